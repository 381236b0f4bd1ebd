//! The crossdir service: the one logical coordinator of operations that touch more than one directory.
//!
//! A thin shell around [`eggs_crossdir_core`]: [`handler`] takes requests and logs their intents,
//! [`driving`] is the task that owns the driver while this store leads, [`shards`] carries its steps to the
//! shards, and [`service`] is its life in a cluster, on top of what all stores of replicas share
//! ([`eggs_replica`]). The daemon `eggs-crossdir` and the embedded cluster both run [`Service`].

mod config;
mod driving;
mod handler;
mod service;
mod shards;

pub use config::Config;
pub use eggs_replica::StartError;
pub use service::Service;
