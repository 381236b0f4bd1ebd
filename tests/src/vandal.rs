//! Damage: steps of transactions that nobody has begun.

use eggs_client::Client;
use eggs_daemon::Secret;
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::shard_service_client::ShardServiceClient;
use eggs_proto::pb::write_op::Op;
use eggs_proto::{InodeId, ShardId, pb};
use tonic::transport::Channel;

use crate::Up;

/// Sends what only a coordinator sends: steps of transactions that nobody has begun.
#[derive(Debug)]
pub struct Vandal {
    shards: ShardServiceClient<Channel>,
    header: pb::RequestHeader,
}

impl Vandal {
    /// # Panics
    /// When the cluster's secret cannot be read, or its address is none.
    pub fn new(up: &Up, client: &Client) -> Vandal {
        let secret = Secret::load(&up.data().join("secret")).expect("secret");
        let header = pb::RequestHeader {
            version: PROTOCOL_VERSION,
            cluster_id: client.cluster_id().0.to_vec().into(),
            secret: secret.to_bytes(),
            time: client.now().0,
            ..pb::RequestHeader::default()
        };
        let channel = eggs_daemon::channel::connect(&up.address().to_string()).expect("address");
        Vandal { shards: ShardServiceClient::new(channel), header }
    }

    /// The inode it made, if it made one.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn step(&mut self, shard: ShardId, op: Op) -> InodeId {
        let write = pb::Write { ops: vec![pb::WriteOp { op: Some(op.clone()) }] };
        let request = pb::ShardRequest {
            header: Some(self.header.clone()),
            shard: u32::from(shard.0),
            op: Some(pb::shard_request::Op::Write(write)),
        };
        let reply = self.shards.call(request).await.expect("answer").into_inner();
        let Some(pb::shard_reply::Result::Write(write)) = reply.result else { panic!("{op:?}: {reply:?}") };
        match &write.results[0].result {
            Some(pb::write_result::Result::Done(_)) => InodeId::NULL,
            Some(pb::write_result::Result::Link(link)) => InodeId(link.inode),
            other => panic!("{op:?}: {other:?}"),
        }
    }
}
