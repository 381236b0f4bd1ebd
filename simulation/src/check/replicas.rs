//! The replicas of every group, when all is quiet: there where they are wanted and nowhere else, and byte for
//! byte the same.

use eggs_consensus_core::GroupId;
use eggs_machine::Row;
use eggs_machine::hash::StateHash;

use crate::kernel::NodeId;
use crate::world::{Node, World};

pub(crate) fn check(world: &World, wrong: &mut Vec<String>) {
    let Some(map) = world.map() else { return wrong.push("no registry leads".to_owned()) };
    for place in &map.groups {
        let Ok(id) = u16::try_from(place.group) else { continue };
        group(world, GroupId(id), wrong);
    }
}

fn group(world: &World, group: GroupId, wrong: &mut Vec<String>) {
    let Some((leader, status)) = world.leading(group) else {
        return wrong.push(format!("nobody leads {group}"));
    };
    let rows = rows(world, leader, group);
    let mut hash = StateHash::default();
    for (key, value) in &rows {
        hash.insert(key, value);
    }
    if hash != status.state_hash {
        wrong.push(format!("{group}: the rows of {leader} have the hash {hash}, not {}", status.state_hash));
    }
    for at in 0..world.nodes.len() {
        let other = NodeId(at);
        let Some(its) = world.status(other, group).filter(|_| other != leader) else { continue };
        if its.membership != status.membership || its.applied_index != status.applied_index {
            wrong.push(format!("{group}: {other} is {its:?}, {leader} is {status:?}"));
        }
        let of_its = self::rows(world, other, group);
        if of_its != rows || its.state_hash != status.state_hash {
            let differs = rows.iter().zip(&of_its).find(|(a, b)| a != b);
            let (here, there) = (rows.len(), of_its.len());
            wrong.push(format!("{group}: {other} has {there} rows, {leader} has {here}; first {differs:?}"));
        }
    }
}

fn rows(world: &World, id: NodeId, group: GroupId) -> Vec<Row> {
    match &world.nodes[id.0] {
        Node::Registry(node) => node.replica.rows(group),
        Node::Shards(node) => node.replica.rows(group),
        Node::Coordinator(node) => node.replica.rows(group),
        Node::Blocks(_) | Node::Client(_) => Vec::new(),
    }
}
