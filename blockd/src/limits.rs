//! What bounds a block service (BL-9). Memory: at most [`WRITES_MAX`] × ([`PIECES_QUEUED`] + 1) +
//! [`READS_MAX`] × ([`PIECES_QUEUED`] + 2) pieces of a megabyte, beside what the connections' windows hold.

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
/// Requests that wait for one of the places above; more are told to come back.
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
/// Requests in flight may take this long when the service stops.
pub const DRAIN_MAX: Duration = Duration::from_secs(10);

const _: () = {
    assert!(WRITES_MAX + READS_MAX < 512 - 64);
    assert!(WRITES_PER_DISK_MAX * 2 <= WRITES_MAX && READS_PER_DISK_MAX * 2 <= READS_MAX);
    assert!(READ_PIECE_BYTES as usize <= eggs_proto::limits::DATA_MESSAGE_BYTES);
};
