//! A shard service's life: open, join the cluster, serve, stop.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use bytes::Bytes;
use eggs_consensus::{ConsensusError, GroupId, PeerHandler};
use eggs_daemon::registry::MapWatch;
use eggs_daemon::{CancellationToken, server};
use eggs_proto::limits::MESSAGE_BYTES_MAX;
use eggs_proto::pb::shard_service_server::{ShardService, ShardServiceServer};
use eggs_proto::{SessionId, ShardId, pb};
use eggs_replica::{InFlight, Replica, Settings, StartError};
use eggs_shard_core::{Cluster, ShardMachine};
use prost::Message;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::config::Config;
use crate::handler::Handler;

/// How often files in writing are looked at for their deadline (which is an hour).
const EXPIRY_INTERVAL: Duration = Duration::from_secs(60);
/// Files that lose their writer in one command.
const EXPIRE_PER_COMMAND: u32 = 256;

/// The shards of one process.
#[derive(Debug)]
pub struct Service {
    handler: Handler,
    cluster: watch::Sender<Arc<Cluster>>,
    replica: Replica,
}

impl Service {
    /// Opens the data directory and brings every replica's state up to its log. Blocks; must be called within a
    /// tokio runtime, on a thread that may block.
    ///
    /// # Errors
    /// See [`Replica::open`].
    pub fn open(config: Config) -> Result<Service, StartError> {
        let Config { data, secret, shuckle, host, read_lease, snapshot_bytes_per_second } = config;
        let kind = pb::StoreKind::StoreShard;
        let settings = Settings {
            data,
            kind,
            host,
            secret: secret.clone(),
            shuckle,
            read_lease,
            snapshot_bytes_per_second,
        };
        let machine = |group: GroupId| group.shard().map(|shard| ShardMachine { shard });
        let replica = Replica::open(settings, machine, |_| {})?;
        let (cluster, receiver) =
            watch::channel(Arc::new(Cluster::from_map(&pb::ClusterMapReply::default())));
        let handler = Handler {
            consensus: replica.handle().clone(),
            secret,
            cluster_id: Arc::clone(replica.cluster()),
            space: Arc::clone(replica.space()),
            cluster: receiver,
            quorum: Arc::clone(replica.quorum()),
        };
        Ok(Service { handler, cluster, replica })
    }

    /// Its part of the port, but for what the other stores ask: see [`peers`](Service::peers).
    pub fn router(&self) -> Router {
        let service = ShardServiceServer::new(Transport { handler: self.handler.clone() })
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        server::grpc(service)
    }

    /// What answers the other stores; the port has one `peer_streams` for all stores behind it.
    pub fn peers(&self) -> PeerHandler {
        self.replica.peers()
    }

    /// Why it is not well, if it is not.
    ///
    /// # Errors
    /// For people.
    pub fn health(&self) -> Result<(), String> {
        self.replica.health()
    }

    /// Joins the cluster and stays part of it until `stop`: registers as `advertised`, follows the
    /// cluster map, expires files whose writer is gone. Hands over what it leads at the end.
    ///
    /// # Errors
    /// What no retry helps against, and a consensus thread that has stopped.
    pub async fn run(&self, advertised: &str, stop: CancellationToken) -> Result<(), StartError> {
        let Some(joined) = self.replica.join(true, &stop).await? else { return Ok(()) };
        tokio::select! {
            result = self.replica.serve(&joined, advertised, || std::future::ready(InFlight::default()), stop) => result,
            () = self.follow(joined.map.clone()) => Ok(()),
            () = self.expire() => Ok(()),
        }
    }

    /// Does not end.
    async fn follow(&self, mut map: MapWatch) {
        while map.changed().await {
            self.cluster.send_replace(Arc::new(Cluster::from_map(&map.get())));
        }
        std::future::pending::<()>().await;
    }

    /// Does not end.
    async fn expire(&self) {
        loop {
            tokio::time::sleep(EXPIRY_INTERVAL).await;
            match self.expire_once().await {
                // Who leads now will.
                Ok(()) | Err(ConsensusError::NotLeader { .. }) => {}
                Err(error) => tracing::warn!(%error, "files past their deadline could not be expired"),
            }
        }
    }

    /// Of the shards led here; what this host only believes to lead is refused when it is written.
    async fn expire_once(&self) -> Result<(), ConsensusError> {
        let consensus = &self.handler.consensus;
        let due = consensus.local(move |views, now| {
            let due = |shard: &ShardId| {
                let view = views.get(GroupId::from(*shard));
                view.is_some_and(|view| eggs_shard_core::expirable(view, now).unwrap_or(false))
            };
            ShardId::all().filter(due).collect::<Vec<_>>()
        });
        for shard in due.await? {
            let op = pb::write_op::Op::ExpireEden(pb::ExpireEden { limit: EXPIRE_PER_COMMAND });
            let chosen = pb::ChosenOp { op: Some(pb::WriteOp { op: Some(op) }), ..pb::ChosenOp::default() };
            let command = Bytes::from(pb::ShardCommand { ops: vec![chosen] }.encode_to_vec());
            let written = consensus.write(shard.into(), SessionId(0), 0, move |_, _| Ok(command));
            match tokio::time::timeout(EXPIRY_INTERVAL, written).await {
                Ok(Ok(_) | Err(ConsensusError::NotLeader { .. })) | Err(_) => {}
                Ok(Err(error)) => return Err(error),
            }
        }
        Ok(())
    }

    /// Finishes what was accepted and makes the state durable. Blocks for as long as that takes.
    pub fn stop(self) {
        self.replica.stop();
    }
}

struct Transport {
    handler: Handler,
}

#[tonic::async_trait]
impl ShardService for Transport {
    async fn call(&self, request: Request<pb::ShardRequest>) -> Result<Response<pb::ShardReply>, Status> {
        Ok(Response::new(self.handler.call(request.into_inner()).await))
    }
}
