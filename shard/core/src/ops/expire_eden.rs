//! ExpireEden: files in writing past their deadline lose their writer. Housekeeping: it needs no
//! secret, since it does only what time has already decided.

use eggs_machine::Table;
use eggs_machine::table::{after, prefix_end};
use eggs_proto::{InodeId, pb};

use crate::context::{Answer, Context, done};
use crate::eden::overdue;
use crate::schema::{self, Key};

/// Rows one command looks at: it goes round the table from call to call.
const ROWS_MAX: usize = 1024;

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::ExpireEden) -> Answer {
    let last = context.meta()?.expire_after;
    let from = if last == 0 { vec![schema::EDEN] } else { after(&schema::eden_key(InodeId(last))) };
    let rows = context.tx.page(&from, &prefix_end(&[schema::EDEN]), ROWS_MAX)?;
    let mut looked_at = (rows.len() == ROWS_MAX).then(|| rows[rows.len() - 1].0.clone());
    let mut left = op.limit.max(1);
    for (key, value) in rows {
        let row: pb::EdenRow = schema::decode(value)?;
        if !overdue(&row, context.time) {
            continue;
        }
        if let Some(Key::Eden(file)) = Key::parse(&key) {
            context.expire(file, row)?;
        }
        left -= 1;
        if left == 0 {
            looked_at = Some(key);
            break;
        }
    }
    let next = match looked_at.as_deref().and_then(Key::parse) {
        Some(Key::Eden(file)) => file.0,
        _ => 0,
    };
    if next != last {
        context.change_meta()?.expire_after = next;
    }
    done()
}
