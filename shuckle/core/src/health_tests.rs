//! Heartbeats in, map and summary out; and whatever else may come in.

use eggs_machine::MemoryTable;
use proptest::prelude::*;

use super::*;
use crate::machine::tests::{apply, report};
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
        let mut table = MemoryTable::default();
        apply(&mut table, 1, Command::Found(pb::FoundCluster { cluster_id: vec![1; 16].into() }));
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

    fn pass(&mut self, duration: Duration) {
        self.now = Time(self.now).saturating_add(duration).0;
    }

    fn map(&self) -> pb::ClusterMapReply {
        self.health.map(&self.table, Time(self.now), false).unwrap()
    }

    fn summary(&self) -> crate::Summary {
        self.health.summary(&self.table, Time(self.now)).unwrap()
    }

    fn whole(&mut self) {
        self.ok(&shards("s:1", 0..256));
        self.ok(&crossdir("x:1"));
        self.ok(&disks("b:1", (1..=8).map(report).collect()));
    }
}

fn shards(address: &str, shards: std::ops::Range<u32>) -> Op {
    let shards = shards.map(|shard| pb::ShardReport { shard, leader: true, applied_index: 7, log_bytes: 8 });
    Op::RegisterShards(pb::RegisterShards { address: address.into(), shards: shards.collect() })
}

fn crossdir(address: &str) -> Op {
    Op::RegisterCrossdir(pb::RegisterCrossdir { address: address.into(), transactions: 3 })
}

fn disks(address: &str, block_services: Vec<pb::BlockServiceReport>) -> Op {
    let failure_domain = "rack".into();
    Op::RegisterBlockServices(pb::RegisterBlockServices {
        address: address.into(),
        failure_domain,
        block_services,
    })
}

fn bad_block(block_service: u64, block: u64) -> pb::BadBlock {
    pb::BadBlock { block_service, block, file: 1, kind: pb::BadBlockKind::BadBlockMissing.into() }
}

#[test]
fn heartbeats_that_say_nothing_new_are_not_logged() {
    let mut registry = Registry::new(STALE_AFTER);
    registry.whole();
    assert_eq!(registry.logged, 3);
    for _ in 0..10 {
        registry.pass(Duration::from_secs(1));
        registry.ok(&shards("s:1", 0..256));
        registry.ok(&crossdir("x:1"));
        // Fuller every second, and on a file system that is shared.
        let fuller =
            pb::BlockServiceReport { available_bytes: 100, capacity_bytes: 990, blocks: 9, ..report(1) };
        registry.ok(&disks("b:1", vec![fuller]));
    }
    assert_eq!(registry.logged, 3, "RG-7");
    let info = &registry.map().block_services[0];
    assert_eq!((info.available_bytes, info.blocks, info.capacity_bytes), (100, 9, 990));
    registry.ok(&disks("b:1", vec![pb::BlockServiceReport { path: "/moved".into(), ..report(1) }]));
    assert_eq!(registry.logged, 4);
    let larger = pb::BlockServiceReport { path: "/moved".into(), capacity_bytes: 2000, ..report(1) };
    registry.ok(&disks("b:1", vec![larger]));
    assert_eq!(registry.logged, 5);
    registry.ok(&disks("b:2", vec![pb::BlockServiceReport { path: "/moved".into(), ..report(1) }]));
    assert_eq!(registry.logged, 6);
}

#[test]
fn a_whole_cluster_is_healthy_and_its_map_says_where_everything_is() {
    let mut registry = Registry::new(Duration::ZERO);
    let empty = registry.summary();
    assert_eq!(empty.state, State::Unavailable);
    assert_eq!(empty.reasons[0].text, "no shard has a live leader");
    registry.whole();
    let map = registry.map();
    assert_eq!(map.shards.len(), 256);
    assert!(map.shards.iter().all(|place| place.alive && place.address == "s:1" && place.applied_index == 7));
    assert_eq!(
        (map.crossdir_address.as_str(), map.crossdir_alive, map.crossdir_transactions),
        ("x:1", true, 3)
    );
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
    registry.pass(STALE_AFTER - Duration::from_nanos(1));
    assert_eq!(registry.summary().state, State::Healthy);
    registry.pass(Duration::from_nanos(1));
    let map = registry.map();
    assert!(map.shards.iter().all(|place| !place.alive) && !map.crossdir_alive);
    assert!(map.block_services.iter().all(|info| info.flags == flags::STALE));
    let summary = registry.summary();
    assert_eq!(summary.state, State::Unavailable);
    let texts: Vec<&str> = summary.reasons.iter().map(|reason| reason.text.as_str()).collect();
    assert!(texts.contains(&"no disk is alive: no data can be read or written"), "{texts:?}");
    assert!(texts.iter().any(|text| text.starts_with("the coordinator at x:1 is away")), "{texts:?}");
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
    registry.ok(&shards("s:1", 0..256));
    registry.ok(&crossdir("x:1"));
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
fn a_shard_has_one_place() {
    let mut registry = Registry::new(Duration::ZERO);
    registry.ok(&shards("s:1", 0..10));
    registry.ok(&shards("s:2", 10..256));
    let taken = RegistryError::ShardTaken.code();
    assert_eq!(registry.code(&shards("s:2", 9..12)), taken, "RG-5");
    assert_eq!(registry.map().shards[9].address, "s:1");
    registry.pass(STALE_AFTER);
    registry.ok(&shards("s:2", 9..12));
    assert_eq!(registry.code(&shards("s:1", 0..10)), taken, "RG-5: it came back too late");
    registry.ok(&shards("s:1", 0..9));
    assert_eq!(registry.summary().reasons[0].text, "244 of 256 shards have no live leader: 12-255");
    registry.ok(&crossdir("x:1"));
    assert_eq!(registry.code(&crossdir("x:2")), taken);
    registry.pass(STALE_AFTER);
    registry.ok(&crossdir("x:2"));
}

#[test]
fn a_replica_that_does_not_lead_claims_nothing_and_hands_over() {
    let mut registry = Registry::new(Duration::ZERO);
    let follower = |address: &str| {
        let report = pb::ShardReport { shard: 1, leader: false, applied_index: 1, log_bytes: 0 };
        Op::RegisterShards(pb::RegisterShards { address: address.into(), shards: vec![report] })
    };
    registry.ok(&follower("s:2"));
    assert_eq!(registry.map().shards.len(), 0);
    registry.ok(&shards("s:1", 1..2));
    registry.ok(&follower("s:2"));
    assert!(registry.map().shards[0].alive);
    // It stepped down: the other may have it at once.
    registry.ok(&follower("s:1"));
    assert!(!registry.map().shards[0].alive);
    registry.ok(&shards("s:2", 1..2));
    assert_eq!(registry.map().shards[0].address, "s:2");
}

#[test]
fn a_registry_that_starts_again_is_patient() {
    let mut registry = Registry::new(Duration::ZERO);
    registry.whole();
    registry.restart(STALE_AFTER);
    assert_eq!(registry.summary().state, State::Healthy, "nobody is disturbed by its restart");
    let taken = RegistryError::ShardTaken.code();
    assert_eq!(registry.code(&shards("s:9", 0..1)), taken, "RG-5");
    assert_eq!(registry.code(&crossdir("x:9")), taken, "RG-5");
    registry.pass(STALE_AFTER);
    assert_eq!(registry.summary().state, State::Unavailable);
    registry.ok(&shards("s:9", 0..1));
    // One that knows that nobody else is there need not be.
    registry.restart(Duration::ZERO);
    assert_eq!(registry.summary().state, State::Unavailable);
    registry.ok(&shards("s:5", 0..256));
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
    assert!(unauthorized(shards("s:1", 0..1)));
    assert!(unauthorized(crossdir("x:1")));
    assert!(unauthorized(disks("b:1", vec![report(1)])));
    assert!(unauthorized(Op::Map(pb::ClusterMap { with_keys: true })), "RG-8");
    assert!(!unauthorized(Op::Map(pb::ClusterMap { with_keys: false })));
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
        },
    )
}

fn hostile() -> impl Strategy<Value = Op> {
    let shard = (0u32..260, any::<bool>(), any::<u64>());
    let shard = shard.prop_map(|(shard, leader, applied_index)| pb::ShardReport {
        shard,
        leader,
        applied_index,
        log_bytes: applied_index,
    });
    let block = (0u64..5, 0u64..5, any::<u64>(), -1i32..4)
        .prop_map(|(block_service, block, file, kind)| pb::BadBlock { block_service, block, file, kind });
    prop_oneof![
        Just(Op::Hello(pb::Hello {})),
        any::<bool>().prop_map(|with_keys| Op::Map(pb::ClusterMap { with_keys })),
        prop::collection::vec(block, 0..6).prop_map(|blocks| Op::ReportBlocks(pb::ReportBlocks { blocks })),
        (prop::collection::vec(0u64..5, 0..4), 0u32..40, 0u32..40).prop_map(
            |(block_services, set, clear)| { Op::SetFlags(pb::SetFlags { block_services, set, clear }) }
        ),
        (text(), prop::collection::vec(shard, 0..6))
            .prop_map(|(address, shards)| Op::RegisterShards(pb::RegisterShards { address, shards })),
        (text(), any::<u32>()).prop_map(|(address, transactions)| {
            Op::RegisterCrossdir(pb::RegisterCrossdir { address, transactions })
        }),
        (text(), text(), prop::collection::vec(hostile_report(), 0..4)).prop_map(
            |(address, failure_domain, block_services)| Op::RegisterBlockServices(
                pb::RegisterBlockServices { address, failure_domain, block_services }
            )
        ),
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
                prop_assert_eq!(reply, Reply::Registered(pb::Registered {}));
            }
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
