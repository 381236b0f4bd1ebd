//! Shards and coordinator of three hosts in one process, under a registry that founds everything and decides nothing else:
//! who leads answers, the others say who does; a host that goes is not missed; two that go are named.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_consensus::peer_streams;
use eggs_daemon::server::{self, Routes};
use eggs_daemon::{CancellationToken, Secret, channel};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::crossdir_service_client::CrossdirServiceClient;
use eggs_proto::pb::registry_service_server::{RegistryService, RegistryServiceServer};
use eggs_proto::pb::shard_service_client::ShardServiceClient;
use eggs_proto::pb::{crossdir_reply, crossdir_request, registry_reply, registry_request};
use eggs_proto::pb::{shard_reply, shard_request};
use eggs_proto::{ClusterId, CrossdirError, GroupId, InodeId, ServiceError, ShardError, pb};
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status};

const CLUSTER: ClusterId = ClusterId([9; 16]);
/// Enough for whatever is to come about by itself.
const PATIENCE: Duration = Duration::from_secs(40);
/// The root's, and others for directories.
const SHARDS: u16 = 4;

/// Keeps what was reported, and founds the groups of a kind once there are as many stores of it as replicas.
#[derive(Clone)]
struct FakeRegistry {
    replicas: Arc<AtomicU32>,
    stores: Arc<Mutex<BTreeMap<u64, (pb::RegisterStore, Instant)>>>,
}

impl FakeRegistry {
    fn map(&self) -> pb::ClusterMapReply {
        let stores = self.stores.lock().unwrap();
        let replicas = self.replicas.load(Ordering::SeqCst);
        let mut map = pb::ClusterMapReply { replicas, ..pb::ClusterMapReply::default() };
        map.stores = stores
            .values()
            .map(|(store, heard)| pb::StoreInfo {
                id: store.id,
                kind: store.kind,
                host: store.host.clone(),
                address: store.address.clone(),
                alive: heard.elapsed() < Duration::from_secs(5),
                ..pb::StoreInfo::default()
            })
            .collect();
        for (kind, groups) in [
            (pb::StoreKind::StoreShard, (0..SHARDS).collect::<Vec<_>>()),
            (pb::StoreKind::StoreCrossdir, vec![GroupId::CROSSDIR.0]),
        ] {
            let voters: Vec<u64> =
                map.stores.iter().filter(|store| store.kind == kind as i32).map(|store| store.id).collect();
            if voters.len() != replicas as usize {
                continue;
            }
            map.groups.extend(groups.into_iter().map(|group| {
                let leads = |store: &&pb::StoreInfo| {
                    stores[&store.id].0.led.iter().any(|led| led.group == u32::from(group))
                };
                let leader = map.stores.iter().find(leads).map_or(0, |store| store.id);
                pb::GroupPlace {
                    group: group.into(),
                    leader,
                    alive: leader != 0,
                    voters: voters.clone(),
                    wanted: voters.clone(),
                    founding: voters.clone(),
                    ..pb::GroupPlace::default()
                }
            }));
        }
        map.groups.sort_by_key(|place| place.group);
        map
    }
}

#[tonic::async_trait]
impl RegistryService for FakeRegistry {
    async fn call(
        &self,
        request: Request<pb::RegistryRequest>,
    ) -> Result<Response<pb::RegistryReply>, Status> {
        use registry_request::Op;
        let result = match request.into_inner().op.unwrap() {
            Op::Hello(_) => registry_reply::Result::Hello(pb::HelloReply {
                cluster_id: Bytes::copy_from_slice(&CLUSTER.0),
                replicas: self.replicas.load(Ordering::SeqCst),
                ..pb::HelloReply::default()
            }),
            Op::Map(_) => registry_reply::Result::Map(self.map()),
            Op::RegisterStore(store) => {
                self.stores.lock().unwrap().insert(store.id, (store, Instant::now()));
                registry_reply::Result::Registered(pb::Registered {})
            }
            _ => panic!("nobody here asks that"),
        };
        Ok(Response::new(pb::RegistryReply { header: None, result: Some(result) }))
    }
}

fn secret() -> Secret {
    Secret::from_bytes([1; 32])
}

async fn registry(replicas: u32) -> (FakeRegistry, String) {
    let fake = FakeRegistry { replicas: Arc::new(AtomicU32::new(replicas)), stores: Arc::default() };
    let listener = server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let router = server::grpc(RegistryServiceServer::new(fake.clone()));
    tokio::spawn(server::serve(listener, router, CancellationToken::new()));
    (fake, address)
}

fn shard_config(folder: &Path, host: &str, shuckle: &str) -> eggs_shard::Config {
    eggs_shard::Config {
        data: folder.join(host).join("shard"),
        secret: secret(),
        shuckle: vec![shuckle.to_owned()],
        host: host.to_owned(),
        read_lease: false,
        snapshot_bytes_per_second: 64 << 20,
    }
}

/// One host: its shard and its coordinator service on one port.
struct Host {
    address: String,
    stop: CancellationToken,
    life: JoinHandle<()>,
}

impl Host {
    async fn start(folder: &Path, name: &str, address: SocketAddr, shuckle: &str) -> Host {
        let shard = shard_config(folder, name, shuckle);
        let (host, shuckle) = (name.to_owned(), vec![shuckle.to_owned()]);
        let crossdir = eggs_crossdir::Config {
            data: folder.join(name).join("crossdir"),
            secret: secret(),
            shuckle,
            host,
            read_lease: false,
            snapshot_bytes_per_second: 64 << 20,
        };
        let listener = server::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shard = tokio::task::spawn_blocking(|| eggs_shard::Service::open(shard)).await.unwrap().unwrap();
        let crossdir =
            tokio::task::spawn_blocking(|| eggs_crossdir::Service::open(crossdir)).await.unwrap().unwrap();
        let routes = Routes::from(shard.router().merge(crossdir.router()))
            .with(peer_streams(vec![shard.peers(), crossdir.peers()]));
        let stop = CancellationToken::new();
        let (stopped, advertised) = (stop.clone(), address.clone());
        let life = tokio::spawn(async move {
            let close = CancellationToken::new();
            let served = tokio::spawn(server::serve(listener, routes, close.clone()));
            let (a, b) =
                tokio::join!(shard.run(&advertised, stopped.clone()), crossdir.run(&advertised, stopped));
            a.unwrap();
            b.unwrap();
            close.cancel();
            served.await.unwrap();
            tokio::task::spawn_blocking(|| (shard.stop(), crossdir.stop())).await.unwrap();
        });
        Host { address, stop, life }
    }

    async fn stop(self) {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.life).await.unwrap().unwrap();
    }
}

fn header(session: u64, sequence: u64) -> pb::RequestHeader {
    pb::RequestHeader {
        version: PROTOCOL_VERSION,
        cluster_id: Bytes::copy_from_slice(&CLUSTER.0),
        session,
        sequence,
        ..pb::RequestHeader::default()
    }
}

type ShardResult = Result<shard_reply::Result, pb::Error>;

async fn ask_shard(address: &str, op: shard_request::Op, sequence: u64) -> ShardResult {
    let mut client = ShardServiceClient::new(channel::connect(address).unwrap());
    let session = if matches!(op, shard_request::Op::Write(_)) { 77 } else { 0 };
    let request = pb::ShardRequest { header: Some(header(session, sequence)), shard: 1, op: Some(op) };
    let unreachable = |status: Status| ShardError::Busy.with(status.message());
    match client.call(request).await.map_err(unreachable)?.into_inner().result.unwrap() {
        shard_reply::Result::Error(error) => Err(error),
        answer => Ok(answer),
    }
}

fn put(name: &str) -> shard_request::Op {
    let small = pb::PutSmall {
        directory: InodeId::ROOT.0,
        name: Bytes::copy_from_slice(name.as_bytes()),
        bytes: Bytes::from_static(b"contents"),
        attributes: Some(pb::NewAttributes::default()),
        ..pb::PutSmall::default()
    };
    let op = pb::WriteOp { op: Some(pb::write_op::Op::PutSmall(small)) };
    shard_request::Op::Write(pb::Write { ops: vec![op] })
}

fn list(at: u64) -> shard_request::Op {
    shard_request::Op::List(pb::List { directory: InodeId::ROOT.0, limit: 100, at, ..pb::List::default() })
}

/// Asks one after the other until one answers; that one's address too.
async fn somebody(
    hosts: &[Host],
    op: impl Fn() -> shard_request::Op,
    sequence: u64,
) -> (String, shard_reply::Result) {
    let deadline = Instant::now() + PATIENCE;
    let mut last = None;
    while Instant::now() < deadline {
        for host in hosts {
            match ask_shard(&host.address, op(), sequence).await {
                Ok(answer) => return (host.address.clone(), answer),
                Err(error) => last = Some(error),
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("nobody answers: {last:?}");
}

async fn mkdir(hosts: &[Host], name: &str, sequence: u64) -> Result<u64, pb::Error> {
    let deadline = Instant::now() + PATIENCE;
    let mut last = CrossdirError::Internal.bare();
    while Instant::now() < deadline {
        for host in hosts {
            let mut client = CrossdirServiceClient::new(channel::connect(&host.address).unwrap());
            let op = crossdir_request::Op::Mkdir(pb::Mkdir {
                parent: InodeId::ROOT.0,
                name: Bytes::copy_from_slice(name.as_bytes()),
                attributes: Some(pb::NewAttributes::default()),
            });
            let request = pb::CrossdirRequest { header: Some(header(88, sequence)), op: Some(op) };
            let Ok(reply) = client.call(request).await else { continue };
            match reply.into_inner().result.unwrap() {
                crossdir_reply::Result::Mkdir(made) => return Ok(made.inode),
                crossdir_reply::Result::Error(error)
                    if CrossdirError::from_code(error.code)
                        .is_some_and(|error| error.retry() != eggs_proto::Retry::Never) =>
                {
                    last = error;
                }
                crossdir_reply::Result::Error(error) => return Err(error),
                _ => panic!("something else than a directory"),
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("nobody makes a directory: {last:?}");
}

fn names(answer: &shard_reply::Result) -> Vec<String> {
    let shard_reply::Result::List(list) = answer else { panic!("{answer:?}") };
    list.entries.iter().map(|entry| String::from_utf8(entry.name.to_vec()).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hosts_answer_as_one_and_one_may_go() {
    let folder = tempfile::tempdir().unwrap();
    let (_fake, shuckle) = registry(3).await;
    let mut hosts = Vec::new();
    for name in ["a", "b", "c"] {
        hosts.push(Host::start(folder.path(), name, "127.0.0.1:0".parse().unwrap(), &shuckle).await);
    }
    let (leader, _) = somebody(&hosts, || put("one"), 1).await;
    // The others say who leads; repeated, the write gets its first answer; listings are the leader's.
    for host in hosts.iter().filter(|host| host.address != leader) {
        let error = ask_shard(&host.address, put("two"), 2).await.unwrap_err();
        assert_eq!((error.code, &error.leader), (ShardError::NotLeader.code(), &leader), "{error:?}");
        assert_eq!(
            ask_shard(&host.address, list(0), 0).await.unwrap_err().code,
            ShardError::NotLeader.code()
        );
    }
    let first = mkdir(&hosts, "directory", 1).await.unwrap();
    assert_eq!(mkdir(&hosts, "directory", 1).await.unwrap(), first);
    assert_eq!(mkdir(&hosts, "directory", 2).await.unwrap_err().code, CrossdirError::Exists.code());

    // An instant that is over: settled by the leader once, then told by every replica that has come so far.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let at = u64::try_from(now.as_nanos()).unwrap();
    somebody(&hosts, || put("later"), 3).await;
    assert_eq!(names(&somebody(&hosts, || list(at), 0).await.1), ["directory", "one"]);
    for host in &hosts {
        let deadline = Instant::now() + PATIENCE;
        let answer = loop {
            match ask_shard(&host.address, list(at), 0).await {
                Ok(answer) => break answer,
                Err(error) => assert!(Instant::now() < deadline, "{error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert_eq!(names(&answer), ["directory", "one"], "{}", host.address);
    }

    // The leader goes in order; another one takes its place, and knows what was asked.
    let at = hosts.iter().position(|host| host.address == leader).unwrap();
    let names_of = ["a", "b", "c"];
    let (gone, address) = (names_of[at], hosts[at].address.parse().unwrap());
    hosts.remove(at).stop().await;
    let (_, answer) = somebody(&hosts, || put("later"), 3).await;
    assert!(matches!(answer, shard_reply::Result::Write(_)));
    assert_eq!(mkdir(&hosts, "directory", 2).await.unwrap_err().code, CrossdirError::Exists.code());
    let second = mkdir(&hosts, "another", 3).await.unwrap();
    assert_eq!(names(&somebody(&hosts, || list(0), 0).await.1), ["another", "directory", "later", "one"]);

    // It comes back, and the other two go: what is left says who is missing.
    hosts.push(Host::start(folder.path(), gone, address, &shuckle).await);
    assert_eq!(mkdir(&hosts, "another", 3).await.unwrap(), second);
    hosts.remove(0).stop().await;
    hosts.remove(0).stop().await;
    let missing: Vec<&str> = names_of.into_iter().filter(|name| *name != gone).collect();
    let expected = format!("no quorum: 1 of 3 replicas answer; missing hosts {}", missing.join(", "));
    let deadline = Instant::now() + PATIENCE;
    let (mut said, mut of_crossdir) = (String::new(), String::new());
    while !said.contains("no quorum") {
        assert!(Instant::now() < deadline, "{said}");
        let asked = Instant::now();
        said = ask_shard(&hosts[0].address, put("never"), 9).await.unwrap_err().message;
        assert!(asked.elapsed() < Duration::from_secs(7), "{:?}", asked.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (a, b) = (missing[0], missing[1]);
    let other = expected.replace(&format!("{a}, {b}"), &format!("{b}, {a}"));
    assert!(said.contains("shard 1: ") && (said.contains(&expected) || said.contains(&other)), "{said}");
    while !of_crossdir.contains("the coordinator: no quorum") {
        assert!(Instant::now() < deadline, "{of_crossdir}");
        let mut client = CrossdirServiceClient::new(channel::connect(&hosts[0].address).unwrap());
        let op = crossdir_request::Op::ListTransactions(pb::ListTransactions {});
        let request = pb::CrossdirRequest { header: Some(header(0, 0)), op: Some(op) };
        if let Some(crossdir_reply::Result::Error(error)) =
            client.call(request).await.unwrap().into_inner().result
        {
            of_crossdir = error.message;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    hosts.remove(0).stop().await;
}

/// RE-1: a log that was lost makes the daemon stay away where nobody else has what it held, and another, empty store where
/// others have.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_log_is_put_aside_only_where_others_have_it() {
    let folder = tempfile::tempdir().unwrap();
    let (fake, shuckle) = registry(1).await;
    let hosts = [Host::start(folder.path(), "a", "127.0.0.1:0".parse().unwrap(), &shuckle).await];
    somebody(&hosts, || put("one"), 1).await;
    let [host] = hosts;
    host.stop().await;
    let data = folder.path().join("a/shard");
    std::fs::remove_dir_all(data.join("log")).unwrap();
    let open = || {
        let config = shard_config(folder.path(), "a", &shuckle);
        tokio::task::spawn_blocking(|| eggs_shard::Service::open(config))
    };
    let refusal = open().await.unwrap().unwrap_err().to_string();
    assert!(refusal.contains("is damaged") && refusal.contains("one replica of everything"), "{refusal}");
    assert!(!refusal.contains('\n') && data.join("state").exists(), "{refusal}");

    fake.replicas.store(3, Ordering::SeqCst);
    let service = open().await.unwrap().unwrap();
    tokio::task::spawn_blocking(|| service.stop()).await.unwrap();
    let folders = std::fs::read_dir(&data).unwrap().map(|entry| entry.unwrap().file_name());
    let aside: Vec<_> = folders.filter(|name| name.to_string_lossy().starts_with("damaged-")).collect();
    assert_eq!(aside.len(), 1);
    assert!(data.join(&aside[0]).join("state").exists());
}
