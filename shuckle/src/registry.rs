//! What the registry answers: a plain function from request to reply. The transports are thin
//! wrappers around [`Registry::handle`].
//!
//! Both cores are used on the consensus thread only, between its turns: the heartbeats' [`Health`]
//! looks at a request and at the rows of that moment, and what it finds worth logging is proposed
//! there and then. The lock around it is never waited for; it is how the compiler is told.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use eggs_consensus::{Applied, ConsensusError, Handle};
use eggs_daemon::Secret;
use eggs_daemon::clock::Stopwatch;
use eggs_machine::{Table, TableError};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{ClusterId, RegistryError, ServiceError, SessionId, Time, pb};
use eggs_shuckle_core::{Health, Step};
use prost::Message;

use crate::service::GROUP;
use crate::state::Known;

/// Answers requests. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    consensus: Handle,
    secret: Secret,
    cluster: ClusterId,
    created_at: Time,
    /// Who was heard of when is told by this, not by the hybrid clock.
    stopwatch: Stopwatch,
    started: Time,
    health: Arc<Mutex<Health>>,
}

impl Registry {
    pub(crate) fn new(
        consensus: Handle,
        secret: Secret,
        cluster: ClusterId,
        created_at: Time,
        patience: Duration,
    ) -> Registry {
        let stopwatch = Stopwatch::start();
        let started = stopwatch.now();
        let health = Arc::new(Mutex::new(Health::new(started, patience)));
        Registry {
            inner: Arc::new(Inner { consensus, secret, cluster, created_at, stopwatch, started, health }),
        }
    }

    pub fn cluster(&self) -> ClusterId {
        self.inner.cluster
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
        self.run(op, authorized).await
    }

    fn check(&self, header: &pb::RequestHeader, op: &Op) -> Result<(), pb::Error> {
        if header.version != PROTOCOL_VERSION {
            let what = format!("version {}, this registry speaks {PROTOCOL_VERSION}", header.version);
            return Err(RegistryError::UnsupportedVersion.with(what));
        }
        // Who says hello does not know the cluster yet.
        let greeting = matches!(op, Op::Hello(_)) && header.cluster_id.is_empty();
        if !greeting && header.cluster_id != self.inner.cluster.0[..] {
            let what = match ClusterId::from_bytes(&header.cluster_id) {
                Some(theirs) => format!("cluster {theirs}, this one is {}", self.inner.cluster),
                None => format!("no cluster, this one is {}", self.inner.cluster),
            };
            return Err(RegistryError::WrongCluster.with(what));
        }
        // A clock too far ahead is not believed; the registry has no instants to protect by refusing.
        if header.time != 0 {
            self.inner.consensus.observe(Time(header.time));
        }
        Ok(())
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
        let applied =
            self.inner.consensus.write(GROUP, SessionId(0), 0, prepare).await.map_err(unavailable)?;
        decode(applied)
    }

    /// The cluster as it is now, for the dashboard.
    ///
    /// # Errors
    /// The registry is stopping, or its storage failed.
    pub async fn known(&self) -> Result<Known, pb::Error> {
        let (health, stopwatch) = (Arc::clone(&self.inner.health), self.inner.stopwatch);
        let read = move |views: &eggs_consensus::Views<'_>, _: Time| {
            let now = stopwatch.now();
            let view = views.get(GROUP).ok_or_else(|| RegistryError::NotLeader.bare())?;
            let health = health.lock().unwrap_or_else(PoisonError::into_inner);
            let map = health.map(view, now, false).map_err(|error| storage(&error))?;
            Ok::<_, pb::Error>((map, now))
        };
        let (map, now) = self.inner.consensus.read(read).await.map_err(unavailable)??;
        Ok(Known {
            cluster: self.inner.cluster,
            created_at: self.inner.created_at,
            started: self.inner.started,
            now,
            map,
        })
    }
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

fn unavailable(error: ConsensusError) -> pb::Error {
    match error {
        ConsensusError::NotLeader => RegistryError::NotLeader.bare(),
        ConsensusError::Busy => RegistryError::Busy.bare(),
        ConsensusError::Stopped => RegistryError::Busy.with("the registry is stopping"),
        ConsensusError::Storage(error) => RegistryError::Internal.with(error),
    }
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
        Op::RegisterShards(_) => "register_shards",
        Op::RegisterCrossdir(_) => "register_crossdir",
        Op::RegisterBlockServices(_) => "register_block_services",
    }
}
