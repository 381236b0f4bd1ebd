//! Policies as they are typed and printed: one word each, `span=4K:inline,64K:mirror3,64M:4+2`.
//!
//! Sizes are powers of 1024 (`4K`, `64M`); rules are for spans (or blocks) of up to that size, in rising order.

use std::time::Duration;

use eggs_client::{Policies, PolicyKind};
use eggs_proto::limits::BLOCK_BYTES_MAX;
use eggs_proto::pb::{BlockPolicy, BlockRule, SnapshotPolicy, SpanPolicy, SpanRule, StripePolicy};
use eggs_proto::policy;
pub use eggs_proto::policy::layout_name as layout;

use crate::policies::class_name;

/// All kinds, with their names.
pub const KINDS: [(&str, PolicyKind); 4] = [
    ("snapshot", PolicyKind::PolicySnapshot),
    ("span", PolicyKind::PolicySpan),
    ("block", PolicyKind::PolicyBlock),
    ("stripe", PolicyKind::PolicyStripe),
];

/// One policy to be set.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    pub kind: PolicyKind,
    pub value: Policies,
}

/// `span=…`, `block=…`, `stripe=…` or `snapshot=…`.
pub fn setting(text: &str) -> Result<Setting, String> {
    let (name, rest) =
        text.split_once('=').ok_or("KIND=RULES is expected, as in span=64K:mirror3,64M:4+2")?;
    let kind = kind(name)?;
    let mut value = Policies::default();
    match kind {
        PolicyKind::PolicySpan => value.span = Some(span(rest)?),
        PolicyKind::PolicyBlock => value.block = Some(block(rest)?),
        PolicyKind::PolicyStripe => value.stripe = Some(StripePolicy { cell_size: size_of(rest)? }),
        _ => value.snapshot = Some(snapshot(rest)?),
    }
    policy::validate(&value)?;
    Ok(Setting { kind, value })
}

pub fn kind(name: &str) -> Result<PolicyKind, String> {
    let found = KINDS.iter().find(|(known, _)| *known == name);
    found
        .map(|(_, kind)| *kind)
        .ok_or_else(|| format!("'{name}' is no policy: span, block, stripe and snapshot are"))
}

fn span(text: &str) -> Result<SpanPolicy, String> {
    let rule = |rule: &str| {
        let (size, layout) = rule
            .split_once(':')
            .ok_or_else(|| format!("span: '{rule}': SIZE:LAYOUT is expected, as in 64M:4+2"))?;
        let (data, parity) = layout_of(layout)?;
        Ok(SpanRule { max_size: size_of(size)?, data, parity })
    };
    Ok(SpanPolicy { rules: text.split(',').map(rule).collect::<Result<_, String>>()? })
}

fn layout_of(text: &str) -> Result<(u32, u32), String> {
    let wrong =
        || format!("'{text}' is no layout: inline, mirrorN (N copies) and D+P (data and parity blocks) are");
    if text.eq_ignore_ascii_case("inline") {
        return Ok((0, 0));
    }
    if let Some(copies) = text.strip_prefix("mirror") {
        let copies: u32 = copies.parse().map_err(|_| wrong())?;
        return copies.checked_sub(1).map(|parity| (1, parity)).ok_or_else(wrong);
    }
    let (data, parity) = text.split_once('+').ok_or_else(wrong)?;
    match (data.parse(), parity.parse()) {
        (Ok(0), _) => {
            Err(format!("'{text}': at least one data block is needed; inline is written as inline"))
        }
        (Ok(data), Ok(parity)) => Ok((data, parity)),
        _ => Err(wrong()),
    }
}

fn block(text: &str) -> Result<BlockPolicy, String> {
    let count = text.split(',').count();
    let rule = |(n, rule): (usize, &str)| {
        let (size, class) = match rule.split_once(':') {
            Some((size, class)) => (Some(size), class),
            None => (None, rule),
        };
        let max_size = match size {
            // The last one is for all that is longer.
            None if n + 1 == count => BLOCK_BYTES_MAX,
            None => return Err(format!("block: '{rule}': SIZE:CLASS is expected, as in 1M:FLASH")),
            Some(size) => size_of(size)?,
        };
        Ok(BlockRule { max_size, storage_class: class_of(class)? })
    };
    Ok(BlockPolicy { rules: text.split(',').enumerate().map(rule).collect::<Result<_, String>>()? })
}

fn class_of(text: &str) -> Result<u32, String> {
    let wrong = || format!("'{text}' is no storage class: HDD, FLASH and CLASS4 to CLASS255 are");
    match text.to_ascii_uppercase().as_str() {
        "HDD" => Ok(2),
        "FLASH" => Ok(3),
        text => {
            let number = text.strip_prefix("CLASS").ok_or_else(wrong)?;
            number.parse().ok().filter(|class| (2..=255).contains(class)).ok_or_else(wrong)
        }
    }
}

fn snapshot(text: &str) -> Result<SnapshotPolicy, String> {
    let mut policy = SnapshotPolicy { keep_ns: None, keep_versions: None };
    if text == "all" {
        return Ok(policy);
    }
    for rule in text.split(',') {
        let wrong = || {
            format!("snapshot: '{rule}': all, a time (30d, 12h) or a number of versions (10v) is expected")
        };
        if let Some(versions) = rule.strip_suffix('v') {
            policy.keep_versions = Some(versions.parse().map_err(|_| wrong())?);
        } else {
            let keep = humantime::parse_duration(rule).map_err(|_| wrong())?;
            policy.keep_ns = Some(u64::try_from(keep.as_nanos()).map_err(|_| wrong())?);
        }
    }
    Ok(policy)
}

/// `64K`, `64KiB`, `65536`.
fn size_of(text: &str) -> Result<u32, String> {
    let wrong = || format!("'{text}' is no size: 4096, 64K, 8M are (powers of 1024)");
    let upper = text.to_ascii_uppercase();
    let digits = upper.trim_end_matches("IB").trim_end_matches('B');
    let (number, shift) = match digits.strip_suffix(['K', 'M', 'G']) {
        Some(number) => (number, 10 * (1 + "KMG".find(&digits[number.len()..]).unwrap_or(0))),
        None => (digits, 0),
    };
    let number: u32 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large"))
}

/// What [`setting`] reads, without the name.
pub fn text(policies: &Policies, kind: PolicyKind) -> String {
    let text = match kind {
        PolicyKind::PolicySpan => policies.span.as_ref().map(|policy| {
            let rule =
                |rule: &SpanRule| format!("{}:{}", size_text(rule.max_size), layout(rule.data, rule.parity));
            policy.rules.iter().map(rule).collect::<Vec<_>>().join(",")
        }),
        PolicyKind::PolicyBlock => policies.block.as_ref().map(|policy| {
            let rule = |rule: &BlockRule| match rule.max_size {
                BLOCK_BYTES_MAX.. => class_name(rule.storage_class),
                size => format!("{}:{}", size_text(size), class_name(rule.storage_class)),
            };
            policy.rules.iter().map(rule).collect::<Vec<_>>().join(",")
        }),
        PolicyKind::PolicyStripe => policies.stripe.as_ref().map(|policy| size_text(policy.cell_size)),
        _ => policies.snapshot.as_ref().map(snapshot_text),
    };
    text.unwrap_or_else(|| "unset".to_owned())
}

fn snapshot_text(policy: &SnapshotPolicy) -> String {
    let keep = policy.keep_ns.map(|keep| time_text(Duration::from_nanos(keep)));
    let versions = policy.keep_versions.map(|versions| format!("{versions}v"));
    let rules: Vec<String> = keep.into_iter().chain(versions).collect();
    if rules.is_empty() { "all".to_owned() } else { rules.join(",") }
}

/// As people type it: `30d`; humantime would make months of it.
fn time_text(time: Duration) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3600, "h"), (60, "m"), (1, "s")];
    let seconds = time.as_secs();
    let unit = UNITS.iter().find(|(unit, _)| seconds > 0 && seconds.is_multiple_of(*unit));
    match unit.filter(|_| time.subsec_nanos() == 0) {
        Some((unit, name)) => format!("{}{name}", seconds / unit),
        None => humantime::format_duration(time).to_string().replace(' ', ""),
    }
}

fn size_text(bytes: u32) -> String {
    [(30, "G"), (20, "M"), (10, "K")]
        .into_iter()
        .find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift))
        .map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_typed() {
        for typed in [
            "span=4K:inline,64K:mirror3,64M:4+2",
            "span=64K:mirror3,8M:4+2,64M:10+4",
            "span=5000:mirror1,100M:16+16",
            "span=1M:3+0",
            "block=FLASH",
            "block=1M:FLASH,HDD",
            "block=5K:CLASS7,CLASS255",
            "stripe=256K",
            "snapshot=all",
            "snapshot=30d",
            "snapshot=400d",
            "snapshot=90m,1v",
            "snapshot=1s",
            "snapshot=10v",
            "snapshot=12h,3v",
        ] {
            let Setting { kind, value } = setting(typed).unwrap();
            let name = KINDS.iter().find(|(_, known)| *known == kind).unwrap().0;
            assert_eq!(format!("{name}={}", text(&value, kind)), typed);
        }
        let defaults = policy::defaults();
        for (name, kind) in KINDS {
            assert!(setting(&format!("{name}={}", text(&defaults, kind))).is_ok(), "{name}");
        }
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for text in ["64K", "64k", "64KiB", "64KB", "65536"] {
            assert_eq!(size_of(text), Ok(65536), "{text}");
        }
        for text in ["", "K", "-1", "1.5M", "4T", "5G", "0x10", "9999999999"] {
            assert!(size_of(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (typed, named) in [
            ("span", "KIND=RULES"),
            ("spam=4K", "'spam' is no policy"),
            ("span=64M", "SIZE:LAYOUT"),
            ("span=64M:4-2", "'4-2' is no layout"),
            ("span=64M:0+2", "at least one data block"),
            ("span=64M:mirror0", "'mirror0' is no layout"),
            ("span=64M:17+1", "over (16, 16) blocks"),
            ("span=1X:4+2", "'1X' is no size"),
            ("span=200M:4+2", "over the limit"),
            ("span=8M:4+2,4M:4+2", "must rise"),
            ("span=1M:inline", "over the limit"),
            ("block=1M:FLASH", "leave its size away"),
            ("block=FLASH,HDD", "SIZE:CLASS"),
            ("block=TAPE", "'TAPE' is no storage class"),
            ("stripe=1K", "cell size 1024"),
            ("snapshot=some", "'some'"),
        ] {
            let error = setting(typed).unwrap_err();
            assert!(error.contains(named), "{typed}: {error}");
        }
    }
}
