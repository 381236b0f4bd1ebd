//! The coordinator of operations on more than one directory, as `eggs-crossdir` is.

use std::collections::BTreeMap;

use eggs_consensus_core::GroupId;
use eggs_crossdir_core::{Answer as Known, CrossdirMachine, Driver, Input, Output, Received, prepare};
use eggs_machine::MemoryTable;
use eggs_machine::group::Applied;
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::crossdir_reply::Result as Answer;
use eggs_proto::pb::crossdir_request::Op;
use eggs_proto::{CrossdirError, ServiceError, SessionId, ShardId, Time, TransactionId, pb};
use prost::Message;

use super::{
    Cluster, Daemon, Me, Stop, ask_registry, decode, encode, map_in, node_at, reply_header, request_header,
    turn_delay,
};
use crate::bug::Bug;
use crate::kernel::{Envelope, Kernel, MILLISECOND, NodeId, Rpc, SECOND, Timer};
use crate::replica::{Offered, Replica, Waiter};

pub(crate) const GROUP: GroupId = GroupId(256);
/// A step not answered by then is lost.
const CALL_TIMEOUT: u64 = 2 * SECOND;
/// How long one request waits for its transaction.
const WAIT_MAX: u64 = 10 * SECOND;

pub(crate) struct Coordinator {
    pub me: Me,
    cluster: Cluster,
    pub replica: Replica<CrossdirMachine>,
    pub driver: Option<Driver>,
    waiting: BTreeMap<TransactionId, Vec<Waiter>>,
    /// Requests to shards, by the tag on the network.
    asked: BTreeMap<u64, Asked>,
    /// Deadlines of waiting callers.
    deadlines: BTreeMap<u64, (TransactionId, Waiter)>,
    places: BTreeMap<ShardId, (NodeId, bool)>,
    made: u64,
    tick_at: Option<Time>,
}

#[derive(Debug, Clone, Copy)]
enum Asked {
    Write(u64),
    Stat(u64),
}

impl Coordinator {
    pub fn new(me: Me, cluster: Cluster) -> Coordinator {
        Coordinator {
            me,
            cluster,
            replica: Replica::new(vec![(GROUP, CrossdirMachine)], false),
            driver: None,
            waiting: BTreeMap::new(),
            asked: BTreeMap::new(),
            deadlines: BTreeMap::new(),
            places: BTreeMap::new(),
            made: 0,
            tick_at: None,
        }
    }

    pub fn view(&self) -> Option<&MemoryTable> {
        self.replica.view(GROUP)
    }

    /// Nothing is begun, waiting to be recorded or to be forgotten.
    pub fn is_idle(&self) -> bool {
        self.driver.as_ref().is_some_and(Driver::is_idle) && !self.replica.has_entries()
    }

    /// A snapshot, soon.
    pub fn request_snapshot(&mut self, kernel: &mut Kernel) {
        if let Some(host) = self.replica.host_mut() {
            host.request_snapshot(GROUP);
            self.schedule_turn(kernel);
        }
    }

    fn now(&mut self, kernel: &Kernel) -> Time {
        self.replica.clock.now(self.me.wall(kernel))
    }

    fn answer(&mut self, kernel: &mut Kernel, waiter: Waiter, result: Answer) {
        let reply = pb::CrossdirReply { header: reply_header(self.now(kernel)), result: Some(result) };
        self.me.reply(kernel, waiter.from, waiter.tag, Rpc::Crossdir, vec![encode(&reply)]);
    }

    fn take(
        &mut self,
        kernel: &mut Kernel,
        waiter: Waiter,
        request: pb::CrossdirRequest,
    ) -> Result<Option<Answer>, Stop> {
        let refused = |error: CrossdirError| Ok(Some(Answer::Error(error.bare())));
        let (Some(header), Some(op)) = (request.header, request.op) else {
            return refused(CrossdirError::Malformed);
        };
        if header.version != PROTOCOL_VERSION {
            return refused(CrossdirError::UnsupportedVersion);
        }
        if header.cluster_id != self.cluster.id.0[..] {
            return refused(CrossdirError::WrongCluster);
        }
        if self.places.is_empty() {
            return refused(CrossdirError::Busy);
        }
        let wall = self.me.wall(kernel);
        if !self.replica.clock.observe(Time(header.time), wall) {
            return refused(CrossdirError::ClockAhead);
        }
        if let Op::ListTransactions(_) = op {
            let transactions = self.driver.as_ref().map(|driver| driver.list(1000)).unwrap_or_default();
            return Ok(Some(Answer::ListTransactions(pb::ListTransactionsReply { transactions })));
        }
        let alive: Vec<ShardId> =
            self.places.iter().filter(|(_, (_, alive))| *alive).map(|(&shard, _)| shard).collect();
        self.made += 1;
        let counter = self.made;
        let offered = self
            .replica
            .write(GROUP, SessionId(0), 0, wall, Some(waiter), |view, now| {
                prepare(view, &op, waiter.session, waiter.sequence, now, &alive, counter)
                    .map(|command| encode(&command))
            })
            .map_err(Stop::Storage)?;
        match offered {
            Offered::Proposed => {
                self.schedule_turn(kernel);
                Ok(None)
            }
            Offered::Refused(error) => Ok(Some(Answer::Error(error))),
            Offered::NotLeader => refused(CrossdirError::NotLeader),
            Offered::Busy | Offered::Repeated(_) => refused(CrossdirError::Busy),
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
        for (waiter, answer) in self.replica.turn().map_err(Stop::Storage)? {
            let Applied::Ran(outcome) = answer.applied else {
                return Err(Stop::Storage("an entry without session was repeated".to_owned()));
            };
            for effect in outcome.effects {
                self.step(kernel, Input::Effect(effect))?;
            }
            let Some(waiter) = waiter else { continue };
            let accepted = pb::TransactionAccepted::decode(outcome.reply)
                .map_err(|error| Stop::Storage(error.to_string()))?;
            match accepted.error {
                Some(error) => self.answer(kernel, waiter, Answer::Error(error)),
                None => self.wait(kernel, TransactionId(accepted.transaction), waiter)?,
            }
        }
        if self.replica.has_work() {
            self.schedule_turn(kernel);
        }
        Ok(())
    }

    fn wait(&mut self, kernel: &mut Kernel, transaction: TransactionId, waiter: Waiter) -> Result<(), Stop> {
        let Some(driver) = &self.driver else { return Ok(()) };
        if let Some(reply) = driver.reply(transaction) {
            let result = reply.result.clone();
            self.answer(kernel, waiter, result.unwrap_or(Answer::Error(CrossdirError::Internal.bare())));
        } else if driver.is_running(transaction) {
            self.waiting.entry(transaction).or_default().push(waiter);
            let tag = kernel.tag();
            self.deadlines.insert(tag, (transaction, waiter));
            self.me.timer(kernel, WAIT_MAX, Timer::Expired(tag));
        } else {
            let answer = self.known(waiter)?;
            self.answer(kernel, waiter, answer);
        }
        Ok(())
    }

    /// The answer to a call whose transaction is over and gone from the driver.
    fn known(&self, waiter: Waiter) -> Result<Answer, Stop> {
        let Some(view) = self.view() else { return Ok(Answer::Error(CrossdirError::NotLeader.bare())) };
        let known = eggs_crossdir_core::answer(view, waiter.session, waiter.sequence)
            .map_err(|error| Stop::Storage(error.to_string()))?;
        Ok(match known {
            Known::Done(_, pb::CrossdirReply { result: Some(result), .. }) => result,
            Known::Done(..) => Answer::Error(CrossdirError::Internal.bare()),
            Known::Stale => Answer::Error(CrossdirError::StaleSession.bare()),
            Known::InProgress(_) | Known::Unknown => Answer::Error(CrossdirError::InProgress.bare()),
        })
    }

    fn step(&mut self, kernel: &mut Kernel, input: Input) -> Result<(), Stop> {
        let now = self.now(kernel);
        if let Some(driver) = &mut self.driver {
            let outputs = driver.step(input, now);
            self.perform(kernel, outputs)?;
        }
        Ok(())
    }

    fn perform(&mut self, kernel: &mut Kernel, outputs: Vec<Output>) -> Result<(), Stop> {
        for output in outputs {
            match output {
                Output::SendWrite { shard, op, tag } => {
                    let write = pb::shard_request::Op::Write(pb::Write { ops: vec![op] });
                    self.ask(kernel, shard, write, Asked::Write(tag));
                }
                Output::SendStat { inode, tag } => {
                    let stat = pb::shard_request::Op::Stat(pb::Stat { inode: inode.0 });
                    self.ask(kernel, inode.shard(), stat, Asked::Stat(tag));
                }
                Output::Propose(command) => {
                    let (wall, command) = (self.me.wall(kernel), encode(&command));
                    self.replica
                        .write(GROUP, SessionId(0), 0, wall, None, |_, _| Ok(command))
                        .map_err(Stop::Storage)?;
                    self.schedule_turn(kernel);
                }
                Output::Answer { transaction, reply } => {
                    for waiter in self.waiting.remove(&transaction).unwrap_or_default() {
                        let result = reply.result.clone();
                        self.answer(
                            kernel,
                            waiter,
                            result.unwrap_or(Answer::Error(CrossdirError::Internal.bare())),
                        );
                    }
                }
            }
        }
        self.schedule_tick(kernel);
        Ok(())
    }

    fn schedule_tick(&mut self, kernel: &mut Kernel) {
        let Some(at) = self.driver.as_ref().and_then(Driver::next_deadline) else { return };
        if self.tick_at.is_none_or(|before| at < before) {
            self.tick_at = Some(at);
            let wait = at.since(self.me.wall(kernel)).as_nanos();
            self.me.timer(kernel, u64::try_from(wait).unwrap_or(SECOND).max(1000), Timer::Tick);
        }
    }

    fn ask(&mut self, kernel: &mut Kernel, shard: ShardId, op: pb::shard_request::Op, asked: Asked) {
        let tag = kernel.tag();
        self.asked.insert(tag, asked);
        self.me.timer(kernel, CALL_TIMEOUT, Timer::Expired(tag));
        let now = self.now(kernel);
        let header = request_header(&self.cluster, now, true);
        let request = pb::ShardRequest { header: Some(header), shard: u32::from(shard.0), op: Some(op) };
        if let Some(&(host, _)) = self.places.get(&shard) {
            self.me.call(kernel, host, tag, Rpc::Shard, vec![encode(&request)]);
        }
    }

    fn received(&mut self, kernel: &mut Kernel, tag: u64, reply: Option<pb::ShardReply>) -> Result<(), Stop> {
        use pb::shard_reply::Result as Reply;
        let Some(asked) = self.asked.remove(&tag) else { return Ok(()) };
        let lost = || "no answer".to_owned();
        let result = reply.and_then(|reply| reply.result);
        let input = match asked {
            Asked::Write(tag) => {
                let received = match result {
                    Some(Reply::Write(mut write)) if write.results.len() == 1 => {
                        Received::Answer(write.results.remove(0))
                    }
                    Some(Reply::Error(error)) => Received::Refused(error),
                    _ => Received::Lost(lost()),
                };
                Input::Write { tag, received }
            }
            Asked::Stat(tag) => {
                let received = match result {
                    Some(Reply::Stat(stat)) => Received::Answer(stat),
                    Some(Reply::Error(error)) => Received::Refused(error),
                    _ => Received::Lost(lost()),
                };
                Input::Stat { tag, received }
            }
        };
        self.step(kernel, input)
    }

    fn heartbeat(&mut self, kernel: &mut Kernel) {
        let transactions = self.driver.as_ref().map_or(0, |driver| driver.unfinished() as u32);
        let register = pb::RegisterCrossdir { address: super::address(self.me.id), transactions };
        let time = self.now(kernel);
        let ops = vec![
            pb::registry_request::Op::RegisterCrossdir(register),
            pb::registry_request::Op::Map(pb::ClusterMap { with_keys: false }),
        ];
        ask_registry(kernel, &self.me, &self.cluster, time, ops);
        let delay = if self.places.is_empty() { 50 * MILLISECOND } else { SECOND };
        self.me.timer(kernel, delay, Timer::Heartbeat);
    }

    fn recover(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        let now = self.now(kernel);
        let empty = MemoryTable::default();
        let Some(view) = self.view() else { return Err("the coordinator has no leader".to_owned()) };
        let view = if self.cluster.bug == Some(Bug::NoRecovery) { &empty } else { view };
        let (driver, outputs) = Driver::recover(view, now).map_err(|error| error.to_string())?;
        self.driver = Some(driver);
        self.perform(kernel, outputs).map_err(|Stop::Storage(error)| error)
    }
}

impl Daemon for Coordinator {
    fn start(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.replica.open(self.me.wall(kernel))?;
        self.me.timer(kernel, 0, Timer::Heartbeat);
        self.recover(kernel)
    }

    fn crash(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.driver = None;
        self.waiting.clear();
        self.asked.clear();
        self.deadlines.clear();
        self.places.clear();
        self.tick_at = None;
        let state = self.replica.random_state_after(kernel);
        self.replica.crash(state)
    }

    fn on_request(&mut self, kernel: &mut Kernel, request: Envelope) -> Result<(), Stop> {
        let Some(message) = decode::<pb::CrossdirRequest>(&request.parts) else { return Ok(()) };
        let waiter = Waiter::new(&request, message.header.as_ref());
        if let Some(answer) = self.take(kernel, waiter, message)? {
            self.answer(kernel, waiter, answer);
        }
        Ok(())
    }

    fn on_reply(&mut self, kernel: &mut Kernel, reply: Envelope) -> Result<(), Stop> {
        let wall = self.me.wall(kernel);
        if reply.rpc == Rpc::Registry {
            if let Some((time, map)) = map_in(&reply) {
                self.replica.clock.observe(time, wall);
                let place = |place: &pb::ShardPlace| {
                    let shard = ShardId::try_from(place.shard).ok()?;
                    Some((shard, (node_at(&place.address)?, place.alive)))
                };
                self.places = map.shards.iter().filter_map(place).collect();
            }
            return Ok(());
        }
        let Some(message) = decode::<pb::ShardReply>(&reply.parts) else { return Ok(()) };
        if let Some(header) = &message.header {
            self.replica.clock.observe(Time(header.time), wall);
        }
        self.received(kernel, reply.tag, Some(message))
    }

    fn on_timer(&mut self, kernel: &mut Kernel, timer: Timer) -> Result<(), Stop> {
        match timer {
            Timer::Turn => self.turn(kernel)?,
            Timer::Heartbeat => self.heartbeat(kernel),
            Timer::Tick => {
                self.tick_at = None;
                self.step(kernel, Input::Tick)?;
            }
            Timer::Expired(tag) => {
                if let Some((transaction, waiter)) = self.deadlines.remove(&tag) {
                    let waiting = self.waiting.entry(transaction).or_default();
                    if let Some(at) = waiting.iter().position(|other| other.tag == waiter.tag) {
                        waiting.remove(at);
                        self.answer(kernel, waiter, Answer::Error(CrossdirError::InProgress.bare()));
                    }
                } else {
                    self.received(kernel, tag, None)?;
                }
            }
            Timer::Disk(_) => {}
        }
        Ok(())
    }
}
