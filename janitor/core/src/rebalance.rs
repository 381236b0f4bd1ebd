//! Which disks are fuller than the others, and what moves where (JA-7).

use std::collections::BTreeMap;

use eggs_proto::{BlockServiceId, pb};

use crate::disks::{Disk, Disks, Presence};

/// In parts per thousand of a disk. A disk that is so much fuller than its class on the whole is relieved …
pub const FULLER: u64 = 50;
/// … until it is no more than this above. The distance keeps it from going to and fro.
pub const RELIEVED: u64 = 10;

/// A disk that gives blocks, and those that may take them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub from: BlockServiceId,
    /// In the order of their ids.
    pub to: Vec<BlockServiceId>,
    /// Until it has given so much, the takers together have room for as much.
    pub bytes: u64,
}

/// The fullest disk that is too full, in comparison with its class; None: all is even, or nothing can move.
pub fn plan(disks: &Disks) -> Option<Plan> {
    let mut classes: BTreeMap<u32, Vec<(BlockServiceId, &Disk)>> = BTreeMap::new();
    for (id, disk) in disks.iter() {
        // How full a read-only disk is nobody says; what leaves it could not be erased there.
        let counts = disk.presence() == Presence::Here && !disk.to_be_emptied() && !disk.read_only;
        if counts && disk.capacity_bytes > 0 {
            classes.entry(disk.storage_class).or_default().push((id, disk));
        }
    }
    let plans = classes.values().filter_map(|class| plan_class(class));
    plans.max_by_key(|(fullness, plan)| (*fullness, std::cmp::Reverse(plan.from))).map(|(_, plan)| plan)
}

fn plan_class(class: &[(BlockServiceId, &Disk)]) -> Option<(u64, Plan)> {
    let filled: u128 = class.iter().map(|(_, disk)| u128::from(disk.filled_bytes())).sum();
    let capacity: u128 = class.iter().map(|(_, disk)| u128::from(disk.capacity_bytes)).sum();
    let mean = u64::try_from(filled * 1000 / capacity.max(1)).unwrap_or(u64::MAX);
    let (from, disk) =
        class.iter().max_by_key(|(id, disk)| (fullness(disk), std::cmp::Reverse(*id))).copied()?;
    let full = fullness(disk);
    if full < mean.saturating_add(FULLER) {
        return None;
    }
    let to: Vec<BlockServiceId> = class
        .iter()
        .filter(|(_, disk)| disk.takes_blocks() && fullness(disk) < mean)
        .map(|(id, _)| *id)
        .collect();
    if to.is_empty() {
        return None;
    }
    let above = bytes(disk.capacity_bytes, full - mean.saturating_add(RELIEVED));
    let room = class.iter().filter(|(id, _)| to.contains(id));
    let room = room.map(|(_, disk)| bytes(disk.capacity_bytes, mean - fullness(disk)));
    let room = room.fold(0u64, u64::saturating_add);
    Some((full, Plan { from, to, bytes: above.min(room) }))
}

/// Whether a block of a span can move from a disk to one of these: to one that has no block of the span, and where it shares
/// its failure domain with no more of them than now (JA-7).
pub fn can_move(span: &pb::Span, disks: &Disks, from: BlockServiceId, to: &[BlockServiceId]) -> bool {
    let blocks = span.blocks.as_ref().map_or(&[][..], |blocks| &blocks.blocks);
    let domain = |id: BlockServiceId| disks.get(id).map(|disk| &disk.failure_domain);
    let sharing = |id: BlockServiceId| {
        let holders = blocks.iter().map(|block| BlockServiceId(block.block_service));
        holders.filter(|&holder| domain(holder) == domain(id)).count()
    };
    let holds = |id: BlockServiceId| blocks.iter().any(|block| block.block_service == id.0);
    to.iter().any(|&id| !holds(id) && (domain(id) == domain(from) || sharing(id) < sharing(from)))
}

/// In parts per thousand.
pub fn fullness(disk: &Disk) -> u64 {
    let part = u128::from(disk.filled_bytes()) * 1000 / u128::from(disk.capacity_bytes.max(1));
    u64::try_from(part).unwrap_or(u64::MAX)
}

fn bytes(capacity: u64, parts: u64) -> u64 {
    u64::try_from(u128::from(capacity) * u128::from(parts) / 1000).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use eggs_proto::flags::{DECOMMISSIONED, LOST, NO_WRITE};
    use proptest::prelude::*;

    use super::*;
    use crate::disks::tests::disk;

    fn disks(filled: &[(u64, u32)]) -> Disks {
        let all = (1u64..).zip(filled);
        all.map(|(id, &(filled, flags))| {
            let available_bytes = 1_000_000 - filled * 1000;
            let disk = Disk { capacity_bytes: 1_000_000, available_bytes, ..disk("a", flags) };
            (BlockServiceId(id), disk)
        })
        .collect()
    }

    #[test]
    fn a_new_disk_takes_from_the_fullest() {
        let plan = plan(&disks(&[(600, 0), (620, 0), (580, 0), (0, 0)])).unwrap();
        assert_eq!((plan.from, &plan.to[..]), (BlockServiceId(2), &[BlockServiceId(4)][..]));
        assert_eq!(plan.bytes, 160_000);
    }

    #[test]
    fn what_is_even_or_not_to_be_touched_stays() {
        assert_eq!(plan(&disks(&[(600, 0), (620, 0), (580, 0)])), None);
        assert_eq!(plan(&disks(&[(600, 0), (600, 0), (0, LOST)])), None);
        assert_eq!(plan(&disks(&[(600, 0), (600, 0), (0, DECOMMISSIONED)])), None);
        assert_eq!(plan(&disks(&[(600, 0), (600, 0), (0, NO_WRITE)])), None, "nobody takes");
        assert_eq!(plan(&Disks::default()), None);
    }

    #[test]
    fn a_read_only_disk_is_left_alone_and_says_nothing_of_how_full_its_class_is() {
        let read_only = Disk { read_only: true, ..disk("a", 0) };
        let read_only = Disk { capacity_bytes: 1_000_000, available_bytes: 0, ..read_only };
        let with = |filled: &[(u64, u32)]| -> Disks {
            let others = disks(filled);
            let others = others.iter().map(|(id, disk)| (id, disk.clone()));
            others.chain([(BlockServiceId(9), read_only.clone())]).collect()
        };
        assert_eq!(plan(&with(&[(600, 0), (620, 0), (580, 0)])), None);
        let even = disks(&[(600, 0), (620, 0), (580, 0), (0, 0)]);
        assert_eq!(plan(&with(&[(600, 0), (620, 0), (580, 0), (0, 0)])), plan(&even));
    }

    #[test]
    fn what_moves_comes_no_closer_to_the_rest_of_its_span() {
        let all = [(1, "a"), (2, "a"), (3, "b"), (4, "b"), (5, "c")];
        let disks: Disks = all.iter().map(|&(id, domain)| (BlockServiceId(id), disk(domain, 0))).collect();
        let can = |holding: &[u64], from: u64, to: &[u64]| {
            let block = |&block_service: &u64| pb::Block { block_service, ..pb::Block::default() };
            let blocks = pb::Blocks { blocks: holding.iter().map(block).collect(), ..pb::Blocks::default() };
            let span = pb::Span { blocks: Some(blocks), ..pb::Span::default() };
            let to: Vec<BlockServiceId> = to.iter().copied().map(BlockServiceId).collect();
            can_move(&span, &disks, BlockServiceId(from), &to)
        };
        assert!(!can(&[1, 3], 3, &[2]), "the other block is in that domain");
        assert!(can(&[1, 3], 3, &[2, 5]) && can(&[1, 3], 3, &[4]));
        assert!(can(&[1, 3, 4], 3, &[2]), "it shares one with as many already");
        assert!(!can(&[1, 3], 3, &[1]), "nor two on one disk");
        assert!(!can(&[1, 3], 3, &[]));
    }

    proptest! {
        /// JA-7: plans that are carried out come to an end, and none makes a taker fuller than the giver.
        #[test]
        fn it_comes_to_rest(mut filled in prop::collection::vec(0u64..=1000, 2..12)) {
            for _ in 0..200 {
                let all: Vec<(u64, u32)> = filled.iter().map(|&filled| (filled, 0)).collect();
                let Some(plan) = plan(&disks(&all)) else { return Ok(()) };
                prop_assert!(plan.bytes > 0);
                let from = plan.from.0 as usize - 1;
                // The emptiest taker gets it.
                let to = plan.to.iter().map(|id| id.0 as usize - 1).min_by_key(|&at| filled[at]).unwrap();
                let parts = (plan.bytes / 1000).clamp(1, (filled[from] - filled[to]).div_ceil(2));
                filled[from] -= parts;
                filled[to] += parts;
                prop_assert!(filled[to] <= filled[from] + 1);
            }
            prop_assert!(false, "it does not come to rest: {filled:?}");
        }
    }
}
