//! Repair comes to an end, and then every block of every file is right, on a disk that stays, and nothing else is on any disk.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use eggs_proto::{BlockId, flags};

use super::facts::Facts;
use crate::client::janitor::finish;
use crate::client::port::Port;
use crate::kernel::{NodeId, SECOND};
use crate::nodes::blocks::Disk;
use crate::world::{Node, World};

/// Rounds of the janitor after which nothing may be left to do: some for the disks that are away to be given up, and one
/// for every few spans of a run.
const ROUNDS_MAX: usize = 80;

/// Gives the cluster room, and lets a janitor work until nothing is left to do.
pub(crate) fn work_off(world: &mut World, wrong: &mut Vec<String>) {
    if let Err(error) = try_work_off(world) {
        wrong.push(error);
    }
}

fn try_work_off(world: &mut World) -> Result<(), String> {
    // Disks that were given up are no place for repair.
    let hosts = (0..world.nodes.len()).filter(|&at| matches!(world.nodes[at], Node::Blocks(_)));
    for host in hosts.collect::<Vec<_>>() {
        world.add_disk(NodeId(host));
    }
    world.run_for(3 * SECOND)?;
    let outcome = Rc::new(RefCell::new(Ok(())));
    let (common, report) = (Rc::clone(&world.common), Rc::clone(&outcome));
    world.run_task(move |port: Port| -> crate::client::Task {
        Box::pin(async move {
            *report.borrow_mut() = finish(port, common, ROUNDS_MAX).await;
        })
    })?;
    // Followers hear of the last of it a little later.
    world.quiet()?;
    let outcome = outcome.borrow().clone();
    outcome.map_err(|left| format!("repair does not come to an end; the last round found {left:?}"))
}

/// To be asked of a world that was worked off.
pub(crate) fn check(world: &World, facts: &Facts, wrong: &mut Vec<String>) {
    let given_up: BTreeSet<u64> = world
        .map()
        .iter()
        .flat_map(|map| &map.block_services)
        .filter(|info| info.flags & flags::DECOMMISSIONED != 0)
        .map(|info| info.id)
        .collect();
    let stays = |disk: &&Disk| !disk.lost && !given_up.contains(&disk.identity.service.0);
    let disks: BTreeMap<u64, &Disk> =
        world.disks().filter(stays).map(|disk| (disk.identity.service.0, disk)).collect();
    let of_files = facts.blocks.iter().filter(|(file, _)| facts.files.contains_key(file));
    let not_right = of_files.filter(|(_, block)| {
        !disks.get(&block.block_service).is_some_and(|disk| disk.has(BlockId(block.block), block.crc))
    });
    let lines = not_right.map(|(file, block)| {
        let (block, service) = (BlockId(block.block), block.block_service);
        format!("block {block} of file {file} is not on {service:#x}, or not right, or that was given up")
    });
    wrong.extend(lines.take(5));
    for disk in disks.values() {
        unknown(disk, facts, wrong);
    }
    for (file, service, block) in world.common.missing.borrow().iter() {
        let disk = world.disks().find(|disk| disk.identity.service == *service);
        if !disk.is_some_and(|disk| disk.damaged.contains(block)) {
            wrong.push(format!("block {block} on {service}, of a span of {file}, was not there"));
        }
    }
}

/// No block is forgotten: what is on a disk is known from the rows. What came late for a writer that was given up, after
/// its block had been erased, cannot be.
fn unknown(disk: &Disk, facts: &Facts, wrong: &mut Vec<String>) {
    let service = disk.identity.service;
    let of_service = facts.known_blocks.range((service.0, 0)..=(service.0, u64::MAX));
    let known: BTreeSet<BlockId> =
        of_service.map(|&(_, block)| BlockId(block)).chain(disk.erased.iter().copied()).collect();
    let unknown = disk.segments.blocks().filter(|block| !known.contains(block));
    wrong.extend(unknown.take(5).map(|block| format!("{block} on {service} is a block of no file")));
}
