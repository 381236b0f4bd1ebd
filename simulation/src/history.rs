//! What the clients asked for and were told, in the terms of the checkers.
//!
//! Every operation becomes claims about edges (a name in a directory): it was born, it died, it was
//! seen so, at an exact instant when the reply told one, else between two. An operation whose outcome
//! its client never learned may have made its claims true, all of them or none.

use std::fmt;

use bytes::Bytes;
use eggs_proto::{InodeId, Time};

/// A name in a directory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Edge {
    pub directory: InodeId,
    pub name: Bytes,
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.directory, self.name.escape_ascii())
    }
}

/// A version of an edge that is dead, as it was listed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Death {
    pub edge: Edge,
    pub target: InodeId,
    pub created_at: Time,
    pub died_at: Time,
    pub owned: bool,
}

impl fmt::Debug for Death {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Death { edge, target, created_at, died_at, owned } = self;
        let owned = if *owned { "" } else { " (not owned)" };
        write!(f, "{edge:?} -> {target} from {} to {}{owned}", created_at.0, died_at.0)
    }
}

/// What an edge was seen to lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expect {
    Absent,
    Present,
    Is(InodeId),
    /// Another inode, or nothing.
    IsNot(InodeId),
    Directory,
    File,
}

impl Expect {
    pub fn holds(self, target: Option<InodeId>) -> bool {
        match self {
            Expect::Absent => target.is_none(),
            Expect::Present => target.is_some(),
            Expect::Is(expected) => target == Some(expected),
            Expect::IsNot(other) => target != Some(other),
            Expect::Directory => target.is_some_and(InodeId::is_directory),
            Expect::File => target.is_some_and(|target| !target.is_directory()),
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) enum Claim {
    /// `target` unknown: the inode made by this operation.
    Born {
        edge: Edge,
        target: Option<InodeId>,
        at: Option<Time>,
    },
    /// `target` unknown: whatever had the name.
    Died {
        edge: Edge,
        target: Option<InodeId>,
        at: Option<Time>,
        owned: bool,
    },
    /// At the instant, or at some moment of the operation.
    Saw {
        edge: Edge,
        expect: Expect,
        at: Option<Time>,
    },
    /// It was listed.
    Version(Death),
    /// It is gone for good; with the operation that made what it owned.
    Purged {
        death: Death,
        maker: Option<u32>,
    },
    /// The inode was purged with the death that owned it.
    PurgedInode(InodeId),
    /// It was purged.
    NoDeath(Death),
    /// Its target lived, or died later.
    NotOwned(Death),
    /// Something had died in the directory.
    HadDead(InodeId),
    /// The mode became the operation's number.
    Set {
        inode: InodeId,
    },
    Mode {
        inode: InodeId,
        mode: u32,
    },
    /// The directory was not there.
    Gone(InodeId),
    /// The directory had an entry.
    NotEmpty(InodeId),
    /// One of them holds.
    AnyOf(Vec<Claim>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Its client was told that it happened.
    Acknowledged,
    /// Its client was told that it did not.
    Refused,
    /// Its client was not told.
    Unknown,
}

/// One operation of a client. Inodes it makes have its id as their user id.
#[derive(Debug, Clone)]
pub(crate) struct Operation {
    pub id: u32,
    pub client: usize,
    pub what: String,
    /// Virtual time.
    pub invoked: u64,
    pub returned: Option<u64>,
    /// The newest instant its client had seen when it asked.
    pub seen: Time,
    /// The newest instant its client had seen when it was told.
    pub heard: Time,
    pub outcome: Outcome,
    pub claims: Vec<Claim>,
    /// Size of the file it writes.
    pub size: u32,
    /// Directories it makes below the one whose birth it claims.
    pub below: usize,
    /// The directory it tries to remove.
    pub removes: Option<InodeId>,
}

/// All operations of a run, by id.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub operations: Vec<Operation>,
    /// What a client found wrong while it ran.
    pub failures: Vec<String>,
}

/// Ids begin here, so that no uid of genesis is one.
const FIRST: u32 = 1000;

impl History {
    pub fn begin(&mut self, client: usize, what: String, invoked: u64, seen: Time) -> u32 {
        let id = FIRST + self.operations.len() as u32;
        self.operations.push(Operation {
            id,
            client,
            what,
            invoked,
            returned: None,
            seen,
            heard: Time::MAX,
            outcome: Outcome::Unknown,
            claims: Vec::new(),
            size: 0,
            below: 0,
            removes: None,
        });
        id
    }

    pub fn get(&self, id: u32) -> Option<&Operation> {
        self.operations.get(id.checked_sub(FIRST)? as usize)
    }

    pub fn get_mut(&mut self, id: u32) -> Option<&mut Operation> {
        self.operations.get_mut(id.checked_sub(FIRST)? as usize)
    }

    pub fn fail(&mut self, what: String) {
        if self.failures.len() < 50 {
            self.failures.push(what);
        }
    }
}

/// The contents of the file that operation `id` of a run writes: known from its name alone. A third of the
/// files begin with zeros.
pub(crate) fn contents(seed: u64, id: u32, size: u32) -> Vec<u8> {
    let mut state = (seed ^ (u64::from(id) << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size as usize + 8);
    while bytes.len() < size as usize {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size as usize);
    if id.is_multiple_of(3) {
        let zeros = bytes.len().min(64 << 10) / 2;
        bytes[..zeros].fill(0);
    }
    bytes
}
