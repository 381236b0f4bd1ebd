//! The coordinator as a client of the shards.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

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
use eggs_proto::{ClusterId, InodeId, Retry, ServiceError, ShardError, ShardId, Time, pb};
use tonic::transport::Channel;

/// Sends steps to whoever serves the shard. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Shards {
    map: MapWatch,
    clock: Handle,
    cluster: ClusterId,
    secret: Secret,
    /// One connection per address, shared by its shards.
    clients: Arc<Mutex<BTreeMap<String, ShardServiceClient<Channel>>>>,
}

impl Shards {
    pub(crate) fn new(map: MapWatch, clock: Handle, cluster: ClusterId, secret: Secret) -> Self {
        Shards { map, clock, cluster, secret, clients: Arc::default() }
    }

    /// Those that can take a new directory.
    pub(crate) fn alive(&self) -> Vec<ShardId> {
        let map = self.map.get();
        let alive = map.shards.iter().filter(|place| place.alive);
        alive.filter_map(|place| ShardId::try_from(place.shard).ok()).collect()
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
        let mut client = match self.client(shard) {
            Ok(client) => client,
            Err(why) => return self.lost(why),
        };
        let header = pb::RequestHeader {
            version: PROTOCOL_VERSION,
            time: self.clock.now().0,
            cluster_id: Bytes::copy_from_slice(&self.cluster.0),
            secret: self.secret.to_bytes(),
            ..pb::RequestHeader::default()
        };
        let request = pb::ShardRequest { header: Some(header), shard: u32::from(shard.0), op: Some(op) };
        let reply = match tokio::time::timeout(STEP_TIMEOUT, client.call(request)).await {
            Ok(Ok(reply)) => reply.into_inner(),
            Ok(Err(status)) => return self.lost(format!("shard {shard}: {}", status.message())),
            Err(_) => return self.lost(format!("shard {shard} does not answer")),
        };
        if let Some(header) = reply.header {
            self.clock.observe(Time(header.time));
        }
        match reply.result {
            Some(Answer::Error(error)) => {
                let elsewhere = |error: ShardError| error.retry() == Retry::Elsewhere;
                if ShardError::from_code(error.code).is_some_and(elsewhere) {
                    self.map.refresh();
                }
                Received::Refused(error)
            }
            Some(answer) => Received::Answer(answer),
            None => Received::Lost(format!("shard {shard} gave an empty answer")),
        }
    }

    fn lost<R>(&self, why: String) -> Received<R> {
        self.map.refresh();
        Received::Lost(why)
    }

    fn client(&self, shard: ShardId) -> Result<ShardServiceClient<Channel>, String> {
        let map = self.map.get();
        let place = map.shards.iter().find(|place| place.shard == u32::from(shard.0));
        let address = match place {
            Some(place) if !place.address.is_empty() => &place.address,
            _ => return Err(format!("no host serves shard {shard}")),
        };
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(address) {
            return Ok(client.clone());
        }
        // Hosts that are gone are not kept.
        clients.retain(|address, _| map.shards.iter().any(|place| place.address == *address));
        let channel = channel::connect(address).map_err(|error| error.to_string())?;
        let client = ShardServiceClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        clients.insert(address.clone(), client.clone());
        Ok(client)
    }
}
