//! Limits of the format and the protocol, tied together by const asserts.

use std::time::Duration;

/// Version of the wire protocol; a peer with another major is refused.
pub const PROTOCOL_VERSION: u32 = 3;
/// Version of everything a daemon stores; a newer one is refused untouched.
pub const FORMAT_VERSION: u32 = 2;

pub const SHARDS: u16 = 256;
/// How many replicas a group may be asked to have.
pub const REPLICAS: [u32; 3] = [1, 3, 5];
/// Voters and learners of one group, a change in progress included.
pub const MEMBERS_MAX: usize = 9;

pub const NAME_BYTES_MAX: usize = 255;
/// Also the longest symlink target.
pub const PATH_BYTES_MAX: usize = 4096;
/// Components in one walk request.
pub const WALK_COMPONENTS_MAX: usize = 256;
/// Directories one request makes, each in the one before.
pub const MKDIR_NAMES_MAX: usize = 256;
/// Deepest directory; bounds the walk to the root of the no-loops check.
pub const DEPTH_MAX: usize = 2048;

pub const SPAN_BYTES_MAX: u32 = 100 << 20;
/// Bytes in the metadata of one span; also the largest file that is created in one request.
pub const INLINE_BYTES_MAX: u32 = 16 << 10;
pub const DATA_BLOCKS_MAX: u32 = 16;
pub const PARITY_BLOCKS_MAX: u32 = 16;
pub const BLOCKS_PER_SPAN_MAX: u32 = DATA_BLOCKS_MAX + PARITY_BLOCKS_MAX;
pub const STRIPES_MAX: u32 = 256;
pub const CELL_BYTES_MIN: u32 = 4 << 10;
pub const CELL_BYTES_MAX: u32 = 16 << 20;
/// A mirrored span is one block; padding makes it at most one cell longer.
pub const BLOCK_BYTES_MAX: u32 = 128 << 20;

/// Operations in one write request.
pub const BATCH_OPS_MAX: usize = 512;
/// Spans either file may have when contents are swapped. They all move in one batch, which holds up every group of the
/// host for as long: these are a few milliseconds, and files of 64 GiB in spans of the usual size.
pub const SWAP_SPANS_MAX: usize = 1024;
/// Bytes of one encoded metadata request or reply.
pub const MESSAGE_BYTES_MAX: usize = 8 << 20;
/// Bytes of one data message of a block stream.
pub const DATA_MESSAGE_BYTES: usize = 1 << 20;
/// Entries or spans in one page of a listing.
pub const PAGE_ENTRIES_MAX: u32 = 4096;
pub const XATTR_NAME_BYTES_MAX: usize = 255;
pub const XATTR_BYTES_MAX: usize = 64 << 10;
pub const NOTE_BYTES_MAX: usize = 1024;
pub const FAILURE_DOMAIN_BYTES_MAX: usize = 64;
/// Block services one cluster map carries.
pub const BLOCK_SERVICES_MAX: usize = 65_536;

/// Storage classes (u8): what is not a kind of disk.
pub const CLASS_EMPTY: u8 = 0;
pub const CLASS_INLINE: u8 = 1;
pub const CLASS_HDD: u8 = 2;
pub const CLASS_FLASH: u8 = 3;

/// The part of a disk that is kept free, as long as others have room, is one of so many: room for what is on other disks when
/// one is lost, and for compaction.
pub const DISK_RESERVE_SHARE: u64 = 20;
/// Every change of an eden file pushes its deadline this far out.
pub const EDEN_DEADLINE: Duration = Duration::from_secs(3600);
/// A session not used this long may be forgotten; a retry must come before.
pub const SESSION_TTL: Duration = Duration::from_secs(24 * 3600);
/// A host whose wall clock is further from the others' than this does not lead.
pub const CLOCK_OFFSET_MAX: Duration = Duration::from_millis(500);
/// A clock further ahead than this is not believed.
pub const CLOCK_AHEAD_MAX: Duration = Duration::from_secs(60);
/// A transaction that takes longer than this is shown, …
pub const SLOW_TRANSACTION: Duration = Duration::from_secs(2);
/// … but not more of them than this, the oldest, each in so many bytes.
pub const SLOW_TRANSACTIONS_MAX: usize = 32;
pub const TRANSACTION_STEP_BYTES_MAX: usize = 512;
/// The `least_redundancy` of a janitor's task that has nothing left to do: no span it is about can be named.
pub const NOTHING_AT_RISK: u32 = u32::MAX;
/// Daemons register this often …
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(1500);
/// … and are stale when not heard of for this long.
pub const STALE_AFTER: Duration = Duration::from_secs(5);

const _: () = {
    assert!(SHARDS as u32 == 1 << 8);
    assert!(INLINE_BYTES_MAX < SPAN_BYTES_MAX);
    assert!(SPAN_BYTES_MAX < BLOCK_BYTES_MAX);
    assert!(CELL_BYTES_MAX as u64 * STRIPES_MAX as u64 >= BLOCK_BYTES_MAX as u64);
    assert!(CELL_BYTES_MIN <= CELL_BYTES_MAX);
    // reed-solomon-erasure's GF(2^8) has 256 shards at most.
    assert!(BLOCKS_PER_SPAN_MAX <= 256);
    assert!(XATTR_BYTES_MAX < MESSAGE_BYTES_MAX);
    assert!(DATA_MESSAGE_BYTES < MESSAGE_BYTES_MAX);
    // One request can carry a good batch of the largest inline files.
    assert!(64 * INLINE_BYTES_MAX as usize <= MESSAGE_BYTES_MAX);
    // The cell CRCs of the largest span fit a message with room to spare.
    assert!((BLOCKS_PER_SPAN_MAX * STRIPES_MAX * 4) as usize * 8 <= MESSAGE_BYTES_MAX);
    assert!(HEARTBEAT_INTERVAL.as_millis() * 3 < STALE_AFTER.as_millis());
};
