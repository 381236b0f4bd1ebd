//! Three hosts with addresses of their own: killed, cut off, deaf and mute in turn, under a mixed load.
//!
//! Needs root and network namespaces; says so and passes where it has none. `EGGS_TEST_SECONDS` says how long the
//! faults go on (40 without it); the first round of them is always whole.

use std::sync::Arc;
use std::time::{Duration, Instant};

use eggs_tests::{Cut, Hosts, HostsConfig, Load, LoadOptions, Network, TOO_LONG, scratch, seed, until};

const HOSTS: usize = 3;
const CLIENTS: usize = 16;
/// How long a fault lasts: elections take a fraction of it, impatient clients give up in it.
const LASTS: Duration = Duration::from_millis(2500);
const CALM: Duration = Duration::from_millis(700);
/// Shards of each host that change leaders on purpose in one fault.
const TRANSFERS: usize = 20;

/// Gaps that are aimed at, and those that are too long even on a machine that is busy with other tests.
const GOALS: [(&str, u64, u64); 5] = [
    ("kill", 2000, 15_000),
    ("cut off", 2000, 15_000),
    ("deaf", 2000, 15_000),
    ("mute", 2000, 15_000),
    ("transfer", 200, 10_000),
];

#[derive(Debug, Clone, Copy)]
enum Fault {
    /// kill -9 of all that runs on the host; it is started again.
    Kill(usize),
    Network(usize, Cut),
    /// Leaders move as planned; which of them.
    Transfer(usize),
}

/// What happens in one round, in this order.
const ROUND: [Fault; 12] = [
    Fault::Kill(0),
    Fault::Transfer(0),
    Fault::Network(1, Cut::Off),
    Fault::Network(2, Cut::Deaf),
    Fault::Kill(1),
    Fault::Network(2, Cut::Off),
    Fault::Network(0, Cut::Mute),
    Fault::Kill(2),
    Fault::Network(0, Cut::Off),
    Fault::Transfer(20),
    Fault::Network(1, Cut::Deaf),
    Fault::Network(2, Cut::Mute),
];
/// After so many, every kind of fault was there, and every host was killed.
const AT_LEAST: usize = 8;

impl Fault {
    fn name(self) -> String {
        let (kind, host) = match self {
            Fault::Kill(host) => ("kill", host),
            Fault::Network(host, Cut::Off) => ("cut off", host),
            Fault::Network(host, Cut::Deaf) => ("deaf", host),
            Fault::Network(host, Cut::Mute) => ("mute", host),
            Fault::Transfer(_) => return "transfer".to_owned(),
        };
        format!("{kind}: host-{}", host + 1)
    }
}

fn seconds() -> u64 {
    match std::env::var("EGGS_TEST_SECONDS") {
        Ok(text) => text.parse().expect("EGGS_TEST_SECONDS is a number"),
        Err(_) => 40,
    }
}

#[test]
fn hosts_are_killed_and_cut_off_under_a_mixed_load() {
    seed();
    let Some(network) = Network::new(HOSTS) else { return };
    let network = Arc::new(network);
    let folder = scratch();
    let config = HostsConfig { network: Some(Arc::clone(&network)), ..HostsConfig::new(HOSTS) };
    let mut hosts = Hosts::start(folder.path(), config);
    let runtime = network.client_runtime();
    let options = LoadOptions { shuckle: hosts.shuckles(), clients: CLIENTS, root: "/load".to_owned() };
    let load = Load::start(&runtime, &options);
    std::thread::sleep(CALM);

    let until = Instant::now() + Duration::from_secs(seconds());
    for (count, fault) in ROUND.into_iter().cycle().enumerate() {
        if count >= AT_LEAST && Instant::now() > until {
            break;
        }
        run(&mut hosts, &network, &load, fault);
    }
    let report = load.finish(&runtime);
    println!("\n{}", report.table());
    println!("{} operations answered, {} of unknown outcome", report.acknowledged, report.unknown);
    for (kind, goal, _) in GOALS {
        let Some(longest) = report.longest(kind) else { continue };
        let verdict = if longest < Duration::from_millis(goal) { "met" } else { "missed" };
        println!("{kind}: longest {} ms, goal {goal} ms: {verdict}", longest.as_millis());
    }
    report.assert_right();
    let (fsck, status) = network.on_client(|| {
        let ctl = hosts.ctl();
        (ctl.assert_clean(), ctl.ok("status --json").json())
    });
    println!("{fsck}\n{}", status["health"]);
    assert!(report.acknowledged > 500, "hardly a load: {} operations", report.acknowledged);
    for (kind, _, limit) in GOALS {
        let longest = report.longest(kind).unwrap_or_default();
        assert!(longest < Duration::from_millis(limit), "{kind}: {longest:?} without an answer");
    }
}

fn run(hosts: &mut Hosts, network: &Network, load: &Load, fault: Fault) {
    println!("{}", fault.name());
    load.phase(fault.name());
    match fault {
        Fault::Kill(host) => {
            hosts.kill_host(host);
            goes_on(load, fault);
            load.phase(format!("back after {}", fault.name()));
            hosts.launch_host(host);
        }
        Fault::Network(host, cut) => {
            network.cut(host, cut);
            goes_on(load, fault);
            load.phase(format!("back after {}", fault.name()));
            network.heal(host);
        }
        Fault::Transfer(offset) => {
            transfer(hosts, offset);
            load.phase("calm");
        }
    }
    // Two hosts away at once would be too many.
    hosts.wait_until_whole();
    load.phase("calm");
    std::thread::sleep(CALM);
}

/// It lasts for a while, and somebody gets answers in spite of it.
fn goes_on(load: &Load, fault: Fault) {
    let begun = Instant::now();
    std::thread::sleep(LASTS / 2);
    let before = load.acknowledged();
    until(&format!("answers during {}", fault.name()), TOO_LONG, || {
        (load.acknowledged() > before + CLIENTS as u64).then_some(())
    });
    std::thread::sleep(LASTS.saturating_sub(begun.elapsed()));
}

/// Leaders go round: each host gives some of the shards it leads to the next. No host ends up with more than its
/// share, so nothing is moved back.
fn transfer(hosts: &Hosts, offset: usize) {
    hosts.on_client(|| {
        let ctl = hosts.ctl();
        let status = ctl.ok("status --json").json();
        let leads = status["shards"]["hosts"].as_array().expect("hosts").clone();
        for host in 0..HOSTS {
            let (from, to) = (hosts.name(host), hosts.name((host + 1) % HOSTS));
            let led = leads.iter().find(|leads| leads["host"] == from.as_str());
            let led = led.and_then(|leads| leads["shards"].as_str()).unwrap_or_default().split(',');
            let some: Vec<&str> =
                led.filter(|text| text.parse::<u8>().is_ok()).skip(offset).take(TRANSFERS).collect();
            // One that was away may lead nothing yet.
            if !some.is_empty() {
                ctl.ok(&format!("shard transfer-leader --no-wait {} {to}", some.join(",")));
            }
        }
    });
    std::thread::sleep(LASTS / 2);
}
