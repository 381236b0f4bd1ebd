//! SIGINT and SIGTERM: the first asks the daemon to drain, the second ends it on the spot.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit code after the second signal: 128 + SIGINT, as shells report it.
const IMPATIENT: i32 = 130;

/// A token that is cancelled by the first SIGINT or SIGTERM.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn shutdown() -> io::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = CancellationToken::new();
    let told = stop.clone();
    // Not joined: it lives as long as the process, waiting for a signal.
    tokio::spawn(async move {
        for first in [true, false] {
            let name = tokio::select! {
                _ = interrupt.recv() => "SIGINT",
                _ = terminate.recv() => "SIGTERM",
            };
            if first {
                tracing::info!(signal = name, "stopping");
                told.cancel();
            } else {
                tracing::warn!(signal = name, "asked twice, exiting without draining");
                std::process::exit(IMPATIENT);
            }
        }
    });
    Ok(stop)
}
