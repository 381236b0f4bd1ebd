//! The whole world at one moment, and what can happen next.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use eggs_crossdir_core::{CrossdirMachine, Driver, Effect, Input, Output, Received, finished_not_retired};
use eggs_machine::Outcome;
use eggs_machine::group::Applied;
use eggs_proto::{InodeId, ServiceError, SessionId, ShardError, ShardId, Time, TransactionId, pb};
use eggs_shard_core::ShardMachine;
use pb::crossdir_command::Command;
use pb::crossdir_request::Op;
use prost::Message as _;

use super::world::code;
use super::world::tables::{Group, Shards};
use crate::canon::{self, Canon};
use crate::{judge, local};

pub const MS: u64 = 1_000_000;
/// Instants are numbers of their own size, by which [`canon`] knows them: below all inodes, above all else.
pub const BEGINNING: u64 = 1_000_000_000 * MS;

/// What has not happened yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The call is logged, or executed by its shard.
    Begin(usize),
    /// A message comes: a request is executed, an answer or an applied proposal goes to the driver.
    Deliver(usize),
    /// A request or answer is lost.
    Lose(usize),
    /// The driver's next timer runs out.
    Tick,
    /// The driver dies: answers on their way are lost, requests and proposals come late.
    Crash,
    /// Another one: proposals to clear and to finish that come now count for nothing.
    TakeOver,
}

/// How much of it there is in one run.
#[derive(Debug, Clone, Copy, Default, Hash)]
pub struct Bounds {
    pub crashes: u32,
    pub losses: u32,
    /// Timers no longer than this, in milliseconds, run out while messages are on their way, too: ends are
    /// recorded, with more also forgotten, beside transactions that still run.
    pub hasty_ms: u64,
    /// Repetitions of steps that a shard remembers, and so answers as before and does nothing, come at one
    /// moment only: the driver's at once, before anything else happens; a dead driver's at the end, when all
    /// is forgotten ([`State::come_too_late`]). Proposals of a driver that has been replaced come at once.
    pub brief: bool,
    /// The driver does not die: it hears nothing of the log any more, and goes on beside the other one.
    pub lives_on: bool,
    /// The calls begin in their order.
    pub in_order: bool,
}

/// A call of a client.
#[derive(Debug, Clone)]
pub struct Call {
    pub op: Op,
    pub session: SessionId,
    /// Where mkdir makes its directory.
    pub shard: ShardId,
    pub transaction: Option<TransactionId>,
    pub answer: Option<pb::CrossdirReply>,
    /// The calls that were answered before this one began.
    pub after: Vec<usize>,
}

impl Call {
    fn has_begun(&self) -> bool {
        self.transaction.is_some() || self.answer.is_some()
    }
}

#[derive(Debug, Clone)]
enum What {
    Request(Output),
    Reply(Input),
    Proposal(pb::CrossdirCommand),
}

#[derive(Debug, Clone)]
struct Message {
    what: What,
    /// Of a driver that was replaced since, or to it.
    stale: bool,
    /// The sender's clock: the receiver's is not behind it.
    clock: u64,
    text: Rc<str>,
    /// A request that changes nothing, as the shard is, or the answer to one.
    moot: bool,
}

impl Message {
    /// XD-8: a driver that has been replaced proposed it.
    fn counts_for_nothing(&self) -> bool {
        let What::Proposal(command) = &self.what else { return false };
        self.stale && !matches!(command.command, Some(Command::Retire(_)))
    }
}

/// A driver that can be copied: made again from what it was made from and told.
#[derive(Debug)]
struct Copied {
    driver: Driver,
    origin: Rc<(Rc<Group<CrossdirMachine>>, Time)>,
    told: Vec<Rc<(Input, Time)>>,
}

impl Copied {
    fn new(from: Rc<Group<CrossdirMachine>>, now: Time) -> (Copied, Vec<Output>) {
        let (driver, outputs) = Driver::recover(&from.table, now).unwrap();
        (Copied { driver, origin: Rc::new((from, now)), told: Vec::new() }, outputs)
    }

    fn step(&mut self, input: Input, now: Time) -> Vec<Output> {
        let outputs = self.driver.step(input.clone(), now);
        self.told.push(Rc::new((input, now)));
        outputs
    }
}

impl Clone for Copied {
    fn clone(&self) -> Copied {
        let (from, at) = &*self.origin;
        let (mut driver, _) = Driver::recover(&from.table, *at).unwrap();
        for told in &self.told {
            driver.step(told.0.clone(), told.1);
        }
        Copied { driver, origin: self.origin.clone(), told: self.told.clone() }
    }
}

#[derive(Debug, Clone)]
struct Replaced {
    driver: Copied,
    clock: u64,
    canon: Rc<(Canon, u64)>,
}

#[derive(Debug, Clone)]
pub struct State {
    pub coordinator: Rc<Group<CrossdirMachine>>,
    pub shards: Rc<Shards>,
    pub calls: Vec<Call>,
    pub left: Bounds,
    sessions: u64,
    crashed: bool,
    /// The driver is dead, and there is no other yet.
    down: bool,
    /// The one that was replaced and lives on.
    replaced: Option<Replaced>,
    driver: Copied,
    /// Of the driver and now.
    canon: Rc<(Canon, u64)>,
    now: u64,
    /// The driver's host's clock: not behind any answer it had.
    clock: u64,
    messages: Vec<Message>,
    /// All requests of this run.
    pub sent: Vec<Rc<Output>>,
    coordinator_hash: u64,
    shard_hashes: BTreeMap<u8, u64>,
    /// Shards do not remember outcomes: a bug, for the test of the test.
    pub forgetful: bool,
    /// Every directory seems to be in the root: another.
    pub blind: bool,
}

impl State {
    pub fn new(shards: impl IntoIterator<Item = ShardId>) -> State {
        let mut coordinator = Group::new(CrossdirMachine);
        coordinator.apply(BEGINNING, 0, 0, Driver::take_over().encode_to_vec());
        let coordinator = Rc::new(coordinator);
        let (driver, _) = Copied::new(coordinator.clone(), Time(BEGINNING));
        let shards: Shards =
            shards.into_iter().map(|shard| (shard.0, Group::new(ShardMachine { shard }))).collect();
        let mut state = State {
            coordinator,
            shards: Rc::new(shards),
            calls: Vec::new(),
            left: Bounds::default(),
            sessions: 0,
            crashed: false,
            down: false,
            replaced: None,
            canon: Rc::new(Canon::of(&driver.driver, BEGINNING)),
            driver,
            now: BEGINNING,
            clock: BEGINNING,
            messages: Vec::new(),
            sent: Vec::new(),
            coordinator_hash: 0,
            shard_hashes: BTreeMap::new(),
            forgetful: false,
            blind: false,
        };
        state.rehash();
        state
    }

    /// After the tables were changed from outside.
    pub fn rehash(&mut self) {
        self.coordinator_hash = canon::of_coordinator(&self.coordinator);
        self.shard_hashes = self.shards.iter().map(|(&n, shard)| (n, canon::of_shard(shard))).collect();
    }

    pub fn driver(&self) -> &Driver {
        &self.driver.driver
    }

    pub fn is_down(&self) -> bool {
        self.down
    }

    pub fn call(&mut self, op: Op, shard: ShardId) {
        self.sessions += 1;
        let session = SessionId(self.sessions);
        self.calls.push(Call { op, session, shard, transaction: None, answer: None, after: Vec::new() });
    }

    // ---- what can happen ----

    fn all_begun(&self) -> bool {
        self.calls.iter().all(Call::has_begun)
    }

    pub fn is_over(&self) -> bool {
        !self.down && self.all_begun() && self.messages.is_empty() && self.driver().is_idle()
    }

    /// Everything that can happen next and matters.
    pub fn actions(&self) -> Vec<Action> {
        if self.down {
            return self.actions_without_driver();
        }
        let mut actions = Vec::new();
        if self.left.brief
            && let Some(n) = self.messages.iter().position(|message| message.moot && !message.stale)
        {
            return vec![Action::Deliver(n)];
        }
        actions.extend(self.beginnings());
        // The shards forget side by side what nobody asks for any more: one order stands for all.
        let ending = self.all_begun() && self.driver().unfinished() == 0;
        let first = self.messages.iter().filter(|message| !message.stale).map(|message| &message.text).min();
        for (n, message) in self.messages.iter().enumerate() {
            let same = |other: &Message| other.text == message.text && other.stale == message.stale;
            let later = ending && !message.stale && Some(&message.text) != first;
            if later || self.messages[..n].iter().any(same) {
                continue;
            }
            actions.push(Action::Deliver(n));
            if self.left.losses > 0 && !message.stale && !matches!(message.what, What::Proposal(_)) {
                actions.push(Action::Lose(n));
            }
        }
        if let Some(at) = self.driver().next_deadline()
            && (first.is_none() || at.0 <= self.now + self.left.hasty_ms * MS)
        {
            actions.push(Action::Tick);
        }
        if self.left.crashes > 0 && !self.driver().is_idle() {
            actions.push(Action::Crash);
        }
        actions
    }

    fn beginnings(&self) -> impl Iterator<Item = Action> {
        let can_begin = |n: &usize| {
            let (call, before) = (&self.calls[*n], &self.calls[..*n]);
            // Of two calls alike it does not matter which comes first.
            let waits =
                before.iter().any(|other| !other.has_begun() && (self.left.in_order || other.op == call.op));
            // What meets a lock is repeated.
            let locked = || local::write(&call.op).is_some_and(|write| self.try_write(write).is_none());
            !call.has_begun() && !waits && !locked()
        };
        (0..self.calls.len()).filter(can_begin).map(Action::Begin)
    }

    /// A new driver is made from what the log says: whatever else can happen now can as well happen when it is there, or
    /// before the other one died.
    fn actions_without_driver(&self) -> Vec<Action> {
        let mut actions = vec![Action::TakeOver];
        for (n, message) in self.messages.iter().enumerate() {
            let same = |other: &Message| other.text == message.text;
            if matches!(message.what, What::Proposal(_)) && !self.messages[..n].iter().any(same) {
                actions.push(Action::Deliver(n));
            }
        }
        actions
    }

    /// For people: the message or call of an action.
    pub fn describe(&self, action: Action) -> Rc<str> {
        match action {
            Action::Begin(n) => format!("{:?}", self.calls[n].op).into(),
            Action::Deliver(n) | Action::Lose(n) => self.messages[n].text.clone(),
            Action::Tick | Action::Crash | Action::TakeOver => Rc::default(),
        }
    }

    /// Equal for states that go on alike.
    pub fn hash(&self) -> u64 {
        let (canon, driver) = &*self.canon;
        let mut text = String::new();
        let hash_message = |message: &Message| {
            text.clear();
            let replaced = self.replaced.as_ref().filter(|_| message.stale).map(|replaced| &replaced.canon.0);
            replaced.unwrap_or(canon).rewrite(&message.text, &mut text);
            (canon::hash(text.as_bytes()), message.stale)
        };
        let mut messages: Vec<(u64, bool)> = self.messages.iter().map(hash_message).collect();
        messages.sort_unstable();
        let mut hasher = DefaultHasher::new();
        self.replaced.as_ref().map(|replaced| replaced.canon.1).hash(&mut hasher);
        (driver, self.down, messages, self.left, self.coordinator_hash, &self.shard_hashes).hash(&mut hasher);
        for call in &self.calls {
            let answer = call.answer.as_ref().map(code);
            (call.transaction.map(|transaction| transaction.0), answer, &call.after).hash(&mut hasher);
        }
        hasher.finish()
    }

    // ---- making it happen ----

    pub fn act(&mut self, action: Action) {
        match action {
            Action::Begin(n) => self.begin(n),
            Action::Deliver(n) => {
                let message = self.messages.remove(n);
                self.deliver(message);
            }
            Action::Lose(n) => {
                self.left.losses -= 1;
                self.messages.remove(n);
            }
            Action::Tick => {
                let at = self.driver().next_deadline().expect("a timer");
                self.now = self.now.max(at.0);
                self.input(Input::Tick);
            }
            Action::Crash => self.crash(),
            Action::TakeOver => self.take_over(),
        }
    }

    fn begin(&mut self, n: usize) {
        let answered = |n: &usize| self.calls[*n].answer.is_some();
        self.calls[n].after = (0..self.calls.len()).filter(answered).collect();
        let call = &self.calls[n];
        if let Some(write) = local::write(&call.op) {
            return self.write(n, write);
        }
        let session = call.session;
        let command = eggs_crossdir_core::prepare(
            &self.coordinator.table,
            &call.op,
            session,
            1,
            Time(self.now),
            &[call.shard],
            0,
        )
        .unwrap();
        let outcome = self.log(session, command);
        let accepted = pb::TransactionAccepted::decode(outcome.reply).unwrap();
        assert_eq!(accepted.error, None);
        self.calls[n].transaction = Some(TransactionId(accepted.transaction));
        for effect in outcome.effects {
            self.input(Input::Effect(effect));
        }
    }

    /// The shard as it is then, and its answer; `None`: it is locked.
    fn try_write(
        &self,
        (shard, op): (ShardId, pb::WriteOp),
    ) -> Option<(Group<ShardMachine>, pb::WriteResult)> {
        let mut group = self.shards[&shard.0].clone();
        let result = group.write(self.now, op, &mut || unreachable!("nothing is left to chance"));
        let locked = ShardError::Locked.code();
        let is_locked =
            matches!(&result.result, Some(pb::write_result::Result::Error(error)) if error.code == locked);
        (!is_locked).then_some((group, result))
    }

    /// What a shard does alone is over at once.
    fn write(&mut self, n: usize, write: (ShardId, pb::WriteOp)) {
        let shard = write.0;
        let (group, result) = self.try_write(write).expect("what is locked has not begun");
        self.shard_hashes.insert(shard.0, canon::of_shard(&group));
        Rc::make_mut(&mut self.shards).insert(shard.0, group);
        self.find_moot(shard);
        let answer = local::answer(&result);
        judge::local_answer(self, n, &answer);
        self.calls[n].answer = Some(answer);
    }

    /// `session` 0: none.
    fn log(&mut self, session: SessionId, command: pb::CrossdirCommand) -> Outcome<Effect> {
        let coordinator = Rc::make_mut(&mut self.coordinator);
        let applied = coordinator.apply(self.now, session.0, 1, command.encode_to_vec());
        self.coordinator_hash = canon::of_coordinator(&self.coordinator);
        match applied {
            Applied::Ran(outcome) => outcome,
            other => panic!("a call is begun once: {other:?}"),
        }
    }

    fn deliver(&mut self, message: Message) {
        match message.what.clone() {
            What::Request(Output::SendWrite { shard, op, tag }) => {
                judge::forgetting(&self.coordinator, &op);
                let group =
                    Rc::make_mut(&mut self.shards).get_mut(&shard.0).expect("a shard of the scenario");
                if self.forgetful {
                    forget_everything(group);
                }
                let mut none = || unreachable!("steps leave nothing to chance");
                let result = group.write(message.clock, op, &mut none);
                let clock = group.clock();
                self.shard_hashes.insert(shard.0, canon::of_shard(group));
                self.find_moot(shard);
                let received = Received::Answer(result);
                self.reply(Input::Write { tag, received }, clock, &message);
            }
            What::Request(Output::SendStat { inode, tag }) => {
                let group = &self.shards[&inode.shard().0];
                let mut received = group.stat(inode, message.clock);
                if let Received::Answer(pb::StatReply { attributes: Some(attributes) }) = &mut received
                    && self.blind
                {
                    attributes.parent = Some(InodeId::ROOT.0);
                }
                let clock = group.clock().max(message.clock);
                self.reply(Input::Stat { tag, received }, clock, &message);
            }
            What::Request(other) => panic!("{other:?}"),
            What::Reply(input) if message.stale => self.input_replaced(input, message.clock),
            What::Reply(input) => {
                self.clock = self.clock.max(message.clock);
                self.input(input);
            }
            What::Proposal(command) => {
                let before = self.coordinator_hash;
                let counts = self.down || !message.counts_for_nothing();
                let outcome = self.log(SessionId(0), command);
                if !counts {
                    assert_eq!(outcome.effects, [], "XD-8: of a driver that has been replaced");
                    assert_eq!(self.coordinator_hash, before, "XD-8: of a driver that has been replaced");
                }
                for effect in outcome.effects {
                    if !self.down {
                        self.input(Input::Effect(effect));
                    }
                }
            }
        }
    }

    /// To a driver that is dead, nothing goes.
    fn reply(&mut self, input: Input, clock: u64, to: &Message) {
        if !to.stale || self.replaced.is_some() {
            self.post(What::Reply(input), clock, to.moot, to.stale);
        }
    }

    fn post(&mut self, what: What, clock: u64, moot: bool, stale: bool) {
        let text = format!("{what:?}").into();
        self.messages.push(Message { what, stale, clock, text, moot });
    }

    /// What is moot now that the shard has changed.
    fn find_moot(&mut self, changed: ShardId) {
        for n in 0..self.messages.len() {
            if let What::Request(request @ Output::SendWrite { shard, .. }) = &self.messages[n].what
                && *shard == changed
            {
                let unheard = !self.messages[n].stale || self.replaced.is_none();
                self.messages[n].moot = unheard && self.is_moot(request);
            }
        }
        self.messages.retain(|message| !(message.stale && message.moot));
    }

    /// Before a crash nothing is repeated.
    fn is_moot(&self, request: &Output) -> bool {
        let Output::SendWrite { shard, op, .. } = request else { return false };
        if !self.left.brief || !self.crashed {
            return false;
        }
        let mut group = self.shards[&shard.0].clone();
        group.write(self.clock, op.clone(), &mut || 0);
        canon::of_shard(&group) == self.shard_hashes[&shard.0]
    }

    fn input(&mut self, input: Input) {
        let outputs = self.driver.step(input, Time(self.now));
        self.canon = Rc::new(Canon::of(self.driver(), self.now));
        if let Some(replaced) = &mut self.replaced {
            replaced.canon = Rc::new(Canon::of(&replaced.driver.driver, self.now));
        }
        self.perform(outputs);
    }

    /// Its timers run out when it hears something.
    fn input_replaced(&mut self, input: Input, clock: u64) {
        let Some(replaced) = &mut self.replaced else { return };
        replaced.clock = replaced.clock.max(clock);
        let (clock, outputs) = (replaced.clock, replaced.driver.step(input, Time(self.now)));
        replaced.canon = Rc::new(Canon::of(&replaced.driver.driver, self.now));
        for output in outputs {
            match output {
                Output::Answer { transaction, reply } => self.answered(transaction, reply),
                Output::Propose(command) => self.post(What::Proposal(command), clock, false, true),
                request => {
                    self.sent.push(Rc::new(request.clone()));
                    self.post(What::Request(request), clock, false, true);
                }
            }
        }
        self.refuse_proposals();
    }

    fn crash(&mut self) {
        self.left.crashes -= 1;
        if self.left.lives_on {
            let (clock, canon) = (self.clock, self.canon.clone());
            self.messages.retain(|message| !message.stale);
            self.replaced = Some(Replaced { driver: self.driver.clone(), clock, canon });
        } else {
            self.messages.retain(|message| !matches!(message.what, What::Reply(_)));
        }
        self.crashed = true;
        for message in &mut self.messages {
            message.stale = true;
        }
        for shard in 1..=self.shards.len() {
            self.find_moot(ShardId(shard as u8));
        }
        self.down = true;
    }

    fn take_over(&mut self) {
        self.down = false;
        self.now += MS;
        let outcome = self.log(SessionId(0), Driver::take_over());
        let accepted = pb::TransactionAccepted::decode(outcome.reply).unwrap();
        let (driver, outputs) = Copied::new(self.coordinator.clone(), Time(self.now));
        assert_eq!(driver.driver.number(), accepted.driver);
        self.driver = driver;
        self.canon = Rc::new(Canon::of(self.driver(), self.now));
        self.clock = self.now;
        // Callers that wait ask again.
        for (transaction, (_, reply)) in finished_not_retired(&self.coordinator.table).unwrap() {
            assert_eq!(self.driver().reply(transaction), Some(&reply));
            self.answered(transaction, reply);
        }
        self.perform(outputs);
        self.refuse_proposals();
    }

    fn refuse_proposals(&mut self) {
        if self.left.brief {
            while let Some(n) = self.messages.iter().position(Message::counts_for_nothing) {
                let message = self.messages.remove(n);
                self.deliver(message);
            }
        }
    }

    fn perform(&mut self, outputs: Vec<Output>) {
        self.clock = self.clock.max(self.now);
        for output in outputs {
            match output {
                Output::Answer { transaction, reply } => self.answered(transaction, reply),
                Output::Propose(command) => self.post(What::Proposal(command), self.clock, false, false),
                request => {
                    let moot = self.is_moot(&request);
                    if !moot {
                        self.sent.push(Rc::new(request.clone()));
                    }
                    self.post(What::Request(request), self.clock, moot, false);
                }
            }
        }
    }

    /// XD-10: whatever was sent comes once more when it is forgotten, and changes nothing.
    pub fn come_too_late(&mut self) {
        for request in std::mem::take(&mut self.sent) {
            let Output::SendWrite { shard, op, .. } = &*request else { continue };
            // That may still raise the floor.
            if matches!(op.op, Some(pb::write_op::Op::ForgetTransactions(_))) {
                continue;
            }
            let group = Rc::make_mut(&mut self.shards).get_mut(&shard.0).expect("a shard of the scenario");
            group.write(self.clock, op.clone(), &mut || 0);
            assert_eq!(canon::of_shard(group), self.shard_hashes[&shard.0], "XD-10: {op:?} at the end");
        }
    }

    /// XD-2, XD-9: answered again, by another driver, it is the same.
    fn answered(&mut self, transaction: TransactionId, reply: pb::CrossdirReply) {
        let n = self.calls.iter().position(|call| call.transaction == Some(transaction));
        let n = n.expect("a call of the scenario");
        match &self.calls[n].answer {
            Some(first) => {
                assert_eq!(code(first), code(&reply), "{transaction} was answered otherwise before");
                assert!(code(first) != 0 || *first == reply, "{transaction} was answered otherwise before");
            }
            None => {
                judge::answer(self, n, transaction, &reply);
                self.calls[n].answer = Some(reply);
            }
        }
    }
}

fn forget_everything(group: &mut Group<ShardMachine>) {
    use eggs_machine::{Table, Tx, hash::StateHash};
    let mut tx = Tx::new(&group.table, StateHash::default());
    for (key, _) in group.table.page(b"T", b"U", 1000).unwrap() {
        tx.delete(key).unwrap();
    }
    let (batch, _) = tx.finish();
    group.table.apply(batch);
}
