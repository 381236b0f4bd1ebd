//! What is due in words: disks to be emptied, spans at risk, a janitor that is missing.

use std::collections::BTreeMap;
use std::time::Duration;

use eggs_proto::limits::NOTHING_AT_RISK;
use eggs_proto::{BlockServiceId, Time, flags, pb};
use pb::JanitorTaskKind::{JanitorTaskRepair, JanitorTaskSpread};

use crate::summary::{Reason, State};
use crate::troubles::duration;

/// How far a disk that is to be emptied is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Emptying<'a> {
    /// Nothing that anybody needs is on it any more.
    Empty,
    /// A janitor is at it.
    Going(&'a pb::JanitorTask),
    /// No janitor has begun.
    Waiting,
}

/// How far the disks are that are to be emptied, in the order of their ids.
pub fn emptying(map: &pb::ClusterMapReply) -> Vec<(&pb::BlockServiceInfo, Emptying<'_>)> {
    let tasks: BTreeMap<u64, &pb::JanitorTask> = map
        .janitor
        .iter()
        .flat_map(|janitor| &janitor.tasks)
        .filter(|task| task.kind() == JanitorTaskRepair && task.about != 0)
        .map(|task| (task.about, task))
        .collect();
    let disks = map.block_services.iter().filter(|info| info.flags & flags::DECOMMISSIONED != 0);
    let state = |info: &pb::BlockServiceInfo| match tasks.get(&info.id) {
        None => Emptying::Waiting,
        Some(task) if task.least_redundancy == NOTHING_AT_RISK => Emptying::Empty,
        Some(task) => Emptying::Going(task),
    };
    disks.map(|info| (info, state(info))).collect()
}

/// The worst first.
pub(crate) fn reasons(map: &pb::ClusterMapReply) -> Vec<Reason> {
    let mut texts = Vec::new();
    let tasks = map.janitor.iter().flat_map(|janitor| &janitor.tasks);
    let repairs = || tasks.clone().filter(|task| task.kind() == JanitorTaskRepair);
    // A span may be on several disks; those of damaged blocks that are on none of these are of no disk's task.
    let on_disks = repairs().filter(|task| task.about != 0).map(|task| task.spans_lost).max().unwrap_or(0);
    let elsewhere = repairs().filter(|task| task.about == 0).map(|task| task.spans_lost).max().unwrap_or(0);
    let lost = match on_disks.saturating_add(elsewhere) {
        0 => None,
        1 => Some("1 span has lost more blocks than its parity".to_owned()),
        lost => Some(format!("{lost} spans have lost more blocks than their parity")),
    };
    texts.extend(lost.map(|lost| format!("{lost}: `eggsctl verify -r /` says which files that is")));
    let emptying = emptying(map);
    let going = emptying.iter().filter_map(|(info, state)| match state {
        Emptying::Going(task) => Some(format!("{} {}: {}", verb(info), name(info), progress(task))),
        Emptying::Waiting if map.janitor.is_some() => {
            Some(format!("{} {}: it waits for the janitor", verb(info), name(info)))
        }
        _ => None,
    });
    texts.extend(going);
    let waiting = emptying.iter().any(|(_, state)| *state == Emptying::Waiting);
    match &map.janitor {
        Some(janitor) if !janitor.alive => {
            let silent = Time(map.now).since(Time(janitor.last_seen)).as_secs();
            texts.push(format!(
                "the janitor (host {}) was not heard of for {}: nothing is repaired, checked or erased",
                janitor.host,
                duration(silent)
            ));
        }
        None if waiting && !map.listening => {
            texts.push("disks are to be emptied and there is no janitor (eggs-janitor)".to_owned());
        }
        _ => {}
    }
    // What the janitor could not do, or waits for people to decide.
    let stuck =
        tasks.filter(|task| task.about == 0 && task.kind() == JanitorTaskRepair && !task.state.is_empty());
    texts.extend(stuck.map(|task| format!("repair: {}", task.state)));
    texts.into_iter().map(|text| Reason { state: State::Degraded, text }).collect()
}

fn verb(info: &pb::BlockServiceInfo) -> &'static str {
    if flags::readable(info.flags) { "emptying disk" } else { "repairing disk" }
}

fn name(info: &pb::BlockServiceInfo) -> String {
    if info.path.is_empty() { BlockServiceId(info.id).to_string() } else { info.path.clone() }
}

/// `12 % of 3.1 TiB, 20 min left`.
pub fn progress(task: &pb::JanitorTask) -> String {
    if task.bytes_total == 0 && task.spans_total == 0 {
        return if task.state.is_empty() { "looking what is on it".to_owned() } else { task.state.clone() };
    }
    let part = |done: u64, total: u64| u128::from(done.min(total)) * 100 / u128::from(total.max(1));
    let mut text = match task.bytes_total {
        0 => format!("{} of {} spans", task.spans_done.min(task.spans_total), task.spans_total),
        total => format!("{} % of {}", part(task.bytes_done, total), bytes(total)),
    };
    if let Some(left) = left(task) {
        text.push_str(&format!(", {} left", duration(left.as_secs())));
    }
    if !task.state.is_empty() {
        text.push_str(&format!("; {}", task.state));
    }
    text
}

/// Spans two of whose blocks share a disk or a failure domain, and all spans with blocks; `None`: nobody has counted.
pub fn under_spread(map: &pb::ClusterMapReply) -> Option<(u64, u64)> {
    let mut tasks = map.janitor.iter().flat_map(|janitor| &janitor.tasks);
    let task = tasks.find(|task| task.kind() == JanitorTaskSpread)?;
    Some((task.spans_total.saturating_sub(task.spans_done), task.spans_total))
}

/// As people say it.
pub fn task_kind(kind: pb::JanitorTaskKind) -> &'static str {
    match kind {
        pb::JanitorTaskKind::JanitorTaskRepair => "repair",
        pb::JanitorTaskKind::JanitorTaskScrub => "scrub",
        pb::JanitorTaskKind::JanitorTaskRebalance => "rebalance",
        pb::JanitorTaskKind::JanitorTaskGarbage => "garbage",
        pb::JanitorTaskKind::JanitorTaskRestripe => "restripe",
        pb::JanitorTaskKind::JanitorTaskSpread => "spread",
        pb::JanitorTaskKind::JanitorTaskUnspecified => "unknown",
    }
}

/// How long a task has to go on, at its pace of now.
pub fn left(task: &pb::JanitorTask) -> Option<Duration> {
    let bytes = task.bytes_total.checked_sub(task.bytes_done).filter(|&left| left > 0)?;
    (task.bytes_per_second > 0).then(|| Duration::from_secs(bytes.div_ceil(task.bytes_per_second)))
}

/// As people say it: `1.5 GiB`, the units of all of eggsctl and of the dashboard.
pub fn bytes(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}
