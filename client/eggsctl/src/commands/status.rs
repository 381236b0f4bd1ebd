//! `status`: how the cluster feels.

use std::collections::BTreeMap;

use clap::Args;
use eggs_proto::pb::{ClusterMapReply, ShardPlace};
use eggs_proto::{Time, flags, limits};
use serde::Serialize;

use super::df::{JsonDisk, disk_state, disk_table, in_order};
use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::{Failure, Outcome};

/// Print the health of the cluster: shards, coordinator, disks
#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    json: JsonFlag,
    /// Exit with 1 unless the cluster is healthy
    #[arg(long)]
    check: bool,
}

/// From best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Health {
    Healthy,
    /// Everything works; something has lost its spare.
    Degraded,
    /// Some names or new directories are out of reach.
    Unavailable,
}

impl Health {
    fn as_str(self) -> &'static str {
        match self {
            Health::Healthy => "healthy",
            Health::Degraded => "degraded",
            Health::Unavailable => "unavailable",
        }
    }
}

#[derive(Debug, Serialize)]
struct JsonStatus {
    cluster_id: String,
    health: Health,
    problems: Vec<String>,
    shards: JsonShards,
    crossdir: JsonCrossdir,
    disks: Vec<JsonDisk>,
}

#[derive(Debug, Serialize)]
struct JsonShards {
    total: u16,
    alive: usize,
    hosts: Vec<Host>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Host {
    address: String,
    /// `0-127,200`.
    shards: String,
    alive: usize,
    log_bytes: u64,
}

#[derive(Debug, Serialize)]
struct JsonCrossdir {
    address: String,
    alive: bool,
    transactions: u32,
}

impl Status {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let mut map = client.cluster_map().await.map_err(|error| failure("", error))?;
        in_order(&mut map.block_services);
        let (health, problems) = judge(&map, client.now());
        let mut out = context.out();
        if self.json.json {
            out.json(&json(client.cluster_id().to_string(), health, problems, &map))?;
        } else {
            out.line(format_args!(
                "cluster      {} at {}",
                client.cluster_id(),
                context.global.shuckle.join(", ")
            ))?;
            out.line(format_args!("health       {}", health.as_str()))?;
            for problem in &problems {
                out.line(format_args!("             {problem}"))?;
            }
            out.line(format_args!("shards       {} of {} served", alive(&map), limits::SHARDS))?;
            for host in hosts(&map.shards) {
                out.line(format_args!("             {}: {}", host.address, host.shards))?;
            }
            out.line(format_args!("coordinator  {}", coordinator(&map)))?;
            let usable = map.block_services.iter().filter(|disk| flags::writable(disk.flags)).count();
            out.line(format_args!("disks        {usable} of {} writable", map.block_services.len()))?;
            if !map.block_services.is_empty() {
                out.line("")?;
                out.line(disk_table(&map.block_services, client.now()))?;
            }
        }
        out.finish()?;
        if self.check && health != Health::Healthy { Err(Failure::Reported) } else { Ok(()) }
    }
}

fn alive(map: &ClusterMapReply) -> usize {
    map.shards.iter().filter(|place| place.alive).count()
}

fn coordinator(map: &ClusterMapReply) -> String {
    match (map.crossdir_address.as_str(), map.crossdir_alive) {
        ("", _) => "none has registered".to_owned(),
        (address, true) => format!("{address}, {} transactions in flight", map.crossdir_transactions),
        (address, false) => format!("{address}, not heard of lately"),
    }
}

/// What is wrong, and how bad that is.
fn judge(map: &ClusterMapReply, now: Time) -> (Health, Vec<String>) {
    let mut health = Health::Healthy;
    let mut problems = Vec::new();
    let mut worse = |at_least: Health, problem: String| {
        health = health.max(at_least);
        problems.push(problem);
    };
    let missing = usize::from(limits::SHARDS).saturating_sub(alive(map));
    if missing > 0 {
        worse(Health::Unavailable, format!("{missing} shards are served by nobody"));
    }
    if !map.crossdir_alive {
        worse(Health::Unavailable, "no coordinator: directories cannot be made, removed or moved".to_owned());
    }
    if !map.block_services.iter().any(|disk| flags::writable(disk.flags)) {
        worse(Health::Unavailable, "no disk can be written to".to_owned());
    }
    const TROUBLE: u32 = flags::STALE | flags::LOST;
    for disk in &map.block_services {
        if disk.flags & TROUBLE != 0
            || disk.io_errors > 0
            || disk.reported_blocks > 0
            || !disk.problem.is_empty()
        {
            worse(
                Health::Degraded,
                format!("disk {} {}: {}", disk.address, disk.path, disk_state(disk, now)),
            );
        }
    }
    (health, problems)
}

fn hosts(places: &[ShardPlace]) -> Vec<Host> {
    let mut hosts = BTreeMap::<&str, Vec<&ShardPlace>>::new();
    for place in places.iter().filter(|place| !place.address.is_empty()) {
        hosts.entry(&place.address).or_default().push(place);
    }
    hosts
        .into_iter()
        .map(|(address, places)| Host {
            address: address.to_owned(),
            alive: places.iter().filter(|place| place.alive).count(),
            log_bytes: places.iter().map(|place| place.log_bytes).fold(0, u64::saturating_add),
            shards: ranges(places.iter().map(|place| place.shard).collect()),
        })
        .collect()
}

/// `0-2,7`.
fn ranges(mut numbers: Vec<u32>) -> String {
    numbers.sort_unstable();
    numbers.dedup();
    let runs = numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b));
    let texts = runs.map(|run| match run {
        [one] => one.to_string(),
        [first, .., last] => format!("{first}-{last}"),
        [] => String::new(),
    });
    texts.collect::<Vec<_>>().join(",")
}

fn json(cluster_id: String, health: Health, problems: Vec<String>, map: &ClusterMapReply) -> JsonStatus {
    JsonStatus {
        cluster_id,
        health,
        problems,
        shards: JsonShards { total: limits::SHARDS, alive: alive(map), hosts: hosts(&map.shards) },
        crossdir: JsonCrossdir {
            address: map.crossdir_address.clone(),
            alive: map.crossdir_alive,
            transactions: map.crossdir_transactions,
        },
        disks: map.block_services.iter().map(JsonDisk::of).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use eggs_proto::pb::BlockServiceInfo;

    fn healthy() -> ClusterMapReply {
        let place = |shard| ShardPlace {
            shard,
            address: "h:1".into(),
            alive: true,
            last_seen: 1,
            applied_index: 1,
            log_bytes: 2,
        };
        ClusterMapReply {
            shards: (0..256).map(place).collect(),
            crossdir_address: "h:1".into(),
            crossdir_alive: true,
            block_services: vec![BlockServiceInfo::default(); 2],
            crossdir_transactions: 0,
        }
    }

    #[test]
    fn health_is_that_of_the_worst_part() {
        let judged = |change: fn(&mut ClusterMapReply)| {
            let mut map = healthy();
            change(&mut map);
            let (health, problems) = judge(&map, Time(5));
            (health, problems.len())
        };
        assert_eq!(judged(|_| {}), (Health::Healthy, 0));
        assert_eq!(judged(|map| map.block_services[0].flags = flags::LOST), (Health::Degraded, 1));
        assert_eq!(judged(|map| map.block_services[0].flags = flags::NO_WRITE), (Health::Healthy, 0));
        assert_eq!(judged(|map| map.crossdir_alive = false), (Health::Unavailable, 1));
        assert_eq!(judged(|map| map.shards[7].alive = false), (Health::Unavailable, 1));
        assert_eq!(judged(|map| map.shards.truncate(200)), (Health::Unavailable, 1));
        assert_eq!(judged(|map| map.block_services.clear()), (Health::Unavailable, 1));
    }

    #[test]
    fn shards_are_ranges() {
        assert_eq!(ranges(vec![]), "");
        assert_eq!(ranges(vec![2, 1, 0, 7, 9, 10]), "0-2,7,9-10");
        assert_eq!(ranges(vec![u32::MAX]), u32::MAX.to_string());
        let hosts = hosts(&healthy().shards);
        assert_eq!(
            hosts,
            [Host { address: "h:1".into(), shards: "0-255".into(), alive: 256, log_bytes: 512 }]
        );
    }
}
