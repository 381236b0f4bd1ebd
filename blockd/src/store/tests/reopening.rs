//! What the next opening makes of what a stop left: no good copy is given up for a worse one, and nothing before
//! what takes its place is durable.

use super::incoming::Streamed;
use super::*;

fn fault(on: Doing, file: &'static str, error: Option<Errno>, times: u32) -> Fault {
    Fault { on, file, delay: Duration::ZERO, error, times }
}

fn try_open(path: &Path, faults: Vec<Fault>) -> Result<Arc<Store>, OpenError> {
    let ordered = Arc::new(Faults::default());
    ordered.set(faults);
    let options = Options { segment_bytes: Some(1 << 20), faults: Some(ordered), ..Options::default() };
    Store::open(path, CLUSTER, options)
}

/// A disk with the journal it had at some time before.
fn copied_with(folder: &Path, journal: &[u8]) -> TempDir {
    let copy = copied(folder);
    fs::write(copy.path().join("journal"), journal).unwrap();
    copy
}

fn journal(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("journal")).unwrap()
}

/// A large block as a crash finds it after it was moved: marked where it lay, and the journal does not know of its
/// copy. And where it lay.
fn moved() -> (TempDir, Vec<(BlockId, Vec<u8>)>, Place) {
    let (folder, store) = disk();
    drop(store);
    let store = open_small(folder.path());
    let all = blocks(&[700_000, 900_000, 300_000]);
    for (id, bytes) in &all {
        write(&store, *id, bytes).unwrap();
    }
    let lay = place(&store, all[0].0);
    let known = journal(folder.path());
    let (file, kept) = (segment_path(folder.path(), lay.segment), folder.path().join("kept"));
    fs::hard_link(&file, &kept).unwrap();
    assert!(store.compact(lay.segment, &|| false).unwrap());
    assert_ne!(place(&store, all[0].0), lay);
    let copy = copied_with(folder.path(), &known);
    fs::copy(kept, segment_path(copy.path(), lay.segment)).unwrap();
    (copy, all, lay)
}

#[test]
fn a_copy_without_its_checksums_does_not_take_the_place_of_the_original() {
    let (folder, store) = disk();
    let all = blocks(&[300_000, 700_000]);
    for (id, bytes) in &all {
        write(&store, *id, bytes).unwrap();
    }
    let (id, bytes) = &all[1];
    let lies = place(&store, *id);
    let mut copy = Streamed::begin(&store, Record::block(*id, lies.size, lies.crc)).unwrap();
    copy.write(0, bytes).unwrap();
    for lose_journal in [false, true] {
        let stopped = copied(folder.path());
        if lose_journal {
            fs::remove_file(stopped.path().join("journal")).unwrap();
        }
        for _ in 0..2 {
            holds_still(&open(stopped.path()), &all);
        }
    }
}

#[test]
fn a_copy_takes_the_place_of_a_marked_original() {
    let (folder, all, lay) = moved();
    for _ in 0..2 {
        let store = open_small(folder.path());
        holds_still(&store, &all);
        assert_ne!(place(&store, all[0].0), lay);
    }
}

#[test]
fn a_copy_is_durable_before_the_original_is_given_up() {
    let (folder, all, lay) = moved();
    let refused = try_open(folder.path(), vec![fault(Doing::Sync, ".seg", Some(Errno::IO), 1)]);
    assert!(refused.unwrap_err().problem.is_loss());
    let mut bytes = vec![0; lay.size as usize];
    segment_of(folder.path(), lay).read_exact_at(&mut bytes, lay.extent().data_at.into()).unwrap();
    assert!(bytes == all[0].1);
    holds_still(&open_small(folder.path()), &all);
}

#[test]
fn a_copy_that_was_never_durable_is_not_preferred() {
    let (folder, store) = disk();
    drop(store);
    let (store, faults) = open_faulty(folder.path());
    for (n, length) in [300, 300_000].into_iter().enumerate() {
        let (id, bytes) = (block(n as u64), contents(2, length));
        faults.set(vec![fault(Doing::Sync, ".seg", Some(Errno::IO), 1)]);
        assert_eq!(code(write(&store, id, &bytes)), Some(BlockError::Io));
        write(&store, id, &bytes).unwrap();
        for lose_journal in [false, true] {
            let copy = copied(folder.path());
            if lose_journal {
                fs::remove_file(copy.path().join("journal")).unwrap();
            }
            let again = open(copy.path());
            assert_eq!(place(&again, id), place(&store, id));
            assert_eq!(read(&again, id).unwrap(), bytes);
        }
    }
}

#[test]
fn an_opening_that_stops_half_way_tells_the_old_journal_nothing() {
    let (folder, store) = disk();
    drop(store);
    let store = open_small(folder.path());
    let known = journal(folder.path());
    // More than half of a segment, so that the opening seals it.
    let all = blocks(&[200_000, 200_000, 200_000, 700_000]);
    for (id, bytes) in &all {
        write(&store, *id, bytes).unwrap();
    }
    let copy = copied_with(folder.path(), &known);
    let refused = try_open(copy.path(), vec![fault(Doing::Write, "journal.new", Some(Errno::IO), 1)]);
    assert!(refused.unwrap_err().problem.is_loss());
    assert!(journal(copy.path()) == known);
    // The segments are sealed now, the journal knows nothing of it.
    holds_still(&open_small(copy.path()), &all);
}

#[test]
fn a_read_that_fails_while_a_disk_opens_erases_nothing() {
    let (folder, store) = disk();
    let known = journal(folder.path());
    let all = blocks(&[100, 5000, 300_000]);
    for (id, bytes) in &all {
        write(&store, *id, bytes).unwrap();
    }
    let mut opened = 0;
    for reads in 0.. {
        let copy = copied_with(folder.path(), &known);
        // The first ones go well.
        let fine = fault(Doing::Read, ".seg", None, reads);
        let faults = Arc::new(Faults::default());
        faults.set(vec![fine, fault(Doing::Read, ".seg", Some(Errno::IO), 1)]);
        let options = Options { faults: Some(Arc::clone(&faults)), ..Options::default() };
        let result = Store::open(copy.path(), CLUSTER, options);
        opened += u32::from(result.is_ok());
        drop(result);
        holds_still(&open(copy.path()), &all);
        if !faults.are_left() {
            continue;
        }
        break;
    }
    assert!(opened > 5, "{opened}");
}

#[test]
fn a_full_disk_opens_and_goes_on_when_there_is_room() {
    let (folder, store) = disk();
    let all = blocks(&[100, 5000, 300_000]);
    let known = journal(folder.path());
    for (id, bytes) in &all {
        write(&store, *id, bytes).unwrap();
    }
    let copy = copied_with(folder.path(), &known);
    let store =
        try_open(copy.path(), vec![fault(Doing::Write, "journal.new", Some(Errno::NOSPC), 1)]).unwrap();
    holds_still(&store, &all);
    assert_eq!(code(store.erase(all[0].0)), Some(BlockError::Io));
    store.maintain(&|| false).unwrap();
    store.erase(all[0].0).unwrap();
    drop(store);
    holds_still(&open(copy.path()), &all[1..]);
}

#[test]
fn a_journal_without_a_durable_name_is_written_again() {
    let (folder, store) = disk();
    drop(store);
    let (store, faults) = open_faulty(folder.path());
    let all = blocks(&[100, 5000]);
    write(&store, all[0].0, &all[0].1).unwrap();
    faults.set(vec![fault(Doing::Sync, "the folder", Some(Errno::IO), 1)]);
    assert_eq!(code(store.rewrite_journal()), Some(BlockError::Io));
    // Nothing is proved by a file that has no name.
    assert_eq!(code(store.erase(all[0].0)), Some(BlockError::Io));
    write(&store, all[1].0, &all[1].1).unwrap();
    store.maintain(&|| false).unwrap();
    store.erase(all[0].0).unwrap();
    holds_still(&open(copied(folder.path()).path()), &all[1..]);
}

#[test]
fn a_journal_is_rewritten_in_spite_of_a_failed_segment() {
    let (folder, store) = disk();
    drop(store);
    let (store, faults) = open_faulty(folder.path());
    let all = blocks(&[100, 5000, 7000]);
    write(&store, all[0].0, &all[0].1).unwrap();
    write(&store, all[1].0, &all[1].1).unwrap();
    let lay = place(&store, all[0].0);
    let mut header = [0; 64];
    segment_of(folder.path(), lay).read_exact_at(&mut header, lay.offset.into()).unwrap();
    faults.set(vec![fault(Doing::Sync, ".seg", Some(Errno::IO), 1)]);
    assert_eq!(code(write(&store, all[2].0, &all[2].1)), Some(BlockError::Io));
    store.erase(all[0].0).unwrap();
    for _ in 0..2 {
        store.rewrite_journal().unwrap();
        // A power cut, and the header had never become durable.
        let copy = copied(folder.path());
        segment_of(copy.path(), lay).write_all_at(&header, lay.offset.into()).unwrap();
        holds_still(&open(copy.path()), &all[1..2]);
    }
}

#[test]
fn a_large_block_that_cannot_be_read_does_not_keep_the_others_from_being_moved() {
    let (folder, store) = disk();
    drop(store);
    let faults = Arc::new(Faults::default());
    let options =
        Options { segment_bytes: Some(1 << 20), faults: Some(Arc::clone(&faults)), ..Options::default() };
    let store = open_with(folder.path(), options);
    let all = blocks(&[500_000, 600_000, 300_000]);
    for (id, bytes) in &all {
        write(&store, *id, bytes).unwrap();
    }
    let lay = place(&store, all[0].0);
    assert_eq!(place(&store, all[1].0).segment, lay.segment);
    faults.set(vec![fault(Doing::Read, ".seg", Some(Errno::IO), 1)]);
    assert!(!store.compact(lay.segment, &|| false).unwrap());
    assert_eq!(place(&store, all[0].0), lay);
    assert_ne!(place(&store, all[1].0).segment, lay.segment);
    holds_still(&store, &all);
}

#[test]
fn a_block_named_twice_is_erased_once_and_not_before() {
    let (folder, store) = disk();
    drop(store);
    let (store, faults) = open_faulty(folder.path());
    let named = [block(1), block(1), block(2), block(1)];
    for id in &named {
        write(&store, *id, b"contents").unwrap();
    }
    faults.set(vec![fault(Doing::Sync, "journal", Some(Errno::IO), 1)]);
    for result in store.erase_many(&named) {
        assert_eq!(code(result), Some(BlockError::Io));
    }
    store.maintain(&|| false).unwrap();
    store.erase_many(&named).into_iter().for_each(|result| result.unwrap());
}

#[test]
fn a_block_that_moves_while_it_is_checked_is_not_corrupt() {
    let (_folder, store) = disk();
    let bytes = contents(1, 300_000);
    write(&store, block(1), &bytes).unwrap();
    let checked = store.read(block(1)).unwrap();
    let lies = place(&store, block(1));
    let mut copy = Streamed::begin(&store, Record::block(block(1), lies.size, lies.crc)).unwrap();
    copy.write(0, &bytes).unwrap();
    let mut sums = eggs_blockd_core::record::PageSums::new(block(1), lies.size);
    sums.push(&bytes);
    copy.finish(&sums.finish()).unwrap();
    store.placed(&[(block(1), copy.place)]);
    assert_eq!(code(checked.verify()), Some(BlockError::Busy));
    assert_eq!(read(&store, block(1)).unwrap(), bytes);
}

#[test]
fn what_a_disk_holds_is_told_while_it_hangs() {
    let (_folder, store) = disk();
    write(&store, block(1), b"contents").unwrap();
    let before = store.totals();
    assert_eq!(before.blocks, 1);
    let _hangs = lock(&store.books);
    assert_eq!(store.totals(), before);
}

#[test]
fn a_dying_disk_is_given_up_soon() {
    let (folder, store) = disk();
    write(&store, block(1), &contents(1, 6_000_000)).unwrap();
    let copy = copied(folder.path());
    fs::remove_file(copy.path().join("journal")).unwrap();
    let faults = Arc::new(Faults::default());
    faults.set(vec![fault(Doing::Read, ".seg", Some(Errno::IO), 1000)]);
    let options = Options { faults: Some(Arc::clone(&faults)), ..Options::default() };
    assert!(Store::open(copy.path(), CLUSTER, options).unwrap_err().problem.is_loss());
    assert!(faults.are_left());
}
