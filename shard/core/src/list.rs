//! Listing a directory: what lives in it, what lived in it at an instant, what died in it.
//!
//! Names come in byte order. At an instant the living and the dead map are merged: of each name, the
//! version that was visible then (SH-5 makes it at most one).

use bytes::Bytes;
use eggs_machine::table::{after, prefix_end};
use eggs_machine::{Row, Table, TableError};
use eggs_proto::limits::NAME_BYTES_MAX;
use eggs_proto::{InodeId, ServiceError, ShardError, ShardId, Time, pb};
use prost::Message;

use crate::context::{Stop, local_directory};
use crate::read::{PAGE_BYTES, attributes, page_limit};
use crate::schema::{self, Key};

/// Rows one page looks at once it has an entry to go on from: names that were not visible, versions
/// of other times.
const SCAN_ROWS_MAX: usize = 1 << 16;

pub(crate) fn list<T: Table + ?Sized>(
    shard: ShardId,
    view: &T,
    op: &pb::List,
) -> Result<pb::ListReply, Stop> {
    let directory = local_directory(shard, op.directory)?;
    let row: Option<pb::DirectoryRow> = schema::get(view, &schema::directory_key(directory))?;
    let now = !op.dead && op.at == 0;
    // What lived in a removed directory can still be looked at; now, it is not there.
    if !row.is_some_and(|row| row.owner != 0 || !now) {
        return Err(ShardError::NotFound.with(format_args!("directory {directory}")).into());
    }
    if op.prefix.len() > NAME_BYTES_MAX || op.prefix.contains(&0) || op.after_name.contains(&0) {
        return Err(ShardError::InvalidName.with("prefix or start of a listing").into());
    }
    let mut page = Page { shard, view, op, limit: page_limit(op.limit), bytes: 0, reply: Default::default() };
    if op.dead {
        page.dead(directory)?;
    } else if now {
        page.living(directory)?;
    } else {
        page.at(directory, Time(op.at))?;
    }
    Ok(page.reply)
}

struct Page<'a, T: ?Sized> {
    shard: ShardId,
    view: &'a T,
    op: &'a pb::List,
    limit: usize,
    bytes: usize,
    reply: pb::ListReply,
}

impl<'a, T: Table + ?Sized> Page<'a, T> {
    /// Adds an entry; false when the page is full, and then it was not added.
    fn add(&mut self, mut entry: pb::Entry) -> Result<bool, TableError> {
        if self.reply.entries.len() >= self.limit || self.bytes >= PAGE_BYTES {
            self.reply.more = true;
            return Ok(false);
        }
        let target = InodeId(entry.target);
        if self.op.want_attributes && target.shard() == self.shard {
            entry.attributes = attributes(self.view, target)?;
        }
        self.bytes += entry.encoded_len();
        self.reply.entries.push(entry);
        Ok(true)
    }

    fn living(&mut self, directory: InodeId) -> Result<(), TableError> {
        let mut rows = self.living_rows(directory, self.limit + 1);
        while let Some((key, value)) = rows.next()? {
            let edge: pb::EdgeRow = schema::decode(value)?;
            let entry = living_entry(living_name(&key)?, &edge);
            if !self.add(entry)? {
                break;
            }
        }
        Ok(())
    }

    fn at(&mut self, directory: InodeId, at: Time) -> Result<(), TableError> {
        let mut living = self.living_rows(directory, 256);
        let mut dead = self.dead_rows(directory, 256);
        let mut looked_at = 0;
        loop {
            looked_at += 1;
            if looked_at > SCAN_ROWS_MAX && !self.reply.entries.is_empty() {
                self.reply.more = true;
                return Ok(());
            }
            let living_name = living.peek()?.map(|(key, _)| living_name(key)).transpose()?;
            let death = dead.peek()?.map(|(key, _)| dead_parts(key)).transpose()?;
            // The dead versions of a name come before its living one, as they did in time.
            let take_dead = match (&living_name, &death) {
                (None, None) => return Ok(()),
                (Some(_), None) => false,
                (None, Some(_)) => true,
                (Some(living), Some((dead, _))) => dead <= living,
            };
            let entry = match (death, living_name) {
                (Some((name, died_at)), living_name) if take_dead => {
                    let Some((_, value)) = dead.next()? else { return Ok(()) };
                    if died_at <= at {
                        continue;
                    }
                    // The first death after the instant decides for the name.
                    dead.skip_to(schema::dead_name_end(directory, &name));
                    if living_name.as_ref() == Some(&name) {
                        living.next()?;
                    }
                    let edge: pb::DeadEdgeRow = schema::decode(value)?;
                    if edge.created_at > at.0 {
                        continue;
                    }
                    // As it was then: living.
                    let (target, created_at) = (edge.target, edge.created_at);
                    pb::Entry { name, target, created_at, ..Default::default() }
                }
                (_, Some(name)) => {
                    let Some((_, value)) = living.next()? else { return Ok(()) };
                    let edge: pb::EdgeRow = schema::decode(value)?;
                    if edge.created_at > at.0 {
                        continue;
                    }
                    living_entry(name, &edge)
                }
                (_, None) => return Ok(()),
            };
            if !self.add(entry)? {
                return Ok(());
            }
        }
    }

    fn dead(&mut self, directory: InodeId) -> Result<(), TableError> {
        let (since, until) = (Time(self.op.since), Time(self.op.until));
        let mut rows = self.dead_rows(directory, 256);
        let mut looked_at = 0;
        while let Some((key, value)) = rows.next()? {
            looked_at += 1;
            if looked_at > SCAN_ROWS_MAX && !self.reply.entries.is_empty() {
                self.reply.more = true;
                break;
            }
            let (name, died_at) = dead_parts(&key)?;
            if died_at < since {
                rows.skip_to(schema::dead_key(directory, &name, since));
                continue;
            }
            if !until.is_unset() && died_at >= until {
                rows.skip_to(schema::dead_name_end(directory, &name));
                continue;
            }
            let edge: pb::DeadEdgeRow = schema::decode(value)?;
            let entry = pb::Entry {
                name,
                target: edge.target,
                created_at: edge.created_at,
                died_at: died_at.0,
                owned: edge.owned,
                attributes: None,
                locked_by: 0,
            };
            if !self.add(entry)? {
                break;
            }
        }
        Ok(())
    }

    /// The living rows of names with the prefix, after the page before.
    fn living_rows(&self, directory: InodeId, page: usize) -> Rows<'a, T> {
        let prefix = schema::living_key(directory, &self.op.prefix);
        let from = match &self.op.after_name[..] {
            [] => prefix.clone(),
            name => after(&schema::living_key(directory, name)).max(prefix.clone()),
        };
        Rows::new(self.view, from, prefix_end(&prefix), page)
    }

    /// The dead rows of names with the prefix, after the page before: for the dead map after a death,
    /// else after a name.
    fn dead_rows(&self, directory: InodeId, page: usize) -> Rows<'a, T> {
        let mut prefix = schema::id_key(schema::DEAD, directory.0);
        prefix.extend_from_slice(&self.op.prefix);
        let from = match &self.op.after_name[..] {
            [] => prefix.clone(),
            name if self.op.dead => {
                after(&schema::dead_key(directory, name, Time(self.op.after_died_at))).max(prefix.clone())
            }
            name => schema::dead_name_end(directory, name).max(prefix.clone()),
        };
        Rows::new(self.view, from, prefix_end(&prefix), page)
    }
}

fn living_entry(name: Bytes, edge: &pb::EdgeRow) -> pb::Entry {
    let (target, created_at, locked_by) = (edge.target, edge.created_at, edge.transaction);
    pb::Entry { name, target, created_at, locked_by, ..Default::default() }
}

fn living_name(key: &Bytes) -> Result<Bytes, TableError> {
    match Key::parse(key) {
        Some(Key::Living(_, name)) => Ok(key.slice_ref(name)),
        _ => Err(not_a_key()),
    }
}

fn dead_parts(key: &Bytes) -> Result<(Bytes, Time), TableError> {
    match Key::parse(key) {
        Some(Key::Dead(_, name, died_at)) => Ok((key.slice_ref(name), died_at)),
        _ => Err(not_a_key()),
    }
}

fn not_a_key() -> TableError {
    TableError("a key of the living or dead map is not one".to_owned())
}

/// Rows in order, read in pages.
struct Rows<'a, T: ?Sized> {
    view: &'a T,
    from: Vec<u8>,
    to: Vec<u8>,
    page: usize,
    rows: std::iter::Peekable<std::vec::IntoIter<Row>>,
    ended: bool,
}

impl<'a, T: Table + ?Sized> Rows<'a, T> {
    fn new(view: &'a T, from: Vec<u8>, to: Vec<u8>, page: usize) -> Self {
        Rows { view, from, to, page, rows: Vec::new().into_iter().peekable(), ended: false }
    }

    fn fill(&mut self) -> Result<(), TableError> {
        if self.rows.len() > 0 || self.ended {
            return Ok(());
        }
        let rows = self.view.page(&self.from, &self.to, self.page)?;
        self.ended = rows.len() < self.page;
        if let Some((last, _)) = rows.last() {
            self.from = after(last);
        }
        self.rows = rows.into_iter().peekable();
        Ok(())
    }

    fn peek(&mut self) -> Result<Option<&Row>, TableError> {
        self.fill()?;
        Ok(self.rows.peek())
    }

    fn next(&mut self) -> Result<Option<Row>, TableError> {
        self.fill()?;
        Ok(self.rows.next())
    }

    /// Goes on at the first row not below `key`.
    fn skip_to(&mut self, key: Vec<u8>) {
        while self.rows.next_if(|(row, _)| row[..] < key[..]).is_some() {}
        if self.rows.len() == 0 && key > self.from {
            self.from = key;
        }
    }
}
