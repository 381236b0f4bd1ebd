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
//! 3. When the driver's own TakeOver is applied, it decides. Another move, cleared and not over, or older and waiting, *stops*
//!    it when that one's target is among these ancestors, or `t` among that one's: then it reads again when such a one is over.
//!    Nothing stops it, but a move of one of these ancestors became over since it began to read: it reads again at once.
//!    Else what it read is true: it is refused (4), or cleared (5).
//! 4. A refusal for what was read is proposed as the end. The log takes it only of the driver that took over last. It is
//!    answered, and its locks go, when that is applied: not earlier.
//! 5. Cleared(t, ancestors, token) is proposed; it stops others from now on. The log takes it only of the driver that took
//!    over last, and not of what is finished. When that is applied:
//! 6. LockEdge, LinkEdge (decides; refused: UnlockEdge), SetOwner, answer, UnlinkEdge; over: locks and claim go, the end is
//!    proposed, shards forget when it is applied. A shard remembers each outcome (XD-1).
//!
//! A new driver proposes TakeOver with a token above every earlier one; the log takes none that is not above the last. It
//! takes up what is cleared and not finished as cleared, with the ancestors recorded, before all else, from LockEdge; the
//! rest from 1; all by id. What is applied of an older driver until its own TakeOver is: *Cleared*, it takes for its own;
//! *Finish*, it stops, and answers what is recorded.
//!
//! # What is checked
//!
//! Always: no directory is its own ancestor; a directory has one visible name while it lives (XD-12), and none in a removed
//! one; no step is refused that cannot be; a refusal is true when decided; callers are told one thing, which is what is
//! recorded, which is what was done. In the end: all is finished and answered, no lock is left, owners and edges agree.
//! And no run goes in a circle, so every run comes to an end: nothing waits for ever.
//!
//! # What is left out
//!
//! Time, and with it repetition: a message sent twice does what one does, as outcomes are remembered, and one that is lost
//! is one that comes late. An answer arrives at the instant of its step, a log entry at the driver when it is applied: being
//! slow to hear is being slow to act on it. A lost driver does nothing more but for what it sent. The shards forget at
//! once, and late steps find the floor (XD-10). mkdir changes no owner, and files have none. Depth is not limited.
//!
//! Written out rather than on a library for it: the search is a page ([`search()`]), and the library would bring a
//! web server that cannot be left out.

mod check;
mod driver;
mod log;
mod scenario;
mod search;
mod shard;
mod state;

pub use scenario::{Directory, EdgeId, EdgeName, Op, ROOT, Scenario, TRANSACTIONS_MAX, Transaction};
pub use search::{Found, Model, search};
pub use state::{Proposal, Reply, State, Step};

use state::{Phase, STEPS, bit, has};

/// A rule taken away, to see whether it is needed and the checks would notice.
///
/// From [`HalfClaims`](Weakness::HalfClaims) on they do no harm, for the reasons given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weakness {
    /// Leave is given whatever else has it.
    ClearWithoutClaims,
    /// What became over while the ancestors were read does not matter.
    ForgetWhatWasOver,
    /// A refusal does not ask whether what was read still holds.
    RefuseUnchecked,
    /// A new driver has cleared moves read and ask again.
    DropClaims,
    /// No token: the log takes any driver's proposals.
    NoTakeOver,
    /// The TakeOver applied last counts, be it an older driver's that comes late.
    LateTakeOver,
    /// A move that another driver cleared is not taken for cleared before the next recovery.
    AdoptNothing,
    /// A move steps as soon as its clearance is proposed.
    StepBeforeRecorded,
    /// A loop is answered when it is seen.
    AnswerBeforeRecorded,
    /// The end of a move refused for what was read is recorded whichever driver proposed it.
    LateRefusals,
    /// A driver goes on with what another one's proposal has finished.
    FinishDoesNotStop,
    /// Only a cleared move of one of our ancestors stops us, not one that has our target among its ancestors.
    ///
    /// Enough to stay a tree: suppose a circle, and of the moves made on it take the one cleared last. No target of a move
    /// then cleared was among its new parent's ancestors, and those cleared later have made nothing on the circle: so from
    /// its new parent upwards stands what it read, up to the root, and there is no circle.
    HalfClaims,
    /// A new driver takes up cleared moves without the ancestors recorded. With [`HalfClaims`](Weakness::HalfClaims)
    /// nobody looks at them; without, they only make others wait.
    EmptyClaims,
    /// Leave does not wait for older ones that wait for it: that is for fairness among many, which few cannot show.
    OvertakeWaiting,
    /// A new driver queues cleared moves by id, among the others. An older one that meets a cleared one's locks was over
    /// before that was cleared, so it is cleared itself, or an rmdir, or (as a refusal keeps its locks until it is
    /// recorded) finished: none waits for leave.
    ClearedKeepTheirPlace,
    /// Refusals need no token, but the log takes none of a move that is cleared (nor clears what is finished): the other way
    /// to do without [`LateRefusals`](Weakness::LateRefusals).
    RefuseUncleared,
    /// The log clears what is finished: with tokens, a driver that clears has heard of everything an older one finished.
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
    /// The driver is lost; a new one recovers.
    Crash,
}

impl Protocol {
    pub fn new(scenario: Scenario, without: &[Weakness]) -> Protocol {
        Protocol { scenario, weaknesses: without.to_vec() }
    }

    fn is(&self, weakness: Weakness) -> bool {
        self.weaknesses.contains(&weakness)
    }

    fn is_move(&self, transaction: Transaction) -> bool {
        matches!(self.scenario.ops[transaction], Op::Move { .. })
    }

    fn deliver(&self, state: &mut State, transaction: Transaction, step: Step) {
        let Some(done) = shard::run(state, &self.scenario, transaction, step) else { return };
        state.steps[transaction].sent &= !bit(step as usize);
        if state.driver.jobs[transaction].phase == Phase::Stepping(step) {
            self.go_on(state, transaction, step, done);
        }
    }

    /// A message that would find its step done, and nobody waiting for the answer, is as good as lost.
    fn drop_idle_messages(state: &mut State) {
        for transaction in 0..state.begun {
            let at = state.driver.jobs[transaction].phase;
            let steps = &mut state.steps[transaction];
            for step in STEPS {
                if steps.known(step) && at != Phase::Stepping(step) {
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
        let mut state = State::first(&self.scenario);
        if self.is(Weakness::LateTakeOver) {
            // Sent twice.
            state.propose(Proposal::TakeOver { token: state.token });
        }
        state
    }

    fn actions(&self, state: &State) -> Vec<Action> {
        let mut actions = Vec::new();
        if state.begun < self.scenario.ops.len() {
            actions.push(Action::Begin);
        }
        for transaction in 0..state.begun {
            match state.driver.jobs[transaction].phase {
                Phase::Reading { .. } => actions.push(Action::Read(transaction)),
                Phase::Read { .. } if state.driver.leads => actions.push(Action::Decide(transaction)),
                _ => {}
            }
            for step in STEPS {
                let sent = has(state.steps[transaction].sent, step as usize);
                // A shard refuses for now what meets another's lock.
                if sent && shard::run(&mut state.clone(), &self.scenario, transaction, step).is_some() {
                    actions.push(Action::Deliver(transaction, step));
                }
            }
        }
        let counts = |proposal: &Proposal| self.counts(state, *proposal);
        actions.extend(state.proposals.iter().copied().filter(counts).map(Action::Apply));
        if state.crashes < self.scenario.crashes {
            actions.push(Action::Crash);
        }
        actions
    }

    fn after(&self, state: &State, action: Action) -> State {
        let mut state = state.clone();
        match action {
            Action::Begin => {
                let transaction = state.begun;
                state.begun += 1;
                self.join(&mut state, transaction, false);
                self.start_what_can(&mut state);
            }
            Action::Read(transaction) => self.read(&mut state, transaction),
            Action::Decide(transaction) => self.decide(&mut state, transaction),
            Action::Deliver(transaction, step) => self.deliver(&mut state, transaction, step),
            Action::Apply(proposal) => self.apply(&mut state, proposal),
            Action::Crash => {
                state.crashes += 1;
                self.recover(&mut state);
            }
        }
        Protocol::drop_idle_messages(&mut state);
        state
    }

    fn always(&self, state: &State) -> Result<(), String> {
        self.check_always(state)
    }

    fn is_end(&self, actions: &[Action]) -> bool {
        actions.iter().all(|&action| action == Action::Crash)
    }

    fn at_the_end(&self, state: &State) -> Result<(), String> {
        self.check_end(state)
    }
}
