//! Bytes from people who mean no good, on every port: the daemon lives, and serves as before.

mod requests;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use eggs_proto::errors::{CrossdirError, RegistryError, ServiceError as _, ShardError};
use eggs_proto::limits::{MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
use eggs_proto::pb;
use eggs_tests::{
    Connection, Ctl, Daemons, Frame, Process, TOO_LONG, Up, answer_bytes, bytes, get, grpc_message, rng,
    runtime, scratch, seed, send_raw,
};
use prost::Message;
use rand::{Rng as _, RngCore as _};
use requests::Requests;

const PATIENCE: Duration = Duration::from_secs(10);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SHARD: &str = "/eggs.v1.ShardService/Call";
const CROSSDIR: &str = "/eggs.v1.CrossdirService/Call";
const REGISTRY: &str = "/eggs.v1.RegistryService/Call";
const BLOCKS: [&str; 4] = [
    "/eggs.v1.BlockService/Write",
    "/eggs.v1.BlockService/Fetch",
    "/eggs.v1.BlockService/Erase",
    "/eggs.v1.BlockService/Stats",
];
/// However much is announced or sent, a daemon does not hold it.
const MEMORY_MAX_KIB: u64 = 1 << 20;

/// What a port is for.
#[derive(Debug, Clone, Copy)]
struct Target {
    address: SocketAddr,
    process: u32,
}

fn target(address: SocketAddr, process: &Process) -> Target {
    Target { address, process: process.id() }
}

/// The process answers, and has not grown without bounds.
fn assert_lives(target: Target, after: &str) {
    assert_eq!(get(target.address, "/healthz").status, 200, "after {after}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", target.process)).expect("it lives");
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("peak of memory");
    let peak: u64 = peak.trim().trim_end_matches("kB").trim().parse().expect("KiB");
    assert!(peak < MEMORY_MAX_KIB, "{peak} KiB after {after}");
}

/// The cluster does all it should.
fn assert_serves(ctl: &Ctl, round: &str) {
    let path = |name: &str| format!("/{name}-{round}");
    ctl.ok(&format!("mkdir {}", path("served")));
    ctl.run_with(["put", "-", &path("large")], &bytes(1_000_000, 5)).ok();
    assert!(ctl.ok(&format!("cat {}", path("large"))).stdout == bytes(1_000_000, 5));
    ctl.ok(&format!("mv {0} {1}", path("large"), path("served")));
    assert_eq!(ctl.names(&path("served")), [format!("large-{round}")]);
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    Frame { kind, flags, stream, payload: payload.to_vec() }.bytes()
}

/// Bytes sent on connections of their own.
fn garbage() -> Vec<(String, Vec<u8>)> {
    let mut rng = rng("garbage");
    let mut random = |length: usize| {
        let mut bytes = vec![0; length];
        rng.fill_bytes(&mut bytes);
        bytes
    };
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |name: &str, bytes: Vec<u8>| all.push((name.to_owned(), bytes));
    for length in [0, 1, 9, 24, 1000, 100_000] {
        add(&format!("{length} random bytes"), random(length));
    }
    for length in [1, 3, 10, 23] {
        add(&format!("{length} bytes of the preface"), PREFACE[..length].to_vec());
    }
    add("the preface and silence", PREFACE.to_vec());
    add("the preface and random bytes", [PREFACE, &random(5000)].concat());
    add("a frame of 16 MiB announced", [PREFACE, &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]].concat());
    let settings = frame(4, 0, 0, &[]);
    let hello = [PREFACE, &settings].concat();
    let after = |bytes: Vec<u8>| [hello.clone(), bytes].concat();
    add("settings on a stream", [PREFACE, &frame(4, 0, 3, &[])].concat());
    add("settings of 7 bytes", [PREFACE, &frame(4, 0, 0, &[0; 7])].concat());
    add("a window too large", [PREFACE, &frame(4, 0, 0, &[0, 4, 0xff, 0xff, 0xff, 0xff])].concat());
    add("data on stream 0", after(frame(0, 0, 0, b"data")));
    add("data on no stream", after(frame(0, 0, 99, b"data")));
    add("headers that are none", after(frame(1, 5, 1, &random(200))));
    add("headers on an even stream", after(frame(1, 5, 2, &[0x82])));
    add("padding longer than the frame", after(frame(0, 8, 1, &[0xff, 1, 2])));
    add("windows that overflow", after(frame(8, 0, 0, &[0x7f, 0xff, 0xff, 0xff]).repeat(3)));
    add("a window of nothing", after(frame(8, 0, 0, &[0; 4])));
    add("pushed promises", after(frame(5, 4, 1, &[0, 0, 0, 2, 0x82])));
    add("unknown frames", after(frame(0x77, 0xff, 5, &random(100)).repeat(1000)));
    add("endless settings", after(settings.repeat(20_000)));
    add("endless pings", after(frame(6, 0, 0, &[7; 8]).repeat(20_000)));
    add(
        "endless continuations",
        after([frame(1, 0, 1, &[0x82]), frame(9, 0, 1, &[0; 1000]).repeat(2000)].concat()),
    );
    add("priority of itself", after(frame(2, 0, 1, &[0, 0, 0, 1, 0]).repeat(1000)));
    add("streams opened and reset", {
        let request = |n: u32| {
            [
                frame(1, 4, 1 + 2 * n, &[0x83, 0x86, 0x84, 0x41, 1, b'x']),
                frame(3, 0, 1 + 2 * n, &[0, 0, 0, 8]),
            ]
        };
        after((0..3000).flat_map(request).flatten().collect())
    });
    let lines = |text: &str| text.replace('\n', "\r\n").into_bytes();
    add("no method", lines(" / HTTP/1.1\n\n"));
    add("no version", lines("GET /\n\n"));
    add("a version to come", lines("GET / HTTP/9.9\n\n"));
    add("a long path", lines(&format!("GET /{} HTTP/1.1\nhost: x\n\n", "a".repeat(200_000))));
    add("a long header", lines(&format!("GET / HTTP/1.1\nhost: x\nx: {}\n\n", "a".repeat(200_000))));
    add("many headers", lines(&format!("GET / HTTP/1.1\n{}\n", "x: y\n".repeat(10_000))));
    add("a negative length", lines("POST / HTTP/1.1\nhost: x\ncontent-length: -1\n\n"));
    add("two lengths", lines("POST / HTTP/1.1\nhost: x\ncontent-length: 1\ncontent-length: 2\n\nab"));
    add("a length never sent", lines("POST / HTTP/1.1\nhost: x\ncontent-length: 99999999999\n\nab"));
    add(
        "chunks that are none",
        lines("POST / HTTP/1.1\nhost: x\ntransfer-encoding: chunked\n\nzz\nfffffffffffffffff\n"),
    );
    add(
        "odd paths",
        lines("GET /../../etc/passwd HTTP/1.1\nhost: x\n\nGET /%00%ff%2e%2e HTTP/1.1\nhost: x\n\n"),
    );
    add(
        "gRPC over HTTP/1",
        lines(&format!(
            "POST {SHARD} HTTP/1.1\nhost: x\ncontent-type: application/grpc\ncontent-length: 5\n\n\0\0\0\0\0"
        )),
    );
    add("TLS", [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &random(500)].concat());
    all
}

fn throw_garbage(target: Target) {
    let all = garbage();
    // Eight at a time.
    for some in all.chunks(8) {
        std::thread::scope(|scope| {
            for (_, bytes) in some {
                scope.spawn(move || send_raw(target.address, bytes, Duration::from_secs(3)));
            }
        });
        let names: Vec<&str> = some.iter().map(|(name, _)| name.as_str()).collect();
        assert_lives(target, &names.join(", "));
    }
}

/// Bodies of gRPC requests that are not what they say.
fn bodies(path: &str) -> Vec<(String, Vec<u8>)> {
    let mut rng = rng(path);
    let mut random = |length: usize| {
        let mut bytes = vec![0; length];
        rng.fill_bytes(&mut bytes);
        bytes
    };
    let good = pb::ShardRequest { header: Some(pb::RequestHeader::default()), ..Default::default() };
    let good = grpc_message(&good.encode_to_vec());
    let mut all: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |name: &str, bytes: Vec<u8>| all.push((name.to_owned(), bytes));
    add("no body", Vec::new());
    add("an empty message", grpc_message(&[]));
    add("half a prefix", vec![0, 0, 0]);
    add("4 GiB announced", vec![0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3]);
    add("2 GiB announced", vec![0, 0x7f, 0xff, 0xff, 0xff]);
    add("more announced than sent", vec![0, 0, 0, 1, 0, 1, 2, 3]);
    add("more sent than announced", [&good[..], b"more"].concat());
    add("compressed, says the flag", [&[1][..], &good[1..]].concat());
    add("a flag nobody knows", [&[0xff][..], &good[1..]].concat());
    add("two messages", good.repeat(2));
    add("a thousand messages", good.repeat(1000));
    add("a message too large", grpc_message(&vec![0; MESSAGE_BYTES_MAX + 1]));
    add("a field too large", grpc_message(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f, 1]));
    add("an endless number", grpc_message(&[0xff; 100]));
    add("field number 0", grpc_message(&[0x00, 0x00]));
    add("groups in groups", grpc_message(&[0x0b; 100_000]));
    add("messages in messages", {
        let mut nested = Vec::new();
        for _ in 0..2000 {
            let mut outer = vec![0x0a];
            prost::encoding::encode_varint(nested.len() as u64, &mut outer);
            outer.extend(&nested);
            nested = outer;
        }
        grpc_message(&nested)
    });
    for length in [1, 10, 100, 10_000, 1_000_000] {
        add(&format!("{length} random bytes"), grpc_message(&random(length)));
    }
    for length in 0..good.len() {
        add(&format!("{length} bytes of a good one"), good[..length].to_vec());
    }
    all
}

/// Each on a connection of its own where the last one broke it.
fn throw_bodies(target: Target, path: &str) {
    let mut connection = Connection::open(target.address);
    for (name, body) in bodies(path) {
        let started = std::time::Instant::now();
        let stream = connection.post(path, &body);
        let answered = stream.and_then(|stream| connection.answer(stream, PATIENCE));
        if answered.is_none() {
            connection = Connection::open(target.address);
        }
        if started.elapsed() > Duration::from_millis(500) {
            println!("{name} to {path}: {:?}, answered: {}", started.elapsed(), answered.is_some());
        }
        assert_lives(target, &format!("{name} to {path}"));
    }
    // A request that never ends, and one that is left alone.
    for cut in [true, false] {
        let mut connection = Connection::open(target.address);
        let stream = connection.begin(path).expect("a stream");
        connection.send(&frame(0, 0, stream, &[0, 0, 0]));
        if cut {
            connection.send(&frame(3, 0, stream, &[0, 0, 0, 8]));
        }
    }
    assert_lives(target, path);
}

/// Sends a request and reads its answer.
fn call<R: Message + Default>(connection: &mut Connection, path: &str, request: &impl Message) -> R {
    let stream = connection.post(path, &grpc_message(&request.encode_to_vec())).expect("sent");
    let answer = connection.answer(stream, TOO_LONG).expect("an answer");
    let message = answer_bytes(&answer).unwrap_or_else(|| panic!("{path}: no message in {answer:?}"));
    R::decode(message).expect("a reply")
}

/// What is known of the cluster under fire.
#[derive(Debug, Clone)]
struct Known {
    cluster: Vec<u8>,
    services: Vec<u64>,
}

fn known(ctl_address: SocketAddr) -> Known {
    runtime().block_on(async {
        let options = eggs_client::Options::new(ctl_address.to_string());
        let client = eggs_client::Client::connect(options).await.expect("connect");
        let map = client.cluster_map().await.expect("map");
        let services = map.block_services.iter().map(|service| service.id).collect();
        Known { cluster: client.cluster_id().0.to_vec(), services }
    })
}

/// Requests that make sense as messages: every one gets an answer, and the words of a refusal.
fn throw_requests(target: Target, paths: &[&str], known: &Known, count: usize) {
    let mut requests = Requests { rng: rng(&format!("requests {paths:?}")), cluster: known.cluster.clone() };
    let mut connection = Connection::open(target.address);
    for n in 0..count {
        let path = paths[n % paths.len()];
        let message = match path {
            SHARD => vec![requests.shard().encode_to_vec()],
            CROSSDIR => vec![requests.crossdir().encode_to_vec()],
            REGISTRY => vec![requests.registry().encode_to_vec()],
            path if path == BLOCKS[0] => {
                requests.block_write(&known.services).iter().map(Message::encode_to_vec).collect()
            }
            path if path == BLOCKS[1] => vec![requests.block_fetch(&known.services).encode_to_vec()],
            path if path == BLOCKS[2] => vec![requests.block_erase(&known.services).encode_to_vec()],
            _ => vec![pb::BlockStatsRequest { header: requests.header() }.encode_to_vec()],
        };
        let body: Vec<u8> = message.iter().flat_map(|message| grpc_message(message)).collect();
        let answer = connection.post(path, &body).and_then(|stream| connection.answer(stream, TOO_LONG));
        // A stream may be reset when the answer came before its end, or it is too much by far.
        let too_large = body.len() > MESSAGE_BYTES_MAX;
        if answer.is_none() {
            connection = Connection::open(target.address);
        }
        let message = answer.as_deref().and_then(answer_bytes);
        let what = format!("request {n} of {} bytes to {path}", body.len());
        match path {
            SHARD | CROSSDIR | REGISTRY => assert!(message.is_some() || too_large, "{what}: {answer:?}"),
            path => assert!(answer.is_some() || path == BLOCKS[0], "{what}: no answer"),
        }
    }
    assert_lives(target, &format!("{count} requests to {paths:?}"));
}

/// Streams as between stores: without the secret every one is ended, most with a reason.
fn throw_streams(target: Target, known: &Known, count: usize) {
    let mut requests = Requests { rng: rng("streams"), cluster: known.cluster.clone() };
    let mut farewells = 0;
    for n in 0..count {
        let mut stream = TcpStream::connect(target.address).expect("connect");
        stream.set_read_timeout(Some(TOO_LONG)).expect("timeout");
        // It may be ended before it is all sent.
        let _ = stream.write_all(&requests.peer());
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("stream {n}: {error}"),
            _ => farewells += usize::from(!answer.is_empty()),
        }
    }
    assert!(farewells > count / 4, "{farewells} farewells to {count} streams");
    assert_lives(target, &format!("{count} streams"));
}

/// Requests that are wrong in one way get the answer for that.
fn wrong_in_one_way(shard: SocketAddr, crossdir: SocketAddr, registry: SocketAddr, known: &Known) {
    let header = pb::RequestHeader {
        version: PROTOCOL_VERSION,
        cluster_id: known.cluster.clone().into(),
        ..pb::RequestHeader::default()
    };
    let headers = [
        ("no header", None),
        ("another version", Some(pb::RequestHeader { version: 999, ..header.clone() })),
        ("another cluster", Some(pb::RequestHeader { cluster_id: vec![7; 16].into(), ..header.clone() })),
        ("half a cluster id", Some(pb::RequestHeader { cluster_id: vec![7; 8].into(), ..header.clone() })),
        ("a clock ahead", Some(pb::RequestHeader { time: u64::MAX, ..header.clone() })),
    ];
    let shard_codes = [
        ShardError::Malformed,
        ShardError::UnsupportedVersion,
        ShardError::WrongCluster,
        ShardError::WrongCluster,
        ShardError::ClockAhead,
    ];
    let crossdir_codes = [
        CrossdirError::Malformed,
        CrossdirError::UnsupportedVersion,
        CrossdirError::WrongCluster,
        CrossdirError::WrongCluster,
        CrossdirError::ClockAhead,
    ];
    let mut shards = Connection::open(shard);
    let mut coordinator = Connection::open(crossdir);
    let stat = |shard, header: Option<pb::RequestHeader>| pb::ShardRequest {
        header,
        shard,
        op: Some(pb::shard_request::Op::Stat(pb::Stat { inode: eggs_proto::InodeId::ROOT.0 })),
    };
    let mut refused_by_shard = |request: pb::ShardRequest, code: ShardError, why: &str| {
        let reply: pb::ShardReply = call(&mut shards, SHARD, &request);
        let Some(pb::shard_reply::Result::Error(error)) = reply.result else { panic!("{why}: {reply:?}") };
        assert_eq!(ShardError::from_code(error.code), Some(code), "{why}: {error:?}");
        assert!(!error.message.is_empty());
    };
    for ((why, header), code) in headers.iter().zip(shard_codes) {
        refused_by_shard(stat(1, header.clone()), code, why);
    }
    for number in [256, 257, u32::MAX] {
        refused_by_shard(stat(number, Some(header.clone())), ShardError::Malformed, "no such shard");
    }
    let nothing = pb::ShardRequest { header: Some(header.clone()), shard: 1, op: None };
    refused_by_shard(nothing, ShardError::Malformed, "no operation");
    for ((why, header), code) in headers.iter().zip(crossdir_codes) {
        let op = pb::crossdir_request::Op::ListTransactions(pb::ListTransactions {});
        let request = pb::CrossdirRequest { header: header.clone(), op: Some(op) };
        let reply: pb::CrossdirReply = call(&mut coordinator, CROSSDIR, &request);
        let Some(pb::crossdir_reply::Result::Error(error)) = reply.result else { panic!("{why}: {reply:?}") };
        assert_eq!(CrossdirError::from_code(error.code), Some(code), "{why}: {error:?}");
    }
    // What needs the secret, without and with a wrong one.
    let mut registry = Connection::open(registry);
    for secret in [&b""[..], &[1; 32], &[0; 4096]] {
        for op in needs_secret() {
            let header = pb::RequestHeader { secret: secret.to_vec().into(), ..header.clone() };
            let request = pb::RegistryRequest { header: Some(header), op: Some(op) };
            let reply: pb::RegistryReply = call(&mut registry, REGISTRY, &request);
            let Some(pb::registry_reply::Result::Error(error)) = reply.result else { panic!("{reply:?}") };
            assert_eq!(RegistryError::from_code(error.code), Some(RegistryError::Unauthorized), "{error:?}");
        }
    }
    // Nobody is told the disks' keys without it.
    let op = pb::registry_request::Op::Map(pb::ClusterMap { with_keys: true, known_version: 0 });
    let request = pb::RegistryRequest { header: Some(header), op: Some(op) };
    let reply: pb::RegistryReply = call(&mut registry, REGISTRY, &request);
    if let Some(pb::registry_reply::Result::Map(map)) = reply.result {
        assert!(map.block_services.iter().all(|service| service.key.is_empty()));
    }
}

/// What only daemons, and those who have their secret, may ask for.
fn needs_secret() -> Vec<pb::registry_request::Op> {
    use pb::registry_request::Op;
    let kind = pb::StoreKind::StoreShard.into();
    let address = "thief:1".to_owned();
    let host = "thief".to_owned();
    vec![
        Op::RegisterStore(pb::RegisterStore { id: 1, kind, host, address, ..pb::RegisterStore::default() }),
        Op::SetReplicas(pb::SetReplicas { group: 1, wanted: vec![1], ..pb::SetReplicas::default() }),
        Op::DrainHost(pb::DrainHost { host: "host-a".to_owned(), undo: false }),
    ]
}

/// Connections that say nothing, or half of something, and stay.
fn idlers(address: SocketAddr) -> Vec<TcpStream> {
    let mut rng = rng("idlers");
    let mut open = Vec::new();
    for _ in 0..200 {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE).expect("connect");
        let half = rng.random_range(0..PREFACE.len());
        stream.write_all(&PREFACE[..half]).expect("send");
        open.push(stream);
    }
    open
}

#[test]
fn on_the_port_of_a_cluster_in_one_process() {
    seed();
    let folder = scratch();
    let mut up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl();
    let target = target(up.address(), up.process());
    let known = known(up.address());
    let idle = idlers(target.address);
    throw_garbage(target);
    assert_serves(&ctl, "garbage");
    std::thread::scope(|scope| {
        for path in [SHARD, CROSSDIR, REGISTRY].iter().chain(&BLOCKS) {
            scope.spawn(move || throw_bodies(target, path));
        }
        scope.spawn(move || throw_bodies(target, "/eggs.v1.NoService/Call"));
    });
    assert_serves(&ctl, "bodies");
    wrong_in_one_way(target.address, target.address, target.address, &known);
    std::thread::scope(|scope| {
        let known = &known;
        scope.spawn(move || throw_requests(target, &[SHARD], known, 1500));
        scope.spawn(move || throw_requests(target, &[CROSSDIR], known, 400));
        scope.spawn(move || throw_requests(target, &[REGISTRY], known, 400));
        scope.spawn(move || throw_requests(target, &BLOCKS, known, 800));
        scope.spawn(move || throw_streams(target, known, 400));
    });
    assert_serves(&ctl, "requests");
    drop(idle);
    let report = ctl.assert_clean();
    println!("{report}");
    assert!(up.process().is_running());
    let data = up.data().to_owned();
    up.kill();
    // What they wrote is in the log now: it must read back.
    let up = Up::start(&data);
    up.ctl().assert_clean();
    assert_serves(&up.ctl(), "restart");
    up.stop();
}

#[test]
fn on_every_port_of_the_daemons() {
    seed();
    let folder = scratch();
    let mut daemons = Daemons::start(folder.path());
    let ctl = daemons.ctl();
    let known = known(daemons.shuckle());
    let mut targets = Vec::new();
    for name in Daemons::names() {
        let address = daemons.address(name);
        targets.push((name, target(address, daemons.process(name))));
    }
    std::thread::scope(|scope| {
        let known = &known;
        for (name, target) in &targets {
            scope.spawn(move || {
                throw_garbage(*target);
                let paths: &[&str] = match *name {
                    "shuckle" => &[REGISTRY],
                    "shard" => &[SHARD],
                    "crossdir" => &[CROSSDIR],
                    _ => &BLOCKS,
                };
                for path in paths {
                    throw_bodies(*target, path);
                }
                throw_requests(*target, paths, known, 300);
                if *name != "blockd" {
                    throw_streams(*target, known, 100);
                }
            });
        }
    });
    wrong_in_one_way(daemons.address("shard"), daemons.address("crossdir"), daemons.shuckle(), &known);
    for name in Daemons::names() {
        assert!(daemons.process(name).is_running(), "{name}");
    }
    daemons.wait_until_healthy();
    assert_serves(&ctl, "daemons");
    ctl.assert_clean();
}
