//! What every daemon's shell shares: configuration, logs, the data directory, the port, shutdown.
//!
//! Nothing here knows what a service does. A daemon's `main` is thin: [`run`] parses the settings
//! and sets up logs, signals and the runtime; the daemon opens its service, binds, serves until told
//! to stop, and stops the service.
//!
//! Invariants of this crate:
//! - **DA-1** a directory that is not ours (another kind, cluster or newer format, or somebody's
//!   files) is refused before anything in it is changed ([`directory`]).
//! - **DA-2** two processes never have one data directory open ([`directory`]).
//! - **DA-3** whatever bytes come in on the port, only the connection they came on can suffer
//!   ([`server`]): sizes, counts and waits of every connection are bounded.
//! - **DA-4** a daemon that panics ends: the panic is logged and the process aborts ([`logging`]).
//! - **DA-5** the cluster secret never appears in logs, errors or debug output ([`secret`]).
//! - **DA-6** the id of a store is used with all of what that store wrote, or never again: a store that was
//!   emptied or put aside comes back under another id ([`directory`]).

pub mod args;
pub mod channel;
pub mod clock;
pub mod config;
pub mod directory;
pub mod logging;

pub mod metrics;
pub mod registry;
mod run;
pub mod secret;
pub mod server;
pub mod signal;
pub mod space;
pub mod systemd;

pub use directory::DataDirectory;
pub use run::run;
pub use secret::Secret;
pub use tokio_util::sync::CancellationToken;

/// Of every program of ours: sled's pages and messages come and go in many sizes, for which glibc's is slow (ADR 0010).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Version of this build, as daemons and tools print it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
