//! Sealing, sending, receiving and installing; every byte of a file counts.

use eggs_consensus_core::Membership;
use eggs_machine::hash::StateHash;
use eggs_proto::StoreId;

use super::*;

const GROUP: GroupId = GroupId(3);

fn rows(n: u32) -> Vec<Row> {
    (0..n).map(|n| (Bytes::from(format!("key{n:05}")), Bytes::from(vec![7; n as usize % 50]))).collect()
}

fn meta(index: u64, rows: &[Row]) -> SnapshotMeta {
    let mut hash = StateHash::default();
    for (key, value) in rows {
        hash.insert(key, value);
    }
    let membership = Membership { voters: vec![StoreId(1), StoreId(u64::MAX)], learners: vec![], index: 4 };
    SnapshotMeta { index, term: 2, hash, bytes: 9, membership }
}

fn seal(files: &mut SnapshotFiles, meta: &SnapshotMeta) -> Result<(), StorageError> {
    while !files.seal(meta.clone())? {
        std::thread::yield_now();
    }
    Ok(())
}

fn take(files: &mut SnapshotFiles, index: u64, rows: &[Row]) -> SnapshotMeta {
    let meta = meta(index, rows);
    files.begin(GROUP).unwrap();
    for page in rows.chunks(200) {
        files.add(page).unwrap();
    }
    seal(files, &meta).unwrap();
    meta
}

fn try_read(files: &SnapshotFiles) -> Result<Vec<Row>, StorageError> {
    let (mut read, mut at) = (Vec::new(), 0);
    loop {
        let (rows, next) = files.page(GROUP, at)?;
        read.extend(rows);
        match next {
            Some(next) => at = next,
            None => return Ok(read),
        }
    }
}

fn read(files: &SnapshotFiles) -> Vec<Row> {
    try_read(files).unwrap()
}

fn install(files: &mut SnapshotFiles, at: At) -> Result<SnapshotMeta, StorageError> {
    loop {
        if let Some(meta) = files.install(GROUP, at)? {
            return Ok(meta);
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_sealed_snapshot_reads_back_and_replaces_the_older() {
    let directory = tempfile::tempdir().unwrap();
    let mut files = SnapshotFiles::open(directory.path().join("snapshots")).unwrap();
    assert_eq!(files.latest(GROUP).unwrap(), None);
    for index in [10, 20] {
        let rows = rows(500 + u32::try_from(index).unwrap());
        let meta = take(&mut files, index, &rows);
        assert_eq!(files.latest(GROUP).unwrap(), Some(meta));
        assert_eq!(read(&files), rows);
    }
    // One that took longer than another's way here.
    files.begin(GROUP).unwrap();
    assert!(seal(&mut files, &meta(15, &[])).is_err());
    assert_eq!(files.latest(GROUP).unwrap().unwrap().index, 20);
    files.remove(GROUP).unwrap();
    assert_eq!(files.latest(GROUP).unwrap(), None);
    assert_eq!(fs::read_dir(directory.path().join("snapshots")).unwrap().count(), 0);
}

#[test]
fn any_flipped_or_missing_byte_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let mut files = SnapshotFiles::open(directory.path().to_owned()).unwrap();
    let at = (1, 2);
    take(&mut files, 1, &rows(5));
    let (path, incoming) = (files.path(GROUP), files.incoming_path(GROUP, at));
    let good = fs::read(&path).unwrap();
    let whole = |files: &SnapshotFiles| files.latest(GROUP).and_then(|_| try_read(files));
    whole(&files).unwrap();
    let check = |files: &mut SnapshotFiles, bad: &[u8], what: &str| {
        fs::write(&path, bad).unwrap();
        assert!(whole(files).is_err(), "{what}");
        fs::remove_file(&path).unwrap();
        fs::write(&incoming, bad).unwrap();
        let error = install(files, at).unwrap_err();
        assert!(error.is_of_state(), "{what}: {error}");
        assert!(!incoming.exists() && !path.exists(), "{what}");
    };
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        check(&mut files, &bad, &format!("byte {at} flipped"));
        check(&mut files, &good[..at], &format!("cut at {at}"));
    }
    check(&mut files, &[&good[..], &[0]].concat(), "longer");
    fs::write(&incoming, &good).unwrap();
    install(&mut files, at).unwrap();
    whole(&files).unwrap();
}

#[test]
fn other_versions_are_refused_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let mut files = SnapshotFiles::open(directory.path().to_owned()).unwrap();
    take(&mut files, 1, &rows(5));
    let path = files.path(GROUP);
    for version in [1, 3] {
        let mut bytes = fs::read(&path).unwrap();
        bytes[8] = version;
        fs::write(&path, bytes).unwrap();
        let error = files.latest(GROUP).unwrap_err().to_string();
        assert!(error.contains(&format!("version {version}, this build reads version 2")), "{error}");
    }
}

#[test]
fn pieces_make_the_same_snapshot_elsewhere_also_across_a_restart() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut from = SnapshotFiles::open(here.path().to_owned()).unwrap();
    let mut to = SnapshotFiles::open(there.path().to_owned()).unwrap();
    let rows = rows(3000);
    let meta = take(&mut from, 77, &rows);
    let at = (77, 2);
    assert_eq!(from.piece(GROUP, (77, 3), 0, 100).unwrap(), None);
    assert_eq!(from.piece(GroupId(4), at, 0, 100).unwrap(), None);
    // What is left of an older one goes.
    to.receive(GROUP, (5, 1), 0, b"old").unwrap();
    let mut pieces = 0;
    loop {
        let offset = to.received(GROUP, at).unwrap();
        let piece = from.piece(GROUP, at, offset, 10_000).unwrap().unwrap();
        if offset == piece.total {
            break;
        }
        to.receive(GROUP, at, offset, &piece.bytes).unwrap();
        for wrong in [offset, offset + 1] {
            if wrong != 0 {
                assert!(to.receive(GROUP, at, wrong, b"x").unwrap_err().is_of_state());
            }
        }
        pieces += 1;
        if pieces == 3 {
            to = SnapshotFiles::open(there.path().to_owned()).unwrap();
            assert_eq!(to.received(GROUP, at).unwrap(), 30_000);
            assert_eq!(to.received(GROUP, (5, 1)).unwrap(), 0);
        }
    }
    assert!(pieces > 3);
    assert_eq!(to.latest(GROUP).unwrap(), None);
    assert_eq!(install(&mut to, at).unwrap(), meta);
    assert_eq!(install(&mut to, at).unwrap(), meta);
    assert_eq!(to.latest(GROUP).unwrap(), Some(meta));
    assert_eq!(read(&to), rows);
    assert!(to.receive(GROUP, (78, 2), 10, b"x").unwrap_err().is_of_state());
    assert!(install(&mut to, (78, 2)).unwrap_err().is_of_state());
    to.receive(GROUP, (78, 2), 0, b"x").unwrap();
    to.remove(GROUP).unwrap();
    assert_eq!(fs::read_dir(there.path()).unwrap().count(), 0);
}
