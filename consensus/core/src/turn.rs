//! One turn of a host: send, answer what was decided before, persist with one fsync, apply and answer the rest.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use eggs_machine::Machine;
use eggs_proto::StoreId;
use raft::Ready;
use raft::eraftpb::{self, Entry, EntryType, MessageType};

use crate::host::{Answer, Host, HostError, Role, Told, Turn};
use crate::peer::{Now, PeerBatch, PeerMessage};
use crate::peers::Peers;
use crate::replica::Replica;
use crate::storage::{GroupId, LogChange, LogStore, LogWrite, SnapshotStore, StateStore};
use crate::transfers::Transfers;

/// What an entry costs in the log besides its data.
const ENTRY_OVERHEAD_BYTES: u64 = 48;

/// A turn between its halves: what it has to write, and what is said and applied after that.
#[must_use = "a turn that was begun has to be ended"]
pub struct BegunTurn {
    dirty: BTreeSet<GroupId>,
    writes: Vec<LogWrite>,
    /// With the messages that wait for the write.
    readies: Vec<(GroupId, Ready, Vec<eraftpb::Message>)>,
    committed: Vec<(GroupId, Vec<Entry>)>,
    members_change: bool,
}

impl fmt::Debug for BegunTurn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BegunTurn").field("groups", &self.readies.len()).finish_non_exhaustive()
    }
}

impl<M, L, S, P> Host<M, L, S, P>
where
    M: Machine,
    L: LogStore,
    S: StateStore,
    P: SnapshotStore,
{
    /// A turn: [`Host::begin_turn`] and [`Host::end_turn`], for who has nobody to answer in between.
    pub fn turn(
        &mut self,
        now: Now,
        send: &mut dyn FnMut(StoreId, PeerBatch),
    ) -> Result<Turn<M::Effect>, HostError> {
        let (mut turn, begun) = self.begin_turn(now, send)?;
        let rest = self.end_turn(begun, now, send)?;
        turn.answers.extend(rest.answers);
        turn.dropped.extend(rest.dropped);
        turn.confirmed.extend(rest.confirmed);
        turn.lost.extend(rest.lost);
        turn.roles.extend(rest.roles);
        Ok(turn)
    }

    /// Sends what need not be durable here first, and applies what was decided before in the groups this store leads: who
    /// waits for that does not wait for the write of what came since. Nothing but reads may be asked of the host until
    /// [`Host::end_turn`].
    pub fn begin_turn(
        &mut self,
        now: Now,
        send: &mut dyn FnMut(StoreId, PeerBatch),
    ) -> Result<(Turn<M::Effect>, BegunTurn), HostError> {
        let dirty = std::mem::take(&mut self.dirty);
        for id in &dirty {
            if let Some(replica) = self.replicas.get_mut(id) {
                replica.begin_reads(now.monotonic);
            }
        }
        let mut begun = self.take_readies(dirty, now);
        if !begun.members_change {
            self.peers.flush(self.ticks, now, send);
        }
        let replicas = &self.replicas;
        let is_led = |id: &GroupId| replicas.get(id).is_some_and(Replica::leads_as_told);
        let awaited = |(id, entries): &mut (GroupId, Vec<Entry>)| {
            is_led(id) && !entries.is_empty() && !entries.iter().any(changes_members)
        };
        let decided: Vec<_> = begun.committed.extract_if(.., awaited).collect();
        let led: Vec<GroupId> = decided.iter().map(|(id, _)| *id).collect();
        let answers = self.apply(decided)?;
        for id in led {
            if let Some(replica) = self.replicas.get_mut(&id) {
                replica.take_readable(&mut self.told.confirmed);
            }
        }
        let confirmed = std::mem::take(&mut self.told.confirmed);
        Ok((Turn { answers, confirmed, ..Turn::default() }, begun))
    }

    /// Persists what every group has to persist (one fsync), says what could not be said before, applies the rest of what is
    /// decided (one batch), and does one step of a snapshot.
    pub fn end_turn(
        &mut self,
        begun: BegunTurn,
        now: Now,
        send: &mut dyn FnMut(StoreId, PeerBatch),
    ) -> Result<Turn<M::Effect>, HostError> {
        let BegunTurn { dirty, writes, readies, mut committed, members_change: _ } = begun;
        self.persist(writes, readies, &mut committed, now)?;
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

    /// What raft has to say, to write and to apply.
    fn take_readies(&mut self, dirty: BTreeSet<GroupId>, now: Now) -> BegunTurn {
        let (mut writes, mut readies, mut committed) = (Vec::new(), Vec::new(), Vec::new());
        let mut members_change = false;
        for &id in &dirty {
            let Some(replica) = self.replicas.get_mut(&id).filter(|replica| replica.node.has_ready()) else {
                continue;
            };
            let mut ready = replica.node.ready();
            for state in ready.take_read_states() {
                replica.read_confirmed(state.index, &state.request_ctx, self.options.lease);
            }
            // A leader's appends go out while its own disk works.
            for message in ready.take_messages() {
                match replica.decides_without(&message, &self.peers) {
                    true => hold(&mut self.peers, now, id, message),
                    false => post(&mut self.peers, &mut self.transfers, self.ticks, id, message),
                }
            }
            let late = ready.take_persisted_messages();
            let entries = ready.take_entries();
            let hard = ready.hs().cloned();
            if let Some(hard) = &hard {
                replica.node.mut_store().set_hard(hard.clone());
            }
            if !ready.snapshot().is_empty() {
                replica.change = Some(LogChange::Restart { floor: replica.floor });
            }
            let change = replica.change.take();
            // What is decided is decided anew after a restart: that alone is not worth a write.
            if ready.must_sync() || !entries.is_empty() || change.is_some() {
                // A log that begins anew says again what it has promised.
                let hard = hard.or_else(|| change.as_ref().map(|_| replica.node.store().hard().clone()));
                writes.push(LogWrite { group: id, hard, entries, change });
            }
            let decided = ready.take_committed_entries();
            if decided.iter().any(changes_members) {
                members_change = true;
                // Who is removed by it forgets: that it was decided must not be forgotten here.
                let hard = replica.node.raft.hard_state();
                replica.node.mut_store().set_hard(hard.clone());
                match writes.last_mut().filter(|write: &&mut LogWrite| write.group == id) {
                    Some(write) => write.hard = Some(hard),
                    None => writes.push(LogWrite {
                        group: id,
                        hard: Some(hard),
                        entries: Vec::new(),
                        change: None,
                    }),
                }
            }
            committed.push((id, decided));
            readies.push((id, ready, late));
        }
        BegunTurn { dirty, writes, readies, committed, members_change }
    }

    fn persist(
        &mut self,
        writes: Vec<LogWrite>,
        readies: Vec<(GroupId, Ready, Vec<eraftpb::Message>)>,
        committed: &mut Vec<(GroupId, Vec<Entry>)>,
        now: Now,
    ) -> Result<(), HostError> {
        self.write_log(writes)?;
        // Everything above is durable from here on (CO-1).
        let mut decided_now = Vec::new();
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
                match replica.decides_without(&message, &self.peers) {
                    true => hold(&mut self.peers, now, id, message),
                    false => post(&mut self.peers, &mut self.transfers, self.ticks, id, message),
                }
            }
            let decided = light.take_committed_entries();
            if decided.iter().any(changes_members) {
                let hard = replica.node.raft.hard_state();
                replica.node.mut_store().set_hard(hard.clone());
                decided_now.push(LogWrite { group: id, hard: Some(hard), entries: Vec::new(), change: None });
            }
            committed.push((id, decided));
        }
        self.write_log(decided_now)
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
            let gone = self
                .replicas
                .get(&id)
                .is_some_and(|replica| !replica.is_member() && replica.is_known_to_be_gone());
            if let Some(replica) = self.replicas.get_mut(&id)
                && replica.is_alone()
                && !replica.is_raft_leader()
                && replica.has_a_say()
            {
                replica.campaign().map_err(|error| HostError { group: id, error })?;
                self.dirty.insert(id);
            }
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
            if let Some(error) = replica.node.store().take_failure() {
                return Err(HostError { group: id, error });
            }
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
}

/// Puts a message of raft into the outbox.
fn post(peers: &mut Peers, transfers: &mut Transfers, tick: u64, id: GroupId, message: eraftpb::Message) {
    let to = StoreId(message.to);
    if message.get_msg_type() == MessageType::MsgSnapshot {
        transfers.announced(id, to, tick);
    }
    peers.post(to, id, PeerMessage::Raft(message));
}

/// A message of raft whose entries need not be there at once.
fn hold(peers: &mut Peers, now: Now, id: GroupId, message: eraftpb::Message) {
    let bytes = message.entries.iter().map(|entry| entry.data.len()).sum();
    peers.hold(StoreId(message.to), id, PeerMessage::Raft(message), bytes, now);
}

fn changes_members(entry: &Entry) -> bool {
    entry.get_entry_type() != EntryType::EntryNormal
}

fn entry_bytes(entry: &Entry) -> u64 {
    entry.data.len() as u64 + ENTRY_OVERHEAD_BYTES
}
