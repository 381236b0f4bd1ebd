//! Settings that daemons have in common, as clap groups to `#[command(flatten)]`.
//!
//! Every setting is also `EGGS_<NAME>` in the environment and a key of the configuration file
//! ([`crate::config`]).

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use clap::Args;
use eggs_proto::limits::FAILURE_DOMAIN_BYTES_MAX;

use crate::logging::Format;

/// What every daemon takes.
#[derive(Debug, Clone, Args)]
pub struct CommonArgs {
    /// TOML file with settings: the keys are the long flags' names. Flags and the environment win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// What to log: error, warn, info, debug or trace, or per module as in `info,eggs_shard=debug`
    #[arg(long, value_name = "FILTER", default_value = "info", value_parser = log_filter)]
    pub log: String,

    /// How log lines look
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub log_format: Format,

    /// Address and port to listen on; port 0 picks a free one
    #[arg(long, value_name = "ADDR:PORT", value_parser = listen_address)]
    pub listen: SocketAddr,

    /// Address and port others reach this daemon at [default: the address it listens on]
    #[arg(long, value_name = "HOST:PORT", value_parser = advertised_address)]
    pub advertise: Option<String>,
}

impl CommonArgs {
    /// What to tell others, once the port is known.
    ///
    /// # Errors
    /// When it listens on every address of the host and nobody said which one others can use.
    pub fn advertised(&self, bound: SocketAddr) -> Result<String, String> {
        match &self.advertise {
            Some(address) => Ok(address.clone()),
            None if bound.ip().is_unspecified() => Err(format!(
                "listening on {bound}: --advertise HOST:PORT is needed, the address that others reach this host at"
            )),
            None => Ok(bound.to_string()),
        }
    }
}

/// Daemons that keep data in a directory of their own.
#[derive(Debug, Clone, Args)]
pub struct DataArgs {
    /// Directory for the data; made when absent
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
}

/// Daemons that join a cluster through shuckle.
#[derive(Debug, Clone, Args)]
pub struct ClusterArgs {
    /// Where shuckle, the registry, listens: all of its replicas, separated by commas. One is enough as long
    /// as that one is there at the start
    #[arg(long, value_name = "HOST:PORT,…", default_value = "127.0.0.1:5000", value_parser = advertised_address, value_delimiter = ',')]
    pub shuckle: Vec<String>,

    /// File with the cluster secret (shuckle makes it)
    #[arg(long, value_name = "FILE")]
    pub secret_file: PathBuf,
}

/// What every daemon says of the machine it runs on.
#[derive(Debug, Clone, Args)]
pub struct HostArgs {
    /// The name of this host: what is on one host fails together, so no two replicas of anything share one
    /// [default: the system's host name]
    #[arg(long, value_name = "NAME", value_parser = host_name)]
    pub host: Option<String>,
}

impl HostArgs {
    /// The host's name.
    ///
    /// # Errors
    /// When it was not given and the system has none.
    pub fn name(&self) -> Result<String, String> {
        if let Some(name) = &self.host {
            return Ok(name.clone());
        }
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        host_name(name.trim()).map_err(|_| "this host has no usable name: --host NAME is needed".to_owned())
    }
}

/// Daemons whose data is replicated.
#[derive(Debug, Clone, Args)]
pub struct ReplicaArgs {
    /// Answer reads on the word of a lease, without asking the other replicas each time. Right only while no
    /// host's clock runs more than a tenth faster than another's
    #[arg(long)]
    pub read_lease: bool,

    /// MiB per second that replicas far behind, or new, may be sent in all
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub snapshot_rate: u32,
}

impl ReplicaArgs {
    pub fn snapshot_bytes_per_second(&self) -> u64 {
        u64::from(self.snapshot_rate) << 20
    }
}

/// The name of a host: short text, without what separates lists.
///
/// # Errors
/// For people: what it may be.
pub fn host_name(text: &str) -> Result<String, String> {
    let fits = !text.is_empty() && text.len() <= FAILURE_DOMAIN_BYTES_MAX;
    if fits && !text.contains(|c: char| c.is_control() || c.is_whitespace() || c == ',') {
        return Ok(text.to_owned());
    }
    Err(format!("a host's name has 1 to {FAILURE_DOMAIN_BYTES_MAX} bytes without spaces and commas"))
}

fn log_filter(text: &str) -> Result<String, String> {
    crate::logging::parse(text).map(|_| text.to_owned())
}

/// `ADDR:PORT`, where ADDR may be a name of this host.
pub fn listen_address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let found = text.to_socket_addrs().ok().and_then(|mut found| found.next());
    found.ok_or_else(|| "ADDR:PORT is expected, as in 127.0.0.1:5000".to_owned())
}

/// `HOST:PORT`, not looked up here.
pub fn advertised_address(text: &str) -> Result<String, String> {
    let good = text.parse::<http::uri::Authority>().is_ok_and(|authority| {
        authority.port_u16().is_some_and(|port| port > 0) && !authority.host().is_empty()
    });
    if good { Ok(text.to_owned()) } else { Err("HOST:PORT is expected, as in 10.0.0.1:5000".to_owned()) }
}
