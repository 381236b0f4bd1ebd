//! What a span may look like, and the CRCs that bind spans to files.

use crc32fast::Hasher;
use eggs_proto::limits::{
    BLOCK_BYTES_MAX, CELL_BYTES_MAX, CLASS_EMPTY, CLASS_INLINE, DATA_BLOCKS_MAX, INLINE_BYTES_MAX,
    PARITY_BLOCKS_MAX, SPAN_BYTES_MAX, STRIPES_MAX,
};
use eggs_proto::{ServiceError, ShardError, pb};

/// Largest file: offsets fit an `i64` of POSIX with a span to spare.
pub(crate) const FILE_BYTES_MAX: u64 = i64::MAX as u64 - SPAN_BYTES_MAX as u64;

/// Bytes of each block.
pub(crate) fn block_size(stripes: u32, cell_size: u32) -> u64 {
    u64::from(stripes) * u64::from(cell_size)
}

/// Refuses a span that a client may not write: sizes, counts, and CRCs where the bytes are known.
pub(crate) fn validate(span: &pb::NewSpan) -> Result<(), pb::Error> {
    let bad = |what: &dyn std::fmt::Display| Err(ShardError::BadSpan.with(what));
    if span.size == 0 || span.size > SPAN_BYTES_MAX {
        return bad(&format_args!("span of {} bytes", span.size));
    }
    if span.offset > FILE_BYTES_MAX {
        return Err(ShardError::TooLarge.with(format_args!("span at {}", span.offset)));
    }
    match &span.body {
        None => Err(ShardError::Malformed.with("a span without a body")),
        Some(pb::new_span::Body::Zeros(_)) if span.crc != crc_of_zeros(span.size) => {
            bad(&"CRC of the span's zeros")
        }
        Some(pb::new_span::Body::Zeros(_)) => Ok(()),
        Some(pb::new_span::Body::Inline(bytes)) => {
            if span.size > INLINE_BYTES_MAX || bytes.len() != span.size as usize {
                return bad(&format_args!("inline span of {} bytes with {} bytes", span.size, bytes.len()));
            }
            if crc32fast::hash(bytes) != span.crc {
                return bad(&"CRC of the span's inline bytes");
            }
            Ok(())
        }
        Some(pb::new_span::Body::Blocks(blocks)) => validate_blocks(span, blocks),
    }
}

fn validate_blocks(span: &pb::NewSpan, blocks: &pb::NewBlocks) -> Result<(), pb::Error> {
    let bad = |what: std::fmt::Arguments<'_>| Err(ShardError::BadSpan.with(what));
    let &pb::NewBlocks { storage_class, data, parity, stripes, cell_size, .. } = blocks;
    if !(2..=255).contains(&storage_class) {
        return bad(format_args!("storage class {storage_class}"));
    }
    if let Err(what) = shape(data, parity, stripes, cell_size, span.size) {
        return bad(format_args!("{what}"));
    }
    if blocks.blocks.len() != (data + parity) as usize {
        return bad(format_args!("{} blocks for ({data}, {parity})", blocks.blocks.len()));
    }
    if blocks.blocks.iter().any(|block| block.cell_crcs.len() != stripes as usize) {
        return bad(format_args!("CRCs of cells: not one for each of {stripes} stripes"));
    }
    if data == 1 && blocks.blocks.iter().any(|block| block.crc != blocks.blocks[0].crc) {
        return bad(format_args!("mirrored blocks with different CRCs"));
    }
    Ok(())
}

/// The counts of a span in blocks: within limits, and no stripe more than it needs.
pub(crate) fn shape(
    data: u32,
    parity: u32,
    stripes: u32,
    cell_size: u32,
    size: u32,
) -> Result<(), &'static str> {
    if !(1..=DATA_BLOCKS_MAX).contains(&data) || parity > PARITY_BLOCKS_MAX {
        return Err("numbers of data and parity blocks");
    }
    if !(1..=STRIPES_MAX).contains(&stripes) || !(1..=CELL_BYTES_MAX).contains(&cell_size) {
        return Err("stripes and cell size");
    }
    if block_size(stripes, cell_size) > u64::from(BLOCK_BYTES_MAX) {
        return Err("block size");
    }
    let stripe = u64::from(data) * u64::from(cell_size);
    let size = u64::from(size);
    if stripe * u64::from(stripes) < size || stripe * (u64::from(stripes) - 1) >= size {
        return Err("stripes do not fit the span's size");
    }
    Ok(())
}

/// A span of a file as it is stored; blocks without ids and services yet.
pub(crate) fn stored(span: pb::NewSpan) -> pb::Span {
    let pb::NewSpan { offset, size, crc, body } = span;
    let mut stored = pb::Span { offset, size, crc, ..Default::default() };
    match body {
        None | Some(pb::new_span::Body::Zeros(_)) => stored.storage_class = u32::from(CLASS_EMPTY),
        Some(pb::new_span::Body::Inline(bytes)) => {
            stored.storage_class = u32::from(CLASS_INLINE);
            stored.inline = bytes;
        }
        Some(pb::new_span::Body::Blocks(new)) => {
            stored.storage_class = new.storage_class;
            let block = |new: pb::NewBlock| pb::Block {
                crc: new.crc,
                cell_crcs: new.cell_crcs,
                ..Default::default()
            };
            stored.blocks = Some(pb::Blocks {
                data: new.data,
                parity: new.parity,
                stripes: new.stripes,
                cell_size: new.cell_size,
                blocks: new.blocks.into_iter().map(block).collect(),
            });
        }
    }
    stored
}

/// The span of a file that lives in one piece of metadata.
pub(crate) fn inline(bytes: bytes::Bytes, crc: u32) -> pb::Span {
    pb::Span {
        offset: 0,
        size: bytes.len() as u32,
        crc,
        storage_class: u32::from(CLASS_INLINE),
        inline: bytes,
        blocks: None,
    }
}

/// CRC-32 of `a` followed by `b`, which has `b_size` bytes.
pub(crate) fn combine(a: u32, b: u32, b_size: u64) -> u32 {
    let mut hasher = Hasher::new_with_initial(a);
    hasher.combine(&Hasher::new_with_initial_len(b, b_size));
    hasher.finalize()
}

/// CRC-32 of `size` zero bytes, by doubling.
pub(crate) fn crc_of_zeros(size: u32) -> u32 {
    let (mut crc, mut power_crc, mut power) = (0, crc32fast::hash(&[0]), 1u64);
    while power <= u64::from(size) {
        if u64::from(size) & power != 0 {
            crc = combine(crc, power_crc, power);
        }
        power_crc = combine(power_crc, power_crc, power);
        power *= 2;
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crcs_of_zeros() {
        for size in [1, 2, 3, 7, 4096, 100_000] {
            assert_eq!(crc_of_zeros(size), crc32fast::hash(&vec![0; size as usize]), "{size}");
        }
        assert_eq!(crc_of_zeros(0), 0);
    }

    #[test]
    fn combined_crcs() {
        let (a, b) = (&b"hello, "[..], &b"world"[..]);
        let whole = crc32fast::hash(b"hello, world");
        assert_eq!(combine(crc32fast::hash(a), crc32fast::hash(b), b.len() as u64), whole);
        assert_eq!(combine(0, crc32fast::hash(a), a.len() as u64), crc32fast::hash(a));
    }

    #[test]
    fn shapes() {
        assert_eq!(shape(4, 2, 64, 256 << 10, 64 << 20), Ok(()));
        assert_eq!(shape(1, 2, 1, 5000, 5000), Ok(()));
        assert_eq!(shape(1, 0, 1, 4096, 1), Ok(()));
        for (data, parity, stripes, cell_size, size) in [
            (0, 2, 1, 4096, 1),
            (17, 2, 1, 4096, 1),
            (4, 17, 1, 4096, 1),
            (4, 2, 0, 4096, 1),
            (4, 2, 257, 4096, 1),
            (4, 2, 1, 0, 1),
            (4, 2, 1, u32::MAX, 1),
            (4, 2, 256, CELL_BYTES_MAX, SPAN_BYTES_MAX),
            (4, 2, 1, 4096, 16385),
            (4, 2, 2, 4096, 16384),
        ] {
            assert!(shape(data, parity, stripes, cell_size, size).is_err(), "{data} {parity} {stripes}");
        }
    }
}
