//! The process under test: `eggsctl up` of the release build, in a scratch directory, on a free port.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use eggs_client::{Client, Options};
use rustix::process::{Pid, Signal, kill_process};

use super::measure;

/// A start that takes longer has failed.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// A drain that takes longer has failed.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// A directory for everything a suite writes; it goes with the suite.
pub struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    pub fn new(parent: Option<&Path>) -> Result<Scratch> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("eggsfs-bench-");
        let directory = match parent {
            Some(parent) => builder.tempdir_in(parent),
            None => builder.tempdir(),
        };
        Ok(Scratch { directory: directory.context("cannot make a scratch directory")? })
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// An empty place of that name: what was there is removed.
    pub fn fresh(&self, name: &str) -> Result<PathBuf> {
        let path = self.directory.path().join(name);
        if path.exists() {
            std::fs::remove_dir_all(&path).with_context(|| path.display().to_string())?;
        }
        Ok(path)
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    /// Of every shuckle.
    addrs: Vec<String>,
    own: Option<Own>,
}

#[derive(Debug)]
struct Own {
    child: Child,
    took: Duration,
}

impl Cluster {
    /// Somebody else's cluster: it is neither stopped nor are its costs known.
    pub fn foreign(addr: &str) -> Cluster {
        Cluster { addrs: addr.split(',').map(str::to_owned).collect(), own: None }
    }

    /// Starts a cluster in `data` and waits until it says that it is ready.
    pub fn start(eggsctl: &Path, data: &Path) -> Result<Cluster> {
        Cluster::start_replicated(eggsctl, data, 1)
    }

    /// Starts a cluster of one host with so many disks.
    pub fn start_with_disks(eggsctl: &Path, data: &Path, disks: u32) -> Result<Cluster> {
        Cluster::start_up(eggsctl, data, 1, Some(disks))
    }

    /// Starts a cluster of several hosts in one process: each listens on a port of its own.
    pub fn start_replicated(eggsctl: &Path, data: &Path, replicas: u16) -> Result<Cluster> {
        Cluster::start_up(eggsctl, data, replicas, None)
    }

    fn start_up(eggsctl: &Path, data: &Path, replicas: u16, disks: Option<u32>) -> Result<Cluster> {
        let first = free_ports(replicas)?;
        let addrs: Vec<String> = (0..replicas).map(|n| format!("127.0.0.1:{}", first + n)).collect();
        let began = Instant::now();
        let mut command = Command::new(eggsctl);
        command.args(["up", "--listen", &addrs[0], "--data"]).arg(data);
        if replicas > 1 {
            command.args(["--replicas", &replicas.to_string()]);
        }
        if let Some(disks) = disks {
            command.args(["--disks", &disks.to_string()]);
        }
        let mut child = command
            .env_remove("EGGS_SHUCKLE")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", eggsctl.display()))?;
        let ready = watch(&mut child);
        match ready.recv_timeout(READY_TIMEOUT) {
            Ok(Ok(at)) => Ok(Cluster { addrs, own: Some(Own { child, took: at - began }) }),
            Ok(Err(said)) => {
                child.kill().ok();
                child.wait().ok();
                bail!("the cluster did not start: {}", said.trim());
            }
            Err(_) => {
                child.kill().ok();
                child.wait().ok();
                bail!("the cluster was not ready after {} s", READY_TIMEOUT.as_secs());
            }
        }
    }

    /// From running the program to the line that says ready.
    pub fn took(&self) -> Duration {
        self.own.as_ref().map_or(Duration::ZERO, |own| own.took)
    }

    /// The process, when it is ours.
    pub fn pid(&self) -> Option<u32> {
        self.own.as_ref().map(|own| own.child.id())
    }

    /// Of the first shuckle.
    pub fn address(&self) -> Result<&str> {
        Ok(self.addrs.first().context("no address")?)
    }

    pub async fn client(&self) -> Result<Client> {
        self.client_with(|options| options).await
    }

    /// A client with other options than the defaults.
    pub async fn client_with(&self, change: impl FnOnce(Options) -> Options) -> Result<Client> {
        let options = change(Options { shuckle: self.addrs.clone(), ..Options::default() });
        Client::connect(options).await.with_context(|| format!("no cluster at {}", self.addrs.join(", ")))
    }

    /// The sum of a counter over all of its labels, as the process counts it.
    pub fn counter(&self, name: &str) -> Result<f64> {
        measure::counter(self.address()?, name)
    }

    /// CPU of the cluster and of this process so far, in seconds.
    pub fn cpu(&self) -> Result<f64> {
        let own = measure::cpu_seconds("self")?;
        match self.pid() {
            Some(pid) => Ok(own + measure::cpu_seconds(&pid.to_string())?),
            None => Ok(own),
        }
    }

    /// Drains it, as an operator would.
    pub fn stop(mut self) -> Result<()> {
        let Some(mut own) = self.own.take() else { return Ok(()) };
        signal(&own.child, Signal::TERM)?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        loop {
            match own.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("the cluster ended with {status} on SIGTERM"),
                None if Instant::now() > deadline => {
                    own.child.kill()?;
                    own.child.wait()?;
                    bail!("the cluster did not drain within {} s", STOP_TIMEOUT.as_secs());
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Ends it as a crash does.
    pub fn crash(mut self) -> Result<()> {
        if let Some(mut own) = self.own.take() {
            own.child.kill()?;
            own.child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(own) = &mut self.own {
            own.child.kill().ok();
            own.child.wait().ok();
        }
    }
}

fn signal(child: &Child, signal: Signal) -> Result<()> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| anyhow!("no process"))?;
    kill_process(pid, signal)?;
    Ok(())
}

/// Reads what the cluster prints, to its end, so that it never waits for us. The answer is when it said ready,
/// or all it said when it ended before.
fn watch(child: &mut Child) -> mpsc::Receiver<Result<Instant, String>> {
    let (sender, receiver) = mpsc::channel();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let errors = std::thread::spawn(move || {
        let lines = BufReader::new(stderr?).lines().map_while(Result::ok);
        // Only the end is of interest; the rest is logs.
        lines.fold(None, |_, line| Some(line))
    });
    std::thread::spawn(move || {
        let mut said = String::new();
        for line in stdout.into_iter().flat_map(|out| BufReader::new(out).lines().map_while(Result::ok)) {
            if line.starts_with("ready") {
                sender.send(Ok(Instant::now())).ok();
            }
            said = line;
        }
        let last_error = errors.join().ok().flatten();
        sender.send(Err(last_error.unwrap_or(said))).ok();
    });
    receiver
}

/// The first of `count` free ports in a row.
fn free_ports(count: u16) -> Result<u16> {
    for _ in 0..100 {
        let listener = TcpListener::bind("127.0.0.1:0").context("no free port")?;
        let first = listener.local_addr()?.port();
        let Some(last) = first.checked_add(count - 1) else { continue };
        if (first + 1..=last).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return Ok(first);
        }
    }
    bail!("no {count} free ports in a row")
}
