//! `cargo xtask docs`: the invariants stand in the crates that keep them, and are gathered in docs/ARCHITECTURE.md.
//!
//! A crate lists its invariants at the top of its `lib.rs`, one item each: `- **SH-1** what always holds`. The gathered
//! list lies between two marks; `ci` refuses a list that is not what the crates say.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::steps::root;

const DOCUMENT: &str = "docs/ARCHITECTURE.md";
const BEGIN: &str = "<!-- invariants: cargo xtask docs -->\n";
const END: &str = "<!-- end of invariants -->\n";

/// In reading order.
const CRATES: &[&str] = &[
    "consensus/machine",
    "consensus/core",
    "consensus",
    "shard/core",
    "shard",
    "crossdir/core",
    "crossdir",
    "shuckle/core",
    "shuckle",
    "blockd/core",
    "blockd",
    "client/core",
    "janitor/core",
    "client",
    "daemon",
    "deploy/embedded",
    "simulation",
];

#[derive(Debug, Args)]
pub struct Docs {
    /// Only say whether the document is up to date
    #[arg(long)]
    check: bool,
}

impl Docs {
    pub fn run(&self) -> Result<()> {
        if self.check { check() } else { write() }
    }
}

pub fn check() -> Result<()> {
    let (old, new) = documents()?;
    if old != new {
        bail!("{DOCUMENT} does not list the invariants as the crates do: cargo xtask docs");
    }
    Ok(())
}

fn write() -> Result<()> {
    let (old, new) = documents()?;
    if old != new {
        std::fs::write(root().join(DOCUMENT), new)?;
        eprintln!("{DOCUMENT} written");
    }
    Ok(())
}

/// The document as it is and as it should be.
fn documents() -> Result<(String, String)> {
    let old = std::fs::read_to_string(root().join(DOCUMENT)).context(DOCUMENT)?;
    let (before, rest) = old.split_once(BEGIN).with_context(|| format!("{DOCUMENT}: no {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("{DOCUMENT}: no {END}"))?;
    let mut list = String::new();
    for name in CRATES {
        let path = root().join(name).join("src/lib.rs");
        let source = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        section(&mut list, name, &invariants(&source));
    }
    let new = format!("{before}{BEGIN}{list}\n{END}{after}");
    Ok((old, new))
}

fn section(list: &mut String, name: &str, invariants: &[String]) {
    if invariants.is_empty() {
        return;
    }
    // Links lead from docs/ to the file.
    let _ = writeln!(list, "\n**[{name}](../{name}/src/lib.rs)**\n");
    for invariant in invariants {
        let _ = writeln!(list, "- {invariant}");
    }
}

/// The items of a file's top comment that begin with a bold label such as `**SH-1**`.
fn invariants(source: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut open = false;
    for line in source.lines().map_while(|line| line.strip_prefix("//!")) {
        let item = line.trim_start().strip_prefix("- ");
        if let Some(item) = item {
            open = is_label(item);
            if open {
                found.push(plain(item));
            }
        } else if line.trim().is_empty() || !line.starts_with("  ") {
            open = false;
        } else if let (true, Some(last)) = (open, found.last_mut()) {
            last.push(' ');
            last.push_str(&plain(line.trim()));
        }
    }
    found
}

fn is_label(item: &str) -> bool {
    let label = item.strip_prefix("**").and_then(|rest| rest.split_once("**")).map(|(label, _)| label);
    let parts = label.and_then(|label| label.split_once('-'));
    parts.is_some_and(|(letters, number)| {
        letters.len() == 2 && letters.bytes().all(|b| b.is_ascii_uppercase()) && number.parse::<u32>().is_ok()
    })
}

/// Links to Rust items mean nothing in a document: [`Host::turn`] becomes `Host::turn`.
fn plain(text: &str) -> String {
    text.trim().replace("[`", "`").replace("`]", "`")
}

/// Crates with invariants that are not in the list.
#[cfg(test)]
fn unlisted(root: &std::path::Path) -> Result<Vec<String>> {
    let mut unlisted = Vec::new();
    for part in ["", "core", "machine", "embedded"] {
        for entry in std::fs::read_dir(root)? {
            let path = entry?.path().join(part);
            let Ok(source) = std::fs::read_to_string(path.join("src/lib.rs")) else { continue };
            let name = path.strip_prefix(root)?.to_string_lossy().trim_end_matches('/').to_owned();
            if !invariants(&source).is_empty() && !CRATES.contains(&name.as_str()) {
                unlisted.push(name);
            }
        }
    }
    Ok(unlisted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_gathered_with_their_continuations() {
        let source = "//! A crate.\n//!\n//! - not one\n//! - **SH-1** Rows have a\n//!   known [`Tag`].\n//! - **SH-2** More.\n\
                      //!\n//!   after\n//! - **bold** not one\n//!   either\nmod x;\n//! - **SH-3** too late\n";
        assert_eq!(invariants(source), ["**SH-1** Rows have a known `Tag`.", "**SH-2** More."]);
    }

    #[test]
    fn no_crate_is_forgotten() {
        assert_eq!(unlisted(&root()).unwrap(), Vec::<String>::new());
    }
}
