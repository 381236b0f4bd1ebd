//! Policies as people read them, one line each, and in JSON.

use eggs_client::{DirectoryPolicies, Policies};
use serde_json::{Value, json};

use crate::output::size;

/// A policy's name, its text, and whether it is set on the directory itself.
pub fn lines(policies: &DirectoryPolicies) -> Vec<(&'static str, String, bool)> {
    let DirectoryPolicies { own, effective } = policies;
    vec![
        ("snapshot", snapshot(effective), own.snapshot.is_some()),
        ("span", span(effective), own.span.is_some()),
        ("block", block(effective), own.block.is_some()),
        ("stripe", stripe(effective), own.stripe.is_some()),
    ]
}

fn snapshot(policies: &Policies) -> String {
    let Some(policy) = &policies.snapshot else { return "unset".to_owned() };
    let mut rules = Vec::new();
    if let Some(keep) = policy.keep_ns {
        let keep = std::time::Duration::from_nanos(keep);
        rules.push(format!("keep {}", humantime::format_duration(keep)));
    }
    if let Some(versions) = policy.keep_versions {
        rules.push(format!("keep {versions} versions"));
    }
    if rules.is_empty() { "keep everything".to_owned() } else { rules.join(", ") }
}

fn span(policies: &Policies) -> String {
    let Some(policy) = &policies.span else { return "unset".to_owned() };
    let rule = |rule: &eggs_proto::pb::SpanRule| {
        format!("up to {} {}", size(u64::from(rule.max_size)), layout(rule.data, rule.parity))
    };
    policy.rules.iter().map(rule).collect::<Vec<_>>().join(", ")
}

/// How a span with this many blocks is called.
pub fn layout(data: u32, parity: u32) -> String {
    match (data, parity) {
        (0, _) => "inline".to_owned(),
        (1, parity) => format!("mirrored {} times", u64::from(parity) + 1),
        (data, parity) => format!("RS({data},{parity})"),
    }
}

fn block(policies: &Policies) -> String {
    let Some(policy) = &policies.block else { return "unset".to_owned() };
    let rule = |rule: &eggs_proto::pb::BlockRule| {
        format!("up to {} {}", size(u64::from(rule.max_size)), class_name(rule.storage_class))
    };
    policy.rules.iter().map(rule).collect::<Vec<_>>().join(", ")
}

fn stripe(policies: &Policies) -> String {
    let Some(policy) = &policies.stripe else { return "unset".to_owned() };
    format!("cells of {}", size(u64::from(policy.cell_size)))
}

/// What a storage class is called.
pub fn class_name(class: u32) -> String {
    use eggs_proto::limits::{CLASS_EMPTY, CLASS_FLASH, CLASS_HDD, CLASS_INLINE};
    match u8::try_from(class) {
        Ok(CLASS_EMPTY) => "EMPTY".to_owned(),
        Ok(CLASS_INLINE) => "INLINE".to_owned(),
        Ok(CLASS_HDD) => "HDD".to_owned(),
        Ok(CLASS_FLASH) => "FLASH".to_owned(),
        _ => format!("CLASS{class}"),
    }
}

/// Absent policies are null.
pub fn json(policies: &Policies) -> Value {
    json!({
        "snapshot": policies.snapshot.as_ref().map(|policy| json!({
            "keep_ns": policy.keep_ns,
            "keep_versions": policy.keep_versions,
        })),
        "span": policies.span.as_ref().map(|policy| policy.rules.iter().map(|rule| json!({
            "max_size": rule.max_size,
            "data": rule.data,
            "parity": rule.parity,
        })).collect::<Vec<_>>()),
        "block": policies.block.as_ref().map(|policy| policy.rules.iter().map(|rule| json!({
            "max_size": rule.max_size,
            "storage_class": rule.storage_class,
        })).collect::<Vec<_>>()),
        "stripe": policies.stripe.as_ref().map(|policy| json!({ "cell_size": policy.cell_size })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_read_well() {
        let defaults = eggs_proto::policy::defaults();
        let own = Policies { stripe: defaults.stripe, ..Policies::default() };
        let lines = lines(&DirectoryPolicies { own, effective: defaults });
        let text: Vec<String> =
            lines.iter().map(|(name, text, own)| format!("{name}: {text} {own}")).collect();
        assert_eq!(
            text,
            [
                "snapshot: keep everything false",
                "span: up to 4.0 KiB inline, up to 64.0 KiB mirrored 3 times, up to 64.0 MiB RS(4,2) false",
                "block: up to 128.0 MiB FLASH false",
                "stripe: cells of 256.0 KiB true",
            ]
        );
    }
}
