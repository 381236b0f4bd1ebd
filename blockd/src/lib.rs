//! The block service daemon: every disk of a host behind one port.
//!
//! Reading order: `eggs_blockd_core` (layouts, decisions and the invariants BL-1 …), [`store`] (one
//! disk's files), [`disk`] (a disk with its limits and its state: there or lost), [`service`] (the
//! requests, as plain functions over the messages), `transfer` (a block between network and disk),
//! `rpc` (gRPC around them), `registration` (what shuckle is told), [`args`] and `main.rs`.

pub mod args;
pub mod disk;
pub mod limits;
mod registration;
mod rpc;
pub mod service;
pub mod store;
mod telemetry;
mod transfer;

pub use disk::DiskConfig;
pub use service::{Config, Service, known_cluster, would_format};
pub use store::OpenError;
