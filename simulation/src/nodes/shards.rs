//! A host of metadata shards, as `eggs-shard` is.

use eggs_consensus_core::GroupId;
use eggs_machine::group::{self, Applied};
use eggs_machine::hash::StateHash;
use eggs_machine::{MemoryTable, Tx};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::shard_reply::Result as Answer;
use eggs_proto::pb::shard_request::Op;
use eggs_proto::{ServiceError, SessionId, ShardError, ShardId, Time, pb};
use eggs_shard_core::ShardMachine;
use prost::Message;
use rand::{Rng, RngCore};

use super::{Cluster, Daemon, Me, Stop, ask_registry, decode, encode, map_in, reply_header, turn_delay};
use crate::bug::{Bug, BuggyShard};
use crate::kernel::{Envelope, Kernel, MILLISECOND, Rpc, SECOND, Timer};
use crate::replica::{Offered, Replica, StateAfter, Waiter};

pub(crate) struct ShardHost {
    pub me: Me,
    cluster: Cluster,
    pub shards: Vec<ShardId>,
    pub replica: Replica<BuggyShard>,
    /// Block services as the registry last told.
    services: eggs_shard_core::Cluster,
    joined: bool,
    /// Reads of an instant that may still change: they wait for the next turn.
    parked: Vec<(Waiter, pb::ShardRequest)>,
    /// The next write to the log fails.
    pub fail_next_write: bool,
}

/// The views of a walk that begins at `shard`.
fn views<'a>(
    host: &'a ShardHost,
    shard: ShardId,
    view: &'a MemoryTable,
) -> impl Fn(ShardId) -> Option<&'a MemoryTable> {
    move |other| if other == shard { Some(view) } else { host.view(other) }
}

pub(crate) fn group_of(shard: ShardId) -> GroupId {
    GroupId(u16::from(shard.0))
}

impl ShardHost {
    pub fn new(me: Me, cluster: Cluster, shards: Vec<ShardId>) -> ShardHost {
        let bug = cluster.bug;
        let machine =
            |&shard: &ShardId| (group_of(shard), BuggyShard { machine: ShardMachine { shard }, bug });
        let replica = Replica::new(shards.iter().map(machine).collect(), bug == Some(Bug::SkipFsync));
        let services = eggs_shard_core::Cluster::default();
        ShardHost {
            me,
            cluster,
            shards,
            replica,
            services,
            joined: false,
            parked: Vec::new(),
            fail_next_write: false,
        }
    }

    pub fn view(&self, shard: ShardId) -> Option<&MemoryTable> {
        self.replica.view(group_of(shard))
    }

    fn answer(&mut self, kernel: &mut Kernel, waiter: Waiter, result: Answer) {
        let time = self.replica.clock.now(self.me.wall(kernel));
        let reply = pb::ShardReply { header: reply_header(time), result: Some(result) };
        self.me.reply(kernel, waiter.from, waiter.tag, Rpc::Shard, vec![encode(&reply)]);
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
        if let Op::Write(write) = op {
            return self.write(kernel, shard, &header, write, waiter);
        }
        if self.view(shard).is_some() && !self.settle(kernel, shard, &op)? {
            let request = pb::ShardRequest { header: Some(header), shard: request.shard, op: Some(op) };
            self.parked.push((waiter, request));
            return Ok(None);
        }
        let now = self.replica.clock.now(self.me.wall(kernel));
        let Some(mut view) = self.view(shard) else { return refused(ShardError::NotLeader) };
        if self.cluster.bug == Some(Bug::StaleReads)
            && kernel.chance(100)
            && let Some(stale) = self.replica.stale_view(group_of(shard))
        {
            view = stale;
        }
        let answer = match &op {
            Op::Walk(walk) => eggs_shard_core::walk(views(self, shard, view), walk, now)
                .map(|walked| walked.map_or_else(Answer::Error, Answer::Walk)),
            op => eggs_shard_core::read(shard, view, op, now),
        };
        answer.map(Some).map_err(|error| Stop::Storage(error.to_string()))
    }

    /// Whether what the read looks at is past for good. If not, a group's clock is moved beyond it by an
    /// empty command: writes that are proposed already may get earlier instants, and so may later ones after
    /// a crash (SH-12).
    fn settle(&mut self, kernel: &mut Kernel, shard: ShardId, op: &Op) -> Result<bool, Stop> {
        let (at, shards) = match op {
            // It may lead through all shards here.
            Op::Walk(walk) => (Time(walk.at), self.shards.clone()),
            Op::List(list) => (Time(list.at), vec![shard]),
            _ => return Ok(true),
        };
        let wall = self.me.wall(kernel);
        if at.is_unset() || at > self.replica.clock.now(wall) {
            return Ok(true);
        }
        let mut settled = true;
        for shard in shards {
            let Some(view) = self.view(shard) else { continue };
            if group::clock(view).map_err(|error| Stop::Storage(error.to_string()))? < at {
                settled = false;
                let empty = encode(&pb::ShardCommand::default());
                self.replica
                    .write(group_of(shard), SessionId(0), 0, wall, None, |_, _| Ok(empty))
                    .map_err(Stop::Storage)?;
            }
        }
        if !settled {
            self.schedule_turn(kernel);
        }
        Ok(settled)
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
        let (services, rng) = (&self.services, &mut kernel.rng);
        let mut chosen = None;
        let offered = self
            .replica
            .write(group_of(shard), session, header.sequence, wall, Some(waiter), |view, now| {
                let mut entropy = || rng.next_u64();
                eggs_shard_core::prepare(shard, view, write, authorized, now, &mut entropy, services).map(
                    |command| {
                        let command = encode(&command);
                        chosen = Some((now, command.clone()));
                        command
                    },
                )
            })
            .map_err(Stop::Storage)?;
        match offered {
            Offered::Proposed => {
                self.schedule_turn(kernel);
                if self.cluster.bug == Some(Bug::AckBeforeCommit) {
                    return Ok(chosen.and_then(|(now, command)| self.guess(shard, header, now, command)));
                }
                Ok(None)
            }
            Offered::Repeated(reply) => Ok(Some(self.signed(reply))),
            Offered::Refused(error) => Ok(Some(Answer::Error(error))),
            Offered::NotLeader => Ok(Some(Answer::Error(ShardError::NotLeader.bare()))),
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

    fn schedule_turn(&mut self, kernel: &mut Kernel) {
        if !self.replica.turn_due {
            self.replica.turn_due = true;
            let delay = turn_delay(kernel);
            self.me.timer(kernel, delay, Timer::Turn);
        }
    }

    fn turn(&mut self, kernel: &mut Kernel) -> Result<(), Stop> {
        self.replica.turn_due = false;
        if std::mem::take(&mut self.fail_next_write)
            && let Some(host) = self.replica.host()
        {
            host.log().fail_next("input/output error");
        }
        for (waiter, answer) in self.replica.turn().map_err(Stop::Storage)? {
            let result = match answer.applied {
                Applied::Ran(outcome) => self.signed(outcome.reply),
                Applied::Repeated(reply) => self.signed(reply),
                Applied::Stale => Answer::Error(ShardError::StaleSession.bare()),
                Applied::Malformed => Answer::Error(ShardError::Internal.bare()),
            };
            if let Some(waiter) = waiter {
                self.answer(kernel, waiter, result);
            }
        }
        for (waiter, request) in std::mem::take(&mut self.parked) {
            if let Some(answer) = self.take(kernel, waiter, request)? {
                self.answer(kernel, waiter, answer);
            }
        }
        if self.replica.has_work() {
            self.schedule_turn(kernel);
        }
        Ok(())
    }

    /// As the daemon's housekeeping: files whose writers are gone.
    fn expire(&mut self, kernel: &mut Kernel) -> Result<(), Stop> {
        let wall = self.me.wall(kernel);
        let now = self.replica.clock.now(wall);
        for shard in self.shards.clone() {
            let Some(view) = self.view(shard) else { continue };
            if eggs_shard_core::expirable(view, now).map_err(|error| Stop::Storage(error.to_string()))? {
                let op = pb::write_op::Op::ExpireEden(pb::ExpireEden { limit: 100 });
                let op = pb::ChosenOp { op: Some(pb::WriteOp { op: Some(op) }), ..pb::ChosenOp::default() };
                let command = encode(&pb::ShardCommand { ops: vec![op] });
                self.replica
                    .write(group_of(shard), SessionId(0), 0, wall, None, |_, _| Ok(command))
                    .map_err(Stop::Storage)?;
                self.schedule_turn(kernel);
            }
        }
        Ok(())
    }

    fn heartbeat(&mut self, kernel: &mut Kernel) {
        let report = |&shard: &ShardId| {
            let status = self.replica.host()?.status(group_of(shard))?;
            Some(pb::ShardReport {
                shard: u32::from(shard.0),
                leader: status.leader,
                applied_index: status.applied_index,
                log_bytes: status.log_bytes,
            })
        };
        let shards = self.shards.iter().filter_map(report).collect();
        let register = pb::RegisterShards { address: super::address(self.me.id), shards };
        let time = self.replica.clock.now(self.me.wall(kernel));
        let ops = vec![
            pb::registry_request::Op::RegisterShards(register),
            pb::registry_request::Op::Map(pb::ClusterMap { with_keys: true }),
        ];
        ask_registry(kernel, &self.me, &self.cluster, time, ops);
        let delay = if self.joined { SECOND } else { 50 * MILLISECOND };
        self.me.timer(kernel, delay, Timer::Heartbeat);
    }

    /// A snapshot of one shard, soon.
    pub fn request_snapshot(&mut self, kernel: &mut Kernel) {
        let shard = self.shards[kernel.rng.random_range(0..self.shards.len())];
        if let Some(host) = self.replica.host_mut() {
            host.request_snapshot(group_of(shard));
            self.schedule_turn(kernel);
        }
    }
}

impl Daemon for ShardHost {
    fn start(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.replica.open(self.me.wall(kernel))?;
        self.services = eggs_shard_core::Cluster::default();
        self.joined = false;
        self.me.timer(kernel, 0, Timer::Heartbeat);
        if self.replica.has_work() {
            self.schedule_turn(kernel);
        }
        Ok(())
    }

    fn crash(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.fail_next_write = false;
        self.parked.clear();
        let mut state = self.replica.random_state_after(kernel);
        if self.cluster.bug == Some(Bug::SkipFsync) {
            // The state would give it away at once: it is as little durable as the log.
            state = StateAfter::Lost;
        }
        kernel.note(format_args!("{} state store: {state:?}", self.me.id));
        self.replica.crash(state)
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
        if let Some((time, map)) = map_in(&reply) {
            self.replica.clock.observe(time, self.me.wall(kernel));
            self.services = eggs_shard_core::Cluster::from_map(&map);
            self.joined = true;
        }
        Ok(())
    }

    fn on_timer(&mut self, kernel: &mut Kernel, timer: Timer) -> Result<(), Stop> {
        match timer {
            Timer::Turn => self.turn(kernel)?,
            Timer::Heartbeat => {
                self.expire(kernel)?;
                self.heartbeat(kernel);
            }
            Timer::Tick | Timer::Expired(_) | Timer::Disk(_) => {}
        }
        Ok(())
    }
}
