//! Daemons as clients of shuckle: joining the cluster, heartbeats, watching the cluster map.
//!
//! Shuckle is a list of addresses: one of its replicas leads and answers, the others say who does. A call
//! tries whoever led last, follows the hints of those who do not, and goes through all addresses it was
//! given or has learned from the map, until its time is over.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use eggs_proto::limits::{HEARTBEAT_INTERVAL, MESSAGE_BYTES_MAX, PROTOCOL_VERSION, STALE_AFTER};
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::pb::registry_service_client::RegistryServiceClient;
use eggs_proto::{ClusterId, RegistryError, Retry, ServiceError, pb};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::channel::{self, AddressError};
use crate::clock;
use crate::secret::Secret;

/// Between tries until the first success.
const RETRY: Duration = Duration::from_millis(50);
/// Between looks at a map that has just changed.
const EAGER: Duration = Duration::from_millis(100);
/// Between looks at a map that has not changed for long: whoever finds it wrong asks for a fresh one.
const AT_REST: Duration = Duration::from_secs(5);
/// How long one call goes on trying.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// How long one replica may take to answer before another is tried.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);
/// Hints followed before all addresses are gone through once more: two replicas may name each other.
const HINTS_MAX: usize = 4;
/// Addresses learned from the map: a cluster has at most five replicas, and one or two in exchange.
const LEARNED_MAX: usize = 16;
/// Failures are silent that long: daemons start in any order, and an election takes a while.
const SILENCE: Duration = Duration::from_secs(3);
/// A store or disk that was restarted elsewhere is refused for as long as shuckle believes the one before to be there.
const CONFLICT_MAX: Duration = STALE_AFTER.saturating_add(Duration::from_secs(2));
/// A shuckle that stays away is logged this often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);

/// A call to shuckle failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryCallError {
    /// It cannot be reached, or broke off.
    #[error("shuckle at {address} cannot be reached: {reason}")]
    Unreachable { address: String, reason: String },
    /// It answered, and refused.
    #[error("shuckle at {address} refused: {}", error.message)]
    Refused { address: String, error: pb::Error },
    /// It answered something else than was asked.
    #[error("shuckle at {address} does not speak this protocol: {reason}")]
    Nonsense { address: String, reason: String },
}

impl RegistryCallError {
    /// Another replica, or this one in a while, may answer.
    fn may_pass(&self) -> bool {
        match self {
            RegistryCallError::Unreachable { .. } => true,
            RegistryCallError::Nonsense { .. } => false,
            RegistryCallError::Refused { error, .. } => {
                RegistryError::from_code(error.code).is_some_and(|error| error.retry() != Retry::Never)
            }
        }
    }

    /// Another one is there under this name.
    fn is_conflict(&self) -> bool {
        matches!(self, RegistryCallError::Refused { error, .. } if error.code == RegistryError::Conflict.code())
    }

    /// Who leads, as whoever refused knows.
    fn leader(&self) -> Option<&str> {
        match self {
            RegistryCallError::Refused { error, .. } if !error.leader.is_empty() => Some(&error.leader),
            _ => None,
        }
    }

    /// Asking again cannot help: the daemon is set up wrongly.
    pub fn is_fatal(&self) -> bool {
        match self {
            RegistryCallError::Unreachable { .. } => false,
            RegistryCallError::Nonsense { .. } => true,
            RegistryCallError::Refused { error, .. } => matches!(
                RegistryError::from_code(error.code),
                Some(
                    RegistryError::WrongCluster
                        | RegistryError::Unauthorized
                        | RegistryError::UnsupportedVersion
                        | RegistryError::Malformed
                        | RegistryError::Conflict
                )
            ),
        }
    }
}

/// Why a daemon is not part of a cluster.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error(transparent)]
    Call(#[from] RegistryCallError),
    /// Its data belongs to another cluster.
    #[error(
        "shuckle at {address} serves cluster {theirs}, but the data here belongs to cluster {ours}: \
             give the right --shuckle, or other data"
    )]
    AnotherCluster { address: String, theirs: ClusterId, ours: ClusterId },
    #[error("no address of shuckle was given")]
    NoAddress,
    #[error("stopped while waiting for shuckle at {address}")]
    Stopped { address: String },
}

/// A client of the cluster's shuckle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    replicas: Arc<Replicas>,
    secret: Option<Secret>,
    cluster: ClusterId,
    wanted: u32,
}

impl Registry {
    /// Asks the shuckles at `addresses` for the cluster's id, until one answers or `stop`.
    ///
    /// # Errors
    /// Fatal ones: not an address, another cluster than `expected`, another protocol.
    pub async fn join(
        addresses: &[String],
        secret: Option<Secret>,
        expected: Option<ClusterId>,
        stop: &CancellationToken,
    ) -> Result<Registry, JoinError> {
        let replicas = Arc::new(Replicas::new(addresses)?);
        let header = pb::RequestHeader {
            version: PROTOCOL_VERSION,
            time: clock::wall().0,
            ..pb::RequestHeader::default()
        };
        let mut complaints = Complaints::default();
        loop {
            let round = tokio::select! {
                round = replicas.round(&header, &Op::Hello(pb::Hello {})) => round,
                () = stop.cancelled() => return Err(JoinError::Stopped { address: replicas.to_string() }),
            };
            match round {
                Ok((address, Answer::Hello(hello))) => {
                    let theirs = ClusterId::from_bytes(&hello.cluster_id)
                        .ok_or_else(|| nonsense(&address, "its cluster id is not one"))?;
                    if let Some(ours) = expected.filter(|&ours| ours != theirs) {
                        return Err(JoinError::AnotherCluster { address, theirs, ours });
                    }
                    return Ok(Registry { replicas, secret, cluster: theirs, wanted: hello.replicas.max(1) });
                }
                Ok((address, _)) => {
                    return Err(nonsense(&address, "it answered something else than hello").into());
                }
                Err(error) if error.is_fatal() => return Err(error.into()),
                Err(error) => complaints.log(&error),
            }
            if sleep(jittered(RETRY), stop).await.is_err() {
                return Err(JoinError::Stopped { address: replicas.to_string() });
            }
        }
    }

    /// Waits until shuckle has taken the secret, or `stop`: before anything is made that only a member may make.
    ///
    /// # Errors
    /// It is not the cluster's, or none was given.
    pub async fn check_secret(&self, stop: &CancellationToken) -> Result<(), JoinError> {
        let mut complaints = Complaints::default();
        loop {
            let answered = tokio::select! {
                answered = self.map(true) => answered,
                () = stop.cancelled() => return Err(JoinError::Stopped { address: self.addresses() }),
            };
            match answered {
                Ok(_) => return Ok(()),
                Err(error) if error.is_fatal() => return Err(error.into()),
                Err(error) => complaints.log(&error),
            }
            if sleep(jittered(RETRY), stop).await.is_err() {
                return Err(JoinError::Stopped { address: self.addresses() });
            }
        }
    }

    /// The cluster this daemon is part of.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// How many replicas every group of the cluster is to have, as of the joining.
    pub fn replicas(&self) -> u32 {
        self.wanted
    }

    /// Where it was told shuckle is, for people.
    pub fn addresses(&self) -> String {
        self.replicas.to_string()
    }

    fn header(&self) -> pb::RequestHeader {
        pb::RequestHeader {
            version: PROTOCOL_VERSION,
            time: clock::wall().0,
            cluster_id: Bytes::copy_from_slice(&self.cluster.0),
            secret: self.secret.as_ref().map(Secret::to_bytes).unwrap_or_default(),
            ..pb::RequestHeader::default()
        }
    }

    /// One request, to whoever leads; tried for a few seconds.
    ///
    /// # Errors
    /// Not reached, or refused.
    pub async fn call(&self, op: Op) -> Result<Answer, RegistryCallError> {
        let deadline = Instant::now() + CALL_TIMEOUT;
        let mut pause = RETRY;
        loop {
            let round = tokio::time::timeout_at(deadline, self.round(&op)).await;
            let error = match round {
                Ok(Err(error)) if error.may_pass() => error,
                Ok(result) => return result,
                Err(_) => return Err(self.replicas.silent()),
            };
            pause = (pause * 2).min(EAGER * 4);
            let next = Instant::now() + jittered(pause);
            if next >= deadline {
                return Err(error);
            }
            tokio::time::sleep_until(next).await;
        }
    }

    /// One request to each replica at most, but for hints.
    async fn round(&self, op: &Op) -> Result<Answer, RegistryCallError> {
        let answered = self.replicas.round(&self.header(), op).await.map(|(_, answer)| answer);
        answered.map_err(|error| match error {
            RegistryCallError::Refused { address, mut error }
                if error.code == RegistryError::Unauthorized.code() =>
            {
                error.message = self.about_secret();
                RegistryCallError::Refused { address, error }
            }
            error => error,
        })
    }

    /// What is wrong when shuckle says that a secret is required: it does not say whether it was shown one.
    fn about_secret(&self) -> String {
        match &self.secret {
            None => "a cluster secret is required: --secret-file".to_owned(),
            Some(secret) => format!("{secret} is not this cluster's"),
        }
    }

    /// The cluster map.
    ///
    /// # Errors
    /// As [`call`](Registry::call).
    pub async fn map(&self, with_keys: bool) -> Result<pb::ClusterMapReply, RegistryCallError> {
        let op = Op::Map(pb::ClusterMap { with_keys, known_version: 0 });
        self.learned(self.call(op).await?)
    }

    /// The map in an answer; where shuckle is now is remembered.
    fn learned(&self, answer: Answer) -> Result<pb::ClusterMapReply, RegistryCallError> {
        match answer {
            Answer::Map(map) => {
                if !map.unchanged {
                    self.replicas.learn(&map);
                }
                Ok(map)
            }
            _ => Err(nonsense(&self.addresses(), "it answered something else than a map")),
        }
    }

    /// Registers with what `report` says: at once, again soon until shuckle has taken it (`registered`
    /// is called then, once), and then every [`HEARTBEAT_INTERVAL`] until `stop`.
    ///
    /// # Errors
    /// What no retry helps against: [`RegistryCallError::is_fatal`]; that another store is in the place of this
    /// one only when that one does not go away.
    pub async fn heartbeat<F: Future<Output = Op>>(
        &self,
        report: impl FnMut() -> F,
        registered: impl FnOnce(),
        stop: CancellationToken,
    ) -> Result<(), RegistryCallError> {
        self.heartbeat_with_news(report, registered, &Notify::new(), stop).await
    }

    /// As [`heartbeat`](Registry::heartbeat), and also soon after each `news`: there is something to say that others wait for.
    ///
    /// # Errors
    /// As [`heartbeat`](Registry::heartbeat).
    pub async fn heartbeat_with_news<F: Future<Output = Op>>(
        &self,
        report: impl FnMut() -> F,
        registered: impl FnOnce(),
        news: &Notify,
        stop: CancellationToken,
    ) -> Result<(), RegistryCallError> {
        self.beat(report, registered, |_| false, news, stop).await
    }

    /// As [`heartbeat`](Registry::heartbeat); `answered` is told of each answer, and of a refusal what shuckle says.
    /// It says whether the next report is another, to be sent at once.
    ///
    /// # Errors
    /// As [`heartbeat`](Registry::heartbeat).
    pub async fn heartbeat_with_answers<F: Future<Output = Op>>(
        &self,
        report: impl FnMut() -> F,
        registered: impl FnOnce(),
        answered: impl FnMut(Option<&pb::Error>) -> bool,
        stop: CancellationToken,
    ) -> Result<(), RegistryCallError> {
        self.beat(report, registered, answered, &Notify::new(), stop).await
    }

    async fn beat<F: Future<Output = Op>>(
        &self,
        mut report: impl FnMut() -> F,
        registered: impl FnOnce(),
        mut answered: impl FnMut(Option<&pb::Error>) -> bool,
        news: &Notify,
        stop: CancellationToken,
    ) -> Result<(), RegistryCallError> {
        let mut complaints = Complaints::default();
        let mut registered = Some(registered);
        let started = Instant::now();
        loop {
            // What is reported is of now: a round that failed is not repeated but made anew.
            let op = report().await;
            let result = match self.round(&op).await {
                Ok(Answer::Registered(_)) => Ok(()),
                Ok(_) => Err(nonsense(&self.addresses(), "it answered something else than a registration")),
                Err(error) => Err(error),
            };
            let anew = match &result {
                Ok(()) => answered(None),
                Err(RegistryCallError::Refused { error, .. }) => answered(Some(error)),
                Err(_) => false,
            };
            if anew && result.is_err() {
                continue;
            }
            // Whoever is refused as another one's copy asks again, but not in a hurry.
            let unhurried = result.as_ref().map_or_else(RegistryCallError::is_conflict, |()| true);
            match result {
                Ok(()) => {
                    complaints = Complaints::default();
                    if let Some(registered) = registered.take() {
                        registered();
                    }
                }
                // Once part of the cluster, a daemon is not ended by what shuckle says while it is replaced or
                // upgraded: it goes on serving.
                Err(error)
                    if registered.is_some()
                        && error.is_fatal()
                        && !(error.is_conflict()
                            && matches!(op, Op::RegisterStore(_) | Op::RegisterBlockServices(_))
                            && started.elapsed() < CONFLICT_MAX) =>
                {
                    return Err(error);
                }
                Err(error) => complaints.log(&error),
            }
            let pause = match registered {
                Some(_) => jittered(RETRY),
                None if unhurried => HEARTBEAT_INTERVAL,
                // Between two leaders: the next one does not know yet who is there.
                None => jittered(EAGER),
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = async {
                    news.notified().await;
                    // News come in bursts: many groups change hands at once.
                    tokio::time::sleep(EAGER.min(pause)).await;
                } => {}
                () = stop.cancelled() => return Ok(()),
            }
        }
    }

    /// Starts watching the cluster map; the watch is empty (default) until the first answer.
    pub fn watch(&self, with_keys: bool, stop: CancellationToken) -> MapWatch {
        let (sender, receiver) = watch::channel(Arc::new(pb::ClusterMapReply::default()));
        let refresh = Arc::new(Notify::new());
        let task = tokio::spawn(watch_map(self.clone(), with_keys, sender, Arc::clone(&refresh), stop));
        MapWatch { receiver, refresh, _task: Arc::new(AbortOnDrop(task)) }
    }
}

/// The cluster map as last heard. Cheap to clone; the watching ends with the last clone.
#[derive(Debug, Clone)]
pub struct MapWatch {
    receiver: watch::Receiver<Arc<pb::ClusterMapReply>>,
    refresh: Arc<Notify>,
    _task: Arc<AbortOnDrop>,
}

impl MapWatch {
    /// The last map.
    pub fn get(&self) -> Arc<pb::ClusterMapReply> {
        Arc::clone(&self.receiver.borrow())
    }

    /// Asks for a fresh map now: what it says turned out wrong.
    pub fn refresh(&self) {
        self.refresh.notify_one();
    }

    /// Waits for the next map. False when watching has ended.
    pub async fn changed(&mut self) -> bool {
        self.receiver.changed().await.is_ok()
    }

    /// For those who want to wait in their own way.
    pub fn receiver(&self) -> watch::Receiver<Arc<pb::ClusterMapReply>> {
        self.receiver.clone()
    }
}

#[derive(Debug)]
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn watch_map(
    registry: Registry,
    with_keys: bool,
    sender: watch::Sender<Arc<pb::ClusterMapReply>>,
    refresh: Arc<Notify>,
    stop: CancellationToken,
) {
    let mut complaints = Complaints::default();
    let mut heard = false;
    // A cluster that is coming up changes quickly: look again soon after a change, later at rest.
    let mut pause = EAGER;
    loop {
        let known_version = sender.borrow().version;
        let answer = registry.round(&Op::Map(pb::ClusterMap { with_keys, known_version })).await;
        match answer.and_then(|answer| registry.learned(answer)) {
            Ok(map) if map.unchanged => {
                complaints = Complaints::default();
                pause = (pause * 2).min(AT_REST);
            }
            Ok(map) => {
                complaints = Complaints::default();
                let same = heard && same_members(&sender.borrow(), &map);
                pause = if same { (pause * 2).min(AT_REST) } else { EAGER };
                heard = true;
                sender.send_replace(Arc::new(map));
            }
            Err(error) => {
                complaints.log(&error);
                pause = jittered(if heard { EAGER } else { RETRY });
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = async {
                refresh.notified().await;
                // Many callers may find the same thing wrong at once.
                tokio::time::sleep(RETRY).await;
            } => {}
            () = stop.cancelled() => return,
        }
    }
}

/// The same daemons, groups and disks in the same condition; loads, counters and times aside.
pub fn same_members(a: &pb::ClusterMapReply, b: &pb::ClusterMapReply) -> bool {
    let disk = |info: &pb::BlockServiceInfo| (info.id, info.flags, info.address.clone());
    same_groups(a, b)
        && a.stores.iter().map(|store| store.alive).eq(b.stores.iter().map(|store| store.alive))
        && a.groups.iter().map(|group| group.alive).eq(b.groups.iter().map(|group| group.alive))
        && a.block_services.iter().map(disk).eq(b.block_services.iter().map(disk))
}

/// The same stores at the same places, and the same groups with the same members and leaders, there and wanted.
pub fn same_groups(a: &pb::ClusterMapReply, b: &pb::ClusterMapReply) -> bool {
    let store = |a: &pb::StoreInfo, b: &pb::StoreInfo| {
        a.id == b.id
            && a.kind == b.kind
            && a.host == b.host
            && a.address == b.address
            && a.draining == b.draining
    };
    let group = |a: &pb::GroupPlace, b: &pb::GroupPlace| {
        a.group == b.group
            && a.leader == b.leader
            && a.conf_index == b.conf_index
            && a.preferred == b.preferred
            && a.voters == b.voters
            && a.learners == b.learners
            && a.wanted == b.wanted
            && a.founding == b.founding
    };
    a.replicas == b.replicas
        && a.stores.len() == b.stores.len()
        && a.groups.len() == b.groups.len()
        && a.stores.iter().zip(&b.stores).all(|(a, b)| store(a, b))
        && a.groups.iter().zip(&b.groups).all(|(a, b)| group(a, b))
}

/// Shuckle's replicas as far as they are known.
#[derive(Debug)]
struct Replicas {
    /// As set: never empty, never changed.
    given: Vec<String>,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    /// From the map: where shuckle's stores are now.
    learned: Vec<String>,
    /// Who answered last.
    leader: Option<String>,
    clients: BTreeMap<String, RegistryServiceClient<Channel>>,
}

impl std::fmt::Display for Replicas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.given.join(", "))
    }
}

impl Replicas {
    fn new(addresses: &[String]) -> Result<Replicas, JoinError> {
        let mut replicas = Replicas { given: Vec::new(), book: Mutex::default() };
        for address in addresses {
            replicas.client(address)?;
            if !replicas.given.contains(address) {
                replicas.given.push(address.clone());
            }
        }
        if replicas.given.is_empty() {
            return Err(JoinError::NoAddress);
        }
        Ok(replicas)
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn learn(&self, map: &pb::ClusterMapReply) {
        let shuckles = map.stores.iter().filter(|store| store.kind == pb::StoreKind::StoreShuckle as i32);
        let mut learned: Vec<String> = shuckles.map(|store| store.address.clone()).collect();
        learned.truncate(LEARNED_MAX);
        let mut book = self.book();
        if book.learned != learned {
            let Book { clients, .. } = &mut *book;
            clients.retain(|address, _| self.given.contains(address) || learned.contains(address));
            book.learned = learned;
        }
    }

    /// Whom to ask, in this order: who led last, those that the map names, those that were given.
    fn candidates(&self) -> Vec<String> {
        let book = self.book();
        let mut candidates: Vec<String> = Vec::new();
        for address in book.leader.iter().chain(&book.learned).chain(&self.given) {
            if !candidates.contains(address) {
                candidates.push(address.clone());
            }
        }
        candidates
    }

    fn client(&self, address: &str) -> Result<RegistryServiceClient<Channel>, AddressError> {
        let mut book = self.book();
        if let Some(client) = book.clients.get(address) {
            return Ok(client.clone());
        }
        let client = RegistryServiceClient::new(channel::connect(address)?)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        if book.clients.len() < LEARNED_MAX * 2 {
            book.clients.insert(address.to_owned(), client.clone());
        }
        Ok(client)
    }

    /// Asks each candidate once, and those that are named as the leader first, until one answers.
    async fn round(
        &self,
        header: &pb::RequestHeader,
        op: &Op,
    ) -> Result<(String, Answer), RegistryCallError> {
        let mut left = self.candidates();
        left.reverse();
        let mut hints = 0;
        let mut silent: Vec<String> = Vec::new();
        let mut failure: Option<RegistryCallError> = None;
        while let Some(address) = left.pop() {
            let answered = match self.client(&address) {
                Ok(client) => call(&address, client, header.clone(), op.clone()).await,
                Err(_) => continue,
            };
            let error = match answered {
                Ok(answer) => {
                    self.book().leader = Some(address.clone());
                    return Ok((address, answer));
                }
                Err(error) if !error.may_pass() => return Err(error),
                Err(error) => error,
            };
            if matches!(error, RegistryCallError::Unreachable { .. }) {
                silent.push(address.clone());
            }
            if let Some(leader) = error.leader()
                && leader != address
                && !silent.iter().any(|silent| silent == leader)
                && hints < HINTS_MAX
            {
                hints += 1;
                left.retain(|other| other != leader);
                left.push(leader.to_owned());
            }
            // "Not the leader" says less than why the leader cannot be reached.
            failure = Some(match failure {
                Some(earlier @ RegistryCallError::Unreachable { .. }) => earlier,
                _ => error,
            });
        }
        self.book().leader = None;
        Err(failure.unwrap_or_else(|| self.silent()))
    }

    fn silent(&self) -> RegistryCallError {
        let reason = format!("no answer within {} s", CALL_TIMEOUT.as_secs());
        RegistryCallError::Unreachable { address: self.to_string(), reason }
    }
}

async fn call(
    address: &str,
    mut client: RegistryServiceClient<Channel>,
    header: pb::RequestHeader,
    op: Op,
) -> Result<Answer, RegistryCallError> {
    let unreachable = |reason: String| RegistryCallError::Unreachable { address: address.to_owned(), reason };
    let request = pb::RegistryRequest { header: Some(header), op: Some(op) };
    let reply = tokio::time::timeout(ATTEMPT_TIMEOUT, client.call(request))
        .await
        .map_err(|_| unreachable(format!("no answer within {} s", ATTEMPT_TIMEOUT.as_secs())))?
        .map_err(|status| match status.code() {
            tonic::Code::Unimplemented => nonsense(address, "it is not a shuckle"),
            _ => unreachable(reason(&status)),
        })?;
    match reply.into_inner().result {
        Some(Answer::Error(error)) => Err(RegistryCallError::Refused { address: address.to_owned(), error }),
        Some(answer) => Ok(answer),
        None => Err(nonsense(address, "an empty answer")),
    }
}

/// The innermost cause: "connection refused" says more than "transport error".
fn reason(status: &tonic::Status) -> String {
    let mut cause: &dyn std::error::Error = status;
    while let Some(source) = cause.source() {
        cause = source;
    }
    if std::ptr::eq(std::ptr::from_ref(cause).cast::<()>(), std::ptr::from_ref(status).cast::<()>()) {
        status.message().to_owned()
    } else {
        cause.to_string()
    }
}

fn nonsense(address: &str, reason: &str) -> RegistryCallError {
    RegistryCallError::Nonsense { address: address.to_owned(), reason: reason.to_owned() }
}

async fn sleep(pause: Duration, stop: &CancellationToken) -> Result<(), ()> {
    tokio::select! {
        () = tokio::time::sleep(pause) => Ok(()),
        () = stop.cancelled() => Err(()),
    }
}

/// Half as long to half as much again: those who failed together do not come back together.
fn jittered(pause: Duration) -> Duration {
    let random = getrandom::u32().unwrap_or(u32::MAX / 2);
    pause.mul_f64(0.5 + f64::from(random) / f64::from(u32::MAX))
}

/// Logs a failure that repeats when it has lasted a while and then now and then, not every time.
#[derive(Debug, Default)]
struct Complaints {
    since: Option<Instant>,
    last: Option<Instant>,
}

impl Complaints {
    fn log(&mut self, error: &RegistryCallError) {
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        let due = match self.last {
            None => now - since >= SILENCE,
            Some(last) => now - last >= COMPLAIN_EVERY,
        };
        if due {
            tracing::warn!(%error, "waiting for shuckle");
            self.last = Some(now);
        }
    }
}
