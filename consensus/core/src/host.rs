//! The host: all groups of a process, turned together.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use eggs_machine::group::{self, Applied};
use eggs_machine::hash::StateHash;
use eggs_machine::table::scan;
use eggs_machine::{Batch, Machine, Tx};
use eggs_proto::{SessionId, StoreId, Time, pb};
use prost::Message;
use raft::eraftpb::{Entry, EntryType};
use raft::{Config, RawNode, StateRole, Storage};

use crate::group_log::GroupLog;
use crate::membership::Membership;
use crate::snapshot::Taking;
use crate::storage::{
    AppliedRow, GroupCommit, GroupId, LogStore, LogWrite, SnapshotMeta, SnapshotStore, StateStore,
    StorageError,
};

/// This host's replica id in its groups (raft rejects 0).
pub(crate) const REPLICA: u64 = 1;
/// Bytes of committed entries one group applies in one turn: bounds a turn's memory and length.
const APPLY_BYTES_PER_TURN: u64 = 16 << 20;
/// Proposals of one group not yet applied; more are refused as busy.
const PROPOSALS_PER_GROUP_MAX: usize = 4096;
/// A group's log is never cut by a snapshot before it has this many bytes …
const SNAPSHOT_LOG_BYTES_MIN: u64 = 4 << 20;
/// … nor before it is this many times as large as the last snapshot: the cost of snapshots stays a
/// fraction of the cost of the log.
const SNAPSHOT_LOG_FACTOR: u64 = 2;
/// What an entry costs in the log besides its data.
const ENTRY_OVERHEAD_BYTES: u64 = 48;
/// What an entry written before the last start is taken to be: those are counted, not measured.
const ENTRY_BYTES_GUESS: u64 = 256;

/// Names a proposal of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProposalId(pub u64);

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

/// Storage failed: the host must be dropped and opened again.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{group}: {error}")]
pub struct HostError {
    pub group: GroupId,
    pub error: StorageError,
}

/// How a group is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    pub group: GroupId,
    pub leader: bool,
    pub term: u64,
    pub applied_index: u64,
    pub snapshot_index: u64,
    /// Since the last snapshot.
    pub log_bytes: u64,
    pub state_hash: StateHash,
}

struct Group<M, L: LogStore> {
    machine: M,
    node: RawNode<GroupLog<L>>,
    applied: AppliedRow,
    snapshot: Option<SnapshotMeta>,
    log_bytes: u64,
    /// Bytes of the log before which a snapshot that failed is not tried again.
    retry_at: u64,
    /// (index, term, proposal), rising.
    waiting: VecDeque<(u64, u64, ProposalId)>,
}

/// Many groups over one log, one state store and one snapshot store.
pub struct Host<M, L: LogStore, S, P> {
    groups: BTreeMap<GroupId, Group<M, L>>,
    log: Arc<L>,
    state: S,
    snapshots: P,
    /// Groups with work for the next turn (CO-5).
    dirty: BTreeSet<GroupId>,
    /// Groups whose log has outgrown their snapshot, waiting for their turn to be taken.
    outgrown: BTreeSet<GroupId>,
    taking: Option<Taking>,
    rebuilt: Vec<GroupId>,
    truncations: u64,
    snapshot_failed: Option<HostError>,
    next_proposal: u64,
}

impl<M, L: LogStore, S, P> fmt::Debug for Host<M, L, S, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("groups", &self.groups.len()).finish_non_exhaustive()
    }
}

impl<M, L, S, P> Host<M, L, S, P>
where
    M: Machine,
    L: LogStore,
    S: StateStore,
    P: SnapshotStore,
{
    /// Opens every group: verifies its state or rebuilds it (CO-4) and begins its leadership. What the
    /// log holds beyond the state is applied by the first turns: run [`Host::turn`] until
    /// [`Host::has_work`] is false before serving.
    pub fn open(
        machines: impl IntoIterator<Item = (GroupId, M)>,
        log: L,
        state: S,
        snapshots: P,
    ) -> Result<Self, HostError> {
        let mut host = Host {
            groups: BTreeMap::new(),
            log: Arc::new(log),
            state,
            snapshots,
            dirty: BTreeSet::new(),
            outgrown: BTreeSet::new(),
            taking: None,
            rebuilt: Vec::new(),
            truncations: 0,
            snapshot_failed: None,
            next_proposal: 1,
        };
        for (id, machine) in machines {
            host.open_group(id, machine).map_err(|error| HostError { group: id, error })?;
        }
        Ok(host)
    }

    fn open_group(&mut self, id: GroupId, machine: M) -> Result<(), StorageError> {
        let snapshot = self.snapshots.latest(id)?;
        let log_state = self.log.load(id)?;
        let is_new = snapshot.is_none() && log_state.is_none();
        let mut log_state = log_state.unwrap_or_default();
        let before = snapshot.as_ref().map_or((0, 0), |meta| (meta.index, meta.term));
        if log_state.last >= log_state.first && log_state.first > before.0 + 1 {
            return Err(StorageError::new(format!(
                "the log begins at {} but the snapshot ends at {}: the snapshot is missing or damaged",
                log_state.first, before.0
            )));
        }
        log_state.last = log_state.last.max(before.0);
        if log_state.hard.commit > log_state.last {
            return Err(StorageError::new(format!(
                "entries up to {} were committed but the log ends at {}: the log is missing or cut",
                log_state.hard.commit, log_state.last
            )));
        }
        // A snapshot's entries were committed; the log may have been cut to nothing behind it.
        log_state.hard.commit = log_state.hard.commit.max(before.0);
        log_state.hard.term = log_state.hard.term.max(before.1);
        let applied = match self.usable_state(id, before.0, log_state.last)? {
            Some(applied) => applied,
            None => {
                if !is_new {
                    self.rebuilt.push(id);
                }
                self.rebuild(id, &machine, snapshot.clone())?
            }
        };
        log_state.hard.commit = log_state.hard.commit.max(applied.index);
        let entries_before = log_state.last - before.0;
        let log = GroupLog::new(id, Arc::clone(&self.log), log_state, before);
        let config = Config {
            id: REPLICA,
            election_tick: 10,
            heartbeat_tick: 1,
            applied: applied.index,
            max_committed_size_per_ready: APPLY_BYTES_PER_TURN,
            ..Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let mut node = RawNode::new(&config, log, &logger).map_err(raft_failed)?;
        node.campaign().map_err(raft_failed)?;
        let log_bytes = entries_before * ENTRY_BYTES_GUESS;
        let group =
            Group { machine, node, applied, snapshot, log_bytes, retry_at: 0, waiting: VecDeque::new() };
        self.groups.insert(id, group);
        self.dirty.insert(id);
        Ok(())
    }

    /// The applied row of the stored state, when the state can be gone on from.
    fn usable_state(&self, id: GroupId, from: u64, to: u64) -> Result<Option<AppliedRow>, StorageError> {
        let Some(applied) = self.state.applied(id)? else { return Ok(None) };
        if applied.index > to {
            // Rows are applied only after their entries are durable: the log lost some.
            return Err(StorageError::new(format!(
                "the state is at index {} but the log ends at {to}: the log is missing or cut",
                applied.index
            )));
        }
        if applied.index < from {
            return Ok(None);
        }
        if self.state.closed_cleanly() {
            return Ok(Some(applied));
        }
        let mut hash = StateHash::default();
        let read = scan(self.state.table(id), &[], &[], |key, value| {
            hash.insert(key, value);
            Ok(true)
        });
        // A table that cannot be read is as good as a wrong one: rebuild.
        Ok((read.is_ok() && hash == applied.hash).then_some(applied))
    }

    fn rebuild(
        &mut self,
        id: GroupId,
        machine: &M,
        snapshot: Option<SnapshotMeta>,
    ) -> Result<AppliedRow, StorageError> {
        self.state.clear(id)?;
        let Some(meta) = snapshot else {
            let mut tx = Tx::new(self.state.table(id), StateHash::default());
            machine.genesis(&mut tx)?;
            let (batch, hash) = tx.finish();
            let applied = AppliedRow { index: 0, term: 0, hash, membership: Membership::founding(&[StoreId(REPLICA)]) };
            self.state.commit(vec![GroupCommit { group: id, batch, applied: applied.clone() }])?;
            return Ok(applied);
        };
        let mut hash = StateHash::default();
        let state = &mut self.state;
        self.snapshots.read(id, &mut |rows| {
            for (key, value) in &rows {
                hash.insert(key, value);
            }
            // Index 0 until it is whole: a crash in here rebuilds again.
            let applied = AppliedRow::default();
            let changes = rows.into_iter().map(|(key, value)| (key, Some(value))).collect();
            state.commit(vec![GroupCommit { group: id, batch: Batch { changes }, applied }])
        })?;
        if hash != meta.hash {
            return Err(StorageError::new(format!(
                "the snapshot at index {} has hash {hash}, not {}",
                meta.index, meta.hash
            )));
        }
        let applied = AppliedRow { index: meta.index, term: meta.term, hash, membership: meta.membership };
        self.state.commit(vec![GroupCommit { group: id, batch: Batch::default(), applied: applied.clone() }])?;
        Ok(applied)
    }

    /// Groups whose state had to be rebuilt at opening.
    pub fn rebuilt(&self) -> &[GroupId] {
        &self.rebuilt
    }

    /// The state of a group: linearizable between turns while this host leads it. `None` when it does
    /// not, or has not yet applied what earlier leaders committed.
    pub fn view(&self, id: GroupId) -> Option<&S::Table> {
        self.groups.get(&id)?.leads().then(|| self.state.table(id))
    }

    /// The state of a group as far as it is applied here, leader or not.
    pub fn local_view(&self, id: GroupId) -> Option<&S::Table> {
        self.groups.contains_key(&id).then(|| self.state.table(id))
    }

    /// Whether the next turn has something to do.
    pub fn has_work(&self) -> bool {
        !self.dirty.is_empty() || self.taking.is_some() || !self.outgrown.is_empty()
    }

    /// Whether the only work is a snapshot that is being made durable.
    pub fn is_sealing(&self) -> bool {
        self.dirty.is_empty() && self.taking.as_ref().is_some_and(Taking::is_sealing)
    }

    /// Whether entries wait to be persisted or applied (snapshots aside).
    pub fn has_entries(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Takes in a command; its answer comes from a later turn.
    pub fn propose(&mut self, id: GroupId, proposal: Proposal) -> Result<ProposalId, ProposeError> {
        let group = self.groups.get_mut(&id).ok_or(ProposeError::UnknownGroup)?;
        if !group.leads() {
            return Err(ProposeError::NotLeader);
        }
        if group.waiting.len() >= PROPOSALS_PER_GROUP_MAX {
            return Err(ProposeError::Busy);
        }
        let entry = pb::LogEntry {
            time: proposal.time.0,
            session: proposal.session.0,
            sequence: proposal.sequence,
            command: proposal.command,
        };
        group.node.propose(Vec::new(), entry.encode_to_vec()).map_err(|_| ProposeError::Busy)?;
        let proposal = ProposalId(self.next_proposal);
        self.next_proposal += 1;
        let raft = &group.node.raft;
        group.waiting.push_back((raft.raft_log.last_index(), raft.term, proposal));
        self.dirty.insert(id);
        Ok(proposal)
    }

    /// One turn: persist what every group has to persist (one fsync), apply what is committed (one
    /// batch), and one step of a snapshot.
    pub fn turn(&mut self) -> Result<Vec<Answer<M::Effect>>, HostError> {
        let dirty = std::mem::take(&mut self.dirty);
        let mut committed = Vec::new();
        self.persist(&dirty, &mut committed)?;
        let answers = self.apply(committed)?;
        for id in dirty {
            if self.groups.get(&id).is_some_and(|group| group.node.has_ready()) {
                self.dirty.insert(id);
            }
        }
        self.step_snapshot()?;
        Ok(answers)
    }

    fn persist(
        &mut self,
        dirty: &BTreeSet<GroupId>,
        committed: &mut Vec<(GroupId, Vec<Entry>)>,
    ) -> Result<(), HostError> {
        let mut writes = Vec::new();
        let mut readies = Vec::new();
        for &id in dirty {
            let Some(group) = self.groups.get_mut(&id) else { continue };
            if !group.node.has_ready() {
                continue;
            }
            let mut ready = group.node.ready();
            let entries = ready.take_entries();
            let hard = ready.hs().cloned();
            if let Some(hard) = &hard {
                group.node.mut_store().set_hard(hard.clone());
            }
            if hard.is_some() || !entries.is_empty() {
                writes.push(LogWrite { group: id, hard, entries, change: None });
            }
            committed.push((id, ready.take_committed_entries()));
            readies.push((id, ready));
        }
        if !writes.is_empty() {
            let appended: Vec<_> = writes.iter().map(|write| (write.group, write.entries.clone())).collect();
            let first = writes[0].group;
            self.log.write(writes).map_err(|error| HostError { group: first, error })?;
            for (id, entries) in appended {
                if let Some(group) = self.groups.get_mut(&id) {
                    group.log_bytes += entries.iter().map(entry_bytes).sum::<u64>();
                    group.node.mut_store().appended(entries);
                }
            }
        }
        // Everything above is durable from here on (CO-1).
        for (id, ready) in readies {
            if let Some(group) = self.groups.get_mut(&id) {
                let mut light = group.node.advance_append(ready);
                committed.push((id, light.take_committed_entries()));
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
        let mut commits = Vec::with_capacity(by_group.len());
        for (&id, entries) in &by_group {
            let failed = |error| HostError { group: id, error };
            let Some(group) = self.groups.get_mut(&id) else { continue };
            let table = self.state.table(id);
            let commit = group.apply(id, table, entries, &mut answers).map_err(failed)?;
            if let Some(taking) = self.taking.as_mut().filter(|taking| taking.group == id) {
                taking.before_commit(table, &commit.batch).map_err(failed)?;
            }
            commits.push(commit);
        }
        if let Some(first) = commits.first().map(|commit| commit.group) {
            self.state.commit(commits).map_err(|error| HostError { group: first, error })?;
        }
        for id in by_group.into_keys() {
            let Some(group) = self.groups.get_mut(&id) else { continue };
            group.node.advance_apply();
            group.node.mut_store().applied(group.applied.index);
            if group.outgrown() && self.taking.as_ref().is_none_or(|taking| taking.group != id) {
                self.outgrown.insert(id);
            }
        }
        Ok(answers)
    }

    /// A snapshot that cannot be written leaves the log as it is: it is tried again later. Only state
    /// that is not what it should be stops the host.
    fn step_snapshot(&mut self) -> Result<(), HostError> {
        let id = match (&self.taking, self.outgrown.first()) {
            (Some(taking), _) => taking.group,
            (None, Some(&id)) => id,
            (None, None) => return Ok(()),
        };
        match self.try_step_snapshot(id) {
            Err(error) if !error.is_of_state() => {
                self.taking = None;
                self.outgrown.remove(&id);
                if let Some(group) = self.groups.get_mut(&id) {
                    group.retry_at = group.log_bytes + SNAPSHOT_LOG_BYTES_MIN;
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
            let Some(group) = self.groups.get(&id) else { return Ok(()) };
            let AppliedRow { index, term, hash, membership } = group.applied.clone();
            self.snapshots.begin(id)?;
            self.taking = Some(Taking::new(id, SnapshotMeta { index, term, hash, bytes: 0, membership }));
        }
        let Some(taking) = &mut self.taking else { return Ok(()) };
        let Some(meta) = taking.step(self.state.table(id), &mut self.snapshots)? else { return Ok(()) };
        self.taking = None;
        self.truncations += 1;
        self.log.truncate(id, meta.index + 1)?;
        if let Some(group) = self.groups.get_mut(&id) {
            let last = group.node.store().last_index().unwrap_or(meta.index);
            // What came in while it was taken stays in the log.
            let share = last.saturating_sub(meta.index);
            let whole = last.saturating_sub(group.snapshot.as_ref().map_or(0, |meta| meta.index)).max(1);
            group.log_bytes = group.log_bytes / whole * share;
            group.retry_at = 0;
            group.node.mut_store().truncated(meta.index, meta.term);
            group.snapshot = Some(meta);

        }
        Ok(())
    }

    /// Why the last snapshot could not be taken; told once.
    pub fn take_snapshot_failure(&mut self) -> Option<HostError> {
        self.snapshot_failed.take()
    }

    /// How often a log was cut behind a snapshot: space to be given back.
    pub fn truncations(&self) -> u64 {
        self.truncations
    }

    /// Begins a snapshot of a group at the next turn, outgrown or not.
    pub fn request_snapshot(&mut self, id: GroupId) {
        if self.groups.contains_key(&id) {
            self.outgrown.insert(id);
        }
    }

    /// How a group is; `None` when it is not here.
    pub fn status(&self, id: GroupId) -> Option<GroupStatus> {
        let group = self.groups.get(&id)?;
        Some(GroupStatus {
            group: id,
            leader: group.leads(),
            term: group.node.raft.term,
            applied_index: group.applied.index,
            snapshot_index: group.snapshot.as_ref().map_or(0, |meta| meta.index),
            log_bytes: group.log_bytes,
            state_hash: group.applied.hash,
        })
    }

    /// The groups of this host, in order.
    pub fn groups(&self) -> impl Iterator<Item = GroupId> + '_ {
        self.groups.keys().copied()
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
}

impl<M: Machine, L: LogStore> Group<M, L> {
    /// Leader, and everything of earlier terms is applied: its state is linearizable.
    fn leads(&self) -> bool {
        let raft = &self.node.raft;
        raft.state == StateRole::Leader && self.applied.term == raft.term
    }

    fn outgrown(&self) -> bool {
        let snapshot_bytes = self.snapshot.as_ref().map_or(0, |meta| meta.bytes);
        let enough = SNAPSHOT_LOG_BYTES_MIN.max(snapshot_bytes.saturating_mul(SNAPSHOT_LOG_FACTOR));
        self.log_bytes > enough.max(self.retry_at)
    }

    /// Applies a run of committed entries as one transaction.
    fn apply<T: eggs_machine::Table>(
        &mut self,
        id: GroupId,
        table: &T,
        entries: &[Entry],
        answers: &mut Vec<Answer<M::Effect>>,
    ) -> Result<GroupCommit, StorageError> {
        let mut tx = Tx::new(table, self.applied.hash);
        let mut applied = self.applied.clone();
        for entry in entries {
            // CO-6
            if entry.index != applied.index + 1 {
                return Err(StorageError::new(format!("entry {} follows {}", entry.index, applied.index)));
            }
            applied.index = entry.index;
            applied.term = entry.term;
            let proposal = self.proposal_of(entry);
            if entry.get_entry_type() != EntryType::EntryNormal || entry.data.is_empty() {
                continue;
            }
            let outcome = group::apply(&self.machine, &mut tx, &entry.data)?;
            answers.push(Answer { group: id, proposal, applied: outcome });
        }
        let (batch, hash) = tx.finish();
        applied.hash = hash;
        self.applied = applied.clone();
        Ok(GroupCommit { group: id, batch, applied })
    }

    fn proposal_of(&mut self, entry: &Entry) -> Option<ProposalId> {
        while let Some(&(index, term, proposal)) = self.waiting.front() {
            if index > entry.index {
                return None;
            }
            self.waiting.pop_front();
            if index == entry.index && term == entry.term {
                return Some(proposal);
            }
        }
        None
    }
}

fn entry_bytes(entry: &Entry) -> u64 {
    entry.data.len() as u64 + ENTRY_OVERHEAD_BYTES
}

fn raft_failed(error: raft::Error) -> StorageError {
    StorageError::new(format!("raft: {error}"))
}
