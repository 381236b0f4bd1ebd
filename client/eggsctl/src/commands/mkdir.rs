//! `mkdir`: makes directories.

use clap::Args;
use eggs_client::{Client, NewAttributes};

use super::chmod::octal_mode;
use crate::context::{Context, attributes, failure};
use crate::failure::{Failure, Operands, Outcome};
use crate::paths::ClusterPath;

/// Make directories
#[derive(Debug, Args)]
pub struct Mkdir {
    /// Make the directories on the way too, all at once; one that exists is fine
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

async fn make_with_parents(client: &Client, path: &ClusterPath, last: NewAttributes) -> Outcome {
    let made = client.mkdir_all_with(path.as_bytes(), Some(last)).await;
    made.map(drop).map_err(|error| failure(path, error))
}
