//! Disks that are full or read-only.

use super::*;

#[test]
fn a_full_disk_refuses_and_stays_clean() {
    let Some(tmpfs) = Tmpfs::mount("size=8m") else { return };
    format(tmpfs.0.path(), &identity()).unwrap();
    let store = open(tmpfs.0.path());
    let bytes = contents(1, 1 << 20);
    let mut written = 0;
    let refused = loop {
        match write(&store, block(written), &bytes) {
            Ok(_) => written += 1,
            Err(error) => break error.code(),
        }
    };
    assert_eq!(refused, BlockError::NoSpace);
    // 8 MiB less the reserve of 2 MiB, and the journal.
    assert!((4..=5).contains(&written), "{written}");
    // Room is promised to what is arriving.
    store.erase(block(0)).unwrap();
    let arriving = begin(&store, block(100), &bytes);
    assert_eq!(code(store.begin(admission(block(101), &bytes))), Some(BlockError::NoSpace));
    drop(arriving);
    write(&store, block(101), &bytes).unwrap();

    // Somebody else fills the file system while a block arrives: it has its room already.
    store.erase(block(1)).unwrap();
    let mut arriving = begin(&store, block(102), &bytes);
    let hog = tmpfs.0.path().join("lost+found");
    let _ = fs::write(&hog, vec![1; 8 << 20]);
    assert_eq!(store.space().unwrap().available_bytes(), 0);
    assert_eq!(code(store.begin(admission(block(103), b"x"))), Some(BlockError::NoSpace));
    arriving.append(&bytes.clone().into()).unwrap();
    arriving.finish().unwrap();
    assert_eq!(read(&store, block(2)).unwrap(), bytes);
    // Blocks can be erased although there is no room at all.
    store.erase(block(2)).unwrap();
    fs::remove_file(&hog).unwrap();
    write(&store, block(103), &bytes).unwrap();
    let left = listed(&store);
    drop(store);
    assert_eq!(listed(&open(tmpfs.0.path())), left);
}

#[test]
fn a_disk_that_fills_in_spite_of_its_reserve_leaves_nothing_behind() {
    for size in [300, 5000, 300_000] {
        let Some(tmpfs) = Tmpfs::mount("size=8m") else { return };
        format(tmpfs.0.path(), &identity()).unwrap();
        let (store, faults) = open_faulty(tmpfs.0.path());
        let full =
            |on, times| Fault { on, file: ".seg", delay: Duration::ZERO, error: Some(Errno::NOSPC), times };
        let bytes = contents(1, size);
        write(&store, block(1), &bytes).unwrap();
        for on in [Doing::Write, Doing::Allocate] {
            faults.set(vec![full(on, 1)]);
            let result = code(write(&store, block(2), &bytes));
            // Small blocks do not take their room beforehand.
            if result.is_some() {
                assert_eq!(result, Some(BlockError::NoSpace));
                assert_eq!(listed(&store), [block(1)]);
            }
            faults.set(Vec::new());
            write(&store, block(2), &bytes).unwrap();
            store.erase(block(2)).unwrap();
        }
        drop(store);
        let store = open(tmpfs.0.path());
        assert_eq!(read(&store, block(1)).unwrap(), bytes);
        assert_eq!(listed(&store), [block(1)]);
    }
}

#[test]
fn a_disk_mounted_read_only_has_no_room_but_reads() {
    let Some(tmpfs) = Tmpfs::mount("size=8m") else { return };
    format(tmpfs.0.path(), &identity()).unwrap();
    let store = open(tmpfs.0.path());
    write(&store, block(1), b"kept").unwrap();
    // The kernel does not remount while somebody writes.
    drop(store);
    let remount = |how| Command::new("mount").args(["-o", how]).arg(tmpfs.0.path()).status();
    if !remount("remount,ro").is_ok_and(|status| status.success()) {
        println!("skipped: remounting is not allowed here");
        return;
    }
    let store = open(tmpfs.0.path());
    assert!(store.is_read_only() && store.mounted_read_only());
    assert_eq!(store.space().unwrap().available_bytes(), 0);
    assert_eq!(code(store.begin(admission(block(2), b"more"))), Some(BlockError::NoSpace));
    let refused = store.erase(block(1)).unwrap_err();
    assert!(
        matches!(refused, StoreError::Refused(BlockError::ReadOnly)),
        "nothing is wrong with the disk: {refused}"
    );
    assert_eq!(super::io_error("write")(rustix::io::Errno::ROFS).code(), BlockError::ReadOnly);
    assert_eq!(read(&store, block(1)).unwrap(), b"kept");
    store.maintain(&|| false).unwrap();
    store.check().unwrap();
    assert!(remount("remount,rw").unwrap().success());
    assert!(store.check().unwrap_err().contains("opened again"));
}
