//! Logs. Commands say nothing unless asked with `-v`; `up` logs to a file in its data directory, which
//! is known (and known to be ours) only once the cluster has started.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt};

/// What is kept of the log until there is a file for it.
const HELD_BYTES_MAX: usize = 256 << 10;
/// A log longer than this is set aside when `up` starts.
const LOG_BYTES_MAX: u64 = 16 << 20;
const LOG_VARIABLE: &str = "EGGS_LOG";

/// Logs of every command but `up`: to standard error, as much as asked for.
pub fn start(verbose: u8) {
    let filter = match verbose {
        0 => "error",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    // Fails only when there is a subscriber already.
    let _ = fmt()
        .with_env_filter(filter_or(filter))
        .with_writer(to_stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .try_init();
}

/// Logs of `up`: everything from info to the file it will have, warnings to standard error too.
pub fn start_up(verbose: u8, background: bool) -> LogFile {
    let file = LogFile::default();
    let everything = if verbose == 0 { "info" } else { "debug" };
    let to_file = fmt::layer().with_ansi(false).with_writer(file.clone()).with_filter(filter_or(everything));
    let shown = if background { "off" } else { ["warn", "info", "debug"][usize::from(verbose.min(2))] };
    let to_screen = fmt::layer()
        .with_writer(to_stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .with_filter(EnvFilter::builder().parse_lossy(shown));
    let _ = tracing_subscriber::registry().with(to_file).with(to_screen).try_init();
    file
}

fn filter_or(default: &str) -> EnvFilter {
    match std::env::var(LOG_VARIABLE) {
        Ok(filter) if !filter.is_empty() => EnvFilter::builder().parse_lossy(filter),
        _ => EnvFilter::builder().parse_lossy(default),
    }
}

fn to_stderr() -> io::Stderr {
    io::stderr()
}

/// A log that is held in memory until it has a file.
#[derive(Debug, Clone, Default)]
pub struct LogFile(Arc<Mutex<Sink>>);

#[derive(Debug)]
enum Sink {
    Held(Vec<u8>),
    File(File),
}

impl Default for Sink {
    fn default() -> Sink {
        Sink::Held(Vec::new())
    }
}

impl LogFile {
    /// From here on to `data/log/eggsctl.log`; a long one becomes `eggsctl.log.1` first.
    pub fn open(&self, data: &Path) -> io::Result<PathBuf> {
        let directory = data.join("log");
        std::fs::create_dir_all(&directory)?;
        let path = directory.join("eggsctl.log");
        if std::fs::metadata(&path).is_ok_and(|found| found.len() > LOG_BYTES_MAX) {
            std::fs::rename(&path, directory.join("eggsctl.log.1"))?;
        }
        let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
        let mut sink = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Sink::Held(held) = &*sink {
            file.write_all(held)?;
        }
        *sink = Sink::File(file);
        Ok(path)
    }
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Sink::Held(held) => {
                if held.len() + bytes.len() <= HELD_BYTES_MAX {
                    held.extend_from_slice(bytes);
                }
                Ok(bytes.len())
            }
            Sink::File(file) => file.write_all(bytes).map(|()| bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = LogFile;
    fn make_writer(&'a self) -> LogFile {
        self.clone()
    }
}
