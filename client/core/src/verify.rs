//! Everything a span has, checked against everything that is known of it: cells, blocks, parity, the span.
//!
//! A read needs only as many cells as give the bytes; this looks at all of them, stripe by stripe, and goes on after what is
//! wrong. Memory: what the driver holds of one stripe.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;

use crate::code::Code;
use crate::crc::{Crc, join};
use crate::layout::Layout;
use crate::span::{Body, StoredBlock, StoredSpan};

/// Something that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wrong {
    /// Cells of the block do not have their CRCs; the first of them.
    Cell { block: usize, stripe: usize },
    /// The CRC of the block is not that of its bytes, though its cells are right.
    Block { block: usize },
    /// Every cell of the stripe has its CRC, and yet the parity (or the other copy) is not that of the data.
    Parity { stripe: usize, block: usize },
    /// Too few cells of the stripe are right: its bytes are lost.
    Lost { stripe: usize },
    /// The bytes do not have the CRC of the span.
    Span { found: u32 },
}

/// A span in blocks under examination.
#[derive(Debug)]
pub struct VerifySpan {
    span: Arc<StoredSpan>,
    layout: Layout,
    code: Option<Code>,
    next: usize,
    /// Of each block seen whole so far.
    blocks: Vec<Option<Crc>>,
    bad_cells: BTreeSet<usize>,
    /// Of the bytes, while none are lost.
    bytes: Option<Crc>,
    wrong: Vec<Wrong>,
}

impl VerifySpan {
    /// `None` for a span without blocks.
    pub fn new(span: Arc<StoredSpan>) -> Option<VerifySpan> {
        let Body::Blocks { layout, blocks } = &span.body else { return None };
        let layout = *layout;
        let coded = !layout.is_mirrored() && layout.parity() > 0;
        let code = if coded { Code::new(layout.data(), layout.parity()).ok() } else { None };
        let blocks = vec![Some(Crc::default()); blocks.len()];
        let (bad_cells, bytes, wrong) = (BTreeSet::new(), Some(Crc::default()), Vec::new());
        Some(VerifySpan { span, layout, code, next: 0, blocks, bad_cells, bytes, wrong })
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }

    fn stored(&self) -> &[StoredBlock] {
        match &self.span.body {
            Body::Blocks { blocks, .. } => blocks,
            _ => &[],
        }
    }

    /// The next stripe: a cell of every block, none where it could not be had.
    pub fn stripe(&mut self, cells: &[Option<Bytes>]) {
        let stripe = self.next;
        self.next += 1;
        if cells.len() != self.layout.blocks() || stripe >= self.layout.stripes() {
            self.bytes = None;
            return self.wrong.push(Wrong::Lost { stripe });
        }
        let mut right: Vec<Option<&Bytes>> = Vec::with_capacity(cells.len());
        for (block, cell) in cells.iter().enumerate() {
            let sum = cell.as_ref().map(|cell| Crc::of(cell));
            self.blocks[block] = self.blocks[block].zip(sum).map(|(before, sum)| before.then(sum));
            let is_right = sum.is_some_and(|sum| {
                sum.value == self.stored()[block].cell_crcs[stripe]
                    && sum.length == self.layout.cell_size() as u64
            });
            if cell.is_some() && !is_right && self.bad_cells.insert(block) {
                self.wrong.push(Wrong::Cell { block, stripe });
            }
            right.push(cell.as_ref().filter(|_| is_right));
        }
        let Some(data) = self.data_of(&right) else {
            self.bytes = None;
            return self.wrong.push(Wrong::Lost { stripe });
        };
        self.check_parity(stripe, &data, &right);
        let mut left = (self.span.size as usize).saturating_sub(stripe * self.layout.stripe_size());
        for cell in &data {
            let step = left.min(cell.len());
            left -= step;
            self.bytes = self.bytes.map(|bytes| bytes.then(Crc::of(&cell[..step])));
        }
    }

    /// The data cells of a stripe, those that are missing computed.
    fn data_of(&self, right: &[Option<&Bytes>]) -> Option<Vec<Bytes>> {
        if self.layout.is_mirrored() {
            return right.iter().flatten().next().map(|cell| vec![(*cell).clone()]);
        }
        let data = self.layout.data();
        let missing: Vec<usize> = (0..data).filter(|&n| right[n].is_none()).collect();
        let mut cells: Vec<Bytes> =
            right[..data].iter().map(|cell| cell.cloned().unwrap_or_default()).collect();
        if missing.is_empty() {
            return Some(cells);
        }
        let there = right.iter().enumerate().filter_map(|(n, cell)| Some((n, &cell.as_ref()?[..])));
        let there: Vec<(usize, &[u8])> = there.take(data).collect();
        let rebuilt = self.code.as_ref()?.rebuild(&there, &missing).ok()?;
        for (n, cell) in missing.into_iter().zip(rebuilt) {
            cells[n] = Bytes::from(cell);
        }
        Some(cells)
    }

    fn check_parity(&mut self, stripe: usize, data: &[Bytes], right: &[Option<&Bytes>]) {
        let first = if self.layout.is_mirrored() { 1 } else { self.layout.data() };
        let expected: Vec<Bytes> = match &self.code {
            None => right[first..].iter().map(|_| data[0].clone()).collect(),
            Some(code) => {
                let mut parity = vec![vec![0; self.layout.cell_size()]; self.layout.parity()];
                let cells: Vec<&[u8]> = data.iter().map(|cell| &cell[..]).collect();
                let mut slices: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
                if code.encode(&cells, &mut slices).is_err() {
                    return;
                }
                parity.into_iter().map(Bytes::from).collect()
            }
        };
        for (n, expected) in expected.iter().enumerate() {
            if right[first + n].is_some_and(|cell| cell != expected) {
                self.wrong.push(Wrong::Parity { stripe, block: first + n });
            }
        }
    }

    /// After the last stripe: all that is wrong.
    pub fn end(mut self) -> Vec<Wrong> {
        for stripe in self.next..self.layout.stripes() {
            self.bytes = None;
            self.wrong.push(Wrong::Lost { stripe });
        }
        for block in 0..self.blocks.len() {
            let stored = &self.stored()[block];
            let cells =
                join(stored.cell_crcs.iter().map(|&crc| Crc::new(crc, self.layout.cell_size() as u64)));
            let seen = self.blocks[block].is_none_or(|sum| sum.value == stored.crc);
            if cells.value != stored.crc || (!seen && !self.bad_cells.contains(&block)) {
                self.wrong.push(Wrong::Block { block });
            }
        }
        if let Some(found) = self.bytes.filter(|found| found.value != self.span.crc) {
            self.wrong.push(Wrong::Span { found: found.value });
        }
        self.wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encode::encode;
    use bytes::BytesMut;
    use eggs_proto::{BlockId, BlockServiceId};

    /// A span of (data, parity) blocks, and the stripes of its cells.
    fn span(size: u32, data: u32, parity: u32) -> (StoredSpan, Vec<Vec<Option<Bytes>>>) {
        let plain: Vec<u8> = (0..size).map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
        let layout = Layout::choose(size, data, parity, 4096).unwrap();
        let encoded = encode(BytesMut::from(&plain[..]), layout, &mut Vec::new()).unwrap();
        let stored = encoded.new_blocks(3, vec![]).blocks.into_iter().enumerate();
        let stored = stored.map(|(n, block)| StoredBlock {
            service: BlockServiceId(n as u64 + 1),
            block: BlockId(n as u64),
            crc: block.crc,
            cell_crcs: block.cell_crcs,
        });
        let body = Body::Blocks { layout, blocks: stored.collect() };
        let blocks: Vec<Bytes> = (0..layout.blocks()).map(|n| encoded.slices(n).concat().into()).collect();
        let cell = layout.cell_size();
        let stripe =
            |n: usize| blocks.iter().map(|block| Some(block.slice(n * cell..(n + 1) * cell))).collect();
        let cells = (0..layout.stripes()).map(stripe).collect();
        (StoredSpan { offset: 0, size, crc: encoded.crc, storage_class: 3, body }, cells)
    }

    fn verify(span: &StoredSpan, stripes: &[Vec<Option<Bytes>>]) -> Vec<Wrong> {
        let mut verify = VerifySpan::new(Arc::new(span.clone())).unwrap();
        stripes.iter().for_each(|cells| verify.stripe(cells));
        verify.end()
    }

    fn flipped(cell: &Option<Bytes>) -> Bytes {
        let mut bytes = cell.as_ref().unwrap().to_vec();
        bytes[7] ^= 1;
        bytes.into()
    }

    #[test]
    fn what_is_right_is_right() {
        for (size, data, parity) in [(100_000, 4, 2), (5000, 1, 2), (70_000, 3, 0), (4096, 1, 0)] {
            let (span, stripes) = span(size, data, parity);
            assert_eq!(verify(&span, &stripes), [], "({data},{parity})");
        }
    }

    #[test]
    fn each_fault_is_found() {
        let (span, good) = span(100_000, 4, 2);
        let mut stripes = good.clone();
        stripes[1][4] = Some(flipped(&good[1][4]));
        assert_eq!(verify(&span, &stripes), [Wrong::Cell { block: 4, stripe: 1 }], "a bit of parity");
        let mut stripes = good.clone();
        stripes.iter_mut().for_each(|cells| cells[0..2].fill(None));
        assert_eq!(verify(&span, &stripes), [], "what is missing is the driver's to tell");
        stripes[2][5] = None;
        assert_eq!(verify(&span, &stripes), [Wrong::Lost { stripe: 2 }]);
        let wrong_span = StoredSpan { crc: 1, ..span.clone() };
        assert_eq!(verify(&wrong_span, &good), [Wrong::Span { found: span.crc }]);
        assert!(verify(&span, &good[1..]).contains(&Wrong::Lost { stripe: good.len() - 1 }));
    }

    #[test]
    fn parity_that_is_not_of_the_data_is_found_though_its_crc_is_right() {
        for (data, parity, block) in [(4, 2, 5), (1, 2, 2)] {
            let (mut span, mut stripes) = span(8000, data, parity);
            let bad = flipped(&stripes[0][block]);
            let Body::Blocks { blocks, .. } = &mut span.body else { panic!() };
            blocks[block].cell_crcs[0] = crc32fast::hash(&bad);
            blocks[block].crc =
                join(blocks[block].cell_crcs.iter().map(|&crc| Crc::new(crc, bad.len() as u64))).value;
            stripes[0][block] = Some(bad);
            assert_eq!(verify(&span, &stripes), [Wrong::Parity { stripe: 0, block }]);
        }
    }

    #[test]
    fn a_block_whose_crc_is_not_that_of_its_cells_is_found() {
        let (mut span, stripes) = span(100_000, 4, 2);
        let Body::Blocks { blocks, .. } = &mut span.body else { panic!() };
        blocks[3].crc ^= 1;
        assert_eq!(verify(&span, &stripes), [Wrong::Block { block: 3 }]);
    }
}
