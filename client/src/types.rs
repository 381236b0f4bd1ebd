//! What goes in and what comes out, typed.

use std::time::Duration;

use bytes::Bytes;
use eggs_proto::{InodeId, InodeType, Time, pb};

pub use pb::{NewAttributes, Policies, PolicyKind, Span};

/// How to find a cluster and how patient to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// Addresses of shuckle, `host:port`: one that answers is enough, it tells of the others.
    pub shuckle: Vec<String>,
    /// How long one operation is tried before it is given up as unreachable.
    pub timeout: Duration,
    /// A replica of metadata that is silent for this long does not keep the others from being asked.
    pub another_after: Duration,
    /// The cluster secret: only for calls that change the cluster itself.
    pub secret: Option<ClusterSecret>,
    /// How long one block service may take to answer before it counts as failed.
    pub block_timeout: Duration,
    /// Whether a read that is late, going by what its block service and the others usually take, is also asked of
    /// other blocks, and services that were late are not asked first for a while. Without it only failures are
    /// read around.
    pub hedge: bool,
    /// A read not answered in this time is late whatever is usual.
    pub hedge_after_max: Duration,
    /// Bytes a sequential read fetches ahead.
    pub read_ahead: u64,
}

pub const DEFAULT_SHUCKLE: &str = "127.0.0.1:5000";
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

impl Default for Options {
    fn default() -> Options {
        Options {
            shuckle: vec![DEFAULT_SHUCKLE.to_owned()],
            timeout: DEFAULT_TIMEOUT,
            another_after: Duration::from_millis(500),
            secret: None,
            block_timeout: Duration::from_secs(10),
            hedge: true,
            hedge_after_max: Duration::from_millis(1000),
            read_ahead: 32 << 20,
        }
    }
}

impl Options {
    /// The defaults, with one address of shuckle.
    pub fn new(shuckle: impl Into<String>) -> Options {
        Options { shuckle: vec![shuckle.into()], ..Options::default() }
    }
}

/// What only those have who run the cluster. Not in logs, errors or debug output.
#[derive(Clone, PartialEq, Eq)]
pub struct ClusterSecret(Bytes);

impl ClusterSecret {
    pub fn new(secret: impl Into<Bytes>) -> ClusterSecret {
        ClusterSecret(secret.into())
    }

    pub(crate) fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }
}

impl std::fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterSecret")
    }
}

/// Attributes of an inode.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    pub inode: InodeId,
    pub kind: InodeType,
    /// Bytes of a file; of a symlink, of its target; 0 for a directory.
    pub size: u64,
    pub created_at: Time,
    pub mtime: Time,
    pub atime: Time,
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// CRC-32 (ISO-HDLC) of the whole contents of a file.
    pub crc: Option<u32>,
    /// Directories: the directory that owns it; null when it has been removed; itself for the root.
    pub parent: Option<InodeId>,
    pub xattrs: Vec<(Bytes, Bytes)>,
    /// Directories: the policies set on it, not the inherited ones ([`crate::Client::policies`]).
    pub policies: Option<Policies>,
}

impl Metadata {
    /// Of an inode as asked for; an answer about another one is none.
    pub(crate) fn from_wire(inode: InodeId, wire: pb::Attributes) -> Result<Metadata, crate::ClientError> {
        let kind = inode.kind().filter(|_| InodeId(wire.inode) == inode);
        let kind = kind.ok_or_else(|| crate::ClientError::other_reply("attributes"))?;
        let directory = kind == InodeType::Directory;
        Ok(Metadata {
            inode,
            kind,
            size: wire.size,
            created_at: Time(wire.created_at),
            mtime: Time(wire.mtime),
            atime: Time(wire.atime),
            mode: wire.mode,
            uid: wire.uid,
            gid: wire.gid,
            crc: wire.crc,
            parent: wire.parent.filter(|_| directory).map(InodeId),
            xattrs: wire.xattrs.into_iter().map(|xattr| (xattr.name, xattr.value)).collect(),
            policies: if directory { Some(wire.policies.unwrap_or_default()) } else { None },
        })
    }

    pub fn is_directory(&self) -> bool {
        self.kind == InodeType::Directory
    }

    pub fn is_file(&self) -> bool {
        self.kind == InodeType::File
    }

    pub fn is_symlink(&self) -> bool {
        self.kind == InodeType::Symlink
    }
}

/// What to list, and how.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    /// Living map: as of this instant; unset is now.
    pub at: Time,
    /// The dead map instead of the living one.
    pub dead: bool,
    /// Dead map: only what died in [since, until); unset is unbounded.
    pub since: Time,
    pub until: Time,
    /// Only names that start with this.
    pub prefix: Bytes,
    /// Only names after this one.
    pub after: Bytes,
    /// Fill in [`Entry::metadata`] (directories cost a request each, made in parallel).
    pub attributes: bool,
    /// Entries in a page; 0 is the default.
    pub page: u32,
}

/// One death of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    pub directory: InodeId,
    pub name: Bytes,
    pub target: InodeId,
    pub created_at: Time,
    pub died_at: Time,
    /// What died is dead still. False: it was moved away, or undeleted since.
    pub owned: bool,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub name: Bytes,
    pub target: InodeId,
    pub created_at: Time,
    /// Dead map only.
    pub died_at: Option<Time>,
    /// Dead map only: false when the inode lives on elsewhere.
    pub owned: bool,
    /// When asked for; none when the inode is gone.
    pub metadata: Option<Metadata>,
}

impl Entry {
    /// The name for people: what is not UTF-8 is replaced.
    pub fn name_lossy(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.name)
    }

    pub fn kind(&self) -> InodeType {
        self.target.kind().unwrap_or(InodeType::File)
    }
}

/// What a new name does to one that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Replace {
    /// "file exists".
    #[default]
    Refuse,
    /// A file or symlink moves to the dead map; a directory is refused.
    File,
}

impl Replace {
    pub(crate) fn to_wire(self) -> i32 {
        match self {
            Replace::Refuse => pb::Replace::Refuse as i32,
            Replace::File => pb::Replace::File as i32,
        }
    }
}

/// How to make a file.
#[derive(Debug, Clone, Default)]
pub struct CreateOptions {
    /// Unset: mode 0644 (directories 0755, symlinks 0777), uid and gid 0, mtime of publishing.
    pub attributes: Option<NewAttributes>,
    pub replace: Replace,
    /// Expected size in bytes, when known: saves memory, decides nothing.
    pub size_hint: Option<u64>,
}

/// A file of a batch ([`crate::Directory::put_many`]).
#[derive(Debug, Clone, Default)]
pub struct SmallFile {
    pub name: Bytes,
    pub contents: Bytes,
    pub attributes: Option<NewAttributes>,
    pub replace: Replace,
}

/// A file that has its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    pub inode: InodeId,
    pub size: u64,
    pub crc: u32,
    pub created_at: Time,
    /// What had the name before.
    pub replaced: Option<InodeId>,
}

/// What to change; `None` stays as it is.
#[derive(Debug, Clone, Default)]
pub struct AttributeChanges {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mtime: Option<Time>,
    pub atime: Option<Time>,
    pub set_xattrs: Vec<(Bytes, Bytes)>,
    pub remove_xattrs: Vec<Bytes>,
}

/// The policies of a directory.
#[derive(Debug, Clone, PartialEq)]
pub struct DirectoryPolicies {
    /// Set on it.
    pub own: Policies,
    /// What holds there: own, inherited, defaults; every field is present.
    pub effective: Policies,
}

/// Where a path leads.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    pub inode: InodeId,
    /// The directory it was found in; null for the root.
    pub directory: InodeId,
    pub created_at: Time,
    pub metadata: Metadata,
    /// What holds in the directory (its own, when it is one).
    pub policies: Policies,
}

/// What [`crate::Client::fsck`] found.
#[derive(Debug, Clone, Default)]
pub struct FsckReport {
    pub findings: Vec<FsckFinding>,
    pub shards_checked: u32,
    pub rows: u64,
    pub directories: u64,
    pub files: u64,
    /// Directories reached by walking the tree from the root.
    pub directories_reached: u64,
    /// Living entries seen in that walk.
    pub entries: u64,
    /// Directories with an owner that no edge leads to, or that are below themselves; of a lost tree its top.
    pub orphans: u64,
}

#[derive(Debug, Clone)]
pub struct FsckFinding {
    /// The invariant that does not hold ("SH-3"), or what is wrong with the tree ("orphan", "loop", "two names",
    /// "wrong owner", "not listed", "stuck lock").
    pub invariant: String,
    /// Where: "shard 7", "/a/b".
    pub place: String,
    pub message: String,
}

/// How far [`crate::Client::fsck`] is.
#[derive(Debug, Clone, Copy)]
pub struct FsckProgress {
    pub shards_checked: u32,
    pub rows: u64,
    pub directories_reached: u64,
    pub findings: usize,
}

/// One shard, asked itself.
#[derive(Debug, Clone)]
pub struct ShardState {
    pub shard: u32,
    pub status: Result<pb::ShardStatusReply, crate::ClientError>,
}
