//! From a request to its answer; knows nothing of the transport.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_consensus::{Applied, ConsensusError, Handle};
use eggs_crossdir_core::driver::QUEUE_MAX;
use eggs_crossdir_core::{Answer as Known, prepare};
use eggs_daemon::space::Space;
use eggs_machine::Table;
use eggs_proto::limits::{
    PROTOCOL_VERSION, SLOW_TRANSACTION, SLOW_TRANSACTIONS_MAX, TRANSACTION_STEP_BYTES_MAX,
};
use eggs_proto::pb::begin_transaction::Op as Intent;
use eggs_proto::pb::crossdir_reply::Result as Answer;
use eggs_proto::pb::crossdir_request::Op;
use eggs_proto::{ClusterId, CrossdirError, ServiceError, SessionId, Time, TransactionId, pb};
use eggs_replica::{InFlight, Quorum};
use prost::Message;
use tokio::sync::oneshot;

use crate::driving::{Driving, Event, GROUP};
use crate::shards::Shards;

/// How long one request waits for its transaction; then the caller is told to ask again.
const WAIT_MAX: Duration = Duration::from_secs(10);
/// What cannot be agreed on by then is answered all the same, with words for why: clients have more patience than that.
const AGREE_MAX: Duration = Duration::from_secs(5);
/// A heartbeat does not wait longer to hear of the transactions.
const LIST_MAX: Duration = Duration::from_millis(100);

/// What every request needs; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Handler {
    pub(crate) consensus: Handle,
    pub(crate) driving: Driving,
    /// Set once the cluster is known.
    pub(crate) joined: Arc<OnceLock<(ClusterId, Shards)>>,
    /// Of the disk that holds the coordinator's data.
    pub(crate) space: Arc<Space>,
    pub(crate) quorum: Arc<Quorum>,
    /// Counts new directories, so that they go round the shards.
    pub(crate) made: Arc<AtomicU64>,
}

impl Handler {
    /// Answers one request; every failure is an answer too.
    pub(crate) async fn call(&self, request: pb::CrossdirRequest) -> pb::CrossdirReply {
        let started = Instant::now();
        let op = request.op.as_ref().map_or("none", op_name);
        let result = match self.answer(request).await {
            Ok(answer) => answer,
            Err(error) => Answer::Error(error),
        };
        let outcome = if matches!(result, Answer::Error(_)) { "error" } else { "ok" };
        metrics::histogram!("eggs_crossdir_request_seconds", "op" => op, "outcome" => outcome)
            .record(started.elapsed().as_secs_f64());
        let header = pb::ReplyHeader { version: PROTOCOL_VERSION, time: self.consensus.now().0 };
        pb::CrossdirReply { header: Some(header), result: Some(result) }
    }

    async fn answer(&self, request: pb::CrossdirRequest) -> Result<Answer, pb::Error> {
        let header =
            request.header.ok_or_else(|| CrossdirError::Malformed.with("a request without header"))?;
        let shards = self.admit(&header)?;
        match request.op.ok_or_else(|| CrossdirError::Malformed.with("a request without operation"))? {
            Op::ListTransactions(_) => {
                let transactions = self.ask(Event::List).await?;
                Ok(Answer::ListTransactions(pb::ListTransactionsReply { transactions }))
            }
            Op::ResolveMove(op) => self.resolve(TransactionId(op.transaction)).await.map(Answer::ResolveMove),
            op => self.transaction(op, SessionId(header.session), header.sequence, shards).await,
        }
    }

    /// What heartbeats tell of the transactions.
    pub(crate) async fn in_flight(&self) -> InFlight {
        let unfinished = self.driving.unfinished.load(Ordering::Relaxed);
        if unfinished == 0 {
            return InFlight::default();
        }
        let (answer, answered) = oneshot::channel();
        // Without an answer it leads no more; or it is busy, and tells it next time.
        let _ = self.driving.events.send(Event::List(answer));
        let slow = tokio::time::timeout(LIST_MAX, answered).await;
        let mut slow = slow.ok().and_then(Result::ok).unwrap_or_default();
        let now = self.consensus.now();
        slow.retain(|info| !info.finished && now.since(Time(info.started_at)) > SLOW_TRANSACTION);
        slow.truncate(SLOW_TRANSACTIONS_MAX);
        for info in &mut slow {
            info.step.truncate(info.step.floor_char_boundary(TRANSACTION_STEP_BYTES_MAX));
        }
        InFlight { transactions: u32::try_from(unfinished).unwrap_or(u32::MAX), slow }
    }

    fn admit(&self, header: &pb::RequestHeader) -> Result<&Shards, pb::Error> {
        if header.version != PROTOCOL_VERSION {
            let versions = format!("version {} (this host speaks {PROTOCOL_VERSION})", header.version);
            return Err(CrossdirError::UnsupportedVersion.with(versions));
        }
        let Some((cluster_id, shards)) = self.joined.get() else {
            return Err(CrossdirError::Busy.with("the coordinator has not joined the cluster yet"));
        };
        if header.cluster_id != cluster_id.0[..] {
            return Err(CrossdirError::WrongCluster.with(format_args!("this is cluster {cluster_id}")));
        }
        if !self.consensus.observe(Time(header.time)) {
            return Err(CrossdirError::ClockAhead.bare());
        }
        Ok(shards)
    }

    async fn transaction(
        &self,
        op: Op,
        session: SessionId,
        sequence: u64,
        shards: &Shards,
    ) -> Result<Answer, pb::Error> {
        if self.space.is_almost_full() && matches!(op, Op::Mkdir(_) | Op::MkdirPath(_)) {
            return Err(CrossdirError::NoSpace.with("the coordinator"));
        }
        // No queue can be longer than all that is unfinished: only then is it worth asking.
        if self.driving.unfinished.load(Ordering::Relaxed) >= QUEUE_MAX {
            let begin = Box::new(pb::BeginTransaction { op: intent(&op), ..pb::BeginTransaction::default() });
            self.ask(|answer| Event::Admit(begin, answer)).await??;
        }
        let counter = self.made.fetch_add(1, Ordering::Relaxed);
        let alive = shards.alive();
        let prepare = move |view: &dyn Table, now: Time| {
            // The instant the command will get is later than all before it, whatever the clock here says.
            let now = now.max(eggs_machine::group::clock(view).unwrap_or(now));
            match prepare(view, &op, session, sequence, now, &alive, counter) {
                Ok(command) => Ok(Bytes::from(command.encode_to_vec())),
                Err(error) => Err(Bytes::from(error.encode_to_vec())),
            }
        };
        // The machine keeps the sessions itself: a call's answer comes long after its entry.
        let written = self.consensus.write(GROUP, SessionId(0), 0, prepare);
        let accepted = match self.agreed(written).await? {
            Applied::Reply(reply) => {
                pb::TransactionAccepted::decode(reply).map_err(|error| internal(&error))?
            }
            Applied::Refused(error) => {
                return Err(pb::Error::decode(error).unwrap_or_else(|error| internal(&error)));
            }
            Applied::Stale => return Err(CrossdirError::StaleSession.bare()),
        };
        if let Some(error) = accepted.error {
            return Err(error);
        }
        let transaction = TransactionId(accepted.transaction);
        let waited = self.ask(|answer| Event::Wait(transaction, answer));
        let reply = match tokio::time::timeout(WAIT_MAX, waited).await {
            Err(_) => {
                return Err(CrossdirError::InProgress.with(format_args!("transaction {}", transaction.0)));
            }
            Ok(reply) => match reply? {
                Some(reply) => reply,
                None => self.known(session, sequence).await?,
            },
        };
        reply.result.ok_or_else(|| internal(&"an answer without result"))
    }

    /// What has become of a move. This store leads at some moment after it was asked, so no other has decided
    /// something before that this driver does not know.
    async fn resolve(&self, transaction: TransactionId) -> Result<pb::ResolveMoveReply, pb::Error> {
        self.agreed(self.consensus.read(vec![GROUP], |_, _| ())).await?;
        let asked = self.ask(|answer| Event::Resolve(transaction, answer));
        match tokio::time::timeout(WAIT_MAX, asked).await {
            Ok(reply) => reply,
            Err(_) => Err(CrossdirError::InProgress
                .with(format_args!("transaction {} moves the name, and waits for a shard", transaction.0))),
        }
    }

    /// The answer to a call whose transaction is over and gone from the driver.
    async fn known(&self, session: SessionId, sequence: u64) -> Result<pb::CrossdirReply, pb::Error> {
        let read = self.consensus.read(vec![GROUP], move |views, _| {
            views.get(GROUP).map(|view| eggs_crossdir_core::answer(view, session, sequence))
        });
        let Some(known) = self.agreed(read).await? else { return Err(self.not_leader(None).await) };
        match known.map_err(|error| internal(&error))? {
            Known::Done(_, reply) => Ok(reply),
            Known::Stale => Err(CrossdirError::StaleSession.bare()),
            // The driver is being made anew.
            Known::InProgress(_) | Known::Unknown => Err(CrossdirError::InProgress.bare()),
        }
    }

    /// The driving task's answer; it has none when this store does not lead, or leads no more.
    async fn ask<R>(&self, event: impl FnOnce(oneshot::Sender<R>) -> Event) -> Result<R, pb::Error> {
        let (answer, answered) = oneshot::channel();
        if self.driving.events.send(event(answer)).is_err() {
            return Err(CrossdirError::Busy.with("the daemon is stopping"));
        }
        match answered.await {
            Ok(answer) => Ok(answer),
            Err(_) if self.consensus.leader(GROUP) == Some(self.consensus.store()) => {
                Err(CrossdirError::Busy.with("the coordinator takes up what is unfinished"))
            }
            Err(_) => Err(self.not_leader(None).await),
        }
    }

    /// What consensus answers, if it does in time, and else why not.
    async fn agreed<R>(
        &self,
        asked: impl Future<Output = Result<R, ConsensusError>>,
    ) -> Result<R, pb::Error> {
        match tokio::time::timeout(AGREE_MAX, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(ConsensusError::NotLeader { leader })) => Err(self.not_leader(leader).await),
            Ok(Err(error)) => Err(refused(error)),
            Err(_) => {
                let missing = self.quorum.missing(GROUP).await;
                let why = missing.unwrap_or_else(|| "its replicas do not agree in time".to_owned());
                // Whether it will happen yet is unknown; repeated, it happens once.
                Err(CrossdirError::Busy.with(format_args!("the coordinator: {why}")))
            }
        }
    }

    /// Names who leads, as far as is known here, or why nobody does.
    async fn not_leader(&self, leader: Option<String>) -> pb::Error {
        let error = CrossdirError::NotLeader.bare();
        if let Some(why) = self.quorum.unled(GROUP).await {
            return pb::Error { message: format!("the coordinator: {why}"), ..error };
        }
        let leader = leader.or_else(|| self.consensus.leader_address(GROUP)).unwrap_or_default();
        pb::Error { leader, ..error }
    }
}

fn intent(op: &Op) -> Option<Intent> {
    match op {
        Op::Mkdir(op) => Some(Intent::Mkdir(op.clone())),
        Op::Rmdir(op) => Some(Intent::Rmdir(op.clone())),
        Op::Move(op) => Some(Intent::Move(op.clone())),
        Op::MkdirPath(op) => Some(Intent::MkdirPath(op.clone())),
        Op::Exchange(op) => Some(Intent::Exchange(op.clone())),
        Op::UndeleteInode(op) => Some(Intent::UndeleteInode(op.clone())),
        Op::PurgeInode(op) => Some(Intent::PurgeInode(op.clone())),
        Op::ListTransactions(_) | Op::ResolveMove(_) => None,
    }
}

fn refused(error: ConsensusError) -> pb::Error {
    match error {
        ConsensusError::NotLeader { .. } => CrossdirError::NotLeader.bare(),
        ConsensusError::Busy => CrossdirError::Busy.bare(),
        ConsensusError::Stopped => CrossdirError::Busy.with("the daemon is stopping"),
        ConsensusError::Storage(error) | ConsensusError::Damaged(error) => internal(&error),
    }
}

fn internal(error: &dyn std::fmt::Display) -> pb::Error {
    tracing::error!(%error, "request failed");
    CrossdirError::Internal.with(error)
}

fn op_name(op: &Op) -> &'static str {
    match op {
        Op::Mkdir(_) => "mkdir",
        Op::Rmdir(_) => "rmdir",
        Op::Move(_) => "move",
        Op::MkdirPath(_) => "mkdir_path",
        Op::Exchange(_) => "exchange",
        Op::UndeleteInode(_) => "undelete_inode",
        Op::PurgeInode(_) => "purge_inode",
        Op::ListTransactions(_) => "list_transactions",
        Op::ResolveMove(_) => "resolve_move",
    }
}
