//! Whether the disk that holds a service's own data has room.
//!
//! A log that cannot be written stops its service, reads and all. So what adds data is refused while
//! there is still room for what takes data away.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Less free than this is almost full …
const RESERVE_BYTES: u64 = 64 << 20;
/// … or, on a small file system, less than this share. Block services leave more than that free.
const RESERVE_SHARE: u64 = 8;
/// A look is a few microseconds; whoever asks more often gets the last answer.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// The room on one file system, looked at when it is asked for: at rest nobody looks.
#[derive(Debug)]
pub struct Space {
    directory: PathBuf,
    full: AtomicBool,
    made: Instant,
    /// Milliseconds after `made`.
    looked_ms: AtomicU64,
}

impl Space {
    /// Of the file system that holds `directory`.
    pub fn new(directory: PathBuf) -> Space {
        let space = Space {
            directory,
            full: AtomicBool::new(false),
            made: Instant::now(),
            looked_ms: AtomicU64::new(0),
        };
        space.look();
        space
    }

    /// Nothing more should be added.
    pub fn is_almost_full(&self) -> bool {
        let now = u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX);
        let looked = self.looked_ms.load(Ordering::Relaxed);
        let due = u128::from(now.saturating_sub(looked)) >= LOOK_INTERVAL.as_millis();
        // One of those who ask at once looks.
        if due && self.looked_ms.compare_exchange(looked, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.look();
        }
        self.full.load(Ordering::Relaxed)
    }

    fn look(&self) {
        let full = match self.free_and_capacity() {
            Ok((free, capacity)) => free < RESERVE_BYTES.min(capacity / RESERVE_SHARE),
            Err(error) => {
                tracing::warn!(path = %self.directory.display(), %error, "cannot ask for free space");
                return;
            }
        };
        if self.full.swap(full, Ordering::Relaxed) != full {
            let path = self.directory.display();
            if full {
                tracing::warn!(%path, "the disk is almost full: refusing what adds data");
            } else {
                tracing::info!(%path, "the disk has room again");
            }
        }
    }

    fn free_and_capacity(&self) -> io::Result<(u64, u64)> {
        let stat = rustix::fs::statvfs(&self.directory)?;
        Ok((stat.f_bavail.saturating_mul(stat.f_frsize), stat.f_blocks.saturating_mul(stat.f_frsize)))
    }
}
