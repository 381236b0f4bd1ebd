//! Hosts with addresses of their own on this machine: network namespaces on one bridge, and ways to cut them off.
//!
//! ```text
//!   host 1        host 2        host 3       client
//!  10.77.0.1     10.77.0.2     10.77.0.3    10.77.0.100     a namespace each, eth0
//!      │             │             │             │          veth pairs
//!      h1            h2            h3            c
//!      └─────────────┴── bridge ───┴─────────────┘          a namespace: the cables and the switch
//! ```
//!
//! Packets are dropped at the bridge's ports by classic BPF filters of `tc`, so nobody is told: no carrier is
//! lost, no connection is reset. Needs root and `ip`/`tc` (iproute2); where it may not, [`Network::new`] says so.

use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::runtime::{Builder, Runtime};

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);
const NAMES: &str = "eggs-test-";

/// Namespaces that go when it is dropped.
#[derive(Debug)]
pub struct Network {
    /// Of the namespaces' names: no two runs have the same.
    prefix: String,
    hosts: usize,
}

/// What a host is cut off from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Everybody, both ways.
    Off,
    /// It hears no other host. Others, and all clients, hear it; clients reach it.
    Deaf,
    /// No other host hears it. It hears them; clients reach it.
    Mute,
}

impl Network {
    /// `None`, and a line that says why, where it may not be had.
    pub fn new(hosts: usize) -> Option<Network> {
        remove_abandoned();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let network = Network { prefix: format!("{NAMES}{}-{number}", std::process::id()), hosts };
        match network.build() {
            Ok(()) => Some(network),
            Err(why) => {
                println!("skipped: no network namespaces here: {why}");
                None
            }
        }
    }

    fn build(&self) -> Result<(), String> {
        let hub = self.hub();
        ip(&["netns", "add", &hub])?;
        ip(&["-n", &hub, "link", "add", "bridge", "type", "bridge", "stp_state", "0", "forward_delay", "0"])?;
        ip(&["-n", &hub, "link", "set", "bridge", "up"])?;
        let hosts = (0..self.hosts).map(|host| (self.host(host), self.address(host), port(host)));
        for (name, address, port) in hosts.chain([(self.client(), CLIENT, "c".to_owned())]) {
            ip(&["netns", "add", &name])?;
            ip(&["-n", &hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
            ip(&["-n", &hub, "link", "set", &port, "master", "bridge", "up"])?;
            ip(&["-n", &name, "address", "add", &format!("{address}/24"), "dev", "eth0"])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
            ip(&["-n", &name, "link", "set", "eth0", "up"])?;
            tc(&["-n", &hub, "qdisc", "add", "dev", &port, "clsact"])?;
        }
        // Whether packets can be dropped is better known now.
        self.drop_packets(0, "ingress", &everything())?;
        self.try_heal(0)
    }

    fn hub(&self) -> String {
        format!("{}-hub", self.prefix)
    }

    fn host(&self, host: usize) -> String {
        format!("{}-h{}", self.prefix, host + 1)
    }

    fn client(&self) -> String {
        format!("{}-client", self.prefix)
    }

    /// Of a host, from 0.
    pub fn address(&self, host: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, u8::try_from(host + 1).expect("few hosts"))
    }

    /// Runs it where that host is; programs it starts are there too.
    ///
    /// # Panics
    /// When it does.
    pub fn on_host<T: Send>(&self, host: usize, run: impl FnOnce() -> T + Send) -> T {
        inside(&self.host(host), run)
    }

    /// Runs it where the clients are.
    ///
    /// # Panics
    /// When it does.
    pub fn on_client<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        inside(&self.client(), run)
    }

    /// A runtime whose threads are where the clients are.
    ///
    /// # Panics
    /// When the system has no threads left.
    pub fn client_runtime(self: &Arc<Self>) -> Runtime {
        let network = Arc::clone(self);
        let enter = move || enter(&network.client());
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().on_thread_start(enter).build().expect("runtime")
    }

    /// Drops packets until [`Network::heal`].
    ///
    /// # Panics
    /// When it cannot.
    pub fn cut(&self, host: usize, cut: Cut) {
        // At the bridge's port: what the host sends comes in, what it is sent goes out.
        let filters = match cut {
            Cut::Off => vec![("ingress", everything()), ("egress", everything())],
            Cut::Deaf => vec![("egress", unless_client(SOURCE))],
            Cut::Mute => vec![("ingress", unless_client(DESTINATION))],
        };
        for (side, filter) in filters {
            self.drop_packets(host, side, &filter).expect("a filter");
        }
    }

    /// # Panics
    /// When it cannot.
    pub fn heal(&self, host: usize) {
        self.try_heal(host).expect("filters removed");
    }

    fn drop_packets(&self, host: usize, side: &str, filter: &str) -> Result<(), String> {
        let (hub, port) = (self.hub(), port(host));
        tc(&["-n", &hub, "filter", "add", "dev", &port, side, "bpf", "direct-action", "bytecode", filter])
    }

    fn try_heal(&self, host: usize) -> Result<(), String> {
        let (hub, port) = (self.hub(), port(host));
        ["ingress", "egress"]
            .iter()
            .try_for_each(|side| tc(&["-n", &hub, "filter", "del", "dev", &port, side]))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove(&self.prefix);
    }
}

/// The bridge's port of a host.
fn port(host: usize) -> String {
    format!("h{}", host + 1)
}

/// Where an IPv4 packet has its addresses, in an Ethernet frame.
const SOURCE: u32 = 26;
const DESTINATION: u32 = 30;

/// Classic BPF (number of instructions; code, jump if true, jump if false, operand): TC_ACT_SHOT for all.
fn everything() -> String {
    "1,6 0 0 2,".to_owned()
}

/// TC_ACT_SHOT for IPv4 packets whose address at `field` is not the clients'; the rest passes.
fn unless_client(field: u32) -> String {
    let client = u32::from(CLIENT);
    format!("6,40 0 0 12,21 0 3 2048,32 0 0 {field},21 1 0 {client},6 0 0 2,6 0 0 4294967295,")
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    command("ip", arguments)
}

fn tc(arguments: &[&str]) -> Result<(), String> {
    command("tc", arguments)
}

fn command(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(format!("{program} {}: {said}", arguments.join(" ")))
}

/// Moves this thread.
fn enter(namespace: &str) {
    let file = std::fs::File::open(Path::new("/run/netns").join(namespace)).expect("a namespace");
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).expect("setns");
}

fn inside<T: Send>(namespace: &str, run: impl FnOnce() -> T + Send) -> T {
    let run = || {
        enter(namespace);
        run()
    };
    std::thread::scope(|scope| match scope.spawn(run).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

fn namespaces() -> Vec<String> {
    let files = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    files.map(|file| file.file_name().to_string_lossy().into_owned()).collect()
}

fn remove(prefix: &str) {
    for name in namespaces() {
        if name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('-')) {
            // Nobody is left to be told.
            let _ = ip(&["netns", "delete", &name]);
        }
    }
}

/// Those of tests that were killed.
fn remove_abandoned() {
    for name in namespaces() {
        let Some(process) = name.strip_prefix(NAMES).and_then(|rest| rest.split('-').next()) else {
            continue;
        };
        if !Path::new("/proc").join(process).exists() {
            remove(&format!("{NAMES}{process}"));
        }
    }
}
