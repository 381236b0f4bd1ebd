//! Going on in an optimised build of ourselves.
//!
//! `cargo xtask` is a development build, so that it starts quickly. Figures and long simulations need the release
//! build: the same program is built again and takes over.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::steps::{cargo, run};

/// Builds `packages` and ourselves for release and replaces this process by the release build, with the same
/// arguments. Returns when it already is the release build.
pub fn take_over(packages: &[&str]) -> Result<()> {
    let mut arguments = vec!["build", "--release", "--locked", "--package", "xtask"];
    for package in packages {
        arguments.extend(["--package", package]);
    }
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    run(cargo(&arguments))?;
    let program = binary("xtask")?;
    let error = Command::new(&program).args(std::env::args_os().skip(1)).exec();
    bail!("cannot run {}: {error}", program.display());
}

/// A program of the release build.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("where this program lies")?;
    let target = own.parent().and_then(|profile| profile.parent()).context("no target directory")?;
    Ok(target.join("release").join(name))
}
