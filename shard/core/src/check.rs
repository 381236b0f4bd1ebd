//! fsck of a shard: the invariants SH-1 to SH-10 and SH-19, row by row.
//!
//! Every row is checked by itself and against the rows it names, on one view of the state, so the
//! pages of a check may be seconds apart on a shard that serves.

use std::collections::BTreeMap;

use bytes::Bytes;
use eggs_machine::table::{after, prefix_end, scan};
use eggs_machine::{Table, TableError, group};
use eggs_proto::limits::{CLASS_EMPTY, CLASS_INLINE};
use eggs_proto::{BlockServiceId, InodeId, ShardId, Time, TransactionId, names, pb};
use prost::Message;

use crate::context::read_meta;
use crate::schema::{self, Key, Step};
use crate::{counts, span};

/// Rows of one page when the caller does not say.
const ROWS: u32 = 4096;
const ROWS_MAX: u32 = 1 << 16;
/// Findings of one page: a shard in ruins needs no complete list.
const FINDINGS_MAX: usize = 1000;

/// Checks a page of rows from `op.cursor` on. The reply's cursor is empty at the end.
///
/// # Errors
/// The state cannot be read; a row that makes no sense is a finding.
pub fn check<T: Table + ?Sized>(
    shard: ShardId,
    view: &T,
    op: &pb::Check,
) -> Result<pb::CheckReply, TableError> {
    let limit = if op.limit_rows == 0 { ROWS } else { op.limit_rows.min(ROWS_MAX) } as usize;
    let first = [eggs_machine::table::RESERVED + 1];
    let from = if op.cursor.is_empty() { first.to_vec() } else { after(&op.cursor).max(first.to_vec()) };
    let mut checker = Checker::new(shard, view)?;
    if op.cursor.is_empty() {
        checker.counters();
    }
    let mut left = limit;
    let mut cursor = None;
    scan(view, &from, &[], |key, value| {
        checker.reply.rows += 1;
        checker.row(key, value.clone())?;
        left -= 1;
        let full = left == 0 || checker.reply.findings.len() >= FINDINGS_MAX;
        if full {
            cursor = Some(key.clone());
        }
        Ok(!full)
    })?;
    checker.reply.cursor = cursor.unwrap_or_default();
    Ok(checker.reply)
}

struct Checker<'a, T: ?Sized> {
    shard: ShardId,
    view: &'a T,
    meta: pb::ShardMetaRow,
    /// Nothing was applied later; `None` when nothing was applied through a group.
    clock: Option<Time>,
    reply: pb::CheckReply,
}

/// Which blocks a span is to have.
#[derive(Debug, Clone, Copy)]
enum Expected {
    All,
    /// Of an expired file: those that are not erased yet.
    Some,
    /// So many copies of some.
    Copies(usize),
}

/// A file as its own row says it is.
struct FileSums {
    size: u64,
    crc: u32,
}

impl<'a, T: Table + ?Sized> Checker<'a, T> {
    fn new(shard: ShardId, view: &'a T) -> Result<Self, TableError> {
        let clock = Some(group::clock(view)?).filter(|clock| !clock.is_unset());
        // A damaged M row is found when its turn comes.
        let meta = read_meta(view).unwrap_or(pb::ShardMetaRow {
            next_directory: u64::MAX,
            next_file: u64::MAX,
            next_symlink: u64::MAX,
            next_block: u64::MAX,
            ..Default::default()
        });
        Ok(Checker { shard, view, meta, clock, reply: pb::CheckReply::default() })
    }

    fn find(&mut self, number: u32, message: impl std::fmt::Display) {
        let (invariant, message) = (format!("SH-{number}"), message.to_string());
        self.reply.findings.push(pb::Finding { invariant, message });
    }

    /// Decodes a value, or finds that it cannot be (SH-1).
    fn decode<R: Message + Default>(&mut self, what: impl std::fmt::Display, value: Bytes) -> Option<R> {
        match R::decode(value) {
            Ok(row) => Some(row),
            Err(error) => {
                self.find(1, format_args!("{what}: {error}"));
                None
            }
        }
    }

    /// Another row, when it exists and decodes; that it does is its own check.
    fn look<R: Message + Default>(&self, key: &[u8]) -> Result<Option<R>, TableError> {
        Ok(self.view.get(key)?.and_then(|value| R::decode(value).ok()))
    }

    fn exists(&self, key: &[u8]) -> Result<bool, TableError> {
        Ok(self.view.get(key)?.is_some())
    }

    fn row(&mut self, key: &Bytes, value: Bytes) -> Result<(), TableError> {
        match Key::parse(key) {
            Some(Key::Directory(id)) => self.directory(id, value)?,
            Some(Key::Living(directory, name)) => self.living(directory, name, value)?,
            Some(Key::Dead(directory, name, died_at)) => self.dead(directory, name, died_at, value)?,
            Some(Key::File(id)) => self.file(id, value)?,
            Some(Key::Span(file, last)) => self.span(file, last, value)?,
            Some(Key::Eden(id)) => self.eden(id, value)?,
            Some(Key::Blocks(service, file)) => self.blocks(service, file, value)?,
            Some(Key::Transaction(transaction, step)) => self.transaction(transaction, step, value),
            Some(Key::Meta) => {
                self.decode::<pb::ShardMetaRow>("M", value);
            }
            None => self.find(1, format_args!("key {}", key.escape_ascii())),
        }
        Ok(())
    }

    fn counters(&mut self) {
        let meta = &self.meta;
        let least = meta.next_directory.min(meta.next_file).min(meta.next_symlink).min(meta.next_block);
        if least == 0 {
            self.find(9, "a counter is 0");
        }
    }

    /// SH-9 of an inode that has a row here.
    fn inode(&mut self, id: InodeId) {
        if id.shard() != self.shard {
            return self.find(9, format_args!("inode {id} is of shard {}", id.shard()));
        }
        let next = match id.kind() {
            Some(eggs_proto::InodeType::Directory) => self.meta.next_directory,
            Some(eggs_proto::InodeType::File) => self.meta.next_file,
            Some(eggs_proto::InodeType::Symlink) => self.meta.next_symlink,
            None => 0,
        };
        if id.counter() >= next {
            self.find(9, format_args!("inode {id} is not below the counter {next}"));
        }
    }

    /// SH-9 of an instant.
    fn instant(&mut self, what: impl std::fmt::Display, time: u64) {
        if self.clock.is_some_and(|clock| time > clock.0) {
            self.find(9, format_args!("{what} is of {time}, later than the shard's clock"));
        }
    }

    fn directory(&mut self, id: InodeId, value: Bytes) -> Result<(), TableError> {
        self.reply.directories += 1;
        let Some(row) = self.decode::<pb::DirectoryRow>(format_args!("directory {id}"), value) else {
            return Ok(());
        };
        if !id.is_directory() {
            self.find(1, format_args!("directory {id} has the id of a file"));
            return Ok(());
        }
        if row.owner == 0 {
            self.reply.removed_directories += 1;
        } else {
            self.reply.living_directories.push(id.0);
        }
        self.inode(id);
        self.instant(format_args!("directory {id}"), row.created_at);
        if (id == InodeId::ROOT) != (row.owner == id.0) {
            self.find(4, format_args!("directory {id} has the owner {}", InodeId(row.owner)));
        }
        let steps = [Step::LockDirectory, Step::ReviveDirectory];
        let lock = pb::HeldLock { transaction: row.transaction, directory: id.0, ..Default::default() };
        self.lock(lock, &steps, &format_args!("directory {id}"))?;
        if row.owner != 0 && !InodeId(row.owner).is_directory() {
            let owner = InodeId(row.owner);
            self.find(4, format_args!("directory {id} has the owner {owner}, no directory"));
        }
        Ok(())
    }

    /// SH-10; whether the coordinator knows of the transaction, too, is for it to say.
    fn lock(
        &mut self,
        lock: pb::HeldLock,
        steps: &[Step],
        what: &dyn std::fmt::Display,
    ) -> Result<(), TableError> {
        let transaction = lock.transaction;
        if transaction == 0 {
            return Ok(());
        }
        let mut remembered = false;
        for &step in steps {
            remembered |= self.remembers(transaction, step)?;
        }
        if !remembered {
            self.find(10, format_args!("{what} is locked by the unknown transaction {transaction}"));
        }
        self.reply.locks.push(lock);
        Ok(())
    }

    /// Whether the step of the transaction was done.
    fn remembers(&self, transaction: u64, step: Step) -> Result<bool, TableError> {
        let key = schema::transaction_key(TransactionId(transaction), step);
        let row = self.look::<pb::TransactionRow>(&key)?;
        let outcome = row.and_then(|row| row.outcome).and_then(|outcome| outcome.result);
        Ok(matches!(outcome, Some(pb::write_result::Result::Done(_))))
    }

    fn name(&mut self, directory: InodeId, name: &[u8]) {
        if names::validate(name).is_err() {
            self.find(1, format_args!("'{}' in {directory} is no name", name.escape_ascii()));
        }
    }

    /// SH-3 of an edge's target; `living` edges may not lead to a file in writing.
    fn target(&mut self, what: &dyn std::fmt::Display, target: InodeId) -> Result<(), TableError> {
        if target.is_null() || target.kind().is_none() {
            self.find(3, format_args!("{what} leads to {target}, no inode"));
            return Ok(());
        }
        if target.shard() != self.shard {
            return Ok(());
        }
        let key =
            if target.is_directory() { schema::directory_key(target) } else { schema::file_key(target) };
        if !self.exists(&key)? {
            self.find(3, format_args!("{what} leads to {target}, which does not exist"));
        }
        Ok(())
    }

    fn living(&mut self, directory: InodeId, name: &[u8], value: Bytes) -> Result<(), TableError> {
        let what = format!("'{}' in {directory}", name.escape_ascii());
        let Some(row) = self.decode::<pb::EdgeRow>(&what, value) else { return Ok(()) };
        self.name(directory, name);
        self.instant(&what, row.created_at);
        match self.look::<pb::DirectoryRow>(&schema::directory_key(directory))? {
            None => self.find(2, format_args!("{what}: the directory does not exist")),
            Some(parent) if parent.owner == 0 => {
                self.find(4, format_args!("{what} lives in a removed directory"));
            }
            Some(_) => {}
        }
        // One that a transaction has locked may have led elsewhere since, where its target died and was purged.
        if row.transaction == 0 {
            self.target(&what, InodeId(row.target))?;
        }
        let (transaction, name) = (row.transaction, Bytes::copy_from_slice(name));
        let lock = pb::HeldLock { transaction, directory: directory.0, name, died_at: 0 };
        self.lock(lock, &[Step::LockEdge], &what)
    }

    fn dead(
        &mut self,
        directory: InodeId,
        name: &[u8],
        died_at: Time,
        value: Bytes,
    ) -> Result<(), TableError> {
        let what = format!("'{}' in {directory}, dead at {}", name.escape_ascii(), died_at.0);
        let Some(row) = self.decode::<pb::DeadEdgeRow>(&what, value) else { return Ok(()) };
        self.name(directory, name);
        self.instant(&what, died_at.0);
        if !self.exists(&schema::directory_key(directory))? {
            self.find(2, format_args!("{what}: the directory does not exist"));
        }
        // Of others the target may be purged since.
        if row.owned && row.transaction == 0 {
            self.target(&what, InodeId(row.target))?;
        }
        let lock = pb::HeldLock {
            transaction: row.transaction,
            directory: directory.0,
            name: Bytes::copy_from_slice(name),
            died_at: died_at.0,
        };
        self.lock(lock, &[Step::LockDeadEdge], &what)?;
        if row.created_at >= died_at.0 {
            self.find(5, format_args!("{what}, was created at {}", row.created_at));
        }
        // What had the name next must not have come before this one went.
        let from = after(&schema::dead_key(directory, name, died_at));
        let next = self.view.page(&from, &schema::dead_name_end(directory, name), 1)?.into_iter().next();
        let next = match next {
            Some((_, value)) => pb::DeadEdgeRow::decode(value).ok().map(|next| next.created_at),
            None => {
                let living = self.look::<pb::EdgeRow>(&schema::living_key(directory, name))?;
                living.map(|living| living.created_at)
            }
        };
        if next.is_some_and(|created_at| created_at < died_at.0) {
            self.find(5, format_args!("{what}, and the next version was there already"));
        }
        Ok(())
    }

    fn file(&mut self, id: InodeId, value: Bytes) -> Result<(), TableError> {
        self.reply.files += 1;
        let Some(row) = self.decode::<pb::FileRow>(format_args!("file {id}"), value) else { return Ok(()) };
        if id.is_directory() || id.kind().is_none() {
            self.find(1, format_args!("file {id} has not the id of one"));
        }
        self.inode(id);
        self.instant(format_args!("file {id}"), row.created_at);
        if self.exists(&schema::eden_key(id))? {
            self.find(6, format_args!("file {id} is published and in writing"));
        }
        self.contents(id, Some(&FileSums { size: row.size, crc: row.crc }))
    }

    fn eden(&mut self, id: InodeId, value: Bytes) -> Result<(), TableError> {
        let what = format!("file in writing {id}");
        let Some(row) = self.decode::<pb::EdenRow>(&what, value) else { return Ok(()) };
        if !id.is_file() {
            self.find(1, format_args!("{what} has not the id of a file"));
        }
        self.inode(id);
        self.instant(&what, row.created_at);
        if row.cookie == 0 {
            self.find(6, format_args!("{what} has no cookie"));
        }
        if row.expired {
            // Some of its blocks may be erased already.
            return self.contents(id, None);
        }
        if let Some(pending) = &row.pending {
            let (at, copied) = match &row.replacement {
                Some(replacement) => (replacement.offset, Some(replacement.indexes.len())),
                None => (row.size, None),
            };
            if pending.offset != at {
                self.find(7, format_args!("{what} has its pending span at {}, not at {at}", pending.offset));
            }
            self.shape(&what, pending, copied.map_or(Expected::All, Expected::Copies));
        }
        if row.replacement.is_some() && (row.pending.is_none() || row.size != 0) {
            self.find(7, format_args!("{what} holds copies of blocks, and not only those"));
        }
        self.contents(id, Some(&FileSums { size: row.size, crc: row.crc }))
    }

    /// SH-7 (when there are sums) and SH-8 from the file's side.
    fn contents(&mut self, file: InodeId, sums: Option<&FileSums>) -> Result<(), TableError> {
        let prefix = schema::id_key(schema::SPAN, file.0);
        let (mut end, mut crc, mut gap) = (0u64, 0, None);
        let mut counts: BTreeMap<BlockServiceId, u32> = BTreeMap::new();
        scan(self.view, &prefix, &prefix_end(&prefix), |_, value| {
            // A span that does not decode is found when its turn comes; here it leaves a gap.
            let Ok(span) = pb::Span::decode(value.clone()) else { return Ok(true) };
            if span.offset != end {
                gap = gap.or(Some(end));
            }
            end = span.offset.saturating_add(u64::from(span.size));
            crc = span::combine(crc, span.crc, u64::from(span.size));
            for (service, count) in counts::count(counts::blocks(&span)) {
                *counts.entry(service).or_default() += count;
            }
            Ok(true)
        })?;
        match (sums, gap) {
            (None, _) => {}
            (Some(_), Some(at)) => self.find(7, format_args!("file {file} has a gap or overlap at {at}")),
            (Some(sums), _) if end != sums.size => {
                self.find(7, format_args!("file {file} has {} bytes, its spans have {end}", sums.size));
            }
            (Some(&FileSums { crc: whole, .. }), _) if crc != whole => {
                self.find(7, format_args!("file {file} has CRC {whole:#010x}, its spans have {crc:#010x}"));
            }
            _ => {}
        }
        for (service, count) in counts {
            let row = self.look::<pb::BlockCountRow>(&schema::blocks_key(service, file))?;
            let counted = row.map_or(0, |row| row.blocks);
            if counted != count {
                let what = format_args!("{count} blocks of file {file} on {service}, counted {counted}");
                self.find(8, what);
            }
        }
        Ok(())
    }

    fn span(&mut self, file: InodeId, last: u64, value: Bytes) -> Result<(), TableError> {
        let what = format!("span of {file} up to {last}");
        let Some(span) = self.decode::<pb::Span>(&what, value) else { return Ok(()) };
        let end = span.offset.checked_add(u64::from(span.size));
        if span.size == 0 || end.and_then(|end| end.checked_sub(1)) != Some(last) {
            let (offset, size) = (span.offset, span.size);
            self.find(7, format_args!("{what} is {size} bytes at {offset}"));
        }
        let mut expected = Expected::All;
        if !self.exists(&schema::file_key(file))? {
            match self.look::<pb::EdenRow>(&schema::eden_key(file))? {
                None => self.find(6, format_args!("{what}: no such file")),
                Some(row) if row.expired => expected = Expected::Some,
                Some(_) => {}
            }
        }
        self.shape(&what, &span, expected);
        Ok(())
    }

    /// SH-7 and SH-19 within a span, and SH-9 of its blocks.
    fn shape(&mut self, what: &str, span: &pb::Span, expected: Expected) {
        let Some(blocks) = &span.blocks else {
            let good = if span.storage_class == u32::from(CLASS_EMPTY) {
                span.inline.is_empty() && span.crc == span::crc_of_zeros(span.size)
            } else {
                span.storage_class == u32::from(CLASS_INLINE)
                    && span.inline.len() == span.size as usize
                    && span.crc == crc32fast::hash(&span.inline)
            };
            if !good {
                self.find(7, format_args!("{what} does not hold its bytes"));
            }
            return;
        };
        let shape = span::shape(blocks.data, blocks.parity, blocks.stripes, blocks.cell_size, span.size);
        if let Err(error) = shape {
            return self.find(7, format_args!("{what}: {error}"));
        }
        let all = (blocks.data + blocks.parity) as usize;
        let there = blocks.blocks.len();
        let good = match expected {
            Expected::All => there == all,
            Expected::Some => (1..=all).contains(&there),
            Expected::Copies(copies) => there == copies,
        };
        let cells = |block: &pb::Block| block.cell_crcs.len() == blocks.stripes as usize;
        if !good || !blocks.blocks.iter().all(cells) || span.storage_class < 2 {
            self.find(7, format_args!("{what}: its blocks are not what its shape says"));
        }
        if counts::count(&blocks.blocks).len() != there {
            self.find(19, format_args!("{what}: several of its blocks are on one block service"));
        }
        let made_here = |block: &&pb::Block| block.block >> 56 == u64::from(self.shard.0);
        let next = self.meta.next_block;
        let above =
            blocks.blocks.iter().filter(made_here).find(|block| block.block & ((1 << 56) - 1) >= next);
        if let Some(block) = above {
            self.find(9, format_args!("{what}: block {:#018x} is not below the counter", block.block));
        }
    }

    /// SH-8 from the row's side.
    fn blocks(&mut self, service: BlockServiceId, file: InodeId, value: Bytes) -> Result<(), TableError> {
        let what = format!("count of blocks of {file} on {service}");
        let Some(row) = self.decode::<pb::BlockCountRow>(&what, value) else { return Ok(()) };
        let prefix = schema::id_key(schema::SPAN, file.0);
        let mut found = false;
        scan(self.view, &prefix, &prefix_end(&prefix), |_, value| {
            let span = pb::Span::decode(value.clone()).unwrap_or_default();
            found |= counts::blocks(&span).iter().any(|block| block.block_service == service.0);
            Ok(!found)
        })?;
        // How many there are is compared from the file's side.
        if !found || row.blocks == 0 {
            self.find(8, format_args!("{what} is {}, there are none", row.blocks));
        }
        Ok(())
    }

    fn transaction(&mut self, transaction: TransactionId, step: Step, value: Bytes) {
        let what = format!("step {step:?} of transaction {transaction}");
        let Some(row) = self.decode::<pb::TransactionRow>(&what, value) else { return };
        match row.outcome {
            Some(outcome) if outcome.result.is_some() && transaction.0 != 0 => {
                self.instant(&what, outcome.time);
            }
            _ => self.find(1, format_args!("{what} has no outcome")),
        }
    }
}
