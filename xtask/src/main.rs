//! What developers run daily: `cargo xtask ci | test | sim | dev | bench | docs`.
//!
//! Reading order: this file (what can be typed), `steps` (running cargo with names and timings), then `ci` and what it
//! checks by itself (`layers`, `docs`), `dev`, and `programs`: those behind `sim` (simulation/) and
//! `bench` (xtask/bench/).

mod ci;
mod dev;
mod docs;
mod layers;
mod programs;
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
    /// Run the simulation: --seed N replays, --seeds A..B looks for trouble, --bug NAME plants some
    Sim(programs::Sim),
    /// Build eggsctl and run a cluster in a directory that is thrown away
    Dev(dev::Dev),
    /// Gather the crates' invariants in docs/ARCHITECTURE.md
    Docs(docs::Docs),
    /// Measure a release build of a cluster and print the figures beside their floors
    Bench(programs::Rest),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Ci(command) => command.run(),
        Command::Test(command) => command.run(),
        Command::Sim(command) => command.run(),
        Command::Dev(command) => command.run(),
        Command::Docs(command) => command.run(),
        Command::Bench(rest) => programs::bench(&rest),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
