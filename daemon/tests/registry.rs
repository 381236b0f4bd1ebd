//! Joining a cluster through shuckle, heartbeats and the map.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use eggs_daemon::registry::{JoinError, Registry, RegistryCallError};
use eggs_daemon::{CancellationToken, Secret, server};
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::pb::registry_service_server::{RegistryService, RegistryServiceServer};
use eggs_proto::{ClusterId, RegistryError, ServiceError, pb};
use tonic::{Request, Response, Status};

const CLUSTER: ClusterId = ClusterId([9; 16]);

/// Counts registrations and shows the count as a group's term in the map.
#[derive(Clone)]
struct Fake {
    secret: Secret,
    registrations: Arc<AtomicU32>,
    /// Who leads: it refuses when that is somebody else; `None`: nobody does.
    leader: Arc<Mutex<Option<String>>>,
    address: String,
    /// Where the map says shuckles are.
    stores: Arc<Mutex<Vec<String>>>,
}

impl Fake {
    fn map(&self) -> pb::ClusterMapReply {
        let store = |address: &String| pb::StoreInfo {
            kind: pb::StoreKind::StoreShuckle as i32,
            address: address.clone(),
            ..pb::StoreInfo::default()
        };
        let term = u64::from(self.registrations.load(Ordering::SeqCst));
        pb::ClusterMapReply {
            groups: vec![pb::GroupPlace { term, ..pb::GroupPlace::default() }],
            stores: self.stores.lock().unwrap().iter().map(store).collect(),
            ..pb::ClusterMapReply::default()
        }
    }

    fn not_leader(&self) -> Option<pb::Error> {
        match self.leader.lock().unwrap().clone() {
            Some(leader) if leader == self.address => None,
            leader => {
                Some(pb::Error { leader: leader.unwrap_or_default(), ..RegistryError::NotLeader.bare() })
            }
        }
    }

    fn leads(&self, leader: Option<&Fake>) {
        *self.leader.lock().unwrap() = leader.map(|leader| leader.address.clone());
    }
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
                replicas: 3,
                ..pb::HelloReply::default()
            }),
            _ if !known => Answer::Error(RegistryError::WrongCluster.into()),
            _ if !self.secret.matches(&header.secret) => Answer::Error(RegistryError::Unauthorized.into()),
            _ if let Some(refusal) = self.not_leader() => Answer::Error(refusal),
            Some(Op::Map(_)) => Answer::Map(self.map()),
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
    Op::RegisterStore(pb::RegisterStore { address: "here:1".to_owned(), ..pb::RegisterStore::default() })
}

async fn start(address: std::net::SocketAddr, stop: &CancellationToken) -> (Vec<String>, Fake) {
    let listener = server::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let fake = Fake {
        secret: Secret::from_bytes([1; 32]),
        registrations: Arc::default(),
        leader: Arc::new(Mutex::new(Some(address.clone()))),
        address: address.clone(),
        stores: Arc::default(),
    };
    let router = server::grpc(RegistryServiceServer::new(fake.clone()));
    tokio::spawn(server::serve(listener, router, stop.clone()));
    (vec![address], fake)
}

async fn start_anywhere(stop: &CancellationToken) -> (Vec<String>, Fake) {
    start("127.0.0.1:0".parse().unwrap(), stop).await
}

#[tokio::test]
async fn a_daemon_joins_a_shuckle_that_comes_up_later() {
    let stop = CancellationToken::new();
    // A port that is free now, taken again for the server in a moment.
    let reserved = server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap().local_addr().unwrap();
    let joining = {
        let stop = stop.clone();
        tokio::spawn(async move {
            Registry::join(&[reserved.to_string()], Some(Secret::from_bytes([1; 32])), Some(CLUSTER), &stop)
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
    assert_eq!(map.get().groups[0].term, 0);
    let beating = CancellationToken::new();
    let registered = beating.clone();
    registry.heartbeat(|| async { report() }, move || registered.cancel(), beating).await.unwrap();
    assert_eq!(fake.registrations.load(Ordering::SeqCst), 3);
    map.refresh();
    while map.get().groups[0].term != 3 {
        assert!(map.changed().await);
    }
    stop.cancel();
}

#[tokio::test]
async fn what_no_retry_helps_against_is_fatal() {
    let stop = CancellationToken::new();
    let (address, _) = start_anywhere(&stop).await;
    let error = Registry::join(&address, None, Some(ClusterId([3; 16])), &stop).await.unwrap_err();
    assert!(matches!(error, JoinError::AnotherCluster { theirs: CLUSTER, .. }));
    let line = error.to_string();
    assert!(
        line.contains(&CLUSTER.to_string()) && line.contains(&address[0]) && !line.contains('\n'),
        "{line}"
    );

    let stranger = Registry::join(&address, Some(Secret::from_bytes([2; 32])), None, &stop).await.unwrap();
    let error = stranger.heartbeat(|| async { report() }, || {}, stop.clone()).await.unwrap_err();
    assert!(error.is_fatal() && error.to_string().contains("cluster secret"), "{error}");

    assert!(matches!(
        Registry::join(&["nonsense".to_owned()], None, None, &stop).await,
        Err(JoinError::Address(_))
    ));
    stop.cancel();
    let nobody = Registry::join(&["127.0.0.1:1".to_owned()], None, None, &stop).await;
    assert!(matches!(nobody, Err(JoinError::Stopped { .. })));
}

#[tokio::test]
async fn an_unreachable_shuckle_says_why() {
    let stop = CancellationToken::new();
    let (address, _) = start_anywhere(&stop).await;
    let registry = Registry::join(&address, None, None, &stop).await.unwrap();
    stop.cancel();
    let error = loop {
        match registry.map(false).await {
            Err(error @ RegistryCallError::Unreachable { .. }) => break error.to_string(),
            _ => tokio::task::yield_now().await,
        }
    };
    assert!(error.contains(&address[0]), "{error}");
}

#[tokio::test]
async fn hints_lead_to_whoever_leads_and_the_map_tells_of_more() {
    let stop = CancellationToken::new();
    let ((first, a), (_, b), (_, c)) =
        (start_anywhere(&stop).await, start_anywhere(&stop).await, start_anywhere(&stop).await);
    let all = [a.address.clone(), b.address.clone(), c.address.clone()];
    for fake in [&a, &b, &c] {
        *fake.stores.lock().unwrap() = all.to_vec();
        fake.registrations.store(2, Ordering::SeqCst);
        fake.leads(Some(&b));
    }
    // Told of one only: the hint leads to the leader, the map to the third.
    let registry = Registry::join(&first, Some(a.secret.clone()), None, &stop).await.unwrap();
    assert_eq!(registry.replicas(), 3);
    registry.map(false).await.unwrap();
    [&a, &b, &c].iter().for_each(|fake| fake.leads(Some(&c)));
    registry.call(report()).await.unwrap();
    assert_eq!([&a, &b, &c].map(|fake| fake.registrations.load(Ordering::SeqCst)), [2, 2, 3]);

    // Two that name each other are no trap; nor is a leader that is not there.
    a.leads(Some(&b));
    b.leads(Some(&a));
    c.leads(None);
    let electing = {
        let registry = registry.clone();
        tokio::spawn(async move { registry.call(report()).await })
    };
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!electing.is_finished());
    b.leads(Some(&b));
    assert!(matches!(electing.await.unwrap(), Ok(Answer::Registered(_))));

    // A list with a dead one in it.
    let list = [&["127.0.0.1:1".to_owned()][..], &all].concat();
    let registry = Registry::join(&list, Some(a.secret.clone()), None, &stop).await.unwrap();
    registry.map(false).await.unwrap();
    stop.cancel();
}

#[tokio::test]
async fn heartbeats_go_on_while_nobody_leads() {
    let stop = CancellationToken::new();
    let (address, fake) = start_anywhere(&stop).await;
    fake.registrations.store(2, Ordering::SeqCst);
    let registry = Registry::join(&address, Some(fake.secret.clone()), None, &stop).await.unwrap();
    let (registered, mut once) = tokio::sync::mpsc::channel(1);
    let beating = {
        let stop = stop.clone();
        tokio::spawn(async move {
            registry.heartbeat(|| async { report() }, || registered.try_send(()).unwrap(), stop).await
        })
    };
    once.recv().await.unwrap();
    fake.leads(None);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let before = fake.registrations.load(Ordering::SeqCst);
    assert!(!beating.is_finished());
    fake.leads(Some(&fake));
    while fake.registrations.load(Ordering::SeqCst) == before {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.cancel();
    beating.await.unwrap().unwrap();
}
