//! The settings of a coordinator service.

use std::path::PathBuf;

use eggs_daemon::Secret;

/// What a coordinator service needs to know. Whether it has a replica is the registry's to say.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its data directory; made when absent.
    pub data: PathBuf,
    /// Of the cluster: shown to shuckle, the shards and the other stores.
    pub secret: Secret,
    /// `HOST:PORT` of each shuckle that is known.
    pub shuckle: Vec<String>,
    /// The machine it is on: no two replicas share one.
    pub host: String,
    /// Answer reads under a lease.
    pub read_lease: bool,
    /// That replicas far behind, or new, may be sent.
    pub snapshot_bytes_per_second: u64,
}
