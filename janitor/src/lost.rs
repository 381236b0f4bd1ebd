//! Disks that are away: given up after a while, not too many (JA-4).

use std::sync::Arc;
use std::time::{Duration, Instant};

use eggs_janitor_core::lost::{Watch, silent};
use eggs_janitor_core::{Disks, Presence};
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{BlockServiceId, Time, flags, pb};

use crate::context::Context;

const LOOK: Duration = Duration::from_secs(1);

pub(crate) async fn run(context: &Context) {
    let (mut watch, limits, began) = (Watch::default(), context.settings.limits(), Instant::now());
    loop {
        context.until_it_works().await;
        // No look at all rather than one at what was: looks too far apart begin anew.
        if let Some(map) = seen(context).await {
            let now = Time(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX));
            let (disks, empty) = (Disks::of(&map), context.empty());
            let gone = |id: BlockServiceId| disks.presence(id) == Presence::Gone && !empty.contains(&id);
            let given_up = disks.to_be_emptied().filter(|&id| gone(id)).count();
            let verdict = watch.look(&disks, given_up, &limits, now);
            if !verdict.give_up.is_empty() {
                give_up(context, &map, &verdict.give_up).await;
            }
            match verdict.too_many.len() {
                0 => context.board.repair_on_the_whole(context.now(), |task| task.state.clear()),
                many => {
                    let state = too_many(many, given_up, limits.allowed(disks.len()));
                    context.board.repair_on_the_whole(context.now(), |task| task.state = state);
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Why disks that are away are not given up: with those that were given up and are not empty yet there are too many.
fn too_many(away: usize, given_up: usize, allowed: usize) -> String {
    let disks = |count: usize, be: [&str; 2]| match count {
        1 => format!("1 disk {}", be[0]),
        _ => format!("{count} disks {}", be[1]),
    };
    let mut text = format!("{} away and may be gone for good", disks(away, ["is", "are"]));
    if given_up > 0 {
        let before =
            disks(given_up, ["was given up and is not repaired", "were given up and are not repaired"]);
        text.push_str(&format!(", {before} yet: together"));
    } else {
        text.push(',');
    }
    text.push_str(&format!(
        " more than the {allowed} that are given up unasked: bring them back, or `eggsctl disk decommission` those that are \
         lost"
    ));
    text
}

/// The map, asked for now when a disk may be away: the last one heard may be old.
async fn seen(context: &Context) -> Option<Arc<pb::ClusterMapReply>> {
    let map = context.map.get();
    let quiet = !Disks::of(&map).iter().any(|(_, disk)| silent(disk));
    let map = if quiet { map } else { Arc::new(context.registry.map(false).await.ok()?) };
    can_be_believed(&map, context.boot).then_some(map)
}

/// The registry has heard of everybody, and this janitor is the one that works.
fn can_be_believed(map: &pb::ClusterMapReply, boot: u64) -> bool {
    !map.listening && map.janitor.as_ref().is_some_and(|janitor| janitor.alive && janitor.boot == boot)
}

async fn give_up(context: &Context, map: &pb::ClusterMapReply, disks: &[BlockServiceId]) {
    for id in disks {
        let path = map.block_services.iter().find(|info| info.id == id.0).map_or("", |info| &info.path);
        tracing::warn!(block_service = %id, path, away_for = ?context.settings.lost_after, "disk given up: its blocks are made anew");
    }
    metrics::counter!("eggs_janitor_disks_given_up_total").increment(disks.len() as u64);
    let block_services = disks.iter().map(|id| id.0).collect();
    let set = pb::SetFlags { block_services, set: flags::DECOMMISSIONED, clear: 0 };
    match context.registry.call(Op::SetFlags(set)).await {
        Ok(_) => {
            context.map.refresh();
            context.damage.notify_one();
        }
        Err(error) => tracing::warn!(%error, "disks that are lost could not be given up yet"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_up_before_is_said() {
        let text = too_many(3, 0, 2);
        assert!(
            text.starts_with("3 disks are away and may be gone for good, more than the 2 that"),
            "{text}"
        );
        let text = too_many(2, 4, 2);
        assert!(
            text.starts_with(
                "2 disks are away and may be gone for good, 4 disks were given up and are not repaired yet: together \
                 more than the 2 that are given up unasked"
            ),
            "{text}"
        );
        assert!(too_many(1, 2, 2).starts_with("1 disk is away"));
    }

    #[test]
    fn only_the_janitor_that_works_believes_a_registry_that_has_heard_of_all() {
        let janitor = pb::JanitorInfo { boot: 7, alive: true, ..Default::default() };
        let map = pb::ClusterMapReply { janitor: Some(janitor.clone()), ..Default::default() };
        assert!(can_be_believed(&map, 7));
        assert!(!can_be_believed(&map, 8), "another one works");
        assert!(!can_be_believed(&pb::ClusterMapReply { listening: true, ..map.clone() }, 7));
        let dead = pb::JanitorInfo { alive: false, ..janitor };
        assert!(!can_be_believed(&pb::ClusterMapReply { janitor: Some(dead), ..map }, 7));
    }
}
