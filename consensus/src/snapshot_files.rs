//! Snapshots as files: `DIR/snapshots/GROUP.snap`, the newest of each group.
//!
//! Layout, integers little-endian:
//!
//! ```text
//! magic "EGGSSNAP"  u32 version = 1  u32 group
//! pages: u32 length  u32 crc32 of the page  page = rows: u32 key length, key, u32 value length, value
//! end:   u32 0       u32 crc32 of the footer
//! footer: u64 index  u64 term  [u8;16] state hash  u64 bytes of all keys and values
//! ```
//!
//! The footer is at the end, so that rows can stream; its 40 bytes are the last of the file.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use bytes::Bytes;
use eggs_consensus_core::{GroupId, SnapshotMeta, SnapshotStore, StorageError};
use eggs_machine::Row;
use eggs_machine::hash::StateHash;

use crate::sled_state::sync_directory;

const MAGIC: &[u8; 8] = b"EGGSSNAP";
const VERSION: u32 = 1;
const FOOTER_BYTES: usize = 40;
/// A page longer than this is not one (rows are bounded by messages of 8 MiB).
const PAGE_BYTES_MAX: u32 = 1 << 30;

pub(crate) struct SnapshotFiles {
    directory: PathBuf,
    begun: Option<(GroupId, BufWriter<File>)>,
    sealing: Option<JoinHandle<Result<(), StorageError>>>,
}

impl SnapshotFiles {
    pub(crate) fn open(directory: PathBuf) -> Result<Self, StorageError> {
        fs::create_dir_all(&directory).map_err(|error| failed(&directory, &error))?;
        Ok(SnapshotFiles { directory, begun: None, sealing: None })
    }

    fn path(&self, group: GroupId) -> PathBuf {
        self.directory.join(format!("{:05}.snap", group.0))
    }

    fn begun_path(&self) -> PathBuf {
        self.directory.join("taking.tmp")
    }
}

fn failed(path: &Path, error: &io::Error) -> StorageError {
    StorageError::new(format!("{}: {error}", path.display()))
}

fn damaged(path: &Path, what: &str) -> StorageError {
    StorageError::new(format!("{}: snapshot damaged: {what}", path.display()))
}

fn encode_footer(meta: &SnapshotMeta) -> [u8; FOOTER_BYTES] {
    let mut footer = [0; FOOTER_BYTES];
    footer[..8].copy_from_slice(&meta.index.to_le_bytes());
    footer[8..16].copy_from_slice(&meta.term.to_le_bytes());
    footer[16..32].copy_from_slice(&meta.hash.to_bytes());
    footer[32..].copy_from_slice(&meta.bytes.to_le_bytes());
    footer
}

fn decode_footer(footer: &[u8; FOOTER_BYTES]) -> SnapshotMeta {
    let number = |at: usize| footer[at..at + 8].iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte));
    let mut hash = [0; 16];
    hash.copy_from_slice(&footer[16..32]);
    SnapshotMeta { index: number(0), term: number(8), hash: StateHash::from_bytes(hash), bytes: number(32) }
}

fn read_u32(reader: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    reader.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

impl SnapshotStore for SnapshotFiles {
    fn latest(&self, group: GroupId) -> Result<Option<SnapshotMeta>, StorageError> {
        let path = self.path(group);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(&path, &error)),
        };
        let mut tail = [0; 8 + FOOTER_BYTES];
        let end = -i64::try_from(tail.len()).unwrap_or(i64::MAX);
        file.seek(SeekFrom::End(end)).map_err(|_| damaged(&path, "too short"))?;
        file.read_exact(&mut tail).map_err(|error| failed(&path, &error))?;
        let mut footer = [0; FOOTER_BYTES];
        footer.copy_from_slice(&tail[8..]);
        let crc = u32::from_le_bytes([tail[4], tail[5], tail[6], tail[7]]);
        if tail[..4] != [0; 4] || crc32fast::hash(&footer) != crc {
            return Err(damaged(&path, "wrong checksum of the footer"));
        }
        Ok(Some(decode_footer(&footer)))
    }

    fn read(
        &self,
        group: GroupId,
        each: &mut dyn FnMut(Vec<Row>) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let path = self.path(group);
        let io_error = |error: io::Error| failed(&path, &error);
        let mut reader = BufReader::with_capacity(1 << 20, File::open(&path).map_err(io_error)?);
        let mut magic = [0; 8];
        reader.read_exact(&mut magic).map_err(io_error)?;
        let version = read_u32(&mut reader).map_err(io_error)?;
        let stored = read_u32(&mut reader).map_err(io_error)?;
        if &magic != MAGIC || stored != u32::from(group.0) {
            return Err(damaged(&path, "it is not a snapshot of this group"));
        }
        if version != VERSION {
            return Err(StorageError::new(format!(
                "{}: version {version} is newer than this build",
                path.display()
            )));
        }
        loop {
            let length = read_u32(&mut reader).map_err(io_error)?;
            let crc = read_u32(&mut reader).map_err(io_error)?;
            if length == 0 {
                return Ok(());
            }
            if length > PAGE_BYTES_MAX {
                return Err(damaged(&path, "a page is too long"));
            }
            let mut page = Vec::new();
            (&mut reader).take(u64::from(length)).read_to_end(&mut page).map_err(io_error)?;
            if page.len() != length as usize || crc32fast::hash(&page) != crc {
                return Err(damaged(&path, "wrong checksum of a page"));
            }
            let rows =
                decode_page(Bytes::from(page)).ok_or_else(|| damaged(&path, "a page has broken rows"))?;
            each(rows)?;
        }
    }

    fn begin(&mut self, group: GroupId) -> Result<(), StorageError> {
        let path = self.begun_path();
        let io_error = |error: io::Error| failed(&path, &error);
        let mut writer = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(io_error)?);
        writer.write_all(MAGIC).map_err(io_error)?;
        writer.write_all(&VERSION.to_le_bytes()).map_err(io_error)?;
        writer.write_all(&u32::from(group.0).to_le_bytes()).map_err(io_error)?;
        self.begun = Some((group, writer));
        Ok(())
    }

    fn add(&mut self, rows: &[Row]) -> Result<(), StorageError> {
        if rows.is_empty() {
            return Ok(());
        }
        let path = self.begun_path();
        let Some((_, writer)) = &mut self.begun else { return Err(damaged(&path, "not begun")) };
        let page = encode_page(rows);
        let length = u32::try_from(page.len()).map_err(|_| damaged(&path, "page too long"))?;
        let written = writer
            .write_all(&length.to_le_bytes())
            .and_then(|()| writer.write_all(&crc32fast::hash(&page).to_le_bytes()))
            .and_then(|()| writer.write_all(&page));
        written.map_err(|error| failed(&path, &error))
    }

    fn seal(&mut self, meta: SnapshotMeta) -> Result<bool, StorageError> {
        let from = self.begun_path();
        if let Some(sealing) = &self.sealing {
            if !sealing.is_finished() {
                return Ok(false);
            }
        } else if let Some((group, writer)) = self.begun.take() {
            // The fsync of a large file takes long: not on the consensus thread.
            let to = self.path(group);
            let directory = self.directory.clone();
            let sealing = std::thread::Builder::new()
                .name("snapshot".to_owned())
                .spawn(move || seal_file(writer, &meta, &from, &to, &directory));
            self.sealing = Some(sealing.map_err(|error| failed(&self.directory, &error))?);
            return Ok(false);
        }
        match self.sealing.take().map(JoinHandle::join) {
            Some(Ok(sealed)) => sealed.map(|()| true),
            Some(Err(_)) => Err(StorageError::new("the snapshot thread panicked".to_owned())),
            None => Err(StorageError::new("no snapshot begun".to_owned())),
        }
    }
}

fn seal_file(
    mut writer: BufWriter<File>,
    meta: &SnapshotMeta,
    from: &Path,
    to: &Path,
    directory: &Path,
) -> Result<(), StorageError> {
    let io_error = |error: io::Error| failed(from, &error);
    let footer = encode_footer(meta);
    writer.write_all(&0u32.to_le_bytes()).map_err(io_error)?;
    writer.write_all(&crc32fast::hash(&footer).to_le_bytes()).map_err(io_error)?;
    writer.write_all(&footer).map_err(io_error)?;
    let file = writer.into_inner().map_err(|error| io_error(error.into_error()))?;
    file.sync_all().map_err(io_error)?;
    fs::rename(from, to).map_err(io_error)?;
    sync_directory(directory)
}

fn encode_page(rows: &[Row]) -> Vec<u8> {
    let bytes = rows.iter().map(|(key, value)| key.len() + value.len() + 8).sum();
    let mut page = Vec::with_capacity(bytes);
    for part in rows.iter().flat_map(|(key, value)| [key, value]) {
        // Keys and values are far below 4 GiB (messages are bounded by 8 MiB).
        page.extend_from_slice(&(part.len() as u32).to_le_bytes());
        page.extend_from_slice(part);
    }
    page
}

fn decode_page(mut page: Bytes) -> Option<Vec<Row>> {
    let mut part = || -> Option<Bytes> {
        let length = page.get(..4)?;
        let length = u32::from_le_bytes(length.try_into().ok()?) as usize;
        let part = (page.len() - 4 >= length).then(|| page.slice(4..4 + length))?;
        page = page.slice(4 + length..);
        Some(part)
    };
    let mut rows = Vec::new();
    while let Some(key) = part() {
        // Copied: a row must not keep its whole page in memory.
        rows.push((Bytes::copy_from_slice(&key), Bytes::copy_from_slice(&part()?)));
    }
    page.is_empty().then_some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: u32) -> Vec<Row> {
        (0..n).map(|n| (Bytes::from(format!("key{n:05}")), Bytes::from(vec![7; n as usize % 50]))).collect()
    }

    fn seal(files: &mut SnapshotFiles, index: u64) {
        let mut hash = StateHash::default();
        hash.insert(b"a", b"b");
        while !files.seal(SnapshotMeta { index, term: 2, hash, bytes: 9 }).unwrap() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_sealed_snapshot_reads_back_and_replaces_the_older() {
        let directory = tempfile::tempdir().unwrap();
        let mut files = SnapshotFiles::open(directory.path().join("snapshots")).unwrap();
        let group = GroupId(3);
        assert_eq!(files.latest(group).unwrap(), None);
        for index in [10, 20] {
            files.begin(group).unwrap();
            files.add(&rows(500)).unwrap();
            files.add(&rows(3)).unwrap();
            assert_eq!(files.latest(group).unwrap().map_or(0, |meta| meta.index), index - 10);
            seal(&mut files, index);
        }
        assert_eq!(files.latest(group).unwrap().unwrap().index, 20);
        let mut read = Vec::new();
        files
            .read(group, &mut |rows| {
                read.extend(rows);
                Ok(())
            })
            .unwrap();
        assert_eq!(read, [rows(500), rows(3)].concat());
    }

    #[test]
    fn any_flipped_or_missing_byte_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let mut files = SnapshotFiles::open(directory.path().to_owned()).unwrap();
        let group = GroupId(3);
        files.begin(group).unwrap();
        files.add(&rows(5)).unwrap();
        seal(&mut files, 1);
        let path = files.path(group);
        let good = fs::read(&path).unwrap();
        let whole =
            |files: &SnapshotFiles| files.latest(group).and_then(|_| files.read(group, &mut |_| Ok(())));
        whole(&files).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            fs::write(&path, &bad).unwrap();
            assert!(whole(&files).is_err(), "byte {at} flipped");
            fs::write(&path, &good[..at]).unwrap();
            assert!(whole(&files).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn golden_bytes() {
        let meta = SnapshotMeta { index: 1, term: 2, hash: StateHash::from_bytes([9; 16]), bytes: 3 };
        let footer = encode_footer(&meta);
        assert_eq!(footer[..16], [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(footer[16..], [[9; 16].as_slice(), &[3, 0, 0, 0, 0, 0, 0, 0]].concat());
        assert_eq!(decode_footer(&footer), meta);
        let page = encode_page(&[(Bytes::from_static(b"k"), Bytes::from_static(b"vv"))]);
        assert_eq!(page, [1, 0, 0, 0, b'k', 2, 0, 0, 0, b'v', b'v']);
    }
}
