//! DOC
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

/// The protocol with one rule taken away, to see that the rule is needed and the checks would notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weakness {
    /// Leave is given whatever else has it.
    ClearWithoutClaims,
    /// Only what moves an ancestor of ours stops us, not what we would move an ancestor of.
    HalfClaims,
    /// What became over while the ancestors were read does not matter.
    ForgetWhatWasOver,
    /// A refusal does not ask whether what was read still holds.
    RefuseUnchecked,
    /// Leave does not wait for those begun before that wait for it.
    OvertakeWaiting,
    /// A new driver has cleared moves read and ask again.
    DropClaims,
    /// A new driver takes up cleared moves without the ancestors recorded.
    EmptyClaims,
    /// A new driver queues cleared moves by id, among the others.
    ClearedKeepTheirPlace,
    /// No token: the log takes any driver's proposals.
    NoTakeOver,
    /// The newest applied TakeOver counts, be it an older driver's.
    LateTakeOver,
    /// A move that another driver cleared is not taken for cleared before the next recovery.
    AdoptNothing,
    /// A move steps as soon as its clearance is proposed.
    StepBeforeRecorded,
    /// A loop is answered when it is seen.
    AnswerBeforeRecorded,
    /// The end of a move refused for what was read is recorded whichever driver proposed it.
    LateRefusals,
    /// As that, except of a move that is cleared.
    RefuseUncleared,
    /// A driver goes on with what another one recorded as finished.
    FinishDoesNotStop,
    /// The log clears what is finished.
    ClearTheFinished,
}

/// A protocol and a scope to look at it in.
#[derive(Debug, Clone)]
pub struct Protocol {
    pub scenario: Scenario,
    pub weakness: Option<Weakness>,
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
    pub fn new(scenario: Scenario) -> Protocol {
        Protocol { scenario, weakness: None }
    }

    #[must_use]
    pub fn with(mut self, weakness: Weakness) -> Protocol {
        self.weakness = Some(weakness);
        self
    }

    fn is(&self, weakness: Weakness) -> bool {
        self.weakness == Some(weakness)
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
