//! From a request to its answer; knows nothing of the transport.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use eggs_consensus::{Applied, ConsensusError, GroupId, Handle};
use eggs_daemon::Secret;
use eggs_daemon::space::Space;
use eggs_machine::{Table, TableError};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::shard_reply::Result as Answer;
use eggs_proto::pb::shard_request::Op;
use eggs_proto::{ClusterId, ServiceError, SessionId, ShardError, ShardId, Time, pb};
use eggs_shard_core::Cluster;
use prost::Message;
use tokio::sync::watch;

/// Walks of one request: a settled shard stays settled, but a walk may come to others then.
const WALKS_MAX: usize = 8;

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
                let command =
                    eggs_shard_core::prepare(shard, view, write, authorized, now, &mut entropy, &cluster);
                match command {
                    Ok(command) => Ok(Bytes::from(command.encode_to_vec())),
                    Err(error) => Err(Bytes::from(error.encode_to_vec())),
                }
            }
        };
        let session = SessionId(header.session);
        let applied = self
            .consensus
            .write(group(shard), session, header.sequence, prepare)
            .await
            .map_err(|error| refused(shard, error))?;
        match applied {
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
        // Once more when an instant had to be settled first.
        for _ in 0..WALKS_MAX {
            let walk = walk.clone();
            let answer = self
                .consensus
                .read(move |views, now| {
                    // A walk that begins where this host does not lead is sent on, not answered empty.
                    views.get(group(shard))?;
                    let open = RefCell::new(BTreeSet::new());
                    let view = |shard| {
                        let view = views.get(group(shard))?;
                        if !is_settled(view, at) {
                            open.borrow_mut().insert(shard);
                        }
                        Some(view)
                    };
                    let walked = eggs_shard_core::walk(view, &walk, now);
                    Some((walked, open.into_inner()))
                })
                .await
                .map_err(|error| refused(shard, error))?;
            let Some((walked, open)) = answer else {
                return Err(refused(shard, ConsensusError::NotLeader));
            };
            if open.is_empty() {
                return walked.map_err(|error| internal(shard, &error))?.map(Answer::Walk);
            }
            for open in open {
                self.settle(open).await?;
            }
        }
        Err(refused(shard, ConsensusError::Busy))
    }

    async fn read(&self, shard: ShardId, op: Op) -> Result<Answer, pb::Error> {
        if let Op::List(list) = &op
            && let at = self.past(list.at)?
            && !at.is_unset()
        {
            let settled = self.consensus.read(move |views, _| Some(is_settled(views.get(group(shard))?, at)));
            if settled.await.map_err(|error| refused(shard, error))? == Some(false) {
                self.settle(shard).await?;
            }
        }
        let answer: Option<Result<Answer, TableError>> = self
            .consensus
            .read(move |views, now| Some(eggs_shard_core::read(shard, views.get(group(shard))?, &op, now)))
            .await
            .map_err(|error| refused(shard, error))?;
        match answer {
            None => Err(refused(shard, ConsensusError::NotLeader)),
            Some(answer) => answer.map_err(|error| internal(shard, &error)),
        }
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
        let written = self.consensus.write(group(shard), SessionId(0), 0, move |_, _| Ok(empty)).await;
        written.map(drop).map_err(|error| refused(shard, error))
    }

    async fn status(&self, shard: ShardId) -> Result<Answer, pb::Error> {
        let all = self.consensus.status().await.map_err(|error| refused(shard, error))?;
        let status = all
            .into_iter()
            .find(|status| status.group == group(shard) && status.leader)
            .ok_or_else(|| refused(shard, ConsensusError::NotLeader))?;
        Ok(Answer::Status(pb::ShardStatusReply {
            applied_index: status.applied_index,
            term: status.term,
            state_hash: Bytes::copy_from_slice(&status.state_hash.to_bytes()),
            log_bytes: status.log_bytes,
            snapshot_index: status.snapshot_index,
        }))
    }
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
    !matches!(op.op, Some(Op::Unlink(_) | Op::AbandonEden(_)))
}

/// A block placed on a service whose key is not known here: just started, or the service is new.
fn has_unsigned(reply: &pb::WriteReply) -> bool {
    let blocks = reply.results.iter().flat_map(|result| match &result.result {
        Some(pb::write_result::Result::Eden(eden)) => &eden.blocks[..],
        _ => &[],
    });
    blocks.into_iter().any(|block| block.certificate.is_empty())
}

/// The group that replicates a shard.
pub(crate) fn group(shard: ShardId) -> GroupId {
    GroupId(u16::from(shard.0))
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
        ConsensusError::NotLeader => ShardError::NotLeader.with(format_args!("shard {shard}")),
        ConsensusError::Busy => ShardError::Busy.with(format_args!("shard {shard}")),
        ConsensusError::Stopped => {
            ShardError::Busy.with(format_args!("shard {shard}: the daemon is stopping"))
        }
        ConsensusError::Storage(error) => internal(shard, &error),
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
    }
}
