//! Daemons as clients of shuckle: joining the cluster, heartbeats, watching the cluster map.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use eggs_proto::limits::{HEARTBEAT_INTERVAL, MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::pb::registry_service_client::RegistryServiceClient;
use eggs_proto::{ClusterId, RegistryError, ServiceError, pb};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::channel::{self, AddressError};
use crate::clock;
use crate::secret::Secret;

/// Between tries until the first success.
const RETRY: Duration = Duration::from_millis(50);
/// Between looks at a map that has just changed.
const EAGER: Duration = Duration::from_millis(100);
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
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
    #[error("stopped while waiting for shuckle at {address}")]
    Stopped { address: String },
}

/// A client of the cluster's shuckle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Registry {
    address: Arc<str>,
    client: RegistryServiceClient<Channel>,
    secret: Option<Secret>,
    cluster: ClusterId,
}

impl Registry {
    /// Asks shuckle at `address` for the cluster's id, until it answers or `stop`.
    ///
    /// # Errors
    /// Fatal ones: not an address, another cluster than `expected`, another protocol.
    pub async fn join(
        address: &str,
        secret: Option<Secret>,
        expected: Option<ClusterId>,
        stop: &CancellationToken,
    ) -> Result<Registry, JoinError> {
        let client = RegistryServiceClient::new(channel::connect(address)?)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let header = pb::RequestHeader {
            version: PROTOCOL_VERSION,
            time: clock::wall().0,
            ..pb::RequestHeader::default()
        };
        let mut complaints = Complaints::default();
        loop {
            match call(address, client.clone(), header.clone(), Op::Hello(pb::Hello {})).await {
                Ok(Answer::Hello(hello)) => {
                    let theirs = ClusterId::from_bytes(&hello.cluster_id)
                        .ok_or_else(|| nonsense(address, "its cluster id is not one"))?;
                    if let Some(ours) = expected.filter(|&ours| ours != theirs) {
                        return Err(JoinError::AnotherCluster { address: address.to_owned(), theirs, ours });
                    }
                    return Ok(Registry { address: address.into(), client, secret, cluster: theirs });
                }
                Ok(_) => return Err(nonsense(address, "it answered something else than hello").into()),
                Err(error) if error.is_fatal() => return Err(error.into()),
                Err(error) => complaints.log(&error),
            }
            if sleep(RETRY, stop).await.is_err() {
                return Err(JoinError::Stopped { address: address.to_owned() });
            }
        }
    }

    /// The cluster this daemon is part of.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// One request.
    ///
    /// # Errors
    /// Not reached, or refused.
    pub async fn call(&self, op: Op) -> Result<Answer, RegistryCallError> {
        let header = pb::RequestHeader {
            version: PROTOCOL_VERSION,
            time: clock::wall().0,
            cluster_id: Bytes::copy_from_slice(&self.cluster.0),
            secret: self.secret.as_ref().map(Secret::to_bytes).unwrap_or_default(),
            ..pb::RequestHeader::default()
        };
        call(&self.address, self.client.clone(), header, op).await
    }

    /// The cluster map.
    ///
    /// # Errors
    /// As [`call`](Registry::call).
    pub async fn map(&self, with_keys: bool) -> Result<pb::ClusterMapReply, RegistryCallError> {
        match self.call(Op::Map(pb::ClusterMap { with_keys })).await? {
            Answer::Map(map) => Ok(map),
            _ => Err(nonsense(&self.address, "it answered something else than a map")),
        }
    }

    /// Registers with what `report` says: at once, again soon until shuckle has taken it (`registered`
    /// is called then, once), and then every [`HEARTBEAT_INTERVAL`] until `stop`.
    ///
    /// # Errors
    /// What no retry helps against: [`RegistryCallError::is_fatal`].
    pub async fn heartbeat<F: Future<Output = Op>>(
        &self,
        mut report: impl FnMut() -> F,
        registered: impl FnOnce(),
        stop: CancellationToken,
    ) -> Result<(), RegistryCallError> {
        let mut complaints = Complaints::default();
        let mut registered = Some(registered);
        loop {
            let result = match self.call(report().await).await {
                Ok(Answer::Registered(_)) => Ok(()),
                Ok(_) => Err(nonsense(&self.address, "it answered something else than a registration")),
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => {
                    complaints = Complaints::default();
                    if let Some(registered) = registered.take() {
                        registered();
                    }
                }
                // Once part of the cluster, a daemon is not ended by what shuckle says while it is replaced or
                // upgraded: it goes on serving.
                Err(error) if error.is_fatal() && registered.is_some() => return Err(error),
                Err(error) => complaints.log(&error),
            }
            let pause = if registered.is_some() { RETRY } else { HEARTBEAT_INTERVAL };
            if sleep(pause, &stop).await.is_err() {
                return Ok(());
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
        match registry.map(with_keys).await {
            Ok(map) => {
                complaints = Complaints::default();
                let same = heard && same_members(&sender.borrow(), &map);
                pause = if same { (pause * 2).min(HEARTBEAT_INTERVAL) } else { EAGER };
                heard = true;
                sender.send_replace(Arc::new(map));
            }
            Err(error) => {
                complaints.log(&error);
                pause = if heard { EAGER } else { RETRY };
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

/// The same daemons and disks in the same condition; loads and counters aside.
fn same_members(a: &pb::ClusterMapReply, b: &pb::ClusterMapReply) -> bool {
    let shard = |place: &pb::ShardPlace| (place.shard, place.alive, place.address.clone());
    let disk = |info: &pb::BlockServiceInfo| (info.id, info.flags, info.address.clone());
    a.crossdir_address == b.crossdir_address
        && a.crossdir_alive == b.crossdir_alive
        && a.shards.iter().map(shard).eq(b.shards.iter().map(shard))
        && a.block_services.iter().map(disk).eq(b.block_services.iter().map(disk))
}

async fn call(
    address: &str,
    mut client: RegistryServiceClient<Channel>,
    header: pb::RequestHeader,
    op: Op,
) -> Result<Answer, RegistryCallError> {
    let unreachable = |reason: String| RegistryCallError::Unreachable { address: address.to_owned(), reason };
    let request = pb::RegistryRequest { header: Some(header), op: Some(op) };
    let reply = tokio::time::timeout(CALL_TIMEOUT, client.call(request))
        .await
        .map_err(|_| unreachable(format!("no answer within {} s", CALL_TIMEOUT.as_secs())))?
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

/// Logs a failure that repeats at its beginning and now and then, not every time. The first second
/// of it is silent: daemons start in any order.
#[derive(Debug, Default)]
struct Complaints {
    since: Option<tokio::time::Instant>,
    last: Option<tokio::time::Instant>,
}

impl Complaints {
    fn log(&mut self, error: &RegistryCallError) {
        let now = tokio::time::Instant::now();
        let since = *self.since.get_or_insert(now);
        let due = match self.last {
            None => now - since >= Duration::from_secs(1),
            Some(last) => now - last >= COMPLAIN_EVERY,
        };
        if due {
            tracing::warn!(%error, "waiting for shuckle");
            self.last = Some(now);
        }
    }
}
