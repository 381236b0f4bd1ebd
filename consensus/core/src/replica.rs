//! One group on this store: its raft node, how far its state is, who waits for what.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use eggs_machine::group;
use eggs_machine::hash::StateHash;
use eggs_machine::{Machine, Table, Tx};
use eggs_proto::StoreId;
use protobuf::Message as _;
use raft::eraftpb::{self, ConfChangeSingle, ConfChangeType, ConfChangeV2, Entry, EntryType, MessageType};
use raft::{ProgressState, RawNode, StateRole};

use crate::group_log::GroupLog;
use crate::host::{
    Answer, ELECTION_TICKS, LEASE, Progress, ProposalId, ReadTicket, Role, SLEEP_AFTER_TICKS,
    SNAPSHOT_LOG_BYTES_MIN, SNAPSHOT_LOG_FACTOR,
};
use crate::membership::Membership;
use crate::peers::Peers;
use crate::storage::{AppliedRow, GroupCommit, GroupId, LogChange, LogStore, SnapshotMeta, StorageError};
use crate::wanted::Change;

/// Entries a follower may lack and count as caught up: they are on their way to it.
const CAUGHT_UP_ENTRIES: u64 = 256;
/// Times in turn that something is decided by those who get it later, until they get it at once.
const OVERTAKEN_MAX: u32 = 3;
/// A replica that should not lead stands for election when for this long nobody else was elected.
const LAST_RESORT_TICKS: usize = 10 * ELECTION_TICKS;
/// Looks without an answer after which a learner counts as lost.
const LOST_LOOKS: u32 = 30;
/// Bytes of the log looked through at once.
const SCANNED_BYTES: u64 = 1 << 20;
/// Read rounds of one group in flight; more reads wait for the next.
const READ_ROUNDS_MAX: usize = 16;

pub(crate) struct Replica<M, L: LogStore> {
    pub(crate) id: GroupId,
    pub(crate) me: StoreId,
    pub(crate) machine: M,
    pub(crate) node: RawNode<GroupLog<L>>,
    pub(crate) applied: AppliedRow,
    pub(crate) snapshot: Option<SnapshotMeta>,
    pub(crate) log_bytes: u64,
    /// Bytes of the log before which a snapshot that failed is not tried again.
    pub(crate) retry_at: u64,
    /// (index, term, proposal), rising.
    pub(crate) waiting: VecDeque<(u64, u64, ProposalId)>,
    /// Proposals whose place in the log another entry took.
    lost: Vec<ProposalId>,
    /// What happens to the log with the next write.
    pub(crate) change: Option<LogChange>,
    /// Term and index its log has to reach before it has a say in elections.
    pub(crate) floor: (u64, u64),
    /// As last told.
    pub(crate) role: Role,
    pub(crate) reads: Reads,
    /// (term, until): reads need no round before.
    lease: (u64, Duration),
    /// In this term leadership was to be handed over: whoever got it need not wait for a lease.
    lease_barred: u64,
    /// Its state is being made from a snapshot; raft is not told anything meanwhile.
    pub(crate) restoring: bool,
    /// Learners of a leader that do not answer, and how often that was seen in turn.
    unheard: BTreeMap<StoreId, u32>,
    /// The state is that of a snapshot raft has not yet taken.
    pub(crate) restored: Option<AppliedRow>,
    pub(crate) asleep: bool,
    idle_ticks: u64,
    /// Voters that decided before those that were hurried for, the last one first; and how often in turn that was seen.
    quicker: Vec<StoreId>,
    overtaken: u32,
    /// The leader sleeps at (term, index, hash): so does this replica, once it is there.
    pub(crate) sleep_offer: Option<(u64, u64, StateHash)>,
}

/// Reads on their way to being confirmed.
#[derive(Debug, Default)]
pub(crate) struct Reads {
    /// Not yet given to raft.
    asked: Option<ReadTicket>,
    /// (ticket, when the round began).
    issued: VecDeque<(ReadTicket, Duration)>,
    /// Confirmed at this index, which is not applied yet.
    confirmed: Vec<(u64, ReadTicket)>,
}

impl Reads {
    pub(crate) fn is_empty(&self) -> bool {
        self.asked.is_none() && self.issued.is_empty() && self.confirmed.is_empty()
    }

    fn take_all(&mut self) -> Vec<ReadTicket> {
        let Reads { asked, issued, confirmed } = std::mem::take(self);
        let issued = issued.into_iter().map(|(ticket, _)| ticket);
        asked.into_iter().chain(issued).chain(confirmed.into_iter().map(|(_, ticket)| ticket)).collect()
    }
}

impl<M: Machine, L: LogStore> Replica<M, L> {
    pub(crate) fn new(
        id: GroupId,
        me: StoreId,
        machine: M,
        node: RawNode<GroupLog<L>>,
        applied: AppliedRow,
    ) -> Self {
        let mut replica = Replica {
            id,
            me,
            machine,
            node,
            applied,
            snapshot: None,
            log_bytes: 0,
            retry_at: 0,
            waiting: VecDeque::new(),
            lost: Vec::new(),
            change: None,
            floor: (0, 0),
            role: Role::Follower { leader: None },
            reads: Reads::default(),
            lease: (0, Duration::ZERO),
            lease_barred: 0,
            restoring: false,
            unheard: BTreeMap::new(),
            restored: None,
            asleep: false,
            idle_ticks: 0,
            quicker: Vec::new(),
            overtaken: 0,
            sleep_offer: None,
        };
        replica.set_timeout();
        replica
    }

    pub(crate) fn membership(&self) -> &Membership {
        &self.applied.membership
    }

    /// The only voter: what it decides is decided.
    pub(crate) fn is_alone(&self) -> bool {
        self.membership().voters == [self.me]
    }

    /// Whether it may vote and stand: it has state, and its log has whatever a former log here acknowledged (CO-8).
    pub(crate) fn has_a_say(&self) -> bool {
        let log = &self.node.raft.raft_log;
        self.applied.index > 0 && (log.last_term(), log.last_index()) >= self.floor
    }

    /// Has no other members to talk to.
    pub(crate) fn is_single(&self) -> bool {
        self.is_alone() && self.membership().learners.is_empty()
    }

    pub(crate) fn is_raft_leader(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    /// Leader, and everything of earlier terms is applied: its state is what was decided.
    pub(crate) fn leads(&self) -> bool {
        self.is_raft_leader() && self.applied.term == self.node.raft.term && self.is_member()
    }

    /// Leader, and those who ask it know.
    pub(crate) fn leads_as_told(&self) -> bool {
        self.leads() && self.role == Role::Leader { term: self.node.raft.term }
    }

    pub(crate) fn is_member(&self) -> bool {
        self.membership().contains(self.me)
    }

    /// Those that stay can go on without this replica, which was removed: another one leads, or enough of them know of the
    /// removal. Before, none of them might be elected without its vote.
    pub(crate) fn is_known_to_be_gone(&self) -> bool {
        let (members, raft) = (self.membership(), &self.node.raft);
        let knows = |voter: &&StoreId| {
            raft.prs().get(voter.0).is_some_and(|progress| progress.committed_index >= members.index)
        };
        match self.leader() {
            Some(leader) if leader == self.me => {
                members.voters.iter().filter(knows).count() >= members.quorum()
            }
            leader => leader.is_some(),
        }
    }

    pub(crate) fn leader(&self) -> Option<StoreId> {
        let leader = self.node.raft.leader_id;
        (leader != 0).then_some(StoreId(leader))
    }

    /// Raft needs a snapshot for a follower that is not there; told once.
    pub(crate) fn store_wants_snapshot(&self) -> bool {
        self.node.store().take_snapshot_asked()
    }

    pub(crate) fn last_index(&self) -> u64 {
        self.node.raft.raft_log.last_index()
    }

    pub(crate) fn outgrown(&self, sending: bool) -> bool {
        let snapshot_bytes = self.snapshot.as_ref().map_or(0, |meta| meta.bytes);
        let enough = SNAPSHOT_LOG_BYTES_MIN.max(snapshot_bytes.saturating_mul(SNAPSHOT_LOG_FACTOR));
        // A snapshot on its way to a follower is replaced only when the log gets far too long.
        let enough = if sending { enough.saturating_mul(4) } else { enough };
        self.log_bytes > enough.max(self.retry_at)
    }

    // ---- time ----

    /// Raft draws timeouts by chance, and two that draw the same split the votes. Here each voter has its own
    /// turn, which changes from group to group and from term to term.
    pub(crate) fn set_timeout(&mut self) {
        let voters = &self.applied.membership.voters;
        let count = voters.len().max(1);
        let place = voters.iter().position(|&store| store == self.me).unwrap_or(0);
        let mixed = (u64::from(self.id.0) << 32 | (self.node.raft.term & 0xffff_ffff))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let turn = (place + (mixed >> 40) as usize) % count;
        let drawn = ELECTION_TICKS + (turn * ELECTION_TICKS / count).min(ELECTION_TICKS - 1);
        self.node.raft.set_randomized_election_timeout(drawn);
    }

    /// One tick of a replica that is awake. `may_lead`: its clock is good, and it is not about to stop.
    pub(crate) fn tick(&mut self, may_lead: bool) {
        self.idle_ticks += 1;
        // When nobody else is elected for long, it may be that only this log has everything: it stands in order to
        // hand that over.
        let raft = &self.node.raft;
        let needed = raft.election_elapsed >= LAST_RESORT_TICKS + raft.randomized_election_timeout();
        let stands = (may_lead || needed) && self.has_a_say();
        if !stands && !self.is_raft_leader() {
            // It does not stand, but time passes: a leader that is gone must not be stuck to.
            self.node.raft.election_elapsed += 1;
            return;
        }
        self.node.tick();
        self.set_timeout();
    }

    /// Nobody leads: the one who is to lead need not wait for its time.
    pub(crate) fn campaign(&mut self) -> Result<(), StorageError> {
        self.node.campaign().map_err(raft_failed)?;
        self.set_timeout();
        Ok(())
    }

    /// A leader that does not hear a quorum any more is none. The others may hear it all the same: that it stands for
    /// election tells them.
    pub(crate) fn give_up(&mut self) {
        let term = self.node.raft.term;
        self.node.raft.become_follower(term, 0);
        if self.membership().voters.contains(&self.me) {
            // A campaign of a voter that has a log cannot fail.
            let _ = self.node.campaign();
        }
        self.set_timeout();
    }

    /// The leader has been silent, or is known to be gone: time it was silent counts.
    pub(crate) fn leader_is_gone(&mut self) {
        let elapsed = &mut self.node.raft.election_elapsed;
        *elapsed = (*elapsed).max(ELECTION_TICKS);
    }

    pub(crate) fn busy(&mut self) {
        self.asleep = false;
        self.idle_ticks = 0;
        self.sleep_offer = None;
    }

    // ---- entries for the others ----

    /// The voters that entries of this leader go to at once: as many as decide with it, of those that take them. They are
    /// the next ones after this one, so that each store has the same few to hurry for, unless others were quicker.
    fn hurried(&self, peers: &Peers) -> Vec<StoreId> {
        let voters = &self.membership().voters;
        let Some(me) = voters.iter().position(|&store| store == self.me) else { return Vec::new() };
        let next = (1..voters.len()).map(|step| voters[(me + step) % voters.len()]);
        let quicker = self.quicker.iter().copied().filter(|store| voters.contains(store));
        let mut hurried: Vec<StoreId> = Vec::new();
        for store in quicker.chain(next) {
            if hurried.len() + 1 < self.membership().quorum()
                && !hurried.contains(&store)
                && self.takes_entries(store, peers)
            {
                hurried.push(store);
            }
        }
        hurried
    }

    fn takes_entries(&self, store: StoreId, peers: &Peers) -> bool {
        let progress = self.node.raft.prs().get(store.0);
        progress.is_some_and(|progress| progress.state == ProgressState::Replicate) && !peers.is_silent(store)
    }

    /// Whether a message of this leader is entries for a voter that they are decided without: enough others get them at
    /// once.
    pub(crate) fn decides_without(&self, message: &eraftpb::Message, peers: &Peers) -> bool {
        let entries = message.get_msg_type() == MessageType::MsgAppend && !message.entries.is_empty();
        if !entries || self.node.raft.lead_transferee.is_some() {
            return false;
        }
        let (to, voters) = (StoreId(message.to), &self.membership().voters);
        let hurried = self.hurried(peers);
        voters.contains(&self.me)
            && voters.contains(&to)
            && hurried.len() + 1 == self.membership().quorum()
            && !hurried.contains(&to)
            && self.takes_entries(to, peers)
    }

    /// With the answer of this voter something was decided. When that is one again and again that got it later, those that
    /// got it at once are slow, or gone.
    pub(crate) fn decided_with(&mut self, store: StoreId, peers: &Peers) {
        if self.hurried(peers).contains(&store) || !self.membership().voters.contains(&store) {
            self.overtaken = 0;
            return;
        }
        self.overtaken += 1;
        if self.overtaken >= OVERTAKEN_MAX {
            self.overtaken = 0;
            self.quicker.retain(|&known| known != store);
            self.quicker.insert(0, store);
            self.quicker.truncate(self.membership().voters.len());
        }
    }

    // ---- sleep ----

    /// A leader whose followers have everything (or are not there, and not needed) goes to sleep: what it
    /// tells them.
    pub(crate) fn sleep(&mut self, peers: &Peers) -> Option<(u64, u64, StateHash)> {
        let last = self.last_index();
        let quiet = self.idle_ticks >= SLEEP_AFTER_TICKS
            && self.leads()
            && self.waiting.is_empty()
            && self.reads.is_empty()
            // What it still has to say would wake them again.
            && !self.node.has_ready()
            && self.node.raft.lead_transferee.is_none()
            && self.applied.index == last
            && self.node.raft.raft_log.committed == last;
        if !quiet {
            return None;
        }
        let mut voters = 1;
        for (&id, progress) in self.node.raft.prs().iter().filter(|&(&id, _)| id != self.me.0) {
            if peers.is_silent(StoreId(id)) {
                continue;
            }
            if progress.matched != last || progress.committed_index != last {
                return None;
            }
            voters += usize::from(self.membership().voters.contains(&StoreId(id)));
        }
        if voters < self.membership().quorum() {
            return None;
        }
        self.asleep = true;
        Some((self.node.raft.term, last, self.applied.hash))
    }

    /// A follower that has been told that its leader sleeps. `Err`: it is as far as the leader and has
    /// another state.
    pub(crate) fn follow_to_sleep(&mut self) -> Result<(), ()> {
        let Some((term, index, hash)) = self.sleep_offer else { return Ok(()) };
        let raft = &self.node.raft;
        let there = raft.state == StateRole::Follower
            && raft.term == term
            && self.applied.index == index
            && raft.raft_log.last_index() == index;
        if !there {
            return Ok(());
        }
        self.sleep_offer = None;
        if self.applied.hash != hash {
            return Err(());
        }
        self.asleep = true;
        Ok(())
    }

    // ---- reads ----

    pub(crate) fn lease_holds(&self, now: Duration) -> bool {
        let (term, until) = self.lease;
        self.leads() && term == self.node.raft.term && self.lease_barred != term && now < until
    }

    pub(crate) fn ask(&mut self, next: &mut u64) -> ReadTicket {
        if let Some(ticket) = self.reads.asked {
            return ticket;
        }
        let ticket = ReadTicket(*next);
        *next += 1;
        self.reads.asked = Some(ticket);
        ticket
    }

    pub(crate) fn begin_reads(&mut self, now: Duration) {
        if self.reads.issued.len() < READ_ROUNDS_MAX
            && self.leads()
            && let Some(ticket) = self.reads.asked.take()
        {
            self.reads.issued.push_back((ticket, now));
            self.node.read_index(ticket.0.to_be_bytes().to_vec());
        }
    }

    /// Raft says that this was leader when the round began.
    pub(crate) fn read_confirmed(&mut self, index: u64, context: &[u8], lease: bool) {
        let Ok(ticket) = context.try_into().map(u64::from_be_bytes) else { return };
        let Some(at) = self.reads.issued.iter().position(|(issued, _)| issued.0 == ticket) else { return };
        if let Some((ticket, began)) = self.reads.issued.remove(at) {
            if lease {
                self.lease = (self.node.raft.term, began + LEASE);
            }
            self.reads.confirmed.push((index, ticket));
        }
    }

    pub(crate) fn take_readable(&mut self, into: &mut Vec<ReadTicket>) {
        let applied = self.applied.index;
        self.reads.confirmed.retain(|&(index, ticket)| {
            if index <= applied {
                into.push(ticket);
            }
            index > applied
        });
    }

    // ---- role ----

    /// Compares the role with the one last told: what has become of proposals and reads is known then.
    pub(crate) fn role_now(&self) -> Role {
        match self.leads() {
            true => Role::Leader { term: self.node.raft.term },
            false => Role::Follower { leader: self.leader() },
        }
    }

    /// Those that were proposed in a term this replica leads no more.
    pub(crate) fn take_dropped(&mut self) -> Vec<ProposalId> {
        let term = if self.is_raft_leader() { self.node.raft.term } else { 0 };
        let mut dropped = std::mem::take(&mut self.lost);
        self.waiting.retain(|&(_, of, proposal)| {
            if of != term {
                dropped.push(proposal);
            }
            of == term
        });
        dropped
    }

    pub(crate) fn take_lost_reads(&mut self) -> Vec<ReadTicket> {
        self.reads.take_all()
    }

    pub(crate) fn transfer(&mut self, to: StoreId) {
        self.busy();
        self.lease_barred = self.node.raft.term;
        self.node.transfer_leader(to.0);
    }

    /// Has nearly all of the log, and for certain what made it a member.
    pub(crate) fn is_caught_up(&self, store: StoreId) -> bool {
        let (last, member_since) = (self.last_index(), self.membership().index);
        self.node.raft.prs().get(store.0).is_some_and(|progress| {
            progress.matched > 0
                && progress.matched + CAUGHT_UP_ENTRIES >= last
                && progress.matched >= member_since
        })
    }

    /// Looks which learners answer; now and then.
    pub(crate) fn listen_to_learners(&mut self, peers: &Peers) {
        let progress = self.node.raft.prs();
        let unheard = |&&store: &&StoreId| {
            !peers.is_silent(store)
                && progress.get(store.0).is_some_and(|progress| {
                    !progress.recent_active
                        && progress.matched > 0
                        && progress.state != ProgressState::Snapshot
                })
        };
        let learners = self.applied.membership.learners.iter().filter(unheard);
        self.unheard = learners
            .map(|&store| (store, self.unheard.get(&store).map_or(1, |looks| looks.saturating_add(1))))
            .collect();
    }

    pub(crate) fn is_lost(&self, store: StoreId) -> bool {
        self.unheard.get(&store).is_some_and(|&looks| looks >= LOST_LOOKS)
    }

    /// Whether entries after `known`, the index of members that were decided without this replica, may make it a member.
    pub(crate) fn may_be_added_after(&self, known: u64) -> bool {
        let log = &self.node.raft.raft_log;
        let (mut from, end) =
            ((self.applied.index.max(known) + 1).max(log.first_index()), log.last_index() + 1);
        while from < end {
            let context = raft::GetEntriesContext::empty(false);
            match log.slice(from, end, SCANNED_BYTES, context) {
                Ok(entries) if entries.iter().any(|entry| adds(entry, self.me)) => return true,
                Ok(entries) if !entries.is_empty() => from += entries.len() as u64,
                // Not to be read: nobody knows.
                _ => return true,
            }
        }
        false
    }

    pub(crate) fn progress(&self) -> Vec<Progress> {
        if !self.is_raft_leader() {
            return Vec::new();
        }
        let mut all: Vec<Progress> = self
            .node
            .raft
            .prs()
            .iter()
            .filter(|&(&id, _)| id != self.me.0)
            .map(|(&id, progress)| Progress {
                store: StoreId(id),
                matched_index: progress.matched,
                snapshot_sent: 0,
                snapshot_total: 0,
            })
            .collect();
        all.sort_unstable_by_key(|progress| progress.store);
        all
    }

    // ---- log ----

    /// Proposes a change of the members; false when raft takes none now.
    pub(crate) fn propose_change(&mut self, change: Change) -> bool {
        let (kind, store) = match change {
            Change::AddLearner(store) => (ConfChangeType::AddLearnerNode, store),
            Change::Promote(store) => (ConfChangeType::AddNode, store),
            Change::Remove(store) => (ConfChangeType::RemoveNode, store),
        };
        let mut single = ConfChangeSingle { node_id: store.0, ..ConfChangeSingle::default() };
        single.set_change_type(kind);
        let change = ConfChangeV2 { changes: vec![single].into(), ..ConfChangeV2::default() };
        self.node.propose_conf_change(Vec::new(), change).is_ok()
    }

    /// Applies a run of committed entries as one transaction.
    pub(crate) fn apply<T: Table>(
        &mut self,
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
            match entry.get_entry_type() {
                EntryType::EntryNormal if entry.data.is_empty() => {}
                EntryType::EntryNormal => {
                    let outcome = group::apply(&self.machine, &mut tx, &entry.data)?;
                    answers.push(Answer { group: self.id, proposal, applied: outcome });
                }
                EntryType::EntryConfChangeV2 => {
                    let change = ConfChangeV2::parse_from_bytes(&entry.data)
                        .map_err(|error| StorageError::new(format!("entry {}: {error}", entry.index)))?;
                    let conf = self.node.apply_conf_change(&change).map_err(raft_failed)?;
                    applied.membership = Membership::from_conf(&conf, entry.index);
                    self.node.mut_store().set_members(entry.index);
                }
                EntryType::EntryConfChange => {
                    return Err(StorageError::new(format!("entry {} is of no kind we write", entry.index)));
                }
            }
        }
        let (batch, hash) = tx.finish();
        applied.hash = hash;
        self.applied = applied.clone();
        Ok(GroupCommit { group: self.id, batch, applied })
    }

    fn proposal_of(&mut self, entry: &Entry) -> Option<ProposalId> {
        while let Some(&(index, term, proposal)) = self.waiting.front() {
            if index > entry.index {
                return None;
            }
            if index < entry.index || term != entry.term {
                // Another entry took its place.
                self.waiting.pop_front();
                self.lost.push(proposal);
                continue;
            }
            self.waiting.pop_front();
            return Some(proposal);
        }
        None
    }
}

pub(crate) fn raft_failed(error: raft::Error) -> StorageError {
    StorageError::new(format!("raft: {error}"))
}

/// Whether an entry makes a store a member.
fn adds(entry: &Entry, store: StoreId) -> bool {
    entry.get_entry_type() == EntryType::EntryConfChangeV2
        && ConfChangeV2::parse_from_bytes(&entry.data).is_ok_and(|change| {
            change.changes.iter().any(|change| {
                change.node_id == store.0 && change.get_change_type() != ConfChangeType::RemoveNode
            })
        })
}
