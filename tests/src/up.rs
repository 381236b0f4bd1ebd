//! `eggsctl up` as a child.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use eggs_client::{Client, Options};
use rustix::process::Signal;

use crate::{Ctl, Process, TOO_LONG, program};

/// A whole cluster in one process.
#[derive(Debug)]
pub struct Up {
    process: Process,
    address: SocketAddr,
    data: PathBuf,
}

impl Up {
    /// Starts it and waits until it is ready.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(data: &Path) -> Up {
        Up::start_with(data, &[])
    }

    /// With more options.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_with(data: &Path, options: &[&str]) -> Up {
        let process = Up::spawn(data, options);
        Up::ready(process, data)
    }

    /// Starts it without waiting for anything.
    pub fn spawn(data: &Path, options: &[&str]) -> Process {
        let mut command = program("eggsctl");
        command.arg("up").arg("--data").arg(data).args(["--listen", "127.0.0.1:0"]).args(options);
        Process::spawn("up", &mut command)
    }

    /// Waits until it is ready.
    ///
    /// # Panics
    /// When it does not come to that.
    pub fn ready(process: Process, data: &Path) -> Up {
        process.wait_for("ready", TOO_LONG, |line| line.starts_with("ready in ").then_some(()));
        let address = process.wait_for("address", TOO_LONG, |line| {
            let address =
                line.trim_start().strip_prefix("dashboard")?.trim_start().strip_prefix("http://")?;
            address.trim_end_matches('/').parse().ok()
        });
        Up { process, address, data: data.to_owned() }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    pub fn ctl(&self) -> Ctl {
        Ctl::new(self.address)
    }

    /// # Panics
    /// When it is not to be reached.
    pub async fn client(&self) -> Client {
        Client::connect(Options::new(self.address.to_string())).await.expect("connect")
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.process.kill();
    }

    /// SIGTERM; it drains and exits with 0.
    ///
    /// # Panics
    /// When it does not.
    pub fn stop(mut self) {
        self.process.signal(Signal::TERM);
        let status = self.process.wait(Duration::from_secs(30));
        assert!(status.success(), "{status}: {}", self.process.said());
    }
}
