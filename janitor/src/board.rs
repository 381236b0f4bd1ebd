//! What the janitor is doing, for people: told to the registry with every heartbeat.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use eggs_janitor_core::throttle::Rate;
use eggs_proto::{Time, pb};
use pb::JanitorTaskKind as Kind;

/// Tasks the registry is told of: the most urgent ones.
const TASKS_TOLD_MAX: usize = 128;
/// A task that has moved nothing for a while does not fade for ever: every change is told to all who watch.
const RATE_MIN: u64 = 1000;
/// Of what a task says of itself.
const STATE_BYTES_MAX: usize = 300;

#[derive(Debug, Default)]
pub(crate) struct Board {
    tasks: Mutex<BTreeMap<(i32, u64), Entry>>,
}

#[derive(Debug)]
struct Entry {
    task: pb::JanitorTask,
    rate: Rate,
}

impl Board {
    /// Changes a task, which begins now if it is not there.
    pub fn update(&self, kind: Kind, about: u64, now: Time, change: impl FnOnce(&mut pb::JanitorTask)) {
        change_in(&mut self.lock(), kind, about, now, change);
    }

    /// What is said of repair on the whole, not of one disk; it goes when there is nothing to say.
    pub fn repair_on_the_whole(&self, now: Time, change: impl FnOnce(&mut pb::JanitorTask)) {
        let (mut tasks, kind) = (self.lock(), Kind::JanitorTaskRepair);
        change_in(&mut tasks, kind, 0, now, change);
        let quiet = |entry: &Entry| entry.task.state.is_empty() && entry.task.spans_lost == 0;
        tasks.retain(|&at, entry| at != (i32::from(kind), 0) || !quiet(entry));
    }

    pub fn say(&self, kind: Kind, about: u64, now: Time, state: impl std::fmt::Display) {
        let state = state.to_string();
        self.update(kind, about, now, |task| task.state = state);
    }

    /// What is left of a task cannot be done now: how fast it was says nothing of when it ends.
    pub fn stand_still(&self, kind: Kind, about: u64, now: Time) {
        if let Some(entry) = self.lock().get_mut(&(kind.into(), about)) {
            entry.rate = Rate::new(now);
        }
    }

    /// Of one kind, only those about these stay.
    pub fn retain(&self, kind: Kind, keep: impl Fn(u64) -> bool) {
        self.lock().retain(|&(of, about), _| of != i32::from(kind) || keep(about));
    }

    /// The most urgent first.
    pub fn tasks(&self, now: Time) -> Vec<pb::JanitorTask> {
        let mut tasks: Vec<pb::JanitorTask> = self
            .lock()
            .values_mut()
            .map(|entry| pb::JanitorTask {
                bytes_per_second: Some(entry.rate.bytes_per_second(now))
                    .filter(|&rate| rate >= RATE_MIN)
                    .unwrap_or(0),
                ..entry.task.clone()
            })
            .collect();
        tasks.sort_by_key(|task| (task.kind, task.least_redundancy, task.about));
        tasks.truncate(TASKS_TOLD_MAX);
        tasks
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(i32, u64), Entry>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn change_in(
    tasks: &mut BTreeMap<(i32, u64), Entry>,
    kind: Kind,
    about: u64,
    now: Time,
    change: impl FnOnce(&mut pb::JanitorTask),
) {
    let entry = tasks.entry((kind.into(), about)).or_insert_with(|| {
        let task =
            pb::JanitorTask { kind: kind.into(), about, started_at: now.0, ..pb::JanitorTask::default() };
        Entry { task, rate: Rate::new(now) }
    });
    let before = entry.task.bytes_done;
    change(&mut entry.task);
    // The registry refuses a heartbeat whose words are too long: this janitor would be thought gone.
    entry.task.state = one_line(&entry.task.state);
    entry.rate.add(entry.task.bytes_done.saturating_sub(before), now);
}

fn one_line(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    text[..text.floor_char_boundary(STATE_BYTES_MAX)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_of_repair_on_the_whole_goes_when_nothing_is_left_of_it() {
        let board = Board::default();
        board.update(Kind::JanitorTaskRepair, 7, Time(1), |_| {});
        board.repair_on_the_whole(Time(1), |task| task.state = "2 disks are away".into());
        board.repair_on_the_whole(Time(2), |task| task.spans_lost = 3);
        board.repair_on_the_whole(Time(3), |task| task.state.clear());
        let told = |board: &Board| -> Vec<(u64, u64)> {
            board.tasks(Time(4)).iter().map(|task| (task.about, task.spans_lost)).collect()
        };
        assert_eq!(told(&board), [(0, 3), (7, 0)]);
        board.repair_on_the_whole(Time(5), |task| task.spans_lost = 0);
        assert_eq!(told(&board), [(7, 0)]);
    }

    #[test]
    fn tasks_are_told_with_their_rate_until_they_are_over() {
        let (board, second) = (Board::default(), 1_000_000_000);
        board.update(Kind::JanitorTaskRepair, 7, Time(second), |task| task.bytes_total = 100_000);
        board.update(Kind::JanitorTaskRepair, 7, Time(2 * second), |task| task.bytes_done = 50_000);
        board.say(Kind::JanitorTaskScrub, 0, Time(2 * second), "a\nb");
        board.update(Kind::JanitorTaskRestripe, 0, Time(2 * second), |task| task.state = "/x\n".repeat(500));
        let tasks = board.tasks(Time(2 * second));
        assert_eq!((tasks[0].bytes_per_second, tasks[0].started_at), (50_000, second));
        assert_eq!(tasks[1].state, "a b");
        board.stand_still(Kind::JanitorTaskRepair, 7, Time(2 * second));
        assert_eq!(board.tasks(Time(2 * second))[0].bytes_per_second, 0);
        assert!(tasks[2].state.len() <= STATE_BYTES_MAX && tasks[2].state.starts_with("/x /x "));
        board.retain(Kind::JanitorTaskRepair, |about| about != 7);
        board.retain(Kind::JanitorTaskScrub, |_| false);
        board.retain(Kind::JanitorTaskRestripe, |_| false);
        assert!(board.tasks(Time(3 * second)).is_empty());
        assert!(one_line(&"é".repeat(500)).len() <= STATE_BYTES_MAX);
    }
}
