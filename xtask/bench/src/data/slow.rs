//! Reads of 4 KiB at random places of one file, while one of its disks answers 100 ms late: with hedges and without.
//!
//! The slow disk is a block service of its own behind a proxy that holds its answers back. The code is RS(4,2) over
//! exactly six disks, so that the slow one holds a block of every span: of data in two thirds of them.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use eggs_client::{Client, CreateOptions, Options};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::proxy::Proxy;
use super::{Code, coded_directory, large, until};
use crate::Setup;
use crate::cluster::Cluster;
use crate::report::{Report, Sample};

const CODE: Code = Code { data: 4, parity: 2 };
const DELAY: Duration = Duration::from_millis(100);
const SPAN_BYTES: u32 = 8 << 20;
const FILE_BYTES: u64 = 256 << 20;
const READ_BYTES: usize = 4096;
const READS: usize = 2000;

pub async fn run(setup: &Setup, report: &mut Report, random: &Bytes) -> Result<()> {
    let data = setup.scratch.fresh("cluster")?;
    let cluster = Cluster::start_with_disks(&setup.eggsctl, &data, CODE.data + CODE.parity - 1)?;
    let mut proxy = Proxy::bind().await?;
    let disk = SlowDisk::start(setup, &cluster, &data, proxy.address)?;
    proxy.pass(disk.address);
    let client = cluster.client().await?;
    until(|| async { Ok(client.cluster_map().await?.block_services.len() == 6) }).await?;
    coded_directory(&client, "/bench-slow", CODE, SPAN_BYTES).await?;
    let path = "/bench-slow/file";
    large::put(&client, path, FILE_BYTES, random, &CreateOptions::default()).await?;
    client.close().await;
    proxy.set_delay(DELAY);
    for (hedge, rows) in [
        (true, ["read_4k_slow_hedged_p50", "read_4k_slow_hedged_p99"]),
        (false, ["read_4k_slow_p50", "read_4k_slow_p99"]),
    ] {
        let (mut p50, mut p99): (Vec<Sample>, Vec<Sample>) = Default::default();
        for run in 0..setup.runs {
            let client = cluster.client_with(|options| Options { hedge, ..options }).await?;
            let mut took = reads(&client, path, random, run.into()).await?;
            took.sort_unstable();
            let at = |part: usize| (took[took.len() * part / 100].as_secs_f64() * 1e3).into();
            p50.push(at(50));
            p99.push(at(99));
            client.close().await;
        }
        report.row(rows[0], 1, "ms", &p50);
        report.row(rows[1], 1, "ms", &p99);
    }
    drop(disk);
    cluster.stop()
}

async fn reads(client: &Client, path: &str, random: &Bytes, seed: u64) -> Result<Vec<Duration>> {
    let reader = client.open(path).await?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut took = Vec::with_capacity(READS);
    for _ in 0..READS {
        let at = rng.random_range(0..FILE_BYTES / READ_BYTES as u64) * READ_BYTES as u64;
        let began = Instant::now();
        let bytes = reader.read_at(at, READ_BYTES).await?;
        took.push(began.elapsed());
        let from = (at % random.len() as u64) as usize;
        ensure!(bytes[..] == random[from..from + READ_BYTES], "wrong bytes at {at}");
    }
    Ok(took)
}

/// A block service with one disk, in a process of its own.
struct SlowDisk {
    child: Child,
    address: SocketAddr,
}

impl SlowDisk {
    fn start(setup: &Setup, cluster: &Cluster, data: &Path, advertised: SocketAddr) -> Result<SlowDisk> {
        let program = setup.eggsctl.with_file_name("eggs-blockd");
        let mut child = Command::new(&program)
            .args(["--listen", "127.0.0.1:0", "--host", "slow", "--failure-domain", "slow"])
            .args(["--advertise", &advertised.to_string(), "--shuckle", cluster.address()?])
            .arg("--secret-file")
            .arg(data.join("secret"))
            .arg("--disk")
            .arg(format!("{}:FLASH", setup.scratch.path().join("slow-disk").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let mut log = BufReader::new(child.stderr.take().context("no log")?).lines();
        for line in log.by_ref().map_while(Result::ok) {
            let address = line.split_whitespace().find_map(|word| word.strip_prefix("address="));
            if let Some(address) = address.and_then(|address| address.parse().ok()) {
                // It must never wait for a reader of its log.
                std::thread::spawn(move || log.map_while(Result::ok).for_each(drop));
                return Ok(SlowDisk { child, address });
            }
        }
        let status = child.wait()?;
        anyhow::bail!("eggs-blockd ended: {status}")
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
