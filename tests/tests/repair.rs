//! The janitor: lost disks, drained disks, damage, restriping, and a kill in the middle of it.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use eggs_client::PolicyKind;
use eggs_proto::pb;
use eggs_tests::{
    Ctl, Daemons, Up, assert_same_tree, bytes, files_below, get, json, problems, runtime, scratch, until,
};
use serde_json::Value;

/// Of a repair, on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);
/// Quick to act, for tests.
const EAGER: [&str; 4] = ["--lost-after", "1s", "--garbage-interval", "1s"];

/// Files stored in all ways.
fn local_tree(folder: &Path) -> PathBuf {
    let root = folder.join("source");
    fs::create_dir_all(root.join("below")).unwrap();
    for (n, size) in [0, 100, 5000, 66_000, 200_000, 1 << 20, 3_500_000].into_iter().enumerate() {
        for copy in 0..3 {
            let name = format!("{size}-{copy}");
            fs::write(root.join(&name), bytes(size, (n * 10 + copy) as u64)).unwrap();
            fs::write(root.join("below").join(&name), bytes(size, (n * 10 + copy + 500) as u64)).unwrap();
        }
    }
    root
}

struct Cluster {
    up: Up,
    folder: tempfile::TempDir,
    source: PathBuf,
}

impl Cluster {
    /// With files in it.
    fn start(options: &[&str]) -> Cluster {
        let folder = scratch();
        let source = local_tree(folder.path());
        let up = Up::start_with(&folder.path().join("data"), options);
        up.ctl().in_folder(folder.path()).ok("put -r source /data");
        Cluster { up, folder, source }
    }

    fn ctl(&self) -> Ctl {
        self.up.ctl().with_secret(self.up.data().join("secret")).in_folder(self.folder.path())
    }

    fn check(&self, name: &str) {
        self.ctl().ok(&format!("get -r /data {name}"));
        assert_same_tree(&self.source, &self.folder.path().join(name));
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.up.data().join("disks").join(name)
    }

    /// What `disk ls` says of one.
    fn listed(&self, name: &str) -> Value {
        let disks = self.ctl().ok("disk ls --json").json();
        let path = self.disk(name).display().to_string();
        disks.as_array().unwrap().iter().find(|disk| disk["path"] == path.as_str()).unwrap().clone()
    }

    fn wait_until_empty(&self, names: &[&str]) {
        for name in names {
            until("the disk is empty", LIMIT, || (self.listed(name)["emptying"] == "empty").then_some(()));
        }
    }

    /// Flips a bit every so many bytes of what a disk holds.
    fn damage(&self, disk: &str, apart: usize) {
        let mut flipped = 0;
        for path in files_below(&self.disk(disk)) {
            let file = fs::File::options().read(true).write(true).open(&path).unwrap();
            // What is as long holds blocks.
            for at in (32 << 10..file.metadata().unwrap().len()).step_by(apart) {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 4], at).unwrap();
                flipped += 1;
            }
        }
        assert!(flipped > 0);
    }

    fn metric(&self, name: &str) -> f64 {
        let page = get(self.up.address(), "/metrics").body;
        let line = page.lines().find(|line| line.starts_with(name)).map(str::to_owned);
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0)
    }

    /// Tasks of repair; of one disk each, or on the whole (`about` is null).
    fn repairs(&self) -> Vec<Value> {
        let tasks = self.ctl().ok("repairs --json").json()["tasks"].clone();
        tasks.as_array().unwrap().iter().filter(|task| task["kind"] == "repair").cloned().collect()
    }

    /// There is nothing to repair.
    fn healthy(&self) {
        until("nothing is wrong", LIMIT, || {
            problems(&json(self.up.address(), "/api/v1/status")).is_empty().then_some(())
        });
    }
}

#[test]
fn disks_that_are_lost_are_repaired_and_as_many_may_go_again() {
    let cluster = Cluster::start(&[&["--disks", "11"], &EAGER[..]].concat());
    for (round, lost) in [&["03"][..], &["05", "06"], &["00", "10"]].into_iter().enumerate() {
        for disk in lost {
            fs::remove_dir_all(cluster.disk(disk)).unwrap();
        }
        cluster.check(&format!("at-once-{round}"));
        cluster.wait_until_empty(lost);
        cluster.check(&format!("repaired-{round}"));
        cluster.healthy();
    }
    let repairs = cluster.ctl().ok("repairs --json").json();
    let tasks = repairs["tasks"].as_array().unwrap();
    let of_disk = tasks.iter().filter(|task| task["kind"] == "repair" && !task["about"].is_null());
    for task in of_disk {
        assert!(task["spans_done"].as_u64() > Some(0) && task["least_redundancy"].is_null(), "{task}");
        assert_eq!(task["spans_done"], task["spans_total"], "{task}");
    }
    cluster.ctl().assert_clean();
    cluster.up.stop();
}

#[test]
fn a_lost_disk_is_replaced_and_forgotten() {
    let mut cluster = Cluster::start(&[&["--disks", "7"], &EAGER[..]].concat());
    let disk = cluster.disk("02");
    let id = cluster.listed("02")["id"].as_str().unwrap().to_owned();
    cluster.ctl().refused(&format!("disk forget {id}"), &["not decommissioned"]);
    fs::remove_dir_all(&disk).unwrap();
    cluster.wait_until_empty(&["02"]);
    assert!(cluster.listed("02")["progress"].as_str().unwrap().contains("disk forget"));
    fs::create_dir(&disk).unwrap();
    let restart = |up: Up| {
        let data = up.data().to_owned();
        up.stop();
        Up::start_with(&data, &EAGER)
    };
    cluster.up = restart(cluster.up);
    let listed = cluster.ctl().ok("disk ls --json").json();
    let at_path = |disks: &Value| -> Vec<Value> {
        let path = disk.display().to_string();
        disks.as_array().unwrap().iter().filter(|disk| disk["path"] == path.as_str()).cloned().collect()
    };
    assert_eq!(at_path(&listed).len(), 2, "the new one, and what is known of the old: {listed}");
    assert!(disk.join("identity").exists());
    until("the old disk is found empty again", LIMIT, || {
        cluster.ctl().run(["disk", "forget", &id]).code.filter(|&code| code == 0)
    });
    let left = at_path(&cluster.ctl().ok("disk ls --json").json());
    assert_eq!(left.len(), 1);
    assert_ne!(left[0]["id"], id.as_str());
    assert_eq!(left[0]["flags"], Value::Array(Vec::new()), "it takes blocks");

    // One that was forgotten while its host still speaks of it stays away, and its place is free at once.
    let lost = cluster.disk("05");
    let id = cluster.listed("05")["id"].as_str().unwrap().to_owned();
    fs::remove_dir_all(&lost).unwrap();
    cluster.wait_until_empty(&["05"]);
    cluster.ctl().ok(&format!("disk forget {id}"));
    let heard = || cluster.listed("00")["last_seen_ns"].as_u64().unwrap();
    let before = heard();
    until("its host was heard of again", LIMIT, || (heard() > before + 1_500_000_000).then_some(()));
    assert_eq!(cluster.ctl().ok("disk ls --json").json().as_array().unwrap().len(), 6);
    cluster.up = restart(cluster.up);
    assert_eq!(cluster.listed("05")["flags"], Value::Array(Vec::new()));
    assert_eq!(cluster.ctl().ok("disk ls --json").json().as_array().unwrap().len(), 7);
    cluster.check("replaced");
    cluster.healthy();
    cluster.up.stop();
}

#[test]
fn more_disks_than_may_be_given_up_are_waited_for() {
    let mut cluster = Cluster::start(&[&["--disks", "10", "--lost-max", "1"], &EAGER[..]].concat());
    for disk in ["01", "02"] {
        fs::rename(cluster.disk(disk), cluster.folder.path().join(disk)).unwrap();
    }
    until("it says that it waits", LIMIT, || {
        let status = cluster.ctl().run(["status", "--json"]).json();
        status["problems"].to_string().contains("2 disks are away").then_some(())
    });
    assert_eq!(cluster.listed("01")["flags"], serde_json::json!(["LOST"]), "it is not given up");
    cluster.ctl().refused(
        &format!("disk decommission {0}/01 {0}/02", cluster.up.data().join("disks").display()),
        &["--yes"],
    );
    cluster.check("back");
    cluster.up.process().is_running();
    cluster.up.stop();
}

#[test]
fn a_drained_disk_is_emptied_and_can_come_back() {
    let cluster = Cluster::start(&EAGER);
    let id = cluster.listed("04")["id"].as_str().unwrap().to_owned();
    cluster.ctl().refused(&format!("disk decommission {id}"), &["can be read", "disk drain"]);
    let _ = cluster.ctl().run(["disk", "drain", &id, "--wait"]).code(0);
    cluster.wait_until_empty(&["04"]);
    until("its blocks are erased", LIMIT, || (cluster.listed("04")["blocks"] == 0).then_some(()));
    cluster.check("drained");
    cluster.healthy();
    cluster.ctl().ok(&format!("disk drain {id} --undo"));
    assert_eq!(cluster.listed("04")["flags"], serde_json::json!([]));
    cluster.ctl().assert_clean();
    cluster.up.stop();
}

#[test]
fn a_kill_in_mid_repair_loses_nothing_and_it_goes_on() {
    let slow = [&["--disks", "9", "--repair-rate", "1"], &EAGER[..]].concat();
    let mut cluster = Cluster::start(&slow);
    fs::remove_dir_all(cluster.disk("02")).unwrap();
    until("the repair has begun", LIMIT, || {
        let repairs = cluster.ctl().ok("repairs --json").json();
        let tasks = repairs["tasks"].as_array().unwrap().clone();
        tasks
            .iter()
            .any(|task| task["kind"] == "repair" && task["bytes_done"].as_u64() > Some(0))
            .then_some(())
    });
    let data = cluster.up.data().to_owned();
    cluster.up.kill();
    cluster.up = Up::start_with(&data, &EAGER);
    cluster.check("while");
    cluster.wait_until_empty(&["02"]);
    cluster.check("after");
    for disk in ["07", "08"] {
        fs::remove_dir_all(cluster.disk(disk)).unwrap();
    }
    cluster.check("two-more");
    cluster.ctl().assert_clean();
    cluster.up.stop();
}

#[test]
fn of_two_janitors_the_second_takes_over() {
    let folder = scratch();
    let source = local_tree(folder.path());
    let mut daemons = Daemons::start(&folder.path().join("cluster"));
    let janitor = |daemons: &Daemons| json(daemons.shuckle(), "/api/v1/janitor");
    daemons.launch("janitor-slow");
    until("the first one works", LIMIT, || (janitor(&daemons)["host"] == "janitor-slow").then_some(()));
    daemons.launch("janitor-b");
    let ctl = daemons.ctl().with_secret(daemons.secret()).in_folder(folder.path());
    ctl.ok("put -r source /data");
    fs::remove_dir_all(daemons.disk("blockd-a", 1)).unwrap();
    until("the repair has begun", LIMIT, || {
        let tasks = janitor(&daemons)["tasks"].clone();
        let begun = tasks.as_array().unwrap().iter().any(|task| task["bytes_done"].as_u64() > Some(0));
        (begun && janitor(&daemons)["host"] == "janitor-slow").then_some(())
    });
    daemons.kill("janitor-slow");
    until("the second one ends it", LIMIT, || {
        let state = janitor(&daemons);
        let done = |task: &Value| task["kind"] == "repair" && task["least_redundancy"].is_null();
        let ended = state["tasks"].as_array().unwrap().iter().any(done);
        (state["host"] == "janitor-b" && ended).then_some(())
    });
    ctl.ok("get -r /data back");
    assert_same_tree(&source, &folder.path().join("back"));
    ctl.assert_clean();
    assert_eq!(get(daemons.address("janitor-b"), "/healthz").status, 200);
    daemons.stop("janitor-b");
}

#[test]
fn scrub_finds_what_nobody_reads_and_it_is_repaired() {
    let cluster = Cluster::start(&[&["--scrub-period", "10s"], &EAGER[..]].concat());
    cluster.damage("03", 40 << 10);
    let metric = |name: &str| cluster.metric(name);
    until("scrub has found it", LIMIT, || (metric("eggs_janitor_bad_blocks_total") > 0.0).then_some(()));
    until("it is repaired", LIMIT, || {
        let disks = json(cluster.up.address(), "/api/v1/block-services")["block_services"].clone();
        let bad = disks
            .as_array()
            .unwrap()
            .iter()
            .map(|disk| disk["reported_blocks"].as_u64().unwrap())
            .sum::<u64>();
        (bad == 0 && metric("eggs_janitor_repaired_blocks_total") > 0.0).then_some(())
    });
    until("every block is right", LIMIT, || {
        (cluster.ctl().run(["verify", "-r", "/data"]).code == Some(0)).then_some(())
    });
    cluster.check("back");
    assert!(cluster.ctl().ok("scrub").text().contains("bad blocks"));
    cluster.up.stop();
}

#[test]
fn what_damage_has_taken_is_called_lost() {
    let mut cluster = Cluster::start(&[&["--disks", "6", "--scrub-period", "10s"], &EAGER[..]].concat());
    for disk in ["01", "02", "03", "04"] {
        cluster.damage(disk, 8 << 10);
    }
    until("it is said", LIMIT, || {
        let problems = cluster.ctl().run(["status", "--json"]).json()["problems"].to_string();
        (problems.contains("lost more blocks than") && problems.contains("eggsctl verify -r /")).then_some(())
    });
    let whole = |task: &Value| task["about"].is_null() && task["spans_lost"].as_u64() > Some(0);
    assert!(cluster.repairs().iter().any(whole), "{:?}", cluster.repairs());
    assert!(cluster.metric("eggs_janitor_lost_spans") > 0.0);
    let logged = |line: &str| line.contains("ERROR") && line.contains("lost more blocks than their parity");
    cluster.up.process().wait_for("the loss in the log", LIMIT, |line| logged(line).then_some(()));
    assert_ne!(cluster.ctl().run(["verify", "-r", "/"]).code, Some(0));
    cluster.up.stop();
}

#[test]
fn what_there_is_no_room_for_does_not_hold_up_the_rest() {
    let folder = scratch();
    let source = folder.path().join("source");
    fs::create_dir_all(&source).unwrap();
    for n in 0..300 {
        fs::write(source.join(format!("mirrored-{n}")), bytes(5000, n)).unwrap();
    }
    // So many that the workers would be at them for longer than the limit, were each waited for.
    for n in 0..48 {
        fs::write(source.join(format!("wide-{n}")), bytes(200_000, n)).unwrap();
    }
    let up = Up::start_with(&folder.path().join("data"), &[&["--disks", "8"], &EAGER[..]].concat());
    up.ctl().in_folder(folder.path()).ok("put -r source /data");
    let cluster = Cluster { up, folder, source };
    let path = |disk: &str| cluster.disk(disk).display().to_string();
    let four = ["00", "01", "02", "03"].map(path);
    let drained = cluster.ctl().run([&["disk".to_owned(), "drain".to_owned()][..], &four].concat()).code(0);
    drained.says(&["warning: 4+2 needs 6 FLASH disks, there are 4"]);
    cluster.ctl().run(["disk", "decommission", "--yes", &path("04")]).code(0).says(&["there are 3"]);
    until("only what has no room is left", LIMIT, || {
        let stuck = |task: &&Value| {
            let left = task["spans_total"].as_u64().unwrap() - task["spans_done"].as_u64().unwrap();
            let state = task["state"].as_str().unwrap();
            state.contains("for the next try: 4+2 needs") && left <= 48 && task["seconds_left"].is_null()
        };
        (cluster.repairs().iter().filter(stuck).count() == 5).then_some(())
    });
    cluster.check("back");
    // There is room again: nothing of it is forgotten.
    let _ = cluster.ctl().run([&["disk", "drain", "--undo"].map(str::to_owned)[..], &four].concat()).code(0);
    cluster.wait_until_empty(&["04"]);
    cluster.check("repaired");
    cluster.ctl().assert_clean();
    cluster.up.stop();
}

#[test]
fn files_are_stored_anew_as_the_policy_has_it() {
    let cluster = Cluster::start(&EAGER);
    let before = cluster.ctl().ok("stat --json /data/3500000-0").json();
    let rules = [(4096, 0, 0), (64 << 20, 2, 1)];
    let rules = rules.map(|(max_size, data, parity)| pb::SpanRule { max_size, data, parity }).to_vec();
    let policies = pb::Policies { span: Some(pb::SpanPolicy { rules }), ..Default::default() };
    runtime().block_on(async {
        let client = cluster.up.client().await;
        client.set_policy("/data", PolicyKind::PolicySpan, Some(policies)).await.unwrap();
    });
    let _ = cluster.ctl().run(["restripe", "/data", "--wait"]).code(0);
    let after = cluster.ctl().ok("stat --json /data/3500000-0").json();
    assert_ne!(before["spans"], after["spans"]);
    assert_eq!(before["crc"], after["crc"]);
    cluster.check("restriped");
    let jobs = cluster.ctl().ok("restripe ls --json").json();
    assert_eq!((&jobs[0]["done"], &jobs[0]["files_failed"]), (&Value::from(true), &Value::from(0)));
    assert!(jobs[0]["files_done"].as_u64() > Some(0));
    let _ = cluster.ctl().run(["restripe", "/data/below", "--wait"]).code(0);
    assert_eq!(
        cluster.ctl().ok("restripe ls --json").json()[1]["files_done"],
        0,
        "they are as they are to be"
    );
    cluster.ctl().refused("restripe /data/100-0", &["not a directory"]);
    cluster.ctl().refused("restripe cancel 77", &["no job 77"]);
    cluster.ctl().assert_clean();
    cluster.up.stop();
}
