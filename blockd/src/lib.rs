//! The block service daemon: every disk of a host behind one port.
//!
//! Reading order: `eggs_blockd_core` (layouts, decisions and the invariants BL-1 …), [`store`] (one
//! disk's files), [`disk`] (a disk with its limits and its state: there or lost), [`service`] (the
//! requests, as plain functions over the messages), [`rpc`] (gRPC around them), [`registration`].

pub mod store;
