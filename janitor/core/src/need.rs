//! What one span needs (JA-1, JA-3).

use std::collections::BTreeSet;

use eggs_proto::{BlockId, BlockServiceId, pb};

use crate::disks::{Disks, Presence};
use crate::queue::Urgency;

/// What is to be done about a span.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Need {
    /// Indexes of the blocks that are to be made anew from the others, …
    pub rebuild: Vec<u32>,
    /// … and of those that are to be copied.
    pub copy: Vec<u32>,
    /// Blocks that cannot be had now and may come back: they are left where they are.
    pub away: Vec<u32>,
    /// Blocks of the span that its parity can spare, less those that cannot be had. Negative: it cannot be read.
    pub redundancy: i32,
    /// Blocks the span can be read without.
    pub parity: u32,
    /// Bytes of one block.
    pub block_bytes: u64,
}

impl Need {
    /// What a span needs. `bad`: blocks that are known to be missing or damaged although their disk is here.
    pub fn of(span: &pb::Span, disks: &Disks, bad: &BTreeSet<(BlockServiceId, BlockId)>) -> Need {
        Need::with(span, |block| {
            let (service, id) = (BlockServiceId(block.block_service), BlockId(block.block));
            let wanted_away = disks.get(service).is_none_or(crate::Disk::to_be_emptied);
            match disks.presence(service) {
                // A bad block of a disk that is away is bad when it is back: better made anew now.
                _ if bad.contains(&(service, id)) => Part::Lost,
                Presence::Gone => Part::Lost,
                Presence::Away => Part::Away,
                Presence::Here if wanted_away => Part::ToMove,
                Presence::Here => Part::Good,
            }
        })
    }

    /// The blocks on a disk that is here, moved to others.
    pub fn to_leave(span: &pb::Span, disks: &Disks, service: BlockServiceId) -> Need {
        Need::with(span, |block| match disks.presence(BlockServiceId(block.block_service)) {
            Presence::Here if block.block_service == service.0 => Part::ToMove,
            Presence::Here => Part::Good,
            Presence::Away | Presence::Gone => Part::Away,
        })
    }

    fn with(span: &pb::Span, part: impl Fn(&pb::Block) -> Part) -> Need {
        let Some(blocks) = &span.blocks else { return Need { redundancy: i32::MAX, ..Need::default() } };
        let mut need = Need {
            parity: blocks.parity,
            block_bytes: u64::from(blocks.stripes) * u64::from(blocks.cell_size),
            ..Need::default()
        };
        for (index, block) in (0u32..).zip(&blocks.blocks) {
            match part(block) {
                Part::Good => {}
                Part::ToMove => need.copy.push(index),
                Part::Away => need.away.push(index),
                Part::Lost => need.rebuild.push(index),
            }
        }
        let missing = i64::try_from(need.rebuild.len() + need.away.len()).unwrap_or(i64::MAX);
        let left = i64::from(blocks.parity).saturating_sub(missing);
        need.redundancy = i32::try_from(left).unwrap_or(if left < 0 { i32::MIN } else { i32::MAX });
        need
    }

    /// There is something to be done.
    pub fn any(&self) -> bool {
        !self.rebuild.is_empty() || !self.copy.is_empty()
    }

    /// More blocks cannot be had than the parity makes up for: nothing can be rebuilt now.
    pub fn lost(&self) -> bool {
        self.redundancy < 0
    }

    /// The blocks to replace, lost ones first.
    pub fn replace(&self) -> impl Iterator<Item = u32> {
        self.rebuild.iter().chain(&self.copy).copied()
    }

    /// Which blocks to replace in one step: the first of these that there is room for. All; without those that can wait;
    /// one, so that a span that can lose none more can lose one again. `only_copies`: nothing can be rebuilt.
    pub fn steps(&self, only_copies: bool) -> Vec<Vec<u32>> {
        let rebuild = if only_copies { &[][..] } else { &self.rebuild };
        let all: Vec<u32> = rebuild.iter().chain(&self.copy).copied().collect();
        let ones = all.iter().map(|&index| vec![index]).collect::<Vec<_>>();
        let mut steps = Vec::new();
        for step in [vec![all, rebuild.to_vec()], ones].concat() {
            if !step.is_empty() && !steps.contains(&step) {
                steps.push(step);
            }
        }
        steps
    }

    /// Bytes that will be written.
    pub fn bytes(&self) -> u64 {
        self.block_bytes.saturating_mul((self.rebuild.len() + self.copy.len()) as u64)
    }

    /// How urgent it is, in comparison (JA-2). `no_room`: it was tried, and there was none for it.
    pub fn urgency(&self, no_room: bool) -> Urgency {
        let only_to_move = self.rebuild.is_empty();
        Urgency { lost: self.lost(), no_room, redundancy: self.redundancy, only_to_move }
    }
}

enum Part {
    Good,
    ToMove,
    Away,
    Lost,
}

#[cfg(test)]
mod tests {
    use eggs_proto::flags::{DECOMMISSIONED, LOST, STALE};
    use proptest::prelude::*;

    use super::*;
    use crate::disks::tests::disk;

    fn span(data: u32, parity: u32) -> pb::Span {
        let block = |index: u32| pb::Block {
            block_service: u64::from(index) + 1,
            block: u64::from(index) + 100,
            ..pb::Block::default()
        };
        let blocks = pb::Blocks {
            data,
            parity,
            stripes: 2,
            cell_size: 4096,
            blocks: (0..data + parity).map(block).collect(),
        };
        pb::Span { storage_class: 2, blocks: Some(blocks), ..pb::Span::default() }
    }

    fn disks(flags: &[u32]) -> Disks {
        (1u64..).zip(flags).map(|(id, &flags)| (BlockServiceId(id), disk("a", flags))).collect()
    }

    #[test]
    fn lost_blocks_are_rebuilt_those_of_drained_disks_copied_and_those_away_left() {
        let disks = disks(&[0, DECOMMISSIONED, STALE, DECOMMISSIONED | LOST, 0, 0]);
        let need = Need::of(&span(3, 3), &disks, &BTreeSet::new());
        assert_eq!((&need.rebuild[..], &need.copy[..], &need.away[..]), (&[3][..], &[1][..], &[2][..]));
        assert_eq!((need.redundancy, need.lost(), need.bytes()), (1, false, 2 * 2 * 4096));
        assert_eq!(need.replace().collect::<Vec<_>>(), [3, 1]);
        let bad = BTreeSet::from([(BlockServiceId(1), BlockId(100)), (BlockServiceId(9), BlockId(101))]);
        let need = Need::of(&span(3, 3), &disks, &bad);
        assert_eq!((&need.rebuild[..], need.redundancy), (&[0, 3][..], 0), "a reader has found it damaged");
    }

    #[test]
    fn what_there_is_no_room_for_together_is_replaced_step_by_step() {
        let need = Need { rebuild: vec![3, 5], copy: vec![0], ..Need::default() };
        assert_eq!(need.steps(false), [vec![3, 5, 0], vec![3, 5], vec![3], vec![5], vec![0]]);
        assert_eq!(need.steps(true), [[0]]);
        let one = Need { rebuild: vec![2], ..Need::default() };
        assert_eq!(one.steps(false), [[2]]);
        assert_eq!(one.steps(true), Vec::<Vec<u32>>::new());
        let copies = Need { copy: vec![1, 2], ..Need::default() };
        assert_eq!(copies.steps(false), [vec![1, 2], vec![1], vec![2]]);
    }

    #[test]
    fn a_span_without_blocks_needs_nothing() {
        let need = Need::of(&pb::Span::default(), &Disks::default(), &BTreeSet::new());
        assert!(!need.any() && !need.lost());
    }

    #[test]
    fn what_leaves_a_full_disk_is_copied_and_nothing_else_is_touched() {
        let need = Need::to_leave(&span(2, 1), &disks(&[0, 0, STALE]), BlockServiceId(2));
        assert_eq!((&need.copy[..], &need.rebuild[..], &need.away[..]), (&[1][..], &[][..], &[2][..]));
        let need = Need::to_leave(&span(2, 1), &disks(&[0, STALE, 0]), BlockServiceId(2));
        assert!(!need.any(), "it cannot be read now");
    }

    proptest! {
        /// JA-1, JA-3: every block is in at most one list, and what is lost is so by the parity.
        #[test]
        fn every_block_is_judged_once(data in 1u32..17, parity in 0u32..17, bits in prop::collection::vec(0u32..32, 32)) {
            let (span, disks) = (span(data, parity), disks(&bits));
            let need = Need::of(&span, &disks, &BTreeSet::new());
            let all: Vec<u32> = need.rebuild.iter().chain(&need.copy).chain(&need.away).copied().collect();
            let distinct: BTreeSet<u32> = all.iter().copied().collect();
            prop_assert_eq!(distinct.len(), all.len());
            for index in 0..data + parity {
                let disk = disks.get(BlockServiceId(u64::from(index) + 1)).unwrap();
                prop_assert_eq!(need.replace().any(|i| i == index), disk.to_be_emptied());
            }
            let missing = need.rebuild.len() + need.away.len();
            prop_assert_eq!(need.lost(), missing > parity as usize);
        }
    }
}
