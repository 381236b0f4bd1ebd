//! The cluster's state as JSON: what `/api/v1/…` answers and the dashboard shows.
//!
//! Ids are hexadecimal text (JavaScript's numbers end at 2^53), ages are milliseconds before the
//! answer was made, so that a reader's clock does not matter.

use std::collections::BTreeMap;

use eggs_proto::limits::SHARDS;
use eggs_proto::{BlockServiceId, ClusterId, Time, flags, pb};
use eggs_shuckle_core::summary::{class_name, summarize};
use eggs_shuckle_core::{Capacity, State};
use serde::Serialize;

/// What is known of the cluster at one moment.
#[derive(Debug, Clone)]
pub struct Known {
    pub cluster: ClusterId,
    /// When the cluster was founded.
    pub created_at: Time,
    /// When this shuckle started.
    pub started: Time,
    pub now: Time,
    pub map: pb::ClusterMapReply,
}

#[derive(Debug, Serialize)]
pub struct Cluster {
    #[serde(flatten)]
    pub summary: Summary,
    pub shards: Vec<Shard>,
    pub block_services: Vec<BlockService>,
}

#[derive(Debug, Serialize)]
pub struct Summary {
    pub version: &'static str,
    pub cluster_id: String,
    pub created_at_ns: u64,
    pub uptime_ms: u64,
    pub health: Health,
    pub shard_counts: ShardCounts,
    pub block_service_counts: BlockServiceCounts,
    pub total: Space,
    pub classes: Vec<Class>,
    pub failure_domains: Vec<FailureDomain>,
    pub crossdir: Crossdir,
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
    pub alive: usize,
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
pub enum ShardState {
    Alive,
    /// Not heard of lately.
    Stale,
    /// Never registered.
    Missing,
}

#[derive(Debug, Serialize)]
pub struct Shard {
    pub shard: u32,
    pub state: ShardState,
    /// Empty when missing.
    pub address: String,
    pub last_seen_ms_ago: Option<u64>,
    pub applied_index: u64,
    pub log_bytes: u64,
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
    pub problem: String,
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
}

impl Known {
    pub fn cluster(&self) -> Cluster {
        Cluster { summary: self.summary(), shards: self.shards(), block_services: self.block_services() }
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
        Summary {
            version: eggs_daemon::VERSION,
            cluster_id: self.cluster.to_string(),
            created_at_ns: self.created_at.0,
            uptime_ms: milliseconds(self.now, self.started),
            health: health(summary.state, summary.reasons),
            shard_counts: self.shard_counts(),
            block_service_counts: self.block_service_counts(),
            total: summary.total.into(),
            classes: summary.classes.into_iter().map(class).collect(),
            failure_domains: summary.failure_domains.into_iter().map(domain).collect(),
            crossdir: Crossdir {
                address: map.crossdir_address.clone(),
                alive: map.crossdir_alive,
                transactions: map.crossdir_transactions,
            },
        }
    }

    /// All 256, in order.
    pub fn shards(&self) -> Vec<Shard> {
        let places: BTreeMap<u32, &pb::ShardPlace> =
            self.map.shards.iter().map(|place| (place.shard, place)).collect();
        (0..u32::from(SHARDS))
            .map(|shard| match places.get(&shard) {
                None => Shard {
                    shard,
                    state: ShardState::Missing,
                    address: String::new(),
                    last_seen_ms_ago: None,
                    applied_index: 0,
                    log_bytes: 0,
                },
                Some(place) => Shard {
                    shard,
                    state: if place.alive { ShardState::Alive } else { ShardState::Stale },
                    address: place.address.clone(),
                    last_seen_ms_ago: self.age(place.last_seen),
                    applied_index: place.applied_index,
                    log_bytes: place.log_bytes,
                },
            })
            .collect()
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
            problem: disk.problem.clone(),
        };
        self.map.block_services.iter().map(info).collect()
    }

    fn shard_counts(&self) -> ShardCounts {
        let mut counts = ShardCounts::default();
        for shard in self.shards() {
            match shard.state {
                ShardState::Alive => counts.alive += 1,
                ShardState::Stale => counts.stale += 1,
                ShardState::Missing => counts.missing += 1,
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
        for (state, count) in [("alive", shards.alive), ("stale", shards.stale), ("missing", shards.missing)]
        {
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
    } else if disk.flags & flags::SETTABLE != 0 {
        DiskState::Restricted
    } else {
        DiskState::Ok
    }
}

fn milliseconds(now: Time, then: Time) -> u64 {
    u64::try_from(now.since(then).as_millis()).unwrap_or(u64::MAX)
}
