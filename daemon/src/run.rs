//! The frame of a daemon's `main`.

use std::future::Future;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};
use tokio_util::sync::CancellationToken;

use crate::args::CommonArgs;
use crate::{config, logging, metrics, signal, systemd};

/// Parses the settings, sets up logs, metrics, signals and the runtime, and runs `daemon` until it
/// returns. `common` says where the common settings are in `A`.
///
/// Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong settings.
pub fn run<A, F>(
    common: impl FnOnce(&A) -> &CommonArgs,
    daemon: impl FnOnce(A, CancellationToken) -> F,
) -> ExitCode
where
    A: CommandFactory + FromArgMatches,
    F: Future<Output = anyhow::Result<()>>,
{
    let settings: A = config::parse();
    let CommonArgs { log, log_format, .. } = common(&settings);
    if let Err(error) = logging::init(log, *log_format) {
        eprintln!("error: {error}");
        return ExitCode::from(config::EXIT_USAGE);
    }
    metrics::install();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        let stop = signal::shutdown()?;
        daemon(settings, stop).await
    });
    systemd::stopping();
    // Everything that must finish was awaited by the daemon; nothing left may keep the process.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
