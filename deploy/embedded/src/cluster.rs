//! Starting, supervising and stopping all services of a cluster.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use eggs_blockd::DiskConfig;
use eggs_daemon::directory::{DirectoryError, Problem};
use eggs_daemon::registry::{JoinError, Registry, RegistryCallError};
use eggs_daemon::{CancellationToken, DataDirectory, Secret, metrics, server};
use eggs_proto::limits::{CLASS_FLASH, SHARDS};
use eggs_proto::{ClusterId, pb};
use eggs_shard::ShardList;
use tokio::task::{JoinHandle, JoinSet};

use crate::manifest::{DISKS_DEFAULT, DISKS_MAX, Manifest};

/// All of it must be serving by then.
const READY_MAX: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// What to start.
#[derive(Debug, Clone)]
pub struct Config {
    /// The cluster's directory; made when absent.
    pub data: PathBuf,
    /// The one port of everything. Port 0 picks a free one.
    pub listen: SocketAddr,
    /// Unset: what the cluster has, 8 for a new one. More than it has: new ones are added.
    pub disks: Option<usize>,
}

/// Why a cluster cannot start, or went down. One line each.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Bind(#[from] server::BindError),
    #[error(
        "cannot listen on {0}: the parts of a cluster in one process find each other at the address they listen on, so it must be one of this host's"
    )]
    Unspecified(SocketAddr),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{} is missing: restore it, or start with another --data directory", .0.display())]
    PartMissing(PathBuf),
    #[error("--disks {asked}: a cluster in one process has 1 to {DISKS_MAX} disks")]
    DiskCount { asked: usize },
    #[error("--disks {asked}: the cluster in {} has {held} disks, and none can be taken away like this", path.display())]
    FewerDisks { path: PathBuf, held: usize, asked: usize },
    #[error("secret: {0}")]
    Secret(#[from] eggs_daemon::secret::SecretError),
    #[error("shuckle: {0}")]
    Shuckle(#[from] eggs_shuckle::OpenError),
    #[error("shards: {0}")]
    Shard(#[from] eggs_shard::StartError),
    #[error("crossdir: {0}")]
    Crossdir(#[from] eggs_crossdir::StartError),
    #[error("disks: {0}")]
    Blockd(#[from] eggs_blockd::OpenError),
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    Registry(#[from] RegistryCallError),
    #[error("not ready after {seconds} s: {what}", seconds = READY_MAX.as_secs())]
    NotReady { what: String },
    #[error("a part of the cluster ended: {0}")]
    Ended(String),
}

/// A running cluster. Stop it with [`Cluster::stop`]; dropped, it ends as in a crash (nothing
/// acknowledged is lost).
#[derive(Debug)]
pub struct Cluster {
    id: ClusterId,
    address: SocketAddr,
    took: Duration,
    disks: usize,
    data: PathBuf,
    stop: CancellationToken,
    served: JoinHandle<()>,
    tasks: JoinSet<Result<(), StartError>>,
    shuckle: eggs_shuckle::Service,
    shard: Arc<eggs_shard::Service>,
    crossdir: Arc<eggs_crossdir::Service>,
    blockd: eggs_blockd::Service,
    // Last: given up when everything in it is closed.
    _directory: DataDirectory,
}

impl Cluster {
    /// Starts everything; ready to serve when it returns.
    ///
    /// # Errors
    /// One line for people. What could not be used is not changed.
    pub async fn start(config: Config) -> Result<Cluster, StartError> {
        let started = Instant::now();
        metrics::install();
        if let Some(asked) = config.disks.filter(|disks| !(1..=DISKS_MAX).contains(disks)) {
            return Err(StartError::DiskCount { asked });
        }
        if config.listen.ip().is_unspecified() {
            return Err(StartError::Unspecified(config.listen));
        }
        // Whichever can refuse without leaving a trace goes first.
        let (listener, mut directory) = if config.data.join("FORMAT").exists() {
            let directory = DataDirectory::open(&config.data, "embedded")?;
            (server::bind(config.listen).await?, directory)
        } else {
            let listener = server::bind(config.listen).await?;
            (listener, DataDirectory::open(&config.data, "embedded")?)
        };
        let data = std::path::absolute(&config.data).unwrap_or(config.data);
        let io_error = |error| StartError::Io { path: data.clone(), error };
        let address = listener.local_addr().map_err(io_error)?;
        let manifest = Manifest::read(&data).map_err(io_error)?;
        let disks = disks(&data, config.disks, manifest.as_ref())?;
        let parts = ["shuckle", "shard", "crossdir", "secret"].map(|part| data.join(part));
        if let Some(missing) = parts.iter().find(|part| manifest.is_some() && !part.exists()) {
            return Err(StartError::PartMissing(missing.clone()));
        }
        check_parts(&data, directory.cluster(), manifest.is_some())?;
        let secret = Secret::load_or_create(&data.join("secret"))?;

        let shuckle = eggs_shuckle::Service::open(eggs_shuckle::Config {
            directory: data.join("shuckle"),
            secret: eggs_shuckle::SecretSource::Given(secret.clone()),
            // Whoever is not heard of now is not there.
            patience: Duration::ZERO,
        })
        .await?;
        let id = shuckle.cluster();
        directory.claim(id)?;
        let count = disks.len();
        let (shard, crossdir, blockd) = open_services(&data, address, &secret, id, disks).await?;
        if manifest.as_ref() != Some(&Manifest::new(count)) {
            Manifest::new(count).write(&data).map_err(io_error)?;
        }

        let stop = CancellationToken::new();
        let router = shuckle
            .router()
            .merge(shard.router())
            .merge(crossdir.router())
            .merge(blockd.router())
            .merge(metrics::router(health(&shuckle, &shard, &crossdir, &blockd)));
        let served = tokio::spawn(server::serve(listener, router, stop.clone()));
        let mut cluster = Cluster {
            id,
            address,
            took: Duration::ZERO,
            disks: count,
            data,
            stop,
            served,
            tasks: JoinSet::new(),
            shuckle,
            shard,
            crossdir,
            blockd,
            _directory: directory,
        };
        cluster.register(secret);
        match cluster.wait_until_ready(count).await {
            Ok(()) => {
                cluster.took = started.elapsed();
                Ok(cluster)
            }
            Err(error) => {
                cluster.stop().await;
                Err(error)
            }
        }
    }

    fn register(&mut self, secret: Secret) {
        let (failed, stop) = (self.shuckle.failed(), self.stop.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                why = failed => Err(StartError::Ended(format!("shuckle: {why}"))),
                () = stop.cancelled() => Ok(()),
            }
        });
        let advertised = self.address.to_string();
        let (service, address, stop) = (Arc::clone(&self.shard), advertised.clone(), self.stop.clone());
        self.tasks.spawn(async move { Ok(service.run(&address, stop).await?) });
        let (service, address, stop) = (Arc::clone(&self.crossdir), advertised.clone(), self.stop.clone());
        self.tasks.spawn(async move { Ok(service.run(&address, stop).await?) });
        let (service, stop, id) = (self.blockd.clone(), self.stop.clone(), self.id);
        self.tasks.spawn(async move {
            let registry = match Registry::join(&advertised, Some(secret), Some(id), &stop).await {
                Err(JoinError::Stopped { .. }) => return Ok(()),
                joined => joined?,
            };
            Ok(service.run_registration(&registry, advertised, || {}, stop).await?)
        });
    }

    /// Until shuckle knows of everything: every shard, the coordinator, every disk (lost ones too).
    async fn wait_until_ready(&mut self, disks: usize) -> Result<(), StartError> {
        let registry = Registry::join(&self.address.to_string(), None, Some(self.id), &self.stop).await?;
        let deadline = Instant::now() + READY_MAX;
        loop {
            let missing = missing(&registry.map(false).await?, disks);
            let Some(missing) = missing else { return Ok(()) };
            if Instant::now() > deadline {
                return Err(StartError::NotReady { what: missing });
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
                failure = ended(&mut self.tasks) => return Err(failure),
            }
        }
    }

    /// The cluster's id.
    pub fn id(&self) -> ClusterId {
        self.id
    }

    /// Where all of it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many disks it has, lost ones too.
    pub fn disks(&self) -> usize {
        self.disks
    }

    /// The web dashboard.
    pub fn dashboard_url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// How long the start took.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Its directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Waits until a part of the cluster ends by itself, and says why: then the rest should be stopped.
    pub async fn failed(&mut self) -> StartError {
        ended(&mut self.tasks).await
    }

    /// Takes no new requests, finishes those in flight, makes everything durable.
    pub async fn stop(mut self) {
        self.stop.cancel();
        let _ = self.served.await;
        while self.tasks.join_next().await.is_some() {}
        self.blockd.stop().await;
        let (shard, crossdir) = (Arc::into_inner(self.shard), Arc::into_inner(self.crossdir));
        let stopped = tokio::task::spawn_blocking(move || {
            if let Some(crossdir) = crossdir {
                crossdir.stop();
            }
            if let Some(shard) = shard {
                shard.stop();
            }
        });
        let _ = stopped.await;
        self.shuckle.stop().await;
    }
}

/// For `/healthz`: well when every part is.
fn health(
    shuckle: &eggs_shuckle::Service,
    shard: &Arc<eggs_shard::Service>,
    crossdir: &Arc<eggs_crossdir::Service>,
    blockd: &eggs_blockd::Service,
) -> impl Fn() -> Result<(), String> + Send + Sync + 'static {
    let (shuckle, blockd) = (shuckle.health(), blockd.health());
    let (shard, crossdir) = (Arc::downgrade(shard), Arc::downgrade(crossdir));
    move || {
        let stopping = || "stopping".to_owned();
        shuckle()?;
        shard.upgrade().ok_or_else(stopping)?.health()?;
        crossdir.upgrade().ok_or_else(stopping)?.health()?;
        blockd()
    }
}

/// The first part that ends.
async fn ended(tasks: &mut JoinSet<Result<(), StartError>>) -> StartError {
    match tasks.join_next().await {
        Some(Ok(Err(error))) => error,
        Some(Err(error)) => StartError::Ended(error.to_string()),
        Some(Ok(Ok(()))) | None => StartError::Ended("without a word".to_owned()),
    }
}

async fn open_services(
    data: &Path,
    address: SocketAddr,
    secret: &Secret,
    cluster: ClusterId,
    disks: Vec<DiskConfig>,
) -> Result<(Arc<eggs_shard::Service>, Arc<eggs_crossdir::Service>, eggs_blockd::Service), StartError> {
    let shuckle = address.to_string();
    let shard = eggs_shard::Config {
        data: data.join("shard"),
        shards: ShardList::all(),
        secret: secret.clone(),
        shuckle: shuckle.clone(),
    };
    let crossdir = eggs_crossdir::Config { data: data.join("crossdir"), secret: secret.clone(), shuckle };
    let shard = tokio::task::spawn_blocking(|| eggs_shard::Service::open(shard));
    let crossdir = tokio::task::spawn_blocking(|| eggs_crossdir::Service::open(crossdir));
    let config = eggs_blockd::Config { cluster, disks };
    let blockd = tokio::task::spawn_blocking(|| eggs_blockd::Service::open(config));
    let panicked = |error: tokio::task::JoinError| StartError::Ended(error.to_string());
    let (shard, crossdir, blockd) = tokio::join!(shard, crossdir, blockd);
    let shard = shard.map_err(panicked)??;
    let crossdir = crossdir.map_err(panicked)??;
    Ok((Arc::new(shard), Arc::new(crossdir), blockd.map_err(panicked)??))
}

/// Refuses parts of another cluster, or of a newer format, while none has been opened: opening changes them.
fn check_parts(data: &Path, cluster: Option<ClusterId>, complete: bool) -> Result<(), StartError> {
    for part in ["shuckle", "shard", "crossdir"] {
        let path = data.join(part);
        let own = DataDirectory::peek(&path, part)?;
        if let (Some(own), Some(wanted)) = (own, cluster)
            && own != wanted
        {
            return Err(DirectoryError { path, problem: Problem::AnotherCluster { own, wanted } }.into());
        }
        let format = path.join("FORMAT");
        // One that has not joined yet is as it was left when the first start was cut short.
        if complete && !format.exists() {
            // Empty: it would come up with nothing in it.
            return Err(StartError::PartMissing(format));
        }
    }
    Ok(())
}

/// Each disk is its own failure domain: in one process nothing else can fail alone.
fn disks(
    data: &Path,
    asked: Option<usize>,
    manifest: Option<&Manifest>,
) -> Result<Vec<DiskConfig>, StartError> {
    let held = manifest.map_or(0, |manifest| manifest.disks);
    let count = asked.unwrap_or(if held == 0 { DISKS_DEFAULT } else { held });
    if count < held {
        return Err(StartError::FewerDisks { path: data.to_owned(), held, asked: count });
    }
    let disk = |n: usize| DiskConfig {
        path: data.join("disks").join(format!("{n:02}")),
        storage_class: CLASS_FLASH,
        failure_domain: format!("disk-{n:02}"),
        expect_existing: n < held,
    };
    Ok((0..count).map(disk).collect())
}

/// What is not there yet, in words.
fn missing(map: &pb::ClusterMapReply, disks: usize) -> Option<String> {
    let alive = map.shards.iter().filter(|place| place.alive).count();
    if alive < usize::from(SHARDS) {
        return Some(format!("{alive} of {SHARDS} shards are serving"));
    }
    if !map.crossdir_alive {
        return Some("the coordinator is not there".to_owned());
    }
    let known = map.block_services.iter().filter(|service| !service.address.is_empty()).count();
    (known < disks).then(|| format!("{known} of {disks} disks are known"))
}
