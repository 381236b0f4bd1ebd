//! `ln -s`: symbolic links.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;

use clap::Args;
use eggs_client::Replace;

use crate::context::{Context, create_options, failure};
use crate::failure::{Failure, Outcome};
use crate::paths::ClusterPath;

/// Make a symbolic link
#[derive(Debug, Args)]
pub struct Ln {
    /// Make a symbolic link (there are no others)
    #[arg(short, long, required = true)]
    symbolic: bool,
    /// Replace a file or link of that name
    #[arg(short, long)]
    force: bool,
    /// What the link says; it need not exist
    #[arg(value_name = "TARGET")]
    target: OsString,
    /// The link; in a directory it gets the name of TARGET
    #[arg(value_name = "PATH", value_parser = ClusterPath::parser())]
    path: ClusterPath,
}

impl Ln {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let target = self.target.as_bytes();
        let mut path = self.path.clone();
        if path.is_root() || super::mv::is_directory(client, &path).await? {
            let name = target.rsplit(|&byte| byte == b'/').find(|name| !name.is_empty());
            let name = name.ok_or_else(|| Failure::refused(&path, "file exists"))?;
            eggs_proto::names::validate(name).map_err(|error| Failure::refused(&path, error))?;
            path = path.join(name);
        }
        let replace = if self.force { Replace::File } else { Replace::Refuse };
        let options = create_options(0o777, None, replace);
        client.symlink(path.as_bytes(), target, &options).await.map_err(|error| failure(&path, error))?;
        Ok(())
    }
}
