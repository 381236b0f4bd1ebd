//! Writing the blocks of one span: all at once, a failing one placed anew (CL-4, CL-5).
//!
//! The driver asks [`WriteSpan::poll`] what to do until it says nothing, does it, and tells what came of it.

use std::collections::{BTreeSet, VecDeque};

use bytes::Bytes;
use eggs_proto::{BlockId, BlockServiceId, pb};

/// How often blocks of one span are placed anew before it is given up.
pub const REPLACE_ROUNDS_MAX: u32 = 8;
/// Longest certificate or proof believed.
const MAC_BYTES_MAX: usize = 64;

/// A block to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteBlock {
    pub index: usize,
    /// Counts the placements of this block; to be given back with the outcome.
    pub attempt: u32,
    pub service: BlockServiceId,
    pub block: BlockId,
    pub size: u32,
    pub crc: u32,
    pub certificate: Bytes,
}

impl WriteBlock {
    /// A block where the shard has placed it.
    pub fn placed(placed: &pb::PlacedBlock, attempt: u32) -> WriteBlock {
        WriteBlock {
            index: placed.index as usize,
            attempt,
            service: BlockServiceId(placed.block_service),
            block: BlockId(placed.block),
            size: placed.size,
            crc: placed.crc,
            certificate: placed.certificate.clone(),
        }
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteStep {
    Write(WriteBlock),
    /// Ask the shard to place these blocks elsewhere; answer with [`WriteSpan::replaced`].
    Replace {
        indexes: Vec<u32>,
        avoid: Vec<u64>,
    },
    /// Every block is durable: one proof for each, in order.
    Ready(Vec<Bytes>),
    /// Given up.
    Failed(String),
}

/// The shard's answer does not fit what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("placement of blocks: {0}")]
pub struct PlacementError(pub String);

#[derive(Debug)]
enum Slot {
    /// Waiting to be placed.
    Unplaced,
    Writing(BlockServiceId),
    Written(Bytes),
}

/// The blocks of one span on their way to the disks.
#[derive(Debug)]
pub struct WriteSpan {
    size: u32,
    crcs: Vec<u32>,
    slots: Vec<(Slot, u32)>,
    avoid: BTreeSet<u64>,
    rounds: u32,
    replacing: Vec<u32>,
    reasons: Vec<String>,
    steps: VecDeque<WriteStep>,
    over: bool,
}

impl WriteSpan {
    /// `blocks` as the shard was asked to place them, `placed` its answer.
    pub fn new(blocks: &pb::NewBlocks, placed: &[pb::PlacedBlock]) -> Result<WriteSpan, PlacementError> {
        let size = blocks
            .stripes
            .checked_mul(blocks.cell_size)
            .ok_or_else(|| PlacementError("blocks too large".to_owned()))?;
        let mut span = WriteSpan {
            size,
            crcs: blocks.blocks.iter().map(|block| block.crc).collect(),
            slots: blocks.blocks.iter().map(|_| (Slot::Unplaced, 0)).collect(),
            avoid: blocks.avoid.iter().copied().collect(),
            rounds: 0,
            replacing: (0..blocks.blocks.len() as u32).collect(),
            reasons: Vec::new(),
            steps: VecDeque::new(),
            over: false,
        };
        span.place(placed)?;
        Ok(span)
    }

    /// The next thing to do, if there is one now.
    pub fn poll(&mut self) -> Option<WriteStep> {
        self.steps.pop_front()
    }

    /// Services that could not be written to; worth avoiding in the next span too.
    pub fn avoid(&self) -> impl Iterator<Item = BlockServiceId> {
        self.avoid.iter().map(|&id| BlockServiceId(id))
    }

    /// The block service says it is durable.
    pub fn written(&mut self, index: usize, attempt: u32, proof: Bytes) {
        if proof.is_empty() || proof.len() > MAC_BYTES_MAX {
            return self.failed(index, attempt, "the proof is not one".to_owned());
        }
        if self.current(index, attempt).is_none() {
            return;
        }
        self.slots[index].0 = Slot::Written(proof);
        self.advance();
    }

    /// The block could not be written there.
    pub fn failed(&mut self, index: usize, attempt: u32, why: String) {
        let Some(service) = self.current(index, attempt) else { return };
        self.slots[index].0 = Slot::Unplaced;
        self.avoid.insert(service.0);
        self.reasons.push(format!("block {index} on {service}: {why}"));
        self.advance();
    }

    /// The shard's answer to [`WriteStep::Replace`].
    pub fn replaced(&mut self, placed: &[pb::PlacedBlock]) -> Result<(), PlacementError> {
        self.place(placed)?;
        self.advance();
        Ok(())
    }

    /// Late word of a placement that is no more is nothing to act on.
    fn current(&self, index: usize, attempt: u32) -> Option<BlockServiceId> {
        match self.slots.get(index) {
            Some((Slot::Writing(service), current)) if *current == attempt && !self.over => Some(*service),
            _ => None,
        }
    }

    fn place(&mut self, placed: &[pb::PlacedBlock]) -> Result<(), PlacementError> {
        let mut asked: BTreeSet<u32> = self.replacing.iter().copied().collect();
        for block in placed {
            let wrong = |what: &str| PlacementError(format!("block {}: {what}", block.index));
            if !asked.remove(&block.index) {
                return Err(wrong("not asked for, or twice"));
            }
            if block.size != self.size || Some(&block.crc) != self.crcs.get(block.index as usize) {
                return Err(wrong("another size or CRC"));
            }
            if block.block_service == 0 || block.certificate.len() > MAC_BYTES_MAX {
                return Err(wrong("no service or certificate"));
            }
        }
        if let Some(index) = asked.first() {
            return Err(PlacementError(format!("block {index}: not placed")));
        }
        self.replacing.clear();
        for block in placed {
            let (slot, attempt) = &mut self.slots[block.index as usize];
            *slot = Slot::Writing(BlockServiceId(block.block_service));
            *attempt += 1;
            let block = WriteBlock { size: self.size, ..WriteBlock::placed(block, *attempt) };
            self.steps.push_back(WriteStep::Write(block));
        }
        Ok(())
    }

    fn advance(&mut self) {
        if self.over || !self.replacing.is_empty() {
            return;
        }
        let unplaced =
            |(n, (slot, _)): (usize, &(Slot, u32))| matches!(slot, Slot::Unplaced).then_some(n as u32);
        let indexes: Vec<u32> = self.slots.iter().enumerate().filter_map(unplaced).collect();
        if !indexes.is_empty() {
            self.rounds += 1;
            if self.rounds > REPLACE_ROUNDS_MAX {
                self.over = true;
                return self.steps.push_back(WriteStep::Failed(self.reasons.join("; ")));
            }
            self.replacing.clone_from(&indexes);
            let avoid = self.avoid.iter().copied().collect();
            return self.steps.push_back(WriteStep::Replace { indexes, avoid });
        }
        let proof = |(slot, _): &(Slot, u32)| match slot {
            Slot::Written(proof) => Some(proof.clone()),
            _ => None,
        };
        if let Some(proofs) = self.slots.iter().map(proof).collect() {
            self.over = true;
            self.steps.push_back(WriteStep::Ready(proofs));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn new_blocks(count: u32) -> pb::NewBlocks {
        let blocks = (0..count).map(|n| pb::NewBlock { crc: n, cell_crcs: vec![n] }).collect();
        pb::NewBlocks { data: count, stripes: 1, cell_size: 4096, blocks, ..pb::NewBlocks::default() }
    }

    fn placed(index: u32, service: u64) -> pb::PlacedBlock {
        let certificate = Bytes::from_static(b"certificate");
        pb::PlacedBlock { index, block_service: service, block: service, certificate, size: 4096, crc: index }
    }

    fn steps(span: &mut WriteSpan) -> Vec<WriteStep> {
        std::iter::from_fn(|| span.poll()).collect()
    }

    #[test]
    fn placements_that_do_not_fit_are_refused() {
        let blocks = new_blocks(2);
        let new = |placed: &[pb::PlacedBlock]| WriteSpan::new(&blocks, placed).map(|_| ());
        assert!(new(&[placed(0, 1), placed(1, 2)]).is_ok());
        assert!(new(&[placed(0, 1)]).is_err());
        assert!(new(&[placed(0, 1), placed(0, 2)]).is_err());
        assert!(new(&[placed(0, 1), placed(2, 2)]).is_err());
        assert!(new(&[placed(0, 1), placed(1, 0)]).is_err());
        assert!(new(&[placed(0, 1), pb::PlacedBlock { size: 1, ..placed(1, 2) }]).is_err());
        assert!(new(&[placed(0, 1), pb::PlacedBlock { crc: 9, ..placed(1, 2) }]).is_err());
    }

    #[test]
    fn a_failing_service_is_replaced_and_its_late_word_ignored() {
        let mut span = WriteSpan::new(&new_blocks(2), &[placed(0, 1), placed(1, 2)]).unwrap();
        assert_eq!(steps(&mut span).len(), 2);
        span.failed(1, 1, "gone".to_owned());
        assert_eq!(steps(&mut span), [WriteStep::Replace { indexes: vec![1], avoid: vec![2] }]);
        span.written(0, 1, Bytes::from_static(b"p0"));
        span.replaced(&[placed(1, 3)]).unwrap();
        let [WriteStep::Write(write)] = &steps(&mut span)[..] else { panic!() };
        assert_eq!((write.index, write.attempt, write.service), (1, 2, BlockServiceId(3)));
        // CL-4: the proof of the placement before does not count.
        span.written(1, 1, Bytes::from_static(b"late"));
        assert_eq!(steps(&mut span), []);
        span.written(1, 2, Bytes::from_static(b"p1"));
        let proofs = vec![Bytes::from_static(b"p0"), Bytes::from_static(b"p1")];
        assert_eq!(steps(&mut span), [WriteStep::Ready(proofs)]);
    }

    proptest! {
        /// CL-4, CL-5: ends in Ready with the proofs of the last placements, or in Failed after enough rounds.
        #[test]
        fn random_failures(count in 1..14u32, failing in 0..90u64, seed in any::<u64>()) {
            let mut state = seed | 1;
            let mut random = || { state ^= state << 13; state ^= state >> 7; state ^= state << 17; state };
            let first: Vec<_> = (0..count).map(|n| placed(n, u64::from(n) + 1)).collect();
            let mut span = WriteSpan::new(&new_blocks(count), &first).unwrap();
            let mut last: Vec<u64> = vec![0; count as usize];
            let mut next_service = 1000;
            let mut todo: Vec<WriteStep> = Vec::new();
            let mut rounds = 0;
            let end = loop {
                todo.extend(steps(&mut span));
                prop_assert!(!todo.is_empty(), "stuck");
                match todo.swap_remove(random() as usize % todo.len()) {
                    WriteStep::Write(write) => {
                        last[write.index] = write.service.0;
                        if random() % 100 < failing {
                            span.failed(write.index, write.attempt, "failed".to_owned());
                        } else {
                            let proof = Bytes::from(write.service.0.to_string());
                            span.written(write.index, write.attempt, proof.clone());
                            if random() % 4 == 0 {
                                span.written(write.index, write.attempt, proof);
                            }
                        }
                    }
                    WriteStep::Replace { indexes, avoid } => {
                        rounds += 1;
                        prop_assert!(indexes.iter().all(|&n| avoid.contains(&last[n as usize])));
                        let placed: Vec<_> = indexes.iter().map(|&n| { next_service += 1; placed(n, next_service) }).collect();
                        span.replaced(&placed).unwrap();
                    }
                    end => break end,
                }
            };
            prop_assert!(rounds <= REPLACE_ROUNDS_MAX);
            match end {
                WriteStep::Ready(proofs) => {
                    let expected: Vec<Bytes> = last.iter().map(|service| Bytes::from(service.to_string())).collect();
                    prop_assert_eq!(proofs, expected);
                    prop_assert!(todo.is_empty());
                }
                WriteStep::Failed(why) => prop_assert!(rounds == REPLACE_ROUNDS_MAX && !why.is_empty()),
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
