//! What the bytes mean: ids, time, limits, errors and messages.
//!
//! Pure: no clock, no sockets, no storage. With the `rpc` feature the gRPC stubs of the services are
//! added to [`pb`]; the cores never turn it on.

pub mod errors;
pub mod flags;
pub mod ids;
pub mod limits;
pub mod mac;
pub mod names;
pub mod policy;
pub mod time;

/// The messages of `proto/eggs/v1/*.proto`.
#[allow(missing_debug_implementations, clippy::all, clippy::pedantic, rust_2018_idioms)]
pub mod pb {
    include!(concat!(env!("OUT_DIR"), "/eggs.v1.rs"));
}

pub use errors::{BlockError, CrossdirError, RegistryError, Retry, ServiceError, ShardError};
pub use ids::{
    BlockId, BlockServiceId, ClusterId, Cookie, GroupId, InodeId, InodeType, SessionId, ShardId, StoreId,
    TransactionId,
};
pub use time::Time;
