//! How many blocks every span can still lose: faults destroy no more than the code bears.
//!
//! Seen from outside: the rows of every shard's leader, when they are all that is committed, and what is on the disks. Of
//! a span whose blocks are being replaced the old block and its copy both count, whichever is worse: which of them is the
//! span's is decided while nobody looks.

use std::collections::BTreeMap;

use eggs_proto::{BlockId, InodeId, pb};
use eggs_shard_core::schema::Key;
use prost::Message;

use crate::nodes::blocks::Disk;
use crate::nodes::shards::group_of;
use crate::world::{Node, World};

/// A block service and a block.
type Place = (u64, u64);

/// What every span can bear.
#[derive(Debug, Default)]
pub(crate) struct Redundancy {
    spans: Vec<SpanNow>,
    /// Where a block is in which span.
    of_block: BTreeMap<Place, Vec<(usize, usize)>>,
}

#[derive(Debug)]
struct SpanNow {
    /// Blocks it can lose; below zero: a copy that is bad counts for a block that is well, which must stay so.
    left: isize,
    /// By index.
    bad: Vec<bool>,
}

impl Redundancy {
    /// `None`: what is committed, or what is on a disk, is not known now.
    pub fn of(world: &World) -> Option<Redundancy> {
        let is_down = |(node, up): (&Node, &bool)| matches!(node, Node::Blocks(_)) && !up;
        if world.nodes.iter().zip(&world.up).any(is_down) {
            return None;
        }
        let disks: BTreeMap<u64, &Disk> = world
            .nodes
            .iter()
            .filter_map(|node| if let Node::Blocks(host) = node { Some(&host.disks) } else { None })
            .flatten()
            .map(|disk| (disk.identity.service.0, disk))
            .collect();
        let mut redundancy = Redundancy::default();
        for shard in world.shards() {
            let group = group_of(shard);
            let (id, status) = world.leading(group)?;
            if status.applied_index < world.kernel.oracle.committed(group) {
                return None;
            }
            let Node::Shards(host) = &world.nodes[id.0] else { return None };
            redundancy.add_shard(&disks, host.replica.rows(group));
        }
        Some(redundancy)
    }

    fn add_shard(&mut self, disks: &BTreeMap<u64, &Disk>, rows: Vec<eggs_machine::Row>) {
        let is_right = |block: &pb::Block| {
            disks.get(&block.block_service).is_some_and(|disk| disk.has(BlockId(block.block), block.crc))
        };
        // What is not written yet is not lost.
        let may_come = |block: &pb::Block| {
            let disk = disks.get(&block.block_service).filter(|disk| !disk.lost);
            let to_come = |disk: &Disk| {
                let block = BlockId(block.block);
                // What was written and is damaged may be found to be none when its disk starts again.
                !disk.holds(block) && !disk.damaged.contains(&block)
            };
            disk.is_some_and(|disk| to_come(disk) || is_right(block))
        };
        let mut edens = BTreeMap::new();
        let mut spans = BTreeMap::new();
        for (key, value) in rows {
            match Key::parse(&key) {
                Some(Key::Eden(file)) => edens.extend(pb::EdenRow::decode(value).ok().map(|row| (file, row))),
                Some(Key::Span(file, _)) => {
                    let span = pb::Span::decode(value).ok();
                    spans.extend(span.map(|span| ((file, span.offset), span)));
                }
                _ => {}
            }
        }
        let expired = |file: &InodeId| edens.get(file).is_some_and(|row: &pb::EdenRow| row.expired);
        let mut at = BTreeMap::new();
        for ((file, offset), span) in &spans {
            let Some(blocks) = span.blocks.as_ref().filter(|_| !expired(file)) else { continue };
            at.insert((*file, *offset), self.spans.len());
            self.add_span(blocks, is_right);
        }
        for row in edens.values().filter(|row| !row.expired) {
            let Some(blocks) = row.pending.as_ref().and_then(|span| span.blocks.as_ref()) else { continue };
            let Some(replacement) = &row.replacement else {
                self.add_span(blocks, may_come);
                continue;
            };
            let Some(&span) = at.get(&(InodeId(replacement.file), replacement.offset)) else { continue };
            for (copy, &index) in blocks.blocks.iter().zip(&replacement.indexes) {
                self.add_block(span, index as usize, copy, may_come(copy));
            }
        }
    }

    fn add_span(&mut self, blocks: &pb::Blocks, is_right: impl Fn(&pb::Block) -> bool) {
        let span = self.spans.len();
        let bad = vec![false; blocks.blocks.len()];
        self.spans.push(SpanNow { left: blocks.parity as isize, bad });
        for (index, block) in blocks.blocks.iter().enumerate() {
            self.add_block(span, index, block, is_right(block));
        }
    }

    fn add_block(&mut self, span: usize, index: usize, block: &pb::Block, is_right: bool) {
        self.of_block.entry((block.block_service, block.block)).or_default().push((span, index));
        if !is_right {
            self.spoil(span, index);
        }
    }

    fn spoil(&mut self, span: usize, index: usize) {
        let span = &mut self.spans[span];
        if let Some(bad) = span.bad.get_mut(index)
            && !std::mem::replace(bad, true)
        {
            span.left -= 1;
        }
    }

    /// Whether these blocks may go at once; then they are counted as gone.
    fn take(&mut self, at: Vec<(usize, usize)>) -> bool {
        let mut needed: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (span, index) in at {
            let indexes = needed.entry(span).or_default();
            if !self.spans[span].bad.get(index).copied().unwrap_or(true) && !indexes.contains(&index) {
                indexes.push(index);
            }
        }
        if needed.iter().any(|(&span, indexes)| indexes.len() as isize > self.spans[span].left) {
            return false;
        }
        for (span, indexes) in needed {
            indexes.into_iter().for_each(|index| self.spoil(span, index));
        }
        true
    }

    /// Blocks of spans that are, or may soon be, on a disk.
    pub fn blocks_on(&self, service: u64) -> impl Iterator<Item = BlockId> {
        self.of_block.range((service, 0)..=(service, u64::MAX)).map(|(&(_, block), _)| BlockId(block))
    }

    /// Whether every span bears the loss of a block.
    pub fn take_block(&mut self, service: u64, block: BlockId) -> bool {
        let at = self.of_block.get(&(service, block.0)).cloned().unwrap_or_default();
        self.take(at)
    }

    /// Whether every span bears the loss of all that is, or may soon be, on a disk.
    pub fn take_disk(&mut self, service: u64) -> bool {
        let blocks = self.of_block.range((service, 0)..=(service, u64::MAX));
        let at = blocks.flat_map(|(_, at)| at).copied().collect();
        self.take(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(service: u64) -> pb::Block {
        pb::Block { block_service: service, block: service + 100, ..pb::Block::default() }
    }

    #[test]
    fn no_more_goes_than_the_parity_bears() {
        let mut redundancy = Redundancy::default();
        let span = |from: u64| pb::Blocks {
            data: 2,
            parity: 1,
            blocks: (from..from + 3).map(block).collect(),
            ..pb::Blocks::default()
        };
        redundancy.add_span(&span(1), |_| true);
        redundancy.add_span(&span(2), |block| block.block_service != 4);
        // A copy of the first block of the first span is on its way to disk 9.
        redundancy.add_block(0, 0, &block(9), true);
        assert!(!redundancy.take_disk(2), "the second span has lost its parity");
        assert!(redundancy.take_disk(4), "what is on it is lost already");
        assert!(redundancy.take_block(9, BlockId(109)));
        assert!(redundancy.take_disk(1), "it is the same block");
        assert!(!redundancy.take_disk(3));
        assert!(redundancy.take_disk(77), "nothing is on it");
        // A block that is well, and whose copy is lost: it may be the last that is left of what the parity bears.
        let mut redundancy = Redundancy::default();
        redundancy.add_span(&span(1), |block| block.block_service != 2);
        redundancy.add_block(0, 0, &block(9), false);
        assert!(!redundancy.take_block(1, BlockId(101)));
        assert!(!redundancy.take_disk(1));
    }
}
