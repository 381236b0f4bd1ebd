//! Words for a group that does not get on: who of its replicas is missing.
//!
//! An election takes a moment and needs no words. A group that stays without a leader, or whose leader
//! gets nothing agreed on, is looked at: every other voter's port is tried from here, so the answer is right when
//! shuckle cannot be reached either, and names what this host cannot reach.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use eggs_consensus::{GroupId, Handle};
use eggs_daemon::registry::MapWatch;
use eggs_proto::{StoreId, pb};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Longer than an election takes.
const ELECTION_MAX: Duration = Duration::from_secs(3);
/// Those who ask again within this long ask about the same trouble.
const SAME_TROUBLE: Duration = Duration::from_secs(5);
/// Ports are not tried more often than that.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);

/// Looks at groups that do not get on.
#[derive(Debug)]
pub struct Quorum {
    handle: Handle,
    map: OnceLock<MapWatch>,
    /// Until a map is heard: what is known of before.
    before: OnceLock<Arc<pb::ClusterMapReply>>,
    /// Groups that requests were refused for: since when, and when last.
    refused: Mutex<BTreeMap<GroupId, (Instant, Instant)>>,
    /// Whose port answered, and when it was tried. Held while trying: one tries for all.
    probes: tokio::sync::Mutex<BTreeMap<StoreId, (Instant, bool)>>,
}

impl Quorum {
    pub(crate) fn new(handle: Handle) -> Quorum {
        Quorum {
            handle,
            map: OnceLock::new(),
            before: OnceLock::new(),
            refused: Mutex::default(),
            probes: tokio::sync::Mutex::default(),
        }
    }

    pub(crate) fn watch(&self, map: MapWatch) {
        let _ = self.map.set(map);
    }

    /// Where the others were, for as long as no map is heard: the registry itself can tell only this after a start.
    pub fn remember(&self, map: Arc<pb::ClusterMapReply>) {
        let _ = self.before.set(map);
    }

    /// To be asked whenever a request is refused because this store does not lead. `None` while whoever leads can be
    /// reached, and while there may be an election; then why the group has no leader.
    pub async fn unled(&self, group: GroupId) -> Option<String> {
        let now = Instant::now();
        let since = {
            let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
            let (since, last) = refused.entry(group).or_insert((now, now));
            if now - *last > SAME_TROUBLE {
                *since = now;
            }
            *last = now;
            *since
        };
        if now - since < ELECTION_MAX {
            return None;
        }
        Some(
            self.missing(group)
                .await
                .unwrap_or_else(|| "enough replicas answer, but none leads yet".to_owned()),
        )
    }

    /// Which replicas of a group are missing when there are too few: "no quorum: 1 of 3 replicas
    /// answer; missing hosts b, c".
    pub async fn missing(&self, group: GroupId) -> Option<String> {
        let map = self.map();
        let voters = self.voters(group, &map).await;
        let me = self.handle.store();
        let others: Vec<StoreId> = voters.iter().copied().filter(|&store| store != me).collect();
        let missing: Vec<StoreId> = self.silent(&others, &map).await;
        let answering = voters.len() - missing.len();
        if voters.is_empty() || answering > voters.len() / 2 {
            return None;
        }
        let hosts: Vec<String> = missing.iter().map(|&store| host(&map, store)).collect();
        let (count, hosts) = (voters.len(), hosts.join(", "));
        Some(format!("no quorum: {answering} of {count} replicas answer; missing hosts {hosts}"))
    }

    fn map(&self) -> Arc<pb::ClusterMapReply> {
        let heard = self.map.get().map(MapWatch::get).filter(|map| !map.stores.is_empty());
        heard.or_else(|| self.before.get().cloned()).unwrap_or_default()
    }

    /// As the replica here knows, or the map.
    async fn voters(&self, group: GroupId, map: &pb::ClusterMapReply) -> Vec<StoreId> {
        let here = self.handle.status().await.into_iter().find(|status| status.group == group);
        if let Some(status) = here.filter(|status| !status.membership.voters.is_empty()) {
            return status.membership.voters;
        }
        let place = map.groups.iter().find(|place| place.group == u32::from(group.0));
        place.map(|place| place.voters.iter().copied().map(StoreId).collect()).unwrap_or_default()
    }

    /// Those of `stores` whose port does not answer; an address that is not known does not.
    async fn silent(&self, stores: &[StoreId], map: &pb::ClusterMapReply) -> Vec<StoreId> {
        let mut probes = self.probes.lock().await;
        let fresh = |probes: &BTreeMap<StoreId, (Instant, bool)>, store: &StoreId| {
            probes.get(store).is_some_and(|(at, _)| at.elapsed() < PROBE_INTERVAL)
        };
        let due = stores.iter().copied().filter(|store| !fresh(&probes, store));
        let tried = futures_util::future::join_all(due.map(|store| async move {
            let address = map.stores.iter().find(|info| info.id == store.0).map(|info| &info.address);
            (
                store,
                match address {
                    Some(address) => answers(address).await,
                    None => false,
                },
            )
        }));
        let now = Instant::now();
        // Stores come and go, a little at a time.
        probes.retain(|_, (at, _)| now - *at < SAME_TROUBLE);
        probes.extend(tried.await.into_iter().map(|(store, answers)| (store, (now, answers))));
        stores
            .iter()
            .copied()
            .filter(|store| !probes.get(store).is_some_and(|&(_, answers)| answers))
            .collect()
    }
}

async fn answers(address: &str) -> bool {
    matches!(tokio::time::timeout(PROBE_TIMEOUT, TcpStream::connect(address)).await, Ok(Ok(_)))
}

fn host(map: &pb::ClusterMapReply, store: StoreId) -> String {
    let known = map.stores.iter().find(|info| info.id == store.0).filter(|info| !info.host.is_empty());
    known.map_or_else(|| format!("of store {store}"), |info| info.host.clone())
}
