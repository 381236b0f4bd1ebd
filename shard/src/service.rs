//! A shard service's life: open, join the cluster, serve, stop.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::Router;
use bytes::Bytes;
use eggs_consensus::{ConsensusError, GroupId, Handle, Options, Runner};
use eggs_daemon::directory::DirectoryError;
use eggs_daemon::registry::{JoinError, MapWatch, Registry, RegistryCallError};
use eggs_daemon::space::Space;
use eggs_daemon::{CancellationToken, DataDirectory, Secret, server};
use eggs_proto::limits::MESSAGE_BYTES_MAX;
use eggs_proto::pb::registry_request::Op as RegistryOp;
use eggs_proto::pb::shard_service_server::{ShardService, ShardServiceServer};
use eggs_proto::{SessionId, ShardId, pb};
use eggs_shard_core::{Cluster, ShardMachine};
use prost::Message;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::config::Config;
use crate::handler::{Handler, group};
use crate::shards::ShardList;

/// How often files in writing are looked at for their deadline (which is an hour).
const EXPIRY_INTERVAL: Duration = Duration::from_secs(60);
/// Files that lose their writer in one command.
const EXPIRE_PER_COMMAND: u32 = 256;

/// Why the service cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("{}: {error}", path.display())]
    Consensus { path: PathBuf, error: ConsensusError },
    /// The directory was made for other shards.
    #[error("{} holds shards {held}, not {asked}: give --shards {held}, or another directory", path.display())]
    OtherShards { path: PathBuf, held: String, asked: String },
    /// Served elsewhere, or from another directory, before.
    #[error("{} is new and empty, but shard {shard} was served at {address} before: start with the directory that holds it (is its disk mounted?)", path.display())]
    Replaces { path: PathBuf, shard: u32, address: String },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    Registry(#[from] RegistryCallError),
    #[error("the shards stopped: {0}")]
    Failed(String),
}

/// The shards of one process.
#[derive(Debug)]
pub struct Service {
    handler: Handler,
    cluster: watch::Sender<Arc<Cluster>>,
    directory: Mutex<DataDirectory>,
    runner: Runner,
    shards: ShardList,
    shuckle: String,
    secret: Secret,
}

impl Service {
    /// Opens the data directory and brings every shard's state up to its log. Blocks.
    pub fn open(config: Config) -> Result<Service, StartError> {
        let directory = DataDirectory::open(&config.data, "shard")?;
        remember_shards(directory.path(), &config.shards)?;
        let options = Options {
            name: "shard",
            directory: directory.path().to_owned(),
            groups: config.shards.iter().map(group).collect(),
        };
        let machine = |GroupId(id): GroupId| ShardMachine { shard: ShardId(id as u8) };
        let (consensus, runner) = eggs_consensus::spawn(&options, machine, |_, _| {})
            .map_err(|error| StartError::Consensus { path: config.data.clone(), error })?;
        let cluster_id = Arc::new(OnceLock::new());
        if let Some(id) = directory.cluster() {
            let _ = cluster_id.set(id);
        }
        let (cluster, receiver) =
            watch::channel(Arc::new(Cluster::from_map(&pb::ClusterMapReply::default())));
        let handler = Handler {
            consensus,
            secret: config.secret.clone(),
            cluster_id,
            space: Arc::new(Space::new(directory.path().to_owned())),
            cluster: receiver,
        };
        Ok(Service {
            handler,
            cluster,
            directory: Mutex::new(directory),
            runner,
            shards: config.shards,
            shuckle: config.shuckle,
            secret: config.secret,
        })
    }

    /// Its part of the port.
    pub fn router(&self) -> Router {
        let service = ShardServiceServer::new(Transport { handler: self.handler.clone() })
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        server::grpc(service)
    }

    /// Why it is not well, if it is not.
    pub fn health(&self) -> Result<(), String> {
        match self.handler.cluster_id.get() {
            Some(_) => Ok(()),
            None => Err("not joined a cluster yet".to_owned()),
        }
    }

    /// Joins the cluster and stays part of it until `stop`: registers as `advertised`, follows the
    /// cluster map, expires files whose writer is gone.
    ///
    /// # Errors
    /// What no retry helps against, and a consensus thread that has stopped.
    pub async fn run(&self, advertised: &str, stop: CancellationToken) -> Result<(), StartError> {
        let expected = self.directory.lock().unwrap_or_else(PoisonError::into_inner).cluster();
        let joined = Registry::join(&self.shuckle, Some(self.secret.clone()), expected, &stop).await;
        let registry = match joined {
            Err(JoinError::Stopped { .. }) => return Ok(()),
            joined => joined?,
        };
        if expected.is_none() {
            self.refuse_to_replace(&registry).await?;
        }
        self.directory.lock().unwrap_or_else(PoisonError::into_inner).claim(registry.cluster())?;
        let _ = self.handler.cluster_id.set(registry.cluster());
        let report = || report(self.handler.consensus.clone(), advertised.to_owned());
        let heartbeat =
            registry.heartbeat(report, || tracing::info!(shards = %self.shards, "serving"), stop.clone());
        tokio::select! {
            result = heartbeat => result.map_err(StartError::from),
            () = self.follow(registry.watch(true, stop.clone())) => Ok(()),
            () = self.expire(stop.clone()) => Ok(()),
            why = self.handler.consensus.stopped() => {
                Err(StartError::Failed(why.unwrap_or_else(|| "stopped".to_owned())))
            }
        }
    }

    /// A new directory has empty shards. Where the cluster knows these shards already, they hold
    /// something elsewhere: a disk that is not mounted, a wrong path.
    async fn refuse_to_replace(&self, registry: &Registry) -> Result<(), StartError> {
        let map = registry.map(false).await?;
        let held = |place: &&pb::ShardPlace| {
            let shard = ShardId::try_from(place.shard);
            !place.address.is_empty() && shard.is_ok_and(|shard| self.shards.contains(shard))
        };
        let Some(place) = map.shards.iter().find(held) else { return Ok(()) };
        let path = self.directory.lock().unwrap_or_else(PoisonError::into_inner).path().to_owned();
        Err(StartError::Replaces { path, shard: place.shard, address: place.address.clone() })
    }

    async fn follow(&self, mut map: MapWatch) {
        while map.changed().await {
            self.cluster.send_replace(Arc::new(Cluster::from_map(&map.get())));
        }
        std::future::pending::<()>().await;
    }

    async fn expire(&self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(EXPIRY_INTERVAL) => {}
            }
            if let Err(error) = self.expire_once().await {
                tracing::warn!(%error, "files past their deadline could not be expired");
            }
        }
    }

    async fn expire_once(&self) -> Result<(), ConsensusError> {
        let shards: Vec<ShardId> = self.shards.iter().collect();
        let due = self
            .handler
            .consensus
            .read(move |views, now| {
                let due = |&shard: &ShardId| {
                    let view = views.get(group(shard));
                    view.is_some_and(|view| eggs_shard_core::expirable(view, now).unwrap_or(false))
                };
                shards.into_iter().filter(due).collect::<Vec<_>>()
            })
            .await?;
        for shard in due {
            let op = pb::write_op::Op::ExpireEden(pb::ExpireEden { limit: EXPIRE_PER_COMMAND });
            let chosen = pb::ChosenOp { op: Some(pb::WriteOp { op: Some(op) }), ..pb::ChosenOp::default() };
            let command = Bytes::from(pb::ShardCommand { ops: vec![chosen] }.encode_to_vec());
            self.handler.consensus.write(group(shard), SessionId(0), 0, move |_, _| Ok(command)).await?;
        }
        Ok(())
    }

    /// Finishes what was accepted and makes the state durable. Blocks for as long as that takes.
    pub fn stop(self) {
        self.runner.stop();
    }
}

async fn report(consensus: Handle, address: String) -> RegistryOp {
    let status = consensus.status().await.unwrap_or_default();
    let shards = status
        .into_iter()
        .map(|status| pb::ShardReport {
            shard: u32::from(status.group.0),
            leader: status.leader,
            applied_index: status.applied_index,
            log_bytes: status.log_bytes,
        })
        .collect();
    RegistryOp::RegisterShards(pb::RegisterShards { address, shards })
}

/// A directory is made for a list of shards and keeps it: with another list some shards would come up
/// empty and others not at all.
fn remember_shards(directory: &Path, asked: &ShardList) -> Result<(), StartError> {
    let path = directory.join("shards");
    let io_error = |error| StartError::Io { path: path.clone(), error };
    match fs::read_to_string(&path) {
        Ok(held) if held.trim().parse().as_ref() == Ok(asked) => Ok(()),
        Ok(held) => Err(StartError::OtherShards {
            path: directory.to_owned(),
            held: held.trim().to_owned(),
            asked: asked.to_string(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let written = directory.join("shards.tmp");
            fs::write(&written, format!("{asked}\n"))
                .and_then(|()| fs::File::open(&written)?.sync_all())
                .and_then(|()| fs::rename(&written, &path))
                .and_then(|()| fs::File::open(directory)?.sync_all())
                .map_err(io_error)
        }
        Err(error) => Err(io_error(error)),
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
