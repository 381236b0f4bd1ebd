//! The settings of a shard service.

use std::path::PathBuf;

use eggs_daemon::Secret;

use crate::shards::ShardList;

/// What a shard service needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its data directory; made when absent.
    pub data: PathBuf,
    pub shards: ShardList,
    /// Of the cluster: shown to shuckle, asked of the coordinator.
    pub secret: Secret,
    /// `HOST:PORT` of shuckle.
    pub shuckle: String,
}
