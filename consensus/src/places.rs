//! What many threads of a store look at: who leads, where the stores are, the clock.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use eggs_consensus_core::{GroupId, Membership, Role, Wanted};
use eggs_proto::time::HybridClock;
use eggs_proto::{ClusterId, StoreId, Time, pb};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::inbox::{Inbox, News};

/// What the map says is said again to the host at most this often: a replica may have come that did not exist before.
const REPEAT_INTERVAL: Duration = Duration::from_secs(20);

/// The cluster a store is of, and what its stores know one another by.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Joined {
    pub(crate) cluster: ClusterId,
    pub(crate) secret: [u8; 32],
}

impl Joined {
    /// In constant time.
    pub(crate) fn secret_is(&self, shown: &[u8]) -> bool {
        shown.len() == self.secret.len()
            && self.secret.iter().zip(shown).fold(0, |seen, (a, b)| seen | (a ^ b)) == 0
    }
}

type Knows = Box<dyn Fn(GroupId) -> bool + Send>;

pub(crate) struct Shared {
    pub(crate) name: &'static str,
    pub(crate) store: StoreId,
    pub(crate) clock: SharedClock,
    pub(crate) inbox: Inbox,
    /// The consensus thread's, once it runs: the streams that carry much are read on it.
    pub(crate) own_runtime: OnceLock<Handle>,
    /// The consensus thread has ended, or is about to.
    pub(crate) stopped: CancellationToken,
    pub(crate) joined: watch::Sender<Option<Joined>>,
    /// By store; those who wait for a change of one look at all.
    pub(crate) addresses: watch::Sender<Arc<BTreeMap<StoreId, String>>>,
    leaders: RwLock<Leaders>,
    clock_offset: AtomicI64,
    /// Whether groups like this one can be here.
    knows: Mutex<Knows>,
    followed: Mutex<Followed>,
}

#[derive(Default)]
struct Leaders {
    /// Of the groups here, as their replicas know.
    here: BTreeMap<GroupId, Option<StoreId>>,
    /// Of all groups, as the map says.
    told: BTreeMap<GroupId, StoreId>,
}

#[derive(Default)]
struct Followed {
    groups: BTreeMap<GroupId, (Vec<StoreId>, Wanted)>,
    repeated_at: Option<Instant>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(name: &'static str, store: StoreId, knows: Knows) -> Self {
        Shared {
            name,
            store,
            clock: SharedClock::default(),
            inbox: Inbox::default(),
            own_runtime: OnceLock::new(),
            stopped: CancellationToken::new(),
            joined: watch::Sender::new(None),
            addresses: watch::Sender::default(),
            leaders: RwLock::default(),
            clock_offset: AtomicI64::new(0),
            knows: Mutex::new(knows),
            followed: Mutex::default(),
        }
    }

    pub(crate) fn address(&self, store: StoreId) -> Option<String> {
        self.addresses.borrow().get(&store).cloned()
    }

    pub(crate) fn add_addresses(&self, stores: impl IntoIterator<Item = (StoreId, String)>) {
        let changed: Vec<_> = {
            let known = self.addresses.borrow();
            stores.into_iter().filter(|(store, address)| known.get(store) != Some(address)).collect()
        };
        if !changed.is_empty() {
            self.addresses.send_modify(|addresses| Arc::make_mut(addresses).extend(changed));
        }
    }

    // ---- leaders ----

    fn leaders(&self) -> RwLockReadGuard<'_, Leaders> {
        self.leaders.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the replica here knows goes before what the map says.
    pub(crate) fn leader(&self, group: GroupId) -> Option<StoreId> {
        let leaders = self.leaders();
        if let Some(&Some(leader)) = leaders.here.get(&group) {
            return Some(leader);
        }
        // The map may be older than what is known here: that it is not this store.
        leaders.told.get(&group).copied().filter(|&leader| leader != self.store)
    }

    pub(crate) fn hears_leader(&self, group: GroupId) -> bool {
        self.leaders().here.get(&group).is_some_and(Option::is_some)
    }

    pub(crate) fn leader_address(&self, group: GroupId) -> Option<String> {
        self.leader(group).filter(|&leader| leader != self.store).and_then(|leader| self.address(leader))
    }

    pub(crate) fn set_role(&self, group: GroupId, role: Role) {
        let mut leaders = self.leaders.write().unwrap_or_else(PoisonError::into_inner);
        match role {
            Role::Leader { .. } => leaders.here.insert(group, Some(self.store)),
            Role::Follower { leader } => leaders.here.insert(group, leader),
            Role::Removed => leaders.here.remove(&group),
        };
    }

    // ---- the map ----

    /// Takes in a cluster map; the consensus thread is told only what is new of groups that can be here.
    pub(crate) fn follow(&self, map: &pb::ClusterMapReply) {
        self.add_addresses(map.stores.iter().map(|store| (StoreId(store.id), store.address.clone())));
        let known =
            map.groups.iter().filter_map(|place| Some((GroupId(place.group.try_into().ok()?), place)));
        {
            let mut leaders = self.leaders.write().unwrap_or_else(PoisonError::into_inner);
            for (id, place) in known.clone() {
                match place.leader {
                    0 => leaders.told.remove(&id),
                    leader => leaders.told.insert(id, StoreId(leader)),
                };
            }
        }
        let mut followed = locked(&self.followed);
        let repeat = followed.repeated_at.is_none_or(|at| at.elapsed() >= REPEAT_INTERVAL);
        if repeat {
            followed.repeated_at = Some(Instant::now());
        }
        let (mut found, mut want) = (BTreeMap::new(), BTreeMap::new());
        for (id, place) in known {
            let news = said_of(place);
            if (!repeat && followed.groups.get(&id) == Some(&news)) || !locked(&self.knows)(id) {
                continue;
            }
            if news.0.contains(&self.store) {
                found.insert(id, news.0.clone());
            }
            if !news.1.voters.is_empty() {
                want.insert(id, news.1.clone());
            }
            followed.groups.insert(id, news);
        }
        drop(followed);
        if !found.is_empty() || !want.is_empty() {
            self.inbox.tell(|news: &mut News| {
                news.found.extend(found);
                news.want.extend(want);
            });
        }
    }

    // ---- clocks ----

    pub(crate) fn clock_offset(&self) -> i64 {
        self.clock_offset.load(Ordering::Relaxed)
    }

    pub(crate) fn set_clock_offset(&self, nanos: i64) {
        self.clock_offset.store(nanos, Ordering::Relaxed);
    }
}

/// The founding voters, and what the group is to become.
fn said_of(place: &pb::GroupPlace) -> (Vec<StoreId>, Wanted) {
    let stores = |ids: &[u64]| ids.iter().copied().map(StoreId).collect();
    let known = Membership {
        voters: stores(&place.voters),
        learners: stores(&place.learners),
        index: place.conf_index,
    };
    let preferred = (place.preferred != 0).then_some(StoreId(place.preferred));
    (stores(&place.founding), Wanted { voters: stores(&place.wanted), preferred, known })
}

/// The process's hybrid logical clock over the system's.
#[derive(Debug, Default)]
pub(crate) struct SharedClock {
    clock: Mutex<HybridClock>,
}

impl SharedClock {
    pub(crate) fn now(&self) -> Time {
        let wall = wall();
        locked(&self.clock).now(wall)
    }

    pub(crate) fn observe(&self, seen: Time) -> bool {
        let wall = wall();
        locked(&self.clock).observe(seen, wall)
    }

    /// What the groups' own clocks say is believed whatever the system's says: time never goes back.
    pub(crate) fn raise(&self, to: Time) {
        locked(&self.clock).observe(to, to);
    }
}

pub(crate) fn wall() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
