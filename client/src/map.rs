//! The cluster map, ready to be used: who replicates what, who leads, where disks are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use eggs_proto::limits::{BLOCK_SERVICES_MAX, MEMBERS_MAX};
use eggs_proto::{BlockServiceId, GroupId, flags, pb};

use crate::connection::Peer;

/// All groups: shards, coordinator, registry.
const GROUPS: usize = GroupId::SHUCKLE.0 as usize + 1;
/// What was learned from a leader itself counts for more than a map of this much later: the registry hears
/// of leaders by their heartbeats.
const MAP_BEHIND: Duration = Duration::from_secs(3);

/// Where a group is.
#[derive(Debug, Clone, Default)]
struct Place {
    leader: Option<Arc<str>>,
    /// Everybody who has a vote, the leader too.
    members: Vec<Arc<str>>,
}

#[derive(Debug, Clone)]
pub(crate) struct Map {
    groups: Vec<Place>,
    /// Hosts by address, for people.
    hosts: BTreeMap<Arc<str>, String>,
    /// Every shuckle that is heard of.
    shuckles: Vec<Arc<str>>,
    services: BTreeMap<u64, (Peer, u32)>,
    pub fetched: Instant,
}

impl Map {
    /// Nothing is known yet.
    pub fn empty() -> Map {
        Map {
            groups: Vec::new(),
            hosts: BTreeMap::new(),
            shuckles: Vec::new(),
            services: BTreeMap::new(),
            fetched: Instant::now(),
        }
    }

    /// `peer` gives the connection to an address; addresses that are none are as good as absent.
    pub fn new(reply: &pb::ClusterMapReply, peer: impl Fn(&str) -> Option<Peer>) -> Map {
        let mut stores = BTreeMap::<u64, Arc<str>>::new();
        let (mut hosts, mut shuckles) = (BTreeMap::new(), Vec::new());
        for store in reply.stores.iter().filter(|store| !store.address.is_empty()) {
            let address: Arc<str> = store.address.as_str().into();
            stores.insert(store.id, address.clone());
            if store.alive || !hosts.contains_key(&address) {
                hosts.insert(address.clone(), store.host.clone());
            }
            if store.kind() == pb::StoreKind::StoreShuckle && store.alive {
                shuckles.push(address);
            }
        }
        let mut groups = vec![Place::default(); GROUPS];
        for group in &reply.groups {
            if let Some(slot) = groups.get_mut(group.group as usize) {
                *slot = place(group, &stores);
            }
        }
        let services = reply.block_services.iter().take(BLOCK_SERVICES_MAX);
        let services =
            services.filter_map(|info| Some((info.id, (peer(&info.address)?, info.flags)))).collect();
        Map { groups, hosts, shuckles, services, fetched: Instant::now() }
    }

    /// The replicas of a group, its leader first.
    pub fn group(&self, group: GroupId) -> impl Iterator<Item = &Arc<str>> {
        let place = self.groups.get(usize::from(group.0));
        let leader = place.and_then(|place| place.leader.as_ref());
        let members = place.map_or(&[][..], |place| &place.members);
        leader.into_iter().chain(members.iter().filter(move |member| Some(*member) != leader))
    }

    fn leader(&self, group: GroupId) -> Option<&Arc<str>> {
        self.groups.get(usize::from(group.0))?.leader.as_ref()
    }

    pub fn shuckles(&self) -> &[Arc<str>] {
        &self.shuckles
    }

    /// The machine at an address, for people.
    pub fn host(&self, address: &str) -> Option<&str> {
        self.hosts.get(address).map(String::as_str)
    }

    pub fn service(&self, service: BlockServiceId) -> Option<&Peer> {
        self.services.get(&service.0).map(|(peer, _)| peer)
    }

    /// Whether the registry thinks it worth asking for blocks.
    pub fn readable(&self, service: BlockServiceId) -> bool {
        self.services.get(&service.0).is_some_and(|&(_, bits)| flags::readable(bits))
    }

    /// Whether the registry would place new blocks there.
    pub fn writable(&self, service: BlockServiceId) -> bool {
        self.services.get(&service.0).is_some_and(|&(_, bits)| flags::writable(bits))
    }

    /// One address for each daemon that has disks.
    pub fn block_peers(&self) -> Vec<Peer> {
        let mut peers: Vec<Peer> = self.services.values().map(|(peer, _)| peer.clone()).collect();
        peers.sort_by(|a, b| a.address.cmp(&b.address));
        peers.dedup_by(|a, b| a.address == b.address);
        peers
    }
}

fn place(group: &pb::GroupPlace, stores: &BTreeMap<u64, Arc<str>>) -> Place {
    let address = |store: &u64| stores.get(store).cloned();
    // Before its leader has said who is in it: those who are to be.
    let lists = [&group.voters, &group.founding, &group.wanted];
    let voters = lists.into_iter().find(|list| !list.is_empty());
    let mut members: Vec<Arc<str>> =
        voters.into_iter().flatten().filter_map(address).take(MEMBERS_MAX).collect();
    // The one that is to lead is the likeliest, after the one that does.
    if let Some(at) = address(&group.preferred).and_then(|to_lead| members.iter().position(|m| *m == to_lead))
    {
        members.swap(0, at);
    }
    // One that is not heard of any more is as good a guess as any other.
    Place { leader: address(&group.leader).filter(|_| group.alive), members }
}

/// Who leads each group, as the leaders themselves and their followers have said since the map was fetched.
#[derive(Debug)]
pub(crate) struct Leaders(Vec<Option<(Arc<str>, Instant)>>);

impl Leaders {
    pub fn none() -> Leaders {
        Leaders(vec![None; GROUPS])
    }

    /// The likeliest leader, unless nothing is known of one.
    pub fn of(&self, group: GroupId, map: &Map) -> Option<Arc<str>> {
        let mapped = map.leader(group);
        match self.0.get(usize::from(group.0))? {
            Some((_, learned)) if mapped.is_some() && map.fetched > *learned + MAP_BEHIND => mapped.cloned(),
            Some((address, _)) => Some(address.clone()),
            None => mapped.cloned(),
        }
    }

    pub fn learn(&mut self, group: GroupId, address: &Arc<str>) {
        if let Some(slot) = self.0.get_mut(usize::from(group.0)) {
            *slot = Some((address.clone(), Instant::now()));
        }
    }

    /// It does not lead after all.
    pub fn forget(&mut self, group: GroupId, address: &str) {
        if let Some(slot) = self.0.get_mut(usize::from(group.0))
            && slot.as_ref().is_some_and(|(known, _)| **known == *address)
        {
            *slot = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(id: u64, kind: pb::StoreKind, address: &str, alive: bool) -> pb::StoreInfo {
        let (kind, host, address) = (kind as i32, format!("host-{id}"), address.to_owned());
        pb::StoreInfo { id, kind, host, address, alive, ..pb::StoreInfo::default() }
    }

    fn map(groups: Vec<pb::GroupPlace>) -> Map {
        use pb::StoreKind::{StoreShard, StoreShuckle};
        let stores = vec![
            store(1, StoreShard, "a:1", true),
            store(2, StoreShard, "b:1", true),
            store(3, StoreShard, "c:1", false),
            store(4, StoreShuckle, "a:2", true),
            store(5, StoreShuckle, "b:2", false),
            store(6, StoreShard, "", true),
        ];
        let reply = pb::ClusterMapReply { stores, groups, ..pb::ClusterMapReply::default() };
        Map::new(&reply, |_| None)
    }

    fn group(map: &Map, group: u16) -> Vec<&str> {
        map.group(GroupId(group)).map(|address| &**address).collect()
    }

    #[test]
    fn replicas_come_leader_first() {
        let place = pb::GroupPlace {
            group: 7,
            leader: 3,
            alive: true,
            voters: vec![1, 2, 3],
            preferred: 2,
            ..pb::GroupPlace::default()
        };
        let dead = pb::GroupPlace { group: 8, alive: false, ..place.clone() };
        let new = pb::GroupPlace { group: 9, founding: vec![1, 6, 99], ..pb::GroupPlace::default() };
        let nonsense = pb::GroupPlace { group: 70_000, ..place.clone() };
        let map = map(vec![place, dead, new, nonsense]);
        assert_eq!(group(&map, 7), ["c:1", "b:1", "a:1"]);
        assert_eq!(group(&map, 8), ["b:1", "a:1", "c:1"], "nobody leads it: the one that is to lead");
        assert_eq!(group(&map, 9), ["a:1"], "stores without a place or a name are left out");
        assert!(group(&map, 10).is_empty() && group(&map, 300).is_empty());
        assert_eq!(map.shuckles().iter().map(|address| &**address).collect::<Vec<_>>(), ["a:2"]);
        assert_eq!(map.host("b:1"), Some("host-2"));
    }

    #[test]
    fn what_leaders_say_counts_for_more_than_the_map_until_the_map_is_newer() {
        let place = pb::GroupPlace {
            group: 7,
            leader: 1,
            alive: true,
            voters: vec![1, 2, 3],
            ..pb::GroupPlace::default()
        };
        let mut map = map(vec![place]);
        let (seven, mut leaders) = (GroupId(7), Leaders::none());
        let of = |leaders: &Leaders, map: &Map| leaders.of(seven, map).as_deref().map(str::to_owned);
        assert_eq!(of(&leaders, &map).as_deref(), Some("a:1"));
        leaders.learn(seven, &"b:1".into());
        assert_eq!(of(&leaders, &map).as_deref(), Some("b:1"));
        map.fetched = Instant::now() + MAP_BEHIND + Duration::from_secs(1);
        assert_eq!(of(&leaders, &map).as_deref(), Some("a:1"), "the map is much newer");
        map.fetched = Instant::now();
        leaders.forget(seven, "c:1");
        assert_eq!(of(&leaders, &map).as_deref(), Some("b:1"));
        leaders.forget(seven, "b:1");
        assert_eq!(of(&leaders, &map).as_deref(), Some("a:1"));
        leaders.learn(GroupId(999), &"b:1".into());
    }
}
