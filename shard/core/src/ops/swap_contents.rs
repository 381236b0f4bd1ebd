//! SwapContents: the spans of an eden file take the place of a published file's, whose contents are the same. What the file
//! had becomes the eden file's, which has no writer any more: its blocks are garbage.

use eggs_machine::table::prefix_end;
use eggs_machine::{Row, Table, TableError};
use eggs_proto::limits::SWAP_SPANS_MAX;
use eggs_proto::{InodeId, ServiceError, ShardError, pb};

use crate::context::{Answer, Context, Stop, done};
use crate::machine::Choices;
use crate::schema::{self, Key};
use crate::{counts, span};

pub(crate) fn apply<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    op: &pb::SwapContents,
    choices: &Choices,
) -> Answer {
    let file = context.local(op.file)?;
    if !file.is_file() {
        return Err(ShardError::Malformed.with(format_args!("{file} is no file")).into());
    }
    let published: Option<pb::FileRow> = schema::get(&*context.tx, &schema::file_key(file))?;
    let published = published.ok_or_else(|| ShardError::NotFound.with(format_args!("inode {file}")))?;
    let (eden, mut row) = context.writing(op.eden, op.cookie)?;
    let certified = match &op.certify {
        Some(certify) => context.certified(eden, &mut row, certify, &choices.proven_blocks)?,
        None => None,
    };
    if row.pending.is_some() {
        return Err(ShardError::BadSpan.with("a span is still in progress").into());
    }
    let (mut size, mut crc) = (row.size, row.crc);
    if let Some(span) = &certified {
        size += u64::from(span.size);
        crc = span::combine(crc, span.crc, u64::from(span.size));
    }
    if (size, crc) != (published.size, published.crc) {
        let what = format_args!(
            "{size} bytes with CRC {crc:#010x} for the contents of {file}, {} with {:#010x}",
            published.size, published.crc
        );
        return Err(ShardError::BadSpan.with(what).into());
    }
    let old = spans(context, file, 0)?;
    spans(context, eden, usize::from(certified.is_some()))?;
    if let Some(span) = certified {
        context.append(eden, &mut row, span)?;
    }
    let new = spans(context, eden, 0)?;
    exchange(context, file, &old, eden, &new)?;
    // Nobody has looked at the new blocks yet.
    context.put(schema::file_key(file), &pb::FileRow { scrubbed_at: 0, ..published })?;
    context.expire(eden, row)?;
    done()
}

/// The rows of a file's spans, when they and `more` are not too many to move at once.
fn spans<T: Table + ?Sized>(
    context: &Context<'_, '_, T>,
    file: InodeId,
    more: usize,
) -> Result<Vec<Row>, Stop> {
    let prefix = schema::id_key(schema::SPAN, file.0);
    let rows = context.tx.page(&prefix, &prefix_end(&prefix), SWAP_SPANS_MAX + 1)?;
    if rows.len() + more > SWAP_SPANS_MAX {
        let what =
            format_args!("{file} has more than {SWAP_SPANS_MAX} spans, which is what can be swapped at once");
        return Err(ShardError::TooLarge.with(what).into());
    }
    Ok(rows)
}

/// Each file gets the other's spans.
fn exchange<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    one: InodeId,
    ones: &[Row],
    other: InodeId,
    others: &[Row],
) -> Result<(), TableError> {
    for (key, _) in ones.iter().chain(others) {
        context.tx.delete(key.clone())?;
    }
    let gone = put(context, other, ones)?;
    let come = put(context, one, others)?;
    context.recount(one, &gone, &come)?;
    context.recount(other, &come, &gone)
}

/// Puts the spans under another file; their blocks.
fn put<T: Table + ?Sized>(
    context: &mut Context<'_, '_, T>,
    file: InodeId,
    rows: &[Row],
) -> Result<Vec<pb::Block>, TableError> {
    let mut blocks = Vec::new();
    for (key, value) in rows {
        let Some(Key::Span(_, last)) = Key::parse(key) else {
            return Err(TableError("a key of the table of spans is not one".to_owned()));
        };
        blocks.extend_from_slice(counts::blocks(&schema::decode(value.clone())?));
        context.tx.put(schema::span_key(file, last), value.clone())?;
    }
    Ok(blocks)
}
