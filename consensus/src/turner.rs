//! The consensus thread: take in what came, turn, send, answer.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use eggs_consensus_core::{
    Answer, Grant, GroupId, HostError, Now, PeerBatch, Proposal, ProposalId, ProposeError, ReadTicket, Role,
    Ticks, Turn,
};
use eggs_machine::Machine;
use eggs_machine::group::{self, Applied as GroupApplied};
use eggs_proto::{SessionId, StoreId};

use crate::handle::{Applied, ConsensusError, Message, Prepare, Views, WriteAnswer};
use crate::inbox::{Mail, News};
use crate::open::FileHost;
use crate::own_runtime::OwnRuntime;
use crate::places::{Shared, wall};
use crate::reads::{Reading, Reads, Waiting};
use crate::runner::Event;
use crate::transport::{COMMAND_BYTES_MAX, Outbox};

/// Requests taken in before a turn: bounds the length of a turn.
const REQUESTS_PER_TURN: usize = 512;
/// Bytes of commands, and of what peers sent, taken in before a turn: they become one write of the log, which must stay below
/// 2 GiB in raft-engine, and one batch of the state.
const BYTES_PER_TURN: usize = 64 << 20;
/// Proposed and not yet answered, of all groups; more are answered `Busy`. Without a quorum they pile up.
const PROPOSED_BYTES_MAX: usize = 256 << 20;
/// After a turn that had commands to apply those who have something to bring for the next go first, if they wait for a
/// core; after one that had so many …
const PACED_COMMANDS: usize = 5;
/// … the next begins no sooner than this after it began, where other hosts have a part in it: what comes in meanwhile
/// shares its messages, and its fsyncs on all of them.
const PACE: Duration = Duration::from_micros(400);
/// How often a snapshot being synced is looked at.
const SEALING_PAUSE: Duration = Duration::from_millis(1);
/// How long a stop waits for others to take over what is led here.
const HAND_OVER_MAX: Duration = Duration::from_millis(1000);
/// Between looks at figures nobody is told of as they change.
const GAUGES_INTERVAL: Duration = Duration::from_secs(5);

/// The consensus thread's own.
pub(crate) struct Turner<M: Machine, F> {
    name: &'static str,
    host: FileHost<M>,
    shared: Arc<Shared>,
    outbox: Outbox,
    started: Instant,
    /// Since it was started.
    ticks: Ticks,
    /// Taken out of the inbox, not yet looked at.
    requests: VecDeque<Message>,
    mail: VecDeque<Mail>,
    /// With the bytes of the command.
    waiting: BTreeMap<ProposalId, (GroupId, usize, WriteAnswer)>,
    proposed_bytes: usize,
    reads: Reads,
    led: BTreeSet<GroupId>,
    /// Stores something could not be queued for.
    unsent: BTreeSet<StoreId>,
    on_event: F,
    purging: Option<JoinHandle<()>>,
    gauges_at: Option<Instant>,
}

impl<M, F> Turner<M, F>
where
    M: Machine + Send + 'static,
    F: FnMut(Event<M::Effect>),
{
    pub(crate) fn new(
        host: FileHost<M>,
        shared: Arc<Shared>,
        runtime: tokio::runtime::Handle,
        on_event: F,
    ) -> Self {
        Turner {
            name: shared.name,
            host,
            outbox: Outbox::new(Arc::clone(&shared), runtime),
            shared,
            started: Instant::now(),
            ticks: Ticks::new(Duration::ZERO),
            requests: VecDeque::new(),
            mail: VecDeque::new(),
            waiting: BTreeMap::new(),
            proposed_bytes: 0,
            reads: Reads::default(),
            led: BTreeSet::new(),
            unsent: BTreeSet::new(),
            on_event,
            purging: None,
            gauges_at: None,
        }
    }

    /// Until it is told to stop. `roles`: those that opening came to.
    pub(crate) fn run(&mut self, own: &OwnRuntime, roles: Vec<(GroupId, Role)>) -> Result<(), HostError> {
        for (group, role) in roles {
            self.role(group, role);
        }
        let mut stop_at = None;
        loop {
            let until = self.wait_until(stop_at);
            let news = own.wait(&self.shared.inbox, &mut self.requests, until);
            let stop = news.stop;
            let mut busy = !news.is_empty();
            self.host.pass(self.ticks.gone_by(self.started.elapsed()));
            self.take_news(news)?;
            busy |= self.take_mail()?;
            busy |= self.tick()?;
            busy |= self.take_requests();
            if !busy && self.host.is_sealing() {
                // Another thread syncs the snapshot; nothing else is to be done.
                std::thread::sleep(SEALING_PAUSE);
            }
            let held = self.host.held_until().is_some_and(|at| at <= self.started.elapsed());
            if busy || held || self.host.has_work() {
                let begun = Instant::now();
                let applied = self.turn()?;
                match applied {
                    _ if !self.outbox.has_peers() => {}
                    PACED_COMMANDS.. => std::thread::sleep(PACE.saturating_sub(begun.elapsed())),
                    1.. => std::thread::yield_now(),
                    0 => {}
                }
            }
            self.write_state()?;
            self.gauges();
            if stop && stop_at.is_none() {
                self.hand_over();
                stop_at = Some(Instant::now() + HAND_OVER_MAX);
            }
            if stop_at.is_some_and(|at| self.may_stop(at)) {
                return Ok(());
            }
        }
    }

    /// `None`: until somebody asks. Rest is rest.
    fn wait_until(&mut self, stop_at: Option<Instant>) -> Option<Instant> {
        if self.host.has_work() || !self.requests.is_empty() || !self.mail.is_empty() {
            return Some(Instant::now());
        }
        self.ticks.plan(self.host.rest_ticks());
        let tick = self.host.needs_ticks().then(|| self.started + self.ticks.next());
        let held = self.host.held_until().map(|at| self.started + at);
        [tick, held, stop_at, self.host.state().due()].into_iter().flatten().min()
    }

    fn now(&self) -> Now {
        Now { monotonic: self.started.elapsed(), wall: wall() }
    }

    fn take_news(&mut self, news: News) -> Result<(), HostError> {
        self.mail.extend(news.mail);
        for store in news.unreachable.into_iter().chain(std::mem::take(&mut self.unsent)) {
            self.host.unreachable(store);
        }
        if !news.found.is_empty() {
            let here: BTreeSet<GroupId> = self.host.groups().collect();
            let found: Vec<_> = news.found.into_iter().filter(|(id, _)| !here.contains(id)).collect();
            self.host.found(&found)?;
        }
        for (id, wanted) in news.want {
            self.host.want(id, wanted)?;
        }
        if news.hand_over {
            self.hand_over();
        }
        Ok(())
    }

    /// Whether there was any.
    fn take_mail(&mut self) -> Result<bool, HostError> {
        let mut bytes = 0;
        let some = !self.mail.is_empty();
        while bytes < BYTES_PER_TURN
            && let Some(mail) = self.mail.pop_front()
        {
            bytes += mail.bytes;
            let came = Now { monotonic: mail.came.saturating_duration_since(self.started), wall: mail.wall };
            self.host.receive(mail.from, mail.batch, came)?;
        }
        Ok(some)
    }

    /// Once per tick of real time: a thread that stood still ticks once, not for the time it missed.
    fn tick(&mut self) -> Result<bool, HostError> {
        let now = self.started.elapsed();
        if !self.host.needs_ticks() {
            self.ticks = Ticks::new(now);
            return Ok(false);
        }
        self.ticks.plan(self.host.rest_ticks());
        if !self.ticks.is_due(now) {
            return Ok(false);
        }
        self.host.tick()?;
        self.ticks = Ticks::new(now);
        self.shared.set_clock_offset(self.host.clock_offset());
        Ok(true)
    }

    /// Whether there were any.
    fn take_requests(&mut self) -> bool {
        let (mut taken, mut bytes) = (0, 0);
        while taken < REQUESTS_PER_TURN
            && bytes < BYTES_PER_TURN
            && let Some(request) = self.requests.pop_front()
        {
            bytes += self.take(request);
            taken += 1;
        }
        taken > 0
    }

    /// Answers the bytes it proposed.
    fn take(&mut self, message: Message) -> usize {
        match message {
            Message::Write { group, session, sequence, prepare, answer } => {
                let before = self.proposed_bytes;
                if let Err((answer, result)) = self.write(group, session, sequence, prepare, answer) {
                    let _ = answer.send(result);
                }
                return self.proposed_bytes - before;
            }
            Message::Read { groups, reading } => self.read(groups, reading),
            Message::Local(read) => read(&Views::new(&self.host), self.shared.clock.now()),
            Message::Status(answer) => {
                let _ = answer.send(self.host.groups().filter_map(|id| self.host.status(id)).collect());
            }
            Message::Snapshot(group) => self.host.request_snapshot(group),
        }
        0
    }

    fn not_leader(&self, group: GroupId) -> ConsensusError {
        ConsensusError::NotLeader { leader: self.shared.leader_address(group) }
    }

    /// What can be answered at once comes back.
    fn write(
        &mut self,
        id: GroupId,
        session: SessionId,
        sequence: u64,
        prepare: Prepare,
        answer: WriteAnswer,
    ) -> Result<(), (WriteAnswer, Result<Applied, ConsensusError>)> {
        let Some(view) = self.host.view(id) else { return Err((answer, Err(self.not_leader(id)))) };
        if session.0 != 0 {
            match group::repeated(view, session, sequence) {
                Ok(Some(reply)) => return Err((answer, Ok(Applied::Reply(reply)))),
                Ok(None) => {}
                Err(error) => return Err((answer, Err(ConsensusError::Storage(error.to_string())))),
            }
        }
        if self.proposed_bytes >= PROPOSED_BYTES_MAX {
            metrics::counter!("eggs_consensus_busy_total", "host" => self.name).increment(1);
            return Err((answer, Err(ConsensusError::Busy)));
        }
        let time = self.shared.clock.now();
        let command = match prepare(view, time) {
            Ok(command) => command,
            Err(refusal) => return Err((answer, Ok(Applied::Refused(refusal)))),
        };
        let bytes = command.len();
        if bytes > COMMAND_BYTES_MAX {
            let what = format!("a command of {bytes} bytes, {COMMAND_BYTES_MAX} is the longest");
            return Err((answer, Err(ConsensusError::Storage(what))));
        }
        match self.host.propose(id, Proposal { time, session, sequence, command }) {
            Ok(proposal) => {
                self.proposed_bytes += bytes;
                self.waiting.insert(proposal, (id, bytes, answer));
                Ok(())
            }
            Err(ProposeError::Busy) => {
                metrics::counter!("eggs_consensus_busy_total", "host" => self.name).increment(1);
                Err((answer, Err(ConsensusError::Busy)))
            }
            Err(ProposeError::NotLeader | ProposeError::UnknownGroup) => {
                Err((answer, Err(self.not_leader(id))))
            }
        }
    }

    // ---- reads ----

    fn read(&mut self, groups: Vec<GroupId>, reading: Box<dyn Reading>) {
        if self.reads.is_full() {
            metrics::counter!("eggs_consensus_busy_total", "host" => self.name).increment(1);
            return reading.finish(Err(ConsensusError::Busy));
        }
        self.confirm(Waiting::new(reading), groups);
    }

    /// Asks for what a read needs confirmed; runs it when that is nothing (any more).
    fn confirm(&mut self, mut waiting: Waiting, mut groups: Vec<GroupId>) {
        let mut ran = false;
        loop {
            let now = self.now();
            let mut tickets: Vec<(GroupId, ReadTicket)> = Vec::new();
            for group in groups {
                match self.host.read(group, now) {
                    Ok(Grant::Now) => {
                        waiting.confirmed.insert(group);
                    }
                    Ok(Grant::Later(ticket)) => tickets.push((group, ticket)),
                    Err(ProposeError::Busy) => return waiting.reading.finish(Err(ConsensusError::Busy)),
                    Err(ProposeError::NotLeader | ProposeError::UnknownGroup) => {
                        return waiting.reading.finish(Err(self.not_leader(group)));
                    }
                }
            }
            if !tickets.is_empty() {
                return self.reads.wait(waiting, tickets);
            }
            // Nothing happened since it ran: what was granted now was right then.
            if ran {
                return waiting.reading.finish(Ok(()));
            }
            groups = waiting.run(&self.host, self.shared.clock.now());
            ran = true;
        }
    }

    // ---- the turn ----

    /// Answers how many commands were applied.
    fn turn(&mut self) -> Result<usize, HostError> {
        let started = Instant::now();
        let (now, truncations) = (self.now(), self.host.truncations());
        let (begun, in_turn) = self.host.begin_turn(now, &mut sending(&mut self.outbox, &mut self.unsent))?;
        let early = begun.answers.len();
        self.catch_up(&begun.answers)?;
        // Before this turn's write: it was decided before.
        self.tell(begun);
        let turn = self.host.end_turn(in_turn, now, &mut sending(&mut self.outbox, &mut self.unsent))?;
        if let Some(error) = self.host.take_snapshot_failure() {
            tracing::warn!(host = self.name, %error, "a snapshot could not be taken or installed: it is tried again, and the log keeps growing until then");
        }
        self.catch_up(&turn.answers)?;
        let applied = early + turn.answers.len();
        if applied > 0 {
            metrics::counter!("eggs_consensus_turns_total", "host" => self.name).increment(1);
            metrics::counter!("eggs_consensus_commands_total", "host" => self.name).increment(applied as u64);
            metrics::histogram!("eggs_consensus_turn_seconds", "host" => self.name)
                .record(started.elapsed().as_secs_f64());
        }
        self.tell(turn);
        if self.host.truncations() > truncations {
            self.purge();
        }
        Ok(applied)
    }

    /// What half a turn came to. Roles first: a new leader learns what is to be done from the state, and whoever does not lead has nothing to do.
    fn tell(&mut self, turn: Turn<M::Effect>) {
        let changed: BTreeSet<GroupId> = turn.roles.iter().map(|&(group, _)| group).collect();
        for (group, role) in turn.roles {
            self.role(group, role);
        }
        for answer in turn.answers {
            let tell = self.led.contains(&answer.group) && !changed.contains(&answer.group);
            self.answer(answer, tell);
        }
        for proposal in turn.dropped {
            if let Some((group, bytes, answer)) = self.waiting.remove(&proposal) {
                self.proposed_bytes -= bytes;
                let _ = answer.send(Err(self.not_leader(group)));
            }
        }
        for waiting in self.reads.lost(&turn.lost) {
            let error = waiting.asked.first().map_or(ConsensusError::Busy, |&group| self.not_leader(group));
            waiting.reading.finish(Err(error));
        }
        for waiting in self.reads.confirmed(&turn.confirmed) {
            self.confirm(waiting, Vec::new());
        }
    }

    fn role(&mut self, group: GroupId, role: Role) {
        match role {
            Role::Leader { .. } => self.led.insert(group),
            Role::Follower { .. } | Role::Removed => self.led.remove(&group),
        };
        if matches!(role, Role::Leader { .. } | Role::Follower { leader: Some(_) }) {
            // Somebody was elected.
            metrics::counter!("eggs_consensus_elections_total", "host" => self.name).increment(1);
        }
        metrics::gauge!("eggs_consensus_groups_led", "host" => self.name).set(self.led.len() as f64);
        self.shared.set_role(group, role);
        (self.on_event)(Event::Role(group, role));
    }

    /// A command's instant can be later than the clock was when it was proposed (those before it in the
    /// turn used instants too): whoever is told of it must not be told an earlier time with it.
    fn catch_up(&self, answers: &[Answer<M::Effect>]) -> Result<(), HostError> {
        for run in answers.chunk_by(|a, b| a.group == b.group) {
            let group = run[0].group;
            let Some(view) = self.host.local_view(group) else { continue };
            let time = group::clock(view).map_err(|error| HostError { group, error: error.into() })?;
            self.shared.clock.raise(time);
        }
        Ok(())
    }

    fn answer(&mut self, answer: Answer<M::Effect>, tell: bool) {
        let result = match answer.applied {
            GroupApplied::Ran(outcome) => {
                if tell && !outcome.effects.is_empty() {
                    (self.on_event)(Event::Effects(answer.group, outcome.effects));
                }
                Ok(Applied::Reply(outcome.reply))
            }
            GroupApplied::Repeated(reply) => Ok(Applied::Reply(reply)),
            GroupApplied::Stale => Ok(Applied::Stale),
            GroupApplied::Malformed => Err(ConsensusError::Storage("a malformed entry".to_owned())),
        };
        if let Some((_, bytes, waiting)) = answer.proposal.and_then(|proposal| self.waiting.remove(&proposal))
        {
            self.proposed_bytes -= bytes;
            let _ = waiting.send(result);
        }
    }

    // ---- now and then ----

    /// Gives back log space in a thread of its own; one at a time.
    fn purge(&mut self) {
        if self.purging.as_ref().is_some_and(|purging| !purging.is_finished()) {
            return;
        }
        let log = Arc::clone(self.host.log());
        let purging = std::thread::Builder::new().name(format!("{}-log-purge", self.name)).spawn(move || {
            if let Err(error) = log.purge() {
                tracing::warn!(%error, "log space could not be given back");
            }
        });
        self.purging = purging.ok();
    }

    /// Changes of the state that have been in memory long enough.
    fn write_state(&mut self) -> Result<(), HostError> {
        let written = self.host.state_mut().write_due(Instant::now());
        written.map_err(|error| HostError { group: GroupId(0), error })
    }

    fn gauges(&mut self) {
        if self.gauges_at.is_some_and(|at| at.elapsed() < GAUGES_INTERVAL) {
            return;
        }
        self.gauges_at = Some(Instant::now());
        let (mut groups, mut asleep) = (0, 0);
        for status in self.host.groups().filter_map(|id| self.host.status(id)) {
            groups += 1;
            asleep += usize::from(status.asleep);
        }
        metrics::gauge!("eggs_consensus_groups", "host" => self.name).set(f64::from(groups));
        metrics::gauge!("eggs_consensus_groups_asleep", "host" => self.name).set(asleep as f64);
        metrics::gauge!("eggs_consensus_proposed_bytes", "host" => self.name).set(self.proposed_bytes as f64);
        metrics::gauge!("eggs_consensus_clock_offset_seconds", "host" => self.name)
            .set(self.host.clock_offset() as f64 / 1e9);
    }

    // ---- stopping ----

    /// Gives each group led here to a voter that is there and has its log.
    fn hand_over(&mut self) {
        self.host.leave();
    }

    /// Nothing waits here that could still be answered, and nothing is led that others could lead.
    fn may_stop(&self, latest: Instant) -> bool {
        let replicated =
            |id: &GroupId| self.host.status(*id).is_some_and(|status| status.membership.voters.len() > 1);
        let done = self.waiting.is_empty()
            && self.reads.is_empty()
            && self.requests.is_empty()
            && !self.host.has_entries()
            && !self.led.iter().any(replicated);
        done || Instant::now() >= latest
    }

    /// Nobody waits for ever.
    pub(crate) fn end(&mut self) {
        self.shared.inbox.close();
        self.shared.stopped.cancel();
        self.requests.clear();
        for (_, (_, _, answer)) in std::mem::take(&mut self.waiting) {
            let _ = answer.send(Err(ConsensusError::Stopped));
        }
        for waiting in self.reads.take_all() {
            waiting.reading.finish(Err(ConsensusError::Stopped));
        }
    }

    pub(crate) fn close(self) -> Result<(), HostError> {
        if let Some(purging) = self.purging {
            let _ = purging.join();
        }
        let (_, state, _) = self.host.into_stores();
        state.close().map_err(|error| HostError { group: GroupId(0), error })
    }
}

/// Puts what is to be sent into the outbox; `unsent`: the stores it has no room for.
fn sending<'a>(
    outbox: &'a mut Outbox,
    unsent: &'a mut BTreeSet<StoreId>,
) -> impl FnMut(StoreId, PeerBatch) + 'a {
    |store, batch| {
        if !outbox.send(store, batch) {
            unsent.insert(store);
        }
    }
}
