//! Three hosts as processes on the loopback: killed, emptied, damaged, copied, without a majority, drained.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use eggs_client::{Client, CreateOptions, ListOptions, Options};
use eggs_proto::errors::{CrossdirError, ServiceError as _, ShardError};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::{InodeId, pb};
use eggs_tests::{
    Connection, Hosts, HostsConfig, Load, LoadOptions, Outcome, PARTS, TOO_LONG, answer_bytes, bytes,
    files_below, get, grpc_message, program, run, runtime, scratch, seed, until,
};
use prost::Message;

const CLIENTS: usize = 6;
/// What has replicas.
const REPLICATED: [&str; 3] = ["shuckle", "shard", "crossdir"];

fn load(hosts: &Hosts, runtime: &tokio::runtime::Runtime, root: &str) -> Load {
    let options = LoadOptions { shuckle: hosts.shuckles(), clients: CLIENTS, root: root.to_owned() };
    Load::start(runtime, &options)
}

/// So many more answers.
fn goes_on(load: &Load, what: &str) {
    let before = load.acknowledged();
    until(what, TOO_LONG, || (load.acknowledged() > before + 50).then_some(()));
}

#[test]
fn each_host_is_killed_under_load() {
    seed();
    let folder = scratch();
    let mut hosts = Hosts::start(folder.path(), HostsConfig::new(3));
    let ctl = hosts.ctl();
    ctl.run_with(["put", "-", "/large"], &bytes(3_000_000, 1)).ok();
    let runtime = runtime();
    let load = load(&hosts, &runtime, "/load");
    for host in 0..3 {
        let name = hosts.name(host);
        goes_on(&load, "work");
        load.phase(format!("kill: {name}"));
        hosts.kill_host(host);
        goes_on(&load, &format!("work without {name}"));
        // Contents are read around its disks, and written past them.
        assert!(ctl.ok("cat /large").stdout == bytes(3_000_000, 1));
        let new = format!("/large-{host}");
        ctl.run_with(["put", "-", &new], &bytes(1_000_000, 2)).ok();
        load.phase(format!("back: {name}"));
        hosts.launch_host(host);
        hosts.wait_until_whole();
        load.phase("calm");
    }
    let report = load.finish(&runtime);
    println!("{}", report.table());
    report.assert_right();
    for host in 0..3 {
        assert!(ctl.ok(&format!("cat /large-{host}")).stdout == bytes(1_000_000, 2));
        for part in PARTS {
            let address = hosts.address(host, part);
            assert_eq!(get(address, "/healthz").status, 200, "{part} of {host}");
            assert_eq!(get(address, "/metrics").status, 200, "{part} of {host}");
        }
    }
    ctl.assert_clean();
    for host in 0..3 {
        hosts.stop_host(host);
    }
}

#[test]
fn a_host_with_empty_directories_comes_back_as_another_and_is_healed() {
    seed();
    let folder = scratch();
    let mut hosts = Hosts::start(folder.path(), HostsConfig::new(3));
    let ctl = hosts.ctl();
    let runtime = runtime();
    let load = load(&hosts, &runtime, "/load");
    goes_on(&load, "work");
    let before = REPLICATED.map(|part| hosts.store(1, part));
    hosts.kill_host(1);
    for part in REPLICATED {
        fs::remove_dir_all(hosts.data(1, part)).unwrap();
    }
    goes_on(&load, "work without host-2");
    hosts.launch_host(1);
    hosts.wait_until_whole();
    for (part, before) in REPLICATED.iter().zip(before) {
        assert_ne!(hosts.store(1, part), before, "{part}: the old voter is never taken up again");
    }
    // It carries its share: any other may go now.
    for host in [0, 2] {
        hosts.kill_host(host);
        goes_on(&load, &format!("work without {}", hosts.name(host)));
        hosts.launch_host(host);
        hosts.wait_until_whole();
    }
    load.finish(&runtime).assert_right();
    ctl.assert_clean();
}

/// Flips a bit in the middle of what is written in the largest file of a log.
fn damage(log: &Path) {
    let files = files_below(log).into_iter();
    let (path, contents) = files
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .max_by_key(|(_, contents)| contents.iter().rposition(|&byte| byte != 0))
        .expect("a log");
    let end = contents.iter().rposition(|&byte| byte != 0).unwrap();
    assert!(end > 10_000, "{}: hardly a log: {end} bytes", path.display());
    let at = (end / 2..end).find(|&at| contents[at] != 0).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[contents[at] ^ 0x10], at as u64).unwrap();
}

#[test]
fn a_damaged_log_is_put_aside_and_healed() {
    seed();
    let folder = scratch();
    let mut hosts = Hosts::start(folder.path(), HostsConfig::new(3));
    let ctl = hosts.ctl();
    let runtime = runtime();
    let load = load(&hosts, &runtime, "/load");
    for part in ["shard", "crossdir", "shuckle"] {
        goes_on(&load, "work");
        let before = hosts.store(2, part);
        hosts.kill_host(2);
        damage(&hosts.data(2, part).join("log"));
        hosts.launch_host(2);
        hosts.wait_until_whole();
        let aside = hosts.data(2, part).join(format!("damaged-{before}"));
        assert!(aside.is_dir(), "{part}: {} is missing", aside.display());
        assert_ne!(hosts.store(2, part), before, "{part}");
    }
    for host in [0, 1] {
        hosts.kill_host(host);
        goes_on(&load, &format!("work without {}", hosts.name(host)));
        hosts.launch_host(host);
        hosts.wait_until_whole();
    }
    load.finish(&runtime).assert_right();
    ctl.assert_clean();
}

/// A daemon that must not run with this.
fn refused(hosts: &Hosts, name: &str, host: &str, data: &Path, more: &[&str], words: &[&str]) -> Outcome {
    let mut command = program(name);
    command.args(["--log", "off", "--listen", "127.0.0.1:0", "--host", host, "--data"]).arg(data);
    command.arg("--secret-file").arg(hosts.secret()).args(more);
    run(&mut command, b"", TOO_LONG).refused(words)
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp").success());
}

#[test]
fn copies_doubles_and_strangers_are_refused() {
    let folder = scratch();
    let mut hosts = Hosts::start(&folder.path().join("ours"), HostsConfig::new(3));
    let ctl = hosts.ctl();
    ctl.ok("mkdir -p /a/b");
    let shuckles = hosts.shuckles().join(",");
    let peers = ["--peers", &shuckles, "--replicas", "3"];
    let cluster = ["--shuckle", shuckles.as_str()];
    let id = ctl.ok("status --json").json()["cluster_id"].as_str().unwrap().to_owned();
    // A second copy of a data directory, while the first serves.
    for part in ["shard", "crossdir"] {
        hosts.process(2, part).signal(rustix::process::Signal::TERM);
        hosts.process(2, part).wait(TOO_LONG);
        let twin = folder.path().join(format!("twin-{part}"));
        copy(&hosts.data(2, part), &twin);
        hosts.launch(2, part);
        hosts.wait_until_whole();
        let address = hosts.address(2, part).to_string();
        refused(&hosts, &format!("eggs-{part}"), "host-3", &twin, &cluster, &[&address]);
        // Another host's name makes it no other store.
        refused(&hosts, &format!("eggs-{part}"), "host-9", &twin, &cluster, &[&address]);
    }
    // A second store on a host that has one.
    let empty = folder.path().join("empty");
    refused(&hosts, "eggs-shard", "host-1", &empty, &cluster, &["host-1"]);
    // A host of another cluster.
    let theirs = Hosts::start(&folder.path().join("theirs"), HostsConfig::new(1));
    let their_id = theirs.ctl().ok("status --json").json()["cluster_id"].as_str().unwrap().to_owned();
    drop(theirs);
    let data = |part: &str| folder.path().join("theirs/host-1").join(part);
    for part in ["shard", "crossdir"] {
        let words = ["cluster", id.as_str(), their_id.as_str()];
        refused(&hosts, &format!("eggs-{part}"), "host-4", &data(part), &cluster, &words);
    }
    refused(&hosts, "eggs-shuckle", "host-4", &data("shuckle"), &peers, &["cluster"]);
    // All is as before.
    hosts.wait_until_whole();
    ctl.ok("mkdir -p /a/b/c");
    ctl.assert_clean();
}

#[test]
fn without_a_majority_requests_fail_in_time_and_say_why() {
    let folder = scratch();
    let mut hosts = Hosts::start(folder.path(), HostsConfig::new(3));
    let ctl = hosts.ctl();
    ctl.ok("mkdir -p /a/b");
    ctl.run_with(["put", "-", "/a/f"], b"contents").ok();
    // One who knows the cluster, and one who comes to it now.
    let runtime = runtime();
    let timeout = Duration::from_secs(3);
    let options = Options { shuckle: hosts.shuckles(), timeout, ..Options::default() };
    let client = runtime.block_on(Client::connect(options)).unwrap();
    hosts.kill_host(1);
    hosts.kill_host(2);
    for what in ["stat", "put", "ls"] {
        let begun = Instant::now();
        let failed = runtime.block_on(async {
            match what {
                "stat" => client.stat("/a").await.map(drop),
                "put" => client.put_bytes("/a/new", "new".into(), &CreateOptions::default()).await.map(drop),
                _ => client.list("/a", ListOptions::default()).await?.all().await.map(drop),
            }
        });
        let words = failed.unwrap_err().to_string();
        println!("{what}: {words}");
        for word in ["shard", "host-2", "host-3"] {
            assert!(words.contains(word), "{what}: no '{word}' in: {words}");
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{what}: {:?}", begun.elapsed());
    }
    for words in ["mkdir --timeout 3s /a/c", "ls --timeout 3s /a", "mv --timeout 3s /a/f /a/g"] {
        let begun = Instant::now();
        let outcome = ctl.run(words.split_whitespace()).code(3);
        println!("{words}: {}", outcome.stderr);
        outcome.says(&["host-2", "host-3"]);
        assert!(begun.elapsed() < Duration::from_secs(10), "{words}: {:?}", begun.elapsed());
    }
    hosts.launch_host(1);
    let made = ctl.run(["mkdir", "--timeout", "30s", "/a/c"]);
    // What failed may have happened.
    assert!(made.code == Some(0) || made.stderr.contains("file exists"), "{made:?}");
    assert!(ctl.names("/a").contains(&"c".to_owned()));
    hosts.launch_host(2);
    hosts.wait_until_whole();
    ctl.assert_clean();
}

const SESSION: u64 = 0x5e55_1075;

fn header(cluster: &[u8], sequence: u64) -> Option<pb::RequestHeader> {
    Some(pb::RequestHeader {
        version: PROTOCOL_VERSION,
        cluster_id: cluster.to_vec().into(),
        session: SESSION,
        sequence,
        ..pb::RequestHeader::default()
    })
}

/// Asks one daemon; `None` when it is not there.
fn call<R: Message + Default>(address: std::net::SocketAddr, path: &str, request: &[u8]) -> Option<R> {
    std::net::TcpStream::connect(address).ok()?;
    let mut connection = Connection::open(address);
    let stream = connection.post(path, &grpc_message(request))?;
    let answer = connection.answer(stream, Duration::from_secs(15))?;
    R::decode(answer_bytes(&answer)?).ok()
}

/// A rename's answer by whoever leads, and who that is.
fn rename(
    hosts: &Hosts,
    cluster: &[u8],
    sequence: u64,
    from: &str,
    to: &str,
) -> (usize, pb::write_result::Result) {
    let rename = pb::Rename {
        directory: InodeId::ROOT.0,
        old_name: from.to_owned().into(),
        new_name: to.to_owned().into(),
        ..pb::Rename::default()
    };
    let ops = vec![pb::WriteOp { op: Some(pb::write_op::Op::Rename(rename)) }];
    let op = Some(pb::shard_request::Op::Write(pb::Write { ops }));
    let shard = InodeId::ROOT.shard().0.into();
    let request = pb::ShardRequest { header: header(cluster, sequence), shard, op }.encode_to_vec();
    leader(hosts, "shard", |address| {
        let reply: pb::ShardReply = call(address, "/eggs.v1.ShardService/Call", &request)?;
        match reply.result? {
            pb::shard_reply::Result::Error(error) => {
                let again = [ShardError::NotLeader, ShardError::Busy].map(ShardError::code);
                assert!(again.contains(&error.code), "{error:?}");
                None
            }
            pb::shard_reply::Result::Write(reply) => reply.results.into_iter().next()?.result,
            other => panic!("{other:?}"),
        }
    })
}

/// A move between directories, as [`rename`].
fn move_(hosts: &Hosts, cluster: &[u8], sequence: u64, op: &pb::Move) -> (usize, pb::crossdir_reply::Result) {
    let op = Some(pb::crossdir_request::Op::Move(op.clone()));
    let request = pb::CrossdirRequest { header: header(cluster, sequence), op }.encode_to_vec();
    leader(hosts, "crossdir", |address| {
        let reply: pb::CrossdirReply = call(address, "/eggs.v1.CrossdirService/Call", &request)?;
        let again = [CrossdirError::NotLeader, CrossdirError::Busy, CrossdirError::InProgress];
        match reply.result? {
            pb::crossdir_reply::Result::Error(error)
                if again.map(CrossdirError::code).contains(&error.code) =>
            {
                None
            }
            result => Some(result),
        }
    })
}

fn leader<T>(
    hosts: &Hosts,
    part: &'static str,
    ask: impl Fn(std::net::SocketAddr) -> Option<T>,
) -> (usize, T) {
    until("an answer of the leader", TOO_LONG, || {
        let mut alive = (0..hosts.count()).filter(|&host| hosts.is_running(host, part));
        alive.find_map(|host| Some((host, ask(hosts.address(host, part))?)))
    })
}

#[test]
fn a_repeated_call_has_its_first_answer_from_the_next_leader() {
    let folder = scratch();
    let mut hosts = Hosts::start(folder.path(), HostsConfig::new(3));
    let ctl = hosts.ctl();
    let cluster = runtime().block_on(async { hosts.client().await.cluster_id().0.to_vec() });
    ctl.ok("mkdir -p /to");
    for sequence in 1..=3 {
        ctl.run_with(["put", "-", "/a"], b"moved").ok();
        let (host, first) = rename(&hosts, &cluster, sequence, "a", "b");
        assert!(matches!(first, pb::write_result::Result::Link(_)), "{first:?}");
        // Somebody else takes the name meanwhile; the repeated call must not move that.
        ctl.run_with(["put", "-", "/a"], b"another").ok();
        hosts.kill_host(host);
        let (next, again) = rename(&hosts, &cluster, sequence, "a", "b");
        assert_ne!(host, next);
        assert_eq!(again, first);
        assert_eq!((ctl.ok("cat /a").text(), ctl.ok("cat /b").text()), ("another".into(), "moved".into()));
        hosts.launch_host(host);
        hosts.wait_until_whole();
        ctl.ok("rm /a /b");
    }
    let inode = |path: &str| {
        let text = ctl.ok(&format!("stat --json {path}")).json()["inode"].as_str().unwrap().to_owned();
        u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
    };
    for sequence in 4..=6 {
        ctl.run_with(["put", "-", "/a"], b"moved").ok();
        let op = pb::Move {
            old_directory: InodeId::ROOT.0,
            old_name: "a".into(),
            target: inode("/a"),
            new_directory: inode("/to"),
            new_name: "b".into(),
            ..pb::Move::default()
        };
        let (host, first) = move_(&hosts, &cluster, sequence, &op);
        assert!(matches!(first, pb::crossdir_reply::Result::Move(_)), "{first:?}");
        hosts.kill_host(host);
        let (next, again) = move_(&hosts, &cluster, sequence, &op);
        assert_ne!(host, next);
        assert_eq!(again, first);
        assert_eq!(ctl.ok("cat /to/b").text(), "moved");
        hosts.launch_host(host);
        hosts.wait_until_whole();
        ctl.ok("rm /to/b");
    }
    ctl.assert_clean();
}

/// The hosts of a shard's voters, and of its leader.
fn placed(hosts: &Hosts, shard: u32) -> (Vec<String>, String) {
    let map = runtime().block_on(async { hosts.client().await.cluster_map().await.unwrap() });
    let host = |store: u64| {
        let found = map.stores.iter().find(|info| info.id == store);
        found.map(|info| info.host.clone()).unwrap_or_default()
    };
    let group = map.groups.iter().find(|place| place.group == shard).expect("a group");
    let mut voters: Vec<String> = group.voters.iter().map(|&store| host(store)).collect();
    voters.sort();
    (voters, host(group.leader))
}

/// Until the shard is so.
fn wait_for(hosts: &Hosts, shard: u32, what: &str, right: impl Fn(&[String], &str) -> bool) {
    until(what, TOO_LONG, || {
        let (voters, leader) = placed(hosts, shard);
        right(&voters, &leader).then_some(())
    });
}

#[test]
fn shards_are_moved_by_hand_and_a_host_is_drained() {
    seed();
    let folder = scratch();
    let config = HostsConfig { replicas: 3, ..HostsConfig::new(4) };
    let mut hosts = Hosts::start(folder.path(), config);
    let ctl = hosts.ctl();
    let runtime = runtime();
    let load = load(&hosts, &runtime, "/load");
    let all: Vec<String> = (0..4).map(|host| hosts.name(host)).collect();
    // Leaders still go to where they are to be.
    wait_for(&hosts, 7, "a leader", |voters, leader| voters.len() == 3 && !leader.is_empty());
    let (voters, leader) = placed(&hosts, 7);
    let outside = all.iter().find(|name| !voters.contains(name)).unwrap().clone();
    let follower = voters.iter().find(|name| **name != leader).unwrap().clone();

    let text = ctl.ok("shard replicas 7").text();
    for voter in &voters {
        assert!(text.contains(voter), "{text}");
    }
    ctl.ok("shard replicas --json 7").json();
    // They say on standard error how far they are.
    let change = |words: &str| ctl.run(words.split_whitespace()).code(0);
    change(&format!("shard transfer-leader 7 {follower}"));
    wait_for(&hosts, 7, "another leader", |_, leader| leader == follower);
    change(&format!("shard move-replica 7 {leader} {outside}"));
    wait_for(&hosts, 7, "a moved replica", |voters, _| {
        voters.contains(&outside) && !voters.contains(&leader) && voters.len() == 3
    });
    change(&format!("shard add-replica 7 {leader}"));
    wait_for(&hosts, 7, "four replicas", |voters, _| voters.len() == 4);
    change(&format!("shard remove-replica 7 {outside}"));
    wait_for(&hosts, 7, "three replicas", |voters, _| voters.len() == 3 && !voters.contains(&outside));
    // Fewer than the cluster is to have: only by force.
    ctl.refused(&format!("shard remove-replica 7 {leader}"), &["7", "--force"]);
    // … and so it stays, until somebody gives it another.
    change(&format!("shard remove-replica --force 7 {leader}"));
    wait_for(&hosts, 7, "two replicas", |voters, _| voters.len() == 2);
    change(&format!("shard add-replica 7 {leader}"));
    wait_for(&hosts, 7, "three replicas", |voters, _| voters.len() == 3);
    ctl.refused("shard transfer-leader 7 nowhere", &["nowhere"]);
    ctl.refused("drain nowhere", &["nowhere"]);

    // Everything off one host, while work goes on; then it may go.
    change("drain host-2");
    goes_on(&load, "work after the drain");
    let map = runtime.block_on(async { hosts.client().await.cluster_map().await.unwrap() });
    let drained: Vec<u64> =
        map.stores.iter().filter(|store| store.host == "host-2").map(|store| store.id).collect();
    assert_eq!(drained.len(), 3, "{:?}", map.stores);
    for group in &map.groups {
        assert!(!group.voters.iter().any(|store| drained.contains(store)), "{group:?}");
        assert_eq!(group.voters.len(), 3, "{group:?}");
    }
    hosts.stop_host(1);
    goes_on(&load, "work without the drained host");
    hosts.launch_host(1);
    change("drain --undo host-2");
    hosts.wait_until_whole();
    load.finish(&runtime).assert_right();
    ctl.assert_clean();
}
