//! Who is to replicate and lead what.

use eggs_machine::{Table, TableError};
use eggs_proto::{Time, pb};

use crate::health::Health;

/// What is to change about groups, to be logged as one `PutGroups`; nothing most of the time.
///
/// # Errors
/// When the table fails.
pub fn plan<T: Table + ?Sized>(
    _view: &T,
    _health: &Health,
    _now: Time,
) -> Result<Vec<pb::PutGroup>, TableError> {
    Ok(Vec::new())
}
