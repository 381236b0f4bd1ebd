//! Which block services the blocks of a span go to.
//!
//! Every block goes to another service. Failure domains are used evenly: none gets a second block of
//! the span while one that could take it has fewer. Among equals the choice is random, weighted by
//! free space, so that empty disks fill faster but nobody gets all the load.

use std::collections::BTreeMap;

use eggs_proto::{BlockServiceId, pb};

use crate::cluster::{Candidate, Cluster};

/// What to place.
pub(crate) struct Wanted<'a> {
    pub storage_class: u32,
    pub blocks: usize,
    pub block_size: u64,
    /// Services that hold blocks of the span already: not used, and their domains count as used.
    pub holding: &'a [u64],
    /// Services not to use.
    pub avoid: &'a [u64],
}

/// One service per block; `None` when there are not enough.
pub(crate) fn choose(
    cluster: &Cluster,
    wanted: &Wanted<'_>,
    entropy: &mut dyn FnMut() -> u64,
) -> Option<Vec<u64>> {
    let domains = cluster.writable.get(&wanted.storage_class)?;
    let mut free: Vec<Free> = domains
        .iter()
        .map(|domain| Free {
            used: 0,
            candidates: domain
                .services
                .iter()
                .copied()
                .filter(|service| {
                    service.available_bytes >= wanted.block_size
                        && !wanted.avoid.contains(&service.id.0)
                        && !wanted.holding.contains(&service.id.0)
                })
                .collect(),
        })
        .collect();
    for holding in wanted.holding {
        let service = cluster.services.get(holding);
        if let Some((class, domain)) = service.and_then(|service| service.domain)
            && class == wanted.storage_class
        {
            free[domain].used += 1;
        }
    }
    (0..wanted.blocks).map(|_| pick(&mut free, entropy)).collect()
}

struct Free {
    /// Blocks of the span in this domain.
    used: usize,
    candidates: Vec<Candidate>,
}

fn pick(free: &mut [Free], entropy: &mut dyn FnMut() -> u64) -> Option<u64> {
    let least = free.iter().filter(|domain| !domain.candidates.is_empty()).map(|domain| domain.used).min()?;
    let weight = |domain: &Free| {
        let eligible = domain.used == least;
        if eligible { domain.candidates.iter().map(candidate_weight).sum() } else { 0 }
    };
    let domain = weighted(free.iter().map(weight), entropy())?;
    let domain = &mut free[domain];
    let service = weighted(domain.candidates.iter().map(candidate_weight), entropy())?;
    domain.used += 1;
    Some(domain.candidates.swap_remove(service).id.0)
}

/// Free MiB, and one so that a full disk that is still chosen from has a weight.
fn candidate_weight(candidate: &Candidate) -> u64 {
    (candidate.available_bytes >> 20) + 1
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

/// How many blocks of the span each block service has.
pub(crate) fn block_counts(span: &pb::Span) -> BTreeMap<BlockServiceId, u32> {
    let mut counts = BTreeMap::new();
    for block in span.blocks.iter().flat_map(|blocks| &blocks.blocks) {
        *counts.entry(BlockServiceId(block.block_service)).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use eggs_proto::flags;
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

    fn wanted<'a>(blocks: usize, holding: &'a [u64], avoid: &'a [u64]) -> Wanted<'a> {
        Wanted { storage_class: 3, blocks, block_size: 1 << 20, holding, avoid }
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
            let Some(chosen) = chosen else { return Ok(()) };
            let mut used = [0usize; 4];
            let mut capacity = [0usize; 4];
            for (domain, id) in domains.iter().zip(1..) {
                capacity[*domain as usize] += usize::from(id != avoid[0] && id != holding[0]);
            }
            for id in chosen.iter().chain(&holding).filter(|id| **id <= domains.len() as u64) {
                used[domains[*id as usize - 1] as usize] += 1;
                prop_assert!(*id != avoid[0] || *id == holding[0]);
            }
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
        let mut infos: Vec<_> = (1..=8).map(|id| info(id, &format!("d{id}"), 1 << 30)).collect();
        infos[0].flags = flags::NO_WRITE;
        infos[1].flags = flags::STALE;
        infos[2].flags = flags::LOST;
        infos[3].flags = flags::DECOMMISSIONED;
        infos[4].available_bytes = 10;
        infos[5].key = Default::default();
        infos[6].storage_class = 2;
        let cluster = cluster(infos);
        assert_eq!(choose(&cluster, &wanted(1, &[], &[]), &mut entropy(1)), Some(vec![8]));
        assert_eq!(choose(&cluster, &wanted(2, &[], &[]), &mut entropy(1)), None);
    }

    #[test]
    fn free_space_weighs() {
        let cluster = cluster(vec![info(1, "a", 3 << 30), info(2, "b", 1 << 30)]);
        let mut random = entropy(7);
        let first = (0..1000)
            .filter(|_| choose(&cluster, &wanted(1, &[], &[]), &mut random) == Some(vec![1]))
            .count();
        assert!((650..850).contains(&first), "{first} of 1000 went to three quarters of the space");
    }
}
