//! The tour of the README, word by word, with exit codes and messages.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::time::{Duration, Instant};

use eggs_tests::{Ctl, Tree, Up, assert_same_tree, bytes, odd_names, scratch, seed};

#[test]
fn a_real_tree_goes_in_and_comes_back() {
    seed();
    let folder = scratch();
    let tree = Tree::generate(&folder.path().join("source"));
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl().in_folder(folder.path());
    ctl.ok("mkdir -p /data/src");
    ctl.ok("put -r source /data/src");
    ctl.ok("get -r /data/src back");
    assert_same_tree(&tree.root, &folder.path().join("back"));

    let report = ctl.assert_clean();
    assert_eq!(report["directories_reached"], tree.directories + 2, "with / and /data");
    assert_eq!(report["entries"], tree.files + tree.symlinks + tree.directories + 1, "with data and src");

    // Again, over what is there: everything is replaced, nothing is doubled.
    ctl.ok("put -r source /data/src");
    ctl.ok("get -r /data back-2");
    assert_same_tree(&tree.root, &folder.path().join("back-2/src"));
    // A copy, a move of a whole directory, and all of it gone.
    ctl.ok("cp -r /data/src /data/copy");
    ctl.ok("mv /data/copy /moved");
    ctl.ok("get -r /moved back-3");
    let modes = |root: &str| eggs_tests::listing(&folder.path().join(root)).len();
    assert_eq!(modes("back-3"), modes("back"));
    assert_eq!(std::fs::read(folder.path().join("back-3/size-3333333")).unwrap(), bytes(3_333_333, 13));
    ctl.ok("rm -r /data /moved");
    assert_eq!(ctl.names("/"), [""; 0]);
    ctl.assert_clean();
    up.stop();
}

#[test]
fn every_odd_name_one_by_one() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl().in_folder(folder.path());
    let names = odd_names();
    let path =
        |parent: &str, name: &OsStr| OsString::from_vec([parent.as_bytes(), b"/", name.as_bytes()].concat());
    // One command for all names of one kind.
    let directories: Vec<OsString> = names.iter().map(|name| path("", name)).collect();
    let operands: Vec<&OsStr> = directories.iter().map(OsString::as_os_str).collect();
    ctl.with("mkdir", &operands).ok();
    let printed = ctl.run(["ls", "/"]).ok().stdout;
    let mut expected: Vec<&[u8]> = names.iter().map(|name| name.as_bytes()).collect();
    expected.sort_unstable();
    // One name has a line feed in it: it is printed raw into a pipe.
    assert_eq!(printed, [expected.join(&b"\n"[..]), b"\n".to_vec()].concat());
    let listed = ctl.ok("ls --json /").json();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let rows = listed.as_array().unwrap();
    assert_eq!(rows.len(), names.len());
    for (row, name) in rows.iter().zip(expected) {
        match std::str::from_utf8(name) {
            Ok(text) => assert_eq!(row["name"], text),
            Err(_) => assert_eq!(row["name_hex"], hex(name)),
        }
    }
    ctl.with("stat --json", &operands).ok().json();
    let bad = OsString::from("/").into_vec();
    let too_long = OsString::from_vec([bad, vec![b'n'; 256]].concat());
    let refused = ctl.with("mkdir", &[&too_long]);
    assert!(matches!(refused.code, Some(1 | 2)), "{refused:?}");
    assert!(refused.stderr.contains("name too long"), "{}", refused.stderr);
    ctl.with("rmdir", &operands).ok();
    assert_eq!(ctl.names("/"), [""; 0]);
    up.stop();
}

#[test]
fn the_tour() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl().in_folder(folder.path());
    let write = |name: &str, contents: &[u8]| std::fs::write(folder.path().join(name), contents).unwrap();
    write("f", b"the first file\n");
    write("big", &bytes(5_000_000, 1));

    ctl.ok("mkdir -p /data/src");
    ctl.ok("mkdir -p /data/src");
    ctl.ok("put f /data/src");
    ctl.ok("put f /data/src/second");
    ctl.ok("put big /data/src/");
    assert_eq!(ctl.names("/data/src"), ["big", "f", "second"]);
    let long = ctl.ok("ls -l /data/src").text();
    let lines: Vec<&str> = long.lines().collect();
    assert_eq!(lines.len(), 3, "{long}");
    assert!(lines[0].starts_with("-rw-r--r-- ") && lines[0].ends_with(" big"), "{long}");
    assert!(lines[0].contains(" 5000000 ") && lines[1].contains(" 15 "), "{long}");
    assert_eq!(ctl.ok("cat /data/src/f").stdout, b"the first file\n");
    assert_eq!(ctl.ok("cat /data/src/big").stdout, bytes(5_000_000, 1));
    let part = ctl.ok("cat --offset 4999990 --length 5 /data/src/big").stdout;
    assert_eq!(part, bytes(5_000_000, 1)[4_999_990..4_999_995]);

    stat_tells_all(&ctl);
    moves_and_copies(&ctl);

    // Streams.
    ctl.run_with(["put", "-", "/data/stream"], &bytes(200_000, 2)).ok();
    assert_eq!(ctl.ok("cat /data/stream").stdout, bytes(200_000, 2));
    assert_eq!(ctl.run_with(["cat", "-", "/data/g"], b"in ").ok().stdout, b"in the first file\n");

    let df = ctl.ok("df --json").json();
    assert_eq!(df["disks"].as_array().unwrap().len(), 8, "{df}");
    assert_eq!(df["classes"][0]["class"], "FLASH", "{df}");
    assert!(ctl.ok("df").text().contains("FLASH"));
    let status = ctl.ok("status --json --check").json();
    assert_eq!(status["health"], "healthy", "{status}");
    assert_eq!(status["shards"]["alive"], 256, "{status}");
    assert_eq!(status["crossdir"]["alive"], true, "{status}");
    assert_eq!(status["disks"].as_array().unwrap().len(), 8, "{status}");
    assert!(ctl.ok("status").text().contains("256 of 256 served"));
    assert!(ctl.ok("txn list --json").json().is_array());
    ctl.ok("policy get --json /data").json();

    ctl.ok("rm /data/src/second");
    ctl.refused("rmdir /data/src", &["/data/src", "directory not empty"]);
    ctl.ok("rm -r /data/src");
    ctl.ok("rm -f /no/such/file");
    ctl.ok("mkdir /empty");
    ctl.ok("rmdir /empty");
    ctl.assert_clean();
    assert!(ctl.ok("fsck").text().starts_with("clean: 256 shards"), "{}", ctl.ok("fsck").text());
    up.stop();
}

fn stat_tells_all(ctl: &Ctl) {
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}=")).map(str::to_owned));
        line.unwrap_or_else(|| panic!("no {name} in: {text}"))
    };
    let file = ctl.ok("stat /data/src/big").text();
    assert_eq!(field(&file, "type"), "FILE");
    assert_eq!(field(&file, "size"), "5000000");
    assert!(["0x2", "0x3"].iter().any(|kind| field(&file, "inode").starts_with(kind)), "{file}");
    assert!(field(&file, "mtime").parse::<u64>().unwrap() > 0);
    assert!(file.lines().any(|line| line.starts_with("span offset=0 ")), "{file}");
    let directory = ctl.ok("stat /data/src").text();
    assert_eq!(field(&directory, "type"), "DIRECTORY");
    let parent = field(&directory, "parent");
    assert_eq!(parent, field(&ctl.ok("stat /data").text(), "inode"));
    for policy in ["snapshot", "span", "block", "stripe"] {
        assert!(directory.contains(&format!("policy.{policy}=")), "{directory}");
    }
    let json = ctl.ok("stat --json /data/src/big").json();
    assert_eq!(json["type"], "FILE");
    assert_eq!(json["size"], 5_000_000);
    assert_eq!(json["inode"], field(&file, "inode"));
    let sizes: u64 =
        json["spans"].as_array().unwrap().iter().map(|span| span["size"].as_u64().unwrap()).sum();
    assert_eq!(sizes, 5_000_000, "{json}");
    let span = &json["spans"][0];
    assert_eq!((span["data"].as_u64(), span["parity"].as_u64()), (Some(4), Some(2)), "{span}");
    let mut disks: Vec<&str> = span["blocks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|block| block["block_service"].as_str().unwrap())
        .collect();
    disks.sort_unstable();
    disks.dedup();
    assert_eq!(disks.len(), 6, "every block on another disk: {span}");
    let both = ctl.ok("stat --json /data/src /data/src/f").json();
    assert_eq!((&both[0]["type"], &both[1]["type"]), (&"DIRECTORY".into(), &"FILE".into()));
}

fn moves_and_copies(ctl: &Ctl) {
    ctl.ok("mv /data/src/f /data/g");
    ctl.refused("cat /data/src/f", &["/data/src/f", "no such file or directory"]);
    ctl.ok("cp /data/g /data/src/f");
    assert_eq!(ctl.ok("cat /data/src/f /data/g").stdout, b"the first file\nthe first file\n");
    ctl.refused("mv -n /data/g /data/src/f", &["/data/src/f", "file exists"]);
    ctl.ok("mv /data/g /data/src/second");
    ctl.ok("mv /data/src/second /data/g");
    ctl.ok("cp /data/g /data/src/second");
    ctl.refused("mv /data /data/src", &["cannot move a directory into itself"]);
    ctl.ok("ln -s g /data/link");
    assert_eq!(ctl.ok("readlink /data/link").text(), "g\n");
    assert_eq!(ctl.ok("cat /data/link").stdout, b"the first file\n");
    assert!(ctl.ok("ls -l /data").text().contains(" link -> g"));
}

#[test]
fn refusals_in_posix_words() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl().in_folder(folder.path());
    std::fs::write(folder.path().join("f"), "f").unwrap();
    std::fs::create_dir(folder.path().join("d")).unwrap();
    ctl.ok("mkdir -p /d/sub");
    ctl.ok("put f /d/f");
    ctl.ok("put f /d/g");
    for (words, reasons) in [
        ("ls /no", &["/no", "no such file or directory"][..]),
        ("cat /no", &["cat", "/no", "no such file or directory"]),
        ("cat /d", &["/d", "is a directory"]),
        ("stat /no/where", &["/no", "no such file or directory"]),
        ("stat /d/f/x", &["/d/f", "not a directory"]),
        ("mkdir /d", &["/d", "file exists"]),
        ("mkdir /no/d", &["/no", "no such file or directory"]),
        ("mkdir /d/f/x", &["/d/f", "not a directory"]),
        ("mkdir -p /d/f", &["/d/f", "file exists"]),
        ("mkdir -p /d/f/x/y", &["/d/f", "not a directory"]),
        ("rmdir /d", &["/d", "directory not empty"]),
        ("rmdir /d/f", &["/d/f", "not a directory"]),
        ("rmdir /no", &["/no", "no such file or directory"]),
        ("rmdir /", &["/", "root"]),
        ("rm /d", &["/d", "is a directory"]),
        ("rm /no", &["/no", "no such file or directory"]),
        ("rm -r /", &["/", "root"]),
        ("mv /no /x", &["/no", "no such file or directory"]),
        ("mv /d/f /no/x", &["no such file or directory"]),
        ("mv /d /d/sub", &["/d", "into itself"]),
        ("mv -n /d/f /d/g", &["/d/g", "file exists"]),
        ("mv --exchange /d/f /no", &["/no", "no such file or directory"]),
        ("mv --exchange /d/sub /d", &["/d/sub <-> /d", "into itself"]),
        ("mv --exchange /d/f /", &["/", "root"]),
        ("mv --exchange /d/f/ /d/sub", &["/d/f", "not a directory"]),
        ("cp /d /x", &["/d", "is a directory"]),
        ("cp /no /x", &["/no", "no such file or directory"]),
        ("put no /x", &["no", "no such file or directory"]),
        ("put d /x", &["d", "is a directory"]),
        ("put f /no/x", &["/no", "no such file or directory"]),
        ("put -n f /d/f", &["/d/f", "file exists"]),
        ("get /no x", &["/no", "no such file or directory"]),
        ("get /d x", &["/d", "is a directory"]),
        ("get -n /d/f f", &["f", "file exists"]),
        ("readlink /d/f", &["/d/f", "not a symbolic link"]),
        ("create-test-file /d/f", &["/d/f", "file exists"]),
    ] {
        ctl.refused(words, reasons);
    }
    // Operands after a refusal are still done.
    let half = ctl.run(["cat", "/no", "/d/f"]).refused(&["/no"]);
    assert_eq!(half.stdout, b"f");
    for words in [
        "",
        "nonsense",
        "ls --nonsense",
        "mkdir",
        "mkdir relative",
        "mv /d",
        "stat /a/../b",
        "ls --since 5m /",
    ] {
        let usage = ctl.run(words.split_whitespace()).code(2);
        assert!(usage.stdout.is_empty() && !usage.stderr.is_empty(), "{usage:?}");
    }
    assert!(ctl.ok("--help").text().contains("create-test-file"));
    ctl.ok("--version");
    up.stop();
}

#[test]
fn the_test_file_has_three_spans() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl();
    ctl.ok("create-test-file /hello");
    assert_eq!(ctl.ok("cat /hello").stdout, b"hello, world\0\0\0\0\0\0\0\0\0\0");
    let json = ctl.ok("stat --json /hello").json();
    let classes: Vec<&str> =
        json["spans"].as_array().unwrap().iter().map(|span| span["class"].as_str().unwrap()).collect();
    assert_eq!(classes.len(), 3);
    assert_eq!(classes.iter().collect::<std::collections::BTreeSet<_>>().len(), 3, "three ways: {classes:?}");
    up.stop();
}

#[test]
fn the_dead_map_between_two_times() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl();
    ctl.ok("mkdir /d");
    for _ in 0..2 {
        ctl.ok("create-test-file /d/hello");
        ctl.ok("rm /d/hello");
    }
    ctl.ok("create-test-file /d/hello");
    ctl.ok("mv /d/hello /away");
    assert_eq!(ctl.names("/d"), [""; 0]);
    let dead = ctl.ok("ls --dead --json /d").json();
    let rows = dead.as_array().unwrap();
    assert_eq!(rows.len(), 3, "{dead}");
    assert!(rows.iter().all(|row| row["name"] == "hello"), "{dead}");
    assert_eq!(rows.iter().filter(|row| row["owned"] == true).count(), 2, "one lives on elsewhere: {dead}");
    let mut died: Vec<u64> = rows.iter().map(|row| row["died_at_ns"].as_u64().unwrap()).collect();
    died.sort_unstable();
    let count = |bounds: &str| ctl.ok(&format!("ls --dead {bounds} /d")).text().lines().count();
    assert_eq!(count(""), 3);
    assert_eq!(count(&format!("--since {}", died[1])), 2, "since is inclusive");
    assert_eq!(count(&format!("--until {}", died[1])), 1, "until is exclusive");
    assert_eq!(count(&format!("--since {} --until {}", died[0] + 1, died[2])), 1);
    assert_eq!(count("--since now"), 0);
    let stamp = rows[0]["died_at"].as_str().unwrap();
    assert!(count(&format!("--since {stamp}")) >= 1);
    // What was there then.
    let at = died[0] - 1;
    assert_eq!(ctl.ok(&format!("ls --at {at} /d")).text(), "hello\n");
    up.stop();
}

#[test]
fn a_cluster_that_is_not_there() {
    eggs_tests::binary("eggsctl");
    // A port that is ours and silent, and one where nobody listens.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let gone_address = gone.local_addr().unwrap();
    drop(gone);
    for address in [silent.local_addr().unwrap(), gone_address] {
        for command in ["ls /", "mkdir /d", "status", "df --json", "fsck"] {
            let started = Instant::now();
            let words = format!("{command} --timeout 500ms");
            let outcome = Ctl::new(address).run(words.split_whitespace()).code(3);
            outcome.says(&[&address.to_string()]);
            assert!(outcome.stdout.is_empty(), "{outcome:?}");
            assert!(started.elapsed() < Duration::from_secs(10), "{command}: {:?}", started.elapsed());
        }
    }
    // A cluster that goes away in the middle of a life.
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl();
    ctl.ok("mkdir /d");
    up.kill();
    ctl.run(["ls", "--timeout", "1s", "/d"]).code(3).says(&["gave up after"]);
}

#[test]
fn completions_and_manuals() {
    let folder = scratch();
    let ctl = Ctl::new("127.0.0.1:1").in_folder(folder.path());
    for shell in ["bash", "zsh", "fish"] {
        assert!(ctl.ok(&format!("completions {shell}")).text().contains("create-test-file"), "{shell}");
    }
    std::fs::create_dir(folder.path().join("man")).unwrap();
    ctl.ok("man man");
    assert!(folder.path().join("man/eggsctl.1").exists());
    assert!(folder.path().join("man/eggsctl-put.1").exists());
}
