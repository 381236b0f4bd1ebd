//! A model of how the coordinator keeps directories a tree, searched through every state it can come to.
//!
//! Not the code that runs: the rules by which moves of directories and rmdirs run beside each other, over a few
//! directories and transactions, with every order of messages, log entries and losses of the driver. Tests show that the
//! rules keep their promises, and that without any one of them ([`Weakness`]) something goes wrong. When the rules in
//! `crossdir/core` are to change, change them here first.
//!
//! # The rules
//!
//! A move of `t` from `q` to `p`:
//! 0. `Begin` is recorded; ids are the order of that.
//! 1. It asks for all its base locks at once; every queue is strictly first come first served. Both edges exclusive; `p`,
//!    `q` and `t` shared (rmdir: edge and directory exclusive, parent shared). It gives them back when it is over.
//! 2. It reads the ancestors of `p`, one owner after the other, up to the root (or to `t`: a loop; or to a directory that
//!    is removed).
//! 3. Then it decides. It waits while one of these ancestors is the target of another move that is clear and not over, or,
//!    unless it is to be refused, `t` is among what an older move that waits has read. It keeps its place among those that
//!    wait until it is clear or refused, and reads again when one of these or a clear one is over and nothing it knows of
//!    stops it. Nothing stops it, but a clear move of one of these ancestors became over since it began to read: it reads
//!    again at once. Else what it read is true: it is refused (4), or clear (5).
//! 4. A refusal for what was read stops nobody from now on, and is proposed as the end. It is answered, and its locks go,
//!    when that is applied: not earlier.
//! 5. It is clear from now on, until it is over; that is proposed. The log takes it not of what is finished. When it is
//!    applied:
//! 6. LockEdge, LinkEdge (decides; refused: UnlockEdge), SetOwner, answer, UnlinkEdge; over: locks go, the end is proposed,
//!    shards forget when it is applied. A shard remembers each outcome (XD-1).
//!
//! An exchange of `t` in `q` and `u` in `p` is both moves at once, by these rules: one claim with two targets, which reads
//! the ancestors of `p` and then those of `q` not read yet. Its LinkEdge gives `u`'s name to `t`; after two SetOwners its
//! UnlinkEdge gives the locked name of `t` to `u`.
//!
//! An undelete asks for both edges and the directory exclusive, both parents shared; it locks the directory and gives it an
//! owner, then, in one step where it died, or else with the dead edge locked and freed round LinkEdge, its name, and unlocks
//! it. A purge asks for edge and directory exclusive, the parent shared; it locks the directory, if that has no entries,
//! living or dead, takes the dead edge away, and then the directory. Both read nothing, and claim nothing.
//!
//! Whoever comes to lead proposes TakeOver, and when that is applied, reads the rows and makes a driver of them. The log
//! counts TakeOvers; the driver's number is the count its view had. Clearances and ends carry it, and when they are applied
//! count for nothing if there has been another TakeOver since. A driver that hears of another TakeOver is dropped, and
//! another attempt made. It takes up what is cleared and not finished first, as clear, from LockEdge; then the rest, from 1;
//! both by id. What it has not proposed itself it ignores.
//!
//! # What is checked
//!
//! Always: no directory is its own ancestor; a directory has one visible name while it lives (XD-12), and none in a removed
//! one; of its names and deaths one owns it (SH-16), a death is undone once at most, and what was purged is never there
//! again, nor anything in it; no step is refused that cannot be; a refusal is true when the newest driver decides it; callers are told one thing,
//! which is what is recorded, which is what was done. In the end: all is finished and answered, no lock is left, owners and
//! edges agree. And no run goes in a circle, so every run comes to an end: nothing waits for ever.
//!
//! # What is left out
//!
//! Time, and with it repetition: a message sent twice does what one does, as outcomes are remembered, and one that is lost
//! is one that comes late. An answer arrives at the instant of its step, a log entry at the driver when it is applied: being
//! slow to hear is being slow to act on it. A lost driver does nothing more but for what it sent; or, where the scenario has
//! it so ([`Scenario::lingering`]), goes on beside the next, and hears what is applied until another TakeOver is. What of it
//! counts for nothing any more is dropped at once, for fewer states. The shards forget at once, and late steps find the
//! floor (XD-10). mkdir changes no owner, and files have none: one is undeleted as
//! a directory is, but for its first and last step, and an exchange of a directory and a file is a move of the
//! directory. Depth is not limited.
//!
//! Written out rather than on a library for it: the search is a page ([`search()`]), and the library would bring a
//! web server that cannot be left out.

mod check;
mod dead;
mod driver;
mod log;
mod scenario;
mod search;
mod shard;
mod state;

pub use scenario::{DeathId, Directory, EdgeId, EdgeName, Op, ROOT, Scenario, TRANSACTIONS_MAX, Transaction};
pub use search::{Found, Model, search};
pub use state::{Proposal, Reply, State, Step};

use state::{Driver, Phase, STEPS, Set, Stage, bit, has};

/// A rule taken away, to see whether it is needed and the checks would notice.
///
/// From [`OvertakeWaiting`](Weakness::OvertakeWaiting) on they do no harm, for the reasons given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weakness {
    /// Leave is given whatever else has it.
    ClearUnchecked,
    /// A move counts as clear only once that is recorded.
    ClaimWhenRecorded,
    /// An exchange counts as a move of the first of its two directories only.
    ClaimOneOfTwo,
    /// What became over while the ancestors were read does not matter.
    ForgetWhatWasOver,
    /// A refusal does not ask whether what was read still holds.
    RefuseUnchecked,
    /// A move steps as soon as its clearance is proposed.
    StepBeforeRecorded,
    /// A loop is answered when it is seen.
    AnswerBeforeRecorded,
    /// A new driver has cleared moves read and ask again.
    DropClaims,
    /// The log takes clearances of any driver.
    AnyDriverClears,
    /// The log takes ends from any driver.
    AnyDriverFinishes,
    /// A driver is made from what was recorded when its predecessor was lost, not from a view after its TakeOver.
    ViewBeforeTakeOver,
    /// A driver goes on when another TakeOver is applied (of an attempt that was lost before).
    IgnoreReplaced,
    /// An attempt whose TakeOver is applied reads its view when another driver has been made since, and gets that one's
    /// number. (The number is the view's, not that of its own TakeOver: both could then have decisions recorded.)
    LateView,
    /// Who undeletes does not take the ownership from the death.
    DeathStaysOwned,
    /// A directory is purged without having been locked while it had no entries.
    PurgeUnlocked,
    /// Leave does not wait for older ones that wait for it: that is for fairness among many, which few cannot show.
    OvertakeWaiting,
    /// A new driver queues cleared moves by id, among the others. An older one that meets a cleared one's locks was over
    /// before that was cleared, so it is cleared itself, or an rmdir, or (as a refusal keeps its locks until it is
    /// recorded) finished: none waits for leave.
    ClearedKeepTheirPlace,
    /// A refusal gives its locks back before it is recorded. Harmful with
    /// [`ClearedKeepTheirPlace`](Weakness::ClearedKeepTheirPlace); and it would have later ones run first (XD-7).
    RefusedKeepNoLocks,
    /// The log takes ends from any driver that came about by steps: the shards remember them, so the new driver comes to
    /// the same end.
    AnyDriverFinishesSteps,
    /// The log clears what is finished: a driver that clears has heard of all that is.
    ClearTheFinished,
}

/// A protocol and a scope to look at it in.
#[derive(Debug, Clone)]
pub struct Protocol {
    pub scenario: Scenario,
    pub weaknesses: Vec<Weakness>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The next transaction is recorded as begun.
    Begin,
    /// One owner is read.
    Read(Transaction),
    /// The driver has the last of them.
    Decide(Transaction),
    /// A step reaches its shard.
    Deliver(Transaction, Step),
    /// The coordinator's machine applies it.
    Apply(Proposal),
    /// The driver is lost, or the attempt to make one; another attempt begins.
    Crash,
    /// As it is lost, but it goes on, not knowing of it.
    Depose,
    /// By the driver that goes on.
    LostReads(Transaction),
    LostDecides(Transaction),
    LostDelivers(Transaction, Step),
    /// The driver is made.
    View,
    /// A lost attempt goes on after all, in place of the driver there is.
    Resume,
}

impl Protocol {
    pub fn new(scenario: Scenario, without: &[Weakness]) -> Protocol {
        Protocol { scenario, weaknesses: without.to_vec() }
    }

    fn is(&self, weakness: Weakness) -> bool {
        self.weaknesses.contains(&weakness)
    }

    fn is_move(&self, transaction: Transaction) -> bool {
        matches!(self.scenario.ops[transaction], Op::Move { .. } | Op::Exchange { .. })
    }

    fn deliver(&self, state: &mut State, transaction: Transaction, step: Step) {
        let Some(done) = shard::run(state, self, transaction, step) else { return };
        state.steps[transaction].sent &= !bit(step as usize);
        if state.driver.jobs[transaction].phase == Phase::Stepping(step) {
            self.go_on(state, transaction, step, done);
        }
    }

    /// A shard refuses for now what meets another's lock.
    fn arriving(&self, state: &State, transaction: Transaction, sent: Set) -> impl Iterator<Item = Step> {
        let runs = move |step: Step| shard::run(&mut state.clone(), self, transaction, step).is_some();
        STEPS.into_iter().filter(move |&step| has(sent, step as usize) && runs(step))
    }

    /// A message that would find its step done, and nobody waiting for the answer, is as good as lost.
    fn drop_idle_messages(state: &mut State) {
        for transaction in 0..state.begun {
            let at = state.driver.jobs[transaction].phase;
            let forgotten = has(state.forgotten, transaction);
            let steps = &mut state.steps[transaction];
            for step in STEPS {
                if forgotten || (steps.known(step) && at != Phase::Stepping(step)) {
                    steps.sent &= !bit(step as usize);
                }
            }
        }
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn first(&self) -> State {
        State::first(&self.scenario)
    }

    fn actions(&self, state: &State) -> Vec<Action> {
        let mut actions = Vec::new();
        if state.begun < self.scenario.ops.len() {
            actions.push(Action::Begin);
        }
        for transaction in 0..state.begun {
            match state.driver.jobs[transaction].phase {
                Phase::Reading { .. } => actions.push(Action::Read(transaction)),
                Phase::Read { .. } => actions.push(Action::Decide(transaction)),
                _ => {}
            }
            let arriving = self.arriving(state, transaction, state.steps[transaction].sent);
            actions.extend(arriving.map(|step| Action::Deliver(transaction, step)));
            let Some(lost) = &state.lost else { continue };
            match lost.driver.jobs[transaction].phase {
                Phase::Reading { .. } => actions.push(Action::LostReads(transaction)),
                Phase::Read { .. } => actions.push(Action::LostDecides(transaction)),
                _ => {}
            }
            let arriving = self.arriving(state, transaction, lost.sent[transaction]);
            actions.extend(arriving.map(|step| Action::LostDelivers(transaction, step)));
        }
        actions.extend(state.proposals.iter().copied().map(Action::Apply));
        if matches!(state.driver.stage, Stage::Viewing { .. }) {
            actions.push(Action::View);
        }
        if state.dormant {
            actions.push(Action::Resume);
        }
        if state.crashes < self.scenario.crashes {
            actions.push(Action::Crash);
            if self.scenario.lingering && matches!(state.driver.stage, Stage::Made { .. }) {
                actions.push(Action::Depose);
            }
        }
        actions
    }

    fn after(&self, state: &State, action: Action) -> State {
        let mut state = state.clone();
        match action {
            Action::Begin => {
                let transaction = state.begun;
                state.begun += 1;
                let begin = |state: &mut State| {
                    self.join(state, transaction, false);
                    self.start_what_can(state);
                };
                // Who is not made yet will find it in its view.
                if matches!(state.driver.stage, Stage::Made { .. }) {
                    begin(&mut state);
                }
                state.tell_lost(begin);
            }
            Action::Read(transaction) => self.read(&mut state, transaction),
            Action::Decide(transaction) => self.decide(&mut state, transaction),
            Action::Deliver(transaction, step) => self.deliver(&mut state, transaction, step),
            Action::Apply(proposal) => self.apply(&mut state, proposal),
            Action::Crash => {
                state.crashes += 1;
                self.make_anew(&mut state);
            }
            Action::Depose => {
                state.crashes += 1;
                self.leave_behind(&mut state);
            }
            Action::LostReads(transaction) => state.as_lost(|state| self.read(state, transaction)),
            Action::LostDecides(transaction) => state.as_lost(|state| self.decide(state, transaction)),
            Action::LostDelivers(transaction, step) => {
                state.as_lost(|state| self.deliver(state, transaction, step));
            }
            Action::View => self.recover(&mut state),
            Action::Resume => {
                state.dormant = false;
                state.driver = Driver::new(state.driver.attempt, Stage::Viewing { view: None });
            }
        }
        self.drop_what_cannot_count(&mut state);
        Protocol::drop_idle_messages(&mut state);
        state.as_lost(Protocol::drop_idle_messages);
        state
    }

    fn always(&self, state: &State) -> Result<(), String> {
        self.check_always(state)
    }

    fn is_end(&self, actions: &[Action]) -> bool {
        actions.iter().all(|&action| matches!(action, Action::Crash | Action::Depose | Action::Resume))
    }

    fn at_the_end(&self, state: &State) -> Result<(), String> {
        self.check_end(state)
    }
}
