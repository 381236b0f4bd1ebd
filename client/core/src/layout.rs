//! How a span is cut: which rule of the policies, how many stripes, how long the cells.

use eggs_proto::limits::{
    BLOCK_BYTES_MAX, CELL_BYTES_MAX, CELL_BYTES_MIN, DATA_BLOCKS_MAX, INLINE_BYTES_MAX, PARITY_BLOCKS_MAX,
    SPAN_BYTES_MAX, STRIPES_MAX,
};
use eggs_proto::pb::{BlockRule, Policies, SpanRule};
use eggs_proto::policy;

/// Cells are multiples of this: a page of the disk and of memory.
pub const CELL_STEP: u32 = CELL_BYTES_MIN;

/// Most bytes a span's data blocks hold together, padding included.
pub const CAPACITY_MAX: u64 = 128 << 20;

const _: () = {
    // The longest span with the most padding (CL-8) fits.
    assert!(
        SPAN_BYTES_MAX as u64 + (STRIPES_MAX * DATA_BLOCKS_MAX) as u64 * CELL_STEP as u64 <= CAPACITY_MAX
    );
    assert!(CAPACITY_MAX <= BLOCK_BYTES_MAX as u64);
    assert!(CELL_BYTES_MAX.is_multiple_of(CELL_STEP));
};

/// Why a layout cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("({data}, {parity}) blocks are not possible")]
    Blocks { data: u32, parity: u32 },
    #[error("{stripes} stripes of cells of {cell_size} bytes are not possible")]
    Cells { stripes: u32, cell_size: u32 },
    #[error("blocks of {capacity} bytes together cannot hold a span of {size}")]
    Capacity { capacity: u64, size: u32 },
    #[error("policies: {0}")]
    Policies(String),
}

/// Geometry of a span in blocks: `stripes` stripes of `data` cells of `cell_size` bytes, and `parity` cells.
/// One data block: mirrored, every block holds the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    data: u32,
    parity: u32,
    stripes: u32,
    cell_size: u32,
}

impl Layout {
    /// A layout from the wire, checked against the limits and the size of its span (CL-6).
    pub fn new(
        data: u32,
        parity: u32,
        stripes: u32,
        cell_size: u32,
        size: u32,
    ) -> Result<Layout, LayoutError> {
        if !(1..=DATA_BLOCKS_MAX).contains(&data) || parity > PARITY_BLOCKS_MAX {
            return Err(LayoutError::Blocks { data, parity });
        }
        if !(1..=STRIPES_MAX).contains(&stripes) || !(1..=CELL_BYTES_MAX).contains(&cell_size) {
            return Err(LayoutError::Cells { stripes, cell_size });
        }
        let capacity = u64::from(data) * u64::from(stripes) * u64::from(cell_size);
        let stripe = u64::from(data) * u64::from(cell_size);
        let size_fits = capacity >= u64::from(size) && capacity - stripe < u64::from(size);
        if size == 0 || !size_fits || capacity > CAPACITY_MAX {
            return Err(LayoutError::Capacity { capacity, size });
        }
        Ok(Layout { data, parity, stripes, cell_size })
    }

    /// Cuts a span of `size` bytes (1 to [`SPAN_BYTES_MAX`]) into cells of about `cell_target` bytes: as few
    /// stripes as that allows, all cells alike, so that padding stays under [`CELL_STEP`] per cell (CL-8).
    pub fn choose(size: u32, data: u32, parity: u32, cell_target: u32) -> Result<Layout, LayoutError> {
        if data == 0 {
            return Err(LayoutError::Blocks { data, parity });
        }
        let target = cell_target.clamp(CELL_BYTES_MIN, CELL_BYTES_MAX);
        let per_block = size.div_ceil(data).max(1);
        let stripes = per_block.div_ceil(target).clamp(1, STRIPES_MAX);
        let cell_size = per_block.div_ceil(stripes).next_multiple_of(CELL_STEP);
        Layout::new(data, parity, per_block.div_ceil(cell_size), cell_size, size)
    }

    pub fn data(&self) -> usize {
        self.data as usize
    }

    pub fn parity(&self) -> usize {
        self.parity as usize
    }

    /// Data and parity.
    pub fn blocks(&self) -> usize {
        (self.data + self.parity) as usize
    }

    pub fn stripes(&self) -> usize {
        self.stripes as usize
    }

    pub fn cell_size(&self) -> usize {
        self.cell_size as usize
    }

    pub fn is_mirrored(&self) -> bool {
        self.data == 1
    }

    /// Bytes of one block.
    pub fn block_size(&self) -> u32 {
        self.stripes * self.cell_size
    }

    /// Bytes of all data blocks: the span and its padding.
    pub fn capacity(&self) -> usize {
        self.data as usize * self.block_size() as usize
    }

    /// Bytes of data in one stripe.
    pub fn stripe_size(&self) -> usize {
        self.data as usize * self.cell_size as usize
    }
}

/// How a span is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    Inline,
    Blocks { layout: Layout, storage_class: u8 },
}

/// Complete, valid policies, ready to be asked.
#[derive(Debug, Clone)]
pub struct Rules {
    span: Vec<SpanRule>,
    block: Vec<BlockRule>,
    cell_target: u32,
}

impl Rules {
    /// The defaults stand in for what is unset.
    pub fn new(policies: &Policies) -> Result<Rules, LayoutError> {
        policy::validate(policies).map_err(LayoutError::Policies)?;
        let complete = policy::inherit(policies.clone(), &policy::defaults());
        let unset = || LayoutError::Policies("unset".to_owned());
        Ok(Rules {
            span: complete.span.ok_or_else(unset)?.rules,
            block: complete.block.ok_or_else(unset)?.rules,
            cell_target: complete.stripe.ok_or_else(unset)?.cell_size,
        })
    }

    /// Longer files are cut into spans of this size.
    pub fn span_bytes_max(&self) -> u32 {
        self.span.last().map_or(SPAN_BYTES_MAX, |rule| rule.max_size)
    }

    /// Files up to this size live in the metadata.
    pub fn inline_bytes_max(&self) -> u32 {
        let inline = self.span.iter().take_while(|rule| rule.data == 0).last();
        inline.map_or(0, |rule| rule.max_size.min(INLINE_BYTES_MAX))
    }

    /// How a span of `size` bytes, at most [`Rules::span_bytes_max`], is stored.
    pub fn storage(&self, size: u32) -> Result<Storage, LayoutError> {
        let too_long = LayoutError::Capacity { capacity: u64::from(self.span_bytes_max()), size };
        let rule = self.span.iter().find(|rule| rule.max_size >= size).ok_or(too_long)?;
        if rule.data == 0 {
            return Ok(Storage::Inline);
        }
        self.in_blocks(size, rule.data, rule.parity)
    }

    /// A span of `size` bytes in blocks however short it is: by the first rule that has blocks.
    pub fn smallest_in_blocks(&self, size: u32) -> Result<Storage, LayoutError> {
        let rule = self.span.iter().find(|rule| rule.data > 0);
        let (data, parity) = rule.map_or((1, 2), |rule| (rule.data, rule.parity));
        self.in_blocks(size, data, parity)
    }

    /// A span of `size` bytes in (data, parity) blocks, whatever the span policy says.
    pub fn in_blocks(&self, size: u32, data: u32, parity: u32) -> Result<Storage, LayoutError> {
        let layout = Layout::choose(size, data, parity, self.cell_target)?;
        let rule = self.block.iter().find(|rule| rule.max_size >= layout.block_size());
        let class = rule.and_then(|rule| u8::try_from(rule.storage_class).ok());
        let none =
            || LayoutError::Policies(format!("no storage class for blocks of {}", layout.block_size()));
        Ok(Storage::Blocks { layout, storage_class: class.ok_or_else(none)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use eggs_proto::pb::{SpanPolicy, StripePolicy};
    use proptest::prelude::*;

    fn layout_of(rules: &Rules, size: u32) -> (u32, u32, u32, u32) {
        match rules.storage(size).unwrap() {
            Storage::Inline => (0, 0, 0, 0),
            Storage::Blocks { layout: l, .. } => (l.data, l.parity, l.stripes, l.cell_size),
        }
    }

    #[test]
    fn the_defaults_lay_out_as_they_should() {
        let rules = Rules::new(&Policies::default()).unwrap();
        assert_eq!((rules.span_bytes_max(), rules.inline_bytes_max()), (64 << 20, 4096));
        for (size, expected) in [
            (1, (0, 0, 0, 0)),
            (4096, (0, 0, 0, 0)),
            (4097, (1, 2, 1, 8192)),
            (65536, (1, 2, 1, 65536)),
            (65537, (4, 2, 1, 20480)),
            (1 << 20, (4, 2, 1, 256 << 10)),
            ((1 << 20) + 1, (4, 2, 2, 132 << 10)),
            (64 << 20, (4, 2, 64, 256 << 10)),
        ] {
            assert_eq!(layout_of(&rules, size), expected, "{size}");
        }
        assert!(rules.storage((64 << 20) + 1).is_err());
    }

    #[test]
    fn hostile_layouts_are_refused() {
        for (data, parity, stripes, cell, size) in [
            (0, 2, 1, 4096, 1),
            (17, 0, 1, 4096, 1),
            (4, 17, 1, 4096, 1),
            (4, 2, 0, 4096, 1),
            (4, 2, 257, 4096, 1),
            (4, 2, 1, 0, 1),
            (4, 2, 2, 4096, 4 * 4096),
            (4, 2, 1, u32::MAX, 1),
            (16, 2, 256, 16 << 20, 1),
            (4, 2, 1, 4096, 4 * 4096 + 1),
            (4, 2, 1, 4096, 0),
        ] {
            assert!(Layout::new(data, parity, stripes, cell, size).is_err(), "{data} {stripes} {cell}");
        }
        let rule = SpanRule { max_size: u32::MAX, data: 4, parity: 2 };
        let hostile = Policies { span: Some(SpanPolicy { rules: vec![rule] }), ..Policies::default() };
        assert!(Rules::new(&hostile).is_err());
    }

    proptest! {
        #[test]
        fn padding_stays_small(size in 1..=SPAN_BYTES_MAX, data in 1..=16u32, parity in 0..=16u32,
                               target in 0..=(32u32 << 20)) {
            let layout = Layout::choose(size, data, parity, target).unwrap();
            prop_assert!(layout.capacity() >= size as usize);
            prop_assert!(layout.cell_size.is_multiple_of(CELL_STEP));
            // CL-8
            let cells = u64::from(layout.stripes) * u64::from(data);
            prop_assert!(layout.capacity() as u64 - u64::from(size) < cells * u64::from(CELL_STEP) + u64::from(data));
            // The last stripe is not all padding.
            prop_assert!((layout.stripes() - 1) * layout.stripe_size() < size as usize);
        }

        #[test]
        fn every_size_has_a_storage(size in 1..=(10u32 << 20), cell in 4096..=(16u32 << 20)) {
            let stripe = Some(StripePolicy { cell_size: cell });
            let rules = Rules::new(&Policies { stripe, ..Policies::default() }).unwrap();
            prop_assert!(rules.storage(size).is_ok());
        }
    }
}
