//! A progress bar on standard error: only on a terminal, only when the work takes over a second.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinHandle;

/// Work that is over sooner is not worth a bar.
const SHOWN_AFTER: Duration = Duration::from_secs(1);
const REDRAWN_EVERY: Duration = Duration::from_millis(100);

#[derive(Debug, Default)]
struct Counts {
    files: AtomicU64,
    bytes: AtomicU64,
    /// Grows while the source is being looked through.
    bytes_total: AtomicU64,
    over: AtomicBool,
}

/// Counts what has been done; shows it when there is somebody to see it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Progress {
    counts: Arc<Counts>,
}

/// Takes the bar off the screen when dropped, and ends the search for what is to be done.
#[derive(Debug)]
pub struct Shown {
    task: Option<JoinHandle<()>>,
    counts: Arc<Counts>,
}

impl Progress {
    /// Counts only, never shown.
    pub fn silent() -> Progress {
        Progress { counts: Arc::default() }
    }

    /// Must be called within a runtime.
    pub fn start() -> (Progress, Shown) {
        let progress = Progress::silent();
        let counts = progress.counts.clone();
        let task = std::io::stderr().is_terminal().then(|| tokio::spawn(show(counts.clone())));
        (progress, Shown { task, counts })
    }

    pub fn expect_bytes(&self, bytes: u64) {
        self.counts.bytes_total.fetch_add(bytes, Relaxed);
    }

    /// Adds up local trees aside, when there is somebody to see it.
    pub fn scan(&self, trees: Vec<PathBuf>) {
        if trees.is_empty() || !std::io::stderr().is_terminal() {
            return;
        }
        let counts = self.counts.clone();
        // Not joined: it only makes the bar truer, and ends when the bar does.
        tokio::task::spawn_blocking(move || {
            let files = trees.iter().flat_map(|tree| walkdir::WalkDir::new(tree).min_depth(1));
            for found in files.take_while(|_| !counts.over.load(Relaxed)).flatten() {
                if let Some(metadata) = found.metadata().ok().filter(std::fs::Metadata::is_file) {
                    counts.bytes_total.fetch_add(metadata.len(), Relaxed);
                }
            }
        });
    }

    pub fn bytes(&self, bytes: u64) {
        self.counts.bytes.fetch_add(bytes, Relaxed);
    }

    pub fn files(&self, files: u64) {
        self.counts.files.fetch_add(files, Relaxed);
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.counts.over.store(true, Relaxed);
        if let Some(task) = self.task.take() {
            task.abort();
            crate::output::take_bar();
        }
    }
}

/// One line that says how far something is that is waited for: on a terminal it changes in place, elsewhere
/// there is a new one now and then.
#[derive(Debug)]
pub struct Line {
    bar: Option<ProgressBar>,
    said: Option<(Instant, String)>,
}

/// Between lines where lines stay.
const LINES_EVERY: Duration = Duration::from_secs(5);

impl Line {
    pub fn start() -> Line {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.enable_steady_tick(REDRAWN_EVERY);
            crate::output::set_bar(bar.clone());
            bar
        });
        Line { bar, said: None }
    }

    pub fn say(&mut self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_owned());
            return;
        }
        let old = self.said.as_ref();
        if old.is_none_or(|(at, said)| said != text && at.elapsed() >= LINES_EVERY) {
            crate::output::complain(text);
            self.said = Some((Instant::now(), text.to_owned()));
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.bar.is_some() {
            crate::output::take_bar();
        }
    }
}

async fn show(counts: Arc<Counts>) {
    let started = Instant::now();
    tokio::time::sleep(SHOWN_AFTER).await;
    let bar = ProgressBar::no_length();
    let style = ProgressStyle::with_template("{bar:28} {percent:>3} %  {bytes} of {total_bytes}  {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    crate::output::set_bar(bar.clone());
    loop {
        let bytes = counts.bytes.load(Relaxed);
        let total = counts.bytes_total.load(Relaxed).max(bytes);
        bar.set_length(total);
        bar.set_message(rest(counts.files.load(Relaxed), bytes, total, started.elapsed()));
        bar.set_position(bytes);
        tokio::time::sleep(REDRAWN_EVERY).await;
    }
}

/// Files done, speed so far, time left at that speed.
fn rest(files: u64, bytes: u64, total: u64, elapsed: Duration) -> String {
    let files = if files > 0 { format!("{files} files  ") } else { String::new() };
    let per_second = bytes as f64 / elapsed.as_secs_f64().max(0.001);
    let speed = format!("{files}{}/s", crate::output::size(per_second as u64));
    let left = (total.saturating_sub(bytes)) as f64 / per_second;
    match Duration::try_from_secs_f64(left.ceil()) {
        Ok(left) if bytes > 0 => format!("{speed}  {} left", humantime::format_duration(left)),
        _ => speed,
    }
}

/// Does the work; when it takes a while, says in a line how far it is.
pub async fn beside<T>(so_far: impl Fn() -> String, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    let mut line = None;
    loop {
        match tokio::time::timeout(SHOWN_AFTER, &mut work).await {
            Ok(done) => return done,
            Err(_) => line.get_or_insert_with(Line::start).say(&so_far()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_said_at_the_speed_so_far() {
        let second = Duration::from_secs(1);
        assert_eq!(rest(0, 1 << 20, 3 << 20, second), "1.0 MiB/s  2s left");
        assert_eq!(rest(7, 1 << 20, 1 << 20, second), "7 files  1.0 MiB/s  0s left");
        assert_eq!(rest(0, 0, 1 << 20, second), "0 B/s");
        assert_eq!(rest(0, 0, 0, Duration::ZERO), "0 B/s");
        // Half a minute for one byte: the time left has no end worth printing.
        assert!(rest(0, 1, u64::MAX, 30 * second).contains("/s"));
    }
}
