//! The task that owns the driver: feeds it events in order, performs its outputs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use eggs_consensus::{GroupId, Handle};
use eggs_crossdir_core::{Driver, Effect, Input, Output};
use eggs_daemon::clock::Stopwatch;
use eggs_machine::TableError;
use eggs_proto::{SessionId, TransactionId, pb};
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use crate::shards::Shards;

/// Transactions shown to whoever asks for a list.
const LIST_MAX: usize = 1000;

/// What the task is told.
#[derive(Debug)]
pub(crate) enum Event {
    Effects(Vec<Effect>),
    Input(Input),
    /// May one more like this begin?
    Admit(Box<pb::BeginTransaction>, oneshot::Sender<Result<(), pb::Error>>),
    /// Wait for the answer; `None` when the driver does not know the transaction (any more).
    Wait(TransactionId, oneshot::Sender<Option<pb::CrossdirReply>>),
    List(oneshot::Sender<Vec<pb::TransactionInfo>>),
}

/// What others see of the task.
#[derive(Debug, Clone)]
pub(crate) struct Driving {
    pub(crate) events: mpsc::UnboundedSender<Event>,
    /// Unfinished transactions, as of the task's last step.
    pub(crate) unfinished: Arc<AtomicUsize>,
}

/// The group of the coordinator.
pub(crate) const GROUP: GroupId = GroupId(256);

/// Unbounded by itself: what comes in is bounded by the driver's admission (effects, waits) and by its
/// requests in flight (answers).
pub(crate) fn channel() -> (Driving, mpsc::UnboundedReceiver<Event>) {
    let (events, receiver) = mpsc::unbounded_channel();
    (Driving { events, unfinished: Arc::default() }, receiver)
}

/// Drives until the senders are gone or the state cannot be read.
pub(crate) async fn drive(
    mut events: mpsc::UnboundedReceiver<Event>,
    driving: Driving,
    consensus: Handle,
    shards: Shards,
) -> Result<(), String> {
    let stopwatch = Stopwatch::start();
    let now = stopwatch.now();
    let recovered = consensus.read(move |views, _| {
        let view = views.get(GROUP).ok_or_else(|| TableError("the coordinator has no leader".to_owned()))?;
        Driver::recover(view, now)
    });
    let (driver, outputs) =
        recovered.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
    let tracker = TaskTracker::new();
    let mut task = Task { stopwatch, driver, waiting: BTreeMap::new(), driving, consensus, shards, tracker };
    task.perform(outputs);
    loop {
        let deadline = task.until_deadline();
        let event = tokio::select! {
            event = events.recv() => match event {
                Some(event) => event,
                None => return Ok(()),
            },
            () = tokio::time::sleep(deadline.unwrap_or(Duration::MAX)), if deadline.is_some() => Event::Input(Input::Tick),
        };
        task.on(event);
    }
}

struct Task {
    stopwatch: Stopwatch,
    driver: Driver,
    waiting: BTreeMap<TransactionId, Vec<oneshot::Sender<Option<pb::CrossdirReply>>>>,
    driving: Driving,
    consensus: Handle,
    shards: Shards,
    tracker: TaskTracker,
}

impl Task {
    fn until_deadline(&self) -> Option<Duration> {
        self.driver.next_deadline().map(|at| at.since(self.stopwatch.now()))
    }

    fn on(&mut self, event: Event) {
        match event {
            Event::Effects(effects) => {
                for effect in effects {
                    self.step(Input::Effect(effect));
                }
            }
            Event::Input(input) => self.step(input),
            Event::Admit(begin, answer) => {
                let _ = answer.send(self.driver.admit(&begin));
            }
            Event::Wait(transaction, answer) => self.wait(transaction, answer),
            Event::List(answer) => {
                let _ = answer.send(self.driver.list(LIST_MAX));
            }
        }
    }

    fn step(&mut self, input: Input) {
        let outputs = self.driver.step(input, self.stopwatch.now());
        self.perform(outputs);
    }

    fn wait(&mut self, transaction: TransactionId, answer: oneshot::Sender<Option<pb::CrossdirReply>>) {
        if let Some(reply) = self.driver.reply(transaction) {
            let _ = answer.send(Some(reply.clone()));
        } else if self.driver.is_running(transaction) {
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
                        let proposed = consensus.write(GROUP, SessionId(0), 0, move |_, _| Ok(command)).await;
                        if let Err(error) = proposed {
                            tracing::debug!(%error, "could not record the ends of transactions");
                        }
                    });
                }
                Output::Answer { transaction, reply } => {
                    for waiting in self.waiting.remove(&transaction).unwrap_or_default() {
                        let _ = waiting.send(Some(reply.clone()));
                    }
                }
            }
        }
        self.driving.unfinished.store(self.driver.unfinished(), Ordering::Relaxed);
    }
}
