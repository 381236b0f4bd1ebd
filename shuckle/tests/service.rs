//! The registry over its real port: founding, registrations, map, flags, restart.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use eggs_daemon::registry::{Registry, RegistryCallError};
use eggs_daemon::{CancellationToken, Secret, metrics, server};
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{ClusterId, RegistryError, ServiceError, flags, pb};
use eggs_shuckle::{Config, SecretSource, Service};
use tokio::task::JoinHandle;

const SECRET: [u8; 32] = [5; 32];

struct Shuckle {
    service: Service,
    address: SocketAddr,
    stop: CancellationToken,
    served: JoinHandle<()>,
}

impl Shuckle {
    async fn start(directory: &Path) -> Shuckle {
        let secret = SecretSource::Given(Secret::from_bytes(SECRET));
        let service =
            Service::open(Config { directory: directory.to_owned(), secret, patience: Duration::ZERO })
                .await
                .unwrap();
        let listener = server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let router = service.router().merge(metrics::router(service.health()));
        let served = tokio::spawn(server::serve(listener, router, stop.clone()));
        Shuckle { service, address, stop, served }
    }

    async fn join(&self, secret: Option<[u8; 32]>) -> Registry {
        let secret = secret.map(Secret::from_bytes);
        let address = self.address.to_string();
        let joined = Registry::join(&address, secret, None, &self.stop);
        tokio::time::timeout(Duration::from_secs(20), joined).await.expect("no answer to hello").unwrap()
    }

    async fn stop(self) {
        self.stop.cancel();
        self.served.await.unwrap();
        self.service.stop().await;
    }

    async fn page(&self, path: &str) -> String {
        let (address, path) = (self.address, path.to_owned());
        let get = move || {
            let mut stream = std::net::TcpStream::connect(address).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        };
        tokio::task::spawn_blocking(get).await.unwrap()
    }

    async fn json(&self, path: &str) -> serde_json::Value {
        let answer = self.page(path).await;
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{path}: {error} in {answer}"))
    }
}

fn disk(id: u64, key: u8) -> pb::BlockServiceReport {
    pb::BlockServiceReport {
        id,
        key: vec![key; 32].into(),
        storage_class: 3,
        failure_domain: format!("domain-{id}"),
        path: format!("/disks/{id:02}"),
        capacity_bytes: 1000,
        available_bytes: 600,
        used_bytes: 400,
        blocks: 7,
        ..pb::BlockServiceReport::default()
    }
}

fn disks(disks: Vec<pb::BlockServiceReport>) -> Op {
    Op::RegisterBlockServices(pb::RegisterBlockServices {
        address: "host:5003".to_owned(),
        failure_domain: "host".to_owned(),
        block_services: disks,
    })
}

fn shards(address: &str, range: std::ops::Range<u32>) -> Op {
    let report = |shard| pb::ShardReport { shard, leader: true, applied_index: 10, log_bytes: 20 };
    Op::RegisterShards(pb::RegisterShards {
        address: address.to_owned(),
        shards: range.map(report).collect(),
    })
}

fn crossdir() -> Op {
    Op::RegisterCrossdir(pb::RegisterCrossdir { address: "host:5002".to_owned(), transactions: 2 })
}

async fn register(registry: &Registry, op: Op) {
    match registry.call(op).await {
        Ok(Answer::Registered(_)) => {}
        other => panic!("not registered: {other:?}"),
    }
}

async fn refused(registry: &Registry, op: Op) -> RegistryError {
    match registry.call(op).await {
        Err(RegistryCallError::Refused { error, .. }) => RegistryError::from_code(error.code).unwrap(),
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_founded_registered_and_found_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("shuckle");
    let shuckle = Shuckle::start(&path).await;
    let registry = shuckle.join(Some(SECRET)).await;
    let cluster = registry.cluster();
    assert_eq!(shuckle.service.cluster(), cluster);

    register(&registry, shards("host:5001", 0..256)).await;
    register(&registry, crossdir()).await;
    let lost = pb::BlockServiceReport { problem: "gone".to_owned(), ..disk(3, 3) };
    register(&registry, disks(vec![disk(1, 1), disk(2, 2), lost])).await;

    let map = registry.map(false).await.unwrap();
    assert_eq!(map.shards.len(), 256);
    assert!(map.shards.iter().all(|place| place.alive && place.address == "host:5001"));
    assert_eq!(
        (map.crossdir_address.as_str(), map.crossdir_alive, map.crossdir_transactions),
        ("host:5002", true, 2)
    );
    let told: Vec<_> = map.block_services.iter().map(|info| (info.id, info.flags, info.key.len())).collect();
    assert_eq!(told, [(1, 0, 0), (2, 0, 0), (3, flags::LOST, 0)]);
    let keys = registry.map(true).await.unwrap();
    assert_eq!(keys.block_services[1].key, vec![2; 32]);

    let set = Op::SetFlags(pb::SetFlags { block_services: vec![2], set: flags::NO_WRITE, clear: 0 });
    registry.call(set).await.unwrap();
    shuckle.stop().await;

    let shuckle = Shuckle::start(&path).await;
    let registry = shuckle.join(Some(SECRET)).await;
    assert_eq!(registry.cluster(), cluster);
    let map = registry.map(false).await.unwrap();
    assert_eq!(map.shards.len(), 256);
    assert_eq!(map.block_services.len(), 3);
    assert_ne!(map.block_services[1].flags & flags::NO_WRITE, 0, "a flag was forgotten");
    register(&registry, disks(vec![disk(1, 1), disk(2, 2)])).await;
    let map = registry.map(true).await.unwrap();
    assert_eq!(map.block_services[0].flags, 0);
    assert_eq!(map.block_services[1].flags, flags::NO_WRITE);
    shuckle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_allowed_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let shuckle = Shuckle::start(directory.path()).await;
    let registry = shuckle.join(Some(SECRET)).await;
    for secret in [None, Some([6; 32])] {
        let stranger = shuckle.join(secret).await;
        assert_eq!(refused(&stranger, shards("evil:1", 0..1)).await, RegistryError::Unauthorized);
        assert_eq!(refused(&stranger, crossdir()).await, RegistryError::Unauthorized);
        assert_eq!(refused(&stranger, disks(vec![disk(1, 1)])).await, RegistryError::Unauthorized);
        assert_eq!(
            refused(&stranger, Op::Map(pb::ClusterMap { with_keys: true })).await,
            RegistryError::Unauthorized
        );
    }
    register(&registry, disks(vec![disk(1, 1)])).await;
    assert_eq!(refused(&registry, disks(vec![disk(1, 9)])).await, RegistryError::Conflict);
    register(&registry, shards("host:5001", 0..2)).await;
    assert_eq!(refused(&registry, shards("other:5001", 1..2)).await, RegistryError::ShardTaken);
    assert_eq!(refused(&registry, shards("other:5001", 256..257)).await, RegistryError::Malformed);
    let unknown = Op::SetFlags(pb::SetFlags { block_services: vec![99], set: flags::NO_READ, clear: 0 });
    assert_eq!(refused(&registry, unknown).await, RegistryError::NotFound);

    // Headers nobody honest sends.
    let channel = eggs_daemon::channel::connect(&shuckle.address.to_string()).unwrap();
    let mut client = pb::registry_service_client::RegistryServiceClient::new(channel);
    let good = pb::RequestHeader {
        version: 1,
        cluster_id: registry.cluster().0.to_vec().into(),
        ..Default::default()
    };
    let other = pb::RequestHeader { cluster_id: ClusterId([1; 16]).0.to_vec().into(), ..good.clone() };
    let newer = pb::RequestHeader { version: 99, ..good.clone() };
    let map = Some(Op::Map(pb::ClusterMap { with_keys: false }));
    for (header, op, expected) in [
        (None, map.clone(), RegistryError::Malformed),
        (Some(good.clone()), None, RegistryError::Malformed),
        (Some(other), map.clone(), RegistryError::WrongCluster),
        (Some(newer), map.clone(), RegistryError::UnsupportedVersion),
    ] {
        let reply = client.call(pb::RegistryRequest { header, op }).await.unwrap().into_inner();
        let Some(Answer::Error(error)) = reply.result else { panic!("not refused: {reply:?}") };
        assert_eq!(RegistryError::from_code(error.code), Some(expected));
    }
    shuckle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_silent_becomes_stale_and_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let shuckle = Shuckle::start(directory.path()).await;
    let registry = shuckle.join(Some(SECRET)).await;
    register(&registry, shards("host:5001", 0..1)).await;
    register(&registry, crossdir()).await;
    register(&registry, disks(vec![disk(1, 1)])).await;
    let all = |map: &pb::ClusterMapReply| {
        (map.shards[0].alive, map.crossdir_alive, map.block_services[0].flags & flags::STALE == 0)
    };
    assert_eq!(all(&registry.map(false).await.unwrap()), (true, true, true));
    // The deadline is the daemons' five seconds; polled, with a generous end.
    let gone = async {
        while all(&registry.map(false).await.unwrap()) != (false, false, false) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), gone).await.expect("nobody became stale");
    let health = shuckle.json("/api/v1/status").await["health"]["state"].clone();
    assert_eq!(health, "unavailable");
    // Another host may take the shard over now.
    register(&registry, shards("other:5001", 0..1)).await;
    register(&registry, crossdir()).await;
    register(&registry, disks(vec![disk(1, 1)])).await;
    let map = registry.map(false).await.unwrap();
    assert_eq!(all(&map), (true, true, true));
    assert_eq!(map.shards[0].address, "other:5001");
    shuckle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_and_the_api_say_what_is() {
    let directory = tempfile::tempdir().unwrap();
    let shuckle = Shuckle::start(directory.path()).await;
    let registry = shuckle.join(Some(SECRET)).await;
    register(&registry, shards("host:5001", 0..200)).await;
    register(&registry, crossdir()).await;
    let lost = pb::BlockServiceReport { problem: "<script>alert(1)</script>".to_owned(), ..disk(2, 2) };
    register(&registry, disks(vec![disk(1, 1), lost])).await;
    let kind = pb::BadBlockKind::BadBlockMissing.into();
    let report =
        pb::ReportBlocks { blocks: vec![pb::BadBlock { block_service: 1, block: 1, file: 1, kind }] };
    registry.call(Op::ReportBlocks(report)).await.unwrap();

    let page = shuckle.page("/").await;
    assert!(
        page.starts_with("HTTP/1.1 200")
            && page.contains("content-security-policy")
            && page.contains("EggsFS")
    );
    for path in ["/assets/app.js", "/assets/style.css", "/assets/egg.svg"] {
        assert!(shuckle.page(path).await.starts_with("HTTP/1.1 200"), "{path}");
    }
    for prefix in ["/api/v1", "/api"] {
        let cluster = shuckle.json(&format!("{prefix}/cluster")).await;
        assert_eq!(cluster["cluster_id"], registry.cluster().to_string());
        assert_eq!(cluster["shards"].as_array().unwrap().len(), 256);
        assert_eq!(cluster["shards"][199]["state"], "alive");
        assert_eq!(cluster["shards"][200]["state"], "missing");
        assert_eq!(cluster["block_services"][1]["state"], "lost");
        assert_eq!(cluster["block_services"][1]["problem"], "<script>alert(1)</script>");
        assert_eq!(cluster["block_services"][0]["reported_blocks"], 1);
        // The lost disk counts as a disk, not as space.
        assert_eq!(cluster["classes"][0]["block_services"], 2);
        assert_eq!(cluster["classes"][0]["capacity_bytes"], 1000);
        assert_eq!(cluster["total"]["blocks"], 7);
        assert_eq!(cluster["failure_domains"][1]["name"], "domain-2");
        let reasons = cluster["health"]["reasons"].as_array().unwrap();
        assert_eq!(reasons.iter().filter(|reason| reason["lost"] == true).count(), 1, "{reasons:?}");
        assert_eq!(shuckle.json(&format!("{prefix}/status")).await["shard_counts"]["alive"], 200);
        assert_eq!(shuckle.json(&format!("{prefix}/shards")).await["shards"][0]["address"], "host:5001");
        assert_eq!(shuckle.json(&format!("{prefix}/block-services")).await["block_services"][0]["blocks"], 7);
        assert_eq!(shuckle.json(&format!("{prefix}/transactions")).await["transactions"], 2);
        assert_eq!(shuckle.json(&format!("{prefix}/version")).await["api"], 1);
        assert_eq!(shuckle.json(&format!("{prefix}/nothing")).await["error"], "no such page");
    }
    assert!(shuckle.page("/healthz").await.ends_with("ok\n"));
    let gauges = async {
        while !shuckle.page("/metrics").await.contains("eggs_shuckle_shards{state=\"alive\"} 200") {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gauges).await.expect("no gauges");
    shuckle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_service_on_the_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let shuckle = Shuckle::start(directory.path()).await;
    let config = || Config {
        directory: directory.path().to_owned(),
        secret: SecretSource::InDirectory,
        patience: Duration::ZERO,
    };
    let line = Service::open(config()).await.unwrap_err().to_string();
    assert!(line.contains("in use by process") && !line.contains('\n'), "{line}");
    shuckle.stop().await;
    let service = Service::open(config()).await.unwrap();
    assert!(directory.path().join("secret").exists());
    service.stop().await;
}
