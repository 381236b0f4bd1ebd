//! `eggs-blockd inspect DIR`: what a disk holds, told by its segments, and what its journal knows that they lack.
//!
//! For people whose cluster is gone or who do not trust it: no registry, no lock; it changes nothing and may look at a
//! disk that is in use. Every block is read and compared with its checksums. A disk without a journal is told by its
//! segments alone: what is gone from it cannot be named then.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use eggs_blockd_core::identity::{IDENTITY_BYTES_MAX, IDENTITY_FILE};
use eggs_blockd_core::record::{Kind, SEGMENT_BYTES_MAX, Seal};
use eggs_blockd_core::recovery::{Recovery, is_whole, walk};
use eggs_blockd_core::{Identity, Place, journal};
use eggs_proto::BlockId;

use crate::store::{DiskFile, JOURNAL, JOURNAL_BYTES_MAX, numbers, segment_path};

/// A block of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    pub block: BlockId,
    pub place: Place,
    /// Its bytes are those that were written.
    pub whole: bool,
    /// The journal knows it, and there is nothing where it should lie.
    pub missing: bool,
}

/// The identity of the disk at `path`.
///
/// # Errors
/// When it is none.
pub fn identity(path: &Path) -> io::Result<Identity> {
    let file = match std::fs::File::open(path.join(IDENTITY_FILE)) {
        Err(error) if error.kind() == ErrorKind::NotFound && path.is_dir() => {
            let text = format!("not a disk of EggsFS: no file '{IDENTITY_FILE}'");
            return Err(io::Error::new(ErrorKind::InvalidData, text));
        }
        file => file?,
    };
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, IDENTITY_BYTES_MAX as u64 + 1), &mut bytes)?;
    Identity::decode(&bytes).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
}

/// Where the blocks lie that the journal of the disk at `path` knows; none without a good one.
fn known(path: &Path, identity: &Identity) -> BTreeMap<(u32, u32), (BlockId, Place)> {
    let bytes = std::fs::File::open(path.join(JOURNAL)).and_then(|file| {
        let mut bytes = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, JOURNAL_BYTES_MAX), &mut bytes).map(|_| bytes)
    });
    let mut told = Recovery::default();
    let read =
        bytes.ok().and_then(|bytes| journal::read(&bytes, identity.service, |entry| told.apply(entry)));
    match read {
        Some(journal::End::At(_)) => told
            .index
            .blocks()
            .map(|(block, place)| ((place.segment, place.offset), (block, place)))
            .collect(),
        Some(journal::End::Damaged) | None => BTreeMap::new(),
    }
}

/// Every block of the disk at `path`, as it is found, in the order they lie; last those that are missing.
///
/// # Errors
/// When the disk cannot be read at all, or `tell` fails.
pub fn inspect(path: &Path, mut tell: impl FnMut(Found) -> io::Result<()>) -> io::Result<()> {
    let identity = identity(path)?;
    let mut unseen = known(path, &identity);
    let folder = std::fs::File::open(path.join("segments")).map_err(|error| {
        io::Error::new(error.kind(), format!("cannot open its folder 'segments': {error}"))
    })?;
    for number in numbers(&folder.into())? {
        let file = match std::fs::File::open(segment_path(path, number)) {
            // Of a disk in use, emptied meanwhile.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            file => file?,
        };
        let length = u32::try_from(file.metadata()?.len()).unwrap_or(u32::MAX).min(SEGMENT_BYTES_MAX);
        let file = DiskFile::new(file.into(), String::new(), Arc::default(), None);
        let found = walk(Seal::from(&identity), number, length, |at, into| {
            file.read_exact(into, u64::from(at)).is_ok()
        });
        for (offset, record) in found.records {
            unseen.remove(&(number, offset));
            if record.kind == Kind::Block {
                let place = Place { segment: number, offset, size: record.size, crc: record.crc };
                let read = |at, into: &mut [u8]| file.read_exact(into, u64::from(at));
                let whole = is_whole(Seal::from(&identity), record.block, place, read).unwrap_or(false);
                tell(Found { block: record.block, place, whole, missing: false })?;
            }
        }
    }
    if unseen.is_empty() {
        return Ok(());
    }
    // Of a disk in use: erased or moved since.
    let still = known(path, &identity);
    for (at, (block, place)) in unseen {
        if still.get(&at) == Some(&(block, place)) {
            tell(Found { block, place, whole: false, missing: true })?;
        }
    }
    Ok(())
}

/// The subcommand: a line for each block on standard output. Fails when a disk cannot be read or a block is damaged or
/// missing.
pub fn run(paths: &[PathBuf]) -> ExitCode {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let (mut damaged, mut missing, mut unusable) = (0u64, 0u64, false);
    for path in paths {
        let shown = show(&mut out, path, |found| {
            missing += u64::from(found.missing);
            damaged += u64::from(!found.whole && !found.missing);
        });
        match shown.and_then(|()| out.flush()) {
            Ok(()) => {}
            // Whoever reads it has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
            Err(error) => {
                let _ = out.flush();
                eprintln!("error: {}: {error}", path.display());
                unusable = true;
            }
        }
    }
    if damaged > 0 {
        eprintln!("error: {damaged} blocks are damaged");
    }
    if missing > 0 {
        eprintln!(
            "error: {missing} blocks are missing: the journal knows them, the segments do not hold them"
        );
    }
    if unusable || damaged > 0 || missing > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn show(out: &mut impl Write, path: &Path, mut count: impl FnMut(Found)) -> io::Result<()> {
    let identity = identity(path)?;
    writeln!(
        out,
        "disk {} of cluster {}, class {}, domain {}",
        identity.service, identity.cluster, identity.storage_class, identity.failure_domain
    )?;
    writeln!(out, "{:16} {:8} {:>10} {:>10} {:8} verdict", "block", "segment", "offset", "size", "crc")?;
    inspect(path, |found| {
        count(found);
        let Found { block, place: Place { segment, offset, size, crc }, whole, missing } = found;
        let verdict = match (whole, missing) {
            (true, _) => "good",
            (false, false) => "damaged",
            (false, true) => "missing",
        };
        writeln!(out, "{:016x} {segment:08x} {offset:>10} {size:>10} {crc:08x} {verdict}", block.0)
    })
}
