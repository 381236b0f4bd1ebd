//! The stream of one peer, from its greeting to its end, and who reads it.
//!
//! One that carries little is read on the runtime: that a heartbeat came, the consensus thread need not be woken for. One that
//! carries much is read by the consensus thread itself, between its turns: to be woken by another thread for every
//! message costs more than the message.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use eggs_proto::{StoreId, pb};
use prost::Message as _;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_util::codec::Decoder as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::farewell::{Refusal, STOPPED, refused, say_farewell};
use super::frames::Frames;
use super::{DECODED_BYTES_MAX, label, snapshot_bytes};
use crate::inbox::Mail;
use crate::peer_codec;
use crate::places::{Shared, wall};

/// Read at once of a peer.
const READ_BYTES: usize = 64 << 10;
/// A peer that has nothing to say sends heartbeats. A stream that stays silent for longer is one of a host that vanished, or
/// waits for bytes that a damaged length announced.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// When the port is to close: streams stay for as long, so that what is in flight can be agreed on.
const PARTING: Duration = Duration::from_millis(500);
const ROOM_UNIT: usize = 1 << 10;
/// Of one peer, waiting for the consensus thread, in units of [`ROOM_UNIT`]; when it is full the stream is not read.
pub(super) const ROOM_UNITS: usize = 16 << 10;
/// How much a stream carries is counted for so long …
const LOAD_WINDOW: Duration = Duration::from_secs(1);
/// … it is much from so many batches with messages on …
const MUCH: u32 = 100;
/// … and little below so many.
const LITTLE: u32 = 30;

/// Who reads a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    /// The runtime that took it in.
    Runtime,
    /// The consensus thread, on its own.
    Turner,
}

/// How much a stream carries.
struct Load {
    reader: Reader,
    since: Instant,
    batches: u32,
}

impl Load {
    fn new(reader: Reader, now: Instant) -> Self {
        Load { reader, since: now, batches: 0 }
    }

    /// Another batch came. Answers who is to read the next.
    fn add(&mut self, with_messages: bool, now: Instant) -> Reader {
        self.batches += u32::from(with_messages);
        let over = now.saturating_duration_since(self.since) >= LOAD_WINDOW;
        let reader = match self.reader {
            Reader::Runtime if self.batches >= MUCH => Reader::Turner,
            Reader::Turner if over && self.batches < LITTLE => Reader::Runtime,
            same => same,
        };
        if over || reader != self.reader {
            *self = Load::new(reader, now);
        }
        reader
    }
}

/// The stream of one peer.
pub(super) struct Stream {
    intake: Intake,
    load: Load,
    /// Not a whole batch yet.
    read: BytesMut,
    /// By a newer stream of the same peer.
    replaced: CancellationToken,
    /// The port is to close.
    stop: CancellationToken,
}

impl Stream {
    /// `behind_greeting`: what was read together with it.
    pub(super) fn new(
        intake: Intake,
        behind_greeting: &[u8],
        replaced: CancellationToken,
        stop: CancellationToken,
    ) -> Self {
        let mut read = BytesMut::with_capacity(READ_BYTES);
        read.extend_from_slice(behind_greeting);
        Stream { intake, load: Load::new(Reader::Runtime, Instant::now()), read, replaced, stop }
    }

    /// Until it ends, or the consensus thread does.
    pub(super) async fn run(mut self, mut socket: TcpStream) {
        while let Some(moved) = self.read_by(Reader::Runtime, socket).await {
            // It is there before anything comes.
            let Some(turner) = self.intake.shared.own_runtime.get().cloned() else { return };
            let by_turner = turner.spawn(async move {
                let socket = TcpStream::from_std(moved).ok()?;
                let moved = self.read_by(Reader::Turner, socket).await?;
                Some((self, moved))
            });
            let Ok(Some((back, moved))) = AbortOnDropHandle::new(by_turner).await else { return };
            let Ok(here) = TcpStream::from_std(moved) else { return };
            (self, socket) = (back, here);
        }
    }

    /// Reads until another is to: then it answers the socket, which it has let go of. `None`: the stream has ended.
    async fn read_by(&mut self, reader: Reader, mut socket: TcpStream) -> Option<std::net::TcpStream> {
        match self.receive(reader, &mut socket).await {
            Ok(true) => socket.into_std().ok(),
            Ok(false) => None,
            Err(Refusal(why)) => {
                say_farewell(socket, why).await;
                None
            }
        }
    }

    /// Whether there is more, which another is to read.
    async fn receive(&mut self, reader: Reader, socket: &mut TcpStream) -> Result<bool, Refusal> {
        let (intake, read, load) = (&self.intake, &mut self.read, &mut self.load);
        let take_all = async {
            loop {
                let batch = tokio::time::timeout(SILENCE_MAX, next_batch(socket, read)).await;
                let batch = match batch.map_err(|_| refused("nothing was heard of the peer"))? {
                    Ok(Some(batch)) => batch,
                    Ok(None) => return Ok(false),
                    Err(error) => return Err(intake.damaged(error)),
                };
                if self.replaced.is_cancelled() {
                    continue;
                }
                let with_messages = !batch.messages.is_empty();
                intake.take(batch).await?;
                if load.add(with_messages, Instant::now()) != reader && !self.stop.is_cancelled() {
                    return Ok(true);
                }
            }
        };
        tokio::select! {
            biased;
            // First, so that nothing of it comes behind what the newer one brings.
            () = self.replaced.cancelled() => Err(refused("another stream of the same store took its place")),
            () = intake.shared.stopped.cancelled() => Err(refused(STOPPED)),
            () = parting(&self.stop, &intake.shared) => Err(refused("this host is stopping")),
            result = take_all => result,
        }
    }
}

/// `None`: the stream has ended. `read`: what was read, and is not a whole batch yet.
async fn next_batch(socket: &mut TcpStream, read: &mut BytesMut) -> io::Result<Option<pb::PeerBatch>> {
    let mut frames = Frames::new(DECODED_BYTES_MAX);
    loop {
        if let Some(batch) = frames.decode(read)? {
            return Ok(Some(batch));
        }
        read.reserve(READ_BYTES / 16);
        if socket.read_buf(read).await? == 0 {
            return Ok(None);
        }
    }
}

/// Waits until the port is to close, hands over what is led here, and lets that happen.
async fn parting(stop: &CancellationToken, shared: &Shared) {
    stop.cancelled().await;
    shared.inbox.tell(|news| news.hand_over = true);
    tokio::time::sleep(PARTING).await;
}

/// From one stream to the consensus thread.
pub(super) struct Intake {
    shared: Arc<Shared>,
    from: StoreId,
    room: Arc<Semaphore>,
    messages: metrics::Counter,
    bytes: metrics::Counter,
    snapshots: metrics::Counter,
    snapshot_bytes: metrics::Counter,
}

impl Intake {
    pub(super) fn new(shared: Arc<Shared>, from: StoreId, room: Arc<Semaphore>) -> Self {
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

    /// A frame that is none, or a connection that broke.
    fn damaged(&self, error: io::Error) -> Refusal {
        if error.kind() == io::ErrorKind::InvalidData {
            tracing::warn!(host = self.shared.name, from = %self.from, %error, "ended the stream of a peer");
        }
        error.into()
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

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::atomic::{AtomicBool, Ordering};

    use eggs_consensus_core::GroupId;
    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::own_runtime::OwnRuntime;
    use crate::transport::frames;

    #[test]
    fn who_reads_follows_the_load_and_does_not_flutter() {
        let began = Instant::now();
        let at = |ms| began + Duration::from_millis(ms);
        let mut load = Load::new(Reader::Runtime, began);
        // Heartbeats, and fewer messages than are much.
        for ms in 0..5000 {
            assert_eq!(load.add(ms % 11 == 0, at(ms)), Reader::Runtime, "{ms}");
        }
        let mut readers: Vec<_> = (5000..5200).map(|ms| load.add(true, at(ms))).collect();
        readers.dedup();
        assert_eq!(readers, [Reader::Runtime, Reader::Turner]);
        // Between little and much it stays.
        for ms in 5200..9000 {
            assert_eq!(load.add(ms % 20 == 0, at(ms)), Reader::Turner, "{ms}");
        }
        let mut readers: Vec<_> = (9000..12_000).map(|ms| load.add(ms % 100 == 0, at(ms))).collect();
        readers.dedup();
        assert_eq!(readers, [Reader::Turner, Reader::Runtime]);
    }

    fn frame(sent_at: u64, with_message: bool) -> BytesMut {
        let message = eggs_consensus_core::PeerMessage::Want { index: 1, term: 1, offset: sent_at };
        let messages = with_message.then(|| peer_codec::encode(GroupId(1), message)).flatten();
        let heartbeat = pb::PeerHeartbeat { sent_at, ..pb::PeerHeartbeat::default() };
        let batch = pb::PeerBatch { heartbeat: Some(heartbeat), messages: messages.into_iter().collect() };
        let mut frame = BytesMut::new();
        frames::encode(&batch, &mut frame);
        frame
    }

    /// Nothing is lost, torn or out of order when the reader changes, in the middle of a batch too.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_stream_goes_from_one_reader_to_the_other_and_back() {
        let own = OwnRuntime::new().unwrap();
        let on_turner = own.handle().clone();
        let shared = Arc::new(Shared::new("test", StoreId(1), Box::new(|_| true)));
        shared.own_runtime.set(on_turner.clone()).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (socket, _) = listener.accept().await.unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let thread = {
            let (shared, over) = (Arc::clone(&shared), Arc::clone(&over));
            std::thread::spawn(move || {
                let mut came = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    let until = Some(Instant::now() + Duration::from_millis(5));
                    let news = own.wait(&shared.inbox, &mut VecDeque::new(), until);
                    came.extend(news.mail.iter().map(|mail| mail.batch.heartbeat.sent_at));
                }
                came
            })
        };
        let room = Arc::new(Semaphore::new(ROOM_UNITS));
        let intake = Intake::new(Arc::clone(&shared), StoreId(2), room);
        let tokens = (CancellationToken::new(), CancellationToken::new());
        let first = frame(1, true);
        let stream = Stream::new(intake, &first[..5], tokens.0, tokens.1);
        let run = tokio::spawn(stream.run(socket));
        peer.write_all(&first[5..]).await.unwrap();
        let mut sent = 1;
        for moved in [1, 0, 1, 0] {
            // Much, in pieces that are no frames; then nothing but heartbeats.
            let begun = Instant::now();
            while on_turner.metrics().num_alive_tasks() != moved {
                assert!(begun.elapsed() < Duration::from_secs(60), "not read by the other");
                let mut bytes = BytesMut::new();
                for _ in 0..MUCH {
                    sent += 1;
                    bytes.unsplit(frame(sent, moved == 1));
                }
                for piece in bytes.chunks(1000) {
                    peer.write_all(piece).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            assert!(!run.is_finished());
        }
        drop(peer);
        run.await.unwrap();
        over.store(true, Ordering::Relaxed);
        let came = thread.join().unwrap();
        assert_eq!(came, (1..=sent).collect::<Vec<_>>());
    }
}
