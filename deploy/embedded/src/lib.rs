//! A whole cluster in one process: for `eggsctl up`, tests and benches.
//!
//! The same services as the separate daemons, with the same state machines, wire protocol (over
//! loopback) and formats on disk; only the process, and on each host the port, is shared.
//!
//! With replicas there are as many *hosts*: each has a port of its own (the first one's plus 0, 1, 2, …) and
//! runs all services, with data of its own. What is between them is what is between machines.
//!
//! ```text
//! DIR/FORMAT LOCK     what it is, and who has it open
//! DIR/cluster.toml    how many hosts and disks it has; written once all of it exists
//! DIR/secret          the cluster secret
//!
//! one host:                             several:
//! DIR/shuckle/ shard/ crossdir/         DIR/host-1/shuckle/ shard/ crossdir/     DIR/host-2/ …
//! DIR/disks/00 01 …                     DIR/host-1/disks/00 03 …                 disk n is on host n modulo hosts
//! ```
//!
//! A disk is a failure domain where there is one host; else the host is.

mod cluster;
mod error;
mod host;
mod layout;
mod manifest;

pub use cluster::{Cluster, Config};
pub use eggs_janitor::Settings as JanitorSettings;
pub use error::StartError;
