//! Which spans are under-spread, and what moves where so that they are less so (JA-8).
//!
//! A span's blocks are to be on different disks in different failure domains. Where a cluster has fewer domains than a span has
//! blocks, they are to be spread evenly. How far a span is from that is the number of pairs of blocks that share a domain.
//! A move takes a block out of a domain with `n` of them to one with at most `n - 2`: it takes `n - 1` pairs away and adds
//! at most `n - 2`. So whichever disk of those the shard takes, there are fewer pairs, and it comes to rest; where nobody has
//! any two domains that differ by two, nothing moves.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use eggs_proto::limits::DISK_RESERVE_SHARE;
use eggs_proto::{BlockId, BlockServiceId, pb};

use crate::disks::{Disk, Disks};
use crate::need::Need;
use crate::rebalance::fullness;

/// What blocks of a span share that should not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place<'a> {
    Disk(BlockServiceId),
    FailureDomain(&'a str),
}

/// Why a span is under-spread: a disk that has several of its blocks or else a failure domain that has, and their indexes.
/// `None`: it is not. Of disks that nobody knows (`domain_of` gives `None`) the domain is unknown, not shared.
pub fn shared<'a>(
    blocks: &pb::Blocks,
    domain_of: impl Fn(BlockServiceId) -> Option<&'a str>,
) -> Option<(Place<'a>, Vec<usize>)> {
    let mut places: BTreeMap<Place<'a>, Vec<usize>> = BTreeMap::new();
    for (index, block) in blocks.blocks.iter().enumerate() {
        let disk = BlockServiceId(block.block_service);
        let domain = domain_of(disk).map(Place::FailureDomain);
        for place in domain.into_iter().chain([Place::Disk(disk)]) {
            places.entry(place).or_default().push(index);
        }
    }
    // In the order of places: disks come first.
    places.into_iter().find(|(_, there)| there.len() > 1)
}

/// Whether a span has blocks, and two of them share a disk or a failure domain.
pub fn is_under_spread(span: &pb::Span, disks: &Disks) -> bool {
    span.blocks.as_ref().is_some_and(|blocks| shared(blocks, |disk| domain_of(disks, disk)).is_some())
}

fn domain_of(disks: &Disks, disk: BlockServiceId) -> Option<&str> {
    disks.get(disk).map(|disk| &disk.failure_domain[..])
}

/// One block that is to move, to any of these disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub need: Need,
    /// In the order of their ids; not empty.
    pub to: Vec<BlockServiceId>,
}

/// What makes a span less under-spread. `None`: nothing does, or it has something to repair first, or blocks that cannot
/// be had now. `bad`: blocks that are known, or said, to be missing or damaged although their disk is here.
pub fn step(span: &pb::Span, disks: &Disks, bad: &BTreeSet<(BlockServiceId, BlockId)>) -> Option<Step> {
    let need = Need::of(span, disks, bad);
    if need.any() || !need.away.is_empty() {
        return None;
    }
    let blocks = &span.blocks.as_ref()?.blocks;
    let (mut on_disk, mut in_domain) = (BTreeMap::<u64, usize>::new(), BTreeMap::<&str, usize>::new());
    for block in blocks {
        *on_disk.entry(block.block_service).or_default() += 1;
        *in_domain.entry(domain_of(disks, BlockServiceId(block.block_service))?).or_default() += 1;
    }
    let crowd = |block: &pb::Block| {
        let domain = domain_of(disks, BlockServiceId(block.block_service)).unwrap_or_default();
        (in_domain.get(domain).copied().unwrap_or(0), on_disk.get(&block.block_service).copied().unwrap_or(0))
    };
    // Of several the last: parity moves rather than data.
    let (index, leaving) = (0u32..).zip(blocks).max_by_key(|(index, block)| (crowd(block), *index))?;
    let (sharing, _) = crowd(leaving);
    let from = disks.get(BlockServiceId(leaving.block_service))?;
    let used = |disk: &Disk| in_domain.get(&disk.failure_domain[..]).copied().unwrap_or(0);
    let takes = |id: BlockServiceId, disk: &Disk| {
        disk.storage_class == span.storage_class
            && !on_disk.contains_key(&id.0)
            && used(disk) + 2 <= sharing
            && has_room(disk, from, need.block_bytes)
    };
    let to: Vec<BlockServiceId> =
        disks.iter().filter(|&(id, disk)| takes(id, disk)).map(|(id, _)| id).collect();
    (!to.is_empty()).then(|| Step { need: Need { copy: vec![index], ..need }, to })
}

/// What moves without need leaves the disk its reserve, for new blocks want to go to different domains too; unless the disk
/// it leaves is as full.
fn has_room(disk: &Disk, from: &Disk, block_bytes: u64) -> bool {
    let left = disk.available_bytes.checked_sub(block_bytes);
    let keeps_reserve = left.is_some_and(|left| left >= disk.capacity_bytes / DISK_RESERVE_SHARE);
    disk.takes_blocks() && left.is_some() && (keeps_reserve || fullness(disk) <= fullness(from))
}

/// The failure domains of each storage class: when these change, spans may be spread better.
pub fn domains(disks: &Disks) -> BTreeSet<(u32, String)> {
    disks.iter().map(|(_, disk)| (disk.storage_class, disk.failure_domain.clone())).collect()
}

/// What was found of the spans that have blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub spans: u64,
    pub under_spread: u64,
    /// Of the under-spread ones: those that can be less so now, …
    pub movable: u64,
    /// … and the bytes of one block of each.
    pub movable_bytes: u64,
}

impl Tally {
    pub fn add(&mut self, span: &pb::Span, disks: &Disks, bad: &BTreeSet<(BlockServiceId, BlockId)>) {
        self.spans += u64::from(span.blocks.is_some());
        if is_under_spread(span, disks) {
            self.under_spread += 1;
            if let Some(step) = step(span, disks, bad) {
                self.movable += 1;
                self.movable_bytes = self.movable_bytes.saturating_add(step.need.bytes());
            }
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.under_spread == 1 { "is" } else { "are" };
        let [under_spread, spans, movable] = [self.under_spread, self.spans, self.movable].map(thousands);
        write!(f, "{under_spread} of {spans} spans {verb} under-spread")?;
        match self.movable {
            0 => Ok(()),
            _ => write!(f, "; {movable} can be spread now"),
        }
    }
}

/// `4,567`.
fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use eggs_proto::flags::{DECOMMISSIONED, LOST, NO_WRITE, STALE};
    use proptest::prelude::*;

    use super::*;
    use crate::disks::tests::disk;

    /// Disks 1 … in these domains.
    fn disks(domains: &[(&str, u32)]) -> Disks {
        (1u64..)
            .zip(domains)
            .map(|(id, (domain, flags))| (BlockServiceId(id), disk(domain, *flags)))
            .collect()
    }

    /// Blocks of one byte on these disks; block 100 + index.
    fn span(on: &[u64]) -> pb::Span {
        let block = |(block, &block_service)| pb::Block { block_service, block, ..pb::Block::default() };
        let blocks = pb::Blocks {
            data: 1,
            parity: u32::try_from(on.len()).unwrap() - 1,
            stripes: 1,
            cell_size: 1,
            blocks: (100u64..).zip(on).map(block).collect(),
        };
        pb::Span { storage_class: 2, blocks: Some(blocks), ..pb::Span::default() }
    }

    fn steps(span: &pb::Span, disks: &Disks) -> Option<(u32, Vec<u64>)> {
        let Step { need, to } = step(span, disks, &BTreeSet::new())?;
        assert_eq!((need.copy.len(), need.rebuild.len()), (1, 0));
        Some((need.copy[0], to.iter().map(|id| id.0).collect()))
    }

    #[test]
    fn blocks_too_near_each_other_are_seen() {
        let disks = disks(&[("a", 0), ("b", 0), ("b", 0)]);
        let shared = |on: &[u64]| {
            let shared = shared(span(on).blocks.as_ref().unwrap(), |id| domain_of(&disks, id))?;
            Some((shared.0, shared.1))
        };
        assert_eq!(shared(&[1, 2]), None);
        assert_eq!(shared(&[1, 9, 8]), None, "where nobody knows");
        assert_eq!(shared(&[1, 2, 3]), Some((Place::FailureDomain("b"), vec![1, 2])));
        assert_eq!(shared(&[3, 1, 2, 1]), Some((Place::Disk(BlockServiceId(1)), vec![1, 3])));
        assert!(!is_under_spread(&pb::Span::default(), &disks));
    }

    #[test]
    fn a_domain_that_is_not_used_takes_a_block_and_then_they_are_evened_out() {
        let one = [("a", 0); 6];
        let grown = disks(&[&one[..], &[("b", 0), ("b", 0), ("c", 0)]].concat());
        assert_eq!(steps(&span(&[1, 2, 3, 4, 5, 6]), &disks(&one)), None, "a laptop is what it is");
        assert_eq!(steps(&span(&[1, 2, 3, 4, 5, 6]), &grown), Some((5, vec![7, 8, 9])));
        assert_eq!(steps(&span(&[1, 2, 3, 4, 7, 9]), &grown), Some((3, vec![8])));
        assert_eq!(steps(&span(&[1, 2, 3, 7, 8, 9]), &grown), None, "c has no other disk");
        assert_eq!(steps(&span(&[1, 7, 9]), &grown), None);
        assert_eq!(steps(&span(&[7, 1, 1]), &grown), Some((2, vec![9])), "two on a disk");
    }

    #[test]
    fn what_is_to_be_repaired_or_away_is_not_moved_nor_moved_to_what_takes_nothing() {
        let at = |flags: u32| disks(&[("a", 0), ("a", flags), ("b", 0)]);
        assert!(steps(&span(&[1, 2]), &at(0)).is_some() && steps(&span(&[1, 2]), &at(NO_WRITE)).is_some());
        for flags in [STALE, LOST, DECOMMISSIONED, DECOMMISSIONED | STALE] {
            assert_eq!(steps(&span(&[1, 2]), &at(flags)), None, "{flags}");
        }
        let bad = BTreeSet::from([(BlockServiceId(2), BlockId(101))]);
        assert_eq!(step(&span(&[1, 2]), &at(0), &bad), None, "somebody has found it damaged");
        assert_eq!(steps(&span(&[1, 9]), &at(0)), None, "its disk is not known");
        let new = |change: &dyn Fn(&mut Disk)| {
            let mut new = disk("b", 0);
            change(&mut new);
            let all = [disk("a", 0), disk("a", 0), new];
            steps(&span(&[1, 2]), &(1u64..).map(BlockServiceId).zip(all).collect())
        };
        assert!(new(&|_| ()).is_some());
        assert_eq!(new(&|disk| disk.flags = NO_WRITE), None);
        assert_eq!(new(&|disk| disk.read_only = true), None);
        assert_eq!(new(&|disk| disk.storage_class = 3), None);
        assert_eq!(new(&|disk| disk.available_bytes = 50), None, "its reserve");
        assert!(new(&|disk| disk.available_bytes = 51).is_some());
        let full = |new: u64| {
            let all = [990, 990, new].map(|filled| Disk { available_bytes: 1000 - filled, ..disk("a", 0) });
            let mut all = all.to_vec();
            all[2].failure_domain = "b".to_owned();
            steps(&span(&[1, 2]), &(1u64..).map(BlockServiceId).zip(all).collect())
        };
        assert!(full(990).is_some() && full(991).is_none(), "no fuller than where it is");
    }

    #[test]
    fn what_was_found_is_counted() {
        let disks = disks(&[("a", 0), ("a", 0), ("b", 0), ("c", STALE)]);
        let mut tally = Tally::default();
        for span in [span(&[1, 2]), span(&[1, 3]), span(&[1, 2, 3]), span(&[1, 2, 4]), pb::Span::default()] {
            tally.add(&span, &disks, &BTreeSet::new());
        }
        assert_eq!(tally, Tally { spans: 4, under_spread: 3, movable: 1, movable_bytes: 1 });
        assert_eq!(tally.to_string(), "3 of 4 spans are under-spread; 1 can be spread now");
        let many = Tally { spans: 1_234_567, under_spread: 1, ..Tally::default() };
        assert_eq!(many.to_string(), "1 of 1,234,567 spans is under-spread");
    }

    /// Pairs of blocks on a disk, and in a domain.
    fn pairs(span: &pb::Span, disks: &Disks) -> (usize, usize) {
        let blocks = &span.blocks.as_ref().unwrap().blocks;
        let pairs = || {
            let with = |(n, one)| blocks[..n].iter().map(move |other: &pb::Block| (one, other));
            blocks.iter().enumerate().flat_map(with)
        };
        let domain = |block: &pb::Block| domain_of(disks, BlockServiceId(block.block_service)).unwrap();
        let same_disk = pairs().filter(|(a, b)| a.block_service == b.block_service).count();
        (same_disk, pairs().filter(|(a, b)| domain(a) == domain(b)).count())
    }

    proptest! {
        /// JA-8: wherever the shard puts the block, fewer share a domain and no more a disk; at rest no domain with room has
        /// two blocks less than another.
        #[test]
        fn every_move_makes_it_better_and_it_comes_to_rest(
            domains in prop::collection::vec((0u8..6, any::<bool>()), 1..20),
            on in prop::collection::vec(0usize..20, 1..10),
            mut choices: u64,
        ) {
            let names = ["a", "b", "c", "d", "e", "f"];
            let flags = |full: bool| if full { NO_WRITE } else { 0 };
            let all: Vec<_> = domains.iter().map(|&(n, full)| (names[usize::from(n)], flags(full))).collect();
            let (disks, count) = (disks(&all), all.len());
            let mut span = span(&on.iter().map(|n| (n % count) as u64 + 1).collect::<Vec<_>>());
            let mut before = pairs(&span, &disks);
            prop_assert_eq!(is_under_spread(&span, &disks), before != (0, 0));
            while let Some(Step { need, to }) = step(&span, &disks, &BTreeSet::new()) {
                let to = to[(choices % to.len() as u64) as usize];
                choices = choices.rotate_left(7) ^ 0x9e37;
                span.blocks.as_mut().unwrap().blocks[need.copy[0] as usize].block_service = to.0;
                let now = pairs(&span, &disks);
                prop_assert!(now.0 <= before.0 && now.1 < before.1, "{before:?} {now:?}");
                before = now;
            }
            let holders: Vec<u64> = span.blocks.unwrap().blocks.iter().map(|block| block.block_service).collect();
            let in_domain = |name: &str| holders.iter().filter(|&&id| all[id as usize - 1].0 == name).count();
            let most = names.map(in_domain).into_iter().max().unwrap();
            for (id, (name, flags)) in (1u64..).zip(&all) {
                prop_assert!(*flags != 0 || holders.contains(&id) || in_domain(name) + 2 > most);
            }
        }
    }
}
