//! The registry daemon: who serves which shard, which disks exist and how they feel; and the
//! dashboard that shows it.
//!
//! What is decided is decided in `eggs-shuckle-core`. Here: [`service`] opens and stops it,
//! [`registry`] answers requests, [`state`] makes JSON and gauges of the cluster map, [`web`] serves
//! the page and the API.
//!
//! Invariants:
//! - **SU-1** The cluster's id is chosen once, and the data directory has it before the log does; a
//!   directory whose log has another id is refused.
//! - **SU-2** Text from daemons reaches the dashboard as text only: the page never makes markup of it,
//!   and its content security policy allows no script but its own.
//! - **SU-3** Nothing the port answers without the secret has a key or the secret in it.

pub mod registry;
pub mod service;
pub mod state;
mod web;

pub use registry::Registry;
pub use service::{Config, OpenError, SecretSource, Service};
