//! The block service daemon: every disk of a host behind one port.
//!
//! Reading order: `eggs_blockd_core` (layouts, decisions and the invariants BL-1 …), [`store`] (one
//! disk's segments), [`disk`] (a disk with its limits and its state: there or lost), [`service`] (the
//! requests, as plain functions over the messages), `transfer` (a block between network and disk), `batch` (several blocks in one request),
//! `rpc` (gRPC around them), [`inspect`] (a disk without its daemon), `registration` (what shuckle is told), [`args`] and `main.rs`.

pub mod args;
mod batch;
pub mod disk;
pub mod inspect;
pub mod limits;
mod registration;
mod rpc;
pub mod service;
pub mod store;
mod telemetry;
mod transfer;

pub use disk::DiskConfig;
pub use service::{Config, Service, known_cluster, refuse_other_cluster, would_format};
pub use store::OpenError;
