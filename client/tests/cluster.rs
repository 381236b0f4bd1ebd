//! The library against a whole cluster in this process.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_client::{
    AttributeChanges, Client, ClientError, CreateOptions, ListOptions, Options, Policies, PolicyKind,
    Refusal, Replace, SmallFile,
};
use eggs_embedded::{Cluster, Config, JanitorSettings};
use eggs_proto::Time;
use eggs_proto::pb::{SpanPolicy, SpanRule};
use tempfile::TempDir;

struct World {
    cluster: Cluster,
    client: Client,
    directory: TempDir,
}

fn config(data: &Path, port: u16) -> Config {
    let listen = ([127, 0, 0, 1], port).into();
    Config {
        data: data.to_owned(),
        listen,
        disks: None,
        replicas: None,
        read_lease: false,
        janitor: Some(JanitorSettings::default()),
    }
}

fn options(address: impl ToString) -> Options {
    Options { timeout: Duration::from_secs(10), ..Options::new(address.to_string()) }
}

impl World {
    async fn start() -> World {
        let directory = tempfile::tempdir().unwrap();
        let cluster = Cluster::start(config(&directory.path().join("cluster"), 0)).await.unwrap();
        let client = Client::connect(options(cluster.address())).await.unwrap();
        World { cluster, client, directory }
    }

    fn disks(&self) -> Vec<PathBuf> {
        let disks = self.directory.path().join("cluster/disks");
        let mut disks: Vec<PathBuf> =
            fs::read_dir(disks).unwrap().map(|entry| entry.unwrap().path()).collect();
        disks.sort();
        disks
    }

    async fn stop(self) {
        self.client.close().await;
        self.cluster.stop().await;
    }
}

fn bytes(size: usize, seed: u32) -> Bytes {
    (0..size as u32).map(|n| (n.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 11) as u8).collect()
}

fn kind<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Refusal {
    result.unwrap_err().refusal().unwrap()
}

/// Every file under a folder of this host.
fn files_under(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn names() {
    let world = World::start().await;
    let client = &world.client;
    let plain = CreateOptions::default();
    client.mkdir_all("/a/b/c").await.unwrap();
    client.mkdir_all("/a/b/c").await.unwrap();
    assert_eq!(kind(client.mkdir("/a", None).await), Refusal::Exists);
    assert_eq!(kind(client.mkdir("/", None).await), Refusal::Exists);
    assert_eq!(kind(client.mkdir("/x/y", None).await), Refusal::NotFound);
    client.put_bytes("/a/f", "one".into(), &plain).await.unwrap();
    let error = client.put_bytes("/a/f", "two".into(), &plain).await.unwrap_err();
    assert_eq!(error.to_string(), "file exists: /a/f");
    let replacing = CreateOptions { replace: Replace::File, ..CreateOptions::default() };
    assert!(client.put_bytes("/a/f", "two".into(), &replacing).await.unwrap().replaced.is_some());
    let error = client.stat("/a/f/g").await.unwrap_err();
    assert_eq!(error.to_string(), "not a directory: /a/f/g");
    assert_eq!(client.stat("/a/no").await.unwrap_err().to_string(), "no such file or directory: /a/no");
    assert_eq!(kind(client.mkdir_all("/a/f").await), Refusal::Exists);
    assert_eq!(kind(client.mkdir_all("/a/f/g").await), Refusal::NotDirectory);
    assert_eq!(kind(client.unlink("/a/b").await), Refusal::IsDirectory);
    assert_eq!(kind(client.rmdir("/a/f").await), Refusal::NotDirectory);
    assert_eq!(kind(client.rmdir("/a/b").await), Refusal::NotEmpty);
    assert_eq!(kind(client.rmdir("/").await), Refusal::IsRoot);
    assert_eq!(kind(client.open("/a/b").await), Refusal::IsDirectory);
    let long = format!("/a/{}", "x".repeat(256));
    assert_eq!(kind(client.put_bytes(&long, Bytes::new(), &plain).await), Refusal::NameTooLong);
    assert!(matches!(client.stat("a").await, Err(ClientError::Invalid(_))));

    // Moves: within a directory, across, of a directory, into itself.
    client.rename("/a/f", "/a/g", Replace::Refuse).await.unwrap();
    client.rename("/a/g", "/a/b/g", Replace::Refuse).await.unwrap();
    client.rename("/a/b/c", "/c", Replace::Refuse).await.unwrap();
    assert_eq!(kind(client.rename("/a", "/a/b/a", Replace::Refuse).await), Refusal::Loop);
    assert_eq!(kind(client.rename("/no", "/b", Replace::Refuse).await), Refusal::NotFound);
    client.put_bytes("/c/g", Bytes::new(), &plain).await.unwrap();
    let error = client.rename("/a/b/g", "/c/g", Replace::Refuse).await.unwrap_err();
    assert_eq!(error.to_string(), "file exists: /c/g");
    assert!(client.rename("/a/b/g", "/c/g", Replace::File).await.unwrap().is_some());
    assert_eq!(client.open("/c/g").await.unwrap().read_all(100).await.unwrap(), "two");

    // Links, followed on the way and when opened.
    client.symlink("/a/link", "../c", &plain).await.unwrap();
    client.symlink("/absolute", "/a/link/g", &plain).await.unwrap();
    client.symlink("/circle", "circle", &plain).await.unwrap();
    assert_eq!(client.read_link("/a/link").await.unwrap(), "../c");
    assert!(client.stat("/a/link").await.unwrap().is_symlink());
    assert_eq!(client.open("/absolute").await.unwrap().read_all(100).await.unwrap(), "two");
    assert_eq!(client.list("/a/link", ListOptions::default()).await.unwrap().all().await.unwrap().len(), 1);
    assert_eq!(kind(client.open("/circle").await), Refusal::TooDeep);
    let a = client.directory("/a").await.unwrap();
    assert!(a.directory("link").await.is_err(), "a relative link out of a directory handle has no way up");

    // The dead map, and the past.
    let before = client.now();
    client.unlink("/c/g").await.unwrap();
    assert_eq!(kind(client.open("/c/g").await), Refusal::NotFound);
    assert_eq!(client.open_at("/c/g", before).await.unwrap().read_all(100).await.unwrap(), "two");
    let dead = ListOptions { dead: true, attributes: true, ..ListOptions::default() };
    let dead = client.list("/c", dead).await.unwrap().all().await.unwrap();
    assert_eq!(dead.len(), 2, "the replaced one and the removed one");
    assert!(dead.iter().all(|entry| entry.owned && entry.died_at.is_some() && entry.metadata.is_some()));
    let since = ListOptions { dead: true, since: before, ..ListOptions::default() };
    assert_eq!(client.list("/c", since).await.unwrap().all().await.unwrap().len(), 1);
    client.rmdir("/c").await.unwrap();

    let report = client.fsck(|_| {}).await.unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    assert_eq!((report.shards_checked, report.directories, report.directories_reached), (256, 4, 3));
    assert_eq!(report.orphans, 0);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_never_takes_a_files_place() {
    let world = World::start().await;
    let client = &world.client;
    client.mkdir_all("/a").await.unwrap();
    client.put_bytes("/file", Bytes::new(), &CreateOptions::default()).await.unwrap();
    for directory in ["/b", "/a/b"] {
        client.mkdir(directory, None).await.unwrap();
        let error = client.rename(directory, "/file", Replace::File).await.unwrap_err();
        assert!(error.to_string().ends_with(": /file"), "{error}");
    }
    assert!(client.stat("/file").await.unwrap().is_file());
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_listings_attributes_and_policies() {
    let world = World::start().await;
    let client = &world.client;
    client.mkdir("/d", None).await.unwrap();
    let directory = client.directory("/d").await.unwrap();
    let mut files: Vec<SmallFile> = (0..1500)
        .map(|n| SmallFile {
            name: format!("{n:05}").into(),
            contents: bytes(n, n as u32),
            ..SmallFile::default()
        })
        .collect();
    files.push(SmallFile { name: "large".into(), contents: bytes(100_000, 1), ..SmallFile::default() });
    files.push(SmallFile { name: "00000".into(), ..SmallFile::default() });
    let answers = directory.put_many(files).await;
    // Of two with one name the first to come gets it.
    let refused: Vec<ClientError> = answers.into_iter().filter_map(Result::err).collect();
    assert_eq!(refused.iter().map(ClientError::refusal).collect::<Vec<_>>(), [Some(Refusal::Exists)]);
    assert_eq!(client.open("/d/large").await.unwrap().read_all(1 << 20).await.unwrap(), bytes(100_000, 1));
    directory.mkdir("sub", None).await.unwrap();
    let paged = ListOptions { page: 100, attributes: true, ..ListOptions::default() };
    let entries = directory.list(paged).all().await.unwrap();
    assert_eq!(entries.len(), 1502);
    assert!(entries.iter().all(|entry| entry.metadata.is_some()));
    assert!(entries.is_sorted_by(|a, b| a.name < b.name));
    let some = ListOptions { prefix: "0149".into(), ..ListOptions::default() };
    assert_eq!(directory.list(some).all().await.unwrap().len(), 10);
    let after = ListOptions { after: "01499".into(), ..ListOptions::default() };
    assert_eq!(directory.list(after).all().await.unwrap().len(), 2);
    assert_eq!(directory.open("01234").await.unwrap().read_all(1 << 20).await.unwrap(), bytes(1234, 1234));

    let changes = AttributeChanges {
        mode: Some(0o600),
        mtime: Some(Time(5)),
        set_xattrs: vec![("user.a".into(), "b".into())],
        ..AttributeChanges::default()
    };
    client.set_attributes("/d/00007", changes).await.unwrap();
    let metadata = client.stat("/d/00007").await.unwrap();
    assert_eq!((metadata.mode, metadata.mtime, metadata.xattrs.len()), (0o600, Time(5), 1));
    assert_eq!(client.stat_inode(metadata.inode).await.unwrap(), metadata);

    // Mirrored in small spans from here on.
    let rule = SpanRule { max_size: 10_000, data: 1, parity: 1 };
    let policies = Policies { span: Some(SpanPolicy { rules: vec![rule] }), ..Policies::default() };
    client.set_policy("/d", PolicyKind::PolicySpan, Some(policies.clone())).await.unwrap();
    let found = client.policies("/d/sub").await.unwrap();
    assert_eq!((found.own, found.effective.span), (Policies::default(), policies.span));
    let published =
        client.put_bytes("/d/sub/mirrored", bytes(25_000, 3), &CreateOptions::default()).await.unwrap();
    let spans = client.spans(published.inode).await.unwrap();
    assert_eq!(spans.iter().map(|span| span.size).collect::<Vec<_>>(), [10_000, 10_000, 5000]);
    assert!(spans.iter().all(|span| span.blocks.as_ref().unwrap().blocks.len() == 2));
    let reader = client.open("/d/sub/mirrored").await.unwrap();
    assert_eq!(reader.read_at(9_999, 10_002).await.unwrap(), bytes(25_000, 3).slice(9_999..20_001));
    client.set_policy("/d", PolicyKind::PolicySpan, None).await.unwrap();
    assert_eq!(client.policies("/d").await.unwrap().own, Policies::default());

    let names = (0..1500).map(|n| Bytes::from(format!("{n:05}"))).collect();
    assert!(directory.unlink_many(names).await.iter().all(Result::is_ok));
    assert_eq!(directory.list(ListOptions::default()).all().await.unwrap().len(), 2);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn contents_of_all_sizes() {
    let world = World::start().await;
    let client = &world.client;
    let folder = world.directory.path().join("local");
    fs::create_dir(&folder).unwrap();
    // Short spans, so that a few megabytes are many of them.
    let rules = [(4096, 0, 0), (65_536, 1, 2), (1 << 20, 4, 2)];
    let rules = rules.map(|(max_size, data, parity)| SpanRule { max_size, data, parity });
    let policies = Policies { span: Some(SpanPolicy { rules: rules.to_vec() }), ..Policies::default() };
    client.set_policy("/", PolicyKind::PolicySpan, Some(policies)).await.unwrap();
    for size in [0, 1, 4096, 4097, 65_536, 65_537, 1 << 20, (1 << 20) + 1, 5_000_000, 4 << 20] {
        let plain = bytes(size, size as u32);
        let (by_stream, by_file) = (format!("/s{size}"), format!("/f{size}"));
        let mut seen = 0;
        let options = CreateOptions::default();
        let published = client.put(&by_stream, &mut &plain[..], &options, &mut |n| seen = n).await.unwrap();
        assert_eq!(
            (published.size, published.crc, seen),
            (size as u64, crc32fast::hash(&plain), size as u64)
        );
        let local = folder.join("in");
        fs::write(&local, &plain).unwrap();
        client.put_file(&by_file, &local, &options, &mut |n| seen = n).await.unwrap();
        assert_eq!(seen, size as u64);
        for path in [&by_stream, &by_file] {
            let reader = client.open(path).await.unwrap();
            assert_eq!(reader.read_all(1 << 30).await.unwrap(), plain, "{path}");
            let mut out = Vec::new();
            assert_eq!(reader.copy_to(&mut out, &mut |_| {}).await.unwrap(), size as u64);
            assert_eq!(out, plain);
            let local = fs::File::create(folder.join("out")).unwrap();
            reader.copy_to_file(local, &mut |_| {}).await.unwrap();
            assert_eq!(fs::read(folder.join("out")).unwrap(), plain);
            for (at, length) in
                [(0, 1), (size / 2, 100), (size.saturating_sub(1), 10), (size, 5), (size / 3, size / 2)]
            {
                let end = (at + length).min(size);
                assert_eq!(reader.read_at(at as u64, length).await.unwrap(), plain.slice(at..end.max(at)));
            }
        }
    }
    client.copy("/s5000000", "/copy", &CreateOptions::default(), &mut |_| {}).await.unwrap();
    assert_eq!(
        client.open("/copy").await.unwrap().read_all(1 << 30).await.unwrap(),
        bytes(5_000_000, 5_000_000)
    );

    let zeros =
        client.put_bytes("/zeros", vec![0; 3_000_000].into(), &CreateOptions::default()).await.unwrap();
    assert!(client.spans(zeros.inode).await.unwrap().iter().all(|span| span.storage_class == 0));
    assert_eq!(client.open("/zeros").await.unwrap().read_all(1 << 30).await.unwrap(), vec![0; 3_000_000]);

    let test = client.create_test_file("/hello.txt").await.unwrap();
    assert_eq!(
        client.open("/hello.txt").await.unwrap().read_all(100).await.unwrap(),
        &b"hello, world\0\0\0\0\0\0\0\0\0\0"[..]
    );
    let classes: Vec<u32> =
        client.spans(test.inode).await.unwrap().iter().map(|span| span.storage_class).collect();
    assert_eq!(classes, [1, 3, 0]);

    // A dropped writer leaves nothing, not even a file in writing.
    let mut writer = client.create("/dropped", &CreateOptions::default()).await.unwrap();
    writer.write(&bytes(3_000_000, 1)).await.unwrap();
    drop(writer);
    client.close().await;
    assert_eq!(kind(client.stat("/dropped").await), Refusal::NotFound);
    let eden = client.eden_files(1).await.unwrap();
    assert!(eden.iter().all(|file| file.expired), "{eden:?}");
    let report = client.fsck(|_| {}).await.unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_and_corrupt_blocks() {
    let world = World::start().await;
    let client = &world.client;
    let plain = bytes(10_000_000, 9);
    client.put_bytes("/f", plain.clone(), &CreateOptions::default()).await.unwrap();
    client.put_bytes("/mirrored", plain.slice(..50_000), &CreateOptions::default()).await.unwrap();
    // Bits flip all over one disk, in each of its blocks; all of another is gone.
    let disks = world.disks();
    for path in files_under(&disks[0].join("segments")) {
        let mut contents = fs::read(&path).unwrap();
        contents.chunks_mut(16 << 10).for_each(|piece| piece[piece.len() / 2] ^= 1);
        // In place: the daemon has it open.
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(&contents, 0).unwrap();
    }
    fs::remove_dir_all(&disks[1]).unwrap();
    for _ in 0..3 {
        let reader = client.open("/f").await.unwrap();
        assert_eq!(reader.read_all(1 << 30).await.unwrap(), plain);
        assert_eq!(reader.read_at(1_234_567, 1_000_000).await.unwrap(), plain.slice(1_234_567..2_234_567));
        let reader = client.open("/mirrored").await.unwrap();
        assert_eq!(reader.read_all(1 << 30).await.unwrap(), plain.slice(..50_000));
    }
    // Two more whole disks: too many.
    client.close().await;
    let map = client.cluster_map().await.unwrap();
    let reported: u64 = map.block_services.iter().map(|service| service.reported_blocks).sum();
    let inode = client.resolve("/f").await.unwrap();
    let spans = client.spans(inode).await.unwrap();
    let holders: Vec<u64> =
        spans[0].blocks.as_ref().unwrap().blocks.iter().map(|block| block.block_service).collect();
    let hit = map.block_services.iter().filter(|service| {
        let path = Path::new(&service.path);
        holders[..4].contains(&service.id) && path.ends_with(disks[0].file_name().unwrap())
    });
    assert!(reported >= hit.count() as u64, "what readers found is reported");
    disks[2..6].iter().for_each(|disk| fs::remove_dir_all(disk).unwrap());
    // What is open stays readable until the daemon looks for its disks.
    let deadline = Instant::now() + Duration::from_secs(30);
    let error = loop {
        match client.open("/f").await.unwrap().read_all(1 << 30).await {
            Err(error) => break error,
            Ok(read) => assert!(read == plain && Instant::now() < deadline, "never lost"),
        }
    };
    assert!(matches!(&error, ClientError::DataLost { path, .. } if path == "/f"), "{error}");
    assert!(error.to_string().contains("blocks are needed"), "{error}");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn disks_that_die_while_writing_are_replaced() {
    let world = World::start().await;
    let client = &world.client;
    let rule = SpanRule { max_size: 1 << 20, data: 4, parity: 2 };
    let policies = Policies { span: Some(SpanPolicy { rules: vec![rule] }), ..Policies::default() };
    client.set_policy("/", PolicyKind::PolicySpan, Some(policies)).await.unwrap();
    let mut writer = client.create("/f", &CreateOptions::default()).await.unwrap();
    let plain = bytes(20 << 20, 4);
    for (n, piece) in plain.chunks(1 << 20).enumerate() {
        if n == 5 || n == 10 {
            fs::remove_dir_all(&world.disks()[0]).unwrap();
        }
        writer.write(piece).await.unwrap();
    }
    writer.finish().await.unwrap();
    assert!(client.open("/f").await.unwrap().read_all(1 << 30).await.unwrap() == plain);
    // Six disks are left, as many as a span needs; of five no file can be made.
    fs::remove_dir_all(&world.disks()[0]).unwrap();
    let error = client.put_bytes("/g", plain.slice(..1 << 20), &CreateOptions::default()).await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::NoSpace), "{error}");
    assert_eq!(kind(client.stat("/g").await), Refusal::NotFound);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_in_the_middle_is_only_a_pause() {
    let world = World::start().await;
    let World { cluster, client, directory } = world;
    let port = cluster.address().port();
    let data = directory.path().join("cluster");
    let mut writer = client.create("/f", &CreateOptions::default()).await.unwrap();
    let plain = bytes(70 << 20, 4);
    writer.write(&plain[..65 << 20]).await.unwrap();
    cluster.stop().await;
    let making = tokio::spawn({
        let client = client.clone();
        async move { client.mkdir("/made", None).await }
    });
    let cluster = Cluster::start(config(&data, port)).await.unwrap();
    making.await.unwrap().unwrap();
    writer.write(&plain[65 << 20..]).await.unwrap();
    writer.finish().await.unwrap();
    assert!(client.open("/f").await.unwrap().read_all(1 << 30).await.unwrap() == plain);
    client.close().await;
    cluster.stop().await;
}

/// Three hosts; each is stopped in turn while clients write. Nothing that was acknowledged is lost or done
/// twice, and nobody waits for longer than an election.
#[tokio::test(flavor = "multi_thread")]
async fn any_host_may_go() {
    let directory = tempfile::tempdir().unwrap();
    let config = Config { replicas: Some(3), ..config(&directory.path().join("cluster"), 0) };
    let mut cluster = Cluster::start(config).await.unwrap();
    let shuckle = cluster.addresses().iter().map(ToString::to_string).collect();
    let options = Options { shuckle, timeout: Duration::from_secs(20), ..Options::default() };
    let client = Client::connect(options).await.unwrap();
    client.mkdir_all("/a/b").await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (client, stop) = (client.clone(), stop.clone());
            tokio::spawn(async move {
                let (mut made, mut longest) = (0u32, Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    let (file, started) = (format!("/a/{writer}-{made}"), Instant::now());
                    client.put_bytes(&file, file.clone().into(), &CreateOptions::default()).await.unwrap();
                    client.rename(&file, format!("/a/b/{writer}-{made}"), Replace::Refuse).await.unwrap();
                    client.mkdir(&file, None).await.unwrap();
                    longest = longest.max(started.elapsed());
                    made += 1;
                }
                (made, longest)
            })
        })
        .collect();
    for host in 0..3 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        cluster.stop_host(host).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        cluster.start_host(host).await.unwrap();
        let settled = |map: &eggs_proto::pb::ClusterMapReply| {
            let alive =
                map.stores.iter().all(|store| store.alive) && map.groups.iter().all(|group| group.alive);
            alive.then_some(())
        };
        client.wait_for(Duration::from_secs(30), settled).await.unwrap().unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    for (writer, done) in writers.into_iter().enumerate() {
        let (made, longest) = done.await.unwrap();
        eprintln!("writer {writer}: {made} rounds, the longest {longest:?}");
        assert!(made > 10 && longest < Duration::from_secs(10), "{made}, {longest:?}");
        for n in 0..made {
            let contents =
                client.open(format!("/a/b/{writer}-{n}")).await.unwrap().read_all(100).await.unwrap();
            assert_eq!(contents, format!("/a/{writer}-{n}"));
            assert!(client.stat(format!("/a/{writer}-{n}")).await.unwrap().is_directory());
        }
    }
    let report = client.fsck(|_| {}).await.unwrap();
    assert!(report.findings.is_empty() && report.orphans == 0, "{:?}", report.findings);
    client.close().await;
    cluster.stop().await;
}

#[tokio::test]
async fn nobody_there() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let options = Options { timeout: Duration::from_millis(300), ..options(address) };
    let error = Client::connect(options).await.unwrap_err();
    assert!(error.is_unreachable(), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    assert!(error.to_string().to_lowercase().contains("refused"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_small_files_in_and_out() {
    let world = World::start().await;
    let client = &world.client;
    client.mkdir_all("/many/below").await.unwrap();
    let directory = client.directory("/many").await.unwrap();
    // Inline, mirrored, erasure-coded, zeros, and one that goes alone.
    let sizes = [0, 1, 1000, 4096, 4097, 65_536, 65_537, 300_000, 1 << 20, (1 << 20) + 1];
    let contents = |n: usize| match n % 7 {
        6 => Bytes::from(vec![0; 10_000]),
        _ => bytes(sizes[n % sizes.len()], n as u32),
    };
    let file = |n: usize| SmallFile {
        name: format!("f{n:03}").into(),
        contents: contents(n),
        ..SmallFile::default()
    };
    let mut files: Vec<SmallFile> = (0..120).map(file).collect();
    files.push(SmallFile { name: "a/b".into(), contents: bytes(70_000, 1), ..SmallFile::default() });
    files.push(file(5));
    let published = directory.put_many(files).await;
    for (n, published) in published[..120].iter().enumerate().filter(|(n, _)| *n != 5) {
        let published = published.as_ref().unwrap_or_else(|error| panic!("{n}: {error}"));
        assert_eq!(published.size, contents(n).len() as u64, "{n}");
        assert_eq!(published.crc, crc32fast::hash(&contents(n)), "{n}");
    }
    assert_eq!(published[120].as_ref().unwrap_err().refusal(), Some(Refusal::InvalidName));
    let twice = [&published[5], &published[121]];
    assert_eq!(twice.iter().filter(|published| published.is_ok()).count(), 1, "{twice:?}");
    let refused = twice.iter().find_map(|published| published.as_ref().err());
    assert_eq!(refused.unwrap().refusal(), Some(Refusal::Exists));

    let paths: Vec<String> = (0..120).rev().map(|n| format!("/many/f{n:03}")).collect();
    let check = async |what: &str| {
        let mut reader = client.read_paths(&paths).await;
        for n in (0..120).rev() {
            let read = reader.next().await.unwrap().unwrap_or_else(|error| panic!("{what} {n}: {error}"));
            match read.contents {
                Some(found) => assert_eq!(found, contents(n), "{what} {n}"),
                None => assert!(contents(n).len() > 1 << 20, "{what} {n}"),
            }
        }
        assert!(reader.next().await.is_none());
    };
    check("all there").await;
    let verified = client.verify(published[7].as_ref().unwrap().inode, true, &mut |_| {}).await.unwrap();
    assert!(verified.findings.is_empty() && verified.blocks == 6, "{verified:?}");
    fs::remove_dir_all(&world.disks()[3]).unwrap();
    check("without a disk").await;
    let again = SmallFile { replace: Replace::File, ..file(8) };
    assert!(directory.put_many(vec![again]).await[0].is_ok(), "placed elsewhere");

    client.symlink("/many/below/link", "/many/f001", &CreateOptions::default()).await.unwrap();
    let mut mixed = client.read_paths(&["/many/below/link", "/many/none", "/many", "/many/f002"]).await;
    assert_eq!(mixed.next().await.unwrap().unwrap().contents.unwrap(), contents(1));
    assert_eq!(kind(mixed.next().await.unwrap()), Refusal::NotFound);
    assert_eq!(kind(mixed.next().await.unwrap()), Refusal::IsDirectory);
    assert_eq!(mixed.next().await.unwrap().unwrap().contents.unwrap(), contents(2));
    assert!(mixed.next().await.is_none());
    // Nobody's file is left in writing.
    client.close().await;
    for shard in 0..=255 {
        assert!(client.eden_files(shard).await.unwrap().iter().all(|file| file.expired), "shard {shard}");
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_in_order_are_read_ahead_for_and_get_the_right_bytes() {
    let world = World::start().await;
    let contents = bytes(9_000_000, 7);
    world.client.put_bytes("/f", contents.clone(), &CreateOptions::default()).await.unwrap();
    let file = world.client.open("/f").await.unwrap();
    let mut at = 0;
    while at < contents.len() {
        // Pieces of all lengths; now and then somebody looks elsewhere.
        let length = 1 + at % 70_000;
        let piece = file.read_at(at as u64, length).await.unwrap();
        assert_eq!(piece, contents.slice(at..(at + length).min(contents.len())), "{at}");
        at += length;
        if at % 11 == 0 {
            assert_eq!(file.read_at(123, 9).await.unwrap(), contents.slice(123..132));
        }
        // A read that is given up half-way takes nothing from the next one.
        if at % 5 == 0 {
            let _ = tokio::time::timeout(Duration::from_micros(1), file.read_at(at as u64, 100_000)).await;
        }
    }
    world.stop().await;
}
