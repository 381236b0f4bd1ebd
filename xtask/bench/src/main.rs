//! `cargo xtask bench SUITE`: how fast a release build is, beside the floors it has to keep.
//!
//! Each suite starts `eggsctl up` in a directory of its own, loads it from this process through the client library
//! over the real wire protocol, and counts the CPU of both processes. A row's name, clients and unit never change
//! their meaning: figures are compared over months. docs/HACKING.md says what every row is.
//!
//! Reading order: this file, `cluster` (the process under test), `measure` (CPU, medians), `report` (rows, floors, table),
//! `load` (clients at work), then the suites `start`, `meta`, `crossdir`, `data` and `replicated`.

mod cluster;
mod crossdir;
mod data;
mod floors;
mod load;
mod measure;
mod meta;
mod replicated;
mod report;
mod start;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};

use cluster::{Cluster, Scratch};
use report::Report;

/// Loads a release build of a cluster through the client library and prints figures beside their floors
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", max_term_width = 100)]
struct Bench {
    /// What to measure
    suite: Suite,
    /// Write the figures as JSON here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often each figure is taken; the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    runs: u32,
    /// How long one run of a rate is, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    seconds: f64,
    /// Make the scratch directory of the cluster in here (the disk that is measured) instead of the system's
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Load a cluster that runs already (meta, crossdir and data): its CPU is not seen
    #[arg(long, value_name = "HOST:PORT")]
    addr: Option<String>,
    /// The program that is the cluster [default: the eggsctl beside this program]
    #[arg(long, value_name = "FILE")]
    eggsctl: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// How long `up` takes, and what a cluster costs at rest
    Start,
    /// Names: create, mkdir, stat, list, rename, unlink
    Meta,
    /// Operations on more than one directory: mkdir, rmdir, moves of files and directories
    Crossdir,
    /// Contents: one large file in and out, beside what the disk and the loopback can do
    Data,
    /// Names with three replicas beside names with one, and what three replicas cost at rest
    Replicated,
}

impl Suite {
    fn name(self) -> &'static str {
        match self {
            Suite::Start => "start",
            Suite::Meta => "meta",
            Suite::Crossdir => "crossdir",
            Suite::Data => "data",
            Suite::Replicated => "replicated",
        }
    }
}

/// As eggsctl's: the clients are in this process.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What every suite works with.
struct Setup {
    runs: u32,
    run_time: Duration,
    eggsctl: PathBuf,
    scratch: Scratch,
    addr: Option<String>,
}

impl Setup {
    /// The cluster to load: one of our own, unless an address was given.
    fn cluster(&self) -> Result<Cluster> {
        match &self.addr {
            Some(addr) => Ok(Cluster::foreign(addr)),
            None => Cluster::start(&self.eggsctl, &self.scratch.fresh("cluster")?),
        }
    }
}

impl Bench {
    fn run(&self) -> Result<()> {
        if matches!(self.suite, Suite::Start | Suite::Replicated) && self.addr.is_some() {
            bail!("the suite {} measures clusters of its own: leave --addr out", self.suite.name());
        }
        if !(self.seconds.is_finite() && self.seconds > 0.0 && self.seconds <= 3600.0) {
            bail!("--seconds: more than 0, at most 3600");
        }
        let eggsctl = match &self.eggsctl {
            Some(eggsctl) => eggsctl.clone(),
            None => std::env::current_exe()?.with_file_name("eggsctl"),
        };
        let setup = Setup {
            runs: self.runs,
            run_time: Duration::from_secs_f64(self.seconds),
            eggsctl,
            scratch: Scratch::new(self.data.as_deref())?,
            addr: self.addr.clone(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let mut report = Report::begin(self.suite.name())?;
        runtime.block_on(async {
            match self.suite {
                Suite::Start => start::run(&setup, &mut report).await,
                Suite::Meta => meta::run(&setup, &mut report).await,
                Suite::Crossdir => crossdir::run(&setup, &mut report).await,
                Suite::Data => data::run(&setup, &mut report).await,
                Suite::Replicated => replicated::run(&setup, &mut report).await,
            }
        })?;
        report.print()?;
        if let Some(file) = &self.json {
            report.write(file).with_context(|| file.display().to_string())?;
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    if cfg!(debug_assertions) {
        eprintln!("this is not an optimised build: its figures mean nothing");
    }
    match Bench::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
