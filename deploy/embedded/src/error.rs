//! Why a cluster in one process does not start, or goes down.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use eggs_daemon::directory::DirectoryError;
use eggs_daemon::registry::{JoinError, RegistryCallError};
use eggs_daemon::server;

use crate::cluster::READY_MAX;
use crate::manifest::DISKS_MAX;

/// Why a cluster cannot start, or went down. One line each.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Bind(#[from] server::BindError),
    #[error(
        "cannot listen on {0}: the parts of a cluster in one process find each other at the address they listen on, so it must be one of this host's"
    )]
    Unspecified(SocketAddr),
    #[error("cannot listen on {address}: {hosts} hosts need as many ports in a row")]
    Ports { address: SocketAddr, hosts: u32 },
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{} is missing: restore it, or start with another --data directory", .0.display())]
    PartMissing(PathBuf),
    #[error(
        "{} is a copy of {}: two replicas of one name would contradict each other. Empty one of them, and it is filled \
         again from the others",
        path.display(), original.display()
    )]
    Copy { path: PathBuf, original: PathBuf },
    #[error("--disks {asked}: a cluster in one process has 1 to {DISKS_MAX} disks")]
    DiskCount { asked: usize },
    #[error("--disks {asked}: the cluster in {} has {held} disks, and none can be taken away like this", path.display())]
    FewerDisks { path: PathBuf, held: usize, asked: usize },
    #[error("--replicas {0}: 1, 3 or 5")]
    ReplicaCount(u32),
    #[error("--replicas {asked}: the cluster in {} has {held}, and that does not change; choose another --data directory", path.display())]
    OtherReplicas { path: PathBuf, held: u32, asked: u32 },
    #[error("secret: {0}")]
    Secret(#[from] eggs_daemon::secret::SecretError),
    #[error("shuckle: {0}")]
    Shuckle(#[from] eggs_shuckle::OpenError),
    #[error("shards: {0}")]
    Shard(#[source] eggs_shard::StartError),
    #[error("crossdir: {0}")]
    Crossdir(#[source] eggs_crossdir::StartError),
    #[error("disks: {0}")]
    Blockd(#[from] eggs_blockd::OpenError),
    #[error("janitor: {0}")]
    Janitor(#[from] eggs_janitor::service::Ended),
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    Registry(#[from] RegistryCallError),
    #[error("not ready after {seconds} s: {what}", seconds = READY_MAX.as_secs())]
    NotReady { what: String },
    #[error("a part of the cluster ended: {0}")]
    Ended(String),
}
