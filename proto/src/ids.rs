//! Identifiers, one newtype each.

use std::fmt;
use std::str::FromStr;

/// What an inode is; bits 63–61 of its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum InodeType {
    Directory = 0,
    File = 1,
    Symlink = 2,
}

impl InodeType {
    /// As `stat` prints it.
    pub fn as_str(self) -> &'static str {
        match self {
            InodeType::Directory => "DIRECTORY",
            InodeType::File => "FILE",
            InodeType::Symlink => "SYMLINK",
        }
    }
}

/// One of the 256 metadata shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(pub u8);

impl ShardId {
    /// All shards, in order.
    pub fn all() -> impl DoubleEndedIterator<Item = ShardId> + ExactSizeIterator {
        (0..crate::limits::SHARDS).map(|n| ShardId(n as u8))
    }
}

impl TryFrom<u32> for ShardId {
    type Error = u32;
    fn try_from(value: u32) -> Result<Self, u32> {
        u8::try_from(value).map(ShardId).map_err(|_| value)
    }
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Bits 63–61 type, bits 60–53 shard, bits 52–0 counter: an inode tells its shard without a look-up.
///
/// The root directory is counter 0 of shard 1; 0 is the null id (so counters of other shards and
/// types start at 1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct InodeId(pub u64);

const COUNTER_BITS: u32 = 53;
const SHARD_BITS: u32 = 8;

impl InodeId {
    pub const NULL: InodeId = InodeId(0);
    pub const ROOT: InodeId = InodeId(1 << COUNTER_BITS);
    /// Largest counter an id can carry.
    pub const COUNTER_MAX: u64 = (1 << COUNTER_BITS) - 1;

    /// # Panics
    /// When `counter` does not fit 53 bits: a shard would have made 9·10^15 inodes.
    pub fn new(kind: InodeType, shard: ShardId, counter: u64) -> InodeId {
        assert!(counter <= Self::COUNTER_MAX, "inode counter {counter} does not fit 53 bits");
        InodeId(
            ((kind as u64) << (COUNTER_BITS + SHARD_BITS)) | (u64::from(shard.0) << COUNTER_BITS) | counter,
        )
    }

    /// `None` when the type bits are none we know (hostile or newer bytes).
    pub fn kind(self) -> Option<InodeType> {
        match self.0 >> (COUNTER_BITS + SHARD_BITS) {
            0 => Some(InodeType::Directory),
            1 => Some(InodeType::File),
            2 => Some(InodeType::Symlink),
            _ => None,
        }
    }

    pub fn is_directory(self) -> bool {
        !self.is_null() && self.kind() == Some(InodeType::Directory)
    }

    /// A regular file; symlinks are not.
    pub fn is_file(self) -> bool {
        self.kind() == Some(InodeType::File)
    }

    pub fn is_symlink(self) -> bool {
        self.kind() == Some(InodeType::Symlink)
    }

    pub fn shard(self) -> ShardId {
        ShardId((self.0 >> COUNTER_BITS) as u8)
    }

    pub fn counter(self) -> u64 {
        self.0 & Self::COUNTER_MAX
    }

    pub fn is_null(self) -> bool {
        self == Self::NULL
    }
}

impl fmt::Display for InodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

impl fmt::Debug for InodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for InodeId {
    type Err = std::num::ParseIntError;
    /// Hexadecimal with `0x`, or decimal.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        match s.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => s.parse(),
        }
        .map(InodeId)
    }
}

macro_rules! u64_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#018x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#018x})"), self.0)
            }
        }
    };
}

u64_id!(
    /// One disk. Chosen at random when the disk is formatted; never 0.
    BlockServiceId
);
u64_id!(
    /// Known only to the writer of an eden file; never 0.
    Cookie
);
u64_id!(
    /// One lane of one client: it has one write in flight to a group. Random; 0 is "no session".
    SessionId
);
u64_id!(
    /// A cross-directory transaction; counts up from 1.
    TransactionId
);
u64_id!(
    /// Bits 63–56 the shard that chose it, bits 55–0 its counter: unique in the cluster.
    BlockId
);

u64_id!(
    /// One data directory that holds replicas; the id of its replicas in raft. Chosen at random when the directory is
    /// made, never 0: an empty disk in the place of an old one is another store, not a forgetful old voter.
    StoreId
);

impl FromStr for StoreId {
    type Err = std::num::ParseIntError;
    /// Hexadecimal with `0x`, or decimal.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        s.parse::<InodeId>().map(|id| StoreId(id.0))
    }
}

/// A replicated group: 0 to 255 the shards, then the coordinator and the registry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId(pub u16);

impl GroupId {
    /// The cross-directory coordinator.
    pub const CROSSDIR: GroupId = GroupId(256);
    /// The registry.
    pub const SHUCKLE: GroupId = GroupId(257);

    /// The shard it replicates, when it is one.
    pub fn shard(self) -> Option<ShardId> {
        u8::try_from(self.0).ok().map(ShardId)
    }
}

impl From<ShardId> for GroupId {
    fn from(shard: ShardId) -> GroupId {
        GroupId(u16::from(shard.0))
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            GroupId::CROSSDIR => f.write_str("crossdir"),
            GroupId::SHUCKLE => f.write_str("shuckle"),
            GroupId(shard) => write!(f, "shard {shard}"),
        }
    }
}

impl fmt::Debug for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl BlockId {
    /// # Panics
    /// When `counter` does not fit 56 bits.
    pub fn new(shard: ShardId, counter: u64) -> BlockId {
        assert!(counter < 1 << 56, "block counter {counter} does not fit 56 bits");
        BlockId((u64::from(shard.0) << 56) | counter)
    }
}

impl FromStr for BlockServiceId {
    type Err = std::num::ParseIntError;
    /// Hexadecimal with `0x`, or decimal.
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        s.parse::<InodeId>().map(|id| BlockServiceId(id.0))
    }
}

/// 16 random bytes chosen when a cluster is founded; every stored directory carries it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(pub [u8; 16]);

impl ClusterId {
    /// `None` unless there are 16 bytes, not all zero.
    pub fn from_bytes(bytes: &[u8]) -> Option<ClusterId> {
        let array: [u8; 16] = bytes.try_into().ok()?;
        (array != [0; 16]).then_some(ClusterId(array))
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ClusterId {
    type Err = &'static str;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        const WRONG: &str = "a cluster id is 32 hexadecimal digits";
        if s.len() != 32 || !s.is_ascii() {
            return Err(WRONG);
        }
        let mut bytes = [0; 16];
        for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&s[at..at + 2], 16).map_err(|_| WRONG)?;
        }
        ClusterId::from_bytes(&bytes).ok_or(WRONG)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_ids_have_the_bits_of_the_source_document() {
        assert_eq!(InodeId::ROOT.0, 0x0020_0000_0000_0000);
        assert_eq!(InodeId::ROOT, InodeId::new(InodeType::Directory, ShardId(1), 0));
        let file = InodeId::new(InodeType::File, ShardId(1), 3);
        assert_eq!(file.0, 0x2020_0000_0000_0003);
        assert_eq!((file.shard(), file.counter(), file.kind()), (ShardId(1), 3, Some(InodeType::File)));
        let last = InodeId::new(InodeType::Symlink, ShardId(255), InodeId::COUNTER_MAX);
        assert_eq!(last.0, 0x5fff_ffff_ffff_ffff);
        assert_eq!((last.shard(), last.counter()), (ShardId(255), InodeId::COUNTER_MAX));
        assert_eq!(InodeId(u64::MAX).kind(), None);
    }

    #[test]
    fn ids_read_back_what_they_print() {
        let id = InodeId::new(InodeType::File, ShardId(7), 9);
        assert_eq!(id.to_string().parse(), Ok(id));
        let cluster = ClusterId([7; 16]);
        assert_eq!(cluster.to_string().parse(), Ok(cluster));
        assert!("00000000000000000000000000000000".parse::<ClusterId>().is_err());
    }
}
