//! What `put`, `get` and `cp` have in common: how much is in flight at once, and local attributes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use eggs_proto::Time;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::failure::{Failure, Outcome};

/// Memory for files in flight, all together.
const BUDGET_MIB: u32 = 256;
/// What one file may take of it: a span with its parity, twice.
const FILE_MIB_MAX: u32 = 192;
/// Even an empty file takes this much: at most 64 files are in flight.
const FILE_MIB_MIN: u32 = 4;
/// Files of one directory waiting for their turn at the same time.
const FILES_AT_ONCE: usize = 32;

/// Bounds what is in flight by its size.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Semaphore>);

impl Budget {
    pub fn new() -> Budget {
        Budget(Arc::new(Semaphore::new(BUDGET_MIB as usize)))
    }

    /// Room for a file of `bytes`, waiting for it in order.
    pub async fn room(&self, bytes: u64) -> Outcome<OwnedSemaphorePermit> {
        let taken = self.0.clone().acquire_many_owned(weight(bytes)).await;
        taken.map_err(|_| Failure::refused("", "stopping"))
    }
}

fn weight(bytes: u64) -> u32 {
    let mib = u32::try_from(bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
    mib.saturating_mul(2).clamp(FILE_MIB_MIN, FILE_MIB_MAX)
}

/// Does `work` for every item, many at once. Refusals are printed; true when there were any.
pub async fn each<I, F>(
    items: impl IntoIterator<Item = I>,
    command: &str,
    work: impl Fn(I) -> F,
) -> Outcome<bool>
where
    F: Future<Output = Outcome>,
{
    let mut items = items.into_iter();
    let mut running: FuturesUnordered<F> = items.by_ref().take(FILES_AT_ONCE).map(&work).collect();
    let mut refused = false;
    while let Some(outcome) = running.next().await {
        match outcome {
            Ok(()) => {}
            Err(failure) if failure.is_final() => return Err(failure),
            Err(failure) => {
                failure.print(command);
                refused = true;
            }
        }
        running.extend(items.next().map(&work));
    }
    Ok(refused)
}

/// A local time as the cluster keeps it; before 1970 is 1970.
pub fn time_of(local: SystemTime) -> Time {
    let since = local.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    // 0 would say "unset".
    Time(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX).max(1))
}

/// The cluster's time as files here have it.
pub fn local_time(time: Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(time.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_weigh_what_they_take() {
        assert_eq!(weight(0), FILE_MIB_MIN);
        assert_eq!(weight(10 << 20), 20);
        assert_eq!(weight(u64::MAX), FILE_MIB_MAX);
        const { assert!(FILE_MIB_MAX <= BUDGET_MIB) };
    }

    #[test]
    fn times_go_there_and_back() {
        let time = Time(1_700_000_000_123_456_789);
        assert_eq!(time_of(local_time(time)), time);
        assert_eq!(time_of(SystemTime::UNIX_EPOCH), Time(1));
    }

    #[tokio::test]
    async fn each_goes_on_after_a_refusal() {
        let done = std::sync::atomic::AtomicU32::new(0);
        let refused = each(0..100, "test", |n| {
            let done = &done;
            async move {
                done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if n == 7 { Err(Failure::refused(n, "no")) } else { Ok(()) }
            }
        })
        .await
        .unwrap();
        assert!(refused);
        assert_eq!(done.into_inner(), 100);
    }
}
