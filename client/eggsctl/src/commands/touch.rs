//! `touch`: modification times; makes empty files.

use bytes::Bytes;
use clap::Args;
use eggs_client::{AttributeChanges, Client, Replace};
use eggs_proto::Time;

use crate::context::{Context, create_options, failure};
use crate::failure::{Operands, Outcome};
use crate::paths::ClusterPath;
use crate::times;

/// Set modification times; a file that does not exist is made, empty
#[derive(Debug, Args)]
pub struct Touch {
    /// Do not make files
    #[arg(short = 'c', long)]
    no_create: bool,
    /// The time to set, instead of now
    #[arg(short = 'd', long, value_name = "TIME", value_parser = times::typed)]
    date: Option<Time>,
    /// Files and directories
    #[arg(required = true, value_name = "PATH", value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

impl Touch {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let mut operands = Operands::new(context.command);
        for path in &self.paths {
            operands.note(self.touch(client, path).await)?;
        }
        operands.finish()
    }

    async fn touch(&self, client: &Client, path: &ClusterPath) -> Outcome {
        let mtime = self.date.unwrap_or_else(times::now);
        let changes = AttributeChanges { mtime: Some(mtime), ..AttributeChanges::default() };
        match client.set_attributes(path.as_bytes(), changes).await {
            Err(error) if error.is_not_found() && self.no_create => Ok(()),
            Err(error) if error.is_not_found() => {
                let options = create_options(0o644, Some(mtime), Replace::Refuse);
                let made = client.put_bytes(path.as_bytes(), Bytes::new(), &options).await;
                made.map(drop).map_err(|error| failure(path, error))
            }
            outcome => outcome.map_err(|error| failure(path, error)),
        }
    }
}
