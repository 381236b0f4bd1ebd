//! Bytes on the wire and in the log that other versions must go on reading.

use eggs_proto::pb;
use prost::Message;

fn hex(message: &impl Message) -> String {
    message.encode_to_vec().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn header() -> pb::RequestHeader {
    pb::RequestHeader {
        version: 1,
        time: 2,
        cluster_id: vec![3; 16].into(),
        session: 4,
        sequence: 5,
        secret: Default::default(),
    }
}

#[test]
fn a_request_to_a_shard() {
    let unlink = pb::Unlink { directory: 0x0020_0000_0000_0000, name: "f".into(), expected: 0 };
    let op = pb::WriteOp { op: Some(pb::write_op::Op::Unlink(unlink)) };
    let write = pb::Write { ops: vec![op] };
    let request =
        pb::ShardRequest { header: Some(header()), shard: 1, op: Some(pb::shard_request::Op::Write(write)) };
    assert_eq!(hex(&request), SHARD_REQUEST);
    let bytes = request.encode_to_vec();
    assert_eq!(pb::ShardRequest::decode(&bytes[..]).unwrap(), request);
}

#[test]
fn a_log_entry() {
    let entry = pb::LogEntry { time: 1, session: 2, sequence: 3, command: vec![0xff].into() };
    assert_eq!(hex(&entry), LOG_ENTRY);
}

fn begin(op: pb::begin_transaction::Op) -> pb::CrossdirCommand {
    let begin = pb::BeginTransaction { op: Some(op), shard: 7, session: 8, sequence: 9 };
    pb::CrossdirCommand { command: Some(pb::crossdir_command::Command::Begin(begin)) }
}

#[test]
fn intents_of_the_coordinator() {
    let attributes = |mode| Some(pb::NewAttributes { mode, ..pb::NewAttributes::default() });
    let path = pb::MkdirPath {
        parent: 1,
        names: vec!["a".into(), "b".into()],
        on_the_way: attributes(2),
        attributes: attributes(3),
    };
    assert_eq!(hex(&begin(pb::begin_transaction::Op::MkdirPath(path))), MKDIR_PATH);
    let exchange = pb::ExchangeAcross {
        directory: 1,
        name: "a".into(),
        target: 2,
        other_directory: 3,
        other_name: "b".into(),
        other_target: 4,
    };
    assert_eq!(hex(&begin(pb::begin_transaction::Op::Exchange(exchange))), EXCHANGE);
}

#[test]
fn steps_of_an_exchange_and_of_a_path() {
    use pb::write_op::Op;
    let (transaction, directory, name) = (1, 2, bytes::Bytes::from_static(b"a"));
    let steps = [
        Op::Exchange(pb::Exchange { directory, name: name.clone(), other_name: "b".into() }),
        Op::CreateDirectories(pb::CreateDirectories {
            transaction,
            owner: 2,
            names: vec![name.clone()],
            on_the_way: None,
            attributes: None,
        }),
        Op::DiscardDirectories(pb::DiscardDirectories { transaction, directory, names: vec![] }),
        Op::ExchangeEdge(pb::ExchangeEdge {
            transaction,
            directory,
            name: name.clone(),
            target: 3,
            new_target: 4,
        }),
        Op::SettleEdge(pb::SettleEdge {
            transaction,
            directory,
            name,
            target: 3,
            new_target: 4,
            exchanged_at: 5,
        }),
        Op::SetOwners(pb::SetOwners {
            transaction,
            owners: vec![pb::DirectoryOwner { directory, owner: 3 }],
        }),
    ];
    assert_eq!(steps.map(|op| hex(&pb::WriteOp { op: Some(op) })), STEPS);
}

#[test]
fn an_error() {
    let error = pb::Error { code: 20, message: "no".to_owned(), ..pb::Error::default() };
    assert_eq!(hex(&error), "08141202".to_owned() + "6e6f");
}

const SHARD_REQUEST: &str = "0a2808011102000000000000001a10030303030303030303030303030303032104000000000000002805100152100a0e420c090000000000002000120166";
const LOG_ENTRY: &str = "09010000000000000011020000000000000018032201ff";
const MKDIR_PATH: &str = "0a27a201170901000000000000001201611201621a0208022202080320072908000000000000003009";
const EXCHANGE: &str = "0a3aaa012a0901000000000000001201611902000000000000002103000000000000002a016231040000000000000020072908000000000000003009";
const STEPS: [&str; 6] = [
    "fa010f0902000000000000001201611a0162",
    "8202150901000000000000001102000000000000001a0161",
    "8a0212090100000000000000110200000000000000",
    "9202270901000000000000001102000000000000001a0161210300000000000000290400000000000000",
    "9a02300901000000000000001102000000000000001a0161210300000000000000290400000000000000310500000000000000",
    "a2021d0901000000000000001212090200000000000000110300000000000000",
];
