//! `up`: a whole cluster in this process, or with `--detach` in one of its own.
//!
//! Nothing is written into the data directory before the cluster has opened it: a directory in use,
//! of something else or of a newer format is refused untouched.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;
use eggs_client::{Client, Options};
use eggs_embedded::{Cluster, Config, JanitorSettings};
use eggs_proto::limits::REPLICAS;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::place::{self, PidFile};

/// To say what the hosts are; they run already.
const HOSTS_TIMEOUT: Duration = Duration::from_secs(2);

/// Start a whole cluster in one process
///
/// Registry, 256 metadata shards, coordinator and disks, with the same wire protocol and disk formats
/// as separate daemons. With --replicas 3 it is three hosts. Runs until Ctrl-C or SIGTERM (or `eggsctl down`), then drains. The data
/// survives restarts; disks are the folders disks/00, disks/01, … in the data directory. A disk whose folder is gone is lost, and
/// never made anew while anything it had may be missed; once it was given up and is empty (`eggsctl disk ls`), or was forgotten
/// (`eggsctl disk forget`), the start after the next stop makes a new one in its place.
#[derive(Debug, Args)]
pub struct Up {
    #[arg(long, env = "EGGS_DATA", value_name = "DIR", help = format!("Data directory, made when absent [default: {}]", place::DEFAULT_DATA))]
    data: Option<PathBuf>,

    /// Address and port to listen on; port 0 picks a free one
    #[arg(long, env = "EGGS_LISTEN", value_name = "ADDR:PORT", default_value = "127.0.0.1:5000", value_parser = eggs_daemon::args::listen_address)]
    listen: SocketAddr,

    /// Number of disks, each a failure domain of its own [default: 8 in a new directory, else those it has].
    /// Files over 64 KiB need 6
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    disks: Option<u16>,

    /// Replicas of all metadata, each on a host of its own within this process: 1, 3 or 5 [default: 1 in a new
    /// directory, else those it has]. The hosts listen on the port of --listen and those after it
    #[arg(long, value_name = "N", value_parser = replicas)]
    replicas: Option<u32>,

    /// Let leaders answer reads without asking the other replicas, as long as their clocks run evenly
    #[arg(long)]
    read_lease: bool,

    /// Without a janitor: nothing is repaired, checked or erased, unless an eggs-janitor of its own runs
    #[arg(long)]
    no_janitor: bool,

    #[command(flatten, next_help_heading = "Janitor (repairs, checks, cleans up)")]
    janitor: JanitorSettings,

    /// Run in the background: returns when the cluster is ready
    #[arg(short, long)]
    detach: bool,

    /// The background process of --detach
    #[arg(long, hide = true, conflicts_with = "detach")]
    background: bool,
}

impl Up {
    pub async fn run(self, context: &Context) -> Outcome {
        let data =
            place::data(self.data.as_deref()).map_err(|error| Failure::io("data directory", &error))?;
        let stop = eggs_daemon::signal::shutdown().map_err(|error| Failure::io("signals", &error))?;
        if self.detach {
            return self.detached(context, &data, stop).await;
        }
        if self.background {
            // A session of its own: the terminal's signals and its end are not ours. Fails only when
            // we lead one already.
            let _ = rustix::process::setsid();
        }
        let started = Instant::now();
        let log = crate::logs::start_up(context.global.verbose, self.background);
        let mut cluster = tokio::select! {
            cluster = self.start(&data) => cluster?,
            // It ends as in a crash: nothing has been acknowledged yet.
            () = stop.cancelled() => return Err(interrupted(&data)),
        };
        let on_data = |error: std::io::Error| Failure::io(data.display(), &error);
        let log = log.open(&data).map_err(on_data)?;
        let pid_file = PidFile::create(&data).map_err(on_data)?;
        let (needed, _) = eggs_proto::policy::default_blocks();
        if cluster.disks() < needed {
            eprintln!(
                "eggsctl: up: {} disks: files over {} KiB need {needed} (RS(4,2)) and cannot be written; start with --disks {needed} or more",
                cluster.disks(),
                eggs_proto::policy::DEFAULT_MIRROR_BYTES >> 10,
            );
        }
        let seconds = started.elapsed().as_secs_f64();
        let hosts = if cluster.replicas() > 1 { hosts(cluster.address()).await } else { Vec::new() };
        let text = ready(seconds, &data, &log, cluster.address(), &hosts, self.background);
        let mut out = context.out();
        // A reader that has gone is no reason to stop a cluster that runs.
        let _ = out.line(text).and_then(|()| out.flush());
        if self.background {
            leave_terminal(&log).map_err(|error| Failure::io(log.display(), &error))?;
        }
        eggs_daemon::systemd::ready();
        let ended = tokio::select! {
            () = stop.cancelled() => Ok(()),
            why = cluster.failed() => Err(Failure::refused(data.display(), why)),
        };
        eggs_daemon::systemd::stopping();
        let stopping = Instant::now();
        let _ = out.line("stopping").and_then(|()| out.flush());
        cluster.stop().await;
        drop(pid_file);
        let _ = out.line(format_args!("stopped in {:.2} s", stopping.elapsed().as_secs_f64()));
        let _ = out.finish();
        ended
    }

    async fn start(&self, data: &Path) -> Outcome<Cluster> {
        let config = Config {
            data: data.to_owned(),
            listen: self.listen,
            disks: self.disks.map(usize::from),
            replicas: self.replicas,
            read_lease: self.read_lease,
            janitor: (!self.no_janitor).then(|| self.janitor.clone()),
        };
        Box::pin(Cluster::start(config)).await.map_err(|error| Failure::refused("", error))
    }

    /// Runs this program again in the background and waits until it says that it is ready.
    async fn detached(&self, context: &Context, data: &Path, stop: CancellationToken) -> Outcome {
        let mut child =
            self.spawn(context, data).map_err(|error| Failure::io("background process", &error))?;
        let mut stdout = child.stdout.take();
        let said = tokio::task::spawn_blocking(move || {
            let mut said = Vec::new();
            // Ends when the child is ready (it lets go of its standard output) or gone.
            if let Some(stdout) = &mut stdout {
                stdout.read_to_end(&mut said)?;
            }
            Ok::<_, std::io::Error>(said)
        });
        let said = tokio::select! {
            said = said => said,
            () = stop.cancelled() => {
                terminate(&mut child);
                return Err(interrupted(data));
            }
        };
        let said = said.map_err(std::io::Error::other).and_then(|said| said);
        let said = said.map_err(|error| Failure::io("background process", &error))?;
        if said.is_empty() {
            // It has said why on the standard error we share.
            let status = child.wait().map_err(|error| Failure::io("background process", &error))?;
            return Err(match status.code() {
                Some(_) => Failure::Reported,
                None => Failure::refused(data.display(), format!("the background process ended: {status}")),
            });
        }
        let mut out = context.out();
        out.bytes(&said)?;
        out.finish()
    }

    fn spawn(&self, context: &Context, data: &Path) -> std::io::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("up").arg("--background").arg("--data").arg(data);
        command.arg("--listen").arg(self.listen.to_string());
        if let Some(disks) = self.disks {
            command.arg("--disks").arg(disks.to_string());
        }
        if let Some(replicas) = self.replicas {
            command.arg("--replicas").arg(replicas.to_string());
        }
        if self.read_lease {
            command.arg("--read-lease");
        }
        command.args(self.janitor.to_flags());
        if self.no_janitor {
            command.arg("--no-janitor");
        }
        for _ in 0..context.global.verbose {
            command.arg("-v");
        }
        // A working directory would keep a file system from being unmounted.
        command.current_dir("/").env(PROGRAM, program());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()
    }
}

fn replicas(text: &str) -> Result<u32, String> {
    let replicas = text.parse().ok().filter(|replicas| REPLICAS.contains(replicas));
    replicas.ok_or_else(|| "a group has 1, 3 or 5 replicas".to_owned())
}

/// The hosts of the cluster and where each listens, as its registry has them.
async fn hosts(address: SocketAddr) -> Vec<(String, String)> {
    let options = Options { timeout: HOSTS_TIMEOUT, ..Options::new(address.to_string()) };
    let stores = match Client::connect(options).await {
        Ok(client) => client.stores().await.unwrap_or_default(),
        Err(error) => {
            tracing::debug!(%error, "the hosts are not known");
            Vec::new()
        }
    };
    let hosts: BTreeMap<String, String> =
        stores.into_iter().map(|store| (store.host, store.address)).collect();
    hosts.into_iter().collect()
}

fn interrupted(data: &Path) -> Failure {
    Failure::refused(data.display(), "interrupted before the cluster was ready")
}

/// Tells the background process how people call this program.
const PROGRAM: &str = "EGGSCTL_PROGRAM";

/// As it was typed: `eggsctl`, or a path such as `target/release/eggsctl`.
fn program() -> String {
    let typed = || std::env::args().next().filter(|name| name.contains('/'));
    std::env::var(PROGRAM).ok().or_else(typed).unwrap_or_else(|| "eggsctl".to_owned())
}

fn terminate(child: &mut Child) {
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let _ = child.wait();
}

/// Whoever waits for the end of our output must not wait for the end of the cluster.
fn leave_terminal(log: &Path) -> std::io::Result<()> {
    let log = File::options().append(true).open(log)?;
    let nothing = File::options().write(true).open("/dev/null")?;
    std::io::stdout().flush()?;
    rustix::stdio::dup2_stderr(&log)?;
    rustix::stdio::dup2_stdout(&nothing)?;
    Ok(())
}

/// What people need to know once the cluster is up.
fn ready(
    seconds: f64,
    data: &Path,
    log: &Path,
    address: SocketAddr,
    hosts: &[(String, String)],
    background: bool,
) -> String {
    let program = program();
    let shuckle = if address.port() == 5000 && address.ip().is_loopback()
        || address.ip().is_unspecified() && address.port() == 5000
    {
        String::new()
    } else {
        format!(" --shuckle {}", reachable(address))
    };
    let down = match place::data(None) {
        Ok(default) if default == data => format!("{program} down"),
        _ => format!("{program} down --data {}", quoted(data)),
    };
    let stop = if background { down } else { format!("Ctrl-C, or {down}") };
    let hosts: String =
        hosts.iter().map(|(host, address)| format!("host       {host} at {address}\n  ")).collect();
    format!(
        "ready in {seconds:.2} s\n  \
           dashboard  http://{}/\n  {hosts}\
           data       {}\n  \
           log        {}\n  \
           stop       {stop}\n  \
           try        {program} create-test-file /hello{shuckle} && {program} cat /hello{shuckle}",
        reachable(address),
        data.display(),
        log.display(),
    )
}

/// An address that a program on this host can connect to.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => ([127, 0, 0, 1], v4.port()).into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => (std::net::Ipv6Addr::LOCALHOST, v6.port()).into(),
        other => other,
    }
}

/// A path to paste into a shell.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "/._-+,:@%".contains(letter);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_ready() {
        let text = ready(
            0.4213,
            Path::new("/d d"),
            Path::new("/d d/log/eggsctl.log"),
            ([0, 0, 0, 0], 5001).into(),
            &[],
            true,
        );
        let program = program();
        assert_eq!(
            text,
            format!(
                "ready in 0.42 s\n  \
                   dashboard  http://127.0.0.1:5001/\n  \
                   data       /d d\n  \
                   log        /d d/log/eggsctl.log\n  \
                   stop       {program} down --data '/d d'\n  \
                   try        {program} create-test-file /hello --shuckle 127.0.0.1:5001 && {program} cat /hello --shuckle 127.0.0.1:5001"
            )
        );
        let hosts = [("host-1".into(), "127.0.0.1:5000".into()), ("host-2".into(), "127.0.0.1:5001".into())];
        let text = ready(1.0, Path::new("/d"), Path::new("/l"), ([127, 0, 0, 1], 5000).into(), &hosts, false);
        assert!(text.contains("Ctrl-C") && !text.contains("--shuckle"), "{text}");
        assert!(
            text.contains(
                "/\n  host       host-1 at 127.0.0.1:5000\n  host       host-2 at 127.0.0.1:5001\n  data"
            ),
            "{text}"
        );
    }

    #[test]
    fn paths_can_be_pasted() {
        assert_eq!(quoted(Path::new("/a/b-c.d")), "/a/b-c.d");
        assert_eq!(quoted(Path::new("/it's")), r"'/it'\''s'");
    }
}
