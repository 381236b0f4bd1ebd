//! A shuckle behind its real port, and what daemons would tell it.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use eggs_consensus::peer_streams;
use eggs_daemon::registry::{Registry, RegistryCallError};
use eggs_daemon::server::{self, Routes};
use eggs_daemon::{CancellationToken, Secret, metrics};
use eggs_proto::pb::StoreKind;
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{RegistryError, ServiceError, pb};
use eggs_shuckle::{Config, OpenError, SecretSource, Service};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub const SECRET: [u8; 32] = [5; 32];
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Shuckle {
    pub service: Arc<Service>,
    pub address: SocketAddr,
    stop: CancellationToken,
    close: CancellationToken,
    served: JoinHandle<()>,
    ran: JoinHandle<Result<(), OpenError>>,
}

pub async fn listener() -> TcpListener {
    server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap()
}

pub fn config(directory: &Path, host: &str, address: SocketAddr, peers: Vec<String>) -> Config {
    Config {
        directory: directory.to_owned(),
        secret: SecretSource::Given(Secret::from_bytes(SECRET)),
        host: host.to_owned(),
        advertised: address.to_string(),
        peers,
        replicas: 0,
        replace_after: Config::REPLACE_AFTER,
        read_lease: false,
        snapshot_bytes_per_second: 64 << 20,
        patience: Duration::ZERO,
    }
}

impl Shuckle {
    /// The only one.
    pub async fn start(directory: &Path) -> Shuckle {
        let listener = listener().await;
        let address = listener.local_addr().unwrap();
        Shuckle::open(config(directory, "solo", address, Vec::new()), listener).await.unwrap()
    }

    pub async fn open(config: Config, listener: TcpListener) -> Result<Shuckle, OpenError> {
        let service = Arc::new(Service::open(config).await?);
        let address = listener.local_addr().unwrap();
        let (stop, close) = (CancellationToken::new(), CancellationToken::new());
        let router = service.router();
        let router = router.merge(metrics::router(service.health()));
        let routes = Routes::from(router).with(peer_streams(vec![service.peers()]));
        let served = tokio::spawn(server::serve(listener, routes, close.clone()));
        let (runs, told) = (Arc::clone(&service), stop.clone());
        let ran = tokio::spawn(async move { runs.run(told).await });
        Ok(Shuckle { service, address, stop, close, served, ran })
    }

    pub async fn join(&self, secret: Option<[u8; 32]>) -> Registry {
        join(&[self.address.to_string()], secret).await
    }

    pub async fn stop(self) {
        self.stop.cancel();
        self.ran.await.unwrap().unwrap();
        self.close.cancel();
        self.served.await.unwrap();
        Arc::into_inner(self.service).unwrap().stop().await;
    }

    /// How it ends by itself.
    pub async fn ended(self) -> OpenError {
        let error = tokio::time::timeout(PATIENCE, self.ran).await.expect("it goes on").unwrap().unwrap_err();
        self.close.cancel();
        self.served.await.unwrap();
        error
    }

    pub async fn page(&self, path: &str) -> String {
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

    pub async fn json(&self, path: &str) -> serde_json::Value {
        let answer = self.page(path).await;
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{path}: {error} in {answer}"))
    }
}

pub async fn join(addresses: &[String], secret: Option<[u8; 32]>) -> Registry {
    let secret = secret.map(Secret::from_bytes);
    let stop = CancellationToken::new();
    let joined = Registry::join(addresses, secret, None, &stop);
    tokio::time::timeout(PATIENCE, joined).await.expect("no answer to hello").unwrap()
}

/// Looks again and again until it is so.
pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub fn disk(id: u64, key: u8) -> pb::BlockServiceReport {
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

pub fn disks(disks: Vec<pb::BlockServiceReport>) -> Op {
    Op::RegisterBlockServices(pb::RegisterBlockServices {
        address: "host:5003".to_owned(),
        failure_domain: "host".to_owned(),
        block_services: disks,
        ..Default::default()
    })
}

/// A heartbeat of a store that leads these groups alone.
pub fn store(id: u64, kind: StoreKind, host: &str, leads: std::ops::Range<u32>) -> Op {
    let led = |group| pb::LedGroup {
        group,
        term: 1,
        applied_index: 10,
        log_bytes: 20,
        voters: vec![id],
        ..pb::LedGroup::default()
    };
    Op::RegisterStore(pb::RegisterStore {
        id,
        kind: kind.into(),
        host: host.to_owned(),
        address: format!("{host}:{}", 5000 + kind as i32),
        led: leads.map(led).collect(),
        transactions: 2,
        boot: id,
        ..pb::RegisterStore::default()
    })
}

pub async fn register(registry: &Registry, op: Op) {
    match registry.call(op).await {
        Ok(Answer::Registered(_)) => {}
        other => panic!("not registered: {other:?}"),
    }
}

pub async fn refused(registry: &Registry, op: Op) -> RegistryError {
    match registry.call(op).await {
        Err(RegistryCallError::Refused { error, .. }) => RegistryError::from_code(error.code).unwrap(),
        other => panic!("not refused: {other:?}"),
    }
}
