//! `status`: how the cluster feels, by the rules of the registry itself.

use std::collections::BTreeMap;

use clap::Args;
use eggs_proto::{GroupId, pb};
use eggs_shuckle_core::{State, Summary, groups_of, summarize};
use serde::Serialize;

use super::df::{JsonDisk, disk_table, in_order};
use super::host::{JsonHost, host_table, json_hosts};
use crate::cli::JsonFlag;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::members::{View, heard_map, is_settled};

/// Print the health of the cluster: replicas, leaders, hosts, disks
///
/// For scripts: eggsctl status --check
#[derive(Debug, Args)]
pub struct Status {
    #[command(flatten)]
    json: JsonFlag,
    /// Exit with 1 unless the cluster is healthy and every group has its leader and all replicas it is to have,
    /// none of them far behind
    #[arg(long)]
    check: bool,
}

/// Entries a replica may be behind and count as caught up: what a busy group does while heartbeats travel.
const BEHIND_MAX: u64 = 1000;

#[derive(Debug, Serialize)]
struct JsonStatus {
    cluster_id: String,
    health: &'static str,
    problems: Vec<String>,
    /// How many replicas every group is to have.
    replicas: u32,
    groups: JsonGroups,
    shards: JsonShards,
    crossdir: JsonService,
    shuckle: JsonService,
    hosts: Vec<JsonHost>,
    disks: Vec<JsonDisk>,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct JsonGroups {
    total: usize,
    /// With a leader.
    alive: usize,
    /// With a leader and exactly the voters they are to have.
    settled: usize,
    /// Of those: with all that the leader has on every voter, but for what is on its way.
    caught_up: usize,
    /// Of whose voters so many are away that nothing can be changed.
    quorum_lost: Vec<u16>,
    /// With fewer live voters than they are to have.
    under_replicated: Vec<u16>,
}

#[derive(Debug, Serialize)]
struct JsonShards {
    total: u32,
    alive: u32,
    hosts: Vec<Leads>,
}

/// What a host leads.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Leads {
    host: String,
    address: String,
    /// `0-127,200`.
    shards: String,
    alive: usize,
    log_bytes: u64,
}

#[derive(Debug, Serialize)]
struct JsonService {
    host: Option<String>,
    address: String,
    alive: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    transactions: Option<u32>,
}

impl Status {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let mut map = heard_map(client).await?;
        in_order(&mut map.block_services);
        let (summary, groups) = (summarize(&map), groups(&map));
        let mut out = context.out();
        if self.json.json {
            out.json(&json(client.cluster_id().to_string(), &summary, &map))?;
        } else {
            let shuckle = context.global.shuckle.join(", ");
            out.line(format_args!("cluster      {} at {shuckle}", client.cluster_id()))?;
            out.line(text(&summary, &groups, &map))?;
            if !map.stores.is_empty() {
                out.line("")?;
                out.line(host_table(&map))?;
            }
            if !map.block_services.is_empty() {
                out.line("")?;
                out.line(disk_table(&map.block_services, client.now()))?;
            }
        }
        out.finish()?;
        let well = summary.state == State::Healthy && groups.caught_up == all();
        if self.check && !well { Err(Failure::Reported) } else { Ok(()) }
    }
}

/// How many groups a cluster has.
fn all() -> usize {
    use pb::StoreKind::{StoreCrossdir, StoreShard, StoreShuckle};
    [StoreShard, StoreCrossdir, StoreShuckle].into_iter().map(|kind| groups_of(kind).count()).sum()
}

/// Every voter has nearly all that the leader has: any of them may lead next.
fn is_caught_up(place: &pb::GroupPlace) -> bool {
    place.voters.iter().filter(|&&store| store != place.leader).all(|&store| {
        let progress = place.progress.iter().find(|progress| progress.store == store);
        progress.is_some_and(|progress| progress.matched_index + BEHIND_MAX >= place.applied_index)
    })
}

fn groups(map: &pb::ClusterMapReply) -> JsonGroups {
    let view = View::new(map);
    let mut groups = JsonGroups { total: map.groups.len(), ..JsonGroups::default() };
    for place in &map.groups {
        let number = u16::try_from(place.group).unwrap_or(u16::MAX);
        let alive = |stores: &[u64]| stores.iter().filter(|&&store| view.is_alive(store)).count();
        groups.alive += usize::from(place.alive);
        groups.settled += usize::from(is_settled(place));
        groups.caught_up += usize::from(is_settled(place) && is_caught_up(place));
        if alive(&place.voters) * 2 <= place.voters.len() && !place.voters.is_empty() {
            groups.quorum_lost.push(number);
        }
        if alive(&place.voters) < crate::members::wanted(place).len() {
            groups.under_replicated.push(number);
        }
    }
    groups
}

fn text(summary: &Summary, groups: &JsonGroups, map: &pb::ClusterMapReply) -> String {
    let mut lines = vec![format!("health       {}", summary.state)];
    lines.extend(summary.reasons.iter().map(|reason| format!("             {}", reason.text)));
    lines.push(format!("shards       {} of {} served", summary.shards_alive, summary.shards));
    for host in leads(map) {
        lines.push(format!("             {} at {}: {}", host.host, host.address, host.shards));
    }
    lines.push(format!("coordinator  {}", coordinator(map)));
    lines.push(format!("registry     {}", led_by(map, GroupId::SHUCKLE)));
    lines.push(format!("replicas     {}", replicas(groups, map)));
    let usable = summary.total.disks_writable;
    lines.push(format!("disks        {usable} of {} take new blocks", map.block_services.len()));
    lines.join("\n")
}

fn replicas(groups: &JsonGroups, map: &pb::ClusterMapReply) -> String {
    let JsonGroups { total, settled, under_replicated, quorum_lost, .. } = groups;
    let mut text =
        format!("{} of each; {settled} of {total} groups have theirs and a leader", map.replicas.max(1));
    for (what, groups) in [("under-replicated", under_replicated), ("quorum lost", quorum_lost)] {
        if !groups.is_empty() {
            text.push_str(&format!("; {} {what}", groups.len()));
        }
    }
    text
}

fn place(map: &pb::ClusterMapReply, group: GroupId) -> Option<&pb::GroupPlace> {
    map.groups.iter().find(|place| place.group == u32::from(group.0))
}

fn led_by(map: &pb::ClusterMapReply, group: GroupId) -> String {
    let view = View::new(map);
    match place(map, group) {
        None => "it has no replicas yet".to_owned(),
        Some(place) if !place.alive => format!("no live leader; replicas on {}", view.hosts(&place.voters)),
        Some(place) => match view.store(place.leader) {
            Some(store) => format!("led by {} at {}", store.host, store.address),
            None => format!("led by {}", view.host(place.leader)),
        },
    }
}

fn coordinator(map: &pb::ClusterMapReply) -> String {
    let led = led_by(map, GroupId::CROSSDIR);
    match place(map, GroupId::CROSSDIR) {
        Some(place) if place.alive => format!("{led}, {} transactions in flight", map.crossdir_transactions),
        _ => led,
    }
}

/// The shards by the host that leads them.
fn leads(map: &pb::ClusterMapReply) -> Vec<Leads> {
    let view = View::new(map);
    let mut led = BTreeMap::<(&str, &str), Vec<&pb::GroupPlace>>::new();
    let shards = map.groups.iter().filter(|place| place.alive && place.group < GroupId::CROSSDIR.0.into());
    for place in shards {
        if let Some(store) = view.store(place.leader) {
            led.entry((&store.host, &store.address)).or_default().push(place);
        }
    }
    let leads = |((host, address), places): ((&str, &str), Vec<&pb::GroupPlace>)| Leads {
        host: host.to_owned(),
        address: address.to_owned(),
        alive: places.len(),
        log_bytes: places.iter().map(|place| place.log_bytes).fold(0, u64::saturating_add),
        shards: ranges(places.iter().map(|place| place.group).collect()),
    };
    led.into_iter().map(leads).collect()
}

/// `0-2,7`.
fn ranges(mut numbers: Vec<u32>) -> String {
    /// Leaders are spread evenly: a list of them all tells nobody anything.
    const RUNS_MAX: usize = 8;
    numbers.sort_unstable();
    numbers.dedup();
    let runs: Vec<&[u32]> = numbers.chunk_by(|a, b| a.checked_add(1) == Some(*b)).collect();
    let texts = runs.iter().take(RUNS_MAX).map(|run| match run {
        [one] => one.to_string(),
        [first, .., last] => format!("{first}-{last}"),
        [] => String::new(),
    });
    let text = texts.collect::<Vec<_>>().join(",");
    if runs.len() > RUNS_MAX { format!("{text},… ({} shards)", numbers.len()) } else { text }
}

fn json(cluster_id: String, summary: &Summary, map: &pb::ClusterMapReply) -> JsonStatus {
    let view = View::new(map);
    let service = |group, transactions| {
        let place = place(map, group);
        let leader = place.filter(|place| place.alive).and_then(|place| view.store(place.leader));
        JsonService {
            host: leader.map(|leader| leader.host.clone()),
            address: leader.map(|leader| leader.address.clone()).unwrap_or_default(),
            alive: place.is_some_and(|place| place.alive),
            transactions,
        }
    };
    JsonStatus {
        cluster_id,
        health: summary.state.as_str(),
        problems: summary.reasons.iter().map(|reason| reason.text.clone()).collect(),
        replicas: map.replicas,
        groups: groups(map),
        shards: JsonShards { total: summary.shards, alive: summary.shards_alive, hosts: leads(map) },
        crossdir: service(GroupId::CROSSDIR, Some(map.crossdir_transactions)),
        shuckle: service(GroupId::SHUCKLE, None),
        hosts: json_hosts(map),
        disks: map.block_services.iter().map(JsonDisk::of).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::tests::map;

    #[test]
    fn golden_text() {
        let mut map = map();
        for disk in &mut map.block_services {
            (disk.capacity_bytes, disk.available_bytes) = (1000, 500);
        }
        assert_eq!(
            text(&summarize(&map), &groups(&map), &map),
            "health       healthy\n\
             shards       256 of 256 served\n             b at b:5000: 0-255\n\
             coordinator  led by b at b:5000, 0 transactions in flight\n\
             registry     led by b at b:5000\n\
             replicas     3 of each; 258 of 258 groups have theirs and a leader\n\
             disks        2 of 2 take new blocks"
        );
        let mut full = map;
        full.block_services[0].available_bytes = 0;
        full.block_services[1].read_only = true;
        assert!(
            text(&summarize(&full), &groups(&full), &full).ends_with("disks        0 of 2 take new blocks")
        );
    }

    #[test]
    fn groups_in_trouble_are_counted() {
        let mut map = map();
        map.stores.iter_mut().filter(|store| store.host == "a").for_each(|store| store.alive = false);
        let found = groups(&map);
        assert_eq!((found.total, found.alive, found.settled, found.caught_up), (258, 258, 258, 258));
        map.groups[0].applied_index = 10_000;
        map.groups[1].progress.truncate(1);
        assert_eq!((groups(&map).settled, groups(&map).caught_up), (258, 256));
        assert_eq!((found.under_replicated.len(), found.quorum_lost.len()), (258, 0));
        map.stores.iter_mut().filter(|store| store.host == "b").for_each(|store| store.alive = false);
        map.groups.iter_mut().for_each(|place| place.alive = false);
        let found = groups(&map);
        assert_eq!((found.alive, found.settled, found.quorum_lost.len()), (0, 0, 258));
        let text = text(&summarize(&map), &found, &map);
        for part in ["unavailable", "quorum lost", "hosts a, b", "no live leader; replicas on a, b, c"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(groups(&map).total == all());
    }

    #[test]
    fn shards_are_ranges() {
        assert_eq!(ranges(vec![]), "");
        assert_eq!(ranges(vec![2, 1, 0, 7, 9, 10]), "0-2,7,9-10");
        assert_eq!(ranges(vec![u32::MAX]), u32::MAX.to_string());
        let spread = ranges((0..86).map(|n| 3 * n).collect());
        assert_eq!(spread, "0,3,6,9,12,15,18,21,… (86 shards)");
    }
}
