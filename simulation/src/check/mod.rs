//! What must hold when all is quiet. (What must hold at every moment is in [`crate::oracle`].)
//!
//! **How the history is checked.** Twice, by methods that share nothing but the clients' records:
//!
//! 1. [`edges`]: against a witness. The shards keep every version of every edge with its instants; held against
//!    what the clients were told, every acknowledged effect must be there at its very instant and no other effect at
//!    all, the instants must not go against real time, and every read (of now and of the past) must have been so.
//!    This is stronger than linearizability (the order is given, not searched for), and it also finds writes that
//!    were lost, done twice or done though refused.
//! 2. [`registers`] and [`linear`]: by search. Each (directory, name) and each mode is a register; for each
//!    a search in the manner of Wing and Gong with memory (Porcupine's) looks for an order of all writes and reads that
//!    fits calls, answers and values. It does not look at instants, so an error of the shards' clocks cannot
//!    hide from it, and it is the one check of modes, which have no versions.
//!
//! Operations on two edges (moves) are two writes to the search; that they have both effects or none is the witness's
//! matter. [`tree`] looks at the rows as they are, [`replicas`] at all replicas, [`repaired`] at the blocks, [`rest`] at a
//! cluster that sleeps; [`run`] adds the audit of every file and the rebuilding of every state.

pub(crate) mod edges;
pub(crate) mod facts;
pub(crate) mod linear;
pub(crate) mod registers;
pub(crate) mod repaired;
pub(crate) mod replicas;
pub(crate) mod rest;
pub(crate) mod tree;

use std::cell::RefCell;
use std::rc::Rc;

use eggs_proto::InodeId;
use eggs_proto::limits::EDEN_DEADLINE;

use crate::client::calls::Calls;
use crate::client::files::FileError;
use crate::client::port::Port;
use crate::history::contents;
use crate::kernel::SECOND;
use crate::world::{World, with_replica};
use facts::Facts;
use registers::Searched;
use rest::Rest;

/// What was looked at.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Audited {
    /// Files whose bytes were compared.
    pub files: usize,
    pub versions: usize,
    pub searched: Searched,
    pub rest: Rest,
}

/// All checks; what is wrong, in words.
pub(crate) fn run(world: &mut World) -> Result<Audited, Vec<String>> {
    let mut wrong = Vec::new();
    // As faults have left it: with what is lost and damaged, every file reads back.
    let facts = Facts::read(world).map_err(|error| vec![error])?;
    audit(world, &facts, &mut wrong);
    repaired::work_off(world, &mut wrong);
    let facts = Facts::read(world).map_err(|error| vec![error])?;
    let mut audited = Audited {
        files: facts.files.len(),
        versions: facts.versions.values().map(Vec::len).sum(),
        ..Audited::default()
    };
    tree::check(world, &facts, &mut wrong);
    let changes = edges::check(&world.common.history.borrow(), &facts, &mut wrong);
    audited.searched = registers::check(&world.common.history.borrow(), &changes, &mut wrong);
    replicas::check(world, &mut wrong);
    repaired::check(world, &facts, &mut wrong);
    if wrong.is_empty() {
        audit(world, &facts, &mut wrong);
    }
    if wrong.is_empty() {
        expiry(world, &mut wrong);
    }
    if wrong.is_empty() {
        audited.rest = rest::check(world, &mut wrong);
    }
    if wrong.is_empty() {
        rebuild(world, &mut wrong);
    }
    wrong.extend(world.common.history.borrow().failures.iter().cloned());
    if wrong.is_empty() { Ok(audited) } else { Err(wrong) }
}

/// Files whose writers went away lose them when their time is over, and nothing else changes.
fn expiry(world: &mut World, wrong: &mut Vec<String>) {
    world.kernel.jump(3 * EDEN_DEADLINE.as_nanos() as u64);
    if let Err(error) = world.quiet() {
        return wrong.push(error);
    }
    let facts = Facts::read(world);
    for (file, _) in facts.iter().flat_map(|facts| &facts.eden).filter(|(_, expired)| !expired) {
        wrong.push(format!("file {file} in writing is past its deadline and has not expired"));
    }
    repaired::work_off(world, wrong);
    match Facts::read(world) {
        Ok(facts) => {
            for (file, _) in facts.eden.iter().take(5) {
                wrong.push(format!("of file {file}, which nobody writes, something is left for ever"));
            }
            tree::check(world, &facts, wrong);
            replicas::check(world, wrong);
            repaired::check(world, &facts, wrong);
        }
        Err(error) => wrong.push(error),
    }
}

/// Every file that has or had a name reads back byte for byte.
fn audit(world: &mut World, facts: &Facts, wrong: &mut Vec<String>) {
    let files: Vec<(InodeId, u64, Vec<u8>)> = facts
        .files
        .iter()
        .filter_map(|(&inode, file)| {
            let size = world.common.history.borrow().get(file.uid)?.size;
            Some((inode, file.size, contents(world.seed, file.uid, size)))
        })
        .collect();
    let found: Rc<RefCell<Vec<String>>> = Rc::default();
    let (shards, report) = (world.common.shards, Rc::clone(&found));
    let task = move |port: Port| -> crate::client::Task {
        Box::pin(async move {
            let calls = Calls::new(port);
            calls.join(shards).await;
            for (inode, size, expected) in files {
                let until = calls.port.now() + 60 * SECOND;
                let problem = match calls.read_file(inode, size, until).await {
                    Ok(bytes) if bytes == expected => continue,
                    Ok(bytes) => format!("{} bytes that are not the {} written", bytes.len(), expected.len()),
                    Err(FileError::GaveUp) => "no answer".to_owned(),
                    Err(error) => format!("{error:?}"),
                };
                report.borrow_mut().push(format!("file {inode}: {problem}"));
            }
        })
    };
    if let Err(error) = world.run_task(task) {
        wrong.push(error);
    }
    wrong.extend(found.borrow().iter().take(10).cloned());
}

/// Snapshot and log alone give the state that is served.
fn rebuild(world: &mut World, wrong: &mut Vec<String>) {
    let kernel = &mut world.kernel;
    for (at, node) in world.nodes.iter_mut().enumerate() {
        let rebuilt = with_replica!(node, |replica, me| replica.rebuild_equals(kernel, &me));
        if let Some(Err(error)) = rebuilt {
            wrong.push(format!("n{at} rebuilt from snapshots and log: {error}"));
        }
    }
}
