//! Opening and stopping the registry: directory, secret, consensus group, founding.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use bytes::Bytes;
use eggs_consensus::{ConsensusError, GroupId, Handle, Options, Runner};
use eggs_daemon::directory::DirectoryError;
use eggs_daemon::secret::SecretError;
use eggs_daemon::{CancellationToken, DataDirectory, Secret, server};
use eggs_proto::limits::{MESSAGE_BYTES_MAX, STALE_AFTER};
use eggs_proto::pb::registry_command::Command;
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_service_server::{RegistryService, RegistryServiceServer};
use eggs_proto::{ClusterId, SessionId, Time, pb};
use eggs_shuckle_core::RegistryMachine;
use prost::Message;
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status};

use crate::registry::{self, Registry};
use crate::web;

/// The registry's consensus group.
pub const GROUP: GroupId = GroupId(257);

/// How often the gauges of /metrics are set.
const GAUGE_INTERVAL: Duration = Duration::from_secs(1);

/// What a registry needs to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its data directory; made when absent.
    pub directory: PathBuf,
    pub secret: SecretSource,
    /// How long after its start the registry believes its rows about hosts it has not heard of:
    /// [`Config::PATIENCE`], or zero when the same process holds all of the cluster.
    pub patience: Duration,
}

impl Config {
    /// For a registry whose daemons are other processes.
    pub const PATIENCE: Duration = STALE_AFTER;
}

/// Where the cluster secret is.
#[derive(Debug, Clone)]
pub enum SecretSource {
    /// Known already (an embedded cluster's).
    Given(Secret),
    /// In this file; made when absent.
    File(PathBuf),
    /// In the file `secret` of the data directory; made when absent.
    InDirectory,
}

/// Why the registry does not run. One line each.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("the registry in {directory} cannot be opened: {source}")]
    Consensus { directory: String, source: ConsensusError },
    #[error("the registry in {directory} is damaged: {what}")]
    Damaged { directory: String, what: String },
    #[error("the system has no entropy for a cluster id: {0}")]
    Entropy(String),
}

/// A running registry.
#[derive(Debug)]
pub struct Service {
    registry: Registry,
    consensus: Handle,
    runner: Runner,
    gauges: JoinHandle<()>,
    stop: CancellationToken,
    failed: Arc<AtomicBool>,
    // Last: the directory is given up when everything in it is closed.
    directory: DataDirectory,
}

impl Service {
    /// Opens the registry in its directory; founds a cluster when the directory is new.
    ///
    /// # Errors
    /// The directory or the secret cannot be used, or what is stored cannot be read.
    pub async fn open(config: Config) -> Result<Service, OpenError> {
        let mut directory = DataDirectory::open(&config.directory, "shuckle")?;
        let secret = match config.secret {
            SecretSource::Given(secret) => secret,
            SecretSource::File(path) => Secret::load_or_create(&path)?,
            SecretSource::InDirectory => Secret::load_or_create(&directory.path().join("secret"))?,
        };
        // The id is in the directory before it is in the log: a crash between the two founds the
        // same cluster again (SU-1).
        let cluster = match directory.cluster() {
            Some(cluster) => cluster,
            None => new_cluster_id()?,
        };
        directory.claim(cluster)?;
        let shown = directory.path().display().to_string();
        let (consensus, runner) = spawn(directory.path().to_owned(), &shown).await?;
        let created_at = found(&consensus, cluster, &shown).await?;
        let registry = Registry::new(consensus.clone(), secret, cluster, created_at, config.patience);
        let (stop, failed) = (CancellationToken::new(), Arc::new(AtomicBool::new(false)));
        let gauges =
            tokio::spawn(gauges(registry.clone(), consensus.clone(), Arc::clone(&failed), stop.clone()));
        Ok(Service { registry, consensus, runner, gauges, stop, failed, directory })
    }

    pub fn cluster(&self) -> ClusterId {
        self.registry.cluster()
    }

    /// What answers requests, for callers in the same process.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The gRPC service, the dashboard and the API. /metrics and /healthz are the process's to add
    /// ([`eggs_daemon::metrics::router`]), once for all its services.
    pub fn router(&self) -> Router {
        let service = RegistryServiceServer::new(Rpc(self.registry.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        server::grpc(service).merge(web::router(self.registry.clone()))
    }

    /// Whether this daemon is well (not the cluster: /healthz is what restarts a daemon).
    pub fn health(&self) -> impl Fn() -> Result<(), String> + Send + Sync + 'static {
        let failed = Arc::clone(&self.failed);
        move || if failed.load(Ordering::Relaxed) { Err("storage failed".to_owned()) } else { Ok(()) }
    }

    /// Waits until the registry can go on no longer; says why. For ever when all is well.
    pub fn failed(&self) -> impl Future<Output = String> + Send + 'static {
        let consensus = self.consensus.clone();
        async move {
            match consensus.stopped().await {
                Some(why) => format!("the registry's storage failed: {why}"),
                None => std::future::pending().await,
            }
        }
    }

    /// Finishes what was accepted, makes everything durable and lets go of the directory.
    pub async fn stop(self) {
        let Service { runner, gauges, stop, directory, .. } = self;
        stop.cancel();
        let _ = gauges.await;
        let stopped = tokio::task::spawn_blocking(move || {
            runner.stop();
            drop(directory);
        });
        let _ = stopped.await;
    }
}

fn new_cluster_id() -> Result<ClusterId, OpenError> {
    loop {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| OpenError::Entropy(error.to_string()))?;
        // All zeros mean "none".
        if let Some(cluster) = ClusterId::from_bytes(&bytes) {
            return Ok(cluster);
        }
    }
}

async fn spawn(directory: PathBuf, shown: &str) -> Result<(Handle, Runner), OpenError> {
    let options = Options { name: "shuckle", directory, groups: vec![GROUP] };
    let spawn = move || eggs_consensus::spawn(&options, |_| RegistryMachine, |_, _| {});
    let spawned = tokio::task::spawn_blocking(spawn).await;
    spawned
        .unwrap_or_else(|error| Err(ConsensusError::Storage(error.to_string())))
        .map_err(|source| OpenError::Consensus { directory: shown.to_owned(), source })
}

/// Logs the cluster's founding, unless it was; when it was founded. RG-1 makes this the same for
/// every start.
async fn found(consensus: &Handle, cluster: ClusterId, shown: &str) -> Result<Time, OpenError> {
    let damaged = |what: String| OpenError::Damaged { directory: shown.to_owned(), what };
    let id = Bytes::copy_from_slice(&cluster.0);
    let command =
        pb::RegistryCommand { command: Some(Command::Found(pb::FoundCluster { cluster_id: id.clone() })) };
    let prepare = move |view: &dyn eggs_machine::Table, _: Time| match eggs_shuckle_core::hello(view) {
        Ok(Some(hello)) => {
            let reply = pb::RegistryReply { header: None, result: Some(Answer::Hello(hello)) };
            Err(Bytes::from(reply.encode_to_vec()))
        }
        // A row that cannot be read stops the machine when the command is applied.
        Ok(None) | Err(_) => Ok(Bytes::from(command.encode_to_vec())),
    };
    let applied = consensus
        .write(GROUP, SessionId(0), 0, prepare)
        .await
        .map_err(|source| OpenError::Consensus { directory: shown.to_owned(), source })?;
    match registry::decode(applied) {
        Ok(Answer::Hello(hello)) if hello.cluster_id == id => Ok(Time(hello.created_at)),
        Ok(Answer::Hello(hello)) => {
            let theirs =
                ClusterId::from_bytes(&hello.cluster_id).map(|id| id.to_string()).unwrap_or_default();
            Err(damaged(format!("its FORMAT file is of cluster {cluster}, its log of cluster {theirs}")))
        }
        Ok(_) => Err(damaged("founding was answered with something else".to_owned())),
        Err(error) => Err(damaged(error.message)),
    }
}

/// Keeps the gauges and the health of the process current.
async fn gauges(registry: Registry, consensus: Handle, failed: Arc<AtomicBool>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(GAUGE_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            Some(_) = consensus.stopped() => {
                failed.store(true, Ordering::Relaxed);
                return;
            }
            () = stop.cancelled() => return,
        }
        if let Ok(known) = registry.known().await {
            known.record();
        }
    }
}

struct Rpc(Registry);

#[tonic::async_trait]
impl RegistryService for Rpc {
    async fn call(
        &self,
        request: Request<pb::RegistryRequest>,
    ) -> Result<Response<pb::RegistryReply>, Status> {
        Ok(Response::new(self.0.handle(request.into_inner()).await))
    }
}
