//! Three shuckles on loopback: founding and joining, what a follower answers, the loss of one and of two, and
//! a new beginning at other ports.

mod common;

use std::net::SocketAddr;
use std::path::Path;

use common::{SECRET, Shuckle, config, disk, disks, eventually, join, listener, register};
use eggs_daemon::Secret;
use eggs_daemon::registry::Registry;
use eggs_proto::{GroupId, flags, pb};
use eggs_shuckle::{Config, OpenError, SecretSource};
use tokio::net::TcpListener;

const HOSTS: [&str; 3] = ["a", "b", "c"];

async fn three_listeners() -> (Vec<TcpListener>, Vec<SocketAddr>, Vec<String>) {
    let listeners = vec![listener().await, listener().await, listener().await];
    let addresses: Vec<SocketAddr> =
        listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let peers = addresses.iter().map(ToString::to_string).collect();
    (listeners, addresses, peers)
}

async fn open(root: &Path, host: usize, peers: &[String], listener: TcpListener) -> Shuckle {
    let address = listener.local_addr().unwrap();
    let config = config(&root.join(HOSTS[host]), HOSTS[host], address, peers.to_vec());
    Shuckle::open(config, listener).await.unwrap()
}

/// Of the registry's own group.
async fn group(registry: &Registry) -> Option<pb::GroupPlace> {
    let map = registry.map(false).await.ok()?;
    map.groups.into_iter().find(|place| place.group == u32::from(GroupId::SHUCKLE.0))
}

async fn wait_for_three(registry: &Registry) -> pb::GroupPlace {
    eventually("the registry has three replicas", async || {
        group(registry).await.is_some_and(|place| place.voters.len() == 3 && place.leader != 0)
    })
    .await;
    group(registry).await.unwrap()
}

async fn leader(shuckles: &[Shuckle]) -> usize {
    let mut leads = 0;
    eventually("somebody leads", async || {
        let led = shuckles.iter().position(|shuckle| shuckle.service.registry().leads());
        leads = led.unwrap_or(leads);
        led.is_some()
    })
    .await;
    leads
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn three_found_one_cluster_and_bear_the_loss_of_one() {
    let root = tempfile::tempdir().unwrap();
    let (mut listeners, _, peers) = three_listeners().await;
    let mut shuckles = Vec::new();
    // The first comes last: the others wait for it.
    for host in [2, 1] {
        let shuckle = open(root.path(), host, &peers, listeners.pop().unwrap()).await;
        let page = shuckle.page("/api/v1/status").await;
        assert!(page.starts_with("HTTP/1.1 503") && page.contains("no cluster here yet"), "{page}");
        shuckles.insert(0, shuckle);
    }
    assert!(shuckles.iter().all(|shuckle| shuckle.service.cluster().is_none()));
    shuckles.insert(0, open(root.path(), 0, &peers, listeners.pop().unwrap()).await);
    let registry = join(&peers, Some(SECRET)).await;
    assert_eq!(registry.replicas(), 3, "three peers, and nothing said");
    wait_for_three(&registry).await;
    let cluster = Some(registry.cluster());
    assert!(shuckles.iter().all(|shuckle| shuckle.service.cluster() == cluster), "SU-4");

    register(&registry, disks(vec![disk(1, 1), disk(2, 2)])).await;
    let set = pb::SetFlags { block_services: vec![2], set: flags::NO_WRITE, clear: 0 };
    registry.call(pb::registry_request::Op::SetFlags(set)).await.unwrap();
    let leads = leader(&shuckles).await;
    for (host, shuckle) in shuckles.iter().enumerate() {
        let known = shuckle.json("/api/v1/cluster").await;
        assert_eq!(known["stores"].as_array().map(Vec::len), Some(3), "{known}");
        assert_eq!(known["groups"][1]["replicas"].as_array().map(Vec::len), Some(3));
        assert_eq!(known["registry"]["here"], host == leads);
        assert_eq!(known["registry"]["trouble"], "");
        let names: Vec<&str> =
            known["hosts"].as_array().unwrap().iter().map(|host| host["name"].as_str().unwrap()).collect();
        assert_eq!(names, HOSTS);
    }

    shuckles.remove(leads).stop().await;
    eventually("another leads", async || group(&registry).await.is_some_and(|place| place.leader != 0)).await;
    let map = registry.map(false).await.unwrap();
    assert_ne!(map.block_services[1].flags & flags::NO_WRITE, 0, "a flag was forgotten");
    register(&registry, disks(vec![disk(1, 1), disk(2, 2)])).await;
    for shuckle in &shuckles {
        let gone = format!("without host {}", HOSTS[leads]);
        eventually("every page says what is missing", async || {
            let reasons = shuckle.json("/api/v1/summary").await["health"]["reasons"].to_string();
            reasons.contains("under-replicated: the registry") && reasons.contains(&gone)
        })
        .await;
    }

    // Of two the leader goes: no quorum.
    let leads = leader(&shuckles).await;
    shuckles.remove(leads).stop().await;
    let last = &shuckles[0];
    eventually("the page says that there is no quorum", async || {
        let health = last.json("/api/v1/status").await["health"].clone();
        let text = health["reasons"][0]["text"].as_str().unwrap_or_default().to_owned();
        health["state"] == "unavailable" && text.contains("no quorum: 1 of 3 replicas answer; missing hosts")
    })
    .await;
    let known = last.json("/api/v1/cluster").await;
    assert_eq!(known["stores"].as_array().map(Vec::len), Some(3), "what was known is shown: {known}");
    shuckles.remove(0).stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn three_that_have_all_moved_find_one_another() {
    let root = tempfile::tempdir().unwrap();
    let mut cluster = None;
    for _ in 0..2 {
        let (listeners, _, peers) = three_listeners().await;
        let mut shuckles = Vec::new();
        for (host, listener) in listeners.into_iter().enumerate() {
            shuckles.push(open(root.path(), host, &peers, listener).await);
        }
        let registry = join(&peers, Some(SECRET)).await;
        wait_for_three(&registry).await;
        assert_eq!(*cluster.get_or_insert(registry.cluster()), registry.cluster());
        for shuckle in shuckles {
            shuckle.stop().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_peer_with_another_secret_is_told_so() {
    let root = tempfile::tempdir().unwrap();
    let (mut listeners, addresses, peers) = three_listeners().await;
    let secret = SecretSource::Given(Secret::from_bytes([6; 32]));
    let other = Config { secret, ..config(&root.path().join("c"), "c", addresses[2], peers.clone()) };
    let stranger = Shuckle::open(other, listeners.pop().unwrap()).await.unwrap();
    let second = open(root.path(), 1, &peers, listeners.pop().unwrap()).await;
    let first = open(root.path(), 0, &peers, listeners.pop().unwrap()).await;
    let error = stranger.ended().await;
    assert!(matches!(error, OpenError::OtherSecret(_)), "{error}");
    let line = error.to_string();
    assert!(line.contains("is the secret file a copy") && !line.contains('\n'), "{line}");
    first.stop().await;
    second.stop().await;
}
