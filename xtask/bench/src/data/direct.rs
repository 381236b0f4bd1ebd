//! Buffered or direct: what segments do to a disk, once through the page cache and once around it, in one run on one folder.
//!
//! Large blocks are appended a megabyte at a time and made durable every 16, small ones 64 at a time, gathered in one piece.
//! Reads are cold: what is cached of the file is dropped first.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Result, ensure};
use bytes::Bytes;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::fs::{Advice, Mode, OFlags, fadvise, open};

use super::raw::timed;
use crate::Setup;
use crate::report::{Report, Sample};

const LARGE_BYTES: u64 = 1 << 30;
const LARGE_PIECE: usize = 1 << 20;
const LARGE_PIECES_PER_SYNC: u64 = 16;
const SMALL_BYTES: u64 = 128 << 20;
const SMALL_PIECE: usize = 64 * 4096;
/// As a block service reads a range.
const READ_PIECE: usize = 512 << 10;
const PAGE: usize = 4096;
const PAGES_READ: u64 = 8192;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Buffered,
    Direct,
}

const ROWS: [(Way, [&str; 4]); 2] = [
    (
        Way::Buffered,
        ["append_1m_buffered", "append_4k_buffered", "read_cold_buffered", "read_cold_4k_buffered"],
    ),
    (Way::Direct, ["append_1m_direct", "append_4k_direct", "read_cold_direct", "read_cold_4k_direct"]),
];

/// The rows of both ways; none where the file system has no direct IO.
pub fn rows(setup: &Setup, report: &mut Report, random: &Bytes) -> Result<()> {
    let path = setup.scratch.path().join("direct");
    let mut found: [[Vec<Sample>; 4]; 2] = Default::default();
    for run in 0..setup.runs {
        for ((way, _), samples) in ROWS.iter().zip(&mut found) {
            if let Err(error) = opened(&path, *way) {
                eprintln!("left out: direct IO: {error:#}");
                return Ok(());
            }
            samples[1].push(append(&path, *way, SMALL_BYTES, SMALL_PIECE, 1, random)?);
            samples[0].push(append(&path, *way, LARGE_BYTES, LARGE_PIECE, LARGE_PIECES_PER_SYNC, random)?);
            samples[2].push(read(&path, *way, random)?);
            samples[3].push(read_pages(&path, *way, run.into(), random)?);
            std::fs::remove_file(&path)?;
        }
    }
    for ((_, names), samples) in ROWS.iter().zip(&found) {
        for (name, samples) in names.iter().zip(samples) {
            report.row(name, 1, "MB/s", samples);
        }
    }
    Ok(())
}

fn opened(path: &Path, way: Way) -> Result<File> {
    let direct = if way == Way::Direct { OFlags::DIRECT } else { OFlags::empty() };
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | direct;
    Ok(File::from(open(path, flags, Mode::from_raw_mode(0o600))?))
}

/// A buffer that begins on a page, as a device wants it.
struct Aligned {
    bytes: Vec<u8>,
    from: usize,
}

impl Aligned {
    fn new(length: usize) -> Aligned {
        let bytes = vec![0; length + PAGE];
        let from = bytes.as_ptr().align_offset(PAGE);
        Aligned { bytes, from }
    }

    fn get(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.from..][..length]
    }
}

/// A new file, written from front to back. Both ways lay the bytes out in a buffer first, as records are.
fn append(path: &Path, way: Way, total: u64, piece: usize, per_sync: u64, random: &Bytes) -> Result<Sample> {
    let file = opened(path, way)?;
    file.set_len(0)?;
    let mut buffer = Aligned::new(piece);
    timed(total, || {
        for n in 0..total / piece as u64 {
            let at = n * piece as u64;
            let buffer = buffer.get(piece);
            buffer.copy_from_slice(&random[(at % random.len() as u64) as usize..][..piece]);
            file.write_all_at(buffer, at)?;
            if (n + 1) % per_sync == 0 {
                file.sync_data()?;
            }
        }
        Ok(())
    })
}

fn cold(path: &Path, way: Way) -> Result<File> {
    let file = opened(path, way)?;
    file.sync_all()?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(file)
}

/// From front to back.
fn read(path: &Path, way: Way, random: &Bytes) -> Result<Sample> {
    let file = cold(path, way)?;
    let mut buffer = Aligned::new(READ_PIECE);
    timed(LARGE_BYTES, || {
        for n in 0..LARGE_BYTES / READ_PIECE as u64 {
            let at = n * READ_PIECE as u64;
            let buffer = buffer.get(READ_PIECE);
            file.read_exact_at(buffer, at)?;
            check(buffer, at, random)?;
        }
        Ok(())
    })
}

/// Pages anywhere, one after the other.
fn read_pages(path: &Path, way: Way, seed: u64, random: &Bytes) -> Result<Sample> {
    let file = cold(path, way)?;
    if way == Way::Buffered {
        fadvise(&file, 0, None, Advice::Random)?;
    }
    let (mut buffer, mut rng) = (Aligned::new(PAGE), ChaCha8Rng::seed_from_u64(seed));
    timed(PAGES_READ * PAGE as u64, || {
        for _ in 0..PAGES_READ {
            let at = rng.random_range(0..LARGE_BYTES / PAGE as u64) * PAGE as u64;
            let buffer = buffer.get(PAGE);
            file.read_exact_at(buffer, at)?;
            check(buffer, at, random)?;
        }
        Ok(())
    })
}

/// The first bytes tell: the rest would measure memory.
fn check(bytes: &[u8], at: u64, random: &Bytes) -> Result<()> {
    let from = (at % random.len() as u64) as usize;
    ensure!(bytes[..64] == random[from..from + 64], "other bytes at {at}");
    Ok(())
}
