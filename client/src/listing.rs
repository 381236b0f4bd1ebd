//! Listings, page by page.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use eggs_proto::limits::PAGE_ENTRIES_MAX;
use eggs_proto::pb::{shard_reply, shard_request};
use eggs_proto::{InodeId, Time, pb};
use futures_util::{StreamExt, stream};

use crate::Client;
use crate::error::{ClientError, Result};
use crate::moves::{Fate, Moves};
use crate::path::Path;
use crate::types::{Entry, ListOptions, Metadata};
use crate::walk::{Start, Want};

/// A directory listing; entries come in the order of the names' bytes (in the dead map, deaths of one name
/// in order of time).
#[derive(Debug)]
pub struct Listing {
    client: Client,
    directory: InodeId,
    options: ListOptions,
    what: Arc<str>,
    after_name: Bytes,
    after_died_at: u64,
    ready: VecDeque<Entry>,
    ended: bool,
    locked_are_there: bool,
}

/// Attributes asked for at once that the directory's own shard does not have.
const STATS_IN_FLIGHT: usize = 32;

impl Listing {
    pub(crate) fn new(client: &Client, directory: InodeId, options: ListOptions, what: Arc<str>) -> Listing {
        let after_name = options.after.clone();
        // After every death of that name.
        let after_died_at = if options.dead && !after_name.is_empty() { u64::MAX } else { 0 };
        Listing {
            client: client.clone(),
            directory,
            options,
            what,
            after_name,
            after_died_at,
            ready: VecDeque::new(),
            ended: false,
            locked_are_there: false,
        }
    }

    /// Does not ask what became of the moves that have locked names: these are taken to be there.
    #[must_use]
    pub(crate) fn with_what_is_locked(self) -> Listing {
        Listing { locked_are_there: true, ..self }
    }

    pub fn directory(&self) -> InodeId {
        self.directory
    }

    /// The next page, empty pages skipped; `None` at the end.
    pub async fn next_page(&mut self) -> Result<Option<Vec<Entry>>> {
        if !self.ready.is_empty() {
            return Ok(Some(self.ready.drain(..).collect()));
        }
        while !self.ended {
            let page = self.fetch().await?;
            if !page.is_empty() {
                return Ok(Some(page));
            }
        }
        Ok(None)
    }

    /// The next entry.
    pub async fn next(&mut self) -> Result<Option<Entry>> {
        if self.ready.is_empty()
            && let Some(page) = self.next_page().await?
        {
            self.ready = page.into();
        }
        Ok(self.ready.pop_front())
    }

    /// All that is left, in memory.
    pub async fn all(mut self) -> Result<Vec<Entry>> {
        let mut all = Vec::new();
        while let Some(mut page) = self.next_page().await? {
            all.append(&mut page);
        }
        Ok(all)
    }

    async fn fetch(&mut self) -> Result<Vec<Entry>> {
        let options = &self.options;
        let op = shard_request::Op::List(pb::List {
            directory: self.directory.0,
            dead: options.dead,
            after_name: self.after_name.clone(),
            after_died_at: self.after_died_at,
            limit: if options.page == 0 { PAGE_ENTRIES_MAX } else { options.page.min(PAGE_ENTRIES_MAX) },
            at: options.at.0,
            since: options.since.0,
            until: options.until.0,
            want_attributes: options.attributes,
            prefix: options.prefix.clone(),
        });
        let reply = match self.client.shared.shard_read(self.directory.shard(), op).await? {
            Ok(shard_reply::Result::List(reply)) => reply,
            Ok(_) => return Err(ClientError::other_reply("list")),
            Err(error) => return Err(ClientError::from_shard(&error, &self.what)),
        };
        // Pages must go on, or a listing would never end.
        let ordered = reply.entries.is_sorted_by(|a, b| (&a.name, a.died_at) < (&b.name, b.died_at));
        match reply.entries.last() {
            Some(last) if ordered && (&last.name, last.died_at) > (&self.after_name, self.after_died_at) => {
                self.after_name = last.name.clone();
                self.after_died_at = last.died_at;
                self.ended = !reply.more;
            }
            None if !reply.more => self.ended = true,
            _ => return Err(ClientError::protocol("a page of a listing does not follow the one before")),
        }
        let mut moves = Moves::new(&self.client, self.options.at);
        let mut entries = Vec::with_capacity(reply.entries.len());
        for entry in reply.entries {
            let entry = match entry.locked_by == 0 || self.locked_are_there {
                true => Some(entry),
                false => self.settled(entry, &mut moves).await?,
            };
            entries.extend(entry.map(entry_of).transpose()?);
        }
        if self.options.attributes {
            self.complete(&mut entries).await?;
        }
        Ok(entries)
    }

    /// What a name is that a move or an exchange has locked; `None`: it is not there.
    async fn settled(&self, entry: pb::Entry, moves: &mut Moves) -> Result<Option<pb::Entry>> {
        let (target, created_at) = match moves.fate(&self.client, entry.locked_by).await? {
            Some(Fate::There) => return Ok(Some(entry)),
            Some(Fate::Gone) => return Ok(None),
            Some(Fate::Leads(target, since)) => (target, since),
            None => {
                let path = Path { names: vec![entry.name.clone()] };
                let want = Want { at: self.options.at, ..Want::default() };
                match self.client.walk(&Start::at(self.directory), path, want, &self.what).await {
                    Ok(walked) => (walked.inode, walked.created_at),
                    Err(error) if error.is_not_found() => return Ok(None),
                    Err(error) => return Err(error),
                }
            }
        };
        let attributes = entry.attributes.filter(|attributes| attributes.inode == target.0);
        Ok(Some(pb::Entry { target: target.0, created_at: created_at.0, attributes, ..entry }))
    }

    /// Attributes the page came without: of inodes of other shards, and of what was exchanged.
    async fn complete(&self, entries: &mut [Entry]) -> Result<()> {
        let missing: Vec<(usize, InodeId)> = entries
            .iter()
            .enumerate()
            .filter_map(|(n, entry)| entry.metadata.is_none().then_some((n, entry.target)))
            .collect();
        let stats = missing.into_iter().map(|(n, target)| async move {
            match self.client.stat_inode(target).await {
                Ok(metadata) => Ok((n, Some(metadata))),
                // Gone since, or collected: listed without.
                Err(error) if error.is_not_found() => Ok((n, None)),
                Err(error) => Err(error),
            }
        });
        let mut stats = stream::iter(stats).buffer_unordered(STATS_IN_FLIGHT);
        while let Some(answer) = stats.next().await {
            let (n, metadata) = answer?;
            entries[n].metadata = metadata;
        }
        Ok(())
    }
}

fn entry_of(entry: pb::Entry) -> Result<Entry> {
    let target = InodeId(entry.target);
    if target.is_null() || target.kind().is_none() {
        return Err(ClientError::protocol("an entry leads to no inode"));
    }
    let metadata = entry.attributes.map(|attributes| Metadata::from_wire(target, attributes)).transpose()?;
    Ok(Entry {
        name: entry.name,
        target,
        created_at: Time(entry.created_at),
        died_at: (entry.died_at != 0).then_some(Time(entry.died_at)),
        owned: entry.owned,
        metadata,
    })
}
