//! How the cluster is, in words and numbers, for the dashboard and `eggsctl status`.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use eggs_machine::{Table, TableError};
use eggs_proto::limits::SHARDS;
use eggs_proto::policy::class_name;
use eggs_proto::{GroupId, Time, TransactionId, flags, pb};

use crate::health::Health;
use crate::repairs;
use crate::troubles::{Host, Picture};

/// A class of disks with less than one part in this many free is nearly full.
const NEARLY_FULL_PARTS: u64 = 10;
/// Somebody should see why a transaction takes so long.
const STUCK_AFTER: Duration = Duration::from_secs(30);
/// Things named one by one in a reason; more are counted.
const NAMED_MAX: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Nothing to do.
    Healthy,
    /// Everything works; somebody should look.
    Degraded,
    /// Some of the namespace, or all data, cannot be reached.
    Unavailable,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Healthy => "healthy",
            State::Degraded => "degraded",
            State::Unavailable => "unavailable",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why the state is not `Healthy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    pub state: State,
    pub text: String,
}

/// Disks and their space. Lost and stale disks count as disks, not as space.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capacity {
    pub disks: u32,
    /// Heard of, and not lost.
    pub disks_alive: u32,
    /// Take new blocks: they may, and have room.
    pub disks_writable: u32,
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    pub available_bytes: u64,
    pub blocks: u64,
}

impl Capacity {
    fn add(&mut self, info: &pb::BlockServiceInfo) {
        self.disks += 1;
        if info.flags & (flags::STALE | flags::LOST) != 0 {
            return;
        }
        self.disks_alive += 1;
        let takes_blocks = flags::writable(info.flags) && !info.read_only && info.available_bytes > 0;
        self.disks_writable += u32::from(takes_blocks);
        self.capacity_bytes = self.capacity_bytes.saturating_add(info.capacity_bytes);
        self.used_bytes = self.used_bytes.saturating_add(info.used_bytes);
        self.available_bytes = self.available_bytes.saturating_add(info.available_bytes);
        self.blocks = self.blocks.saturating_add(info.blocks);
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The worst of the reasons'.
    pub state: State,
    /// Worst first.
    pub reasons: Vec<Reason>,
    pub shards_alive: u32,
    pub shards: u32,
    pub crossdir_alive: bool,
    pub crossdir_transactions: u32,
    /// By name.
    pub hosts: Vec<Host>,
    pub total: Capacity,
    /// By storage class.
    pub classes: BTreeMap<u32, Capacity>,
    pub failure_domains: BTreeMap<String, Capacity>,
}

impl Health {
    /// How the cluster is.
    ///
    /// # Errors
    /// When the table fails.
    pub fn summary<T: Table + ?Sized>(&self, view: &T, now: Time) -> Result<Summary, TableError> {
        Ok(summarize(&self.map(view, now, false)?))
    }
}

/// How the cluster that has this map is.
pub fn summarize(map: &pb::ClusterMapReply) -> Summary {
    let mut total = Capacity::default();
    let mut classes: BTreeMap<u32, Capacity> = BTreeMap::new();
    let mut failure_domains: BTreeMap<String, Capacity> = BTreeMap::new();
    for info in &map.block_services {
        total.add(info);
        classes.entry(info.storage_class).or_default().add(info);
        failure_domains.entry(info.failure_domain.clone()).or_default().add(info);
    }
    let picture = Picture::of(map);
    let mut reasons = repairs::reasons(map);
    reasons.extend(picture.reasons());
    reasons.extend(disk_reasons(&map.block_services, &total));
    reasons.extend(class_reasons(&classes));
    reasons.extend(transaction_reason(map));
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.state));
    Summary {
        state: reasons.first().map_or(State::Healthy, |reason| reason.state),
        reasons,
        shards_alive: u32::try_from(picture.shards_alive()).unwrap_or(u32::MAX),
        shards: u32::from(SHARDS),
        crossdir_alive: picture.alive(GroupId::CROSSDIR),
        crossdir_transactions: map.crossdir_transactions,
        hosts: picture.hosts(),
        total,
        classes,
        failure_domains,
    }
}

/// A transaction that does not get on: what it waits for is in its step.
fn transaction_reason(map: &pb::ClusterMapReply) -> Option<Reason> {
    let age = |info: &pb::TransactionInfo| Time(map.now).since(Time(info.started_at));
    let stuck: Vec<_> = map.slow_transactions.iter().filter(|info| age(info) > STUCK_AFTER).collect();
    let first = stuck.first()?;
    let more = match stuck.len() - 1 {
        0 => String::new(),
        more => format!("; {more} more do not get on"),
    };
    let text = format!(
        "a {} (transaction {}) has been under way for {} s: {}{more}",
        first.kind,
        TransactionId(first.transaction),
        age(first).as_secs(),
        first.step
    );
    Some(Reason { state: State::Degraded, text })
}

fn disk_reasons(services: &[pb::BlockServiceInfo], total: &Capacity) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if services.is_empty() {
        let text = "no disk has registered: only small files can be stored".to_owned();
        reasons.push(Reason { state: State::Degraded, text });
    } else if total.disks_alive == 0 {
        let text = "no disk is alive: no data can be read or written".to_owned();
        reasons.push(Reason { state: State::Unavailable, text });
    } else if total.disks_writable == 0 {
        reasons.push(Reason { state: State::Degraded, text: "no disk can be written to".to_owned() });
    }
    let mut about = |select: &dyn Fn(&pb::BlockServiceInfo) -> bool, what: &str| {
        let selected: Vec<&pb::BlockServiceInfo> = services.iter().filter(|info| select(info)).collect();
        if !selected.is_empty() {
            let text = format!("{}: {}", disks(selected.len(), what), name_disks(&selected));
            reasons.push(Reason { state: State::Degraded, text });
        }
    };
    // Of those that were given up it is said how their repair goes.
    let missed = |info: &pb::BlockServiceInfo| info.flags & flags::DECOMMISSIONED == 0;
    about(&|info| info.flags & flags::LOST != 0 && missed(info), "lost");
    about(&|info| info.flags & (flags::STALE | flags::LOST) == flags::STALE && missed(info), "not heard of");
    about(
        &|info| info.io_errors > 0 && info.flags & flags::LOST == 0 && missed(info),
        "with input/output errors",
    );
    about(&|info| info.read_only && flags::writable(info.flags), "read-only");
    let reported = services.iter().fold(0u64, |sum, info| sum.saturating_add(info.reported_blocks));
    if reported > 0 {
        let on: Vec<&pb::BlockServiceInfo> =
            services.iter().filter(|info| info.reported_blocks > 0).collect();
        let blocks = if reported == 1 { "1 block was".to_owned() } else { format!("{reported} blocks were") };
        let text = format!("{blocks} reported missing or corrupt, on {}", name_disks(&on));
        reasons.push(Reason { state: State::Degraded, text });
    }
    reasons
}

fn disks(count: usize, what: &str) -> String {
    if count == 1 { format!("1 disk {what}") } else { format!("{count} disks {what}") }
}

fn name_disks(services: &[&pb::BlockServiceInfo]) -> String {
    let named = services.iter().take(NAMED_MAX).map(|info| {
        let place = if info.path.is_empty() { &info.address } else { &info.path };
        let why = if info.problem.is_empty() { String::new() } else { format!(" ({})", info.problem) };
        format!("{place}{why}")
    });
    let mut text = named.collect::<Vec<_>>().join(", ");
    if services.len() > NAMED_MAX {
        text.push_str(&format!(" and {} more", services.len() - NAMED_MAX));
    }
    text
}

fn class_reasons(classes: &BTreeMap<u32, Capacity>) -> Vec<Reason> {
    let full = classes.iter().filter(|(_, class)| {
        class.capacity_bytes > 0 && class.available_bytes < class.capacity_bytes / NEARLY_FULL_PARTS
    });
    full.map(|(&class, space)| {
        let left = u128::from(space.available_bytes) * 100 / u128::from(space.capacity_bytes.max(1));
        let text = format!("{} disks are nearly full: {left} % is left", class_name(class));
        Reason { state: State::Degraded, text }
    })
    .collect()
}
