//! Many seeds, one seed twice, and every planted bug found.
//!
//! `EGGS_SIM_SEEDS=1..5000` runs other seeds than the two hundred of every day; a failure prints the command that
//! replays it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use eggs_simulation::{Bug, Failure, Options, Report, Totals, run};

fn seeds() -> std::ops::RangeInclusive<u64> {
    let given = std::env::var("EGGS_SIM_SEEDS").unwrap_or_else(|_| "1..200".to_owned());
    let parsed = given.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..=b.parse().ok()?));
    parsed.unwrap_or_else(|| panic!("EGGS_SIM_SEEDS={given} is no range such as 1..200"))
}

/// Runs seeds on every core until `each` is content.
fn run_all(
    seeds: std::ops::RangeInclusive<u64>,
    options: &Options,
    each: impl Fn(Result<Report, Failure>) -> bool + Sync,
) {
    let (next, last) = (AtomicU64::new(*seeds.start()), *seeds.end());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed > last {
                        return;
                    }
                    if each(run(seed, options)) {
                        next.store(last + 1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}

#[test]
fn seeds_run_and_nothing_is_wrong() {
    let (totals, failures) = (Mutex::new(Totals::default()), Mutex::new(Vec::new()));
    run_all(seeds(), &Options::default(), |result| {
        match result {
            Ok(report) => totals.lock().unwrap().add(&report),
            Err(failure) => failures.lock().unwrap().push(failure),
        }
        false
    });
    println!("{}", totals.into_inner().unwrap());
    let failures = failures.into_inner().unwrap();
    for failure in &failures {
        failure.trace.iter().for_each(|line| println!("{line}"));
        println!("{failure}\nto replay: cargo run -p eggs-simulation -- --seed {} --trace", failure.seed);
    }
    assert!(failures.is_empty(), "seeds fail: {:?}", failures.iter().map(|f| f.seed).collect::<Vec<_>>());
}

#[test]
fn one_seed_makes_one_run() {
    let hash = |seed| {
        let report = run(seed, &Options::default()).unwrap_or_else(|failure| panic!("{failure}"));
        (report.trace_hash, report.events)
    };
    for seed in [3, 4] {
        let here = hash(seed);
        // Nor does it matter on which thread.
        let there = thread::spawn(move || hash(seed)).join().unwrap();
        assert_eq!(here, there, "seed {seed}");
    }
    assert_ne!(hash(3).0, hash(4).0);
}

#[test]
fn all_256_shards() {
    let options = Options { shards: 256, replicas: Some(3), clients: 6, ..Options::default() };
    run(1, &options).unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn without_faults_every_client_is_answered() {
    for replicas in [1, 3, 5] {
        let options = Options { faults: false, replicas: Some(replicas), ..Options::default() };
        for seed in 1..=3 {
            let report = run(seed, &options).unwrap_or_else(|failure| panic!("{failure}"));
            // In the end one sleeping leader is killed, to see its group wake.
            assert_eq!(report.crashes, u64::from(replicas > 1));
            assert_eq!(report.put_aside, 0);
            assert!(report.acknowledged > 200 && report.refused > 10, "{report}");
        }
    }
}

/// The checkers are checked: each planted bug must be found within a few seeds.
#[test]
fn every_planted_bug_is_caught() {
    const SEEDS: u64 = 50;
    for &bug in Bug::ALL {
        let options = Options { bug: Some(bug), ..Options::default() };
        let caught = Mutex::new(Vec::new());
        run_all(1..=SEEDS, &options, |result| {
            let failure = result.err();
            let is_caught = failure.is_some();
            caught.lock().unwrap().extend(failure);
            is_caught
        });
        let caught = caught.into_inner().unwrap();
        let failure = caught.first().unwrap_or_else(|| panic!("{bug} is not caught by seeds 1 to {SEEDS}"));
        println!("{bug}: caught by seed {}: {}", failure.seed, failure.wrong[0]);
    }
}
