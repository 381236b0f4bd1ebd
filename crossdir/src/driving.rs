//! The task that owns the driver: makes one when this store comes to lead the coordinator, feeds it events in
//! order, performs its outputs, and drops it when this store leads no more.
//!
//! A driver knows nothing that the rows and the shards do not, so one can be dropped at any point and another
//! one made, here or elsewhere, in any number of terms. Callers that wait are told so: they ask whoever leads next, which
//! knows their call by session and sequence.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use eggs_consensus::{Applied, ConsensusError, Event as ConsensusEvent, GroupId, Handle, Role};
use eggs_crossdir_core::driver::RECORD_TIMEOUT;
use eggs_crossdir_core::{Driver, Effect, Input, Output};
use eggs_daemon::clock::Stopwatch;
use eggs_machine::TableError;
use eggs_proto::{SessionId, Time, TransactionId, pb};
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use crate::shards::Shards;

/// Transactions shown to whoever asks for a list.
const LIST_MAX: usize = 1000;
/// How long making a driver may take before it is tried again.
const RECOVER_MAX: Duration = Duration::from_secs(10);
/// Between tries.
const RECOVER_PAUSE: Duration = Duration::from_millis(100);
/// While there is something to drive, the task wakes at least this often …
const WAKE_INTERVAL: Duration = Duration::from_secs(1);
/// … and when it finds that it slept longer than this (the process was held, the machine was suspended), somebody else may
/// have led meanwhile: it goes on only with a driver made anew, which takes a quorum's word.
const HELD_MAX: Duration = Duration::from_secs(4);

/// What the task is told.
#[derive(Debug)]
pub(crate) enum Event {
    /// Effects of applied commands, and who leads; in the order it happened.
    Consensus(ConsensusEvent<Effect>),
    Input(Input),
    /// May one more like this begin?
    Admit(Box<pb::BeginTransaction>, oneshot::Sender<Result<(), pb::Error>>),
    /// Wait for the answer; `None` when the driver does not know the transaction (any more). Without an
    /// answer: this store does not lead, or leads no more.
    Wait(TransactionId, oneshot::Sender<Option<pb::CrossdirReply>>),
    /// What has become of a move; answered when it is certain. Without an answer: as of `Wait`.
    Resolve(TransactionId, oneshot::Sender<pb::ResolveMoveReply>),
    List(oneshot::Sender<Vec<pb::TransactionInfo>>),
}

/// What others see of the task.
#[derive(Debug, Clone)]
pub(crate) struct Driving {
    pub(crate) events: mpsc::UnboundedSender<Event>,
    /// Unfinished transactions, as of the task's last step; 0 when this store does not lead.
    pub(crate) unfinished: Arc<AtomicUsize>,
}

/// The group of the coordinator.
pub(crate) const GROUP: GroupId = GroupId::CROSSDIR;

/// Unbounded by itself: what comes in is bounded by the driver's admission (effects, waits) and by its
/// requests in flight (answers).
pub(crate) fn channel() -> (Driving, mpsc::UnboundedReceiver<Event>) {
    let (events, receiver) = mpsc::unbounded_channel();
    (Driving { events, unfinished: Arc::default() }, receiver)
}

/// Drives whenever this store leads, until the senders are gone or the state cannot be read.
pub(crate) async fn drive(
    mut events: mpsc::UnboundedReceiver<Event>,
    driving: Driving,
    consensus: Handle,
    shards: Shards,
) -> Result<(), String> {
    let mut task = Task {
        stopwatch: Stopwatch::start(),
        driver: None,
        recover_at: None,
        waiting: BTreeMap::new(),
        resolving: Vec::new(),
        driving,
        consensus,
        shards,
        tracker: TaskTracker::new(),
    };
    let mut awake = task.stopwatch.now();
    loop {
        let wake = task.until_wake();
        let event = tokio::select! {
            event = events.recv() => match event {
                Some(event) => event,
                None => return Ok(()),
            },
            () = tokio::time::sleep(wake.unwrap_or(Duration::MAX)), if wake.is_some() => Event::Input(Input::Tick),
        };
        let before = std::mem::replace(&mut awake, task.stopwatch.now());
        if wake.is_some() && task.driver.is_some() && awake.since(before) > HELD_MAX {
            task.make_anew();
        }
        task.on(event);
        if task.recover_at.is_some_and(|at| at <= task.stopwatch.now()) {
            task.recover().await?;
            awake = task.stopwatch.now();
        }
    }
}

struct Task {
    stopwatch: Stopwatch,
    /// While this store leads.
    driver: Option<Driver>,
    /// This store leads, and a driver is to be made.
    recover_at: Option<Time>,
    waiting: BTreeMap<TransactionId, Vec<oneshot::Sender<Option<pb::CrossdirReply>>>>,
    /// Those who met a move that is being decided.
    resolving: Vec<(TransactionId, oneshot::Sender<pb::ResolveMoveReply>)>,
    driving: Driving,
    consensus: Handle,
    shards: Shards,
    tracker: TaskTracker,
}

impl Task {
    fn until_wake(&self) -> Option<Duration> {
        let now = self.stopwatch.now();
        let driver = self.driver.as_ref().filter(|driver| !driver.is_idle());
        let due = driver.map(|driver| {
            driver.next_deadline().map_or(WAKE_INTERVAL, |at| at.since(now)).min(WAKE_INTERVAL)
        });
        let recover = self.recover_at.map(|at| at.since(now));
        due.into_iter().chain(recover).min()
    }

    fn on(&mut self, event: Event) {
        match event {
            Event::Consensus(ConsensusEvent::Role(GROUP, role)) => self.on_role(role),
            Event::Consensus(ConsensusEvent::Effects(GROUP, effects)) => {
                for effect in effects {
                    self.step(Input::Effect(effect));
                }
            }
            // There is no other group here.
            Event::Consensus(_) => {}
            Event::Input(input) => self.step(input),
            // Who asks without a driver hears nothing: the sender is dropped.
            Event::Admit(begin, answer) => {
                if let Some(driver) = &self.driver {
                    let _ = answer.send(driver.admit(&begin));
                }
            }
            Event::Wait(transaction, answer) => self.wait(transaction, answer),
            Event::Resolve(transaction, answer) => {
                if let Some(driver) = &self.driver {
                    match driver.resolve(transaction).reply() {
                        Some(reply) => drop(answer.send(reply)),
                        None => self.resolving.push((transaction, answer)),
                    }
                }
            }
            Event::List(answer) => {
                if let Some(driver) = &self.driver {
                    let _ = answer.send(driver.list(LIST_MAX));
                }
            }
        }
    }

    fn on_role(&mut self, role: Role) {
        match role {
            // Another term: what happened between the two is in the rows only.
            Role::Leader { term } => {
                tracing::debug!(term, "this store leads the coordinator");
                self.make_anew();
            }
            Role::Follower { .. } | Role::Removed => {
                if self.driver.is_some() {
                    tracing::debug!("this store leads the coordinator no more");
                }
                self.drop_driver();
                self.recover_at = None;
            }
        }
    }

    fn make_anew(&mut self) {
        self.drop_driver();
        self.recover_at = Some(self.stopwatch.now());
    }

    fn drop_driver(&mut self) {
        self.driver = None;
        // They ask whoever leads.
        self.waiting.clear();
        self.resolving.clear();
        self.driving.unfinished.store(0, Ordering::Relaxed);
    }

    /// A driver from the rows as a quorum knows them, once no earlier driver's decisions are recorded any more. What is
    /// applied between that and now comes as effects: those that the rows have already do no harm (the driver's first
    /// rule). When the roles that are still to be heard say otherwise, it is dropped again.
    async fn recover(&mut self) -> Result<(), String> {
        let now = self.stopwatch.now();
        let consensus = self.consensus.clone();
        let take_over = Bytes::from(Driver::take_over().encode_to_vec());
        let read = async move {
            let taken = consensus.write(GROUP, SessionId(0), 0, move |_, _| Ok(take_over)).await?;
            let number = number_of(taken);
            let view = consensus
                .read(vec![GROUP], move |views, _| views.get(GROUP).map(|view| Driver::recover(view, now)));
            let mine = |made: &Result<(Driver, _), TableError>| {
                made.as_ref().map_or(true, |(driver, _)| Some(driver.number()) == number)
            };
            // Otherwise there has been another one since.
            view.await.map(|made| made.filter(mine))
        };
        let recovered: Option<Result<_, TableError>> = match tokio::time::timeout(RECOVER_MAX, read).await {
            Ok(Ok(recovered)) => recovered,
            Ok(Err(
                error @ (ConsensusError::Stopped | ConsensusError::Storage(_) | ConsensusError::Damaged(_)),
            )) => {
                return Err(error.to_string());
            }
            // Not confirmed: the next role says more, or the next try.
            Ok(Err(ConsensusError::NotLeader { .. } | ConsensusError::Busy)) | Err(_) => None,
        };
        match recovered {
            Some(recovered) => {
                let (driver, outputs) = recovered.map_err(|error| error.to_string())?;
                self.recover_at = None;
                self.driver = Some(driver);
                self.perform(outputs);
            }
            None => self.recover_at = Some(self.stopwatch.now().saturating_add(RECOVER_PAUSE)),
        }
        Ok(())
    }

    fn step(&mut self, input: Input) {
        let Some(driver) = &mut self.driver else { return };
        let outputs = driver.step(input, self.stopwatch.now());
        self.perform(outputs);
        self.resolve();
    }

    /// Answers those who wait for a move that is decided by now.
    fn resolve(&mut self) {
        let Some(driver) = &self.driver else { return };
        let decided = self.resolving.extract_if(.., |(transaction, answer)| {
            answer.is_closed() || driver.resolve(*transaction).reply().is_some()
        });
        for (transaction, answer) in decided {
            if let Some(reply) = driver.resolve(transaction).reply() {
                let _ = answer.send(reply);
            }
        }
    }

    fn wait(&mut self, transaction: TransactionId, answer: oneshot::Sender<Option<pb::CrossdirReply>>) {
        let Some(driver) = &self.driver else { return };
        if let Some(reply) = driver.reply(transaction) {
            let _ = answer.send(Some(reply.clone()));
        } else if driver.is_running(transaction) {
            let waiting = self.waiting.entry(transaction).or_default();
            // A caller that asks again has given up its earlier wait.
            waiting.retain(|waiting| !waiting.is_closed());
            waiting.push(answer);
        } else {
            let _ = answer.send(None);
        }
    }

    fn perform(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::SendWrite { shard, op, tag } => {
                    let (shards, events) = (self.shards.clone(), self.driving.events.clone());
                    self.tracker.spawn(async move {
                        let received = shards.write(shard, op).await;
                        let _ = events.send(Event::Input(Input::Write { tag, received }));
                    });
                }
                Output::SendStat { inode, tag } => {
                    let (shards, events) = (self.shards.clone(), self.driving.events.clone());
                    self.tracker.spawn(async move {
                        let received = shards.stat(inode).await;
                        let _ = events.send(Event::Input(Input::Stat { tag, received }));
                    });
                }
                Output::Propose(command) => {
                    let consensus = self.consensus.clone();
                    let command = Bytes::from(command.encode_to_vec());
                    self.tracker.spawn(async move {
                        // Lost proposals are made again after a while; the effect says which came through.
                        let proposed = consensus.write(GROUP, SessionId(0), 0, move |_, _| Ok(command));
                        if let Ok(Err(error)) = tokio::time::timeout(RECORD_TIMEOUT, proposed).await {
                            tracing::debug!(%error, "could not record the ends of transactions");
                        }
                    });
                }
                Output::Answer { transaction, reply } => {
                    for waiting in self.waiting.remove(&transaction).unwrap_or_default() {
                        let _ = waiting.send(Some(reply.clone()));
                    }
                }
                Output::Replaced => return self.make_anew(),
            }
        }
        let unfinished = self.driver.as_ref().map_or(0, Driver::unfinished);
        self.driving.unfinished.store(unfinished, Ordering::Relaxed);
    }
}

/// Of the driver that is to be made.
fn number_of(taken: Applied) -> Option<u64> {
    let Applied::Reply(reply) = taken else { return None };
    pb::TransactionAccepted::decode(reply).ok().map(|accepted| accepted.driver)
}
