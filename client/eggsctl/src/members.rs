//! Groups, stores and hosts as people name them, and what the cluster map says of them.

use std::collections::BTreeMap;
use std::time::Duration;

use eggs_client::Client;
use eggs_proto::limits::{SHARDS, STALE_AFTER};
use eggs_proto::{GroupId, StoreId, pb};
use eggs_shuckle_core::{groups_of, kind_name, kind_of};
use serde::Serialize;

use crate::context::failure;
use crate::failure::{Failure, Outcome};

/// What the commands that take groups accept, for their help.
pub const GROUPS_HELP: &str =
    "0 to 255, a range as in 0-15, `crossdir`, `shuckle`, `all`; several with commas";

/// Between looks at a registry that has not heard of everybody yet.
const LISTEN_PAUSE: Duration = Duration::from_millis(200);

/// The cluster map. A registry that has begun to lead a moment ago is given the time to hear of everybody: until then it
/// can only guess how they are.
pub async fn heard_map(client: &Client) -> Result<pb::ClusterMapReply, Failure> {
    let deadline = tokio::time::Instant::now() + STALE_AFTER + LISTEN_PAUSE;
    loop {
        let map = client.cluster_map().await.map_err(|error| failure("", error))?;
        if !map.listening || tokio::time::Instant::now() >= deadline {
            return Ok(map);
        }
        tokio::time::sleep(LISTEN_PAUSE).await;
    }
}

/// Groups as typed: `7`, `0-15`, `1,2,crossdir`, `all`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups(Vec<GroupId>);

impl Groups {
    pub fn parse(text: &str) -> Result<Groups, String> {
        let mut groups = Vec::new();
        for part in text.split(',') {
            match part.trim() {
                "crossdir" => groups.push(GroupId::CROSSDIR),
                "shuckle" => groups.push(GroupId::SHUCKLE),
                "all" => groups.extend(all()),
                part => groups.extend(shards(part)?),
            }
        }
        Ok(Groups(groups))
    }

    /// All that were typed, each once, in order; everything when nothing was typed.
    pub fn of(typed: &[Groups]) -> Vec<GroupId> {
        let mut groups: Vec<GroupId> = typed.iter().flat_map(|groups| groups.0.iter().copied()).collect();
        if typed.is_empty() {
            groups = all().collect();
        }
        groups.sort_unstable();
        groups.dedup();
        groups
    }
}

fn all() -> impl Iterator<Item = GroupId> {
    use pb::StoreKind::{StoreCrossdir, StoreShard, StoreShuckle};
    [StoreShard, StoreCrossdir, StoreShuckle].into_iter().flat_map(groups_of)
}

fn shards(part: &str) -> Result<impl Iterator<Item = GroupId>, String> {
    let wrong = || format!("'{part}' is no shard: use {GROUPS_HELP}");
    let number = |text: &str| {
        let text = text.strip_prefix("shard").unwrap_or(text).trim();
        text.parse::<u16>().ok().filter(|&number| number < SHARDS).ok_or_else(wrong)
    };
    let (first, last) = match part.split_once("..").or_else(|| part.split_once('-')) {
        Some((first, last)) => (number(first)?, number(last.trim_start_matches('='))?),
        None => (number(part)?, number(part)?),
    };
    if first > last {
        return Err(wrong());
    }
    Ok((first..=last).map(GroupId))
}

/// The map, with what is looked up in it.
pub struct View<'a> {
    pub map: &'a pb::ClusterMapReply,
    stores: BTreeMap<u64, &'a pb::StoreInfo>,
    groups: BTreeMap<u32, &'a pb::GroupPlace>,
}

/// A replica in JSON.
#[derive(Debug, Serialize)]
pub struct JsonStore {
    pub store: String,
    /// Not known of a store that was forgotten.
    pub host: Option<String>,
    pub address: Option<String>,
    pub alive: bool,
}

impl<'a> View<'a> {
    pub fn new(map: &'a pb::ClusterMapReply) -> View<'a> {
        View {
            map,
            stores: map.stores.iter().map(|store| (store.id, store)).collect(),
            groups: map.groups.iter().map(|place| (place.group, place)).collect(),
        }
    }

    pub fn group(&self, group: GroupId) -> Outcome<&'a pb::GroupPlace> {
        let place = self.groups.get(&u32::from(group.0)).copied();
        place.ok_or_else(|| Failure::refused(group, "it has no replicas yet: too few hosts have registered"))
    }

    pub fn store(&self, store: u64) -> Option<&'a pb::StoreInfo> {
        self.stores.get(&store).copied()
    }

    /// The host of a store, or the store when it is not known any more.
    pub fn host(&self, store: u64) -> String {
        self.store(store).map_or_else(|| StoreId(store).to_string(), |store| store.host.clone())
    }

    pub fn hosts(&self, stores: &[u64]) -> String {
        let mut hosts: Vec<String> = stores.iter().map(|&store| self.host(store)).collect();
        hosts.sort_unstable();
        if hosts.is_empty() { "-".to_owned() } else { hosts.join(", ") }
    }

    pub fn is_alive(&self, store: u64) -> bool {
        self.store(store).is_some_and(|store| store.alive)
    }

    pub fn json(&self, store: u64) -> JsonStore {
        let known = self.store(store);
        JsonStore {
            store: StoreId(store).to_string(),
            host: known.map(|store| store.host.clone()),
            address: known.map(|store| store.address.clone()),
            alive: self.is_alive(store),
        }
    }

    /// The store on a host that can hold `group`: the live one, else the one that came last.
    pub fn store_on(&self, host: &str, group: GroupId) -> Outcome<StoreId> {
        let on_host = || self.map.stores.iter().filter(|store| store.host == host);
        if on_host().next().is_none() {
            let mut known: Vec<&str> = self.map.stores.iter().map(|store| store.host.as_str()).collect();
            known.sort_unstable();
            known.dedup();
            return Err(Failure::refused(host, format!("no such host; there are {}", known.join(", "))));
        }
        let kind = kind_of(group).unwrap_or_default();
        let fitting = on_host().filter(|store| store.kind() == kind);
        let best = fitting.max_by_key(|store| (store.alive, store.registered_at));
        best.map(|store| StoreId(store.id)).ok_or_else(|| {
            Failure::refused(
                host,
                format!("no {} store is on that host: it cannot hold {group}", kind_name(kind)),
            )
        })
    }
}

/// The voters a group is to have.
pub fn wanted(place: &pb::GroupPlace) -> &[u64] {
    if place.wanted.is_empty() { &place.voters } else { &place.wanted }
}

pub fn same_set(a: &[u64], b: &[u64]) -> bool {
    a.len() == b.len() && a.iter().all(|store| b.contains(store))
}

/// A group has exactly the voters it is to have, and a leader.
pub fn is_settled(place: &pb::GroupPlace) -> bool {
    place.alive && place.learners.is_empty() && same_set(&place.voters, wanted(place))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Hosts a, b and c with a store of each kind (11, 12, 13 for shards), all groups on all of them; b leads.
    pub fn map() -> pb::ClusterMapReply {
        use pb::StoreKind::{StoreCrossdir, StoreShard, StoreShuckle};
        let kinds = [StoreShard, StoreCrossdir, StoreShuckle];
        let store = |host: &str, n: u64, kind: pb::StoreKind| pb::StoreInfo {
            id: 10 * kind as u64 + n,
            kind: kind as i32,
            host: host.to_owned(),
            address: format!("{host}:5000"),
            alive: true,
            last_seen: 1_000_000_000,
            replicas: if kind == StoreShard { 256 } else { 1 },
            leaders: if n == 2 { 256 } else { 0 },
            ..pb::StoreInfo::default()
        };
        let hosts = [("a", 1), ("b", 2), ("c", 3)];
        let stores = hosts.iter().flat_map(|&(host, n)| kinds.map(|kind| store(host, n, kind)));
        let group = |group: GroupId| {
            let first = 10 * kind_of(group).unwrap() as u64;
            let voters = vec![first + 1, first + 2, first + 3];
            pb::GroupPlace {
                group: group.0.into(),
                leader: first + 2,
                alive: true,
                applied_index: 100,
                term: 3,
                wanted: voters.clone(),
                preferred: first + 2,
                voters,
                progress: vec![
                    pb::ReplicaProgress { store: first + 1, matched_index: 100, ..Default::default() },
                    pb::ReplicaProgress { store: first + 3, matched_index: 93, ..Default::default() },
                ],
                ..pb::GroupPlace::default()
            }
        };
        pb::ClusterMapReply {
            stores: stores.collect(),
            groups: all().map(group).collect(),
            block_services: vec![pb::BlockServiceInfo::default(); 2],
            replicas: 3,
            now: 2_000_000_000,
            ..pb::ClusterMapReply::default()
        }
    }

    #[test]
    fn groups_are_typed_in_many_ways() {
        let of = |text: &str| Groups::parse(text).map(|groups| Groups::of(&[groups]));
        let shards = |numbers: &[u16]| Ok(numbers.iter().copied().map(GroupId).collect::<Vec<_>>());
        assert_eq!(of("7"), shards(&[7]));
        assert_eq!(of("3-5,4,255"), shards(&[3, 4, 5, 255]));
        assert_eq!(of("3..5"), shards(&[3, 4, 5]));
        assert_eq!(of("crossdir"), Ok(vec![GroupId::CROSSDIR]));
        assert_eq!(of("shuckle,0"), Ok(vec![GroupId(0), GroupId::SHUCKLE]));
        assert_eq!(of("all").unwrap().len(), 258);
        assert_eq!(Groups::of(&[]).len(), 258);
        for wrong in ["", "256", "5-3", "x", "-1", "1-", "0-256"] {
            assert!(Groups::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn hosts_stand_for_their_store_of_the_right_kind() {
        let mut map = map();
        let old = pb::StoreInfo { id: 99, alive: false, registered_at: 9, ..map.stores[0].clone() };
        map.stores.push(old);
        let only_disks = pb::StoreInfo { id: 98, host: "d".into(), ..map.stores[1].clone() };
        map.stores.push(only_disks);
        let view = View::new(&map);
        assert_eq!(view.store_on("a", GroupId(0)).unwrap(), StoreId(11), "the live one");
        assert_eq!(view.store_on("a", GroupId::SHUCKLE).unwrap(), StoreId(31));
        let line = |outcome: Outcome<StoreId>| outcome.unwrap_err().line("shard").unwrap();
        assert!(line(view.store_on("x", GroupId(0))).contains("no such host; there are a, b, c, d"));
        assert!(line(view.store_on("d", GroupId(0))).contains("cannot hold shard 0"));
    }

    #[test]
    fn a_group_is_settled_when_it_has_what_it_is_to_have() {
        let place = map().groups[0].clone();
        assert!(is_settled(&place));
        assert!(!is_settled(&pb::GroupPlace { alive: false, ..place.clone() }));
        assert!(!is_settled(&pb::GroupPlace { learners: vec![1], ..place.clone() }));
        assert!(!is_settled(&pb::GroupPlace { wanted: vec![11, 12], ..place.clone() }));
        assert!(is_settled(&pb::GroupPlace { wanted: vec![], ..place }));
    }
}
