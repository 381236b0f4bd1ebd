//! What the shards hold in the end, read from their rows.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use eggs_proto::{InodeId, ShardId, Time, pb};
use eggs_shard_core::schema::Key;
use prost::Message;

use crate::history::{Claim, Edge, History, Outcome};
use crate::nodes::shards::group_of;
use crate::world::World;

/// An edge from its birth to its death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Version {
    pub target: InodeId,
    pub created_at: Time,
    /// With whether it was owned when it died; `None`: living.
    pub died: Option<(Time, bool)>,
    /// It was owned until its target lived again.
    pub undeleted: bool,
    /// The shard does not have it any more: its purger said what it was.
    pub purged: bool,
}

impl Version {
    fn new(target: InodeId, created_at: Time, died: Option<(Time, bool)>) -> Version {
        Version { target, created_at, died, undeleted: false, purged: false }
    }
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
    /// Inodes that were purged, and who had made them.
    pub purged: BTreeMap<InodeId, Option<u32>>,
    /// Every block the shards know of, as (block service, block): those of files, and what is left to be erased.
    pub known_blocks: BTreeSet<(u64, u64)>,
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
        facts.put_back_purged(&world.common.history.borrow())?;
        for versions in facts.versions.values_mut() {
            versions.sort_by_key(|version| version.created_at);
        }
        facts.find_undeleted();
        Ok(facts)
    }

    /// What was purged is part of the history all the same: who purged it says what it was.
    fn put_back_purged(&mut self, history: &History) -> Result<(), String> {
        for operation in history.operations.iter().filter(|operation| operation.outcome != Outcome::Refused) {
            for claim in &operation.claims {
                let Claim::Purged { death, maker } = claim else { continue };
                let versions = self.versions.entry(death.edge.clone()).or_default();
                let known =
                    versions.iter().find(|version| version.died.is_some_and(|(at, _)| at == death.died_at));
                match known {
                    // Nobody was told, twice.
                    Some(version) if version.purged => {}
                    Some(_) if operation.outcome == Outcome::Acknowledged => {
                        return Err(format!(
                            "{death:?} was purged by operation {}, and is there",
                            operation.id
                        ));
                    }
                    Some(_) => {}
                    None => {
                        let died = Some((death.died_at, death.owned));
                        let version = Version::new(death.target, death.created_at, died);
                        versions.push(Version { purged: true, ..version });
                        if death.owned {
                            self.purged.insert(death.target, *maker);
                        }
                    }
                }
            }
        }
        // Undeleted before it was purged: only the name went.
        self.purged
            .retain(|inode, _| !self.files.contains_key(inode) && !self.directories.contains_key(inode));
        Ok(())
    }

    /// What lives again after a time without a name was undeleted: until then its death owned it.
    fn find_undeleted(&mut self) {
        let mut lives: BTreeMap<InodeId, Vec<&mut Version>> = BTreeMap::new();
        for version in self.versions.values_mut().flatten() {
            lives.entry(version.target).or_default().push(version);
        }
        for versions in lives.values_mut() {
            versions.sort_by_key(|version| version.created_at);
            for n in 1..versions.len() {
                let born = versions[n].created_at;
                if let Some((died_at, owned)) = versions[n - 1].died
                    && died_at < born
                    && (!owned || versions[n - 1].purged)
                {
                    versions[n - 1].died = Some((died_at, true));
                    versions[n - 1].undeleted = true;
                }
            }
        }
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
                self.versions.entry(edge).or_default().push(Version::new(target, created_at, None));
            }
            Some(Key::Dead(directory, name, died_at)) => {
                let row = pb::DeadEdgeRow::decode(value)?;
                let edge = Edge { directory, name: Bytes::copy_from_slice(name) };
                let (target, created_at) = (InodeId(row.target), Time(row.created_at));
                let died = Some((died_at, row.owned));
                self.versions.entry(edge).or_default().push(Version::new(target, created_at, died));
            }
            Some(Key::File(file)) => {
                let row = pb::FileRow::decode(value)?;
                self.files.insert(file, FileFact { uid: row.uid, size: row.size });
            }
            Some(Key::Span(file, _)) => {
                let blocks = pb::Span::decode(value)?.blocks.map(|blocks| blocks.blocks).unwrap_or_default();
                self.known_blocks.extend(blocks.iter().map(|block| (block.block_service, block.block)));
                self.blocks.extend(blocks.into_iter().map(|block| (file, block)));
            }
            Some(Key::Eden(file)) => {
                let row = pb::EdenRow::decode(value)?;
                self.eden.push((file, row.expired));
                let pending = row.pending.and_then(|span| span.blocks).map(|blocks| blocks.blocks);
                let left = row.garbage.into_iter().chain(pending.into_iter().flatten());
                self.known_blocks.extend(left.map(|block| (block.block_service, block.block)));
            }
            Some(Key::Transaction(transaction, _)) => self.outcomes.push((shard, transaction.0)),
            _ => {}
        }
        Ok(())
    }

    /// Who made an inode.
    pub fn uid(&self, inode: InodeId) -> Option<u32> {
        match self.directories.get(&inode) {
            Some((_, uid)) => Some(*uid),
            None => match self.files.get(&inode) {
                Some(file) => Some(file.uid),
                None => self.purged.get(&inode).copied().flatten(),
            },
        }
    }

    /// What the edge led to at an instant.
    pub fn at(&self, edge: &Edge, at: Time) -> Option<InodeId> {
        let visible =
            |version: &&Version| version.created_at <= at && version.died.is_none_or(|(died, _)| at < died);
        self.versions.get(edge)?.iter().find(visible).map(|version| version.target)
    }

    /// Whether what the edge led to at an instant is not to be seen any more.
    pub fn is_purged_at(&self, edge: &Edge, at: Time) -> bool {
        let purged = |version: &Version| {
            version.purged && version.created_at <= at && version.died.is_some_and(|(died, _)| at < died)
        };
        self.versions.get(edge).is_some_and(|versions| versions.iter().any(purged))
    }
}
