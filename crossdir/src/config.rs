//! The settings of a crossdir service.

use std::path::PathBuf;

use eggs_daemon::Secret;

/// What a crossdir service needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its data directory; made when absent.
    pub data: PathBuf,
    /// Of the cluster: shown to shuckle and the shards.
    pub secret: Secret,
    /// `HOST:PORT` of shuckle.
    pub shuckle: String,
}
