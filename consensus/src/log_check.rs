//! What tells a log that lost acknowledged writes from one whose last write was cut by a crash.
//!
//! raft-engine cuts its newest file at the first byte it cannot read, and checks the bytes of entries only when they are
//! read. So two things are done besides:
//!
//! - `DIR/log.written` says how far the log was when it was last written. It is written after the log was synced and is
//!   not synced itself: it is never ahead of the log, and a killed process leaves it as it is.
//! - at opening, every file of the log is read whole ([`verify`]).
//!
//! Layout of `log.written`, integers little-endian:
//!
//! ```text
//! magic "EGGSLOGW"  u64 number of the last write  u64 newest file of moved entries  u64 its length  u32 crc32 of all before
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::handle::ConsensusError;

const MAGIC: &[u8; 8] = b"EGGSLOGW";
const WRITTEN_BYTES: usize = 36;
/// raft-engine's file header: a magic text, version and alignment.
const FILE_HEADER_BYTES: usize = 69;
/// Of a batch: u56 length, u8 compression, u64 offset of the items; big-endian.
const BATCH_HEADER_BYTES: usize = 16;
const CRC_BYTES: usize = 4;
/// Where raft-engine appends, and where it moves old entries to.
const APPENDED: &str = "raftlog";
const MOVED: &str = "rewrite";

/// How far the log is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Of the last synced write.
    pub(crate) sequence: u64,
    /// Number of the newest file of moved entries, 0 when there is none, and how much of it is written.
    pub(crate) moved_file: u64,
    pub(crate) moved_bytes: u64,
}

/// The file beside the log that says how far the log is.
pub(crate) struct Written {
    file: File,
    path: PathBuf,
    mark: Mark,
}

impl Written {
    fn path(directory: &Path) -> PathBuf {
        directory.join("log.written")
    }

    /// `None` when there is none, or when it cannot be read: it is not synced, a power cut may take it.
    pub(crate) fn load(directory: &Path) -> io::Result<Option<Mark>> {
        match fs::read(Written::path(directory)) {
            Ok(bytes) => Ok(decode(&bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Begins anew, durably: from here on there is always one. What `mark` says must be durable in the log.
    pub(crate) fn create(directory: &Path, mark: Mark) -> io::Result<Self> {
        let path = Written::path(directory);
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
        let mut written = Written { file, path, mark };
        written.save(mark)?;
        written.file.sync_all()?;
        File::open(directory)?.sync_all()?;
        Ok(written)
    }

    pub(crate) fn mark(&self) -> Mark {
        self.mark
    }

    pub(crate) fn save(&mut self, mark: Mark) -> io::Result<()> {
        self.mark = mark;
        let write = self.file.write_all_at(&encode(&mark), 0);
        write.map_err(|error| io::Error::other(format!("{}: {error}", self.path.display())))
    }
}

fn encode(mark: &Mark) -> [u8; WRITTEN_BYTES] {
    let mut bytes = [0; WRITTEN_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..16].copy_from_slice(&mark.sequence.to_le_bytes());
    bytes[16..24].copy_from_slice(&mark.moved_file.to_le_bytes());
    bytes[24..32].copy_from_slice(&mark.moved_bytes.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..32]);
    bytes[32..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<Mark> {
    let bytes: &[u8; WRITTEN_BYTES] = bytes.try_into().ok()?;
    let number = |at: usize| bytes[at..at + 8].iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte));
    let mark = Mark { sequence: number(8), moved_file: number(16), moved_bytes: number(24) };
    (encode(&mark) == *bytes).then_some(mark)
}

/// Before raft-engine opens the log: it would drop every file before one that is missing.
pub(crate) fn no_file_is_missing(log: &Path) -> Result<(), ConsensusError> {
    for kind in [APPENDED, MOVED] {
        let files = files(log, kind)?;
        for pair in files.windows(2) {
            if pair[1].0 != pair[0].0 + 1 {
                return Err(ConsensusError::Damaged(format!(
                    "{}: the files between {} and {} are missing",
                    log.display(),
                    pair[0].1.display(),
                    pair[1].1.display()
                )));
            }
        }
    }
    Ok(())
}

/// After raft-engine opened the log, and cut what a crash left of a last write: all that is there must be whole. Makes it
/// durable too: what a killed process had written but not synced counts as written from here on. Answers the newest file of
/// moved entries and its length.
pub(crate) fn verify(log: &Path) -> Result<(u64, u64), ConsensusError> {
    let mut moved = (0, 0);
    for kind in [APPENDED, MOVED] {
        let files = files(log, kind)?;
        let newest = files.last().map(|(number, _)| *number);
        for (number, path) in files {
            let failed = |error| io_failed(&path, &error);
            let bytes = fs::read(&path).map_err(failed)?;
            match whole_until(&bytes) {
                Ok(end) if end == bytes.len() => {}
                // Where it is appended, space that was taken ahead is zeros; what was acknowledged and is missing there
                // shows in the number of the last write. Anywhere else nothing would show it.
                Ok(end)
                    if kind == APPENDED
                        && Some(number) == newest
                        && bytes[end..].iter().all(|&byte| byte == 0) => {}
                Ok(at) => return Err(damaged(&path, at, "is no record")),
                Err(at) => return Err(damaged(&path, at, "has a wrong checksum")),
            }
            File::open(&path).and_then(|file| file.sync_data()).map_err(failed)?;
            if kind == MOVED {
                moved = (number, bytes.len() as u64);
            }
        }
    }
    Ok(moved)
}

/// The newest file of moved entries and how much of it is written, while the log is open.
pub(crate) fn moved(log: &Path) -> io::Result<(u64, u64)> {
    let files = files(log, MOVED).map_err(|error| io::Error::other(error.to_string()))?;
    let Some((number, path)) = files.last() else { return Ok((0, 0)) };
    // The file is longer than what is written: space is taken ahead.
    let end = whole_until(&fs::read(path)?).unwrap_or_else(|at| at);
    Ok((*number, end as u64))
}

/// Where the last whole batch ends; `Err`: where a batch begins whose entries have a wrong checksum. The items of the batches
/// are checked by raft-engine.
fn whole_until(bytes: &[u8]) -> Result<usize, usize> {
    let mut at = FILE_HEADER_BYTES.min(bytes.len());
    loop {
        let rest = &bytes[at..];
        let Some((header, _)) = rest.split_first_chunk::<BATCH_HEADER_BYTES>() else { return Ok(at) };
        let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, &byte| n << 8 | u64::from(byte));
        let length = usize::try_from(number(&header[..7])).unwrap_or(usize::MAX);
        let items = usize::try_from(number(&header[8..])).unwrap_or(usize::MAX);
        if items < BATCH_HEADER_BYTES || items >= length || length > rest.len() {
            return Ok(at);
        }
        let entries = &rest[BATCH_HEADER_BYTES..items];
        if let Some((data, crc)) = entries.split_last_chunk::<CRC_BYTES>()
            && crc32fast::hash(data) != u32::from_le_bytes(*crc)
        {
            return Err(at);
        }
        at += length;
    }
}

/// The files of one kind by number, in order.
fn files(log: &Path, kind: &str) -> Result<Vec<(u64, PathBuf)>, ConsensusError> {
    let mut files = Vec::new();
    let entries = match fs::read_dir(log) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(files),
        Err(error) => return Err(io_failed(log, &error)),
    };
    for entry in entries {
        let path = entry.map_err(|error| io_failed(log, &error))?.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        if let Some(number) = number.filter(|_| path.extension().is_some_and(|extension| extension == kind)) {
            files.push((number, path));
        }
    }
    files.sort();
    Ok(files)
}

fn damaged(path: &Path, at: usize, what: &str) -> ConsensusError {
    ConsensusError::Damaged(format!("{}: what is at byte {at} {what}", path.display()))
}

fn io_failed(path: &Path, error: &io::Error) -> ConsensusError {
    ConsensusError::Storage(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A log of two files of each kind, each no more than its header, with zeros behind some.
    fn log_with_zeros(zeros: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for name in ["1.raftlog", "2.raftlog", "1.rewrite", "2.rewrite"] {
            let mut bytes = vec![7; FILE_HEADER_BYTES];
            if zeros.contains(&name) {
                bytes.extend([0; 4096]);
            }
            fs::write(directory.path().join(name), bytes).unwrap();
        }
        directory
    }

    #[test]
    fn zeros_are_room_only_where_the_log_is_appended() {
        verify(log_with_zeros(&[]).path()).unwrap();
        verify(log_with_zeros(&["2.raftlog"]).path()).unwrap();
        for lost in ["1.raftlog", "1.rewrite", "2.rewrite"] {
            let verified = verify(log_with_zeros(&[lost]).path());
            assert!(matches!(verified, Err(ConsensusError::Damaged(_))), "{lost}: {verified:?}");
        }
    }

    #[test]
    fn golden_mark() {
        let mark = Mark { sequence: 0x0102, moved_file: 3, moved_bytes: 4 };
        let bytes = encode(&mark);
        assert_eq!(bytes[..10], *b"EGGSLOGW\x02\x01");
        assert_eq!(bytes[16..32], [3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(decode(&bytes), Some(mark));
        for at in 0..bytes.len() {
            let mut wrong = bytes;
            wrong[at] ^= 4;
            assert_eq!(decode(&wrong), None, "byte {at}");
        }
        assert_eq!(decode(&bytes[1..]), None);
    }
}
