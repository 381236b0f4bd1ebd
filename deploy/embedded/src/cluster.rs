//! Starting, supervising and stopping all hosts of a cluster.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use eggs_daemon::registry::Registry;
use eggs_daemon::{CancellationToken, DataDirectory, Secret, metrics, server};
use eggs_proto::limits::{REPLICAS, SHARDS};
use eggs_proto::{ClusterId, pb};
use futures_util::future::{join_all, select_all};
use tokio::net::TcpListener;

use crate::error::StartError;
use crate::host::{Common, Host};
use crate::layout::Layout;
use crate::manifest::{DISKS_MAX, Manifest};

/// All of it must be serving by then.
pub(crate) const READY_MAX: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// A registry that does not answer by then does not hold up a stop.
const NOTE_MAX: Duration = Duration::from_secs(2);
/// Each shard, the coordinator, the registry.
const GROUPS: usize = SHARDS as usize + 2;
/// Tries at as many free ports in a row as there are hosts.
const PORT_TRIES: usize = 100;

/// What to start.
#[derive(Debug, Clone)]
pub struct Config {
    /// The cluster's directory; made when absent.
    pub data: PathBuf,
    /// The one port of everything, of the first host; the others have the ports after it. Port 0 picks free ones.
    pub listen: SocketAddr,
    /// Unset: what the cluster has; for a new one 8, or 3 (2) for each of 3 (5) hosts. More than it has: new ones are added.
    pub disks: Option<usize>,
    /// Of everything, and hosts for them: 1, 3 or 5. Unset: what the cluster has, 1 for a new one.
    pub replicas: Option<u32>,
    /// Answer reads on the word of a lease.
    pub read_lease: bool,
    /// How the janitor works; none: there is none.
    pub janitor: Option<eggs_janitor::Settings>,
}

/// A running cluster. Stop it with [`Cluster::stop`]; dropped, it ends as in a crash (nothing
/// acknowledged is lost).
#[derive(Debug)]
pub struct Cluster {
    id: ClusterId,
    took: Duration,
    common: Common,
    /// `None`: stopped by [`Cluster::stop_host`].
    hosts: Vec<Option<Host>>,
    stop: CancellationToken,
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
        check(&config)?;
        // Whichever can refuse without leaving a trace goes first.
        let (directory, listeners, manifest) = if config.data.join("FORMAT").exists() {
            let directory = DataDirectory::open(&config.data, "embedded")?;
            let manifest = read_manifest(&config.data)?;
            let hosts = manifest.as_ref().map_or(config.replicas.unwrap_or(1), |manifest| manifest.hosts);
            (directory, bind(config.listen, hosts).await?, manifest)
        } else {
            let listeners = bind(config.listen, config.replicas.unwrap_or(1)).await?;
            (DataDirectory::open(&config.data, "embedded")?, listeners, None)
        };
        let data = std::path::absolute(&config.data).unwrap_or(config.data);
        let layout = Layout::of(&data, manifest.as_ref(), config.replicas, config.disks)?;
        layout.check(directory.cluster())?;
        let secret = Secret::load_or_create(&data.join("secret"))?;
        let io_error = |error| StartError::Io { path: data.clone(), error };
        let addresses: Result<Vec<SocketAddr>, _> = listeners.iter().map(TcpListener::local_addr).collect();
        let addresses = addresses.map_err(io_error)?;
        let common =
            Common { layout, secret, addresses, read_lease: config.read_lease, janitor: config.janitor };
        let mut cluster = Cluster::open(common, listeners, directory).await?;
        let manifest = Manifest::new(cluster.common.layout.hosts, cluster.common.layout.disks);
        if let Err(error) = manifest.write(&data).map_err(io_error) {
            cluster.stop().await;
            return Err(error);
        }
        match cluster.wait_until_ready().await {
            Ok(()) => {
                cluster.took = started.elapsed();
                cluster.note_free_places().await;
                Ok(cluster)
            }
            Err(error) => {
                cluster.stop().await;
                Err(error)
            }
        }
    }

    /// Opens every host. Of a new cluster the first one's registry is opened first: it founds the cluster, and the others are
    /// told which it is. Those of a complete one are opened side by side: one that is damaged asks the others.
    async fn open(
        common: Common,
        listeners: Vec<TcpListener>,
        mut directory: DataDirectory,
    ) -> Result<Cluster, StartError> {
        let (first, id) = match directory.cluster().filter(|_| common.layout.complete) {
            Some(id) => (None, id),
            None => {
                let first = common.open_shuckle(0, !common.layout.complete).await?;
                let id = first.cluster();
                let id = id.ok_or_else(|| StartError::Ended("the registry has no cluster".to_owned()))?;
                (Some(first), id)
            }
        };
        directory.claim(id)?;
        let firsts = std::iter::once(first).chain(std::iter::repeat_with(|| None));
        let opening = (0..).zip(firsts).zip(listeners).map(|((number, shuckle), listener)| {
            let common = &common;
            async move {
                let shuckle = match shuckle {
                    Some(shuckle) => shuckle,
                    None => common.open_shuckle(number, false).await?,
                };
                Host::start(common, number, id, shuckle, listener).await
            }
        });
        let mut hosts = Vec::new();
        let mut failure = None;
        for host in join_all(opening).await {
            match host {
                Ok(host) => hosts.push(Some(host)),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        let stop = CancellationToken::new();
        let cluster = Cluster { id, took: Duration::ZERO, common, hosts, stop, _directory: directory };
        match failure {
            None => Ok(cluster),
            Some(error) => {
                cluster.stop().await;
                Err(error)
            }
        }
    }

    /// Remembers for the next start which disks are gone for good: it may make new ones in their places.
    async fn note_free_places(&self) {
        let layout = &self.common.layout;
        // One that never was ready is not complete: it has no manifest yet.
        if self.took.is_zero() || layout.vacant().is_empty() {
            return;
        }
        let addresses: Vec<String> = self.common.addresses.iter().map(ToString::to_string).collect();
        let map = async {
            let registry = Registry::join(&addresses, None, Some(self.id), &self.stop).await.ok()?;
            registry.map(false).await.ok()
        };
        let Ok(Some(map)) = tokio::time::timeout(NOTE_MAX, map).await else { return };
        let manifest = Manifest::new(layout.hosts, layout.disks).with_free(layout.free(&map));
        if let Err(error) = manifest.write(&layout.data) {
            tracing::warn!(%error, "which disks are gone for good is not remembered");
        } else if !manifest.free.is_empty() {
            tracing::info!(places = ?manifest.free, "disks are gone for good: the next start makes new ones in their places");
        }
    }

    /// Until shuckle knows of everything: every group is led and has its replicas, every disk that was opened.
    async fn wait_until_ready(&mut self) -> Result<(), StartError> {
        let addresses: Vec<String> = self.common.addresses.iter().map(ToString::to_string).collect();
        let disks = self.hosts.iter().flatten().map(Host::disks).sum();
        let (id, stop) = (self.id, self.stop.clone());
        let ready = async move {
            let registry = Registry::join(&addresses, None, Some(id), &stop).await?;
            let deadline = Instant::now() + READY_MAX;
            loop {
                let missing = match registry.map(false).await {
                    Ok(map) => missing(&map, disks),
                    Err(error) if error.is_fatal() => return Err(error.into()),
                    Err(error) => Some(error.to_string()),
                };
                match missing {
                    None => return Ok(()),
                    Some(what) if Instant::now() > deadline => return Err(StartError::NotReady { what }),
                    Some(_) => tokio::time::sleep(LOOK_INTERVAL).await,
                }
            }
        };
        tokio::select! {
            ready = tokio::time::timeout(READY_MAX * 2, ready) => {
                ready.unwrap_or_else(|_| Err(StartError::NotReady { what: "the registry does not answer".to_owned() }))
            }
            failure = self.failed() => Err(failure),
        }
    }

    /// The cluster's id.
    pub fn id(&self) -> ClusterId {
        self.id
    }

    /// Where all of it listens; of several hosts, the first.
    pub fn address(&self) -> SocketAddr {
        self.common.addresses[0]
    }

    /// Where each host listens: the addresses of shuckle.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.common.addresses
    }

    /// Of everything, each on a host of its own.
    pub fn replicas(&self) -> u32 {
        self.common.layout.hosts
    }

    /// How many disks it has, lost ones too.
    pub fn disks(&self) -> usize {
        self.common.layout.disks
    }

    /// The web dashboard.
    pub fn dashboard_url(&self) -> String {
        format!("http://{}/", self.address())
    }

    /// How long the start took.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Its directory.
    pub fn data(&self) -> &Path {
        &self.common.layout.data
    }

    /// Waits until a part of the cluster ends by itself, and says why: then the rest should be stopped.
    pub async fn failed(&mut self) -> StartError {
        let hosts = self.hosts.iter_mut().flatten().map(|host| Box::pin(host.failed()));
        let hosts: Vec<_> = hosts.collect();
        if hosts.is_empty() {
            return StartError::Ended("no host is left".to_owned());
        }
        select_all(hosts).await.0
    }

    /// Stops one host, from 0, in order; the others go on. Nothing when it is stopped already.
    pub async fn stop_host(&mut self, host: usize) {
        if let Some(host) = self.hosts.get_mut(host).and_then(Option::take) {
            host.stop(true).await;
        }
    }

    /// Starts a host that was stopped, at the port it had. Nothing when it runs.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub async fn start_host(&mut self, host: usize) -> Result<(), StartError> {
        let (Some(place), Some(&address)) = (self.hosts.get_mut(host), self.common.addresses.get(host))
        else {
            return Ok(());
        };
        if place.is_some() {
            return Ok(());
        }
        let listener = server::bind(address).await?;
        let number = u32::try_from(host).unwrap_or_default();
        let shuckle = self.common.open_shuckle(number, false).await?;
        *place = Some(Host::start(&self.common, number, self.id, shuckle, listener).await?);
        Ok(())
    }

    /// Takes no new requests, finishes those in flight, makes everything durable.
    pub async fn stop(self) {
        self.note_free_places().await;
        self.stop.cancel();
        join_all(self.hosts.into_iter().flatten().map(|host| host.stop(false))).await;
    }
}

fn check(config: &Config) -> Result<(), StartError> {
    if let Some(asked) = config.disks.filter(|disks| !(1..=DISKS_MAX).contains(disks)) {
        return Err(StartError::DiskCount { asked });
    }
    if let Some(asked) = config.replicas.filter(|replicas| !REPLICAS.contains(replicas)) {
        return Err(StartError::ReplicaCount(asked));
    }
    if config.listen.ip().is_unspecified() {
        return Err(StartError::Unspecified(config.listen));
    }
    Ok(())
}

fn read_manifest(data: &Path) -> Result<Option<Manifest>, StartError> {
    Manifest::read(data).map_err(|error| StartError::Io { path: data.to_owned(), error })
}

/// A port for each host, in a row.
async fn bind(first: SocketAddr, hosts: u32) -> Result<Vec<TcpListener>, StartError> {
    for _ in 0..PORT_TRIES {
        let listener = server::bind(first).await?;
        let chosen = listener.local_addr().map_err(|source| server::BindError { address: first, source })?;
        let mut listeners = vec![listener];
        for n in 1..hosts {
            let port = u16::try_from(n).ok().and_then(|n| chosen.port().checked_add(n));
            let Some(port) = port else { break };
            match server::bind(SocketAddr::new(chosen.ip(), port)).await {
                Ok(listener) => listeners.push(listener),
                Err(_) if first.port() == 0 => break,
                Err(error) => return Err(error.into()),
            }
        }
        if listeners.len() == hosts as usize {
            return Ok(listeners);
        }
        if first.port() != 0 {
            break;
        }
    }
    Err(StartError::Ports { address: first, hosts })
}

/// What is not there yet, in words.
fn missing(map: &pb::ClusterMapReply, disks: usize) -> Option<String> {
    let ready = |place: &&pb::GroupPlace| {
        let has = |store| place.voters.contains(store);
        place.alive
            && place.leader != 0
            && place.learners.is_empty()
            && place.voters.len() == place.wanted.len()
            && place.wanted.iter().all(has)
            && place.voters.len() == map.replicas as usize
    };
    let groups = map.groups.iter().filter(ready).count();
    if groups < GROUPS {
        return Some(format!("{groups} of {GROUPS} replicated groups are complete"));
    }
    let known = map.block_services.iter().filter(|service| !service.address.is_empty()).count();
    (known < disks).then(|| format!("{known} of {disks} disks are known"))
}
