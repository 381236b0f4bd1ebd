//! Requests about several blocks, over real gRPC on loopback.

mod support;

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_blockd::limits::{BATCH_BLOCKS_MAX, BATCHES_BYTES_MAX, BATCHES_RECEIVED_MAX};
use eggs_blockd::store::{Doing, Fault, Faults, Options};
use eggs_proto::{BlockError, ServiceError, pb};
use support::*;

#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_several_disks_go_in_and_come_out_together() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b", "c"].map(|name| folder.path().join(name));
    let daemon = Daemon::start(paths.iter().map(disk).collect()).await;
    let ids = paths.each_ref().map(identity);
    let all: Vec<_> =
        (0..300).map(|n| (&ids[n as usize % 3], block(n), contents(n, 1 + 37 * n as usize))).collect();
    let proofs =
        daemon.write_many(all.iter().map(|(id, block, bytes)| whole(id, *block, bytes)).collect()).await;
    for ((id, block, bytes), result) in all.iter().zip(proofs) {
        assert_eq!(result, Ok(proof(id, *block, bytes)));
    }
    // Again: the same proofs.
    let proofs =
        daemon.write_many(all.iter().map(|(id, block, bytes)| whole(id, *block, bytes)).collect()).await;
    assert!(
        proofs.iter().zip(&all).all(|(result, (id, block, bytes))| *result == Ok(proof(id, *block, bytes)))
    );
    let ranges = all.iter().map(|(id, block, bytes)| range(id, *block, 0, bytes.len() as u32)).collect();
    for ((_, _, bytes), fetched) in all.iter().zip(daemon.fetch_many(ranges).await) {
        assert_eq!(fetched.as_ref(), Ok(bytes));
    }
    let checks: Vec<_> = all.iter().map(|(id, block, bytes)| expected(id, *block, bytes)).collect();
    assert_eq!(daemon.check(checks).await, vec![None; all.len()]);
    let blocks = all.iter().map(|(id, block, _)| erase(id, *block)).collect();
    let request = pb::EraseBlocksRequest { header: Some(header()), blocks };
    let reply = daemon.client.clone().erase(request).await.unwrap().into_inner();
    for ((id, block, _), result) in all.iter().zip(reply.results) {
        assert_eq!(result.result, Some(pb::proven_block::Result::Proof(erased(id, *block))));
    }
    assert!(daemon.stats().await.iter().all(|disk| disk.blocks == 0 && disk.segments == 1));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_block_is_answered_for_itself() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let daemon = Daemon::start(paths.iter().map(disk).collect()).await;
    let [a, b] = paths.each_ref().map(identity);
    let bytes = contents(1, 10_000);
    daemon.write_many(vec![whole(&a, block(1), &bytes), whole(&b, block(1), &bytes)]).await;
    let (path, extent) = daemon.place(&a, block(1));
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(b"rot", (extent.data_at + 5000).into()).unwrap();
    std::fs::remove_dir_all(&paths[1]).unwrap();
    use BlockError::*;

    let mut uncertified = whole(&a, block(3), &bytes);
    uncertified.certificate = vec![0; 16].into();
    let mut unknown = whole(&a, block(3), &bytes);
    unknown.block_service = 0;
    let mut other = whole(&a, block(4), &bytes);
    other.data = vec![7; 10_000].into();
    let blocks = vec![whole(&a, block(2), &bytes), uncertified, whole(&b, block(2), &bytes), unknown, other];
    let results = daemon.write_many(blocks).await;
    assert_eq!(
        results,
        [
            Ok(proof(&a, block(2), &bytes)),
            Err(BadCertificate),
            Err(DiskLost),
            Err(UnknownBlockService),
            Err(WrongCrc)
        ]
    );
    let ranges = vec![
        range(&a, block(2), 5000, 5000),
        range(&a, block(1), 0, 4096),
        range(&a, block(1), 0, 10_000),
        range(&b, block(1), 0, 1),
        range(&a, block(9), 0, 1),
        range(&a, block(2), 1, 10_000),
        range(&a, block(2), 3, 0),
    ];
    assert_eq!(
        daemon.fetch_many(ranges).await,
        [
            Ok(bytes.slice(5000..)),
            Ok(bytes.slice(..4096)),
            Err(Corrupt),
            Err(DiskLost),
            Err(UnknownBlock),
            Err(OutOfRange),
            Ok(Bytes::new())
        ]
    );
    let checks = vec![
        expected(&a, block(2), &bytes),
        expected(&a, block(1), &bytes),
        expected(&b, block(1), &bytes),
        expected(&a, block(9), &bytes),
        expected(&a, block(2), &bytes[1..]),
        expected(&a, block(2), &[7; 10_000]),
    ];
    let verdicts = daemon.check(checks).await;
    assert_eq!(
        verdicts,
        [None, Some(Corrupt), Some(DiskLost), Some(UnknownBlock), Some(WrongSize), Some(WrongCrc)]
    );
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_too_much_are_refused_as_a_whole() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(vec![disk(folder.path())]).await;
    let id = identity(folder.path());
    let refused = |error: Option<pb::Error>| BlockError::from_code(error.unwrap().code).unwrap();
    let ranges = (0..3).map(|_| range(&id, block(1), 0, u32::MAX)).collect();
    let request = pb::FetchBlocksRequest { header: Some(header()), ranges };
    let reply = daemon.client.clone().fetch_many(request).await.unwrap().into_inner();
    assert_eq!(refused(reply.error), BlockError::Malformed);
    let blocks = (0..=BATCH_BLOCKS_MAX as u64).map(|n| erase(&id, block(n))).collect();
    let request = pb::EraseBlocksRequest { header: Some(header()), blocks };
    let reply = daemon.client.clone().erase(request).await.unwrap().into_inner();
    assert_eq!(refused(reply.error), BlockError::Malformed);
    let reply = daemon.client.clone().check(pb::CheckBlocksRequest::default()).await.unwrap().into_inner();
    assert_eq!(refused(reply.error), BlockError::Malformed);
    assert!(daemon.write_many(Vec::new()).await.is_empty());
    daemon.stop().await;
}

/// A disk whose syncs take a while.
fn slow(path: &Path, delay: Duration) -> eggs_blockd::DiskConfig {
    let faults = Arc::new(Faults::default());
    faults.set(vec![Fault { on: Doing::Sync, file: ".seg", delay, error: None, times: u32::MAX }]);
    let options = Options { faults: Some(faults), ..Default::default() };
    eggs_blockd::DiskConfig { options, ..disk(path) }
}

/// A daemon in a process of its own: this program again, with the folder of its disks in [`FOLDER`].
struct Alone {
    process: std::process::Child,
    address: String,
}

const FOLDER: &str = "EGGS_TEST_FOLDER";

impl Alone {
    fn start(test: &str, folder: &Path) -> Alone {
        let program = std::env::current_exe().unwrap();
        let mut process = Command::new(program)
            .args([test, "--exact", "--nocapture"])
            .env(FOLDER, folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (file, begun) = (folder.join("address"), Instant::now());
        let address = loop {
            if let Ok(address) = std::fs::read_to_string(&file) {
                break address;
            }
            assert!(process.try_wait().unwrap().is_none(), "the daemon ended");
            assert!(begun.elapsed() < Duration::from_secs(60), "the daemon does not start");
            std::thread::sleep(Duration::from_millis(10));
        };
        Alone { process, address }
    }

    /// That process, until it is told to end, or who started it has.
    async fn run(daemon: Daemon, folder: &Path) {
        std::fs::write(folder.join("new"), &daemon.address).unwrap();
        std::fs::rename(folder.join("new"), folder.join("address")).unwrap();
        tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()).unwrap()).await.unwrap();
        daemon.stop().await;
    }

    /// The most memory it ever had.
    fn peak_bytes(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        peak.split_whitespace().next().unwrap().parse::<usize>().unwrap() << 10
    }

    fn stop(mut self) {
        drop(self.process.stdin.take());
        assert!(self.process.wait().unwrap().success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_of_a_slow_disk_are_told_to_come_back_and_memory_is_bounded() {
    if let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) {
        let slow = slow(&folder.join("slow"), Duration::from_millis(300));
        return Alone::run(Daemon::start(vec![slow, disk(folder.join("well"))]).await, &folder).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let test = "many_clients_of_a_slow_disk_are_told_to_come_back_and_memory_is_bounded";
    let daemon = Alone::start(test, folder.path());
    let [slow, well] = ["slow", "well"].map(|name| identity(folder.path().join(name)));
    let before = daemon.peak_bytes();
    let clients: Vec<_> = (0..8).map(|_| client(&daemon.address)).collect();
    // Three times as much at once as may be held.
    const BYTES: usize = 6 << 20;
    let bytes = contents(1, BYTES);
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..(3 * BATCHES_BYTES_MAX / BYTES) as u64 {
        let (client, block) = (clients[n as usize % clients.len()].clone(), whole(&slow, block(n), &bytes));
        tasks.spawn(async move { write_many(&client, vec![block]).await.remove(0) });
    }
    let begun = Instant::now();
    // Another disk is not touched by that: it is answered, if only with "come back".
    let mut other = Vec::new();
    while other.len() < 3 && begun.elapsed() < Duration::from_secs(60) {
        let block = whole(&well, block(1000 + other.len() as u64), &contents(2, 1000));
        other.extend(write_many(&clients[0], vec![block]).await.remove(0).ok());
    }
    assert_eq!(other.len(), 3);
    let (mut written, mut busy) = (0, 0);
    while let Some(result) = tasks.join_next().await {
        match result.unwrap() {
            Ok(_) => written += 1,
            Err(BlockError::Busy) => busy += 1,
            Err(error) => panic!("{error:?}"),
        }
    }
    println!("{written} written, {busy} sent back");
    assert!(written > 0 && busy > 0);
    let grown = daemon.peak_bytes() - before;
    println!("{} MiB more", grown >> 20);
    // As `limits.rs` says: twice what is held, messages that are not whole yet, and what waits in the connections.
    let most = 2 * BATCHES_BYTES_MAX + BATCHES_RECEIVED_MAX * BYTES + clients.len() * (8 << 20);
    assert!(grown < most, "{grown} bytes, at most {most}");
    daemon.stop();
}
