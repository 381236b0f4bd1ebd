//! What waits for the consensus thread: bounded, and taken in at most once a turn.
//!
//! What peers say is apart from what clients ask, so that heartbeats do not wait behind requests. Peers are bounded where
//! their streams are read ([`transport`](crate::transport)): what waits here of a stream stops its reading.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use eggs_consensus_core::{GroupId, PeerBatch, Wanted};
use eggs_proto::StoreId;
use tokio::sync::OwnedSemaphorePermit;

use crate::handle::{ConsensusError, Message};

/// Requests waiting for the thread; more are answered `Busy`.
const REQUESTS_MAX: usize = 4096;

/// What another store had to say.
pub(crate) struct Mail {
    pub(crate) from: StoreId,
    pub(crate) batch: PeerBatch,
    pub(crate) bytes: usize,
    /// Gives its stream room for more once it is taken in.
    pub(crate) _room: OwnedSemaphorePermit,
}

#[derive(Default)]
pub(crate) struct Inbox {
    waiting: Mutex<Waiting>,
    wake: Condvar,
}

#[derive(Default)]
struct Waiting {
    closed: bool,
    /// The thread waits to be woken.
    asleep: bool,
    requests: VecDeque<Message>,
    news: News,
}

/// Everything but requests.
#[derive(Default)]
pub(crate) struct News {
    pub(crate) mail: Vec<Mail>,
    /// Something could not be sent to these.
    pub(crate) unreachable: BTreeSet<StoreId>,
    pub(crate) found: BTreeMap<GroupId, Vec<StoreId>>,
    pub(crate) want: BTreeMap<GroupId, Wanted>,
    pub(crate) hand_over: bool,
    pub(crate) stop: bool,
}

impl News {
    pub(crate) fn is_empty(&self) -> bool {
        self.mail.is_empty()
            && self.unreachable.is_empty()
            && self.found.is_empty()
            && self.want.is_empty()
            && !self.hand_over
            && !self.stop
    }
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn ask(&self, request: Message) -> Result<(), ConsensusError> {
        let mut waiting = self.lock();
        if waiting.closed {
            return Err(ConsensusError::Stopped);
        }
        if waiting.requests.len() >= REQUESTS_MAX {
            return Err(ConsensusError::Busy);
        }
        waiting.requests.push_back(request);
        self.wake(waiting);
        Ok(())
    }

    /// False: the thread has ended.
    pub(crate) fn tell(&self, news: impl FnOnce(&mut News)) -> bool {
        let mut waiting = self.lock();
        if waiting.closed {
            return false;
        }
        news(&mut waiting.news);
        self.wake(waiting);
        true
    }

    /// Only who sleeps: waking is a system call.
    fn wake(&self, mut waiting: MutexGuard<'_, Waiting>) {
        let asleep = std::mem::take(&mut waiting.asleep);
        drop(waiting);
        if asleep {
            self.wake.notify_one();
        }
    }

    /// Waits until there is something, or `until` (`None`: for as long as it takes), and takes the news; the requests too
    /// when `requests` has none left.
    pub(crate) fn take(&self, requests: &mut VecDeque<Message>, until: Option<Instant>) -> News {
        let mut waiting = self.lock();
        while requests.is_empty() && waiting.requests.is_empty() && waiting.news.is_empty() {
            waiting.asleep = true;
            match until {
                None => waiting = self.wake.wait(waiting).unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    let woken = self.wake.wait_timeout(waiting, left);
                    waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
        waiting.asleep = false;
        if requests.is_empty() {
            std::mem::swap(requests, &mut waiting.requests);
        }
        std::mem::take(&mut waiting.news)
    }

    /// Nothing comes in any more; what waited is dropped, which answers it.
    pub(crate) fn close(&self) {
        let mut waiting = self.lock();
        waiting.closed = true;
        let dropped = (std::mem::take(&mut waiting.requests), std::mem::take(&mut waiting.news));
        drop(waiting);
        drop(dropped);
    }
}
