//! What the shards hold in the end, read from their rows.

use std::collections::BTreeMap;

use bytes::Bytes;
use eggs_proto::{InodeId, ShardId, Time, pb};
use eggs_shard_core::schema::Key;
use prost::Message;

use crate::history::Edge;
use crate::nodes::shards::group_of;
use crate::world::World;

/// An edge from its birth to its death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Version {
    pub target: InodeId,
    pub created_at: Time,
    /// With whether it was owned; `None`: living.
    pub died: Option<(Time, bool)>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct FileFact {
    pub uid: u32,
    pub size: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Facts {
    /// In the order of their times.
    pub versions: BTreeMap<Edge, Vec<Version>>,
    /// Owner and uid.
    pub directories: BTreeMap<InodeId, (InodeId, u32)>,
    pub files: BTreeMap<InodeId, FileFact>,
    /// Edges that are locked, and by which transaction.
    pub locked: Vec<(Edge, u64)>,
    /// Blocks of published files.
    pub blocks: Vec<(InodeId, pb::Block)>,
    /// Files in writing, and whether they lost their writer.
    pub eden: Vec<(InodeId, bool)>,
    /// Outcomes of coordinator's steps that are still remembered.
    pub outcomes: Vec<(ShardId, u64)>,
}

impl Facts {
    pub fn read(world: &World) -> Result<Facts, String> {
        let mut facts = Facts::default();
        for shard in world.shards() {
            let Some(host) = world.shard_host(shard) else { return Err(format!("shard {shard} is not led")) };
            for (key, value) in host.replica.rows(group_of(shard)) {
                facts.row(shard, &key, value).map_err(|error| format!("shard {shard}: {error}"))?;
            }
        }
        for versions in facts.versions.values_mut() {
            versions.sort_by_key(|version| version.created_at);
        }
        Ok(facts)
    }

    fn row(&mut self, shard: ShardId, key: &[u8], value: Bytes) -> Result<(), prost::DecodeError> {
        match Key::parse(key) {
            Some(Key::Directory(directory)) => {
                let row = pb::DirectoryRow::decode(value)?;
                self.directories.insert(directory, (InodeId(row.owner), row.uid));
            }
            Some(Key::Living(directory, name)) => {
                let row = pb::EdgeRow::decode(value)?;
                let edge = Edge { directory, name: Bytes::copy_from_slice(name) };
                if row.transaction != 0 {
                    self.locked.push((edge.clone(), row.transaction));
                }
                let (target, created_at) = (InodeId(row.target), Time(row.created_at));
                self.versions.entry(edge).or_default().push(Version { target, created_at, died: None });
            }
            Some(Key::Dead(directory, name, died_at)) => {
                let row = pb::DeadEdgeRow::decode(value)?;
                let edge = Edge { directory, name: Bytes::copy_from_slice(name) };
                let (target, created_at) = (InodeId(row.target), Time(row.created_at));
                let died = Some((died_at, row.owned));
                self.versions.entry(edge).or_default().push(Version { target, created_at, died });
            }
            Some(Key::File(file)) => {
                let row = pb::FileRow::decode(value)?;
                self.files.insert(file, FileFact { uid: row.uid, size: row.size });
            }
            Some(Key::Span(file, _)) => {
                let blocks = pb::Span::decode(value)?.blocks.map(|blocks| blocks.blocks).unwrap_or_default();
                self.blocks.extend(blocks.into_iter().map(|block| (file, block)));
            }
            Some(Key::Eden(file)) => self.eden.push((file, pb::EdenRow::decode(value)?.expired)),
            Some(Key::Transaction(transaction, _)) => self.outcomes.push((shard, transaction.0)),
            _ => {}
        }
        Ok(())
    }

    /// Who made an inode.
    pub fn uid(&self, inode: InodeId) -> Option<u32> {
        match self.directories.get(&inode) {
            Some((_, uid)) => Some(*uid),
            None => self.files.get(&inode).map(|file| file.uid),
        }
    }

    /// What the edge led to at an instant.
    pub fn at(&self, edge: &Edge, at: Time) -> Option<InodeId> {
        let visible =
            |version: &&Version| version.created_at <= at && version.died.is_none_or(|(died, _)| at < died);
        self.versions.get(edge)?.iter().find(visible).map(|version| version.target)
    }
}
