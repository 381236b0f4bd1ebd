//! Segments that are mostly dead give their room back, and nothing is lost on the way.

use super::*;

type Blocks = Vec<(BlockId, Vec<u8>)>;

fn never() -> bool {
    false
}

fn segments(folder: &Path) -> usize {
    fs::read_dir(folder.join("segments")).unwrap().count()
}

/// A disk with some sealed segments of small and large blocks.
fn filled() -> (TempDir, Arc<Store>, Blocks) {
    let (folder, store) = disk();
    drop(store);
    let store = open_small(folder.path());
    let mut all = Vec::new();
    for n in 0..120 {
        let length = if n % 10 == 0 { 400_000 } else { 50_000 };
        let (id, bytes) = (block(n), contents(n, length));
        write(&store, id, &bytes).unwrap();
        all.push((id, bytes));
    }
    (folder, store, all)
}

#[test]
fn dead_segments_go_and_half_dead_ones_are_moved() {
    let (folder, store, mut all) = filled();
    let before = segments(folder.path());
    assert!(before > 8, "{before}");
    let mut n = 0;
    all.retain(|(id, _)| {
        n += 1;
        let keep = n % 4 == 0;
        if !keep {
            store.erase(*id).unwrap();
        }
        keep
    });
    let held = store.read(all[3].0).unwrap();
    store.maintain(&never).unwrap();
    holds_still(&store, &all);
    assert!(segments(folder.path()) < before, "{before}");
    assert_eq!(held.read_at(0, 100).unwrap(), all[3].1[..100]);
    drop(held);
    assert!(store.counters.compacted_segments.load(Ordering::Relaxed) > 0);
    let totals = store.totals();
    drop(store);
    let store = open_small(folder.path());
    holds_still(&store, &all);
    assert_eq!(store.totals().used_bytes, totals.used_bytes);
    drop(store);
    fs::remove_file(folder.path().join("journal")).unwrap();
    holds_still(&open_small(folder.path()), &all);
    for (id, _) in &all {
        let store = open_small(folder.path());
        store.erase(*id).unwrap();
    }
    let store = open_small(folder.path());
    store.maintain(&never).unwrap();
    assert_eq!(store.totals().blocks, 0);
    assert!(segments(folder.path()) <= 2);
}

#[test]
fn a_crash_in_mid_compaction_loses_nothing_and_revives_nothing() {
    let (folder, store, all) = filled();
    for (id, _) in all.iter().step_by(2) {
        store.erase(*id).unwrap();
    }
    let kept: Vec<_> = all.iter().skip(1).step_by(2).cloned().collect();
    let victims: Vec<u32> = lock(&store.books)
        .index
        .segments()
        .filter(|(_, used)| used.sealed)
        .map(|(number, _)| number)
        .collect();
    for (n, victim) in victims.into_iter().enumerate() {
        // Stopped after some batches, or not at all.
        let calls = std::cell::Cell::new(0);
        let stop = || {
            calls.set(calls.get() + 1);
            n % 2 == 0 && calls.get() > n
        };
        store.compact(victim, &stop).unwrap();
        let copy = copied(folder.path());
        holds_still(&open_small(copy.path()), &kept);
        fs::remove_file(copy.path().join("journal")).unwrap();
        holds_still(&open_small(copy.path()), &kept);
    }
    holds_still(&store, &kept);
}

#[test]
fn damage_is_moved_as_damage() {
    let (folder, store, all) = filled();
    let hurt = all[5].0;
    let lies = place(&store, hurt);
    segment_of(folder.path(), lies).write_all_at(b"rot", (lies.extent().data_at + 9000).into()).unwrap();
    store.compact(lies.segment, &never).unwrap();
    assert_ne!(place(&store, hurt).segment, lies.segment);
    assert_eq!(code(read(&store, hurt)), Some(BlockError::Corrupt));
    assert_eq!(store.read(hurt).unwrap().read_at(0, 8192).unwrap(), all[5].1[..8192]);
    let others: Vec<_> = all.iter().filter(|(id, _)| *id != hurt).cloned().collect();
    for (id, bytes) in &others {
        assert_eq!(&read(&store, *id).unwrap(), bytes);
    }
}

#[test]
fn the_journal_does_not_grow_for_ever() {
    let (folder, store) = disk();
    let ids: Vec<_> = (0..8000).map(block).collect();
    let all = || ids.iter().map(|id| wanted(*id, b"a few bytes")).collect();
    for _ in 0..5 {
        store.write_many(all()).into_iter().for_each(|result| assert_eq!(result.unwrap().len(), 16));
        store.erase_many(&ids).into_iter().for_each(|result| result.unwrap());
    }
    store.write_many(all()).into_iter().for_each(|result| assert_eq!(result.unwrap().len(), 16));
    let length = || fs::metadata(folder.path().join("journal")).unwrap().len();
    let before = length();
    store.maintain(&never).unwrap();
    assert!(length() < before / 4, "{before} {}", length());
    drop(store);
    assert_eq!(listed(&open(folder.path())).len(), ids.len());
}
