//! Suite `replicated`: what three replicas of everything cost, beside one.
//!
//! A cluster of one host and one of three hosts run at the same time, each in one process, on the same disk, and take
//! turns: what else the machine does meets both. The ratio of a row is the median of the ratios of its turns. What
//! three machines would do side by side, this one does with the same cores: the CPU is shared, only the waiting is not.
//!
//! fsyncs are those of the consensus logs, per operation and host: all hosts' together, divided by the hosts.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use eggs_client::CreateOptions;

use super::Setup;
use super::cluster::Cluster;
use super::load::{Load, Place, Worker};
use super::report::{Report, Sample};
use super::start::rest;

const REPLICAS: u16 = 3;
const CLIENTS: [u32; 3] = [1, 16, 64];
const SETTLE: Duration = Duration::from_secs(8);
const FSYNCS: &str = "eggs_consensus_fsyncs_total";

/// The names of an operation's rows.
struct Rows {
    single: &'static str,
    replicated: &'static str,
    ratio: &'static str,
    fsyncs_single: &'static str,
    fsyncs: &'static str,
}

const CREATE: Rows = Rows {
    single: "create_single",
    replicated: "create_replicated",
    ratio: "create_ratio",
    fsyncs_single: "create_fsyncs_single",
    fsyncs: "create_fsyncs",
};

const MKDIR: Rows = Rows {
    single: "mkdir_single",
    replicated: "mkdir_replicated",
    ratio: "mkdir_ratio",
    fsyncs_single: "mkdir_fsyncs_single",
    fsyncs: "mkdir_fsyncs",
};

pub async fn run(setup: &Setup, report: &mut Report) -> Result<()> {
    let replicated =
        Cluster::start_replicated(&setup.eggsctl, &setup.scratch.fresh("replicated")?, REPLICAS)?;
    report.row("up_new", 0, "s", &[replicated.took().as_secs_f64().into()]);
    // At rest first, with nothing else of ours running.
    let (percent, mib) = rest(&replicated).await?;
    report.row("idle_cpu_percent", 0, "%", &[percent.into()]);
    report.row("idle_rss_mib", 0, "MiB", &[mib.into()]);

    let single = Cluster::start(&setup.eggsctl, &setup.scratch.fresh("single")?)?;
    let most = CLIENTS.into_iter().max().unwrap_or(1);
    let loads = (
        Load::new(&single, "replicated", most, setup.run_time).await?,
        Load::new(&replicated, "replicated", most, setup.run_time).await?,
    );
    let create = |worker: Arc<Worker>, n| async move {
        worker.directory.put_bytes(format!("file-{n}"), Bytes::new(), &CreateOptions::default()).await?;
        Ok(())
    };
    let mkdir = |worker: Arc<Worker>, n| async move {
        worker.directory.mkdir(format!("directory-{n}"), None).await?;
        Ok(())
    };
    for clients in CLIENTS {
        compare(setup, report, &loads, &CREATE, clients, create).await?;
    }
    // What was created is in the state store within seconds: that work is not the next operation's.
    tokio::time::sleep(SETTLE).await;
    for clients in CLIENTS {
        compare(setup, report, &loads, &MKDIR, clients, mkdir).await?;
    }
    loads.0.close().await;
    loads.1.close().await;
    single.stop()?;
    // After the work, everything is to be as quiet as before it.
    let (percent, mib) = rest(&replicated).await?;
    report.row("idle_cpu_percent_after", 0, "%", &[percent.into()]);
    report.row("idle_rss_mib_after", 0, "MiB", &[mib.into()]);
    replicated.stop()
}

/// One operation on both clusters in turns.
async fn compare<F, Done>(
    setup: &Setup,
    report: &mut Report,
    (single, replicated): &(Load<'_>, Load<'_>),
    rows: &Rows,
    clients: u32,
    operation: F,
) -> Result<()>
where
    F: Fn(Arc<Worker>, u64) -> Done + Clone + Send + 'static,
    Done: Future<Output = Result<()>> + Send,
{
    let (mut rates, mut fsyncs): ([Vec<Sample>; 2], [Vec<Sample>; 2]) = Default::default();
    let mut ratios = Vec::new();
    for run in 0..setup.runs {
        for (n, (load, hosts)) in [(single, 1), (replicated, REPLICAS)].into_iter().enumerate() {
            let folder = format!("{}-{clients}-{run}", rows.single);
            let before = load.cluster.counter(FSYNCS)?;
            let done = load.run(&folder, clients, Place::Own, operation.clone()).await?;
            let synced = (load.cluster.counter(FSYNCS)? - before) / f64::from(hosts);
            rates[n].push(done.sample);
            fsyncs[n].push((synced / done.operations.max(1) as f64).into());
        }
        ratios.push((rates[1][ratios.len()].value / rates[0][ratios.len()].value).into());
    }
    report.row(rows.single, clients, "ops/s", &rates[0]);
    report.row(rows.replicated, clients, "ops/s", &rates[1]);
    report.row(rows.ratio, clients, "of single", &ratios);
    report.row(rows.fsyncs_single, clients, "/op", &fsyncs[0]);
    report.row(rows.fsyncs, clients, "/op/host", &fsyncs[1]);
    Ok(())
}
