//! Who opens a stream to a store here: strangers are refused, and a newer stream of a peer ends the one before.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use eggs_daemon::server::{MAGIC_BYTES, Streams};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::{StoreId, pb};
use futures_util::StreamExt as _;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_util::codec::FramedRead;
use tokio_util::sync::CancellationToken;

use super::farewell::{Refusal, STOPPED, refused, say_farewell};
use super::frames::{self, Frames};
use super::stream::{Intake, ROOM_UNITS, Stream};
use crate::places::Shared;

/// A stream has said who it is by then.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// What is taken in of a stranger.
const GREETING_BYTES_MAX: usize = 1 << 10;
/// Refused strangers that are remembered, so that each is logged once.
const REFUSED_MAX: usize = 64;

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
                Ok(Some((handler, from))) => handler.clone().take_in(from, stream, read, stop).await,
                Err(Refusal(why)) => say_farewell(stream, why).await,
            }
        })
    }
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
        if shared.stopped.is_cancelled() {
            return Err(refused(STOPPED));
        }
        Ok(from)
    }

    /// Takes in a stream until it ends. `read`: what was read of it already.
    async fn take_in(self, from: StoreId, socket: TcpStream, read: BytesMut, stop: CancellationToken) {
        let replaced = CancellationToken::new();
        if let Some(before) = locked(&self.store.streams).insert(from, replaced.clone()) {
            before.cancel();
        }
        let room = {
            let mut rooms = locked(&self.store.rooms);
            Arc::clone(rooms.entry(from).or_insert_with(|| Arc::new(Semaphore::new(ROOM_UNITS))))
        };
        let intake = Intake::new(Arc::clone(&self.store.shared), from, room);
        Stream::new(intake, &read, replaced.clone(), stop).run(socket).await;
        let mut streams = locked(&self.store.streams);
        if !replaced.is_cancelled() {
            streams.remove(&from);
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
