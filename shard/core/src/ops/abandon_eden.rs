//! AbandonEden: the writer gives up; nothing can be done to the file but erasing it.

use eggs_machine::Table;
use eggs_proto::pb;

use crate::context::{Answer, Context, done};

pub(crate) fn apply<T: Table + ?Sized>(context: &mut Context<'_, '_, T>, op: &pb::AbandonEden) -> Answer {
    let (file, row) = context.eden(op.file, op.cookie)?;
    context.expire(file, row)?;
    done()
}
