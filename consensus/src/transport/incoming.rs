//! What comes from other stores.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use eggs_daemon::server::{MAGIC_BYTES, Streams};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::{StoreId, pb};
use futures_util::StreamExt as _;
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_util::codec::{Decoder as _, FramedRead};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::frames::{self, Frames};
use super::{DECODED_BYTES_MAX, label, snapshot_bytes};
use crate::inbox::Mail;
use crate::peer_codec;
use crate::places::{Shared, wall};

/// A stream has said who it is by then.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// What is taken in of a stranger.
const GREETING_BYTES_MAX: usize = 1 << 10;
/// Read at once of a peer.
const READ_BYTES: usize = 64 << 10;
/// A stream is closed no later than this after it was refused.
const FAREWELL_MAX: Duration = Duration::from_secs(1);
/// A peer that has nothing to say sends heartbeats. A stream that stays silent for longer is one of a host that vanished, or
/// waits for bytes that a damaged length announced.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Of one peer, waiting for the consensus thread, in units of [`ROOM_UNIT`]; when it is full the stream is not read.
const ROOM_UNITS: usize = 16 << 10;
const ROOM_UNIT: usize = 1 << 10;
/// Refused strangers that are remembered, so that each is logged once.
const REFUSED_MAX: usize = 64;
/// When the port is to close: streams stay for as long, so that what is in flight can be agreed on.
const PARTING: Duration = Duration::from_millis(500);

const STOPPED: &str = "this store has stopped";

/// Answers the other stores for one store.
#[derive(Clone)]
pub struct PeerHandler {
    store: Arc<Store>,
}

struct Store {
    shared: Arc<Shared>,
    /// The stream of each peer: a newer one ends the one before.
    streams: Mutex<BTreeMap<StoreId, CancellationToken>>,
    /// Of each peer, whatever its stream: what one has left behind counts against the next.
    rooms: Mutex<BTreeMap<StoreId, Arc<Semaphore>>>,
    refused: Mutex<BTreeSet<(u64, String)>>,
}

impl fmt::Debug for PeerHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PeerHandler").field(&self.store.shared.store).finish()
    }
}

/// What takes in the streams to all stores of a port.
pub fn peer_streams(handlers: Vec<PeerHandler>) -> Arc<dyn Streams> {
    let stores = handlers.into_iter().map(|handler| (handler.store.shared.store, handler)).collect();
    Arc::new(Port { stores: Arc::new(stores) })
}

struct Port {
    stores: Arc<BTreeMap<StoreId, PeerHandler>>,
}

impl Streams for Port {
    fn magic(&self) -> [u8; MAGIC_BYTES] {
        frames::MAGIC
    }

    fn serve(&self, stream: TcpStream, stop: CancellationToken) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let stores = Arc::clone(&self.stores);
        Box::pin(async move {
            let mut greetings =
                FramedRead::with_capacity(stream, Frames::new(GREETING_BYTES_MAX), GREETING_BYTES_MAX);
            let greeted = tokio::select! {
                greeted = greeted(&stores, &mut greetings) => greeted,
                () = stop.cancelled() => return,
            };
            let read = greetings.read_buffer_mut().split();
            let stream = greetings.into_inner();
            match greeted {
                Ok(None) => {}
                Ok(Some((handler, from))) => handler.clone().take_over(from, stream, read, stop).await,
                Err(Refusal(why)) => say_farewell(stream, why).await,
            }
        })
    }
}

/// Why a stream is ended, in one line.
#[derive(Debug)]
struct Refusal(String);

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        Refusal(error.to_string())
    }
}

fn refused(why: impl Into<String>) -> Refusal {
    Refusal(why.into())
}

/// Tells the other side why. Closed before it was read to its end, a stream would be reset, and the words lost.
async fn say_farewell(mut stream: TcpStream, why: String) {
    let mut frame = BytesMut::new();
    frames::encode(&pb::PeerFarewell { why }, &mut frame);
    let part = async {
        stream.write_all(&frame).await?;
        stream.shutdown().await?;
        let mut rest = [0; 1 << 10];
        while stream.read(&mut rest).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    // Who does not listen need not hear it.
    let _ = tokio::time::timeout(FAREWELL_MAX, part).await;
}

/// Who a new stream is from and to; `None`: it ended without a word.
async fn greeted<'a>(
    stores: &'a BTreeMap<StoreId, PeerHandler>,
    greetings: &mut FramedRead<TcpStream, Frames<pb::PeerGreeting>>,
) -> Result<Option<(&'a PeerHandler, StoreId)>, Refusal> {
    let greeting = async {
        let mut magic = [0; MAGIC_BYTES];
        greetings.get_mut().read_exact(&mut magic).await?;
        greetings.next().await.transpose()
    };
    let greeting = tokio::time::timeout(GREETING_TIMEOUT, greeting).await;
    let greeting = greeting.map_err(|_| refused("no greeting came"))??;
    let Some(greeting) = greeting else { return Ok(None) };
    let handler = stores.get(&StoreId(greeting.to_store));
    let handler =
        handler.ok_or_else(|| refused(format!("store {:#x} is not on this host", greeting.to_store)))?;
    Ok(Some((handler, handler.admit(&greeting)?)))
}

impl PeerHandler {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let store =
            Store { shared, streams: Mutex::default(), rooms: Mutex::default(), refused: Mutex::default() };
        PeerHandler { store: Arc::new(store) }
    }

    /// Who a stream is from, when its greeting is good.
    fn admit(&self, greeting: &pb::PeerGreeting) -> Result<StoreId, Refusal> {
        let refusal = match self.check(greeting) {
            Ok(from) => return Ok(from),
            Err(refusal) => refusal,
        };
        let mut refused = locked(&self.store.refused);
        let why = refusal.0.clone();
        if refused.len() < REFUSED_MAX && refused.insert((greeting.from_store, why.clone())) {
            let (host, from) = (self.store.shared.name, StoreId(greeting.from_store));
            tracing::warn!(host, %from, %why, "refused a peer");
        }
        Err(refusal)
    }

    fn check(&self, greeting: &pb::PeerGreeting) -> Result<StoreId, Refusal> {
        let shared = &self.store.shared;
        if greeting.version != PROTOCOL_VERSION {
            return Err(refused(format!(
                "the peer speaks version {} of the protocol, this host version {PROTOCOL_VERSION}",
                greeting.version
            )));
        }
        let joined = shared.joined.borrow();
        let Some(joined) = &*joined else {
            return Err(refused("this store is not part of a cluster yet"));
        };
        if greeting.cluster_id != joined.cluster.0[..] {
            return Err(refused(format!("the peer is of another cluster, this one is {}", joined.cluster)));
        }
        if !joined.secret_is(&greeting.secret) {
            return Err(refused("wrong cluster secret"));
        }
        let from = StoreId(greeting.from_store);
        if from == shared.store || from.0 == 0 {
            return Err(refused("the peer says that it is this store"));
        }
        if shared.inbox.is_closed() {
            return Err(refused(STOPPED));
        }
        Ok(from)
    }

    /// Takes in a stream until it ends; the consensus thread reads it, between its turns. `read`: what was read of it already.
    async fn take_over(self, from: StoreId, stream: TcpStream, read: BytesMut, stop: CancellationToken) {
        let Ok(stream) = stream.into_std() else { return };
        let streams = self.store.shared.streams.clone();
        let taken_over = streams.spawn(async move {
            let Ok(mut stream) = TcpStream::from_std(stream) else { return };
            if let Err(Refusal(why)) = self.receive(from, &mut stream, read, stop).await {
                say_farewell(stream, why).await;
            }
        });
        // It ends with the consensus thread too.
        let _ = AbortOnDropHandle::new(taken_over).await;
    }

    /// Until the stream ends, the port closes, or the same store opens another.
    async fn receive(
        &self,
        from: StoreId,
        stream: &mut TcpStream,
        read_already: BytesMut,
        stop: CancellationToken,
    ) -> Result<(), Refusal> {
        let replaced = CancellationToken::new();
        if let Some(before) = locked(&self.store.streams).insert(from, replaced.clone()) {
            before.cancel();
        }
        let room = {
            let mut rooms = locked(&self.store.rooms);
            Arc::clone(rooms.entry(from).or_insert_with(|| Arc::new(Semaphore::new(ROOM_UNITS))))
        };
        let intake = Intake::new(Arc::clone(&self.store.shared), from, room);
        let mut read = BytesMut::with_capacity(READ_BYTES);
        read.extend_from_slice(&read_already);
        let take_all = async {
            loop {
                let batch = tokio::time::timeout(SILENCE_MAX, next_batch(stream, &mut read)).await;
                match batch.map_err(|_| refused("nothing was heard of the peer"))? {
                    Ok(Some(batch)) => intake.take(batch).await?,
                    Ok(None) => return Ok(()),
                    Err(error) => return Err(self.damaged(from, error)),
                }
            }
        };
        let result = tokio::select! {
            result = take_all => result,
            () = replaced.cancelled() => Err(refused("another stream of the same store took its place")),
            () = parting(stop, &self.store.shared) => Err(refused("this host is stopping")),
        };
        let mut streams = locked(&self.store.streams);
        if !replaced.is_cancelled() {
            streams.remove(&from);
        }
        result
    }
}

impl PeerHandler {
    /// A frame that is none, or a connection that broke.
    fn damaged(&self, from: StoreId, error: std::io::Error) -> Refusal {
        if error.kind() == std::io::ErrorKind::InvalidData {
            tracing::warn!(host = self.store.shared.name, %from, %error, "ended the stream of a peer");
        }
        error.into()
    }
}

/// `None`: the stream has ended. `read`: what was read, and is not a whole batch yet.
async fn next_batch(stream: &mut TcpStream, read: &mut BytesMut) -> std::io::Result<Option<pb::PeerBatch>> {
    let mut frames = Frames::new(DECODED_BYTES_MAX);
    loop {
        if let Some(batch) = frames.decode(read)? {
            return Ok(Some(batch));
        }
        read.reserve(READ_BYTES / 16);
        if stream.read_buf(read).await? == 0 {
            return Ok(None);
        }
    }
}

/// Waits until the port is to close, hands over what is led here, and lets that happen.
async fn parting(stop: CancellationToken, shared: &Shared) {
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
    fn new(shared: Arc<Shared>, from: StoreId, room: Arc<Semaphore>) -> Self {
        let name = shared.name;
        Intake {
            shared,
            from,
            room,
            messages: metrics::counter!("eggs_peer_messages_received_total", "host" => name, "peer" => label(from)),
            bytes: metrics::counter!("eggs_peer_bytes_received_total", "host" => name, "peer" => label(from)),
            snapshots: metrics::counter!("eggs_consensus_snapshots_received_total", "host" => name),
            snapshot_bytes: metrics::counter!("eggs_consensus_snapshot_bytes_received_total", "host" => name),
        }
    }

    async fn take(&self, batch: pb::PeerBatch) -> Result<(), Refusal> {
        let bytes = batch.encoded_len();
        self.messages.increment(batch.messages.len() as u64);
        self.bytes.increment(bytes as u64);
        let decoded = peer_codec::decode_batch(self.from, self.shared.store, batch);
        let batch = decoded.map_err(|error| {
            tracing::warn!(host = self.shared.name, from = %self.from, %error, "ended the stream of a peer");
            refused(error.to_string())
        })?;
        for (_, message) in &batch.messages {
            if let Some((bytes, last)) = snapshot_bytes(message) {
                self.snapshot_bytes.increment(bytes);
                self.snapshots.increment(u64::from(last));
            }
        }
        let (came, wall) = (Instant::now(), wall());
        let units = (bytes / ROOM_UNIT + 1).min(ROOM_UNITS);
        let units = u32::try_from(units).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).acquire_many_owned(units).await;
        let room = room.map_err(|_| refused("this host is stopping"))?;
        let mail = Mail { from: self.from, batch, bytes, came, wall, _room: room };
        if self.shared.inbox.post(mail) { Ok(()) } else { Err(refused(STOPPED)) }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
