//! A whole cluster in one deterministic thread: every core, under faults, from one seed.
//!
//! Reading order: [`kernel`] (virtual clock, event queue, network), [`replica`] and [`disk`] (what a crash
//! leaves), `nodes/` (each daemon's shell in plain calls), `client/` (workload, and the janitor), [`world`] (the loop),
//! [`faults`] (never more than the code of every span bears: [`redundancy`]) and [`settling`] (how it comes to rest), `check/` (what must hold; `check/edges.rs` says how a history is checked), [`bug`] (bugs planted to
//! see the checkers find them).
//!
//! One seed makes one run: the same seed and options give the same events in the same order, which the
//! hash of the trace says. All chance comes from one generator, all time from one clock; nothing here
//! reads the machine's clock, environment or entropy.

mod bug;
mod check;
mod client;
mod disk;
mod faults;
mod history;
mod kernel;
mod nodes;
mod oracle;
mod redundancy;
mod replica;
mod settling;
mod trace;
mod world;

use std::collections::BTreeMap;
use std::fmt;
use std::panic::AssertUnwindSafe;

pub use bug::Bug;

use history::Outcome;
use trace::Trace;
use world::World;

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Operations of all clients together; those that only look count too.
    pub operations: usize,
    pub clients: usize,
    /// 2 (the root's is 1) to 256.
    pub shards: usize,
    /// Replicas of every group: 1, 3 or 5; `None`: the seed decides, mostly 3.
    pub replicas: Option<u32>,
    /// Whether leaders answer reads on a lease; `None`: the seed decides.
    pub lease: Option<bool>,
    /// Each has two disks.
    pub block_hosts: usize,
    /// Crashes, partitions, loss, damage.
    pub faults: bool,
    pub bug: Option<Bug>,
    /// Print every event.
    pub print: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            operations: 600,
            clients: 5,
            shards: 8,
            replicas: None,
            lease: None,
            block_hosts: 5,
            faults: true,
            bug: None,
            print: false,
        }
    }
}

/// A run in which all was as it should be.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub seed: u64,
    /// Of everything that happened, in order.
    pub trace_hash: u64,
    pub events: u64,
    /// Virtual time until all was quiet.
    pub virtual_ms: u64,
    /// Of every group.
    pub replicas: u32,
    /// Leaders answered reads on a lease.
    pub lease: bool,
    pub acknowledged: usize,
    pub refused: usize,
    /// Their clients were never told.
    pub unknown: usize,
    /// Acknowledged, refused and unknown by the operation's first word.
    pub kinds: BTreeMap<String, [usize; 3]>,
    pub crashes: u64,
    pub disks_lost: u64,
    /// Spans the janitor repaired while faults went on.
    pub repaired: u64,
    pub blocks_erased: u64,
    /// Of blocks.
    pub bits_flipped: u64,
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Terms that had a leader, of all groups.
    pub elections: usize,
    pub snapshots_sent: u64,
    pub membership_changes: usize,
    /// Stores that were damaged, or whose disk was replaced, and came back as others.
    pub put_aside: usize,
    /// Reads on a lease (or of a group of one), and reads that asked the others.
    pub reads: [u64; 2],
    /// Files compared byte for byte in the end.
    pub files: usize,
    /// Versions of edges, living and dead.
    pub versions: usize,
    /// Histories of one edge or mode that were searched for an order, how many operations are in them, and how many
    /// searches were given up.
    pub searched: [usize; 3],
    /// Heartbeats between stores in ten seconds of rest.
    pub heartbeats: u64,
    /// How long a group took to answer whose leader died asleep; 0: not tried.
    pub wake_ms: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}: {} replicas{}; {} acknowledged, {} refused, {} unknown; {} crashes, {} elections, \
             {} member changes, {} snapshots sent, {} stores put aside, {} disks lost, {} bits flipped, \
             {} spans repaired, {} blocks erased; \
             {} files, \
             {} versions; {} events in {:.1} s, trace {:016x}",
            self.seed,
            self.replicas,
            if self.lease { ", leases" } else { "" },
            self.acknowledged,
            self.refused,
            self.unknown,
            self.crashes,
            self.elections,
            self.membership_changes,
            self.snapshots_sent,
            self.put_aside,
            self.disks_lost,
            self.bits_flipped,
            self.repaired,
            self.blocks_erased,
            self.files,
            self.versions,
            self.events,
            self.virtual_ms as f64 / 1e3,
            self.trace_hash
        )
    }
}

/// Many runs together.
#[derive(Debug, Clone, Default)]
pub struct Totals {
    runs: u64,
    sum: Report,
    wake_ms_max: u64,
    by_replicas: BTreeMap<u32, u64>,
    leases: u64,
}

impl Totals {
    pub fn add(&mut self, report: &Report) {
        self.runs += 1;
        *self.by_replicas.entry(report.replicas).or_default() += 1;
        self.leases += u64::from(report.lease);
        self.wake_ms_max = self.wake_ms_max.max(report.wake_ms);
        let sum = &mut self.sum;
        sum.events += report.events;
        sum.virtual_ms += report.virtual_ms;
        sum.acknowledged += report.acknowledged;
        sum.refused += report.refused;
        sum.unknown += report.unknown;
        sum.crashes += report.crashes;
        sum.disks_lost += report.disks_lost;
        sum.bits_flipped += report.bits_flipped;
        sum.repaired += report.repaired;
        sum.blocks_erased += report.blocks_erased;
        sum.elections += report.elections;
        sum.snapshots_sent += report.snapshots_sent;
        sum.membership_changes += report.membership_changes;
        sum.put_aside += report.put_aside;
        sum.files += report.files;
        sum.versions += report.versions;
        for (sum, part) in sum.searched.iter_mut().zip(report.searched) {
            *sum += part;
        }
        for (sum, part) in sum.reads.iter_mut().zip(report.reads) {
            *sum += part;
        }
        for (&kind, count) in &report.faults {
            *sum.faults.entry(kind).or_default() += count;
        }
        for (kind, counts) in &report.kinds {
            for (sum, part) in sum.kinds.entry(kind.clone()).or_default().iter_mut().zip(counts) {
                *sum += part;
            }
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sum = &self.sum;
        let replicas: Vec<String> =
            self.by_replicas.iter().map(|(replicas, runs)| format!("{runs} of {replicas}")).collect();
        writeln!(f, "runs by replicas: {}; {} with leases", replicas.join(", "), self.leases)?;
        let operations = sum.acknowledged + sum.refused + sum.unknown;
        writeln!(
            f,
            "operations: {operations} ({} acknowledged, {} refused, {} unknown); {} events, {:.1} h of virtual time",
            sum.acknowledged,
            sum.refused,
            sum.unknown,
            sum.events,
            sum.virtual_ms as f64 / 3.6e6
        )?;
        writeln!(
            f,
            "elections: {}; changes of members: {}; snapshots sent: {}; stores put aside: {}",
            sum.elections, sum.membership_changes, sum.snapshots_sent, sum.put_aside
        )?;
        let [leased, asked] = sum.reads;
        writeln!(f, "reads: {leased} at once (lease, or alone), {asked} after asking the others")?;
        let [registers, searched, given_up] = sum.searched;
        writeln!(
            f,
            "histories searched: {registers} of {searched} operations, {given_up} given up; versions held against \
             them: {}; files compared: {}",
            sum.versions, sum.files
        )?;
        writeln!(f, "longest wake of a sleeping group without its leader: {} ms", self.wake_ms_max)?;
        let (lost, flipped) = (sum.disks_lost, sum.bits_flipped);
        writeln!(f, "spans repaired among faults: {}; blocks erased: {}", sum.repaired, sum.blocks_erased)?;
        write!(f, "faults: crashes {}, disks lost {lost}, bits of blocks flipped {flipped}", sum.crashes)?;
        sum.faults.iter().try_for_each(|(kind, count)| write!(f, ", {kind} {count}"))
    }
}

/// A run in which something was wrong.
#[derive(Debug, Clone)]
pub struct Failure {
    pub seed: u64,
    /// What, in words; at least one.
    pub wrong: Vec<String>,
    /// The last events.
    pub trace: Vec<String>,
    pub trace_hash: u64,
    pub events: u64,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "seed {} fails after {} events:", self.seed, self.events)?;
        self.wrong.iter().try_for_each(|wrong| writeln!(f, "  {wrong}"))
    }
}

impl std::error::Error for Failure {}

/// Events a failure shows.
const TRACE_TAIL: usize = 40;

/// Runs one seed to its end and checks everything. A panic of a core is a failure like any other.
///
/// # Errors
/// What was found wrong.
pub fn run(seed: u64, options: &Options) -> Result<Report, Failure> {
    let trace = Trace::new(options.print);
    let attempt = AssertUnwindSafe(|| run_world(seed, options, trace.clone()));
    let result = std::panic::catch_unwind(attempt).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(vec![format!("panic: {}", text.unwrap_or_default())])
    });
    result.map_err(|wrong| Failure {
        seed,
        wrong,
        trace: trace.tail(TRACE_TAIL),
        trace_hash: trace.hash(),
        events: trace.events(),
    })
}

fn run_world(seed: u64, options: &Options, trace: Trace) -> Result<Report, Vec<String>> {
    let one = |wrong: String| vec![wrong];
    let mut world = World::new(seed, options, trace.clone()).map_err(one)?;
    world.run_clients().map_err(one)?;
    world.quiet().map_err(one)?;
    let virtual_ms = world.kernel.now / kernel::MILLISECOND;
    let audited = check::run(&mut world)?;
    let history = world.common.history.borrow();
    let count = |outcome| history.operations.iter().filter(|operation| operation.outcome == outcome).count();
    let mut kinds: BTreeMap<String, [usize; 3]> = BTreeMap::new();
    for operation in &history.operations {
        let kind = operation.what.split(' ').next().unwrap_or_default();
        kinds.entry(kind.to_owned()).or_default()[operation.outcome as usize] += 1;
    }
    let oracle = &world.kernel.oracle;
    let searched = audited.searched;
    Ok(Report {
        seed,
        kinds,
        trace_hash: trace.hash(),
        events: trace.events(),
        virtual_ms,
        replicas: world.cluster.replicas,
        lease: world.cluster.lease,
        acknowledged: count(Outcome::Acknowledged),
        refused: count(Outcome::Refused),
        unknown: count(Outcome::Unknown),
        crashes: world.counts.crashes,
        disks_lost: world.counts.disks_lost,
        repaired: world.common.repaired.get(),
        blocks_erased: world.disks().map(|disk| disk.erased.len() as u64).sum(),
        bits_flipped: world.counts.bits_flipped,
        faults: world.counts.faults.clone(),
        elections: oracle.elections(),
        snapshots_sent: oracle.snapshots_sent,
        membership_changes: oracle.membership_changes(),
        put_aside: world.put_aside(),
        reads: [oracle.reads_leased, oracle.reads_waited],
        files: audited.files,
        versions: audited.versions,
        searched: [searched.registers, searched.operations, searched.too_large],
        heartbeats: audited.rest.heartbeats,
        wake_ms: audited.rest.wake / kernel::MILLISECOND,
    })
}
