//! Building and running programs of the release build.
//!
//! `cargo xtask` itself is a development build of few dependencies, so that it starts at once. Figures and long
//! simulations come from programs of their own, optimised.

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
    build(&["eggsctl", "eggs-bench"])?;
    let error = Command::new(binary("eggs-bench")?).args(&rest.arguments).exec();
    bail!("cannot run eggs-bench: {error}");
}

/// One seed replays a run of the simulation, a range of seeds looks for trouble.
pub fn sim(rest: &Rest) -> Result<()> {
    build(&["eggs-simulation"])?;
    let mut simulation = Command::new(binary("eggs-simulation")?);
    simulation.args(&rest.arguments);
    run(simulation)
}

/// The seeds that every change must pass.
pub fn sim_seeds(range: &str) -> Result<()> {
    sim(&Rest { arguments: vec!["--seeds".into(), range.into()] })
}

fn build(packages: &[&str]) -> Result<()> {
    let mut arguments = vec!["build", "--release", "--locked"];
    for package in packages {
        arguments.extend(["--package", package]);
    }
    run(cargo(&arguments))
}

/// A program of the release build.
fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("where this program lies")?;
    let target = own.parent().and_then(|profile| profile.parent()).context("no target directory")?;
    Ok(target.join("release").join(name))
}
