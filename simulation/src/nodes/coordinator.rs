//! The coordinator of operations on more than one directory, as `eggs-crossdir` is.

use std::collections::BTreeMap;

use bytes::Bytes;
use eggs_consensus_core::{Grant, GroupId, ReadTicket, Role};
use eggs_crossdir_core::{
    Answer as Known, CrossdirMachine, Driver, Effect, Input, Output, Received, prepare,
};
use eggs_machine::group::Applied;
use eggs_machine::{Batch, MemoryTable, Table};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::crossdir_reply::Result as Answer;
use eggs_proto::pb::crossdir_request::Op;
use eggs_proto::{
    CrossdirError, InodeId, ServiceError, SessionId, ShardError, ShardId, Time, TransactionId, pb,
};
use prost::Message;

use super::{
    Cluster, Daemon, Me, RegistryLine, Stop, decode, encode, leader_in, node_at, register, reply_header,
    request_header, store_in,
};
use crate::bug::Bug;
use crate::kernel::{Envelope, Kernel, MILLISECOND, NodeId, PeerEnvelope, Rpc, SECOND, Timer};
use crate::replica::{Offered, Replica, Turned, Waiter};

pub(crate) const GROUP: GroupId = GroupId::CROSSDIR;
/// A step not answered by then is lost.
const CALL_TIMEOUT: u64 = 2 * SECOND;
/// How long one request waits for its transaction.
const WAIT_MAX: u64 = 10 * SECOND;

pub(crate) struct Coordinator {
    pub me: Me,
    cluster: Cluster,
    pub replica: Replica<CrossdirMachine>,
    line: RegistryLine,
    /// While it leads.
    pub driver: Option<Driver>,
    /// It leads, and a driver is made once it is recorded that there is another one.
    taking_over: bool,
    waiting: BTreeMap<TransactionId, Vec<Waiter>>,
    /// Who asks what became of a move; with what has to be confirmed first.
    resolving: Vec<(Option<ReadTicket>, TransactionId, Waiter)>,
    /// Requests to shards, by the tag on the network.
    asked: BTreeMap<u64, (Asked, ShardId)>,
    /// Deadlines of waiting callers.
    deadlines: BTreeMap<u64, (TransactionId, Waiter)>,
    places: BTreeMap<ShardId, (NodeId, bool)>,
    /// The shards' replicas, to be tried when the one that is to lead does not.
    others: BTreeMap<ShardId, Vec<NodeId>>,
    made: u64,
    tick_at: Option<Time>,
}

#[derive(Debug, Clone, Copy)]
enum Asked {
    Write(u64),
    Stat(u64),
}

impl Coordinator {
    pub fn new(kernel: &mut Kernel, me: Me, cluster: Cluster) -> Coordinator {
        let replica = Replica::new(kernel, &cluster, |id| (id == GROUP).then_some(CrossdirMachine));
        Coordinator {
            me,
            cluster,
            replica,
            line: RegistryLine::default(),
            others: BTreeMap::new(),
            driver: None,
            taking_over: false,
            waiting: BTreeMap::new(),
            resolving: Vec::new(),
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
        self.view().is_some()
            && self.driver.as_ref().is_some_and(Driver::is_idle)
            && !self.replica.has_entries()
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
        if self.driver.is_none() {
            return Ok(Some(self.not_leader()));
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
        if let Op::ResolveMove(op) = op {
            let ticket = match self.replica.read(kernel, &self.me, GROUP) {
                None => return Ok(Some(self.not_leader())),
                Some(Grant::Now) => None,
                Some(Grant::Later(ticket)) => Some(ticket),
            };
            self.resolving.push((ticket, TransactionId(op.transaction), waiter));
            self.resolve(kernel);
            return Ok(None);
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
                self.replica.go_on(kernel, &self.me);
                Ok(None)
            }
            Offered::Refused(error) => Ok(Some(Answer::Error(error))),
            Offered::NotLeader => Ok(Some(self.not_leader())),
            Offered::Busy | Offered::Repeated(_) => refused(CrossdirError::Busy),
        }
    }

    fn not_leader(&self) -> Answer {
        let leader = self.replica.hint(GROUP);
        Answer::Error(pb::Error { leader, ..CrossdirError::NotLeader.bare() })
    }

    fn turn(&mut self, kernel: &mut Kernel) -> Result<(), Stop> {
        let (early, rest) = self.replica.turn(kernel, &self.me).map_err(Stop::Storage)?;
        self.told(kernel, early)?;
        self.told(kernel, rest.map_err(Stop::Storage)?)
    }

    /// What half a turn came to.
    fn told(&mut self, kernel: &mut Kernel, turned: Turned<Effect>) -> Result<(), Stop> {
        if let Some((_, role)) = turned.roles.last() {
            self.resign(kernel);
            if matches!(role, Role::Leader { .. }) {
                self.take_over(kernel)?;
            }
        }
        for (waiter, answer) in turned.answers {
            let Applied::Ran(outcome) = answer.applied else {
                return Err(Stop::Storage("an entry without session was repeated".to_owned()));
            };
            for effect in outcome.effects {
                // Who leads no more when the turn is over takes nothing up.
                if self.taking_over && matches!(effect, Effect::TakenOver(_)) && self.view().is_some() {
                    // What the driver takes up is the state after all of this turn.
                    self.recover(kernel).map_err(Stop::Storage)?;
                }
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
        for waiter in turned.dropped {
            let answer = self.not_leader();
            self.answer(kernel, waiter, answer);
        }
        for (ticket, ..) in &mut self.resolving {
            *ticket = ticket.filter(|ticket| !turned.confirmed.contains(ticket));
        }
        let lost = |ticket: &Option<ReadTicket>| ticket.is_some_and(|ticket| turned.lost.contains(&ticket));
        let lost: Vec<_> = self.resolving.extract_if(.., |(ticket, ..)| lost(ticket)).collect();
        for (_, _, waiter) in lost {
            let answer = self.not_leader();
            self.answer(kernel, waiter, answer);
        }
        self.resolve(kernel);
        Ok(())
    }

    /// Answers those who wait for a move that is decided by now.
    fn resolve(&mut self, kernel: &mut Kernel) {
        let Some(driver) = &self.driver else { return };
        let reply = |transaction: &TransactionId| driver.resolve(*transaction).reply();
        let decided = self
            .resolving
            .extract_if(.., |(ticket, transaction, _)| ticket.is_none() && reply(transaction).is_some());
        let decided: Vec<_> =
            decided.filter_map(|(_, transaction, waiter)| Some((waiter, reply(&transaction)?))).collect();
        for (waiter, reply) in decided {
            self.answer(kernel, waiter, Answer::ResolveMove(reply));
        }
    }

    /// Others go on with what this one had begun.
    fn resign(&mut self, kernel: &mut Kernel) {
        self.driver = None;
        self.taking_over = false;
        self.asked.clear();
        self.deadlines.clear();
        self.tick_at = None;
        let resolving = std::mem::take(&mut self.resolving).into_iter().map(|(_, _, waiter)| waiter);
        for waiter in resolving.chain(std::mem::take(&mut self.waiting).into_values().flatten()) {
            let answer = self.not_leader();
            self.answer(kernel, waiter, answer);
        }
    }

    fn wait(&mut self, kernel: &mut Kernel, transaction: TransactionId, waiter: Waiter) -> Result<(), Stop> {
        let Some(driver) = &self.driver else {
            let answer = self.not_leader();
            self.answer(kernel, waiter, answer);
            return Ok(());
        };
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
            self.resolve(kernel);
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
                Output::Propose(command) => self.propose(kernel, &command)?,
                Output::Replaced => {
                    self.resign(kernel);
                    self.take_over(kernel)?;
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

    fn propose(&mut self, kernel: &mut Kernel, command: &pb::CrossdirCommand) -> Result<(), Stop> {
        let (wall, command) = (self.me.wall(kernel), encode(command));
        let offered = self.replica.write(GROUP, SessionId(0), 0, wall, None, |_, _| Ok(command));
        offered.map_err(Stop::Storage)?;
        self.replica.go_on(kernel, &self.me);
        Ok(())
    }

    fn take_over(&mut self, kernel: &mut Kernel) -> Result<(), Stop> {
        self.taking_over = true;
        self.propose(kernel, &Driver::take_over())
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
        self.asked.insert(tag, (asked, shard));
        self.me.timer(kernel, CALL_TIMEOUT, Timer::Expired(tag));
        let now = self.now(kernel);
        let header = request_header(&self.cluster, now, true);
        let request = pb::ShardRequest { header: Some(header), shard: u32::from(shard.0), op: Some(op) };
        if let Some(&(host, _)) = self.places.get(&shard) {
            self.me.call(kernel, host, tag, Rpc::Shard, vec![encode(&request)]);
        }
    }

    /// Whoever answered that it does not lead may know who does; else it is another's turn.
    fn look_elsewhere(&mut self, shard: ShardId, from: NodeId, error: &pb::Error) {
        let Some((place, _)) = self.places.get_mut(&shard) else { return };
        if *place != from {
            return;
        }
        let others = self.others.get(&shard).map_or(&[][..], Vec::as_slice);
        let at = others.iter().position(|&other| other == from).map_or(0, |at| at + 1);
        if let Some(next) = node_at(&error.leader).or(others.get(at).or(others.first()).copied()) {
            *place = next;
        }
    }

    fn received(&mut self, kernel: &mut Kernel, tag: u64, reply: Option<pb::ShardReply>) -> Result<(), Stop> {
        use pb::shard_reply::Result as Reply;
        let Some((asked, _)) = self.asked.remove(&tag) else { return Ok(()) };
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
                    Some(Reply::Stat(mut stat)) => {
                        if self.cluster.bug == Some(Bug::UnclearedMoves)
                            && let Some(attributes) = &mut stat.attributes
                        {
                            attributes.parent = Some(InodeId::ROOT.0);
                        }
                        Received::Answer(stat)
                    }
                    Some(Reply::Error(error)) => Received::Refused(error),
                    _ => Received::Lost(lost()),
                };
                Input::Stat { tag, received }
            }
        };
        self.step(kernel, input)
    }

    fn heartbeat(&mut self, kernel: &mut Kernel) -> Result<(), Stop> {
        if self.taking_over {
            // What was proposed may have been lost.
            self.take_over(kernel)?;
        }
        let offset = self.replica.host().map_or(0, eggs_consensus_core::Host::clock_offset);
        let kind = pb::StoreKind::StoreCrossdir;
        let mut register = register(&self.me, self.replica.store, kind, offset, self.replica.led_groups());
        register.transactions = self.driver.as_ref().map_or(0, |driver| driver.unfinished() as u32);
        let time = self.now(kernel);
        let ops = vec![
            pb::registry_request::Op::RegisterStore(register),
            pb::registry_request::Op::Map(pb::ClusterMap { with_keys: false, known_version: 0 }),
        ];
        self.line.ask(kernel, &self.me, &self.cluster, time, ops);
        let delay = if self.places.is_empty() { 50 * MILLISECOND } else { self.line.pause() };
        self.me.timer(kernel, delay, Timer::Heartbeat);
        Ok(())
    }

    fn follow(&mut self, kernel: &mut Kernel, map: &pb::ClusterMapReply) -> Result<(), Stop> {
        for place in &map.groups {
            let Ok(shard) = ShardId::try_from(place.group) else { continue };
            let voters = || place.voters.iter().chain(&place.wanted);
            let others: Vec<NodeId> = voters().filter_map(|&store| store_in(map, store)).collect();
            let known = self.places.get(&shard).map(|(node, _)| *node);
            let preferred = store_in(map, place.preferred);
            let node = leader_in(map, place).or(known).or(preferred).or(others.first().copied());
            if let Some(node) = node {
                self.places.insert(shard, (node, place.alive));
            }
            self.others.insert(shard, others);
        }
        self.replica.follow(kernel, &self.me, map).map_err(Stop::Storage)
    }

    fn recover(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        let now = self.now(kernel);
        let mut forgotten = MemoryTable::default();
        let Some(view) = self.view() else { return Err("the coordinator has no leader".to_owned()) };
        let view = match self.cluster.bug {
            Some(Bug::NoRecovery) => {
                // Only the counters.
                let row = view.get(b"M").map_err(|error| error.to_string())?;
                forgotten.apply(Batch { changes: vec![(Bytes::from_static(b"M"), row)] });
                &forgotten
            }
            _ => view,
        };
        let (driver, outputs) = Driver::recover(view, now).map_err(|error| error.to_string())?;
        self.taking_over = false;
        self.driver = Some(driver);
        self.perform(kernel, outputs).map_err(|Stop::Storage(error)| error)
    }
}

impl Daemon for Coordinator {
    fn start(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.replica.open(kernel, &self.me)?;
        self.me.timer(kernel, 0, Timer::Heartbeat);
        Ok(())
    }

    fn crash(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.driver = None;
        self.taking_over = false;
        self.waiting.clear();
        self.resolving.clear();
        self.asked.clear();
        self.deadlines.clear();
        self.places.clear();
        self.others.clear();
        self.tick_at = None;
        let state = self.replica.random_state_after(kernel);
        self.replica.crash(kernel, &self.me, state);
        Ok(())
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
            if let Some((time, map)) = self.line.heard(&self.cluster, &reply) {
                self.replica.clock.observe(time, wall);
                self.follow(kernel, &map)?;
            }
            return Ok(());
        }
        let Some(message) = decode::<pb::ShardReply>(&reply.parts) else { return Ok(()) };
        if let Some(header) = &message.header {
            self.replica.clock.observe(Time(header.time), wall);
        }
        if let Some(pb::shard_reply::Result::Error(error)) = &message.result
            && ShardError::from_code(error.code) == Some(ShardError::NotLeader)
            && let Some((_, shard)) = self.asked.get(&reply.tag).copied()
        {
            self.look_elsewhere(shard, reply.from, error);
        }
        self.received(kernel, reply.tag, Some(message))
    }

    fn on_timer(&mut self, kernel: &mut Kernel, timer: Timer) -> Result<(), Stop> {
        match timer {
            Timer::Turn => self.turn(kernel)?,
            Timer::Held => self.replica.go_on(kernel, &self.me),
            Timer::RaftTick(at) => self.replica.tick(kernel, &self.me, at).map_err(Stop::Storage)?,
            Timer::Heartbeat => self.heartbeat(kernel)?,
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
                    if let Some((_, shard)) = self.asked.get(&tag).copied()
                        && let Some(&(place, _)) = self.places.get(&shard)
                    {
                        self.look_elsewhere(shard, place, &pb::Error::default());
                    }
                    self.received(kernel, tag, None)?;
                }
            }
            Timer::Disk(_) => {}
        }
        Ok(())
    }

    fn on_peer(&mut self, kernel: &mut Kernel, envelope: PeerEnvelope) -> Result<(), Stop> {
        self.replica.receive(kernel, &self.me, envelope).map_err(Stop::Storage)
    }
}
