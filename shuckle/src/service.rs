//! Opening, running and stopping the registry: directory, secret, replica, founding or joining.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use bytes::Bytes;
use eggs_consensus::{ConsensusError, Event, GroupId, Handle, PeerHandler, Views};
use eggs_daemon::clock::Stopwatch;
use eggs_daemon::directory::DirectoryError;
use eggs_daemon::registry::RegistryCallError;
use eggs_daemon::secret::SecretError;
use eggs_daemon::{CancellationToken, DataDirectory, Secret, server};
use eggs_proto::limits::{MESSAGE_BYTES_MAX, REPLICAS, STALE_AFTER};
use eggs_proto::pb::registry_command::Command;
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_service_server::{RegistryService, RegistryServiceServer};
use eggs_proto::{ClusterId, RegistryError, ServiceError, SessionId, StoreId, pb};
use eggs_replica::{InFlight, Replica, Settings, StartError};
use eggs_shuckle_core::RegistryMachine;
use prost::Message;
use tonic::{Request, Response, Status};

use crate::joining::{Greeting, Peers, Verdict, judge};
use crate::registry::{self, Parts, Registry};
use crate::web;

/// The registry's consensus group.
pub const GROUP: GroupId = GroupId::SHUCKLE;

/// How often the planner looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How often the gauges of /metrics are set: it takes the whole map.
const GAUGES_INTERVAL: Duration = Duration::from_secs(5);
/// After something was logged, before the planner looks: often more comes.
const NEWS_PAUSE: Duration = Duration::from_millis(20);
/// Between rounds of greetings while there is no cluster.
const GREET_INTERVAL: Duration = Duration::from_millis(200);
/// Peers that are waited for are named this often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);
/// A group of one elects itself at once.
const FOUND_MAX: Duration = Duration::from_secs(10);
const FOUND_PAUSE: Duration = Duration::from_millis(2);
/// Founded with three or more peers, and nothing said: one host may be lost.
const REPLICAS_OF_MANY: u32 = 3;

/// What a registry needs to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its data directory; made when absent.
    pub directory: PathBuf,
    pub secret: SecretSource,
    /// The machine it is on: what is on one host fails together.
    pub host: String,
    /// HOST:PORT that others reach it at.
    pub advertised: String,
    /// HOST:PORT of every shuckle the cluster begins with, this one included: the first founds it. Empty: this one
    /// founds it alone. Not looked at by a directory that is part of a cluster, but to find the others when all
    /// have moved.
    pub peers: Vec<String>,
    /// How many replicas every group is to have; used at the founding, and to be the same later. 0: as the
    /// cluster has (at its founding: 1, or 3 with three peers and more).
    pub replicas: u32,
    /// How long a store may be silent before others get its replicas.
    pub replace_after: Duration,
    /// Answer reads on the word of a lease.
    pub read_lease: bool,
    pub snapshot_bytes_per_second: u64,
    /// How long after it began to lead the registry believes its rows about hosts it has not heard of:
    /// [`Config::PATIENCE`], or zero when the same process holds all of the cluster.
    pub patience: Duration,
}

impl Config {
    /// For a registry whose daemons are other processes.
    pub const PATIENCE: Duration = STALE_AFTER;
    /// Longer than a machine takes to start anew.
    pub const REPLACE_AFTER: Duration = eggs_shuckle_core::REPLACE_AFTER;
}

/// Where the cluster secret is.
#[derive(Debug, Clone)]
pub enum SecretSource {
    /// Known already (an embedded cluster's).
    Given(Secret),
    /// In this file; made when absent by the one that may found the cluster.
    File(PathBuf),
    /// In the file `secret` of the data directory; made when absent. Not with peers.
    InDirectory,
}

/// Why the registry does not run. One line each.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("{0}: every host of --peers needs a copy of the one that the first of them makes")]
    NoSecret(SecretError),
    #[error("with --peers, --secret-file FILE is needed: the same file on every host")]
    WhichSecret,
    #[error("{0}: is the secret file a copy of the other hosts'?")]
    OtherSecret(RegistryCallError),
    #[error("{0} replicas: there can be 1, 3 or 5")]
    Replicas(u32),
    #[error("the cluster was founded with --replicas {founded}, not {asked}: give that, or nothing")]
    OtherReplicas { founded: u32, asked: u32 },
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("the registry in {directory} is damaged: {what}")]
    Damaged { directory: String, what: String },
    #[error(
        "{directory} belongs to cluster {cluster} and has no replica of the registry: give --peers, where others are"
    )]
    Alone { directory: String, cluster: ClusterId },
    #[error("the cluster cannot be founded: {0}")]
    Founding(String),
    #[error("the system has no entropy for a cluster id: {0}")]
    Entropy(String),
}

/// A replica of the registry.
#[derive(Debug)]
pub struct Service {
    registry: Registry,
    replica: Arc<Replica>,
    peers: Peers,
    advertised: String,
    replicas: u32,
    directory: String,
    failed: Arc<AtomicBool>,
}

impl Service {
    /// Opens the registry in its directory; founds a cluster when the directory is new and there are no peers.
    ///
    /// # Errors
    /// The directory or the secret cannot be used, or what is stored cannot be read.
    pub async fn open(config: Config) -> Result<Service, OpenError> {
        if config.replicas != 0 && !REPLICAS.contains(&config.replicas) {
            return Err(OpenError::Replicas(config.replicas));
        }
        let peers = Peers::new(&config.peers, &config.advertised);
        let secret = secret(&config, &peers)?;
        let stopwatch = Stopwatch::start();
        let (patience, replace_after) = (config.patience, config.replace_after);
        let begin = move || registry::listening(stopwatch.now(), patience, replace_after);
        let health = Arc::new(Mutex::new(begin()));
        let heard = Arc::clone(&health);
        let on_event = move |event| {
            if let Event::Role(GROUP, role) = event {
                Registry::role(&heard, role, begin);
            }
        };
        // Itself first: whoever has a replica knows the cluster.
        let shuckle = std::iter::once(&config.advertised).chain(peers.addresses()).cloned().collect();
        let settings = Settings {
            data: config.directory.clone(),
            kind: pb::StoreKind::StoreShuckle,
            host: config.host,
            secret: secret.clone(),
            shuckle,
            read_lease: config.read_lease,
            snapshot_bytes_per_second: config.snapshot_bytes_per_second,
        };
        let machine = |group| (group == GROUP).then_some(RegistryMachine);
        let opened = tokio::task::spawn_blocking(move || Replica::open(settings, machine, on_event)).await;
        let replica = Arc::new(opened.map_err(|error| OpenError::Founding(error.to_string()))??);
        let parts = Parts {
            consensus: replica.handle().clone(),
            secret,
            cluster: Arc::clone(replica.cluster()),
            quorum: Arc::clone(replica.quorum()),
            patience,
            replace_after,
            stopwatch,
            health,
        };
        let service = Service {
            registry: Registry::new(parts),
            replica,
            peers,
            advertised: config.advertised,
            replicas: config.replicas,
            directory: config.directory.display().to_string(),
            failed: Arc::default(),
        };
        service.begin().await?;
        Ok(service)
    }

    /// Goes on from what the directory holds.
    async fn begin(&self) -> Result<(), OpenError> {
        let (handle, cluster) = (self.replica.handle(), self.registry.cluster());
        let status = handle.status().await.into_iter().find(|status| status.group == GROUP);
        let Some(status) = status else {
            return match cluster {
                None if self.peers.is_empty() => self.found().await,
                // The peers are asked once the port is open.
                None => Ok(()),
                Some(_) if !self.peers.is_empty() => Ok(()),
                Some(cluster) => Err(OpenError::Alone { directory: self.directory.clone(), cluster }),
            };
        };
        let damaged = |what: String| OpenError::Damaged { directory: self.directory.clone(), what };
        let rows = handle.local(|views: &Views<'_>, _| views.local(GROUP).map(eggs_shuckle_core::hello));
        let rows = rows.await.map_err(|error| damaged(error.to_string()))?;
        // It waits for its first snapshot.
        let Some(hello) = rows else { return Ok(()) };
        let hello = hello.map_err(|error| damaged(error.to_string()))?;
        // Where the others were last: without a leader nobody else tells.
        let before = self.registry.last_map().await.map_err(|error| damaged(error.message))?;
        let shuckles = before.stores.iter().filter(|info| info.kind() == pb::StoreKind::StoreShuckle);
        handle.addresses(shuckles.map(|info| (StoreId(info.id), info.address.clone())).collect());
        self.replica.quorum().remember(Arc::new(before));
        match hello {
            Some(hello) => {
                let theirs = ClusterId::from_bytes(&hello.cluster_id);
                if let (Some(ours), Some(theirs)) =
                    (cluster, theirs.filter(|theirs| Some(*theirs) != cluster))
                {
                    let what = format!("its FORMAT file is of cluster {ours}, its log of cluster {theirs}");
                    return Err(damaged(what));
                }
                self.check_replicas(hello.replicas)
            }
            // The founding was cut short.
            None if status.membership.voters == [handle.store()] => self.found().await,
            None => Ok(()),
        }
    }

    fn check_replicas(&self, founded: u32) -> Result<(), OpenError> {
        match self.replicas {
            0 => Ok(()),
            asked if asked == founded => Ok(()),
            asked => Err(OpenError::OtherReplicas { founded, asked }),
        }
    }

    /// Founds the cluster, or goes on founding it. The group has its first record before the directory has the
    /// cluster's id, and that before the log has it (SU-1): whatever a crash leaves is gone on with.
    async fn found(&self) -> Result<(), OpenError> {
        let handle = self.replica.handle();
        handle.found(vec![(GROUP, vec![handle.store()])]);
        let founding = async {
            while !handle.status().await.iter().any(|status| status.group == GROUP) {
                tokio::time::sleep(FOUND_PAUSE).await;
            }
            let cluster = match self.registry.cluster() {
                Some(cluster) => cluster,
                None => new_cluster_id()?,
            };
            self.replica.claim(cluster)?;
            self.log_founding(handle, cluster).await
        };
        let founded = tokio::time::timeout(FOUND_MAX, founding).await;
        founded.unwrap_or_else(|_| Err(OpenError::Founding("its log does not get on".to_owned())))
    }

    async fn log_founding(&self, handle: &Handle, cluster: ClusterId) -> Result<(), OpenError> {
        let replicas = match self.replicas {
            0 if self.peers.len() + 1 >= REPLICAS_OF_MANY as usize => REPLICAS_OF_MANY,
            0 => 1,
            asked => asked,
        };
        let id = Bytes::copy_from_slice(&cluster.0);
        let command = Some(Command::Found(pb::FoundCluster { cluster_id: id.clone(), replicas }));
        let command = Bytes::from(pb::RegistryCommand { command }.encode_to_vec());
        loop {
            let command = command.clone();
            match handle.write(GROUP, SessionId(0), 0, move |_, _| Ok(command)).await {
                // It elects itself in a moment.
                Err(ConsensusError::NotLeader { .. } | ConsensusError::Busy) => {
                    tokio::time::sleep(FOUND_PAUSE).await;
                }
                Err(error) => return Err(OpenError::Founding(error.to_string())),
                Ok(applied) => match registry::decode(applied) {
                    Ok(Answer::Hello(hello)) if hello.cluster_id == id => {
                        tracing::info!(%cluster, replicas, "founded a cluster");
                        return self.check_replicas(hello.replicas);
                    }
                    Ok(Answer::Error(error)) | Err(error) => return Err(OpenError::Founding(error.message)),
                    Ok(other) => return Err(OpenError::Founding(format!("answered with {other:?}"))),
                },
            }
        }
    }

    /// The cluster, once it is known: at once when it was founded here, or known before.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.registry.cluster()
    }

    /// What answers requests, for callers in the same process.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The gRPC service, the dashboard and the API. /metrics and /healthz are the process's to add
    /// ([`eggs_daemon::metrics::router`]), once for all its services; so is the `peer_streams`.
    pub fn router(&self) -> Router {
        let service = RegistryServiceServer::new(Rpc(self.registry.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        server::grpc(service).merge(web::router(self.registry.clone()))
    }

    /// What answers the other replicas of the registry.
    pub fn peers(&self) -> PeerHandler {
        self.replica.peers()
    }

    /// Whether this daemon is well (not the cluster: /healthz is what restarts a daemon).
    pub fn health(&self) -> impl Fn() -> Result<(), String> + Send + Sync + 'static {
        let (failed, replica) = (Arc::clone(&self.failed), Arc::downgrade(&self.replica));
        move || {
            if failed.load(Ordering::Relaxed) {
                return Err("failed".to_owned());
            }
            replica.upgrade().ok_or_else(|| "stopping".to_owned())?.health()
        }
    }

    /// Becomes part of the cluster and stays it until `stop`; leads it when it is this one's turn. The port must be
    /// served meanwhile. Hands over what it leads at the end.
    ///
    /// # Errors
    /// What no retry helps against, and storage that has failed.
    pub async fn run(&self, stop: CancellationToken) -> Result<(), OpenError> {
        let result = tokio::select! {
            result = self.take_part(stop) => result,
            () = self.plan() => Ok(()),
            () = self.gauges() => Ok(()),
            () = self.find_others() => Ok(()),
        };
        if result.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        result
    }

    async fn take_part(&self, stop: CancellationToken) -> Result<(), OpenError> {
        if self.registry.cluster().is_none() {
            tokio::select! {
                begun = self.found_or_join() => begun?,
                () = stop.cancelled() => return Ok(()),
            }
        }
        let Some(joined) = self.replica.join(false, &stop).await? else { return Ok(()) };
        self.check_replicas(joined.registry.replicas())?;
        self.registry.joined(joined.clone());
        let served = self
            .replica
            .serve(&joined, &self.advertised, || std::future::ready(InFlight::default()), stop)
            .await;
        served.map_err(|error| match error {
            StartError::Registry(RegistryCallError::Refused { address, error })
                if error.code == RegistryError::Unauthorized.code() =>
            {
                OpenError::OtherSecret(RegistryCallError::Refused { address, error })
            }
            error => error.into(),
        })
    }

    /// Until it is clear who founds the cluster, or that there is one.
    async fn found_or_join(&self) -> Result<(), OpenError> {
        let mut complained: Option<tokio::time::Instant> = None;
        loop {
            let waits = match judge(self.peers.first, &self.peers.greet().await) {
                Verdict::Found => return self.found().await,
                Verdict::Join => return Ok(()),
                Verdict::Wait(waits) => waits,
            };
            if complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
                complained = Some(tokio::time::Instant::now());
                tracing::warn!(%waits, "this one founds the cluster when all other peers say that they have none");
            }
            tokio::time::sleep(GREET_INTERVAL).await;
        }
    }

    /// Looks about once a second, and soon after something was logged. Does not end.
    async fn plan(&self) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                () = self.registry.news() => tokio::time::sleep(NEWS_PAUSE).await,
            }
            if let Err(error) = self.registry.plan().await
                && self.registry.leads()
            {
                tracing::warn!(error = error.message, "what is planned cannot be logged");
            }
        }
    }

    /// While nobody leads, as the replica here knows: the peers that were listed may have moved since they last registered.
    /// Does not end.
    async fn find_others(&self) {
        let handle = self.replica.handle();
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let Some(ours) = self.registry.cluster().filter(|_| !handle.hears_leader(GROUP)) else {
                continue;
            };
            let found =
                self.peers.greet().await.into_iter().filter_map(|(address, greeting)| match greeting {
                    Greeting::Cluster(cluster, Some(store)) if cluster == ours => Some((store, address)),
                    _ => None,
                });
            let found: Vec<(StoreId, String)> = found.filter(|(store, _)| *store != handle.store()).collect();
            handle.addresses(found);
        }
    }

    /// Keeps the gauges current. Does not end.
    async fn gauges(&self) {
        loop {
            let leads = self.registry.leads();
            metrics::gauge!("eggs_shuckle_leader").set(f64::from(u8::from(leads)));
            // Everybody's would be the leader's.
            let pause = match self.registry.known_here().await {
                Some(known) => {
                    known.record();
                    GAUGES_INTERVAL
                }
                None => LOOK_INTERVAL,
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Finishes what was accepted, makes everything durable and lets go of the directory.
    pub async fn stop(self) {
        let Service { replica, .. } = self;
        if let Some(replica) = Arc::into_inner(replica) {
            let _ = tokio::task::spawn_blocking(|| replica.stop()).await;
        }
    }
}

/// With peers only the one that may found makes a secret: others would make another.
fn secret(config: &Config, peers: &Peers) -> Result<Secret, OpenError> {
    match &config.secret {
        SecretSource::Given(secret) => Ok(secret.clone()),
        SecretSource::File(path) if peers.first => Ok(Secret::load_or_create(path)?),
        SecretSource::File(path) => Secret::load(path).map_err(OpenError::NoSecret),
        SecretSource::InDirectory if !peers.is_empty() => Err(OpenError::WhichSecret),
        SecretSource::InDirectory => {
            // It is made only in a directory that is ours.
            let directory = DataDirectory::open(&config.directory, "shuckle")?;
            Ok(Secret::load_or_create(&directory.path().join("secret"))?)
        }
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
