//! How fast blocks move and how many are in memory (JA-5, JA-6).

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use eggs_janitor_core::throttle::{Throttle, rest_after};
use eggs_proto::Time;
use tokio::sync::{Semaphore, SemaphorePermit};

const UNIT: u64 = 1 << 10;

#[derive(Debug)]
pub(crate) struct Budget {
    throttle: Mutex<Throttle>,
    began: Instant,
    /// In KiB.
    memory: Semaphore,
    memory_units: u32,
    disk_share: u32,
}

impl Budget {
    /// Rate in bytes per second, 0: no limit.
    pub fn new(rate: u64, disk_share: u32, memory_mib: u32) -> Budget {
        let memory_units = memory_mib.saturating_mul(1 << 10);
        Budget {
            throttle: Mutex::new(Throttle::new(rate)),
            began: Instant::now(),
            memory: Semaphore::new(memory_units as usize),
            memory_units,
            disk_share,
        }
    }

    pub fn set_rate(&self, rate: u64) {
        self.throttle.lock().unwrap_or_else(PoisonError::into_inner).set_rate(rate);
    }

    /// Waits until so many bytes may be moved.
    pub async fn take(&self, bytes: u64) {
        let now = Time(u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX));
        let wait = self.throttle.lock().unwrap_or_else(PoisonError::into_inner).take(bytes, now);
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Of what was taken, this was not moved.
    pub fn give_back(&self, bytes: u64) {
        self.throttle.lock().unwrap_or_else(PoisonError::into_inner).give_back(bytes);
    }

    /// Waits for room in memory; what is larger than all there is takes all.
    pub async fn memory(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).clamp(1, self.memory_units);
        // Never closed.
        self.memory.acquire_many(units).await.ok()
    }

    /// Rests after work, so that the disks have time for others.
    pub async fn rest(&self, busy: Duration) {
        let rest = rest_after(busy, self.disk_share);
        if !rest.is_zero() {
            tokio::time::sleep(rest).await;
        }
    }
}
