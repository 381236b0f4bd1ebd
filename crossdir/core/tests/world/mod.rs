//! A coordinator and its shards in one thread: the real machines, a network that delays, loses and
//! doubles, and a driver that can be killed before any of its outputs is performed.

#![allow(dead_code)] // each test uses a part

pub mod model;
pub mod tables;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use eggs_crossdir_core::{CrossdirMachine, Driver, Effect, Input, Output, Received, finished_not_retired};
use eggs_machine::group::Applied;
use eggs_proto::{InodeId, ServiceError, SessionId, ShardError, ShardId, Time, TransactionId, pb};
use eggs_shard_core::ShardMachine;
use pb::write_op::Op;
use prost::Message;

use tables::{Group, Shards};

const MS: u64 = 1_000_000;

/// SplitMix64 (Steele, Lea, Flood 2014): enough for choices, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }
}

#[derive(Debug, Clone)]
enum Event {
    Request(Output),
    Reply(Input),
    Propose(pb::CrossdirCommand),
}

/// How bad the network is, in percent.
#[derive(Debug, Clone, Copy, Default)]
pub struct Weather {
    pub lose: u64,
    pub double: u64,
    /// A doubled message's second copy comes this much later at most.
    pub late_ms: u64,
    /// The driver is killed before an output.
    pub crash: u64,
}

pub struct World {
    pub now: u64,
    pub rng: Rng,
    pub weather: Weather,
    pub coordinator: Group<CrossdirMachine>,
    pub shards: Shards,
    pub driver: Driver,
    /// By time, then by number.
    events: BTreeMap<(u64, u64), Event>,
    numbers: u64,
    /// Outputs performed so far, and the one before which the driver is killed.
    pub outputs: u64,
    pub kill_at: Option<u64>,
    pub kills: u64,
    pub answers: BTreeMap<TransactionId, pb::CrossdirReply>,
    pub begun_at: BTreeMap<TransactionId, u64>,
    pub answered_at: BTreeMap<TransactionId, u64>,
    /// XD-3, XD-4 are watched from outside.
    forgotten: BTreeMap<u64, BTreeSet<u8>>,
    pub writes: u64,
    pub proposals: u64,
    /// Shards nothing gets through to.
    pub cut: BTreeSet<u8>,
    /// No end is logged: such proposals are lost.
    pub mute: bool,
}

impl World {
    pub fn new(seed: u64, weather: Weather) -> World {
        let mut coordinator = Group::new(CrossdirMachine);
        let now = 1_000_000_000 * MS;
        coordinator.apply(now, 0, 0, Driver::take_over().encode_to_vec());
        let (driver, outputs) = Driver::recover(&coordinator.table, Time(now)).unwrap();
        assert!(outputs.is_empty());
        World {
            now,
            rng: Rng(seed),
            weather,
            coordinator,
            shards: BTreeMap::new(),
            driver,
            events: BTreeMap::new(),
            numbers: 0,
            outputs: 0,
            kill_at: None,
            kills: 0,
            answers: BTreeMap::new(),
            begun_at: BTreeMap::new(),
            answered_at: BTreeMap::new(),
            forgotten: BTreeMap::new(),
            writes: 0,
            proposals: 0,
            cut: BTreeSet::new(),
            mute: false,
        }
    }

    pub fn shard(&mut self, shard: ShardId) -> &mut Group<ShardMachine> {
        self.shards.entry(shard.0).or_insert_with(|| Group::new(ShardMachine { shard }))
    }

    /// One write on a shard, at once.
    pub fn write(&mut self, shard: ShardId, op: pb::WriteOp) -> pb::WriteResult {
        self.now += 1;
        let now = self.now;
        let mut entropy = self.rng.clone();
        self.shard(shard).write(now, op, &mut || entropy.next())
    }

    fn stat(&mut self, inode: InodeId) -> Received<pb::StatReply> {
        let now = self.now;
        self.shard(inode.shard()).stat(inode, now)
    }

    /// A request of a client, up to the log.
    pub fn begin(
        &mut self,
        op: &pb::crossdir_request::Op,
        session: u64,
        sequence: u64,
    ) -> Result<TransactionId, pb::Error> {
        let alive: Vec<ShardId> = (0..4).map(ShardId).collect();
        let counter = self.rng.next();
        let table = &self.coordinator.table;
        let session = SessionId(session);
        let command =
            eggs_crossdir_core::prepare(table, op, session, sequence, Time(self.now), &alive, counter)?;
        self.now += 1;
        let now = self.now;
        match self.coordinator.apply(now, session.0, sequence, command.encode_to_vec()) {
            Applied::Ran(outcome) => {
                let accepted = pb::TransactionAccepted::decode(outcome.reply).unwrap();
                self.begun_at.entry(TransactionId(accepted.transaction)).or_insert(now);
                self.effects(outcome.effects);
                match accepted.error {
                    Some(error) => Err(error),
                    None => Ok(TransactionId(accepted.transaction)),
                }
            }
            Applied::Repeated(reply) => {
                Ok(TransactionId(pb::TransactionAccepted::decode(reply).unwrap().transaction))
            }
            other => panic!("{other:?}"),
        }
    }

    fn effects(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.input(Input::Effect(effect));
        }
    }

    fn input(&mut self, input: Input) {
        let outputs = self.driver.step(input, Time(self.now));
        self.perform(outputs);
    }

    fn perform(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            self.outputs += 1;
            let crash = self.weather.crash;
            if self.kill_at == Some(self.outputs) || (crash > 0 && self.rng.percent(crash)) {
                self.kill();
                return;
            }
            match output {
                Output::Answer { transaction, reply } => self.answered(transaction, reply),
                Output::Propose(command) => {
                    self.proposals += 1;
                    self.post(Event::Propose(command));
                }
                request => self.post(Event::Request(request)),
            }
        }
    }

    /// Kills the driver, and makes another from the machine's state.
    pub fn kill(&mut self) {
        self.kills += 1;
        self.now += MS;
        self.coordinator.apply(self.now, 0, 0, Driver::take_over().encode_to_vec());
        let (driver, outputs) = Driver::recover(&self.coordinator.table, Time(self.now)).unwrap();
        self.driver = driver;
        // Callers that wait ask again.
        for (transaction, (_, reply)) in finished_not_retired(&self.coordinator.table).unwrap() {
            assert_eq!(self.driver.reply(transaction), Some(&reply));
            self.answered(transaction, reply);
        }
        self.perform(outputs);
    }

    /// XD-2, XD-9: an answer given again, after a crash, is the same.
    fn answered(&mut self, transaction: TransactionId, reply: pb::CrossdirReply) {
        self.answered_at.entry(transaction).or_insert(self.now);
        if let Some(first) = self.answers.insert(transaction, reply.clone()) {
            assert_eq!(code(&first), code(&reply), "{transaction} was answered otherwise before");
            if code(&first) == 0 {
                assert_eq!(first, reply, "{transaction} was answered otherwise before");
            }
        }
    }

    fn post(&mut self, event: Event) {
        let weather = self.weather;
        let lose = !matches!(event, Event::Propose(_)) && self.rng.percent(weather.lose);
        if weather.double > 0 && self.rng.percent(weather.double) {
            let late = self.rng.below(weather.late_ms.max(1)) * MS;
            self.schedule(late, event.clone());
        }
        if !lose {
            let delay = self.rng.below(3 * MS) + 1;
            self.schedule(delay, event);
        }
    }

    fn schedule(&mut self, delay: u64, event: Event) {
        self.numbers += 1;
        self.events.insert((self.now + delay, self.numbers), event);
    }

    /// Runs until `done` or `limit_s` seconds have passed.
    pub fn run_until(&mut self, limit_s: u64, done: impl Fn(&World) -> bool) -> bool {
        let end = self.now + limit_s * 1000 * MS;
        while !done(self) {
            let event = self.events.first_key_value().map(|(&(at, _), _)| at);
            let timer = self.driver.next_deadline().map(|at| at.0);
            let Some(next) = event.into_iter().chain(timer).min() else { return done(self) };
            if next > end {
                return false;
            }
            self.now = self.now.max(next);
            if event.is_some_and(|at| at <= self.now) {
                let (_, event) = self.events.pop_first().unwrap();
                self.happen(event);
            } else {
                self.input(Input::Tick);
            }
        }
        true
    }

    /// Runs until everything is retired and the last late message has come.
    pub fn settle(&mut self) {
        let weather = std::mem::take(&mut self.weather);
        let settled = self.run_until(600, |world| world.driver.is_idle() && world.events.is_empty());
        assert!(settled, "stuck: {:#?}\n{:?}", self.driver.list(100), self.events);
        self.weather = weather;
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Request(Output::SendWrite { shard, op, tag }) => {
                if self.cut.contains(&shard.0) {
                    let received = Received::Lost("connection refused".to_owned());
                    return self.post(Event::Reply(Input::Write { tag, received }));
                }
                self.watch(shard, &op);
                self.writes += 1;
                let received = if self.weather.lose > 0 && self.rng.percent(5) {
                    Received::Refused(ShardError::NotLeader.bare())
                } else {
                    Received::Answer(self.write(shard, op))
                };
                self.post(Event::Reply(Input::Write { tag, received }));
            }
            Event::Request(Output::SendStat { inode, tag }) => {
                let received = if self.cut.contains(&inode.shard().0) {
                    Received::Lost("connection refused".to_owned())
                } else {
                    self.stat(inode)
                };
                self.post(Event::Reply(Input::Stat { tag, received }));
            }
            Event::Request(other) => panic!("{other:?}"),
            Event::Reply(input) => self.input(input),
            Event::Propose(command) if self.mute && is_finish(&command) => {}
            Event::Propose(command) => self.propose(&command),
        }
    }

    fn propose(&mut self, command: &pb::CrossdirCommand) {
        use pb::crossdir_command::Command;
        match &command.command {
            Some(Command::Finish(finish)) => {
                for one in &finish.transactions {
                    assert!(one.reply.is_some(), "a finish without an answer");
                }
            }
            Some(Command::Retire(retire)) => {
                for transaction in &retire.transactions {
                    // XD-4.
                    let shards = self.forgotten.get(transaction).map_or(0, BTreeSet::len);
                    assert!(shards >= 1, "transaction {transaction} is retired, and no shard forgot it");
                }
            }
            Some(Command::Clear(_)) => {}
            other => panic!("{other:?}"),
        }
        let now = self.now;
        match self.coordinator.apply(now, 0, 0, command.encode_to_vec()) {
            Applied::Ran(outcome) => self.effects(outcome.effects),
            other => panic!("{other:?}"),
        }
    }

    /// XD-3: what a shard is told to forget is finished.
    fn watch(&mut self, shard: ShardId, op: &pb::WriteOp) {
        if let Some(Op::ForgetTransactions(forget)) = &op.op {
            let unfinished = eggs_crossdir_core::unfinished(&self.coordinator.table).unwrap();
            for pending in unfinished {
                assert!(!forget.transactions.contains(&pending.transaction.0), "XD-3");
                assert!(forget.floor <= pending.transaction.0, "XD-10");
            }
            for &transaction in &forget.transactions {
                self.forgotten.entry(transaction).or_default().insert(shard.0);
            }
        }
    }

    // ---- looking at the namespace ----

    pub fn edges(&self) -> BTreeMap<(u64, Bytes), pb::EdgeRow> {
        tables::edges(&self.shards)
    }

    pub fn owners(&self) -> BTreeMap<u64, u64> {
        tables::owners(&self.shards)
    }

    pub fn lookup(&self, directory: u64, name: &[u8]) -> Option<u64> {
        self.edges().get(&(directory, Bytes::copy_from_slice(name))).map(|edge| edge.target)
    }

    /// XD-11, when nothing is on its way.
    pub fn check(&self) {
        tables::check(&self.coordinator, &self.shards);
    }
}

/// 0: done; else the code of the refusal.
pub fn code(reply: &pb::CrossdirReply) -> u32 {
    match reply.result.as_ref().expect("an answer says something") {
        pb::crossdir_reply::Result::Error(error) => error.code,
        _ => 0,
    }
}

pub fn mkdir(parent: u64, name: &[u8]) -> pb::crossdir_request::Op {
    let name = Bytes::copy_from_slice(name);
    pb::crossdir_request::Op::Mkdir(pb::Mkdir { parent, name, attributes: None })
}

pub fn rmdir(parent: u64, name: &[u8], target: u64) -> pb::crossdir_request::Op {
    let name = Bytes::copy_from_slice(name);
    pb::crossdir_request::Op::Rmdir(pb::Rmdir { parent, name, target })
}

pub fn rename(
    old: (u64, &[u8]),
    target: u64,
    new: (u64, &[u8]),
    replace: pb::Replace,
) -> pb::crossdir_request::Op {
    pb::crossdir_request::Op::Move(pb::Move {
        old_directory: old.0,
        old_name: Bytes::copy_from_slice(old.1),
        target,
        new_directory: new.0,
        new_name: Bytes::copy_from_slice(new.1),
        replace: replace.into(),
    })
}

pub fn mkdir_path(parent: u64, names: &[&[u8]]) -> pb::crossdir_request::Op {
    let names = names.iter().map(|name| Bytes::copy_from_slice(name)).collect();
    let op = pb::MkdirPath { parent, names, ..pb::MkdirPath::default() };
    pb::crossdir_request::Op::MkdirPath(op)
}

pub fn exchange(
    (directory, name): (u64, &[u8]),
    target: u64,
    (other_directory, other_name): (u64, &[u8]),
    other_target: u64,
) -> pb::crossdir_request::Op {
    pb::crossdir_request::Op::Exchange(pb::ExchangeAcross {
        directory,
        name: Bytes::copy_from_slice(name),
        target,
        other_directory,
        other_name: Bytes::copy_from_slice(other_name),
        other_target,
    })
}

/// The directory that was made, or the first of them; the instant at which one was removed; 0: neither.
pub fn made(reply: &pb::CrossdirReply) -> u64 {
    match &reply.result {
        Some(pb::crossdir_reply::Result::Mkdir(reply)) => reply.inode,
        Some(pb::crossdir_reply::Result::MkdirPath(reply)) => reply.inodes[0],
        Some(pb::crossdir_reply::Result::Rmdir(reply)) => reply.died_at,
        _ => 0,
    }
}

/// Of what a dead edge owns.
pub fn undelete(old: (u64, &[u8], u64), target: u64, new: (u64, &[u8])) -> pb::crossdir_request::Op {
    pb::crossdir_request::Op::UndeleteInode(pb::UndeleteInode {
        directory: old.0,
        name: Bytes::copy_from_slice(old.1),
        died_at: old.2,
        target,
        new_directory: new.0,
        new_name: Bytes::copy_from_slice(new.1),
    })
}

pub fn purge((directory, name, died_at): (u64, &[u8], u64), target: u64) -> pb::crossdir_request::Op {
    let name = Bytes::copy_from_slice(name);
    pb::crossdir_request::Op::PurgeInode(pb::PurgeInode { directory, name, died_at, target })
}

pub fn put_small(directory: u64, name: &[u8]) -> pb::WriteOp {
    let op = pb::PutSmall {
        directory,
        name: Bytes::copy_from_slice(name),
        bytes: Bytes::from_static(b"contents"),
        ..Default::default()
    };
    pb::WriteOp { op: Some(Op::PutSmall(op)) }
}

pub fn unlink(directory: u64, name: &[u8]) -> pb::WriteOp {
    let op = pb::Unlink { directory, name: Bytes::copy_from_slice(name), expected: 0 };
    pb::WriteOp { op: Some(Op::Unlink(op)) }
}

fn is_finish(command: &pb::CrossdirCommand) -> bool {
    matches!(command.command, Some(pb::crossdir_command::Command::Finish(_)))
}
