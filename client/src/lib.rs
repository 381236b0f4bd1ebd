//! The client library: a cluster as files and directories.
//!
//! ```no_run
//! # async fn example() -> eggs_client::Result<()> {
//! use eggs_client::{Client, CreateOptions, Options};
//! let client = Client::connect(Options::new("127.0.0.1:5000")).await?;
//! client.mkdir_all("/data").await?;
//! client.put_bytes("/data/hello", "hello".into(), &CreateOptions::default()).await?;
//! let contents = client.open("/data/hello").await?.read_all(1 << 20).await?;
//! # Ok(()) }
//! ```
//!
//! Paths are absolute, any bytes (`impl AsRef<[u8]>`: `&str`, `String`, `&[u8]`, `Vec<u8>`, `Bytes`). A symbolic
//! link in the middle of a path is followed, at its end only by [`Client::open`].
//!
//! There is no cache of names: every path call asks (one request per host on the way). Who works much
//! in one directory takes a [`Directory`] — like a directory descriptor it stays that directory whatever
//! happens to its name — and pays no look-up.
//!
//! Dropping any future or writer half-way is safe: what was not acknowledged may or may not have
//! happened, a file not finished has no name.

mod admin;
mod ahead;
mod ask;
mod blocks;
mod blocks_many;
mod call;
mod connection;
mod dead;
mod directory;
mod eden;
mod error;
mod explain;
mod find_many;
mod fsck;
mod hops;
mod listing;
mod map;
mod members;
mod moves;
mod names;
mod path;
mod put_many;
mod read_many;
mod reader;
mod reading;
mod repair;
mod stream;
mod types;
mod upkeep;
mod verify;
mod walk;
mod writer;

use std::sync::Arc;

use eggs_client_core::layout::Rules;
use eggs_proto::{ClusterId, InodeId, Time};

use connection::Shared;

pub use dead::LastDeaths;
pub use error::{ClientError, Refusal, Result};
pub use explain::Explanation;
pub use hops::Hop;
pub use listing::Listing;
pub use put_many::SMALL_FILE_BYTES_MAX;
pub use read_many::{ManyReader, ReadFile};
pub use reader::FileReader;
pub use reading::{FetchEnd, FetchTold};
pub use repair::BlockVerdict;
pub use stream::FileStream;
pub use types::*;
pub use upkeep::{Placement, Rewrite};
pub use verify::{Finding, Verified};
pub use writer::FileWriter;

/// A connection to a cluster; clones share it.
///
/// What it can do is spread over the files by subject: names and attributes, listings, contents in and
/// out, the cluster as a whole.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

/// A directory that was found once: no look-up per call.
#[derive(Debug, Clone)]
pub struct Directory {
    client: Client,
    inode: InodeId,
    policies: Arc<Policies>,
    rules: Arc<Rules>,
    /// Its path when it was found, for people.
    text: Arc<str>,
}

impl Client {
    /// Asks shuckle (whichever of the addresses answers) for the cluster; tries until `options.timeout`.
    pub async fn connect(options: Options) -> Result<Client> {
        Ok(Client { shared: call::join(options).await? })
    }

    pub fn cluster_id(&self) -> ClusterId {
        self.shared.cluster
    }

    /// The client's hybrid clock: after everything it has seen.
    pub fn now(&self) -> Time {
        self.shared.now()
    }

    pub fn options(&self) -> &Options {
        &self.shared.options
    }

    /// Waits for what goes on behind dropped writers (abandoning their files) and damaged blocks (reports).
    pub async fn close(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.tasks.reopen();
    }
}
