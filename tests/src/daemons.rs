//! The separate daemons as children, nothing replicated: shuckle, shard, crossdir, two disk hosts.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use eggs_client::{Client, Options};
use rustix::process::Signal;

use crate::{Ctl, Process, TOO_LONG, json, problems, program, until};

/// How long a restarted shuckle may be away for others: they ask again every second.
pub const SHUCKLE_RESTART: Duration = Duration::from_secs(30);

const NAMES: [&str; 5] = ["shuckle", "shard", "crossdir", "blockd-a", "blockd-b"];
/// The host that all but the disks are on.
const HOST: &str = "host-a";
const DISKS_PER_HOST: usize = 4;

/// A cluster of daemons that find each other through shuckle.
#[derive(Debug)]
pub struct Daemons {
    root: PathBuf,
    running: BTreeMap<&'static str, Process>,
    addresses: BTreeMap<&'static str, SocketAddr>,
}

impl Daemons {
    /// Starts all of them in folders of `root`, and waits until the cluster is healthy.
    ///
    /// # Panics
    /// When it does not become so.
    pub fn start(root: &Path) -> Daemons {
        std::fs::create_dir_all(root).expect("a folder");
        let mut daemons =
            Daemons { root: root.to_owned(), running: BTreeMap::new(), addresses: BTreeMap::new() };
        for name in NAMES {
            daemons.launch(name);
        }
        daemons.wait_until_healthy();
        daemons
    }

    /// Every daemon's name.
    pub fn names() -> [&'static str; 5] {
        NAMES
    }

    pub fn shuckle(&self) -> SocketAddr {
        self.addresses["shuckle"]
    }

    /// # Panics
    /// When there is no daemon of this name.
    pub fn address(&self, name: &str) -> SocketAddr {
        self.addresses[name]
    }

    pub fn secret(&self) -> PathBuf {
        self.root.join("secret")
    }

    pub fn data(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn ctl(&self) -> Ctl {
        Ctl::new(self.shuckle())
    }

    /// # Panics
    /// When it is not to be reached.
    pub async fn client(&self) -> Client {
        Client::connect(Options::new(self.shuckle().to_string())).await.expect("connect")
    }

    pub fn process(&mut self, name: &str) -> &mut Process {
        self.running.get_mut(name).expect("a running daemon")
    }

    /// SIGKILL.
    pub fn kill(&mut self, name: &'static str) {
        self.running.remove(name).expect("a running daemon").kill();
    }

    /// SIGTERM, and exit code 0.
    ///
    /// # Panics
    /// When it does not end so.
    pub fn stop(&mut self, name: &'static str) {
        let mut process = self.running.remove(name).expect("a running daemon");
        process.signal(Signal::TERM);
        let status = process.wait(TOO_LONG);
        assert!(status.success(), "{name}: {status}: {}", process.said());
    }

    /// Starts a daemon (also `janitor-NAME`, and other hosts of disks, `blockd-NAME`, each a failure domain: they are not there
    /// from the beginning), at the address it had before if it had one; returns when it listens.
    ///
    /// # Panics
    /// When it does not start.
    pub fn launch(&mut self, name: &'static str) {
        let address = until(name, TOO_LONG, || {
            let process = self.spawn(name);
            let found = process.try_wait_for(TOO_LONG, listening_address);
            // Its old port may be in use for a moment, as the local end of somebody's connection.
            if found.is_none() && !process.said().contains("address in use") {
                panic!("{name} does not listen; it said:\n{}", process.said());
            }
            if found.is_some() {
                self.running.insert(name, process);
            }
            found
        });
        self.addresses.insert(name, address);
    }

    /// Starts a daemon without waiting for it.
    pub fn spawn(&self, name: &'static str) -> Process {
        let (binary, options) = self.arguments(name);
        let mut command = program(binary);
        let listen = self.addresses.get(name).map_or_else(|| "127.0.0.1:0".to_owned(), ToString::to_string);
        command.arg("--listen").arg(listen).arg("--secret-file").arg(self.secret()).args(options);
        if name != "shuckle" {
            command.arg("--shuckle").arg(self.shuckle().to_string());
        }
        Process::spawn(name, &mut command)
    }

    fn arguments(&self, name: &str) -> (&'static str, Vec<OsString>) {
        let data = || vec!["--host".into(), HOST.into(), "--data".into(), self.data(name).into_os_string()];
        match name {
            "shuckle" => ("eggs-shuckle", data()),
            "shard" => ("eggs-shard", data()),
            "crossdir" => ("eggs-crossdir", data()),
            janitor if janitor.starts_with("janitor") => ("eggs-janitor", janitor_options(janitor)),
            host => {
                let mut options = vec!["--failure-domain".into(), host.into()];
                for n in 0..DISKS_PER_HOST {
                    let mut disk = self.disk(host, n).into_os_string();
                    disk.push(":FLASH");
                    options.extend(["--disk".into(), disk]);
                }
                ("eggs-blockd", options)
            }
        }
    }

    /// A disk of a host.
    pub fn disk(&self, host: &str, n: usize) -> PathBuf {
        self.root.join(host).join(format!("disk-{n}"))
    }

    /// All shards served, a coordinator, all disks writable. That the machine's own disk is nearly full may be.
    ///
    /// # Panics
    /// When it does not become so.
    pub fn wait_until_healthy(&self) {
        until("a healthy cluster", TOO_LONG, || {
            let status = json(self.shuckle(), "/api/v1/status");
            let disks = status["block_service_counts"]["ok"] == 2 * DISKS_PER_HOST;
            (problems(&status).is_empty() && disks).then_some(())
        });
    }
}

/// Quick to act; the one called `janitor-slow` is not quick to repair, `janitor-spread` looks all the time how spans are spread.
fn janitor_options(name: &str) -> Vec<OsString> {
    let rate = if name.ends_with("slow") { "1" } else { "0" };
    let spread = if name.ends_with("spread") { "1s" } else { "1h" };
    let quick = ["--host", name, "--lost-after", "1s", "--garbage-interval", "1s"];
    let options = [&quick[..], &["--repair-rate", rate, "--spread-interval", spread]].concat();
    options.into_iter().map(OsString::from).collect()
}

/// From the line that says where it listens.
pub(crate) fn listening_address(line: &str) -> Option<SocketAddr> {
    let rest = line.split_once("address=")?.1;
    rest.split_whitespace().next()?.parse().ok()
}
