//! A shuckle with a made-up cluster registered through its real port, to look at the dashboard:
//! `cargo run -p eggs-shuckle --example dashboard [ADDR:PORT]`.
//!
//! Two shard hosts (one falls silent), twelve disks (one lost, those of one host fall silent), a
//! coordinator, reported blocks, a flag.

use std::time::Duration;

use eggs_daemon::registry::Registry;
use eggs_daemon::{CancellationToken, Secret, metrics, server};
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{flags, pb};
use eggs_shuckle::{Config, SecretSource, Service};

const GIB: u64 = 1 << 30;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:5000".to_owned());
    let directory = tempfile::tempdir()?;
    let secret = Secret::random()?;
    let service = Service::open(Config {
        directory: directory.path().join("shuckle"),
        secret: SecretSource::Given(secret.clone()),
        patience: Duration::ZERO,
    })
    .await?;
    let listener = server::bind(address.parse()?).await?;
    let stop = eggs_daemon::signal::shutdown()?;
    let router = service.router().merge(metrics::router(service.health()));
    let served = tokio::spawn(server::serve(listener, router, stop.clone()));
    println!("http://{address}/");
    pretend(Registry::join(&address, Some(secret), None, &stop).await?, &stop).await?;
    served.await?;
    service.stop().await;
    Ok(())
}

async fn pretend(registry: Registry, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut silent = vec![shards("10.0.0.12:5001", 200..256), disks("10.0.0.13:5003", 9..12, 3)];
    let lively = [
        shards("10.0.0.11:5001", 0..200),
        disks("10.0.0.11:5003", 1..5, 3),
        disks("10.0.0.12:5003", 5..9, 2),
    ];
    for op in silent.drain(..) {
        registry.call(op).await?;
    }
    let mut first = true;
    while !stop.is_cancelled() {
        for op in &lively {
            registry.call(op.clone()).await?;
        }
        let crossdir = pb::RegisterCrossdir { address: "10.0.0.11:5002".to_owned(), transactions: 3 };
        registry.call(Op::RegisterCrossdir(crossdir)).await?;
        if std::mem::take(&mut first) {
            registry
                .call(Op::SetFlags(pb::SetFlags {
                    block_services: vec![disk_id(2)],
                    set: flags::NO_WRITE,
                    clear: 0,
                }))
                .await?;
            let kind = pb::BadBlockKind::BadBlockCorrupt.into();
            let block =
                pb::BadBlock { block_service: disk_id(6), block: 77, file: 0x2020_0000_0000_0003, kind };
            registry.call(Op::ReportBlocks(pb::ReportBlocks { blocks: vec![block] })).await?;
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
            () = stop.cancelled() => {}
        }
    }
    Ok(())
}

fn shards(address: &str, range: std::ops::Range<u32>) -> Op {
    let report = |shard| pb::ShardReport {
        shard,
        leader: true,
        applied_index: 1000 + u64::from(shard) * 37,
        log_bytes: 70_000,
    };
    Op::RegisterShards(pb::RegisterShards {
        address: address.to_owned(),
        shards: range.map(report).collect(),
    })
}

fn disk_id(n: u64) -> u64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn disks(address: &str, range: std::ops::Range<u64>, storage_class: u32) -> Op {
    let report = |n: u64| {
        let capacity_bytes = if storage_class == 2 { 16_000 * GIB } else { 1_900 * GIB };
        let used_bytes = capacity_bytes / 100 * (11 + n * 13 % 70);
        let lost = n == 3;
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
        }
    };
    Op::RegisterBlockServices(pb::RegisterBlockServices {
        address: address.to_owned(),
        failure_domain: "rack".to_owned(),
        block_services: range.map(report).collect(),
    })
}
