//! The host: all groups of a store, turned together.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use eggs_machine::Machine;
use eggs_machine::group::Applied;
use eggs_machine::hash::StateHash;
use eggs_proto::{SessionId, StoreId, Time, pb};
use prost::Message;
use raft::eraftpb::{self, Entry, MessageType};
use raft::{SnapshotStatus, Storage};

use crate::membership::Membership;
use crate::open::Restoring;
use crate::peer::{Now, PeerBatch, PeerMessage};
use crate::peers::{Heard, Peers};
use crate::replica::Replica;
use crate::snapshot::Taking;
use crate::storage::{
    AppliedRow, GroupId, LogStore, LogWrite, SnapshotMeta, SnapshotStore, StateStore, StorageError,
};
use crate::transfers::Transfers;
use crate::wanted::{Member, Step, Wanted, next_step};

/// The unit of a host's time.
pub const TICK: Duration = Duration::from_millis(100);
/// A follower that has heard nothing of its leader for this long, and up to as long again, stands for election.
pub(crate) const ELECTION_TICKS: usize = 6;
const HEARTBEAT_TICKS: usize = 2;
/// Reads need no round this long after one began: followers elect nobody else before. One tick less than
/// the election timeout (ticks are counted, not measured), and a tenth less for clocks that run fast.
pub(crate) const LEASE: Duration =
    TICK.saturating_mul(ELECTION_TICKS as u32 - 1).saturating_mul(9).checked_div(10).unwrap();
/// Leaders with nothing to do for this long send their group to sleep.
pub(crate) const SLEEP_AFTER_TICKS: u64 = 10;
/// Between tries to hand over leadership, or to change members.
const RECONCILE_TICKS: u64 = 2;
const TRANSFER_TICKS: u64 = 20;
/// Bytes of committed entries one group applies in one turn: bounds a turn's memory and length.
const APPLY_BYTES_PER_TURN: u64 = 16 << 20;
/// Bytes of entries in one message, and messages in flight to one follower of one group.
const APPEND_BYTES_MAX: u64 = 1 << 20;
const APPENDS_IN_FLIGHT: usize = 64;
/// Bytes of entries of one group that are not yet committed; more are refused as busy.
const UNCOMMITTED_BYTES_MAX: u64 = 64 << 20;
/// Proposals of one group not yet applied; more are refused as busy.
const PROPOSALS_PER_GROUP_MAX: usize = 4096;
/// A group's log is never cut by a snapshot before it has this many bytes …
pub(crate) const SNAPSHOT_LOG_BYTES_MIN: u64 = 4 << 20;
/// … nor before it is this many times as large as the last snapshot: the cost of snapshots stays a
/// fraction of the cost of the log.
pub(crate) const SNAPSHOT_LOG_FACTOR: u64 = 2;
/// What an entry costs in the log besides its data.
const ENTRY_OVERHEAD_BYTES: u64 = 48;
/// What an entry written before the last start is taken to be: those are counted, not measured.
const ENTRY_BYTES_GUESS: u64 = 256;

/// What a host is told when it opens.
#[derive(Debug, Clone, Copy)]
pub struct HostOptions {
    pub store: StoreId,
    /// Another at each start: how others tell this one from the one before.
    pub seed: u64,
    /// Reads without a round to the others while a lease holds. All stores of a group must agree on it.
    pub lease: bool,
    /// Of snapshots sent, to all stores together.
    pub snapshot_bytes_per_second: u64,
}

/// Names a proposal of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProposalId(pub u64);

/// Names a round of confirming reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReadTicket(pub u64);

/// Whether a read may look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grant {
    /// At the state as it is, now.
    Now,
    /// At the state as it is when the ticket is confirmed.
    Later(ReadTicket),
}

/// A command to agree on.
#[derive(Debug, Clone)]
pub struct Proposal {
    pub time: Time,
    /// 0: not exactly-once.
    pub session: SessionId,
    pub sequence: u64,
    pub command: Bytes,
}

/// Why a proposal was not taken; it will not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    #[error("no such group on this host")]
    UnknownGroup,
    #[error("this host does not lead the group")]
    NotLeader,
    #[error("too many proposals are waiting")]
    Busy,
}

/// What came of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer<E> {
    pub group: GroupId,
    /// Set when this host proposed it and still waits.
    pub proposal: Option<ProposalId>,
    pub applied: Applied<E>,
}

/// What a replica is in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// And has applied all of earlier terms.
    Leader {
        term: u64,
    },
    Follower {
        leader: Option<StoreId>,
    },
    /// It is here no more.
    Removed,
}

/// What a turn came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn<E> {
    pub answers: Vec<Answer<E>>,
    /// Leadership was lost: whether they happen is not known here.
    pub dropped: Vec<ProposalId>,
    /// The state is as new as these reads need it.
    pub confirmed: Vec<ReadTicket>,
    /// Leadership was lost before these were confirmed.
    pub lost: Vec<ReadTicket>,
    /// Changes since the last turn.
    pub roles: Vec<(GroupId, Role)>,
}

/// Storage failed: the host must be dropped and opened again.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{group}: {error}")]
pub struct HostError {
    pub group: GroupId,
    pub error: StorageError,
}

/// How far a follower is, as its leader knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub store: StoreId,
    pub matched_index: u64,
    /// Bytes of a snapshot on its way, of how many; 0 of 0: none.
    pub snapshot_sent: u64,
    pub snapshot_total: u64,
}

/// How a group is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    pub group: GroupId,
    /// This replica leads.
    pub leader: bool,
    pub leader_store: Option<StoreId>,
    pub term: u64,
    pub applied_index: u64,
    pub committed_index: u64,
    pub snapshot_index: u64,
    /// Since the last snapshot.
    pub log_bytes: u64,
    pub state_hash: StateHash,
    pub membership: Membership,
    /// Of the others, when this replica leads.
    pub progress: Vec<Progress>,
    pub asleep: bool,
}

pub(crate) type MachineOf<M> = Box<dyn Fn(GroupId) -> Option<M> + Send>;

/// Many groups over one log, one state store and one snapshot store.
pub struct Host<M, L: LogStore, S, P> {
    pub(crate) options: HostOptions,
    pub(crate) machine_of: MachineOf<M>,
    pub(crate) replicas: BTreeMap<GroupId, Replica<M, L>>,
    pub(crate) log: Arc<L>,
    pub(crate) state: S,
    pub(crate) snapshots: P,
    /// Groups with work for the next turn (CO-5).
    pub(crate) dirty: BTreeSet<GroupId>,
    /// Groups whose time passes (CO-5).
    awake: BTreeSet<GroupId>,
    /// Led groups that are not as they are wanted.
    unsettled: BTreeSet<GroupId>,
    wanted: BTreeMap<GroupId, Wanted>,
    peers: Peers,
    transfers: Transfers,
    /// Groups whose log has outgrown their snapshot, waiting for their turn to be taken.
    outgrown: BTreeSet<GroupId>,
    /// Groups whose state becomes that of a snapshot; the message is for raft, once it has.
    restoring: BTreeMap<GroupId, (Option<Restoring>, SnapshotMeta, eraftpb::Message)>,
    taking: Option<Taking>,
    pub(crate) rebuilt: Vec<GroupId>,
    /// Index at which the state of a group was found to be another than its leader's, and made anew.
    pub(crate) healed: BTreeMap<GroupId, u64>,
    truncations: u64,
    snapshot_failed: Option<HostError>,
    next_proposal: u64,
    next_ticket: u64,
    ticks: u64,
    told: Told,
}

/// For the next [`Turn`].
#[derive(Default)]
struct Told {
    dropped: Vec<ProposalId>,
    confirmed: Vec<ReadTicket>,
    lost: Vec<ReadTicket>,
    roles: Vec<(GroupId, Role)>,
}

impl<M, L: LogStore, S, P> fmt::Debug for Host<M, L, S, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("groups", &self.replicas.len()).finish_non_exhaustive()
    }
}

impl<M, L, S, P> Host<M, L, S, P>
where
    M: Machine,
    L: LogStore,
    S: StateStore,
    P: SnapshotStore,
{
    /// Opens every group the log holds: verifies its state or rebuilds it (CO-4). What the log holds beyond the
    /// state is applied by the first turns.
    ///
    /// `machine_of`: the machine of a group, `None` when this host takes no part in such groups.
    pub fn open(
        options: HostOptions,
        machine_of: impl Fn(GroupId) -> Option<M> + Send + 'static,
        log: L,
        state: S,
        snapshots: P,
    ) -> Result<Self, HostError> {
        let ticks_per_second = 1000 / TICK.as_millis() as u64;
        let mut host = Host {
            options,
            machine_of: Box::new(machine_of),
            replicas: BTreeMap::new(),
            log: Arc::new(log),
            state,
            snapshots,
            dirty: BTreeSet::new(),
            awake: BTreeSet::new(),
            unsettled: BTreeSet::new(),
            wanted: BTreeMap::new(),
            peers: Peers::new(options.seed),
            transfers: Transfers::new(options.snapshot_bytes_per_second / ticks_per_second),
            outgrown: BTreeSet::new(),
            restoring: BTreeMap::new(),
            taking: None,
            rebuilt: Vec::new(),
            healed: BTreeMap::new(),
            truncations: 0,
            snapshot_failed: None,
            next_proposal: 1,
            next_ticket: 1,
            ticks: 1,
            told: Told::default(),
        };
        let groups = host.log.groups().map_err(|error| HostError { group: GroupId(0), error })?;
        for id in groups {
            host.open_group(id).map_err(|error| HostError { group: id, error })?;
        }
        host.members_changed();
        Ok(host)
    }

    /// A replica that was opened takes its place.
    pub(crate) fn insert(&mut self, mut replica: Replica<M, L>) -> Result<(), StorageError> {
        let id = replica.id;
        if replica.is_alone() {
            replica.campaign()?;
        }
        self.told.roles.push((id, replica.role));
        self.replicas.insert(id, replica);
        self.dirty.insert(id);
        self.wake(id);
        Ok(())
    }

    /// Groups whose state had to be rebuilt at opening.
    pub fn rebuilt(&self) -> &[GroupId] {
        &self.rebuilt
    }

    /// Founds groups that this store is a first voter of and has no trace of, with one write of the log.
    pub fn found(&mut self, groups: &[(GroupId, Vec<StoreId>)]) -> Result<(), HostError> {
        let me = self.options.store;
        let mut founded = Vec::new();
        for (id, voters) in groups {
            if voters.contains(&me) && !self.replicas.contains_key(id) && (self.machine_of)(*id).is_some() {
                let known = self.log.load(*id).map_err(|error| HostError { group: *id, error })?;
                if known.is_none() {
                    founded.push((*id, voters.clone()));
                }
            }
        }
        let Some(&(group, _)) = founded.first() else { return Ok(()) };
        self.write_founding(&founded).map_err(|error| HostError { group, error })?;
        for (id, _) in founded {
            self.open_group(id).map_err(|error| HostError { group: id, error })?;
        }
        self.members_changed();
        Ok(())
    }

    /// The members a group is to have, and those it is known to have. Its leader brings it there.
    pub fn want(&mut self, id: GroupId, wanted: Wanted) -> Result<(), HostError> {
        let me = self.options.store;
        let removed = self.replicas.get(&id).is_some_and(|replica| {
            // Others decided it, and later than anything this replica knows.
            wanted.known.index > replica.membership().index
                && !wanted.known.contains(me)
                && !wanted.voters.contains(&me)
                && !replica.leads()
        });
        if removed {
            self.remove(id).map_err(|error| HostError { group: id, error })?;
            self.members_changed();
        }
        if self.wanted.get(&id) != Some(&wanted) {
            self.wanted.insert(id, wanted);
            self.unsettled.insert(id);
            self.wake(id);
        }
        Ok(())
    }

    // ---- looking ----

    /// The state of a group when this host leads it, as new as its last confirmed read. `None` when it does
    /// not, or has not yet applied what earlier leaders committed.
    pub fn view(&self, id: GroupId) -> Option<&S::Table> {
        self.replicas.get(&id)?.leads().then(|| self.state.table(id))
    }

    /// The state of a group as far as it is applied here, leader or not. `None` also of a replica that
    /// waits for its first snapshot.
    pub fn local_view(&self, id: GroupId) -> Option<&S::Table> {
        let replica = self.replicas.get(&id)?;
        (replica.applied.index > 0).then(|| self.state.table(id))
    }

    pub fn role(&self, id: GroupId) -> Role {
        self.replicas.get(&id).map_or(Role::Removed, Replica::role_now)
    }

    /// Whether the next turn has something to do.
    pub fn has_work(&self) -> bool {
        !self.dirty.is_empty()
            || self.taking.is_some()
            || !self.outgrown.is_empty()
            || self.transfers.has_work()
            || !self.restoring.is_empty()
            || self.peers.has_mail()
            || !self.told.roles.is_empty()
    }

    /// Whether the only work is a snapshot that is being made durable.
    pub fn is_sealing(&self) -> bool {
        let taking = self.taking.as_ref();
        self.dirty.is_empty()
            && self.restoring.is_empty()
            && !self.peers.has_mail()
            && taking.is_none_or(Taking::is_sealing)
            && (taking.is_some() || (self.outgrown.is_empty() && self.transfers.is_installing()))
    }

    /// Whether entries wait to be persisted or applied (snapshots aside).
    pub fn has_entries(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// How a group is; `None` when it is not here.
    pub fn status(&self, id: GroupId) -> Option<GroupStatus> {
        let replica = self.replicas.get(&id)?;
        let mut progress = replica.progress();
        for progress in &mut progress {
            let (sent, total) = self.transfers.sent(id, progress.store);
            (progress.snapshot_sent, progress.snapshot_total) = (sent, total);
        }
        Some(GroupStatus {
            group: id,
            leader: replica.leads(),
            leader_store: replica.leader(),
            term: replica.node.raft.term,
            applied_index: replica.applied.index,
            committed_index: replica.node.raft.raft_log.committed,
            snapshot_index: replica.snapshot.as_ref().map_or(0, |meta| meta.index),
            log_bytes: replica.log_bytes,
            state_hash: replica.applied.hash,
            membership: replica.membership().clone(),
            progress,
            asleep: replica.asleep,
        })
    }

    /// The groups of this host, in order.
    pub fn groups(&self) -> impl Iterator<Item = GroupId> + '_ {
        self.replicas.keys().copied()
    }

    /// How far the wall clock here is ahead of the others', in nanoseconds.
    pub fn clock_offset(&self) -> i64 {
        self.peers.own_offset()
    }

    /// Peers that have not been heard of for an election timeout.
    pub fn is_silent(&self, store: StoreId) -> bool {
        self.peers.is_silent(store)
    }

    /// Gives back the stores, to be closed or (in the simulation) crashed.
    pub fn into_stores(self) -> (Arc<L>, S, P) {
        (self.log, self.state, self.snapshots)
    }

    pub fn state_mut(&mut self) -> &mut S {
        &mut self.state
    }

    pub fn log(&self) -> &Arc<L> {
        &self.log
    }

    // ---- asking ----

    /// Takes in a command; its answer comes from a later turn.
    pub fn propose(&mut self, id: GroupId, proposal: Proposal) -> Result<ProposalId, ProposeError> {
        let replica = self.replicas.get_mut(&id).ok_or(ProposeError::UnknownGroup)?;
        if !replica.leads() {
            return Err(ProposeError::NotLeader);
        }
        if replica.waiting.len() >= PROPOSALS_PER_GROUP_MAX {
            return Err(ProposeError::Busy);
        }
        let entry = pb::LogEntry {
            time: proposal.time.0,
            session: proposal.session.0,
            sequence: proposal.sequence,
            command: proposal.command,
        };
        replica.node.propose(Vec::new(), entry.encode_to_vec()).map_err(|_| ProposeError::Busy)?;
        let proposal = ProposalId(self.next_proposal);
        self.next_proposal += 1;
        replica.waiting.push_back((replica.last_index(), replica.node.raft.term, proposal));
        self.dirty.insert(id);
        self.wake(id);
        Ok(proposal)
    }

    /// Asks to read the state of a group so that nothing that was answered before is missed (ReadIndex, and
    /// leases: Ongaro 2014, 6.4).
    pub fn read(&mut self, id: GroupId, now: Now) -> Result<Grant, ProposeError> {
        let replica = self.replicas.get_mut(&id).ok_or(ProposeError::UnknownGroup)?;
        if !replica.leads() {
            return Err(ProposeError::NotLeader);
        }
        if replica.is_alone() || (self.options.lease && replica.lease_holds(now.monotonic)) {
            return Ok(Grant::Now);
        }
        let ticket = replica.ask(&mut self.next_ticket);
        self.dirty.insert(id);
        self.wake(id);
        Ok(Grant::Later(ticket))
    }

    /// Hands leadership of a group to another voter, when it is led here.
    pub fn transfer_leader(&mut self, id: GroupId, to: StoreId) -> Result<(), ProposeError> {
        let replica = self.replicas.get_mut(&id).ok_or(ProposeError::UnknownGroup)?;
        if !replica.is_raft_leader() {
            return Err(ProposeError::NotLeader);
        }
        replica.transfer(to);
        self.dirty.insert(id);
        self.wake(id);
        Ok(())
    }

    /// Begins a snapshot of a group at the next turn, outgrown or not.
    pub fn request_snapshot(&mut self, id: GroupId) {
        if self.replicas.get(&id).is_some_and(|replica| replica.applied.index > 0) {
            self.outgrown.insert(id);
        }
    }

    /// Why the last snapshot could not be taken; told once.
    pub fn take_snapshot_failure(&mut self) -> Option<HostError> {
        self.snapshot_failed.take()
    }

    /// How often a log was cut behind a snapshot: space to be given back.
    pub fn truncations(&self) -> u64 {
        self.truncations
    }

    // ---- peers ----

    /// Whether time matters: some group has other members.
    pub fn needs_ticks(&self) -> bool {
        !self.peers.is_empty() || !self.awake.is_empty() || !self.unsettled.is_empty()
    }

    /// Something could not be sent to a store.
    pub fn unreachable(&mut self, store: StoreId) {
        for &id in &self.awake {
            if let Some(replica) = self.replicas.get_mut(&id)
                && replica.is_raft_leader()
                && replica.membership().contains(store)
            {
                replica.node.report_unreachable(store.0);
            }
        }
    }

    /// Takes in what another store has to say. It is authenticated.
    pub fn receive(&mut self, from: StoreId, batch: PeerBatch, now: Now) -> Result<(), HostError> {
        match self.peers.heard(from, &batch.heartbeat, self.ticks, now) {
            Heard::AsEver => {}
            Heard::Back => self.wake_for(from, false),
            Heard::Restarted => self.wake_for(from, true),
        }
        for (group, message) in batch.messages {
            self.receive_one(from, group, message).map_err(|error| HostError { group, error })?;
        }
        Ok(())
    }

    fn receive_one(&mut self, from: StoreId, id: GroupId, message: PeerMessage) -> Result<(), StorageError> {
        match message {
            PeerMessage::Raft(message) => self.receive_raft(from, id, message)?,
            PeerMessage::Sleep { term, index, hash } => {
                if let Some(replica) = self.replicas.get_mut(&id)
                    && replica.leader() == Some(from)
                {
                    replica.sleep_offer = Some((term, index, hash));
                    self.dirty.insert(id);
                }
            }
            PeerMessage::Want { index, term, offset } => {
                self.transfers.wanted(from, id, (index, term), offset, self.ticks);
                self.serve()?;
            }
            PeerMessage::Piece { index, term, offset, total, bytes } => {
                let (snapshots, peers) = (&mut self.snapshots, (&mut self.peers, self.ticks));
                let piece = (offset, total, &bytes);
                self.transfers.piece(id, from, (index, term), piece, snapshots, peers)?;
            }
        }
        Ok(())
    }

    fn receive_raft(
        &mut self,
        from: StoreId,
        id: GroupId,
        message: eraftpb::Message,
    ) -> Result<(), StorageError> {
        let kind = message.get_msg_type();
        if message.from != from.0 || message.to != self.options.store.0 || !may_come_in(kind) {
            return Ok(());
        }
        let of_leader =
            matches!(kind, MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot);
        let known = self.replicas.contains_key(&id) || (of_leader && self.open_waiting(id)?);
        if !known {
            return Ok(());
        }
        let just_opened = self.ticks <= ELECTION_TICKS as u64 + 1;
        let Some(replica) = self.replicas.get_mut(&id).filter(|replica| !replica.restoring) else {
            return Ok(());
        };
        let vote = matches!(kind, MessageType::MsgRequestVote | MessageType::MsgRequestPreVote);
        if vote && self.options.lease && just_opened && replica.applied.index > 1 {
            // What was promised to a leader before the restart is not remembered: it may still have its lease.
            return Ok(());
        }
        if kind == MessageType::MsgTimeoutNow && !self.peers.clock_is_good() {
            return Ok(());
        }
        if kind == MessageType::MsgSnapshot {
            let index = message.get_snapshot().get_metadata().index;
            if index > replica.node.raft.raft_log.committed && message.term >= replica.node.raft.term {
                self.transfers.fetch(id, from, message, self.ticks);
                self.transfers.ask(&self.snapshots, &mut self.peers, self.ticks)?;
                return Ok(());
            }
        }
        // Late answers do not wake who sleeps.
        let answer = match kind {
            MessageType::MsgHeartbeatResponse => true,
            MessageType::MsgAppendResponse => !message.reject,
            _ => false,
        };
        // From somebody raft does not know any more, or does not know yet: nothing to it.
        let _ = replica.node.step(message);
        replica.set_timeout();
        self.dirty.insert(id);
        if !answer {
            match kind {
                // Its leader is awake; that alone is no business.
                MessageType::MsgHeartbeat => self.stir(id),
                _ => self.wake(id),
            }
        }
        Ok(())
    }

    /// One [`TICK`] has passed.
    pub fn tick(&mut self, now: Now) -> Result<(), HostError> {
        let _ = now;
        self.ticks += 1;
        let fallen = self.peers.fallen_silent(self.ticks, ELECTION_TICKS as u64);
        for store in fallen {
            self.wake_without(store);
        }
        let clock_is_good = self.peers.clock_is_good();
        for id in self.awake.clone() {
            self.tick_one(id, clock_is_good).map_err(|error| HostError { group: id, error })?;
        }
        if self.ticks.is_multiple_of(RECONCILE_TICKS) {
            self.reconcile(clock_is_good);
        }
        let failed = |error| HostError { group: GroupId(0), error };
        self.transfers.refill();
        self.transfers.ask(&self.snapshots, &mut self.peers, self.ticks).map_err(failed)?;
        self.serve().map_err(failed)?;
        let replicas = &self.replicas;
        self.transfers.settled(|group, to| {
            let progress = replicas.get(&group).and_then(|replica| replica.node.raft.prs().get(to.0));
            progress.is_some_and(|progress| progress.state == raft::ProgressState::Snapshot)
        });
        for (group, to) in self.transfers.given_up(self.ticks) {
            self.snapshot_not_sent(group, to);
        }
        Ok(())
    }

    fn tick_one(&mut self, id: GroupId, clock_is_good: bool) -> Result<(), StorageError> {
        let me = self.options.store;
        let Some(replica) = self.replicas.get_mut(&id) else {
            self.awake.remove(&id);
            return Ok(());
        };
        if replica.restoring {
            return Ok(());
        }
        replica.tick(clock_is_good);
        let preferred = self.wanted.get(&id).and_then(|wanted| wanted.preferred) == Some(me);
        let leaderless = replica.leader().is_none() && !replica.is_raft_leader();
        if leaderless && preferred && clock_is_good && self.ticks.is_multiple_of(3) {
            replica.campaign()?;
        }
        if replica.node.has_ready() {
            self.dirty.insert(id);
        }
        if replica.store_wants_snapshot() {
            self.outgrown.insert(id);
        }
        let busy = self.unsettled.contains(&id) || self.transfers.is_sending(id);
        if !busy && let Some((term, index, hash)) = replica.sleep(&self.peers) {
            let members: Vec<StoreId> = replica.membership().members().filter(|&store| store != me).collect();
            for store in members {
                self.peers.post(store, id, PeerMessage::Sleep { term, index, hash });
            }
            self.awake.remove(&id);
        }
        Ok(())
    }

    /// Brings led groups to the members and the leader they are to have.
    fn reconcile(&mut self, clock_is_good: bool) {
        for id in self.unsettled.clone() {
            let Some(replica) = self.replicas.get_mut(&id).filter(|replica| replica.is_raft_leader()) else {
                self.unsettled.remove(&id);
                continue;
            };
            if !replica.leads() || replica.node.raft.has_pending_conf() {
                continue;
            }
            let Some(wanted) = self.wanted.get(&id) else {
                self.unsettled.remove(&id);
                continue;
            };
            let peers = &self.peers;
            let member =
                |store| Member { caught_up: replica.is_caught_up(store), alive: !peers.is_silent(store) };
            match next_step(self.options.store, replica.membership(), wanted, member) {
                Step::Done => {
                    self.unsettled.remove(&id);
                }
                Step::Wait => {}
                Step::Transfer(store) => {
                    if replica.node.raft.lead_transferee.is_none()
                        && self.ticks.is_multiple_of(TRANSFER_TICKS / 2)
                    {
                        replica.transfer(store);
                    }
                }
                Step::Change(change) => {
                    replica.propose_change(change);
                }
            }
            self.dirty.insert(id);
        }
        if !clock_is_good && self.ticks.is_multiple_of(TRANSFER_TICKS) {
            self.hand_over_all();
        }
    }

    /// A host whose clock cannot be trusted leads nothing that others can lead.
    fn hand_over_all(&mut self) {
        for (&id, replica) in &mut self.replicas {
            if !replica.is_raft_leader() {
                continue;
            }
            let fit = |&&store: &&StoreId| {
                store != self.options.store && replica.is_caught_up(store) && !self.peers.is_silent(store)
            };
            if let Some(store) = replica.membership().voters.iter().find(fit).copied() {
                replica.transfer(store);
                self.dirty.insert(id);
            }
        }
    }

    fn serve(&mut self) -> Result<(), StorageError> {
        for (group, to) in self.transfers.serve(&self.snapshots, &mut self.peers)? {
            self.snapshot_not_sent(group, to);
        }
        Ok(())
    }

    fn snapshot_not_sent(&mut self, group: GroupId, to: StoreId) {
        if let Some(replica) = self.replicas.get_mut(&group) {
            replica.node.report_snapshot(to.0, SnapshotStatus::Failure);
            self.dirty.insert(group);
        }
    }

    // ---- sleeping and waking ----

    /// There is business in the group.
    fn wake(&mut self, id: GroupId) {
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.busy();
            if !replica.is_single() {
                self.awake.insert(id);
            }
        }
    }

    /// Time passes again, but there is no business.
    fn stir(&mut self, id: GroupId) {
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.asleep = false;
            replica.sleep_offer = None;
            if !replica.is_single() {
                self.awake.insert(id);
            }
        }
    }

    /// A store is back: what sleeps without it may have something for it; and it leads nothing any more when
    /// it restarted.
    fn wake_for(&mut self, store: StoreId, restarted: bool) {
        for (&id, replica) in &mut self.replicas {
            let led_there = replica.leader() == Some(store);
            if led_there && restarted {
                replica.leader_is_gone();
            }
            if replica.membership().contains(store) && (replica.is_raft_leader() || led_there) {
                replica.busy();
                self.awake.insert(id);
                self.unsettled.insert(id);
            }
        }
    }

    /// A store has fallen silent: those it leads need another leader, and those led here may have no
    /// quorum any more.
    fn wake_without(&mut self, store: StoreId) {
        for (&id, replica) in self.replicas.iter_mut().filter(|(_, replica)| replica.asleep) {
            if replica.leader() == Some(store) {
                replica.leader_is_gone();
            } else if !(replica.is_raft_leader() && replica.membership().contains(store)) {
                continue;
            }
            replica.busy();
            self.awake.insert(id);
        }
    }

    /// The peers are all other members of all groups.
    pub(crate) fn members_changed(&mut self) {
        let me = self.options.store;
        let members = self.replicas.values().flat_map(|replica| replica.membership().members());
        let stores: BTreeSet<StoreId> = members.filter(|&store| store != me).collect();
        self.peers.set(&stores, self.ticks);
        self.awake.retain(|id| self.replicas.get(id).is_some_and(|replica| !replica.is_single()));
    }

    // ---- the turn ----

    /// One turn: send what can be sent, persist what every group has to persist (one fsync), apply what is
    /// committed (one batch), and one step of a snapshot.
    pub fn turn(
        &mut self,
        now: Now,
        send: &mut dyn FnMut(StoreId, PeerBatch),
    ) -> Result<Turn<M::Effect>, HostError> {
        let dirty = std::mem::take(&mut self.dirty);
        for id in &dirty {
            if let Some(replica) = self.replicas.get_mut(id) {
                replica.begin_reads(now.monotonic);
            }
        }
        let mut committed = Vec::new();
        self.persist(&dirty, &mut committed, now, send)?;
        // The others need not wait until it is applied here.
        self.peers.flush(self.ticks, now, send);
        let answers = self.apply(committed)?;
        self.after_turn(dirty)?;
        self.step_install()?;
        self.step_restore()?;
        self.step_snapshot()?;
        self.peers.flush(self.ticks, now, send);
        let Told { dropped, confirmed, lost, roles } = std::mem::take(&mut self.told);
        Ok(Turn { answers, dropped, confirmed, lost, roles })
    }

    fn persist(
        &mut self,
        dirty: &BTreeSet<GroupId>,
        committed: &mut Vec<(GroupId, Vec<Entry>)>,
        now: Now,
        send: &mut dyn FnMut(StoreId, PeerBatch),
    ) -> Result<(), HostError> {
        let (mut writes, mut readies) = (Vec::new(), Vec::new());
        for &id in dirty {
            let Some(replica) = self.replicas.get_mut(&id).filter(|replica| replica.node.has_ready()) else {
                continue;
            };
            let mut ready = replica.node.ready();
            for state in ready.take_read_states() {
                replica.read_confirmed(state.index, &state.request_ctx, self.options.lease);
            }
            // A leader's appends go out while its own disk works.
            for message in ready.take_messages() {
                post(&mut self.peers, &mut self.transfers, self.ticks, id, message);
            }
            let late = ready.take_persisted_messages();
            let entries = ready.take_entries();
            let hard = ready.hs().cloned();
            if let Some(hard) = &hard {
                replica.node.mut_store().set_hard(hard.clone());
            }
            if !ready.snapshot().is_empty() {
                replica.change = Some(crate::storage::LogChange::Restart);
            }
            let change = replica.change.take();
            if hard.is_some() || !entries.is_empty() || change.is_some() {
                // A log that begins anew says again what it has promised.
                let hard = hard.or_else(|| change.as_ref().map(|_| replica.node.store().hard().clone()));
                writes.push(LogWrite { group: id, hard, entries, change });
            }
            committed.push((id, ready.take_committed_entries()));
            readies.push((id, ready, late));
        }
        self.peers.flush(self.ticks, now, send);
        self.write_log(writes)?;
        // Everything above is durable from here on (CO-1).
        for (id, ready, late) in readies {
            for message in late {
                post(&mut self.peers, &mut self.transfers, self.ticks, id, message);
            }
            let metadata = ready.snapshot().get_metadata();
            let restored = (metadata.index, metadata.term);
            if restored.0 > 0 {
                self.restored(id, restored).map_err(|error| HostError { group: id, error })?;
            }
            let Some(replica) = self.replicas.get_mut(&id) else { continue };
            let mut light = replica.node.advance_append(ready);
            if restored.0 > 0 {
                replica.node.advance_apply_to(restored.0);
            }
            for message in light.take_messages() {
                post(&mut self.peers, &mut self.transfers, self.ticks, id, message);
            }
            committed.push((id, light.take_committed_entries()));
        }
        Ok(())
    }

    fn write_log(&mut self, writes: Vec<LogWrite>) -> Result<(), HostError> {
        let Some(first) = writes.first().map(|write| write.group) else { return Ok(()) };
        let appended: Vec<_> = writes.iter().map(|write| (write.group, write.entries.clone())).collect();
        self.log.write(writes).map_err(|error| HostError { group: first, error })?;
        for (id, entries) in appended {
            if let Some(replica) = self.replicas.get_mut(&id) {
                replica.log_bytes += entries.iter().map(entry_bytes).sum::<u64>();
                replica.node.mut_store().appended(entries);
            }
        }
        Ok(())
    }

    fn apply(&mut self, committed: Vec<(GroupId, Vec<Entry>)>) -> Result<Vec<Answer<M::Effect>>, HostError> {
        let mut answers = Vec::new();
        let mut by_group: BTreeMap<GroupId, Vec<Entry>> = BTreeMap::new();
        for (id, entries) in committed {
            if !entries.is_empty() {
                by_group.entry(id).or_default().extend(entries);
            }
        }
        let (mut commits, mut changed) = (Vec::with_capacity(by_group.len()), Vec::new());
        for (&id, entries) in &by_group {
            let failed = |error| HostError { group: id, error };
            let Some(replica) = self.replicas.get_mut(&id) else { continue };
            let (table, before) = (self.state.table(id), replica.membership().index);
            let commit = replica.apply(table, entries, &mut answers).map_err(failed)?;
            if let Some(taking) = self.taking.as_mut().filter(|taking| taking.group == id) {
                taking.before_commit(table, &commit.batch).map_err(failed)?;
            }
            if replica.membership().index != before {
                changed.push(id);
            }
            commits.push(commit);
        }
        if let Some(first) = commits.first().map(|commit| commit.group) {
            self.state.commit(commits).map_err(|error| HostError { group: first, error })?;
        }
        for id in by_group.into_keys() {
            let Some(replica) = self.replicas.get_mut(&id) else { continue };
            replica.node.advance_apply();
            replica.node.mut_store().applied(replica.applied.index);
        }
        self.changed(&changed)?;
        Ok(answers)
    }

    /// The members of these groups have changed.
    fn changed(&mut self, groups: &[GroupId]) -> Result<(), HostError> {
        if groups.is_empty() {
            return Ok(());
        }
        for &id in groups {
            let gone =
                self.replicas.get(&id).is_some_and(|replica| !replica.membership().contains(replica.me));
            if gone {
                self.remove(id).map_err(|error| HostError { group: id, error })?;
            } else {
                self.unsettled.insert(id);
                self.wake(id);
            }
        }
        self.members_changed();
        Ok(())
    }

    fn after_turn(&mut self, dirty: BTreeSet<GroupId>) -> Result<(), HostError> {
        let mut diverged = Vec::new();
        for id in dirty {
            let Some(replica) = self.replicas.get_mut(&id) else { continue };
            if replica.node.has_ready() {
                self.dirty.insert(id);
            }
            let role = replica.role_now();
            self.told.dropped.extend(replica.take_dropped());
            if role != replica.role {
                if !matches!(role, Role::Leader { .. }) || matches!(replica.role, Role::Leader { .. }) {
                    self.told.lost.extend(replica.take_lost_reads());
                }
                replica.role = role;
                self.told.roles.push((id, role));
                if self.wanted.contains_key(&id) {
                    self.unsettled.insert(id);
                }
                self.awake.insert(id);
                if replica.is_single() {
                    self.awake.remove(&id);
                }
            }
            replica.take_readable(&mut self.told.confirmed);
            if replica.follow_to_sleep().is_err() {
                diverged.push(id);
            } else if replica.asleep {
                self.awake.remove(&id);
            }
            let taking = self.taking.as_ref().is_some_and(|taking| taking.group == id);
            let wants = replica.outgrown(self.transfers.is_sending(id)) || replica.store_wants_snapshot();
            if wants && !taking {
                self.outgrown.insert(id);
            }
        }
        for id in diverged {
            self.heal(id).map_err(|error| HostError { group: id, error })?;
        }
        Ok(())
    }

    /// One step of making a snapshot that was fetched the group's own.
    fn step_install(&mut self) -> Result<(), HostError> {
        let replicas = &self.replicas;
        let unfit = |group, (index, _): (u64, u64)| {
            replicas.get(&group).is_none_or(|replica| index <= replica.node.raft.raft_log.committed)
        };
        let installed = self
            .transfers
            .install(&mut self.snapshots, unfit)
            .map_err(|error| HostError { group: GroupId(0), error })?;
        let Some((id, meta, message)) = installed else { return Ok(()) };
        let me = self.options.store;
        let Some(replica) = self.replicas.get_mut(&id) else { return Ok(()) };
        replica.node.mut_store().set_snapshot(meta.clone());
        replica.snapshot = Some(meta.clone());
        if !meta.membership.contains(me) || message.term < replica.node.raft.term {
            return Ok(());
        }
        if replica.node.raft.raft_log.match_term(meta.index, meta.term) {
            // The log has come there by itself: raft goes on from where it is.
            let _ = replica.node.step(message);
            replica.set_timeout();
        } else {
            replica.restoring = true;
            self.restoring.insert(id, (None, meta, message));
        }
        self.dirty.insert(id);
        self.wake(id);
        Ok(())
    }

    /// One step of making the state of a snapshot that raft is to go on from. Meanwhile the group hears nothing.
    fn step_restore(&mut self) -> Result<(), HostError> {
        let Some(&id) = self.restoring.keys().next() else { return Ok(()) };
        let failed = |error| HostError { group: id, error };
        let (Some(replica), Some((restoring, meta, _))) =
            (self.replicas.get_mut(&id), self.restoring.get_mut(&id))
        else {
            self.restoring.remove(&id);
            return Ok(());
        };
        if replica.node.has_ready() {
            // What was decided before is applied first.
            self.dirty.insert(id);
            return Ok(());
        }
        let restoring = match restoring {
            Some(restoring) => restoring,
            None => {
                self.state.clear(id).map_err(failed)?;
                replica.applied.index = 0;
                restoring.insert(Restoring::new(meta.clone()))
            }
        };
        let step = restoring.step(id, &mut self.state, &self.snapshots).map_err(failed)?;
        let Some(applied) = step else { return Ok(()) };
        replica.restoring = false;
        replica.restored = Some(applied);
        if let Some((_, _, message)) = self.restoring.remove(&id) {
            let _ = replica.node.step(message);
            replica.set_timeout();
        }
        self.dirty.insert(id);
        self.wake(id);
        Ok(())
    }

    /// A snapshot that cannot be written leaves the log as it is: it is tried again later. Only state
    /// that is not what it should be stops the host.
    fn step_snapshot(&mut self) -> Result<(), HostError> {
        let transfers = &self.transfers;
        let restoring = &self.restoring;
        self.outgrown.retain(|&id| !transfers.is_fetching(id) && !restoring.contains_key(&id));
        let id = match (&self.taking, self.outgrown.first()) {
            (Some(taking), _) => taking.group,
            (None, Some(&id)) => id,
            (None, None) => return Ok(()),
        };
        match self.try_step_snapshot(id) {
            Err(error) if !error.is_of_state() => {
                self.taking = None;
                self.outgrown.remove(&id);
                if let Some(replica) = self.replicas.get_mut(&id) {
                    replica.retry_at = replica.log_bytes + SNAPSHOT_LOG_BYTES_MIN;
                }
                self.snapshot_failed = Some(HostError { group: id, error });
                Ok(())
            }
            result => result.map_err(|error| HostError { group: id, error }),
        }
    }

    fn try_step_snapshot(&mut self, id: GroupId) -> Result<(), StorageError> {
        if self.taking.is_none() {
            self.outgrown.remove(&id);
            let Some(replica) = self.replicas.get(&id) else { return Ok(()) };
            let AppliedRow { index, term, hash, membership } = replica.applied.clone();
            if replica.snapshot.as_ref().is_some_and(|meta| meta.index >= index) {
                return Ok(());
            }
            self.snapshots.begin(id)?;
            self.taking = Some(Taking::new(id, SnapshotMeta { index, term, hash, bytes: 0, membership }));
        }
        let Some(taking) = &mut self.taking else { return Ok(()) };
        let Some(meta) = taking.step(self.state.table(id), &mut self.snapshots)? else { return Ok(()) };
        self.taking = None;
        self.truncations += 1;
        self.log.truncate(id, meta.index + 1)?;
        if let Some(replica) = self.replicas.get_mut(&id) {
            let last = replica.node.store().last_index().unwrap_or(meta.index);
            // What came in while it was taken stays in the log.
            let share = last.saturating_sub(meta.index);
            let whole = last.saturating_sub(replica.node.store().before()).max(1);
            replica.log_bytes = replica.log_bytes / whole * share;
            replica.retry_at = 0;
            replica.node.mut_store().truncated(meta.index, meta.term);
            replica.node.mut_store().set_snapshot(meta.clone());
            replica.snapshot = Some(meta);
            if replica.is_raft_leader() && !replica.is_single() {
                // Whoever waits for it answers, and gets it.
                replica.node.ping();
                self.dirty.insert(id);
            }
        }
        Ok(())
    }

    /// The replica is here no more: it was removed from its group.
    pub(crate) fn remove(&mut self, id: GroupId) -> Result<(), StorageError> {
        let Some(mut replica) = self.replicas.remove(&id) else { return Ok(()) };
        self.told.dropped.extend(replica.waiting.drain(..).map(|(_, _, proposal)| proposal));
        self.told.lost.extend(replica.take_lost_reads());
        self.told.roles.push((id, Role::Removed));
        self.forget(id);
        let mut hard = replica.node.raft.hard_state();
        hard.commit = 0;
        self.write_removal(id, hard)
    }

    /// A group that is opened again, or gone.
    pub(crate) fn forget(&mut self, id: GroupId) {
        self.dirty.remove(&id);
        self.awake.remove(&id);
        self.unsettled.remove(&id);
        self.outgrown.remove(&id);
        self.restoring.remove(&id);
        self.transfers.forget(id);
        if self.taking.as_ref().is_some_and(|taking| taking.group == id) {
            self.taking = None;
        }
    }

    pub(crate) fn raft_config(&self, applied: u64) -> raft::Config {
        raft::Config {
            id: self.options.store.0,
            election_tick: ELECTION_TICKS,
            min_election_tick: ELECTION_TICKS,
            max_election_tick: 2 * ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            applied,
            max_size_per_msg: APPEND_BYTES_MAX,
            max_inflight_msgs: APPENDS_IN_FLIGHT,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: APPLY_BYTES_PER_TURN,
            check_quorum: true,
            pre_vote: true,
            ..raft::Config::default()
        }
    }
}

/// Puts a message of raft into the outbox.
fn post(peers: &mut Peers, transfers: &mut Transfers, tick: u64, id: GroupId, message: eraftpb::Message) {
    let to = StoreId(message.to);
    if message.get_msg_type() == MessageType::MsgSnapshot {
        transfers.announced(id, to, tick);
    }
    peers.post(to, id, PeerMessage::Raft(message));
}

/// What raft says to raft; the rest is for itself only.
fn may_come_in(kind: MessageType) -> bool {
    matches!(
        kind,
        MessageType::MsgAppend
            | MessageType::MsgAppendResponse
            | MessageType::MsgRequestVote
            | MessageType::MsgRequestVoteResponse
            | MessageType::MsgRequestPreVote
            | MessageType::MsgRequestPreVoteResponse
            | MessageType::MsgHeartbeat
            | MessageType::MsgHeartbeatResponse
            | MessageType::MsgSnapshot
            | MessageType::MsgTimeoutNow
    )
}

fn entry_bytes(entry: &Entry) -> u64 {
    entry.data.len() as u64 + ENTRY_OVERHEAD_BYTES
}

/// What entries of an earlier start are taken to weigh.
pub(crate) fn guessed_bytes(entries: u64) -> u64 {
    entries * ENTRY_BYTES_GUESS
}
