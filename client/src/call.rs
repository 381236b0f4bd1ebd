//! Requests and their retries: until the deadline, with pauses, where the map says (CL-10).

use std::sync::Arc;
use std::time::{Duration, Instant};

use eggs_client_core::retry::Backoff;
use eggs_proto::limits::{MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
use eggs_proto::pb::crossdir_service_client::CrossdirServiceClient;
use eggs_proto::pb::registry_service_client::RegistryServiceClient;
use eggs_proto::pb::shard_service_client::ShardServiceClient;
use eggs_proto::pb::{crossdir_reply, crossdir_request, registry_reply, registry_request};
use eggs_proto::pb::{shard_reply, shard_request, write_result};
use eggs_proto::{
    ClusterId, CrossdirError, RegistryError, Retry, ServiceError, SessionId, ShardError, ShardId, pb,
};
use tonic::{Code, Status};

use crate::connection::{Lane, Peer, Shared, entropy};
use crate::error::{ClientError, Result, shortened};
use crate::types::Options;

/// One try of a metadata request; the coordinator itself answers "in progress" after 10 s.
const TRY_MAX: Duration = Duration::from_secs(15);
const REGISTRY_TRY_MAX: Duration = Duration::from_secs(3);
/// Disks come back within the time after which they count as stale; a full cluster does not.
const NO_SPACE_PATIENCE: Duration = Duration::from_secs(5);

/// One operation's patience.
struct Tries {
    started: Instant,
    timeout: Duration,
    backoff: Backoff,
}

/// What one try came to.
enum Outcome<T> {
    Done(T),
    /// Ask again; the map may be wrong.
    Elsewhere(String),
    /// Ask again.
    Later(ClientError),
}

impl Tries {
    fn new(timeout: Duration) -> Tries {
        Tries { started: Instant::now(), timeout, backoff: Backoff::default() }
    }

    fn left(&self) -> Duration {
        self.timeout.saturating_sub(self.started.elapsed())
    }

    /// Waits before the next try; `Err` when there is none.
    async fn pause(&mut self, why: ClientError) -> Result<()> {
        let pause = self.backoff.pause(entropy());
        if self.left() <= pause {
            return Err(match why {
                ClientError::Unreachable { tried, .. } => {
                    ClientError::Unreachable { tried, after: self.started.elapsed() }
                }
                why => why,
            });
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

fn unreachable(tried: String) -> ClientError {
    ClientError::Unreachable { tried, after: Duration::ZERO }
}

/// What a transport failure says for people: the innermost reason.
pub(crate) fn status_words(status: &Status) -> String {
    let mut words = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        words = error.to_string();
        source = error.source();
    }
    if words.is_empty() {
        words = status.code().to_string();
    }
    shortened(&words)
}

/// One try within `limit`. Everything but an answer is words.
async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Outcome<T>> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) if matches!(status.code(), Code::OutOfRange | Code::Unimplemented) => {
            // Too large a message, or not our protocol at all: the same again next time.
            Err(Outcome::Later(ClientError::protocol(status_words(&status))))
        }
        Ok(Err(status)) => Err(Outcome::Elsewhere(status_words(&status))),
        Err(_) => Err(Outcome::Elsewhere(format!("no answer for {:.1} s", limit.as_secs_f64()))),
    }
}

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

impl Shared {
    /// A read from a shard. Refusals come back as they are, for the caller to name the path.
    pub async fn shard_read(
        self: &Arc<Self>,
        shard: ShardId,
        op: shard_request::Op,
    ) -> Result<Result<shard_reply::Result, pb::Error>> {
        self.shard_call(shard, op, (SessionId(0), 0)).await
    }

    /// Operations on one shard in one request, each with its answer in order. What is refused for now
    /// (a locked edge) is asked again until the deadline.
    pub async fn shard_write(
        self: &Arc<Self>,
        shard: ShardId,
        ops: Vec<pb::WriteOp>,
    ) -> Result<Vec<pb::WriteResult>> {
        let mut tries = Tries::new(self.options.timeout);
        let mut results = self.shard_write_once(shard, ops.clone()).await?;
        loop {
            let again: Vec<usize> = (0..ops.len()).filter(|&n| tries.worth_again(&results[n])).collect();
            if again.is_empty() || tries.pause(unreachable(String::new())).await.is_err() {
                return Ok(results);
            }
            let ops = again.iter().map(|&n| ops[n].clone()).collect();
            let answers = self.shard_write_once(shard, ops).await?;
            for (n, answer) in again.into_iter().zip(answers) {
                results[n] = answer;
            }
        }
    }

    async fn shard_write_once(
        self: &Arc<Self>,
        shard: ShardId,
        ops: Vec<pb::WriteOp>,
    ) -> Result<Vec<pb::WriteResult>> {
        let count = ops.len();
        let mut lane = LaneGuard::next(self);
        let op = shard_request::Op::Write(pb::Write { ops });
        let answer = self.shard_call(shard, op, lane.ids()).await?;
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
        (session, sequence): (SessionId, u64),
    ) -> Result<Result<shard_reply::Result, pb::Error>> {
        let mut tries = Tries::new(self.options.timeout);
        loop {
            let map = self.map();
            let seen = self.map_time();
            let outcome = match map.shard(shard) {
                None => Outcome::Elsewhere(format!("nobody serves shard {shard}")),
                Some(peer) => {
                    let mut header = self.header();
                    (header.session, header.sequence) = (session.0, sequence);
                    let (shard, op) = (shard.0.into(), Some(op.clone()));
                    let request = pb::ShardRequest { header: Some(header), shard, op };
                    self.shard_try(peer, request, tries.left().min(TRY_MAX)).await
                }
            };
            let why = match outcome {
                Outcome::Done(answer) => return Ok(answer),
                Outcome::Later(why @ ClientError::Protocol(_)) => return Err(why),
                Outcome::Later(why) => why,
                Outcome::Elsewhere(words) => {
                    let place = map.shard(shard).map_or("shuckle's map", |peer| &peer.address);
                    let why = unreachable(format!("shard {shard} at {place}: {words}"));
                    let _ = tokio::time::timeout(tries.left(), self.renew(seen)).await;
                    why
                }
            };
            tries.pause(why).await?;
        }
    }

    async fn shard_try(
        &self,
        peer: &Peer,
        request: pb::ShardRequest,
        limit: Duration,
    ) -> Outcome<Result<shard_reply::Result, pb::Error>> {
        let mut client =
            ShardServiceClient::new(peer.meta.clone()).max_decoding_message_size(2 * MESSAGE_BYTES_MAX);
        let reply = match within(limit, client.call(request)).await {
            Ok(reply) => reply,
            Err(Outcome::Elsewhere(words)) => return Outcome::Elsewhere(words),
            Err(Outcome::Later(why)) => return Outcome::Later(why),
            Err(Outcome::Done(_)) => return Outcome::Elsewhere(String::new()),
        };
        self.observe(reply.header.as_ref());
        match reply.result {
            None => Outcome::Later(ClientError::protocol("a shard's answer says nothing")),
            Some(shard_reply::Result::Error(error)) => {
                match ShardError::from_code(error.code).map(ServiceError::retry) {
                    Some(Retry::Elsewhere) => Outcome::Elsewhere(shortened(&error.message)),
                    Some(Retry::Later) if error.code == ShardError::Busy.code() => Outcome::Later(
                        unreachable(format!("{}: {}", peer.address, shortened(&error.message))),
                    ),
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
        self.crossdir_call(op, (SessionId(0), 0)).await
    }

    async fn crossdir_call(
        self: &Arc<Self>,
        op: crossdir_request::Op,
        (session, sequence): (SessionId, u64),
    ) -> Result<Result<crossdir_reply::Result, pb::Error>> {
        let mut tries = Tries::new(self.options.timeout);
        loop {
            let map = self.map();
            let seen = self.map_time();
            let outcome = match &map.crossdir {
                None => Outcome::Elsewhere("nobody serves it".to_owned()),
                Some(peer) => {
                    let mut header = self.header();
                    (header.session, header.sequence) = (session.0, sequence);
                    let request = pb::CrossdirRequest { header: Some(header), op: Some(op.clone()) };
                    self.crossdir_try(peer, request, tries.left().min(TRY_MAX)).await
                }
            };
            let why = match outcome {
                Outcome::Done(answer) => return Ok(answer),
                Outcome::Later(why @ ClientError::Protocol(_)) => return Err(why),
                Outcome::Later(why) => why,
                Outcome::Elsewhere(words) => {
                    let place = map.crossdir.as_ref().map_or("shuckle's map", |peer| &peer.address);
                    let why = unreachable(format!("the coordinator at {place}: {words}"));
                    let _ = tokio::time::timeout(tries.left(), self.renew(seen)).await;
                    why
                }
            };
            tries.pause(why).await?;
        }
    }

    async fn crossdir_try(
        &self,
        peer: &Peer,
        request: pb::CrossdirRequest,
        limit: Duration,
    ) -> Outcome<Result<crossdir_reply::Result, pb::Error>> {
        let mut client =
            CrossdirServiceClient::new(peer.meta.clone()).max_decoding_message_size(2 * MESSAGE_BYTES_MAX);
        let reply = match within(limit, client.call(request)).await {
            Ok(reply) => reply,
            Err(Outcome::Elsewhere(words)) => return Outcome::Elsewhere(words),
            Err(Outcome::Later(why)) => return Outcome::Later(why),
            Err(Outcome::Done(_)) => return Outcome::Elsewhere(String::new()),
        };
        self.observe(reply.header.as_ref());
        match reply.result {
            None => Outcome::Later(ClientError::protocol("the coordinator's answer says nothing")),
            Some(crossdir_reply::Result::Error(error)) => {
                match CrossdirError::from_code(error.code).map(ServiceError::retry) {
                    Some(Retry::Elsewhere) => Outcome::Elsewhere(shortened(&error.message)),
                    Some(Retry::Later) => {
                        let words = shortened(&error.message);
                        Outcome::Later(unreachable(format!("the coordinator at {}: {words}", peer.address)))
                    }
                    _ => Outcome::Done(Err(error)),
                }
            }
            Some(result) => Outcome::Done(Ok(result)),
        }
    }

    /// A request to the registry, tried for `timeout`.
    pub async fn registry(
        &self,
        op: registry_request::Op,
        timeout: Duration,
    ) -> Result<registry_reply::Result> {
        let mut tries = Tries::new(timeout);
        loop {
            let mut tried = Vec::new();
            for address in &self.options.shuckle {
                let peer = self.peer(address)?;
                let request = pb::RegistryRequest { header: Some(self.header()), op: Some(op.clone()) };
                match registry_try(&peer, request, tries.left().min(REGISTRY_TRY_MAX)).await {
                    Outcome::Done(reply) => {
                        self.observe(reply.header.as_ref());
                        return reply
                            .result
                            .ok_or_else(|| ClientError::protocol("shuckle's answer says nothing"));
                    }
                    Outcome::Later(why) => return Err(why),
                    Outcome::Elsewhere(words) => tried.push(format!("shuckle at {address}: {words}")),
                }
            }
            tries.pause(unreachable(tried.join("; "))).await?;
        }
    }

    /// The map, fresh from shuckle.
    pub async fn fetch_map(&self) -> Result<pb::ClusterMapReply> {
        let op = registry_request::Op::Map(pb::ClusterMap { with_keys: false });
        match self.registry(op, self.options.timeout.min(REGISTRY_TRY_MAX)).await? {
            registry_reply::Result::Map(map) => Ok(map),
            _ => Err(ClientError::protocol("shuckle did not answer with a map")),
        }
    }
}

impl Tries {
    fn worth_again(&self, result: &pb::WriteResult) -> bool {
        let Some(write_result::Result::Error(error)) = &result.result else { return false };
        match ShardError::from_code(error.code) {
            Some(ShardError::NoBlockServices) => self.started.elapsed() < NO_SPACE_PATIENCE,
            Some(code) => code.retry() == Retry::Later,
            None => false,
        }
    }
}

async fn registry_try(
    peer: &Peer,
    request: pb::RegistryRequest,
    limit: Duration,
) -> Outcome<pb::RegistryReply> {
    let mut client =
        RegistryServiceClient::new(peer.meta.clone()).max_decoding_message_size(8 * MESSAGE_BYTES_MAX);
    let reply = match within(limit, client.call(request)).await {
        Ok(reply) => reply,
        Err(outcome) => return outcome,
    };
    let Some(registry_reply::Result::Error(error)) = &reply.result else { return Outcome::Done(reply) };
    match RegistryError::from_code(error.code).map(ServiceError::retry) {
        Some(Retry::Later | Retry::Elsewhere) => Outcome::Elsewhere(shortened(&error.message)),
        _ => Outcome::Later(ClientError::from_registry(error)),
    }
}

/// Finds the cluster: who it is, and its first map.
pub(crate) async fn join(options: Options) -> Result<Shared> {
    if options.shuckle.is_empty() {
        return Err(ClientError::Invalid("no address of shuckle was given".to_owned()));
    }
    let timeout = options.timeout;
    let started = Instant::now();
    // Not yet known which cluster: only `Hello` may say so.
    let nobody = Shared::new(options, ClusterId([0; 16]));
    let hello = match nobody.registry(registry_request::Op::Hello(pb::Hello {}), timeout).await? {
        registry_reply::Result::Hello(hello) => hello,
        _ => return Err(ClientError::protocol("shuckle did not say which cluster it is of")),
    };
    if hello.version != PROTOCOL_VERSION {
        let versions = format!("shuckle speaks version {}, this client {PROTOCOL_VERSION}", hello.version);
        return Err(ClientError::protocol(versions));
    }
    let cluster = ClusterId::from_bytes(&hello.cluster_id)
        .ok_or_else(|| ClientError::protocol("shuckle's cluster id is none"))?;
    let shared = Shared::new(nobody.options, cluster);
    let op = registry_request::Op::Map(pb::ClusterMap { with_keys: false });
    let left = timeout.saturating_sub(started.elapsed()).max(Duration::from_millis(1));
    match shared.registry(op, left).await? {
        registry_reply::Result::Map(map) => shared.learn(&map),
        _ => return Err(ClientError::protocol("shuckle did not answer with a map")),
    }
    Ok(shared)
}
