//! The store on real files.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

use bytes::Bytes;
use eggs_blockd_core::{Extent, IdentityError, WriteAdmission};
use eggs_proto::{BlockServiceId, ClusterId, ShardId, Time, mac};
use tempfile::TempDir;

use super::*;

mod blocks;
mod compaction;
mod crashes;
mod folders;
mod full;
mod reopening;

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
    open_with(path, Options::default())
}

fn open_with(path: &Path, options: Options) -> Arc<Store> {
    for _ in 0..1000 {
        match Store::open(path, CLUSTER, options.clone()) {
            // A child that another test is just starting has all our locks for a moment.
            Err(error) if matches!(error.problem, OpenProblem::InUse) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result.unwrap(),
        }
    }
    panic!("{} stays in use", path.display());
}

/// With segments of 1 MiB.
fn open_small(path: &Path) -> Arc<Store> {
    open_with(path, Options { segment_bytes: Some(1 << 20), ..Options::default() })
}

fn open_faulty(path: &Path) -> (Arc<Store>, Arc<Faults>) {
    let faults = Arc::new(Faults::default());
    let options = Options { faults: Some(Arc::clone(&faults)), ..Options::default() };
    (open_with(path, options), faults)
}

fn problem(path: &Path) -> OpenProblem {
    Store::open(path, CLUSTER, Options::default()).unwrap_err().problem
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
        Begun::Arriving(incoming) => *incoming,
        Begun::Stored(_) => panic!("{id} is stored already"),
    }
}

fn write(store: &Arc<Store>, id: BlockId, bytes: &[u8]) -> Result<mac::Mac, StoreError> {
    match store.begin(admission(id, bytes))? {
        Begun::Stored(proof) => Ok(proof),
        Begun::Arriving(mut incoming) => {
            let bytes = Bytes::copy_from_slice(bytes);
            for at in (0..bytes.len()).step_by(100_000) {
                incoming.append(&bytes.slice(at..bytes.len().min(at + 100_000)))?;
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

/// The segment a block lies in, to be damaged.
fn segment_of(folder: &Path, place: Place) -> fs::File {
    let path = folder.join("segments").join(segment_name(place.segment));
    fs::File::options().read(true).write(true).open(path).unwrap()
}

fn place(store: &Store, id: BlockId) -> Place {
    lock(&store.books).index.get(id).unwrap()
}

fn listed(store: &Store) -> Vec<BlockId> {
    let mut blocks: Vec<_> = store.list().into_iter().map(|(block, _)| block).collect();
    blocks.sort_unstable();
    blocks
}

fn wanted(id: BlockId, bytes: &[u8]) -> Wanted {
    Wanted { admission: admission(id, bytes), data: Bytes::copy_from_slice(bytes) }
}

/// Everything a disk has, as a crash leaves it: nothing was closed.
fn copied(folder: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    let segments = copy.path().join("segments");
    fs::create_dir(&segments).unwrap();
    for name in ["identity", "journal"] {
        let _ = fs::copy(folder.join(name), copy.path().join(name));
    }
    for entry in fs::read_dir(folder.join("segments")).unwrap() {
        let entry = entry.unwrap();
        // Removed in between, as it may be.
        let _ = fs::copy(entry.path(), segments.join(entry.file_name()));
    }
    copy
}

fn holds_still(store: &Store, all: &[(BlockId, Vec<u8>)]) {
    for (id, bytes) in all {
        assert!(&read(store, *id).unwrap() == bytes, "block {id}");
    }
    let mut ids: Vec<_> = all.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    assert_eq!(listed(store), ids);
}

fn blocks(lengths: &[usize]) -> Vec<(BlockId, Vec<u8>)> {
    let contents = |(n, length): (usize, &usize)| (block(n as u64 + 1), contents(n as u64, *length));
    lengths.iter().enumerate().map(contents).collect()
}

const LENGTHS: [usize; 9] = [1, 999, 4096, 4097, 65_535, 65_536, 300_000, 262_144, 1_500_000];

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
