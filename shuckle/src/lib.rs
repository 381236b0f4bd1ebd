//! The registry daemon: who replicates and leads what, which disks exist and how they feel; and the
//! dashboard that shows it.
//!
//! What is decided is decided in `eggs-shuckle-core`. Here: [`service`] opens, runs and stops it, `joining`
//! finds out whether it founds a cluster or joins one, [`registry`] answers requests, [`state`] makes JSON
//! and gauges of the cluster map, [`web`] serves the page and the API.
//!
//! Invariants:
//! - **SU-1** The cluster's id is chosen once, and the data directory has it before the log does; a
//!   directory whose log has another id is refused.
//! - **SU-2** Text from daemons reaches the dashboard as text only: the page never makes markup of it,
//!   and its content security policy allows no script but its own.
//! - **SU-3** Nothing the port answers without the secret has a key or the secret in it.
//! - **SU-4** Of several shuckles one founds the cluster: the first of the list, and only when all the others
//!   have said that they have none. One that does not answer may have it.
//! - **SU-5** A map is answered by a leader that its replicas have confirmed since it was asked for, with what
//!   was heard since it began to lead; but that a map is unchanged, its leader says alone.

mod joining;
pub mod registry;
pub mod service;
pub mod state;
mod web;

pub use registry::Registry;
pub use service::{Config, OpenError, SecretSource, Service};
