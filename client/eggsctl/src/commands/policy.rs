//! `policy`: how the files of a directory are stored and kept.

use clap::{Args, Subcommand};
use serde_json::json;

use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::Outcome;
use crate::output::JsonPath;
use crate::paths::ClusterPath;
use crate::policies;

/// Look at policies: how files are cut, stored and kept
#[derive(Debug, Args)]
pub struct Policy {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Print the policies that hold in a directory, and which of them are set on it
    Get(PolicyGet),
}

#[derive(Debug, Args)]
struct PolicyGet {
    #[command(flatten)]
    json: JsonFlag,
    /// The directory
    #[arg(value_name = "PATH", value_parser = ClusterPath::parser())]
    path: ClusterPath,
}

impl Policy {
    pub async fn run(self, context: &Context) -> Outcome {
        let PolicyCommand::Get(get) = self.command;
        let client = context.client().await?;
        let found = client.policies(get.path.as_bytes()).await.map_err(|error| failure(&get.path, error))?;
        let mut out = context.out();
        if get.json.json {
            let JsonPath { path, path_hex } = JsonPath::of(get.path.as_bytes());
            let mut document = json!({
                "path": path,
                "own": policies::json(&found.own),
                "effective": policies::json(&found.effective),
            });
            if let Some(hex) = path_hex {
                document["path_hex"] = hex.into();
            }
            out.json(&document)?;
        } else {
            for (name, text, own) in policies::lines(&found) {
                out.line(format_args!("{name}={text}{}", if own { "" } else { " (inherited)" }))?;
            }
        }
        out.finish()
    }
}
