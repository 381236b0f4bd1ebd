//! One host of the cluster: all services on one port.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use eggs_consensus::peer_streams;
use eggs_daemon::registry::{JoinError, Registry};
use eggs_daemon::server::{self, Routes};
use eggs_daemon::{CancellationToken, Secret, metrics};
use eggs_proto::ClusterId;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use crate::error::StartError;
use crate::layout::Layout;

/// How long requests in flight have for their answers once all hosts are told to stop: after it nobody is left who
/// could agree to a write.
const GRACE: Duration = Duration::from_millis(300);
/// That replicas far behind, or new, may be sent.
const SNAPSHOT_BYTES_PER_SECOND: u64 = 64 << 20;

/// What all hosts of a cluster have in common.
#[derive(Debug, Clone)]
pub(crate) struct Common {
    pub layout: Layout,
    pub secret: Secret,
    /// Where each host listens.
    pub addresses: Vec<SocketAddr>,
    pub read_lease: bool,
    pub janitor: Option<eggs_janitor::Settings>,
}

/// A host that runs.
#[derive(Debug)]
pub(crate) struct Host {
    name: String,
    tasks: JoinSet<Result<(), StartError>>,
    /// Tells the services to hand over and end.
    stop: CancellationToken,
    /// Closes the port.
    close: CancellationToken,
    served: Option<JoinHandle<()>>,
    shuckle: Arc<eggs_shuckle::Service>,
    shard: Arc<eggs_shard::Service>,
    crossdir: Arc<eggs_crossdir::Service>,
    blockd: eggs_blockd::Service,
}

impl Common {
    fn shuckles(&self) -> Vec<String> {
        self.addresses.iter().map(ToString::to_string).collect()
    }

    fn address(&self, host: u32) -> String {
        self.addresses[host as usize].to_string()
    }

    /// Opens the registry's store of a host. `founds`: it begins the cluster alone, the others join it.
    pub async fn open_shuckle(&self, host: u32, founds: bool) -> Result<eggs_shuckle::Service, StartError> {
        let config = eggs_shuckle::Config {
            directory: self.layout.folder(host).join("shuckle"),
            secret: eggs_shuckle::SecretSource::Given(self.secret.clone()),
            host: Layout::name(host),
            advertised: self.address(host),
            peers: if founds { Vec::new() } else { self.shuckles() },
            replicas: self.layout.hosts,
            read_lease: self.read_lease,
            snapshot_bytes_per_second: SNAPSHOT_BYTES_PER_SECOND,
            replace_after: eggs_shuckle::Config::REPLACE_AFTER,
            // Whoever is not heard of now is not there; and started again, it may be at another port.
            patience: Duration::ZERO,
        };
        Ok(eggs_shuckle::Service::open(config).await?)
    }
}

impl Host {
    /// Opens the rest of a host, and serves.
    pub async fn start(
        common: &Common,
        number: u32,
        cluster: ClusterId,
        shuckle: eggs_shuckle::Service,
        listener: TcpListener,
    ) -> Result<Host, StartError> {
        let (shard, crossdir, blockd) = open_services(common, number, cluster).await?;
        let shuckle = Arc::new(shuckle);
        let router = shuckle
            .router()
            .merge(shard.router())
            .merge(crossdir.router())
            .merge(blockd.router())
            .merge(metrics::router(health(&shuckle, &shard, &crossdir, &blockd)));
        let close = CancellationToken::new();
        let routes =
            Routes::from(router).with(peer_streams(vec![shuckle.peers(), shard.peers(), crossdir.peers()]));
        let served = Some(tokio::spawn(server::serve(listener, routes, close.clone())));
        let mut host = Host {
            name: Layout::name(number),
            tasks: JoinSet::new(),
            stop: CancellationToken::new(),
            close,
            served,
            shuckle,
            shard,
            crossdir,
            blockd,
        };
        host.run(common, common.address(number), cluster);
        Ok(host)
    }

    fn run(&mut self, common: &Common, advertised: String, cluster: ClusterId) {
        let (service, stop) = (Arc::clone(&self.shuckle), self.stop.clone());
        self.tasks.spawn(async move { Ok(service.run(stop).await?) });
        let (service, address, stop) = (Arc::clone(&self.shard), advertised.clone(), self.stop.clone());
        self.tasks.spawn(async move { service.run(&address, stop).await.map_err(StartError::Shard) });
        let (service, address, stop) = (Arc::clone(&self.crossdir), advertised.clone(), self.stop.clone());
        self.tasks.spawn(async move { service.run(&address, stop).await.map_err(StartError::Crossdir) });
        let (service, stop) = (self.blockd.clone(), self.stop.clone());
        let (shuckles, secret, address) = (common.shuckles(), common.secret.clone(), advertised.clone());
        self.tasks.spawn(async move {
            let registry = match Registry::join(&shuckles, Some(secret), Some(cluster), &stop).await {
                Err(JoinError::Stopped { .. }) => return Ok(()),
                joined => joined?,
            };
            Ok(service.run_registration(&registry, address, || {}, stop).await?)
        });
        // Every host has one: the first works, the others take its place when it is gone.
        let Some(settings) = common.janitor.clone() else { return };
        let janitor = eggs_janitor::Service::new(eggs_janitor::Config {
            shuckle: common.shuckles(),
            secret: common.secret.clone(),
            cluster: Some(cluster),
            host: self.name.clone(),
            advertised,
            settings,
        });
        let stop = self.stop.clone();
        self.tasks.spawn(async move { Ok(Box::pin(janitor.run(|| {}, stop)).await?) });
    }

    /// How many disks it has that are well, or were since its start.
    pub fn disks(&self) -> usize {
        self.blockd.registration("").block_services.len()
    }

    /// Waits until a part of it ends by itself, and says why.
    pub async fn failed(&mut self) -> StartError {
        let Host { name, tasks, served, .. } = self;
        let Some(served) = served else { return StartError::Ended(format!("{name}: its port is closed")) };
        tokio::select! {
            ended = tasks.join_next() => match ended {
                Some(Ok(Err(error))) => error,
                Some(Err(error)) => StartError::Ended(format!("{name}: {error}")),
                Some(Ok(Ok(()))) | None => StartError::Ended(format!("{name}: without a word")),
            },
            closed = served => {
                self.served = None;
                let why = closed.err().map(|error| error.to_string()).unwrap_or_default();
                StartError::Ended(format!("{}: its port is closed {why}", self.name))
            }
        }
    }

    /// Takes no new requests, finishes those in flight, makes everything durable.
    pub async fn stop(mut self, others_go_on: bool) {
        if others_go_on {
            self.stop.cancel();
            while self.tasks.join_next().await.is_some() {}
        } else {
            // There is nobody to hand anything over to.
            self.tasks.shutdown().await;
        }
        self.close.cancel();
        let mut served = self.served.take();
        if let Some(served) = &mut served {
            // A write that waits for other hosts, which have gone, ends only with the consensus.
            let _ = tokio::time::timeout(GRACE, served).await;
        }
        self.blockd.stop().await;
        let Host { shuckle, shard, crossdir, .. } = self;
        let (shard, crossdir) = (Arc::into_inner(shard), Arc::into_inner(crossdir));
        let stopped = tokio::task::spawn_blocking(move || {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    if let Some(crossdir) = crossdir {
                        crossdir.stop();
                    }
                });
                if let Some(shard) = shard {
                    shard.stop();
                }
            });
        });
        let _ = stopped.await;
        if let Some(shuckle) = Arc::into_inner(shuckle) {
            shuckle.stop().await;
        }
        if let Some(served) = served.filter(|served| !served.is_finished()) {
            let _ = served.await;
        }
    }
}

/// For `/healthz`: well when every part is.
fn health(
    shuckle: &Arc<eggs_shuckle::Service>,
    shard: &Arc<eggs_shard::Service>,
    crossdir: &Arc<eggs_crossdir::Service>,
    blockd: &eggs_blockd::Service,
) -> impl Fn() -> Result<(), String> + Send + Sync + 'static {
    let blockd = blockd.health();
    let shuckle = shuckle.health();
    let (shard, crossdir) = (Arc::downgrade(shard), Arc::downgrade(crossdir));
    move || {
        let stopping = || "stopping".to_owned();
        shuckle()?;
        shard.upgrade().ok_or_else(stopping)?.health()?;
        crossdir.upgrade().ok_or_else(stopping)?.health()?;
        blockd()
    }
}

async fn open_services(
    common: &Common,
    host: u32,
    cluster: ClusterId,
) -> Result<(Arc<eggs_shard::Service>, Arc<eggs_crossdir::Service>, eggs_blockd::Service), StartError> {
    let folder = common.layout.folder(host);
    let shard = eggs_shard::Config {
        data: folder.join("shard"),
        secret: common.secret.clone(),
        shuckle: common.shuckles(),
        host: Layout::name(host),
        read_lease: common.read_lease,
        snapshot_bytes_per_second: SNAPSHOT_BYTES_PER_SECOND,
    };
    let crossdir = eggs_crossdir::Config {
        data: folder.join("crossdir"),
        secret: common.secret.clone(),
        shuckle: common.shuckles(),
        host: Layout::name(host),
        read_lease: common.read_lease,
        snapshot_bytes_per_second: SNAPSHOT_BYTES_PER_SECOND,
    };
    let blockd = eggs_blockd::Config { cluster, disks: common.layout.disks_of(host) };
    let shard = tokio::task::spawn_blocking(|| eggs_shard::Service::open(shard));
    let crossdir = tokio::task::spawn_blocking(|| eggs_crossdir::Service::open(crossdir));
    let blockd = tokio::task::spawn_blocking(|| eggs_blockd::Service::open(blockd));
    let panicked = |error: tokio::task::JoinError| StartError::Ended(error.to_string());
    let (shard, crossdir, blockd) = tokio::join!(shard, crossdir, blockd);
    let shard = shard.map_err(panicked)?.map_err(StartError::Shard)?;
    let crossdir = crossdir.map_err(panicked)?.map_err(StartError::Crossdir)?;
    Ok((Arc::new(shard), Arc::new(crossdir), blockd.map_err(panicked)??))
}
