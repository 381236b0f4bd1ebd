//! The shard service: many of the 256 metadata shards in one process.
//!
//! A thin shell around [`eggs_shard_core`]: [`handler`] takes a request to the consensus thread and
//! brings the answer back, [`service`] is its life in a cluster. The daemon `eggs-shard` and the
//! embedded cluster both run [`Service`].

mod config;
mod handler;
mod service;
mod shards;

pub use config::Config;
pub use service::{Service, StartError};
pub use shards::{ShardList, ShardListError};
