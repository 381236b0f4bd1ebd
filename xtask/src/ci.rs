//! `cargo xtask ci` and `cargo xtask test`.

use std::process::Command;

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::docs;
use crate::layers;
use crate::programs;
use crate::steps::{Steps, cargo, cargo_has, run};

/// Seeds of the simulation that every change must pass.
const SEEDS: &str = "1..50";

/// Where `tests/` finds the programs.
const BIN_DIR: &str = "EGGS_BIN_DIR";

/// What `cargo deny` can check without a network: the advisories need a clone of a database.
const DENY_OFFLINE: &[&str] = &["deny", "--locked", "check", "bans", "licenses", "sources"];
const DENY: &[&str] = &["deny", "--locked", "check"];

#[derive(Debug, Args)]
pub struct Ci {
    /// Leave a step out; repeatable
    #[arg(long, value_name = "STEP")]
    skip: Vec<Step>,
    /// Check the advisories too (needs the network)
    #[arg(long)]
    advisories: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Step {
    Fmt,
    Clippy,
    Layers,
    Docs,
    Deny,
    Test,
    Sim,
}

impl Ci {
    pub fn run(&self) -> Result<()> {
        let mut steps = Steps::default();
        for step in [Step::Fmt, Step::Clippy, Step::Layers, Step::Docs, Step::Deny, Step::Test, Step::Sim] {
            if self.skip.contains(&step) {
                continue;
            }
            match step {
                Step::Fmt => steps.step("fmt", || run(cargo(&["fmt", "--all", "--check"]))),
                Step::Clippy => steps.step("clippy", || run(clippy())),
                Step::Layers => steps.step("layers", layers::check),
                Step::Docs => steps.step("docs", docs::check),
                Step::Deny => steps.step("deny", || self.deny()),
                Step::Test => steps.step("test", test),
                Step::Sim => steps.step("sim", sim),
            }
        }
        steps.finish()
    }

    fn deny(&self) -> Result<()> {
        if !cargo_has("deny") {
            anyhow::bail!("cargo-deny is not installed: cargo install --locked cargo-deny");
        }
        run(cargo(if self.advisories { DENY } else { DENY_OFFLINE }))
    }
}

fn clippy() -> Command {
    cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])
}

#[derive(Debug, Args)]
pub struct Test {}

impl Test {
    #[expect(clippy::unused_self, reason = "the shape of every command")]
    pub fn run(&self) -> Result<()> {
        test()
    }
}

/// One build for the programs, the tests and the simulation: built apart they would build their dependencies apart.
fn build() -> Result<()> {
    run(cargo(&["build", "--workspace", "--all-targets", "--locked"]))
}

/// The tests in `tests/` run the programs themselves: those just built, unless `EGGS_BIN_DIR` says otherwise.
fn test() -> Result<()> {
    build()?;
    let mut tests = if cargo_has("nextest") {
        cargo(&["nextest", "run", "--workspace", "--locked", "--no-fail-fast"])
    } else {
        eprintln!("cargo-nextest is not installed: going on with cargo test, which is slower");
        cargo(&["test", "--workspace", "--locked", "--no-fail-fast"])
    };
    if std::env::var_os(BIN_DIR).is_none() {
        tests.env(BIN_DIR, programs::binary("debug", "")?);
    }
    run(tests)
}

fn sim() -> Result<()> {
    build()?;
    let mut simulation = Command::new(programs::binary("debug", "eggs-simulation")?);
    simulation.args(["--seeds", SEEDS]);
    run(simulation)
}
