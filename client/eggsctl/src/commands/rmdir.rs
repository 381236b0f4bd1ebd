//! `rmdir`: removes empty directories.

use clap::Args;

use crate::context::{Context, failure};
use crate::failure::{Operands, Outcome};
use crate::paths::ClusterPath;

/// Remove empty directories
///
/// What was removed stays in the dead map of the directory above (`eggsctl ls --dead`).
#[derive(Debug, Args)]
pub struct Rmdir {
    /// Remove the directories above too, as long as they are empty
    #[arg(short, long)]
    parents: bool,
    /// Directories to remove
    #[arg(required = true, value_name = "PATH", value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

impl Rmdir {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let mut operands = Operands::new(context.command);
        for path in &self.paths {
            let mut path = path.clone();
            loop {
                let removed = client.rmdir(path.as_bytes()).await;
                let done = removed.is_ok();
                operands.note(removed.map(drop).map_err(|error| failure(&path, error)))?;
                path = path.parent();
                if !(self.parents && done) || path.is_root() {
                    break;
                }
            }
        }
        operands.finish()
    }
}
