//! Settings that daemons have in common, as clap groups to `#[command(flatten)]`.
//!
//! Every setting is also `EGGS_<NAME>` in the environment and a key of the configuration file
//! ([`crate::config`]).

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use clap::Args;

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
    /// Where shuckle, the registry, listens
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:5000", value_parser = advertised_address)]
    pub shuckle: String,

    /// File with the cluster secret (shuckle makes it)
    #[arg(long, value_name = "FILE")]
    pub secret_file: PathBuf,
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
