//! The programs behind `sim` and `bench`: built, then run.
//!
//! `cargo xtask` itself is a development build of few dependencies, so that it starts at once. Figures need the
//! release build; the simulation runs some ten seeds in a second as it is.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::steps::{cargo, run};

/// What the program behind a command takes; its own help says what.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

/// Load the release build of a cluster and print figures beside their floors.
pub fn bench(rest: &Rest) -> Result<()> {
    let packages = ["eggsctl", "eggs-blockd", "eggs-bench"].map(|package| ["--package", package]);
    run(cargo(&[&["build", "--release", "--locked"], packages.as_flattened()].concat()))?;
    let error = Command::new(binary("release", "eggs-bench")?).args(&rest.arguments).exec();
    bail!("cannot run eggs-bench: {error}");
}

/// Replays a seed or looks for trouble in a range of them.
#[derive(Debug, Args)]
pub struct Sim {
    /// Optimise: worth it from thousands of seeds on
    #[arg(long)]
    release: bool,
    #[command(flatten)]
    rest: Rest,
}

impl Sim {
    pub fn run(&self) -> Result<()> {
        let mut build = vec!["build", "--locked", "--package", "eggs-simulation"];
        build.extend(self.release.then_some("--release"));
        run(cargo(&build))?;
        let mut simulation = Command::new(binary(profile(self.release), "eggs-simulation")?);
        simulation.args(&self.rest.arguments);
        run(simulation)
    }
}

fn profile(release: bool) -> &'static str {
    if release { "release" } else { "debug" }
}

/// A program that was built.
pub fn binary(profile: &str, name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("where this program lies")?;
    let target = own.parent().and_then(|profile| profile.parent()).context("no target directory")?;
    Ok(target.join(profile).join(name))
}
