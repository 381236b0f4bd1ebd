//! A call that is repeated, because its answer got lost, happens once and is answered the same.

use std::time::Duration;

use eggs_proto::errors::{CrossdirError, ServiceError as _};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::{InodeId, pb};
use eggs_tests::{Connection, TOO_LONG, Up, answer_bytes, grpc_message, runtime, scratch, until};
use prost::Message;

const SHARD: &str = "/eggs.v1.ShardService/Call";
const CROSSDIR: &str = "/eggs.v1.CrossdirService/Call";
const SESSION: u64 = 0x5e55_1074;

fn header(cluster: &[u8], sequence: u64) -> Option<pb::RequestHeader> {
    Some(pb::RequestHeader {
        version: PROTOCOL_VERSION,
        cluster_id: cluster.to_vec().into(),
        session: SESSION,
        sequence,
        ..pb::RequestHeader::default()
    })
}

fn mkdir(cluster: &[u8], sequence: u64, name: &str) -> Vec<u8> {
    let mkdir = pb::Mkdir { parent: InodeId::ROOT.0, name: name.to_owned().into(), attributes: None };
    let op = Some(pb::crossdir_request::Op::Mkdir(mkdir));
    pb::CrossdirRequest { header: header(cluster, sequence), op }.encode_to_vec()
}

fn put(cluster: &[u8], sequence: u64, name: &str) -> Vec<u8> {
    let put = pb::PutSmall {
        directory: InodeId::ROOT.0,
        name: name.to_owned().into(),
        bytes: "contents".into(),
        ..pb::PutSmall::default()
    };
    let op = pb::WriteOp { op: Some(pb::write_op::Op::PutSmall(put)) };
    let shard = u32::from(InodeId::ROOT.shard().0);
    let op = Some(pb::shard_request::Op::Write(pb::Write { ops: vec![op] }));
    pb::ShardRequest { header: header(cluster, sequence), shard, op }.encode_to_vec()
}

/// The result without the header, whose time is another one each time.
fn call<R: Message + Default>(up: &Up, path: &str, request: &[u8]) -> R {
    let mut connection = Connection::open(up.address());
    let stream = connection.post(path, &grpc_message(request)).expect("sent");
    let answer = connection.answer(stream, TOO_LONG).expect("an answer");
    R::decode(answer_bytes(&answer).expect("a message")).expect("a reply")
}

/// The coordinator's answer, asked for until it is one.
fn crossdir(up: &Up, request: &[u8]) -> pb::crossdir_reply::Result {
    until("the coordinator's answer", TOO_LONG, || {
        let reply: pb::CrossdirReply = call(up, CROSSDIR, request);
        match reply.result.expect("a result") {
            pb::crossdir_reply::Result::Error(error)
                if [CrossdirError::Busy, CrossdirError::InProgress]
                    .map(CrossdirError::code)
                    .contains(&error.code) =>
            {
                None
            }
            result => Some(result),
        }
    })
}

fn cluster(up: &Up) -> Vec<u8> {
    runtime().block_on(async { up.client().await.cluster_id().0.to_vec() })
}

#[test]
fn a_mkdir_cut_off_is_carried_on_and_answered_once() {
    let folder = scratch();
    let data = folder.path().join("data");
    let mut up = Up::start(&data);
    let cluster = cluster(&up);
    for round in 1..=8u64 {
        let name = format!("d{round}");
        let request = mkdir(&cluster, round, &name);
        // Asked, and nobody waits for the answer.
        let mut connection = Connection::open(up.address());
        connection.post(CROSSDIR, &grpc_message(&request)).expect("sent");
        if round % 2 == 0 {
            // It is accepted by now, or not at all: both are fine, but nothing between.
            connection.answer(1, Duration::from_millis(round));
            up.kill();
            up = Up::start(&data);
        }
        drop(connection);
        let first = crossdir(&up, &request);
        let pb::crossdir_reply::Result::Mkdir(made) = &first else { panic!("{name}: {first:?}") };
        let found = up.ctl().ok(&format!("stat --json /{name}")).json();
        assert_eq!(found["inode"], InodeId(made.inode).to_string());
        // Again and again, and after a restart.
        assert_eq!(crossdir(&up, &request), first);
        if round % 3 == 0 {
            up.kill();
            up = Up::start(&data);
        }
        assert_eq!(crossdir(&up, &request), first);
        // The same wish in another call is another matter.
        let other = pb::CrossdirRequest::decode(&request[..]).map(|mut request| {
            request.header =
                request.header.map(|header| pb::RequestHeader { session: SESSION + round, ..header });
            request.encode_to_vec()
        });
        let pb::crossdir_reply::Result::Error(error) = crossdir(&up, &other.unwrap()) else {
            panic!("made twice")
        };
        assert_eq!(CrossdirError::from_code(error.code), Some(CrossdirError::Exists));
    }
    // One that the session has left behind.
    let late = crossdir(&up, &mkdir(&cluster, 1, "d1"));
    let pb::crossdir_reply::Result::Error(error) = late else { panic!("{late:?}") };
    assert_eq!(CrossdirError::from_code(error.code), Some(CrossdirError::StaleSession));
    assert_eq!(up.ctl().names("/").len(), 8);
    let report = up.ctl().assert_clean();
    assert_eq!(report["orphans"], 0, "{report}");
    up.stop();
}

#[test]
fn a_write_to_a_shard_happens_once() {
    let folder = scratch();
    let data = folder.path().join("data");
    let mut up = Up::start(&data);
    let cluster = cluster(&up);
    for round in 1..=4u64 {
        let name = format!("f{round}");
        let request = put(&cluster, round, &name);
        let result = |up: &Up| call::<pb::ShardReply>(up, SHARD, &request).result.expect("a result");
        let first = result(&up);
        let pb::shard_reply::Result::Write(written) = &first else { panic!("{first:?}") };
        assert!(matches!(written.results[0].result, Some(pb::write_result::Result::Link(_))), "{first:?}");
        // It is removed; the repeated call does not bring it back.
        up.ctl().ok(&format!("rm /{name}"));
        assert_eq!(result(&up), first);
        if round % 2 == 0 {
            up.kill();
            up = Up::start(&data);
        }
        assert_eq!(result(&up), first);
        assert_eq!(up.ctl().names("/"), [""; 0]);
    }
    up.ctl().assert_clean();
    up.stop();
}
