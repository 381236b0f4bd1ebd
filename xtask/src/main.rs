//! What developers run daily: `cargo xtask ci | test | sim | dev | bench`.
//!
//! Reading order: this file (what can be typed), `steps` (running cargo with names and timings), then one file per
//! command. `bench/` is the only part with ideas of its own: it starts a real cluster and loads it through the
//! client library.

mod bench;
mod ci;
mod dev;
mod layers;
mod release;
mod sim;
mod steps;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "What developers of EggsFS run daily", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Everything that must be green before a change goes in: formatting, lints, licences, tests, simulation
    Ci(ci::Ci),
    /// Build the binaries and run every test (with cargo-nextest when it is there, with cargo test otherwise)
    Test(ci::Test),
    /// Run the simulation for a seed or a range of seeds
    Sim(sim::Sim),
    /// Build eggsctl and run a cluster in a directory that is thrown away
    Dev(dev::Dev),
    /// Measure a release build of a cluster and print the figures beside their floors
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Ci(command) => command.run(),
        Command::Test(command) => command.run(),
        Command::Sim(command) => command.run(),
        Command::Dev(command) => command.run(),
        Command::Bench(command) => command.run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
