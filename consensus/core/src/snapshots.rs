//! Snapshots as a host goes on with them, a step per turn: taken of its own groups, installed and restored from
//! others.

use eggs_machine::Machine;
use raft::Storage;

use crate::host::{Host, HostError, SNAPSHOT_LOG_BYTES_MIN};
use crate::open::Restoring;
use crate::storage::{AppliedRow, GroupId, LogStore, SnapshotMeta, SnapshotStore, StateStore, StorageError};
use crate::taking::Taking;

impl<M, L, S, P> Host<M, L, S, P>
where
    M: Machine,
    L: LogStore,
    S: StateStore,
    P: SnapshotStore,
{
    /// One step of making a snapshot that was fetched the group's own.
    pub(crate) fn step_install(&mut self) -> Result<(), HostError> {
        let replicas = &self.replicas;
        let unfit = |group, (index, _): (u64, u64)| {
            replicas.get(&group).is_none_or(|replica| index <= replica.node.raft.raft_log.committed)
        };
        let (id, meta, message) = match self.transfers.install(&mut self.snapshots, unfit) {
            Ok(Some(installed)) => installed,
            Ok(None) => return Ok(()),
            Err(error) => {
                self.snapshot_failed = Some(error);
                return Ok(());
            }
        };
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
    pub(crate) fn step_restore(&mut self) -> Result<(), HostError> {
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
    pub(crate) fn step_snapshot(&mut self) -> Result<(), HostError> {
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
}
