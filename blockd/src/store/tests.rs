//! The store on real files.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

use bytes::Bytes;
use eggs_blockd_core::IdentityError;
use eggs_blockd_core::{HEADER_BYTES, WriteAdmission};
use eggs_proto::{BlockServiceId, ClusterId, ShardId, Time, mac};
use tempfile::TempDir;

use super::format::OpenProblem;
use super::*;

const CLUSTER: ClusterId = ClusterId([1; 16]);

fn identity() -> Identity {
    Identity {
        cluster: CLUSTER,
        service: BlockServiceId(7),
        key: [9; 32],
        formatted_at: Time(1),
        storage_class: 3,
        failure_domain: "rack".into(),
    }
}

fn disk() -> (TempDir, Arc<Store>) {
    let folder = tempfile::tempdir().unwrap();
    format(folder.path(), &identity()).unwrap();
    let store = open(folder.path());
    (folder, store)
}

fn open(path: &Path) -> Arc<Store> {
    Arc::new(Store::open(path, CLUSTER).unwrap())
}

fn problem(path: &Path) -> OpenProblem {
    Store::open(path, CLUSTER).unwrap_err().problem
}

fn block(n: u64) -> BlockId {
    BlockId::new(ShardId((n % 3) as u8), n)
}

fn admission(id: BlockId, bytes: &[u8]) -> WriteAdmission {
    let (size, crc) = (bytes.len() as u32, crc32fast::hash(bytes));
    WriteAdmission {
        block: id,
        size,
        crc,
        proof: mac::write_proof(&[9; 32], BlockServiceId(7), id, size, crc),
    }
}

fn contents(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64).map(|i| (i.wrapping_mul(seed + 3) >> 3) as u8 ^ seed as u8).collect()
}

fn begin(store: &Arc<Store>, id: BlockId, bytes: &[u8]) -> Incoming {
    match store.begin(admission(id, bytes)).unwrap() {
        Begun::Arriving(incoming) => incoming,
        Begun::Stored(_) => panic!("{id} is stored already"),
    }
}

fn write(store: &Arc<Store>, id: BlockId, bytes: &[u8]) -> Result<mac::Mac, StoreError> {
    match store.begin(admission(id, bytes))? {
        Begun::Stored(proof) => Ok(proof),
        Begun::Arriving(mut incoming) => {
            for piece in bytes.chunks(1000) {
                incoming.append(piece)?;
            }
            incoming.finish()
        }
    }
}

fn read(store: &Store, id: BlockId) -> Result<Vec<u8>, StoreError> {
    let block = store.read(id)?;
    block.verify()?;
    Ok(block.read_at(0, block.size())?.to_vec())
}

fn code<T>(result: Result<T, StoreError>) -> Option<BlockError> {
    result.err().map(|error| error.code())
}

fn file_of(folder: &TempDir, id: BlockId) -> PathBuf {
    folder.path().join("blocks").join(BlockPath::new(id).to_string())
}

fn leftovers(folder: &TempDir) -> usize {
    fs::read_dir(folder.path().join("tmp")).unwrap().count()
}

fn scanned(store: &Store) -> Totals {
    store.scan(|| false).unwrap();
    store.totals()
}

#[test]
fn blocks_read_back_over_a_restart() {
    let (folder, store) = disk();
    let all: Vec<_> = [1, 999, 1000, 1001, 4096, 100_000]
        .into_iter()
        .enumerate()
        .map(|(n, length)| (block(n as u64 + 1), contents(n as u64, length)))
        .collect();
    for (id, bytes) in &all {
        assert_eq!(write(&store, *id, bytes).unwrap(), admission(*id, bytes).proof);
    }
    drop(store);
    let store = open(folder.path());
    for (id, bytes) in &all {
        assert_eq!(&read(&store, *id).unwrap(), bytes);
        let block = store.read(*id).unwrap();
        assert_eq!(block.read_at(0, 0).unwrap(), Bytes::new());
        assert_eq!(block.read_at(block.size() - 1, 1).unwrap(), bytes[bytes.len() - 1..]);
    }
    let used: u64 = all.iter().map(|(_, bytes)| u64::from(HEADER_BYTES) + bytes.len() as u64).sum();
    let totals = scanned(&store);
    assert_eq!(totals, Totals { blocks: all.len() as u64, used_bytes: used, complete: true });
    assert_eq!(leftovers(&folder), 0);
}

#[test]
fn what_is_not_whole_and_right_gets_no_name() {
    let (folder, store) = disk();
    let (id, bytes) = (block(1), contents(1, 5000));

    let mut short = begin(&store, id, &bytes);
    short.append(&bytes[..4999]).unwrap();
    assert_eq!(code(short.finish()), Some(BlockError::WrongSize));

    let mut long = begin(&store, id, &bytes);
    long.append(&bytes).unwrap();
    assert_eq!(code(long.append(b"x")), Some(BlockError::WrongSize));
    drop(long);

    let mut flipped = begin(&store, id, &bytes);
    let mut wrong = bytes.clone();
    wrong[2500] ^= 1;
    flipped.append(&wrong).unwrap();
    assert_eq!(code(flipped.finish()), Some(BlockError::WrongCrc));

    assert_eq!(code(store.read(id)), Some(BlockError::UnknownBlock));
    assert_eq!(leftovers(&folder), 0);
    assert_eq!(scanned(&store).blocks, 0);
    assert_eq!(store.promised.load(Ordering::Relaxed), 0);
    write(&store, id, &bytes).unwrap();
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
    assert_eq!(code(store.begin(admission(id, &contents(2, 5000)))), Some(BlockError::WrongCrc));
    assert_eq!(code(store.begin(admission(id, &contents(1, 4999)))), Some(BlockError::WrongCrc));
    assert_eq!(read(&store, id).unwrap(), bytes);
    assert_eq!(scanned(&store).blocks, 1);
}

#[test]
fn a_repeated_write_mends_a_damaged_block() {
    let (folder, store) = disk();
    let (id, bytes) = (block(1), contents(1, 5000));
    scanned(&store);
    write(&store, id, &bytes).unwrap();
    // Its bytes, its header, its length.
    let damages: [fn(&fs::File); 3] = [
        |file| file.write_all_at(b"?", 4096 + 77).unwrap(),
        |file| file.write_all_at(b"?", 20).unwrap(),
        |file| file.set_len(1234).unwrap(),
    ];
    for damage in damages {
        damage(&fs::File::options().write(true).open(file_of(&folder, id)).unwrap());
        assert_eq!(code(read(&store, id)), Some(BlockError::Corrupt));
        write(&store, id, &bytes).unwrap();
        assert_eq!(read(&store, id).unwrap(), bytes);
        assert_eq!(store.totals().blocks, 1);
    }
}

#[test]
fn every_damage_of_a_file_is_found() {
    let (folder, store) = disk();
    let (id, bytes) = (block(1), contents(1, 300));
    write(&store, id, &bytes).unwrap();
    let path = file_of(&folder, id);
    let good = fs::read(&path).unwrap();
    for at in (0..64).chain(4096..good.len()) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        assert_eq!(code(read(&store, id)), Some(BlockError::Corrupt), "byte {at}");
    }
    for length in [0, 1, 63, 64, 4095, 4096, 4097, good.len() - 1, good.len() + 1] {
        let mut bad = good.clone();
        bad.resize(length, 0);
        fs::write(&path, &bad).unwrap();
        assert_eq!(code(read(&store, id)), Some(BlockError::Corrupt), "{length} bytes");
    }
    // Another block's file under this one's name.
    write(&store, block(2), &bytes).unwrap();
    fs::copy(file_of(&folder, block(2)), &path).unwrap();
    assert_eq!(code(read(&store, id)), Some(BlockError::Corrupt));
}

#[test]
fn erasing_is_idempotent() {
    let (folder, store) = disk();
    let (id, bytes) = (block(1), contents(1, 5000));
    store.erase(id).unwrap();
    write(&store, id, &bytes).unwrap();
    write(&store, block(2), &bytes).unwrap();
    assert_eq!(scanned(&store).blocks, 2);
    let held = store.read(id).unwrap();
    store.erase(id).unwrap();
    store.erase(id).unwrap();
    held.verify().unwrap();
    assert_eq!(code(store.read(id)), Some(BlockError::UnknownBlock));
    assert!(!file_of(&folder, id).exists());
    assert_eq!(store.totals(), Totals { blocks: 1, used_bytes: 4096 + 5000, complete: true });
}

#[test]
fn one_block_is_written_or_erased_by_one_at_a_time() {
    let (folder, store) = disk();
    let (id, bytes) = (block(1), contents(1, 5000));
    let incoming = begin(&store, id, &bytes);
    assert_eq!(code(store.begin(admission(id, &bytes))), Some(BlockError::Busy));
    assert_eq!(code(store.erase(id)), Some(BlockError::Busy));
    begin(&store, block(2), &bytes);
    drop(incoming);
    assert_eq!(leftovers(&folder), 0);
    write(&store, id, &bytes).unwrap();
}

#[test]
fn what_a_crash_left_in_tmp_is_removed() {
    let (folder, store) = disk();
    drop(store);
    fs::write(folder.path().join("tmp/0100000000000001.0"), b"half").unwrap();
    let store = open(folder.path());
    assert_eq!(leftovers(&folder), 0);
    write(&store, block(1), b"x").unwrap();
}

#[test]
fn only_empty_folders_are_formatted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/b");
    assert_eq!(inspect(&path).unwrap(), Contents::Absent);
    fs::create_dir_all(path.join("lost+found")).unwrap();
    // As an interrupted formatting leaves it.
    fs::create_dir(path.join("blocks")).unwrap();
    fs::write(path.join("identity.new"), b"half").unwrap();
    assert_eq!(inspect(&path).unwrap(), Contents::Empty);
    assert!(matches!(problem(&path), OpenProblem::NotFormatted));
    format(&path, &identity()).unwrap();
    assert_eq!(inspect(&path).unwrap(), Contents::Disk(identity()));

    // A disk is not formatted again, nor is a folder with anything in it.
    assert!(matches!(format(&path, &identity()).unwrap_err().problem, OpenProblem::NotEmpty));
    for file in ["mine.txt", "blocks/x"] {
        let other = folder.path().join("other");
        fs::create_dir_all(other.join("blocks")).unwrap();
        fs::write(other.join(file), b"precious").unwrap();
        assert!(matches!(inspect(&other).unwrap_err().problem, OpenProblem::NotEmpty));
        assert!(matches!(format(&other, &identity()).unwrap_err().problem, OpenProblem::NotEmpty));
        assert!(!other.join("identity").exists() && !other.join("tmp").exists());
        fs::remove_dir_all(other).unwrap();
    }
}

#[test]
fn what_is_not_our_disk_is_refused_untouched() {
    let (folder, store) = disk();
    assert!(matches!(problem(folder.path()), OpenProblem::InUse));
    drop(store);
    fs::write(folder.path().join("tmp/left"), b"x").unwrap();

    let other = Store::open(folder.path(), ClusterId([2; 16])).unwrap_err();
    assert!(matches!(other.problem, OpenProblem::AnotherCluster { theirs: CLUSTER, .. }), "{other}");

    let file = folder.path().join("identity");
    let good = fs::read(&file).unwrap();
    let mut newer = good.clone();
    newer[8] = 3;
    fs::write(&file, &newer).unwrap();
    assert!(matches!(problem(folder.path()), OpenProblem::Identity(IdentityError::Newer { found: 3 })));
    fs::write(&file, &good[..50]).unwrap();
    assert!(matches!(problem(folder.path()), OpenProblem::Identity(IdentityError::Damaged(_))));
    fs::write(&file, vec![b'x'; 1 << 20]).unwrap();
    assert!(matches!(problem(folder.path()), OpenProblem::Identity(IdentityError::Damaged(_))));
    fs::write(&file, &good).unwrap();
    assert_eq!(leftovers(&folder), 1);

    fs::remove_dir(folder.path().join("blocks")).unwrap();
    assert!(matches!(problem(folder.path()), OpenProblem::Incomplete("blocks")));
    assert!(!folder.path().join("blocks").exists());
    fs::remove_file(&file).unwrap();
    assert!(matches!(problem(folder.path()), OpenProblem::NotFormatted));
    assert!(matches!(problem(&folder.path().join("nothing")), OpenProblem::Missing));
}

#[test]
fn a_disk_that_vanishes_is_noticed_and_not_made_again() {
    let damages: [fn(&Path); 5] = [
        |path| fs::remove_dir_all(path).unwrap(),
        |path| fs::remove_file(path.join("identity")).unwrap(),
        |path| fs::write(path.join("identity"), b"something else").unwrap(),
        |path| fs::rename(path.join("blocks"), path.join("kept")).unwrap(),
        |path| {
            fs::rename(path, path.with_extension("old")).unwrap();
            format(path, &identity()).unwrap();
        },
    ];
    for (n, damage) in damages.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        format(&path, &identity()).unwrap();
        let store = open(&path);
        let (id, bytes) = (block(1), contents(1, 5000));
        store.check().unwrap();
        let arriving = begin(&store, block(3), &bytes);
        damage(&path);
        store.check().unwrap_err();
        assert_eq!(code(store.read(id)), Some(BlockError::DiskLost), "damage {n}");
        drop(arriving);
        if n == 0 {
            assert_eq!(code(write(&store, id, &bytes)), Some(BlockError::Io));
            assert_eq!(code(store.erase(id)), Some(BlockError::DiskLost));
            assert!(!path.exists());
        }
    }
}

#[test]
fn the_scan_and_changes_meanwhile_agree() {
    const BLOCKS: u64 = 60;
    let (folder, store) = disk();
    let bytes = contents(1, 100);
    let id = |n: u64| BlockId::new(ShardId((n % 7) as u8), n << 11);
    for n in 0..BLOCKS {
        write(&store, id(n), &bytes).unwrap();
    }
    drop(store);
    for round in 0..3 {
        let store = open(folder.path());
        std::thread::scope(|scope| {
            let changing = scope.spawn(|| {
                for n in (0..BLOCKS).rev() {
                    store.erase(id(n)).unwrap();
                    if (n + round) % 3 > 0 {
                        write(&store, id(n), &bytes).unwrap();
                    }
                }
            });
            store.scan(|| false).unwrap();
            changing.join().unwrap();
        });
        let counted = store.totals();
        drop(store);
        let store = open(folder.path());
        assert_eq!(counted, scanned(&store), "round {round}");
        assert_eq!(counted.used_bytes, counted.blocks * 4196);
        for n in 0..BLOCKS {
            write(&store, id(n), &bytes).unwrap();
        }
    }
}

#[test]
fn many_writers_do_not_disturb_each_other() {
    let (folder, store) = disk();
    scanned(&store);
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
    assert_eq!(store.totals().blocks, 80);
    assert_eq!(leftovers(&folder), 0);
    let totals = store.totals();
    drop(store);
    assert_eq!(scanned(&open(folder.path())), totals);
}

/// A small file system of its own, for root only.
struct Tmpfs(TempDir);

impl Tmpfs {
    fn mount(option: &str) -> Option<Tmpfs> {
        let folder = tempfile::tempdir().unwrap();
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", option, "tmpfs"]).arg(folder.path()).output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Some(Tmpfs(folder));
        }
        println!("skipped: mounting a tmpfs is not allowed here");
        None
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

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
    // 8 MiB less the reserve of 2 MiB, and a header page each.
    assert_eq!(written, 5);
    assert_eq!(leftovers(&tmpfs.0), 0);
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
    arriving.append(&bytes).unwrap();
    arriving.finish().unwrap();
    assert_eq!(leftovers(&tmpfs.0), 0);
    assert_eq!(read(&store, block(2)).unwrap(), bytes);
    fs::remove_file(&hog).unwrap();
    store.erase(block(2)).unwrap();
    write(&store, block(103), &bytes).unwrap();
}

#[test]
fn a_disk_that_fills_in_spite_of_its_reserve_leaves_nothing_behind() {
    // Bytes enough, but few inodes: making files and folders fails at every step once.
    for inodes in 5..16 {
        let Some(tmpfs) = Tmpfs::mount(&format!("size=8m,nr_inodes={inodes}")) else { return };
        format(tmpfs.0.path(), &identity()).unwrap();
        let store = open(tmpfs.0.path());
        let all: Vec<_> = (0..20).map(|n| BlockId::new(ShardId(n as u8), n << 12)).collect();
        let results: Vec<_> = all.iter().map(|&id| code(write(&store, id, b"bytes"))).collect();
        assert!(results.contains(&Some(BlockError::NoSpace)), "{results:?}");
        assert!(results.iter().flatten().all(|&error| error == BlockError::NoSpace), "{results:?}");
        assert_eq!(leftovers(&tmpfs.0), 0);
        for (&id, result) in all.iter().zip(&results) {
            assert_eq!(read(&store, id).is_ok(), result.is_none());
        }
        assert_eq!(scanned(&store).blocks, results.iter().filter(|result| result.is_none()).count() as u64);
        store.check().unwrap();
    }
}

#[test]
fn a_disk_mounted_read_only_has_no_room_but_reads() {
    let Some(tmpfs) = Tmpfs::mount("size=8m") else { return };
    format(tmpfs.0.path(), &identity()).unwrap();
    let store = open(tmpfs.0.path());
    write(&store, block(1), b"kept").unwrap();
    let remount = Command::new("mount").args(["-o", "remount,ro"]).arg(tmpfs.0.path()).status();
    if !remount.is_ok_and(|status| status.success()) {
        println!("skipped: remounting is not allowed here");
        return;
    }
    assert_eq!(store.space().unwrap().available_bytes(), 0);
    assert_eq!(code(store.begin(admission(block(2), b"more"))), Some(BlockError::NoSpace));
    assert_eq!(read(&store, block(1)).unwrap(), b"kept");
    store.check().unwrap();
}
