//! The coordinator as a client of the shards.
//!
//! Who leads a shard changes without notice: a step goes to whoever led last, follows the hints of those who do not lead,
//! and goes round the shard's replicas. Steps may arrive twice; the shards answer a repeated one as the first.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use eggs_consensus::Handle;
use eggs_crossdir_core::Received;
use eggs_crossdir_core::driver::STEP_TIMEOUT;
use eggs_daemon::registry::MapWatch;
use eggs_daemon::{Secret, channel};
use eggs_proto::limits::{MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
use eggs_proto::pb::shard_reply::Result as Answer;
use eggs_proto::pb::shard_request::Op;
use eggs_proto::pb::shard_service_client::ShardServiceClient;
use eggs_proto::{ClusterId, GroupId, InodeId, Retry, ServiceError, ShardError, ShardId, Time, pb};
use tokio::time::Instant;
use tonic::transport::Channel;

/// How long one replica may take before another is tried.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
/// Replicas tried for one step: each may be named twice, once by the map and once by a hint.
const ATTEMPTS_MAX: usize = 8;

/// Sends steps to whoever serves the shard. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Shards {
    map: MapWatch,
    clock: Handle,
    cluster: ClusterId,
    secret: Secret,
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    /// Who answered last for a shard.
    leaders: BTreeMap<ShardId, String>,
    /// One connection per address, shared by its shards.
    clients: BTreeMap<String, ShardServiceClient<Channel>>,
}

impl Shards {
    pub(crate) fn new(map: MapWatch, clock: Handle, cluster: ClusterId, secret: Secret) -> Self {
        Shards { map, clock, cluster, secret, known: Arc::default() }
    }

    /// Those that can take a new directory.
    pub(crate) fn alive(&self) -> Vec<ShardId> {
        let map = self.map.get();
        let alive = map.groups.iter().filter(|place| place.alive);
        alive.filter_map(|place| GroupId(u16::try_from(place.group).ok()?).shard()).collect()
    }

    pub(crate) async fn write(&self, shard: ShardId, op: pb::WriteOp) -> Received<pb::WriteResult> {
        match self.call(shard, Op::Write(pb::Write { ops: vec![op] })).await {
            Received::Answer(Answer::Write(mut reply)) if reply.results.len() == 1 => {
                match reply.results.pop() {
                    Some(result) => Received::Answer(result),
                    None => Received::Lost("an empty reply".to_owned()),
                }
            }
            Received::Answer(_) => Received::Lost(format!("shard {shard} answered something else")),
            Received::Refused(error) => Received::Refused(error),
            Received::Lost(why) => Received::Lost(why),
        }
    }

    pub(crate) async fn stat(&self, inode: InodeId) -> Received<pb::StatReply> {
        let shard = inode.shard();
        match self.call(shard, Op::Stat(pb::Stat { inode: inode.0 })).await {
            Received::Answer(Answer::Stat(reply)) => Received::Answer(reply),
            Received::Answer(_) => Received::Lost(format!("shard {shard} answered something else")),
            Received::Refused(error) => Received::Refused(error),
            Received::Lost(why) => Received::Lost(why),
        }
    }

    async fn call(&self, shard: ShardId, op: Op) -> Received<Answer> {
        let deadline = Instant::now() + STEP_TIMEOUT;
        let mut left = self.candidates(shard);
        left.reverse();
        let mut received = Received::Lost(format!("no host serves shard {shard}"));
        for _ in 0..ATTEMPTS_MAX {
            let Some(address) = left.pop().filter(|_| Instant::now() < deadline) else { break };
            received = self.attempt(shard, &address, &op, deadline).await;
            let leader = match &received {
                Received::Answer(_) => {
                    self.known().leaders.insert(shard, address);
                    return received;
                }
                Received::Refused(error) if !is_elsewhere(error) => return received,
                Received::Refused(error) => error.leader.clone(),
                Received::Lost(_) => String::new(),
            };
            if !leader.is_empty() && leader != address {
                left.retain(|other| *other != leader);
                left.push(leader);
            }
        }
        // Nobody leads it yet, or the map is old.
        self.known().leaders.remove(&shard);
        self.map.refresh();
        received
    }

    async fn attempt(&self, shard: ShardId, address: &str, op: &Op, deadline: Instant) -> Received<Answer> {
        let mut client = match self.client(address) {
            Ok(client) => client,
            Err(why) => return Received::Lost(why),
        };
        let header = pb::RequestHeader {
            version: PROTOCOL_VERSION,
            time: self.clock.now().0,
            cluster_id: Bytes::copy_from_slice(&self.cluster.0),
            secret: self.secret.to_bytes(),
            ..pb::RequestHeader::default()
        };
        let request =
            pb::ShardRequest { header: Some(header), shard: u32::from(shard.0), op: Some(op.clone()) };
        let deadline = deadline.min(Instant::now() + ATTEMPT_TIMEOUT);
        let reply = match tokio::time::timeout_at(deadline, client.call(request)).await {
            Ok(Ok(reply)) => reply.into_inner(),
            Ok(Err(status)) => return Received::Lost(format!("shard {shard}: {}", status.message())),
            Err(_) => return Received::Lost(format!("shard {shard} does not answer")),
        };
        if let Some(header) = reply.header {
            self.clock.observe(Time(header.time));
        }
        match reply.result {
            Some(Answer::Error(error)) => Received::Refused(error),
            Some(answer) => Received::Answer(answer),
            None => Received::Lost(format!("shard {shard} gave an empty answer")),
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whom to ask, in this order: who answered last, who leads as the map says, who is to lead, the others.
    fn candidates(&self, shard: ShardId) -> Vec<String> {
        let map = self.map.get();
        let mut candidates: Vec<String> = self.known().leaders.get(&shard).cloned().into_iter().collect();
        let Some(place) = map.groups.iter().find(|place| place.group == u32::from(shard.0)) else {
            return candidates;
        };
        for id in [place.leader, place.preferred].iter().chain(&place.voters) {
            let store = map.stores.iter().find(|store| store.id == *id);
            if let Some(store) = store.filter(|store| !candidates.contains(&store.address)) {
                candidates.push(store.address.clone());
            }
        }
        candidates
    }

    fn client(&self, address: &str) -> Result<ShardServiceClient<Channel>, String> {
        let map = self.map.get();
        let mut known = self.known();
        if let Some(client) = known.clients.get(address) {
            return Ok(client.clone());
        }
        let channel = channel::connect(address).map_err(|error| error.to_string())?;
        let client = ShardServiceClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        // Hosts that are gone are not kept.
        known.clients.retain(|address, _| map.stores.iter().any(|store| store.address == *address));
        known.clients.insert(address.to_owned(), client.clone());
        Ok(client)
    }
}

fn is_elsewhere(error: &pb::Error) -> bool {
    ShardError::from_code(error.code).is_some_and(|error| error.retry() == Retry::Elsewhere)
}
