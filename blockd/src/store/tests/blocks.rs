//! Blocks go in, come out, are damaged and erased.

use super::*;

#[test]
fn blocks_read_back_over_a_restart() {
    let (folder, store) = disk();
    let all = blocks(&LENGTHS);
    for (id, bytes) in &all {
        assert_eq!(write(&store, *id, bytes).unwrap(), admission(*id, bytes).proof);
    }
    let totals = store.totals();
    holds_still(&store, &all);
    drop(store);
    let store = open(folder.path());
    holds_still(&store, &all);
    assert_eq!(store.totals().used_bytes, totals.used_bytes);
    for (id, bytes) in &all {
        let block = store.read(*id).unwrap();
        assert_eq!(block.read_at(0, 0).unwrap(), Bytes::new());
        assert_eq!(block.read_at(block.size() - 1, 1).unwrap(), bytes[bytes.len() - 1..]);
        let (from, to) = (bytes.len() / 3, bytes.len() - bytes.len() / 4);
        assert_eq!(block.read_at(from as u32, (to - from) as u32).unwrap(), bytes[from..to]);
    }
    let used: u64 = all.iter().map(|(id, _)| place(&store, *id).extent().bytes()).sum();
    assert_eq!((totals.blocks, totals.used_bytes), (all.len() as u64, used));
}

#[test]
fn what_is_not_whole_and_right_is_not_there() {
    for length in [5000, 400_000] {
        let (folder, store) = disk();
        let (id, bytes) = (block(1), Bytes::from(contents(1, length)));

        let mut short = begin(&store, id, &bytes);
        short.append(&bytes.slice(..length - 1)).unwrap();
        assert_eq!(code(short.finish()), Some(BlockError::WrongSize));

        let mut long = begin(&store, id, &bytes);
        long.append(&bytes).unwrap();
        assert_eq!(code(long.append(&Bytes::from_static(b"x"))), Some(BlockError::WrongSize));
        drop(long);

        let mut flipped = begin(&store, id, &bytes);
        let mut wrong = bytes.to_vec();
        wrong[2500] ^= 1;
        flipped.append(&wrong.clone().into()).unwrap();
        assert_eq!(code(flipped.finish()), Some(BlockError::WrongCrc));

        let many = Wanted { admission: admission(id, &bytes), data: wrong.into() };
        assert_eq!(code(store.write_many(vec![many]).remove(0)), Some(BlockError::WrongCrc));

        assert_eq!(code(store.read(id)), Some(BlockError::UnknownBlock));
        assert_eq!(store.totals().blocks, 0);
        assert_eq!(store.promised.load(Ordering::Relaxed), 0);
        write(&store, id, &bytes).unwrap();
        drop(store);
        assert_eq!(read(&open(folder.path()), id).unwrap(), bytes);
    }
}

#[test]
fn a_repeated_write_gets_the_same_proof_and_other_contents_are_refused() {
    let (_folder, store) = disk();
    let (id, bytes) = (block(1), contents(1, 5000));
    let proof = write(&store, id, &bytes).unwrap();
    match store.begin(admission(id, &bytes)).unwrap() {
        Begun::Stored(again) => assert_eq!(again, proof),
        Begun::Arriving(_) => panic!("written twice"),
    }
    assert_eq!(store.write_many(vec![wanted(id, &bytes)]).remove(0).unwrap(), proof);
    assert_eq!(code(store.begin(admission(id, &contents(2, 5000)))), Some(BlockError::WrongCrc));
    assert_eq!(code(store.begin(admission(id, &contents(1, 4999)))), Some(BlockError::WrongCrc));
    assert_eq!(read(&store, id).unwrap(), bytes);
    assert_eq!(store.totals().blocks, 1);
}

#[test]
fn many_blocks_share_one_sync() {
    let (folder, store) = disk();
    write(&store, block(9999), b"opens the segment").unwrap();
    let all: Vec<_> = (0..1000).map(|n| (block(n), contents(n, 1 + 7 * n as usize))).collect();
    let before = store.counters.syncs.load(Ordering::Relaxed);
    let results = store.write_many(all.iter().map(|(id, bytes)| wanted(*id, bytes)).collect());
    for ((id, bytes), result) in all.iter().zip(results) {
        assert_eq!(result.unwrap(), admission(*id, bytes).proof);
    }
    assert_eq!(store.counters.syncs.load(Ordering::Relaxed), before + 1);
    let crashed = open(copied(folder.path()).path());
    for (id, bytes) in &all {
        assert_eq!(&read(&store, *id).unwrap(), bytes);
        assert_eq!(&read(&crashed, *id).unwrap(), bytes);
    }
    // All are erased with one sync too.
    let before = store.counters.syncs.load(Ordering::Relaxed);
    let ids: Vec<_> = all.iter().map(|(id, _)| *id).collect();
    store.erase_many(&ids).into_iter().for_each(|result| result.unwrap());
    assert_eq!(store.counters.syncs.load(Ordering::Relaxed), before + 1);
    assert_eq!(listed(&store), [block(9999)]);
    assert_eq!(listed(&open(copied(folder.path()).path())), [block(9999)]);
}

#[test]
fn in_one_request_each_block_stands_for_itself() {
    let (_folder, store) = disk();
    let bytes = contents(1, 5000);
    write(&store, block(1), &bytes).unwrap();
    let arriving = begin(&store, block(2), &bytes);
    let results = store.write_many(vec![
        wanted(block(1), &bytes),
        wanted(block(1), b"other"),
        wanted(block(2), &bytes),
        wanted(block(3), &bytes),
        wanted(block(3), &bytes),
    ]);
    let codes: Vec<_> = results.into_iter().map(code).collect();
    use BlockError::{Busy, WrongCrc};
    assert_eq!(codes, [None, Some(WrongCrc), Some(Busy), None, Some(Busy)]);
    let results = store.erase_many(&[block(1), block(1), block(2), block(4)]);
    assert_eq!(results.into_iter().map(code).collect::<Vec<_>>(), [None, None, Some(Busy), None]);
    drop(arriving);
    assert_eq!(listed(&store), [block(3)]);
}

#[test]
fn a_repeated_write_mends_a_damaged_block() {
    for length in [5000, 400_000] {
        let (folder, store) = disk();
        let (id, bytes) = (block(1), contents(1, length));
        write(&store, block(2), b"before").unwrap();
        write(&store, id, &bytes).unwrap();
        // Its bytes, its header, its checksums.
        let damages: [fn(Extent) -> u32; 3] =
            [|extent| extent.data_at + 77, |extent| extent.offset + 20, |extent| extent.sums_at()];
        for damage in damages {
            let lies = place(&store, id);
            segment_of(folder.path(), lies).write_all_at(b"?!", damage(lies.extent()).into()).unwrap();
            assert_eq!(code(read(&store, id)), Some(BlockError::Corrupt));
            write(&store, id, &bytes).unwrap();
            assert_eq!(read(&store, id).unwrap(), bytes);
            assert_ne!(place(&store, id), lies);
            assert_eq!(store.totals().blocks, 2);
        }
        drop(store);
        fs::remove_file(folder.path().join("journal")).unwrap();
        let store = open(folder.path());
        assert_eq!(read(&store, id).unwrap(), bytes);
        assert_eq!(store.totals().blocks, 2);
    }
}

#[test]
fn every_damage_of_a_block_is_found() {
    let (folder, store) = disk();
    let (id, bytes) = (block(1), contents(1, 300));
    write(&store, id, &bytes).unwrap();
    write(&store, block(2), &bytes).unwrap();
    let extent = place(&store, id).extent();
    let segment = segment_of(folder.path(), place(&store, id));
    for at in u64::from(extent.offset)..u64::from(extent.data_at) + 300 {
        let mut byte = [0];
        segment.read_exact_at(&mut byte, at).unwrap();
        segment.write_all_at(&[byte[0] ^ (1 << (at % 8))], at).unwrap();
        assert_eq!(code(read(&store, id)), Some(BlockError::Corrupt), "byte {at}");
        segment.write_all_at(&byte, at).unwrap();
    }
    assert_eq!(read(&store, id).unwrap(), bytes);
    // Only the page that is damaged cannot be read.
    let (id, bytes) = (block(3), contents(3, 20_000));
    write(&store, id, &bytes).unwrap();
    let at = place(&store, id).extent().data_at + 5000;
    segment.write_all_at(b"rot", at.into()).unwrap();
    let damaged = store.read(id).unwrap();
    assert_eq!(damaged.read_at(0, 4096).unwrap(), bytes[..4096]);
    assert_eq!(code(damaged.read_at(4000, 97)), Some(BlockError::Corrupt));
    assert_eq!(code(damaged.read_at(8191, 1)), Some(BlockError::Corrupt));
    assert_eq!(damaged.read_at(8192, 20_000 - 8192).unwrap(), bytes[8192..]);
    assert_eq!(code(damaged.check(20_000, crc32fast::hash(&bytes))), Some(BlockError::Corrupt));
    // Another block's bytes in the place of these are not taken for them.
    let other = place(&store, block(2)).extent();
    let mut record = vec![0; other.bytes() as usize];
    segment.read_exact_at(&mut record, other.offset.into()).unwrap();
    segment.write_all_at(&record, extent.offset.into()).unwrap();
    assert_eq!(code(store.read(block(1)).unwrap().read_at(0, 300)), Some(BlockError::Corrupt));
    segment.set_len(10).unwrap();
    assert_eq!(code(read(&store, block(2))), Some(BlockError::Corrupt));
}

#[test]
fn a_check_says_what_is_wrong() {
    let (_folder, store) = disk();
    let bytes = contents(1, 100_000);
    write(&store, block(1), &bytes).unwrap();
    let (found, crc) = (store.read(block(1)).unwrap(), crc32fast::hash(&bytes));
    found.check(100_000, crc).unwrap();
    assert_eq!(code(found.check(99_999, crc)), Some(BlockError::WrongSize));
    assert_eq!(code(found.check(100_000, crc ^ 1)), Some(BlockError::WrongCrc));
}

#[test]
fn erasing_is_idempotent_and_gives_the_room_back() {
    let (folder, store) = disk();
    let (id, bytes) = (block(1), contents(1, 3_000_000));
    store.erase(id).unwrap();
    write(&store, block(2), &bytes[..300_000]).unwrap();
    write(&store, id, &bytes).unwrap();
    assert_eq!(store.totals().blocks, 2);
    let on_disk = || {
        use std::os::unix::fs::MetadataExt;
        let entries = fs::read_dir(folder.path().join("segments")).unwrap();
        entries.map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum::<u64>()
    };
    let full = on_disk();
    let held = store.read(id).unwrap();
    store.erase(id).unwrap();
    store.erase(id).unwrap();
    assert_eq!(code(held.read_at(0, 100)), Some(BlockError::UnknownBlock));
    assert_eq!(code(store.read(id)), Some(BlockError::UnknownBlock));
    assert!(on_disk() <= full - 2_900_000, "{full} {}", on_disk());
    let totals = store.totals();
    assert_eq!(totals.blocks, 1);
    assert!(totals.dead_bytes < 20_000, "{totals:?}");
    drop(held);
    drop(store);
    assert_eq!(listed(&open(folder.path())), [block(2)]);
}

#[test]
fn one_block_is_written_or_erased_by_one_at_a_time() {
    let (_folder, store) = disk();
    for length in [5000, 400_000] {
        let (id, bytes) = (block(length as u64), contents(1, length));
        let incoming = begin(&store, id, &bytes);
        assert_eq!(code(store.begin(admission(id, &bytes))), Some(BlockError::Busy));
        assert_eq!(code(store.erase(id)), Some(BlockError::Busy));
        begin(&store, block(2), &bytes);
        drop(incoming);
        write(&store, id, &bytes).unwrap();
    }
}

#[test]
fn many_writers_do_not_disturb_each_other() {
    let (folder, store) = disk();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let store = &store;
            scope.spawn(move || {
                for n in 0..20 {
                    let (id, bytes) = (block(thread * 100 + n), contents(n, 3000 + n as usize));
                    write(store, id, &bytes).unwrap();
                    assert_eq!(read(store, id).unwrap(), bytes);
                    if n % 2 == 0 {
                        store.erase(id).unwrap();
                    }
                }
            });
        }
    });
    let totals = store.totals();
    assert_eq!(totals.blocks, 80);
    let waiters = store.counters.sync_waiters.load(Ordering::Relaxed);
    assert!(store.counters.syncs.load(Ordering::Relaxed) <= waiters);
    let left = listed(&store);
    drop(store);
    let store = open(folder.path());
    assert_eq!(listed(&store), left);
    assert_eq!(store.totals().used_bytes, totals.used_bytes);
}
