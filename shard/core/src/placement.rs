//! Which block services the blocks of a span go to.
//!
//! In this order:
//! 1. Every block goes to another service (SH-19).
//! 2. Failure domains are used evenly: none gets a second block of the span while one that could take it has fewer. When
//!    one gets a second all the same, the writer is told: the span is under-spread.
//! 3. Services keep a reserve free, as long as others in as good a place have room. Beyond that a block service has a
//!    reserve of its own, which nothing gets (BL-10).
//! 4. Among equals the choice is random, weighted by free space, so that disks come to be equally full. But none is more
//!    than [`EAGERNESS_MAX`] times as likely as another: new data is what is read most, and an empty disk among full ones
//!    would have to serve all of it.

use std::collections::BTreeMap;

use eggs_proto::BlockServiceId;
use eggs_proto::limits::DISK_RESERVE_SHARE;
use eggs_proto::policy::class_name;

use crate::cluster::{Candidate, Cluster, Domain};

/// See the top of the file. Four new disks beside forty full ones still get a fair part of all writes.
const EAGERNESS_MAX: u64 = 8;

/// What to place.
pub(crate) struct Wanted<'a> {
    pub storage_class: u32,
    pub blocks: usize,
    pub block_size: u64,
    /// Services that hold blocks of the span already: not used, and their domains count as used.
    pub holding: &'a [u64],
    /// Services not to use.
    pub avoid: &'a [u64],
    /// When there are any: no others.
    pub only: &'a [u64],
    /// Blocks of the span that a failure domain may have at most.
    pub per_domain: usize,
}

impl Wanted<'_> {
    fn can_take(&self, service: &Candidate) -> bool {
        service.available_bytes >= self.block_size && self.may_take(service)
    }

    /// If it has room.
    fn may_take(&self, service: &Candidate) -> bool {
        let id = service.id.0;
        !self.avoid.contains(&id)
            && !self.holding.contains(&id)
            && (self.only.is_empty() || self.only.contains(&id))
    }

    /// Whether one block more leaves the service its reserve.
    fn has_room(&self, service: &Candidate) -> bool {
        let reserve = service.capacity_bytes / DISK_RESERVE_SHARE;
        service.available_bytes.saturating_sub(self.block_size) >= reserve
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    /// One for each block.
    pub services: Vec<u64>,
    /// Blocks of the span share a failure domain.
    pub under_spread: bool,
}

/// `None` when there are not enough services.
pub(crate) fn choose(
    cluster: &Cluster,
    wanted: &Wanted<'_>,
    entropy: &mut dyn FnMut() -> u64,
) -> Option<Placement> {
    let services = cluster.writable.get(&wanted.storage_class)?;
    let usable = || services.iter().filter(|service| wanted.can_take(service));
    let least_weight = usable().map(free_mib).max().unwrap_or(0) / EAGERNESS_MAX;
    let mut domains: BTreeMap<Domain, Free> = BTreeMap::new();
    for service in usable() {
        domains.entry(service.domain).or_default().candidates.push(Weighed {
            id: service.id,
            weight: free_mib(service).max(least_weight),
            roomy: wanted.has_room(service),
        });
    }
    for holding in wanted.holding {
        if let Some(service) = cluster.services.get(holding) {
            domains.entry(service.domain).or_default().used += 1;
        }
    }
    let mut domains: Vec<Free> = domains.into_values().collect();
    let services: Option<Vec<u64>> =
        (0..wanted.blocks).map(|_| pick(&mut domains, wanted.per_domain, entropy)).collect();
    let under_spread = domains.iter().any(|domain| domain.used > 1);
    services.map(|services| Placement { services, under_spread })
}

/// Why there are not enough services, for people; `layout` is what the span is stored as.
pub(crate) fn shortage(cluster: &Cluster, wanted: &Wanted<'_>, layout: &str) -> String {
    let services = cluster.writable.get(&wanted.storage_class).map_or(&[][..], Vec::as_slice);
    let (needed, class) = (wanted.blocks, class_name(wanted.storage_class));
    let other = if wanted.holding.is_empty() { "" } else { "other " };
    let (disks, take) = if needed == 1 { ("disk", "that takes") } else { ("disks", "that take") };
    let there_are =
        |count: usize| if count == 1 { "there is 1".to_owned() } else { format!("there are {count}") };
    let free = services.iter().filter(|service| wanted.may_take(service)).count();
    let roomy = services.iter().filter(|service| wanted.can_take(service)).count();
    if free < needed {
        format!("{layout} needs {needed} {other}{class} {disks} {take} blocks, {}", there_are(free))
    } else if roomy < needed {
        let (size, are) = (wanted.block_size, there_are(roomy));
        format!("no space: {layout} needs {needed} {other}{class} {disks} with {size} bytes free, {are}")
    } else {
        format!(
            "{layout} needs {needed} {other}{class} {disks} in failure domains that have fewer of its blocks"
        )
    }
}

#[derive(Default)]
struct Free {
    /// Blocks of the span in this domain.
    used: usize,
    candidates: Vec<Weighed>,
}

struct Weighed {
    id: BlockServiceId,
    weight: u64,
    /// Has more than its reserve.
    roomy: bool,
}

fn pick(domains: &mut [Free], per_domain: usize, entropy: &mut dyn FnMut() -> u64) -> Option<u64> {
    let can_take = |domain: &&Free| !domain.candidates.is_empty() && domain.used < per_domain;
    let least = domains.iter().filter(can_take).map(|domain| domain.used).min()?;
    let is_eligible = |domain: &&Free| domain.used == least;
    let any_roomy = domains.iter().filter(is_eligible).flat_map(|domain| &domain.candidates).any(|c| c.roomy);
    let weight = |service: &Weighed| if service.roomy || !any_roomy { service.weight } else { 0 };
    let domain_weight =
        |domain: &Free| if domain.used == least { domain.candidates.iter().map(weight).sum() } else { 0 };
    let domain = weighted(domains.iter().map(domain_weight), entropy())?;
    let domain = &mut domains[domain];
    let service = weighted(domain.candidates.iter().map(weight), entropy())?;
    domain.used += 1;
    Some(domain.candidates.swap_remove(service).id.0)
}

/// Free MiB, and one so that a full disk that is still chosen from has a weight.
fn free_mib(service: &Candidate) -> u64 {
    (service.available_bytes >> 20) + 1
}

/// An index, each as likely as its weight; `None` when all are 0.
fn weighted(weights: impl Iterator<Item = u64> + Clone, random: u64) -> Option<usize> {
    let total: u128 = weights.clone().map(u128::from).sum();
    let mut at = (u128::from(random) * total) >> 64;
    for (index, weight) in weights.enumerate() {
        let weight = u128::from(weight);
        if at < weight {
            return Some(index);
        }
        at -= weight;
    }
    None
}

#[cfg(test)]
mod tests {
    use eggs_proto::{flags, pb};
    use proptest::prelude::*;

    use super::*;

    fn info(id: u64, domain: &str, available_bytes: u64) -> pb::BlockServiceInfo {
        pb::BlockServiceInfo {
            id,
            storage_class: 3,
            failure_domain: domain.to_owned(),
            available_bytes,
            key: vec![1; 32].into(),
            ..Default::default()
        }
    }

    fn cluster(block_services: Vec<pb::BlockServiceInfo>) -> Cluster {
        Cluster::from_map(&pb::ClusterMapReply { block_services, ..Default::default() })
    }

    #[test]
    fn what_lacks_is_said() {
        let few = cluster((1..=4).map(|id| info(id, "a", 1 << 30)).collect());
        let said = |cluster: &Cluster, wanted: &Wanted<'_>| {
            assert_eq!(choose(cluster, wanted, &mut || 0), None);
            shortage(cluster, wanted, "4+2")
        };
        assert_eq!(said(&few, &wanted(6, &[], &[])), "4+2 needs 6 FLASH disks that take blocks, there are 4");
        let others = wanted(2, &[1, 2, 3], &[]);
        assert_eq!(said(&few, &others), "4+2 needs 2 other FLASH disks that take blocks, there is 1");
        let full = cluster((1..=6).map(|id| info(id, "a", if id < 3 { 0 } else { 1 << 30 })).collect());
        let lacks = "no space: 4+2 needs 6 FLASH disks with 1048576 bytes free, there are 4";
        assert_eq!(said(&full, &wanted(6, &[], &[])), lacks);
        let one = wanted(1, &[1, 2, 3, 4], &[]);
        assert_eq!(said(&few, &one), "4+2 needs 1 other FLASH disk that takes blocks, there are 0");
        let apart = Wanted { per_domain: 1, ..wanted(1, &[1], &[]) };
        assert!(said(&few, &apart).contains("failure domains"));
    }

    fn wanted<'a>(blocks: usize, holding: &'a [u64], avoid: &'a [u64]) -> Wanted<'a> {
        Wanted {
            storage_class: 3,
            blocks,
            block_size: 1 << 20,
            holding,
            avoid,
            only: &[],
            per_domain: usize::MAX,
        }
    }

    fn chosen(cluster: &Cluster, wanted: &Wanted<'_>, seed: u64) -> Option<Vec<u64>> {
        choose(cluster, wanted, &mut entropy(seed)).map(|placement| placement.services)
    }

    /// A small generator; any would do.
    fn entropy(mut state: u64) -> impl FnMut() -> u64 {
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }
    }

    proptest! {
        #[test]
        fn domains_are_used_evenly_and_services_once(
            domains in prop::collection::vec(0u64..4, 0..20), blocks in 1usize..10, seed: u64,
            avoid in 1u64..20, holding in 1u64..20,
        ) {
            let infos = domains.iter().zip(1..).map(|(d, id)| info(id, &format!("d{d}"), 1 << 30)).collect();
            let cluster = cluster(infos);
            let (avoid, holding) = ([avoid], [holding]);
            let chosen = choose(&cluster, &wanted(blocks, &holding, &avoid), &mut entropy(seed));
            let free = (1..=domains.len() as u64).filter(|id| *id != avoid[0] && *id != holding[0]).count();
            prop_assert_eq!(chosen.is_some(), free >= blocks);
            let Some(Placement { services: chosen, under_spread }) = chosen else { return Ok(()) };
            let mut used = [0usize; 4];
            let mut capacity = [0usize; 4];
            for (domain, id) in domains.iter().zip(1..) {
                capacity[*domain as usize] += usize::from(id != avoid[0] && id != holding[0]);
            }
            for id in chosen.iter().chain(&holding).filter(|id| **id <= domains.len() as u64) {
                used[domains[*id as usize - 1] as usize] += 1;
                prop_assert!(*id != avoid[0] || *id == holding[0]);
            }
            prop_assert_eq!(under_spread, used.iter().any(|used| *used > 1));
            if let Some(&held) = holding.iter().find(|id| **id <= domains.len() as u64) {
                capacity[domains[held as usize - 1] as usize] += 1;
            }
            let mut distinct = chosen.clone();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(distinct.len(), blocks);
            // A domain with a block to spare has at most one less than any other.
            for (mine, room) in used.iter().zip(&capacity) {
                if mine < room {
                    prop_assert!(used.iter().all(|other| *other <= mine + 1), "{:?} {:?}", used, capacity);
                }
            }
        }
    }

    #[test]
    fn what_cannot_take_a_block_gets_none() {
        let mut infos: Vec<_> = (1..=9).map(|id| info(id, &format!("d{id}"), 1 << 30)).collect();
        infos[8].read_only = true;
        infos[0].flags = flags::NO_WRITE;
        infos[1].flags = flags::STALE;
        infos[2].flags = flags::LOST;
        infos[3].flags = flags::DECOMMISSIONED;
        infos[4].available_bytes = 10;
        infos[5].key = Default::default();
        infos[6].storage_class = 2;
        let cluster = cluster(infos);
        assert_eq!(chosen(&cluster, &wanted(1, &[], &[]), 1), Some(vec![8]));
        assert_eq!(chosen(&cluster, &wanted(2, &[], &[]), 1), None);
    }

    #[test]
    fn free_space_weighs() {
        let cluster = cluster(vec![info(1, "a", 3 << 30), info(2, "b", 1 << 30)]);
        let mut random = entropy(7);
        let first =
            (0..1000).filter(|_| chosen(&cluster, &wanted(1, &[], &[]), random()) == Some(vec![1])).count();
        assert!((650..850).contains(&first), "{first} of 1000 went to three quarters of the space");
    }

    #[test]
    fn an_empty_disk_does_not_get_everything() {
        let cluster = cluster(vec![info(1, "a", 1000 << 30), info(2, "b", 1 << 30)]);
        let mut random = entropy(7);
        let second =
            (0..1000).filter(|_| chosen(&cluster, &wanted(1, &[], &[]), random()) == Some(vec![2])).count();
        assert!((60..170).contains(&second), "{second} of 1000 went to the full disk, a ninth should");
    }

    #[test]
    fn the_reserve_is_left_while_there_is_another_place() {
        let with_reserve = |id: u64, domain: &str, available_bytes| pb::BlockServiceInfo {
            capacity_bytes: 1 << 40,
            ..info(id, domain, available_bytes)
        };
        let (full, roomy) = ((1 << 40) / DISK_RESERVE_SHARE, 1 << 39);
        let infos = vec![
            with_reserve(1, "a", full),
            with_reserve(2, "a", roomy),
            with_reserve(3, "b", full),
            with_reserve(4, "c", roomy),
        ];
        let cluster = cluster(infos);
        for seed in 0..100 {
            let mut two = chosen(&cluster, &wanted(2, &[], &[]), seed).unwrap();
            two.sort_unstable();
            assert_eq!(two, [2, 4], "of two domains with room each one block, none on a full service");
            let three = chosen(&cluster, &wanted(3, &[], &[]), seed).unwrap();
            assert!(three.contains(&3), "another domain is worth more than the reserve: {three:?}");
        }
        assert_eq!(chosen(&cluster, &wanted(1, &[2, 4], &[]), 1), Some(vec![3]));
    }

    /// What a span has on a service that takes no new blocks still uses its domain.
    #[test]
    fn domains_of_services_without_writes_count() {
        let mut infos = vec![info(1, "a", 1 << 30), info(2, "a", 1 << 30), info(3, "b", 1 << 30)];
        infos[0].flags = flags::NO_WRITE;
        let cluster = cluster(infos);
        for seed in 0..50 {
            assert_eq!(chosen(&cluster, &wanted(1, &[1], &[]), seed), Some(vec![3]));
        }
        let both = choose(&cluster, &wanted(2, &[1], &[]), &mut entropy(1)).unwrap();
        assert!(both.under_spread);
    }

    #[test]
    fn only_these() {
        let cluster = cluster((1..=5).map(|id| info(id, &format!("d{id}"), 1 << 30)).collect());
        let only = Wanted { only: &[2, 4], ..wanted(2, &[], &[]) };
        let mut two = choose(&cluster, &only, &mut entropy(1)).unwrap().services;
        two.sort_unstable();
        assert_eq!(two, [2, 4]);
        let none = Wanted { only: &[2, 4], ..wanted(1, &[2], &[4]) };
        assert_eq!(choose(&cluster, &none, &mut entropy(1)), None);
    }
}
