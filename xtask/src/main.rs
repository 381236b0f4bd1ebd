//! What developers run daily: `cargo xtask ci | test | sim | dev | bench | docs`.
//!
//! Reading order: this file (what can be typed), `steps` (running cargo with names and timings), then `ci` and what it
//! checks by itself (`layers`, `docs`), `dev`, and `release`, which builds and runs the programs behind `sim`
//! (simulation/) and `bench` (xtask/bench/).

mod ci;
mod dev;
mod docs;
mod layers;
mod release;
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
    Sim(release::Rest),
    /// Build eggsctl and run a cluster in a directory that is thrown away
    Dev(dev::Dev),
    /// Gather the crates' invariants in docs/ARCHITECTURE.md
    Docs(docs::Docs),
    /// Measure a release build of a cluster and print the figures beside their floors
    Bench(release::Rest),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Ci(command) => command.run(),
        Command::Test(command) => command.run(),
        Command::Sim(rest) => release::sim(&rest),
        Command::Dev(command) => command.run(),
        Command::Docs(command) => command.run(),
        Command::Bench(rest) => release::bench(&rest),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
