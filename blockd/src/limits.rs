//! What bounds a block service (BL-9). Memory, in a process with `n` disks:
//!
//! - connections: `CONNECTION_WINDOW` (8 MiB, `eggs_daemon::server`) for each that sends more than the disks take; what waits
//!   for a place waits there;
//! - blocks being written: min(32 `n`, [`WRITES_MAX`]) × ([`PIECES_QUEUED`] + 2) megabytes (pieces queued, on the way to the disk,
//!   being received; ours are shorter, but it was not taken apart what they keep of the buffers they came in). What is gathered of small blocks (256 KiB each) and
//!   the checksums of large ones (128 KiB) are within that;
//! - blocks being read: min(32 `n`, [`READS_MAX`]) × ([`PIECES_QUEUED`] + 2) × [`READ_PIECE_BYTES`], and what a connection has not sent
//!   yet, 2 MiB for each stream;
//! - requests of several blocks: [`BATCHES_BYTES_MAX`] of contents, twice while they are laid out as records; and
//!   [`BATCHES_RECEIVED_MAX`] messages of 8 MiB (of our clients 4 MiB) that are not whole yet;
//! - compaction: [`COMPACTION_BATCH_BYTES`] for each disk, twice;
//! - the index: 56 bytes for each block at most, 16 M blocks for each disk (`eggs_blockd_core::index`), once more while
//!   a journal is rewritten.
//!
//! `tests/tests/limits.rs` looks, and allows a quarter more for what the allocator has not given back. With four disks and 41
//! clients it saw up to 1.6 GiB of 1.7; which of the above that is was not taken apart.

use std::time::Duration;

/// Blocks being written on one disk. A disk does not get faster with more; each is a thread that mostly waits for
/// the network. Sixteen clients with two spans of six blocks in flight over eight disks make 24.
pub const WRITES_PER_DISK_MAX: usize = 32;
/// Blocks being read from one disk.
pub const READS_PER_DISK_MAX: usize = 32;
/// Blocks being written on all disks: as many as six hung disks can hold, so that others still get through.
/// With the reads it stays under the runtime's limit of blocking threads (512).
pub const WRITES_MAX: usize = 192;
/// Blocks being read from all disks.
pub const READS_MAX: usize = 192;
/// Requests that wait for one of the places above, to write and to read; more are told to come back.
pub const WAITING_MAX: usize = 512;
/// How long they wait: a burst passes, a hung disk does not.
pub const WAIT_MAX: Duration = Duration::from_secs(2);

/// Pieces between the network and the disk's thread: one being handled on either side is enough to overlap.
pub const PIECES_QUEUED: usize = 2;
/// Pieces in which a range is read and sent.
pub const READ_PIECE_BYTES: u32 = 512 << 10;

/// Longest a whole block may take to arrive or leave: a megabyte a second for the largest.
pub const TRANSFER_MAX: Duration = Duration::from_secs(128);
/// Longest a peer may be silent in between.
pub const SILENCE_MAX: Duration = Duration::from_secs(20);

/// A disk is looked at this often …
pub const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// … and not trusted when a look takes this long.
pub const CHECK_MAX: Duration = Duration::from_secs(5);
/// … or when a write or a sync of it takes this long: a disk may still answer from memory what it does not write any more.
pub const UNDERWAY_MAX: Duration = Duration::from_secs(20);
/// A disk that the cluster refuses is left out of heartbeats this long, for the sake of the others.
pub const REFUSED_PAUSE: Duration = Duration::from_secs(2);
/// Requests in flight may take this long when the service stops.
pub const DRAIN_MAX: Duration = Duration::from_secs(10);

/// Compaction moves so many bytes at once, on top of one larger block …
pub const COMPACTION_BATCH_BYTES: u64 = 4 << 20;
/// … and so many in a second: a tenth of a slow disk's time.
pub const COMPACTION_BYTES_PER_SECOND: u64 = 32 << 20;
/// A disk is asked this often whether there is something to compact …
pub const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(2);
/// … and after a failure so much later.
pub const MAINTENANCE_PAUSE: Duration = Duration::from_secs(60);

/// Blocks or ranges in one request of several: the smallest that fit in a message.
pub const BATCH_BLOCKS_MAX: usize = 8192;
/// Bytes of the blocks of one such request.
pub const BATCH_BYTES_MAX: usize = 8 << 20;
/// Bytes that all such requests together may hold; more are told to come back.
pub const BATCHES_BYTES_MAX: usize = 128 << 20;
/// Requests with contents of several blocks that are received or worked on at the same time; others wait unread.
pub const BATCHES_RECEIVED_MAX: usize = 32;
/// Blocks of one disk that are checked at the same time: a scrub must not take the disk from its readers.
pub const CHECKS_PER_DISK_MAX: usize = 2;
/// A request to check is answered after this, as far as it has come.
pub const CHECK_REQUEST_MAX: Duration = Duration::from_secs(5);

const _: () = {
    assert!(WRITES_MAX + READS_MAX < 512 - 64);
    assert!(WRITES_PER_DISK_MAX * 2 <= WRITES_MAX && READS_PER_DISK_MAX * 2 <= READS_MAX);
    assert!(READ_PIECE_BYTES as usize <= eggs_proto::limits::DATA_MESSAGE_BYTES);
};
