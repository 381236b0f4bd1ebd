//! Rows (golden bytes), refusals, and what a command can do at most.

use bytes::Bytes;
use eggs_machine::hash::StateHash;
use eggs_machine::{MemoryTable, Tx};
use eggs_proto::flags;
use pb::StoreKind::{StoreCrossdir, StoreShard, StoreShuckle};
use prost::Message;

use super::*;

pub(crate) fn apply(table: &mut MemoryTable, time: u64, command: Command) -> Reply {
    let command = pb::RegistryCommand { command: Some(command) }.encode_to_vec();
    apply_bytes(table, time, &command)
}

fn apply_bytes(table: &mut MemoryTable, time: u64, command: &[u8]) -> Reply {
    let mut tx = Tx::new(&*table, StateHash::default());
    let outcome = RegistryMachine.apply(&mut tx, Time(time), command).unwrap();
    let (batch, _) = tx.finish();
    table.apply(batch);
    pb::RegistryReply::decode(outcome.reply).unwrap().result.unwrap()
}

pub(crate) fn report(id: u64) -> pb::BlockServiceReport {
    pb::BlockServiceReport {
        id,
        key: Bytes::from(vec![id as u8; 32]),
        storage_class: 3,
        path: format!("/disks/{id:02}"),
        capacity_bytes: 1000,
        available_bytes: 600,
        used_bytes: 400,
        blocks: 4,
        ..Default::default()
    }
}

fn put(reports: Vec<pb::BlockServiceReport>) -> Command {
    Command::PutBlockServices(pb::PutBlockServices {
        address: "10.0.0.1:5003".into(),
        failure_domain: "rack1".into(),
        block_services: reports,
    })
}

pub(crate) fn code(reply: &Reply) -> u32 {
    match reply {
        Reply::Error(error) => error.code,
        _ => 0,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn founded(id: u8, replicas: u32) -> Command {
    Command::Found(pb::FoundCluster { cluster_id: vec![id; 16].into(), replicas })
}

pub(crate) fn store(id: u64, kind: pb::StoreKind, host: &str) -> Command {
    let address = format!("{host}:{}", 5000 + kind as i32);
    Command::PutStore(pb::PutStore { id, kind: kind.into(), host: host.into(), address })
}

fn groups(puts: Vec<pb::PutGroup>) -> Command {
    Command::PutGroups(pb::PutGroups { groups: puts })
}

fn wanted(group: u32, voters: &[u64], preferred: u64) -> pb::PutGroup {
    let wanted = Some(pb::WantedReplicas { voters: voters.to_vec(), preferred, ..Default::default() });
    pb::PutGroup { group, wanted, ..Default::default() }
}

fn founding(group: u32, voters: &[u64]) -> pb::PutGroup {
    pb::PutGroup { founding: voters.to_vec(), ..wanted(group, voters, 0) }
}

fn members(group: u32, voters: &[u64], index: u64) -> pb::PutGroup {
    let membership = Some(pb::Membership { voters: voters.to_vec(), learners: vec![], index });
    pb::PutGroup { group, membership, ..Default::default() }
}

#[test]
fn golden_rows() {
    let mut table = MemoryTable::default();
    apply(&mut table, 5, founded(0xcc, 3));
    apply(&mut table, 6, put(vec![pb::BlockServiceReport { key: vec![0x11; 32].into(), ..report(7) }]));
    apply(&mut table, 7, store(0x21, StoreShard, "a"));
    apply(&mut table, 8, store(0x22, StoreShard, "b"));
    apply(&mut table, 9, Command::DrainHost(pb::DrainHost { host: "b".into(), undo: false }));
    apply(&mut table, 10, groups(vec![founding(255, &[0x21, 0x22])]));
    apply(&mut table, 11, groups(vec![members(257, &[0x33], 4)]));
    apply(&mut table, 12, Command::SetFlags(pb::SetFlags { block_services: vec![7], set: 2, clear: 0 }));
    let rows: Vec<String> = table.iter().map(|(key, value)| format!("{} {}", hex(key), hex(value))).collect();
    assert_eq!(
        rows,
        [
            // B, id → key, class, failure domain, address, path, flags, registered at, capacity
            concat!(
                "420000000000000007 0a20",
                "1111111111111111111111111111111111111111111111111111111111111111",
                "10031a057261636b31220d31302e302e302e313a353030332a092f6469736b732f3037",
                "300239060000000000000040e807",
            ),
            // G, group → founding, wanted; membership
            "4700ff 0a102100000000000000220000000000000012120a1021000000000000002200000000000000",
            "470101 1a0c0a0833000000000000001804",
            // M → cluster, created at, replicas
            "4d 0a10cccccccccccccccccccccccccccccccc1105000000000000001803",
            // S, id → kind, host, address, registered at, draining
            "530000000000000021 08011201611a06613a35303031210700000000000000",
            "530000000000000022 08011201621a06623a353030312108000000000000002801",
        ]
    );
}

#[test]
fn a_cluster_is_founded_once() {
    let mut table = MemoryTable::default();
    for (id, replicas) in [(0, 3), (1, 0), (1, 2), (1, 7)] {
        let code = code(&apply(&mut table, 1, founded(id, replicas)));
        assert_eq!(code, RegistryError::Malformed.code(), "{id} {replicas}");
    }
    assert_eq!(hello(&table).unwrap(), None);
    let first = apply(&mut table, 2, founded(1, 3));
    assert!(
        matches!(&first, Reply::Hello(hello) if hello.cluster_id == vec![1; 16] && hello.created_at == 2 && hello.replicas == 3)
    );
    assert_eq!(apply(&mut table, 3, founded(2, 5)), first, "RG-1");
    assert_eq!(hello(&table).unwrap().map(Reply::Hello), Some(first));
}

/// Stores 1 to 4 for shards on hosts a to d, 9 for the coordinator on a.
fn with_stores() -> MemoryTable {
    let mut table = MemoryTable::default();
    apply(&mut table, 1, founded(1, 3));
    for (id, host) in [(1, "a"), (2, "b"), (3, "c"), (4, "d")] {
        assert_eq!(code(&apply(&mut table, 10 + id, store(id, StoreShard, host))), 0);
    }
    assert_eq!(code(&apply(&mut table, 20, store(9, StoreCrossdir, "a"))), 0);
    table
}

#[test]
fn a_store_keeps_its_kind_and_its_beginning() {
    let mut table = with_stores();
    let before = table.clone();
    assert_eq!(code(&apply(&mut table, 30, store(1, StoreCrossdir, "a"))), RegistryError::Conflict.code());
    assert_eq!(table, before, "RG-2");
    apply(&mut table, 31, store(1, StoreShard, "elsewhere"));
    let row = schema::store(&table, StoreId(1)).unwrap().unwrap();
    assert_eq!((row.registered_at, row.host.as_str()), (11, "elsewhere"));
}

#[test]
fn a_host_is_drained_as_a_whole_and_what_is_new_on_it() {
    let mut table = with_stores();
    let drain = |undo| Command::DrainHost(pb::DrainHost { host: "a".into(), undo });
    let draining = |table: &MemoryTable| -> Vec<u64> {
        let stores = schema::stores(table).unwrap().into_iter();
        stores.filter(|(_, row)| row.draining).map(|(id, _)| id.0).collect()
    };
    apply(&mut table, 30, drain(false));
    assert_eq!(draining(&table), [1, 9]);
    apply(&mut table, 31, store(7, StoreShuckle, "a"));
    assert_eq!(draining(&table), [1, 7, 9]);
    apply(&mut table, 32, store(7, StoreShuckle, "b"));
    assert_eq!(draining(&table), [1, 9], "it moved to a host that is not drained");
    apply(&mut table, 33, drain(true));
    assert!(draining(&table).is_empty());
    let nowhere = Command::DrainHost(pb::DrainHost { host: "nowhere".into(), undo: false });
    assert_eq!(code(&apply(&mut table, 34, nowhere)), RegistryError::UnknownMember.code());
}

#[test]
fn groups_have_known_stores_of_their_kind() {
    let mut table = with_stores();
    let before = table.clone();
    let good = founding(0, &[1, 2, 3]);
    for (bad, error) in [
        (wanted(1, &[1, 2, 77], 1), RegistryError::UnknownMember),
        (wanted(1, &[1, 2, 9], 1), RegistryError::Malformed),
        (wanted(1, &[1, 2, 2], 1), RegistryError::Malformed),
        (wanted(1, &[1, 2, 0], 1), RegistryError::Malformed),
        (wanted(1, &[], 0), RegistryError::Malformed),
        (wanted(1, &[1, 2, 3], 4), RegistryError::Malformed),
        (wanted(258, &[1, 2, 3], 1), RegistryError::Malformed),
        (wanted(70_000, &[1, 2, 3], 1), RegistryError::Malformed),
        (members(1, &[], 1), RegistryError::Malformed),
        (members(1, &[5, 5], 1), RegistryError::Malformed),
        (founding(257, &[1]), RegistryError::Conflict),
        (wanted(0, &[1, 2, 3], 1), RegistryError::Malformed),
    ] {
        let reply = apply(&mut table, 30, groups(vec![good.clone(), bad.clone()]));
        assert_eq!(code(&reply), error.code(), "RG-10: {bad:?}");
        assert_eq!(table, before, "RG-2: {bad:?}");
    }
}

#[test]
fn nobody_founds_a_group_whose_members_have_changed() {
    let founders = |table: &MemoryTable| schema::group(table, GroupId(0)).unwrap().unwrap().founding;
    let mut table = with_stores();
    apply(&mut table, 30, groups(vec![founding(0, &[1, 2, 3])]));
    let again = apply(&mut table, 31, groups(vec![founding(0, &[2, 3, 4])]));
    assert_eq!(code(&again), RegistryError::Conflict.code());
    apply(&mut table, 32, groups(vec![members(0, &[1, 2, 3], 0)]));
    assert_eq!(founders(&table), [1, 2, 3], "one that was late may found its replica yet");
    let mut moved = table.clone();
    apply(&mut moved, 33, groups(vec![wanted(0, &[1, 2, 4], 1)]));
    assert!(founders(&moved).is_empty(), "RG-11");
    apply(&mut moved, 34, groups(vec![wanted(0, &[1, 2, 3], 1)]));
    assert!(founders(&moved).is_empty(), "RG-11: and for good");
    apply(&mut table, 33, groups(vec![members(0, &[1, 2, 3], 7)]));
    assert!(founders(&table).is_empty(), "RG-11");
    apply(&mut table, 34, groups(vec![members(0, &[4], 6)]));
    let row = schema::group(&table, GroupId(0)).unwrap().unwrap();
    assert_eq!(row.membership.unwrap().voters, [1, 2, 3], "old news");
}

#[test]
fn a_replaced_store_is_forgotten_with_its_last_replica() {
    let mut table = with_stores();
    apply(&mut table, 30, groups(vec![founding(0, &[1, 2, 3])]));
    apply(&mut table, 31, groups(vec![members(0, &[1, 2, 3], 1)]));
    apply(&mut table, 32, store(11, StoreShard, "a"));
    assert!(schema::store(&table, StoreId(1)).unwrap().is_some());
    apply(&mut table, 33, groups(vec![wanted(0, &[2, 3, 11], 2)]));
    assert!(schema::store(&table, StoreId(1)).unwrap().is_some());
    apply(&mut table, 34, groups(vec![members(0, &[2, 3, 11], 5)]));
    assert!(schema::store(&table, StoreId(1)).unwrap().is_none(), "RG-12");
    assert!(schema::store(&table, StoreId(9)).unwrap().is_some(), "RG-12: of another kind");
}

#[test]
fn a_second_disk_with_one_id_is_refused_with_all_that_came_with_it() {
    let mut table = MemoryTable::default();
    assert_eq!(code(&apply(&mut table, 1, put(vec![report(1)]))), 0);
    let before = table.clone();
    let other = pb::BlockServiceReport { key: vec![9; 32].into(), ..report(1) };
    let reply = apply(&mut table, 2, put(vec![report(2), other]));
    assert_eq!(code(&reply), RegistryError::Conflict.code(), "RG-3");
    assert_eq!(table, before, "RG-2");
}

#[test]
fn what_people_set_stays_when_a_disk_moves() {
    let mut table = MemoryTable::default();
    apply(&mut table, 1, put(vec![report(1)]));
    let set = pb::SetFlags { block_services: vec![1], set: flags::NO_WRITE | flags::NO_READ, clear: 0 };
    assert_eq!(code(&apply(&mut table, 2, Command::SetFlags(set))), 0);
    let clear = pb::SetFlags { block_services: vec![1], set: 0, clear: flags::NO_READ };
    assert_eq!(code(&apply(&mut table, 3, Command::SetFlags(clear))), 0);
    let moved = pb::BlockServiceReport { path: "/new".into(), failure_domain: "own".into(), ..report(1) };
    apply(&mut table, 4, put(vec![moved]));
    let row = schema::block_service(&table, BlockServiceId(1)).unwrap().unwrap();
    assert_eq!((row.flags, row.registered_at), (flags::NO_WRITE, 1), "RG-4");
    assert_eq!((row.path.as_str(), row.failure_domain.as_str()), ("/new", "own"));
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_kept() {
    let with = |change: fn(&mut pb::BlockServiceReport)| {
        let mut report = report(1);
        change(&mut report);
        put(vec![report])
    };
    let flags = |set, clear| Command::SetFlags(pb::SetFlags { block_services: vec![1], set, clear });
    let at = |host: &str, address: &str| {
        let (host, address) = (host.to_owned(), address.to_owned());
        Command::PutStore(pb::PutStore { id: 1, kind: StoreShard.into(), host, address })
    };
    let cases = vec![
        with(|report| report.id = 0),
        with(|report| report.key = Bytes::from_static(&[1; 31])),
        with(|report| report.key = Bytes::from_static(&[0; 32])),
        with(|report| report.storage_class = 1),
        with(|report| report.storage_class = 256),
        with(|report| report.failure_domain = "x".repeat(65)),
        with(|report| report.path = "x".repeat(5000)),
        with(|report| report.path = "line\nbreak".into()),
        with(|report| report.problem = "x".repeat(2000)),
        with(|report| report.available_bytes = 2000),
        put(vec![report(1), report(1)]),
        put((1..=1025).map(report).collect()),
        flags(flags::STALE, 0),
        flags(0, flags::LOST),
        flags(flags::NO_READ, flags::NO_READ),
        Command::PutStore(pb::PutStore { id: 0, kind: 1, host: "h".into(), address: "h:1".into() }),
        Command::PutStore(pb::PutStore { id: 1, kind: 0, host: "h".into(), address: "h:1".into() }),
        Command::PutStore(pb::PutStore { id: 1, kind: 9, host: "h".into(), address: "h:1".into() }),
        at("", "h:1"),
        at("a b", "h:1"),
        at("a,b", "h:1"),
        at("line\nbreak", "h:1"),
        at(&"h".repeat(65), "h:1"),
        at("h", ""),
        at("h", "h"),
        at("h", ":5000"),
        at("h", "h:0"),
        at("h", "h:65536"),
        at("h", &format!("{}:1", "h".repeat(300))),
    ];
    for command in cases {
        let mut table = MemoryTable::default();
        let reply = apply(&mut table, 1, command.clone());
        assert_eq!(code(&reply), RegistryError::Malformed.code(), "RG-6: {command:?}");
        assert!(table.is_empty(), "RG-2: {command:?}");
    }
    let mut table = MemoryTable::default();
    let unknown = Command::SetFlags(pb::SetFlags { block_services: vec![1], set: 1, clear: 0 });
    assert_eq!(code(&apply(&mut table, 1, unknown)), RegistryError::NotFound.code());
    assert_eq!(code(&apply_bytes(&mut table, 1, b"\xff\xff")), RegistryError::Malformed.code());
    assert_eq!(code(&apply_bytes(&mut table, 1, b"")), RegistryError::Malformed.code());
    assert!(table.is_empty());
}
