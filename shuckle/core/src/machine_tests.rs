//! Rows (golden bytes), refusals, and what a command can do at most.

use bytes::Bytes;
use eggs_machine::hash::StateHash;
use eggs_machine::{MemoryTable, Tx};
use eggs_proto::flags;
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

#[test]
fn golden_rows() {
    let mut table = MemoryTable::default();
    apply(&mut table, 5, Command::Found(pb::FoundCluster { cluster_id: vec![0xcc; 16].into() }));
    apply(&mut table, 6, put(vec![pb::BlockServiceReport { key: vec![0x11; 32].into(), ..report(7) }]));
    let places = pb::PutShardPlaces { address: "h:1".into(), shards: vec![0, 255] };
    apply(&mut table, 7, Command::PutShardPlaces(places));
    apply(&mut table, 8, Command::PutCrossdir(pb::PutCrossdir { address: "h:2".into() }));
    apply(&mut table, 9, Command::SetFlags(pb::SetFlags { block_services: vec![7], set: 2, clear: 0 }));
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
            "4d 0a10cccccccccccccccccccccccccccccccc110500000000000000",
            "5000 0a03683a31",
            "50ff 0a03683a31",
            "58 0a03683a32",
        ]
    );
}

#[test]
fn a_cluster_is_founded_once() {
    let mut table = MemoryTable::default();
    let found = |id: u8| Command::Found(pb::FoundCluster { cluster_id: vec![id; 16].into() });
    assert_eq!(code(&apply(&mut table, 1, found(0))), RegistryError::Malformed.code());
    assert_eq!(hello(&table).unwrap(), None);
    let first = apply(&mut table, 2, found(1));
    assert!(
        matches!(&first, Reply::Hello(hello) if hello.cluster_id == vec![1; 16] && hello.created_at == 2)
    );
    assert_eq!(apply(&mut table, 3, found(2)), first, "RG-1");
    assert_eq!(hello(&table).unwrap().map(Reply::Hello), Some(first));
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
    let shards = |address: &str, shards: Vec<u32>| {
        Command::PutShardPlaces(pb::PutShardPlaces { address: address.into(), shards })
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
        shards("h:1", vec![256]),
        shards("h:1", vec![1, 1]),
        shards("", vec![1]),
        shards("h", vec![1]),
        shards(":5000", vec![1]),
        shards("h:0", vec![1]),
        shards("h:65536", vec![1]),
        shards(&format!("{}:1", "h".repeat(300)), vec![1]),
        Command::PutCrossdir(pb::PutCrossdir { address: "nowhere".into() }),
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
