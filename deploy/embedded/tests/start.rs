//! Starting and refusing to start.

use std::fs;
use std::path::Path;

use eggs_embedded::{Cluster, Config, JanitorSettings};

fn config(data: &Path) -> Config {
    let listen = "127.0.0.1:0".parse().unwrap();
    Config {
        data: data.to_owned(),
        listen,
        disks: None,
        replicas: None,
        read_lease: false,
        janitor: Some(JanitorSettings::default()),
    }
}

fn replicated(data: &Path) -> Config {
    Config { replicas: Some(3), ..config(data) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_keeps_its_id_and_has_one_process() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("cluster");
    let first = Cluster::start(config(&data)).await.unwrap();
    let id = first.id();
    let second = Cluster::start(config(&data)).await.unwrap_err();
    assert!(second.to_string().contains("in use"), "{second}");
    let elsewhere = directory.path().join("elsewhere");
    let same_port = Config { listen: first.address(), ..config(&elsewhere) };
    let error = Cluster::start(same_port).await.unwrap_err();
    assert!(error.to_string().contains("address in use"), "{error}");
    assert!(!elsewhere.exists(), "a refused start leaves nothing");
    first.stop().await;
    let again = Cluster::start(config(&data)).await.unwrap();
    assert_eq!(again.id(), id);
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_parts_are_not_made_anew_and_lost_disks_do_not_stop_it() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("cluster");
    Cluster::start(config(&data)).await.unwrap().stop().await;
    fs::rename(data.join("shard"), data.join("hidden")).unwrap();
    let error = Cluster::start(config(&data)).await.unwrap_err();
    assert!(error.to_string().contains("shard is missing"), "{error}");
    fs::create_dir(data.join("shard")).unwrap();
    let error = Cluster::start(config(&data)).await.unwrap_err();
    assert!(error.to_string().contains("shard/FORMAT is missing"), "{error}");
    fs::remove_dir(data.join("shard")).unwrap();
    fs::rename(data.join("hidden"), data.join("shard")).unwrap();
    fs::remove_dir_all(data.join("disks/03")).unwrap();
    let cluster = Cluster::start(config(&data)).await.unwrap();
    assert!(!data.join("disks/03").exists(), "a lost disk is never made anew");
    cluster.stop().await;
    let fewer = Config { disks: Some(4), ..config(&data) };
    let error = Cluster::start(fewer).await.unwrap_err();
    assert!(error.to_string().contains("has 8 disks"), "{error}");
    let more = Config { disks: Some(9), ..config(&data) };
    Cluster::start(more).await.unwrap().stop().await;
    assert!(data.join("disks/08").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_folder_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("thesis.txt"), "precious").unwrap();
    let error = Cluster::start(config(directory.path())).await.unwrap_err();
    assert!(error.to_string().contains(&directory.path().display().to_string()), "{error}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_hosts_start_stop_and_keep_their_number() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("cluster");
    let mut cluster = Cluster::start(replicated(&data)).await.unwrap();
    let (id, addresses) = (cluster.id(), cluster.addresses().to_vec());
    assert_eq!((addresses.len(), cluster.replicas(), cluster.disks()), (3, 3, 9));
    let ports: Vec<u16> = addresses.iter().map(std::net::SocketAddr::port).collect();
    assert_eq!([ports[0] + 1, ports[0] + 2], ports[1..]);
    for host in 0..3 {
        cluster.stop_host(host).await;
        cluster.start_host(host).await.unwrap();
    }
    let began = std::time::Instant::now();
    cluster.stop().await;
    assert!(began.elapsed() < std::time::Duration::from_secs(5), "{:?}", began.elapsed());
    for replicas in [1, 5] {
        let other = Config { replicas: Some(replicas), ..config(&data) };
        let error = Cluster::start(other).await.unwrap_err();
        assert!(error.to_string().contains("has 3"), "{error}");
    }
    let error = Cluster::start(Config { replicas: Some(2), ..config(&data) }).await.unwrap_err();
    assert!(error.to_string().contains("1, 3 or 5"), "{error}");
    let again = Cluster::start(config(&data)).await.unwrap();
    assert_eq!((again.id(), again.replicas()), (id, 3));
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minority_of_hosts_may_have_lost_everything() {
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("cluster");
    Cluster::start(replicated(&data)).await.unwrap().stop().await;
    let store = |host: u32| {
        let format = fs::read_to_string(data.join(format!("host-{host}/shard/FORMAT"))).unwrap();
        format.lines().find(|line| line.starts_with("store ")).unwrap().to_owned()
    };
    let before = store(2);
    for part in ["shuckle", "shard", "crossdir"] {
        fs::remove_dir_all(data.join("host-2").join(part)).unwrap();
    }
    Cluster::start(config(&data)).await.unwrap().stop().await;
    assert_ne!(store(2), before, "the old voter is never taken up again");
    for host in ["host-1", "host-3"] {
        fs::rename(data.join(host).join("shard"), data.join(host).join("hidden")).unwrap();
    }
    let error = Cluster::start(config(&data)).await.unwrap_err();
    assert!(error.to_string().contains("shard is missing"), "{error}");
}
