//! `cargo xtask sim`: one seed replays a run of the simulation, a range of seeds looks for trouble.

use anyhow::{Result, bail};
use clap::Args;

#[derive(Debug, Args)]
pub struct Sim {
    /// One seed
    #[arg(long, conflicts_with = "seeds", required_unless_present = "seeds")]
    seed: Option<u64>,
    /// A range of seeds, both ends included: 1..200
    #[arg(long, value_name = "A..B")]
    seeds: Option<String>,
    /// Put a bug in on purpose, to see it caught
    #[arg(long, value_name = "NAME")]
    bug: Option<String>,
}

impl Sim {
    pub fn run(&self) -> Result<()> {
        bail!("the simulation has not landed")
    }
}

pub fn sweep_in_child(_seeds: &str) -> Result<()> {
    bail!("the simulation has not landed")
}
