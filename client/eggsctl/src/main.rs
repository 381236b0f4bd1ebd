//! `eggsctl`, the EggsFS command line.
//!
//! Reading order: `cli` (what can be typed), `commands/` (one file each), then what they share:
//! `context` (the cluster), `failure` (errors and exit codes), `output`, `paths`, `times`, `tree`
//! (whole directories in parallel), `transfer` (what `put` and `get` have in common).

mod cli;
mod commands;
mod context;
mod failure;
mod logs;
mod members;
mod output;
mod paths;
mod place;
mod policies;
mod policy_text;
mod progress;
mod spread;
mod times;
mod transfer;
mod tree;

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::{Cli, Command};
use crate::context::Context;
use crate::failure::{DONE, Failure, Outcome};

/// How long background work of the library may take after a command is over.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Tasks that were dropped half-way get this long to take away their temporary files.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let Cli { global, command } = Cli::parse();
    let name = command.name();
    if !command.is_up() {
        logs::start(global.verbose);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            Failure::io("cannot start threads", &error).print(name);
            return ExitCode::FAILURE;
        }
    };
    let context = Context::new(name, global);
    let code = runtime.block_on(run(command, &context));
    // A task that reads standard input never ends by itself; nothing else may be left.
    runtime.shutdown_timeout(CLEANUP_TIMEOUT);
    ExitCode::from(code)
}

async fn run(command: Command, context: &Context) -> u8 {
    let code = if command.handles_signals() {
        report(command.run(context).await, context)
    } else {
        tokio::select! {
            outcome = command.run(context) => report(outcome, context),
            signal = interrupted() => 128 + signal,
        }
    };
    output::take_bar();
    let patience = if code < 128 { CLOSE_TIMEOUT } else { CLEANUP_TIMEOUT };
    context.close(patience).await;
    code
}

fn report(outcome: Outcome, context: &Context) -> u8 {
    match outcome {
        Ok(()) => DONE,
        Err(failure) => {
            failure.print(context.command);
            failure.exit_code()
        }
    }
}

/// The number of the signal that ends this process.
async fn interrupted() -> u8 {
    const SIGINT: u8 = 2;
    const SIGTERM: u8 = 15;
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => tokio::select! {
            _ = interrupt.recv() => SIGINT,
            _ = terminate.recv() => SIGTERM,
        },
        // Without handlers the signal ends the process anyway.
        _ => std::future::pending().await,
    }
}
