//! Who is not of the cluster, or talks nonsense, is refused in one line and harms nobody.

use std::time::Duration;

use bytes::Bytes;
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::{StoreId, pb};
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::cluster::{CLUSTER, Cluster, GROUP, SECRET, reply};

fn greeting(from: StoreId, to: StoreId) -> pb::PeerGreeting {
    pb::PeerGreeting {
        version: PROTOCOL_VERSION,
        cluster_id: CLUSTER.0.to_vec().into(),
        secret: SECRET.to_vec().into(),
        from_store: from.0,
        to_store: to.0,
    }
}

fn batch(messages: Vec<pb::PeerMessage>) -> pb::PeerBatch {
    pb::PeerBatch { heartbeat: Some(pb::PeerHeartbeat { boot: 1, ..Default::default() }), messages }
}

fn frame(message: &impl Message) -> Vec<u8> {
    let bytes = message.encode_to_vec();
    let length = u32::try_from(bytes.len()).unwrap();
    [&length.to_le_bytes()[..], &crc32fast::hash(&bytes).to_le_bytes(), &bytes].concat()
}

/// A stream of these bytes after its magic; what the other side says before it ends it.
async fn say(address: &str, bytes: &[Vec<u8>]) -> Option<String> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"eggspeer").await.unwrap();
    for bytes in bytes {
        stream.write_all(bytes).await.unwrap();
    }
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer));
    read.await.expect("an answer in time").unwrap();
    let body = answer.get(8..)?;
    Some(pb::PeerFarewell::decode(body).unwrap().why)
}

async fn refused(address: &str, bytes: &[Vec<u8>], why: &str) {
    let said = say(address, bytes).await.expect("a farewell");
    assert!(said.contains(why) && !said.contains('\n'), "{said:?} and not {why}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused_and_harm_nothing() {
    let mut cluster = Cluster::start(3).await;
    cluster.write(GROUP, 1, b"a").await;
    let to = cluster.store(0);
    let (address, id) = (cluster.address(to.id()), to.id());
    // Nobody knows this one, so that it ends no stream of the cluster's.
    let from = StoreId(5);
    let good = greeting(from, id);
    let garbage = pb::PeerMessage {
        group: u32::from(GROUP.0),
        body: Some(pb::peer_message::Body::Raft(Bytes::from_static(&[0xff; 64]))),
    };

    let garbage = frame(&batch(vec![garbage]));

    let hello = pb::PeerGreeting { secret: Bytes::from_static(&[1; 32]), ..good.clone() };
    refused(&address, &[frame(&hello), garbage.clone()], "secret").await;
    let hello = pb::PeerGreeting { secret: Bytes::new(), ..good.clone() };
    refused(&address, &[frame(&hello)], "secret").await;
    let hello = pb::PeerGreeting { cluster_id: Bytes::from_static(&[1; 16]), ..good.clone() };
    refused(&address, &[frame(&hello)], "another cluster").await;
    let hello = pb::PeerGreeting { version: PROTOCOL_VERSION + 1, ..good.clone() };
    refused(&address, &[frame(&hello)], "version").await;
    refused(&address, &[frame(&greeting(from, StoreId(6)))], "not on this host").await;
    for itself in [id, StoreId(0)] {
        refused(&address, &[frame(&greeting(itself, id))], "this store").await;
    }
    refused(&address, std::slice::from_ref(&garbage), "not on this host").await;
    refused(&address, &[frame(&good), garbage], "raft message").await;
    // Frames that are none: too long for a greeting, damaged, no message, cut off.
    refused(&address, &[vec![0xff; 5000]], "too long").await;
    let mut damaged = frame(&good);
    *damaged.last_mut().unwrap() ^= 1;
    refused(&address, &[damaged], "checksum").await;
    let nonsense =
        [&2_u32.to_le_bytes()[..], &crc32fast::hash(&[0xff; 2]).to_le_bytes(), &[0xff; 2]].concat();
    refused(&address, &[nonsense], "no message").await;
    refused(&address, &[frame(&good)[..20].to_vec()], "bytes remaining").await;
    refused(&address, &[frame(&good), vec![0xff; 8]], "too long").await;
    assert_eq!(say(&address, &[]).await, None);
    // A good one that says nothing is no harm either.
    assert_eq!(say(&address, &[frame(&good), frame(&batch(vec![]))]).await, None);

    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff",
        &[0; 5000],
        b"eggspee",
    ] {
        let mut raw = TcpStream::connect(&address).await.unwrap();
        raw.write_all(bytes).await.unwrap();
        let _ = raw.shutdown().await;
    }
    assert_eq!(cluster.write(GROUP, 2, b"b").await, reply(b"ab"));
    cluster.same_everywhere(GROUP, b"ab").await;
    cluster.stop().await;
}
