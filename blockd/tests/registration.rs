//! What shuckle hears of a block service, and the daemon's binary from start to end.

mod support;

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use eggs_blockd::{Config, DiskConfig, Service};
use eggs_daemon::registry::Registry;
use eggs_daemon::{CancellationToken, Secret, channel, server};
use eggs_proto::limits::MESSAGE_BYTES_MAX;
use eggs_proto::pb::block_service_client::BlockServiceClient;
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::pb::registry_service_server::{RegistryService, RegistryServiceServer};
use eggs_proto::{BlockError, ClusterId, RegistryError, ServiceError, flags, pb};
use support::*;
use tonic::{Request, Response, Status};

/// A shuckle that believes everything, but for the disks and secrets it is told to refuse.
#[derive(Clone)]
struct FakeShuckle {
    cluster: ClusterId,
    map: pb::ClusterMapReply,
    refused: Arc<Mutex<Vec<u64>>>,
    /// Empty: any secret will do.
    expected: Arc<Mutex<Vec<u8>>>,
    heard: Arc<Mutex<Option<pb::RegisterBlockServices>>>,
    secret: Arc<Mutex<Vec<u8>>>,
}

#[tonic::async_trait]
impl RegistryService for FakeShuckle {
    async fn call(
        &self,
        request: Request<pb::RegistryRequest>,
    ) -> Result<Response<pb::RegistryReply>, Status> {
        let request = request.into_inner();
        let result = match request.op.unwrap() {
            Op::Hello(_) => Answer::Hello(pb::HelloReply {
                cluster_id: self.cluster.0.to_vec().into(),
                created_at: 1,
                version: 1,
                replicas: 1,
                ..Default::default()
            }),
            _ if !self.takes(&request.header.as_ref().unwrap().secret) => {
                Answer::Error(RegistryError::Unauthorized.bare())
            }
            Op::Map(_) => Answer::Map(self.map.clone()),
            Op::RegisterBlockServices(report) if let Some(error) = self.conflict(&report) => {
                Answer::Error(error)
            }
            Op::RegisterBlockServices(report) => {
                *self.heard.lock().unwrap() = Some(report);
                *self.secret.lock().unwrap() = request.header.unwrap().secret.to_vec();
                Answer::Registered(pb::Registered {})
            }
            _ => panic!("a block service does not ask that"),
        };
        Ok(Response::new(pb::RegistryReply { header: None, result: Some(result) }))
    }
}

impl FakeShuckle {
    fn takes(&self, secret: &[u8]) -> bool {
        let expected = self.expected.lock().unwrap();
        expected.is_empty() || *expected == secret
    }

    fn conflict(&self, report: &pb::RegisterBlockServices) -> Option<pb::Error> {
        assert_ne!(report.boot, 0);
        let refused = self.refused.lock().unwrap();
        let mut ids: Vec<u64> = report.block_services.iter().map(|disk| disk.id).collect();
        ids.retain(|id| refused.contains(id));
        (!ids.is_empty()).then(|| pb::Error { block_services: ids, ..RegistryError::Conflict.bare() })
    }

    async fn start(cluster: ClusterId, map: pb::ClusterMapReply) -> (FakeShuckle, String) {
        let shuckle = FakeShuckle {
            cluster,
            map,
            refused: Arc::default(),
            expected: Arc::default(),
            heard: Arc::default(),
            secret: Arc::default(),
        };
        let listener = server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let router = server::grpc(RegistryServiceServer::new(shuckle.clone()));
        tokio::spawn(server::serve(listener, router, CancellationToken::new()));
        (shuckle, address)
    }

    async fn hears(&self, wanted: impl Fn(&pb::RegisterBlockServices) -> bool) -> pb::RegisterBlockServices {
        for _ in 0..3000 {
            if let Some(heard) = self.heard.lock().unwrap().take()
                && wanted(&heard)
            {
                return heard;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("shuckle did not hear it");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_lost_before_the_start_is_reported_by_the_id_the_cluster_remembers() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let expected = |path: &std::path::PathBuf| DiskConfig { expect_existing: true, ..disk(path) };
    open(paths.iter().map(disk).collect()).stop().await;
    let [a, b] = paths.each_ref().map(identity);
    std::fs::remove_dir_all(&paths[0]).unwrap();

    let remembered = |identity: &eggs_blockd_core::Identity, path: &Path, flags| pb::BlockServiceInfo {
        id: identity.service.0,
        key: identity.key.to_vec().into(),
        storage_class: 3,
        failure_domain: "here".to_owned(),
        path: path.display().to_string(),
        flags,
        ..Default::default()
    };
    let elsewhere = pb::BlockServiceInfo {
        failure_domain: "there".to_owned(),
        id: 5,
        ..remembered(&a, &paths[0], flags::STALE)
    };
    let map = pb::ClusterMapReply {
        block_services: vec![
            elsewhere,
            remembered(&a, &paths[0], flags::STALE),
            remembered(&b, &paths[1], 0),
        ],
        ..Default::default()
    };
    let (shuckle, address) = FakeShuckle::start(CLUSTER, map).await;
    let stop = CancellationToken::new();
    let registry = Registry::join(&[address], None, Some(CLUSTER), &stop).await.unwrap();
    let service = open(paths.iter().map(expected).collect());
    let registering = {
        let (service, stop) = (service.clone(), stop.clone());
        tokio::spawn(
            async move { service.run_registration(&registry, "here:1".to_owned(), || {}, stop).await },
        )
    };
    let heard = shuckle.hears(|heard| heard.block_services.len() == 2).await;
    let (lost, well) = (&heard.block_services[0], &heard.block_services[1]);
    assert_eq!((lost.id, lost.key.to_vec()), (a.service.0, a.key.to_vec()));
    assert!(!lost.problem.is_empty());
    assert_eq!((well.id, well.problem.as_str()), (b.service.0, ""));
    assert!(well.capacity_bytes > 0);
    stop.cancel();
    registering.await.unwrap().unwrap();
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_the_cluster_refuses_is_not_served_and_the_others_are() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let daemon = Daemon::start(paths.iter().map(disk).collect()).await;
    let [a, b] = paths.each_ref().map(identity);
    let (shuckle, address) = FakeShuckle::start(CLUSTER, Default::default()).await;
    shuckle.refused.lock().unwrap().push(a.service.0);
    let stop = CancellationToken::new();
    let registry = Registry::join(&[address], None, Some(CLUSTER), &stop).await.unwrap();
    let registering = {
        let (service, stop) = (daemon.service.clone(), stop.clone());
        tokio::spawn(
            async move { service.run_registration(&registry, "here:1".to_owned(), || {}, stop).await },
        )
    };
    let heard = shuckle.hears(|_| true).await;
    assert_eq!(heard.block_services.iter().map(|disk| disk.id).collect::<Vec<_>>(), [b.service.0]);
    let bytes = contents(1, 100);
    assert_eq!(daemon.write(write(&a, block(1), &bytes)).await, Err(BlockError::DiskLost));
    daemon.write(write(&b, block(1), &bytes)).await.unwrap();

    // The one that had it is gone; and when there is no other disk, it is asked for all the same.
    shuckle.refused.lock().unwrap().clear();
    shuckle.hears(|heard| heard.block_services.len() == 2).await;
    for _ in 0..2000 {
        if daemon.write(write(&a, block(1), &bytes)).await.is_ok() {
            stop.cancel();
            registering.await.unwrap().unwrap();
            daemon.stop().await;
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the disk is not served again");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_disks_that_are_refused_end_the_daemon_after_a_while() {
    let folder = tempfile::tempdir().unwrap();
    Secret::create(&folder.path().join("secret")).unwrap();
    open(vec![disk(folder.path().join("0"))]).stop().await;
    let (shuckle, address) = FakeShuckle::start(CLUSTER, Default::default()).await;
    shuckle.refused.lock().unwrap().push(identity(folder.path().join("0")).service.0);
    let (code, said) = refused(command(folder.path(), &address, &["0"])).await;
    assert_eq!((code, said.contains("another disk is registered")), (Some(1), true), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_secret_is_refused_before_anything_is_formatted() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret");
    Secret::create(&file).unwrap();
    let (shuckle, address) = FakeShuckle::start(CLUSTER, Default::default()).await;
    *shuckle.expected.lock().unwrap() = vec![1; 32];
    let (code, said) = refused(command(folder.path(), &address, &["0"])).await;
    let words = format!("the cluster secret in {} is not this cluster's", file.display());
    assert_eq!((code, said.contains(&words)), (Some(1), true), "{said}");
    assert!(!folder.path().join("0").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_disk_is_named_and_the_others_are_served() {
    let folder = tempfile::tempdir().unwrap();
    Secret::create(&folder.path().join("secret")).unwrap();
    let foreign = Config { cluster: ClusterId([8; 16]), disks: vec![disk(folder.path().join("foreign"))] };
    Service::open(foreign).unwrap().stop().await;
    open(vec![disk(folder.path().join("right"))]).stop().await;
    let (shuckle, address) = FakeShuckle::start(CLUSTER, Default::default()).await;
    let mut daemon = Running(command(folder.path(), &address, &["foreign", "right"]).spawn().unwrap());
    let heard = shuckle.hears(|_| true).await;
    let right = identity(folder.path().join("right")).service.0;
    assert_eq!(heard.block_services.iter().map(|disk| disk.id).collect::<Vec<_>>(), [right]);
    daemon.0.kill().unwrap();
    let mut said = String::new();
    for log in [
        daemon.0.stdout.take().map(|log| Box::new(log) as Box<dyn std::io::Read>),
        daemon.0.stderr.take().map(|log| Box::new(log) as _),
    ] {
        std::io::Read::read_to_string(&mut log.unwrap(), &mut said).unwrap();
    }
    let line = said.lines().find(|line| line.contains("another cluster")).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains("/foreign") && line.contains("ERROR"), "{line}");
    // Alone it ends the daemon.
    let (code, said) = refused(command(folder.path(), &address, &["foreign"])).await;
    assert_eq!((code, said.contains("/foreign: it belongs to another cluster")), (Some(1), true), "{said}");
}

fn command(folder: &Path, shuckle: &str, disks: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_eggs-blockd"));
    command.env_clear().stdout(Stdio::piped()).stderr(Stdio::piped());
    command.args(["--listen", "127.0.0.1:0", "--shuckle", shuckle, "--failure-domain", "rack"]);
    command.arg("--secret-file").arg(folder.join("secret"));
    for disk in disks {
        command.arg("--disk").arg(format!("{}:FLASH", folder.join(disk).display()));
    }
    command
}

/// Exit code and what it said, for a daemon that must not start.
async fn refused(mut command: Command) -> (Option<i32>, String) {
    let waited = tokio::task::spawn_blocking(move || command.output().unwrap());
    let Output { status, stderr, .. } =
        tokio::time::timeout(Duration::from_secs(20), waited).await.unwrap().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

/// Ends the daemon with the test, whatever becomes of that.
struct Running(Child);

impl Running {
    async fn terminate(mut self) -> Option<i32> {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        for _ in 0..4000 {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("it does not end");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_formats_serves_survives_kill_and_stops() {
    let folder = tempfile::tempdir().unwrap();
    let secret = Secret::create(&folder.path().join("secret")).unwrap();
    let (shuckle, address) = FakeShuckle::start(CLUSTER, Default::default()).await;
    let start = || Running(command(folder.path(), &address, &["0", "1"]).spawn().unwrap());
    let client = |address: &str| {
        BlockServiceClient::new(channel::connect(address).unwrap())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
    };

    let mut daemon = start();
    let heard = shuckle.hears(|heard| heard.block_services.len() == 2).await;
    assert!(secret.matches(&shuckle.secret.lock().unwrap()));
    assert_eq!(
        (heard.block_services[0].storage_class, heard.block_services[0].failure_domain.as_str()),
        (3, "rack")
    );
    let disk = identity(folder.path().join("0"));
    assert_eq!((heard.block_services[0].id, disk.cluster), (disk.service.0, CLUSTER));
    let bytes = contents(1, 3 << 20);
    let written =
        client(&heard.address).write(tokio_stream::iter(write(&disk, block(1), &bytes))).await.unwrap();
    assert!(matches!(written.into_inner().result, Some(pb::write_block_reply::Result::Proof(_))));

    // A second one on the same disks; a port in use; disks of another cluster.
    let (code, said) = refused(command(folder.path(), &address, &["0"])).await;
    assert_eq!((code, said.contains("in use by another process")), (Some(1), true), "{said}");
    let mut taken = command(folder.path(), &address, &["2"]);
    taken.args(["--listen", &heard.address]);
    // Clap takes a flag once.
    assert_eq!(refused(taken).await.0, Some(2));
    let (_, elsewhere) = FakeShuckle::start(ClusterId([8; 16]), Default::default()).await;
    let (code, said) = refused(command(folder.path(), &elsewhere, &["0", "2"])).await;
    assert_eq!((code, said.contains("cluster")), (Some(1), true), "{said}");
    assert!(!folder.path().join("2").exists());

    // Killed while a block arrives: the block that was proven stays, the other leaves nothing.
    let half = write(&disk, block(2), &bytes)[..2].to_vec();
    let mut writer = client(&heard.address);
    let stream = tokio_stream::StreamExt::chain(tokio_stream::iter(half), tokio_stream::pending());
    let writing = tokio::spawn(async move { writer.write(stream).await.map(drop) });
    let found = || {
        let mut found = Vec::new();
        let tell = |block| {
            found.push(block);
            Ok(())
        };
        eggs_blockd::inspect::inspect(&folder.path().join("0"), tell).unwrap();
        found
    };
    while found().iter().all(|found| found.block != block(2)) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    daemon.0.kill().unwrap();
    daemon.0.wait().unwrap();
    assert!(writing.await.unwrap().is_err());

    shuckle.heard.lock().unwrap().take();
    let daemon = start();
    let heard = shuckle.hears(|heard| heard.block_services.iter().any(|disk| disk.blocks == 1)).await;
    assert!(found().iter().all(|found| found.block == block(1) && found.whole), "{:?}", found());
    for (n, there) in [(1, true), (2, false)] {
        let mut stream =
            client(&heard.address).fetch(fetch(&disk, block(n), 0, 3 << 20)).await.unwrap().into_inner();
        let mut read = Vec::new();
        let error = loop {
            match stream.message().await.unwrap().unwrap().part.unwrap() {
                pb::fetch_block_reply::Part::Data(piece) => read.extend_from_slice(&piece),
                pb::fetch_block_reply::Part::Crc(_) => break None,
                pb::fetch_block_reply::Part::Error(error) => break Some(error.code),
            }
        };
        let unknown = eggs_proto::ServiceError::code(BlockError::UnknownBlock);
        assert_eq!((read == bytes, error), (there, (!there).then_some(unknown)));
    }
    assert_eq!(daemon.terminate().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn formatted_disks_are_served_while_shuckle_is_away() {
    let folder = tempfile::tempdir().unwrap();
    Secret::create(&folder.path().join("secret")).unwrap();
    open(vec![disk(folder.path().join("0"))]).stop().await;
    // Takes connections and says nothing, so the port stays ours until shuckle is back.
    let silent = server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let daemon = Running(command(folder.path(), &address, &["0"]).spawn().unwrap());
    // Served means opened, and that means locked.
    let path = folder.path().join("0");
    for _ in 0..4000 {
        if std::fs::File::open(&path).unwrap().try_lock().is_err() {
            assert_eq!(daemon.terminate().await, Some(0));
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the disk was not opened");
}
