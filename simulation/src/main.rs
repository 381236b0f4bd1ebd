//! `eggs-simulation --seed 7` replays a run, `--seeds 1..200` looks for trouble, `--bug NAME` plants some.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use clap::Parser;
use eggs_simulation::{Bug, Failure, Options, Report, Totals, run};

#[derive(Debug, Parser)]
#[command(about = "Runs a whole cluster in one deterministic thread and checks it")]
struct Args {
    /// One seed
    #[arg(long, conflicts_with = "seeds", required_unless_present = "seeds")]
    seed: Option<u64>,
    /// A range of seeds, both ends included
    #[arg(long, value_name = "A..B", value_parser = range)]
    seeds: Option<(u64, u64)>,
    /// Put a bug in on purpose, to see it caught
    #[arg(long, value_name = "NAME")]
    bug: Option<Bug>,
    /// Operations of all clients together
    #[arg(long, default_value_t = Options::default().operations)]
    operations: usize,
    /// Clients
    #[arg(long, default_value_t = Options::default().clients)]
    clients: usize,
    /// Metadata shards
    #[arg(long, default_value_t = Options::default().shards)]
    shards: usize,
    /// Replicas of every group: 1, 3 or 5; else the seed decides
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=5))]
    replicas: Option<u32>,
    /// Whether leaders answer reads on a lease; else the seed decides
    #[arg(long)]
    lease: Option<bool>,
    /// Nothing goes wrong
    #[arg(long)]
    no_faults: bool,
    /// Seeds run at once; as many as there are cores
    #[arg(long)]
    jobs: Option<usize>,
    /// Print every event
    #[arg(long)]
    trace: bool,
}

fn range(text: &str) -> Result<(u64, u64), String> {
    let wrong = || format!("'{text}' is no range of seeds: expected 1..200");
    let (first, last) = text.split_once("..").ok_or_else(wrong)?;
    let last = last.strip_prefix('=').unwrap_or(last);
    match (first.trim().parse(), last.trim().parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok((first, last)),
        _ => Err(wrong()),
    }
}

/// Runs the seeds on every core and hands on what they came to, in their order.
fn run_all(
    (first, last): (u64, u64),
    options: &Options,
    jobs: usize,
    mut each: impl FnMut(u64, Result<Report, Failure>),
) {
    let (next, (sender, receiver)) = (AtomicU64::new(first), mpsc::channel());
    thread::scope(|scope| {
        for _ in 0..jobs {
            let (next, sender) = (&next, sender.clone());
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > last || sender.send((seed, run(seed, options))).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let (mut waiting, mut due) = (BTreeMap::new(), first);
        for (seed, result) in receiver {
            waiting.insert(seed, result);
            while let Some(result) = waiting.remove(&due) {
                each(due, result);
                due += 1;
            }
        }
    });
}

/// Beyond so many seeds only every hundredth is told of.
const TOLD_MAX: u64 = 500;

fn main() -> ExitCode {
    let args = Args::parse();
    let options = Options {
        operations: args.operations,
        clients: args.clients.max(1),
        shards: args.shards.clamp(2, 256),
        replicas: args.replicas,
        lease: args.lease,
        faults: !args.no_faults,
        bug: args.bug,
        print: args.trace,
        ..Options::default()
    };
    // A panic is a failure like any other, told once.
    std::panic::set_hook(Box::new(|_| {}));
    let (first, last) = args.seeds.or(args.seed.map(|seed| (seed, seed))).unwrap_or((1, 1));
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let jobs = if first == last { 1 } else { args.jobs.unwrap_or(cores).max(1) };
    let all = last - first + 1;
    let (mut caught, mut totals, begun) = (Vec::new(), Totals::default(), Instant::now());
    run_all((first, last), &options, jobs, |seed, result| match result {
        Ok(report) => {
            totals.add(&report);
            if all <= TOLD_MAX || seed.is_multiple_of(100) {
                println!("{report}");
            }
            if all == 1 {
                for (kind, [acknowledged, refused, unknown]) in &report.kinds {
                    println!("  {kind:8} {acknowledged:5} {refused:5} {unknown:5}");
                }
            }
        }
        Err(failure) => {
            caught.push(seed);
            if args.bug.is_some() && all > 1 {
                println!("seed {seed}: caught: {}", failure.wrong[0]);
                return;
            }
            println!("the last events:");
            failure.trace.iter().for_each(|line| println!("  {line}"));
            println!("{failure}");
            println!("to replay: {}", replay(&args, seed));
        }
    });
    println!("{totals}");
    println!("{all} seeds in {:.1} s on {jobs} threads", begun.elapsed().as_secs_f64());
    match args.bug {
        Some(bug) => println!("{bug}: {} of {all} seeds caught it: {caught:?}", caught.len()),
        None if caught.is_empty() => println!("{all} seeds, nothing wrong"),
        None => println!("{} of {all} seeds fail: {caught:?}", caught.len()),
    }
    // A bug planted must be found, else none.
    if caught.is_empty() == args.bug.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn replay(args: &Args, seed: u64) -> String {
    let mut command = format!("cargo run -p eggs-simulation -- --seed {seed} --trace");
    let defaults = Options::default();
    let mut option = |differs: bool, text: String| {
        if differs {
            command.push_str(&text);
        }
    };
    option(args.operations != defaults.operations, format!(" --operations {}", args.operations));
    option(args.clients != defaults.clients, format!(" --clients {}", args.clients));
    option(args.shards != defaults.shards, format!(" --shards {}", args.shards));
    if let Some(replicas) = args.replicas {
        option(true, format!(" --replicas {replicas}"));
    }
    if let Some(lease) = args.lease {
        option(true, format!(" --lease {lease}"));
    }
    option(args.no_faults, " --no-faults".to_owned());
    if let Some(bug) = args.bug {
        option(true, format!(" --bug {bug}"));
    }
    command
}
