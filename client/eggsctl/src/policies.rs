//! Policies as people read them, one line each, and in JSON.

use eggs_client::{DirectoryPolicies, Policies};
pub use eggs_proto::policy::class_name;
use serde_json::{Value, json};

use crate::policy_text::{self, KINDS};

/// A policy's name, its text, and whether it is set on the directory itself.
pub fn lines(policies: &DirectoryPolicies) -> Vec<(&'static str, String, bool)> {
    let DirectoryPolicies { own, effective } = policies;
    let own = [own.snapshot.is_some(), own.span.is_some(), own.block.is_some(), own.stripe.is_some()];
    let lines = KINDS.into_iter().zip(own);
    lines.map(|((name, kind), own)| (name, policy_text::text(effective, kind), own)).collect()
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
                "snapshot: all false",
                "span: 4K:inline,64K:mirror3,64M:4+2 false",
                "block: FLASH false",
                "stripe: 256K true",
            ]
        );
    }
}
