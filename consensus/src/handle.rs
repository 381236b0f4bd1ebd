//! How async code writes to and reads from the consensus thread.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use eggs_consensus_core::{GroupId, GroupStatus};
use eggs_machine::Table;
use eggs_proto::time::HybridClock;
use eggs_proto::{SessionId, Time};
use tokio::sync::{mpsc, oneshot, watch};

/// Why nothing was answered. Whether a write happened is unknown only after `Stopped`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConsensusError {
    #[error("this host does not lead the group")]
    NotLeader,
    #[error("too many requests are waiting")]
    Busy,
    /// Stopping, or stopped by a storage error.
    #[error("consensus has stopped")]
    Stopped,
    #[error("{0}")]
    Storage(String),
}

/// The answer to a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// The machine's (first) reply.
    Reply(Bytes),
    /// What `prepare` answered; nothing was logged.
    Refused(Bytes),
    /// The session has gone on to a later sequence.
    Stale,
}

pub(crate) type Prepare = Box<dyn FnOnce(&dyn Table, Time) -> Result<Bytes, Bytes> + Send>;
pub(crate) type Read = Box<dyn FnOnce(&Views<'_>, Time) + Send>;
pub(crate) type WriteAnswer = oneshot::Sender<Result<Applied, ConsensusError>>;

pub(crate) enum Message {
    Write { group: GroupId, session: SessionId, sequence: u64, prepare: Prepare, answer: WriteAnswer },
    Read(Read),
    Status(oneshot::Sender<Vec<GroupStatus>>),
    Snapshot(GroupId),
    Stop,
}

/// The state of the groups led here; valid within one read.
pub struct Views<'a> {
    pub(crate) view: &'a dyn Fn(GroupId) -> Option<&'a dyn Table>,
}

impl<'a> Views<'a> {
    /// `None` when this host does not lead the group.
    pub fn get(&self, group: GroupId) -> Option<&'a dyn Table> {
        (self.view)(group)
    }
}

impl fmt::Debug for Views<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Views")
    }
}

/// Sends requests to the consensus thread; cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(crate) sender: mpsc::Sender<Message>,
    pub(crate) clock: Arc<SharedClock>,
    pub(crate) stopped: watch::Receiver<Option<String>>,
}

impl Handle {
    /// Agrees on a command and answers the machine's reply to it.
    ///
    /// `prepare` runs on the consensus thread, on the leader, on the state just before the proposal:
    /// it makes the choices. Its `Err(bytes)` is answered as `Refused`, and nothing is logged. A repeated
    /// (session, sequence) gets its first reply without being prepared again.
    pub async fn write(
        &self,
        group: GroupId,
        session: SessionId,
        sequence: u64,
        prepare: impl FnOnce(&dyn Table, Time) -> Result<Bytes, Bytes> + Send + 'static,
    ) -> Result<Applied, ConsensusError> {
        let (answer, answered) = oneshot::channel();
        self.send(Message::Write { group, session, sequence, prepare: Box::new(prepare), answer })?;
        answered.await.unwrap_or(Err(ConsensusError::Stopped))
    }

    /// Runs `read` on the consensus thread between turns: what it sees is linearizable for the groups
    /// led here.
    pub async fn read<R: Send + 'static>(
        &self,
        read: impl FnOnce(&Views<'_>, Time) -> R + Send + 'static,
    ) -> Result<R, ConsensusError> {
        let (answer, answered) = oneshot::channel();
        let read: Read = Box::new(move |views, now| {
            // Nobody waits any more: nothing to do.
            let _ = answer.send(read(views, now));
        });
        self.send(Message::Read(read))?;
        answered.await.map_err(|_| ConsensusError::Stopped)
    }

    /// How every group of this host is.
    pub async fn status(&self) -> Result<Vec<GroupStatus>, ConsensusError> {
        let (answer, answered) = oneshot::channel();
        self.send(Message::Status(answer))?;
        answered.await.map_err(|_| ConsensusError::Stopped)
    }

    /// Begins a snapshot of a group without waiting for its log to outgrow it.
    pub fn snapshot(&self, group: GroupId) -> Result<(), ConsensusError> {
        self.send(Message::Snapshot(group))
    }

    /// A time later than every one given or observed before.
    pub fn now(&self) -> Time {
        self.clock.now()
    }

    /// Takes in a time seen in a message; false: it is too far ahead to be believed.
    pub fn observe(&self, seen: Time) -> bool {
        self.clock.observe(seen)
    }

    /// Waits until the thread has ended; the reason when it was a failure.
    pub async fn stopped(&self) -> Option<String> {
        let mut stopped = self.stopped.clone();
        match stopped.wait_for(Option::is_some).await {
            Ok(why) => why.clone().filter(|why| !why.is_empty()),
            Err(_) => Some("the consensus thread panicked".to_owned()),
        }
    }

    fn send(&self, message: Message) -> Result<(), ConsensusError> {
        self.sender.try_send(message).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ConsensusError::Busy,
            mpsc::error::TrySendError::Closed(_) => ConsensusError::Stopped,
        })
    }
}

/// The process's hybrid logical clock over the system's.
#[derive(Debug, Default)]
pub(crate) struct SharedClock {
    clock: Mutex<HybridClock>,
}

impl SharedClock {
    pub(crate) fn now(&self) -> Time {
        let wall = wall();
        self.clock.lock().unwrap_or_else(PoisonError::into_inner).now(wall)
    }

    fn observe(&self, seen: Time) -> bool {
        let wall = wall();
        self.clock.lock().unwrap_or_else(PoisonError::into_inner).observe(seen, wall)
    }

    /// What the groups' own clocks say is believed whatever the system's says: time never goes back.
    pub(crate) fn raise(&self, to: Time) {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner).observe(to, to);
    }
}

fn wall() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
