//! `mkdir`: makes directories.

use clap::Args;
use eggs_client::{Client, NewAttributes, Refusal};

use super::chmod::octal_mode;
use crate::context::{Context, attributes, failure};
use crate::failure::{Failure, Operands, Outcome};
use crate::paths::ClusterPath;

/// Make directories
#[derive(Debug, Args)]
pub struct Mkdir {
    /// Make the directories on the way too; one that exists is fine
    #[arg(short, long)]
    parents: bool,
    /// Permissions of the new directories, octal
    #[arg(short, long, value_name = "MODE", default_value = "0755", value_parser = octal_mode)]
    mode: u32,
    /// Directories to make
    #[arg(required = true, value_name = "PATH", value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

impl Mkdir {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let mut operands = Operands::new(context.command);
        for path in &self.paths {
            let made = if self.parents {
                make_with_parents(client, path, attributes(self.mode, None)).await
            } else {
                make(client, path, attributes(self.mode, None)).await
            };
            operands.note(made)?;
        }
        operands.finish()
    }
}

async fn make(client: &Client, path: &ClusterPath, attributes: NewAttributes) -> Outcome {
    if path.is_root() {
        return Err(Failure::refused(path, "file exists"));
    }
    client.mkdir(path.as_bytes(), Some(attributes)).await.map(drop).map_err(|error| failure(path, error))
}

/// Mostly everything but the last few is there, so the last is tried first.
async fn make_with_parents(client: &Client, path: &ClusterPath, last: NewAttributes) -> Outcome {
    // Up and down again; more only when somebody else removes what was just made.
    let mut tries = 4 * path.components().count() + 4;
    let mut missing = vec![path.clone()];
    while let Some(path) = missing.last().cloned() {
        if path.is_root() {
            missing.pop();
            continue;
        }
        tries = tries.saturating_sub(1);
        let attributes = if missing.len() == 1 { last } else { attributes(0o755, None) };
        match client.mkdir(path.as_bytes(), Some(attributes)).await {
            Ok(_) => drop(missing.pop()),
            Err(error) if error.is_not_found() && tries > 0 => missing.push(path.parent()),
            Err(error) if error.is_exists() => {
                client.directory(path.as_bytes()).await.map_err(|found| match found.refusal() {
                    Some(Refusal::NotDirectory | Refusal::NotFound) => failure(&path, error),
                    _ => failure(&path, found),
                })?;
                missing.pop();
            }
            Err(error) => return Err(failure(&path, error)),
        }
    }
    Ok(())
}
