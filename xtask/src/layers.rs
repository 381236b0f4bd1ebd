//! Imports go one way: the rule of docs/ARCHITECTURE.md, checked on what Cargo says.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::steps::cargo;

/// What each crate of ours may import, of ours.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("eggs-proto", &[]),
    ("eggs-machine", &["eggs-proto"]),
    ("eggs-consensus-core", &["eggs-proto", "eggs-machine"]),
    ("eggs-shard-core", &["eggs-proto", "eggs-machine"]),
    ("eggs-crossdir-core", &["eggs-proto", "eggs-machine"]),
    ("eggs-crossdir-model", &[]),
    ("eggs-shuckle-core", &["eggs-proto", "eggs-machine"]),
    ("eggs-blockd-core", &["eggs-proto"]),
    ("eggs-client-core", &["eggs-proto"]),
    ("eggs-daemon", &["eggs-proto"]),
    ("eggs-consensus", &["eggs-proto", "eggs-machine", "eggs-consensus-core", "eggs-daemon"]),
    ("eggs-replica", &["eggs-proto", "eggs-machine", "eggs-consensus-core", "eggs-consensus", "eggs-daemon"]),
    ("eggs-client", &["eggs-proto", "eggs-client-core"]),
    ("eggs-janitor-core", &["eggs-proto"]),
    ("eggs-janitor", &["eggs-proto", "eggs-client", "eggs-daemon", "eggs-janitor-core"]),
    ("eggs-shard", &SERVICE_OF_SHARD),
    ("eggs-crossdir", &SERVICE_OF_CROSSDIR),
    ("eggs-shuckle", &SERVICE_OF_SHUCKLE),
    ("eggs-blockd", &["eggs-proto", "eggs-daemon", "eggs-blockd-core"]),
    (
        "eggs-embedded",
        &[
            "eggs-proto",
            "eggs-consensus",
            "eggs-daemon",
            "eggs-shard",
            "eggs-crossdir",
            "eggs-shuckle",
            "eggs-shuckle-core",
            "eggs-blockd",
            "eggs-janitor",
        ],
    ),
    (
        "eggsctl",
        &[
            "eggs-proto",
            "eggs-client",
            "eggs-daemon",
            "eggs-embedded",
            "eggs-shuckle-core",
            "eggs-janitor-core",
        ],
    ),
    (
        "eggs-simulation",
        &[
            "eggs-proto",
            "eggs-machine",
            "eggs-consensus-core",
            "eggs-shard-core",
            "eggs-crossdir-core",
            "eggs-shuckle-core",
            "eggs-blockd-core",
            "eggs-client-core",
            "eggs-janitor-core",
        ],
    ),
    ("eggs-tests", &["eggs-proto", "eggs-client", "eggs-daemon", "eggs-blockd-core"]),
    ("eggs-bench", &["eggs-proto", "eggs-client", "eggs-client-core"]),
    ("xtask", &[]),
];

const SERVICE_OF_SHARD: [&str; 7] = service("eggs-shard-core");
const SERVICE_OF_CROSSDIR: [&str; 7] = service("eggs-crossdir-core");
const SERVICE_OF_SHUCKLE: [&str; 7] = service("eggs-shuckle-core");

const fn service(core: &'static str) -> [&'static str; 7] {
    [
        "eggs-proto",
        "eggs-machine",
        "eggs-consensus-core",
        "eggs-consensus",
        "eggs-replica",
        "eggs-daemon",
        core,
    ]
}

/// Crates that decide and do nothing: the same input gives the same output on every machine.
const PURE: &[&str] = &[
    "eggs-proto",
    "eggs-machine",
    "eggs-consensus-core",
    "eggs-shard-core",
    "eggs-crossdir-core",
    "eggs-crossdir-model",
    "eggs-shuckle-core",
    "eggs-blockd-core",
    "eggs-client-core",
    "eggs-janitor-core",
];

/// What brings clocks, chance, threads or devices. Behind a feature it may come: the shells ask for it.
const IMPURE: &[&str] = &[
    "axum",
    "futures-util",
    "getrandom",
    "hyper",
    "jiff",
    "metrics",
    "raft-engine",
    "rand",
    "rand_chacha",
    "rustix",
    "sled",
    "tokio",
    "tokio-stream",
    "tokio-util",
    "tonic",
    "tracing",
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// None: an ordinary one; tests may import what they like.
    kind: Option<String>,
    optional: bool,
}

pub fn check() -> Result<()> {
    let output = cargo(&["metadata", "--locked", "--no-deps", "--format-version", "1"]).output()?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let wrong = wrong(&metadata.packages);
    for line in &wrong {
        eprintln!("{line}");
    }
    if !wrong.is_empty() {
        bail!("{} imports go the wrong way (docs/ARCHITECTURE.md)", wrong.len());
    }
    Ok(())
}

fn wrong(packages: &[Package]) -> Vec<String> {
    let rules: BTreeMap<&str, &[&str]> = MAY_IMPORT.iter().copied().collect();
    let mut wrong = Vec::new();
    for package in packages {
        let name = package.name.as_str();
        let Some(allowed) = rules.get(name) else {
            wrong.push(format!("{name} is not in xtask/src/layers.rs"));
            continue;
        };
        for dependency in package.dependencies.iter().filter(|d| d.kind.is_none()) {
            let import = dependency.name.as_str();
            if rules.contains_key(import) && !allowed.contains(&import) {
                wrong.push(format!("{name} may not import {import}"));
            }
            if PURE.contains(&name) && IMPURE.contains(&import) && !dependency.optional {
                wrong.push(format!("{name} decides only: {import} does things"));
            }
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, imports: &[(&str, bool)]) -> Package {
        let dependency = |(name, optional): &(&str, bool)| Dependency {
            name: (*name).to_owned(),
            kind: None,
            optional: *optional,
        };
        Package { name: name.to_owned(), dependencies: imports.iter().map(dependency).collect() }
    }

    #[test]
    fn this_checkout_keeps_the_rule() {
        check().unwrap();
    }

    #[test]
    fn what_breaks_the_rule_is_found() {
        let none =
            wrong(&[package("eggs-machine", &[("eggs-proto", false), ("sled", true), ("bytes", false)])]);
        assert!(none.is_empty(), "{none:?}");
        for (name, import) in [
            ("eggs-shard-core", "tokio"),
            ("eggs-shard", "eggs-crossdir-core"),
            ("eggs-client", "eggs-daemon"),
            ("new", "bytes"),
        ] {
            assert_eq!(wrong(&[package(name, &[(import, false)])]).len(), 1, "{name} {import}");
        }
    }
}
