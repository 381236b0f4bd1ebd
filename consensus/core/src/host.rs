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
use raft::eraftpb;

use crate::membership::Membership;
use crate::open::Restoring;
use crate::peer::Now;
use crate::peers::Peers;
use crate::replica::Replica;
use crate::storage::{GroupId, LogStore, SnapshotMeta, SnapshotStore, StateStore, StorageError};
use crate::taking::Taking;
use crate::transfers::Transfers;
use crate::wanted::Wanted;

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

/// What a turn, or one half of it, came to.
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

impl<E> Default for Turn<E> {
    fn default() -> Self {
        Turn {
            answers: Vec::new(),
            dropped: Vec::new(),
            confirmed: Vec::new(),
            lost: Vec::new(),
            roles: Vec::new(),
        }
    }
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
    pub(crate) awake: BTreeSet<GroupId>,
    /// Led groups that are not as they are wanted.
    pub(crate) unsettled: BTreeSet<GroupId>,
    pub(crate) wanted: BTreeMap<GroupId, Wanted>,
    pub(crate) peers: Peers,
    pub(crate) transfers: Transfers,
    /// Groups whose log has outgrown their snapshot, waiting for their turn to be taken.
    pub(crate) outgrown: BTreeSet<GroupId>,
    /// Groups whose state becomes that of a snapshot; the message is for raft, once it has.
    pub(crate) restoring: BTreeMap<GroupId, (Option<Restoring>, SnapshotMeta, eraftpb::Message)>,
    pub(crate) taking: Option<Taking>,
    pub(crate) rebuilt: Vec<GroupId>,
    /// Index at which the state of a group was found to be another than its leader's, and made anew.
    pub(crate) healed: BTreeMap<GroupId, u64>,
    pub(crate) truncations: u64,
    pub(crate) snapshot_failed: Option<HostError>,
    pub(crate) next_proposal: u64,
    pub(crate) next_ticket: u64,
    pub(crate) ticks: u64,
    /// Of this host, as of the last tick.
    pub(crate) clock_is_good: bool,
    pub(crate) told: Told,
}

/// For the next [`Turn`].
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) dropped: Vec<ProposalId>,
    pub(crate) confirmed: Vec<ReadTicket>,
    pub(crate) lost: Vec<ReadTicket>,
    pub(crate) roles: Vec<(GroupId, Role)>,
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
            clock_is_good: true,
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
        if replica.is_alone() && replica.has_a_say() {
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
            // Others decided it: later than the members this replica knows of, or as it knows itself.
            let known_later = wanted.known.index > replica.membership().index;
            (known_later || (!replica.is_member() && wanted.known.index == replica.membership().index))
                && !wanted.known.contains(me)
                && !wanted.voters.contains(&me)
                && !replica.leads()
                && !replica.may_be_added_after(wanted.known.index)
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

    /// A turn is due by then, by the monotonic clock: something that is to be said together is held.
    pub fn held_until(&self) -> Option<Duration> {
        self.peers.held_until()
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

    pub fn state(&self) -> &S {
        &self.state
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
        let replica = self.replicas.get(&id).ok_or(ProposeError::UnknownGroup)?;
        // Times of a clock that is off would push those of the others: it is handed over first, if somebody can take it.
        let off = !self.clock_is_good && !self.peers.clock_is_good();
        if !replica.leads() || (off && self.heir(replica).is_some()) {
            return Err(ProposeError::NotLeader);
        }
        let replica = self.replicas.get_mut(&id).ok_or(ProposeError::UnknownGroup)?;
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

    /// The replica is here no more: it was removed from its group.
    pub(crate) fn remove(&mut self, id: GroupId) -> Result<(), StorageError> {
        let Some(mut replica) = self.replicas.remove(&id) else { return Ok(()) };
        self.told.dropped.extend(replica.waiting.drain(..).map(|(_, _, proposal)| proposal));
        self.told.lost.extend(replica.take_lost_reads());
        self.told.roles.push((id, Role::Removed));
        self.forget(id);
        let mut hard = replica.node.raft.hard_state();
        hard.commit = 0;
        let log = &replica.node.raft.raft_log;
        let floor = (log.last_term(), log.last_index()).max(replica.floor);
        self.write_removal(id, hard, floor)
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
            // Followers learn what is decided with the next entries, or the next heartbeat.
            skip_bcast_commit: true,
            check_quorum: true,
            pre_vote: true,
            ..raft::Config::default()
        }
    }
}
