//! A file of a disk: positioned reads and writes that do all or fail, and faults on demand for tests.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::fs::{self as rfs, FallocateFlags};
use rustix::io::{Errno, retry_on_intr};

use super::lock;

/// What can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    Read,
    Write,
    Sync,
    Allocate,
}

/// A fault of a disk, as tests order it.
#[derive(Debug, Clone)]
pub struct Fault {
    pub on: Doing,
    /// Part of the names of the files it concerns.
    pub file: &'static str,
    /// It takes so long …
    pub delay: Duration,
    /// … and then fails like this, if at all.
    pub error: Option<Errno>,
    /// How often it happens.
    pub times: u32,
}

/// The faults of one disk; none in daily life.
#[derive(Debug, Default)]
pub struct Faults(Mutex<Vec<Fault>>);

impl Faults {
    pub fn set(&self, faults: Vec<Fault>) {
        *lock(&self.0) = faults;
    }

    /// Whether some have not happened yet.
    pub fn are_left(&self) -> bool {
        lock(&self.0).iter().any(|fault| fault.times > 0)
    }

    pub(super) fn meet(&self, doing: Doing, file: &str) -> Result<(), Errno> {
        let fault = {
            let mut faults = lock(&self.0);
            let fits = |fault: &&mut Fault| fault.on == doing && fault.times > 0 && file.contains(fault.file);
            let Some(fault) = faults.iter_mut().find(fits) else { return Ok(()) };
            fault.times -= 1;
            fault.clone()
        };
        if !fault.delay.is_zero() {
            std::thread::sleep(fault.delay);
        }
        fault.error.map_or(Ok(()), Err)
    }
}

/// The writes and syncs of a disk that are under way.
#[derive(Debug, Default)]
pub struct Underway {
    begun: Mutex<BTreeSet<(Instant, u64)>>,
    next: AtomicU64,
}

impl Underway {
    /// How long the oldest has been going on; none is under way: no time at all.
    pub fn oldest(&self) -> Duration {
        lock(&self.begun).first().map_or(Duration::ZERO, |(since, _)| since.elapsed())
    }

    fn during<R>(&self, work: impl FnOnce() -> R) -> R {
        let key = (Instant::now(), self.next.fetch_add(1, Ordering::Relaxed));
        lock(&self.begun).insert(key);
        let result = work();
        lock(&self.begun).remove(&key);
        result
    }
}

/// An open file.
#[derive(Debug)]
pub struct DiskFile {
    fd: OwnedFd,
    name: String,
    underway: Arc<Underway>,
    faults: Option<Arc<Faults>>,
}

impl DiskFile {
    /// A file of the disk whose writes and syncs `underway` counts.
    pub fn new(fd: OwnedFd, name: String, underway: Arc<Underway>, faults: Option<Arc<Faults>>) -> DiskFile {
        DiskFile { fd, name, underway, faults }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    fn meet(&self, doing: Doing) -> Result<(), Errno> {
        self.faults.as_ref().map_or(Ok(()), |faults| faults.meet(doing, &self.name))
    }

    /// Fills `bytes` from `at`.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file ends before, or the disk's.
    pub fn read_exact(&self, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
        self.meet(Doing::Read)?;
        while !bytes.is_empty() {
            let read = retry_on_intr(|| rustix::io::pread(&self.fd, &mut *bytes, at))?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes = &mut bytes[read..];
            at += read as u64;
        }
        Ok(())
    }

    /// Exactly `length` bytes from `at`, without first filling them with zeros.
    ///
    /// # Errors
    /// As [`DiskFile::read_exact`].
    pub fn read(&self, at: u64, length: usize) -> io::Result<Vec<u8>> {
        self.meet(Doing::Read)?;
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let from = at + bytes.len() as u64;
            let read = retry_on_intr(|| rustix::io::pread(&self.fd, spare_capacity(&mut bytes), from))?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        // An allocator may have given more room than was asked for.
        bytes.truncate(length);
        Ok(bytes)
    }

    /// # Errors
    /// The disk's; a part may be written then.
    pub fn write_all(&self, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
        self.underway.during(|| {
            self.meet(Doing::Write)?;
            while !bytes.is_empty() {
                let written = retry_on_intr(|| rustix::io::pwrite(&self.fd, bytes, at))?;
                if written == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                bytes = &bytes[written..];
                at += written as u64;
            }
            Ok(())
        })
    }

    /// Makes what was written durable, and the length that goes with it.
    ///
    /// # Errors
    /// The disk's. What was not durable before may be lost then, whatever a later call says.
    pub fn sync(&self) -> io::Result<()> {
        self.underway.during(|| {
            self.meet(Doing::Sync)?;
            Ok(retry_on_intr(|| rfs::fdatasync(&self.fd))?)
        })
    }

    /// Takes room; beyond its end too when the length is to stay.
    ///
    /// # Errors
    /// No space. Not every file system can do this: that is no error.
    pub fn allocate(&self, at: u64, length: u64, keep_length: bool) -> io::Result<()> {
        self.meet(Doing::Allocate)?;
        let flags = if keep_length { FallocateFlags::KEEP_SIZE } else { FallocateFlags::empty() };
        match rfs::fallocate(&self.fd, flags, at, length) {
            Err(error @ (Errno::NOSPC | Errno::DQUOT)) => Err(error.into()),
            // Failing disks show when written to.
            _ => Ok(()),
        }
    }

    /// Gives room inside the file back; whether the file system can.
    pub fn punch(&self, at: u64, length: u64) -> bool {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rfs::fallocate(&self.fd, flags, at, length).is_ok()
    }

    /// # Errors
    /// The disk's.
    pub fn truncate(&self, length: u64) -> io::Result<()> {
        Ok(rfs::ftruncate(&self.fd, length)?)
    }

    /// Length, and the room it takes on the disk.
    ///
    /// # Errors
    /// The disk's.
    pub fn lengths(&self) -> io::Result<(u64, u64)> {
        let stat = rfs::fstat(&self.fd)?;
        Ok((stat.st_size as u64, stat.st_blocks as u64 * 512))
    }

    /// Tells the kernel what will become of a range.
    pub fn advise(&self, at: u64, length: u64, advice: rfs::Advice) {
        // Advice: it may be refused.
        let _ = rfs::fadvise(self.fd.as_fd(), at, std::num::NonZeroU64::new(length), advice);
    }
}
