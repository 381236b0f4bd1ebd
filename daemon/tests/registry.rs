//! Joining a cluster through shuckle, heartbeats and the map.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use eggs_daemon::registry::{JoinError, Registry, RegistryCallError};
use eggs_daemon::{CancellationToken, Secret, server};
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::pb::registry_service_server::{RegistryService, RegistryServiceServer};
use eggs_proto::{ClusterId, RegistryError, pb};
use tonic::{Request, Response, Status};

const CLUSTER: ClusterId = ClusterId([9; 16]);

/// Counts registrations and shows the count as a shard's place in the map.
#[derive(Clone)]
struct Fake {
    secret: Secret,
    registrations: Arc<AtomicU32>,
}

#[tonic::async_trait]
impl RegistryService for Fake {
    async fn call(
        &self,
        request: Request<pb::RegistryRequest>,
    ) -> Result<Response<pb::RegistryReply>, Status> {
        let request = request.into_inner();
        let header = request.header.unwrap_or_default();
        let known = ClusterId::from_bytes(&header.cluster_id) == Some(CLUSTER);
        let result = match request.op {
            Some(Op::Hello(_)) => Answer::Hello(pb::HelloReply {
                cluster_id: Bytes::copy_from_slice(&CLUSTER.0),
                ..pb::HelloReply::default()
            }),
            _ if !known => Answer::Error(RegistryError::WrongCluster.into()),
            _ if !self.secret.matches(&header.secret) => Answer::Error(RegistryError::Unauthorized.into()),
            Some(Op::Map(_)) => Answer::Map(pb::ClusterMapReply {
                shards: vec![pb::ShardPlace {
                    shard: self.registrations.load(Ordering::SeqCst),
                    ..pb::ShardPlace::default()
                }],
                ..pb::ClusterMapReply::default()
            }),
            // Busy at first: the daemon must try again soon.
            _ if self.registrations.fetch_add(1, Ordering::SeqCst) < 2 => {
                Answer::Error(RegistryError::Busy.into())
            }
            _ => Answer::Registered(pb::Registered {}),
        };
        Ok(Response::new(pb::RegistryReply { header: None, result: Some(result) }))
    }
}

fn report() -> Op {
    Op::RegisterCrossdir(pb::RegisterCrossdir { address: "here:1".to_owned(), transactions: 0 })
}

async fn start(address: std::net::SocketAddr, stop: &CancellationToken) -> (String, Fake) {
    let listener = server::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let fake = Fake { secret: Secret::from_bytes([1; 32]), registrations: Arc::default() };
    let router = server::grpc(RegistryServiceServer::new(fake.clone()));
    tokio::spawn(server::serve(listener, router, stop.clone()));
    (address, fake)
}

#[tokio::test]
async fn a_daemon_joins_a_shuckle_that_comes_up_later() {
    let stop = CancellationToken::new();
    // A port that is free now, taken again for the server in a moment.
    let reserved = server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap().local_addr().unwrap();
    let joining = {
        let stop = stop.clone();
        tokio::spawn(async move {
            Registry::join(&reserved.to_string(), Some(Secret::from_bytes([1; 32])), Some(CLUSTER), &stop)
                .await
        })
    };
    // Time for a few tries in vain; the test holds with any number of them.
    tokio::time::sleep(Duration::from_millis(120)).await;
    assert!(!joining.is_finished());
    let (_, fake) = start(reserved, &stop).await;
    let registry = tokio::time::timeout(Duration::from_secs(5), joining).await.unwrap().unwrap().unwrap();
    assert_eq!(registry.cluster(), CLUSTER);

    let mut map = registry.watch(false, stop.clone());
    assert!(map.changed().await);
    assert_eq!(map.get().shards[0].shard, 0);
    let beating = CancellationToken::new();
    let registered = beating.clone();
    registry.heartbeat(|| async { report() }, move || registered.cancel(), beating).await.unwrap();
    assert_eq!(fake.registrations.load(Ordering::SeqCst), 3);
    map.refresh();
    while map.get().shards[0].shard != 3 {
        assert!(map.changed().await);
    }
    stop.cancel();
}

#[tokio::test]
async fn what_no_retry_helps_against_is_fatal() {
    let stop = CancellationToken::new();
    let (address, _) = start("127.0.0.1:0".parse().unwrap(), &stop).await;
    let error = Registry::join(&address, None, Some(ClusterId([3; 16])), &stop).await.unwrap_err();
    assert!(matches!(error, JoinError::AnotherCluster { theirs: CLUSTER, .. }));
    let line = error.to_string();
    assert!(line.contains(&CLUSTER.to_string()) && line.contains(&address) && !line.contains('\n'), "{line}");

    let stranger = Registry::join(&address, Some(Secret::from_bytes([2; 32])), None, &stop).await.unwrap();
    let error = stranger.heartbeat(|| async { report() }, || {}, stop.clone()).await.unwrap_err();
    assert!(error.is_fatal() && error.to_string().contains("cluster secret"), "{error}");

    assert!(matches!(Registry::join("nonsense", None, None, &stop).await, Err(JoinError::Address(_))));
    stop.cancel();
    let nobody = Registry::join("127.0.0.1:1", None, None, &stop).await;
    assert!(matches!(nobody, Err(JoinError::Stopped { .. })));
}

#[tokio::test]
async fn an_unreachable_shuckle_says_why() {
    let stop = CancellationToken::new();
    let (address, _) = start("127.0.0.1:0".parse().unwrap(), &stop).await;
    let registry = Registry::join(&address, None, None, &stop).await.unwrap();
    stop.cancel();
    let error = loop {
        match registry.map(false).await {
            Err(error @ RegistryCallError::Unreachable { .. }) => break error.to_string(),
            _ => tokio::task::yield_now().await,
        }
    };
    assert!(error.contains(&address), "{error}");
}
