//! The rows as they are: every directory has one edge and its owner agrees, nothing is orphaned,
//! locked or left over from a transaction, and fsck finds nothing.

use std::collections::BTreeMap;

use eggs_proto::{InodeId, pb};

use super::facts::{Facts, Version};
use crate::history::Edge;
use crate::world::World;

pub(crate) fn check(world: &World, facts: &Facts, wrong: &mut Vec<String>) {
    fsck(world, wrong);
    let mut living: BTreeMap<InodeId, Vec<&Edge>> = BTreeMap::new();
    let mut named: BTreeMap<InodeId, ()> = BTreeMap::new();
    for (edge, versions) in &facts.versions {
        for version in versions {
            named.insert(version.target, ());
            if version.died.is_none() {
                living.entry(version.target).or_default().push(edge);
            }
        }
    }
    directories(facts, &living, wrong);
    one_name_at_a_time(facts, wrong);
    owned(facts, wrong);
    for (target, edges) in &living {
        if edges.len() > 1 {
            wrong.push(format!("{target} has several living names: {edges:?}"));
        }
        let there = if target.is_directory() {
            facts.directories.contains_key(target)
        } else {
            facts.files.contains_key(target)
        };
        if !there {
            wrong.push(format!("{edges:?} lead to {target}, which is not there"));
        }
    }
    for file in facts.files.keys() {
        if !named.contains_key(file) {
            wrong.push(format!("file {file} is published and never had a name"));
        }
    }
    for (edge, transaction) in &facts.locked {
        wrong.push(format!("{edge:?} is still locked by transaction {transaction}"));
    }
    for (shard, transaction) in facts.outcomes.iter().take(5) {
        wrong.push(format!("shard {shard} still remembers transaction {transaction}"));
    }
    coordinator(world, wrong);
}

/// Every inode is owned by one edge: the one it lives under, or the one it died under.
fn owned(facts: &Facts, wrong: &mut Vec<String>) {
    let mut owning: BTreeMap<InodeId, usize> = BTreeMap::new();
    for version in facts.versions.values().flatten() {
        let owns = version.died.is_none_or(|(_, owned)| owned && !version.undeleted && !version.purged);
        *owning.entry(version.target).or_default() += usize::from(owns);
    }
    let inodes = facts.files.keys().chain(facts.directories.keys()).filter(|id| **id != InodeId::ROOT);
    for inode in inodes {
        let edges = owning.get(inode).copied().unwrap_or(0);
        if edges != 1 {
            wrong.push(format!("{inode} is owned by {edges} edges"));
        }
    }
}

/// What was moved had one name at every instant from its first to its last: the old one goes as the new one comes.
/// What was undeleted had none for a while.
fn one_name_at_a_time(facts: &Facts, wrong: &mut Vec<String>) {
    let mut names: BTreeMap<InodeId, Vec<(&Edge, &Version)>> = BTreeMap::new();
    for (edge, versions) in &facts.versions {
        for version in versions {
            names.entry(version.target).or_default().push((edge, version));
        }
    }
    for (target, mut names) in names {
        names.sort_by_key(|(_, version)| version.created_at);
        for pair in names.windows(2) {
            let ((old, before), (new, after)) = (pair[0], pair[1]);
            match before.died {
                Some((died_at, false)) if died_at == after.created_at => {}
                Some(_) if before.undeleted => {}
                died => wrong.push(format!(
                    "{target} was {old:?} until {died:?}, and {new:?} from {:?}",
                    after.created_at
                )),
            }
        }
        if let Some((edge, Version { died: Some((died_at, false)), .. })) = names.last() {
            wrong.push(format!("{target} was moved from {edge:?} at {died_at:?}, and has no name since"));
        }
    }
}

fn directories(facts: &Facts, living: &BTreeMap<InodeId, Vec<&Edge>>, wrong: &mut Vec<String>) {
    for (&directory, &(owner, _)) in &facts.directories {
        let edges = living.get(&directory).map_or(&[][..], Vec::as_slice);
        if directory == InodeId::ROOT {
            if owner != directory || !edges.is_empty() {
                wrong.push(format!("the root is owned by {owner}, named {edges:?}"));
            }
        } else if owner.is_null() {
            if !edges.is_empty() {
                wrong.push(format!("directory {directory} was removed and is still at {edges:?}"));
            }
        } else if edges.is_empty() {
            wrong.push(format!("directory {directory} (owner {owner}) is an orphan"));
        } else if edges[0].directory != owner {
            wrong.push(format!("directory {directory} at {edges:?} says it is owned by {owner}"));
        }
        if !owner.is_null() && climbs_to_root(facts, directory).is_none() {
            wrong.push(format!("directory {directory} does not lead up to the root"));
        }
    }
}

fn climbs_to_root(facts: &Facts, mut directory: InodeId) -> Option<()> {
    for _ in 0..=facts.directories.len() {
        if directory == InodeId::ROOT {
            return Some(());
        }
        directory = facts.directories.get(&directory)?.0;
    }
    None
}

fn fsck(world: &World, wrong: &mut Vec<String>) {
    for shard in world.shards() {
        let Some(view) = world.shard_host(shard).and_then(|host| host.view(shard)) else {
            wrong.push(format!("shard {shard} is not led"));
            continue;
        };
        let mut op = pb::Check { limit_rows: 500, ..pb::Check::default() };
        loop {
            match eggs_shard_core::check(shard, view, &op) {
                Ok(reply) => {
                    let findings = reply.findings.iter().take(5);
                    wrong.extend(findings.map(|f| format!("shard {shard}: {}: {}", f.invariant, f.message)));
                    op.cursor = reply.cursor;
                }
                Err(error) => wrong.push(format!("shard {shard}: check: {error}")),
            }
            if op.cursor.is_empty() {
                break;
            }
        }
    }
}

fn coordinator(world: &World, wrong: &mut Vec<String>) {
    let Some(view) = world.coordinator().and_then(|node| node.view()) else {
        return wrong.push("the coordinator is not led".to_owned());
    };
    match eggs_crossdir_core::unfinished(view) {
        Ok(unfinished) if unfinished.is_empty() => {}
        other => wrong.push(format!("unfinished transactions: {other:?}")),
    }
    match eggs_crossdir_core::finished_not_retired(view) {
        Ok(finished) if finished.is_empty() => {}
        other => wrong.push(format!("transactions not retired: {other:?}")),
    }
}
