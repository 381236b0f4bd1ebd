//! `cargo xtask dev`: a cluster of the development build, in a directory that is thrown away.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::steps::{cargo, run};

#[derive(Debug, Args)]
pub struct Dev {
    /// Keep the cluster here instead of in a directory that is removed at the end
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Further arguments of `eggsctl up`, after `--`
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Dev {
    pub fn run(&self) -> Result<()> {
        run(cargo(&["build", "--locked", "--package", "eggsctl"]))?;
        let own = std::env::current_exe().context("where this program lies")?;
        let eggsctl = own.with_file_name("eggsctl");
        let scratch = match self.data {
            Some(_) => None,
            None => Some(tempfile::Builder::new().prefix("eggsfs-dev-").tempdir()?),
        };
        let data = match (&self.data, &scratch) {
            (Some(data), _) => data.clone(),
            (None, Some(scratch)) => scratch.path().join("cluster"),
            (None, None) => bail!("no directory"),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let status = runtime.block_on(async {
            let mut cluster = tokio::process::Command::new(eggsctl);
            cluster.arg("up").arg("--data").arg(&data).args(&self.arguments).stdin(Stdio::null());
            let mut cluster = cluster.spawn().context("cannot run eggsctl")?;
            // An interrupt reaches the cluster too, which drains and ends; only then may the directory go.
            loop {
                tokio::select! {
                    status = cluster.wait() => return anyhow::Ok(status?),
                    interrupted = tokio::signal::ctrl_c() => interrupted?,
                }
            }
        })?;
        if !status.success() {
            bail!("eggsctl up: {status}");
        }
        Ok(())
    }
}
