//! Names are exchanged, and paths of directories made, while others look: nobody ever sees a third state.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use eggs_client::{Client, CreateOptions, ListOptions, Refusal, Replace};
use eggs_proto::limits::MKDIR_NAMES_MAX;
use eggs_proto::{InodeId, Time};
use eggs_tests::{Up, get, runtime, scratch};

/// Of each pair of names.
const EXCHANGES: usize = 150;
/// Exchanged with each other: files, directories, a file with a directory, within a directory.
const PAIRS: [(&str, &str); 4] = [
    ("/left/file", "/right/file"),
    ("/left/dir", "/right/dir"),
    ("/left/any", "/right/any"),
    ("/left/one", "/left/two"),
];

async fn found(client: &Client, path: &str, at: Time) -> InodeId {
    client.resolve_at(path, at).await.unwrap_or_else(|error| panic!("{path} at {at:?}: {error}")).inode
}

async fn listed(client: &Client, directory: &str, at: Time) -> Vec<(String, InodeId)> {
    let listing = client.list(directory, ListOptions { at, ..ListOptions::default() }).await.unwrap();
    let entries = listing.all().await.unwrap();
    entries.iter().map(|entry| (format!("{directory}/{}", entry.name_lossy()), entry.target)).collect()
}

/// At an instant both names are there and lead to the two inodes, the one to the one and the other to the other; and a
/// listing says what a look at the name says.
async fn assert_both(client: &Client, inodes: &[(InodeId, InodeId)], at: Time) {
    let mut listing = listed(client, "/left", at).await;
    listing.extend(listed(client, "/right", at).await);
    for ((one, other), &(first, second)) in PAIRS.into_iter().zip(inodes) {
        let here = (found(client, one, at).await, found(client, other, at).await);
        assert!(here == (first, second) || here == (second, first), "{one}, {other} at {at:?}: {here:?}");
        for (path, inode) in [(one, here.0), (other, here.1)] {
            let listed: Vec<_> = listing.iter().filter(|(name, _)| name == path).collect();
            assert!(matches!(listed[..], [(_, target)] if *target == inode), "{path} at {at:?}: {listed:?}");
        }
    }
}

async fn exchange_to_and_fro(client: Client, (one, other): (&'static str, &'static str)) {
    let mut now = (client.resolve(one).await.unwrap(), client.resolve(other).await.unwrap());
    for n in 0..EXCHANGES {
        let (a, b) = if n % 3 == 0 { (other, one) } else { (one, other) };
        client.exchange(a, b).await.unwrap();
        now = (now.1, now.0);
        let seen = (client.resolve(one).await.unwrap(), client.resolve(other).await.unwrap());
        assert_eq!(seen, now, "{one}, {other} after exchange {n}");
    }
}

#[test]
fn no_name_is_ever_missing_or_has_the_others_target_too() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    runtime().block_on(async {
        let client = up.client().await;
        for side in ["/left", "/right"] {
            client.mkdir(side, None).await.unwrap();
        }
        let mut inodes = Vec::new();
        for (one, other) in PAIRS {
            for path in [one, other] {
                if path.ends_with("dir") || path == "/right/any" || path == "/left/two" {
                    client.mkdir(path, None).await.unwrap();
                } else {
                    client.put_bytes(path, "contents".into(), &CreateOptions::default()).await.unwrap();
                }
            }
            inodes.push((client.resolve(one).await.unwrap(), client.resolve(other).await.unwrap()));
        }
        let began = client.now();
        let (done, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let look = {
            let (client, done, looks) = (client.clone(), Arc::clone(&done), Arc::clone(&looks));
            let inodes = inodes.clone();
            tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    let now = client.now();
                    assert_both(&client, &inodes, now).await;
                    looks.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let exchanging: Vec<_> =
            PAIRS.iter().map(|pair| tokio::spawn(exchange_to_and_fro(client.clone(), *pair))).collect();
        for exchanges in exchanging {
            exchanges.await.unwrap();
        }
        done.store(true, Ordering::Relaxed);
        look.await.unwrap();
        assert!(looks.load(Ordering::Relaxed) > 5, "hardly ever looked");
        // And long after: every instant in between.
        let ended = client.now();
        for part in 0..100 {
            let at = Time(began.0 + (ended.0 - began.0) / 100 * part);
            assert_both(&client, &inodes, at).await;
        }
        // Directories know where they are.
        for path in ["/left/dir", "/right/dir"] {
            let (parent, found) = path.rsplit_once('/').unwrap();
            let owner = client.resolve(parent).await.unwrap();
            assert_eq!(client.stat(path).await.unwrap().parent, Some(owner), "{found} in {parent}");
        }
    });
    up.ctl().ok("fsck");
    up.stop();
}

#[test]
fn what_cannot_be_exchanged_stays_as_it_is() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    runtime().block_on(async {
        let client = up.client().await;
        client.mkdir_all("/a/b/c").await.unwrap();
        client.put_bytes("/f", "f".into(), &CreateOptions::default()).await.unwrap();
        let refusal = |result: eggs_client::Result<()>| result.unwrap_err().refusal();
        for (one, other) in [("/a", "/a/b"), ("/a/b/c", "/a"), ("/a/b/c", "/a/b")] {
            assert_eq!(refusal(client.exchange(one, other).await), Some(Refusal::Loop), "{one} {other}");
        }
        assert_eq!(refusal(client.exchange("/f", "/a/none").await), Some(Refusal::NotFound));
        assert_eq!(refusal(client.exchange("/none", "/f").await), Some(Refusal::NotFound));
        assert_eq!(refusal(client.exchange("/f", "/").await), Some(Refusal::IsRoot));
        // What is the same name stays as it is, too.
        let before = client.resolve("/f").await.unwrap();
        client.exchange("/f", "/f").await.unwrap();
        assert_eq!(client.resolve("/f").await.unwrap(), before);
    });
    let ctl = up.ctl();
    ctl.ok("mv --exchange /f /a/b/c");
    assert_eq!(ctl.ok("cat /a/b/c").text(), "f");
    assert_eq!(ctl.names("/f"), Vec::<String>::new());
    ctl.refused("mv --exchange /a/b/c /a", &["/a/b/c <-> /a", "into itself"]);
    ctl.ok("mv --exchange /f /a");
    assert_eq!((ctl.names("/a"), ctl.names("/f")), (vec![], vec!["b".to_owned()]));
    up.stop();
}

/// The coordinator counts what it is asked for.
fn mkdir_requests(up: &Up) -> u64 {
    let text = get(up.address(), "/metrics").body;
    let mkdir = |line: &&str| !line.starts_with('#') && line.contains("crossdir") && line.contains("mkdir");
    let count = |line: &str| line.rsplit(' ').next().and_then(|count| count.parse::<f64>().ok());
    let lines = text.lines().filter(mkdir).filter(|line| line.contains("_count") || line.contains("_total"));
    lines.filter_map(count).sum::<f64>() as u64
}

#[test]
fn a_path_of_directories_is_made_in_one_request_and_seen_whole() {
    const PATHS: usize = 40;
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    // Until the coordinator has heard where shards are it is asked again and again.
    up.ctl().ok("mkdir /before");
    let before = mkdir_requests(&up);
    up.ctl().ok("mkdir -p -m 0700 /one/request/for/all");
    assert_eq!(mkdir_requests(&up) - before, 1, "requests to the coordinator");
    up.ctl().ok("mkdir -p /one/request/for/all");
    assert_eq!(mkdir_requests(&up) - before, 1, "nothing is missing: nothing is asked for");
    runtime().block_on(async {
        let client = up.client().await;
        for (path, mode) in [("/one", 0o755), ("/one/request/for", 0o755), ("/one/request/for/all", 0o700)] {
            assert_eq!(client.stat(path).await.unwrap().mode, mode, "{path}");
        }
        // Several want the same path at the same time, and others parts of it.
        for n in 0..PATHS {
            let ends = ["", "/a", "/a/b", "/a/b/c", "/a/b", "/a/x/y", "/a/b/c"];
            let paths: Vec<String> = ends.iter().map(|end| format!("/p{n}{end}")).collect();
            let whole = format!("/p{n}/a");
            let looks = {
                let client = client.clone();
                tokio::spawn(async move {
                    // Once there is an instant with the path there is none without it.
                    let mut seen = false;
                    for _ in 0..20 {
                        let there = client.stat(&whole).await.is_ok();
                        assert!(there || !seen, "{whole} was there, and is not");
                        seen |= there;
                    }
                })
            };
            let making = paths.into_iter().map(|path| {
                let client = client.clone();
                tokio::spawn(async move { (client.mkdir_all(&path).await.unwrap(), path) })
            });
            for making in making.collect::<Vec<_>>() {
                let (made, path) = making.await.unwrap();
                assert_eq!(client.resolve(&path).await.unwrap(), made, "{path}");
            }
            looks.await.unwrap();
        }
        // Nothing of it was there a moment before, all of it at the moment after.
        let (tried, path) = (client.now(), "/q/1/2/3/4/5/6/7/8");
        client.mkdir_all(path).await.unwrap();
        let made = client.resolve_at("/q", Time::ZERO).await.unwrap().created_at;
        assert!(made > tried);
        assert!(client.resolve_at("/q", Time(made.0 - 1)).await.unwrap_err().is_not_found());
        client.resolve_at(path, made).await.unwrap();
        // Through a link, but not a link that leads nowhere.
        client.symlink("/link", "/q/1", &CreateOptions::default()).await.unwrap();
        client.mkdir_all("/link/x/y").await.unwrap();
        client.resolve("/q/1/x/y").await.unwrap();
        client.symlink("/nowhere", "/q/none/more", &CreateOptions::default()).await.unwrap();
        assert!(client.mkdir_all("/nowhere/x").await.unwrap_err().is_not_found());
        assert!(client.stat("/q/none").await.unwrap_err().is_not_found());
        // Many at once, but not any number.
        let deep = |names: usize| "/d".repeat(names);
        client.mkdir_all(deep(MKDIR_NAMES_MAX)).await.unwrap();
        let error = client.mkdir_all(format!("/e{}", deep(MKDIR_NAMES_MAX))).await.unwrap_err();
        assert_eq!(error.refusal(), Some(Refusal::TooDeep));
        assert!(error.to_string().contains("257 directories are missing, at most 256"), "{error}");
        client.mkdir_all(deep(MKDIR_NAMES_MAX + 7)).await.unwrap();
    });
    up.ctl().ok("fsck");
    up.stop();
}

/// As by paths, but nothing is walked to again: the directories may have moved meanwhile.
#[test]
fn what_is_held_is_moved_wherever_it_is() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    runtime().block_on(async {
        let client = up.client().await;
        client.mkdir("/one", None).await.unwrap();
        client.mkdir("/two", None).await.unwrap();
        let (one, two) = (client.directory("/one").await.unwrap(), client.directory("/two").await.unwrap());
        let read = async |path| client.open(path).await.unwrap().read_all(100).await.unwrap();
        one.put_bytes("file", "text".into(), &CreateOptions::default()).await.unwrap();
        client.rename("/one", "/two/moved", Replace::Refuse).await.unwrap();
        assert_eq!(one.rename_to("file", &two, "there", Replace::Refuse).await.unwrap(), None);
        assert_eq!(read("/two/there").await, "text");
        let error = one.rename_to("file", &two, "there", Replace::Refuse).await.unwrap_err();
        assert_eq!(error.refusal(), Some(Refusal::NotFound), "{error}");
        // Within one directory, and back over something.
        one.put_bytes("file", "other".into(), &CreateOptions::default()).await.unwrap();
        two.rename_to("there", &two, "here", Replace::Refuse).await.unwrap();
        let error = two.rename_to("here", &one, "file", Replace::Refuse).await.unwrap_err();
        assert_eq!(error.refusal(), Some(Refusal::Exists), "{error}");
        assert!(error.to_string().contains("file"), "{error}");
        assert!(two.rename_to("here", &one, "file", Replace::File).await.unwrap().is_some());
        assert_eq!(read("/two/moved/file").await, "text");
    });
    up.ctl().assert_clean();
}
