//! What the registry answers: a plain function from request to reply. The transports are thin
//! wrappers around [`Registry::handle`].
//!
//! Both cores are used on the consensus thread only, between its turns: the heartbeats' [`Health`]
//! looks at a request and at the rows of that moment, and what it finds worth logging is proposed
//! there and then. The lock around it is never waited for; it is how the compiler is told. `Health` begins
//! anew whenever this replica begins to lead ([`Registry::role`]): what a former leader heard is gone.
//!
//! Replicas that do not lead answer who does, and `Hello`.

use std::hash::{DefaultHasher, Hasher};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use eggs_consensus::{Applied, ConsensusError, Handle, Role, Views};
use eggs_daemon::Secret;
use eggs_daemon::clock::Stopwatch;
use eggs_machine::{Table, TableError};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::registry_command::Command;
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{ClusterId, RegistryError, ServiceError, SessionId, Time, pb};
use eggs_replica::{Joined, Quorum};
use eggs_shuckle_core::{Health, Step};
use prost::Message;
use tokio::sync::Notify;

use crate::service::GROUP;
use crate::state::Known;

/// What is answered by one that has no cluster. The others tell it by these words from one that is busy.
pub const NO_CLUSTER: &str = "no cluster here yet";

/// How long a request waits for the other replicas: less than the callers wait for the answer.
const AGREE_MAX: Duration = Duration::from_millis(900);
/// How long a page waits for the leader's map.
const ASK_MAX: Duration = Duration::from_millis(1500);

/// Answers requests. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    consensus: Handle,
    secret: Secret,
    cluster: Arc<OnceLock<ClusterId>>,
    quorum: Arc<Quorum>,
    patience: Duration,
    replace_after: Duration,
    /// Who was heard of when is told by this, not by the hybrid clock.
    stopwatch: Stopwatch,
    started: Time,
    health: Arc<Mutex<Health>>,
    /// The planner is to look at once.
    news: Notify,
    /// This store as part of the cluster: how others are asked.
    joined: OnceLock<Joined>,
}

/// What a registry begins with.
#[derive(Debug)]
pub(crate) struct Parts {
    pub consensus: Handle,
    pub secret: Secret,
    pub cluster: Arc<OnceLock<ClusterId>>,
    pub quorum: Arc<Quorum>,
    pub patience: Duration,
    pub replace_after: Duration,
    pub stopwatch: Stopwatch,
    pub health: Arc<Mutex<Health>>,
}

/// What is heard from now on.
pub(crate) fn listening(now: Time, patience: Duration, replace_after: Duration) -> Health {
    Health::new(now, patience).with_replace_after(replace_after)
}

impl Registry {
    pub(crate) fn new(parts: Parts) -> Registry {
        let Parts { consensus, secret, cluster, quorum, patience, replace_after, stopwatch, health } = parts;
        let (news, joined) = (Notify::new(), OnceLock::new());
        let started = stopwatch.now();
        Registry {
            inner: Arc::new(Inner {
                consensus,
                secret,
                cluster,
                quorum,
                patience,
                replace_after,
                stopwatch,
                started,
                health,
                news,
                joined,
            }),
        }
    }

    /// The cluster, once it is known.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.inner.cluster.get().copied()
    }

    /// Whether this replica leads, as far as it knows.
    pub fn leads(&self) -> bool {
        self.inner.consensus.leader(GROUP) == Some(self.inner.consensus.store())
    }

    pub(crate) fn joined(&self, joined: Joined) {
        let _ = self.inner.joined.set(joined);
    }

    /// Answers one request; errors are answers too.
    pub async fn handle(&self, request: pb::RegistryRequest) -> pb::RegistryReply {
        let result = match self.answer(request).await {
            Ok(answer) => answer,
            Err(error) => Answer::Error(error),
        };
        let header = pb::ReplyHeader { version: PROTOCOL_VERSION, time: self.inner.consensus.now().0 };
        pb::RegistryReply { header: Some(header), result: Some(result) }
    }

    async fn answer(&self, request: pb::RegistryRequest) -> Result<Answer, pb::Error> {
        let header = request.header.ok_or_else(|| RegistryError::Malformed.with("no header"))?;
        let op = request.op.ok_or_else(|| RegistryError::Malformed.with("no operation"))?;
        self.check(&header, &op)?;
        let authorized = self.inner.secret.matches(&header.secret);
        metrics::counter!("eggs_shuckle_requests_total", "op" => name(&op)).increment(1);
        match op {
            Op::Hello(_) => self.hello().await.map(Answer::Hello),
            Op::Map(op) if op.with_keys && !authorized => Err(RegistryError::Unauthorized.bare()),
            Op::Map(op) if op.known_version != 0 => self.map_unless(op).await.map(Answer::Map),
            Op::Map(op) => self.map(op.with_keys).await.map(Answer::Map),
            op => self.run(op, authorized).await,
        }
    }

    fn check(&self, header: &pb::RequestHeader, op: &Op) -> Result<(), pb::Error> {
        if header.version != PROTOCOL_VERSION {
            let what = format!("version {}, this registry speaks {PROTOCOL_VERSION}", header.version);
            return Err(RegistryError::UnsupportedVersion.with(what));
        }
        // Who says hello does not know the cluster yet.
        let greeting = matches!(op, Op::Hello(_)) && header.cluster_id.is_empty();
        let cluster = self.cluster().ok_or_else(no_cluster)?;
        if !greeting && header.cluster_id != cluster.0[..] {
            let what = match ClusterId::from_bytes(&header.cluster_id) {
                Some(theirs) => format!("cluster {theirs}, this one is {cluster}"),
                None => format!("no cluster, this one is {cluster}"),
            };
            return Err(RegistryError::WrongCluster.with(what));
        }
        // A clock too far ahead is not believed; the registry has no instants to protect by refusing.
        if header.time != 0 {
            self.inner.consensus.observe(Time(header.time));
        }
        Ok(())
    }

    /// Which cluster this is: anybody knows who has a replica.
    pub(crate) async fn hello(&self) -> Result<pb::HelloReply, pb::Error> {
        let cluster = self.cluster().ok_or_else(no_cluster)?;
        let rows = self
            .inner
            .consensus
            .local(|views: &Views<'_>, _| views.local(GROUP).map_or(Ok(None), eggs_shuckle_core::hello));
        let hello = rows.await.map_err(|error| self.stopping(&error))?.map_err(|error| storage(&error))?;
        let store = self.inner.consensus.store().0;
        let hello = match (hello, self.inner.joined.get()) {
            (Some(hello), _) => hello,
            // It holds no replica of the registry (any more), and knows from the others what it is part of.
            (None, Some(joined)) => pb::HelloReply {
                cluster_id: Bytes::copy_from_slice(&cluster.0),
                version: PROTOCOL_VERSION,
                replicas: joined.registry.replicas(),
                created_at: 0,
                store,
            },
            (None, None) => {
                let what = format!("this replica of cluster {cluster} has no rows yet");
                return Err(RegistryError::Busy.with(what));
            }
        };
        Ok(pb::HelloReply { store: self.inner.consensus.store().0, ..hello })
    }

    /// The cluster map, as of now (RG-8: keys only when they are asked for).
    async fn map(&self, with_keys: bool) -> Result<pb::ClusterMapReply, pb::Error> {
        let (health, stopwatch) = (Arc::clone(&self.inner.health), self.inner.stopwatch);
        let read = move |views: &Views<'_>, _: Time| {
            let view = views.get(GROUP)?;
            let health = health.lock().unwrap_or_else(PoisonError::into_inner);
            Some(health.map(view, stopwatch.now(), with_keys))
        };
        let read = self.inner.consensus.read(vec![GROUP], read);
        match self.agreed(read).await? {
            Some(map) => map.map(versioned).map_err(|error| storage(&error)),
            None => Err(self.not_leader(None).await),
        }
    }

    /// The cluster map as this leader knows it, without asking the others whether it still leads: a group that sleeps
    /// is not woken.
    async fn map_here(&self, with_keys: bool) -> Result<pb::ClusterMapReply, pb::Error> {
        if !self.leads() {
            return Err(self.not_leader(None).await);
        }
        let (health, stopwatch) = (Arc::clone(&self.inner.health), self.inner.stopwatch);
        let read = move |views: &Views<'_>, _: Time| {
            let view = views.local(GROUP)?;
            let health = health.lock().unwrap_or_else(PoisonError::into_inner);
            Some(health.map(view, stopwatch.now(), with_keys))
        };
        match self.agreed(self.inner.consensus.local(read)).await? {
            Some(map) => map.map(versioned).map_err(|error| storage(&error)),
            None => Err(self.not_leader(None).await),
        }
    }

    /// For one who watches: whole, and as of now, only when it is another than the one it knows.
    async fn map_unless(&self, op: pb::ClusterMap) -> Result<pb::ClusterMapReply, pb::Error> {
        let here = self.map_here(op.with_keys).await?;
        if here.version == op.known_version {
            let (now, version) = (here.now, here.version);
            return Ok(pb::ClusterMapReply { now, version, unchanged: true, ..Default::default() });
        }
        self.map(op.with_keys).await
    }

    /// Asks the cores on the consensus thread; what they find worth logging is logged first.
    async fn run(&self, op: Op, authorized: bool) -> Result<Answer, pb::Error> {
        let (health, stopwatch) = (Arc::clone(&self.inner.health), self.inner.stopwatch);
        let prepare = move |view: &dyn Table, _: Time| {
            let mut health = health.lock().unwrap_or_else(PoisonError::into_inner);
            match health.request(view, &op, authorized, stopwatch.now()) {
                Ok(Step::Log(command)) => Ok(command.encode_to_vec().into()),
                Ok(Step::Answer(answer)) => Err(encode(answer)),
                Err(error) => Err(encode(Answer::Error(storage(&error)))),
            }
        };
        let applied = self.agreed(self.inner.consensus.write(GROUP, SessionId(0), 0, prepare)).await?;
        if matches!(applied, Applied::Reply(_)) {
            self.inner.news.notify_one();
        }
        decode(applied)
    }

    /// What comes of asking the consensus, in time.
    async fn agreed<R>(
        &self,
        asked: impl Future<Output = Result<R, ConsensusError>>,
    ) -> Result<R, pb::Error> {
        match tokio::time::timeout(AGREE_MAX, asked).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(ConsensusError::NotLeader { leader })) => Err(self.not_leader(leader).await),
            Ok(Err(error)) => Err(self.stopping(&error)),
            Err(_) => {
                let why = self.inner.quorum.missing(GROUP).await;
                let why = why.unwrap_or_else(|| "its replicas do not agree in time".to_owned());
                Err(RegistryError::Busy.with(format_args!("the registry: {why}")))
            }
        }
    }

    async fn not_leader(&self, leader: Option<String>) -> pb::Error {
        let leader = leader.or_else(|| self.inner.consensus.leader_address(GROUP)).unwrap_or_default();
        // What the map says of a leader the replica here does not hear is old.
        let unheard = leader.is_empty() || !self.inner.consensus.hears_leader(GROUP);
        let why = if unheard { self.inner.quorum.unled(GROUP).await } else { None };
        let error = match why {
            Some(why) => RegistryError::NotLeader.with(format_args!("the registry: {why}")),
            None => RegistryError::NotLeader.bare(),
        };
        pb::Error { leader, ..error }
    }

    fn stopping(&self, error: &ConsensusError) -> pb::Error {
        match error {
            ConsensusError::NotLeader { .. } => RegistryError::NotLeader.bare(),
            ConsensusError::Busy => RegistryError::Busy.bare(),
            ConsensusError::Stopped => RegistryError::Busy.with("the registry is stopping"),
            ConsensusError::Storage(error) | ConsensusError::Damaged(error) => {
                RegistryError::Internal.with(error)
            }
        }
    }

    // ---- leading ----

    /// This replica's role has changed: the consensus thread says so before anything is asked of a new leader.
    pub(crate) fn role(health: &Mutex<Health>, role: Role, begin: impl FnOnce() -> Health) {
        if matches!(role, Role::Leader { .. }) {
            *health.lock().unwrap_or_else(PoisonError::into_inner) = begin();
        }
    }

    /// Waits until the planner should look.
    pub(crate) async fn news(&self) {
        self.inner.news.notified().await;
    }

    /// Plans, and logs what is planned.
    pub(crate) async fn plan(&self) -> Result<(), pb::Error> {
        if !self.leads() {
            return Ok(());
        }
        let (health, stopwatch) = (Arc::clone(&self.inner.health), self.inner.stopwatch);
        let prepare = move |view: &dyn Table, _: Time| {
            let health = health.lock().unwrap_or_else(PoisonError::into_inner);
            match eggs_shuckle_core::plan(view, &health, stopwatch.now()) {
                Ok(groups) if groups.is_empty() => Err(encode(Answer::Registered(pb::Registered {}))),
                Ok(groups) => {
                    let command = Some(Command::PutGroups(pb::PutGroups { groups }));
                    Ok(pb::RegistryCommand { command }.encode_to_vec().into())
                }
                Err(error) => Err(encode(Answer::Error(storage(&error)))),
            }
        };
        let applied = self.agreed(self.inner.consensus.write(GROUP, SessionId(0), 0, prepare)).await?;
        if matches!(applied, Applied::Reply(_)) {
            tracing::info!("who is to replicate or lead what has changed");
        }
        match decode(applied)? {
            Answer::Error(error) => Err(error),
            _ => Ok(()),
        }
    }

    // ---- the dashboard ----

    /// The cluster as it is now, for the dashboard: the leader's map, here or there; without one, what was
    /// heard last, and why there is no more.
    ///
    /// # Errors
    /// This shuckle is not part of a cluster yet, or stops.
    pub async fn known(&self) -> Result<Known, pb::Error> {
        let cluster = self.cluster().ok_or_else(no_cluster)?;
        // One that has joined and waits for its replica knows less.
        let hello = self.hello().await.unwrap_or_default();
        let (map, trouble) = match self.current_map().await {
            Ok(map) => (map, None),
            Err(error) => (self.last_map().await?, Some(error.message)),
        };
        Ok(self.knows(cluster, &hello, map, trouble))
    }

    /// The cluster as this leader knows it, for its gauges; `None`: it does not lead.
    pub(crate) async fn known_here(&self) -> Option<Known> {
        let (cluster, hello) = (self.cluster()?, self.hello().await.ok()?);
        let map = self.map_here(false).await.ok()?;
        Some(self.knows(cluster, &hello, map, None))
    }

    fn knows(
        &self,
        cluster: ClusterId,
        hello: &pb::HelloReply,
        map: pb::ClusterMapReply,
        trouble: Option<String>,
    ) -> Known {
        Known {
            cluster,
            created_at: Time(hello.created_at),
            uptime: self.inner.stopwatch.now().since(self.inner.started),
            leads: self.leads(),
            leader: self.leader(),
            now: Time(map.now),
            map,
            trouble,
        }
    }

    /// HOST:PORT of who leads; empty: nobody, or this one.
    fn leader(&self) -> String {
        self.inner.consensus.leader_address(GROUP).unwrap_or_default()
    }

    async fn current_map(&self) -> Result<pb::ClusterMapReply, pb::Error> {
        let error = match self.map(false).await {
            Ok(map) => return Ok(map),
            Err(error) => error,
        };
        let Some(joined) = self.inner.joined.get() else { return Err(error) };
        match tokio::time::timeout(ASK_MAX, joined.registry.map(false)).await {
            Ok(Ok(map)) => Ok(map),
            Ok(Err(_)) | Err(_) => {
                let why = self.inner.quorum.missing(GROUP).await;
                let why = why.unwrap_or_else(|| "no replica of it leads".to_owned());
                Err(pb::Error { message: format!("the registry cannot be asked: {why}"), ..error })
            }
        }
    }

    /// The last that was heard; without that, what the rows here say.
    pub(crate) async fn last_map(&self) -> Result<pb::ClusterMapReply, pb::Error> {
        if let Some(map) = self.inner.joined.get().map(|joined| joined.map.get()).filter(|map| map.now != 0) {
            return Ok((*map).clone());
        }
        let now = self.inner.stopwatch.now();
        let (patience, replace_after) = (self.inner.patience, self.inner.replace_after);
        let rows = self.inner.consensus.local(move |views: &Views<'_>, _| {
            let health = listening(now, patience, replace_after);
            views.local(GROUP).map_or(Ok(pb::ClusterMapReply::default()), |view| health.map(view, now, false))
        });
        rows.await.map_err(|error| self.stopping(&error))?.map_err(|error| storage(&error))
    }
}

/// The map with its version.
fn versioned(map: pb::ClusterMapReply) -> pb::ClusterMapReply {
    let mut hasher = DefaultHasher::new();
    hasher.write_u32(map.replicas);
    hasher.write_u32(map.crossdir_transactions);
    for transaction in &map.slow_transactions {
        hasher.write(&transaction.encode_length_delimited_to_vec());
    }
    for store in &map.stores {
        let store = pb::StoreInfo { last_seen: 0, clock_offset: 0, ..store.clone() };
        hasher.write(&store.encode_length_delimited_to_vec());
    }
    for group in &map.groups {
        let group = pb::GroupPlace { last_seen: 0, ..group.clone() };
        hasher.write(&group.encode_length_delimited_to_vec());
    }
    for service in &map.block_services {
        let available_bytes = about(service.available_bytes);
        let service = pb::BlockServiceInfo { last_seen: 0, available_bytes, ..service.clone() };
        hasher.write(&service.encode_length_delimited_to_vec());
    }
    if let Some(janitor) = &map.janitor {
        let janitor = pb::JanitorInfo { last_seen: 0, ..janitor.clone() };
        hasher.write(&janitor.encode_length_delimited_to_vec());
    }
    for job in &map.jobs {
        hasher.write(&job.encode_length_delimited_to_vec());
    }
    pb::ClusterMapReply { version: hasher.finish().max(1), ..map }
}

/// The highest seven bits. Others write to the file systems of disks too: without this every heartbeat would make another
/// map for everybody who watches.
fn about(bytes: u64) -> u64 {
    let low = (u64::BITS - bytes.leading_zeros()).saturating_sub(7);
    bytes >> low << low
}

fn no_cluster() -> pb::Error {
    RegistryError::Busy.with(NO_CLUSTER)
}

fn encode(answer: Answer) -> Bytes {
    pb::RegistryReply { header: None, result: Some(answer) }.encode_to_vec().into()
}

pub(crate) fn decode(applied: Applied) -> Result<Answer, pb::Error> {
    let reply = match applied {
        Applied::Reply(reply) | Applied::Refused(reply) => reply,
        Applied::Stale => return Err(RegistryError::Internal.with("a session where none is used")),
    };
    let reply = pb::RegistryReply::decode(reply).map_err(|error| RegistryError::Internal.with(error))?;
    reply.result.ok_or_else(|| RegistryError::Internal.with("an empty reply"))
}

fn storage(error: &TableError) -> pb::Error {
    tracing::error!(%error, "registry rows cannot be read");
    RegistryError::Internal.with(error)
}

fn name(op: &Op) -> &'static str {
    match op {
        Op::Hello(_) => "hello",
        Op::Map(_) => "map",
        Op::ReportBlocks(_) => "report_blocks",
        Op::SetFlags(_) => "set_flags",
        Op::RegisterStore(_) => "register_store",
        Op::RegisterBlockServices(_) => "register_block_services",
        Op::SetReplicas(_) => "set_replicas",
        Op::DrainHost(_) => "drain_host",
        Op::RegisterJanitor(_) => "register_janitor",
        Op::ListBadBlocks(_) => "list_bad_blocks",
        Op::PutJob(_) => "put_job",
        Op::ForgetBlockServices(_) => "forget_block_services",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_another_when_something_is_and_not_for_a_little_less_room() {
        let map = |available_bytes, used_bytes| {
            let service = pb::BlockServiceInfo { id: 1, available_bytes, used_bytes, ..Default::default() };
            let map = pb::ClusterMapReply { block_services: vec![service], ..Default::default() };
            versioned(map).version
        };
        let large = 250 << 30;
        assert_eq!(map(large, 0), map(large + (1 << 29), 0));
        assert_ne!(map(large, 0), map(large, 1));
        assert_ne!(map(large, 0), map(large + (1 << 33), 0));
        // Near the end every byte counts.
        for room in 0..128 {
            assert_ne!(map(room, 0), map(room + 1, 0), "{room}");
        }
        assert_eq!(about(u64::MAX), 127 << 57);
    }
}
