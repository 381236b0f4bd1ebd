//! How async code writes to and reads from the consensus thread.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use eggs_consensus_core::{GroupId, GroupStatus};
use eggs_machine::Table;
use eggs_proto::{ClusterId, SessionId, StoreId, Time, pb};
use tokio::sync::{oneshot, watch};

use crate::places::{Joined, Shared};
use crate::reads::{self, Reading};
use crate::transport::PeerHandler;

/// Why nothing was answered. Whether a write happened is unknown after `NotLeader` (it may have been proposed before the
/// leader changed) and `Stopped`: repeated with its session and sequence, it happens once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConsensusError {
    /// HOST:PORT of who does, as far as it is known here.
    #[error("this host does not lead the group")]
    NotLeader { leader: Option<String> },
    #[error("too many requests are waiting")]
    Busy,
    /// Stopping, or stopped by a storage error.
    #[error("consensus has stopped")]
    Stopped,
    #[error("{0}")]
    Storage(String),
    /// The files have lost or damaged what was acknowledged: this replica may have forgotten its votes and must not go on.
    #[error("{0}")]
    Damaged(String),
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
pub(crate) type LocalRead = Box<dyn FnOnce(&Views<'_>, Time) + Send>;
pub(crate) type WriteAnswer = oneshot::Sender<Result<Applied, ConsensusError>>;

pub(crate) enum Message {
    Write { group: GroupId, session: SessionId, sequence: u64, prepare: Prepare, answer: WriteAnswer },
    Read { groups: Vec<GroupId>, reading: Box<dyn Reading> },
    Local(LocalRead),
    Status(oneshot::Sender<Vec<GroupStatus>>),
    Snapshot(GroupId),
}

/// The tables behind [`Views`].
pub(crate) trait Look {
    fn led(&self, group: GroupId) -> Option<&dyn Table>;
    fn local(&self, group: GroupId) -> Option<&dyn Table>;
}

/// The state of the groups here; valid within one read.
pub struct Views<'a> {
    look: &'a dyn Look,
    /// Those led here that were asked for.
    pub(crate) asked: RefCell<BTreeSet<GroupId>>,
}

impl<'a> Views<'a> {
    pub(crate) fn new(look: &'a dyn Look) -> Self {
        Views { look, asked: RefCell::default() }
    }

    /// `None` when this store does not lead the group.
    pub fn get(&self, group: GroupId) -> Option<&'a dyn Table> {
        let table = self.look.led(group)?;
        self.asked.borrow_mut().insert(group);
        Some(table)
    }

    /// The state of any replica here, as far as it is applied; `None` when there is none, or it waits for its first snapshot.
    pub fn local(&self, group: GroupId) -> Option<&'a dyn Table> {
        self.look.local(group)
    }
}

impl fmt::Debug for Views<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Views")
    }
}

/// Sends requests to the consensus thread; cheap to clone.
#[derive(Clone)]
pub struct Handle {
    pub(crate) shared: Arc<Shared>,
    pub(crate) stopped: watch::Receiver<Option<String>>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("store", &self.shared.store).finish_non_exhaustive()
    }
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
        self.ask(Message::Write { group, session, sequence, prepare: Box::new(prepare), answer })?;
        answered.await.unwrap_or(Err(ConsensusError::Stopped))
    }

    /// Runs `read` on the consensus thread; what it sees with [`Views::get`] is linearizable, for all groups it asks for.
    ///
    /// `groups` are confirmed first: this store leads them (else `NotLeader`), and their state is as new as this call.
    /// When `read` asks for others led here, those are confirmed and it runs again, so it must be repeatable; only the last
    /// run counts. Without other voters, and under a lease, nothing has to be confirmed and it runs once.
    pub async fn read<R: Send + 'static>(
        &self,
        groups: Vec<GroupId>,
        read: impl FnMut(&Views<'_>, Time) -> R + Send + 'static,
    ) -> Result<R, ConsensusError> {
        let (answer, answered) = oneshot::channel();
        self.ask(Message::Read { groups, reading: reads::reading(read, answer) })?;
        answered.await.unwrap_or(Err(ConsensusError::Stopped))
    }

    /// Runs `read` once on the consensus thread without confirming anything: [`Views::get`] only tells what this store leads,
    /// as far as it knows.
    pub async fn local<R: Send + 'static>(
        &self,
        read: impl FnOnce(&Views<'_>, Time) -> R + Send + 'static,
    ) -> Result<R, ConsensusError> {
        let (answer, answered) = oneshot::channel();
        let read: LocalRead = Box::new(move |views, now| {
            // Nobody waits any more: nothing to do.
            let _ = answer.send(read(views, now));
        });
        self.ask(Message::Local(read))?;
        answered.await.map_err(|_| ConsensusError::Stopped)
    }

    /// How every group of this store is; none once it has stopped.
    pub async fn status(&self) -> Vec<GroupStatus> {
        let (answer, answered) = oneshot::channel();
        match self.ask(Message::Status(answer)) {
            Ok(()) => answered.await.unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }

    /// Begins a snapshot of a group without waiting for its log to outgrow it.
    pub fn snapshot(&self, group: GroupId) -> Result<(), ConsensusError> {
        self.ask(Message::Snapshot(group))
    }

    /// Acts on a cluster map: learns addresses and leaders, founds the groups it is to found, and brings those it leads to
    /// the members they are wanted to have. Cheap when the map says nothing new.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "maps are handed on; nobody needs to know whether it is kept"
    )]
    pub fn follow(&self, map: Arc<pb::ClusterMapReply>) {
        self.shared.follow(&map);
    }

    /// Founds groups with these voters, this store among them; nothing happens to those it has any trace of.
    pub fn found(&self, groups: Vec<(GroupId, Vec<StoreId>)>) {
        self.shared.inbox.tell(|news| news.found.extend(groups));
    }

    /// Where stores are, before there is a map.
    pub fn addresses(&self, addresses: Vec<(StoreId, String)>) {
        self.shared.add_addresses(addresses);
    }

    /// Who leads a group, as far as it is known here.
    pub fn leader(&self, group: GroupId) -> Option<StoreId> {
        self.shared.leader(group)
    }

    /// Whether the replica here leads the group or follows somebody, whatever the map says.
    pub fn hears_leader(&self, group: GroupId) -> bool {
        self.shared.hears_leader(group)
    }

    /// HOST:PORT of another store that leads a group, as far as it is known here: for hints.
    pub fn leader_address(&self, group: GroupId) -> Option<String> {
        self.shared.leader_address(group)
    }

    pub fn store(&self) -> StoreId {
        self.shared.store
    }

    /// How far the wall clock here is ahead of the others', in nanoseconds.
    pub fn clock_offset(&self) -> i64 {
        self.shared.clock_offset()
    }

    /// What answers the other stores for this one; see [`peer_streams`](crate::peer_streams).
    pub fn peers(&self) -> PeerHandler {
        PeerHandler::new(Arc::clone(&self.shared))
    }

    /// Which cluster this store is of. Until it is known no stream to or from another store is opened.
    pub fn join(&self, cluster: ClusterId, secret: [u8; 32]) {
        let joined = Some(Joined { cluster, secret });
        self.shared.joined.send_if_modified(|known| {
            let changed = *known != joined;
            *known = joined;
            changed
        });
    }

    /// Hands the groups led here to others where they are as far as this one: before an orderly stop.
    pub fn hand_over(&self) {
        self.shared.inbox.tell(|news| news.hand_over = true);
    }

    /// A time later than every one given or observed before.
    pub fn now(&self) -> Time {
        self.shared.clock.now()
    }

    /// Takes in a time seen in a message; false: it is too far ahead to be believed.
    pub fn observe(&self, seen: Time) -> bool {
        self.shared.clock.observe(seen)
    }

    /// Waits until the thread has ended; the reason when it was a failure.
    pub async fn stopped(&self) -> Option<String> {
        let mut stopped = self.stopped.clone();
        match stopped.wait_for(Option::is_some).await {
            Ok(why) => why.clone().filter(|why| !why.is_empty()),
            Err(_) => Some("the consensus thread panicked".to_owned()),
        }
    }

    fn ask(&self, message: Message) -> Result<(), ConsensusError> {
        let asked = self.shared.inbox.ask(message);
        if asked == Err(ConsensusError::Busy) {
            metrics::counter!("eggs_consensus_busy_total", "host" => self.shared.name).increment(1);
        }
        asked
    }
}
