//! A mixed load that knows what must come back: clients that change names of their own and check every answer.
//!
//! Each client is the only one that changes its names, one operation at a time, so its history is a sequence and
//! what it reads can be checked at once against a register per name ([`model`]). A call that failed may or may not
//! have happened, or happen later: its names are left alone from then on, looked at, and in the end must be as
//! before or as after it, never anything else. Reads go through the client's own connections or through its
//! neighbour's, which may still believe in another leader.
//!
//! Every second client is impatient: its calls fail while a fault lasts, which makes unknown outcomes. The patient
//! ones must never see a failure as long as a majority lives.
//!
//! Reading order: this file, `model`, `worker` (what a client does), `gaps` (how long it had to wait).

mod gaps;
mod model;
mod worker;

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use eggs_client::{Client, Options};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

pub use gaps::Phase;
use gaps::Timeline;
use worker::Worker;

/// Waits for an election, a restart, and a machine that is busy with other things.
const PATIENT: Duration = Duration::from_secs(60);
/// Shorter than a fault lasts.
const IMPATIENT: Duration = Duration::from_millis(1500);

/// What to load, and how.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// HOST:PORT, all of them.
    pub shuckle: Vec<String>,
    pub clients: usize,
    /// A directory of the root for this load alone.
    pub root: String,
}

/// A load that is going on.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<Done>>,
    acknowledged: Arc<AtomicU64>,
    phases: Mutex<Vec<(Instant, String)>>,
}

/// What one client had to say in the end.
#[derive(Debug)]
struct Done {
    timeline: Timeline,
    violations: Vec<String>,
    patient: bool,
}

/// What all clients saw.
#[derive(Debug)]
pub struct LoadReport {
    /// Operations answered.
    pub acknowledged: usize,
    /// Calls whose outcome is unknown, of clients that give up soon.
    pub unknown: usize,
    /// Failed calls of clients that wait for long: there should be none while a majority lives.
    pub failures: Vec<String>,
    /// What must never be: a lost write, a wrong read.
    pub violations: Vec<String>,
    /// In the order they began.
    pub phases: Vec<Phase>,
}

impl Load {
    /// Makes the clients' directories and lets them loose. The sockets are of `runtime`'s threads.
    ///
    /// # Panics
    /// When the cluster does not serve yet.
    pub fn start(runtime: &Runtime, options: &LoadOptions) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let wanted = options.clone();
        let workers = on(runtime, async move {
            let mut clients = Vec::new();
            for number in 0..wanted.clients {
                clients.push(connect(&wanted, if patient(number) { PATIENT } else { IMPATIENT }).await);
            }
            let setup = connect(&wanted, PATIENT).await;
            setup.mkdir_all(&wanted.root).await.expect("the load's directory");
            let mut workers = Vec::new();
            for number in 0..wanted.clients {
                // As patient as this one.
                let other = clients[(number + 2) % wanted.clients].clone();
                let home = format!("{}/c{number}", wanted.root);
                workers.push(Worker::new(number, clients[number].clone(), other, setup.clone(), home).await);
            }
            workers
        });
        let spawn = |worker: Worker| {
            let (stop, acknowledged) = (Arc::clone(&stop), Arc::clone(&acknowledged));
            runtime.spawn(worker.run(stop, acknowledged))
        };
        let workers = workers.into_iter().map(spawn).collect();
        let begun = Mutex::new(vec![(Instant::now(), "calm".to_owned())]);
        Load { stop, workers, acknowledged, phases: begun }
    }

    /// What happens from now on has this name in the report.
    pub fn phase(&self, name: impl Into<String>) {
        let mut phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner);
        phases.push((Instant::now(), name.into()));
    }

    /// Operations answered so far, of all clients.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Ends it, compares everything with what the clients know, and reports. The cluster must be whole.
    ///
    /// # Panics
    /// When a client's task does.
    pub fn finish(self, runtime: &Runtime) -> LoadReport {
        self.stop.store(true, Ordering::Relaxed);
        let workers = self.workers;
        let done = on(runtime, async move {
            let mut done = Vec::new();
            for worker in workers {
                done.push(worker.await.expect("a client"));
            }
            done
        });
        let phases = self.phases.into_inner().unwrap_or_else(PoisonError::into_inner);
        let timelines: Vec<&Timeline> = done.iter().map(|done| &done.timeline).collect();
        let phases = gaps::phases(&phases, &timelines);
        let failed = |wanted: bool| {
            let these = done.iter().filter(move |done| done.patient == wanted);
            these.flat_map(|done| done.timeline.failures().map(str::to_owned))
        };
        LoadReport {
            acknowledged: timelines.iter().map(|timeline| timeline.len()).sum(),
            unknown: failed(false).count(),
            failures: failed(true).collect(),
            violations: done.iter().flat_map(|done| done.violations.iter().cloned()).collect(),
            phases,
        }
    }
}

impl LoadReport {
    /// The longest gap of the phases whose name begins so.
    pub fn longest(&self, name: &str) -> Option<Duration> {
        self.phases.iter().filter(|phase| phase.name.starts_with(name)).map(|phase| phase.longest).max()
    }

    /// A table for people: kinds of phases (the words before a colon), how often, and the longest gap.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<28} {:>5} {:>12} {:>12} {:>8}  {}\n",
            "phase", "times", "longest gap", "median gap", "unknown", "in the longest"
        );
        let mut kinds: Vec<&str> = Vec::new();
        for phase in &self.phases {
            if !kinds.contains(&phase.kind()) {
                kinds.push(phase.kind());
            }
        }
        for kind in kinds {
            let mut these: Vec<&Phase> = self.phases.iter().filter(|phase| phase.kind() == kind).collect();
            these.sort_by_key(|phase| phase.longest);
            let (Some(worst), median) = (these.last(), these[these.len() / 2].longest) else { continue };
            let failures: usize = these.iter().map(|phase| phase.failures).sum();
            let (longest, median) = (milliseconds(worst.longest), milliseconds(median));
            let _ = writeln!(
                text,
                "{kind:<28} {:>5} {longest:>12} {median:>12} {failures:>8}  {}",
                these.len(),
                worst.what
            );
        }
        text
    }

    /// # Panics
    /// When something was lost, wrong, or failed for those who wait.
    pub fn assert_right(&self) {
        assert!(self.violations.is_empty(), "{}", self.violations.join("\n"));
        assert!(self.failures.is_empty(), "{}", self.failures.join("\n"));
    }
}

fn milliseconds(time: Duration) -> String {
    format!("{} ms", time.as_millis())
}

fn patient(number: usize) -> bool {
    number.is_multiple_of(2)
}

async fn connect(options: &LoadOptions, timeout: Duration) -> Client {
    let patient =
        Options { shuckle: options.shuckle.clone(), timeout: PATIENT.max(timeout), ..Options::default() };
    // Who cannot even begin would be no client.
    drop(Client::connect(patient).await.expect("connect"));
    let options = Options { shuckle: options.shuckle.clone(), timeout, ..Options::default() };
    Client::connect(options).await.expect("connect")
}

/// Runs it on the runtime's own threads, which may live in another network than this one.
fn on<T: Send + 'static>(runtime: &Runtime, future: impl Future<Output = T> + Send + 'static) -> T {
    runtime.block_on(runtime.spawn(future)).expect("a task")
}
