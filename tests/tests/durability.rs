//! Rounds of harm under a load: block services killed, disks deleted, bits flipped. After each the janitor makes everything
//! whole again, and in the end every file that was acknowledged is there, byte for byte.
//!
//! A short run belongs to every test run; `EGGS_TEST_ROUNDS=20` is the long one.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use eggs_client::{Client, CreateOptions};
use eggs_tests::{Daemons, Process, TOO_LONG, bytes, program, rng, runtime, scratch, seed, until};
use rand::Rng as _;
use rand::seq::IndexedRandom as _;

/// Rounds of a run that nobody asked to be longer.
const ROUNDS: u32 = 3;
const WRITERS: u64 = 4;
/// Files a writer keeps: it removes the oldest for each new one, so that a look at all of them takes as long in every round.
const FILES_KEPT: usize = 60;
/// A disk that is gone is given up after this.
const LOST_AFTER: &str = "2s";
const SIZES: [usize; 6] = [700, 5_000, 60_000, 70_000, 600_000, 3_000_000];
const HOSTS: [&str; 2] = ["blockd-a", "blockd-b"];
const DISKS: usize = 4;

/// Files that must be there, and what their bytes are made from.
type Acknowledged = Arc<Mutex<BTreeMap<String, (usize, u64)>>>;

#[test]
fn what_was_acknowledged_outlives_kills_lost_disks_and_flipped_bits() {
    let rounds = std::env::var("EGGS_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    println!("seed {}", seed());
    let folder = scratch();
    let mut daemons = Daemons::start(&folder.path().join("cluster"));
    let janitor = janitor(&daemons);
    let runtime = runtime();
    let client = runtime.block_on(daemons.client());
    let acknowledged = Acknowledged::default();
    let (written, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    runtime.block_on(client.mkdir("/load", None)).unwrap();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (client, acknowledged) = (client.clone(), acknowledged.clone());
            runtime.spawn(write(client, writer, acknowledged, written.clone(), stop.clone()))
        })
        .collect();
    let mut random = rng("harm");
    for round in 0..rounds {
        let host = *HOSTS.choose(&mut random).unwrap();
        match round % 3 {
            0 => {
                println!("round {round}: {host} is killed");
                daemons.kill(host);
                daemons.launch(host);
            }
            1 => {
                let disk = daemons.disk(host, random.random_range(0..DISKS));
                println!("round {round}: {} is deleted", disk.display());
                fs::remove_dir_all(&disk).unwrap();
                // Noticed, given up, and made anew from the others; then there is another disk in its place.
                whole(&daemons, &written);
                daemons.kill(host);
                daemons.launch(host);
            }
            _ => {
                let disk = daemons.disk(host, random.random_range(0..DISKS));
                let flips = flip_bits(&disk, &mut random);
                println!("round {round}: {flips} bits of {} are flipped", disk.display());
            }
        }
        whole(&daemons, &written);
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        runtime.block_on(writer).unwrap();
    }
    // Files that were in writing when bits flipped have been looked at by nobody yet.
    mended(&daemons);
    daemons.ctl().assert_clean();
    let acknowledged = lock(&acknowledged).clone();
    let written = written.load(Ordering::Relaxed);
    assert!(written > 20 * u64::from(rounds) && acknowledged.len() > 20, "{written} files only");
    for (path, &(size, number)) in &acknowledged {
        let read = runtime.block_on(async { client.open(path).await?.read_all(1 << 30).await });
        assert!(read.unwrap() == bytes(size, number), "{path} is not what was written");
    }
    runtime.block_on(client.close());
    drop(janitor);
}

fn janitor(daemons: &Daemons) -> Process {
    let mut command = program("eggs-janitor");
    command.args(["--listen", "127.0.0.1:0", "--shuckle", &daemons.shuckle().to_string()]);
    command.arg("--secret-file").arg(daemons.secret()).args(["--lost-after", LOST_AFTER]);
    Process::spawn("janitor", &mut command)
}

/// Writes files of all sizes, and reads what it wrote before, until it is told to stop. Whoever may read may not read wrong.
async fn write(
    client: Client,
    writer: u64,
    acknowledged: Acknowledged,
    written: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) {
    let mut number = writer;
    let mut mine: VecDeque<(String, usize, u64)> = VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        number += WRITERS;
        let size = SIZES[number as usize / WRITERS as usize % SIZES.len()];
        let path = format!("/load/file-{number}");
        let contents = Bytes::from(bytes(size, number));
        // Too few disks for a moment: then it is not acknowledged.
        if client.put_bytes(&path, contents, &CreateOptions::default()).await.is_ok() {
            lock(&acknowledged).insert(path.clone(), (size, number));
            written.fetch_add(1, Ordering::Relaxed);
            mine.push_back((path, size, number));
        }
        if mine.len() > FILES_KEPT
            && let Some((oldest, ..)) = mine.pop_front()
        {
            lock(&acknowledged).remove(&oldest);
            client.unlink(&oldest).await.unwrap();
        }
        let Some((path, size, number)) = mine.get(mine.len() / 2) else { continue };
        let read = async { client.open(path).await?.read_all(1 << 30).await };
        if let Ok(read) = read.await {
            assert!(read == bytes(*size, *number), "{path} was read wrong");
        }
    }
}

/// Waits until every block of every file is there, and right: what is not is found by this, and mended.
fn mended(daemons: &Daemons) {
    until("everything is whole again", 2 * TOO_LONG, || {
        (daemons.ctl().run(["verify", "-r", "/"]).code == Some(0)).then_some(())
    });
}

/// Waits until everything is whole again, and written to.
fn whole(daemons: &Daemons, written: &AtomicU64) {
    let before = written.load(Ordering::Relaxed);
    mended(daemons);
    until("files go on being written", TOO_LONG, || (written.load(Ordering::Relaxed) > before).then_some(()));
}

/// Flips bits anywhere in the files a disk keeps its blocks in.
fn flip_bits(disk: &Path, random: &mut impl rand::Rng) -> u32 {
    let mut files: Vec<(PathBuf, u64)> = eggs_tests::files_below(disk)
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "seg"))
        .map(|path| (path.clone(), fs::metadata(path).unwrap().len()))
        .filter(|(_, length)| *length > 0)
        .collect();
    files.sort();
    // Of a disk that is new nothing can flip.
    let flips = if files.is_empty() { 0 } else { random.random_range(1..20) };
    for _ in 0..flips {
        let (path, length) = files.choose(random).unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        let (at, bit) = (random.random_range(0..*length), random.random_range(0..8));
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
    }
    flips
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
