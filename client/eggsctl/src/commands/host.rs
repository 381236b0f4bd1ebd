//! `host`: the machines of the cluster.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use eggs_proto::{StoreId, Time, pb};
use eggs_shuckle_core::{hosts, kind_name};
use serde::Serialize;

use crate::cli::JsonFlag;
use crate::context::Context;
use crate::failure::Outcome;
use crate::members::heard_map;
use crate::output::{json_time, table, table_text};
use crate::times;

/// Look at the machines of the cluster
#[derive(Debug, Args)]
#[command(visible_alias = "hosts", args_conflicts_with_subcommands = true)]
pub struct Host {
    #[command(subcommand)]
    command: Option<HostCommand>,
    #[command(flatten)]
    list: HostList,
}

#[derive(Debug, Subcommand)]
enum HostCommand {
    /// List the hosts: what runs there, how many replicas and leaders they have, how their clocks are
    ///
    /// Example: eggsctl host ls
    Ls(HostList),
}

#[derive(Debug, Args)]
struct HostList {
    #[command(flatten)]
    json: JsonFlag,
}

/// A host in JSON.
#[derive(Debug, Serialize)]
pub struct JsonHost {
    host: String,
    alive: bool,
    draining: bool,
    replicas: u32,
    leaders: u32,
    clock_offset_ns: i64,
    /// Of a host that is drained: replicas that wait for another host that can take them.
    stuck: u32,
    stores: Vec<JsonStore>,
}

#[derive(Debug, Serialize)]
struct JsonStore {
    id: String,
    kind: &'static str,
    address: String,
    alive: bool,
    draining: bool,
    replicas: u32,
    leaders: u32,
    clock_offset_ns: i64,
    last_seen_ns: u64,
    last_seen: Option<String>,
    registered_at_ns: u64,
    registered_at: Option<String>,
    problem: String,
}

impl Host {
    pub async fn run(self, context: &Context) -> Outcome {
        let json = match self.command {
            Some(HostCommand::Ls(list)) => list.json.json,
            None => self.list.json.json,
        };
        let client = context.client().await?;
        let map = heard_map(client).await?;
        let mut out = context.out();
        if json {
            out.json(&json_hosts(&map))?;
        } else if map.stores.is_empty() {
            out.line("no host has registered yet")?;
        } else {
            out.line(host_table(&map))?;
        }
        out.finish()
    }
}

fn stores_of<'a>(map: &'a pb::ClusterMapReply, host: &'a str) -> impl Iterator<Item = &'a pb::StoreInfo> {
    map.stores.iter().filter(move |store| store.host == host)
}

pub fn json_hosts(map: &pb::ClusterMapReply) -> Vec<JsonHost> {
    let host = |host: eggs_shuckle_core::Host| JsonHost {
        stores: stores_of(map, &host.name).map(json_store).collect(),
        alive: host.alive,
        draining: host.draining,
        replicas: host.replicas,
        leaders: host.leaders,
        clock_offset_ns: host.clock_offset,
        stuck: host.stuck,
        host: host.name,
    };
    hosts(map).into_iter().map(host).collect()
}

fn json_store(store: &pb::StoreInfo) -> JsonStore {
    JsonStore {
        id: StoreId(store.id).to_string(),
        kind: kind_name(store.kind()),
        address: store.address.clone(),
        alive: store.alive,
        draining: store.draining,
        replicas: store.replicas,
        leaders: store.leaders,
        clock_offset_ns: store.clock_offset,
        last_seen_ns: store.last_seen,
        last_seen: json_time(Time(store.last_seen)),
        registered_at_ns: store.registered_at,
        registered_at: json_time(Time(store.registered_at)),
        problem: store.problem.clone(),
    }
}

/// One line per host.
pub fn host_table(map: &pb::ClusterMapReply) -> String {
    let header = ["HOST", "STATE", "REPLICAS", "LEADERS", "CLOCK", "STORES"];
    let mut table = table(&header, &[2, 3, 4]);
    for host in hosts(map) {
        table.add_row([
            host.name.clone(),
            host_state(&host, map),
            host.replicas.to_string(),
            host.leaders.to_string(),
            clock(host.clock_offset),
            stores_text(map, &host.name),
        ]);
    }
    table_text(&table)
}

/// `ok`, or everything that is the matter.
fn host_state(host: &eggs_shuckle_core::Host, map: &pb::ClusterMapReply) -> String {
    let mut words = Vec::new();
    if !host.alive {
        let seen = stores_of(map, &host.name).map(|store| store.last_seen).max().unwrap_or(0);
        words.push(format!("away, last seen {}", times::age(Time(seen), Time(map.now))));
    } else if host.stores_alive < host.stores {
        let away = stores_of(map, &host.name).filter(|store| !store.alive);
        let kinds: Vec<&str> = away.map(|store| kind_name(store.kind())).collect();
        words.push(format!("{} away", kinds.join(", ")));
    }
    match host.drain() {
        Some(drain) => words.push(format!("draining: {drain}")),
        None if host.draining => words.push("drained".to_owned()),
        None => {}
    }
    for store in stores_of(map, &host.name).filter(|store| store.alive && !store.problem.is_empty()) {
        let problem = crate::paths::escape(store.problem.as_bytes());
        words.push(format!("{}: {problem}", kind_name(store.kind())));
    }
    if words.is_empty() { "ok".to_owned() } else { words.join("; ") }
}

/// `+12 ms`.
pub fn clock(nanoseconds: i64) -> String {
    let milliseconds = nanoseconds as f64 / 1e6;
    if milliseconds.abs() < 0.5 { "0 ms".to_owned() } else { format!("{milliseconds:+.0} ms") }
}

/// `10.0.0.1:5000 crossdir, shard, shuckle`: the kinds at each address.
fn stores_text(map: &pb::ClusterMapReply, host: &str) -> String {
    let mut kinds = BTreeMap::<&str, Vec<&str>>::new();
    for store in stores_of(map, host) {
        let at = kinds.entry(&store.address).or_default();
        let kind = kind_name(store.kind());
        if !at.contains(&kind) {
            at.push(kind);
        }
    }
    let text = |(address, mut kinds): (&str, Vec<&str>)| {
        kinds.sort_unstable();
        format!("{address} {}", kinds.join(", "))
    };
    let texts = kinds.into_iter().map(text);
    texts.collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::tests::map;

    #[test]
    fn golden_hosts() {
        let mut map = map();
        let on = |host: &'static str| move |store: &&mut pb::StoreInfo| store.host == host;
        map.stores.iter_mut().filter(on("a")).for_each(|store| store.alive = false);
        map.stores.iter_mut().filter(on("c")).for_each(|store| store.draining = true);
        map.stores[3].clock_offset = 12_300_000;
        assert_eq!(
            host_table(&map),
            "HOST  STATE                                                                                            REPLICAS  LEADERS   CLOCK  STORES\n\
             a     away, last seen 1s ago                                                                                258        0    0 ms  a:5000 crossdir, shard, shuckle\n\
             b     ok                                                                                                    258      768  +12 ms  b:5000 crossdir, shard, shuckle\n\
             c     draining: 258 replicas still to move, 258 of them wait for another live host that can take them       258        0    0 ms  c:5000 crossdir, shard, shuckle"
        );
    }

    #[test]
    fn clocks_are_told_in_milliseconds() {
        assert_eq!(clock(0), "0 ms");
        assert_eq!(clock(-400_000), "0 ms");
        assert_eq!(clock(-700_000_000), "-700 ms");
    }
}
