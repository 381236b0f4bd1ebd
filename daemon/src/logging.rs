//! Logs to stderr, and what a panic does.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Sends logs that pass `filter` (see `EGGS_LOG`) to stderr, and makes a panic in any thread end the
/// process (DA-4). Later calls change nothing.
///
/// # Errors
/// When `filter` is not one: one line that says where.
pub fn init(filter: &str, format: Format) -> Result<(), String> {
    let filter = parse(filter)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // An error means that a subscriber is set already (an embedding program's): theirs stays.
    let _ = match format {
        Format::Text => builder.with_ansi(std::io::stderr().is_terminal()).with_target(false).try_init(),
        Format::Json => builder.json().flatten_event(true).try_init(),
    };
    abort_on_panic();
    Ok(())
}

/// Checks a filter without using it.
pub fn parse(filter: &str) -> Result<EnvFilter, String> {
    EnvFilter::builder().parse(filter).map_err(|error| {
        format!("'{filter}' is not a log filter ({error}): a level (error, warn, info, debug, trace) or module=level, …")
    })
}

/// A panic is logged with its place, then the process aborts: a daemon in an unknown state must not
/// go on answering.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        let message = info
            .payload()
            .downcast_ref::<&str>()
            .map(ToString::to_string)
            .or_else(|| info.payload().downcast_ref::<String>().cloned())
            .unwrap_or_default();
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current().name().unwrap_or("unnamed").to_owned();
        let backtrace = std::backtrace::Backtrace::capture();
        tracing::error!(%message, %place, %thread, %backtrace, "panic, aborting");
        std::process::abort();
    }));
}
