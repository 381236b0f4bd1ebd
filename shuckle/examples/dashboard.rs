//! A shuckle with a made-up cluster registered through its real port, to look at the dashboard:
//! `cargo run -p eggs-shuckle --example dashboard [ADDR:PORT]`.
//!
//! Four hosts: one falls silent, one is drained and its shards are on their way, one has a clock that is off.
//! Twelve disks (one lost, those of one host fall silent), a coordinator, reported blocks, a flag.

use std::time::Duration;

use eggs_consensus::peer_streams;
use eggs_daemon::registry::Registry;
use eggs_daemon::server::{self, Routes};
use eggs_daemon::{CancellationToken, Secret, metrics};
use eggs_proto::pb::StoreKind::{self, StoreCrossdir, StoreShard};
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{flags, pb};
use eggs_shuckle::{Config, SecretSource, Service};

const GIB: u64 = 1 << 30;
const HOSTS: [&str; 4] = ["mars", "venus", "saturn", "pluto"];
const DRAINED: &str = "saturn";
const SILENT: &str = "pluto";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:5000".to_owned());
    let directory = tempfile::tempdir()?;
    let secret = Secret::random()?;
    let service = Service::open(Config {
        directory: directory.path().join("shuckle"),
        secret: SecretSource::Given(secret.clone()),
        host: HOSTS[0].to_owned(),
        advertised: address.clone(),
        peers: Vec::new(),
        replicas: 3,
        replace_after: Config::REPLACE_AFTER,
        read_lease: false,
        snapshot_bytes_per_second: 64 << 20,
        patience: Duration::ZERO,
    })
    .await?;
    let listener = server::bind(address.parse()?).await?;
    let stop = eggs_daemon::signal::shutdown()?;
    let router = service.router();
    let router = router.merge(metrics::router(service.health()));
    let routes = Routes::from(router).with(peer_streams(vec![service.peers()]));
    let served = tokio::spawn(server::serve(listener, routes, stop.clone()));
    println!("http://{address}/");
    let pretended = async {
        let registry = Registry::join(std::slice::from_ref(&address), Some(secret), None, &stop).await?;
        pretend(registry, &stop).await
    };
    let (ran, pretended) = tokio::join!(service.run(stop.clone()), pretended);
    served.await?;
    service.stop().await;
    ran?;
    pretended
}

async fn pretend(registry: Registry, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut silent = Some(disks("10.0.0.13:5003", 9..12, 3, false));
    let mut round = 0;
    while !stop.is_cancelled() {
        let map = registry.map(false).await?;
        for (number, host) in HOSTS.iter().enumerate() {
            // One host goes once all is founded.
            if *host == SILENT && round > 6 {
                continue;
            }
            for kind in [StoreShard, StoreCrossdir] {
                registry.call(store(&map, number, kind, round)).await?;
            }
        }
        // A disk is lost only after it was there.
        let lively =
            [disks("10.0.0.11:5003", 1..5, 3, round > 0), disks("10.0.0.12:5003", 5..9, 2, round > 0)];
        for op in silent.take().iter().chain(&lively) {
            registry.call(op.clone()).await?;
        }
        if round == 0 {
            let set = pb::SetFlags { block_services: vec![disk_id(2)], set: flags::NO_WRITE, clear: 0 };
            registry.call(Op::SetFlags(set)).await?;
            let kind = pb::BadBlockKind::BadBlockCorrupt.into();
            let block =
                pb::BadBlock { block_service: disk_id(6), block: 77, file: 0x2020_0000_0000_0003, kind };
            registry.call(Op::ReportBlocks(pb::ReportBlocks { blocks: vec![block] })).await?;
        }
        if round == 8 {
            registry.call(Op::DrainHost(pb::DrainHost { host: DRAINED.to_owned(), undo: false })).await?;
        }
        round += 1;
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            () = stop.cancelled() => {}
        }
    }
    Ok(())
}

/// The heartbeat of a store: it leads what it is to lead, and moves one shard after the other.
fn store(map: &pb::ClusterMapReply, number: usize, kind: StoreKind, round: u64) -> Op {
    let id = 0xe995_0000_0000_0000 + (number as u64 + 1) * 16 + kind as u64;
    let silent = 0xe995_0000_0000_0000 + HOSTS.len() as u64 * 16 + kind as u64;
    let leads = |place: &&pb::GroupPlace| {
        let first = place.wanted.iter().copied().find(|&store| store != silent);
        let of_kind = (place.group == 256) == (kind == StoreCrossdir) && place.group < 257;
        of_kind
            && if round > 6 && place.preferred == silent { first == Some(id) } else { place.preferred == id }
    };
    let led = |place: &pb::GroupPlace| {
        let applied_index = 1000 + u64::from(place.group) * 37 + round * 3;
        let voters = if place.voters.is_empty() { &place.wanted } else { &place.voters };
        let coming: Vec<u64> = place.wanted.iter().copied().filter(|store| !voters.contains(store)).collect();
        let arrived = (round + u64::from(place.group)).is_multiple_of(40);
        let members = if arrived { &place.wanted } else { voters };
        let learners = if arrived { Vec::new() } else { coming };
        let changed = members != &place.voters || learners != place.learners;
        let progress = members.iter().chain(&learners).filter(|&&store| store != id).map(|&store| {
            let learner = learners.contains(&store);
            pb::ReplicaProgress {
                store,
                matched_index: if learner { 0 } else { applied_index - u64::from(store == silent) * 12 },
                snapshot_sent: if learner { (round % 40) * GIB / 40 } else { 0 },
                snapshot_total: if learner { GIB } else { 0 },
            }
        });
        pb::LedGroup {
            group: place.group,
            term: 2 + round / 7,
            applied_index,
            log_bytes: 70_000,
            progress: progress.collect(),
            conf_index: place.conf_index + u64::from(changed && !place.voters.is_empty()),
            voters: members.clone(),
            learners,
        }
    };
    let late = number == 1;
    Op::RegisterStore(pb::RegisterStore {
        id,
        kind: kind.into(),
        host: HOSTS[number].to_owned(),
        address: format!("10.0.0.{}:{}", 11 + number, 5000 + kind as i32),
        clock_offset: if late { -700_000_000 } else { 180_000 * (number as i64 + 1) },
        problem: if late && kind == StoreShard {
            "its clock is 700 ms behind the other hosts'".to_owned()
        } else {
            String::new()
        },
        led: map.groups.iter().filter(leads).map(led).collect(),
        transactions: 3,
        slow_transactions: vec![pb::TransactionInfo {
            transaction: 4711,
            kind: "mkdir".to_owned(),
            started_at: eggs_daemon::clock::wall().0 - 42_000_000_000,
            step: "waits for shard 17".to_owned(),
            finished: false,
        }],
        boot: 7,
    })
}

fn disk_id(n: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn disks(address: &str, range: std::ops::Range<u64>, storage_class: u32, lose: bool) -> Op {
    let report = |n: u64| {
        let capacity_bytes = if storage_class == 2 { 16_000 * GIB } else { 1_900 * GIB };
        let used_bytes = capacity_bytes / 100 * (11 + n * 13 % 70);
        let lost = lose && n == 3;
        pb::BlockServiceReport {
            id: disk_id(n),
            key: vec![n as u8; 32].into(),
            storage_class,
            failure_domain: format!("rack-{}/slot-{n}", 1 + n % 3),
            path: format!("/srv/eggs/disk{n:02}"),
            capacity_bytes,
            available_bytes: capacity_bytes - used_bytes,
            used_bytes,
            blocks: used_bytes / (9 << 20),
            io_errors: if lost { 4 } else { 0 },
            // Hostile on purpose: it must show as text.
            problem: if lost {
                "identity file is gone: <b>No such file</b> (os error 2)".to_owned()
            } else {
                String::new()
            },
            ..Default::default()
        }
    };
    Op::RegisterBlockServices(pb::RegisterBlockServices {
        address: address.to_owned(),
        failure_domain: "rack".to_owned(),
        block_services: range.map(report).collect(),
        ..Default::default()
    })
}
