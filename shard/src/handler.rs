//! From a request to its answer; knows nothing of the transport.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_consensus::{Applied, ConsensusError, GroupId, Handle, Views};
use eggs_daemon::Secret;
use eggs_daemon::space::Space;
use eggs_machine::{Table, TableError};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::shard_reply::Result as Answer;
use eggs_proto::pb::shard_request::Op;
use eggs_proto::{ClusterId, ServiceError, SessionId, ShardError, ShardId, Time, pb};
use eggs_replica::Quorum;
use eggs_shard_core::Cluster;
use prost::Message;
use tokio::sync::watch;

/// Walks of one request: a settled shard stays settled, but a walk may come to others then.
const WALKS_MAX: usize = 8;
/// What cannot be agreed on by then is answered all the same, with words for why: clients have more patience than that.
const AGREE_MAX: Duration = Duration::from_secs(5);

/// What every request needs; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Handler {
    pub(crate) consensus: Handle,
    pub(crate) secret: Secret,
    /// Set once the cluster is known.
    pub(crate) cluster_id: Arc<OnceLock<ClusterId>>,
    /// Of the disk that holds the shards.
    pub(crate) space: Arc<Space>,
    /// Block services as shuckle last told.
    pub(crate) cluster: watch::Receiver<Arc<Cluster>>,
    pub(crate) quorum: Arc<Quorum>,
}

impl Handler {
    /// Answers one request; every failure is an answer too.
    pub(crate) async fn call(&self, request: pb::ShardRequest) -> pb::ShardReply {
        let started = Instant::now();
        let op = request.op.as_ref().map_or("none", op_name);
        let result = match self.answer(request).await {
            Ok(answer) => answer,
            Err(error) => Answer::Error(error),
        };
        let outcome = if matches!(result, Answer::Error(_)) { "error" } else { "ok" };
        metrics::histogram!("eggs_shard_request_seconds", "op" => op, "outcome" => outcome)
            .record(started.elapsed().as_secs_f64());
        let header = pb::ReplyHeader { version: PROTOCOL_VERSION, time: self.consensus.now().0 };
        pb::ShardReply { header: Some(header), result: Some(result) }
    }

    async fn answer(&self, request: pb::ShardRequest) -> Result<Answer, pb::Error> {
        let header = request.header.ok_or_else(|| ShardError::Malformed.with("a request without header"))?;
        let authorized = self.admit(&header)?;
        let shard = ShardId::try_from(request.shard)
            .map_err(|shard| ShardError::Malformed.with(format_args!("shard {shard}")))?;
        let op = request.op.ok_or_else(|| ShardError::Malformed.with("a request without operation"))?;
        match op {
            Op::Write(write) => self.write(shard, &header, authorized, write).await,
            Op::Walk(walk) => self.walk(shard, walk).await,
            Op::Status(_) => self.status(shard).await,
            read if !authorized && eggs_shard_core::needs_secret(&read) => {
                Err(ShardError::Unauthorized.bare())
            }
            read => self.read(shard, read).await,
        }
    }

    /// Whether the request is for this cluster, in this protocol; true: from a daemon of it.
    fn admit(&self, header: &pb::RequestHeader) -> Result<bool, pb::Error> {
        if header.version != PROTOCOL_VERSION {
            let versions = format!("version {} (this host speaks {PROTOCOL_VERSION})", header.version);
            return Err(ShardError::UnsupportedVersion.with(versions));
        }
        let Some(cluster_id) = self.cluster_id.get() else {
            return Err(ShardError::Busy.with("the shards have not joined the cluster yet"));
        };
        if header.cluster_id != cluster_id.0[..] {
            return Err(ShardError::WrongCluster.with(format_args!("this is cluster {cluster_id}")));
        }
        if !self.consensus.observe(Time(header.time)) {
            return Err(ShardError::ClockAhead.bare());
        }
        Ok(self.secret.matches(&header.secret))
    }

    async fn write(
        &self,
        shard: ShardId,
        header: &pb::RequestHeader,
        authorized: bool,
        write: pb::Write,
    ) -> Result<Answer, pb::Error> {
        if self.space.is_almost_full() && !authorized && write.ops.iter().any(adds_data) {
            return Err(ShardError::NoSpace.with(format_args!("shard {shard}")));
        }
        let cluster = Arc::clone(&self.cluster.borrow());
        let prepare = {
            let cluster = Arc::clone(&cluster);
            move |view: &dyn Table, now: Time| {
                // The instant the command will get is later than all before it, whatever the clock here says.
                let now = now.max(eggs_machine::group::clock(view).unwrap_or(now));
                let command =
                    eggs_shard_core::prepare(shard, view, write, authorized, now, &mut entropy, &cluster);
                match command {
                    Ok(command) => Ok(Bytes::from(command.encode_to_vec())),
                    Err(error) => Err(Bytes::from(error.encode_to_vec())),
                }
            }
        };
        let session = SessionId(header.session);
        let written = self.consensus.write(shard.into(), session, header.sequence, prepare);
        match self.agreed(shard, written).await? {
            Applied::Reply(reply) => {
                let mut reply = pb::WriteReply::decode(reply).map_err(|error| internal(shard, &error))?;
                eggs_shard_core::sign(&mut reply, &cluster);
                if has_unsigned(&reply) {
                    // The same request is asked again; it is answered from its session then.
                    return Err(ShardError::Busy.with("the keys of the block services are not known yet"));
                }
                Ok(Answer::Write(reply))
            }
            Applied::Refused(error) => {
                Err(pb::Error::decode(error).unwrap_or_else(|error| internal(shard, &error)))
            }
            Applied::Stale => Err(ShardError::StaleSession.bare()),
        }
    }

    async fn walk(&self, shard: ShardId, walk: pb::Walk) -> Result<Answer, pb::Error> {
        let at = self.past(walk.at)?;
        if let Some(walked) = self.walk_locally(shard, &walk, at).await? {
            return Ok(walked);
        }
        // Once more when an instant had to be settled first.
        for _ in 0..WALKS_MAX {
            let walk = walk.clone();
            let read = self.consensus.read(vec![shard.into()], move |views, now| {
                let open = RefCell::new(BTreeSet::new());
                let view = |shard: ShardId| {
                    let view = views.get(shard.into())?;
                    if !is_settled(view, at) {
                        open.borrow_mut().insert(shard);
                    }
                    Some(view)
                };
                // A walk that begins where this host does not lead is sent on, not answered empty.
                view(shard)?;
                let walked = eggs_shard_core::walk(view, &walk, now);
                Some((walked, open.into_inner()))
            });
            let Some((walked, open)) = self.agreed(shard, read).await? else {
                return Err(self.not_leader(shard, None).await);
            };
            if open.is_empty() {
                return walked.map_err(|error| internal(shard, &error))?.map(Answer::Walk);
            }
            for open in open {
                self.settle(open).await?;
            }
        }
        Err(ShardError::Busy.with(format_args!("shard {shard}")))
    }

    /// A walk at an instant that is over for good where it begins: any replica's state will do, as far as
    /// it is (SH-12). It ends at the first shard of which there is no such state here.
    async fn walk_locally(
        &self,
        shard: ShardId,
        walk: &pb::Walk,
        at: Time,
    ) -> Result<Option<Answer>, pb::Error> {
        if at.is_unset() {
            return Ok(None);
        }
        let walk = walk.clone();
        let walked = self.consensus.local(move |views, now| {
            settled(views, shard, at)?;
            Some(eggs_shard_core::walk(|shard| settled(views, shard, at), &walk, now))
        });
        match self.agreed(shard, walked).await? {
            None => Ok(None),
            Some(walked) => walked.map_err(|error| internal(shard, &error))?.map(Answer::Walk).map(Some),
        }
    }

    async fn read(&self, shard: ShardId, op: Op) -> Result<Answer, pb::Error> {
        if let Op::List(list) = &op {
            let at = self.past(list.at)?;
            if !at.is_unset() {
                return self.list_at(shard, op, at).await;
            }
        }
        // Garbage stays garbage (SH-17): who looks for it need not wake the group to hear of the newest.
        let may_be_old = matches!(op, Op::ListGarbage(_));
        let look = move |views: &Views<'_>, now| {
            Some(eggs_shard_core::read(shard, views.get(shard.into())?, &op, now))
        };
        let answer: Option<Result<Answer, TableError>> = if may_be_old {
            self.agreed(shard, self.consensus.local(look)).await?
        } else {
            self.agreed(shard, self.consensus.read(vec![shard.into()], look)).await?
        };
        match answer {
            None => Err(self.not_leader(shard, None).await),
            Some(answer) => answer.map(|answer| self.signed(answer)).map_err(|error| internal(shard, &error)),
        }
    }

    fn signed(&self, mut answer: Answer) -> Answer {
        if let Answer::ListGarbage(garbage) = &mut answer {
            eggs_shard_core::sign_garbage(garbage, &self.cluster.borrow());
        }
        answer
    }

    /// A listing at an instant: settled first, by the leader, when it is not over for good yet.
    async fn list_at(&self, shard: ShardId, op: Op, at: Time) -> Result<Answer, pb::Error> {
        for attempt in 0..2 {
            let op = op.clone();
            let listed = self.consensus.local(move |views, now| {
                settled(views, shard, at).map(|view| eggs_shard_core::read(shard, view, &op, now))
            });
            let answer: Option<Result<Answer, TableError>> = self.agreed(shard, listed).await?;
            match answer {
                Some(answer) => return answer.map_err(|error| internal(shard, &error)),
                None if attempt == 0 => self.settle(shard).await?,
                None => {}
            }
        }
        Err(ShardError::Busy.with(format_args!("shard {shard}")))
    }

    /// The instant a read looks at, when it has come.
    fn past(&self, at: u64) -> Result<Time, pb::Error> {
        if Time(at) > self.consensus.now() {
            return Err(ShardError::Malformed.with("that instant has not come yet"));
        }
        Ok(Time(at))
    }

    /// Moves the shard's own clock to now for good, by an empty command: no write that is on its way, nor
    /// one after a crash, can get an earlier instant from then on (SH-12).
    async fn settle(&self, shard: ShardId) -> Result<(), pb::Error> {
        let empty = Bytes::from(pb::ShardCommand::default().encode_to_vec());
        let written = self.consensus.write(shard.into(), SessionId(0), 0, move |_, _| Ok(empty));
        self.agreed(shard, written).await.map(drop)
    }

    async fn status(&self, shard: ShardId) -> Result<Answer, pb::Error> {
        let all = self.consensus.status().await;
        let led = all.into_iter().find(|status| status.group == GroupId::from(shard) && status.leader);
        let Some(status) = led else { return Err(self.not_leader(shard, None).await) };
        Ok(Answer::Status(pb::ShardStatusReply {
            applied_index: status.applied_index,
            term: status.term,
            state_hash: Bytes::copy_from_slice(&status.state_hash.to_bytes()),
            log_bytes: status.log_bytes,
            snapshot_index: status.snapshot_index,
            leader: self.consensus.store().0,
            committed_index: status.committed_index,
            membership: Some((&status.membership).into()),
        }))
    }

    /// What consensus answers, if it does in time, and else why not.
    async fn agreed<R>(
        &self,
        shard: ShardId,
        asked: impl Future<Output = Result<R, ConsensusError>>,
    ) -> Result<R, pb::Error> {
        match tokio::time::timeout(AGREE_MAX, asked).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(ConsensusError::NotLeader { leader })) => Err(self.not_leader(shard, leader).await),
            Ok(Err(error)) => Err(refused(shard, error)),
            Err(_) => {
                let missing = self.quorum.missing(shard.into()).await;
                let why = missing.unwrap_or_else(|| "its replicas do not agree in time".to_owned());
                // Whether it will happen yet is unknown; repeated, it happens once.
                Err(ShardError::Busy.with(format_args!("shard {shard}: {why}")))
            }
        }
    }

    /// Names who leads, as far as is known here, or why nobody does.
    async fn not_leader(&self, shard: ShardId, leader: Option<String>) -> pb::Error {
        let error = ShardError::NotLeader.with(format_args!("shard {shard}"));
        if let Some(why) = self.quorum.unled(shard.into()).await {
            return pb::Error { message: format!("shard {shard}: {why}"), ..error };
        }
        let leader = leader.or_else(|| self.consensus.leader_address(shard.into())).unwrap_or_default();
        pb::Error { leader, ..error }
    }
}

/// The state here of a shard, led here or not, when `at` is over for good in it.
fn settled<'a>(views: &Views<'a>, shard: ShardId, at: Time) -> Option<&'a dyn Table> {
    views.local(shard.into()).filter(|view| is_settled(*view, at))
}

/// Whether nothing can happen at `at` or before any more: the shard's own clock is past it. An instant
/// later than that may be one of a write that is proposed and not applied yet.
fn is_settled(view: &dyn Table, at: Time) -> bool {
    // A row that cannot be read is the read's to say.
    at.is_unset() || eggs_machine::group::clock(view).map_or(true, |clock| clock >= at)
}

/// Whatever does not take away.
fn adds_data(op: &pb::WriteOp) -> bool {
    use pb::write_op::Op;
    !matches!(op.op, Some(Op::Unlink(_) | Op::AbandonEden(_) | Op::Purge(_)))
}

/// A block placed on a service whose key is not known here: just started, or the service is new.
fn has_unsigned(reply: &pb::WriteReply) -> bool {
    let blocks = reply.results.iter().flat_map(|result| match &result.result {
        Some(pb::write_result::Result::Eden(eden)) => &eden.blocks[..],
        _ => &[],
    });
    blocks.into_iter().any(|block| block.certificate.is_empty())
}

fn entropy() -> u64 {
    // The system's source does not fail once it has worked, and it has at start; a cookie of the
    // clock's bits would be guessable, so there is nothing better to do than to stop.
    getrandom::u64().unwrap_or_else(|error| {
        tracing::error!(%error, "no entropy from the system");
        std::process::abort()
    })
}

fn refused(shard: ShardId, error: ConsensusError) -> pb::Error {
    match error {
        ConsensusError::NotLeader { .. } => ShardError::NotLeader.with(format_args!("shard {shard}")),
        ConsensusError::Busy => ShardError::Busy.with(format_args!("shard {shard}")),
        ConsensusError::Stopped => {
            ShardError::Busy.with(format_args!("shard {shard}: the daemon is stopping"))
        }
        ConsensusError::Storage(error) | ConsensusError::Damaged(error) => internal(shard, &error),
    }
}

fn internal(shard: ShardId, error: &dyn std::fmt::Display) -> pb::Error {
    tracing::error!(shard = shard.0, %error, "request failed");
    ShardError::Internal.with(format_args!("shard {shard}: {error}"))
}

fn op_name(op: &Op) -> &'static str {
    match op {
        Op::Walk(_) => "walk",
        Op::Stat(_) => "stat",
        Op::GetSpans(_) => "get_spans",
        Op::List(_) => "list",
        Op::ListEden(_) => "list_eden",
        Op::Check(_) => "check",
        Op::Status(_) => "status",
        Op::Write(_) => "write",
        Op::OpenMany(_) => "open_many",
        Op::ListFiles(_) => "list_files",
        Op::ListServiceFiles(_) => "list_service_files",
        Op::ListGarbage(_) => "list_garbage",
    }
}
