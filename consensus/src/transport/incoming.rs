//! What comes from other stores.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use eggs_daemon::server::{self, Stopping};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::peer_service_server::{PeerService, PeerServiceServer};
use eggs_proto::{StoreId, pb};
use prost::Message as _;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{DECODED_BYTES_MAX, label, snapshot_bytes};
use crate::inbox::Mail;
use crate::peer_codec;
use crate::places::Shared;

/// A stream has said who it is by then.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams whose greeting is being waited for; more wait their turn. What strangers can make a port hold is that often the
/// largest batch.
const GREETINGS_MAX: usize = 32;
/// Of one stream, waiting for the consensus thread, in units of [`ROOM_UNIT`]; when it is full the stream is not read.
const ROOM_UNITS: usize = 16 << 10;
const ROOM_UNIT: usize = 1 << 10;
/// Refused strangers that are remembered, so that each is logged once.
const REFUSED_MAX: usize = 64;
/// When the port is to close: streams stay for as long, so that what is in flight can be agreed on.
const PARTING: Duration = Duration::from_millis(500);

type Exchanged = Result<Response<pb::PeerFarewell>, Status>;

/// Answers the other stores for one store.
#[derive(Clone)]
pub struct PeerHandler {
    store: Arc<Store>,
}

struct Store {
    shared: Arc<Shared>,
    /// The stream of each peer: a newer one ends the one before.
    streams: Mutex<BTreeMap<StoreId, CancellationToken>>,
    refused: Mutex<BTreeSet<(u64, String)>>,
}

impl fmt::Debug for PeerHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PeerHandler").field(&self.store.shared.store).finish()
    }
}

/// One `PeerService` for all stores of a port.
pub fn peer_router(handlers: Vec<PeerHandler>) -> axum::Router {
    let stores = handlers.into_iter().map(|handler| (handler.store.shared.store, handler)).collect();
    let port = Port { stores, greetings: Semaphore::new(GREETINGS_MAX) };
    server::grpc(PeerServiceServer::new(port).max_decoding_message_size(DECODED_BYTES_MAX))
}

struct Port {
    stores: BTreeMap<StoreId, PeerHandler>,
    greetings: Semaphore,
}

#[tonic::async_trait]
impl PeerService for Port {
    async fn exchange(&self, request: Request<Streaming<pb::PeerBatch>>) -> Exchanged {
        let stopping = request.extensions().get::<Stopping>().cloned();
        let mut stream = request.into_inner();
        let greeting = async {
            let _turn = self.greetings.acquire().await;
            stream.message().await
        };
        let first = tokio::time::timeout(GREETING_TIMEOUT, greeting).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no greeting came"))??;
        let Some(mut batch) = first else { return Ok(Response::new(pb::PeerFarewell {})) };
        let greeting = batch.greeting.take();
        let greeting =
            greeting.ok_or_else(|| Status::unauthenticated("the stream begins without a greeting"))?;
        let handler = self.stores.get(&StoreId(greeting.to_store));
        let handler = handler.ok_or_else(|| {
            Status::not_found(format!("store {:#x} is not on this host", greeting.to_store))
        })?;
        let from = handler.admit(&greeting)?;
        handler.receive(from, batch, stream, stopping).await
    }
}

impl PeerHandler {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let store = Store { shared, streams: Mutex::default(), refused: Mutex::default() };
        PeerHandler { store: Arc::new(store) }
    }

    /// Who a stream is from, when its greeting is good.
    fn admit(&self, greeting: &pb::PeerGreeting) -> Result<StoreId, Status> {
        let refusal = match self.check(greeting) {
            Ok(from) => return Ok(from),
            Err(refusal) => refusal,
        };
        let mut refused = locked(&self.store.refused);
        let why = refusal.message().to_owned();
        if refused.len() < REFUSED_MAX && refused.insert((greeting.from_store, why.clone())) {
            let (host, from) = (self.store.shared.name, StoreId(greeting.from_store));
            tracing::warn!(host, %from, %why, "refused a peer");
        }
        Err(refusal)
    }

    fn check(&self, greeting: &pb::PeerGreeting) -> Result<StoreId, Status> {
        let shared = &self.store.shared;
        if greeting.version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "the peer speaks version {} of the protocol, this host version {PROTOCOL_VERSION}",
                greeting.version
            )));
        }
        let joined = shared.joined.borrow();
        let Some(joined) = &*joined else {
            return Err(Status::unavailable("this store is not part of a cluster yet"));
        };
        if greeting.cluster_id != joined.cluster.0[..] {
            return Err(Status::permission_denied(format!(
                "the peer is of another cluster, this one is {}",
                joined.cluster
            )));
        }
        if !joined.secret_is(&greeting.secret) {
            return Err(Status::permission_denied("wrong cluster secret"));
        }
        let from = StoreId(greeting.from_store);
        if from == shared.store || from.0 == 0 {
            return Err(Status::invalid_argument("the peer says that it is this store"));
        }
        Ok(from)
    }

    /// Takes in a stream until it ends, the port closes, or the same store opens another.
    async fn receive(
        &self,
        from: StoreId,
        first: pb::PeerBatch,
        mut stream: Streaming<pb::PeerBatch>,
        stopping: Option<Stopping>,
    ) -> Exchanged {
        let replaced = CancellationToken::new();
        if let Some(before) = locked(&self.store.streams).insert(from, replaced.clone()) {
            before.cancel();
        }
        let intake = Intake::new(Arc::clone(&self.store.shared), from);
        let take_all = async {
            intake.take(first).await?;
            while let Some(batch) = stream.message().await? {
                intake.take(batch).await?;
            }
            Ok(Response::new(pb::PeerFarewell {}))
        };
        let result = tokio::select! {
            result = take_all => result,
            () = replaced.cancelled() => Err(Status::aborted("another stream of the same store took its place")),
            () = parting(stopping, &self.store.shared) => Err(Status::unavailable("this host is stopping")),
        };
        let mut streams = locked(&self.store.streams);
        if !replaced.is_cancelled() {
            streams.remove(&from);
        }
        result
    }
}

/// Waits until the port is to close, hands over what is led here, and lets that happen.
async fn parting(stopping: Option<Stopping>, shared: &Shared) {
    let Some(Stopping(stop)) = stopping else { return std::future::pending().await };
    stop.cancelled().await;
    shared.inbox.tell(|news| news.hand_over = true);
    tokio::time::sleep(PARTING).await;
}

/// From one stream to the consensus thread.
struct Intake {
    shared: Arc<Shared>,
    from: StoreId,
    room: Arc<Semaphore>,
    messages: metrics::Counter,
    bytes: metrics::Counter,
    snapshots: metrics::Counter,
    snapshot_bytes: metrics::Counter,
}

impl Intake {
    fn new(shared: Arc<Shared>, from: StoreId) -> Self {
        let name = shared.name;
        Intake {
            shared,
            from,
            room: Arc::new(Semaphore::new(ROOM_UNITS)),
            messages: metrics::counter!("eggs_peer_messages_received_total", "host" => name, "peer" => label(from)),
            bytes: metrics::counter!("eggs_peer_bytes_received_total", "host" => name, "peer" => label(from)),
            snapshots: metrics::counter!("eggs_consensus_snapshots_received_total", "host" => name),
            snapshot_bytes: metrics::counter!("eggs_consensus_snapshot_bytes_received_total", "host" => name),
        }
    }

    async fn take(&self, batch: pb::PeerBatch) -> Result<(), Status> {
        let bytes = batch.encoded_len();
        self.messages.increment(batch.messages.len() as u64);
        self.bytes.increment(bytes as u64);
        let decoded = peer_codec::decode_batch(self.from, self.shared.store, batch);
        let batch = decoded.map_err(|error| {
            tracing::warn!(host = self.shared.name, from = %self.from, %error, "ended the stream of a peer");
            Status::invalid_argument(error.to_string())
        })?;
        for (_, message) in &batch.messages {
            if let Some((bytes, last)) = snapshot_bytes(message) {
                self.snapshot_bytes.increment(bytes);
                self.snapshots.increment(u64::from(last));
            }
        }
        let units = (bytes / ROOM_UNIT + 1).min(ROOM_UNITS);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(units).await;
        let room = room.map_err(|_| Status::unavailable("this host is stopping"))?;
        let mail = Mail { from: self.from, batch, bytes, _room: room };
        if self.shared.inbox.tell(|news| news.mail.push(mail)) {
            Ok(())
        } else {
            Err(Status::unavailable("this store has stopped"))
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
