//! Suite `start`: from nothing to ready, and what a cluster costs while nobody asks anything of it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use bytes::Bytes;
use eggs_client::{CreateOptions, SmallFile};

use super::cluster::Cluster;
use super::report::{Report, Sample};
use super::{Setup, data, measure};

/// After the start, before rest is measured: connections and first heartbeats are not rest.
const SETTLE: Duration = Duration::from_secs(20);

/// How long rest is watched.
const REST: Duration = Duration::from_secs(10);

/// What the existing directory holds: directories × files, and one large file.
const DIRECTORIES: u32 = 16;
const FILES: u32 = 250;
const LARGE_BYTES: u64 = 64 << 20;

pub async fn run(setup: &Setup, report: &mut Report) -> Result<()> {
    let (mut new, mut existing, mut crashed) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cpu, mut memory) = (Vec::new(), Vec::new());
    for _ in 0..setup.runs {
        let directory = setup.scratch.fresh("cluster")?;
        let cluster = Cluster::start(&setup.eggsctl, &directory)?;
        new.push(cluster.took().as_secs_f64().into());
        let (percent, mib) = rest(&cluster).await?;
        cpu.push(percent.into());
        memory.push(mib.into());
        fill(&cluster).await?;
        cluster.stop()?;
        existing.push(start_again(setup, &directory, Cluster::stop)?);
        start_again(setup, &directory, Cluster::crash)?;
        crashed.push(start_again(setup, &directory, Cluster::stop)?);
    }
    report.row("up_new", 0, "s", &new);
    report.row("up_existing", 0, "s", &existing);
    report.row("up_after_kill", 0, "s", &crashed);
    report.row("idle_cpu_percent", 0, "%", &cpu);
    report.row("idle_rss_mib", 0, "MiB", &memory);
    Ok(())
}

fn start_again(setup: &Setup, directory: &Path, end: impl Fn(Cluster) -> Result<()>) -> Result<Sample> {
    let cluster = Cluster::start(&setup.eggsctl, directory)?;
    let took = cluster.took().as_secs_f64();
    end(cluster)?;
    Ok(took.into())
}

/// Percent of one core, and MiB, at rest.
pub async fn rest(cluster: &Cluster) -> Result<(f64, f64)> {
    let Some(pid) = cluster.pid() else { anyhow::bail!("not our cluster") };
    let process = pid.to_string();
    tokio::time::sleep(SETTLE).await;
    let (before, began) = (measure::cpu_seconds(&process)?, Instant::now());
    tokio::time::sleep(REST).await;
    let used = measure::cpu_seconds(&process)? - before;
    Ok((100.0 * used / began.elapsed().as_secs_f64(), measure::resident_mib(pid)?))
}

/// An existing directory is one that was used.
async fn fill(cluster: &Cluster) -> Result<()> {
    let client = cluster.client().await?;
    for directory in 0..DIRECTORIES {
        let path = format!("/d{directory}");
        client.mkdir(&path, None).await?;
        let files = (0..FILES).map(|n| SmallFile {
            name: Bytes::from(format!("file-{n}")),
            contents: Bytes::from(format!("contents of file {n}")),
            ..SmallFile::default()
        });
        for published in client.directory(&path).await?.put_many(files.collect()).await {
            published?;
        }
    }
    data::large::put(&client, "/large", LARGE_BYTES, &data::random_bytes(), &CreateOptions::default())
        .await?;
    client.close().await;
    Ok(())
}
