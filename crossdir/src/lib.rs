//! The crossdir service: the one logical coordinator of operations that touch more than one directory.
//!
//! A thin shell around [`eggs_crossdir_core`]: [`handler`] takes requests and logs their intents,
//! [`driving`] is the task that owns the driver, [`shards`] carries its steps to the shards, and
//! [`service`] is its life in a cluster. The daemon `eggs-crossdir` and the embedded cluster both run
//! [`Service`].

mod config;
mod driving;
mod handler;
mod service;
mod shards;

pub use config::Config;
pub use service::{Service, StartError};
