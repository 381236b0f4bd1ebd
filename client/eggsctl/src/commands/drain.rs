//! `drain`: everything off a host, or back.

use std::net::{SocketAddr, ToSocketAddrs as _};

use clap::Args;
use eggs_client::Client;
use eggs_proto::{BlockServiceId, flags, pb};
use eggs_shuckle_core::hosts;
use serde::Serialize;

use crate::cli::{JsonFlag, SecretArgs};
use crate::context::{Context, failure};
use crate::failure::{Failure, Outcome};
use crate::progress::Line;

/// Move every replica and leader off a host
///
/// Its disks take no new blocks from then on; blocks that are there stay (`eggsctl disk drain` moves them). Waits until no
/// replica and no leader is left, which needs other hosts that can take them; interrupted, the cluster goes
/// on. Example: eggsctl drain host-a; later: eggsctl drain host-a --undo
#[derive(Debug, Args)]
pub struct Drain {
    /// The host, by name: `eggsctl host ls` lists them
    #[arg(value_name = "HOST")]
    host: String,
    /// Let the host take part again
    #[arg(long)]
    undo: bool,
    /// Do not wait until it is done
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    json: JsonFlag,
    #[command(flatten)]
    secret: SecretArgs,
}

#[derive(Debug, Serialize)]
struct JsonDrain {
    host: String,
    draining: bool,
    /// No replica and no leader is there.
    empty: bool,
    replicas: u32,
    leaders: u32,
    /// Whose flag NO_WRITE was set or cleared.
    block_services: Vec<String>,
}

impl Drain {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.admin(&self.secret).await?;
        let on_host = |error| failure(&self.host, error);
        client.drain_host(&self.host, self.undo).await.map_err(on_host)?;
        let map = client.cluster_map().await.map_err(on_host)?;
        let disks = disks_of(&map, &self.host);
        let (set, clear) = if self.undo { (0, flags::NO_WRITE) } else { (flags::NO_WRITE, 0) };
        if !disks.is_empty() {
            client.set_flags(&disks, set, clear).await.map_err(on_host)?;
        }
        if !self.undo && !self.no_wait {
            self.wait(context, client).await?;
        }
        let map = client.cluster_map().await.map_err(on_host)?;
        let mut out = context.out();
        if self.json.json {
            out.json(&self.json(&map, &disks))?;
        } else {
            out.line(self.text(&map, disks.len()))?;
        }
        out.finish()
    }

    /// Until nothing is left there. Without --timeout: however long it takes.
    async fn wait(&self, context: &Context, client: &Client) -> Outcome {
        let (mut line, mut left) = (Line::start(), String::new());
        let timeout = context.global.wait_timeout();
        let done = client.wait_for(timeout, |map| {
            let (replicas, leaders) = what_is_left(map, &self.host);
            if replicas == 0 && leaders == 0 {
                return Some(());
            }
            left = progress(map, &self.host, replicas, leaders);
            line.say(&format!("{}: {left}", self.host));
            None
        });
        match done.await.map_err(|error| failure(&self.host, error))? {
            Some(()) => Ok(()),
            None => {
                let seconds = timeout.as_secs_f64();
                let reason = format!("not empty after {seconds:.0} s: {left}; the cluster goes on with it");
                Err(Failure::refused(&self.host, reason))
            }
        }
    }

    fn json(&self, map: &pb::ClusterMapReply, disks: &[u64]) -> JsonDrain {
        let (replicas, leaders) = what_is_left(map, &self.host);
        JsonDrain {
            host: self.host.clone(),
            draining: !self.undo,
            empty: replicas == 0 && leaders == 0,
            replicas,
            leaders,
            block_services: disks.iter().map(|&id| BlockServiceId(id).to_string()).collect(),
        }
    }

    fn text(&self, map: &pb::ClusterMapReply, disks: usize) -> String {
        let host = &self.host;
        let (replicas, leaders) = what_is_left(map, host);
        if self.undo {
            let disks = match disks {
                0 => String::new(),
                disks => format!("; {} new blocks again", count(disks, "disk takes", "disks take")),
            };
            return format!(
                "{host}: takes part again; it gets its share of replicas little by little{disks}"
            );
        }
        let state = match (replicas, leaders) {
            (0, 0) => "drained: no replica and no leader is left on it".to_owned(),
            (replicas, leaders) => format!("draining: {}", progress(map, host, replicas, leaders)),
        };
        let disks = match disks {
            0 => "no disks are known to be on it".to_owned(),
            disks => format!(
                "{} no new blocks; the blocks that are there stay: `eggsctl disk drain` moves them",
                count(disks, "disk takes", "disks take")
            ),
        };
        format!("{host}: {state}\n{host}: {disks}")
    }
}

fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

/// Replicas (those that are still to be there too) and leaders on a host.
fn what_is_left(map: &pb::ClusterMapReply, host: &str) -> (u32, u32) {
    let is_there = |store: u64| map.stores.iter().any(|info| info.id == store && info.host == host);
    let (mut replicas, mut leaders) = (0, 0);
    for place in &map.groups {
        let mut members = place.voters.iter().chain(&place.learners).chain(&place.wanted);
        replicas += u32::from(members.any(|&store| is_there(store)));
        leaders += u32::from(place.alive && is_there(place.leader));
    }
    (replicas, leaders)
}

/// What is left, and what it waits for.
fn progress(map: &pb::ClusterMapReply, host: &str, replicas: u32, leaders: u32) -> String {
    let left = format!(
        "{} and {} left",
        count(replicas as usize, "replica", "replicas"),
        count(leaders as usize, "leader", "leaders")
    );
    match hosts(map).iter().find(|found| found.name == host).map_or(0, |found| found.stuck) {
        0 => left,
        stuck => format!("{left}; {stuck} of them wait for another live host that can take them"),
    }
}

/// The disks of a host: those at an address of its stores, in a failure domain of its name, or at another
/// port of an IP address that only this host has.
fn disks_of(map: &pb::ClusterMapReply, host: &str) -> Vec<u64> {
    let stores = |here: bool| map.stores.iter().filter(move |store| (store.host == host) == here);
    let ip = |address: &str| {
        let parsed = address.parse::<SocketAddr>().ok();
        parsed.or_else(|| address.to_socket_addrs().ok()?.next()).map(|address| address.ip())
    };
    let own_ips: Vec<_> = stores(true).filter_map(|store| ip(&store.address)).collect();
    let shared = stores(false).filter_map(|store| ip(&store.address)).any(|ip| own_ips.contains(&ip));
    let on_host = |disk: &&pb::BlockServiceInfo| {
        let domain = disk.failure_domain.as_str();
        domain == host
            || domain.strip_prefix(host).is_some_and(|rest| rest.starts_with('/'))
            || stores(true).any(|store| store.address == disk.address)
            || (!shared && ip(&disk.address).is_some_and(|ip| own_ips.contains(&ip)))
    };
    map.block_services.iter().filter(on_host).map(|disk| disk.id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::tests::map;

    fn disk(id: u64, address: &str, failure_domain: &str) -> pb::BlockServiceInfo {
        let (address, failure_domain) = (address.to_owned(), failure_domain.to_owned());
        pb::BlockServiceInfo { id, address, failure_domain, ..pb::BlockServiceInfo::default() }
    }

    #[test]
    fn what_is_left_and_what_it_waits_for() {
        let mut map = map();
        map.stores.iter_mut().filter(|store| store.host == "b").for_each(|store| store.draining = true);
        assert_eq!(what_is_left(&map, "b"), (258, 258));
        assert_eq!(
            progress(&map, "b", 258, 258),
            "258 replicas and 258 leaders left; 258 of them wait for another live host that can take them"
        );
        map.groups.truncate(1);
        map.groups[0].wanted = vec![11, 13];
        map.groups[0].leader = 11;
        assert_eq!(what_is_left(&map, "b"), (1, 0), "it is on its way");
        map.groups[0].voters = vec![11, 13];
        assert_eq!(what_is_left(&map, "b"), (0, 0));
    }

    #[test]
    fn the_disks_of_a_host_are_found() {
        let mut map = map();
        map.stores.iter_mut().for_each(|store| {
            let n = store.id % 10;
            store.address = format!("10.0.0.{n}:5000");
        });
        map.block_services = vec![
            disk(1, "10.0.0.1:5003", "rack-1"),
            disk(2, "10.0.0.2:5003", "rack-1"),
            disk(3, "10.9.9.9:1", "a"),
            disk(4, "10.9.9.9:1", "a/disk-0"),
            disk(5, "10.9.9.9:1", "ab"),
        ];
        assert_eq!(disks_of(&map, "a"), [1, 3, 4]);
        // All on one machine: the port tells them apart.
        map.stores.iter_mut().for_each(|store| {
            let n = store.id % 10;
            store.address = format!("127.0.0.1:500{n}");
        });
        map.block_services = vec![disk(1, "127.0.0.1:5001", "disk-0"), disk(2, "127.0.0.1:5002", "disk-1")];
        assert_eq!(disks_of(&map, "a"), [1]);
        assert!(disks_of(&map, "nobody").is_empty());
    }
}
