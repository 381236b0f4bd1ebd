//! The shard service: replicas of many of the 256 metadata shards in one process.
//!
//! A thin shell around [`eggs_shard_core`]: [`handler`] takes a request to the consensus thread and
//! brings the answer back, [`service`] is its life in a cluster, on top of what all stores of replicas share
//! ([`eggs_replica`]). The daemon `eggs-shard` and the embedded cluster both run [`Service`].

mod config;
mod handler;
mod service;

pub use config::Config;
pub use eggs_replica::StartError;
pub use service::Service;
