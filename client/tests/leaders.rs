//! How the library finds leaders: against servers that speak the real protocol and do what a test says.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use eggs_client::{Client, ClientError, ClusterSecret, ListOptions, Options, Refusal};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::registry_service_server::{RegistryService, RegistryServiceServer};
use eggs_proto::pb::shard_service_server::{ShardService, ShardServiceServer};
use eggs_proto::pb::{registry_reply, registry_request, shard_reply, shard_request, write_result};
use eggs_proto::{GroupId, InodeId, RegistryError, ServiceError as _, ShardError, StoreId, Time, pb};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

const CLUSTER: [u8; 16] = [7; 16];
const SECRET: [u8; 32] = [9; 32];
const SHARD: u32 = 1;

/// Time that this process was given: a shared machine stands still now and then, and what the client cannot help is
/// not counted against it.
struct Awake(u64);

/// Milliseconds, each tick counted as at most [`TICK`] late.
static AWAKE: LazyLock<Arc<AtomicU64>> = LazyLock::new(|| {
    let awake = Arc::new(AtomicU64::new(0));
    let counted = awake.clone();
    std::thread::spawn(move || {
        let (mut looked, mut total) = (Instant::now(), Duration::ZERO);
        loop {
            std::thread::sleep(TICK);
            total += looked.elapsed().min(2 * TICK);
            looked = Instant::now();
            counted.store(total.as_millis() as u64, Ordering::Relaxed);
        }
    });
    awake
});
const TICK: Duration = Duration::from_millis(5);

impl Awake {
    fn now() -> Awake {
        Awake(AWAKE.load(Ordering::Relaxed))
    }

    fn elapsed(&self) -> Duration {
        Duration::from_millis(AWAKE.load(Ordering::Relaxed) - self.0)
    }
}

/// What a host does with requests to shards.
#[derive(Debug, Clone, PartialEq)]
enum Manner {
    Leads,
    /// Does not lead; says who does, or that it does not know.
    Names(Option<String>),
    /// Takes requests and never answers.
    Silent,
    /// Does the write, and does not say so.
    DoesAndIsSilent,
    Busy,
    /// Answers about the past only.
    Follows(String),
}

/// One host of the cluster.
#[derive(Debug, Clone)]
struct Host {
    address: String,
    world: Arc<World>,
}

#[derive(Debug, Default)]
struct World {
    manners: Mutex<BTreeMap<String, Manner>>,
    map: Mutex<pb::ClusterMapReply>,
    /// Requests to shards, in order: who was asked, session and sequence.
    asked: Mutex<Vec<(String, u64, u64)>>,
    /// Writes done: how often, by session and sequence.
    done: Mutex<BTreeMap<(u64, u64), u32>>,
    /// Whether shuckle answers; who of it leads.
    shuckle_away: Mutex<bool>,
    shuckle_leader: Mutex<Option<String>>,
    admin: Mutex<Vec<(Vec<u8>, registry_request::Op)>>,
}

impl World {
    fn set(&self, address: &str, manner: Manner) {
        self.manners.lock().unwrap().insert(address.to_owned(), manner);
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().drain(..).map(|(address, ..)| address).collect()
    }
}

#[tonic::async_trait]
impl ShardService for Host {
    async fn call(&self, request: Request<pb::ShardRequest>) -> Result<Response<pb::ShardReply>, Status> {
        let request = request.into_inner();
        let header = request.header.clone().unwrap_or_default();
        assert_eq!(header.cluster_id, &CLUSTER[..]);
        let ids = (header.session, header.sequence);
        self.world.asked.lock().unwrap().push((self.address.clone(), ids.0, ids.1));
        let manner = self.world.manners.lock().unwrap().get(&self.address).cloned();
        let past = matches!(&request.op, Some(shard_request::Op::List(list)) if list.at != 0);
        let not_leader = |hint: Option<String>| {
            let error = ShardError::NotLeader.bare();
            shard_reply::Result::Error(pb::Error { leader: hint.unwrap_or_default(), ..error })
        };
        let result = match manner.unwrap_or(Manner::Names(None)) {
            Manner::Names(hint) => not_leader(hint),
            Manner::Follows(hint) if !past => not_leader(Some(hint)),
            Manner::Busy => shard_reply::Result::Error(ShardError::Busy.bare()),
            Manner::Silent => std::future::pending().await,
            manner => {
                let result = answer(request.op);
                if matches!(result, shard_reply::Result::Write(_)) {
                    *self.world.done.lock().unwrap().entry(ids).or_default() += 1;
                }
                if manner == Manner::DoesAndIsSilent {
                    std::future::pending::<()>().await;
                }
                result
            }
        };
        let header = Some(pb::ReplyHeader { version: PROTOCOL_VERSION, time: header.time });
        Ok(Response::new(pb::ShardReply { header, result: Some(result) }))
    }
}

fn answer(op: Option<shard_request::Op>) -> shard_reply::Result {
    match op {
        Some(shard_request::Op::Stat(stat)) => {
            let attributes = pb::Attributes { inode: stat.inode, ..pb::Attributes::default() };
            shard_reply::Result::Stat(pb::StatReply { attributes: Some(attributes) })
        }
        Some(shard_request::Op::List(_)) => shard_reply::Result::List(pb::ListReply::default()),
        Some(shard_request::Op::Write(write)) => {
            let result = write_result::Result::Done(pb::Done {});
            let done = pb::WriteResult { result: Some(result), time: 1 };
            shard_reply::Result::Write(pb::WriteReply { results: vec![done; write.ops.len()] })
        }
        _ => shard_reply::Result::Error(ShardError::Malformed.bare()),
    }
}

#[tonic::async_trait]
impl RegistryService for Host {
    async fn call(
        &self,
        request: Request<pb::RegistryRequest>,
    ) -> Result<Response<pb::RegistryReply>, Status> {
        let request = request.into_inner();
        if *self.world.shuckle_away.lock().unwrap() {
            return Err(Status::unavailable("away"));
        }
        let leader = self.world.shuckle_leader.lock().unwrap().clone();
        let result = match request.op {
            _ if leader.as_ref().is_some_and(|leader| *leader != self.address) => {
                let error = RegistryError::NotLeader.bare();
                registry_reply::Result::Error(pb::Error { leader: leader.unwrap_or_default(), ..error })
            }
            Some(registry_request::Op::Hello(_)) => registry_reply::Result::Hello(pb::HelloReply {
                cluster_id: CLUSTER.to_vec().into(),
                version: PROTOCOL_VERSION,
                replicas: 3,
                ..pb::HelloReply::default()
            }),
            Some(registry_request::Op::Map(_)) => {
                registry_reply::Result::Map(self.world.map.lock().unwrap().clone())
            }
            Some(op) => {
                let secret = request.header.unwrap_or_default().secret;
                let known = secret == SECRET[..];
                self.world.admin.lock().unwrap().push((secret.to_vec(), op));
                if known {
                    registry_reply::Result::Registered(pb::Registered {})
                } else {
                    registry_reply::Result::Error(RegistryError::Unauthorized.bare())
                }
            }
            None => registry_reply::Result::Error(RegistryError::Malformed.bare()),
        };
        Ok(Response::new(pb::RegistryReply { header: None, result: Some(result) }))
    }
}

/// A server with threads of its own: when they end so do its connections, as those of a killed process.
struct Server(Option<Runtime>);

impl Server {
    fn start(host: Host, listener: std::net::TcpListener) -> Server {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        listener.set_nonblocking(true).unwrap();
        runtime.spawn(async move {
            let server = tonic::transport::Server::builder()
                .add_service(ShardServiceServer::new(host.clone()))
                .add_service(RegistryServiceServer::new(host));
            let listener = TcpListener::from_std(listener).unwrap();
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        Server(Some(runtime))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Three hosts, each with shuckle and shards, and their servers.
struct Cluster {
    world: Arc<World>,
    addresses: Vec<String>,
    servers: Vec<Option<Server>>,
}

impl Cluster {
    fn start() -> Cluster {
        let world = Arc::new(World::default());
        let (mut addresses, mut servers) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let host = Host { address: address.clone(), world: world.clone() };
            addresses.push(address);
            servers.push(Some(Server::start(host, listener)));
        }
        let cluster = Cluster { world, addresses, servers };
        cluster.map_says(Some(0));
        cluster
    }

    /// Shuckle's map: every host has a voter, `leader` leads.
    fn map_says(&self, leader: Option<usize>) {
        let store = |n: usize, kind: pb::StoreKind| pb::StoreInfo {
            id: n as u64 + 1 + 10 * kind as u64,
            kind: kind as i32,
            host: format!("host-{n}"),
            address: self.addresses[n].clone(),
            alive: true,
            ..pb::StoreInfo::default()
        };
        let stores: Vec<pb::StoreInfo> = (0..3)
            .flat_map(|n| [pb::StoreKind::StoreShard, pb::StoreKind::StoreShuckle].map(|k| store(n, k)))
            .collect();
        let group = pb::GroupPlace {
            group: SHARD,
            leader: leader.map_or(0, |n| n as u64 + 11),
            alive: leader.is_some(),
            voters: vec![11, 12, 13],
            wanted: vec![11, 12, 13],
            ..pb::GroupPlace::default()
        };
        *self.world.map.lock().unwrap() = pb::ClusterMapReply {
            stores,
            groups: vec![group],
            replicas: 3,
            ..pb::ClusterMapReply::default()
        };
    }

    fn manners(&self, manners: [Manner; 3]) {
        for (address, manner) in self.addresses.iter().zip(manners) {
            self.world.set(address, manner);
        }
    }

    fn names(&self, n: usize) -> Manner {
        Manner::Names(Some(self.addresses[n].clone()))
    }

    async fn client(&self, timeout: Duration) -> Client {
        Client::connect(self.options(timeout)).await.unwrap()
    }

    fn options(&self, timeout: Duration) -> Options {
        let secret = Some(ClusterSecret::new(SECRET.to_vec()));
        Options { timeout, secret, ..Options::new(self.addresses[0].clone()) }
    }

    fn kill(&mut self, n: usize) {
        self.servers[n] = None;
    }

    /// It is there again, at the same address.
    fn restart(&mut self, n: usize) {
        let address: SocketAddr = self.addresses[n].parse().unwrap();
        let patience = Instant::now();
        let listener = loop {
            match std::net::TcpListener::bind(address) {
                Ok(listener) => break listener,
                Err(error) => assert!(patience.elapsed() < second(5), "{error}"),
            }
        };
        let host = Host { address: self.addresses[n].clone(), world: self.world.clone() };
        self.servers[n] = Some(Server::start(host, listener));
    }
}

fn second(n: u64) -> Duration {
    Duration::from_secs(n)
}

async fn stat(client: &Client) -> eggs_client::Result<()> {
    client.stat_inode(InodeId::ROOT).await.map(drop)
}

async fn write(client: &Client) -> eggs_client::Result<()> {
    client.set_attributes_inode(InodeId::ROOT, Default::default()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn hints_are_followed_and_remembered() {
    let cluster = Cluster::start();
    cluster.manners([cluster.names(2), cluster.names(2), Manner::Leads]);
    let client = cluster.client(second(10)).await;
    stat(&client).await.unwrap();
    assert_eq!(cluster.world.asked(), [cluster.addresses[0].clone(), cluster.addresses[2].clone()]);
    stat(&client).await.unwrap();
    write(&client).await.unwrap();
    assert_eq!(cluster.world.asked(), [cluster.addresses[2].clone(), cluster.addresses[2].clone()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_costs_an_election() {
    let mut cluster = Cluster::start();
    cluster.manners([Manner::Leads, cluster.names(0), cluster.names(0)]);
    let client = cluster.client(second(20)).await;
    write(&client).await.unwrap();
    cluster.kill(0);
    let election = Duration::from_millis(700);
    let world = cluster.world.clone();
    let (second_host, third_host) = (cluster.addresses[1].clone(), cluster.addresses[2].clone());
    let voting = tokio::spawn(async move {
        tokio::time::sleep(election / 2).await;
        world.set(&second_host, Manner::Names(None));
        tokio::time::sleep(election / 2).await;
        world.set(&third_host, Manner::Leads);
        world.set(&second_host, Manner::Names(Some(third_host)));
    });
    let (started, awake) = (Instant::now(), Awake::now());
    write(&client).await.unwrap();
    let (took, awake) = (started.elapsed(), awake.elapsed());
    voting.await.unwrap();
    assert!(took >= election && awake < election + second(1), "{took:?}, awake {awake:?}");
    assert!(cluster.world.asked().len() < 100, "the others are asked now and then, not all the time");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_leader_does_not_eat_the_deadline() {
    let cluster = Cluster::start();
    cluster.manners([Manner::DoesAndIsSilent, Manner::Leads, cluster.names(1)]);
    let client = cluster.client(second(20)).await;
    let started = Awake::now();
    write(&client).await.unwrap();
    assert!(started.elapsed() < second(3), "{:?}", started.elapsed());
    // The same call twice: same session, same sequence (CL-10).
    let asked = cluster.world.asked.lock().unwrap().clone();
    let ids: Vec<(u64, u64)> = asked.iter().map(|(_, session, sequence)| (*session, *sequence)).collect();
    assert!(ids.len() >= 2 && ids.iter().all(|&id| id == ids[0] && id.0 != 0 && id.1 == 1), "{asked:?}");
    assert_eq!(cluster.world.done.lock().unwrap().len(), 1);
    // And the next one goes on with the next sequence, to the one that answered.
    cluster.world.asked();
    write(&client).await.unwrap();
    let asked = cluster.world.asked.lock().unwrap().clone();
    assert_eq!(asked, [(cluster.addresses[1].clone(), ids[0].0, 2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_leader_is_waited_for() {
    let cluster = Cluster::start();
    cluster.manners([Manner::Silent, cluster.names(0), cluster.names(0)]);
    let client = cluster.client(Duration::from_millis(2500)).await;
    let error = stat(&client).await.unwrap_err();
    assert!(error.is_unreachable());
    let asked = cluster.world.asked();
    let leader = asked.iter().filter(|address| **address == cluster.addresses[0]).count();
    assert_eq!(leader, 1, "its request goes on: {asked:?}");
    assert!(asked.len() <= 12, "the others are asked now and then: {asked:?}");
    let words = error.to_string();
    assert!(words.contains("shard 1") && words.contains("host-0") && words.contains("no answer"), "{words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_quorum_names_the_shard_the_hosts_and_what_each_said() {
    let mut cluster = Cluster::start();
    cluster.manners([Manner::Leads, Manner::Names(None), Manner::Names(None)]);
    let client = cluster.client(second(2)).await;
    cluster.kill(0);
    cluster.kill(2);
    let (started, awake) = (Instant::now(), Awake::now());
    let error = write(&client).await.unwrap_err();
    let (took, awake) = (started.elapsed(), awake.elapsed());
    assert!(took >= second(2) && awake < second(3), "{took:?}, awake {awake:?}");
    let words = error.to_string();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{words}");
    for part in ["shard 1", "host-0 at", "host-1 at", "host-2 at", "does not lead", "refused"] {
        assert!(words.contains(part), "{part}: {words}");
    }
    let gave_up = words.split_once("gave up after ").and_then(|(_, after)| after.split_once(" s"));
    let gave_up: f64 = gave_up.unwrap_or_else(|| panic!("{words}")).0.parse().unwrap();
    assert!((2.0..took.as_secs_f64() + 0.1).contains(&gave_up), "{took:?}: {words}");
}

/// The last request of many is always cut off: what the ones before it were told is what people need.
#[tokio::test(flavor = "multi_thread")]
async fn a_silence_that_just_began_says_less_than_the_answers_before_it() {
    let cluster = Cluster::start();
    cluster.manners([Manner::Names(None), Manner::Names(None), Manner::Names(None)]);
    let client = cluster.client(second(2)).await;
    let (world, addresses) = (cluster.world.clone(), cluster.addresses.clone());
    let later = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(1600)).await;
        addresses.iter().for_each(|address| world.set(address, Manner::Silent));
    });
    let words = write(&client).await.unwrap_err().to_string();
    later.await.unwrap();
    assert!(words.matches("does not lead").count() == 3 && !words.contains("no answer"), "{words}");
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_is_asked_again_and_refusals_are_answers() {
    let cluster = Cluster::start();
    cluster.manners([Manner::Busy, cluster.names(0), cluster.names(0)]);
    let client = cluster.client(second(10)).await;
    let (world, address) = (cluster.world.clone(), cluster.addresses[0].clone());
    let later = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(300)).await;
        world.set(&address, Manner::Leads);
    });
    stat(&client).await.unwrap();
    later.await.unwrap();
    let error = client.read_link_inode(InodeId(InodeId::ROOT.0 | 2 << 61 | 1)).await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::Invalid), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_past_is_read_from_any_replica() {
    let cluster = Cluster::start();
    let follows = || Manner::Follows(cluster.addresses[0].clone());
    cluster.manners([Manner::Leads, follows(), follows()]);
    let client = cluster.client(second(10)).await;
    let past = ListOptions { at: Time(1), ..ListOptions::default() };
    for _ in 0..9 {
        client.list_inode(InodeId::ROOT, past.clone()).all().await.unwrap();
    }
    let mut asked = cluster.world.asked();
    assert_eq!(asked.len(), 9);
    asked.sort();
    asked.dedup();
    assert_eq!(asked.len(), 3, "spread over the replicas");
    // That a follower answered does not make it the leader.
    stat(&client).await.unwrap();
    assert_eq!(cluster.world.asked(), [cluster.addresses[0].clone()]);
    // One that has not come so far sends on to the leader.
    cluster.manners([Manner::Leads, cluster.names(0), Manner::Names(None)]);
    for _ in 0..6 {
        client.list_inode(InodeId::ROOT, past.clone()).all().await.unwrap();
    }
    assert!(cluster.world.asked().len() <= 18);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_shuckle_will_do_and_without_one_the_map_at_hand() {
    let mut cluster = Cluster::start();
    cluster.manners([Manner::Leads, cluster.names(0), cluster.names(0)]);
    *cluster.world.shuckle_leader.lock().unwrap() = Some(cluster.addresses[2].clone());
    // The first address is nobody's; the second sends on to one that was not listed.
    let nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let shuckle = vec![nobody, cluster.addresses[1].clone()];
    let client = Client::connect(Options { shuckle, ..cluster.options(second(5)) }).await.unwrap();
    assert_eq!(client.stores().await.unwrap().len(), 6);
    // The listed ones are gone: those of the map are asked.
    cluster.kill(1);
    *cluster.world.shuckle_leader.lock().unwrap() = None;
    assert_eq!(client.groups().await.unwrap().len(), 1);
    *cluster.world.shuckle_away.lock().unwrap() = true;
    cluster.manners([cluster.names(2), Manner::Leads, Manner::Leads]);
    let started = Awake::now();
    stat(&client).await.unwrap();
    assert!(started.elapsed() < second(1), "{:?}", started.elapsed());
    let error = client.groups().await.unwrap_err();
    assert!(error.is_unreachable() && error.to_string().contains("away"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn changing_the_cluster_takes_the_secret_and_nothing_else_shows_it() {
    let cluster = Cluster::start();
    let client = cluster.client(second(5)).await;
    let (group, wanted) = (GroupId(1), [StoreId(11), StoreId(12)]);
    client.set_replicas(group, &wanted, Some(StoreId(12)), true).await.unwrap();
    client.drain_host("host-0", false).await.unwrap();
    let admin = std::mem::take(&mut *cluster.world.admin.lock().unwrap());
    assert!(admin.iter().all(|(secret, _)| secret == &SECRET), "{admin:?}");
    let expected = pb::SetReplicas { group: 1, wanted: vec![11, 12], preferred: 12, force: true };
    assert_eq!(admin[0].1, registry_request::Op::SetReplicas(expected));
    assert!(!format!("{:?}", client.options()).contains("9, 9"), "{:?}", client.options());
    let without = Client::connect(Options { secret: None, ..cluster.options(second(5)) }).await.unwrap();
    let error = without.drain_host("host-0", true).await.unwrap_err();
    assert_eq!(error.refusal(), Some(Refusal::PermissionDenied), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_ends_when_it_is_so_or_time_is_up() {
    let cluster = Cluster::start();
    let client = cluster.client(second(5)).await;
    let led = |map: &pb::ClusterMapReply| map.groups[0].alive.then_some(map.groups[0].leader);
    cluster.map_says(None);
    let started = Instant::now();
    assert_eq!(client.wait_for(Duration::from_millis(500), led).await.unwrap(), None);
    assert!(started.elapsed() >= Duration::from_millis(500));
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.wait_for(second(10), led).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.map_says(Some(1));
    assert_eq!(waiting.await.unwrap().unwrap(), Some(12));
}

/// A host that was cut off and is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_back_is_used_within_a_second() {
    let mut cluster = Cluster::start();
    cluster.manners([Manner::Leads, cluster.names(0), cluster.names(0)]);
    let client = cluster.client(second(20)).await;
    stat(&client).await.unwrap();
    cluster.kill(0);
    let asking = tokio::spawn({
        let client = client.clone();
        async move { stat(&client).await }
    });
    tokio::time::sleep(second(2)).await;
    assert!(!asking.is_finished());
    cluster.restart(0);
    let back = Awake::now();
    asking.await.unwrap().unwrap();
    assert!(back.elapsed() < second(1), "{:?}", back.elapsed());
}
