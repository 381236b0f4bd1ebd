//! What a folder is, and making one a disk.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use eggs_blockd_core::identity::{IDENTITY_BYTES_MAX, IDENTITY_FILE, IDENTITY_FILE_NEW};
use eggs_blockd_core::{Identity, IdentityError};
use eggs_proto::ClusterId;
use rustix::fs::{self as rfs, Dir, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::SEGMENTS;

/// Why a folder cannot be used as a disk. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
#[error("disk {}: {problem}", path.display())]
pub struct OpenError {
    pub path: PathBuf,
    pub problem: OpenProblem,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenProblem {
    #[error("there is no such folder")]
    Missing,
    #[error("it is not formatted")]
    NotFormatted,
    #[error("the folder is neither empty nor a disk of EggsFS (no file '{IDENTITY_FILE}' in it)")]
    NotEmpty,
    #[error("{0}")]
    Identity(#[from] IdentityError),
    #[error("it belongs to another cluster ({theirs}; this is {ours})")]
    AnotherCluster { theirs: ClusterId, ours: ClusterId },
    #[error("it is in use by another process")]
    InUse,
    #[error("its folder '{0}' is gone")]
    Incomplete(&'static str),
    /// The configuration and the disk, or two disks, do not go together.
    #[error("{0}")]
    Mismatch(String),
    #[error("cannot {what}: {source}")]
    Io { what: &'static str, source: io::Error },
}

impl OpenProblem {
    pub(super) fn io(what: &'static str) -> impl FnOnce(Errno) -> OpenProblem {
        move |errno| OpenProblem::Io { what, source: errno.into() }
    }

    /// Of a disk that was there once: it is lost and may come back, the process goes on even when it has no other.
    /// Everything else is for people to put right.
    pub fn is_loss(&self) -> bool {
        matches!(
            self,
            OpenProblem::Missing
                | OpenProblem::NotFormatted
                | OpenProblem::NotEmpty
                | OpenProblem::Incomplete(_)
                | OpenProblem::Identity(IdentityError::Damaged(_) | IdentityError::Invalid(_))
                | OpenProblem::Io { .. }
        )
    }
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Contents {
    Absent,
    /// Nothing, or what an interrupted formatting left.
    Empty,
    Disk(Identity),
}

pub(super) const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Looks at what is at `path`; changes nothing.
///
/// # Errors
/// What makes it unusable.
pub fn inspect(path: &Path) -> Result<Contents, OpenError> {
    let problem = |problem| OpenError { path: path.to_owned(), problem };
    let root = match rfs::open(path, DIRECTORY, Mode::empty()) {
        Ok(root) => root,
        Err(Errno::NOENT) => return Ok(Contents::Absent),
        Err(error) => return Err(problem(OpenProblem::io("open the folder")(error))),
    };
    match identity(&root) {
        Ok((identity, _)) => Ok(Contents::Disk(identity)),
        Err(OpenProblem::NotFormatted) => match blank(&root) {
            Ok(true) => Ok(Contents::Empty),
            Ok(false) => Err(problem(OpenProblem::NotEmpty)),
            Err(error) => Err(problem(OpenProblem::io("read the folder")(error))),
        },
        Err(error) => Err(problem(error)),
    }
}

/// Makes the empty or absent folder at `path` a disk (BL-6). Interrupted, it can be done again.
///
/// # Errors
/// What is in the way. A folder that is not empty is left as it is.
pub fn format(path: &Path, identity: &Identity) -> Result<(), OpenError> {
    let problem = |problem| OpenError { path: path.to_owned(), problem };
    let encoded = identity.encode().map_err(|error| problem(error.into()))?;
    std::fs::create_dir_all(path)
        .map_err(|source| problem(OpenProblem::Io { what: "make the folder", source }))?;
    let root = rfs::open(path, DIRECTORY, Mode::empty())
        .map_err(|error| problem(OpenProblem::io("open the folder")(error)))?;
    lock(&root).map_err(problem)?;
    match blank(&root) {
        Ok(true) => {}
        Ok(false) => return Err(problem(OpenProblem::NotEmpty)),
        Err(error) => return Err(problem(OpenProblem::io("read the folder")(error))),
    }
    write_new(&root, &encoded)
        .and_then(|()| parents_durable(path))
        .map_err(|source| problem(OpenProblem::Io { what: "format the folder", source }))
}

/// The identity is renamed into place last: with it, everything else is there.
fn write_new(root: &OwnedFd, identity: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
    let file = rfs::openat(root, IDENTITY_FILE_NEW, flags, Mode::from_raw_mode(0o600))?;
    let mut file = std::fs::File::from(file);
    io::Write::write_all(&mut file, identity)?;
    file.sync_all()?;
    match rfs::mkdirat(root, SEGMENTS, Mode::from_raw_mode(0o700)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    rfs::fsync(root)?;
    rfs::renameat(root, IDENTITY_FILE_NEW, root, IDENTITY_FILE)?;
    rfs::fsync(root)?;
    Ok(())
}

/// The folder's own name, and those of the folders made with it.
fn parents_durable(path: &Path) -> io::Result<()> {
    for parent in std::path::absolute(path)?.ancestors().skip(1).take(2) {
        // One we may not read was not made by us.
        if let Ok(parent) = std::fs::File::open(parent) {
            parent.sync_all()?;
        }
    }
    Ok(())
}

/// One process per disk: a lock on the folder itself leaves no file and ends with the process.
pub(super) fn lock(root: &OwnedFd) -> Result<(), OpenProblem> {
    match rfs::flock(root, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(OpenProblem::InUse),
        Err(error) => Err(OpenProblem::io("lock the folder")(error)),
    }
}

pub(super) fn identity(root: &OwnedFd) -> Result<(Identity, Vec<u8>), OpenProblem> {
    let bytes = match read_identity(root) {
        Ok(bytes) => bytes,
        Err(Errno::NOENT) => return Err(OpenProblem::NotFormatted),
        Err(error) => return Err(OpenProblem::io("read its identity file")(error)),
    };
    Ok((Identity::decode(&bytes)?, bytes))
}

/// The bytes of the identity file; of one that is too long, more than an identity can have.
pub(super) fn read_identity(root: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rfs::openat(root, IDENTITY_FILE, flags, Mode::empty())?;
    let mut bytes = vec![0; IDENTITY_BYTES_MAX + 1];
    let mut length = 0;
    while length < bytes.len() {
        let read =
            rustix::io::retry_on_intr(|| rustix::io::pread(&file, &mut bytes[length..], length as u64))?;
        if read == 0 {
            break;
        }
        length += read;
    }
    bytes.truncate(length);
    Ok(bytes)
}

/// Whether a folder may be formatted: nothing in it but what mkfs or an interrupted formatting left.
fn blank(root: &OwnedFd) -> Result<bool, Errno> {
    for entry in Dir::read_from(root)? {
        let entry = entry?;
        let usual = match entry.file_name().to_bytes() {
            b"." | b".." | b"lost+found" => true,
            name if name == IDENTITY_FILE_NEW.as_bytes() => true,
            name if name == SEGMENTS.as_bytes() => {
                let folder = rfs::openat(root, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
                let mut inside = Dir::read_from(&folder)?;
                inside.all(|entry| {
                    entry.is_ok_and(|entry| matches!(entry.file_name().to_bytes(), b"." | b".."))
                })
            }
            _ => false,
        };
        if !usual {
            return Ok(false);
        }
    }
    Ok(true)
}
