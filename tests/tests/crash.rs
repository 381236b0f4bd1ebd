//! SIGKILL in the middle of everything, twenty times.
//!
//! Several writers change directories of their own and note what was acknowledged. Each has one
//! operation in flight when the cluster dies, so what is found after the restart must be what was
//! noted, with or without that one operation: nothing acknowledged is missing, nothing half is there.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use eggs_client::{Client, ClientError, CreateOptions, ListOptions, Replace};
use eggs_proto::InodeType;
use eggs_tests::{TOO_LONG, Up, bytes, rng, runtime, scratch, seed};
use rand::Rng as _;
use rand_chacha::ChaCha8Rng;

const ROUNDS: usize = 20;
/// On a machine that is busy it takes more rounds until enough was written in them.
const ROUNDS_MAX: usize = 3 * ROUNDS;
const OPERATIONS: usize = 20 * ROUNDS;
const WRITERS: usize = 4;
const SIZES: [usize; 8] = [0, 10, 4096, 4097, 65_537, 300_000, 1 << 20, 2_500_000];

/// What is at a path: a directory, or a file with these contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Directory,
    File { size: usize, number: u64 },
}

type Names = BTreeMap<String, Node>;

/// What one writer knows.
#[derive(Debug, Clone, Default)]
struct Notes {
    names: Names,
    /// The names as they are once the operation in flight is done.
    in_flight: Option<(String, Names)>,
    acknowledged: usize,
    next: u64,
}

#[derive(Debug, Clone)]
enum Step {
    Put {
        path: String,
        size: usize,
        number: u64,
    },
    Mkdir(String),
    /// Each in the one before.
    MkdirAll(Vec<String>),
    Rmdir(String),
    Unlink(String),
    Rename(String, String),
    Exchange(String, String),
}

impl Step {
    fn choose(home: &str, notes: &mut Notes, rng: &mut ChaCha8Rng) -> Step {
        notes.next += 1;
        let number = notes.next;
        let directories: Vec<&String> =
            notes.names.iter().filter(|(_, node)| **node == Node::Directory).map(|(path, _)| path).collect();
        let files: Vec<&String> =
            notes.names.iter().filter(|(_, node)| **node != Node::Directory).map(|(path, _)| path).collect();
        let parent = if directories.is_empty() || rng.random_bool(0.3) {
            home.to_owned()
        } else {
            directories[rng.random_range(0..directories.len())].clone()
        };
        let new = format!("{parent}/n{number}");
        let file = (!files.is_empty()).then(|| files[rng.random_range(0..files.len().max(1))].clone());
        let empty = directories.iter().find(|path| !notes.names.keys().any(|name| is_below(name, path)));
        let all: Vec<&String> = notes.names.keys().collect();
        let pick = |rng: &mut ChaCha8Rng| all.get(rng.random_range(0..all.len().max(1))).copied();
        let apart = |a: &str, b: &str| a != b && !is_below(a, b) && !is_below(b, a);
        if let (true, Some(one), Some(other)) = (rng.random_bool(0.12), pick(rng), pick(rng))
            && apart(one, other)
        {
            return Step::Exchange(one.clone(), other.clone());
        }
        if rng.random_bool(0.06) {
            let below = format!("{new}/a");
            return Step::MkdirAll(vec![new, below.clone(), format!("{below}/b")]);
        }
        match (rng.random_range(0..10), file) {
            (0..5, _) | (_, None) => {
                let size = SIZES[rng.random_range(0..SIZES.len())];
                Step::Put { path: new, size, number }
            }
            (5, _) => Step::Mkdir(new),
            (6, Some(file)) => Step::Unlink(file),
            (7, _) if empty.is_some() => Step::Rmdir(empty.map(|path| (*path).clone()).unwrap_or_default()),
            (8, _) if directories.len() > 1 => {
                let from = directories[rng.random_range(0..directories.len())].clone();
                let to = if parent == from || is_below(&parent, &from) { home.to_owned() } else { parent };
                Step::Rename(from, format!("{to}/n{number}"))
            }
            (_, Some(file)) => Step::Rename(file, new),
        }
    }

    /// The names after it.
    fn done(&self, names: &Names) -> Names {
        let mut names = names.clone();
        match self {
            Step::Put { path, size, number } => {
                names.insert(path.clone(), Node::File { size: *size, number: *number });
            }
            Step::Mkdir(path) => {
                names.insert(path.clone(), Node::Directory);
            }
            Step::MkdirAll(paths) => {
                names.extend(paths.iter().map(|path| (path.clone(), Node::Directory)));
            }
            Step::Rmdir(path) | Step::Unlink(path) => {
                names.remove(path);
            }
            Step::Exchange(one, other) => {
                let moved = |name: &String| {
                    let below =
                        |path: &String| (name == path || is_below(name, path)).then(|| &name[path.len()..]);
                    let to_other = below(one).map(|rest| format!("{other}{rest}"));
                    to_other.or_else(|| below(other).map(|rest| format!("{one}{rest}")))
                };
                names =
                    names.iter().map(|(name, node)| (moved(name).unwrap_or(name.clone()), *node)).collect();
            }
            Step::Rename(from, to) => {
                let moved: Vec<String> =
                    names.keys().filter(|name| *name == from || is_below(name, from)).cloned().collect();
                for name in moved {
                    if let Some(node) = names.remove(&name) {
                        names.insert(format!("{to}{}", &name[from.len()..]), node);
                    }
                }
            }
        }
        names
    }

    async fn run(&self, client: &Client) -> Result<(), ClientError> {
        match self {
            Step::Put { path, size, number } => {
                let options = CreateOptions::default();
                client.put_bytes(path, bytes(*size, *number).into(), &options).await.map(drop)
            }
            Step::Mkdir(path) => client.mkdir(path, None).await.map(drop),
            Step::MkdirAll(paths) => {
                client.mkdir_all(paths.last().expect("directories to make")).await.map(drop)
            }
            Step::Exchange(one, other) => client.exchange(one, other).await,
            Step::Rmdir(path) => client.rmdir(path).await.map(drop),
            Step::Unlink(path) => client.unlink(path).await,
            Step::Rename(from, to) => client.rename(from, to, Replace::Refuse).await.map(drop),
        }
    }
}

fn is_below(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
}

/// Changes its directory until the task is dropped.
async fn write(client: Client, home: String, mut rng: ChaCha8Rng, notes: Arc<Mutex<Notes>>) {
    loop {
        let step = {
            let mut notes = notes.lock().unwrap();
            let step = Step::choose(&home, &mut notes, &mut rng);
            notes.in_flight = Some((format!("{step:?}"), step.done(&notes.names)));
            step
        };
        match step.run(&client).await {
            Ok(()) => {
                let mut notes = notes.lock().unwrap();
                notes.names = notes.in_flight.take().map(|(_, names)| names).unwrap_or_default();
                notes.acknowledged += 1;
            }
            // The end of the cluster; the outcome stays open.
            Err(error) if error.is_unreachable() => return,
            Err(ClientError::WriteFailed { .. }) => return,
            Err(error) => panic!("{step:?}: {error}"),
        }
    }
}

/// What is there, with every byte of every file checked against its size and number.
async fn found(client: &Client, home: &str, expected: [&Names; 2]) -> Names {
    let mut found = Names::new();
    let mut waiting = vec![home.to_owned()];
    while let Some(directory) = waiting.pop() {
        let listing = client.list(&directory, ListOptions::default()).await.unwrap();
        for entry in listing.all().await.unwrap() {
            let path = format!("{directory}/{}", entry.name_lossy());
            let node = if entry.kind() == InodeType::Directory {
                waiting.push(path.clone());
                Node::Directory
            } else {
                let contents = client.open(&path).await.unwrap().read_all(1 << 30).await;
                let contents = contents.unwrap_or_else(|error| panic!("{path}: {error}"));
                let same = |names: &&Names| match names.get(&path) {
                    Some(&node @ Node::File { size, number }) => {
                        (contents.len() == size && contents == bytes(size, number)).then_some(node)
                    }
                    _ => None,
                };
                let node = expected.iter().find_map(same);
                node.unwrap_or_else(|| {
                    let known = expected.map(|names| names.get(&path));
                    panic!("{path} has {} bytes nobody wrote there; known is {known:?}", contents.len())
                })
            };
            found.insert(path, node);
        }
    }
    found
}

/// Compares, and takes what is there as known.
async fn verify(client: &Client, home: &str, notes: &Mutex<Notes>) {
    let mut known = notes.lock().unwrap().clone();
    let (step, after) = known.in_flight.take().unwrap_or_else(|| (String::new(), known.names.clone()));
    let names = found(client, home, [&known.names, &after]).await;
    if names != known.names && names != after {
        let lost: Vec<_> = known.names.iter().filter(|(path, _)| !names.contains_key(*path)).collect();
        let new: Vec<_> = names.iter().filter(|(path, _)| !known.names.contains_key(*path)).collect();
        panic!("in flight: {step}\nlost: {lost:?}\nnew: {new:?}");
    }
    known.names = names;
    *notes.lock().unwrap() = known;
}

/// The coordinator carries on what it had accepted.
async fn settled(client: &Client) {
    let deadline = std::time::Instant::now() + TOO_LONG;
    loop {
        let transactions = client.transactions().await.unwrap();
        if transactions.iter().all(|transaction| transaction.finished) {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{transactions:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn twenty_kills_lose_nothing() {
    seed();
    let folder = scratch();
    let data = folder.path().join("data");
    let notes: Vec<Arc<Mutex<Notes>>> = (0..WRITERS).map(|_| Arc::default()).collect();
    let homes: Vec<String> = (0..WRITERS).map(|n| format!("/w{n}")).collect();
    let mut chance = rng("rounds");
    let acknowledged = || notes.iter().map(|notes| notes.lock().unwrap().acknowledged).sum::<usize>();
    for round in 0..=ROUNDS_MAX {
        let up = Up::start(&data);
        let runtime = runtime();
        runtime.block_on(async {
            let client = up.client().await;
            if round == 0 {
                for home in &homes {
                    client.mkdir(home, None).await.unwrap();
                }
            }
            settled(&client).await;
            let checks = homes.iter().zip(&notes).map(|(home, notes)| verify(&client, home, notes));
            for check in checks {
                check.await;
            }
        });
        if round >= ROUNDS && acknowledged() > OPERATIONS || round == ROUNDS_MAX {
            let report = up.ctl().assert_clean();
            assert_eq!(report["orphans"], 0, "{report}");
            up.stop();
            break;
        }
        let writers: Vec<_> = homes
            .iter()
            .zip(&notes)
            .enumerate()
            .map(|(n, (home, notes))| {
                let client = runtime.block_on(up.client());
                let rng = rng(&format!("round {round} writer {n}"));
                runtime.spawn(write(client, home.clone(), rng, Arc::clone(notes)))
            })
            .collect();
        let moment = Duration::from_millis(chance.random_range(20..600));
        std::thread::sleep(moment);
        up.kill();
        // An acknowledgement may still be on its way; a writer that failed says why.
        runtime.block_on(async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            for writer in writers {
                writer.abort();
                if let Err(error) = writer.await
                    && error.is_panic()
                {
                    std::panic::resume_unwind(error.into_panic());
                }
            }
        });
        runtime.shutdown_timeout(Duration::from_secs(5));
        println!("round {round}: killed after {moment:?}, {} operations acknowledged so far", acknowledged());
    }
    assert!(acknowledged() > OPERATIONS, "only {} operations in all rounds", acknowledged());
}

#[test]
fn a_put_cut_off_has_no_name() {
    let mut chance = rng("puts");
    let folder = scratch();
    let data = folder.path().join("data");
    std::fs::write(folder.path().join("large"), bytes(24 << 20, 1)).unwrap();
    for round in 0..6 {
        let up = Up::start(&data);
        let ctl = up.ctl().in_folder(folder.path());
        let name = format!("/large-{round}");
        let putting = {
            let (ctl, name) = (ctl.clone(), name.clone());
            std::thread::spawn(move || ctl.run(["put", "--timeout", "300ms", "large", &name]))
        };
        // At the first blocks, and later and later.
        eggs_tests::until("blocks arrive", TOO_LONG, || {
            (putting.is_finished() || !blocks(&data).is_empty()).then_some(())
        });
        std::thread::sleep(Duration::from_millis(chance.random_range(0..40 * (round + 1))));
        up.kill();
        let put = putting.join().unwrap();
        let up = Up::start(&data);
        let cat = up.ctl().run(["cat", &name]);
        match (put.code, cat.code) {
            (Some(0), Some(0)) | (Some(1 | 3), Some(0)) => assert!(cat.stdout == bytes(24 << 20, 1)),
            (Some(1 | 3), Some(1)) => cat.says(&[&name, "no such file or directory"]),
            other => panic!("{other:?}: {} {}", put.stderr, cat.stderr),
        }
        up.ctl().assert_clean();
        up.kill();
    }
}

fn blocks(data: &std::path::Path) -> Vec<eggs_tests::StoredBlock> {
    eggs_tests::stored_blocks(&data.join("disks/00"))
}
