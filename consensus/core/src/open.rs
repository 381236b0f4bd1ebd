//! Opening groups: from what the stores hold to a replica that runs.

use std::sync::Arc;

use eggs_machine::hash::StateHash;
use eggs_machine::table::scan;
use eggs_machine::{Batch, Machine, Tx};
use eggs_proto::StoreId;
use raft::RawNode;
use raft::eraftpb::HardState;

use crate::group_log::GroupLog;
use crate::host::Host;
use crate::membership::Membership;
use crate::replica::{Replica, raft_failed};
use crate::storage::{
    AppliedRow, GroupCommit, GroupId, LogChange, LogState, LogStore, LogWrite, SnapshotMeta, SnapshotStore,
    StateStore, StorageError,
};

/// What an entry written before the last start is taken to be: those are counted, not measured.
const ENTRY_BYTES_GUESS: u64 = 256;
/// Index and term a founded group begins at: as if its genesis were a snapshot. Whoever comes later lacks
/// it, and so gets a snapshot with the members in it.
const FOUNDED: (u64, u64) = (1, 1);

/// Making the state of a snapshot, a page at a time.
pub(crate) struct Restoring {
    meta: SnapshotMeta,
    at: u64,
    hash: StateHash,
}

impl Restoring {
    /// The state of the group has to be empty.
    pub(crate) fn new(meta: SnapshotMeta) -> Self {
        Restoring { meta, at: 0, hash: StateHash::default() }
    }

    /// One page further; the applied row once the state is whole. Until then the stored one is of index 0: a crash in
    /// between begins again.
    pub(crate) fn step<S: StateStore, P: SnapshotStore>(
        &mut self,
        id: GroupId,
        state: &mut S,
        snapshots: &P,
    ) -> Result<Option<AppliedRow>, StorageError> {
        let (rows, next) = snapshots.page(id, self.at)?;
        for (key, value) in &rows {
            self.hash.insert(key, value);
        }
        let changes = rows.into_iter().map(|(key, value)| (key, Some(value))).collect();
        let SnapshotMeta { index, term, hash, membership, .. } = self.meta.clone();
        let mut applied = AppliedRow::default();
        if next.is_none() {
            if self.hash != hash {
                let found = self.hash;
                return Err(StorageError::damaged(format!(
                    "the snapshot at index {index} has hash {found}, not {hash}"
                )));
            }
            applied = AppliedRow { index, term, hash, membership };
        }
        self.at = next.unwrap_or(self.at);
        state.commit(vec![GroupCommit { group: id, batch: Batch { changes }, applied: applied.clone() }])?;
        Ok(next.is_none().then_some(applied))
    }
}

impl<M, L, S, P> Host<M, L, S, P>
where
    M: Machine,
    L: LogStore,
    S: StateStore,
    P: SnapshotStore,
{
    /// Opens a group the log knows of. One that was removed stays closed.
    pub(crate) fn open_group(&mut self, id: GroupId) -> Result<(), StorageError> {
        let Some(machine) = (self.machine_of)(id) else {
            return Err(StorageError::new(format!("{id} is not one of this kind of store")));
        };
        let Some(log_state) = self.log.load(id)? else { return Ok(()) };
        self.state.add(id)?;
        if log_state.removed {
            self.snapshots.remove(id)?;
            return self.state.clear(id);
        }
        let replica = self.open_replica(id, machine, log_state)?;
        self.insert(replica)
    }

    fn open_replica(
        &mut self,
        id: GroupId,
        machine: M,
        mut log_state: LogState,
    ) -> Result<Replica<M, L>, StorageError> {
        let snapshot = self.snapshots.latest(id)?;
        let before = match &snapshot {
            Some(meta) => (meta.index, meta.term),
            None if log_state.founding.is_empty() => (0, 0),
            None => FOUNDED,
        };
        if log_state.last >= log_state.first && log_state.first > before.0 + 1 {
            return Err(StorageError::damaged(format!(
                "the log begins at {} but the snapshot ends at {}: the snapshot is missing or damaged",
                log_state.first, before.0
            )));
        }
        self.drop_other_history(id, &mut log_state, before)?;
        log_state.last = log_state.last.max(before.0);
        if log_state.hard.commit > log_state.last {
            return Err(StorageError::damaged(format!(
                "entries up to {} were committed but the log ends at {}: the log is missing or cut",
                log_state.hard.commit, log_state.last
            )));
        }
        // A snapshot's entries were committed; the log may have been cut to nothing behind it.
        log_state.hard.commit = log_state.hard.commit.max(before.0);
        log_state.hard.term = log_state.hard.term.max(before.1);
        if before.0 == 0 && log_state.last == 0 {
            // It waits for its first snapshot; whatever is there is of a former life.
            self.state.clear(id)?;
        }
        let applied = match self.usable_state(id, before.0, &log_state)? {
            Some(applied) => applied,
            None => {
                if log_state.last > before.0 || snapshot.is_some() {
                    self.rebuilt.push(id);
                }
                self.rebuild(id, &machine, snapshot.clone(), &log_state.founding)?
            }
        };
        log_state.hard.commit = log_state.hard.commit.max(applied.index);
        let (entries, floor) = (log_state.last - before.0, log_state.floor);
        let last_term = match log_state.last {
            last if last > before.0 => {
                self.log.entries(id, last, last + 1, u64::MAX)?.first().map(|e| e.term)
            }
            _ => Some(before.1),
        };
        let last_term =
            last_term.ok_or_else(|| StorageError::damaged("the last entry of the log is missing"))?;
        let log = GroupLog::new(
            id,
            Arc::clone(&self.log),
            log_state,
            before,
            last_term,
            &applied.membership,
            snapshot.clone(),
        );
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let node = RawNode::new(&self.raft_config(applied.index), log, &logger).map_err(raft_failed)?;
        let mut replica = Replica::new(id, self.options.store, machine, node, applied);
        replica.snapshot = snapshot;
        replica.floor = floor;
        replica.log_bytes = entries * ENTRY_BYTES_GUESS;
        Ok(replica)
    }

    /// A snapshot of another store was installed, and the crash came before the log began anew behind it: what the
    /// log holds is not what led to the snapshot.
    fn drop_other_history(
        &mut self,
        id: GroupId,
        log_state: &mut LogState,
        (index, term): (u64, u64),
    ) -> Result<(), StorageError> {
        if log_state.last < log_state.first {
            return Ok(());
        }
        let other = if log_state.last < index {
            true
        } else if log_state.first <= index {
            let entries = self.log.entries(id, index, index + 1, u64::MAX)?;
            entries.first().is_none_or(|entry| entry.term != term)
        } else {
            false
        };
        if other {
            let mut hard = log_state.hard.clone();
            hard.commit = hard.commit.min(index);
            self.log.write(vec![LogWrite {
                group: id,
                hard: Some(hard.clone()),
                entries: Vec::new(),
                change: Some(LogChange::Restart { floor: log_state.floor }),
            }])?;
            let floor = log_state.floor;
            *log_state = LogState { hard, first: index + 1, last: index, floor, ..LogState::default() };
        }
        Ok(())
    }

    /// The applied row of the stored state, when the state can be gone on from.
    fn usable_state(
        &self,
        id: GroupId,
        from: u64,
        log_state: &LogState,
    ) -> Result<Option<AppliedRow>, StorageError> {
        let Some(applied) = self.state.applied(id)? else { return Ok(None) };
        if applied.index > log_state.last {
            // Of a replica that was here before, and whose end sled has lost: this one has no say before it is as far.
            if (applied.term, applied.index) <= log_state.floor {
                return Ok(None);
            }
            // Rows are applied only after their entries are durable: the log lost some.
            return Err(StorageError::damaged(format!(
                "the state is at index {} but the log ends at {}: the log is missing or cut",
                applied.index, log_state.last
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

    /// The state from what is durable: the snapshot, or the genesis of a founded group, or nothing.
    fn rebuild(
        &mut self,
        id: GroupId,
        machine: &M,
        snapshot: Option<SnapshotMeta>,
        founding: &[StoreId],
    ) -> Result<AppliedRow, StorageError> {
        if let Some(meta) = snapshot {
            return self.rebuild_from(id, meta);
        }
        self.state.clear(id)?;
        if founding.is_empty() {
            return Ok(AppliedRow::default());
        }
        let mut tx = Tx::new(self.state.table(id), StateHash::default());
        machine.genesis(&mut tx)?;
        let (batch, hash) = tx.finish();
        let (index, term) = FOUNDED;
        let applied = AppliedRow { index, term, hash, membership: Membership::founding(founding) };
        self.state.commit(vec![GroupCommit { group: id, batch, applied: applied.clone() }])?;
        Ok(applied)
    }

    fn rebuild_from(&mut self, id: GroupId, meta: SnapshotMeta) -> Result<AppliedRow, StorageError> {
        self.state.clear(id)?;
        let mut restoring = Restoring::new(meta);
        loop {
            if let Some(applied) = restoring.step(id, &mut self.state, &self.snapshots)? {
                return Ok(applied);
            }
        }
    }

    /// Raft has taken a snapshot in the place of its log; the state is the snapshot's already.
    pub(crate) fn restored(&mut self, id: GroupId, (index, term): (u64, u64)) -> Result<(), StorageError> {
        let Some(replica) = self.replicas.get_mut(&id) else { return Ok(()) };
        let applied = replica.restored.take().filter(|row| (row.index, row.term) == (index, term));
        let Some(applied) = applied else {
            return Err(StorageError::new(format!("raft went on after index {index}, the state did not")));
        };
        replica.node.mut_store().restarted(index, term);
        replica.applied = applied;
        replica.log_bytes = 0;
        self.members_changed();
        Ok(())
    }

    /// Writes the beginning of groups, all at once.
    pub(crate) fn write_founding(&mut self, groups: &[(GroupId, Vec<StoreId>)]) -> Result<(), StorageError> {
        let (commit, term) = FOUNDED;
        let hard = HardState { term, commit, ..HardState::default() };
        let write = |(group, voters): &(GroupId, Vec<StoreId>)| LogWrite {
            group: *group,
            hard: Some(hard.clone()),
            entries: Vec::new(),
            change: Some(LogChange::Found(voters.clone())),
        };
        self.log.write(groups.iter().map(write).collect())
    }

    /// Another store leads a group and says that this one has a part in it: a replica that waits for its first
    /// snapshot. False: it has no such part. What a replica that was removed has promised still holds.
    pub(crate) fn open_waiting(&mut self, id: GroupId) -> Result<bool, StorageError> {
        let Some(machine) = (self.machine_of)(id) else { return Ok(false) };
        let LogState { hard, floor, .. } = self.log.load(id)?.unwrap_or_default();
        let hard = HardState { commit: 0, ..hard };
        self.state.add(id)?;
        self.state.clear(id)?;
        self.snapshots.remove(id)?;
        let log_state = LogState { hard, first: 1, floor, ..LogState::default() };
        let mut replica = self.open_replica(id, machine, log_state)?;
        replica.change = Some(LogChange::Restart { floor });
        self.insert(replica)?;
        Ok(true)
    }

    /// The log says that there is no replica here any more, before anything else of it goes.
    pub(crate) fn write_removal(
        &mut self,
        id: GroupId,
        hard: HardState,
        floor: (u64, u64),
    ) -> Result<(), StorageError> {
        let (entries, change) = (Vec::new(), Some(LogChange::Remove { floor }));
        self.log.write(vec![LogWrite { group: id, hard: Some(hard), entries, change }])?;
        self.snapshots.remove(id)?;
        self.state.clear(id)
    }

    /// The state is not the leader's: it is made anew from snapshot and log. When that comes to the same, this build and
    /// the leader's do not agree, and the host stops.
    pub(crate) fn heal(&mut self, id: GroupId) -> Result<(), StorageError> {
        let index = self.replicas.get(&id).map_or(0, |replica| replica.applied.index);
        if self.healed.insert(id, index) == Some(index) {
            return Err(StorageError::new(format!(
                "the state at index {index} is not the leader's, also when made anew from snapshot and log"
            )));
        }
        self.rebuilt.push(id);
        self.replicas.remove(&id);
        self.forget(id);
        self.state.clear(id)?;
        self.open_group(id)
    }
}
