//! `readlink`: what symbolic links say.

use clap::Args;

use crate::context::{Context, failure};
use crate::failure::{Operands, Outcome};
use crate::paths::ClusterPath;

/// Print what symbolic links say
#[derive(Debug, Args)]
pub struct Readlink {
    /// Links
    #[arg(required = true, value_name = "PATH", value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

impl Readlink {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let mut out = context.out();
        let mut operands = Operands::new(context.command);
        for path in &self.paths {
            match client.read_link(path.as_bytes()).await {
                Ok(target) => out.named_line("", &target, None, b"")?,
                Err(error) => operands.note(Err(failure(path, error)))?,
            }
        }
        out.finish()?;
        operands.finish()
    }
}
