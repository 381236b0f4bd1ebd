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

#[test]
fn an_error() {
    let error = pb::Error { code: 20, message: "no".to_owned(), ..pb::Error::default() };
    assert_eq!(hex(&error), "08141202".to_owned() + "6e6f");
}

const SHARD_REQUEST: &str = "0a2808011102000000000000001a10030303030303030303030303030303032104000000000000002805100152100a0e420c090000000000002000120166";
const LOG_ENTRY: &str = "09010000000000000011020000000000000018032201ff";
