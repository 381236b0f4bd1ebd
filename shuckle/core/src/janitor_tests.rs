//! One janitor works, what it says is shown, its jobs are kept.

use std::time::Duration;

use eggs_machine::MemoryTable;
use eggs_proto::flags::{DECOMMISSIONED, NO_READ};
use eggs_proto::limits::{NOTHING_AT_RISK, STALE_AFTER};
use eggs_proto::{InodeId, InodeType, ShardId};
use pb::JanitorTaskKind::{JanitorTaskRepair, JanitorTaskRestripe, JanitorTaskScrub};
use pb::registry_request::Op;

use super::*;
use crate::machine::tests::{apply, founded, report};
use crate::summary::State;

const SECOND: u64 = 1_000_000_000;

struct Registry {
    table: MemoryTable,
    health: Health,
    now: u64,
    logged: usize,
}

impl Registry {
    /// With three disks.
    fn new() -> Registry {
        let mut table = MemoryTable::default();
        apply(&mut table, 1, founded(1, 1));
        let health = Health::new(Time(1000 * SECOND), Duration::ZERO);
        let mut registry = Registry { table, health, now: 1000 * SECOND, logged: 0 };
        registry.disks(|_| {});
        registry
    }

    fn disks(&mut self, change: impl Fn(&mut pb::BlockServiceReport)) {
        let mut block_services: Vec<_> = (1..=3).map(report).collect();
        block_services.iter_mut().for_each(change);
        self.ok(Op::RegisterBlockServices(pb::RegisterBlockServices {
            address: "b:1".into(),
            failure_domain: "rack".into(),
            block_services,
            ..Default::default()
        }));
    }

    fn request(&mut self, op: Op) -> Reply {
        match self.health.request(&self.table, &op, true, Time(self.now)).unwrap() {
            Step::Answer(reply) => reply,
            Step::Log(command) => {
                self.logged += 1;
                self.now += 1;
                apply(&mut self.table, self.now, command.command.unwrap())
            }
        }
    }

    fn ok(&mut self, op: Op) {
        assert_eq!(self.request(op), Reply::Registered(pb::Registered {}));
    }

    fn refused(&mut self, op: Op, words: &str) {
        match self.request(op) {
            Reply::Error(error) => assert!(error.message.contains(words), "{}", error.message),
            other => panic!("{other:?}"),
        }
    }

    fn beat(&mut self, boot: u64, tasks: Vec<pb::JanitorTask>, jobs: Vec<pb::JobProgress>) {
        self.ok(Op::RegisterJanitor(janitor(boot, tasks, jobs)));
    }

    fn map(&self) -> pb::ClusterMapReply {
        self.health.map(&self.table, Time(self.now), false).unwrap()
    }

    /// What is due.
    fn texts(&self) -> Vec<String> {
        crate::repairs::reasons(&self.map()).into_iter().map(|reason| reason.text).collect()
    }

    fn job(&mut self, directory: u64) -> pb::Job {
        match self.request(Op::PutJob(restripe(directory))) {
            Reply::Job(job) => job,
            other => panic!("{other:?}"),
        }
    }

    fn cancel(&mut self, id: u64) -> Reply {
        self.request(Op::PutJob(pb::PutJob { id, cancel: true, ..Default::default() }))
    }
}

fn janitor(boot: u64, tasks: Vec<pb::JanitorTask>, jobs: Vec<pb::JobProgress>) -> pb::RegisterJanitor {
    pb::RegisterJanitor { boot, host: "j".into(), address: format!("j:{boot}"), tasks, jobs }
}

fn directory(counter: u64) -> u64 {
    InodeId::new(InodeType::Directory, ShardId(1), counter).0
}

fn restripe(counter: u64) -> pb::PutJob {
    let (kind, path) = (JanitorTaskRestripe.into(), format!("/{counter}"));
    pb::PutJob { id: 0, cancel: false, kind, directory: directory(counter), path }
}

fn repair(about: u64) -> pb::JanitorTask {
    pb::JanitorTask {
        kind: JanitorTaskRepair.into(),
        about,
        spans_done: 12,
        spans_total: 100,
        bytes_done: 372_000_000_000,
        bytes_total: 3_100_000_000_000,
        bytes_per_second: 2_000_000_000,
        ..Default::default()
    }
}

fn progress(id: u64, files_done: u64, done: bool) -> pb::JobProgress {
    pb::JobProgress { id, files_done, done, cursor: "here".into(), ..Default::default() }
}

fn decommission(id: u64, set: u32) -> Op {
    Op::SetFlags(pb::SetFlags { block_services: vec![id], set, clear: 0 })
}

#[test]
fn the_first_janitor_works_until_it_is_not_heard_of() {
    let mut registry = Registry::new();
    assert_eq!(registry.map().janitor, None);
    registry.beat(7, vec![repair(0)], vec![]);
    registry.beat(8, vec![], vec![]);
    let info = registry.map().janitor.unwrap();
    assert_eq!((info.boot, info.alive, info.tasks.len()), (7, true, 1), "RG-18: the other stands by");
    registry.now += u64::try_from(STALE_AFTER.as_nanos()).unwrap();
    assert!(!registry.map().janitor.unwrap().alive);
    assert!(
        registry.texts()[0].starts_with("the janitor (host j) was not heard of for 5 s"),
        "{:?}",
        registry.texts()
    );
    registry.beat(8, vec![], vec![]);
    assert_eq!(registry.map().janitor.unwrap().boot, 8);
    registry.beat(7, vec![], vec![]);
    assert_eq!(registry.map().janitor.unwrap().boot, 8);
    let another_host =
        pb::RegisterJanitor { host: "k".into(), address: "j:8".into(), ..janitor(9, vec![], vec![]) };
    registry.ok(Op::RegisterJanitor(another_host));
    assert_eq!(registry.map().janitor.unwrap().boot, 8, "RG-18: 127.0.0.1 of another host is another place");
    let same_place = pb::RegisterJanitor { address: "j:8".into(), ..janitor(9, vec![], vec![]) };
    registry.ok(Op::RegisterJanitor(same_place));
    assert_eq!(
        registry.map().janitor.unwrap().boot,
        9,
        "one that starts again at its address is taken at once"
    );
    assert_eq!(registry.logged, 1, "RG-7");
}

#[test]
fn what_is_no_janitor_is_refused() {
    let mut registry = Registry::new();
    let refused = [
        (janitor(0, vec![], vec![]), "start"),
        (pb::RegisterJanitor { host: " ".into(), ..janitor(1, vec![], vec![]) }, "host name"),
        (janitor(1, vec![pb::JanitorTask::default()], vec![]), "kind of task"),
        (janitor(1, vec![repair(1); validate::TASKS_MAX + 1], vec![]), "tasks"),
        (janitor(1, vec![pb::JanitorTask { state: "x".repeat(600), ..repair(1) }], vec![]), "state"),
        (janitor(1, vec![], vec![progress(1, 0, false); 2]), "progress of job 1"),
    ];
    for (op, words) in refused {
        registry.refused(Op::RegisterJanitor(op), words);
    }
    assert_eq!(registry.map().janitor, None);
}

#[test]
fn jobs_are_kept_with_how_far_they_are_until_they_are_done_or_cancelled() {
    let mut registry = Registry::new();
    let job = registry.job(5);
    assert_eq!((job.id, &*job.path, job.directory), (1, "/5", directory(5)));
    assert_eq!(registry.job(5).id, 1, "it is under way already");
    assert_eq!(registry.job(6).id, 2);
    registry.beat(7, vec![], vec![progress(1, 10, false), progress(99, 1, false)]);
    let logged = registry.logged;
    registry.beat(7, vec![], vec![progress(1, 10, false)]);
    assert_eq!(registry.logged, logged, "RG-7");
    registry.health = Health::new(Time(registry.now), Duration::ZERO);
    assert_eq!(
        registry.map().jobs[0].progress,
        Some(progress(1, 10, false)),
        "RG-19: it outlives the registry's leader"
    );
    registry.beat(7, vec![], vec![progress(1, 20, true)]);
    registry.beat(7, vec![], vec![progress(1, 0, false)]);
    assert_eq!(registry.map().jobs[0].progress, Some(progress(1, 20, true)), "what is done stays done");
    assert_eq!(registry.job(5).id, 3, "and can be asked for again");
    assert!(matches!(registry.cancel(2), Reply::Job(job) if job.id == 2));
    registry.beat(7, vec![], vec![progress(2, 20, false)]);
    assert_eq!(registry.map().jobs.iter().map(|job| job.id).collect::<Vec<_>>(), [1, 3]);
    assert!(matches!(registry.cancel(2), Reply::Error(error) if error.message == "there is no job 2"));
    for counter in 10..40 {
        let id = registry.job(counter).id;
        registry.beat(7, vec![], vec![progress(id, 1, true)]);
    }
    let jobs = registry.map().jobs;
    assert_eq!((jobs.len(), jobs[0].id), (validate::JOBS_DONE_KEPT + 1, 3), "the last few can be looked at");
}

#[test]
fn a_job_is_to_restripe_a_directory() {
    let mut registry = Registry::new();
    registry.refused(Op::PutJob(pb::PutJob { kind: JanitorTaskScrub.into(), ..restripe(1) }), "restripe");
    registry.refused(Op::PutJob(pb::PutJob { directory: 0, ..restripe(1) }), "no directory");
    registry.refused(Op::PutJob(pb::PutJob { id: 7, ..restripe(1) }), "id from the registry");
    registry.refused(Op::PutJob(pb::PutJob { path: "/a\nb".into(), ..restripe(1) }), "control");
    (0..validate::JOBS_MAX as u64).for_each(|counter| drop(registry.job(counter)));
    registry.refused(Op::PutJob(restripe(9999)), "256 jobs are under way");
}

#[test]
fn bad_blocks_are_listed_until_they_are_forgotten() {
    let mut registry = Registry::new();
    let bad = |service, block| pb::BadBlock { block_service: service, block, file: 9, kind: 2 };
    registry.ok(Op::ReportBlocks(pb::ReportBlocks { blocks: vec![bad(2, 5), bad(1, 6), bad(2, 4)] }));
    let list = |registry: &mut Registry, forget: Vec<pb::BadBlock>| match registry
        .request(Op::ListBadBlocks(pb::ListBadBlocks { forget }))
    {
        Reply::ListBadBlocks(reply) => reply.blocks,
        other => panic!("{other:?}"),
    };
    assert_eq!(list(&mut registry, vec![]), [bad(1, 6), bad(2, 4), bad(2, 5)]);
    assert_eq!(list(&mut registry, vec![bad(1, 6), bad(2, 4), bad(3, 1)]), [bad(2, 5)]);
    assert_eq!(registry.map().block_services[0].reported_blocks, 0);
    assert_eq!(list(&mut registry, vec![bad(2, 5)]), []);
}

#[test]
fn blocks_that_nobody_can_look_at_do_not_hide_the_others() {
    let mut registry = Registry::new();
    let per_service = crate::health::REPORTED_PER_SERVICE_MAX as u64;
    let services = BAD_BLOCKS_PER_REPLY as u64 / per_service + 2;
    registry.ok(Op::RegisterBlockServices(pb::RegisterBlockServices {
        address: "b:1".into(),
        failure_domain: "rack".into(),
        block_services: (1..=services).map(report).collect(),
        ..Default::default()
    }));
    for service in 1..=services {
        let bad = |block| pb::BadBlock { block_service: service, block, file: 9, kind: 2 };
        for from in (1..=per_service).step_by(256) {
            registry.ok(Op::ReportBlocks(pb::ReportBlocks { blocks: (from..from + 256).map(bad).collect() }));
        }
    }
    let mut seen = BTreeSet::new();
    for _ in 0..2 {
        match registry.request(Op::ListBadBlocks(pb::ListBadBlocks { forget: vec![] })) {
            Reply::ListBadBlocks(reply) => {
                assert!(reply.blocks.len() <= BAD_BLOCKS_PER_REPLY);
                seen.extend(reply.blocks.iter().map(|bad| (bad.block_service, bad.block)));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen.len() as u64, services * per_service, "none was forgotten, all were listed");
}

#[test]
fn what_is_due_is_said_until_it_is_done() {
    let mut registry = Registry::new();
    registry.ok(decommission(1, DECOMMISSIONED));
    assert_eq!(registry.texts(), ["disks are to be emptied and there is no janitor (eggs-janitor)"]);
    registry.beat(7, vec![], vec![]);
    assert_eq!(registry.texts(), ["emptying disk /disks/01: it waits for the janitor"]);
    registry.beat(7, vec![repair(1)], vec![]);
    assert_eq!(registry.texts(), ["emptying disk /disks/01: 12 % of 2.8 TiB, 22 min left"]);
    registry.ok(decommission(1, NO_READ));
    let lost = pb::JanitorTask { spans_lost: 3, state: "waits".into(), ..repair(1) };
    registry.beat(7, vec![lost, pb::JanitorTask { state: "3 disks are away".into(), ..repair(0) }], vec![]);
    assert_eq!(
        registry.texts(),
        [
            "3 spans have lost more blocks than their parity: `eggsctl verify -r /` says which files that is",
            "repairing disk /disks/01: 12 % of 2.8 TiB, 22 min left; waits",
            "repair: 3 disks are away"
        ]
    );
    let summary = registry.health.summary(&registry.table, Time(registry.now)).unwrap();
    assert!(summary.reasons.iter().any(|reason| reason.state == State::Degraded));
    let done = pb::JanitorTask { least_redundancy: NOTHING_AT_RISK, ..repair(1) };
    let damaged = pb::JanitorTask { spans_lost: 2, ..repair(0) };
    registry.beat(7, vec![done.clone(), damaged], vec![]);
    assert_eq!(
        registry.texts(),
        ["2 spans have lost more blocks than their parity: `eggsctl verify -r /` says which files that is"],
        "of no disk that is to be emptied"
    );
    registry.beat(7, vec![done], vec![]);
    assert_eq!(registry.texts(), [""; 0]);
}

#[test]
fn what_hosts_say_of_dead_bytes_and_read_only_disks_is_in_the_map() {
    let mut registry = Registry::new();
    registry.disks(|report| {
        report.read_only = report.id == 2;
        report.dead_bytes = 7 * report.id;
    });
    let map = registry.map();
    let said: Vec<(bool, u64)> =
        map.block_services.iter().map(|info| (info.read_only, info.dead_bytes)).collect();
    assert_eq!(said, [(false, 7), (true, 14), (false, 21)]);
    let summary = crate::summarize(&map);
    assert_eq!(summary.total.disks_writable, 2);
    assert!(summary.reasons.iter().any(|reason| reason.text == "1 disk read-only: /disks/02"));
}

#[test]
fn a_disk_is_forgotten_when_it_is_given_up_gone_and_empty() {
    let forget =
        |ids: &[u64]| Op::ForgetBlockServices(pb::ForgetBlockServices { block_services: ids.to_vec() });
    let empty = |id| vec![pb::JanitorTask { least_redundancy: NOTHING_AT_RISK, ..repair(id) }];
    let lose = |report: &mut pb::BlockServiceReport| {
        if report.id == 1 {
            report.problem = "gone".into();
        }
    };
    let mut registry = Registry::new();
    let bad = bad_block(
        BlockServiceId(1),
        5,
        &Reported { file: 9, kind: pb::BadBlockKind::BadBlockMissing, at: Time(1) },
    );
    registry.ok(Op::ReportBlocks(pb::ReportBlocks { blocks: vec![bad] }));
    registry.refused(forget(&[]), "how many");
    registry.refused(forget(&[1, 99]), "is not decommissioned");
    registry.ok(decommission(1, DECOMMISSIONED));
    registry.beat(7, empty(1), vec![]);
    registry.refused(forget(&[1]), "is there");
    registry.disks(lose);
    registry.beat(7, vec![repair(1)], vec![]);
    registry.refused(forget(&[1]), "not empty yet");
    registry.beat(7, empty(1), vec![]);
    registry.now += u64::try_from(STALE_AFTER.as_nanos()).unwrap();
    registry.refused(forget(&[1]), "no janitor");
    registry.beat(7, empty(1), vec![]);
    registry.refused(forget(&[1, 99]), "");
    assert_eq!(registry.map().block_services.len(), 3, "RG-2");
    registry.ok(forget(&[1]));
    let ids = |registry: &Registry| -> Vec<u64> {
        registry.map().block_services.iter().map(|info| info.id).collect()
    };
    assert_eq!(ids(&registry), [2, 3]);
    let logged = registry.logged;
    registry.disks(lose);
    assert_eq!((ids(&registry), registry.logged), (vec![2, 3], logged), "RG-20: its host goes on about it");
    assert_eq!(registry.health.reported(BlockServiceId(1)).count(), 0);
    let unauthorized =
        registry.health.request(&registry.table, &forget(&[2]), false, Time(registry.now)).unwrap();
    let Step::Answer(Reply::Error(error)) = unauthorized else { panic!("{unauthorized:?}") };
    assert_eq!(error.code, RegistryError::Unauthorized.code(), "RG-17");
    // Applied to one that was put back meanwhile: nothing is forgotten.
    let command = Command::ForgetBlockServices(pb::ForgetBlockServices { block_services: vec![2] });
    assert!(matches!(apply(&mut registry.table, 1, command), Reply::Error(_)));
    // Well again: it is as any new disk.
    registry.disks(|_| {});
    assert_eq!(ids(&registry), [1, 2, 3]);
}

#[test]
fn bytes_in_words() {
    let words = [0, 1023, 1024, 1536, 99 << 10, 31 << 39, u64::MAX].map(crate::repairs::bytes);
    assert_eq!(words, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "99.0 KiB", "15.5 TiB", "16.0 EiB"]);
}
