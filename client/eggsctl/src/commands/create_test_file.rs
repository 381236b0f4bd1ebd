//! `create-test-file`: a small file stored in every way there is.

use clap::Args;

use crate::context::{Context, failure};
use crate::failure::Outcome;
use crate::paths::ClusterPath;

/// Make a small file of three spans, each stored another way
///
/// Its contents are `hello, world` and ten zero bytes: one span in the metadata, one in blocks, one
/// empty. Handy for looking at `eggsctl stat`, and for tests.
#[derive(Debug, Args)]
pub struct CreateTestFile {
    /// The file to make
    #[arg(value_name = "PATH", value_parser = ClusterPath::parser())]
    path: ClusterPath,
}

impl CreateTestFile {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let path = &self.path;
        client.create_test_file(path.as_bytes()).await.map_err(|error| failure(path, error))?;
        Ok(())
    }
}
