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

mod error;
mod types;

pub use error::{ClientError, Refusal, Result};
pub use types::*;

use std::fs::File;
use std::path::Path;

use bytes::Bytes;
use eggs_proto::{ClusterId, InodeId, Time, pb};
use tokio::io::{AsyncRead, AsyncWrite};

fn unfinished<T>() -> Result<T> {
    Err(ClientError::Invalid("unfinished".to_owned()))
}

/// A connection to a cluster; clones share it.
#[derive(Debug, Clone)]
pub struct Client {}

/// A directory that was found once: no look-up per call.
#[derive(Debug, Clone)]
pub struct Directory {}

/// A page-wise listing; entries come in the order of the names' bytes.
#[derive(Debug)]
pub struct Listing {}

/// Writes a file from front to back. Its name appears at [`FileWriter::finish`]; dropped before, nothing does.
#[derive(Debug)]
pub struct FileWriter {}

/// An open file. Files never change, so what it reads is one version whatever happens to the name.
#[derive(Debug, Clone)]
pub struct FileReader {}

/// A file read in order, ahead of its consumer.
#[derive(Debug)]
pub struct FileStream {}

/// Cluster.
impl Client {
    /// Asks shuckle for the cluster; tries until `options.timeout`.
    pub async fn connect(options: Options) -> Result<Client> {
        let _ = options;
        unfinished()
    }

    pub fn cluster_id(&self) -> ClusterId {
        ClusterId([1; 16])
    }

    /// The client's hybrid clock: after everything it has seen.
    pub fn now(&self) -> Time {
        Time::ZERO
    }

    pub fn options(&self) -> Options {
        Options::default()
    }

    /// Who serves what, and how the disks feel, fresh from shuckle.
    pub async fn cluster_map(&self) -> Result<pb::ClusterMapReply> {
        unfinished()
    }

    /// Every shard asked itself, in order of shards; those that do not answer carry the error.
    pub async fn shard_states(&self) -> Result<Vec<ShardState>> {
        unfinished()
    }

    /// Block services asked themselves, by address.
    pub async fn block_stats(&self) -> Result<Vec<(String, Result<Vec<pb::BlockServiceStats>>)>> {
        unfinished()
    }

    /// Transactions the coordinator has in flight.
    pub async fn transactions(&self) -> Result<Vec<pb::TransactionInfo>> {
        unfinished()
    }

    /// Sets and clears flags (`eggs_proto::flags`) of block services.
    pub async fn set_flags(&self, services: &[u64], set: u32, clear: u32) -> Result<()> {
        let _ = (services, set, clear);
        unfinished()
    }

    /// Files being written, of one shard.
    pub async fn eden_files(&self, shard: u8) -> Result<Vec<pb::EdenFile>> {
        let _ = shard;
        unfinished()
    }

    /// Checks every shard's invariants, then walks the tree: each directory's parent against the edge
    /// that leads to it, and directories no edge leads to.
    pub async fn fsck(&self, progress: impl FnMut(FsckProgress) + Send) -> Result<FsckReport> {
        let _ = progress;
        unfinished()
    }

    /// Waits for what goes on behind dropped writers (abandoning their files, reports of bad blocks).
    pub async fn close(&self) {}
}

/// Names.
impl Client {
    /// The inode a path leads to, now.
    pub async fn resolve(&self, path: impl AsRef<[u8]>) -> Result<InodeId> {
        let _ = path.as_ref();
        unfinished()
    }

    /// Everything about what a path leads to; `at` unset is now.
    pub async fn resolve_at(&self, path: impl AsRef<[u8]>, at: Time) -> Result<Resolved> {
        let _ = (path.as_ref(), at);
        unfinished()
    }

    /// Attributes (as lstat: of a link itself).
    pub async fn stat(&self, path: impl AsRef<[u8]>) -> Result<Metadata> {
        let _ = path.as_ref();
        unfinished()
    }

    pub async fn stat_inode(&self, inode: InodeId) -> Result<Metadata> {
        let _ = inode;
        unfinished()
    }

    /// The directory at a path.
    pub async fn directory(&self, path: impl AsRef<[u8]>) -> Result<Directory> {
        let _ = path.as_ref();
        unfinished()
    }

    /// The directory of an inode; its policies are gathered from its parents.
    pub async fn directory_inode(&self, inode: InodeId) -> Result<Directory> {
        let _ = inode;
        unfinished()
    }

    pub async fn list(&self, path: impl AsRef<[u8]>, options: ListOptions) -> Result<Listing> {
        let _ = (path.as_ref(), options);
        unfinished()
    }

    /// No request is made until the first page is asked for.
    pub fn list_inode(&self, directory: InodeId, options: ListOptions) -> Listing {
        let _ = (directory, options);
        Listing {}
    }

    /// Makes a directory.
    pub async fn mkdir(&self, path: impl AsRef<[u8]>, attributes: Option<NewAttributes>) -> Result<InodeId> {
        let _ = (path.as_ref(), attributes);
        unfinished()
    }

    /// Makes a directory and those on the way; one that exists is fine.
    pub async fn mkdir_all(&self, path: impl AsRef<[u8]>) -> Result<InodeId> {
        let _ = path.as_ref();
        unfinished()
    }

    /// Removes an empty directory; returns when it died.
    pub async fn rmdir(&self, path: impl AsRef<[u8]>) -> Result<Time> {
        let _ = path.as_ref();
        unfinished()
    }

    /// Moves a file, link or directory to exactly `to`; returns what it replaced.
    pub async fn rename(
        &self,
        from: impl AsRef<[u8]>,
        to: impl AsRef<[u8]>,
        replace: Replace,
    ) -> Result<Option<InodeId>> {
        let _ = (from.as_ref(), to.as_ref(), replace);
        unfinished()
    }

    /// Removes a file or link; its entry moves to the dead map.
    pub async fn unlink(&self, path: impl AsRef<[u8]>) -> Result<()> {
        let _ = path.as_ref();
        unfinished()
    }

    /// Makes a symbolic link at `path` that says `target`.
    pub async fn symlink(
        &self,
        path: impl AsRef<[u8]>,
        target: impl AsRef<[u8]>,
        options: &CreateOptions,
    ) -> Result<InodeId> {
        let _ = (path.as_ref(), target.as_ref(), options);
        unfinished()
    }

    pub async fn read_link(&self, path: impl AsRef<[u8]>) -> Result<Bytes> {
        let _ = path.as_ref();
        unfinished()
    }

    pub async fn read_link_inode(&self, link: InodeId) -> Result<Bytes> {
        let _ = link;
        unfinished()
    }

    pub async fn set_attributes(&self, path: impl AsRef<[u8]>, changes: AttributeChanges) -> Result<()> {
        let _ = (path.as_ref(), changes);
        unfinished()
    }

    pub async fn policies(&self, path: impl AsRef<[u8]>) -> Result<DirectoryPolicies> {
        let _ = path.as_ref();
        unfinished()
    }

    /// Sets the policy of `kind` (that field of `value`); `None` unsets it: inherited again.
    pub async fn set_policy(
        &self,
        path: impl AsRef<[u8]>,
        kind: PolicyKind,
        value: Option<Policies>,
    ) -> Result<()> {
        let _ = (path.as_ref(), kind, value);
        unfinished()
    }
}

/// Contents.
impl Client {
    /// Writes a whole file from memory.
    pub async fn put_bytes(
        &self,
        path: impl AsRef<[u8]>,
        contents: Bytes,
        options: &CreateOptions,
    ) -> Result<Published> {
        let _ = (path.as_ref(), contents, options);
        unfinished()
    }

    /// Begins a file; nothing has the name until [`FileWriter::finish`].
    pub async fn create(&self, path: impl AsRef<[u8]>, options: &CreateOptions) -> Result<FileWriter> {
        let _ = (path.as_ref(), options);
        unfinished()
    }

    /// Writes a whole file from a reader; `progress` hears the bytes taken in so far.
    pub async fn put(
        &self,
        path: impl AsRef<[u8]>,
        input: &mut (dyn AsyncRead + Unpin + Send),
        options: &CreateOptions,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Published> {
        let _ = (path.as_ref(), input, options, progress);
        unfinished()
    }

    /// Writes a whole file from a file of this host (the fastest way: it is read where it is encoded).
    pub async fn put_file(
        &self,
        path: impl AsRef<[u8]>,
        local: &Path,
        options: &CreateOptions,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Published> {
        let _ = (path.as_ref(), local, options, progress);
        unfinished()
    }

    /// Opens a file for reading; follows links.
    pub async fn open(&self, path: impl AsRef<[u8]>) -> Result<FileReader> {
        let _ = path.as_ref();
        unfinished()
    }

    /// Opens what was at the path at an instant.
    pub async fn open_at(&self, path: impl AsRef<[u8]>, at: Time) -> Result<FileReader> {
        let _ = (path.as_ref(), at);
        unfinished()
    }

    pub async fn open_inode(&self, file: InodeId) -> Result<FileReader> {
        let _ = file;
        unfinished()
    }

    /// How a file is stored: all its spans.
    pub async fn spans(&self, file: InodeId) -> Result<Vec<Span>> {
        let _ = file;
        unfinished()
    }

    /// Copies a file's contents; the copy has the attributes `options` say.
    pub async fn copy(
        &self,
        from: impl AsRef<[u8]>,
        to: impl AsRef<[u8]>,
        options: &CreateOptions,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Published> {
        let _ = (from.as_ref(), to.as_ref(), options, progress);
        unfinished()
    }

    /// `hello, world` and ten zero bytes, as three spans stored three ways: inline, blocks, empty.
    pub async fn create_test_file(&self, path: impl AsRef<[u8]>) -> Result<Published> {
        let _ = path.as_ref();
        unfinished()
    }
}

impl Directory {
    pub fn inode(&self) -> InodeId {
        InodeId::NULL
    }

    /// The policies in force here when it was found.
    pub fn policies(&self) -> Policies {
        Policies::default()
    }

    pub fn list(&self, options: ListOptions) -> Listing {
        let _ = options;
        Listing {}
    }

    /// Resolves one name.
    pub async fn lookup(&self, name: impl AsRef<[u8]>) -> Result<Resolved> {
        let _ = name.as_ref();
        unfinished()
    }

    /// The directory of that name in this one.
    pub async fn directory(&self, name: impl AsRef<[u8]>) -> Result<Directory> {
        let _ = name.as_ref();
        unfinished()
    }

    /// Makes a directory in this one.
    pub async fn mkdir(
        &self,
        name: impl AsRef<[u8]>,
        attributes: Option<NewAttributes>,
    ) -> Result<Directory> {
        let _ = (name.as_ref(), attributes);
        unfinished()
    }

    pub async fn rmdir(&self, name: impl AsRef<[u8]>) -> Result<Time> {
        let _ = name.as_ref();
        unfinished()
    }

    /// One whole file from memory: one request when it is small.
    pub async fn put_bytes(
        &self,
        name: impl AsRef<[u8]>,
        contents: Bytes,
        options: &CreateOptions,
    ) -> Result<Published> {
        let _ = (name.as_ref(), contents, options);
        unfinished()
    }

    /// Many files from memory, many to a request; answers in the order of the files.
    pub async fn put_many(&self, files: Vec<SmallFile>) -> Vec<Result<Published>> {
        let _ = files;
        Vec::new()
    }

    /// As [`Client::put_file`].
    pub async fn put_file(
        &self,
        name: impl AsRef<[u8]>,
        local: &Path,
        options: &CreateOptions,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Published> {
        let _ = (name.as_ref(), local, options, progress);
        unfinished()
    }

    pub async fn create(&self, name: impl AsRef<[u8]>, options: &CreateOptions) -> Result<FileWriter> {
        let _ = (name.as_ref(), options);
        unfinished()
    }

    pub async fn symlink(
        &self,
        name: impl AsRef<[u8]>,
        target: impl AsRef<[u8]>,
        options: &CreateOptions,
    ) -> Result<InodeId> {
        let _ = (name.as_ref(), target.as_ref(), options);
        unfinished()
    }

    /// Renames within this directory.
    pub async fn rename(
        &self,
        from: impl AsRef<[u8]>,
        to: impl AsRef<[u8]>,
        replace: Replace,
    ) -> Result<Option<InodeId>> {
        let _ = (from.as_ref(), to.as_ref(), replace);
        unfinished()
    }

    pub async fn unlink(&self, name: impl AsRef<[u8]>) -> Result<()> {
        let _ = name.as_ref();
        unfinished()
    }

    /// Removes many files and links, many to a request; answers in the order of the names.
    pub async fn unlink_many(&self, names: Vec<Bytes>) -> Vec<Result<()>> {
        let _ = names;
        Vec::new()
    }

    pub async fn open(&self, name: impl AsRef<[u8]>) -> Result<FileReader> {
        let _ = name.as_ref();
        unfinished()
    }
}

impl Listing {
    /// The next page, empty pages skipped; `None` at the end.
    pub async fn next_page(&mut self) -> Result<Option<Vec<Entry>>> {
        unfinished()
    }

    /// The next entry.
    pub async fn next(&mut self) -> Result<Option<Entry>> {
        unfinished()
    }

    /// All that is left, in memory.
    pub async fn all(self) -> Result<Vec<Entry>> {
        unfinished()
    }
}

impl FileWriter {
    /// Takes in the next bytes; waits while too much is in flight.
    pub async fn write(&mut self, data: &[u8]) -> Result<()> {
        let _ = data;
        unfinished()
    }

    /// Bytes taken in.
    pub fn written(&self) -> u64 {
        0
    }

    /// Makes everything durable and gives the file its name.
    pub async fn finish(self) -> Result<Published> {
        unfinished()
    }

    /// Gives the file up (dropping does it too, in the background).
    pub async fn abandon(self) {}
}

impl FileReader {
    pub fn metadata(&self) -> Metadata {
        Metadata::unknown()
    }

    pub fn inode(&self) -> InodeId {
        InodeId::NULL
    }

    pub fn size(&self) -> u64 {
        0
    }

    /// Up to `length` bytes at `offset`; fewer only at the end of the file.
    pub async fn read_at(&self, offset: u64, length: usize) -> Result<Bytes> {
        let _ = (offset, length);
        unfinished()
    }

    /// The whole file; `Invalid` when it is longer than `limit`.
    pub async fn read_all(&self, limit: u64) -> Result<Bytes> {
        let _ = limit;
        unfinished()
    }

    /// In order from `offset`; from 0 the CRC of the whole file is checked at the end.
    pub fn stream(&self, offset: u64) -> FileStream {
        let _ = offset;
        FileStream {}
    }

    /// Everything, in order; `progress` hears the bytes written so far.
    pub async fn copy_to(
        &self,
        output: &mut (dyn AsyncWrite + Unpin + Send),
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<u64> {
        let _ = (output, progress);
        unfinished()
    }

    /// Everything, to a file of this host opened for writing (the fastest way).
    pub async fn copy_to_file(&self, output: File, progress: &mut (dyn FnMut(u64) + Send)) -> Result<u64> {
        let _ = (output, progress);
        unfinished()
    }
}

impl FileStream {
    /// The next bytes; `None` at the end of the file.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        unfinished()
    }
}
