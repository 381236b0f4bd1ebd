//! The separate daemons: together, killed one by one, configured, and refusing.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use eggs_client::{Client, CreateOptions, Options, Replace};
use eggs_tests::{
    Daemons, Outcome, Process, TOO_LONG, Tree, assert_same_tree, bytes, free_ports, get, json, program, run,
    runtime, scratch, seed,
};

#[test]
fn a_cluster_of_daemons_works_like_one_process() {
    seed();
    let folder = scratch();
    let tree = Tree::generate(&folder.path().join("source"));
    let mut daemons = Daemons::start(&folder.path().join("cluster"));
    let ctl = daemons.ctl().in_folder(folder.path());
    ctl.ok("mkdir -p /data");
    ctl.ok("put -r source /data/src");
    ctl.ok("get -r /data/src back");
    assert_same_tree(&tree.root, &folder.path().join("back"));
    ctl.ok("mv /data/src /moved");
    ctl.ok("cp -r /moved /data/copy");
    ctl.ok("create-test-file /data/hello");
    ctl.ok("rm -r /data/copy");
    ctl.assert_clean();

    let status = ctl.ok("status --json --check").json();
    assert_eq!(status["shards"]["alive"], 256, "{status}");
    let api = json(daemons.shuckle(), "/api/v1/status");
    assert_eq!(api["failure_domains"].as_array().unwrap().len(), 2, "{api}");
    // Blocks of a span are spread evenly over the two hosts.
    let span = ctl.ok("stat --json /moved/size-3333333").json()["spans"][0].clone();
    let on_first = span["blocks"].as_array().unwrap().iter().filter(|block| {
        let disk =
            status["disks"].as_array().unwrap().iter().find(|disk| disk["id"] == block["block_service"]);
        disk.unwrap()["failure_domain"] == "blockd-a"
    });
    assert_eq!(on_first.count(), 3, "{span}");
    for name in Daemons::names() {
        let address = daemons.address(name);
        assert_eq!(get(address, "/healthz").status, 200, "{name}");
        assert_eq!(get(address, "/metrics").status, 200, "{name}");
    }
    // An orderly stop of all of them, and up again.
    for name in Daemons::names().into_iter().rev() {
        daemons.stop(name);
    }
    for name in Daemons::names() {
        daemons.launch(name);
    }
    daemons.wait_until_healthy();
    ctl.ok("get -r /moved back-2");
    assert_same_tree(&tree.root, &folder.path().join("back-2"));
    ctl.assert_clean();
}

/// Puts, moves and reads back until told to stop; every operation succeeds in the end.
async fn work(client: Client, home: String, stop: Arc<AtomicBool>) -> u64 {
    let options = CreateOptions { replace: Replace::File, ..CreateOptions::default() };
    let sizes = [100, 5000, 70_000, 400_000];
    client.mkdir(&home, None).await.unwrap();
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        let size = sizes[n as usize % sizes.len()];
        let (directory, file) = (format!("{home}/d{n}"), format!("{home}/f{n}"));
        client.mkdir(&directory, None).await.unwrap();
        let contents = bytes(size, n);
        client
            .put_bytes(&file, contents.clone().into(), &options)
            .await
            .unwrap_or_else(|error| panic!("{file}: {error}"));
        let to = format!("{directory}/f");
        client.rename(&file, &to, Replace::Refuse).await.unwrap();
        assert!(client.stat(&to).await.unwrap().size == size as u64);
        n += 1;
    }
    n
}

#[test]
fn each_daemon_is_killed_during_a_workload() {
    seed();
    let folder = scratch();
    let mut daemons = Daemons::start(folder.path());
    let runtime = runtime();
    let options = Options { timeout: TOO_LONG, ..Options::new(daemons.shuckle().to_string()) };
    let client = runtime.block_on(Client::connect(options)).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> =
        (0..3).map(|n| runtime.spawn(work(client.clone(), format!("/w{n}"), Arc::clone(&stop)))).collect();
    for name in Daemons::names().into_iter().chain(Daemons::names().into_iter().rev()) {
        // Work is going on …
        let before = done(&runtime, &client);
        eggs_tests::until("work goes on", TOO_LONG, || (done(&runtime, &client) > before).then_some(()));
        // … in the middle of it one dies, and comes back.
        daemons.kill(name);
        daemons.launch(name);
        println!("{name} was killed and is back");
    }
    let before = done(&runtime, &client);
    eggs_tests::until("work goes on", TOO_LONG, || (done(&runtime, &client) > before + 3).then_some(()));
    stop.store(true, Ordering::Relaxed);
    let counts: Vec<u64> =
        workers.into_iter().map(|worker| runtime.block_on(worker).expect("a worker")).collect();
    println!("{counts:?} files");
    daemons.wait_until_healthy();
    runtime.block_on(async {
        let sizes = [100, 5000, 70_000, 400_000];
        for (worker, count) in counts.iter().enumerate() {
            for n in 0..*count {
                let path = format!("/w{worker}/d{n}/f");
                let contents = client.open(&path).await.unwrap().read_all(1 << 30).await.unwrap();
                assert!(contents == bytes(sizes[n as usize % sizes.len()], n), "{path}");
            }
        }
    });
    daemons.ctl().assert_clean();
}

/// How many directories the first worker has made.
fn done(runtime: &tokio::runtime::Runtime, client: &Client) -> usize {
    let listed = runtime
        .block_on(async { client.list("/w0", eggs_client::ListOptions::default()).await?.all().await });
    listed.map_or(0, |entries| entries.len())
}

#[test]
fn all_at_once_die_and_come_back_in_any_order() {
    let folder = scratch();
    let mut daemons = Daemons::start(folder.path());
    let ctl = daemons.ctl();
    ctl.run_with(["put", "-", "/f"], &bytes(3_000_000, 1)).ok();
    ctl.ok("mkdir -p /a/b/c");
    for name in Daemons::names() {
        daemons.kill(name);
    }
    // Shuckle last: the others wait for it.
    let mut waiting: Vec<(&str, Process)> = Vec::new();
    for name in ["blockd-b", "crossdir", "shard", "blockd-a"] {
        waiting.push((name, daemons.spawn(name)));
    }
    daemons.launch("shuckle");
    daemons.wait_until_healthy();
    assert_eq!(ctl.ok("cat /f").stdout, bytes(3_000_000, 1));
    assert_eq!(ctl.names("/a/b"), ["c"]);
    ctl.ok("mkdir /new");
    ctl.assert_clean();
    for (name, mut process) in waiting {
        assert!(process.is_running(), "{name}: {}", process.said());
        process.signal(rustix::process::Signal::TERM);
        assert_eq!(process.wait(TOO_LONG).code(), Some(0), "{name}: {}", process.said());
    }
}

#[test]
fn help_names_every_key() {
    let common = ["config", "log", "log-format", "listen"];
    let member = ["advertise", "shuckle", "secret-file"];
    let replica = ["data", "host", "read-lease", "snapshot-rate"];
    let founding = ["advertise", "secret-file", "peers", "replicas", "replace-after"];
    let keys: [(&str, Vec<&str>); 4] = [
        ("eggs-shuckle", [&common[..], &replica, &founding].concat()),
        ("eggs-shard", [&common[..], &member, &replica].concat()),
        ("eggs-crossdir", [&common[..], &member, &replica].concat()),
        ("eggs-blockd", [&common[..], &member, &["host", "disk", "failure-domain", "no-format"]].concat()),
    ];
    for (name, keys) in keys {
        for flag in ["--help", "-h"] {
            let help = run(program(name).arg(flag), b"", TOO_LONG).ok().text();
            for key in &keys {
                assert!(help.contains(&format!("--{key}")), "{name}: --{key}");
                let variable = format!("EGGS_{}", key.to_uppercase().replace('-', "_"));
                assert!(help.contains(&variable), "{name}: {variable}");
            }
            // And no key that we forgot here.
            let named = help.lines().filter_map(|line| line.trim_start().strip_prefix("--"));
            for name in named.map(|line| line.split([' ', '=']).next().unwrap_or_default()) {
                assert!(keys.contains(&name), "--{name} is not expected");
            }
        }
        assert!(run(program(name).arg("--version"), b"", TOO_LONG).ok().text().starts_with(name));
        let wrong = run(program(name).arg("--nonsense"), b"", TOO_LONG).code(2);
        wrong.says(&["--nonsense"]);
    }
}

/// A shuckle with these settings; the address it took.
fn shuckle(command: &mut Command) -> (Process, std::net::SocketAddr) {
    let process = Process::spawn("shuckle", command);
    let address = process.wait_for("address", TOO_LONG, |line| {
        line.split_once("address=")?.1.split_whitespace().next()?.parse().ok()
    });
    (process, address)
}

#[test]
fn flags_win_over_environment_over_file() {
    let folder = scratch();
    let path = |name: &str| folder.path().join(name);
    let config = path("shuckle.toml");
    let text = format!("listen = \"127.0.0.3:0\"\ndata = {:?}\nlog_format = \"json\"\n", path("from-file"));
    fs::write(&config, text).unwrap();
    let base = || {
        let mut command = program("eggs-shuckle");
        command.arg("--config").arg(&config);
        command
    };
    let json_log = |line: &str| {
        let says_where = line.starts_with('{') && line.contains("\"address\"");
        says_where.then(|| serde_json::from_str::<serde_json::Value>(line))
    };
    // All from the file.
    let process = Process::spawn("shuckle", &mut base());
    let line = process.wait_for("a line of JSON", TOO_LONG, json_log).unwrap();
    assert!(line.to_string().contains("127.0.0.3:"), "{line}");
    drop(process);
    // The environment over it; the file keeps what nothing else says.
    let env = |command: &mut Command| {
        command
            .env("EGGS_LISTEN", "127.0.0.2:0")
            .env("EGGS_LOG_FORMAT", "text")
            .env("EGGS_DATA", path("from-env"));
    };
    let mut command = base();
    env(&mut command);
    let (process, address) = shuckle(&mut command);
    assert_eq!(address.ip().to_string(), "127.0.0.2");
    assert!(path("from-env/FORMAT").exists());
    drop(process);
    // Flags over all.
    let mut command = base();
    env(&mut command);
    command.args(["--listen", "127.0.0.1:0"]).arg("--data").arg(path("from-flag"));
    let (process, address) = shuckle(&mut command);
    assert_eq!(address.ip().to_string(), "127.0.0.1");
    assert!(path("from-flag/FORMAT").exists());
    drop(process);
    // Even the file itself by environment.
    let (_, address) =
        shuckle(program("eggs-shuckle").env("EGGS_CONFIG", &config).env("EGGS_LOG_FORMAT", "text"));
    assert_eq!(address.ip().to_string(), "127.0.0.3");

    for (text, words) in [
        ("lisen = 1\n", &["shuckle.toml", "lisen", "not a setting"][..]),
        ("listen = \"nowhere\"\n", &["shuckle.toml", "listen", "ADDR:PORT"]),
        ("listen = [\n", &["shuckle.toml", "line"]),
        ("listen = [\"127.0.0.1:0\"]\n", &["shuckle.toml", "listen", "list"]),
    ] {
        fs::write(&config, text).unwrap();
        run(&mut base(), b"", TOO_LONG).code(2).says(words);
    }
    let wrong = run(
        program("eggs-shuckle").env("EGGS_LISTEN", "nowhere").arg("--data").arg(path("x")),
        b"",
        TOO_LONG,
    );
    wrong.code(2).says(&["EGGS_LISTEN"]);
    run(program("eggs-shuckle").args(["--config", "/no/such/file"]), b"", TOO_LONG)
        .code(2)
        .says(&["/no/such/file"]);
    run(&mut program("eggs-shard"), b"", TOO_LONG).code(2).says(&["--data"]);
    assert!(!path("x").exists());
}

/// A daemon that must not run with this.
fn refused(name: &str, shuckle: &str, secret: &Path, options: &[&str], words: &[&str]) -> Outcome {
    let mut command = program(name);
    command.args(["--listen", "127.0.0.1:0", "--log", "off", "--shuckle", shuckle]);
    command.arg("--secret-file").arg(secret).args(options);
    run(&mut command, b"", TOO_LONG).refused(words)
}

#[test]
fn what_belongs_to_another_cluster_is_refused() {
    let folder = scratch();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    let mut first = Daemons::start(&ours);
    first.ctl().run_with(["put", "-", "/f"], &bytes(100_000, 1)).ok();
    let id = first.ctl().ok("status --json").json()["cluster_id"].as_str().unwrap().to_owned();
    // Another cluster's registry.
    let (_other, address) = shuckle(
        program("eggs-shuckle").args(["--listen", "127.0.0.1:0"]).arg("--data").arg(theirs.join("shuckle")),
    );
    let (address, secret) = (address.to_string(), theirs.join("shuckle/secret"));
    for name in ["shard", "crossdir", "blockd-a"] {
        first.stop(name);
    }
    let text = |path: &Path| path.display().to_string();
    let shard = text(&first.data("shard"));
    refused("eggs-shard", &address, &secret, &["--data", &shard], &["cluster", &id]);
    let crossdir = text(&first.data("crossdir"));
    refused("eggs-crossdir", &address, &secret, &["--data", &crossdir], &["cluster", &id]);
    let disk = format!("{}:FLASH", text(&first.disk("blockd-a", 0)));
    refused("eggs-blockd", &address, &secret, &["--failure-domain", "x", "--disk", &disk], &["cluster"]);
    // The wrong secret, another kind of directory, one in use, a port in use.
    let (ours_address, ours_secret) = (first.shuckle().to_string(), first.secret());
    let new = text(&folder.path().join("new"));
    refused("eggs-crossdir", &ours_address, &secret, &["--data", &crossdir], &["secret"]);
    refused("eggs-crossdir", &ours_address, &folder.path().join("no-file"), &["--data", &new], &["no-file"]);
    refused(
        "eggs-crossdir",
        &ours_address,
        &ours_secret,
        &["--data", &shard],
        &["belongs to shard", "crossdir"],
    );
    first.launch("shard");
    refused("eggs-shard", &ours_address, &ours_secret, &["--data", &shard], &["in use"]);
    let listen = first.address("shard").to_string();
    let mut command = program("eggs-crossdir");
    command.args(["--log", "off", "--shuckle", &ours_address, "--listen", &listen, "--data", &new]);
    run(command.arg("--secret-file").arg(&ours_secret), b"", TOO_LONG).refused(&[&listen, "in use"]);
    // All is as before.
    for name in ["crossdir", "blockd-a"] {
        first.launch(name);
    }
    first.wait_until_healthy();
    assert_eq!(first.ctl().ok("cat /f").stdout, bytes(100_000, 1));
    first.ctl().assert_clean();
}

#[test]
fn nothing_empty_takes_the_place_of_the_only_replica() {
    let folder = scratch();
    let mut daemons = Daemons::start(folder.path());
    daemons.ctl().ok("mkdir -p /a/b");
    let (address, secret) = (daemons.shuckle().to_string(), daemons.secret());
    let empty = daemons.data("empty").display().to_string();
    // While the one is there, and while it is away.
    refused("eggs-shard", &address, &secret, &["--host", "host-a", "--data", &empty], &["host-a"]);
    daemons.stop("shard");
    let mut command = program("eggs-shard");
    command.args(["--listen", "127.0.0.1:0", "--shuckle", &address, "--host", "host-a"]);
    command.arg("--secret-file").arg(&secret).arg("--data").arg(&empty);
    let other = Process::spawn("empty", &mut command);
    daemons.ctl().run(["ls", "--timeout", "3s", "/a"]).code(3).says(&["shard"]);
    drop(other);
    daemons.launch("shard");
    daemons.wait_until_healthy();
    assert_eq!(daemons.ctl().names("/a"), ["b"]);
    daemons.ctl().ok("mkdir -p /a/b/c");
    daemons.ctl().assert_clean();
}

#[test]
fn a_host_that_is_away_for_long() {
    let folder = scratch();
    let mut daemons = Daemons::start(folder.path());
    let ctl = daemons.ctl();
    ctl.run_with(["put", "-", "/f"], &bytes(3_000_000, 1)).ok();
    ctl.run_with(["put", "-", "/small"], b"small").ok();
    // Half of every span's blocks.
    daemons.kill("blockd-b");
    assert_eq!(ctl.ok("cat /small").stdout, b"small");
    let cat = ctl.run(["cat", "--timeout", "5s", "/f"]);
    assert_eq!(cat.code, Some(3), "{cat:?}");
    cat.says(&["cat"]);
    // Without a coordinator, or the shards, what needs them waits, and says so in the end.
    daemons.kill("crossdir");
    ctl.run(["mkdir", "--timeout", "1s", "/d"]).code(3).says(&["unreachable"]);
    assert_eq!(ctl.names("/").len(), 2);
    daemons.kill("shard");
    ctl.run(["ls", "--timeout", "1s", "/"]).code(3).says(&["unreachable"]);
    for name in ["shard", "crossdir", "blockd-b"] {
        daemons.launch(name);
    }
    daemons.wait_until_healthy();
    assert!(ctl.ok("cat /f").stdout == bytes(3_000_000, 1));
    ctl.ok("mkdir -p /d");
    ctl.assert_clean();
}

/// What `cluster.sh` started, gone when dropped.
struct Script<'a>(&'a Path);

impl Script<'_> {
    fn run(&self, word: &str, more: &[&str]) -> Outcome {
        let mut command = Command::new(eggs_tests::checkout().join("deploy/local/cluster.sh"));
        let bin = eggs_tests::binary("eggsctl").parent().map(Path::to_owned).unwrap_or_default();
        // A host, where there is one, comes before the options.
        command.arg(word).args(more).arg("--data").arg(self.0).arg("--bin").arg(bin);
        run(&mut command, b"", 2 * TOO_LONG)
    }
}

impl Drop for Script<'_> {
    fn drop(&mut self) {
        for file in fs::read_dir(self.0.join("run")).into_iter().flatten().flatten() {
            let pid = fs::read_to_string(file.path()).ok().and_then(|text| text.trim().parse().ok());
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// Starts a cluster of so many hosts; its first port.
fn start_script(script: &Script<'_>, hosts: u16) -> u16 {
    // Somebody may take one of the ports meanwhile.
    let port = (0..5).find_map(|_| {
        let port = free_ports([127, 0, 0, 1].into(), usize::from(10 * (hosts - 1) + 4)).port();
        let started = script.run("start", &["--port", &port.to_string(), "--hosts", &hosts.to_string()]);
        if started.code != Some(0) {
            script.run("stop", &[]);
            assert!(started.stderr.contains("in use"), "{started:?}");
            return None;
        }
        assert!(started.text().contains(&format!("http://127.0.0.1:{port}/")), "{started:?}");
        Some(port)
    });
    port.expect("free ports")
}

#[test]
fn the_script_for_a_local_cluster() {
    let folder = scratch();
    let script = Script(folder.path());
    assert_eq!(script.run("status", &[]).code(1).text().matches("does not run").count(), 5);
    let port = start_script(&script, 1);
    assert_eq!(script.run("status", &[]).code(0).text().matches("runs as process").count(), 5);
    let ctl = eggs_tests::Ctl::new(format!("127.0.0.1:{port}"));
    ctl.run_with(["put", "-", "/f"], &bytes(500_000, 1)).ok();
    assert!(ctl.ok("cat /f").stdout == bytes(500_000, 1));
    assert!(script.run("start", &["--hosts", "3"]).code(1).stderr.contains("has 1 hosts"));
    assert_eq!(script.run("stop", &[]).code(0).text().matches("stopped").count(), 5);
    let _ = script.run("status", &[]).code(1);
    let _ = script.run("nonsense", &[]).code(2);
}

#[test]
fn the_script_for_three_hosts() {
    let folder = scratch();
    let script = Script(folder.path());
    let port = start_script(&script, 3);
    assert_eq!(script.run("status", &[]).code(0).text().matches("runs as process").count(), 15);
    let ctl = eggs_tests::Ctl::new([0, 10, 20].map(|n| format!("127.0.0.1:{}", port + n)).join(","));
    ctl.run_with(["put", "-", "/f"], &bytes(500_000, 1)).ok();
    for host in ["host-1", "host-2", "host-3"] {
        assert_eq!(script.run("kill", &[host]).code(0).text().matches("killed").count(), 5);
        assert!(ctl.ok("cat /f").stdout == bytes(500_000, 1));
        ctl.ok(&format!("mkdir /{host}"));
        assert_eq!(script.run("status", &[]).code(1).text().matches("does not run").count(), 5);
        assert_eq!(script.run("restart", &[host]).code(0).text(), "ready\n");
    }
    assert_eq!(ctl.names("/"), ["f", "host-1", "host-2", "host-3"]);
    let _ = script.run("kill", &["host-4"]).code(1);
    let _ = script.run("kill", &[]).code(2);
    assert_eq!(script.run("stop", &[]).code(0).text().matches("stopped").count(), 15);
}
