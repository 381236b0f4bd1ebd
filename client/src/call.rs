//! Requests to shards, coordinator and registry: what is sent, and what an answer means.

use std::sync::Arc;
use std::time::Duration;

use eggs_client_core::retry::Backoff;
use eggs_proto::limits::{MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
use eggs_proto::pb::crossdir_service_client::CrossdirServiceClient;
use eggs_proto::pb::registry_service_client::RegistryServiceClient;
use eggs_proto::pb::shard_service_client::ShardServiceClient;
use eggs_proto::pb::{crossdir_reply, crossdir_request, registry_reply, registry_request};
use eggs_proto::pb::{shard_reply, shard_request, write_op, write_result};
use eggs_proto::{
    ClusterId, CrossdirError, GroupId, RegistryError, Retry, ServiceError, SessionId, ShardError, ShardId, pb,
};

use crate::ask::{Outcome, Patience, Target, within};
use crate::connection::{Lane, Peer, Shared, entropy};
use crate::error::{ClientError, Result};
use crate::types::Options;

/// One try of a metadata request; the coordinator itself answers "in progress" after 10 s. Others are asked
/// while it goes on.
const TRY_MAX: Duration = Duration::from_secs(15);
const REGISTRY_TRY_MAX: Duration = Duration::from_secs(3);
/// Disks come back within the time after which they count as stale; a full cluster does not. Who writes waits for
/// that; who repairs has others to repair.
const NO_SPACE_PATIENCE: Duration = Duration::from_secs(5);

/// Session and sequence of a write; zeros in reads.
type Ids = (SessionId, u64);
const READ: Ids = (SessionId(0), 0);

/// Gives its lane back when the write was answered. One that was given up or dropped half-way may still
/// be under way: its lane is not used again.
struct LaneGuard<'a> {
    shared: &'a Shared,
    lane: Option<Lane>,
    settled: bool,
}

impl<'a> LaneGuard<'a> {
    fn next(shared: &'a Shared) -> LaneGuard<'a> {
        let mut lane = shared.take_lane();
        lane.sequence += 1;
        LaneGuard { shared, lane: Some(lane), settled: false }
    }

    fn ids(&self) -> (SessionId, u64) {
        self.lane.as_ref().map_or((SessionId(0), 0), |lane| (lane.session, lane.sequence))
    }
}

impl Drop for LaneGuard<'_> {
    fn drop(&mut self) {
        if let (true, Some(lane)) = (self.settled, self.lane.take()) {
            self.shared.give_lane(lane);
        }
    }
}

/// Whether an operation that was refused may succeed later.
fn worth_again(op: &pb::WriteOp, result: &pb::WriteResult, patience: &Patience) -> bool {
    let Some(write_result::Result::Error(error)) = &result.result else { return false };
    match ShardError::from_code(error.code) {
        Some(ShardError::NoBlockServices) => {
            let repairs = matches!(op.op, Some(write_op::Op::PlaceReplacements(_)));
            !repairs && patience.elapsed() < NO_SPACE_PATIENCE
        }
        Some(code) => code.retry() == Retry::Later,
        None => false,
    }
}

/// Asked about an instant in the past, any replica that has come so far can answer.
fn target_of(shard: ShardId, op: &shard_request::Op) -> Target {
    match op {
        shard_request::Op::Walk(walk) if walk.at != 0 => Target::Any(shard.into()),
        shard_request::Op::List(list) if list.at != 0 && !list.dead => Target::Any(shard.into()),
        _ => Target::Leader(shard.into()),
    }
}

impl Shared {
    pub fn patience(&self) -> Patience {
        Patience::new(self.options.timeout)
    }

    fn header_of(&self, (session, sequence): Ids) -> pb::RequestHeader {
        let mut header = self.header();
        (header.session, header.sequence) = (session.0, sequence);
        header
    }

    /// A read from a shard. Refusals come back as they are, for the caller to name the path.
    pub async fn shard_read(
        self: &Arc<Self>,
        shard: ShardId,
        op: shard_request::Op,
    ) -> Result<Result<shard_reply::Result, pb::Error>> {
        self.shard_call(shard, op, READ, self.patience()).await
    }

    /// Operations on one shard in one request, each with its answer in order. What is refused for now
    /// (a locked edge) is asked again until the deadline.
    pub async fn shard_write(
        self: &Arc<Self>,
        shard: ShardId,
        ops: Vec<pb::WriteOp>,
    ) -> Result<Vec<pb::WriteResult>> {
        let (patience, mut backoff) = (self.patience(), Backoff::default());
        let mut results = self.shard_write_once(shard, ops.clone(), patience).await?;
        loop {
            let again: Vec<usize> =
                (0..ops.len()).filter(|&n| worth_again(&ops[n], &results[n], &patience)).collect();
            if again.is_empty() || !patience.sleep(backoff.pause(entropy())).await {
                return Ok(results);
            }
            let ops = again.iter().map(|&n| ops[n].clone()).collect();
            let Ok(answers) = self.shard_write_once(shard, ops, patience).await else {
                // What was refused was answered: that says more than "no answer".
                return Ok(results);
            };
            for (n, answer) in again.into_iter().zip(answers) {
                results[n] = answer;
            }
        }
    }

    async fn shard_write_once(
        self: &Arc<Self>,
        shard: ShardId,
        ops: Vec<pb::WriteOp>,
        patience: Patience,
    ) -> Result<Vec<pb::WriteResult>> {
        let count = ops.len();
        let mut lane = LaneGuard::next(self);
        let op = shard_request::Op::Write(pb::Write { ops });
        let answer = self.shard_call(shard, op, lane.ids(), patience).await?;
        lane.settled = true;
        match answer {
            Ok(shard_reply::Result::Write(reply)) if reply.results.len() == count => Ok(reply.results),
            Ok(_) => Err(ClientError::protocol("a shard's answer to a write has other results than asked")),
            // The whole request was refused: so was each of its operations.
            Err(error) => {
                let refused = pb::WriteResult { result: Some(write_result::Result::Error(error)), time: 0 };
                Ok(vec![refused; count])
            }
        }
    }

    async fn shard_call(
        self: &Arc<Self>,
        shard: ShardId,
        op: shard_request::Op,
        ids: Ids,
        patience: Patience,
    ) -> Result<Result<shard_reply::Result, pb::Error>> {
        let attempt = |peer: Peer| {
            let mut header = self.header_of(ids);
            if let (true, Some(secret)) = (crate::upkeep::needs_secret(&op), &self.options.secret) {
                header.secret = secret.to_bytes();
            }
            let (header, op) = (Some(header), Some(op.clone()));
            self.shard_try(peer, pb::ShardRequest { header, shard: shard.0.into(), op })
        };
        self.ask(target_of(shard, &op), patience, attempt).await
    }

    async fn shard_try(
        &self,
        peer: Peer,
        request: pb::ShardRequest,
    ) -> Outcome<Result<shard_reply::Result, pb::Error>> {
        let client = ShardServiceClient::new(peer.meta);
        let mut client = client.max_decoding_message_size(2 * MESSAGE_BYTES_MAX);
        let reply = match within(TRY_MAX, client.call(request)).await {
            Ok(reply) => reply,
            Err(outcome) => return outcome,
        };
        self.observe(reply.header.as_ref());
        match reply.result {
            None => Outcome::Fatal(ClientError::protocol("a shard's answer says nothing")),
            Some(shard_reply::Result::Error(error)) => {
                match ShardError::from_code(error.code) {
                    // Said of the whole request: the shard, not what was asked of it.
                    Some(ShardError::NotLeader | ShardError::Busy) => {
                        Outcome::of_refusal::<ShardError>(error)
                            .unwrap_or_else(|error| Outcome::Done(Err(error)))
                    }
                    _ => Outcome::Done(Err(error)),
                }
            }
            Some(result) => Outcome::Done(Ok(result)),
        }
    }

    /// A transaction; asked again with the same session and sequence until the answer is there.
    pub async fn crossdir_write(
        self: &Arc<Self>,
        op: crossdir_request::Op,
    ) -> Result<Result<crossdir_reply::Result, pb::Error>> {
        let mut lane = LaneGuard::next(self);
        let answer = self.crossdir_call(op, lane.ids()).await?;
        lane.settled = true;
        Ok(answer)
    }

    pub async fn crossdir_read(
        self: &Arc<Self>,
        op: crossdir_request::Op,
    ) -> Result<Result<crossdir_reply::Result, pb::Error>> {
        self.crossdir_call(op, READ).await
    }

    async fn crossdir_call(
        self: &Arc<Self>,
        op: crossdir_request::Op,
        ids: Ids,
    ) -> Result<Result<crossdir_reply::Result, pb::Error>> {
        let attempt = |peer: Peer| {
            let (header, op) = (Some(self.header_of(ids)), Some(op.clone()));
            self.crossdir_try(peer, pb::CrossdirRequest { header, op })
        };
        self.ask(Target::Leader(GroupId::CROSSDIR), self.patience(), attempt).await
    }

    async fn crossdir_try(
        &self,
        peer: Peer,
        request: pb::CrossdirRequest,
    ) -> Outcome<Result<crossdir_reply::Result, pb::Error>> {
        let client = CrossdirServiceClient::new(peer.meta);
        let mut client = client.max_decoding_message_size(2 * MESSAGE_BYTES_MAX);
        let reply = match within(TRY_MAX, client.call(request)).await {
            Ok(reply) => reply,
            Err(outcome) => return outcome,
        };
        self.observe(reply.header.as_ref());
        match reply.result {
            None => Outcome::Fatal(ClientError::protocol("the coordinator's answer says nothing")),
            Some(crossdir_reply::Result::Error(error)) => {
                Outcome::of_refusal::<CrossdirError>(error).unwrap_or_else(|error| Outcome::Done(Err(error)))
            }
            Some(result) => Outcome::Done(Ok(result)),
        }
    }

    /// A request to the registry, tried for `timeout`.
    pub async fn registry(
        self: &Arc<Self>,
        op: registry_request::Op,
        timeout: Duration,
    ) -> Result<registry_reply::Result> {
        let attempt = |peer: Peer| {
            let mut header = self.header();
            if let (true, Some(secret)) = (needs_secret(&op), &self.options.secret) {
                header.secret = secret.to_bytes();
            }
            self.registry_try(peer, pb::RegistryRequest { header: Some(header), op: Some(op.clone()) })
        };
        self.ask(Target::Leader(GroupId::SHUCKLE), Patience::new(timeout), attempt).await?
    }

    /// Refusals are answers too, but for those of who cannot know: the answer of another one may be better.
    async fn registry_try(
        &self,
        peer: Peer,
        request: pb::RegistryRequest,
    ) -> Outcome<Result<registry_reply::Result>> {
        let client = RegistryServiceClient::new(peer.meta);
        let mut client = client.max_decoding_message_size(8 * MESSAGE_BYTES_MAX);
        let reply = match within(REGISTRY_TRY_MAX, client.call(request)).await {
            Ok(reply) => reply,
            Err(outcome) => return outcome,
        };
        self.observe(reply.header.as_ref());
        match reply.result {
            None => Outcome::Fatal(ClientError::protocol("shuckle's answer says nothing")),
            Some(registry_reply::Result::Error(error)) => match RegistryError::from_code(error.code) {
                // It is starting, or is of another cluster: the others may not be.
                Some(RegistryError::Busy) => Outcome::Elsewhere(None, error.message),
                Some(RegistryError::WrongCluster | RegistryError::UnsupportedVersion) => {
                    Outcome::Fatal(ClientError::from_registry(&error))
                }
                _ => Outcome::of_refusal::<RegistryError>(error)
                    .unwrap_or_else(|error| Outcome::Done(Err(ClientError::from_registry(&error)))),
            },
            Some(result) => Outcome::Done(Ok(result)),
        }
    }

    /// The map, fresh from shuckle.
    pub async fn fetch_map(self: &Arc<Self>, timeout: Duration) -> Result<pb::ClusterMapReply> {
        let op = registry_request::Op::Map(pb::ClusterMap { with_keys: false, known_version: 0 });
        match self.registry(op, timeout).await? {
            registry_reply::Result::Map(map) => Ok(map),
            _ => Err(ClientError::protocol("shuckle did not answer with a map")),
        }
    }
}

fn needs_secret(op: &registry_request::Op) -> bool {
    use registry_request::Op;
    matches!(
        op,
        Op::SetReplicas(_) | Op::DrainHost(_) | Op::SetFlags(_) | Op::PutJob(_) | Op::ForgetBlockServices(_)
    )
}

/// Finds the cluster: who it is, and its first map.
pub(crate) async fn join(options: Options) -> Result<Arc<Shared>> {
    if options.shuckle.is_empty() {
        return Err(ClientError::Invalid("no address of shuckle was given".to_owned()));
    }
    let patience = Patience::new(options.timeout);
    // Not yet known which cluster: only `Hello` may say so.
    let nobody = Arc::new(Shared::new(options.clone(), ClusterId([0; 16])));
    let hello = match nobody.registry(registry_request::Op::Hello(pb::Hello {}), options.timeout).await? {
        registry_reply::Result::Hello(hello) => hello,
        _ => return Err(ClientError::protocol("shuckle did not say which cluster it is of")),
    };
    if hello.version != PROTOCOL_VERSION {
        let versions = format!("shuckle speaks version {}, this client {PROTOCOL_VERSION}", hello.version);
        return Err(ClientError::protocol(versions));
    }
    let cluster = ClusterId::from_bytes(&hello.cluster_id)
        .ok_or_else(|| ClientError::protocol("shuckle's cluster id is none"))?;
    let shared = Arc::new(Shared::new(options, cluster));
    let map = shared.fetch_map(patience.left().max(Duration::from_millis(1))).await?;
    shared.learn(&map);
    Ok(shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_writes_waits_for_room_and_who_repairs_does_not() {
        let patience = Patience::new(Duration::from_secs(60));
        let refused = |error: ShardError| pb::WriteResult {
            result: Some(write_result::Result::Error(error.bare())),
            time: 0,
        };
        let writes = pb::WriteOp { op: Some(write_op::Op::StartEden(pb::StartEden::default())) };
        let repairs =
            pb::WriteOp { op: Some(write_op::Op::PlaceReplacements(pb::PlaceReplacements::default())) };
        assert!(worth_again(&writes, &refused(ShardError::NoBlockServices), &patience));
        assert!(!worth_again(&repairs, &refused(ShardError::NoBlockServices), &patience));
        assert!(worth_again(&repairs, &refused(ShardError::Busy), &patience));
        assert!(!worth_again(&writes, &refused(ShardError::NotFound), &patience));
    }
}
