//! What a crash, a power cut, a lost journal or a failing disk leaves.

use super::*;

fn journal(folder: &Path) -> PathBuf {
    folder.join("journal")
}

#[test]
fn without_a_journal_the_segments_tell_everything() {
    let (folder, store) = disk();
    let mut all = blocks(&LENGTHS);
    for (id, bytes) in &all {
        write(&store, *id, bytes).unwrap();
    }
    for n in [7, 4, 1] {
        store.erase(all.remove(n).0).unwrap();
    }
    drop(store);
    let damages: [fn(&Path); 4] = [
        |path| fs::remove_file(path).unwrap(),
        |path| fs::write(path, b"").unwrap(),
        |path| fs::write(path, vec![7; 1000]).unwrap(),
        // An entry in the middle.
        |path| fs::File::options().write(true).open(path).unwrap().write_all_at(b"?", 100).unwrap(),
    ];
    for damage in damages {
        damage(&journal(folder.path()));
        let store = open(folder.path());
        holds_still(&store, &all);
        drop(store);
        // It was written anew.
        let bytes = fs::read(journal(folder.path())).unwrap();
        assert_eq!(bytes.len(), 32 * (1 + all.len()));
        holds_still(&open(folder.path()), &all);
    }
}

#[test]
fn a_torn_end_of_the_journal_loses_nothing() {
    let (folder, store) = disk();
    let mut all = blocks(&LENGTHS);
    for (id, bytes) in &all {
        write(&store, *id, bytes).unwrap();
    }
    store.erase(all.remove(3).0).unwrap();
    let length = fs::metadata(journal(folder.path())).unwrap().len();
    for cut in [0, 31, 32, 33, 100, 160, length - 33, length - 1] {
        let copy = copied(folder.path());
        // What was not made durable: here even the erasure, whose header says it too.
        fs::File::options().write(true).open(journal(copy.path())).unwrap().set_len(cut).unwrap();
        holds_still(&open(copy.path()), &all);
    }
}

#[test]
fn what_was_not_durable_is_whole_or_not_there() {
    let (folder, store) = disk();
    let kept = blocks(&[5000, 70_000, 300_000]);
    for (id, bytes) in &kept {
        write(&store, *id, bytes).unwrap();
    }
    let known = fs::read(journal(folder.path())).unwrap();
    let late = [100, 9000, 66_000].into_iter().enumerate();
    let late: Vec<_> = late.map(|(n, length)| (block(100 + n as u64), contents(9, length))).collect();
    for (id, bytes) in &late {
        write(&store, *id, bytes).unwrap();
    }
    let lies: Vec<_> = late.iter().map(|(id, _)| place(&store, *id)).collect();
    // Of the late ones any pages may be missing, and the journal does not know them.
    for torn in 0..late.len() {
        for part in 0..3 {
            let copy = copied(folder.path());
            fs::write(journal(copy.path()), &known).unwrap();
            let extent = lies[torn].extent();
            let (from, to) = match part {
                0 => (extent.offset, extent.data_at),
                1 => (extent.data_at, extent.end),
                _ => (extent.data_at + (extent.end - extent.data_at) / 2, extent.end),
            };
            let zeros = vec![0; (to - from) as usize];
            segment_of(copy.path(), lies[torn]).write_all_at(&zeros, from.into()).unwrap();
            let mut expected: Vec<_> = kept.iter().chain(&late).cloned().collect();
            expected.remove(kept.len() + torn);
            let store = open(copy.path());
            holds_still(&store, &expected);
            // And it can be written again.
            write(&store, late[torn].0, &late[torn].1).unwrap();
            drop(store);
            fs::remove_file(journal(copy.path())).unwrap();
            let all: Vec<_> = kept.iter().chain(&late).cloned().collect();
            holds_still(&open(copy.path()), &all);
        }
    }
}

#[test]
fn what_is_arriving_when_it_stops_is_gone_and_hides_nothing() {
    let (folder, store) = disk();
    let bytes = Bytes::from(contents(1, 2_000_000));
    let mut arriving = begin(&store, block(1), &bytes);
    arriving.append(&bytes.slice(..900_000)).unwrap();
    let kept = contents(2, 1_000_000);
    write(&store, block(2), &kept).unwrap();
    let copy = copied(folder.path());
    arriving.append(&bytes.slice(900_000..1_800_000)).unwrap();
    arriving.append(&bytes.slice(1_800_000..)).unwrap();
    arriving.finish().unwrap();
    assert_eq!(listed(&store), [block(1), block(2)]);
    for lose_journal in [false, true] {
        if lose_journal {
            let _ = fs::remove_file(journal(copy.path()));
        }
        let store = open(copy.path());
        assert_eq!(listed(&store), [block(2)]);
        assert_eq!(read(&store, block(2)).unwrap(), kept);
    }
}

/// Without compaction: a copy of many files is not of one instant, and a block that moves may be in neither.
#[test]
fn a_disk_copied_at_any_moment_holds_all_that_was_proved() {
    let (folder, store) = disk();
    drop(store);
    let store = open_small(folder.path());
    let done = Mutex::new(HashSet::new());
    let erased = Mutex::new(HashSet::new());
    std::thread::scope(|scope| {
        let writer = |thread: u64| {
            let (store, done, erased) = (&store, &done, &erased);
            move || {
                for n in 0..60 {
                    let id = block(thread * 1000 + n);
                    let length = if n % 7 == 0 { 300_000 } else { 2000 + 100 * n as usize };
                    write(store, id, &contents(id.0, length)).unwrap();
                    lock(done).insert((id, length));
                    if n % 3 == 0 {
                        lock(done).remove(&(id, length));
                        store.erase(id).unwrap();
                        lock(erased).insert(id);
                    }
                }
            }
        };
        let writers: Vec<_> = (0..3).map(|thread| scope.spawn(writer(thread))).collect();
        let mut copies = 0;
        while copies < 8 || writers.iter().any(|writer| !writer.is_finished()) {
            let (before, gone) = (lock(&done).clone(), lock(&erased).clone());
            let copy = copied(folder.path());
            let crashed = open_small(copy.path());
            let after = lock(&done).clone();
            for (id, length) in before.intersection(&after) {
                assert_eq!(read(&crashed, *id).unwrap(), contents(id.0, *length), "{id}");
            }
            for id in gone {
                assert_eq!(code(crashed.read(id)), Some(BlockError::UnknownBlock), "{id}");
            }
            copies += 1;
        }
    });
}

#[test]
fn a_failed_sync_is_not_believed_again() {
    let (folder, store) = disk();
    drop(store);
    let (store, faults) = open_faulty(folder.path());
    for length in [300, 300_000] {
        let first = block(length as u64);
        write(&store, first, &contents(1, length)).unwrap();
        let fault =
            Fault { on: Doing::Sync, file: ".seg", delay: Duration::ZERO, error: Some(Errno::IO), times: 1 };
        faults.set(vec![fault]);
        let id = block(length as u64 + 1);
        assert_eq!(code(write(&store, id, &contents(2, length))), Some(BlockError::Io));
        assert_eq!(code(store.read(id)), Some(BlockError::UnknownBlock));
        // The next one goes elsewhere.
        write(&store, id, &contents(2, length)).unwrap();
        assert_ne!(place(&store, id).segment, place(&store, first).segment);
        assert_eq!(read(&store, first).unwrap(), contents(1, length));
    }
    let left = listed(&store);
    drop(store);
    assert_eq!(listed(&open(folder.path())), left);
}

#[test]
fn a_failing_journal_erases_nothing_and_is_written_anew() {
    let (folder, store) = disk();
    drop(store);
    for on in [Doing::Write, Doing::Sync] {
        let (store, faults) = open_faulty(folder.path());
        write(&store, block(1), b"one").unwrap();
        write(&store, block(2), b"two").unwrap();
        let fault = Fault { on, file: "journal", delay: Duration::ZERO, error: Some(Errno::IO), times: 1 };
        faults.set(vec![fault]);
        assert_eq!(code(store.erase(block(1))), Some(BlockError::Io));
        assert_eq!(code(store.erase(block(1))), Some(BlockError::Io));
        assert_eq!(read_bytes(&store, block(2)), b"two");
        store.maintain(&|| false).unwrap();
        store.erase(block(1)).unwrap();
        write(&store, block(3), b"three").unwrap();
        drop(store);
        let store = open(folder.path());
        assert_eq!(listed(&store), [block(3), block(2)]);
        store.erase(block(3)).unwrap();
    }
}

fn read_bytes(store: &Store, id: BlockId) -> Vec<u8> {
    let block = store.read(id).unwrap();
    block.read_at(0, block.size()).unwrap().to_vec()
}

#[test]
fn places_that_cannot_be_read_cost_only_their_blocks() {
    let (folder, store) = disk();
    drop(store);
    let (store, faults) = open_faulty(folder.path());
    let bytes = contents(1, 5000);
    for n in 1..4 {
        write(&store, block(n), &bytes).unwrap();
    }
    let eio = |times| {
        let error = Some(Errno::IO);
        vec![Fault { on: Doing::Read, file: ".seg", delay: Duration::ZERO, error, times }]
    };
    faults.set(eio(1));
    assert_eq!(code(read(&store, block(1))), Some(BlockError::Io));
    assert_eq!(read(&store, block(1)).unwrap(), bytes);
    drop(store);
    // A disk of which nothing can be read does not open as an empty one.
    let faults = Arc::new(Faults::default());
    faults.set(eio(u32::MAX));
    fs::remove_file(journal(folder.path())).unwrap();
    let options = Options { faults: Some(faults), ..Options::default() };
    let refused = Store::open(folder.path(), CLUSTER, options);
    assert!(refused.unwrap_err().problem.is_loss());
    assert_eq!(listed(&open(folder.path())).len(), 3);
}

#[test]
fn a_segment_that_is_gone_takes_only_its_blocks_along() {
    let (folder, store) = disk();
    write(&store, block(1), b"small").unwrap();
    write(&store, block(2), &contents(1, 300_000)).unwrap();
    let lies = place(&store, block(2));
    drop(store);
    fs::remove_file(folder.path().join("segments").join(segment_name(lies.segment))).unwrap();
    let store = open(folder.path());
    assert_eq!(listed(&store), [block(1)]);
    // Its number is not used again.
    write(&store, block(2), &contents(1, 300_000)).unwrap();
    assert!(place(&store, block(2)).segment > lies.segment);
}

#[test]
fn rotten_headers_cost_nothing_while_the_journal_knows_their_blocks() {
    let (folder, store) = disk();
    let all = blocks(&[100, 5000, 400_000]);
    for (id, bytes) in &all {
        write(&store, *id, bytes).unwrap();
    }
    for (id, _) in &all {
        let lies = place(&store, *id);
        segment_of(folder.path(), lies).write_all_at(b"rot", lies.offset.into()).unwrap();
    }
    drop(store);
    for _ in 0..2 {
        let store = open(folder.path());
        for (id, bytes) in &all {
            let block = store.read(*id).unwrap();
            assert_eq!(block.read_at(0, block.size()).unwrap(), bytes);
            // A scrub sees it.
            assert_eq!(code(block.verify()), Some(BlockError::Corrupt));
        }
    }
    let store = open(folder.path());
    for (id, bytes) in &all {
        write(&store, *id, bytes).unwrap();
    }
    drop(store);
    holds_still(&open(folder.path()), &all);
}
