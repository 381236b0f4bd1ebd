//! Many seeds, one seed twice, and every planted bug found.
//!
//! `EGGS_SIM_SEEDS=1..200` runs other seeds than the fifty of every day; a failure prints the command that
//! replays it.

use eggs_simulation::{Bug, Options, run};

fn seeds() -> std::ops::RangeInclusive<u64> {
    let given = std::env::var("EGGS_SIM_SEEDS").unwrap_or_else(|_| "1..50".to_owned());
    let parsed = given.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..=b.parse().ok()?));
    parsed.unwrap_or_else(|| panic!("EGGS_SIM_SEEDS={given} is no range such as 1..50"))
}

#[test]
fn seeds_run_and_nothing_is_wrong() {
    let seeds = seeds();
    println!("seeds {seeds:?}");
    for seed in seeds {
        match run(seed, &Options::default()) {
            Ok(report) => println!("{report}"),
            Err(failure) => {
                failure.trace.iter().for_each(|line| println!("{line}"));
                panic!("{failure}\nto replay: cargo run -p eggs-simulation -- --seed {seed} --trace");
            }
        }
    }
}

#[test]
fn one_seed_makes_one_run() {
    for seed in [3, 4] {
        let hashes: Vec<(u64, u64)> = (0..2)
            .map(|_| run(seed, &Options::default()).map(|report| (report.trace_hash, report.events)))
            .collect::<Result<_, _>>()
            .unwrap_or_else(|failure| panic!("{failure}"));
        assert_eq!(hashes[0], hashes[1], "seed {seed}");
    }
    let hash = |seed| run(seed, &Options::default()).map(|report| report.trace_hash).unwrap_or_default();
    assert_ne!(hash(3), hash(4));
}

#[test]
fn all_256_shards() {
    let options = Options { shards: 256, clients: 6, ..Options::default() };
    run(1, &options).unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn without_faults_every_client_is_answered() {
    let options = Options { faults: false, ..Options::default() };
    for seed in 1..=5 {
        let report = run(seed, &options).unwrap_or_else(|failure| panic!("{failure}"));
        assert_eq!(report.crashes, 0);
        assert!(report.acknowledged > 200 && report.refused > 10, "{report}");
    }
}

/// The checkers are checked: each planted bug must be found within a few seeds.
#[test]
fn every_planted_bug_is_caught() {
    const SEEDS: u64 = 50;
    for &bug in Bug::ALL {
        let options = Options { bug: Some(bug), ..Options::default() };
        let caught = (1..=SEEDS).find_map(|seed| run(seed, &options).err());
        let failure = caught.unwrap_or_else(|| panic!("{bug} is not caught by seeds 1 to {SEEDS}"));
        println!("{bug}: caught by seed {}: {}", failure.seed, failure.wrong[0]);
    }
}
