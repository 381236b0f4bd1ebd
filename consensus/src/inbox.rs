//! What waits for the consensus thread: bounded, and taken in at most once a turn.
//!
//! What peers say is apart from what clients ask, so that heartbeats do not wait behind requests. Peers are bounded where
//! their streams are read ([`transport`](crate::transport)): what waits here of a stream stops its reading.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use eggs_consensus_core::{GroupId, PeerBatch, TICK, Wanted};
use eggs_proto::{StoreId, Time};
use tokio::sync::{Notify, OwnedSemaphorePermit};

use crate::handle::{ConsensusError, Message};

/// Requests waiting for the thread; more are answered `Busy`.
const REQUESTS_MAX: usize = 4096;

/// The tick that a heartbeat waits for comes within this: at rest several pass at once.
const NEAR: Duration = TICK.saturating_mul(3);

/// What another store had to say.
pub(crate) struct Mail {
    pub(crate) from: StoreId,
    pub(crate) batch: PeerBatch,
    pub(crate) bytes: usize,
    /// When it was read.
    pub(crate) came: Instant,
    pub(crate) wall: Time,
    /// Gives its stream room for more once it is taken in.
    pub(crate) _room: OwnedSemaphorePermit,
}

#[derive(Default)]
pub(crate) struct Inbox {
    waiting: Mutex<Waiting>,
    wake: Notify,
}

#[derive(Default)]
struct Waiting {
    closed: bool,
    /// The thread waits to be woken …
    asleep: bool,
    /// … or until then.
    until: Option<Instant>,
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

    /// What peers say. A heartbeat alone waits for the next tick when one is near: that somebody is there, the thread needs
    /// to know no sooner, and at rest most of the waking would be for it. False: the thread has ended.
    pub(crate) fn post(&self, mail: Mail) -> bool {
        let mut waiting = self.lock();
        if waiting.closed {
            return false;
        }
        let can_wait = mail.batch.messages.is_empty();
        waiting.news.mail.push(mail);
        let soon = || waiting.until.is_some_and(|until| until <= Instant::now() + NEAR);
        if !(can_wait && soon()) {
            self.wake(waiting);
        }
        true
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
    pub(crate) async fn take(&self, requests: &mut VecDeque<Message>, until: Option<Instant>) -> News {
        loop {
            if let Some(news) = self.take_now(requests, until) {
                return news;
            }
            let woken = self.wake.notified();
            match until {
                None => woken.await,
                // Too late or woken, it is looked at again.
                Some(until) => drop(tokio::time::timeout_at(until.into(), woken).await),
            }
        }
    }

    /// `None`: there is nothing yet, and it is not yet `until`; whoever brings something wakes from now on.
    fn take_now(&self, requests: &mut VecDeque<Message>, until: Option<Instant>) -> Option<News> {
        let mut waiting = self.lock();
        let nothing = requests.is_empty() && waiting.requests.is_empty() && waiting.news.is_empty();
        if nothing && until.is_none_or(|until| until > Instant::now()) {
            (waiting.asleep, waiting.until) = (true, until);
            return None;
        }
        waiting.asleep = false;
        if requests.is_empty() {
            std::mem::swap(requests, &mut waiting.requests);
        }
        Some(std::mem::take(&mut waiting.news))
    }

    /// Whether anything waits.
    pub(crate) fn is_empty(&self) -> bool {
        let waiting = self.lock();
        waiting.requests.is_empty() && waiting.news.is_empty()
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use eggs_consensus_core::PeerMessage;
    use eggs_proto::pb;
    use tokio::sync::Semaphore;

    use super::*;

    fn mail(messages: usize) -> Mail {
        let want = (GroupId(1), PeerMessage::Want { index: 1, term: 1, offset: 0 });
        Mail {
            from: StoreId(1),
            batch: PeerBatch { heartbeat: pb::PeerHeartbeat::default(), messages: vec![want; messages] },
            bytes: 1,
            came: Instant::now(),
            wall: Time(1),
            _room: Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap(),
        }
    }

    /// How long the thread sleeps that waits for `wait` when that mail comes.
    fn slept(wait: Option<Duration>, messages: usize) -> Duration {
        let inbox = Inbox::default();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
                let (began, mut requests) = (Instant::now(), VecDeque::new());
                let news = runtime.block_on(inbox.take(&mut requests, wait.map(|wait| began + wait)));
                assert_eq!(news.mail.len(), 1);
                began.elapsed()
            });
            while !inbox.lock().asleep {
                std::thread::yield_now();
            }
            assert!(inbox.post(mail(messages)));
            thread.join().unwrap()
        })
    }

    #[test]
    fn a_heartbeat_waits_for_a_tick_that_is_near_and_nothing_else_waits() {
        assert!(slept(Some(TICK), 0) >= TICK);
        let long = 100 * TICK;
        for (wait, messages) in [(Some(TICK), 1), (Some(long), 0), (Some(long), 1), (None, 0), (None, 1)] {
            assert!(slept(wait, messages) < wait.unwrap_or(long), "{wait:?} {messages}");
        }
    }
}
