//! Memory under load is bounded: more comes than slow disks take, and what does not fit is told to come back.
//!
//! Slow is a file system that stands still most of the time ([`SlowDisk`]): the page cache does not help there, what a
//! block service has taken in it has in its own memory.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_client::{Client, CreateOptions, Directory, Options, Replace, SmallFile};
use eggs_tests::{
    Daemons, Process, SlowDisk, TOO_LONG, bytes, forget_peak, get, peak_bytes, program, rng, runtime,
    scratch, seed,
};
use rand::Rng as _;

const MIB: u64 = 1 << 20;
const HOSTS: [&str; 2] = ["blockd-a", "blockd-b"];
/// Writers of large and of small files at once, two to a client: 32 connections to each host.
const WRITERS: usize = 64;
const WRITERS_PER_CLIENT: usize = 2;
const READERS: usize = 8;
const LARGE_BYTES: usize = 16 << 20;
/// Stored in three mirrored blocks each.
const SMALL_FILES: usize = 256;
const SMALL_BYTES: usize = 16 << 10;

/// What `blockd/src/limits.rs` says for four disks and this many clients.
const HOST_BYTES_MAX: u64 = {
    let clients = (WRITERS / WRITERS_PER_CLIENT + READERS + 1) as u64;
    let connections = clients * 8 * MIB;
    let writes = 4 * 32 * (2 + 2) * MIB;
    let reads = READERS as u64 * 4 * ((2 + 2) * MIB / 2 + 2 * MIB);
    let batches = 2 * 128 * MIB;
    let received = 32 * 4 * MIB;
    let rest = 64 * MIB;
    // A quarter more for what the allocator has not given back.
    (connections + writes + reads + batches + received + rest) / 4 * 5
};

/// Two spans of 64 MiB with their parity (`FileWriter`), and what is on its way and the program itself.
const WRITER_BYTES_MAX: u64 = (2 * (64 + 32) + 64) * MIB;
/// 32 MiB read ahead and the 8 MiB handed out, with parity when one is late, twice while they are put together; and the same.
const READER_BYTES_MAX: u64 = ((32 + 8) * 3 / 2 * 2 + 64) * MIB;

/// Daemons whose disks are all on one slow file system; `None` where there cannot be one.
fn on_slow_disks(root: &Path) -> Option<(SlowDisk, Daemons)> {
    let mount = root.join("slow");
    let disk = SlowDisk::mount(&mount, 8 << 30)?;
    let cluster = root.join("cluster");
    std::fs::create_dir(&cluster).unwrap();
    for host in HOSTS {
        std::fs::create_dir(mount.join(host)).unwrap();
        std::os::unix::fs::symlink(mount.join(host), cluster.join(host)).unwrap();
    }
    Some((disk, Daemons::start(&cluster)))
}

/// How often a host has told somebody to come back.
fn busy(daemons: &Daemons, host: &str) -> u64 {
    let page = get(daemons.address(host), "/metrics").body;
    let lines =
        page.lines().filter(|line| line.starts_with("eggs_block_errors_total") && line.contains("Busy"));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

async fn client(shuckle: &str) -> Client {
    Client::connect(Options::new(shuckle)).await.unwrap()
}

fn small_files(random: &Bytes, writer: usize) -> Vec<SmallFile> {
    let file = |n: usize| SmallFile {
        name: format!("{writer}-small-{n}").into(),
        contents: random.slice((writer + n) * 4096..(writer + n) * 4096 + SMALL_BYTES),
        attributes: None,
        replace: Replace::Refuse,
    };
    (0..SMALL_FILES).map(file).collect()
}

fn large_file(random: &Bytes, writer: usize) -> Bytes {
    random.slice(writer * 4096..writer * 4096 + LARGE_BYTES)
}

async fn write(client: &Client, random: &Bytes, writer: usize) {
    let directory: Directory = client.directory("/").await.unwrap();
    let options = CreateOptions::default();
    let large = directory.put_bytes(format!("{writer}-large"), large_file(random, writer), &options);
    let (large, small) = tokio::join!(large, directory.put_many(small_files(random, writer)));
    large.unwrap();
    for file in small {
        file.unwrap();
    }
}

async fn check(client: &Client, random: &Bytes, writer: usize) {
    let large = client.open(format!("/{writer}-large")).await.unwrap();
    assert!(large.read_all(LARGE_BYTES as u64).await.unwrap() == large_file(random, writer), "{writer}");
    let small = small_files(random, writer);
    let paths: Vec<String> =
        small.iter().map(|file| format!("/{}", String::from_utf8_lossy(&file.name))).collect();
    let mut read = client.read_paths(&paths).await;
    for file in small {
        let found = read.next().await.unwrap().unwrap();
        assert!(found.contents.as_ref() == Some(&file.contents), "{:?}", file.name);
    }
}

#[test]
fn block_services_with_slow_disks_hold_no_more_than_they_may() {
    seed();
    let folder = scratch();
    let Some((mut disk, mut daemons)) = on_slow_disks(folder.path()) else { return };
    let shuckle = daemons.shuckle().to_string();
    let random = Bytes::from(bytes(LARGE_BYTES + (WRITERS + SMALL_FILES) * 4096, 1));
    let hosts = HOSTS.map(|host| daemons.process(host).id());
    let before = hosts.map(|host| peak_bytes(host).unwrap());
    hosts.into_iter().for_each(forget_peak);
    runtime().block_on(async {
        let first = client(&shuckle).await;
        first.put_bytes("/read", large_file(&random, 0), &CreateOptions::default()).await.unwrap();
        disk.slow_down("0.5", "0.05");
        let began = Instant::now();
        let over = Arc::new(AtomicBool::new(false));
        let reads = Arc::new(AtomicU64::new(0));
        let mut readers = tokio::task::JoinSet::new();
        for reader in 0..READERS {
            let (client, random) = (client(&shuckle).await, random.clone());
            let (over, reads) = (Arc::clone(&over), Arc::clone(&reads));
            let mut rng = rng(&format!("reader {reader}"));
            readers.spawn(async move {
                let file = client.open("/read").await.unwrap();
                while !over.load(Ordering::Relaxed) {
                    let at = rng.random_range(0..LARGE_BYTES - (1 << 20));
                    let read = file.read_at(at as u64, 1 << 20).await.unwrap();
                    assert!(read == random[at..at + (1 << 20)], "at {at}");
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut writers = tokio::task::JoinSet::new();
        let mut clients = Vec::new();
        for writer in 0..WRITERS {
            if writer % WRITERS_PER_CLIENT == 0 {
                clients.push(client(&shuckle).await);
            }
            let (client, random) = (clients[writer / WRITERS_PER_CLIENT].clone(), random.clone());
            writers.spawn(async move { write(&client, &random, writer).await });
        }
        let mut written = 0;
        while let Some(writer) = tokio::time::timeout(3 * TOO_LONG, writers.join_next()).await.unwrap() {
            writer.unwrap();
            written += 1;
            if written == WRITERS / 2 {
                println!("half after {:?}", began.elapsed());
            }
        }
        println!("written after {:?}", began.elapsed());
        over.store(true, Ordering::Relaxed);
        while let Some(reader) = readers.join_next().await {
            reader.unwrap();
        }
        disk.speed_up();
        let peaks = hosts.map(|host| peak_bytes(host).unwrap());
        let told = HOSTS.map(|host| busy(&daemons, host));
        println!(
            "before {:?} MiB, peaks {:?} MiB, told to come back {told:?}, reads {}",
            before.map(|bytes| bytes / MIB),
            peaks.map(|bytes| bytes / MIB),
            reads.load(Ordering::Relaxed)
        );
        assert!(peaks.into_iter().all(|peak| peak <= HOST_BYTES_MAX), "at most {} MiB", HOST_BYTES_MAX / MIB);
        assert!(told.into_iter().sum::<u64>() > 0, "nobody was told to come back");
        for writer in 0..WRITERS {
            check(&first, &random, writer).await;
        }
        println!("checked after {:?}", began.elapsed());
    });
    daemons.ctl().assert_clean();
}

/// The most memory a command had; it ends well.
fn peak_of(arguments: &[&str], shuckle: &str) -> u64 {
    let mut command = program("eggsctl");
    let mut process = Process::spawn("eggsctl", command.env("EGGS_SHUCKLE", shuckle).args(arguments));
    let (mut peak, began) = (0, Instant::now());
    while let Some(bytes) = peak_bytes(process.id()) {
        peak = peak.max(bytes);
        assert!(began.elapsed() < TOO_LONG, "{arguments:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    let status = process.wait(TOO_LONG);
    assert!(status.success(), "{arguments:?}: {}", process.said());
    peak
}

#[test]
fn a_client_of_slow_disks_holds_no_more_than_it_may() {
    let folder = scratch();
    let Some((mut disk, daemons)) = on_slow_disks(folder.path()) else { return };
    let shuckle = daemons.shuckle().to_string();
    let (local, back) = (folder.path().join("local"), folder.path().join("back"));
    std::fs::write(&local, bytes(512 << 20, 1)).unwrap();
    disk.slow_down("0.2", "0.05");
    let began = Instant::now();
    let written = peak_of(&["put", local.to_str().unwrap(), "/file"], &shuckle);
    let took = began.elapsed();
    let read = peak_of(&["get", "/file", back.to_str().unwrap()], &shuckle);
    println!("written {} MiB in {took:?}, read {} MiB {:?}", written / MIB, read / MIB, began.elapsed());
    disk.speed_up();
    assert!(written <= WRITER_BYTES_MAX, "at most {} MiB", WRITER_BYTES_MAX / MIB);
    assert!(read <= READER_BYTES_MAX, "at most {} MiB", READER_BYTES_MAX / MIB);
    assert!(std::fs::read(&local).unwrap() == std::fs::read(&back).unwrap());
}
