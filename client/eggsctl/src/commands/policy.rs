//! `policy`: how the files of a directory are stored and kept.

use std::collections::BTreeSet;

use clap::{Args, Subcommand};
use eggs_client::{Client, DirectoryPolicies, Policies, PolicyKind};
use eggs_proto::flags;
use eggs_proto::pb::BlockServiceInfo;
use serde_json::{Value, json};

use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::{Failure, Outcome};
use crate::output::JsonPath;
use crate::paths::ClusterPath;
use crate::policies::{self, class_name};
use crate::policy_text::{self, KINDS, Setting};

/// Look at and change policies: how files are cut, stored and kept
///
/// Every directory has four, each its own or its parent's: span (how long pieces of files are stored), block (on which kind
/// of disk), stripe (how long cells are), snapshot (how long what was deleted is kept).
#[derive(Debug, Args)]
pub struct Policy {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Print the policies that hold in a directory, and which of them are set on it
    Get(PolicyGet),
    /// Set policies on a directory
    Set(PolicySet),
    /// Take policies off a directory: those of its parent hold again
    Unset(PolicyUnset),
}

#[derive(Debug, Args)]
struct PolicyGet {
    #[command(flatten)]
    json: JsonFlag,
    /// The directory
    #[arg(value_name = "PATH", value_parser = ClusterPath::parser())]
    path: ClusterPath,
}

/// Set policies on a directory
///
/// They hold for files written from now on, in it and in the directories below that have none of their own. Files that are
/// there stay as they are: `eggsctl restripe PATH` writes them anew in the background.
#[derive(Debug, Args)]
#[command(after_help = "\
Policies, as `policy get` prints them (sizes are powers of 1024):
  span=SIZE:LAYOUT,…     spans of up to SIZE are stored as LAYOUT: inline (in the metadata, up to 16K),
                         mirrorN (N copies), D+P (D data and P parity blocks: any P may be lost; D 1 to 16, P 0 to 16).
                         The last SIZE is what longer files are cut into, at most 100M.
  block=SIZE:CLASS,…     blocks of up to SIZE are on disks of CLASS: HDD, FLASH, CLASS4 … The last without SIZE.
  stripe=SIZE            cells of about SIZE, 4K to 16M: what a small read fetches at least.
  snapshot=all           what was deleted is kept; or 30d, 10v (versions of a name), or both: 30d,10v.

Examples:
  eggsctl policy set /backup span=64K:mirror3,8M:4+2,64M:10+4
  eggsctl policy set /photos block=1M:FLASH,HDD stripe=1M
  eggsctl policy set /scratch span=64M:mirror1 snapshot=1d")]
struct PolicySet {
    #[command(flatten)]
    json: JsonFlag,
    /// The directory
    #[arg(value_name = "PATH", value_parser = ClusterPath::parser())]
    path: ClusterPath,
    /// KIND=RULES
    #[arg(required = true, value_name = "POLICY", value_parser = policy_text::setting)]
    policies: Vec<Setting>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  eggsctl policy unset /backup span stripe")]
struct PolicyUnset {
    #[command(flatten)]
    json: JsonFlag,
    /// The directory
    #[arg(value_name = "PATH", value_parser = ClusterPath::parser())]
    path: ClusterPath,
    /// span, block, stripe, snapshot, or all
    #[arg(required = true, value_name = "KIND", value_parser = typed_kinds)]
    kinds: Vec<Kinds>,
}

#[derive(Debug, Clone)]
struct Kinds(Vec<PolicyKind>);

fn typed_kinds(text: &str) -> Result<Kinds, String> {
    match text {
        "all" => Ok(Kinds(KINDS.iter().map(|(_, kind)| *kind).collect())),
        name => policy_text::kind(name).map(|kind| Kinds(vec![kind])),
    }
}

impl Policy {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let (path, json, changed) = match self.command {
            PolicyCommand::Get(PolicyGet { path, json }) => (path, json.json, false),
            PolicyCommand::Set(PolicySet { path, json, policies }) => {
                let kinds: BTreeSet<i32> = policies.iter().map(|setting| setting.kind as i32).collect();
                if kinds.len() < policies.len() {
                    return Err(Failure::Usage("each policy can be given once".to_owned()));
                }
                for Setting { kind, value } in policies {
                    set(client, &path, kind, Some(value)).await?;
                }
                (path, json.json, true)
            }
            PolicyCommand::Unset(PolicyUnset { path, json, kinds }) => {
                for kind in kinds.into_iter().flat_map(|kinds| kinds.0) {
                    set(client, &path, kind, None).await?;
                }
                (path, json.json, true)
            }
        };
        let found = client.policies(path.as_bytes()).await.map_err(|error| failure(&path, error))?;
        let warnings = if changed { warnings(client, &found.effective).await? } else { Vec::new() };
        print(context, &path, &found, changed.then_some(&warnings), json)
    }
}

async fn set(client: &Client, path: &ClusterPath, kind: PolicyKind, value: Option<Policies>) -> Outcome {
    client.set_policy(path.as_bytes(), kind, value).await.map_err(|error| failure(path, error))
}

fn print(
    context: &Context,
    path: &ClusterPath,
    found: &DirectoryPolicies,
    changed: Option<&Vec<String>>,
    json: bool,
) -> Outcome {
    let mut out = context.out();
    if json {
        let JsonPath { path, path_hex } = JsonPath::of(path.as_bytes());
        let text = |policies: &Policies| {
            let text = KINDS
                .iter()
                .map(|(name, kind)| ((*name).to_owned(), policy_text::text(policies, *kind).into()));
            Value::Object(text.collect())
        };
        let mut document = json!({
            "path": path,
            "own": policies::json(&found.own),
            "effective": policies::json(&found.effective),
            "text": text(&found.effective),
        });
        if let Some(hex) = path_hex {
            document["path_hex"] = hex.into();
        }
        if let Some(warnings) = changed {
            document["warnings"] = json!(warnings);
        }
        out.json(&document)?;
    } else {
        for (name, text, own) in policies::lines(found) {
            out.line(format_args!("{name}={text}{}", if own { "" } else { " (inherited)" }))?;
        }
        if let Some(warnings) = changed {
            for warning in warnings {
                out.line(format_args!("warning: {warning}"))?;
            }
            out.line(format_args!(
                "note: this holds for new files; `eggsctl restripe {path}` rewrites those that are there"
            ))?;
        }
    }
    out.finish()
}

/// What the cluster has not got that these policies ask for.
async fn warnings(client: &Client, policies: &Policies) -> Outcome<Vec<String>> {
    let map = client.cluster_map().await.map_err(|error| failure("", error))?;
    Ok(shortages(policies, &map.block_services))
}

/// What disks there are too few of for what these policies ask for.
pub(crate) fn shortages(policies: &Policies, disks: &[BlockServiceInfo]) -> Vec<String> {
    let (Some(span), Some(block)) = (&policies.span, &policies.block) else { return Vec::new() };
    let mut warnings = Vec::new();
    for rule in span.rules.iter().filter(|rule| rule.data > 0) {
        let size = rule.max_size.div_ceil(rule.data);
        let class =
            block.rules.iter().find(|rule| rule.max_size >= size).map_or(0, |rule| rule.storage_class);
        let usable = |disk: &&BlockServiceInfo| {
            disk.storage_class == class && flags::writable(disk.flags) && !disk.read_only
        };
        let usable: Vec<&BlockServiceInfo> = disks.iter().filter(usable).collect();
        let domains: BTreeSet<&str> = usable.iter().map(|disk| disk.failure_domain.as_str()).collect();
        let needed = (rule.data + rule.parity) as usize;
        let (layout, class) = (policy_text::layout(rule.data, rule.parity), class_name(class));
        if usable.len() < needed {
            warnings.push(format!(
                "{layout} needs {needed} {class} disks, there are {}: such files can neither be written nor moved",
                usable.len()
            ));
        } else if domains.len() < needed {
            warnings.push(format!(
                "{layout} needs {needed} failure domains with {class} disks, there are {}: spans will be under-spread",
                domains.len()
            ));
        }
    }
    warnings.dedup();
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks(count: u64, domains: u64) -> Vec<BlockServiceInfo> {
        let disk = |n| BlockServiceInfo {
            id: n,
            storage_class: 3,
            failure_domain: format!("d{}", n % domains),
            ..BlockServiceInfo::default()
        };
        (0..count).map(disk).collect()
    }

    #[test]
    fn too_few_disks_or_domains_are_warned_of() {
        let policies = eggs_proto::policy::defaults();
        assert_eq!(shortages(&policies, &disks(6, 6)), Vec::<String>::new());
        let [few] = &shortages(&policies, &disks(5, 5))[..] else { panic!() };
        assert!(few.contains("4+2 needs 6 FLASH disks, there are 5"), "{few}");
        let [near] = &shortages(&policies, &disks(8, 4))[..] else { panic!() };
        assert!(near.contains("under-spread"), "{near}");
        let mut broken = disks(6, 6);
        broken[0].flags = flags::NO_WRITE;
        assert_eq!(shortages(&policies, &broken).len(), 1);
    }
}
