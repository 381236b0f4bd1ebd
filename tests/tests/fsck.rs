//! fsck of a cluster in use: it finds each kind of damage and says what it is, and finds none where there is none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use eggs_client::{CreateOptions, Replace};
use eggs_proto::pb::write_op::Op;
use eggs_proto::{InodeId, ShardId, pb};
use eggs_tests::{Up, Vandal, runtime, scratch};

/// Invariant, place and message of each finding.
fn findings(up: &Up) -> Vec<(String, String, String)> {
    let report = up.ctl().run(["fsck", "--json"]).json();
    let findings = report["findings"].as_array().unwrap().iter();
    let text = |finding: &serde_json::Value, key: &str| finding[key].as_str().unwrap().to_owned();
    findings.map(|f| (text(f, "invariant"), text(f, "place"), text(f, "message"))).collect()
}

#[test]
fn each_kind_of_damage_is_found_and_named() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    runtime().block_on(async {
        let client = up.client().await;
        for path in ["/a", "/a/b", "/c", "/d", "/e", "/g", "/g/h"] {
            client.mkdir(path, None).await.unwrap();
        }
        client.put_bytes("/c/f", "contents".into(), &CreateOptions::default()).await.unwrap();
        assert_eq!(findings(&up), []);
        let id = async |path: &str| client.resolve(path).await.unwrap();
        let (a, b, c, d, e, f) = (
            id("/a").await,
            id("/a/b").await,
            id("/c").await,
            id("/d").await,
            id("/e").await,
            id("/c/f").await,
        );
        let mut vandal = Vandal::new(&up, &client);
        let unknown = 1 << 40;

        let create = pb::CreateDirectory { transaction: unknown, owner: a.0, attributes: None };
        let orphan = vandal.step(ShardId(77), Op::CreateDirectory(create)).await;
        let link = pb::LinkEdge {
            transaction: unknown + 1,
            directory: c.0,
            name: "again".into(),
            target: b.0,
            replace: pb::Replace::Refuse.into(),
        };
        vandal.step(c.shard(), Op::LinkEdge(link)).await;
        let set = pb::SetOwner { transaction: unknown + 2, directory: d.0, owner: a.0 };
        vandal.step(d.shard(), Op::SetOwner(set)).await;
        let lock = pb::LockEdge { transaction: unknown + 3, directory: c.0, name: "f".into(), target: f.0 };
        vandal.step(c.shard(), Op::LockEdge(lock)).await;
        let lock = pb::LockDirectory {
            transaction: unknown + 4,
            directory: e.0,
            owner: InodeId::ROOT.0,
            removed: false,
        };
        vandal.step(e.shard(), Op::LockDirectory(lock)).await;

        // /g goes into /g/h, where no coordinator would let it go.
        let (g, h) = (id("/g").await, id("/g/h").await);
        let (transaction, name) = (unknown + 5, bytes::Bytes::from("g"));
        let (target, replace) = (g.0, pb::Replace::Refuse.into());
        let link = pb::LinkEdge { transaction, directory: h.0, name: name.clone(), target, replace };
        vandal.step(h.shard(), Op::LinkEdge(link)).await;
        let set = pb::SetOwner { transaction, directory: g.0, owner: h.0 };
        vandal.step(g.shard(), Op::SetOwner(set)).await;
        let (directory, owned, died_at) = (InodeId::ROOT.0, false, 0);
        let unlink = pb::UnlinkEdge { transaction, directory, name, target, owned, died_at };
        vandal.step(InodeId::ROOT.shard(), Op::UnlinkEdge(unlink)).await;

        let found = findings(&up);
        let has = |invariant: &str, place: &str, words: &[String]| {
            let fits = |(i, p, message): &(String, String, String)| {
                i == invariant && p == place && words.iter().all(|word| message.contains(word))
            };
            assert!(found.iter().any(fits), "no {invariant} at {place} with {words:?} in {found:#?}");
        };
        let text = |id: InodeId| id.to_string();
        has("orphan", "shard 77", &[text(orphan), text(a)]);
        let two = found.iter().find(|(invariant, ..)| invariant == "two names").unwrap();
        let mut names = [two.1.as_str(), two.2.split(' ').nth(3).unwrap()];
        names.sort_unstable();
        assert_eq!(names, ["/a/b", "/c/again"], "{two:?}");
        has("wrong owner", "/c/again", &[text(b), text(c), text(a)]);
        has("wrong owner", "/d", &[text(d), text(InodeId::ROOT), text(a)]);
        has("stuck lock", &format!("shard {}", c.shard()), &["'f'".to_owned(), text(c)]);
        has("stuck lock", &format!("shard {}", e.shard()), &[text(e)]);
        has("loop", &format!("shard {}", g.shard()), &[text(g), text(h)]);
        has("loop", &format!("shard {}", h.shard()), &[text(h), text(g)]);
        assert_eq!(found.len(), 8, "{found:#?}");
    });
    up.stop();
}

/// Directories are made, moved, exchanged and removed all the while.
#[test]
fn a_busy_cluster_is_clean() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    runtime().block_on(async {
        let client = up.client().await;
        let (done, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut busy = Vec::new();
        for n in 0..8 {
            let (client, done, rounds) = (client.clone(), Arc::clone(&done), Arc::clone(&rounds));
            busy.push(tokio::spawn(async move {
                for side in ["left", "right"] {
                    client.mkdir_all(format!("/{n}/{side}")).await.unwrap();
                }
                while !done.load(Ordering::Relaxed) {
                    let (left, right) = (format!("/{n}/left/d"), format!("/{n}/right/d"));
                    let (path, other) = (format!("/{n}/right/p/q"), format!("/{n}/right/p"));
                    client.mkdir(&left, None).await.unwrap();
                    client.mkdir_all(&path).await.unwrap();
                    client.exchange(&left, &path).await.unwrap();
                    client.exchange(&other, &left).await.unwrap();
                    client.rmdir(&other).await.unwrap();
                    client.rmdir(format!("{left}/q")).await.unwrap();
                    client.rename(&left, &right, Replace::Refuse).await.unwrap();
                    client.rmdir(&right).await.unwrap();
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        let mut checks = 0;
        while checks < 3 || rounds.load(Ordering::Relaxed) < 50 {
            assert_eq!(findings(&up), []);
            checks += 1;
        }
        done.store(true, Ordering::Relaxed);
        for worker in busy {
            worker.await.unwrap();
        }
    });
    up.stop();
}

/// Whoever looks at one of two directories and then at its parent mostly finds them of different instants: at some looks
/// every time, of so many.
#[test]
fn directories_that_are_exchanged_all_the_time_are_no_orphans() {
    const PAIRS: usize = 24;
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    runtime().block_on(async {
        let client = up.client().await;
        let (done, exchanges) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut busy = Vec::new();
        for n in 0..PAIRS {
            let (left, right) = (format!("/{n}/left/d"), format!("/{n}/right/p/q"));
            for path in [&left, &right] {
                client.mkdir_all(format!("{path}/below")).await.unwrap();
            }
            let (client, done, exchanges) = (client.clone(), Arc::clone(&done), Arc::clone(&exchanges));
            busy.push(tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    client.exchange(&left, &right).await.unwrap();
                    exchanges.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        let mut checks = 0;
        while checks < 4 || exchanges.load(Ordering::Relaxed) < 40 * PAIRS {
            let report = client.fsck(|_| {}).await.unwrap();
            assert!(report.findings.is_empty(), "after {checks} checks: {:#?}", report.findings);
            checks += 1;
        }
        done.store(true, Ordering::Relaxed);
        for worker in busy {
            worker.await.unwrap();
        }
        println!("{checks} checks, {} exchanges", exchanges.load(Ordering::Relaxed));
    });
    up.stop();
}
