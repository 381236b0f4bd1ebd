//! Flags of a block service.

/// No reads from it.
pub const NO_READ: u32 = 1;
/// No new blocks on it.
pub const NO_WRITE: u32 = 2;
/// To be emptied and taken away.
pub const DECOMMISSIONED: u32 = 4;
/// Not heard of lately (derived, never set by people).
pub const STALE: u32 = 8;
/// Its host says the disk is gone or failing (derived).
pub const LOST: u32 = 16;

/// What people may set and clear.
pub const SETTABLE: u32 = NO_READ | NO_WRITE | DECOMMISSIONED;

/// New blocks may go there.
pub fn writable(flags: u32) -> bool {
    flags & (NO_WRITE | DECOMMISSIONED | STALE | LOST) == 0
}

/// Worth asking for a block.
pub fn readable(flags: u32) -> bool {
    flags & (NO_READ | STALE | LOST) == 0
}

/// Names of the flags set, as people read and type them.
pub fn names(flags: u32) -> Vec<&'static str> {
    [
        (NO_READ, "NO_READ"),
        (NO_WRITE, "NO_WRITE"),
        (DECOMMISSIONED, "DECOMMISSIONED"),
        (STALE, "STALE"),
        (LOST, "LOST"),
    ]
    .into_iter()
    .filter_map(|(bit, name)| (flags & bit != 0).then_some(name))
    .collect()
}
