//! Starting, refusing to start, stopping, starting again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use eggs_tests::{Ctl, Outcome, Process, TOO_LONG, Up, bytes, listing, program, run, scratch, until};
use rustix::process::{Pid, Signal, kill_process};

/// Everything in a folder.
type Files = BTreeMap<Vec<u8>, String>;

/// `up` that is expected to refuse.
fn up(data: &Path, options: &[&str]) -> Outcome {
    let mut command = program("eggsctl");
    command.arg("up").arg("--data").arg(data).args(options);
    if !options.contains(&"--listen") {
        command.args(["--listen", "127.0.0.1:0"]);
    }
    run(&mut command, b"", TOO_LONG)
}

/// Refused with one line, and not a byte of the folder is another one.
fn refused_untouched(data: &Path, options: &[&str], words: &[&str]) {
    let before = existing(data);
    let outcome = up(data, options).refused(words);
    assert!(outcome.stdout.is_empty(), "{outcome:?}");
    assert_same(before.as_ref(), existing(data).as_ref(), &outcome.stderr);
}

/// As `assert_eq`, but says only what differs.
fn assert_same(left: Option<&Files>, right: Option<&Files>, what: &str) {
    let entries = |files: Option<&Files>| -> BTreeSet<(String, String)> {
        let shown =
            |(path, what): (&Vec<u8>, &String)| (String::from_utf8_lossy(path).into_owned(), what.clone());
        files.into_iter().flatten().map(shown).collect()
    };
    let (left_entries, right_entries) = (entries(left), entries(right));
    let differ: Vec<_> = left_entries.symmetric_difference(&right_entries).collect();
    assert!(differ.is_empty() && left.is_some() == right.is_some(), "{what}: {differ:#?}");
}

fn existing(folder: &Path) -> Option<Files> {
    folder.exists().then(|| listing(folder))
}

/// A cluster with something in it, at rest.
fn stopped_cluster(data: &Path) -> String {
    let up = Up::start(data);
    up.ctl().ok("create-test-file /hello");
    let id = up.ctl().ok("status --json").json()["cluster_id"].as_str().unwrap().to_owned();
    up.stop();
    id
}

#[test]
fn a_directory_in_use() {
    let folder = scratch();
    let data = folder.path().join("data");
    let mut first = Up::start(&data);
    // Held still, so that what changes is the second one's doing.
    first.process().hold();
    let id = first.process().id().to_string();
    refused_untouched(&data, &[], &["in use", &id, &data.display().to_string()]);
    refused_untouched(&data, &["--detach"], &["in use"]);
    first.process().signal(Signal::CONT);
    first.ctl().ok("create-test-file /hello");
    first.stop();
}

#[test]
fn a_port_in_use() {
    let folder = scratch();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let options = ["--listen", address.as_str()];
    refused_untouched(&folder.path().join("new"), &options, &[&address, "in use"]);
    assert!(!folder.path().join("new").exists());
    let data = folder.path().join("data");
    stopped_cluster(&data);
    let before = without_locks(&data);
    up(&data, &options).refused(&[&address, "in use"]);
    assert_same(Some(&before), Some(&without_locks(&data)), "refused");
    Up::start(&data).stop();
}

/// The process id in a LOCK file is that of who last had it open, refused or not.
fn without_locks(data: &Path) -> Files {
    let mut found = listing(data);
    found.retain(|path, _| !path.ends_with(b"LOCK"));
    found
}

#[test]
fn a_foreign_directory() {
    let folder = scratch();
    let data = folder.path().join("photos");
    fs::create_dir_all(data.join("holiday")).unwrap();
    fs::write(data.join("holiday/one.jpg"), "jpg").unwrap();
    refused_untouched(&data, &[], &["photos", "holiday"]);
    fs::write(data.join("FORMAT"), "something else\n").unwrap();
    refused_untouched(&data, &[], &["FORMAT"]);
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let outcome = up(&file, &[]).refused(&["not a directory"]);
    assert!(outcome.stderr.contains("file"));
    assert_eq!(fs::read(&file).unwrap(), b"");
    // An empty one that exists is fine.
    fs::create_dir(folder.path().join("empty")).unwrap();
    Up::start(&folder.path().join("empty")).stop();
}

#[test]
fn a_newer_format() {
    let folder = scratch();
    let data = folder.path().join("data");
    stopped_cluster(&data);
    let format = fs::read_to_string(data.join("FORMAT")).unwrap();
    assert!(format.starts_with("eggsfs 2\n"), "{format}");
    // A later version may have more to say after its first line.
    for newer in [format.replacen("eggsfs 2", "eggsfs 3", 1), "eggsfs 999\nand more\n".to_owned()] {
        fs::write(data.join("FORMAT"), newer).unwrap();
        refused_untouched(&data, &[], &["format", "newer"]);
    }
    // From before replication.
    fs::write(data.join("FORMAT"), format.replacen("eggsfs 2", "eggsfs 1", 1)).unwrap();
    refused_untouched(&data, &[], &["format 1", "before replication"]);
    let damaged = format.replacen("kind", "kinb", 1);
    fs::write(data.join("FORMAT"), damaged).unwrap();
    refused_untouched(&data, &[], &["FORMAT", "damaged"]);
    fs::write(data.join("FORMAT"), format).unwrap();
    // One part of it is newer.
    for part in ["shuckle", "shard", "crossdir"] {
        let file = data.join(part).join("FORMAT");
        let format = fs::read_to_string(&file).unwrap();
        fs::write(&file, format.replacen("eggsfs 2", "eggsfs 3", 1)).unwrap();
        let before = without_locks(&data);
        up(&data, &[]).refused(&[part, "format", "newer"]);
        assert_same(Some(&before), Some(&without_locks(&data)), "refused");
        fs::write(&file, format).unwrap();
    }
    let again = Up::start(&data);
    again.ctl().ok("cat /hello");
    again.ctl().assert_clean();
    again.stop();
}

#[test]
fn a_directory_of_another_cluster() {
    let folder = scratch();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    let (our_id, their_id) = (stopped_cluster(&ours), stopped_cluster(&theirs));
    assert_ne!(our_id, their_id);
    for part in ["shuckle", "shard", "crossdir"] {
        let (own, aside) = (ours.join(part), folder.path().join("aside"));
        fs::rename(&own, &aside).unwrap();
        fs::rename(theirs.join(part), &own).unwrap();
        let before = without_locks(&ours);
        let outcome = up(&ours, &[]).refused(&["cluster", &our_id, &their_id]);
        assert!(outcome.stdout.is_empty());
        assert_same(Some(&before), Some(&without_locks(&ours)), "refused");
        fs::rename(&own, theirs.join(part)).unwrap();
        fs::rename(&aside, &own).unwrap();
    }
    // Another kind of directory.
    refused_untouched(&ours.join("shuckle"), &[], &["shuckle", "embedded"]);
    // Both are as good as before.
    for data in [&ours, &theirs] {
        let up = Up::start(data);
        assert_eq!(up.ctl().ok("cat /hello").stdout.len(), 22);
        up.ctl().assert_clean();
        up.stop();
    }
}

#[test]
fn a_disk_of_another_cluster_is_not_touched() {
    let folder = scratch();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    stopped_cluster(&ours);
    stopped_cluster(&theirs);
    fs::remove_dir_all(ours.join("disks/03")).unwrap();
    fs::rename(theirs.join("disks/03"), ours.join("disks/03")).unwrap();
    let before = listing(&ours.join("disks/03"));
    // Whether it starts without the disk or not at all, the disk stays as it is.
    let process = Up::spawn(&ours, &[]);
    if process.try_wait_for(TOO_LONG, |line| line.starts_with("ready in ").then_some(())).is_some() {
        let up = Up::ready(process, &ours);
        let disks = up.ctl().ok("status --json").json()["disks"].clone();
        let disk =
            disks.as_array().unwrap().iter().find(|disk| disk["path"].as_str().unwrap().ends_with("03"));
        assert_eq!(disk.unwrap()["flags"], serde_json::json!(["LOST"]), "{disks}");
        assert_eq!(up.ctl().ok("cat /hello").stdout.len(), 22);
        up.stop();
    }
    assert_eq!(listing(&ours.join("disks/03")), before);
}

#[test]
fn signals_drain() {
    let folder = scratch();
    let data = folder.path().join("data");
    let contents = bytes(30 << 20, 1);
    fs::write(folder.path().join("local"), &contents).unwrap();
    for (signal, name) in [(Signal::TERM, "/term"), (Signal::INT, "/int")] {
        let mut up = Up::start(&data);
        let ctl = up.ctl().in_folder(folder.path());
        let putting = std::thread::spawn(move || ctl.run(["put", "--timeout", "3s", "local", name]));
        // In the middle of it, when the machine is not too quick for that.
        until("blocks arrive", TOO_LONG, || {
            let blocks = eggs_tests::json(up.address(), "/api/v1/status")["total"]["blocks"].as_u64()?;
            (blocks > 0 || putting.is_finished()).then_some(())
        });
        up.process().signal(signal);
        let status = up.process().wait(TOO_LONG);
        assert_eq!(status.code(), Some(0), "{}", up.process().said());
        assert!(up.process().said().contains("stopped in"), "{}", up.process().said());
        drop(up);
        let put = putting.join().unwrap();
        let again = Up::start(&data);
        match put.code {
            Some(0) => assert_eq!(again.ctl().ok(&format!("cat {name}")).stdout, contents),
            // Not acknowledged: all of it or none of it.
            Some(_) => {
                let cat = again.ctl().run(["cat", name]);
                assert!(cat.code == Some(1) || cat.stdout == contents, "{}", cat.stderr);
            }
            None => panic!("{put:?}"),
        }
        again.ctl().assert_clean();
        again.stop();
    }
}

/// Ends what `--detach` left when a test fails.
struct Detached<'a>(&'a Path);

impl Detached<'_> {
    fn pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.0.join("eggsctl.pid")).ok()?;
        Pid::from_raw(text.trim().parse().ok()?)
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

#[test]
fn in_the_background() {
    let folder = scratch();
    let data = folder.path().join("data with 'blanks'");
    let detached = Detached(&data);
    let down = |data: &Path| {
        let mut command = program("eggsctl");
        run(command.arg("down").arg("--data").arg(data), b"", TOO_LONG)
    };
    down(&data).refused(&["no cluster is running here"]);
    for _ in 0..2 {
        let ready = up(&data, &["--detach"]).ok().text();
        assert!(ready.starts_with("ready in "), "{ready}");
        let address = ready.split("http://").nth(1).unwrap().split('/').next().unwrap();
        let ctl = Ctl::new(address);
        ctl.ok("mkdir -p /d");
        assert_eq!(ctl.names("/"), ["d"]);
        let pid = detached.pid().unwrap();
        up(&data, &["--detach"]).refused(&["in use"]);
        let stopped = down(&data).ok().text();
        assert!(stopped.starts_with("stopped process"), "{stopped}");
        assert!(kill_process(pid, Signal::WINCH).is_err() || is_zombie(pid), "it is gone");
        ctl.run(["ls", "--timeout", "300ms", "/"]).code(3).says(&[address]);
        down(&data).refused(&["no cluster is running here"]);
    }
    // One that was killed leaves its file: nobody is fooled.
    let ready = up(&data, &["--detach"]).ok().text();
    let pid = detached.pid().unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    // Its locks go a moment after it, when it is busy.
    until("its end", TOO_LONG, || {
        let outcome = down(&data);
        (outcome.code == Some(1)).then(|| outcome.says(&["no cluster is running here"]))
    });
    assert!(ready.contains("eggsctl.log"), "{ready}");
    up(&data, &["--detach"]).ok();
    down(&data).ok();
}

fn is_zombie(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
}

#[test]
fn down_stops_one_in_the_foreground() {
    let folder = scratch();
    let data = folder.path().join("data");
    let mut up = Up::start(&data);
    let mut command = program("eggsctl");
    run(command.arg("down").env("EGGS_DATA", &data), b"", TOO_LONG).ok();
    assert_eq!(up.process().wait(Duration::from_secs(5)).code(), Some(0));
}

#[test]
fn data_survives_restarts_and_disks_are_added() {
    let folder = scratch();
    let data = folder.path().join("data");
    let contents = bytes(3_000_000, 7);
    let up = Up::start_with(&data, &["--disks", "6"]);
    let id = up.ctl().ok("status --json").json()["cluster_id"].clone();
    up.ctl().run_with(["put", "-", "/f"], &contents).ok();
    up.ctl().ok("mkdir -p /a/b/c");
    up.stop();
    super_up_refuses_fewer(&data);
    let up = Up::start_with(&data, &["--disks", "9"]);
    let status = up.ctl().ok("status --json").json();
    assert_eq!((&status["cluster_id"], status["disks"].as_array().unwrap().len()), (&id, 9));
    assert_eq!(up.ctl().ok("cat /f").stdout, contents);
    up.kill();
    let up = Up::start(&data);
    let status = up.ctl().ok("status --json --check").json();
    assert_eq!((&status["cluster_id"], status["disks"].as_array().unwrap().len()), (&id, 9));
    assert_eq!(up.ctl().ok("cat /f").stdout, contents);
    assert_eq!(up.ctl().names("/a/b"), ["c"]);
    up.ctl().assert_clean();
    up.stop();
}

fn super_up_refuses_fewer(data: &Path) {
    let outcome = up(data, &["--disks", "3"]).refused(&["--disks 3", "6"]);
    assert!(outcome.stdout.is_empty());
    for nonsense in ["0", "101", "many"] {
        let _ = up(data, &["--disks", nonsense]).code(2);
    }
}

#[test]
fn three_hosts_in_one_process() {
    let folder = scratch();
    let data = folder.path().join("data");
    let contents = bytes(3_000_000, 7);
    let up = Up::start_with(&data, &["--replicas", "3"]);
    let status = up.ctl().ok("status --json --check").json();
    assert_eq!((&status["replicas"], status["disks"].as_array().unwrap().len()), (&3.into(), 9), "{status}");
    let id = status["cluster_id"].clone();
    up.ctl().run_with(["put", "-", "/f"], &contents).ok();
    up.ctl().ok("mkdir -p /a/b/c");
    up.stop();
    // What it has, without being told.
    let again = Up::start(&data);
    assert_eq!(again.ctl().ok("cat /f").stdout, contents);
    again.ctl().ok("mkdir /d");
    again.kill();
    let other = up_refused(&data, "1");
    assert!(other.contains("has 3"), "{other}");
    let again = Up::start_with(&data, &["--replicas", "3"]);
    let status = again.ctl().ok("status --json --check").json();
    assert_eq!((&status["cluster_id"], &status["replicas"]), (&id, &3.into()), "{status}");
    assert_eq!(again.ctl().ok("cat /f").stdout, contents);
    assert_eq!(again.ctl().names("/"), ["a", "d", "f"]);
    again.kill();
    // A host that has lost everything is given it again.
    for part in ["shuckle", "shard", "crossdir"] {
        fs::remove_dir_all(data.join("host-3").join(part)).unwrap();
    }
    let again = Up::start(&data);
    assert_eq!(again.ctl().ok("cat /f").stdout, contents);
    again.ctl().assert_clean();
    again.stop();
}

fn up_refused(data: &Path, replicas: &str) -> String {
    up(data, &["--replicas", replicas]).code(1).stderr
}

#[test]
fn killed_while_it_starts() {
    let folder = scratch();
    let data = folder.path().join("data");
    // At other moments of its first start each time, and of its starts after it.
    for (replicas, disks) in [("1", 8), ("3", 9)] {
        let data = data.join(replicas);
        fs::create_dir_all(&data).unwrap();
        for milliseconds in [0, 5, 15, 30, 60, 120, 250, 500] {
            let mut process: Process = Up::spawn(&data, &["--replicas", replicas]);
            let moment = Duration::from_millis(milliseconds);
            process.try_wait_for(moment, |line| line.starts_with("ready in ").then_some(()));
            process.kill();
        }
        let up = Up::start_with(&data, &["--replicas", replicas]);
        up.ctl().ok("create-test-file /hello");
        let status = up.ctl().ok("status --json --check").json();
        assert_eq!(status["disks"].as_array().unwrap().len(), disks, "{status}");
        up.ctl().assert_clean();
        up.stop();
    }
}
