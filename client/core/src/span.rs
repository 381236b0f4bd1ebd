//! Spans as the metadata tells of them, checked before anything is done with them (CL-6, CL-7).

use bytes::Bytes;
use eggs_proto::limits::{CLASS_EMPTY, CLASS_INLINE, INLINE_BYTES_MAX, SPAN_BYTES_MAX};
use eggs_proto::{BlockId, BlockServiceId, pb};

use crate::layout::{Layout, LayoutError};

/// What is wrong with a span.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    #[error("span at {offset}: {size} bytes cannot be")]
    Size { offset: u64, size: u32 },
    #[error("span at {offset}: storage class {class} and what it holds do not agree")]
    Body { offset: u64, class: u32 },
    #[error("span at {offset}: {error}")]
    Layout { offset: u64, error: LayoutError },
    #[error("span at {offset}: {found} blocks or cell CRCs where {expected} are needed")]
    Count { offset: u64, found: usize, expected: usize },
    #[error("span at {found} where one at {expected} is needed")]
    Order { expected: u64, found: u64 },
    #[error("spans reach to {reached} in a file of {size} bytes")]
    End { reached: u64, size: u64 },
}

/// A span that was found sound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredSpan {
    pub offset: u64,
    pub size: u32,
    pub crc: u32,
    pub storage_class: u8,
    pub body: Body,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    Zeros,
    Inline(Bytes),
    Blocks { layout: Layout, blocks: Vec<StoredBlock> },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBlock {
    pub service: BlockServiceId,
    pub block: BlockId,
    pub crc: u32,
    pub cell_crcs: Vec<u32>,
}

impl StoredSpan {
    /// Checks one span from the wire.
    pub fn from_wire(span: pb::Span) -> Result<StoredSpan, SpanError> {
        let pb::Span { offset, size, crc, storage_class: class, inline, blocks } = span;
        let fits = offset.checked_add(u64::from(size)).is_some();
        if size == 0 || size > SPAN_BYTES_MAX || !fits {
            return Err(SpanError::Size { offset, size });
        }
        let wrong = SpanError::Body { offset, class };
        let storage_class = u8::try_from(class).map_err(|_| wrong.clone())?;
        let body = match (storage_class, blocks) {
            (CLASS_EMPTY, None) if inline.is_empty() => Body::Zeros,
            (CLASS_INLINE, None) if inline.len() == size as usize && size <= INLINE_BYTES_MAX => {
                Body::Inline(inline)
            }
            (CLASS_EMPTY | CLASS_INLINE, _) => return Err(wrong),
            (_, Some(blocks)) if inline.is_empty() => body_of(offset, size, blocks)?,
            _ => return Err(wrong),
        };
        Ok(StoredSpan { offset, size, crc, storage_class, body })
    }

    /// First byte after it.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.size)
    }
}

fn body_of(offset: u64, size: u32, blocks: pb::Blocks) -> Result<Body, SpanError> {
    let layout = Layout::new(blocks.data, blocks.parity, blocks.stripes, blocks.cell_size, size)
        .map_err(|error| SpanError::Layout { offset, error })?;
    let count = |found: usize, expected: usize| {
        if found == expected { Ok(()) } else { Err(SpanError::Count { offset, found, expected }) }
    };
    count(blocks.blocks.len(), layout.blocks())?;
    let stored = blocks.blocks.into_iter().map(|block| {
        count(block.cell_crcs.len(), layout.stripes())?;
        Ok(StoredBlock {
            service: BlockServiceId(block.block_service),
            block: BlockId(block.block),
            crc: block.crc,
            cell_crcs: block.cell_crcs,
        })
    });
    Ok(Body::Blocks { layout, blocks: stored.collect::<Result<_, _>>()? })
}

/// Checks a page of spans that must begin at `from` (or hold it, when `inside`) and go on without gap,
/// within `size`; `last` says that no page follows.
pub fn check_page(
    spans: Vec<pb::Span>,
    from: u64,
    inside: bool,
    size: u64,
    last: bool,
) -> Result<Vec<StoredSpan>, SpanError> {
    let mut checked: Vec<StoredSpan> = Vec::with_capacity(spans.len());
    for span in spans {
        let span = StoredSpan::from_wire(span)?;
        let follows = match checked.last() {
            Some(before) => before.end() == span.offset,
            None if inside => (span.offset..span.end()).contains(&from),
            None => span.offset == from,
        };
        if !follows {
            let expected = checked.last().map_or(from, StoredSpan::end);
            return Err(SpanError::Order { expected, found: span.offset });
        }
        checked.push(span);
    }
    let reached = checked.last().map_or(from, StoredSpan::end);
    if reached > size || (last && reached != size) {
        return Err(SpanError::End { reached, size });
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn zeros(offset: u64, size: u32) -> pb::Span {
        pb::Span { offset, size, ..pb::Span::default() }
    }

    fn in_blocks() -> pb::Span {
        let block = pb::Block { block_service: 1, block: 2, crc: 3, cell_crcs: vec![4, 5] };
        let blocks = pb::Blocks { data: 2, parity: 1, stripes: 2, cell_size: 4096, blocks: vec![block; 3] };
        pb::Span { size: 10_000, storage_class: 3, blocks: Some(blocks), ..pb::Span::default() }
    }

    #[test]
    fn sound_spans_are_taken() {
        assert!(StoredSpan::from_wire(in_blocks()).is_ok());
        assert_eq!(StoredSpan::from_wire(zeros(0, 1)).unwrap().body, Body::Zeros);
        let inline = Bytes::from_static(b"abc");
        let span = pb::Span { size: 3, storage_class: 1, inline: inline.clone(), ..pb::Span::default() };
        assert_eq!(StoredSpan::from_wire(span).unwrap().body, Body::Inline(inline));
    }

    #[test]
    fn unsound_spans_are_refused() {
        let with = |change: &dyn Fn(&mut pb::Span)| {
            let mut span = in_blocks();
            change(&mut span);
            StoredSpan::from_wire(span)
        };
        let blocks = |change: &dyn Fn(&mut pb::Blocks)| with(&|span| change(span.blocks.as_mut().unwrap()));
        assert!(with(&|span| span.size = 0).is_err());
        assert!(with(&|span| span.size = u32::MAX).is_err());
        assert!(with(&|span| span.offset = u64::MAX).is_err());
        assert!(with(&|span| span.storage_class = 256).is_err());
        assert!(with(&|span| span.storage_class = 1).is_err());
        assert!(with(&|span| span.blocks = None).is_err());
        assert!(with(&|span| span.inline = Bytes::from_static(b"x")).is_err());
        assert!(blocks(&|blocks| blocks.cell_size = u32::MAX).is_err());
        assert!(blocks(&|blocks| blocks.stripes = 3).is_err());
        assert!(blocks(&|blocks| blocks.blocks.truncate(2)).is_err());
        assert!(blocks(&|blocks| blocks.blocks[1].cell_crcs.clear()).is_err());
    }

    #[test]
    fn pages_go_on_without_gap() {
        let page = |spans: &[(u64, u32)], from, inside, size, last| {
            let spans = spans.iter().map(|&(offset, size)| zeros(offset, size)).collect();
            check_page(spans, from, inside, size, last)
        };
        assert!(page(&[(0, 10), (10, 5)], 0, false, 15, true).is_ok());
        assert!(page(&[(0, 10), (10, 5)], 7, true, 15, true).is_ok());
        assert!(page(&[(0, 10)], 0, false, 15, false).is_ok());
        assert!(page(&[], 0, false, 0, true).is_ok());
        assert!(page(&[(0, 10)], 0, false, 15, true).is_err());
        assert!(page(&[(0, 10), (9, 6)], 0, false, 15, true).is_err());
        assert!(page(&[(0, 10), (11, 4)], 0, false, 15, true).is_err());
        assert!(page(&[(0, 10), (10, 6)], 0, false, 15, false).is_err());
        assert!(page(&[(5, 10)], 0, false, 15, true).is_err());
        assert!(page(&[(0, 5)], 7, true, 5, true).is_err());
    }

    proptest! {
        /// CL-6: whatever the numbers, an answer and no panic.
        #[test]
        fn hostile_spans_never_panic(
            offset in any::<u64>(), size in any::<u32>(), class in prop_oneof![0..4u32, any::<u32>()],
            data in prop_oneof![0..20u32, any::<u32>()], parity in prop_oneof![0..20u32, any::<u32>()],
            stripes in prop_oneof![0..300u32, any::<u32>()], cell_size in any::<u32>(),
            count in 0..40usize, crcs in 0..300usize,
        ) {
            let block = pb::Block { cell_crcs: vec![0; crcs], ..pb::Block::default() };
            let blocks = pb::Blocks { data, parity, stripes, cell_size, blocks: vec![block; count] };
            let span = pb::Span { offset, size, storage_class: class, blocks: Some(blocks), ..pb::Span::default() };
            let _ = check_page(vec![span], 0, true, size.into(), true);
        }
    }
}
