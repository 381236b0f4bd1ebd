//! `man`: manual pages from the same source as `--help`.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use crate::cli::Cli;
use crate::context::Context;
use crate::failure::{Failure, Outcome};

/// Write manual pages, one per command, into a directory
#[derive(Debug, Args)]
pub struct Man {
    /// Directory to write to; made when absent
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

impl Man {
    #[allow(clippy::unused_async)]
    pub async fn run(self, _: &Context) -> Outcome {
        let written = std::fs::create_dir_all(&self.directory)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &self.directory));
        written.map_err(|error| Failure::io(self.directory.display(), &error))
    }
}
