//! What tests with real programs need: the binaries, processes that never outlive a test, clusters,
//! trees of odd files, plain HTTP and HTTP/2.
//!
//! Tests are in `tests/`, a file for each theme. They start the real binaries (built once for a run, or
//! those in `EGGS_BIN_DIR`) on free ports in scratch directories. Every wait has a deadline; chance comes
//! from a seed that is printed and can be set with `EGGS_TEST_SEED`.

mod binaries;
mod command;
mod daemons;
mod h2;
mod hosts;
mod http;
mod load;
mod net;
mod process;
mod seed;
mod slow_disk;
mod stored;
mod tree;
mod up;
mod vandal;

pub use binaries::{binary, checkout};
pub use command::{Ctl, Outcome, TOO_LONG, program, run, until};
pub use daemons::{Daemons, SHUCKLE_RESTART};
pub use h2::{Connection, Frame, answer_bytes, grpc_message};
pub use hosts::{Hosts, HostsConfig, PARTS};
pub use http::{Page, get, json, problems, send_raw};
pub use load::{Load, LoadOptions, LoadReport, Phase};
pub use net::{Cut, Network};
pub use process::{Process, forget_peak, peak_bytes};
pub use seed::{bytes, rng, seed};
pub use slow_disk::SlowDisk;
pub use stored::{StoredBlock, stored_blocks};
pub use tree::{Tree, assert_same_tree, listing, odd_names};
pub use up::Up;
pub use vandal::Vandal;

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;

/// A scratch directory, removed when dropped.
///
/// # Panics
/// When there is no room for one.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("eggs-tests-").tempdir().expect("no scratch directory")
}

/// All files below a folder.
///
/// # Panics
/// When it cannot be read.
pub fn files_below(folder: &std::path::Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![folder.to_owned()];
    while let Some(folder) = waiting.pop() {
        for entry in
            std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        {
            let path = entry.expect("entry").path();
            if path.is_dir() && !path.is_symlink() { waiting.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

/// A runtime for tests that use the client library.
///
/// # Panics
/// When the system has no threads left.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime")
}

/// The first of so many free ports in a row, where the system takes none for connections: whoever is killed and
/// started again finds his port free.
///
/// # Panics
/// When there are none.
pub fn free_ports(ip: IpAddr, count: usize) -> SocketAddr {
    until("free ports in a row", TOO_LONG, || {
        let first = 10_000 + u16::try_from(RandomState::new().build_hasher().finish() % 22_000).ok()?;
        let free = |n: usize| TcpListener::bind((ip, first.checked_add(u16::try_from(n).ok()?)?)).ok();
        let all: Option<Vec<_>> = (0..count).map(free).collect();
        all.map(|_| SocketAddr::new(ip, first))
    })
}
