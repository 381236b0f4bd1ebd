//! Heartbeats in, map and summary out; and whatever else may come in.

use eggs_machine::MemoryTable;
use eggs_proto::flags;
use eggs_proto::limits::{SLOW_TRANSACTIONS_MAX, TRANSACTION_STEP_BYTES_MAX};
use pb::StoreKind::{self, StoreCrossdir, StoreShard, StoreShuckle};
use proptest::prelude::*;

use super::*;
use crate::machine::tests::{apply, founded, report};
use crate::plan;
use crate::summary::State;

const SECOND: u64 = 1_000_000_000;
const START: u64 = 1_000 * SECOND;

/// The registry: what is logged is applied at once.
struct Registry {
    table: MemoryTable,
    health: Health,
    now: u64,
    logged: usize,
}

impl Registry {
    fn new(patience: Duration) -> Registry {
        Registry::with_replicas(patience, 1)
    }

    fn with_replicas(patience: Duration, replicas: u32) -> Registry {
        let mut table = MemoryTable::default();
        apply(&mut table, 1, founded(1, replicas));
        Registry { table, health: Health::new(Time(START), patience), now: START, logged: 0 }
    }

    fn restart(&mut self, patience: Duration) {
        self.health = Health::new(Time(self.now), patience);
    }

    fn request(&mut self, op: &Op) -> Reply {
        match self.health.request(&self.table, op, true, Time(self.now)).unwrap() {
            Step::Answer(reply) => reply,
            Step::Log(command) => {
                self.logged += 1;
                self.now += 1;
                apply(&mut self.table, self.now, command.command.unwrap())
            }
        }
    }

    fn ok(&mut self, op: &Op) {
        let reply = self.request(op);
        assert_eq!(reply, Reply::Registered(pb::Registered {}), "{op:?}");
    }

    fn code(&mut self, op: &Op) -> u32 {
        crate::machine::tests::code(&self.request(op))
    }

    /// It is refused with these words.
    fn refused(&mut self, op: &Op, error: RegistryError, words: &str) {
        match self.request(op) {
            Reply::Error(refusal) => {
                assert_eq!(refusal.code, error.code(), "{}", refusal.message);
                assert!(
                    refusal.message.contains(words) && !refusal.message.contains('\n'),
                    "{}",
                    refusal.message
                );
            }
            other => panic!("{op:?} is answered with {other:?}"),
        }
    }

    fn plan(&mut self) -> usize {
        let groups = plan(&self.table, &self.health, Time(self.now)).unwrap();
        let planned = groups.len();
        if planned > 0 {
            let reply = apply(&mut self.table, self.now, Command::PutGroups(pb::PutGroups { groups }));
            assert_eq!(reply, Reply::Registered(pb::Registered {}));
        }
        planned
    }

    fn pass(&mut self, duration: Duration) {
        self.now = Time(self.now).saturating_add(duration).0;
    }

    fn map(&self) -> pb::ClusterMapReply {
        self.health.map(&self.table, Time(self.now), false).unwrap()
    }

    fn place(&self, group: u32) -> pb::GroupPlace {
        self.map().groups.into_iter().find(|place| place.group == group).unwrap()
    }

    fn summary(&self) -> crate::Summary {
        self.health.summary(&self.table, Time(self.now)).unwrap()
    }

    fn texts(&self) -> Vec<String> {
        self.summary().reasons.into_iter().map(|reason| reason.text).collect()
    }

    /// One host with everything.
    fn whole(&mut self) {
        self.ok(&Beat::new(10, StoreShard, "a").op());
        self.ok(&Beat::new(20, StoreCrossdir, "a").op());
        self.ok(&Beat::new(30, StoreShuckle, "a").led(&[257], 1, &[30]).op());
        self.plan();
        self.beat();
        self.beat();
        self.ok(&disks("b:1", (1..=8).map(report).collect()));
    }

    /// All of the one host lead what they have.
    fn beat(&mut self) {
        let shards: Vec<u32> = (0..256).collect();
        self.ok(&Beat::new(10, StoreShard, "a").led(&shards, 1, &[10]).op());
        self.ok(&Beat::new(20, StoreCrossdir, "a").led(&[256], 1, &[20]).op());
        self.ok(&Beat::new(30, StoreShuckle, "a").led(&[257], 1, &[30]).op());
    }

    /// Hosts a, b, c with shard stores 11, 12, 13, coordinators 21, 22, 23, registries 31, 32, 33; the ones
    /// on a lead everything.
    fn three(patience: Duration) -> Registry {
        let mut registry = Registry::with_replicas(patience, 3);
        registry.beat_three(&["a", "b", "c"]);
        registry.plan();
        registry.beat_three(&["a", "b", "c"]);
        registry.beat_three(&["a", "b", "c"]);
        registry.ok(&disks("b:1", (1..=8).map(report).collect()));
        registry.logged = 0;
        registry
    }

    fn beat_three(&mut self, hosts: &[&str]) {
        for host in hosts {
            let n = 1 + u64::from(host.as_bytes()[0] - b'a');
            for (kind, base) in [(StoreShard, 10), (StoreCrossdir, 20), (StoreShuckle, 30)] {
                let mut beat = Beat::new(base + n, kind, host);
                let founded = schema::groups(&self.table).unwrap().len() > 1;
                if *host == "a" && (founded || kind == StoreShuckle) {
                    let groups: Vec<u32> = crate::groups_of(kind).map(|group| u32::from(group.0)).collect();
                    beat = beat.led(&groups, 1, &[base + 1, base + 2, base + 3]);
                }
                self.ok(&beat.op());
            }
        }
    }
}

/// A heartbeat of a store.
#[derive(Clone)]
struct Beat(pb::RegisterStore);

impl Beat {
    fn new(id: u64, kind: StoreKind, host: &str) -> Beat {
        let address = format!("{host}:{}", 5000 + kind as i32);
        Beat(pb::RegisterStore {
            id,
            kind: kind.into(),
            host: host.into(),
            address,
            boot: id,
            ..Default::default()
        })
    }

    fn at(mut self, address: &str) -> Beat {
        self.0.address = address.into();
        self
    }

    fn boot(mut self, boot: u64) -> Beat {
        self.0.boot = boot;
        self
    }

    fn led(mut self, groups: &[u32], term: u64, voters: &[u64]) -> Beat {
        let led = |&group| pb::LedGroup {
            group,
            term,
            applied_index: 7,
            log_bytes: 8,
            voters: voters.to_vec(),
            ..Default::default()
        };
        self.0.led = groups.iter().map(led).collect();
        self.0.transactions = 3;
        self
    }

    fn op(self) -> Op {
        Op::RegisterStore(self.0)
    }
}

fn disks(address: &str, block_services: Vec<pb::BlockServiceReport>) -> Op {
    disks_of(0, address, block_services)
}

/// As the start `boot` of a daemon says it.
fn disks_of(boot: u64, address: &str, block_services: Vec<pb::BlockServiceReport>) -> Op {
    let (address, failure_domain) = (address.into(), "rack".into());
    Op::RegisterBlockServices(pb::RegisterBlockServices { address, failure_domain, block_services, boot })
}

fn bad_block(block_service: u64, block: u64) -> pb::BadBlock {
    pb::BadBlock { block_service, block, file: 1, kind: pb::BadBlockKind::BadBlockMissing.into() }
}

#[test]
fn heartbeats_that_say_nothing_new_are_not_logged() {
    let mut registry = Registry::new(STALE_AFTER);
    registry.whole();
    let logged = registry.logged;
    for _ in 0..10 {
        registry.pass(Duration::from_secs(1));
        registry.beat();
        // Fuller every second, and on a file system that is shared.
        let fuller =
            pb::BlockServiceReport { available_bytes: 100, capacity_bytes: 990, blocks: 9, ..report(1) };
        registry.ok(&disks("b:1", vec![fuller]));
        assert_eq!(registry.plan(), 0);
    }
    assert_eq!(registry.logged, logged, "RG-7");
    let info = &registry.map().block_services[0];
    assert_eq!((info.available_bytes, info.blocks, info.capacity_bytes), (100, 9, 990));
    registry.ok(&disks("b:1", vec![pb::BlockServiceReport { path: "/moved".into(), ..report(1) }]));
    assert_eq!(registry.logged, logged + 1);
    let larger = pb::BlockServiceReport { path: "/moved".into(), capacity_bytes: 2000, ..report(1) };
    registry.ok(&disks("b:1", vec![larger]));
    assert_eq!(registry.logged, logged + 2);
    registry.ok(&disks("b:2", vec![pb::BlockServiceReport { path: "/moved".into(), ..report(1) }]));
    assert_eq!(registry.logged, logged + 3);
}

#[test]
fn a_whole_cluster_is_healthy_and_its_map_says_where_everything_is() {
    let mut registry = Registry::new(Duration::ZERO);
    let empty = registry.summary();
    assert_eq!(empty.state, State::Unavailable);
    assert_eq!(empty.reasons[0].text, "no shard host has registered: nothing can be stored");
    registry.whole();
    let map = registry.map();
    assert_eq!((map.groups.len(), map.replicas, map.now), (258, 1, registry.now));
    assert!(map.groups.iter().take(256).all(|place| place.alive
        && place.leader == 10
        && place.wanted == [10]
        && place.founding == [10]
        && place.preferred == 10
        && place.applied_index == 7));
    let stores: Vec<_> =
        map.stores.iter().map(|info| (info.id, info.alive, info.replicas, info.leaders)).collect();
    assert_eq!(stores, [(10, true, 256, 256), (20, true, 1, 1), (30, true, 1, 1)]);
    assert_eq!(map.crossdir_transactions, 3);
    assert_eq!(map.block_services.len(), 8);
    assert!(map.block_services.iter().all(|info| info.flags == 0 && info.failure_domain == "rack"));
    assert!(map.block_services.iter().all(|info| info.key.is_empty()), "RG-8");
    let keys = registry.health.map(&registry.table, Time(registry.now), true).unwrap();
    assert!(keys.block_services.iter().all(|info| info.key.len() == 32));
    let summary = registry.summary();
    assert_eq!((summary.state, summary.reasons.len()), (State::Healthy, 0), "{:?}", summary.reasons);
    assert_eq!(
        (summary.total.disks, summary.total.capacity_bytes, summary.total.used_bytes),
        (8, 8000, 3200)
    );
    assert_eq!(summary.classes.keys().copied().collect::<Vec<_>>(), [3]);
    assert_eq!(summary.failure_domains["rack"].disks_writable, 8);
}

#[test]
fn what_is_not_heard_of_is_stale() {
    let mut registry = Registry::new(Duration::ZERO);
    registry.whole();
    registry.pass(STALE_AFTER - Duration::from_nanos(100));
    assert_eq!(registry.summary().state, State::Healthy);
    registry.pass(Duration::from_nanos(100));
    let map = registry.map();
    assert!(map.groups.iter().all(|place| !place.alive) && map.stores.iter().all(|info| !info.alive));
    assert!(map.block_services.iter().all(|info| info.flags == flags::STALE));
    let summary = registry.summary();
    assert_eq!(summary.state, State::Unavailable);
    let texts = registry.texts();
    assert!(texts.contains(&"no disk is alive: no data can be read or written".to_owned()), "{texts:?}");
    let lost = "quorum lost: all 256 shards, the coordinator, the registry cannot work without host a";
    assert_eq!(texts[0], lost);
    assert!(texts.contains(&"host a not heard of for 5 s: shard, crossdir, shuckle".to_owned()), "{texts:?}");
    assert!(texts.iter().any(|text| text.starts_with("8 disks not heard of: /disks/01")), "{texts:?}");
    assert_eq!((summary.total.capacity_bytes, summary.total.disks_alive), (0, 0));
}

#[test]
fn a_disk_with_a_problem_is_lost_and_so_is_one_its_host_no_longer_has() {
    let mut registry = Registry::new(Duration::ZERO);
    registry.whole();
    registry.pass(Duration::from_secs(4));
    let dead = pb::BlockServiceReport { problem: "no such directory".into(), ..report(1) };
    let errors = pb::BlockServiceReport { io_errors: 2, ..report(2) };
    let mut all = vec![dead, errors];
    all.extend((3..=7).map(report));
    registry.ok(&disks("b:1", all.clone()));
    registry.pass(Duration::from_secs(2));
    registry.ok(&disks("b:1", all));
    registry.beat();
    let map = registry.map();
    let flags_of: Vec<u32> = map.block_services.iter().map(|info| info.flags).collect();
    assert_eq!(flags_of, [flags::LOST, 0, 0, 0, 0, 0, 0, flags::STALE | flags::LOST]);
    assert_eq!(map.block_services[7].problem, "its host no longer has it");
    let summary = registry.summary();
    let texts: Vec<&str> = summary.reasons.iter().map(|reason| reason.text.as_str()).collect();
    assert_eq!(
        texts,
        [
            "2 disks lost: /disks/01 (no such directory), /disks/08 (its host no longer has it)",
            "1 disk with input/output errors: /disks/02"
        ]
    );
    assert_eq!(summary.state, State::Degraded);
}

#[test]
fn flags_are_set_once_and_seen_in_the_map() {
    let mut registry = Registry::new(Duration::ZERO);
    registry.whole();
    let logged = registry.logged;
    let set = Op::SetFlags(pb::SetFlags { block_services: vec![2, 3], set: flags::DECOMMISSIONED, clear: 0 });
    registry.ok(&set);
    registry.ok(&set);
    assert_eq!(registry.logged, logged + 1);
    assert_eq!(registry.map().block_services[1].flags, flags::DECOMMISSIONED);
    assert_eq!(registry.summary().total.disks_writable, 6);
    let unknown = Op::SetFlags(pb::SetFlags { block_services: vec![2, 99], set: 1, clear: 0 });
    assert_eq!(registry.code(&unknown), RegistryError::NotFound.code());
}

#[test]
fn a_store_that_starts_again_at_its_address_is_taken_at_once() {
    let mut registry = Registry::three(Duration::ZERO);
    let beat = || Beat::new(12, StoreShard, "b");
    registry.ok(&beat().boot(100).op());
    registry.ok(&beat().boot(100).op());
    assert_eq!(registry.logged, 0);
    // The process before it speaks again: somebody copied the directory, and the address.
    registry.refused(&beat().op(), RegistryError::Conflict, "two copies of one data directory?");
    registry.ok(&beat().boot(100).op());
}

#[test]
fn two_copies_of_a_store_are_refused_while_one_is_alive() {
    let mut registry = Registry::three(Duration::ZERO);
    let elsewhere = Beat::new(12, StoreShard, "b").at("other:5001").boot(9).op();
    registry.refused(&elsewhere, RegistryError::Conflict, "is alive at b:5001, asked for other:5001");
    let renamed = Beat::new(12, StoreShard, "z").at("other:5001").op();
    registry.refused(&renamed, RegistryError::Conflict, "two copies of one data directory?");
    let kind = Beat::new(12, StoreCrossdir, "b").op();
    registry.refused(&kind, RegistryError::Conflict, "is a shard store, not a crossdir store");
    assert_eq!(registry.map().stores[1].address, "b:5001");
    registry.pass(STALE_AFTER);
    registry.ok(&elsewhere);
    assert_eq!(registry.map().stores[1].address, "other:5001");
}

#[test]
fn a_host_has_one_live_store_of_a_kind() {
    let mut registry = Registry::three(Duration::ZERO);
    let second = Beat::new(99, StoreShard, "b").at("b:6001").op();
    registry.refused(&second, RegistryError::Conflict, "give each host its own --host");
    // At the very address of the other: an empty disk in its place.
    registry.ok(&Beat::new(99, StoreShard, "b").op());
    let alive =
        |registry: &Registry, id| registry.map().stores.iter().any(|info| info.id == id && info.alive);
    assert!(alive(&registry, 99) && !alive(&registry, 12));
    registry.refused(&Beat::new(12, StoreShard, "b").op(), RegistryError::Conflict, "two copies");
    // The old disk is put back.
    registry.ok(&Beat::new(12, StoreShard, "b").boot(5).op());
    assert!(alive(&registry, 12) && !alive(&registry, 99));
    registry.pass(STALE_AFTER);
    registry.ok(&Beat::new(99, StoreShard, "b").at("b:6001").boot(6).op());
}

#[test]
fn transactions_that_take_long_are_told() {
    let mut registry = Registry::new(STALE_AFTER);
    registry.whole();
    let slow = |transaction, started_at: Time, step: &str| pb::TransactionInfo {
        transaction,
        kind: "mkdir".into(),
        started_at: started_at.0,
        step: step.into(),
        finished: false,
    };
    let beat = |slow| {
        let mut beat = Beat::new(20, StoreCrossdir, "a").led(&[256], 1, &[20]);
        beat.0.slow_transactions = slow;
        beat.op()
    };
    let began = Time(registry.now);
    let two = vec![slow(5, began, "waits for shard 7"), slow(6, began, "waits for transaction 5")];
    registry.ok(&beat(two.clone()));
    assert_eq!((registry.map().slow_transactions, registry.texts()), (two.clone(), vec![]));
    for _ in 0..30 {
        registry.pass(Duration::from_secs(1));
        registry.beat();
        registry.ok(&disks("b:1", (1..=8).map(report).collect()));
    }
    registry.ok(&beat(two.clone()));
    assert_eq!(registry.texts(), [""; 0], "not yet");
    registry.pass(Duration::from_secs(1));
    registry.ok(&beat(two));
    let texts = registry.texts();
    assert!(
        texts.len() == 1 && texts[0].contains("under way for 31 s: waits for shard 7; 1 more"),
        "{texts:?}"
    );
    // Another that leads has none.
    registry.ok(&beat(vec![]));
    assert_eq!((registry.map().slow_transactions, registry.texts()), (vec![], vec![]));

    let many = vec![slow(1, began, ""); SLOW_TRANSACTIONS_MAX + 1];
    registry.refused(&beat(many), RegistryError::Malformed, "too many");
    let long = "x".repeat(TRANSACTION_STEP_BYTES_MAX + 1);
    registry.refused(&beat(vec![slow(1, began, &long)]), RegistryError::Malformed, "too long");
}

#[test]
fn of_two_leaders_the_later_term_wins() {
    let mut registry = Registry::three(Duration::ZERO);
    let all: Vec<u32> = (0..256).collect();
    let members = [11, 12, 13];
    registry.ok(&Beat::new(12, StoreShard, "b").led(&[7], 5, &members).op());
    assert_eq!((registry.place(7).leader, registry.place(7).term), (12, 5));
    registry.ok(&Beat::new(11, StoreShard, "a").led(&all, 4, &members).op());
    assert_eq!(registry.place(7).leader, 12, "RG-13");
    assert_eq!(registry.place(8).leader, 11);
    // It steps down: nobody leads until somebody says so.
    registry.ok(&Beat::new(12, StoreShard, "b").op());
    assert_eq!((registry.place(7).leader, registry.place(7).alive), (0, false));
    assert_eq!(registry.texts(), ["no live leader: shard 7"]);
    registry.ok(&Beat::new(13, StoreShard, "c").led(&[7], 6, &members).op());
    assert_eq!(registry.place(7).leader, 13);
    assert_eq!(registry.logged, 0, "who leads is not logged");
}

#[test]
fn memberships_are_logged_when_they_change() {
    let mut registry = Registry::three(Duration::ZERO);
    assert_eq!(registry.place(7).founding, registry.place(7).wanted);
    let mut beat = Beat::new(11, StoreShard, "a").led(&[7], 1, &[12, 11, 13]);
    registry.ok(&beat.clone().op());
    assert_eq!(registry.logged, 0, "the order of the voters is no news");
    beat.0.led[0].learners = vec![14];
    beat.0.led[0].conf_index = 9;
    beat.0.led[0].progress =
        vec![pb::ReplicaProgress { store: 14, snapshot_sent: 1, snapshot_total: 5, matched_index: 0 }];
    registry.ok(&beat.clone().op());
    registry.ok(&beat.op());
    assert_eq!(registry.logged, 1);
    let place = registry.place(7);
    assert_eq!((place.voters, place.learners, place.conf_index), (vec![11, 12, 13], vec![14], 9));
    assert_eq!(place.progress[0].snapshot_total, 5);
    assert!(place.founding.is_empty(), "RG-11");
}

#[test]
fn a_registry_that_starts_again_is_patient() {
    let mut registry = Registry::three(Duration::ZERO);
    registry.restart(STALE_AFTER);
    assert_eq!(registry.summary().state, State::Healthy, "nobody is disturbed by its restart");
    assert_eq!((registry.place(0).leader, registry.place(0).alive), (0, true));
    assert_eq!(registry.plan(), 0);
    let elsewhere = Beat::new(12, StoreShard, "b").at("b:6001").op();
    registry.refused(&elsewhere, RegistryError::Conflict, "two copies");
    let second = Beat::new(99, StoreShard, "b").at("b:6001").op();
    registry.refused(&second, RegistryError::Conflict, "--host");
    registry.ok(&Beat::new(99, StoreShard, "b").op());
    registry.pass(STALE_AFTER);
    assert_eq!(registry.summary().state, State::Unavailable);
    registry.ok(&elsewhere);
}

fn replicas(group: u32, wanted: &[u64]) -> pb::SetReplicas {
    pb::SetReplicas { group, wanted: wanted.to_vec(), preferred: 0, force: false }
}

#[test]
fn what_would_leave_too_few_replicas_needs_force() {
    use RegistryError::{Busy, Malformed, TooFewReplicas, UnknownMember};
    let mut registry = Registry::three(Duration::ZERO);
    registry.ok(&Beat::new(14, StoreShard, "d").op());
    registry.ok(&Beat::new(15, StoreShard, "e").op());
    let ask = |op: pb::SetReplicas| Op::SetReplicas(op);
    let force = |op: pb::SetReplicas| Op::SetReplicas(pb::SetReplicas { force: true, ..op });
    for (wanted, error, words) in [
        (&[11, 12, 77][..], UnknownMember, "store 0x000000000000004d"),
        (&[11, 12, 21], Malformed, "is a crossdir store, asked for shard 3"),
        (&[11, 12, 12], Malformed, "there twice"),
        (&[11, 12, 0], Malformed, "there twice, or is none"),
    ] {
        registry.refused(&ask(replicas(3, wanted)), error, words);
        registry.refused(&force(replicas(3, wanted)), error, words);
    }
    registry.refused(&ask(replicas(999, &[11])), Malformed, "group 999");
    registry.refused(&ask(replicas(3, &[11, 12])), TooFewReplicas, "shard 3: 2 of 3 replicas would be left");
    let leader = pb::SetReplicas { preferred: 14, ..replicas(3, &[]) };
    registry.refused(&ask(leader), Malformed, "is not to be a voter of shard 3");
    registry.ok(&ask(pb::SetReplicas { preferred: 12, ..replicas(3, &[]) }));
    assert_eq!(registry.place(3).preferred, 12);
    // Host d falls silent, e is drained.
    registry.pass(STALE_AFTER);
    registry.beat_three(&["a", "b", "c"]);
    registry.ok(&Beat::new(15, StoreShard, "e").op());
    registry.refused(&ask(replicas(3, &[11, 12, 14])), TooFewReplicas, "on host d is not alive (--force");
    registry.ok(&Op::DrainHost(pb::DrainHost { host: "e".into(), undo: false }));
    registry.refused(&ask(replicas(3, &[11, 12, 15])), TooFewReplicas, "on host e is being drained");
    registry.ok(&Op::DrainHost(pb::DrainHost { host: "e".into(), undo: true }));
    registry.ok(&ask(replicas(3, &[11, 12, 15])));
    assert_eq!(registry.place(3).wanted, [11, 12, 15]);
    let logged = registry.logged;
    registry.ok(&ask(replicas(3, &[15, 12, 11])));
    assert_eq!(registry.logged, logged, "RG-7");
    registry.ok(&ask(replicas(3, &[11, 12, 13, 15])));
    registry.ok(&force(replicas(3, &[11, 12])));
    // Two on one host: the old store of a host whose disk was replaced.
    registry.ok(&Beat::new(16, StoreShard, "b").op());
    registry.refused(&ask(replicas(4, &[12, 13, 16])), TooFewReplicas, "both on host b");
    registry.ok(&force(replicas(4, &[12, 13, 16])));
    // Hosts b and c fall silent: nothing can change.
    registry.pass(STALE_AFTER);
    registry.beat_three(&["a"]);
    registry.ok(&Beat::new(15, StoreShard, "e").op());
    registry.ok(&Beat::new(14, StoreShard, "d").op());
    registry.refused(
        &ask(replicas(5, &[11, 14, 15])),
        TooFewReplicas,
        "shard 5 has no quorum: not alive on b, c",
    );
    registry.refused(&ask(replicas(5, &[11, 12, 13, 14])), TooFewReplicas, "would have no quorum");
    // A new leader does not know better until all had the time to speak.
    registry.restart(Duration::ZERO);
    let to_b = pb::SetReplicas { preferred: 12, ..replicas(6, &[]) };
    registry.beat_three(&["a"]);
    registry.refused(&ask(to_b.clone()), Busy, "on host b is not alive");
    registry.refused(
        &force(pb::SetReplicas { preferred: 14, ..to_b.clone() }),
        Malformed,
        "not to be a voter",
    );
    registry.beat_three(&["b"]);
    registry.ok(&ask(to_b.clone()));
    registry.restart(Duration::ZERO);
    registry.pass(STALE_AFTER);
    registry.beat_three(&["a", "c"]);
    registry.refused(
        &ask(pb::SetReplicas { preferred: 12, ..replicas(7, &[]) }),
        TooFewReplicas,
        "on host b is not",
    );
    let mut fresh = Registry::with_replicas(Duration::ZERO, 3);
    fresh.refused(&ask(replicas(5, &[11])), UnknownMember, "shard 5");
}

#[test]
fn a_quorum_that_is_lost_is_said_with_the_hosts_that_are_missing() {
    let mut registry = Registry::three(Duration::ZERO);
    assert_eq!(registry.texts(), Vec::<String>::new());
    registry.pass(STALE_AFTER);
    registry.beat_three(&["a", "b"]);
    registry.ok(&disks("b:1", (1..=8).map(report).collect()));
    let under = "under-replicated: all 256 shards, the coordinator, the registry, without host c";
    assert_eq!(registry.texts(), [under, "host c not heard of for 5 s: shard, crossdir, shuckle"]);
    assert_eq!(registry.summary().state, State::Degraded);
    registry.pass(STALE_AFTER);
    registry.beat_three(&["a"]);
    let lost = "quorum lost: all 256 shards, the coordinator, the registry cannot work without hosts b, c";
    assert_eq!(registry.texts()[0], lost);
    assert_eq!(registry.summary().state, State::Unavailable);
}

#[test]
fn clocks_problems_and_drains_are_said() {
    let mut registry = Registry::three(Duration::ZERO);
    let mut beat = Beat::new(12, StoreShard, "b");
    beat.0.problem = "the disk is slow".into();
    registry.ok(&beat.op());
    let mut beat = Beat::new(22, StoreCrossdir, "b");
    beat.0.clock_offset = -730_000_000;
    beat.0.problem = "its clock is 730 ms behind the other hosts'".into();
    registry.ok(&beat.op());
    let drain = |undo| Op::DrainHost(pb::DrainHost { host: "c".into(), undo });
    registry.ok(&drain(false));
    registry.ok(&drain(false));
    assert_eq!(registry.logged, 1);
    assert_eq!(
        registry.texts(),
        [
            "shard on host b: the disk is slow",
            "the clock of host b is off by -730 ms: it does not lead",
            "draining host c: 258 replicas still to move, 258 of them wait for another live host that can take them"
        ]
    );
    registry.ok(&Beat::new(14, StoreShard, "d").op());
    let hosts = registry.summary().hosts;
    assert_eq!((hosts[2].name.as_str(), hosts[2].to_move, hosts[2].stuck), ("c", 258, 2));
    registry.ok(&drain(true));
    let nowhere = Op::DrainHost(pb::DrainHost { host: "nowhere".into(), undo: false });
    registry.refused(&nowhere, RegistryError::UnknownMember, "host 'nowhere'");
}

#[test]
fn a_disk_with_anothers_id_is_refused_and_disturbs_nothing() {
    let mut registry = Registry::new(Duration::ZERO);
    registry.whole();
    let other = pb::BlockServiceReport { key: vec![7; 32].into(), problem: "x".into(), ..report(1) };
    assert_eq!(registry.code(&disks("b:2", vec![other])), RegistryError::Conflict.code(), "RG-3");
    assert_eq!(registry.map().block_services[0].flags, 0);
    assert_eq!(registry.map().block_services[0].address, "b:1");
}

/// The block services that are to blame, and where the registry says that block service 1 is then.
fn conflict(registry: &mut Registry, op: &Op) -> (Vec<u64>, String) {
    let Reply::Error(error) = registry.request(op) else { panic!("{op:?} is accepted") };
    assert_eq!(error.code, RegistryError::Conflict.code(), "{}", error.message);
    assert!(error.message.contains("two copies of one disk?"), "{}", error.message);
    (error.block_services, registry.map().block_services[0].address.clone())
}

#[test]
fn a_copy_of_a_disk_is_refused_while_the_disk_is_heard_of() {
    let mut registry = Registry::new(Duration::ZERO);
    registry.ok(&disks_of(1, "a:1", vec![report(1), report(2)]));
    let copy = pb::BlockServiceReport { path: "/copy".into(), ..report(1) };
    let logged = registry.logged;
    // Of three disks one is a copy, and it alone is to blame.
    let host = |boot| disks_of(boot, "b:1", vec![report(3), copy.clone(), report(4)]);
    assert_eq!(conflict(&mut registry, &host(2)), (vec![1], "a:1".to_owned()), "RG-3");
    assert_eq!((registry.logged, registry.map().block_services.len()), (logged, 2), "RG-2");
    // The same process elsewhere, and another at the same place: the one before is gone.
    registry.ok(&disks_of(1, "a:2", vec![report(1)]));
    registry.ok(&disks_of(3, "a:2", vec![report(1)]));
    assert_eq!(conflict(&mut registry, &disks_of(1, "a:2", vec![report(1)])).0, [1], "it is not gone");
    // One that does not say which start it is.
    registry.ok(&disks("a:3", vec![report(1)]));
    registry.ok(&disks_of(4, "a:3", vec![report(1)]));

    // Restarted elsewhere.
    registry.pass(STALE_AFTER / 2);
    assert_eq!(conflict(&mut registry, &host(2)).0, [1]);
    registry.pass(STALE_AFTER / 2);
    registry.ok(&host(2));
    assert_eq!(conflict(&mut registry, &disks_of(4, "a:3", vec![report(1)])), (vec![1], "b:1".to_owned()));
}

#[test]
fn a_disk_moves_to_another_host_while_the_former_says_that_it_is_lost() {
    let mut registry = Registry::new(Duration::ZERO);
    let lost = || pb::BlockServiceReport { problem: "it is gone".into(), ..report(1) };
    registry.ok(&disks_of(1, "a:1", vec![report(1)]));
    registry.ok(&disks_of(1, "a:1", vec![lost()]));
    registry.ok(&disks_of(2, "b:1", vec![report(1)]));
    assert_eq!(conflict(&mut registry, &disks_of(1, "a:1", vec![lost()])), (vec![1], "b:1".to_owned()));
    assert_eq!(registry.map().block_services[0].flags, 0);
}

#[test]
fn a_registry_that_has_just_started_takes_its_rows_word_for_where_a_disk_is() {
    let mut registry = Registry::new(Duration::ZERO);
    registry.ok(&disks_of(1, "a:1", vec![report(1)]));
    registry.restart(STALE_AFTER);
    assert_eq!(conflict(&mut registry, &disks_of(2, "b:1", vec![report(1)])).0, [1]);
    registry.ok(&disks_of(1, "a:1", vec![report(1)]));
    registry.restart(STALE_AFTER);
    registry.pass(STALE_AFTER);
    registry.ok(&disks_of(2, "b:1", vec![report(1)]));
}

#[test]
fn reports_of_bad_blocks_are_counted_once_each_and_bounded() {
    let mut registry = Registry::new(Duration::ZERO);
    registry.whole();
    let reports = Op::ReportBlocks(pb::ReportBlocks { blocks: vec![bad_block(1, 5), bad_block(1, 5)] });
    registry.ok(&reports);
    registry.ok(&reports);
    assert_eq!(registry.map().block_services[0].reported_blocks, 1);
    let texts: Vec<String> = registry.summary().reasons.into_iter().map(|reason| reason.text).collect();
    assert_eq!(texts, ["1 block was reported missing or corrupt, on /disks/01"]);
    let many = (1..=4000).map(|block| bad_block(1, block)).collect();
    registry.ok(&Op::ReportBlocks(pb::ReportBlocks { blocks: many }));
    assert_eq!(registry.health.reported(BlockServiceId(1)).count(), REPORTED_PER_SERVICE_MAX);
    assert_eq!(registry.map().block_services[0].reported_blocks, 4000);
    let unknown = Op::ReportBlocks(pb::ReportBlocks { blocks: vec![bad_block(1, 9000), bad_block(77, 1)] });
    assert_eq!(registry.code(&unknown), RegistryError::NotFound.code());
    let nothing = Op::ReportBlocks(pb::ReportBlocks { blocks: vec![bad_block(1, 0)] });
    assert_eq!(registry.code(&nothing), RegistryError::Malformed.code());
    assert_eq!(registry.map().block_services[0].reported_blocks, 4000);
}

#[test]
fn nearly_full_disks_are_said() {
    let mut registry = Registry::new(Duration::ZERO);
    registry.whole();
    let full = (1..=8).map(|id| pb::BlockServiceReport { available_bytes: 70, ..report(id) }).collect();
    registry.ok(&disks("b:1", full));
    let texts: Vec<String> = registry.summary().reasons.into_iter().map(|reason| reason.text).collect();
    assert_eq!(texts, ["FLASH disks are nearly full: 7 % is left"]);
}

#[test]
fn without_the_secret_nobody_registers_or_gets_keys() {
    let mut registry = Registry::new(Duration::ZERO);
    registry.whole();
    let unauthorized = |op: Op| {
        let mut health = Health::new(Time(START), Duration::ZERO);
        match health.request(&registry.table, &op, false, Time(START)).unwrap() {
            Step::Answer(Reply::Error(error)) => error.code == RegistryError::Unauthorized.code(),
            _ => false,
        }
    };
    assert!(unauthorized(Beat::new(1, StoreShard, "a").op()));
    assert!(unauthorized(Op::SetReplicas(replicas(0, &[1]))));
    assert!(unauthorized(Op::DrainHost(pb::DrainHost { host: "a".into(), undo: false })));
    assert!(unauthorized(disks("b:1", vec![report(1)])));
    let flags = pb::SetFlags { block_services: vec![1], set: flags::NO_WRITE, clear: 0 };
    assert!(unauthorized(Op::SetFlags(flags)), "RG-17");
    assert!(unauthorized(Op::PutJob(pb::PutJob::default())), "RG-17");
    assert!(unauthorized(Op::RegisterJanitor(pb::RegisterJanitor { boot: 1, ..Default::default() })));
    assert!(unauthorized(Op::ListBadBlocks(pb::ListBadBlocks::default())));
    assert!(unauthorized(Op::Map(pb::ClusterMap { with_keys: true, known_version: 0 })), "RG-8");
    assert!(!unauthorized(Op::Map(pb::ClusterMap { with_keys: false, known_version: 0 })));
    assert!(!unauthorized(Op::Hello(pb::Hello {})));
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-c]:[0-9]{1,5}", ".{0,8}", Just("x".repeat(5000))]
}

fn hostile_report() -> impl Strategy<Value = pb::BlockServiceReport> {
    let key = prop_oneof![Just(32usize), 0usize..40];
    let numbers = prop::array::uniform4(prop_oneof![0u64..4, any::<u64>()]);
    (0u64..5, key, any::<u8>(), 0u32..5, text(), numbers, text()).prop_map(
        |(id, key, byte, storage_class, path, [a, b, c, d], problem)| pb::BlockServiceReport {
            id,
            key: vec![byte % 3; key].into(),
            storage_class,
            failure_domain: path.clone(),
            path,
            capacity_bytes: a,
            available_bytes: b,
            used_bytes: c,
            blocks: d,
            io_errors: d,
            problem,
            read_only: byte % 2 == 1,
            dead_bytes: a,
        },
    )
}

fn hostile() -> impl Strategy<Value = Op> {
    let ids = || prop::collection::vec(0u64..5, 0..5);
    let led = (prop_oneof![0u32..4, 255u32..260], 0u64..4, ids(), ids()).prop_map(
        |(group, term, voters, learners)| pb::LedGroup {
            group,
            term,
            voters,
            learners,
            conf_index: term,
            ..Default::default()
        },
    );
    let host = || prop_oneof!["[a-c]", text()];
    let store = (
        0u64..5,
        -1i32..5,
        host(),
        text(),
        prop::collection::vec(led, 0..3),
        (any::<i64>(), text(), 0u64..3),
    );
    let store =
        store.prop_map(|(id, kind, host, address, led, (clock_offset, problem, boot))| pb::RegisterStore {
            id,
            kind,
            host,
            address,
            led,
            clock_offset,
            problem,
            boot,
            transactions: 0,
            slow_transactions: vec![pb::TransactionInfo::default(); (boot as usize) * 20],
        });
    let block = (0u64..5, 0u64..5, any::<u64>(), -1i32..4)
        .prop_map(|(block_service, block, file, kind)| pb::BadBlock { block_service, block, file, kind });
    prop_oneof![
        Just(Op::Hello(pb::Hello {})),
        any::<bool>().prop_map(|with_keys| Op::Map(pb::ClusterMap { with_keys, known_version: 0 })),
        prop::collection::vec(block, 0..6).prop_map(|blocks| Op::ReportBlocks(pb::ReportBlocks { blocks })),
        (prop::collection::vec(0u64..5, 0..4), 0u32..40, 0u32..40).prop_map(
            |(block_services, set, clear)| { Op::SetFlags(pb::SetFlags { block_services, set, clear }) }
        ),
        prop::collection::vec(0u64..5, 0..4)
            .prop_map(|block_services| Op::ForgetBlockServices(pb::ForgetBlockServices { block_services })),
        store.prop_map(Op::RegisterStore),
        (prop_oneof![0u32..4, 255u32..260], ids(), 0u64..5, any::<bool>()).prop_map(
            |(group, wanted, preferred, force)| {
                Op::SetReplicas(pb::SetReplicas { group, wanted, preferred, force })
            }
        ),
        (host(), any::<bool>()).prop_map(|(host, undo)| Op::DrainHost(pb::DrainHost { host, undo })),
        (text(), text(), prop::collection::vec(hostile_report(), 0..4), 0u64..3).prop_map(
            |(address, failure_domain, block_services, boot)| Op::RegisterBlockServices(
                pb::RegisterBlockServices { address, failure_domain, block_services, boot }
            )
        ),
        (0u64..3, host(), text(), text(), -1i32..7, 0u64..4).prop_map(
            |(boot, host, address, state, kind, id)| {
                let task = pb::JanitorTask { kind, about: id, state, bytes_done: boot, ..Default::default() };
                let job = pb::JobProgress { id, done: boot == 1, ..Default::default() };
                let (tasks, jobs) = (vec![task], vec![job]);
                Op::RegisterJanitor(pb::RegisterJanitor { boot, host, address, tasks, jobs })
            }
        ),
        (ids(), 0u64..5).prop_map(|(blocks, block_service)| {
            let bad = |block| pb::BadBlock { block_service, block, ..Default::default() };
            Op::ListBadBlocks(pb::ListBadBlocks { forget: blocks.into_iter().map(bad).collect() })
        }),
    ]
}

proptest! {
    /// RG-3, RG-4, RG-6, RG-9: whatever comes, at whatever time.
    #[test]
    fn whatever_comes_in_the_registry_stays_sound(
        requests in prop::collection::vec((hostile(), any::<bool>(), 0u64..20 * SECOND), 0..40)
    ) {
        let mut registry = Registry::new(STALE_AFTER);
        let mut keys: BTreeMap<u64, bytes::Bytes> = BTreeMap::new();
        for (op, authorized, wait) in requests {
            registry.now = registry.now.wrapping_add(wait);
            let step = registry.health.request(&registry.table, &op, authorized, Time(registry.now)).unwrap();
            if let Step::Log(command) = step {
                let reply = apply(&mut registry.table, registry.now, command.command.unwrap());
                // What is worth logging has been checked: nothing else came between.
                prop_assert!(matches!(reply, Reply::Registered(_) | Reply::Job(_)), "{:?}", reply);
            }
            registry.plan();
            let summary = registry.summary();
            prop_assert_eq!(summary.state == State::Healthy, summary.reasons.is_empty());
            for info in registry.health.map(&registry.table, Time(registry.now), true).unwrap().block_services {
                prop_assert!(info.id != 0 && info.key.len() == 32 && info.storage_class >= 2);
                prop_assert!(info.path.len() <= 4096 && info.failure_domain.len() <= 64);
                let first = keys.entry(info.id).or_insert_with(|| info.key.clone());
                prop_assert_eq!(&*first, &info.key, "RG-3");
            }
            for (_, row) in schema::block_services(&registry.table).unwrap() {
                prop_assert_eq!(row.flags & !flags::SETTABLE, 0, "RG-4");
            }
        }
    }

    /// RG-9: bytes that are no command.
    #[test]
    fn no_bytes_stop_the_machine(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        use eggs_machine::{Machine, Tx};
        let table = MemoryTable::default();
        let mut tx = Tx::new(&table, eggs_machine::hash::StateHash::default());
        prop_assert!(crate::RegistryMachine.apply(&mut tx, Time(1), &bytes).is_ok());
    }
}
