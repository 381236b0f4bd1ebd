//! One store of replicated groups, in memory, with what a crash leaves of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use eggs_consensus_core::memory::{MemoryLog, MemorySnapshots, MemoryState};
use eggs_consensus_core::{
    Answer, Grant, GroupId, Host, HostOptions, LogStore, Membership, Now, PeerBatch, Proposal, ProposalId,
    ProposeError, ReadTicket, Role, Ticks, Turn, Wanted,
};
use eggs_machine::hash::StateHash;
use eggs_machine::{Machine, MemoryTable, Table, group};
use eggs_proto::time::HybridClock;
use eggs_proto::{SessionId, StoreId, Time, pb};
use rand::{Rng, RngCore};

use crate::bug::Bug;
use crate::kernel::{Envelope, Kernel, NodeId, PeerEnvelope, Timer};
use crate::nodes::{Cluster, Me, node_at, turn_delay};
use crate::oracle::LogEnds;

type MemoryHost<M> = Host<M, MemoryLog, MemoryState, MemorySnapshots>;
type MachineOf<M> = Arc<dyn Fn(GroupId) -> Option<M> + Send + Sync>;

/// Bytes per second of snapshots: the pieces of a run's small snapshots still come one by one.
const SNAPSHOT_RATE: u64 = 8 << 20;
/// Entries one look into a log reads.
const LOOK_BYTES_MAX: u64 = u64::MAX;

/// What is found of the state store after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StateAfter {
    Kept,
    Lost,
    Damaged(GroupId),
    /// As it was some time ago.
    Earlier,
    /// The host was stopped in order: nothing is lost.
    Closed,
}

/// What the shell's consensus thread is in a daemon.
pub(crate) struct Replica<M: Machine> {
    machine_of: MachineOf<M>,
    pub store: StoreId,
    lease: bool,
    bug: Option<Bug>,
    host: Option<MemoryHost<M>>,
    stores: Option<(MemoryLog, MemoryState, MemorySnapshots)>,
    earlier: Option<MemoryState>,
    pub clock: HybridClock,
    waiting: BTreeMap<ProposalId, Waiter>,
    /// Where the other stores are: as a daemon keeps it, also over a restart.
    pub addresses: BTreeMap<StoreId, NodeId>,
    turn_due: bool,
    ticks: Ticks,
    /// The instant of the timer that counts; others are of rests broken off.
    timer_at: Option<Duration>,
    /// Then something is due to be sent that was held.
    held_timer: Option<Duration>,
    /// Heartbeats alone wait for the next tick.
    heartbeats: Vec<(StoreId, PeerBatch, Now)>,
    /// A turn is due after a tick, whatever there is to do: heartbeats go out with it.
    ticked: bool,
    /// Bits of its log were flipped.
    pub spoiled: bool,
    /// The stores it had before this one: put aside, damaged.
    pub put_aside: Vec<StoreId>,
}

/// Who asked, and where the answer goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waiter {
    pub from: NodeId,
    pub tag: u64,
    pub session: SessionId,
    pub sequence: u64,
}

impl Waiter {
    pub fn new(request: &Envelope, header: Option<&pb::RequestHeader>) -> Waiter {
        let (session, sequence) = header.map_or((0, 0), |header| (header.session, header.sequence));
        Waiter { from: request.from, tag: request.tag, session: SessionId(session), sequence }
    }
}

/// The outcome of an offered write.
pub(crate) enum Offered {
    /// Its answer comes with a turn.
    Proposed,
    /// A repetition: the first answer.
    Repeated(Bytes),
    /// `prepare` refused it; nothing was logged.
    Refused(pb::Error),
    NotLeader,
    Busy,
}

/// What a turn came to.
pub(crate) struct Turned<E> {
    pub answers: Vec<(Option<Waiter>, Answer<E>)>,
    /// Who asked for what may or may not happen.
    pub dropped: Vec<Waiter>,
    pub confirmed: Vec<ReadTicket>,
    pub lost: Vec<ReadTicket>,
    pub roles: Vec<(GroupId, Role)>,
}

/// What was told before a turn's write, and what came of the rest.
pub(crate) type Halves<E> = (Turned<E>, Result<Turned<E>, String>);

impl<E> Default for Turned<E> {
    fn default() -> Self {
        Turned {
            answers: Vec::new(),
            dropped: Vec::new(),
            confirmed: Vec::new(),
            lost: Vec::new(),
            roles: Vec::new(),
        }
    }
}

impl<M: Machine + Clone + 'static> Replica<M> {
    pub fn new(
        kernel: &mut Kernel,
        cluster: &Cluster,
        machine_of: impl Fn(GroupId) -> Option<M> + Send + Sync + 'static,
    ) -> Replica<M> {
        Replica {
            machine_of: Arc::new(machine_of),
            store: StoreId(kernel.rng.next_u64() | 1),
            lease: cluster.lease,
            bug: cluster.bug,
            host: None,
            stores: Some(new_stores(cluster.bug)),
            earlier: None,
            clock: HybridClock::default(),
            waiting: BTreeMap::new(),
            addresses: BTreeMap::new(),
            turn_due: false,
            ticked: false,
            ticks: Ticks::new(Duration::ZERO),
            timer_at: None,
            held_timer: None,
            heartbeats: Vec::new(),
            spoiled: false,
            put_aside: Vec::new(),
        }
    }

    // ---- life ----

    /// Opens what the log holds. A log that is damaged is put aside: the store comes back empty, as another.
    pub fn open(&mut self, kernel: &mut Kernel, me: &Me) -> Result<(), String> {
        let Some((log, state, snapshots)) = self.stores.take() else { return Err("is open".to_owned()) };
        let machine_of = Arc::clone(&self.machine_of);
        let options = HostOptions {
            store: self.store,
            seed: kernel.rng.next_u64(),
            lease: self.lease,
            snapshot_bytes_per_second: SNAPSHOT_RATE,
        };
        (self.turn_due, self.timer_at, self.held_timer) = (false, None, None);
        self.ticks = Ticks::new(me.now(kernel).monotonic);
        self.heartbeats.clear();
        self.clock = HybridClock::default();
        self.clock.now(me.wall(kernel));
        let opened = Host::open(options, move |id| machine_of(id), log, state, snapshots);
        match opened {
            Ok(host) => {
                kernel.note(format_args!("{} is {}", me.id, self.store));
                self.host = Some(host);
            }
            Err(error) if self.spoiled => {
                kernel.note(format_args!("{} puts {} aside: {error}", me.id, self.store));
                kernel.oracle.forget(self.store);
                self.put_aside.push(self.store);
                self.store = StoreId(kernel.rng.next_u64() | 1);
                self.spoiled = false;
                self.earlier = None;
                self.stores = Some(new_stores(self.bug));
                return self.open(kernel, me);
            }
            Err(error) => return Err(error.to_string()),
        }
        self.go_on(kernel, me);
        Ok(())
    }

    /// Leaves only what is durable, and of the state store what chance leaves.
    pub fn crash(&mut self, kernel: &mut Kernel, me: &Me, state_after: StateAfter) {
        self.waiting.clear();
        kernel.oracle.forget(self.store);
        let Some(mut host) = self.host.take() else { return };
        let mut state_after = state_after;
        if self.bug == Some(Bug::SkipFsync) {
            // The state would give it away at once: it is as little durable as the log.
            state_after = StateAfter::Lost;
        }
        if self.spoiled && state_after == StateAfter::Closed {
            state_after = StateAfter::Kept;
        }
        while state_after == StateAfter::Closed && host.has_entries() {
            // A host whose log fails while it stops has not stopped in order.
            if host.turn(me.now(kernel), &mut |_, _| {}).is_err() {
                state_after = StateAfter::Kept;
            }
        }
        let (log, mut state, snapshots) = host.into_stores();
        if self.bug == Some(Bug::ApplyTwice) && kernel.chance(500) {
            state.rewind(3);
            state_after = StateAfter::Closed;
        }
        let state = match state_after {
            StateAfter::Kept => state.crashed(),
            StateAfter::Closed => state.closed(),
            StateAfter::Lost => MemoryState::default(),
            StateAfter::Earlier => self.earlier.clone().unwrap_or_default().crashed(),
            StateAfter::Damaged(group) => {
                let mut state = state.crashed();
                state.damage(group);
                state
            }
        };
        let log = log.crashed();
        if self.bug == Some(Bug::DamagedLogKept) && self.spoiled {
            log.cut_damaged();
            (self.spoiled, self.earlier) = (false, None);
            self.stores = Some((log, MemoryState::default(), snapshots.crashed()));
            return;
        }
        self.stores = Some((log, state, snapshots.crashed()));
    }

    /// The whole disk is gone: the host comes back with an empty one, which is another store.
    pub fn replace_disk(&mut self, kernel: &mut Kernel) {
        kernel.oracle.forget(self.store);
        self.put_aside.push(self.store);
        self.store = StoreId(kernel.rng.next_u64() | 1);
        (self.spoiled, self.earlier, self.host) = (false, None, None);
        self.stores = Some(new_stores(self.bug));
    }

    /// Founds one group with this store alone: the first registry.
    pub fn found_alone(&mut self, group: GroupId) -> Result<(), String> {
        let Some(host) = &mut self.host else { return Err("is not open".to_owned()) };
        host.found(&[(group, vec![self.store])]).map_err(|error| error.to_string())
    }

    // ---- looking ----

    pub fn host(&self) -> Option<&MemoryHost<M>> {
        self.host.as_ref()
    }

    pub fn host_mut(&mut self) -> Option<&mut MemoryHost<M>> {
        self.host.as_mut()
    }

    /// The state of a group led here.
    pub fn view(&self, group: GroupId) -> Option<&MemoryTable> {
        self.host.as_ref()?.view(group)
    }

    pub fn local_view(&self, group: GroupId) -> Option<&MemoryTable> {
        self.host.as_ref()?.local_view(group)
    }

    pub fn groups(&self) -> Vec<GroupId> {
        self.host.as_ref().map(|host| host.groups().collect()).unwrap_or_default()
    }

    pub fn has_entries(&self) -> bool {
        self.host.as_ref().is_some_and(MemoryHost::has_entries)
    }

    /// Groups led here.
    pub fn led(&self) -> Vec<GroupId> {
        let Some(host) = &self.host else { return Vec::new() };
        host.groups().filter(|group| host.view(*group).is_some()).collect()
    }

    /// Whether the group's clock has gone beyond an instant here: what was so then stays so (SH-12).
    pub fn is_past(&self, group: GroupId, at: Time) -> Result<bool, String> {
        let Some(view) = self.local_view(group) else { return Ok(false) };
        Ok(group::clock(view).map_err(|error| error.to_string())? >= at)
    }

    /// Where a group is led, as far as known here.
    pub fn leader_of(&self, group: GroupId) -> Option<NodeId> {
        match self.host.as_ref()?.role(group) {
            Role::Follower { leader: Some(leader) } => self.addresses.get(&leader).copied(),
            _ => None,
        }
    }

    /// The address of who leads, for those who came to the wrong one.
    pub fn hint(&self, group: GroupId) -> String {
        self.leader_of(group).map(crate::nodes::address).unwrap_or_default()
    }

    /// What the registry is told of the groups led here.
    pub fn led_groups(&self) -> Vec<pb::LedGroup> {
        let Some(host) = &self.host else { return Vec::new() };
        let led = |group| {
            let status = host.status(group)?;
            let ids = |stores: &[StoreId]| stores.iter().map(|store| store.0).collect();
            status.leader.then(|| pb::LedGroup {
                group: u32::from(group.0),
                term: status.term,
                applied_index: status.applied_index,
                log_bytes: status.log_bytes,
                voters: ids(&status.membership.voters),
                learners: ids(&status.membership.learners),
                conf_index: status.membership.index,
                progress: Vec::new(),
            })
        };
        host.groups().filter_map(led).collect()
    }

    // ---- work ----

    /// What was asked of the host may need a turn, and time.
    pub fn go_on(&mut self, kernel: &mut Kernel, me: &Me) {
        let Some(host) = &self.host else { return };
        let held = host.held_until();
        let held_is_due = held.is_some_and(|at| at <= me.now(kernel).monotonic);
        if (host.has_work() || self.ticked || held_is_due) && !self.turn_due {
            self.turn_due = true;
            let delay = turn_delay(kernel, me.id);
            me.timer(kernel, delay, Timer::Turn);
        }
        if let Some(at) = held.filter(|_| !self.turn_due)
            && self.held_timer.replace(at) != Some(at)
        {
            // Its clock may be a nanosecond behind the timer.
            me.timer_at(kernel, at + Duration::from_micros(1), Timer::Held);
        }
        if !host.needs_ticks() {
            self.ticks = Ticks::new(me.now(kernel).monotonic);
            self.timer_at = None;
        } else if !self.turn_due {
            self.ticks.plan(host.rest_ticks());
            let at = self.ticks.next();
            if self.timer_at.replace(at) != Some(at) {
                me.raft_tick(kernel, at);
            }
        }
    }

    /// What has gone by of a rest, and the heartbeats that came in it.
    fn rest(&mut self, now: Now) -> Result<(), String> {
        let Some(host) = &mut self.host else { return Ok(()) };
        host.pass(self.ticks.gone_by(now.monotonic));
        for (from, batch, came) in self.heartbeats.drain(..) {
            host.receive(from, batch, came).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// A tick has passed, or at rest several. Now and then the logs are looked into.
    pub fn tick(&mut self, kernel: &mut Kernel, me: &Me, at: Duration) -> Result<(), String> {
        if self.timer_at != Some(at) {
            return Ok(());
        }
        // Its clock may be a nanosecond behind the timer.
        let now = Now { monotonic: me.now(kernel).monotonic.max(at), ..me.now(kernel) };
        self.rest(now)?;
        if let Some(host) = &mut self.host {
            host.tick().map_err(|error| error.to_string())?;
        }
        (self.ticks, self.timer_at) = (Ticks::new(now.monotonic), None);
        self.observe_logs(kernel)?;
        self.ticked = true;
        self.go_on(kernel, me);
        Ok(())
    }

    /// Another store has something to say.
    pub fn receive(&mut self, kernel: &mut Kernel, me: &Me, envelope: PeerEnvelope) -> Result<(), String> {
        if envelope.to_store != self.store {
            return Ok(());
        }
        let now = me.now(kernel);
        if envelope.batch.messages.is_empty() && self.timer_at.is_some() {
            self.heartbeats.push((envelope.from_store, envelope.batch, now));
            return Ok(());
        }
        self.rest(now)?;
        if let Some(host) = &mut self.host {
            host.receive(envelope.from_store, envelope.batch, now).map_err(|error| error.to_string())?;
        }
        self.go_on(kernel, me);
        Ok(())
    }

    /// As the shell follows the cluster map: addresses, what is to be founded, what is wanted.
    pub fn follow(&mut self, kernel: &mut Kernel, me: &Me, map: &pb::ClusterMapReply) -> Result<(), String> {
        for store in &map.stores {
            if let Some(node) = node_at(&store.address) {
                self.addresses.insert(StoreId(store.id), node);
            }
        }
        let Some(host) = &mut self.host else { return Ok(()) };
        let ids = |ids: &[u64]| ids.iter().copied().map(StoreId).collect::<Vec<_>>();
        let mut founding = Vec::new();
        for place in &map.groups {
            let Ok(id) = u16::try_from(place.group).map(GroupId) else { continue };
            if place.founding.contains(&self.store.0) {
                founding.push((id, ids(&place.founding)));
            }
        }
        host.found(&founding).map_err(|error| error.to_string())?;
        for place in &map.groups {
            let Ok(id) = u16::try_from(place.group).map(GroupId) else { continue };
            if (self.machine_of)(id).is_none() {
                continue;
            }
            let known = Membership {
                voters: ids(&place.voters),
                learners: ids(&place.learners),
                index: place.conf_index,
            };
            let preferred = (place.preferred != 0).then_some(StoreId(place.preferred));
            let wanted = Wanted { voters: ids(&place.wanted), preferred, known };
            host.want(id, wanted).map_err(|error| error.to_string())?;
        }
        self.go_on(kernel, me);
        Ok(())
    }

    /// As `eggs-consensus` takes in a write: repetitions, `prepare` on the state as it is, proposal.
    pub fn write(
        &mut self,
        id: GroupId,
        session: SessionId,
        sequence: u64,
        wall: Time,
        waiter: Option<Waiter>,
        prepare: impl FnOnce(&MemoryTable, Time) -> Result<Bytes, pb::Error>,
    ) -> Result<Offered, String> {
        let Some(host) = &mut self.host else { return Ok(Offered::NotLeader) };
        let Some(view) = host.view(id) else { return Ok(Offered::NotLeader) };
        let applied = group::clock(view).map_err(|error| error.to_string())?;
        self.clock.observe(applied, Time::MAX);
        if session.0 != 0
            && let Some(reply) =
                group::repeated(view, session, sequence).map_err(|error| error.to_string())?
        {
            return Ok(Offered::Repeated(reply));
        }
        let time = self.clock.now(wall);
        let command = match prepare(view, time) {
            Ok(command) => command,
            Err(error) => return Ok(Offered::Refused(error)),
        };
        match host.propose(id, Proposal { time, session, sequence, command }) {
            Ok(proposal) => {
                if let Some(waiter) = waiter {
                    self.waiting.insert(proposal, waiter);
                }
                Ok(Offered::Proposed)
            }
            Err(ProposeError::Busy) => Ok(Offered::Busy),
            Err(_) => Ok(Offered::NotLeader),
        }
    }

    /// Asks to read a group that is led here; `None`: it is not.
    pub fn read(&mut self, kernel: &mut Kernel, me: &Me, id: GroupId) -> Option<Grant> {
        let grant = self.host.as_mut()?.read(id, me.now(kernel)).ok()?;
        match grant {
            Grant::Now => kernel.oracle.reads_leased += 1,
            Grant::Later(_) => kernel.oracle.reads_waited += 1,
        }
        self.go_on(kernel, me);
        Some(grant)
    }

    /// An instant not before anything that was applied to a group here.
    pub fn read_time(&mut self, id: GroupId, wall: Time) -> Result<Time, String> {
        if let Some(view) = self.local_view(id) {
            let applied = group::clock(view).map_err(|error| error.to_string())?;
            self.clock.observe(applied, Time::MAX);
        }
        Ok(self.clock.now(wall))
    }

    /// Both halves of a turn: what was told before its write, and what came of the rest. What it says to others is sent,
    /// answers come with who waits for them.
    pub fn turn(&mut self, kernel: &mut Kernel, me: &Me) -> Result<Halves<M::Effect>, String> {
        (self.turn_due, self.ticked) = (false, false);
        self.rest(me.now(kernel))?;
        let Some(host) = &mut self.host else { return Ok((Turned::default(), Ok(Turned::default()))) };
        if self.bug == Some(Bug::SkipFsync) && kernel.chance(100) {
            host.log().sync_now();
        }
        let mut mail: Vec<(StoreId, PeerBatch)> = Vec::new();
        let begun = host.begin_turn(me.now(kernel), &mut |to, batch| mail.push((to, batch)));
        let mut unsent = self.send(kernel, me, std::mem::take(&mut mail));
        let (turn, begun) = begun.map_err(|error| error.to_string())?;
        let early = self.turned(kernel, me, turn)?;
        let Some(host) = &mut self.host else { return Ok((early, Ok(Turned::default()))) };
        let ended = host.end_turn(begun, me.now(kernel), &mut |to, batch| mail.push((to, batch)));
        // What was sent before the disk failed is sent.
        unsent.extend(self.send(kernel, me, mail));
        // Between the halves of a turn raft is told nothing.
        for store in unsent {
            if let Some(host) = &mut self.host {
                host.unreachable(store);
            }
        }
        let rest = ended.map_err(|error| error.to_string()).and_then(|turn| self.turned(kernel, me, turn));
        self.go_on(kernel, me);
        Ok((early, rest))
    }

    /// Answers to whom it could not be sent.
    fn send(&self, kernel: &mut Kernel, me: &Me, mail: Vec<(StoreId, PeerBatch)>) -> Vec<StoreId> {
        let mut unsent = Vec::new();
        for (to, batch) in mail {
            kernel.oracle.sends(self.store, &batch);
            let node = self.addresses.get(&to).copied();
            if !node.is_some_and(|node| kernel.send_peer((me.id, self.store), (node, to), batch)) {
                unsent.push(to);
            }
        }
        unsent
    }

    fn turned(
        &mut self,
        kernel: &mut Kernel,
        me: &Me,
        turn: Turn<M::Effect>,
    ) -> Result<Turned<M::Effect>, String> {
        let Some(host) = &mut self.host else { return Ok(Turned::default()) };
        for &(group, role) in &turn.roles {
            kernel.note(format_args!("{} {group}: {role:?}", me.id));
            if let Role::Leader { term } = role {
                kernel.oracle.leads(group, term, self.store);
                if let Some(view) = host.local_view(group) {
                    // No instant it gives is before one that was given.
                    self.clock.observe(group::clock(view).map_err(|error| error.to_string())?, Time::MAX);
                }
            }
        }
        for answer in turn.answers.iter().filter(|answer| answer.proposal.is_some()) {
            if let Some(view) = host.local_view(answer.group) {
                // Commands of one turn have instants after another.
                self.clock.observe(group::clock(view).map_err(|error| error.to_string())?, Time::MAX);
            }
        }
        let waiting = &mut self.waiting;
        let dropped = turn.dropped.iter().filter_map(|proposal| waiting.remove(proposal)).collect();
        let answers = turn.answers.into_iter();
        let answers = answers
            .map(|answer| (answer.proposal.and_then(|proposal| waiting.remove(&proposal)), answer))
            .collect();
        let (confirmed, lost, roles) = (turn.confirmed, turn.lost, turn.roles);
        Ok(Turned { answers, dropped, confirmed, lost, roles })
    }

    // ---- faults ----

    /// The state store as it is now may be what a later crash leaves.
    pub fn remember_state(&mut self) {
        if let Some(host) = &mut self.host {
            self.earlier = Some(host.state_mut().clone());
        }
    }

    /// A snapshot of one of its groups, soon.
    pub fn request_snapshot(&mut self, kernel: &mut Kernel, me: &Me) {
        let groups = self.groups();
        if groups.is_empty() {
            return;
        }
        let group = groups[kernel.rng.random_range(0..groups.len())];
        if let Some(host) = &mut self.host {
            host.request_snapshot(group);
        }
        self.go_on(kernel, me);
    }

    /// Flips a bit of one of the last entries of a log (of any group: `None`), while it is open.
    pub fn flip_log(&mut self, kernel: &mut Kernel, me: &Me, group: Option<GroupId>) -> bool {
        let Some(host) = &self.host else { return false };
        let groups = host.log().groups_with_entries();
        if groups.is_empty() {
            return false;
        }
        let group = group.unwrap_or_else(|| groups[kernel.rng.random_range(0..groups.len())]);
        let (from_end, bit) = (kernel.rng.random_range(0..4), kernel.rng.random_range(0..1 << 12));
        let flipped = host.log().flip(group, from_end, bit);
        if flipped {
            kernel.note(format_args!("{} a bit of the log of {group} flips", me.id));
            self.spoiled = true;
        }
        flipped
    }

    /// Its disk has no room, or has room again.
    pub fn set_full(&mut self, full: bool) {
        if let Some(host) = &mut self.host {
            host.log().set_full(full);
        }
    }

    /// The next write of the log fails, with or without being there all the same.
    pub fn fail_next_write(&mut self, kernel: &mut Kernel) {
        let kept = kernel.chance(500);
        if let Some(host) = &self.host {
            let why = "input/output error";
            if kept { host.log().fail_after_next(why) } else { host.log().fail_next(why) }
        }
    }

    /// What chance leaves of the state store.
    pub fn random_state_after(&self, kernel: &mut Kernel) -> StateAfter {
        let groups = self.groups();
        match kernel.rng.random_range(0..6) {
            0 => StateAfter::Lost,
            1 if !groups.is_empty() => StateAfter::Damaged(groups[kernel.rng.random_range(0..groups.len())]),
            2 => StateAfter::Earlier,
            3 => StateAfter::Closed,
            _ => StateAfter::Kept,
        }
    }

    // ---- checking ----

    /// Shows the oracle what is new in the logs, and the memberships.
    fn observe_logs(&self, kernel: &mut Kernel) -> Result<(), String> {
        let Some(host) = &self.host else { return Ok(()) };
        for group in host.groups() {
            let Some(status) = host.status(group) else { continue };
            if status.applied_index > 0 {
                let members = &status.membership;
                if kernel.oracle.member(group, self.store, members) {
                    kernel.note(format_args!(
                        "{group} has {:?} and {:?} since {}",
                        members.voters, members.learners, members.index
                    ));
                }
            }
            let Some((first, last, last_term)) = host.log().ends(group) else { continue };
            // What is committed in memory may not be in the log yet; what is applied is.
            let ends = LogEnds { first, last, committed: status.applied_index };
            let Some(from) = kernel.oracle.look_from(self.store, group, ends, last_term) else { continue };
            // A damaged log is the replica's own trouble.
            let Ok(entries) = host.log().entries(group, from, last + 1, LOOK_BYTES_MAX) else { continue };
            kernel.oracle.log(self.store, group, &entries, ends);
        }
        Ok(())
    }

    /// State from snapshot and log alone has the same hash as the state that is served.
    pub fn rebuild_equals(&mut self, kernel: &mut Kernel, me: &Me) -> Result<(), String> {
        let before = self.hashes();
        self.crash(kernel, me, StateAfter::Lost);
        self.open(kernel, me)?;
        // Alone it commits nothing new: what it had applied was committed, and it knows up to where.
        for _ in 0..before.len() * 4 + 8 {
            let Some(host) = &mut self.host else { break };
            if !host.has_entries() {
                break;
            }
            host.turn(me.now(kernel), &mut |_, _| {}).map_err(|error| error.to_string())?;
        }
        let after: BTreeMap<GroupId, (u64, StateHash, StateHash)> =
            self.hashes().into_iter().map(|(group, at, hashes)| (group, (at, hashes.0, hashes.1))).collect();
        for (group, at, (said, rows)) in before {
            match after.get(&group) {
                Some(&(now, said_after, rows_after)) if now == at => {
                    if (said, rows) != (said_after, rows_after) || said != rows {
                        return Err(format!(
                            "{group}: state {said} of {rows}, rebuilt {said_after} of {rows_after}"
                        ));
                    }
                }
                // Not all that is committed is known to be before it hears of the others.
                Some(&(now, said, rows)) if now < at && said == rows => {}
                Some(&(now, ..)) if now > at => {}
                other => return Err(format!("{group}: rebuilt as {other:?} of {at}")),
            }
        }
        Ok(())
    }

    /// For each group how far it is, the hash it says it has, and the one its rows have.
    pub fn hashes(&self) -> Vec<(GroupId, u64, (StateHash, StateHash))> {
        let Some(host) = &self.host else { return Vec::new() };
        let of_rows = |table: &MemoryTable| {
            let mut hash = StateHash::default();
            for (key, value) in table.iter() {
                hash.insert(key, value);
            }
            hash
        };
        host.groups()
            .filter_map(|id| {
                let status = host.status(id)?;
                Some((id, status.applied_index, (status.state_hash, of_rows(host.local_view(id)?))))
            })
            .collect()
    }

    /// Rows of a group as they are here, for the checkers.
    pub fn rows(&self, group: GroupId) -> Vec<eggs_machine::Row> {
        self.local_view(group).and_then(|view| view.page(&[], &[], usize::MAX).ok()).unwrap_or_default()
    }
}

fn new_stores(bug: Option<Bug>) -> (MemoryLog, MemoryState, MemorySnapshots) {
    let (log, mut snapshots) = (MemoryLog::default(), MemorySnapshots::default());
    match bug {
        Some(Bug::SkipFsync) => log.skip_sync(),
        Some(Bug::ForgetVote) => log.forget_votes(),
        // The tag of sessions (eggs_machine::group).
        Some(Bug::SnapshotWithoutSessions) => snapshots.leave_out(&[0, b'C']),
        _ => {}
    }
    (log, MemoryState::default(), snapshots)
}
