//! The cluster's state as JSON: what `/api/v1/…` answers and the dashboard shows.
//!
//! Ids are hexadecimal text (JavaScript's numbers end at 2^53), ages are milliseconds before the
//! answer was made, so that a reader's clock does not matter.

use std::collections::BTreeMap;
use std::time::Duration;

use eggs_proto::limits::NOTHING_AT_RISK;
use eggs_proto::policy::class_name;
use eggs_proto::{BlockServiceId, ClusterId, GroupId, StoreId, Time, TransactionId, flags, pb};
use eggs_shuckle_core::repairs::{left, task_kind, under_spread};
use eggs_shuckle_core::summary::summarize;
use eggs_shuckle_core::{Capacity, State, groups_of, kind_name};
use pb::StoreKind;
use serde::Serialize;

/// What is known of the cluster at one moment.
#[derive(Debug, Clone)]
pub struct Known {
    pub cluster: ClusterId,
    /// When the cluster was founded; unset: not known here yet.
    pub created_at: Time,
    /// Since this shuckle started.
    pub uptime: Duration,
    /// This shuckle leads the registry.
    pub leads: bool,
    /// HOST:PORT of the other one that does.
    pub leader: String,
    /// The clock of the map.
    pub now: Time,
    pub map: pb::ClusterMapReply,
    /// Why the map is not of now.
    pub trouble: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct Cluster {
    #[serde(flatten)]
    pub summary: Summary,
    pub shards: Vec<Group>,
    /// The coordinator's group and the registry's.
    pub groups: Vec<Group>,
    pub stores: Vec<Store>,
    pub block_services: Vec<BlockService>,
    pub janitor: Upkeep,
}

#[derive(Debug, Serialize)]
pub struct Summary {
    pub version: &'static str,
    pub cluster_id: String,
    pub created_at_ns: u64,
    pub uptime_ms: u64,
    /// How many replicas every group is to have.
    pub replicas: u32,
    pub health: Health,
    pub registry: Leader,
    pub hosts: Vec<Host>,
    pub shard_counts: ShardCounts,
    pub block_service_counts: BlockServiceCounts,
    pub total: Space,
    pub classes: Vec<Class>,
    pub failure_domains: Vec<FailureDomain>,
    pub crossdir: Crossdir,
}

/// Who speaks for the registry.
#[derive(Debug, Serialize)]
pub struct Leader {
    /// The shuckle that answers leads.
    pub here: bool,
    /// HOST:PORT of the other one that leads; empty: this one does, or none.
    pub leader: String,
    /// Not empty: nobody can be asked, and what is shown was known before.
    pub trouble: String,
}

#[derive(Debug, Serialize)]
pub struct Host {
    pub name: String,
    pub alive: bool,
    pub stores: u32,
    pub stores_alive: u32,
    pub replicas: u32,
    pub leaders: u32,
    pub draining: bool,
    /// How that is going, in words; empty: it is not drained, or it is empty.
    pub drain: String,
    /// What a drain has to move still, and how many of those no other host can take.
    pub to_move: u32,
    pub stuck: u32,
    pub clock_offset_ms: i64,
}

#[derive(Debug, Serialize)]
pub struct Health {
    /// "healthy", "degraded" (somebody should look) or "unavailable".
    pub state: &'static str,
    /// 0, 1, 2 of the same.
    pub level: u8,
    /// Worst first.
    pub reasons: Vec<Reason>,
}

#[derive(Debug, Serialize)]
pub struct Reason {
    pub state: &'static str,
    pub text: String,
    /// It tells of lost disks.
    pub lost: bool,
}

#[derive(Debug, Default, Serialize)]
pub struct ShardCounts {
    /// With a live leader …
    pub alive: usize,
    /// … of those, with fewer live replicas than there are to be, or on their way to others.
    pub degraded: usize,
    pub stale: usize,
    pub missing: usize,
}

#[derive(Debug, Default, Serialize)]
pub struct BlockServiceCounts {
    pub total: usize,
    pub ok: usize,
    pub failing: usize,
    pub restricted: usize,
    pub stale: usize,
    pub lost: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupState {
    Alive,
    /// It works, with fewer live replicas than there are to be, or on its way to others.
    Degraded,
    /// Nobody leads it, as far as is known.
    Stale,
    /// Not founded yet.
    Missing,
}

#[derive(Debug, Serialize)]
pub struct Group {
    /// The shard, or 256 the coordinator, 257 the registry.
    pub shard: u32,
    pub state: GroupState,
    /// Where its leader is; empty: nobody leads.
    pub address: String,
    pub leader: Option<String>,
    /// The store that is to lead while it can.
    pub preferred: Option<String>,
    pub replicas: Vec<Replica>,
    /// Stores that are to be voters and are none yet.
    pub coming: Vec<String>,
    pub last_seen_ms_ago: Option<u64>,
    pub term: u64,
    pub applied_index: u64,
    pub log_bytes: u64,
}

/// A store's part in a group.
#[derive(Debug, Serialize)]
pub struct Replica {
    pub store: String,
    /// "leader", "voter", "learner".
    pub role: &'static str,
    pub alive: bool,
    /// It is to go.
    #[serde(skip_serializing_if = "is_false")]
    pub leaving: bool,
    /// Entries it is behind.
    #[serde(skip_serializing_if = "is_zero")]
    pub lag: u64,
    /// A snapshot on its way to it, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<u64>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(value: &bool) -> bool {
    !value
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

#[derive(Debug, Serialize)]
pub struct Store {
    pub id: String,
    /// "shard", "crossdir", "shuckle".
    pub kind: &'static str,
    pub host: String,
    pub address: String,
    pub alive: bool,
    pub draining: bool,
    pub last_seen_ms_ago: Option<u64>,
    pub registered_at_ns: u64,
    pub clock_offset_ms: i64,
    pub problem: String,
    pub replicas: u32,
    pub leaders: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    Ok,
    /// People have set a flag on it.
    Restricted,
    /// It works, with errors.
    Failing,
    Stale,
    Lost,
}

#[derive(Debug, Serialize)]
pub struct BlockService {
    pub id: String,
    pub state: DiskState,
    pub storage_class: u32,
    pub class_name: String,
    pub failure_domain: String,
    pub address: String,
    pub path: String,
    pub flags: Vec<&'static str>,
    pub capacity_bytes: u64,
    pub available_bytes: u64,
    pub used_bytes: u64,
    pub blocks: u64,
    pub last_seen_ms_ago: Option<u64>,
    pub registered_at_ns: u64,
    pub io_errors: u64,
    pub reported_blocks: u64,
    /// Takes no writes, as its host says.
    pub read_only: bool,
    /// Of blocks that nobody needs any more, and whose space is not given back yet.
    pub dead_bytes: u64,
    pub problem: String,
}

/// Repair, scrub, garbage, balancing, spreading, jobs.
#[derive(Debug, Serialize)]
pub struct Upkeep {
    /// Empty: no janitor was ever heard of.
    pub host: String,
    pub address: String,
    pub alive: bool,
    pub last_seen_ms_ago: Option<u64>,
    pub tasks: Vec<Task>,
    pub jobs: Vec<Job>,
    /// Null: nobody has counted yet.
    pub under_spread: Option<UnderSpread>,
}

/// Spans two of whose blocks share a disk or a failure domain.
#[derive(Debug, Serialize)]
pub struct UnderSpread {
    pub spans: u64,
    /// All spans with blocks.
    pub of: u64,
}

#[derive(Debug, Serialize)]
pub struct Task {
    /// "repair", "scrub", "rebalance", "garbage", "restripe", "spread".
    pub kind: &'static str,
    /// The block service or directory; empty: all.
    pub about: String,
    /// The same as people know it.
    pub name: String,
    pub state: String,
    pub started_ms_ago: Option<u64>,
    pub spans_done: u64,
    pub spans_total: u64,
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub bytes_per_second: u64,
    pub seconds_left: Option<u64>,
    pub spans_lost: u64,
    /// Fewest blocks that a span it is about can still lose; null: nothing is at risk.
    pub least_redundancy: Option<u32>,
}

#[derive(Debug, Serialize)]
pub struct Job {
    pub id: u64,
    pub kind: &'static str,
    pub path: String,
    pub files_done: u64,
    pub files_failed: u64,
    pub bytes_done: u64,
    pub done: bool,
}

#[derive(Debug, Serialize)]
pub struct Class {
    pub storage_class: u32,
    pub name: String,
    #[serde(flatten)]
    pub space: Space,
}

#[derive(Debug, Serialize)]
pub struct FailureDomain {
    pub name: String,
    #[serde(flatten)]
    pub space: Space,
}

/// Disks and their space; lost and stale ones count as disks, not as space.
#[derive(Debug, Serialize)]
pub struct Space {
    pub block_services: u32,
    /// Heard of, and not lost.
    pub alive: u32,
    /// Take new blocks.
    pub writable: u32,
    pub capacity_bytes: u64,
    pub available_bytes: u64,
    pub used_bytes: u64,
    pub blocks: u64,
}

impl From<Capacity> for Space {
    fn from(capacity: Capacity) -> Space {
        Space {
            block_services: capacity.disks,
            alive: capacity.disks_alive,
            writable: capacity.disks_writable,
            capacity_bytes: capacity.capacity_bytes,
            available_bytes: capacity.available_bytes,
            used_bytes: capacity.used_bytes,
            blocks: capacity.blocks,
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Crossdir {
    /// Empty: none has registered.
    pub address: String,
    pub alive: bool,
    pub transactions: u32,
    /// Those that take long, the oldest first; not more than a few.
    pub slow_transactions: Vec<Transaction>,
}

#[derive(Debug, Serialize)]
pub struct Transaction {
    pub transaction: String,
    pub kind: String,
    pub started_at_ns: u64,
    pub age_ms: u64,
    /// What it is doing or waiting for.
    pub step: String,
}

impl Known {
    pub fn cluster(&self) -> Cluster {
        Cluster {
            summary: self.summary(),
            shards: self.shards(),
            groups: self.groups(&[GroupId::CROSSDIR, GroupId::SHUCKLE]),
            stores: self.stores(),
            block_services: self.block_services(),
            janitor: self.upkeep(),
        }
    }

    pub fn summary(&self) -> Summary {
        let map = &self.map;
        let summary = summarize(map);
        let class = |(storage_class, capacity): (u32, Capacity)| Class {
            storage_class,
            name: class_name(storage_class),
            space: capacity.into(),
        };
        let domain = |(name, capacity): (String, Capacity)| FailureDomain { name, space: capacity.into() };
        let coordinator = self.groups(&[GroupId::CROSSDIR]).into_iter().next();
        Summary {
            version: eggs_daemon::VERSION,
            cluster_id: self.cluster.to_string(),
            created_at_ns: self.created_at.0,
            uptime_ms: u64::try_from(self.uptime.as_millis()).unwrap_or(u64::MAX),
            replicas: map.replicas,
            health: match &self.trouble {
                None => health(summary.state, summary.reasons),
                // What was wrong before says nothing of now.
                Some(text) => health(State::Unavailable, vec![unavailable(text.clone())]),
            },
            registry: Leader {
                here: self.leads,
                leader: self.leader.clone(),
                trouble: self.trouble.clone().unwrap_or_default(),
            },
            hosts: summary.hosts.into_iter().map(host).collect(),
            shard_counts: self.shard_counts(),
            block_service_counts: self.block_service_counts(),
            total: summary.total.into(),
            classes: summary.classes.into_iter().map(class).collect(),
            failure_domains: summary.failure_domains.into_iter().map(domain).collect(),
            crossdir: Crossdir {
                address: coordinator.map(|group| group.address).unwrap_or_default(),
                alive: summary.crossdir_alive,
                transactions: map.crossdir_transactions,
                slow_transactions: map
                    .slow_transactions
                    .iter()
                    .map(|info| transaction(info, map.now))
                    .collect(),
            },
        }
    }

    /// All 256, in order.
    pub fn shards(&self) -> Vec<Group> {
        self.groups(&groups_of(StoreKind::StoreShard).collect::<Vec<_>>())
    }

    fn groups(&self, groups: &[GroupId]) -> Vec<Group> {
        let places: BTreeMap<u32, &pb::GroupPlace> =
            self.map.groups.iter().map(|place| (place.group, place)).collect();
        let stores: BTreeMap<u64, &pb::StoreInfo> =
            self.map.stores.iter().map(|info| (info.id, info)).collect();
        let group = |&id: &GroupId| match places.get(&u32::from(id.0)) {
            Some(place) => self.group(place, &stores),
            None => missing(u32::from(id.0)),
        };
        groups.iter().map(group).collect()
    }

    fn group(&self, place: &pb::GroupPlace, stores: &BTreeMap<u64, &pb::StoreInfo>) -> Group {
        let replica = |id: u64, learner: bool| {
            let progress = place.progress.iter().find(|progress| progress.store == id);
            // A leader that has not heard of it yet knows nothing of how far it is.
            let matched = progress.map(|progress| progress.matched_index).filter(|&matched| matched != 0);
            let snapshot = progress.filter(|progress| progress.snapshot_total > 0);
            Replica {
                store: StoreId(id).to_string(),
                role: match (id == place.leader, learner) {
                    (true, _) => "leader",
                    (false, true) => "learner",
                    (false, false) => "voter",
                },
                alive: stores.get(&id).is_some_and(|info| info.alive),
                leaving: !place.wanted.is_empty() && !place.wanted.contains(&id),
                lag: matched.map_or(0, |matched| place.applied_index.saturating_sub(matched)),
                snapshot: snapshot.map(|of| of.snapshot_sent.saturating_mul(100) / of.snapshot_total),
            }
        };
        let voters = place.voters.iter().map(|&id| replica(id, false));
        let replicas: Vec<Replica> =
            voters.chain(place.learners.iter().map(|&id| replica(id, true))).collect();
        let coming: Vec<String> = place
            .wanted
            .iter()
            .filter(|id| !place.voters.contains(id))
            .map(|&id| StoreId(id).to_string())
            .collect();
        let whole = coming.is_empty()
            && replicas.iter().all(|replica| replica.alive && replica.role != "learner" && !replica.leaving)
            && replicas.len() >= self.map.replicas as usize;
        Group {
            shard: place.group,
            state: match (place.alive, whole) {
                (true, true) => GroupState::Alive,
                (true, false) => GroupState::Degraded,
                (false, _) => GroupState::Stale,
            },
            address: stores.get(&place.leader).map(|info| info.address.clone()).unwrap_or_default(),
            leader: (place.leader != 0).then(|| StoreId(place.leader).to_string()),
            preferred: (place.preferred != 0).then(|| StoreId(place.preferred).to_string()),
            replicas,
            coming,
            last_seen_ms_ago: self.age(place.last_seen),
            term: place.term,
            applied_index: place.applied_index,
            log_bytes: place.log_bytes,
        }
    }

    /// In the order of hosts and kinds.
    pub fn stores(&self) -> Vec<Store> {
        let mut stores: Vec<&pb::StoreInfo> = self.map.stores.iter().collect();
        stores.sort_by_key(|info| (&info.host, info.kind, info.id));
        let store = |info: &pb::StoreInfo| Store {
            id: StoreId(info.id).to_string(),
            kind: kind_name(info.kind()),
            host: info.host.clone(),
            address: info.address.clone(),
            alive: info.alive,
            draining: info.draining,
            last_seen_ms_ago: self.age(info.last_seen),
            registered_at_ns: info.registered_at,
            clock_offset_ms: info.clock_offset / 1_000_000,
            problem: info.problem.clone(),
            replicas: info.replicas,
            leaders: info.leaders,
        };
        stores.into_iter().map(store).collect()
    }

    pub fn block_services(&self) -> Vec<BlockService> {
        let info = |disk: &pb::BlockServiceInfo| BlockService {
            id: BlockServiceId(disk.id).to_string(),
            state: disk_state(disk),
            storage_class: disk.storage_class,
            class_name: class_name(disk.storage_class),
            failure_domain: disk.failure_domain.clone(),
            address: disk.address.clone(),
            path: disk.path.clone(),
            flags: flags::names(disk.flags),
            capacity_bytes: disk.capacity_bytes,
            available_bytes: disk.available_bytes,
            used_bytes: disk.used_bytes,
            blocks: disk.blocks,
            last_seen_ms_ago: self.age(disk.last_seen),
            registered_at_ns: disk.registered_at,
            io_errors: disk.io_errors,
            reported_blocks: disk.reported_blocks,
            read_only: disk.read_only,
            dead_bytes: disk.dead_bytes,
            problem: disk.problem.clone(),
        };
        self.map.block_services.iter().map(info).collect()
    }

    /// What the janitor does.
    pub fn upkeep(&self) -> Upkeep {
        let janitor = self.map.janitor.clone().unwrap_or_default();
        let job = |job: &pb::Job| {
            let progress = job.progress.clone().unwrap_or_default();
            Job {
                id: job.id,
                kind: task_kind(job.kind()),
                path: job.path.clone(),
                files_done: progress.files_done,
                files_failed: progress.files_failed,
                bytes_done: progress.bytes_done,
                done: progress.done,
            }
        };
        Upkeep {
            tasks: janitor.tasks.iter().map(|task| self.task(task)).collect(),
            host: janitor.host,
            address: janitor.address,
            alive: janitor.alive,
            last_seen_ms_ago: self.age(janitor.last_seen),
            jobs: self.map.jobs.iter().map(job).collect(),
            under_spread: under_spread(&self.map).map(|(spans, of)| UnderSpread { spans, of }),
        }
    }

    fn task(&self, task: &pb::JanitorTask) -> Task {
        let disk = self.map.block_services.iter().find(|info| info.id == task.about);
        let job = self.map.jobs.iter().find(|job| job.directory == task.about);
        let name = disk.map(|info| &info.path).or(job.map(|job| &job.path));
        Task {
            kind: task_kind(task.kind()),
            about: if task.about == 0 { String::new() } else { BlockServiceId(task.about).to_string() },
            name: name.cloned().unwrap_or_default(),
            state: task.state.clone(),
            started_ms_ago: self.age(task.started_at),
            spans_done: task.spans_done,
            spans_total: task.spans_total,
            bytes_done: task.bytes_done,
            bytes_total: task.bytes_total,
            bytes_per_second: task.bytes_per_second,
            seconds_left: left(task).map(|left| left.as_secs()),
            spans_lost: task.spans_lost,
            least_redundancy: Some(task.least_redundancy).filter(|&least| least != NOTHING_AT_RISK),
        }
    }

    fn shard_counts(&self) -> ShardCounts {
        let mut counts = ShardCounts::default();
        for shard in self.shards() {
            match shard.state {
                GroupState::Alive => counts.alive += 1,
                GroupState::Degraded => {
                    counts.alive += 1;
                    counts.degraded += 1;
                }
                GroupState::Stale => counts.stale += 1,
                GroupState::Missing => counts.missing += 1,
            }
        }
        counts
    }

    fn block_service_counts(&self) -> BlockServiceCounts {
        let mut counts =
            BlockServiceCounts { total: self.map.block_services.len(), ..BlockServiceCounts::default() };
        for disk in &self.map.block_services {
            match disk_state(disk) {
                DiskState::Ok => counts.ok += 1,
                DiskState::Restricted => counts.restricted += 1,
                DiskState::Failing => counts.failing += 1,
                DiskState::Stale => counts.stale += 1,
                DiskState::Lost => counts.lost += 1,
            }
        }
        counts
    }

    fn age(&self, seen: u64) -> Option<u64> {
        (seen != 0).then(|| milliseconds(self.now, Time(seen)))
    }

    /// Puts the state into the process's metrics.
    pub fn record(&self) {
        let summary = self.summary();
        let shards = summary.shard_counts;
        for (state, count) in [
            ("alive", shards.alive),
            ("degraded", shards.degraded),
            ("stale", shards.stale),
            ("missing", shards.missing),
        ] {
            metrics::gauge!("eggs_shuckle_shards", "state" => state).set(count as f64);
        }
        let disks = summary.block_service_counts;
        for (state, count) in [
            ("ok", disks.ok),
            ("restricted", disks.restricted),
            ("failing", disks.failing),
            ("stale", disks.stale),
            ("lost", disks.lost),
        ] {
            metrics::gauge!("eggs_shuckle_block_services", "state" => state).set(count as f64);
        }
        for class in summary.classes {
            for (name, value) in [
                ("eggs_shuckle_capacity_bytes", class.space.capacity_bytes),
                ("eggs_shuckle_available_bytes", class.space.available_bytes),
                ("eggs_shuckle_used_bytes", class.space.used_bytes),
                ("eggs_shuckle_blocks", class.space.blocks),
            ] {
                metrics::gauge!(name, "class" => class.name.clone()).set(value as f64);
            }
        }
        metrics::gauge!("eggs_shuckle_crossdir_alive").set(f64::from(u8::from(summary.crossdir.alive)));
        metrics::gauge!("eggs_shuckle_transactions").set(f64::from(summary.crossdir.transactions));
        metrics::gauge!("eggs_shuckle_health").set(f64::from(summary.health.level));
    }
}

fn transaction(info: &pb::TransactionInfo, now: u64) -> Transaction {
    Transaction {
        transaction: TransactionId(info.transaction).to_string(),
        kind: info.kind.clone(),
        started_at_ns: info.started_at,
        age_ms: now.saturating_sub(info.started_at) / 1_000_000,
        step: info.step.clone(),
    }
}

fn health(state: State, reasons: Vec<eggs_shuckle_core::Reason>) -> Health {
    let level = match state {
        State::Healthy => 0,
        State::Degraded => 1,
        State::Unavailable => 2,
    };
    let reason = |reason: eggs_shuckle_core::Reason| Reason {
        state: reason.state.as_str(),
        lost: is_about_lost_disks(&reason.text),
        text: reason.text,
    };
    Health { state: state.as_str(), level, reasons: reasons.into_iter().map(reason).collect() }
}

fn missing(shard: u32) -> Group {
    Group {
        shard,
        state: GroupState::Missing,
        address: String::new(),
        leader: None,
        preferred: None,
        replicas: Vec::new(),
        coming: Vec::new(),
        last_seen_ms_ago: None,
        term: 0,
        applied_index: 0,
        log_bytes: 0,
    }
}

fn host(host: eggs_shuckle_core::Host) -> Host {
    Host {
        drain: host.drain().unwrap_or_default(),
        name: host.name,
        alive: host.alive,
        stores: host.stores,
        stores_alive: host.stores_alive,
        replicas: host.replicas,
        leaders: host.leaders,
        draining: host.draining,
        to_move: host.to_move,
        stuck: host.stuck,
        clock_offset_ms: host.clock_offset / 1_000_000,
    }
}

fn unavailable(text: String) -> eggs_shuckle_core::Reason {
    eggs_shuckle_core::Reason { state: State::Unavailable, text }
}

/// "1 disk lost: …", "3 disks lost: …".
fn is_about_lost_disks(text: &str) -> bool {
    let mut words = text.split(' ').skip(1);
    matches!(words.next(), Some("disk" | "disks")) && words.next() == Some("lost:")
}

fn disk_state(disk: &pb::BlockServiceInfo) -> DiskState {
    if disk.flags & flags::LOST != 0 {
        DiskState::Lost
    } else if disk.flags & flags::STALE != 0 {
        DiskState::Stale
    } else if disk.io_errors > 0 || disk.reported_blocks > 0 || !disk.problem.is_empty() {
        DiskState::Failing
    } else if disk.flags & flags::SETTABLE != 0 || disk.read_only {
        DiskState::Restricted
    } else {
        DiskState::Ok
    }
}

fn milliseconds(now: Time, then: Time) -> u64 {
    u64::try_from(now.since(then).as_millis()).unwrap_or(u64::MAX)
}
