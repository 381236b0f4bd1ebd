//! Policies: defaults, inheritance, validity.
//!
//! Defaults (docs/adr/0004): a file of at most 4 KiB lives in the metadata (one request, one fsync;
//! a block would cost six); up to 64 KiB it is mirrored three times (three small writes are cheaper
//! than six tiny ones); above that RS(4,2) in spans of up to 64 MiB (1.5 × space, any two disks may
//! be lost, a span's buffers stay bounded in a client).

use crate::limits::{
    BLOCK_BYTES_MAX, CELL_BYTES_MAX, CELL_BYTES_MIN, CLASS_EMPTY, CLASS_FLASH, CLASS_HDD, CLASS_INLINE,
    DATA_BLOCKS_MAX, INLINE_BYTES_MAX, PARITY_BLOCKS_MAX, SPAN_BYTES_MAX,
};
use crate::pb::{BlockPolicy, BlockRule, Policies, SnapshotPolicy, SpanPolicy, SpanRule, StripePolicy};

pub const DEFAULT_INLINE_BYTES: u32 = 4 << 10;
pub const DEFAULT_MIRROR_BYTES: u32 = 64 << 10;
pub const DEFAULT_SPAN_BYTES: u32 = 64 << 20;
pub const DEFAULT_CELL_BYTES: u32 = 256 << 10;

/// What holds where nothing is set: every field is present.
pub fn defaults() -> Policies {
    Policies {
        snapshot: Some(SnapshotPolicy { keep_ns: None, keep_versions: None }),
        span: Some(SpanPolicy {
            rules: vec![
                SpanRule { max_size: DEFAULT_INLINE_BYTES, data: 0, parity: 0 },
                SpanRule { max_size: DEFAULT_MIRROR_BYTES, data: 1, parity: 2 },
                SpanRule { max_size: DEFAULT_SPAN_BYTES, data: 4, parity: 2 },
            ],
        }),
        block: Some(BlockPolicy {
            rules: vec![BlockRule { max_size: BLOCK_BYTES_MAX, storage_class: u32::from(CLASS_FLASH) }],
        }),
        stripe: Some(StripePolicy { cell_size: DEFAULT_CELL_BYTES }),
    }
}

/// Block services the widest span of the defaults needs, each with room for one of its blocks.
pub fn default_blocks() -> (usize, u64) {
    let widest =
        defaults().span.into_iter().flat_map(|span| span.rules).max_by_key(|rule| rule.data + rule.parity);
    let (data, parity) = widest.map_or((1, 0), |rule| (rule.data.max(1), rule.parity));
    ((data + parity) as usize, u64::from(DEFAULT_SPAN_BYTES / data))
}

/// What a storage class is called.
pub fn class_name(class: u32) -> String {
    match u8::try_from(class) {
        Ok(CLASS_EMPTY) => "EMPTY".to_owned(),
        Ok(CLASS_INLINE) => "INLINE".to_owned(),
        Ok(CLASS_HDD) => "HDD".to_owned(),
        Ok(CLASS_FLASH) => "FLASH".to_owned(),
        _ => format!("CLASS{class}"),
    }
}

/// How a span with this many blocks is stored: `inline`, `mirror3`, `4+2`.
pub fn layout_name(data: u32, parity: u32) -> String {
    match (data, parity) {
        (0, _) => "inline".to_owned(),
        (1, parity) => format!("mirror{}", u64::from(parity) + 1),
        (data, parity) => format!("{data}+{parity}"),
    }
}

/// `near` where it is set, `far` (a parent's, or the defaults) elsewhere.
#[must_use]
pub fn inherit(near: Policies, far: &Policies) -> Policies {
    Policies {
        snapshot: near.snapshot.or(far.snapshot),
        span: near.span.or_else(|| far.span.clone()),
        block: near.block.or_else(|| far.block.clone()),
        stripe: near.stripe.or(far.stripe),
    }
}

/// What longer files are cut into is at least this long: a span costs a row of metadata, whatever it holds.
const LAST_SPAN_BYTES_MIN: u32 = CELL_BYTES_MIN;

/// What is wrong with a policy, for people; `Ok` for every field that is absent.
pub fn validate(policies: &Policies) -> Result<(), String> {
    if let Some(span) = &policies.span {
        validate_span(span)?;
    }
    if let Some(block) = &policies.block {
        ascending("block", block.rules.iter().map(|rule| rule.max_size))?;
        if let Some(rule) = block.rules.iter().find(|rule| !(2..=255).contains(&rule.storage_class)) {
            return Err(format!("block policy: storage class {} is not 2 to 255", rule.storage_class));
        }
        if block.rules.last().is_some_and(|rule| rule.max_size < BLOCK_BYTES_MAX) {
            return Err(
                "block policy: the last rule is for all longer blocks: leave its size away".to_owned()
            );
        }
    }
    if let Some(stripe) = &policies.stripe
        && !(CELL_BYTES_MIN..=CELL_BYTES_MAX).contains(&stripe.cell_size)
    {
        return Err(format!(
            "stripe policy: cell size {} is not {CELL_BYTES_MIN} to {CELL_BYTES_MAX}",
            stripe.cell_size
        ));
    }
    Ok(())
}

fn validate_span(span: &SpanPolicy) -> Result<(), String> {
    ascending("span", span.rules.iter().map(|rule| rule.max_size))?;
    for rule in &span.rules {
        let limit = if rule.data == 0 { INLINE_BYTES_MAX } else { SPAN_BYTES_MAX };
        if rule.max_size > limit {
            return Err(format!(
                "span policy: spans of {} bytes are over the limit of {limit}",
                rule.max_size
            ));
        }
        if rule.data > DATA_BLOCKS_MAX || rule.parity > PARITY_BLOCKS_MAX {
            return Err(format!(
                "span policy: ({}, {}) is over ({DATA_BLOCKS_MAX}, {PARITY_BLOCKS_MAX}) blocks",
                rule.data, rule.parity
            ));
        }
        if rule.data == 0 && rule.parity != 0 {
            return Err("span policy: an inline span has no parity".to_owned());
        }
    }
    let last = span.rules.last().copied().unwrap_or_default();
    if last.data == 0 {
        return Err("span policy: the last rule, for all that is longer, must be of blocks".to_owned());
    }
    if last.max_size < LAST_SPAN_BYTES_MIN {
        return Err(format!("span policy: the last rule must reach {LAST_SPAN_BYTES_MIN} bytes"));
    }
    Ok(())
}

fn ascending(what: &str, sizes: impl Iterator<Item = u32>) -> Result<(), String> {
    let sizes: Vec<u32> = sizes.collect();
    if sizes.is_empty() || sizes.len() > 32 {
        return Err(format!("{what} policy: 1 to 32 rules are needed"));
    }
    if sizes[0] == 0 || !sizes.is_sorted_by(|a, b| a < b) {
        return Err(format!("{what} policy: the rules' sizes must rise from above 0"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_complete() {
        let defaults = defaults();
        validate(&defaults).unwrap();
        assert_eq!(inherit(Policies::default(), &defaults), defaults);
        assert_eq!(default_blocks(), (6, 16 << 20));
    }

    #[test]
    fn nearer_policies_win() {
        let near = Policies { stripe: Some(StripePolicy { cell_size: 8192 }), ..Policies::default() };
        let merged = inherit(near, &defaults());
        assert_eq!(merged.stripe.unwrap().cell_size, 8192);
        assert_eq!(merged.span, defaults().span);
    }

    #[test]
    fn policies_that_cannot_be_are_refused() {
        let span = |rules: &[(u32, u32, u32)]| Policies {
            span: Some(SpanPolicy {
                rules: rules
                    .iter()
                    .map(|&(max_size, data, parity)| SpanRule { max_size, data, parity })
                    .collect(),
            }),
            ..Policies::default()
        };
        assert!(validate(&span(&[])).is_err());
        assert!(validate(&span(&[(0, 1, 1)])).is_err());
        assert!(validate(&span(&[(10, 1, 1), (10, 4, 2)])).is_err());
        assert!(validate(&span(&[(10, 17, 1)])).is_err());
        assert!(validate(&span(&[(u32::MAX, 4, 2)])).is_err());
        assert!(validate(&span(&[(INLINE_BYTES_MAX + 1, 0, 0)])).is_err());
        assert!(validate(&span(&[(10, 0, 1)])).is_err());
        assert!(validate(&span(&[(10, 0, 0), (1 << 20, 10, 4)])).is_ok());
        assert!(validate(&span(&[(1 << 20, 17, 0)])).is_err());
        assert!(validate(&span(&[(1 << 20, 1, 17)])).is_err());
        // Everything from one block to sixteen and sixteen, mirrored or not, is allowed.
        for (data, parity) in (1..=16).flat_map(|data| (0..=16).map(move |parity| (data, parity))) {
            assert_eq!(validate(&span(&[(SPAN_BYTES_MAX, data, parity)])), Ok(()), "({data}, {parity})");
        }
        assert!(validate(&span(&[(1 << 20, 4, 2), (1 << 20, 4, 2)])).is_err(), "sizes that do not rise");
        // What is longer than the last rule is cut into pieces of it.
        assert!(validate(&span(&[(INLINE_BYTES_MAX, 0, 0)])).is_err());
        assert!(validate(&span(&[(CELL_BYTES_MIN - 1, 1, 2)])).is_err());
        assert!(validate(&span(&[(CELL_BYTES_MIN, 1, 2)])).is_ok());
        let stripe = |cell_size| Policies { stripe: Some(StripePolicy { cell_size }), ..Policies::default() };
        assert!(validate(&stripe(CELL_BYTES_MIN - 1)).is_err());
        assert!(validate(&stripe(CELL_BYTES_MAX + 1)).is_err());
        assert!(validate(&stripe(CELL_BYTES_MIN)).is_ok());
        let block = |rules: &[(u32, u32)]| Policies {
            block: Some(BlockPolicy {
                rules: rules
                    .iter()
                    .map(|&(max_size, storage_class)| BlockRule { max_size, storage_class })
                    .collect(),
            }),
            ..Policies::default()
        };
        assert!(validate(&block(&[])).is_err());
        assert!(validate(&block(&[(BLOCK_BYTES_MAX, 1)])).is_err());
        assert!(validate(&block(&[(BLOCK_BYTES_MAX, 256)])).is_err());
        assert!(validate(&block(&[(BLOCK_BYTES_MAX - 1, 2)])).is_err());
        assert!(validate(&block(&[(1 << 20, 3), (BLOCK_BYTES_MAX, 2)])).is_ok());
    }
}
