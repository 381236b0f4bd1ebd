//! A cluster at rest says nothing but that it is there, and a group that sleeps wakes when somebody asks, also when
//! its leader is dead.

use std::cell::RefCell;
use std::rc::Rc;

use eggs_proto::{ShardId, pb};
use rand::Rng;
use rand::seq::IndexedRandom;

use crate::client::calls::Calls;
use crate::client::port::Port;
use crate::kernel::{MILLISECOND, SECOND};
use crate::nodes::shards::group_of;
use crate::world::World;

/// Everything is asleep by then, whatever the planner still levels.
const ASLEEP_AFTER_MAX: u64 = 120 * SECOND;
/// For so long not a word of raft is heard.
const SILENCE: u64 = 10 * SECOND;
/// A client's first call is lost on the dead one (1 s), which is noticed after an election timeout (0.6 s) if it
/// was not before; elections take up to two (1.2 s), and one may come to nothing.
pub(crate) const WAKE_MAX: u64 = 5 * SECOND;

/// What rest is like.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rest {
    /// Heartbeats between stores in [`SILENCE`], all pairs together.
    pub heartbeats: u64,
    /// How long the answer of a group took whose leader died asleep.
    pub wake: u64,
}

pub(crate) fn check(world: &mut World, wrong: &mut Vec<String>) -> Rest {
    match rest(world) {
        Ok(rest) => rest,
        Err(error) => {
            wrong.push(error);
            Rest::default()
        }
    }
}

fn rest(world: &mut World) -> Result<Rest, String> {
    let begun = world.kernel.now;
    let heartbeats = loop {
        let (messages, batches) = (world.kernel.oracle.messages, world.kernel.oracle.batches);
        world.run_for(SILENCE)?;
        if world.kernel.oracle.messages == messages {
            break world.kernel.oracle.batches - batches;
        }
        if world.kernel.now - begun > ASLEEP_AFTER_MAX {
            let said = world.kernel.oracle.messages - messages;
            return Err(format!(
                "the cluster is at rest, and its stores said {said} things: {:?}",
                world.awake()
            ));
        }
    };
    let wake = if world.cluster.replicas >= 3 { wake(world)? } else { 0 };
    Ok(Rest { heartbeats, wake })
}

fn wake(world: &mut World) -> Result<u64, String> {
    // People may have left some with fewer.
    let three = |shard: &ShardId| {
        world.leading(group_of(*shard)).is_some_and(|(_, status)| status.membership.voters.len() >= 3)
    };
    let shards: Vec<ShardId> = world.shards().filter(three).collect();
    let Some(&shard) = shards.choose(&mut world.kernel.rng) else { return Ok(0) };
    let Some((leader, _)) = world.leading(group_of(shard)) else { return Err(format!("{shard} is not led")) };
    let died_before = world.kernel.rng.random_range(0..3) * 700 * MILLISECOND;
    // The client knows its way.
    let known: Rc<RefCell<Option<u64>>> = Rc::default();
    let (count, report) = (world.common.shards, Rc::clone(&known));
    let gate = Rc::new(RefCell::new(false));
    let open = Rc::clone(&gate);
    let task = move |port: Port| -> crate::client::Task {
        Box::pin(async move {
            let calls = Calls::new(port);
            calls.join(count).await;
            while !*open.borrow() {
                calls.port.sleep(10 * MILLISECOND).await;
            }
            let (asked, until) = (calls.port.now(), calls.port.now() + 60 * SECOND);
            let stat = pb::shard_request::Op::Stat(pb::Stat { inode: u64::from(shard.0) << 53 });
            if calls.shard(shard, stat, None, until).await.is_ok() {
                *report.borrow_mut() = Some(calls.port.now() - asked);
            }
        })
    };
    world.begin_task(task)?;
    world.run_for(2 * SECOND)?;
    world.crash(leader)?;
    world.run_for(died_before)?;
    *gate.borrow_mut() = true;
    world.end_task()?;
    world.start(leader)?;
    let took = *known.borrow();
    match took {
        Some(took) if took <= WAKE_MAX => Ok(took),
        Some(took) => Err(format!(
            "shard {shard} slept when its leader died, and took {} ms to answer",
            took / MILLISECOND
        )),
        None => Err(format!("shard {shard} slept when its leader died, and does not answer")),
    }
}
