//! What all clones of a client share: channels, the cluster map, who leads, the clock, lanes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use eggs_client_core::latency::Latencies;
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::time::HybridClock;
use eggs_proto::{BlockServiceId, ClusterId, GroupId, SessionId, Time, pb};
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Endpoint};

use crate::error::{ClientError, Result};
use crate::map::{Leaders, Map};
use crate::types::Options;

// What daemons may send before it is read: bounded by what was asked for, and nobody else waits behind it.
const STREAM_WINDOW: u32 = 16 << 20;
const CONNECTION_WINDOW: u32 = 64 << 20;
const FRAME_BYTES_MAX: u32 = 1 << 20;
/// A host that is away does not answer at all: each try to connect is short, so that one that is back is
/// found soon.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Without keep-alive a channel stays broken after a partition heals.
const KEEP_ALIVE: [Duration; 2] = [Duration::from_millis(500), Duration::from_millis(750)];
/// Of connections that move blocks: pings wait behind them.
const BULK_KEEP_ALIVE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(3)];
/// A map older than this is renewed in the background when it is used.
const MAP_AGE_MAX: Duration = Duration::from_secs(5);
/// However many ask at once, shuckle is asked this often at most.
const MAP_INTERVAL_MIN: Duration = Duration::from_millis(100);
/// A renewal takes this long at most; the map at hand serves meanwhile.
const RENEW_TIMEOUT: Duration = Duration::from_secs(3);
/// A host that could not be reached is asked after the others for this long.
const SUSPECT_FOR: Duration = Duration::from_secs(2);
/// Connections kept; addresses come from maps and hints.
const PEERS_MAX: usize = 4096;
/// Damaged blocks remembered as reported.
const REPORTED_MAX: usize = 4096;

/// One daemon: a connection for metadata, and one for blocks so that the first never waits behind them.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub address: Arc<str>,
    pub meta: Channel,
    pub bulk: Channel,
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
    leaders: Mutex<Leaders>,
    /// Unreachable just now, and since when.
    suspects: Mutex<BTreeMap<Arc<str>, Instant>>,
    renewing: tokio::sync::Mutex<()>,
    lanes: Mutex<Vec<Lane>>,
    turn: AtomicUsize,
    reported: Mutex<std::collections::BTreeSet<(u64, u64)>>,
    /// How fast block services are, and since when that is counted.
    latencies: Mutex<Latencies>,
    started: Instant,
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
        Shared {
            options,
            cluster,
            // Before the cluster is known, in `Hello`, it is empty.
            cluster_bytes: ClusterId::from_bytes(&cluster.0)
                .map_or_else(Bytes::new, |id| Bytes::copy_from_slice(&id.0)),
            clock: Mutex::default(),
            peers: Mutex::default(),
            map: RwLock::new(Arc::new(Map::empty())),
            leaders: Mutex::new(Leaders::none()),
            suspects: Mutex::default(),
            renewing: tokio::sync::Mutex::new(()),
            lanes: Mutex::default(),
            turn: AtomicUsize::new(entropy() as usize % 1024),
            reported: Mutex::default(),
            latencies: Mutex::default(),
            started: Instant::now(),
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

    /// Whether it has been, or will not be: too many were.
    pub fn is_reported(&self, service: u64, block: u64) -> bool {
        let reported = lock(&self.reported);
        reported.len() >= REPORTED_MAX || reported.contains(&(service, block))
    }

    /// A fetch of so many bytes was answered.
    pub fn fetch_answered(&self, service: BlockServiceId, bytes: u32, took: Duration) {
        lock(&self.latencies).answered(service, bytes, took);
    }

    /// A fetch was late, and others are asked.
    pub fn fetch_late(&self, service: BlockServiceId) {
        lock(&self.latencies).late(service, self.started.elapsed());
    }

    pub fn is_slow(&self, service: BlockServiceId) -> bool {
        lock(&self.latencies).is_slow(service, self.started.elapsed())
    }

    /// When a fetch of so many bytes is late.
    pub fn hedge_after(&self, service: BlockServiceId, bytes: u32) -> Duration {
        lock(&self.latencies).hedge_after(service, bytes, self.options.hedge_after_max)
    }

    /// Whether there is budget for one more hedge; takes it.
    pub fn pay_hedge(&self) -> bool {
        lock(&self.latencies).pay()
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
        if peers.len() < PEERS_MAX {
            peers.insert(address.to_owned(), peer.clone());
        }
        Ok(peer)
    }

    /// The likeliest leader of a group.
    pub fn leader(&self, group: GroupId, map: &Map) -> Option<Arc<str>> {
        lock(&self.leaders).of(group, map)
    }

    pub fn learn_leader(&self, group: GroupId, address: &Arc<str>) {
        lock(&self.leaders).learn(group, address);
    }

    pub fn forget_leader(&self, group: GroupId, address: &str) {
        lock(&self.leaders).forget(group, address);
    }

    /// It could not be reached: for a moment the others are asked first.
    pub fn suspect(&self, address: &Arc<str>) {
        let mut suspects = lock(&self.suspects);
        suspects.retain(|_, since| since.elapsed() < SUSPECT_FOR);
        if suspects.len() < PEERS_MAX {
            suspects.insert(address.clone(), Instant::now());
        }
    }

    /// It answered.
    pub fn trust(&self, address: &str) {
        lock(&self.suspects).remove(address);
    }

    pub fn is_trusted(&self, address: &str) -> bool {
        lock(&self.suspects).get(address).is_none_or(|since| since.elapsed() >= SUSPECT_FOR)
    }

    /// The map at hand, however old.
    pub fn map_at_hand(&self) -> Arc<Map> {
        self.map.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The map at hand; renewed in the background when it is not young.
    pub fn map(self: &Arc<Self>) -> Arc<Map> {
        let map = self.map_at_hand();
        if map.fetched.elapsed() > MAP_AGE_MAX {
            self.renew_soon(map.fetched);
        }
        map
    }

    /// Has the map renewed in the background, unless that is being done.
    pub fn renew_soon(self: &Arc<Self>, seen: Instant) {
        if self.renewing.try_lock().is_err() {
            return;
        }
        let shared = self.clone();
        self.tasks.spawn(async move {
            if let Err(error) = shared.renew(seen).await {
                tracing::debug!(%error, "cluster map not renewed");
            }
        });
    }

    /// Asks shuckle for the map, unless somebody else did since `seen`. What is not known by then is not
    /// waited for: the map at hand goes on serving.
    pub async fn renew_within(self: &Arc<Self>, seen: Instant, patience: Duration) {
        let shared = self.clone();
        let renewing = self.tasks.spawn(async move { shared.renew(seen).await });
        let _ = tokio::time::timeout(patience, renewing).await;
    }

    /// Asks shuckle for the map, unless somebody else did since `seen`.
    async fn renew(self: &Arc<Self>, seen: Instant) -> Result<()> {
        let _one = self.renewing.lock().await;
        let fetched = self.map_time();
        if fetched > seen || (fetched == seen && seen.elapsed() < MAP_INTERVAL_MIN) {
            return Ok(());
        }
        match self.fetch_map(RENEW_TIMEOUT).await {
            Ok(reply) => {
                self.learn(&reply);
                Ok(())
            }
            Err(error) => {
                // Whoever waited behind this does not ask a shuckle that is away once more.
                let mut map = Map::clone(&self.map_at_hand());
                map.fetched = Instant::now();
                *self.map.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(map);
                Err(error)
            }
        }
    }

    /// When the map at hand was fetched.
    pub fn map_time(&self) -> Instant {
        self.map.read().unwrap_or_else(PoisonError::into_inner).fetched
    }

    /// Takes in a map.
    pub fn learn(&self, reply: &pb::ClusterMapReply) {
        let map = Map::new(reply, |address| if address.is_empty() { None } else { self.peer(address).ok() });
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
        .keep_alive_while_idle(true);
    let channel = |[interval, timeout]: [Duration; 2]| {
        endpoint.clone().http2_keep_alive_interval(interval).keep_alive_timeout(timeout).connect_lazy()
    };
    Ok(Peer { address: address.into(), meta: channel(KEEP_ALIVE), bulk: channel(BULK_KEEP_ALIVE) })
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
