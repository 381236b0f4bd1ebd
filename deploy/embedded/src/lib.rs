//! A whole cluster in one process: for `eggsctl up`, tests and benches.
//!
//! The same services as the separate daemons, with the same state machines, wire protocol (over
//! loopback) and formats on disk; only the port is shared.
//!
//! ```text
//! DIR/FORMAT LOCK     what it is, and who has it open
//! DIR/cluster.toml    how many disks it has; written once all of it exists
//! DIR/secret          the cluster secret
//! DIR/shuckle/ shard/ crossdir/
//! DIR/disks/00 01 …   one block service and one failure domain each
//! ```

mod cluster;
mod manifest;

pub use cluster::{Cluster, Config, StartError};
