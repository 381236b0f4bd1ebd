//! sled's files may be lost, torn or garbage: the state comes back from snapshots and log.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use eggs_client::{Client, CreateOptions, ListOptions, Replace};
use eggs_tests::{Up, bytes, files_below, rng, runtime, scratch, seed};
use rand::{Rng as _, RngCore as _};

const PARTS: [&str; 3] = ["shuckle", "shard", "crossdir"];

#[derive(Debug, Clone, Copy)]
enum Damage {
    Deleted,
    Emptied,
    Truncated,
    Garbage,
    OneBit,
}

/// Does it to every file of a state.
fn damage(state: &Path, damage: Damage) {
    let mut rng = rng(&format!("{damage:?} {}", state.display()));
    assert!(state.is_dir(), "{}", state.display());
    if let Damage::Deleted = damage {
        return fs::remove_dir_all(state).unwrap();
    }
    let files = files_below(state);
    assert!(!files.is_empty());
    for path in files {
        let file = fs::File::options().read(true).write(true).open(&path).unwrap();
        let length = file.metadata().unwrap().len();
        match damage {
            Damage::Deleted => {}
            _ if length < 3 => {}
            Damage::Emptied => file.set_len(0).unwrap(),
            Damage::Truncated => file.set_len(rng.random_range(1..length)).unwrap(),
            Damage::Garbage => {
                let mut garbage = vec![0; usize::try_from(length / 3).unwrap()];
                rng.fill_bytes(&mut garbage);
                file.write_all_at(&garbage, length / 3).unwrap();
            }
            Damage::OneBit => {
                let at = rng.random_range(0..length);
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ (1 << rng.random_range(0..8))], at).unwrap();
            }
        }
    }
}

/// Names, kinds, sizes and sums of everything, living and dead; contents are read as well.
async fn everything(client: &Client) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![String::new()];
    while let Some(directory) = waiting.pop() {
        let path = if directory.is_empty() { "/" } else { &directory };
        for dead in [false, true] {
            let options = ListOptions { dead, attributes: true, ..ListOptions::default() };
            for entry in client.list(path, options).await.unwrap().all().await.unwrap() {
                let below = format!("{directory}/{}", entry.name_lossy());
                if !dead && entry.target.is_directory() {
                    waiting.push(below.clone());
                }
                if !dead && entry.target.is_file() {
                    let contents = client.open(&below).await.unwrap().read_all(1 << 30).await.unwrap();
                    let number: u64 = below.rsplit('-').next().unwrap().parse().unwrap();
                    assert_eq!(contents, bytes(contents.len(), number), "{below}");
                }
                let name = format!("{below} dead {dead} {:?}", entry.died_at);
                assert!(found.insert(name, format!("{entry:?}")).is_none(), "{below}");
            }
        }
    }
    found
}

/// The hashes of all shards' states.
async fn hashes(client: &Client) -> Vec<Vec<u8>> {
    let states = client.shard_states().await.unwrap();
    assert_eq!(states.len(), 256);
    states.into_iter().map(|state| state.status.unwrap().state_hash.to_vec()).collect()
}

/// Every kind of change there is.
async fn work(client: &Client, round: u64) {
    let options = CreateOptions::default();
    let top = format!("/round{round}");
    for directory in ["a/deep/er", "b", "c"] {
        client.mkdir_all(format!("{top}/{directory}")).await.unwrap();
    }
    for n in 0..40 {
        let number = round * 1000 + n;
        let size = [0, 1, 4096, 4097, 70_000, 300_000][n as usize % 6];
        client.put_bytes(format!("{top}/a/f-{number}"), bytes(size, number).into(), &options).await.unwrap();
    }
    for n in 0..10 {
        let number = round * 1000 + n;
        let (from, across) = (format!("{top}/a/f-{number}"), format!("{top}/b/g-{number}"));
        client.rename(&from, &across, Replace::Refuse).await.unwrap();
        client.unlink(format!("{top}/a/f-{}", number + 10)).await.unwrap();
        let within = format!("{top}/a/renamed-{}", number + 20);
        client.rename(format!("{top}/a/f-{}", number + 20), within, Replace::Refuse).await.unwrap();
    }
    client.symlink(format!("{top}/link"), "a", &options).await.unwrap();
    client.rmdir(format!("{top}/c")).await.unwrap();
    client.rename(format!("{top}/a/deep"), format!("{top}/b/deep"), Replace::Refuse).await.unwrap();
    // Somebody is in the middle of a file.
    let mut writer = client.create(format!("{top}/unfinished"), &options).await.unwrap();
    writer.write(&bytes(200_000, 1)).await.unwrap();
    writer.abandon().await;
}

/// Damages the states of these parts after each round of work.
fn rebuilt(kill: bool, rounds: &[(Damage, &[&str])]) {
    seed();
    let folder = scratch();
    let data = folder.path().join("data");
    let mut up = Up::start(&data);
    let cluster = up.ctl().ok("status --json").json()["cluster_id"].clone();
    for (round, (kind, parts)) in (1..).zip(rounds) {
        let what = format!("{kind:?} of {parts:?}, killed: {kill}");
        let runtime = runtime();
        let (before, hashes_before) = runtime.block_on(async {
            let client = up.client().await;
            work(&client, round).await;
            client.close().await;
            settled(&client).await;
            (everything(&client).await, hashes(&client).await)
        });
        if kill {
            up.kill();
        } else {
            up.stop();
        }
        for part in *parts {
            damage(&data.join(part).join("state"), *kind);
        }
        up = Up::start(&data);
        runtime.block_on(async {
            let client = up.client().await;
            let after = everything(&client).await;
            assert_eq!(after.len(), before.len(), "{what}");
            for (name, entry) in &before {
                assert_eq!(after.get(name), Some(entry), "{what}: {name}");
            }
            assert!(hashes(&client).await == hashes_before, "{what}: the same state to the last bit");
        });
        assert_eq!(up.ctl().ok("status --json --check").json()["cluster_id"], cluster);
        up.ctl().assert_clean();
    }
    up.stop();
}

/// Until the coordinator has nothing more to tell the shards.
async fn settled(client: &Client) {
    let deadline = std::time::Instant::now() + eggs_tests::TOO_LONG;
    let mut last = Vec::new();
    loop {
        let (transactions, hashes) = (client.transactions().await.unwrap(), hashes(client).await);
        if transactions.is_empty() && hashes == last {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "{transactions:?}");
        last = hashes;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[test]
fn after_a_kill() {
    rebuilt(
        true,
        &[
            (Damage::Deleted, &PARTS),
            (Damage::Truncated, &PARTS),
            (Damage::Garbage, &PARTS),
            (Damage::Garbage, &["shard"]),
            (Damage::Emptied, &["crossdir", "shuckle"]),
        ],
    );
}

#[test]
fn after_an_orderly_stop() {
    rebuilt(
        false,
        &[
            (Damage::Deleted, &PARTS),
            (Damage::Truncated, &PARTS),
            (Damage::Garbage, &PARTS),
            (Damage::OneBit, &PARTS),
            (Damage::Deleted, &["shard"]),
            (Damage::Garbage, &["crossdir"]),
            (Damage::Emptied, &["shuckle"]),
        ],
    );
}

#[test]
fn from_a_snapshot_and_the_log_after_it() {
    seed();
    let folder = scratch();
    let data = folder.path().join("data");
    let mut up = Up::start(&data);
    let runtime = runtime();
    let snapshots = data.join("shard/snapshots");
    let sealed =
        || files_below(&snapshots).iter().filter(|path| path.extension() == Some("snap".as_ref())).count();
    assert_eq!(sealed(), 0);
    for round in 0..3u64 {
        let (before, hashes_before) = runtime.block_on(async {
            let client = up.client().await;
            client.mkdir_all("/large").await.unwrap();
            let large = client.directory("/large").await.unwrap();
            let had = sealed();
            // Small files' contents are in the log: it grows until a snapshot is worth it.
            for batch in 0..40u64 {
                let number = |n: u64| round * 100_000 + batch * 100 + n;
                let file = |n: u64| eggs_client::SmallFile {
                    name: format!("s-{}", number(n)).into(),
                    contents: bytes(4096, number(n)).into(),
                    ..eggs_client::SmallFile::default()
                };
                let answers = large.put_many((0..100).map(file).collect()).await;
                assert!(answers.iter().all(Result::is_ok));
                if sealed() > had || (round > 0 && batch > 5) {
                    break;
                }
            }
            work(&client, round).await;
            client.close().await;
            settled(&client).await;
            (everything(&client).await, hashes(&client).await)
        });
        assert!(sealed() > 0, "no snapshot was taken");
        if round == 1 {
            up.stop();
        } else {
            up.kill();
        }
        damage(&data.join("shard/state"), Damage::Deleted);
        up = Up::start(&data);
        runtime.block_on(async {
            let client = up.client().await;
            assert!(everything(&client).await == before);
            assert!(hashes(&client).await == hashes_before);
        });
        up.ctl().assert_clean();
    }
    up.stop();
}
