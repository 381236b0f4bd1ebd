//! The consensus thread: drain the inbox, turn, answer.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use eggs_consensus_core::{
    Answer, GroupId, Host, HostError, Proposal, ProposalId, ProposeError, StorageError,
};
use eggs_machine::group::{self, Applied as GroupApplied};
use eggs_machine::{Machine, Table};
use tokio::sync::{mpsc, watch};

use crate::handle::{Applied, ConsensusError, Handle, Message, Prepare, SharedClock, Views, WriteAnswer};
use crate::log_files::LogFiles;
use crate::sled_state::SledState;
use crate::snapshot_files::SnapshotFiles;

/// Requests waiting for the thread; more are answered `Busy`.
const INBOX_MAX: usize = 4096;
/// Requests taken in before a turn: bounds the length of a turn.
const REQUESTS_PER_TURN: usize = 512;
/// Bytes of commands taken in before a turn: they become one write of the log, which must stay below
/// 2 GiB in raft-engine, and one batch of the state.
const BYTES_PER_TURN: usize = 64 << 20;
/// How often a snapshot being synced is looked at.
const SEALING_PAUSE: Duration = Duration::from_millis(1);

type FileHost<M> = Host<M, LogFiles, SledState, SnapshotFiles>;

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// For the thread's name and the metrics' label: "shard", "crossdir", "shuckle".
    pub name: &'static str,
    /// Exists and belongs to this process.
    pub directory: PathBuf,
    /// Ids up to 65,534.
    pub groups: Vec<GroupId>,
}

/// Owns the consensus thread.
pub struct Runner {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Runner")
    }
}

/// Opens the groups, brings their state up to the log, and runs them in a thread of their own.
///
/// `on_effects` is called on that thread with what applied commands ask for, in order; it must not
/// block.
///
/// # Errors
/// When the files cannot be opened, or hold what cannot be rebuilt.
pub fn spawn<M>(
    options: &Options,
    machine: impl Fn(GroupId) -> M,
    on_effects: impl FnMut(GroupId, Vec<M::Effect>) + Send + 'static,
) -> Result<(Handle, Runner), ConsensusError>
where
    M: Machine + Send + 'static,
{
    let host = open(options, &machine).map_err(|error| ConsensusError::Storage(error.to_string()))?;
    let clock = Arc::new(SharedClock::default());
    for &id in &options.groups {
        if let Some(view) = host.view(id) {
            let time = group::clock(view).map_err(|error| ConsensusError::Storage(error.to_string()))?;
            clock.raise(time);
        }
    }
    if !host.rebuilt().is_empty() {
        tracing::warn!(
            host = options.name,
            groups = host.rebuilt().len(),
            "state rebuilt from snapshots and log"
        );
    }
    let (sender, inbox) = mpsc::channel(INBOX_MAX);
    let (stopped_sender, stopped) = watch::channel(None);
    let handle = Handle { sender, clock: Arc::clone(&clock), stopped };
    let name = options.name;
    let thread = std::thread::Builder::new()
        .name(format!("{name}-consensus"))
        .spawn(move || {
            let mut turner = Turner {
                name,
                host,
                clock,
                waiting: BTreeMap::new(),
                on_effects,
                purging: None,
                proposed_bytes: 0,
            };
            let result = turner.run(inbox);
            let result = result.and_then(|()| turner.close());
            if let Err(error) = &result {
                tracing::error!(host = name, %error, "consensus stopped: storage failed");
            }
            let _ =
                stopped_sender.send(Some(result.err().map(|error| error.to_string()).unwrap_or_default()));
        })
        .map_err(|error| ConsensusError::Storage(format!("cannot start a thread: {error}")))?;
    Ok((handle.clone(), Runner { handle, thread: Some(thread) }))
}

impl Runner {
    /// Lets what was accepted finish, makes the state durable, and joins the thread. Blocks for as
    /// long as that takes.
    pub fn stop(mut self) {
        self.join();
    }

    fn join(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let mut stop = Message::Stop;
        // A full inbox empties within a turn or two.
        while let Err(mpsc::error::TrySendError::Full(again)) = self.handle.sender.try_send(stop) {
            stop = again;
            std::thread::yield_now();
        }
        let _ = thread.join();
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.join();
    }
}

fn open<M: Machine>(options: &Options, machine: &impl Fn(GroupId) -> M) -> Result<FileHost<M>, StorageError> {
    let directory = &options.directory;
    // The truth first, and on its own: trouble with it must never touch the state, which may be all
    // that is left of what it lost.
    let mut log = LogFiles::open(&directory.join("log"))?;
    let mut rebuilding = false;
    loop {
        let snapshots = SnapshotFiles::open(directory.join("snapshots"))?;
        let why = match open_state(directory, &options.groups) {
            Ok(state) => match open_host(options, machine, log, snapshots, state) {
                Ok(host) => return Ok(host),
                Err(error) if !error.is_of_state() => return Err(error),
                Err(error) => {
                    log = LogFiles::open(&directory.join("log"))?;
                    error
                }
            },
            Err(error) => error,
        };
        if rebuilding {
            return Err(why);
        }
        rebuilding = true;
        tracing::warn!(path = %directory.join("state").display(), error = %why, "state cannot be used: putting it aside and rebuilding it from snapshots and log");
        SledState::put_aside(directory)?;
    }
}

/// The state, every page of which can be read. sled can panic on damaged files instead of saying so.
fn open_state(directory: &Path, groups: &[GroupId]) -> Result<SledState, StorageError> {
    let opened = catch_panic(AssertUnwindSafe(|| {
        let state = SledState::open(directory, groups)?;
        state.read_all()?;
        Ok(state)
    }));
    opened.unwrap_or_else(|()| Err(StorageError::of_state("sled panicked")))
}

fn open_host<M: Machine>(
    options: &Options,
    machine: &impl Fn(GroupId) -> M,
    log: LogFiles,
    snapshots: SnapshotFiles,
    state: SledState,
) -> Result<FileHost<M>, StorageError> {
    let machines = options.groups.iter().map(|&id| (id, machine(id)));
    let failed = |error: HostError| {
        let what = error.to_string();
        if error.error.is_of_state() { StorageError::of_state(what) } else { StorageError::new(what) }
    };
    let mut host = Host::open(machines, log, state, snapshots).map_err(failed)?;
    while host.has_entries() {
        host.turn().map_err(failed)?;
    }
    Ok(host)
}

/// Runs `f` with panics caught and not reported: the process's panic hook may end the process.
fn catch_panic<R>(f: impl FnOnce() -> R + std::panic::UnwindSafe) -> Result<R, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = std::panic::catch_unwind(f);
    std::panic::set_hook(hook);
    result.map_err(drop)
}

struct Turner<M: Machine, F> {
    name: &'static str,
    host: FileHost<M>,
    clock: Arc<SharedClock>,
    waiting: BTreeMap<ProposalId, WriteAnswer>,
    on_effects: F,
    purging: Option<JoinHandle<()>>,
    /// Since the last turn.
    proposed_bytes: usize,
}

impl<M, F> Turner<M, F>
where
    M: Machine + Send + 'static,
    F: FnMut(GroupId, Vec<M::Effect>),
{
    fn run(&mut self, mut inbox: mpsc::Receiver<Message>) -> Result<(), HostError> {
        loop {
            // Rest is rest: without work the thread sleeps until somebody asks.
            if !self.host.has_work() {
                match inbox.blocking_recv() {
                    None => break,
                    Some(message) => {
                        if !self.take(message) {
                            break;
                        }
                    }
                }
            }
            let mut taken = 0;
            while taken < REQUESTS_PER_TURN && self.proposed_bytes < BYTES_PER_TURN {
                let Ok(message) = inbox.try_recv() else { break };
                if !self.take(message) {
                    return self.drain(inbox);
                }
                taken += 1;
            }
            if taken == 0 && self.host.is_sealing() {
                // Another thread syncs the snapshot; nothing else is to be done.
                std::thread::sleep(SEALING_PAUSE);
            }
            self.turn()?;
        }
        self.drain(inbox)
    }

    /// Refuses what comes, finishes what was taken in.
    fn drain(&mut self, mut inbox: mpsc::Receiver<Message>) -> Result<(), HostError> {
        inbox.close();
        while self.host.has_entries() {
            self.turn()?;
        }
        Ok(())
    }

    /// False: stop.
    fn take(&mut self, message: Message) -> bool {
        match message {
            Message::Write { group, session, sequence, prepare, answer } => {
                if let Some(now) = self.write(group, session, sequence, prepare, answer) {
                    let (answer, result) = now;
                    let _ = answer.send(result);
                }
            }
            Message::Read(read) => {
                let host = &self.host;
                let view = |id| host.view(id).map(|table| table as &dyn Table);
                read(&Views { view: &view }, self.clock.now());
            }
            Message::Status(answer) => {
                let _ = answer.send(self.host.groups().filter_map(|id| self.host.status(id)).collect());
            }
            Message::Snapshot(group) => self.host.request_snapshot(group),
            Message::Stop => return false,
        }
        true
    }

    /// What can be answered at once comes back.
    fn write(
        &mut self,
        id: GroupId,
        session: eggs_proto::SessionId,
        sequence: u64,
        prepare: Prepare,
        answer: WriteAnswer,
    ) -> Option<(WriteAnswer, Result<Applied, ConsensusError>)> {
        let Some(view) = self.host.view(id) else { return Some((answer, Err(ConsensusError::NotLeader))) };
        if session.0 != 0 {
            match group::repeated(view, session, sequence) {
                Ok(Some(reply)) => return Some((answer, Ok(Applied::Reply(reply)))),
                Ok(None) => {}
                Err(error) => return Some((answer, Err(ConsensusError::Storage(error.to_string())))),
            }
        }
        let time = self.clock.now();
        let command = match prepare(view, time) {
            Ok(command) => command,
            Err(refusal) => return Some((answer, Ok(Applied::Refused(refusal)))),
        };
        self.proposed_bytes += command.len();
        match self.host.propose(id, Proposal { time, session, sequence, command }) {
            Ok(proposal) => {
                self.waiting.insert(proposal, answer);
                None
            }
            Err(ProposeError::Busy) => Some((answer, Err(ConsensusError::Busy))),
            Err(ProposeError::NotLeader | ProposeError::UnknownGroup) => {
                Some((answer, Err(ConsensusError::NotLeader)))
            }
        }
    }

    fn turn(&mut self) -> Result<(), HostError> {
        let started = Instant::now();
        let truncations = self.host.truncations();
        self.proposed_bytes = 0;
        let answers = self.host.turn()?;
        if let Some(error) = self.host.take_snapshot_failure() {
            tracing::warn!(host = self.name, %error, "a snapshot could not be taken: the log keeps growing until one can");
        }
        self.catch_up(&answers)?;
        if !answers.is_empty() {
            metrics::counter!("eggs_consensus_turns_total", "host" => self.name).increment(1);
            metrics::counter!("eggs_consensus_commands_total", "host" => self.name)
                .increment(answers.len() as u64);
            metrics::histogram!("eggs_consensus_turn_seconds", "host" => self.name)
                .record(started.elapsed().as_secs_f64());
        }
        for answer in answers {
            self.answer(answer);
        }
        if self.host.truncations() > truncations {
            self.purge();
        }
        Ok(())
    }

    /// A command's instant can be later than the clock was when it was proposed (those before it in the
    /// turn used instants too): whoever is told of it must not be told an earlier time with it.
    fn catch_up(&self, answers: &[Answer<M::Effect>]) -> Result<(), HostError> {
        for run in answers.chunk_by(|a, b| a.group == b.group) {
            let group = run[0].group;
            let Some(view) = self.host.view(group) else { continue };
            let time = group::clock(view).map_err(|error| HostError { group, error: error.into() })?;
            self.clock.raise(time);
        }
        Ok(())
    }

    fn answer(&mut self, answer: Answer<M::Effect>) {
        let waiting = answer.proposal.and_then(|proposal| self.waiting.remove(&proposal));
        let result = match answer.applied {
            GroupApplied::Ran(outcome) => {
                if !outcome.effects.is_empty() {
                    (self.on_effects)(answer.group, outcome.effects);
                }
                Ok(Applied::Reply(outcome.reply))
            }
            GroupApplied::Repeated(reply) => Ok(Applied::Reply(reply)),
            GroupApplied::Stale => Ok(Applied::Stale),
            GroupApplied::Malformed => Err(ConsensusError::Storage("a malformed entry".to_owned())),
        };
        if let Some(waiting) = waiting {
            let _ = waiting.send(result);
        }
    }

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

    fn close(self) -> Result<(), HostError> {
        if let Some(purging) = self.purging {
            let _ = purging.join();
        }
        let (_, state, _) = self.host.into_stores();
        state.close().map_err(|error| HostError { group: GroupId(0), error })
    }
}
