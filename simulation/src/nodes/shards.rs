//! A store of metadata shards, as `eggs-shard` is.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::convert::Infallible;

use eggs_consensus_core::{Grant, GroupId, ReadTicket, Role};
use eggs_machine::group::{self, Applied};
use eggs_machine::hash::StateHash;
use eggs_machine::{MemoryTable, Tx};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::shard_reply::Result as Answer;
use eggs_proto::pb::shard_request::Op;
use eggs_proto::{ServiceError, SessionId, ShardError, ShardId, Time, pb};
use eggs_shard_core::ShardMachine;
use prost::Message;
use rand::RngCore;

use super::{Cluster, Daemon, Me, RegistryLine, Stop, decode, encode, register, reply_header};
use crate::bug::{Bug, BuggyShard};
use crate::kernel::{Envelope, Kernel, MILLISECOND, PeerEnvelope, Rpc, Timer};
use crate::replica::{Offered, Replica, Turned, Waiter};

pub(crate) struct ShardHost {
    pub me: Me,
    cluster: Cluster,
    pub replica: Replica<BuggyShard>,
    /// Block services as the registry last told.
    services: eggs_shard_core::Cluster,
    line: RegistryLine,
    joined: bool,
    /// Reads on their way to being confirmed.
    reading: Vec<Reading>,
    /// Reads of an instant that may still change: they wait until the group's clock is past it.
    parked: Vec<(Waiter, pb::ShardRequest)>,
    /// Groups whose clock is being moved by an empty command.
    settling: BTreeSet<GroupId>,
    /// The next write to the log fails.
    pub fail_next_write: bool,
    pub full: bool,
}

/// A read of groups led here.
struct Reading {
    waiter: Waiter,
    shard: ShardId,
    op: Op,
    confirmed: BTreeSet<GroupId>,
    tickets: Vec<(ReadTicket, GroupId)>,
}

/// What became of a read that could look.
#[expect(clippy::large_enum_variant, reason = "one at a time, taken apart at once")]
enum Looked {
    Answer(Answer),
    /// It looked at groups that are not confirmed.
    More(BTreeSet<GroupId>),
}

pub(crate) fn group_of(shard: ShardId) -> GroupId {
    GroupId(u16::from(shard.0))
}

fn storage(error: impl std::fmt::Display) -> Stop {
    Stop::Storage(error.to_string())
}

impl ShardHost {
    pub fn new(kernel: &mut Kernel, me: Me, cluster: Cluster) -> ShardHost {
        let bug = cluster.bug;
        let replica = Replica::new(kernel, &cluster, move |id: GroupId| {
            let shard = ShardId::try_from(u32::from(id.0)).ok()?;
            Some(BuggyShard { machine: ShardMachine { shard }, bug })
        });
        ShardHost {
            me,
            cluster,
            replica,
            services: eggs_shard_core::Cluster::default(),
            line: RegistryLine::default(),
            joined: false,
            reading: Vec::new(),
            parked: Vec::new(),
            settling: BTreeSet::new(),
            fail_next_write: false,
            full: false,
        }
    }

    /// A shard led here.
    pub fn view(&self, shard: ShardId) -> Option<&MemoryTable> {
        self.replica.view(group_of(shard))
    }

    fn answer(&mut self, kernel: &mut Kernel, waiter: Waiter, mut result: Answer) {
        if let Answer::ListGarbage(garbage) = &mut result {
            if self.cluster.bug == Some(Bug::EraseLive) && waiter.tag.is_multiple_of(8) {
                let views = self.replica.led().into_iter().filter_map(|group| self.replica.view(group));
                garbage.blocks.extend(views.into_iter().find_map(|view| crate::bug::living_block(view)));
            }
            eggs_shard_core::sign_garbage(garbage, &self.services);
        }
        let time = self.replica.clock.now(self.me.wall(kernel));
        let reply = pb::ShardReply { header: reply_header(time), result: Some(result) };
        self.me.reply(kernel, waiter.from, waiter.tag, Rpc::Shard, vec![encode(&reply)]);
    }

    fn not_leader(&self, shard: ShardId) -> Answer {
        let leader = self.replica.hint(group_of(shard));
        Answer::Error(pb::Error { leader, ..ShardError::NotLeader.bare() })
    }

    /// `None`: the answer comes with a turn.
    fn take(
        &mut self,
        kernel: &mut Kernel,
        waiter: Waiter,
        request: pb::ShardRequest,
    ) -> Result<Option<Answer>, Stop> {
        let refused = |error: ShardError| Ok(Some(Answer::Error(error.bare())));
        let Some(header) = request.header else { return refused(ShardError::Malformed) };
        if header.version != PROTOCOL_VERSION {
            return refused(ShardError::UnsupportedVersion);
        }
        if header.cluster_id != self.cluster.id.0[..] {
            return refused(ShardError::WrongCluster);
        }
        if !self.replica.clock.observe(Time(header.time), self.me.wall(kernel)) {
            return refused(ShardError::ClockAhead);
        }
        let Ok(shard) = ShardId::try_from(request.shard) else { return refused(ShardError::Malformed) };
        let Some(op) = request.op else { return refused(ShardError::Malformed) };
        if eggs_shard_core::needs_secret(&op) && header.secret != self.cluster.secret {
            return refused(ShardError::Unauthorized);
        }
        let at = match &op {
            Op::Write(write) => return self.write(kernel, shard, &header, write.clone(), waiter),
            Op::Walk(walk) => Time(walk.at),
            Op::List(list) => Time(list.at),
            _ => Time::ZERO,
        };
        if !at.is_unset() && at <= self.replica.clock.now(self.me.wall(kernel)) {
            let again = pb::ShardRequest { header: Some(header), shard: request.shard, op: Some(op.clone()) };
            return self.look_back(kernel, waiter, shard, &op, at, again);
        }
        if self.cluster.bug == Some(Bug::StaleReads) {
            // Who was leader when it last heard of the others is leader still.
            return match self.look(kernel, shard, &op, None)? {
                Looked::Answer(answer) => Ok(Some(answer)),
                Looked::More(_) => Ok(None),
            };
        }
        if matches!(op, Op::ListGarbage(_)) {
            // Garbage stays garbage (SH-17): who leads, or did, says what it knows of it.
            let now = self.replica.clock.now(self.me.wall(kernel));
            let Some(view) = self.view(shard) else { return Ok(Some(self.not_leader(shard))) };
            return eggs_shard_core::read(shard, view, &op, now).map(Some).map_err(storage);
        }
        let reading = Reading { waiter, shard, op, confirmed: BTreeSet::new(), tickets: Vec::new() };
        self.confirm(kernel, reading, BTreeSet::from([group_of(shard)]))
    }

    // ---- reads of now ----

    /// Has the groups confirmed; when all are, the read looks.
    fn confirm(
        &mut self,
        kernel: &mut Kernel,
        mut reading: Reading,
        groups: BTreeSet<GroupId>,
    ) -> Result<Option<Answer>, Stop> {
        let mut groups = groups;
        loop {
            for group in std::mem::take(&mut groups) {
                match self.replica.read(kernel, &self.me, group) {
                    None => return Ok(Some(self.not_leader(reading.shard))),
                    Some(Grant::Now) => {
                        reading.confirmed.insert(group);
                    }
                    Some(Grant::Later(ticket)) => reading.tickets.push((ticket, group)),
                }
            }
            if !reading.tickets.is_empty() {
                self.reading.push(reading);
                return Ok(None);
            }
            match self.look(kernel, reading.shard, &reading.op, Some(&reading.confirmed))? {
                Looked::Answer(answer) => return Ok(Some(answer)),
                Looked::More(more) => groups = more,
            }
        }
    }

    /// `confirmed`: `None` when that does not matter.
    fn look(
        &mut self,
        kernel: &Kernel,
        shard: ShardId,
        op: &Op,
        confirmed: Option<&BTreeSet<GroupId>>,
    ) -> Result<Looked, Stop> {
        let now = self.replica.read_time(group_of(shard), self.me.wall(kernel)).map_err(storage)?;
        let Some(view) = self.view(shard) else { return Ok(Looked::Answer(self.not_leader(shard))) };
        let more = RefCell::new(BTreeSet::new());
        let answer = match op {
            Op::Walk(walk) => {
                let views = |other: ShardId| {
                    let group = group_of(other);
                    let view = self.replica.view(group)?;
                    if confirmed.is_some_and(|confirmed| !confirmed.contains(&group)) {
                        more.borrow_mut().insert(group);
                    }
                    Some(view)
                };
                eggs_shard_core::walk(views, walk, now)
                    .map(|walked| walked.map_or_else(Answer::Error, Answer::Walk))
            }
            op => eggs_shard_core::read(shard, view, op, now),
        };
        let more = more.into_inner();
        if more.is_empty() { answer.map(Looked::Answer).map_err(storage) } else { Ok(Looked::More(more)) }
    }

    fn confirmed(&mut self, kernel: &mut Kernel, tickets: &[ReadTicket]) -> Result<(), Stop> {
        let mut done = Vec::new();
        for at in (0..self.reading.len()).rev() {
            let reading = &mut self.reading[at];
            let confirmed = &mut reading.confirmed;
            reading.tickets.retain(|(ticket, group)| {
                let is_in = tickets.contains(ticket);
                if is_in {
                    confirmed.insert(*group);
                }
                !is_in
            });
            if reading.tickets.is_empty() {
                done.push(self.reading.swap_remove(at));
            }
        }
        for reading in done {
            let (waiter, shard) = (reading.waiter, reading.shard);
            let answer = match self.look(kernel, shard, &reading.op, Some(&reading.confirmed))? {
                Looked::Answer(answer) => Some(answer),
                Looked::More(more) => self.confirm(kernel, reading, more)?,
            };
            if let Some(answer) = answer {
                self.answer(kernel, waiter, answer);
            }
        }
        Ok(())
    }

    fn lost(&mut self, kernel: &mut Kernel, tickets: &[ReadTicket]) {
        let is_lost = |reading: &Reading| reading.tickets.iter().any(|(ticket, _)| tickets.contains(ticket));
        let (lost, left) = std::mem::take(&mut self.reading).into_iter().partition(is_lost);
        self.reading = left;
        let lost: Vec<Reading> = lost;
        for reading in lost {
            let answer = self.not_leader(reading.shard);
            self.answer(kernel, reading.waiter, answer);
        }
    }

    // ---- reads of the past ----

    /// What was so at an instant that every group it leads through is past: any replica knows. If the first
    /// is not, its leader moves its clock beyond it by an empty command: writes that are proposed already may
    /// get earlier instants, and so may later ones after a crash (SH-12).
    fn look_back(
        &mut self,
        kernel: &mut Kernel,
        waiter: Waiter,
        shard: ShardId,
        op: &Op,
        at: Time,
        again: pb::ShardRequest,
    ) -> Result<Option<Answer>, Stop> {
        let group = group_of(shard);
        if !self.replica.is_past(group, at).map_err(storage)? {
            if self.view(shard).is_none() {
                return Ok(Some(self.not_leader(shard)));
            }
            let wall = self.me.wall(kernel);
            if self.settling.insert(group) {
                let empty = encode(&pb::ShardCommand::default());
                self.replica.clock.observe(at, Time::MAX);
                self.replica
                    .write(group, SessionId(0), 0, wall, None, |_, _| Ok(empty))
                    .map_err(Stop::Storage)?;
                self.replica.go_on(kernel, &self.me);
            }
            self.parked.push((waiter, again));
            return Ok(None);
        }
        let now = self.replica.clock.now(self.me.wall(kernel));
        let Some(view) = self.replica.local_view(group) else { return Ok(Some(self.not_leader(shard))) };
        let answer = match op {
            Op::Walk(walk) => {
                let views = |other: ShardId| {
                    let group = group_of(other);
                    let past = self.replica.is_past(group, at).unwrap_or(false);
                    self.replica.local_view(group).filter(|_| past)
                };
                eggs_shard_core::walk(views, walk, now)
                    .map(|walked| walked.map_or_else(Answer::Error, Answer::Walk))
            }
            op => eggs_shard_core::read(shard, view, op, now),
        };
        answer.map(Some).map_err(storage)
    }

    fn write(
        &mut self,
        kernel: &mut Kernel,
        shard: ShardId,
        header: &pb::RequestHeader,
        write: pb::Write,
        waiter: Waiter,
    ) -> Result<Option<Answer>, Stop> {
        let authorized = header.secret == self.cluster.secret;
        let (session, wall) = (SessionId(header.session), self.me.wall(kernel));
        let (services, rng, bug) = (&self.services, &mut kernel.rng, self.cluster.bug);
        let mut chosen = None;
        let offered = self
            .replica
            .write(group_of(shard), session, header.sequence, wall, Some(waiter), |view, now| {
                let mut entropy = || rng.next_u64();
                let asked = (bug == Some(Bug::SwapUnproven)).then(|| write.clone());
                eggs_shard_core::prepare(shard, view, write, authorized, now, &mut entropy, services).map(
                    |mut command| {
                        if let Some(asked) = asked {
                            crate::bug::believe_swaps(view, asked, &mut command);
                        }
                        let command = encode(&command);
                        chosen = Some((now, command.clone()));
                        command
                    },
                )
            })
            .map_err(Stop::Storage)?;
        match offered {
            Offered::Proposed => {
                self.replica.go_on(kernel, &self.me);
                if self.cluster.bug == Some(Bug::AckBeforeCommit) {
                    return Ok(chosen.and_then(|(now, command)| self.guess(shard, header, now, command)));
                }
                Ok(None)
            }
            Offered::Repeated(reply) => Ok(Some(self.signed(reply))),
            Offered::Refused(error) => Ok(Some(Answer::Error(error))),
            Offered::NotLeader => Ok(Some(self.not_leader(shard))),
            Offered::Busy => Ok(Some(Answer::Error(ShardError::Busy.bare()))),
        }
    }

    /// [`Bug::AckBeforeCommit`]: what the answer would be if the entry were applied now.
    fn guess(
        &self,
        shard: ShardId,
        header: &pb::RequestHeader,
        now: Time,
        command: bytes::Bytes,
    ) -> Option<Answer> {
        let mut tx = Tx::new(self.view(shard)?, StateHash::default());
        let entry = pb::LogEntry { time: now.0, session: header.session, sequence: header.sequence, command };
        let machine = BuggyShard { machine: ShardMachine { shard }, bug: None };
        match group::apply(&machine, &mut tx, &entry.encode_to_vec()) {
            Ok(Applied::Ran(outcome)) => Some(self.signed(outcome.reply)),
            _ => None,
        }
    }

    fn signed(&self, reply: bytes::Bytes) -> Answer {
        match pb::WriteReply::decode(reply) {
            Ok(mut reply) => {
                eggs_shard_core::sign(&mut reply, &self.services);
                Answer::Write(reply)
            }
            Err(error) => Answer::Error(ShardError::Internal.with(error)),
        }
    }

    fn turn(&mut self, kernel: &mut Kernel) -> Result<(), Stop> {
        if std::mem::take(&mut self.fail_next_write) {
            self.replica.fail_next_write(kernel);
        }
        let (early, rest) = self.replica.turn(kernel, &self.me).map_err(Stop::Storage)?;
        self.told(kernel, early)?;
        self.told(kernel, rest.map_err(Stop::Storage)?)?;
        for (waiter, request) in std::mem::take(&mut self.parked) {
            if let Some(answer) = self.take(kernel, waiter, request)? {
                self.answer(kernel, waiter, answer);
            }
        }
        Ok(())
    }

    /// What half a turn came to.
    fn told(&mut self, kernel: &mut Kernel, turned: Turned<Infallible>) -> Result<(), Stop> {
        for (waiter, answer) in turned.answers {
            self.settling.remove(&answer.group);
            let Some(waiter) = waiter else { continue };
            let result = match answer.applied {
                Applied::Ran(outcome) => self.signed(outcome.reply),
                Applied::Repeated(reply) => self.signed(reply),
                Applied::Stale => Answer::Error(ShardError::StaleSession.bare()),
                Applied::Malformed => Answer::Error(ShardError::Internal.bare()),
            };
            self.answer(kernel, waiter, result);
        }
        // Whether it happens is not known here: the client asks whoever leads now.
        for waiter in turned.dropped {
            let answer = Answer::Error(ShardError::NotLeader.bare());
            self.answer(kernel, waiter, answer);
        }
        for (group, role) in turned.roles {
            if !matches!(role, Role::Leader { .. }) {
                self.settling.remove(&group);
            }
        }
        self.lost(kernel, &turned.lost);
        self.confirmed(kernel, &turned.confirmed)
    }

    /// As the daemon's housekeeping: files whose writers are gone.
    fn expire(&mut self, kernel: &mut Kernel) -> Result<(), Stop> {
        let wall = self.me.wall(kernel);
        let now = self.replica.clock.now(wall);
        for group in self.replica.led() {
            let Some(view) = self.replica.view(group) else { continue };
            if eggs_shard_core::expirable(view, now).map_err(storage)? {
                let op = pb::write_op::Op::ExpireEden(pb::ExpireEden { limit: 100 });
                let op = pb::ChosenOp { op: Some(pb::WriteOp { op: Some(op) }), ..pb::ChosenOp::default() };
                let command = encode(&pb::ShardCommand { ops: vec![op] });
                self.replica
                    .write(group, SessionId(0), 0, wall, None, |_, _| Ok(command))
                    .map_err(Stop::Storage)?;
                self.replica.go_on(kernel, &self.me);
            }
        }
        Ok(())
    }

    fn heartbeat(&mut self, kernel: &mut Kernel) {
        let offset = self.replica.host().map_or(0, eggs_consensus_core::Host::clock_offset);
        let kind = pb::StoreKind::StoreShard;
        let register = register(&self.me, self.replica.store, kind, offset, self.replica.led_groups());
        let time = self.replica.clock.now(self.me.wall(kernel));
        let ops = vec![
            pb::registry_request::Op::RegisterStore(register),
            pb::registry_request::Op::Map(pb::ClusterMap { with_keys: true, known_version: 0 }),
        ];
        self.line.ask(kernel, &self.me, &self.cluster, time, ops);
        let delay = if self.joined { self.line.pause() } else { 50 * MILLISECOND };
        self.me.timer(kernel, delay, Timer::Heartbeat);
    }
}

impl Daemon for ShardHost {
    fn start(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.replica.open(kernel, &self.me)?;
        self.replica.set_full(self.full);
        self.services = eggs_shard_core::Cluster::default();
        self.joined = false;
        self.me.timer(kernel, 0, Timer::Heartbeat);
        Ok(())
    }

    fn crash(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.fail_next_write = false;
        self.parked.clear();
        self.reading.clear();
        self.settling.clear();
        let state = self.replica.random_state_after(kernel);
        kernel.note(format_args!("{} state store: {state:?}", self.me.id));
        self.replica.crash(kernel, &self.me, state);
        Ok(())
    }

    fn on_request(&mut self, kernel: &mut Kernel, request: Envelope) -> Result<(), Stop> {
        let Some(message) = decode::<pb::ShardRequest>(&request.parts) else { return Ok(()) };
        let waiter = Waiter::new(&request, message.header.as_ref());
        if let Some(answer) = self.take(kernel, waiter, message)? {
            self.answer(kernel, waiter, answer);
        }
        Ok(())
    }

    fn on_reply(&mut self, kernel: &mut Kernel, reply: Envelope) -> Result<(), Stop> {
        if let Some((time, map)) = self.line.heard(&self.cluster, &reply) {
            self.replica.clock.observe(time, self.me.wall(kernel));
            self.services = eggs_shard_core::Cluster::from_map(&map);
            self.joined = true;
            self.replica.follow(kernel, &self.me, &map).map_err(Stop::Storage)?;
        }
        Ok(())
    }

    fn on_timer(&mut self, kernel: &mut Kernel, timer: Timer) -> Result<(), Stop> {
        match timer {
            Timer::Turn => self.turn(kernel)?,
            Timer::Held => self.replica.go_on(kernel, &self.me),
            Timer::RaftTick(at) => self.replica.tick(kernel, &self.me, at).map_err(Stop::Storage)?,
            Timer::Heartbeat => {
                self.expire(kernel)?;
                self.heartbeat(kernel);
            }
            Timer::Tick | Timer::Expired(_) | Timer::Disk(_) => {}
        }
        Ok(())
    }

    fn on_peer(&mut self, kernel: &mut Kernel, envelope: PeerEnvelope) -> Result<(), Stop> {
        self.replica.receive(kernel, &self.me, envelope).map_err(Stop::Storage)
    }
}
