//! Who is not of the cluster, or talks nonsense, is refused in one line and harms nobody.

use bytes::Bytes;
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::peer_service_client::PeerServiceClient;
use eggs_proto::{StoreId, pb};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tonic::{Code, Status};

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

fn batch(greeting: Option<pb::PeerGreeting>, messages: Vec<pb::PeerMessage>) -> pb::PeerBatch {
    pb::PeerBatch { greeting, heartbeat: Some(pb::PeerHeartbeat { boot: 1, ..Default::default() }), messages }
}

async fn exchange(address: &str, batches: Vec<pb::PeerBatch>) -> Result<(), Status> {
    let channel = eggs_daemon::channel::connect(address).unwrap();
    let mut client = PeerServiceClient::new(channel);
    let answer = client.exchange(tokio_stream::iter(batches));
    let answer = tokio::time::timeout(std::time::Duration::from_secs(20), answer).await;
    answer.expect("an answer in time").map(drop)
}

async fn refused(address: &str, batches: Vec<pb::PeerBatch>, code: Code, why: &str) {
    let status = exchange(address, batches).await.unwrap_err();
    assert_eq!(status.code(), code, "{status:?}");
    assert!(status.message().contains(why) && !status.message().contains('\n'), "{status:?}");
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

    let hello = pb::PeerGreeting { secret: Bytes::from_static(&[1; 32]), ..good.clone() };
    refused(&address, vec![batch(Some(hello), vec![garbage.clone()])], Code::PermissionDenied, "secret")
        .await;
    let hello = pb::PeerGreeting { secret: Bytes::new(), ..good.clone() };
    refused(&address, vec![batch(Some(hello), vec![])], Code::PermissionDenied, "secret").await;
    let hello = pb::PeerGreeting { cluster_id: Bytes::from_static(&[1; 16]), ..good.clone() };
    refused(&address, vec![batch(Some(hello), vec![])], Code::PermissionDenied, "another cluster").await;
    let hello = pb::PeerGreeting { version: PROTOCOL_VERSION + 1, ..good.clone() };
    refused(&address, vec![batch(Some(hello), vec![])], Code::FailedPrecondition, "version").await;
    let hello = greeting(from, StoreId(6));
    refused(&address, vec![batch(Some(hello), vec![])], Code::NotFound, "not on this host").await;
    for itself in [id, StoreId(0)] {
        let hello = greeting(itself, id);
        refused(&address, vec![batch(Some(hello), vec![])], Code::InvalidArgument, "this store").await;
    }
    refused(&address, vec![batch(None, vec![garbage.clone()])], Code::Unauthenticated, "greeting").await;
    let hello = batch(Some(good.clone()), vec![garbage]);
    refused(&address, vec![hello], Code::InvalidArgument, "raft message").await;
    exchange(&address, vec![]).await.unwrap();
    // A good one that says nothing is no harm either.
    exchange(&address, vec![batch(Some(good), vec![])]).await.unwrap();

    for bytes in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff", &[0; 5000]]
    {
        let mut raw = TcpStream::connect(&address).await.unwrap();
        raw.write_all(bytes).await.unwrap();
        let _ = raw.shutdown().await;
    }
    assert_eq!(cluster.write(GROUP, 2, b"b").await, reply(b"ab"));
    cluster.same_everywhere(GROUP, b"ab").await;
    cluster.stop().await;
}
