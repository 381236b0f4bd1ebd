//! What all clones of a client share: channels, the cluster map, the clock, lanes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use eggs_proto::limits::{BLOCK_SERVICES_MAX, PROTOCOL_VERSION, SHARDS};
use eggs_proto::time::HybridClock;
use eggs_proto::{BlockServiceId, ClusterId, SessionId, ShardId, Time, flags, pb};
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Endpoint};

use crate::error::{ClientError, Result};
use crate::types::Options;

// As the daemons' ends (`eggs_daemon::server`): both must agree for large messages to flow.
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
const FRAME_BYTES_MAX: u32 = 1 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Without keep-alive a channel stays broken after a partition heals.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// A map older than this is renewed in the background when it is used.
const MAP_AGE_MAX: Duration = Duration::from_secs(5);
/// However many ask at once, shuckle is asked this often at most.
const MAP_INTERVAL_MIN: Duration = Duration::from_millis(50);
/// Damaged blocks remembered as reported.
const REPORTED_MAX: usize = 4096;

/// One daemon: a connection for metadata, and one for blocks so that the first never waits behind them.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub address: Arc<str>,
    pub meta: Channel,
    pub bulk: Channel,
}

/// The cluster map, ready to be used.
#[derive(Debug)]
pub(crate) struct Map {
    shards: Vec<Option<Peer>>,
    pub crossdir: Option<Peer>,
    services: BTreeMap<u64, (Peer, u32)>,
    fetched: Instant,
}

impl Map {
    pub fn shard(&self, shard: ShardId) -> Option<&Peer> {
        self.shards.get(usize::from(shard.0))?.as_ref()
    }

    pub fn service(&self, service: BlockServiceId) -> Option<&Peer> {
        self.services.get(&service.0).map(|(peer, _)| peer)
    }

    /// Whether the registry thinks it worth asking for blocks.
    pub fn readable(&self, service: BlockServiceId) -> bool {
        self.services.get(&service.0).is_some_and(|&(_, bits)| flags::readable(bits))
    }

    /// One address for each daemon that has disks.
    pub fn block_peers(&self) -> Vec<Peer> {
        let mut peers: Vec<Peer> = self.services.values().map(|(peer, _)| peer.clone()).collect();
        peers.sort_by(|a, b| a.address.cmp(&b.address));
        peers.dedup_by(|a, b| a.address == b.address);
        peers
    }
}

/// A session with its last sequence (CL-10). One write at a time uses it; sessions are kept by each group
/// on its own, so the next write may go anywhere.
#[derive(Debug)]
pub(crate) struct Lane {
    pub session: SessionId,
    pub sequence: u64,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub options: Options,
    pub cluster: ClusterId,
    cluster_bytes: Bytes,
    clock: Mutex<HybridClock>,
    peers: Mutex<BTreeMap<String, Peer>>,
    map: RwLock<Arc<Map>>,
    renewing: tokio::sync::Mutex<()>,
    lanes: Mutex<Vec<Lane>>,
    turn: AtomicUsize,
    reported: Mutex<std::collections::BTreeSet<(u64, u64)>>,
    pub tasks: TaskTracker,
}

/// A panic elsewhere does not make what these guard wrong: every change is one step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn wall() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// A random number; where the system has none, the clock's bits do for jitter and lanes.
pub(crate) fn entropy() -> u64 {
    getrandom::u64().unwrap_or_else(|_| wall().0.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

impl Shared {
    pub fn new(options: Options, cluster: ClusterId) -> Shared {
        let map =
            Map { shards: Vec::new(), crossdir: None, services: BTreeMap::new(), fetched: Instant::now() };
        Shared {
            options,
            cluster,
            // Before the cluster is known, in `Hello`, it is empty.
            cluster_bytes: ClusterId::from_bytes(&cluster.0)
                .map_or_else(Bytes::new, |id| Bytes::copy_from_slice(&id.0)),
            clock: Mutex::default(),
            peers: Mutex::default(),
            map: RwLock::new(Arc::new(map)),
            renewing: tokio::sync::Mutex::new(()),
            lanes: Mutex::default(),
            turn: AtomicUsize::new(entropy() as usize % 1024),
            reported: Mutex::default(),
            tasks: TaskTracker::new(),
        }
    }

    pub fn now(&self) -> Time {
        lock(&self.clock).now(wall())
    }

    pub fn observe(&self, header: Option<&pb::ReplyHeader>) {
        if let Some(header) = header {
            lock(&self.clock).observe(Time(header.time), wall());
        }
    }

    pub fn header(&self) -> pb::RequestHeader {
        pb::RequestHeader {
            version: PROTOCOL_VERSION,
            time: self.now().0,
            cluster_id: self.cluster_bytes.clone(),
            ..pb::RequestHeader::default()
        }
    }

    /// Counts up; spreads readers over mirrors.
    pub fn turn(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether this damaged block has not been reported yet.
    pub fn first_report(&self, service: u64, block: u64) -> bool {
        let mut reported = lock(&self.reported);
        reported.len() < REPORTED_MAX && reported.insert((service, block))
    }

    pub fn take_lane(&self) -> Lane {
        let lane = lock(&self.lanes).pop();
        // 0 is "no session".
        lane.unwrap_or_else(|| Lane { session: SessionId(entropy().max(1)), sequence: 0 })
    }

    pub fn give_lane(&self, lane: Lane) {
        lock(&self.lanes).push(lane);
    }

    pub fn peer(&self, address: &str) -> Result<Peer> {
        let mut peers = lock(&self.peers);
        if let Some(peer) = peers.get(address) {
            return Ok(peer.clone());
        }
        let peer = connect(address)?;
        peers.insert(address.to_owned(), peer.clone());
        Ok(peer)
    }

    /// The map at hand; renewed in the background when it is not young.
    pub fn map(self: &Arc<Self>) -> Arc<Map> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner).clone();
        if map.fetched.elapsed() > MAP_AGE_MAX && self.renewing.try_lock().is_ok() {
            let shared = self.clone();
            let old = map.fetched;
            self.tasks.spawn(async move {
                if let Err(error) = shared.renew(old).await {
                    tracing::debug!(%error, "cluster map not renewed");
                }
            });
        }
        map
    }

    /// Asks shuckle for the map, unless somebody else did since `seen`.
    pub async fn renew(&self, seen: Instant) -> Result<()> {
        let _one = self.renewing.lock().await;
        let fetched = self.map.read().unwrap_or_else(PoisonError::into_inner).fetched;
        if fetched > seen || (fetched == seen && seen.elapsed() < MAP_INTERVAL_MIN) {
            return Ok(());
        }
        match self.fetch_map().await {
            Ok(reply) => {
                self.learn(&reply);
                Ok(())
            }
            Err(error) => {
                // Whoever waited behind this does not ask a shuckle that is away once more.
                let old = self.map.read().unwrap_or_else(PoisonError::into_inner).clone();
                let (shards, crossdir) = (old.shards.clone(), old.crossdir.clone());
                let map = Map { shards, crossdir, services: old.services.clone(), fetched: Instant::now() };
                *self.map.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(map);
                Err(error)
            }
        }
    }

    /// When the map at hand was fetched.
    pub fn map_time(&self) -> Instant {
        self.map.read().unwrap_or_else(PoisonError::into_inner).fetched
    }

    /// Takes in a map. Addresses that are none are as good as absent.
    pub fn learn(&self, reply: &pb::ClusterMapReply) {
        let peer = |address: &str| if address.is_empty() { None } else { self.peer(address).ok() };
        let mut shards = vec![None; usize::from(SHARDS)];
        for place in &reply.shards {
            if let Some(slot) = shards.get_mut(place.shard as usize) {
                *slot = peer(&place.address);
            }
        }
        let services = reply.block_services.iter().take(BLOCK_SERVICES_MAX);
        let services =
            services.filter_map(|info| Some((info.id, (peer(&info.address)?, info.flags)))).collect();
        let crossdir = peer(&reply.crossdir_address);
        let map = Map { shards, crossdir, services, fetched: Instant::now() };
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(map);
    }
}

fn connect(address: &str) -> Result<Peer> {
    let wrong = || ClientError::Invalid(format!("'{address}' is not an address: HOST:PORT is expected"));
    let sound = address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok() && !address.contains(['/', '@', ' '])
    });
    if !sound {
        return Err(wrong());
    }
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| wrong())?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES_MAX)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(Peer { address: address.into(), meta: endpoint.connect_lazy(), bulk: endpoint.connect_lazy() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_addresses_are_connected_to() {
        for address in ["127.0.0.1:5000", "localhost:1", "[::1]:80"] {
            assert!(connect(address).is_ok(), "{address}");
        }
        for address in ["", ":", ":5000", "localhost", "a b:1", "http://x:1", "host:port", "host:99999"] {
            assert!(connect(address).is_err(), "{address}");
        }
    }
}
