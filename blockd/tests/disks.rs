//! Disks that are not there, not ours, full, damaged or busy; and the others beside them.

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use eggs_blockd::store::{Doing, Fault, Faults, Options};
use eggs_blockd::{Config, DiskConfig, Service, known_cluster};
use eggs_proto::pb::write_block_request::Part;
use eggs_proto::{BlockError, ClusterId};
use support::*;
use tokio_stream::StreamExt;

fn lost(stats: &[eggs_proto::pb::BlockServiceStats]) -> Vec<bool> {
    stats.iter().map(|disk| !disk.problem.is_empty()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_disk_is_reported_and_recovers_beside_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let daemon = Daemon::start(paths.iter().map(disk).collect()).await;
    let [a, b] = paths.each_ref().map(identity);
    let bytes = contents(1, 100_000);
    daemon.write(write(&a, block(1), &bytes)).await.unwrap();
    daemon.write(write(&b, block(1), &bytes)).await.unwrap();
    assert_eq!(lost(&daemon.stats().await), [false, false]);

    let away = folder.path().join("away");
    std::fs::rename(&paths[0], &away).unwrap();
    let stats = daemon.until(|stats| lost(stats) == [true, false]).await;
    assert_eq!((stats[0].id, stats[0].capacity_bytes), (a.service.0, 0));
    assert!(stats[0].problem.contains("gone"), "{}", stats[0].problem);
    assert_eq!(daemon.fetch(&a, block(1), 0, 1).await, Err(BlockError::DiskLost));
    assert_eq!(daemon.write(write(&a, block(2), &bytes)).await, Err(BlockError::DiskLost));
    assert_eq!(daemon.erase(erase(&a, block(1))).await, Err(BlockError::DiskLost));
    assert_eq!(daemon.fetch(&b, block(1), 0, 100_000).await, Ok(bytes.clone()));
    assert!(daemon.service.health()().is_ok());

    // An empty folder in its place, as when a mount is missing: nothing is made in it.
    std::fs::create_dir(&paths[0]).unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(lost(&daemon.stats().await), [true, false]);
    assert_eq!(std::fs::read_dir(&paths[0]).unwrap().count(), 0);

    std::fs::remove_dir(&paths[0]).unwrap();
    std::fs::rename(&away, &paths[0]).unwrap();
    daemon.until(|stats| lost(stats) == [false, false] && stats[0].blocks == 1).await;
    assert_eq!(daemon.fetch(&a, block(1), 0, 100_000).await, Ok(bytes.clone()));
    daemon.write(write(&a, block(2), &bytes)).await.unwrap();
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_lost_at_the_first_failure() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let daemon = Daemon::start(vec![disk(&path)]).await;
    let a = identity(&path);
    let bytes = contents(1, 100_000);
    daemon.write(write(&a, block(1), &bytes)).await.unwrap();
    std::fs::remove_dir_all(&path).unwrap();
    // No look of the monitor is waited for.
    assert_eq!(daemon.write(write(&a, block(2), &bytes)).await, Err(BlockError::DiskLost));
    assert_eq!(daemon.fetch(&a, block(1), 0, 1).await, Err(BlockError::DiskLost));
    assert!(daemon.service.health()().is_err());
    assert!(!path.exists());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_should_exist_and_does_not_is_lost_not_new() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let expected =
        |path: &std::path::PathBuf| eggs_blockd::DiskConfig { expect_existing: true, ..disk(path) };
    open(paths.iter().map(disk).collect()).stop().await;
    let [a, b] = paths.each_ref().map(identity);
    let away = folder.path().join("away");
    std::fs::rename(&paths[0], &away).unwrap();

    let daemon = Daemon::start(paths.iter().map(expected).collect()).await;
    let bytes = contents(1, 1000);
    assert_eq!(daemon.fetch(&a, block(1), 0, 1).await, Err(BlockError::UnknownBlockService));
    daemon.write(write(&b, block(1), &bytes)).await.unwrap();
    assert_eq!(daemon.stats().await.len(), 1);
    assert!(!paths[0].exists());
    let report = daemon.service.registration("here:1");
    assert_eq!(report.block_services.len(), 1);

    std::fs::rename(&away, &paths[0]).unwrap();
    daemon.until(|stats| lost(stats) == [false, false]).await;
    daemon.write(write(&a, block(1), &bytes)).await.unwrap();
    daemon.stop().await;

    for damage in [b"".as_slice(), b"junk"] {
        std::fs::write(paths[0].join("identity"), damage).unwrap();
        let service = open(paths.iter().map(expected).collect());
        assert_eq!(service.registration("here:1").block_services.len(), 1);
        service.stop().await;
        // Alone it is refused; beside another it is lost.
        assert!(refusal(vec![disk(&paths[0])]).contains("damaged"));
        let service = open(paths.iter().map(disk).collect());
        assert_eq!(service.registration("here:1").block_services.len(), 1);
        service.stop().await;
        assert_eq!(std::fs::read(paths[0].join("identity")).unwrap(), damage);
    }
}

/// Every file under a folder with its contents.
fn tree(path: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.push((path.clone(), Vec::new()));
            found.extend(tree(&path));
        } else {
            found.push((path.clone(), std::fs::read(&path).unwrap()));
        }
    }
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_ours_is_refused_in_one_line_and_untouched() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let fresh = folder.path().join("fresh");
    let service = open(vec![disk(&path)]);
    assert!(refusal(vec![disk(&path)]).contains("in use"));
    service.stop().await;
    assert_eq!(known_cluster(&[disk(&path), disk(&fresh)]), Some(CLUSTER));
    assert_eq!(known_cluster(&[disk(&fresh)]), None);

    let before = tree(folder.path());
    let both = || vec![disk(&fresh), disk(&path)];
    let other = Service::open(Config { cluster: ClusterId([9; 16]), disks: both() }).unwrap_err().to_string();
    assert!(other.contains("another cluster") && other.contains(path.to_str().unwrap()), "{other}");
    assert!(!other.contains('\n'));
    let twice = vec![disk(&path), disk(folder.path().join("./a"))];
    assert!(refusal(twice).contains("given twice"));
    let flash = eggs_blockd::DiskConfig { storage_class: 2, ..disk(&path) };
    assert!(refusal(vec![flash]).contains("storage class"));
    assert_eq!(tree(folder.path()), before);

    let mut newer = std::fs::read(path.join("identity")).unwrap();
    newer[8] += 1;
    let good = std::fs::read(path.join("identity")).unwrap();
    std::fs::write(path.join("identity"), newer).unwrap();
    assert!(refusal(vec![disk(&path)]).contains("newer"));
    std::fs::write(path.join("identity"), good).unwrap();

    let copy = folder.path().join("copy");
    std::fs::create_dir_all(copy.join("segments")).unwrap();
    std::fs::copy(path.join("identity"), copy.join("identity")).unwrap();
    let before = tree(&copy);
    let service = open(vec![disk(&path), disk(&copy)]);
    assert_eq!(service.registration("here:1").block_services[0].path, path.display().to_string());
    assert_eq!((service.registration("here:1").block_services.len(), tree(&copy)), (1, before));
    service.stop().await;

    let full = folder.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("letter"), b"dear").unwrap();
    let before = tree(&full);
    assert!(refusal(vec![disk(&full)]).contains("neither empty nor a disk"));
    assert_eq!(tree(&full), before);
    let file = full.join("letter");
    assert!(!refusal(vec![disk(&file)]).contains('\n'));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_another_cluster_does_not_keep_the_others_from_being_served() {
    let folder = tempfile::tempdir().unwrap();
    let [foreign, right] = ["foreign", "right"].map(|name| folder.path().join(name));
    let elsewhere = Config { cluster: ClusterId([9; 16]), disks: vec![disk(&foreign)] };
    Service::open(elsewhere).unwrap().stop().await;
    open(vec![disk(&right)]).stop().await;
    let before = tree(&foreign);
    assert_eq!(known_cluster(&[disk(&foreign), disk(&right)]), None);

    let daemon = Daemon::start(vec![disk(&foreign), disk(&right)]).await;
    let told = daemon.service.registration("here:1").block_services;
    assert_eq!((told.len(), told[0].path.as_str()), (1, right.to_str().unwrap()));
    let bytes = contents(1, 100);
    daemon.write(write(&identity(&right), block(1), &bytes)).await.unwrap();
    assert!(daemon.service.health()().is_ok());
    daemon.stop().await;
    assert_eq!(tree(&foreign), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn inspecting_says_what_the_journal_knows_and_the_segments_lack() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let small = eggs_blockd::store::Options { segment_bytes: Some(4 << 20), ..Default::default() };
    let daemon = Daemon::start(vec![eggs_blockd::DiskConfig { options: small, ..disk(&path) }]).await;
    let identity = identity(&path);
    let bytes = contents(1, 1 << 20);
    for n in 1..=9 {
        daemon.write(write(&identity, block(n), &bytes)).await.unwrap();
    }
    let (cut, _) = daemon.place(&identity, block(1));
    let (gone, _) = daemon.place(&identity, block(9));
    assert_ne!(cut, gone);
    daemon.stop().await;
    let inspect = |paths: &[&Path]| {
        let inspect = std::process::Command::new(env!("CARGO_BIN_EXE_eggs-blockd"))
            .arg("inspect")
            .args(paths)
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (inspect.status.code(), text(inspect.stdout), text(inspect.stderr))
    };
    let (code, blocks, said) = inspect(&[&path]);
    assert_eq!((code, blocks.matches(" good").count(), said.as_str()), (Some(0), 9, ""), "{blocks}");

    std::fs::File::options().write(true).open(cut).unwrap().set_len(4096).unwrap();
    std::fs::remove_file(gone).unwrap();
    let (code, blocks, said) = inspect(&[folder.path(), &path]);
    let bad = blocks.matches(" damaged").count() + blocks.matches(" missing").count();
    assert_eq!((code, blocks.matches(" good").count() + bad), (Some(1), 9), "{blocks}");
    assert!(blocks.contains(" missing") && said.contains("blocks are missing"), "{blocks}{said}");
    assert!(said.contains("not a disk of EggsFS: no file 'identity'"), "{said}");

    // Looked at, they are not there; the disk is served all the same.
    let daemon = Daemon::start(vec![disk(&path)]).await;
    for n in [1, 9] {
        let refusal = daemon.fetch(&identity, block(n), 0, 1 << 20).await.unwrap_err();
        assert!(matches!(refusal, BlockError::Corrupt | BlockError::UnknownBlock), "{refusal:?}");
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_block_is_never_passed_off_as_good() {
    let folder = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(vec![disk(folder.path())]).await;
    let identity = identity(folder.path());
    let bytes = contents(1, 2 << 20);
    daemon.write(write(&identity, block(1), &bytes)).await.unwrap();
    let (path, extent) = daemon.place(&identity, block(1));
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(b"rot", u64::from(extent.data_at) + 1_500_000).unwrap();
    assert_eq!(daemon.fetch(&identity, block(1), 0, 2 << 20).await, Err(BlockError::Corrupt));
    // Every page has its checksum: parts that are damaged are not given, the others are.
    assert_eq!(daemon.fetch(&identity, block(1), 1 << 20, 1 << 20).await, Err(BlockError::Corrupt));
    assert_eq!(daemon.fetch(&identity, block(1), 0, 1 << 20).await.unwrap(), bytes.slice(..1 << 20));
    file.set_len(u64::from(extent.end) - 100).unwrap();
    assert_eq!(daemon.fetch(&identity, block(1), (2 << 20) - 1, 1).await, Err(BlockError::Corrupt));
    // Corrupt is not lost.
    assert_eq!(lost(&daemon.stats().await), [false]);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_on_one_disk_leaves_the_others_alone() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let daemon = Daemon::start(paths.iter().map(disk).collect()).await;
    let [a, b] = paths.each_ref().map(identity);
    let bytes = contents(1, 1000);
    let mut writers = tokio::task::JoinSet::new();
    for n in 0..eggs_blockd::limits::WRITES_PER_DISK_MAX as u64 {
        let start = start(&a, block(n), 1000, crc32fast::hash(&bytes));
        let messages = tokio_stream::iter([message(Part::Start(start))]).chain(tokio_stream::pending());
        let mut client = daemon.client.clone();
        writers.spawn(async move { client.write(messages).await.map(drop) });
    }
    while daemon.service.arriving(a.service) < eggs_blockd::limits::WRITES_PER_DISK_MAX {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let busy = daemon.write(write(&a, block(100), &bytes));
    let (busy, other) = tokio::join!(busy, daemon.write(write(&b, block(100), &bytes)));
    assert_eq!(busy, Err(BlockError::Busy));
    assert_eq!(other, Ok(proof(&b, block(100), &bytes)));
    writers.shutdown().await;
    assert_eq!(daemon.write(write(&a, block(100), &bytes)).await, Ok(proof(&a, block(100), &bytes)));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_does_not_end_its_writes_is_lost_until_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let paths = ["a", "b"].map(|name| folder.path().join(name));
    let faults = Arc::new(Faults::default());
    let underway_max = Some(Duration::from_millis(500));
    let options = Options { faults: Some(Arc::clone(&faults)), underway_max, ..Options::default() };
    let daemon = Daemon::start(vec![DiskConfig { options, ..disk(&paths[0]) }, disk(&paths[1])]).await;
    let [a, b] = paths.each_ref().map(identity);
    let bytes = contents(1, 1000);
    daemon.write(write(&a, block(1), &bytes)).await.unwrap();
    let delay = Duration::from_secs(4);
    faults.set(vec![Fault { on: Doing::Sync, file: ".seg", delay, error: None, times: 1 }]);
    let hung = daemon.write(write(&a, block(2), &bytes));
    let meanwhile = async {
        let stats = daemon.until(|stats| lost(stats) == [true, false]).await;
        assert!(stats[0].problem.contains("end of a write"), "{}", stats[0].problem);
        // What takes part in this disk's writes would wait with them; what can be elsewhere is told so at once.
        assert_eq!(daemon.write(write(&a, block(3), &bytes)).await, Err(BlockError::DiskLost));
        assert_eq!(daemon.write(write(&b, block(3), &bytes)).await, Ok(proof(&b, block(3), &bytes)));
    };
    let (hung, ()) = tokio::join!(hung, meanwhile);
    assert_eq!(hung, Ok(proof(&a, block(2), &bytes)));
    daemon.until(|stats| lost(stats) == [false, false]).await;
    daemon.write(write(&a, block(3), &bytes)).await.unwrap();
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_on_one_file_system_share_its_space() {
    let folder = tempfile::tempdir().unwrap();
    let one = Daemon::start(vec![disk(folder.path().join("a"))]).await;
    let whole = one.stats().await[0].capacity_bytes;
    one.stop().await;
    let paths = ["a", "b", "c", "d"].map(|name| folder.path().join(name));
    let four = Daemon::start(paths.iter().map(disk).collect()).await;
    for stats in four.stats().await {
        assert_eq!(stats.capacity_bytes, whole / 4);
    }
    let registration = four.service.registration("here:1");
    assert_eq!((registration.address.as_str(), registration.block_services.len()), ("here:1", 4));
    assert_eq!(registration.block_services[0].key.len(), 32);
    four.stop().await;
}
