//! Turns the bytes of a span into blocks: parity, and a CRC for each cell, block and the span, in one
//! pass over the data while it is in the cache.
//!
//! Data blocks are never put together in memory: they are sent as slices of the span's own buffer.

use bytes::{Bytes, BytesMut};
use eggs_proto::limits::DATA_MESSAGE_BYTES;
use eggs_proto::pb;

use crate::code::{Code, CodeError};
use crate::crc::{Crc, join};
use crate::layout::Layout;

/// A span ready to be placed and sent.
#[derive(Debug, Clone)]
pub struct Encoded {
    pub layout: Layout,
    /// Logical bytes.
    pub size: u32,
    /// Of the logical bytes.
    pub crc: u32,
    blocks: Vec<pb::NewBlock>,
    /// The span and its padding.
    data: Bytes,
    /// Whole parity blocks; none when mirrored.
    parity: Vec<Bytes>,
}

/// Encodes `span` (1 byte to the layout's capacity), whose buffer is padded in place. `spare` are buffers
/// to be used for the parity blocks when they are large enough.
pub fn encode(mut span: BytesMut, layout: Layout, spare: &mut Vec<BytesMut>) -> Result<Encoded, CodeError> {
    let size = span.len();
    if size == 0 || size > layout.capacity() {
        return Err(CodeError::Cells);
    }
    span.resize(layout.capacity(), 0);
    let data = span.freeze();
    let mirrored = layout.is_mirrored();
    let mut crcs = vec![Vec::with_capacity(layout.stripes()); layout.blocks()];
    let mut parity: Vec<BytesMut> = Vec::new();
    if !mirrored && layout.parity() > 0 {
        parity = (0..layout.parity()).map(|_| parity_buffer(spare, layout.block_size() as usize)).collect();
        let code = Code::new(layout.data(), layout.parity())?;
        for (stripe, bytes) in data.chunks_exact(layout.stripe_size()).enumerate() {
            encode_stripe(&code, bytes, &mut parity, layout, stripe, &mut crcs)?;
        }
    } else {
        for bytes in data.chunks_exact(layout.stripe_size()) {
            for (crcs, cell) in crcs.iter_mut().zip(bytes.chunks_exact(layout.cell_size())) {
                crcs.push(crc32fast::hash(cell));
            }
        }
        if mirrored {
            let first = crcs[0].clone();
            crcs.iter_mut().skip(1).for_each(|crcs| crcs.clone_from(&first));
        }
    }
    let crc = span_crc(&data, size, layout, &crcs);
    let cell = layout.cell_size() as u64;
    let blocks = crcs.into_iter().map(|cell_crcs| pb::NewBlock {
        crc: join(cell_crcs.iter().map(|&crc| Crc::new(crc, cell))).value,
        cell_crcs,
    });
    Ok(Encoded {
        layout,
        size: size as u32,
        crc,
        blocks: blocks.collect(),
        data,
        parity: parity.into_iter().map(BytesMut::freeze).collect(),
    })
}

fn parity_buffer(spare: &mut Vec<BytesMut>, size: usize) -> BytesMut {
    let mut buffer = spare.pop().unwrap_or_default();
    // What was there is overwritten by the encoder: only growth needs zeros.
    if buffer.capacity() < size {
        return BytesMut::zeroed(size);
    }
    buffer.resize(size, 0);
    buffer
}

fn encode_stripe(
    code: &Code,
    bytes: &[u8],
    parity: &mut [BytesMut],
    layout: Layout,
    stripe: usize,
    crcs: &mut [Vec<u32>],
) -> Result<(), CodeError> {
    let cell = layout.cell_size();
    let range = stripe * cell..(stripe + 1) * cell;
    let cells: Vec<&[u8]> = bytes.chunks_exact(cell).collect();
    let mut coded: Vec<&mut [u8]> = parity.iter_mut().map(|block| &mut block[range.clone()]).collect();
    code.encode(&cells, &mut coded)?;
    let all = cells.into_iter().chain(coded.iter().map(|cell| &**cell));
    for (crcs, cell) in crcs.iter_mut().zip(all) {
        crcs.push(crc32fast::hash(cell));
    }
    Ok(())
}

/// From the data cells' CRCs; only the cell in which the span ends is read again.
fn span_crc(data: &[u8], size: usize, layout: Layout, crcs: &[Vec<u32>]) -> u32 {
    let cell = layout.cell_size();
    let whole = size / cell;
    let cells = (0..whole).map(|n| Crc::new(crcs[n % layout.data()][n / layout.data()], cell as u64));
    join(cells).then(Crc::of(&data[whole * cell..size])).value
}

impl Encoded {
    /// What the shard is asked to place.
    pub fn new_blocks(&self, storage_class: u8, avoid: Vec<u64>) -> pb::NewBlocks {
        pb::NewBlocks {
            storage_class: u32::from(storage_class),
            data: self.layout.data() as u32,
            parity: self.layout.parity() as u32,
            stripes: self.layout.stripes() as u32,
            cell_size: self.layout.cell_size() as u32,
            blocks: self.blocks.clone(),
            avoid,
        }
    }

    /// The bytes of one block in order, as slices of at most [`DATA_MESSAGE_BYTES`]; nothing is copied.
    /// Empty for a block that is not there.
    pub fn slices(&self, block: usize) -> Vec<Bytes> {
        let whole = match block.checked_sub(self.layout.data()) {
            _ if block >= self.layout.blocks() => return Vec::new(),
            _ if self.layout.is_mirrored() => &self.data,
            Some(parity) => match self.parity.get(parity) {
                Some(block) => block,
                None => return Vec::new(),
            },
            None => return self.data_slices(block),
        };
        let starts = (0..whole.len()).step_by(DATA_MESSAGE_BYTES);
        starts.map(|at| whole.slice(at..whole.len().min(at + DATA_MESSAGE_BYTES))).collect()
    }

    fn data_slices(&self, block: usize) -> Vec<Bytes> {
        let cell = self.layout.cell_size();
        let cells = (0..self.layout.stripes()).map(|stripe| (stripe * self.layout.data() + block) * cell);
        let step = cell.min(DATA_MESSAGE_BYTES);
        cells
            .flat_map(|at| (at..at + cell).step_by(step).map(move |from| from..(from + step).min(at + cell)))
            .map(|range| self.data.slice(range))
            .collect()
    }

    /// The buffers, for the next span: the data's, the parity's. Those still in use elsewhere are left out.
    pub fn into_buffers(self) -> (Option<BytesMut>, Vec<BytesMut>) {
        let parity = self.parity.into_iter().filter_map(|block| block.try_into_mut().ok()).collect();
        (self.data.try_into_mut().ok(), parity)
    }
}

/// Whether there is nothing but zeros; looks no further than the first that is not.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(4096).all(|piece| piece.iter().fold(0, |any, byte| any | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(size: usize) -> Vec<u8> {
        (0..size as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    #[test]
    fn zeros_are_seen() {
        assert!(is_zero(&[]) && is_zero(&[0; 5000]));
        let mut bytes = vec![0; 5000];
        bytes[4999] = 1;
        assert!(!is_zero(&bytes));
    }

    #[test]
    fn golden_span() {
        let layout = Layout::choose(20_000, 2, 1, 4096).unwrap();
        let encoded = encode(BytesMut::from(&bytes(20_000)[..]), layout, &mut Vec::new()).unwrap();
        let blocks = encoded.new_blocks(3, vec![]);
        assert_eq!((blocks.data, blocks.parity, blocks.stripes, blocks.cell_size), (2, 1, 3, 4096));
        assert_eq!(encoded.crc, crc32fast::hash(&bytes(20_000)));
        let crcs: Vec<u32> = blocks.blocks.iter().map(|block| block.crc).collect();
        assert_eq!(crcs, GOLDEN);
    }
    const GOLDEN: [u32; 3] = [2_836_217_363, 3_336_478_347, 4_089_846_606];

    #[test]
    fn an_empty_or_too_long_span_is_refused() {
        let layout = Layout::choose(10, 4, 2, 4096).unwrap();
        assert!(encode(BytesMut::new(), layout, &mut Vec::new()).is_err());
        assert!(encode(BytesMut::zeroed(layout.capacity() + 1), layout, &mut Vec::new()).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn blocks_are_what_the_format_says(size in 1..200_000usize, data in 1..=6u32, parity in 0..=3u32,
                                           cell in 0..40_000u32, dirty in any::<bool>()) {
            let layout = Layout::choose(size as u32, data, parity, cell).unwrap();
            let plain = bytes(size);
            let mut spare = Vec::new();
            if dirty {
                spare.extend((0..2).map(|_| BytesMut::from(&vec![0xaa; layout.block_size() as usize][..])));
            }
            let encoded = encode(BytesMut::from(&plain[..]), layout, &mut spare).unwrap();
            let mut padded = plain.clone();
            padded.resize(layout.capacity(), 0);
            let new = encoded.new_blocks(3, vec![]);
            let mut all: Vec<Vec<u8>> = Vec::new();
            for (n, block) in new.blocks.iter().enumerate() {
                let slices = encoded.slices(n);
                prop_assert!(slices.iter().all(|slice| !slice.is_empty() && slice.len() <= DATA_MESSAGE_BYTES));
                let whole = slices.concat();
                prop_assert_eq!(whole.len(), layout.block_size() as usize);
                prop_assert_eq!(crc32fast::hash(&whole), block.crc);
                let crcs: Vec<u32> = whole.chunks(layout.cell_size()).map(crc32fast::hash).collect();
                prop_assert_eq!(&crcs, &block.cell_crcs);
                all.push(whole);
            }
            prop_assert!(encoded.slices(layout.blocks()).is_empty());
            prop_assert_eq!(encoded.crc, crc32fast::hash(&plain));
            for (n, cell) in padded.chunks(layout.cell_size()).enumerate() {
                let at = n / layout.data() * layout.cell_size();
                prop_assert_eq!(cell, &all[n % layout.data()][at..at + layout.cell_size()]);
            }
            if layout.is_mirrored() {
                prop_assert!(all.iter().all(|block| *block == all[0]));
            } else if parity > 0 {
                let codec = reed_solomon_erasure::galois_8::ReedSolomon::new(data as usize, parity as usize).unwrap();
                prop_assert!(codec.verify(&all).unwrap());
            }
            let (data_buffer, parity_buffers) = encoded.into_buffers();
            prop_assert!(data_buffer.is_some());
            prop_assert_eq!(parity_buffers.len(), if data > 1 { parity as usize } else { 0 });
        }
    }
}
