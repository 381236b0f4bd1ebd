//! Suite `data`: contents in and out, beside what the disk, the loopback and the code alone can do.
//!
//! The contents are random and come from memory, so that neither the reading of a source nor zeros that cost nothing
//! flatter a figure. What comes out is compared by CRC with what went in, and then forgotten. Reads are of files
//! just written: the page cache of the disks' host is warm.
//!
//! `raw`: those limits. `direct`: what segments do to a disk, buffered and around the page cache. `large`: one file of 1 GiB in two codes, whole and with as many disks gone as the code allows. `small`: many files of
//! 1 KiB, 64 KiB and 1 MiB. `slow`: reads of 4 KiB while one disk is slow. `repair`: a lost disk's blocks made anew.

mod direct;
pub mod large;
mod proxy;
mod raw;
mod repair;
mod slow;
mod small;

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use eggs_client::Client;
use eggs_proto::pb::{self, PolicyKind};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Setup;
use super::cluster::Cluster;
use super::measure;
use super::report::{Report, Sample};

/// Random bytes to go round in: longer than any cache, shorter than memory.
const RANDOM_BYTES: usize = 64 << 20;
/// fsyncs of the process, of disks and of logs.
const FSYNCS: [&str; 2] = ["eggs_disk_syncs_total", "eggs_consensus_fsyncs_total"];

/// Disks tell of their fsyncs once a second.
const TOLD_AFTER: Duration = Duration::from_millis(1500);

pub async fn run(setup: &Setup, report: &mut Report) -> Result<()> {
    let random = random_bytes();
    raw::rows(setup, report, &random)?;
    direct::rows(setup, report, &random)?;
    large::run(setup, report, &random).await?;
    small::run(setup, report, &random).await?;
    slow::run(setup, report, &random).await?;
    repair::run(setup, report, &random).await
}

/// A code of `data` + `parity` blocks.
#[derive(Debug, Clone, Copy)]
struct Code {
    data: u32,
    parity: u32,
}

/// Makes a directory whose files are cut into spans of at most `span_bytes` of this code, and nothing else.
async fn coded_directory(client: &Client, path: &str, code: Code, span_bytes: u32) -> Result<()> {
    client.mkdir(path, None).await?;
    let rule = pb::SpanRule { max_size: span_bytes, data: code.data, parity: code.parity };
    let span = pb::SpanPolicy { rules: vec![rule] };
    let policies = pb::Policies { span: Some(span), ..pb::Policies::default() };
    client.set_policy(path, PolicyKind::PolicySpan, Some(policies)).await?;
    Ok(())
}

/// What a transfer cost, beside its time.
struct Cost {
    seconds: f64,
    /// CPU of server and client.
    cpu: f64,
    /// Bytes the server's host was made to write.
    written: f64,
    fsyncs: f64,
}

/// Times something the cluster does, and counts what it costs.
async fn costed(cluster: &Cluster, work: impl AsyncFnOnce() -> Result<()>) -> Result<Cost> {
    let (cpu, written, fsyncs) = (cluster.cpu()?, written(cluster)?, fsyncs(cluster)?);
    let began = Instant::now();
    work().await?;
    let seconds = began.elapsed().as_secs_f64();
    let cpu = cluster.cpu()? - cpu;
    tokio::time::sleep(TOLD_AFTER).await;
    Ok(Cost {
        seconds,
        cpu,
        written: self::written(cluster)? - written,
        fsyncs: self::fsyncs(cluster)? - fsyncs,
    })
}

fn written(cluster: &Cluster) -> Result<f64> {
    cluster.pid().map_or(Ok(f64::NAN), measure::written_bytes)
}

fn fsyncs(cluster: &Cluster) -> Result<f64> {
    FSYNCS.iter().map(|name| cluster.counter(name)).sum()
}

impl Cost {
    /// Units per second, and CPU for each.
    fn rate(&self, units: f64) -> Sample {
        Sample { value: units / self.seconds, cpu_per_unit: Some(self.cpu / units) }
    }

    /// MB/s, and CPU seconds per GiB.
    fn throughput(&self, bytes: u64) -> Sample {
        raw::sample(bytes, self.seconds, self.cpu)
    }
}

/// The same bytes on every machine.
pub fn random_bytes() -> Bytes {
    let mut bytes = vec![0; RANDOM_BYTES];
    ChaCha8Rng::seed_from_u64(1).fill_bytes(&mut bytes);
    bytes.into()
}

/// The disks' folders of a cluster of ours.
fn disk_folder(setup: &Setup, disk: u32) -> std::path::PathBuf {
    setup.scratch.path().join("cluster/disks").join(format!("{disk:02}"))
}

/// Takes disks away, and waits until the registry has heard of it.
async fn take_disks(setup: &Setup, client: &Client, disks: std::ops::Range<u32>) -> Result<()> {
    for disk in disks.clone() {
        let folder = disk_folder(setup, disk);
        std::fs::rename(&folder, folder.with_extension("gone")).context("disks of a cluster of our own")?;
    }
    until(|| async {
        let map = client.cluster_map().await?;
        let gone = map.block_services.iter().filter(|service| !service.problem.is_empty()).count();
        Ok(gone >= disks.len())
    })
    .await
    .context("lost disks were not noticed")
}

/// Waits until something is so.
async fn until<F, So>(so: F) -> Result<()>
where
    F: Fn() -> So,
    So: Future<Output = Result<bool>>,
{
    const PATIENCE: Duration = Duration::from_secs(600);
    let began = Instant::now();
    while !so().await? {
        anyhow::ensure!(began.elapsed() < PATIENCE, "not after {} s", PATIENCE.as_secs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
