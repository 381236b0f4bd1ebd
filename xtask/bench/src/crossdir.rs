//! Suite `crossdir`: the operations on more than one directory, which the coordinator runs as transactions.
//!
//! Rows of their plain name spread the clients over directories of their own; `…_shared` rows put all of them into the
//! same one (moves: between the same two). What an operation needs is made before the time begins. A row `…_fsyncs` says
//! how often a log was synced for each transaction, the coordinator's and all shards' together.

use std::future::Future;
use std::sync::Arc;

use anyhow::Result;
use bytes::Bytes;
use eggs_client::{CreateOptions, Directory, Replace};

use super::Setup;
use super::load::{Load, Place, Worker};
use super::report::{Report, Sample};

const CLIENTS: [u32; 3] = [1, 16, 64];
const FSYNCS: &str = "eggs_consensus_fsyncs_total";
/// Directories made before rmdir is measured, of all clients together: more than a run removes.
const REMOVED_MAX: u64 = 12_000;

/// The names of an operation's rows.
#[derive(Clone, Copy)]
struct Rows {
    rate: &'static str,
    fsyncs: &'static str,
    place: Place,
}

const fn rows(rate: &'static str, fsyncs: &'static str, place: Place) -> Rows {
    Rows { rate, fsyncs, place }
}

const MKDIR: [Rows; 2] =
    [rows("mkdir", "mkdir_fsyncs", Place::Own), rows("mkdir_shared", "mkdir_shared_fsyncs", Place::Shared)];
const RMDIR: [Rows; 2] =
    [rows("rmdir", "rmdir_fsyncs", Place::Own), rows("rmdir_shared", "rmdir_shared_fsyncs", Place::Shared)];
const MOVE_FILE: [Rows; 2] = [
    rows("move_file", "move_file_fsyncs", Place::Own),
    rows("move_file_shared", "move_file_shared_fsyncs", Place::Shared),
];
const MOVE_DIRECTORY: [Rows; 2] = [
    rows("move_directory", "move_directory_fsyncs", Place::Own),
    rows("move_directory_shared", "move_directory_shared_fsyncs", Place::Shared),
];

pub async fn run(setup: &Setup, report: &mut Report) -> Result<()> {
    let cluster = setup.cluster()?;
    let most = CLIENTS.into_iter().max().unwrap_or(1);
    let load = Load::new(&cluster, "crossdir", most, setup.run_time).await?;
    let nothing = |_: Arc<Worker>, _| async { Ok(()) };
    let mkdir = |worker: Arc<Worker>, n| async move {
        worker.directory.mkdir(format!("directory-{}-{n}", worker.number), None).await?;
        Ok(())
    };
    let rmdir = |worker: Arc<Worker>, n| async move {
        worker.directory.rmdir(format!("directory-{}-{n}", worker.number)).await?;
        Ok(())
    };
    for clients in CLIENTS {
        for rows in MKDIR {
            measure(setup, report, &load, rows, clients, (0, nothing), (u64::MAX, mkdir)).await?;
        }
    }
    for clients in CLIENTS {
        let each = REMOVED_MAX / u64::from(clients.max(4));
        for rows in RMDIR {
            measure(setup, report, &load, rows, clients, (each, mkdir), (each, rmdir)).await?;
        }
    }
    for clients in CLIENTS {
        for rows in MOVE_FILE {
            let make = |worker: Arc<Worker>, _| async move {
                let [here, _] = sides(&worker).await?;
                here.put_bytes(thing(&worker), Bytes::new(), &CreateOptions::default()).await?;
                Ok(())
            };
            measure(setup, report, &load, rows, clients, (1, make), (u64::MAX, to_and_fro)).await?;
        }
    }
    for clients in CLIENTS {
        for rows in MOVE_DIRECTORY {
            let make = |worker: Arc<Worker>, _| async move {
                let [here, _] = sides(&worker).await?;
                here.mkdir(thing(&worker), None).await?;
                Ok(())
            };
            measure(setup, report, &load, rows, clients, (1, make), (u64::MAX, to_and_fro)).await?;
        }
    }
    load.close().await;
    cluster.stop()
}

/// The two directories between which a worker moves its thing; made when they are not there.
async fn sides(worker: &Worker) -> Result<&[Directory; 2]> {
    let side = async |n| {
        // Those who share a directory share its sides.
        let path = format!("{}/side-{n}", worker.path);
        worker.client.mkdir_all(&path).await?;
        anyhow::Ok(worker.client.directory(&path).await?)
    };
    worker.sides.get_or_try_init(async || Ok([side(0).await?, side(1).await?])).await
}

async fn to_and_fro(worker: Arc<Worker>, n: u64) -> Result<()> {
    let [one, other] = sides(&worker).await?;
    let (from, to) = if n.is_multiple_of(2) { (one, other) } else { (other, one) };
    let name = thing(&worker);
    from.rename_to(&name, to, &name, Replace::Refuse).await?;
    Ok(())
}

fn thing(worker: &Worker) -> String {
    format!("thing-{}", worker.number)
}

/// The two rows of one operation: each client first does `prepare`, and then, timed, `operation`; each so often at most.
async fn measure<P, Prepared, F, Done>(
    setup: &Setup,
    report: &mut Report,
    load: &Load<'_>,
    rows: Rows,
    clients: u32,
    prepare: (u64, P),
    operation: (u64, F),
) -> Result<()>
where
    P: Fn(Arc<Worker>, u64) -> Prepared + Clone + Send + 'static,
    Prepared: Future<Output = Result<()>> + Send,
    F: Fn(Arc<Worker>, u64) -> Done + Clone + Send + 'static,
    Done: Future<Output = Result<()>> + Send,
{
    let (mut rates, mut fsyncs): (Vec<Sample>, Vec<Sample>) = Default::default();
    for run in 0..setup.runs {
        let folder = format!("{}-{clients}-{run}", rows.rate);
        let workers = load.workers(&folder, clients, rows.place).await?;
        load.all(&workers, prepare.0, None, prepare.1.clone()).await?;
        let before = load.cluster.counter(FSYNCS)?;
        let done = load.all(&workers, operation.0, Some(setup.run_time), operation.1.clone()).await?;
        let synced = load.cluster.counter(FSYNCS)? - before;
        rates.push(done.sample);
        fsyncs.push((synced / done.operations.max(1) as f64).into());
    }
    report.row(rows.rate, clients, "ops/s", &rates);
    report.row(rows.fsyncs, clients, "/op", &fsyncs);
    Ok(())
}
