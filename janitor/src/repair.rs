//! Repair in rounds: what needs it is looked for while the most urgent of what was found is done (JA-2).
//!
//! A round goes through the files that have blocks on disks that are to be emptied, and through what was reported. The
//! queue is bounded: what has no room is found by the next round. A round ends when another disk is lost. A disk is empty when
//! a round finds nothing on it, nor a file in writing that may come to have blocks there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use eggs_client::{ClientError, Refusal, Span};
use eggs_janitor_core::{Disks, Need, NoRoom, Queue, SpanKey};
use eggs_proto::limits::NOTHING_AT_RISK;
use eggs_proto::{BlockServiceId, pb};
use pb::JanitorTaskKind::JanitorTaskRepair as Repair;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::context::Context;
use crate::find::{self, Unanswered};
use crate::fix::{self, Fixed};
use crate::lost_spans::LostSpans;

/// Work begins when so many spans were found, or all: so that the most urgent of many come first. …
const HEAD_START: usize = 1024;
/// … But not later than this: what is silent may hold up the finding for long.
const HEAD_START_TIME: Duration = Duration::from_secs(5);
/// Between looks at the map for something to do.
const LOOK: Duration = Duration::from_millis(500);
/// After a round that could not do all, at first; doubled up to the largest.
const PAUSE: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A disk is not said to be empty before it was to be emptied for so long: until then shards may place blocks there, who have
/// not heard of it. What they have placed is listed.
const HEARD_OF: Duration = Duration::from_secs(10);
/// An empty disk is looked at again after this: what was being written when it was drained is there now.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// How far a disk is.
#[derive(Debug, Clone, Default)]
struct Tally {
    done: u64,
    bytes_done: u64,
    /// Found in this round and not done yet.
    left: u64,
    bytes_left: u64,
    /// Of these bytes, those of spans that are lost or have no room: they do not get less now.
    bytes_stuck: u64,
    lost: u64,
    least: Option<i32>,
    /// Spans that are to be tried again, and what came in the way of the last one.
    failed: u64,
    trouble: String,
}

impl Tally {
    /// Of a new round.
    fn anew(&self) -> Tally {
        Tally { done: self.done, bytes_done: self.bytes_done, ..Tally::default() }
    }

    /// One of its spans was tried, and still has so many bytes here.
    fn not_done(&mut self, bytes: u64, why: &Left) {
        match why {
            Left::Lost => {
                (self.left, self.lost) = (self.left.saturating_sub(1), self.lost + 1);
                self.bytes_stuck += bytes;
            }
            Left::NoRoom(trouble) => {
                self.bytes_stuck += bytes;
                (self.failed, self.trouble) = (self.failed + 1, trouble.clone());
            }
            Left::Failed(trouble) => (self.failed, self.trouble) = (self.failed + 1, trouble.clone()),
        }
    }

    /// Nothing that is left of what was found can be done now.
    fn stands_still(&self) -> bool {
        self.bytes_stuck > 0 && self.bytes_left <= self.bytes_stuck
    }
}

/// Why a span is not repaired.
enum Left {
    Lost,
    NoRoom(String),
    Failed(String),
}

pub(crate) async fn run(context: &Arc<Context>) {
    let mut tallies: BTreeMap<BlockServiceId, Tally> = BTreeMap::new();
    let mut empty: BTreeMap<BlockServiceId, Instant> = BTreeMap::new();
    let mut known: BTreeMap<BlockServiceId, Instant> = BTreeMap::new();
    let (mut no_room, mut lost) = (NoRoom::default(), LostSpans::default());
    let mut pause = PAUSE;
    loop {
        context.until_it_works().await;
        let disks = context.disks();
        let emptied =
            |id: &BlockServiceId| disks.get(*id).is_some_and(eggs_janitor_core::Disk::to_be_emptied);
        empty.retain(|id, since| emptied(id) && since.elapsed() < LOOK_AGAIN);
        tallies.retain(|id, _| emptied(id));
        known.retain(|id, _| emptied(id));
        for id in disks.to_be_emptied() {
            known.entry(id).or_insert_with(Instant::now);
        }
        let fresh = known.iter().filter(|(_, since)| since.elapsed() < HEARD_OF).map(|(&id, _)| id).collect();
        context.board.retain(Repair, |about| about == 0 || emptied(&BlockServiceId(about)));
        let services = find::to_empty(&disks, &empty.keys().copied().collect());
        let reports = context.map.get().block_services.iter().any(|info| info.reported_blocks > 0);
        if services.is_empty() && !reports {
            pause = PAUSE;
            LostSpans::default().tell(context, &lost);
            lost = LostSpans::default();
            tokio::time::sleep(LOOK).await;
            continue;
        }
        no_room.look(&disks);
        let round = Round::new(context, disks, tallies.clone(), fresh, no_room);
        let (nothing_on, found) = round.go(&services).await;
        empty.extend(nothing_on.into_iter().map(|id| (id, Instant::now())));
        if let Err(error) = &found {
            tracing::warn!(%error, "not everything that needs repair could be found");
        }
        context.set_empty(empty.keys().copied().collect());
        let (done, failed) = round.counts();
        tallies = round.take_tallies();
        no_room = std::mem::take(&mut *lock(&round.no_room));
        let mut lost_now = std::mem::take(&mut lock(&round.progress).lost);
        if found.is_err() || round.is_overtaken() {
            lost_now.extend(&lost);
        }
        lost_now.tell(context, &lost);
        lost = lost_now;
        if done > 0 && failed == 0 && found.is_ok() {
            pause = PAUSE;
        }
        let wait = if done > 0 { PAUSE } else { pause };
        tokio::select! {
            () = tokio::time::sleep(wait) => pause = (pause * 2).min(PAUSE_MAX),
            () = context.damage.notified() => pause = PAUSE,
            () = round.overtaken() => pause = PAUSE,
        }
    }
}

#[derive(Debug)]
struct Round {
    context: Arc<Context>,
    began: Instant,
    disks: Disks,
    /// To be emptied for a moment only.
    fresh: BTreeSet<BlockServiceId>,
    queue: Mutex<Queue>,
    /// Spans that there was no room for in the rounds before.
    no_room: Mutex<NoRoom>,
    /// There is something in the queue, or never will be.
    more: Notify,
    found_all: AtomicBool,
    bad: Mutex<Arc<fix::Bad>>,
    /// Spans with reported blocks, and the reports.
    reports: Mutex<BTreeMap<SpanKey, Vec<pb::BadBlock>>>,
    forget: Mutex<Vec<pb::BadBlock>>,
    progress: Mutex<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    tallies: BTreeMap<BlockServiceId, Tally>,
    /// On which disks the spans of the queue have how many bytes that are to go.
    parts: BTreeMap<SpanKey, Vec<(BlockServiceId, u64)>>,
    lost: LostSpans,
    done: u64,
    failed: u64,
    /// Disks that have blocks of files that are not published.
    waiting: BTreeMap<BlockServiceId, String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Round {
    fn new(
        context: &Arc<Context>,
        disks: Disks,
        mut tallies: BTreeMap<BlockServiceId, Tally>,
        fresh: BTreeSet<BlockServiceId>,
        no_room: NoRoom,
    ) -> Arc<Round> {
        for tally in tallies.values_mut() {
            *tally = tally.anew();
        }
        Arc::new(Round {
            context: Arc::clone(context),
            began: Instant::now(),
            disks,
            fresh,
            queue: Mutex::default(),
            no_room: Mutex::new(no_room),
            more: Notify::new(),
            found_all: AtomicBool::new(false),
            bad: Mutex::default(),
            reports: Mutex::default(),
            forget: Mutex::default(),
            progress: Mutex::new(Progress { tallies, ..Progress::default() }),
        })
    }

    /// Finds and repairs; the disks that nothing was found on, and what did not answer.
    async fn go(
        self: &Arc<Self>,
        services: &[BlockServiceId],
    ) -> (Vec<BlockServiceId>, Result<(), ClientError>) {
        let mut workers = JoinSet::new();
        for _ in 0..self.context.settings.repairs_in_flight {
            let round = Arc::clone(self);
            workers.spawn(async move { round.work().await });
        }
        let mut overtaken = std::pin::pin!(self.overtaken());
        let ((nothing_on, found), mut over) = tokio::select! {
            found = self.find(services) => (found, false),
            () = &mut overtaken => ((Vec::new(), Ok(())), true),
        };
        loop {
            if over {
                *lock(&self.queue) = Queue::default();
            }
            self.found_all.store(true, Ordering::Release);
            self.more.notify_waiters();
            tokio::select! {
                ended = workers.join_next() => if ended.is_none() { break },
                () = &mut overtaken, if !over => over = true,
            }
        }
        let forget = std::mem::take(&mut *lock(&self.forget));
        if !forget.is_empty()
            && let Err(error) = self.context.bad_blocks(forget).await
        {
            tracing::debug!(%error, "reports of blocks that are right are not forgotten yet");
        }
        self.tell(services, &nothing_on, found.as_ref().err());
        (nothing_on, found)
    }

    /// Another disk is lost: what waits is found again by the next round, in the order that is right now.
    async fn overtaken(&self) {
        while !self.is_overtaken() {
            tokio::time::sleep(LOOK).await;
        }
    }

    fn is_overtaken(&self) -> bool {
        self.disks.are_overtaken(&self.context.disks())
    }

    /// The disks that nothing was found on, and what did not answer.
    async fn find(&self, services: &[BlockServiceId]) -> (Vec<BlockServiceId>, Result<(), ClientError>) {
        // Beside each other: reported blocks of a host that is silent do not hold up what is lost.
        let (reported, (nothing_on, on_disks)) =
            tokio::join!(self.find_reported(), self.find_on_disks(services));
        (nothing_on, reported.and(on_disks))
    }

    async fn find_on_disks(
        &self,
        services: &[BlockServiceId],
    ) -> (Vec<BlockServiceId>, Result<(), ClientError>) {
        let (mut nothing_on, mut unanswered) = (Vec::new(), Unanswered::default());
        for &service in services {
            let mut any = false;
            let unpublished = find::on_disk(&self.context, service, &mut unanswered, |key, span| {
                any = true;
                self.found(key, span, service);
            });
            let Some(unpublished) = unpublished.await else { continue };
            if unpublished > 0 {
                let state = format!(
                    "{unpublished} files in writing, or left by their writers, end by their deadlines"
                );
                self.update(service, |_| {});
                lock(&self.progress).waiting.insert(service, state);
            } else if !any && self.fresh.contains(&service) {
                let state = "what is being placed there still is waited for".to_owned();
                self.update(service, |_| {});
                lock(&self.progress).waiting.insert(service, state);
            } else if !any {
                nothing_on.push(service);
            }
        }
        (nothing_on, unanswered.result())
    }

    async fn find_reported(&self) -> Result<(), ClientError> {
        let reports = match self.context.bad_blocks(Vec::new()).await {
            Ok(reports) => reports,
            Err(error) => {
                tracing::debug!(%error, "what was reported is not known");
                return Ok(());
            }
        };
        if reports.is_empty() {
            return Ok(());
        }
        let mut unanswered = Unanswered::default();
        let looked = find::reported(&self.context, &self.disks, reports, &mut unanswered).await;
        lock(&self.forget).extend(looked.forget);
        let bad = Arc::new(looked.bad);
        *lock(&self.bad) = Arc::clone(&bad);
        for (key, (span, reports)) in looked.spans {
            lock(&self.reports).insert(key, reports);
            self.offer(key, &Need::of(&span, &self.disks, &bad));
        }
        unanswered.result()
    }

    fn found(&self, key: SpanKey, span: &Span, service: BlockServiceId) {
        // With what is known to be bad: it may be in the queue, as urgent as that makes it.
        let need = Need::of(span, &self.disks, &lock(&self.bad));
        let on = |block: &&pb::Block| block.block_service == service.0;
        let blocks = span.blocks.iter().flat_map(|blocks| &blocks.blocks).filter(on).count() as u64;
        let bytes = blocks * need.block_bytes;
        lock(&self.progress).parts.entry(key).or_default().push((service, bytes));
        self.update(service, |tally| {
            tally.left += 1;
            tally.bytes_left += bytes;
            let least = tally.least.unwrap_or(i32::MAX);
            tally.least = Some(least.min(need.redundancy));
        });
        self.offer(key, &need);
    }

    fn offer(&self, key: SpanKey, need: &Need) {
        let no_room = lock(&self.no_room).contains(key);
        let dropped = lock(&self.queue).offer(key, need.urgency(no_room));
        if let Some(dropped) = dropped {
            lock(&self.progress).parts.remove(&dropped);
        }
        self.more.notify_one();
    }

    /// A worker's next span; `None`: there are no more.
    async fn next(&self) -> Option<SpanKey> {
        loop {
            let mut waiting = std::pin::pin!(self.more.notified());
            waiting.as_mut().enable();
            // Asked before the queue is: what was found last is in it then.
            let all = self.found_all.load(Ordering::Acquire);
            match self.pop(all) {
                Some(key) => return Some(key),
                None if all => return None,
                // In vain, perhaps: but the time of the head start is over then.
                None => drop(tokio::time::timeout(HEAD_START_TIME, waiting).await),
            }
        }
    }

    fn pop(&self, all: bool) -> Option<SpanKey> {
        let mut queue = lock(&self.queue);
        if all || work_begins(queue.len(), self.began.elapsed()) {
            queue.pop().map(|(key, _)| key)
        } else {
            None
        }
    }

    async fn work(&self) {
        while let Some(key) = self.next().await {
            let bad = Arc::clone(&lock(&self.bad));
            let fixed = fix::fix(&self.context, key, &bad).await;
            self.finished(key, fixed);
        }
    }

    fn finished(&self, key: SpanKey, fixed: Result<Fixed, ClientError>) {
        let parts = lock(&self.progress).parts.remove(&key).unwrap_or_default();
        match fixed {
            Ok(fixed) => {
                lock(&self.no_room).remove(key);
                if fixed.lost {
                    lock(&self.progress).lost.insert(key, !parts.is_empty());
                }
                let replaced = fix::by_service(&fixed.replaced);
                for (service, found) in parts {
                    let bytes = replaced.get(&service).copied().unwrap_or(0) * fixed.block_bytes;
                    self.update(service, |tally| {
                        tally.bytes_left = tally.bytes_left.saturating_sub(bytes);
                        tally.bytes_done += bytes;
                        if fixed.lost {
                            tally.not_done(found.saturating_sub(bytes), &Left::Lost);
                        } else {
                            (tally.left, tally.done) = (tally.left.saturating_sub(1), tally.done + 1);
                        }
                    });
                }
                lock(&self.progress).done += u64::from(!fixed.replaced.is_empty());
                if let Some(reports) = lock(&self.reports).remove(&key).filter(|_| !fixed.lost) {
                    lock(&self.forget).extend(reports);
                }
                if !fixed.replaced.is_empty() {
                    tracing::debug!(file = %key.file, offset = key.offset, blocks = fixed.replaced.len(), bytes = fixed.bytes(), "span repaired");
                }
            }
            Err(error) => {
                let no_room = error.refusal() == Some(Refusal::NoSpace);
                if no_room && !lock(&self.no_room).insert(key) {
                    tracing::debug!(file = %key.file, offset = key.offset, %error, "span not repaired yet");
                } else {
                    tracing::warn!(file = %key.file, offset = key.offset, %error, "span not repaired yet");
                }
                let trouble = error.to_string();
                let why = if no_room { Left::NoRoom(trouble) } else { Left::Failed(trouble) };
                for (service, bytes) in parts {
                    self.update(service, |tally| tally.not_done(bytes, &why));
                }
                lock(&self.progress).failed += 1;
            }
        }
    }

    fn update(&self, service: BlockServiceId, change: impl FnOnce(&mut Tally)) {
        let tally = {
            let mut progress = lock(&self.progress);
            let tally = progress.tallies.entry(service).or_default();
            change(tally);
            tally.clone()
        };
        self.context.board.update(Repair, service.0, self.context.now(), |task| {
            task.spans_done = tally.done;
            task.spans_total = tally.done + tally.left + tally.lost;
            task.bytes_done = tally.bytes_done;
            task.bytes_total = tally.bytes_done + tally.bytes_left;
            task.spans_lost = tally.lost;
            task.least_redundancy = match tally.least {
                Some(least) => clamped(least),
                None if task.least_redundancy == NOTHING_AT_RISK => 0,
                None => task.least_redundancy,
            };
        });
        if tally.stands_still() && self.found_all.load(Ordering::Acquire) {
            self.context.board.stand_still(Repair, service.0, self.context.now());
        }
    }

    /// What came of the round, disk by disk.
    fn tell(
        &self,
        services: &[BlockServiceId],
        nothing_on: &[BlockServiceId],
        unanswered: Option<&ClientError>,
    ) {
        let (tallies, waiting) = {
            let progress = lock(&self.progress);
            (progress.tallies.clone(), progress.waiting.clone())
        };
        for &service in services {
            let board = &self.context.board;
            if nothing_on.contains(&service) {
                board.update(Repair, service.0, self.context.now(), |task| {
                    (task.spans_total, task.bytes_total) = (task.spans_done, task.bytes_done);
                    (task.spans_lost, task.least_redundancy) = (0, NOTHING_AT_RISK);
                    task.state.clear();
                });
            } else {
                let failed = tallies.get(&service).filter(|tally| tally.failed > 0);
                let failed = failed.map(|tally| waits(tally.failed, &tally.trouble));
                let state = failed.or_else(|| waiting.get(&service).cloned());
                let state = state.or_else(|| unanswered.map(ToString::to_string)).unwrap_or_default();
                // What was tried last in the round may have been so before all was found.
                if tallies.get(&service).is_some_and(Tally::stands_still) {
                    board.stand_still(Repair, service.0, self.context.now());
                }
                board.say(Repair, service.0, self.context.now(), state);
            }
        }
    }

    fn counts(&self) -> (u64, u64) {
        let progress = lock(&self.progress);
        (progress.done, progress.failed)
    }

    fn take_tallies(&self) -> BTreeMap<BlockServiceId, Tally> {
        std::mem::take(&mut lock(&self.progress).tallies)
    }
}

fn work_begins(found: usize, after: Duration) -> bool {
    found >= HEAD_START || after >= HEAD_START_TIME
}

fn waits(spans: u64, trouble: &str) -> String {
    match spans {
        1 => format!("1 span waits for the next try: {trouble}"),
        _ => format!("{spans} spans wait for the next try: {trouble}"),
    }
}

fn clamped(redundancy: i32) -> u32 {
    u32::try_from(redundancy).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_urgent_have_a_head_start_that_ends() {
        assert!(!work_begins(HEAD_START - 1, Duration::ZERO));
        assert!(work_begins(HEAD_START, Duration::ZERO));
        assert!(work_begins(1, HEAD_START_TIME), "some shard is silent");
    }

    #[test]
    fn a_disk_stands_still_when_only_what_is_lost_or_has_no_room_is_left() {
        let mut tally = Tally { left: 4, bytes_left: 400, done: 7, ..Tally::default() };
        tally.not_done(100, &Left::Lost);
        tally.not_done(100, &Left::NoRoom("too few disks".to_owned()));
        tally.not_done(100, &Left::Failed("no answer".to_owned()));
        assert!(!tally.stands_still(), "one can be tried again, one was not tried yet");
        assert_eq!((tally.left, tally.lost, tally.failed, &tally.trouble[..]), (3, 1, 2, "no answer"));
        tally.bytes_left -= 200;
        assert!(tally.stands_still());
        assert_eq!((tally.anew().done, tally.anew().failed, tally.anew().bytes_left), (7, 0, 0));
    }

    #[test]
    fn a_span_that_cannot_be_read_has_nothing_to_spare() {
        assert_eq!([-3, 0, 2].map(clamped), [0, 0, 2]);
    }
}
