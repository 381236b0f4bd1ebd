//! A host and the others: what they say, time that passes, who sleeps and who wakes.

use std::collections::BTreeSet;

use eggs_machine::Machine;
use eggs_proto::StoreId;
use raft::SnapshotStatus;
use raft::eraftpb::{self, MessageType};

use crate::host::{ELECTION_TICKS, Host, HostError};
use crate::peer::{Now, PeerBatch, PeerMessage};
use crate::peers::Heard;
use crate::replica::Replica;
use crate::storage::{GroupId, LogStore, SnapshotStore, StateStore, StorageError};
use crate::wanted::{Member, Step, next_step};

/// A store that was not heard of for this long is silent: more than two of its heartbeats are missing, and it is
/// longer than any lease.
const SILENT_TICKS: u64 = ELECTION_TICKS as u64 + 1;
/// Between tries to hand over leadership, or to change members.
const RECONCILE_TICKS: u64 = 2;
const TRANSFER_TICKS: u64 = 20;
/// Between looks whether groups at rest are led by whom they are to be.
const PREFERENCE_TICKS: u64 = 100;

impl<M, L, S, P> Host<M, L, S, P>
where
    M: Machine,
    L: LogStore,
    S: StateStore,
    P: SnapshotStore,
{
    /// Whether time matters: some group has other members.
    pub fn needs_ticks(&self) -> bool {
        !self.peers.is_empty() || !self.awake.is_empty() || !self.unsettled.is_empty()
    }

    /// Ticks until something happens by itself, at least one: at rest that is the next heartbeat (CO-5). As many may pass at
    /// once: all but the last with [`Host::pass`], if nothing else comes.
    pub fn rest_ticks(&self) -> u64 {
        let rests = self.awake.is_empty()
            && self.unsettled.is_empty()
            && self.transfers.is_idle()
            && self.clock_is_good
            && !self.peers.is_leaving();
        let looks = PREFERENCE_TICKS - self.ticks % PREFERENCE_TICKS;
        if rests { self.peers.heartbeat_in(self.ticks).clamp(1, looks) } else { 1 }
    }

    /// So many ticks have passed in which nothing was to happen. What came meanwhile is taken in after it.
    pub fn pass(&mut self, ticks: u64) {
        self.ticks += ticks;
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
                let taken = self.transfers.piece(id, from, (index, term), piece, snapshots, peers);
                if let Err(error) = taken {
                    self.snapshot_failed = Some(HostError { group: id, error });
                }
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
        // Its leader would know a replica that has nothing.
        let late = kind == MessageType::MsgHeartbeat && message.commit > 0;
        let known = self.replicas.contains_key(&id) || (of_leader && !late && self.open_waiting(id)?);
        if !known {
            return Ok(());
        }
        let just_opened = self.ticks <= ELECTION_TICKS as u64 + 1;
        let Some(replica) = self.replicas.get_mut(&id).filter(|replica| !replica.restoring) else {
            return Ok(());
        };
        let vote = matches!(kind, MessageType::MsgRequestVote | MessageType::MsgRequestPreVote);
        if vote && !replica.has_a_say() {
            // What a log that was here before acknowledged, before it went, could be missed by whoever is elected.
            return Ok(());
        }
        if vote && self.options.lease && just_opened && replica.last_index() > 1 {
            // What was promised to a leader before the restart is not remembered: it may still have its lease.
            return Ok(());
        }
        if kind == MessageType::MsgHeartbeat && message.commit > replica.last_index() {
            // Sent before this replica was removed, and came again.
            return Ok(());
        }
        let may_lead = self.peers.clock_is_good() && !self.peers.is_leaving();
        if kind == MessageType::MsgTimeoutNow && !(may_lead && replica.has_a_say()) {
            return Ok(());
        }
        if vote && replica.leader() == Some(from) && message.term > replica.node.raft.term {
            // Who led stands for election: it has given up.
            replica.leader_is_gone();
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
        let decided = replica.node.raft.raft_log.committed;
        // From somebody raft does not know any more, or does not know yet: nothing to it.
        let _ = replica.node.step(message);
        if kind == MessageType::MsgAppendResponse && replica.node.raft.raft_log.committed > decided {
            replica.decided_with(from, &self.peers);
        }
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
    pub fn tick(&mut self) -> Result<(), HostError> {
        self.ticks += 1;
        let fallen = self.peers.fallen_silent(self.ticks, SILENT_TICKS);
        for store in fallen {
            self.wake_without(store);
        }
        // CO-12
        let was_good = std::mem::replace(&mut self.clock_is_good, self.peers.clock_is_good());
        let may_lead = self.clock_is_good && !self.peers.is_leaving();
        for id in self.awake.clone() {
            self.tick_one(id, may_lead).map_err(|error| HostError { group: id, error })?;
        }
        if self.ticks.is_multiple_of(PREFERENCE_TICKS) {
            let led = self.replicas.iter().filter(|(_, replica)| replica.is_raft_leader());
            self.unsettled.extend(led.map(|(&id, _)| id));
        }
        if self.ticks.is_multiple_of(RECONCILE_TICKS) {
            self.reconcile();
        }
        if !may_lead && (was_good && !self.clock_is_good || self.ticks.is_multiple_of(TRANSFER_TICKS)) {
            self.hand_over_all();
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

    fn tick_one(&mut self, id: GroupId, may_lead: bool) -> Result<(), StorageError> {
        let me = self.options.store;
        let Some(replica) = self.replicas.get_mut(&id) else {
            self.awake.remove(&id);
            return Ok(());
        };
        if replica.restoring {
            return Ok(());
        }
        if replica.is_raft_leader() && !replica.is_member() && replica.is_known_to_be_gone() {
            self.remove(id)?;
            self.members_changed();
            return Ok(());
        }
        replica.tick(may_lead);
        let preferred = self.wanted.get(&id).and_then(|wanted| wanted.preferred) == Some(me);
        let leaderless = replica.leader().is_none() && !replica.is_raft_leader();
        let votes = replica.membership().voters.contains(&me) && replica.has_a_say();
        if leaderless && preferred && votes && may_lead && self.ticks.is_multiple_of(3) {
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
    fn reconcile(&mut self) {
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
            replica.listen_to_learners(peers);
            let member = |store| Member {
                caught_up: replica.is_caught_up(store),
                alive: peers.is_staying(store),
                on_time: peers.may_lead(store),
                lost: replica.is_lost(store),
            };
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
                        // That it comes to nothing is noticed as time passes.
                        self.awake.insert(id);
                        self.dirty.insert(id);
                    }
                }
                Step::Change(change) => {
                    replica.propose_change(change);
                    self.dirty.insert(id);
                }
            }
        }
    }

    /// The store is about to stop: hands over what others can lead, takes nothing on, and tells the others.
    pub fn leave(&mut self) {
        self.peers.leave();
        self.hand_over_all();
    }

    /// Hands over all that others can lead.
    fn hand_over_all(&mut self) {
        let led = self.replicas.iter().filter(|(_, replica)| replica.is_raft_leader());
        let heirs: Vec<_> = led.filter_map(|(&id, replica)| Some((id, self.heir(replica)?))).collect();
        for (id, store) in heirs {
            if let Some(replica) = self.replicas.get_mut(&id) {
                replica.transfer(store);
                self.dirty.insert(id);
                self.awake.insert(id);
            }
        }
    }

    /// Who could lead in the place of this store.
    pub(crate) fn heir(&self, replica: &Replica<M, L>) -> Option<StoreId> {
        let fit = |&&store: &&StoreId| {
            store != self.options.store
                && replica.is_caught_up(store)
                && self.peers.is_staying(store)
                && self.peers.may_lead(store)
        };
        replica.membership().voters.iter().find(fit).copied()
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
    pub(crate) fn wake(&mut self, id: GroupId) {
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

    /// A store has fallen silent: those it leads need another leader, and those led here whose quorum is not heard
    /// any more have to be given up.
    fn wake_without(&mut self, store: StoreId) {
        for (&id, replica) in &mut self.replicas {
            let members = replica.membership();
            let heard = |&&voter: &&StoreId| voter == self.options.store || !self.peers.is_silent(voter);
            let quorum = members.voters.iter().filter(heard).count() >= members.quorum();
            if replica.is_raft_leader() && members.contains(store) && !quorum {
                replica.give_up();
                replica.busy();
                self.dirty.insert(id);
                self.awake.insert(id);
            }
        }
        for (&id, replica) in &mut self.replicas {
            if replica.leader() == Some(store) {
                // Awake too: another may have asked for its vote already, and was not given it.
                replica.leader_is_gone();
            } else if !(replica.asleep && replica.is_raft_leader() && replica.membership().contains(store)) {
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
