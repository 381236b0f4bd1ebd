//! The registry over its real port: founding, registrations, map, flags, restart.

mod common;

use common::{SECRET, Shuckle, config, disk, disks, eventually, listener, refused, register, store};
use eggs_daemon::registry::Registry;
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::StoreKind::{StoreCrossdir, StoreShard};
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{ClusterId, RegistryError, ServiceError, flags, pb};
use eggs_shuckle::{Config, SecretSource, Service};

fn shards(leads: std::ops::Range<u32>) -> Op {
    store(11, StoreShard, "host", leads)
}

fn crossdir() -> Op {
    store(21, StoreCrossdir, "host", 256..257)
}

/// Registers a host with everything, as far as it leads its shards.
async fn host(registry: &Registry, leads: std::ops::Range<u32>) {
    register(registry, shards(0..0)).await;
    register(registry, store(21, StoreCrossdir, "host", 0..0)).await;
    eventually("all groups are founded", async || {
        registry.map(false).await.unwrap().groups.iter().filter(|place| place.wanted.len() == 1).count()
            == 258
    })
    .await;
    // Twice: what is new of a store, and of its groups, is logged one after the other.
    for _ in 0..2 {
        register(registry, shards(leads.clone())).await;
        register(registry, crossdir()).await;
    }
}

fn place(map: &pb::ClusterMapReply, group: u32) -> &pb::GroupPlace {
    map.groups.iter().find(|place| place.group == group).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_founded_registered_and_found_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("shuckle");
    let shuckle = Shuckle::start(&path).await;
    let registry = shuckle.join(Some(SECRET)).await;
    let cluster = registry.cluster();
    assert_eq!((shuckle.service.cluster(), registry.replicas()), (Some(cluster), 1));

    host(&registry, 0..256).await;
    let lost = pb::BlockServiceReport { problem: "gone".to_owned(), ..disk(3, 3) };
    register(&registry, disks(vec![disk(1, 1), disk(2, 2), disk(3, 3)])).await;
    register(&registry, disks(vec![disk(1, 1), disk(2, 2), lost])).await;

    let map = registry.map(false).await.unwrap();
    assert_eq!((map.groups.len(), map.replicas), (258, 1));
    assert!(map.groups[..256].iter().all(|place| place.alive && place.leader == 11 && place.voters == [11]));
    assert!(place(&map, 256).alive && place(&map, 257).alive, "{:?}", place(&map, 257));
    assert_eq!(map.stores.iter().filter(|info| info.alive).count(), 3);
    assert_eq!(map.crossdir_transactions, 2);
    let told: Vec<_> = map.block_services.iter().map(|info| (info.id, info.flags, info.key.len())).collect();
    assert_eq!(told, [(1, 0, 0), (2, 0, 0), (3, flags::LOST, 0)]);
    let keys = registry.map(true).await.unwrap();
    assert_eq!(keys.block_services[1].key, vec![2; 32]);

    let set = Op::SetFlags(pb::SetFlags { block_services: vec![2], set: flags::NO_WRITE, clear: 0 });
    registry.call(set).await.unwrap();
    shuckle.stop().await;

    let shuckle = Shuckle::start(&path).await;
    let registry = shuckle.join(Some(SECRET)).await;
    assert_eq!(registry.cluster(), cluster);
    let map = registry.map(false).await.unwrap();
    assert_eq!(map.groups.len(), 258);
    assert!(map.groups[..256].iter().all(|place| !place.alive && place.voters == [11]));
    assert_eq!(map.block_services.len(), 3);
    assert_ne!(map.block_services[1].flags & flags::NO_WRITE, 0, "a flag was forgotten");
    register(&registry, disks(vec![disk(1, 1), disk(2, 2)])).await;
    let map = registry.map(true).await.unwrap();
    assert_eq!(map.block_services[0].flags, 0);
    assert_eq!(map.block_services[1].flags, flags::NO_WRITE);
    shuckle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_allowed_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let shuckle = Shuckle::start(directory.path()).await;
    let registry = shuckle.join(Some(SECRET)).await;
    for secret in [None, Some([6; 32])] {
        let stranger = shuckle.join(secret).await;
        assert_eq!(refused(&stranger, shards(0..1)).await, RegistryError::Unauthorized);
        let drain = Op::DrainHost(pb::DrainHost { host: "solo".to_owned(), undo: false });
        assert_eq!(refused(&stranger, drain).await, RegistryError::Unauthorized);
        assert_eq!(refused(&stranger, disks(vec![disk(1, 1)])).await, RegistryError::Unauthorized);
        assert_eq!(
            refused(&stranger, Op::Map(pb::ClusterMap { with_keys: true, known_version: 0 })).await,
            RegistryError::Unauthorized
        );
    }
    register(&registry, disks(vec![disk(1, 1)])).await;
    assert_eq!(refused(&registry, disks(vec![disk(1, 9)])).await, RegistryError::Conflict);
    register(&registry, shards(0..0)).await;
    assert_eq!(refused(&registry, store(11, StoreShard, "other", 0..0)).await, RegistryError::Conflict);
    assert_eq!(refused(&registry, store(11, StoreCrossdir, "host", 0..0)).await, RegistryError::Conflict);
    assert_eq!(refused(&registry, shards(256..257)).await, RegistryError::Malformed);
    let unknown = Op::SetFlags(pb::SetFlags { block_services: vec![99], set: flags::NO_READ, clear: 0 });
    assert_eq!(refused(&registry, unknown).await, RegistryError::NotFound);

    // Headers nobody honest sends.
    let channel = eggs_daemon::channel::connect(&shuckle.address.to_string()).unwrap();
    let mut client = pb::registry_service_client::RegistryServiceClient::new(channel);
    let good = pb::RequestHeader {
        version: PROTOCOL_VERSION,
        cluster_id: registry.cluster().0.to_vec().into(),
        ..Default::default()
    };
    let other = pb::RequestHeader { cluster_id: ClusterId([1; 16]).0.to_vec().into(), ..good.clone() };
    let newer = pb::RequestHeader { version: 99, ..good.clone() };
    let map = Some(Op::Map(pb::ClusterMap { with_keys: false, known_version: 0 }));
    for (header, op, expected) in [
        (None, map.clone(), RegistryError::Malformed),
        (Some(good.clone()), None, RegistryError::Malformed),
        (Some(other), map.clone(), RegistryError::WrongCluster),
        (Some(newer), map.clone(), RegistryError::UnsupportedVersion),
    ] {
        let reply = client.call(pb::RegistryRequest { header, op }).await.unwrap().into_inner();
        let Some(Answer::Error(error)) = reply.result else { panic!("not refused: {reply:?}") };
        assert_eq!(RegistryError::from_code(error.code), Some(expected));
    }
    shuckle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_silent_becomes_stale_and_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let shuckle = Shuckle::start(directory.path()).await;
    let registry = shuckle.join(Some(SECRET)).await;
    host(&registry, 0..256).await;
    register(&registry, disks(vec![disk(1, 1)])).await;
    let all = |map: &pb::ClusterMapReply| {
        (place(map, 0).alive, place(map, 256).alive, map.block_services[0].flags & flags::STALE == 0)
    };
    assert_eq!(all(&registry.map(false).await.unwrap()), (true, true, true));
    // The deadline is the daemons' five seconds; polled, with a generous end.
    eventually("everybody is stale", async || {
        all(&registry.map(false).await.unwrap()) == (false, false, false)
    })
    .await;
    let health = shuckle.json("/api/v1/status").await["health"].clone();
    assert_eq!(health["state"], "unavailable");
    let lost = "quorum lost: all 256 shards, the coordinator cannot work without host host";
    assert_eq!(health["reasons"][0]["text"], lost);
    // From elsewhere: nobody is there any more who could be disturbed.
    let moved = |kind, id, led: &Op| match led {
        Op::RegisterStore(op) => Op::RegisterStore(pb::RegisterStore {
            address: format!("other:{id}"),
            kind: pb::StoreKind::into(kind),
            ..op.clone()
        }),
        _ => unreachable!(),
    };
    for _ in 0..2 {
        register(&registry, moved(StoreShard, 5001, &shards(0..256))).await;
        register(&registry, moved(StoreCrossdir, 5002, &crossdir())).await;
    }
    register(&registry, disks(vec![disk(1, 1)])).await;
    let map = registry.map(false).await.unwrap();
    assert_eq!(all(&map), (true, true, true));
    assert_eq!(map.stores.iter().find(|info| info.id == 11).unwrap().address, "other:5001");
    shuckle.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_and_the_api_say_what_is() {
    let directory = tempfile::tempdir().unwrap();
    let shuckle = Shuckle::start(directory.path()).await;
    let registry = shuckle.join(Some(SECRET)).await;
    host(&registry, 0..200).await;
    let lost = pb::BlockServiceReport { problem: "<script>alert(1)</script>".to_owned(), ..disk(2, 2) };
    register(&registry, disks(vec![disk(1, 1), disk(2, 2)])).await;
    register(&registry, disks(vec![disk(1, 1), lost])).await;
    let kind = pb::BadBlockKind::BadBlockMissing.into();
    let report =
        pb::ReportBlocks { blocks: vec![pb::BadBlock { block_service: 1, block: 1, file: 1, kind }] };
    registry.call(Op::ReportBlocks(report)).await.unwrap();

    let page = shuckle.page("/").await;
    assert!(
        page.starts_with("HTTP/1.1 200")
            && page.contains("content-security-policy")
            && page.contains("EggsFS")
    );
    for path in ["/assets/app.js", "/assets/style.css", "/assets/egg.svg"] {
        assert!(shuckle.page(path).await.starts_with("HTTP/1.1 200"), "{path}");
    }
    for prefix in ["/api/v1", "/api"] {
        let cluster = shuckle.json(&format!("{prefix}/cluster")).await;
        assert_eq!(cluster["cluster_id"], registry.cluster().to_string());
        assert_eq!(cluster["shards"].as_array().unwrap().len(), 256);
        assert_eq!(cluster["shards"][199]["state"], "alive");
        assert_eq!(cluster["shards"][199]["replicas"][0]["role"], "leader");
        assert_eq!(cluster["shards"][200]["state"], "stale");
        assert_eq!(cluster["shards"][200]["coming"][0], "0x000000000000000b");
        assert_eq!(cluster["groups"][1]["replicas"].as_array().unwrap().len(), 1);
        assert_eq!(cluster["stores"].as_array().unwrap().len(), 3);
        assert_eq!(cluster["stores"][0]["kind"], "shard");
        assert_eq!((&cluster["replicas"], &cluster["registry"]["here"]), (&1.into(), &true.into()));
        assert_eq!(cluster["hosts"][1]["name"], "solo");
        assert_eq!(cluster["block_services"][1]["state"], "lost");
        assert_eq!(cluster["block_services"][1]["problem"], "<script>alert(1)</script>");
        assert_eq!(cluster["block_services"][0]["reported_blocks"], 1);
        // The lost disk counts as a disk, not as space.
        assert_eq!(cluster["classes"][0]["block_services"], 2);
        assert_eq!(cluster["classes"][0]["capacity_bytes"], 1000);
        assert_eq!(cluster["total"]["blocks"], 7);
        assert_eq!(cluster["failure_domains"][1]["name"], "domain-2");
        let reasons = cluster["health"]["reasons"].as_array().unwrap();
        assert_eq!(reasons.iter().filter(|reason| reason["lost"] == true).count(), 1, "{reasons:?}");
        assert_eq!(shuckle.json(&format!("{prefix}/status")).await["shard_counts"]["alive"], 200);
        assert_eq!(shuckle.json(&format!("{prefix}/shards")).await["shards"][0]["address"], "host:5001");
        assert_eq!(shuckle.json(&format!("{prefix}/stores")).await["stores"][2]["host"], "solo");
        assert_eq!(shuckle.json(&format!("{prefix}/hosts")).await["hosts"][0]["name"], "host");
        assert_eq!(shuckle.json(&format!("{prefix}/block-services")).await["block_services"][0]["blocks"], 7);
        assert_eq!(shuckle.json(&format!("{prefix}/transactions")).await["transactions"], 2);
        assert_eq!(shuckle.json(&format!("{prefix}/version")).await["api"], 1);
        assert_eq!(shuckle.json(&format!("{prefix}/nothing")).await["error"], "no such page");
    }
    assert!(shuckle.page("/healthz").await.ends_with("ok\n"));
    eventually("there are gauges", async || {
        // Heartbeats, or they would be stale before.
        host(&registry, 0..200).await;
        shuckle.page("/metrics").await.contains("eggs_shuckle_shards{state=\"alive\"} 200")
    })
    .await;
    shuckle.stop().await;
}

fn line(error: &impl std::fmt::Display) -> String {
    let line = error.to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_service_on_the_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let shuckle = Shuckle::start(directory.path()).await;
    let config = || Config {
        secret: SecretSource::InDirectory,
        ..config(directory.path(), "solo", shuckle.address, Vec::new())
    };
    let refused = line(&Service::open(config()).await.unwrap_err());
    assert!(refused.contains("in use by process"), "{refused}");
    let config = config();
    shuckle.stop().await;
    let service = Service::open(config).await.unwrap();
    assert!(directory.path().join("secret").exists());
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_do_not_fit_are_refused_in_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let listener = listener().await;
    let address = listener.local_addr().unwrap();
    let path = directory.path().join("shuckle");
    let good =
        |peers: &[&str]| config(&path, "a", address, peers.iter().map(|&peer| peer.to_owned()).collect());
    let two = Config { replicas: 2, ..good(&[]) };
    assert!(line(&Service::open(two).await.unwrap_err()).contains("1, 3 or 5"));
    let which = Config { secret: SecretSource::InDirectory, ..good(&["10.0.0.1:5000"]) };
    assert!(line(&Service::open(which).await.unwrap_err()).contains("--secret-file FILE is needed"));
    // Not the first of the list: it must not make a secret that the others do not have.
    let absent = directory.path().join("secret");
    let copy = Config { secret: SecretSource::File(absent.clone()), ..good(&["10.0.0.1:5000"]) };
    let refused = line(&Service::open(copy).await.unwrap_err());
    assert!(refused.contains("every host of --peers needs a copy") && !absent.exists(), "{refused}");
    assert!(!path.exists(), "a refusal leaves no trace");
    let shuckle = Shuckle::open(Config { replicas: 3, ..good(&[]) }, listener).await.unwrap();
    shuckle.stop().await;
    let five = Config { replicas: 5, ..good(&[]) };
    assert!(line(&Service::open(five).await.unwrap_err()).contains("founded with --replicas 3, not 5"));
    Service::open(good(&[])).await.unwrap().stop().await;
}
