//! A replicated cluster as processes: each host runs shuckle, shard, crossdir and blockd.
//!
//! Hosts are addresses of the loopback (127.0.0.1, .2, .3), or namespaces of a [`Network`]. All of a host is in one
//! folder, which may be deleted while it is down: the machine with its disks is lost then.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use eggs_client::{Client, Options};
use rustix::process::Signal;

use crate::daemons::listening_address;
use crate::{Ctl, Network, Outcome, Process, TOO_LONG, free_ports, program, run, runtime, until};

/// What runs on each host, in the order of a start; the number is added to the host's first port.
pub const PARTS: [&str; 4] = ["shuckle", "shard", "crossdir", "blockd"];
/// RS(4,2) still finds six of them when one host of three is away.
const DISKS_PER_HOST: usize = 3;
/// Heartbeats come each second.
const FRESH: Duration = Duration::from_millis(2500);
const IMPATIENT: Duration = Duration::from_secs(3);
/// Entries that a follower may be behind its leader and count as caught up: heartbeats are a second old.
const BEHIND_MAX: u64 = 5000;
const SECRET: &str = "5e55104e5e55104e5e55104e5e55104e5e55104e5e55104e5e55104e5e55104e\n";

/// How to start a cluster of several hosts.
#[derive(Debug, Clone)]
pub struct HostsConfig {
    pub hosts: usize,
    /// Of every group: those on hosts beyond them are spare.
    pub replicas: usize,
    /// `None`: on the loopback.
    pub network: Option<Arc<Network>>,
    /// Further flags of shuckle.
    pub shuckle: Vec<String>,
    /// Further flags of shard and crossdir.
    pub replica: Vec<String>,
}

impl HostsConfig {
    pub fn new(hosts: usize) -> HostsConfig {
        HostsConfig { hosts, replicas: hosts, network: None, shuckle: Vec::new(), replica: Vec::new() }
    }
}

/// A cluster that is replicated over hosts, numbered from 0.
#[derive(Debug)]
pub struct Hosts {
    root: PathBuf,
    config: HostsConfig,
    /// The first port of each host.
    first: Vec<SocketAddr>,
    running: BTreeMap<(usize, &'static str), Process>,
}

impl Hosts {
    /// Starts all hosts in folders of `root`, and waits until the cluster is whole.
    ///
    /// # Panics
    /// When it does not become so.
    pub fn start(root: &Path, config: HostsConfig) -> Hosts {
        let mut hosts = Hosts::prepare(root, config);
        for host in 0..hosts.count() {
            hosts.spawn_host(host);
        }
        hosts.wait_until_whole();
        hosts
    }

    /// All but the processes.
    ///
    /// # Panics
    /// When its folder cannot be written.
    pub fn prepare(root: &Path, config: HostsConfig) -> Hosts {
        std::fs::create_dir_all(root).expect("a folder");
        let secret = root.join("secret");
        std::fs::write(&secret, SECRET).expect("a secret");
        let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&secret, private).expect("chmod");
        let first = (0..config.hosts).map(|host| match &config.network {
            Some(network) => SocketAddr::new(network.address(host).into(), 5000),
            None => free_ports(loopback(host), PARTS.len()),
        });
        let first = first.collect();
        Hosts { root: root.to_owned(), config, first, running: BTreeMap::new() }
    }

    pub fn count(&self) -> usize {
        self.config.hosts
    }

    /// As it is called in the cluster.
    pub fn name(&self, host: usize) -> String {
        format!("host-{}", host + 1)
    }

    pub fn secret(&self) -> PathBuf {
        self.root.join("secret")
    }

    /// The id of a store: of what is in a data directory now.
    ///
    /// # Panics
    /// When there is none.
    pub fn store(&self, host: usize, part: &str) -> String {
        let format = std::fs::read_to_string(self.data(host, part).join("FORMAT")).expect("FORMAT");
        let store = format.lines().find_map(|line| line.strip_prefix("store "));
        store.unwrap_or_else(|| panic!("no store in: {format}")).to_owned()
    }

    /// All that a host has.
    pub fn folder(&self, host: usize) -> PathBuf {
        self.root.join(self.name(host))
    }

    pub fn data(&self, host: usize, part: &str) -> PathBuf {
        self.folder(host).join(part)
    }

    /// # Panics
    /// When there is no such part.
    pub fn address(&self, host: usize, part: &str) -> SocketAddr {
        let number = PARTS.iter().position(|name| *name == part).expect("a part");
        let first = self.first[host];
        SocketAddr::new(first.ip(), first.port() + u16::try_from(number).expect("few parts"))
    }

    /// Every shuckle's address.
    pub fn shuckles(&self) -> Vec<String> {
        (0..self.count()).map(|host| self.address(host, "shuckle").to_string()).collect()
    }

    pub fn ctl(&self) -> Ctl {
        Ctl::new(self.shuckles().join(",")).with_secret(self.secret())
    }

    /// # Panics
    /// When the cluster is not to be reached.
    pub async fn client(&self) -> Client {
        let options = Options { shuckle: self.shuckles(), ..Options::default() };
        Client::connect(options).await.expect("connect")
    }

    pub fn process(&mut self, host: usize, part: &'static str) -> &mut Process {
        self.running.get_mut(&(host, part)).expect("a running daemon")
    }

    pub fn is_running(&self, host: usize, part: &'static str) -> bool {
        self.running.contains_key(&(host, part))
    }

    /// SIGKILL for all of a host, as when its power goes.
    pub fn kill_host(&mut self, host: usize) {
        for part in PARTS {
            if let Some(process) = self.running.get_mut(&(host, part)) {
                process.send_kill();
            }
        }
        for part in PARTS {
            self.kill(host, part);
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self, host: usize, part: &'static str) {
        if let Some(mut process) = self.running.remove(&(host, part)) {
            process.kill();
        }
    }

    /// SIGTERM for all of a host, at once; each ends with 0.
    ///
    /// # Panics
    /// When one does not.
    pub fn stop_host(&mut self, host: usize) {
        let mut stopping = Vec::new();
        for part in PARTS {
            if let Some(mut process) = self.running.remove(&(host, part)) {
                process.signal(Signal::TERM);
                stopping.push((part, process));
            }
        }
        for (part, mut process) in stopping {
            let status = process.wait(TOO_LONG);
            assert!(status.success(), "{part} of host {host}: {status}: {}", process.said());
        }
    }

    /// SIGKILL for the rest of them, at once.
    pub fn kill_all(&mut self) {
        for process in self.running.values_mut() {
            process.send_kill();
        }
        self.running.clear();
    }

    /// Starts all of a host; does not wait for anything.
    ///
    /// # Panics
    /// When its folder cannot be made.
    pub fn spawn_host(&mut self, host: usize) {
        std::fs::create_dir_all(self.folder(host)).expect("a folder");
        for part in PARTS {
            let process = self.spawn(host, part, &[]);
            self.running.insert((host, part), process);
        }
    }

    /// Starts all of a host; returns when all of it listens.
    ///
    /// # Panics
    /// When it does not start.
    pub fn launch_host(&mut self, host: usize) {
        std::fs::create_dir_all(self.folder(host)).expect("a folder");
        let waiting: Vec<_> = PARTS.iter().map(|part| (*part, self.spawn(host, part, &[]))).collect();
        for (part, process) in waiting {
            self.listens(host, part, process);
        }
    }

    /// Starts a part of a host; returns when it listens.
    ///
    /// # Panics
    /// When it does not start.
    pub fn launch(&mut self, host: usize, part: &'static str) {
        let process = self.spawn(host, part, &[]);
        self.listens(host, part, process);
    }

    fn listens(&mut self, host: usize, part: &'static str, mut process: Process) {
        // An old port may be in use for a moment, as the local end of somebody's connection.
        until(part, TOO_LONG, || {
            let listens = process.try_wait_for(TOO_LONG, listening_address).is_some();
            if !listens {
                let said = process.said();
                assert!(said.contains("in use"), "{part} does not listen; it said:\n{said}");
                process = self.spawn(host, part, &[]);
            }
            listens.then_some(())
        });
        self.running.insert((host, part), process);
    }

    /// A part of a host as another process; nobody waits for it.
    pub fn spawn(&self, host: usize, part: &str, more: &[&str]) -> Process {
        let mut command = self.command(host, part);
        command.args(more);
        let name = format!("{}/{part}", self.name(host));
        self.on_host(host, || Process::spawn(&name, &mut command))
    }

    /// Runs a part of a host to its end.
    pub fn run(&self, host: usize, part: &str, more: &[&str]) -> Outcome {
        let mut command = self.command(host, part);
        command.args(["--log", "off"]).args(more);
        self.on_host(host, || run(&mut command, b"", TOO_LONG))
    }

    fn command(&self, host: usize, part: &str) -> std::process::Command {
        let mut command = program(&format!("eggs-{part}"));
        command.arg("--listen").arg(self.address(host, part).to_string());
        command.arg("--secret-file").arg(self.secret());
        command.args(self.arguments(host, part));
        command
    }

    fn arguments(&self, host: usize, part: &str) -> Vec<OsString> {
        let name: OsString = self.name(host).into();
        let mut arguments: Vec<OsString> = match part {
            "blockd" => vec!["--host".into(), name],
            _ => vec!["--host".into(), name, "--data".into(), self.data(host, part).into()],
        };
        let shuckles: OsString = self.shuckles().join(",").into();
        let further = match part {
            "shuckle" => {
                let replicas = self.config.replicas.to_string();
                arguments.extend(["--peers".into(), shuckles, "--replicas".into(), replicas.into()]);
                &self.config.shuckle[..]
            }
            "blockd" => {
                arguments.extend(["--shuckle".into(), shuckles]);
                for n in 0..DISKS_PER_HOST {
                    let mut disk = self.folder(host).join(format!("disk-{n}")).into_os_string();
                    disk.push(":FLASH");
                    arguments.extend(["--disk".into(), disk]);
                }
                &[]
            }
            _ => {
                arguments.extend(["--shuckle".into(), shuckles]);
                &self.config.replica[..]
            }
        };
        arguments.extend(further.iter().map(OsString::from));
        arguments
    }

    /// Runs it in the host's network.
    pub fn on_host<T: Send>(&self, host: usize, run: impl FnOnce() -> T + Send) -> T {
        match &self.config.network {
            Some(network) => network.on_host(host, run),
            None => run(),
        }
    }

    /// Runs it in the clients' network.
    pub fn on_client<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        match &self.config.network {
            Some(network) => network.on_client(run),
            None => run(),
        }
    }

    /// Every group led and with all the replicas it is to have, all of them caught up; every disk there.
    ///
    /// # Panics
    /// When it does not become so.
    pub fn wait_until_whole(&self) {
        let mut last = String::new();
        let deadline = std::time::Instant::now() + 2 * TOO_LONG;
        while !self.is_whole(&mut last) {
            assert!(std::time::Instant::now() < deadline, "the cluster does not become whole:\n{last}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn is_whole(&self, last: &mut String) -> bool {
        let outcome = self.on_client(|| self.ctl().run(["status", "--check", "--timeout", "5s"]));
        *last = format!("{}{}", outcome.text(), outcome.stderr);
        if outcome.code != Some(0) {
            return false;
        }
        // The registry believes for a while in what was heard of before a fault: its stores must be those of now.
        match self.on_client(|| runtime().block_on(self.what_is_old())) {
            Some(what) => {
                last.push_str(&what);
                false
            }
            None => true,
        }
    }

    /// What the cluster's map says that is not so any more, or not yet.
    async fn what_is_old(&self) -> Option<String> {
        let options = Options { shuckle: self.shuckles(), timeout: IMPATIENT, ..Options::default() };
        let map = match Client::connect(options).await {
            Ok(client) => client.cluster_map().await,
            Err(error) => Err(error),
        };
        let map = match map {
            Ok(map) => map,
            Err(error) => return Some(error.to_string()),
        };
        let running = self.running.keys().filter(|(_, part)| *part != "blockd");
        let now: Vec<u64> = running
            .map(|(host, part)| u64::from_str_radix(&self.store(*host, part), 16).expect("a store"))
            .collect();
        let is_heard_of = |id: &u64| {
            let fresh = |at: u64| map.now.saturating_sub(at) < u64::try_from(FRESH.as_nanos()).unwrap_or(0);
            map.stores.iter().any(|store| store.id == *id && store.alive && fresh(store.last_seen))
        };
        if let Some(silent) = now.iter().find(|id| !is_heard_of(id)) {
            return Some(format!("store {silent:016x} is not heard of"));
        }
        let behind = |place: &eggs_proto::pb::GroupPlace| {
            let reached = |progress: &eggs_proto::pb::ReplicaProgress| {
                progress.matched_index + BEHIND_MAX >= place.applied_index
            };
            !place.voters.iter().all(|voter| now.contains(voter)) || !place.progress.iter().all(reached)
        };
        map.groups.iter().find(|place| behind(place)).map(|place| format!("{place:?}"))
    }
}

fn loopback(host: usize) -> IpAddr {
    Ipv4Addr::new(127, 0, 0, u8::try_from(host + 1).expect("few hosts")).into()
}
