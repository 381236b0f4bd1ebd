//! What was deleted comes back, and what is purged does not; whoever dies meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use eggs_client::{Client, ClientError, CreateOptions, ListOptions, Refusal, Replace};
use eggs_proto::pb::write_op::Op;
use eggs_proto::{InodeId, Time, pb};
use eggs_tests::{Daemons, Up, Vandal, bytes, rng, runtime, scratch, seed};
use rand::Rng as _;

async fn put(client: &Client, path: &str, size: usize) {
    let options = CreateOptions { replace: Replace::File, ..CreateOptions::default() };
    client.put_bytes(path, bytes(size, 7).into(), &options).await.unwrap();
}

async fn read(client: &Client, path: &str) -> Vec<u8> {
    client.open(path).await.unwrap().read_all(1 << 24).await.unwrap().to_vec()
}

async fn names(client: &Client, path: &str, at: Time) -> Vec<String> {
    let listing = client.list(path, ListOptions { at, ..ListOptions::default() }).await.unwrap();
    listing.all().await.unwrap().iter().map(|entry| entry.name_lossy().into_owned()).collect()
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Refusal {
    result.unwrap_err().refusal().unwrap()
}

#[test]
fn a_tree_comes_back_as_it_was() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl();
    runtime().block_on(async {
        let client = up.client().await;
        for path in ["/t", "/t/a", "/t/a/b", "/t/a/b/c"] {
            client.mkdir(path, None).await.unwrap();
        }
        put(&client, "/t/a/small", 100).await;
        put(&client, "/t/a/b/large", 300_000).await;
        put(&client, "/t/moved", 5000).await;
        put(&client, "/t/a/b/replaced", 10).await;
        put(&client, "/t/a/b/replaced", 20).await;
        // Its inode is on the shard of /t.
        client.rename("/t/moved", "/t/a/b/moved", Replace::Refuse).await.unwrap();
        client.rename("/t/a/small", "/t/a/b/c/small", Replace::Refuse).await.unwrap();
        let whole = client.now();
        ctl.ok("rm -r /t/a");
        let gone = client.now();
        assert_eq!(ctl.names("/t"), [""; 0]);
        ctl.refused("undelete /t/a/b/large", &["/t/a/b", "deleted itself", "--at"]);
        let deleted = ctl.ok("ls --dead --deleted --json /t").json();
        assert_eq!(deleted.as_array().unwrap().len(), 1, "{deleted}");
        assert_eq!(deleted[0]["name"], "a");

        let report = ctl.ok("undelete -r /t/a --json").json();
        assert_eq!((&report["directories"], &report["files"]), (&3.into(), &4.into()), "{report}");
        for (path, size) in [("large", 300_000), ("moved", 5000), ("replaced", 20), ("c/small", 100)] {
            assert_eq!(read(&client, &format!("/t/a/b/{path}")).await, bytes(size, 7), "{path}");
        }
        // The past is as it was, the time without it too.
        assert_eq!(names(&client, "/t", whole).await, ["a"]);
        assert_eq!(names(&client, "/t", gone).await, [""; 0]);
        assert!(client.resolve_at("/t/a/b/large", whole).await.is_ok());
        assert!(client.resolve_at("/t/a/b/large", gone).await.unwrap_err().is_not_found());
        ctl.refused("undelete /t/a", &["undeleted since"]);
        ctl.assert_clean();

        // To another place, out of a directory that is deleted itself.
        let again = client.now();
        ctl.ok("rm -r /t/a");
        ctl.refused(&format!("undelete /t/a/b/large --at {} --to /t/x", whole.0), &["undeleted since"]);
        ctl.ok(&format!("undelete /t/a/b/large --at {} --to /t/x", again.0));
        ctl.ok("undelete /t/a --to /t/again");
        assert_eq!(ctl.names("/t"), ["again", "x"]);
        assert_eq!(ctl.names("/t/again"), [""; 0]);
        assert_eq!(read(&client, "/t/x").await, bytes(300_000, 7));
        // The rest of what was in it then; the name it had is of another directory now.
        put(&client, "/t/again/b", 1).await;
        ctl.refused("undelete /t/again/b", &["/t/again/b", "exists"]);
        ctl.ok("undelete -r /t/again/b --to /t/b");
        assert_eq!(ctl.names("/t/b"), ["c", "moved", "replaced"]);
        ctl.assert_clean();
    });
    up.stop();
}

#[test]
fn a_directory_becomes_again_what_it_was() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl();
    runtime().block_on(async {
        let client = up.client().await;
        for path in ["/d", "/d/stays", "/d/goes", "/elsewhere"] {
            client.mkdir(path, None).await.unwrap();
        }
        for path in ["/d/one", "/d/stays/two", "/d/goes/three", "/d/stays/taken", "/d/moved"] {
            put(&client, path, 10).await;
        }
        let then = client.now();
        for path in ["/d/one", "/d/stays/two", "/d/stays/taken"] {
            client.unlink(path).await.unwrap();
        }
        ctl.ok("rm -r /d/goes");
        put(&client, "/d/stays/taken", 99).await;
        put(&client, "/d/new", 10).await;
        client.rename("/d/moved", "/elsewhere/moved", Replace::Refuse).await.unwrap();
        let outcome =
            ctl.run(["undelete", "-r", "/d", "--at", &then.0.to_string(), "--json"]).refused(&["taken"]);
        let report = outcome.json();
        assert_eq!(
            (&report["directories"], &report["files"], &report["refused"]),
            (&1.into(), &3.into(), &1.into()),
            "{report}"
        );
        assert_eq!(ctl.names("/d"), ["goes", "new", "one", "stays"]);
        assert_eq!(ctl.names("/d/goes"), ["three"]);
        assert_eq!(ctl.names("/d/stays"), ["taken", "two"]);
        assert_eq!(read(&client, "/d/stays/taken").await.len(), 99);
        ctl.assert_clean();
    });
    up.stop();
}

/// Of three deaths of one name the first is refused: the others go, with what is in them.
#[test]
fn a_refused_death_does_not_save_the_others() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl();
    runtime().block_on(async {
        let client = up.client().await;
        client.mkdir("/p", None).await.unwrap();
        put(&client, "/p/n", 100).await;
        ctl.ok("rm /p/n");
        for command in ["mkdir /p/n", "create-test-file /p/n/f", "rm -r /p/n"] {
            ctl.ok(command);
        }
        put(&client, "/p/n", 200).await;
        ctl.ok("rm /p/n");
        let deaths = client.deaths("/p/n", Time::ZERO).await.unwrap();
        let [first, _, _] = &deaths[..] else { panic!("{deaths:?}") };
        let lock = pb::LockDeadEdge {
            transaction: 1 << 40,
            directory: first.directory.0,
            name: first.name.clone(),
            died_at: first.died_at.0,
            target: first.target.0,
        };
        Vandal::new(&up, &client).step(first.directory.shard(), Op::LockDeadEdge(lock)).await;

        let report =
            ctl.run("purge /p/n --yes --json --timeout 3s".split(' ')).refused(&["/p/n", "busy"]).json();
        let counts = ["files", "directories", "refused"].map(|key| report[key].as_u64().unwrap());
        assert_eq!(counts, [2, 1, 1], "{report}");
        assert_eq!(client.deaths("/p/n", Time::ZERO).await.unwrap(), std::slice::from_ref(first));
    });
    up.stop();
}

#[test]
fn what_is_purged_is_gone_and_nothing_else() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl();
    runtime().block_on(async {
        let client = up.client().await;
        for path in ["/p", "/p/a", "/p/a/b", "/p/c"] {
            client.mkdir(path, None).await.unwrap();
        }
        for (path, size) in
            [("/p/a/small", 100), ("/p/a/b/large", 300_000), ("/p/c/lives", 50), ("/p/f", 200)]
        {
            put(&client, path, size).await;
        }
        put(&client, "/p/c/lives", 60).await;
        client.rename("/p/f", "/p/a/b/f", Replace::Refuse).await.unwrap();
        let large = client.resolve("/p/a/b/large").await.unwrap();
        let old = client.now();
        ctl.ok("rm -r /p/a");
        let deleted = ctl.ok("ls --dead /p").text();
        assert!(deleted.contains('a'), "{deleted}");
        ctl.refused("purge /p/a --older-than 1h --yes", &["nothing of that name died before then"]);
        ctl.refused("purge /p/a", &["3 files", "2 directories", "--yes"]);
        assert_eq!(ctl.ok("ls --dead /p").text(), deleted, "nothing was done");
        ctl.assert_clean();
        let report = ctl.ok("purge /p/a --yes --json").json();
        assert_eq!((&report["files"], &report["directories"]), (&3.into(), &2.into()), "{report}");
        ctl.refused("undelete /p/a", &["nothing of that name"]);
        assert!(client.stat_inode(large).await.unwrap_err().is_not_found());
        // The past has the other names, and not these.
        assert_eq!(names(&client, "/p", old).await, ["c"]);
        assert_eq!(read(&client, "/p/c/lives").await.len(), 60);
        ctl.assert_clean();
        // Before all time is not always.
        assert_eq!(ctl.ok("purge /p --before @0 --yes --json").json()["names"], 0);
        ctl.refused("undelete /p/f --at @0", &["/p/f"]);
        // Of a name that is there again it has to be said which is meant.
        for command in ["mkdir /p/n", "create-test-file /p/n/old", "rm -r /p/n", "mkdir /p/n"] {
            ctl.ok(command);
        }
        ctl.ok("create-test-file /p/n/new");
        ctl.ok("rm /p/n/new");
        ctl.refused("purge /p/n --yes", &["--only name", "--only below"]);
        let report = ctl.ok("purge /p/n --only name --yes --json").json();
        assert_eq!((&report["files"], &report["directories"]), (&1.into(), &1.into()), "{report}");
        ctl.ok("undelete /p/n/new");
        ctl.ok("rm /p/n/new");
        let report = ctl.ok("purge /p/n --only below --yes --json").json();
        assert_eq!((&report["files"], &report["directories"]), (&1.into(), &0.into()), "{report}");
        ctl.ok("rmdir /p/n");
        ctl.ok("purge /p/n --yes");
        // What is dead below a directory that lives, and the name the file was moved from.
        let report = ctl.ok("purge /p --yes --json").json();
        assert_eq!((&report["files"], &report["names"]), (&1.into(), &1.into()), "{report}");
        assert_eq!(ctl.ok("ls --dead /p").text(), "");
        assert_eq!(ctl.names("/p/c"), ["lives"]);
        ctl.refused("purge /p/c/lives --yes", &["nothing of that name is dead"]);
        ctl.refused("purge /nowhere --yes", &["nothing of that name is dead"]);
        ctl.assert_clean();
    });
    up.stop();
}

/// One thing after another dies and comes back in directories of its own; every answer is what it must be.
async fn revolve(client: Client, n: usize, done: Arc<AtomicBool>, rounds: Arc<AtomicUsize>) {
    let (left, right) = (format!("/left-{n}"), format!("/right-{n}"));
    let [l, r] = [left.clone(), right.clone()];
    let left = client.mkdir(&left, None).await.unwrap();
    let right = client.mkdir(&right, None).await.unwrap();
    let death = async |path: String| client.death_of(&path, Time::ZERO).await.unwrap();
    let there = async |path: String, inode: InodeId| {
        assert_eq!(client.resolve(&path).await.unwrap(), inode, "{path}");
    };
    while !done.load(Ordering::Relaxed) {
        let directory = client.mkdir(format!("{l}/d"), None).await.unwrap();
        client.rmdir(format!("{l}/d")).await.unwrap();
        client.undelete(&death(format!("{l}/d")).await, left, "d").await.unwrap();
        there(format!("{l}/d"), directory).await;
        put(&client, &format!("{l}/d/in"), 10).await;
        client.unlink(format!("{l}/d/in")).await.unwrap();
        client.rmdir(format!("{l}/d")).await.unwrap();
        let dead = death(format!("{l}/d")).await;
        assert_eq!(refusal(client.purge(&dead).await), Refusal::NotEmpty);
        client.undelete(&dead, right, "e").await.unwrap();
        assert_eq!(refusal(client.undelete(&dead, right, "f").await), Refusal::NotOwned);
        there(format!("{r}/e"), directory).await;
        client.purge(&death(format!("{r}/e/in")).await).await.unwrap();
        client.rmdir(format!("{r}/e")).await.unwrap();
        client.purge(&death(format!("{r}/e")).await).await.unwrap();
        assert!(client.stat_inode(directory).await.unwrap_err().is_not_found());

        put(&client, &format!("{l}/f"), 5000).await;
        let file = client.resolve(format!("{l}/f")).await.unwrap();
        client.rename(format!("{l}/f"), format!("{r}/f"), Replace::Refuse).await.unwrap();
        client.unlink(format!("{r}/f")).await.unwrap();
        client.undelete(&death(format!("{r}/f")).await, left, "g").await.unwrap();
        there(format!("{l}/g"), file).await;
        assert_eq!(read(&client, &format!("{l}/g")).await.len(), 5000);
        client.rename(format!("{l}/g"), format!("{r}/g"), Replace::Refuse).await.unwrap();
        client.unlink(format!("{r}/g")).await.unwrap();
        client.purge(&death(format!("{r}/g")).await).await.unwrap();
        assert!(client.stat_inode(file).await.unwrap_err().is_not_found());
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// Coordinator and shards are killed again and again: nobody who asks notices more than that it takes longer.
#[test]
fn whoever_is_killed_each_undelete_and_purge_happens_once() {
    println!("seed {}", seed());
    let folder = scratch();
    let mut daemons = Daemons::start(folder.path());
    let runtime = runtime();
    let (done, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let workers: Vec<_> = runtime.block_on(async {
        let client = daemons.client().await;
        let work = |n| tokio::spawn(revolve(client.clone(), n, Arc::clone(&done), Arc::clone(&rounds)));
        (0..4).map(work).collect()
    });
    let mut rng = rng("killer");
    for _ in 0..8 {
        let name = if rng.random_bool(0.6) { "crossdir" } else { "shard" };
        std::thread::sleep(Duration::from_millis(rng.random_range(100..900)));
        daemons.kill(name);
        daemons.launch(name);
    }
    std::thread::sleep(Duration::from_millis(500));
    done.store(true, Ordering::Relaxed);
    runtime.block_on(async {
        for worker in workers {
            worker.await.unwrap();
        }
    });
    assert!(rounds.load(Ordering::Relaxed) >= 4, "hardly anything was done");
    println!("{} rounds", rounds.load(Ordering::Relaxed));
    daemons.ctl().assert_clean();
}
