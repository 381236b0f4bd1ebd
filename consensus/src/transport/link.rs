//! What waits for one store, and the way it goes out.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf as _, BytesMut};
use eggs_consensus_core::{GroupId, PeerBatch, PeerMessage};
use eggs_proto::{StoreId, pb};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::{BATCH_BYTES_MAX, frames, label, snapshot_bytes};
use crate::peer_codec;

/// Waiting for one store; what comes beyond is dropped. A heartbeat waits behind that much: well under an election timeout.
const QUEUE_BYTES_MAX: usize = 16 << 20;
const QUEUE_MESSAGES_MAX: usize = 65_536;
/// What is shorter is written by the consensus thread itself, if the stream takes it at once: waking another to do it
/// costs more. What is longer would keep it from its work.
const DIRECT_BYTES_MAX: usize = 64 << 10;

/// Between the consensus thread, which pushes, and the task that keeps the stream.
pub(super) struct Link {
    waiting: Mutex<Waiting>,
    ready: Notify,
    dropped: metrics::Counter,
    sent: metrics::Counter,
    sent_bytes: metrics::Counter,
    snapshots: metrics::Counter,
    snapshot_bytes: metrics::Counter,
}

#[derive(Default)]
struct Waiting {
    heartbeat: Option<pb::PeerHeartbeat>,
    messages: VecDeque<(GroupId, PeerMessage)>,
    bytes: usize,
    /// Whose greeting is sent.
    stream: Option<Arc<TcpStream>>,
    /// The rest of a frame the stream did not take at once; with it, the task writes.
    rest: BytesMut,
    /// Why the stream took nothing any more: the task's to tell.
    failed: Option<io::Error>,
    /// The task writes: whatever is pushed waits for it.
    task_writes: bool,
}

impl Waiting {
    /// As much of what waits as fits one batch.
    fn take(&mut self) -> Option<Taken> {
        let heartbeat = self.heartbeat?;
        let (mut bytes, mut messages) = (0, Vec::new());
        while let Some((_, message)) = self.messages.front() {
            let cost = peer_codec::cost(message);
            if bytes > 0 && bytes + cost > BATCH_BYTES_MAX {
                break;
            }
            bytes += cost;
            messages.extend(self.messages.pop_front());
        }
        self.bytes = self.bytes.saturating_sub(bytes);
        if self.messages.is_empty() {
            self.heartbeat = None;
        }
        Some((heartbeat, messages))
    }
}

type Taken = (pb::PeerHeartbeat, Vec<(GroupId, PeerMessage)>);

impl Link {
    pub(super) fn new(name: &'static str, to: StoreId) -> Self {
        Link {
            waiting: Mutex::default(),
            ready: Notify::new(),
            dropped: metrics::counter!("eggs_peer_messages_dropped_total", "host" => name, "peer" => label(to)),
            sent: metrics::counter!("eggs_peer_messages_sent_total", "host" => name, "peer" => label(to)),
            sent_bytes: metrics::counter!("eggs_peer_bytes_sent_total", "host" => name, "peer" => label(to)),
            snapshots: metrics::counter!("eggs_consensus_snapshots_sent_total", "host" => name),
            snapshot_bytes: metrics::counter!("eggs_consensus_snapshot_bytes_sent_total", "host" => name),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False: there was no room for all of it.
    pub(super) fn push(&self, batch: PeerBatch) -> bool {
        let bytes: usize = batch.messages.iter().map(|(_, message)| peer_codec::cost(message)).sum();
        let mut waiting = self.lock();
        waiting.heartbeat = Some(batch.heartbeat);
        let fits = waiting.messages.is_empty()
            || (waiting.bytes + bytes <= QUEUE_BYTES_MAX
                && waiting.messages.len() + batch.messages.len() <= QUEUE_MESSAGES_MAX);
        if fits {
            waiting.bytes += bytes;
            waiting.messages.extend(batch.messages);
        } else {
            self.dropped.increment(batch.messages.len() as u64);
        }
        let written = self.write_at_once(&mut waiting);
        drop(waiting);
        if !written {
            self.ready.notify_one();
        }
        fits
    }

    /// True: nothing is left for the task.
    fn write_at_once(&self, waiting: &mut Waiting) -> bool {
        if waiting.task_writes || waiting.bytes > DIRECT_BYTES_MAX {
            return false;
        }
        let Some(stream) = waiting.stream.clone() else { return false };
        let Some(taken) = waiting.take() else { return true };
        let mut frame = self.frame(taken);
        match stream.try_write(&frame) {
            Ok(n) => frame.advance(n),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => waiting.failed = Some(error),
        }
        waiting.task_writes = !frame.is_empty();
        waiting.rest = frame;
        !waiting.task_writes
    }

    /// What was taken, as it goes out.
    fn frame(&self, (heartbeat, messages): Taken) -> BytesMut {
        for (_, message) in &messages {
            if let Some((bytes, last)) = snapshot_bytes(message) {
                self.snapshot_bytes.increment(bytes);
                self.snapshots.increment(u64::from(last));
            }
        }
        self.sent.increment(messages.len() as u64);
        let messages = messages.into_iter().filter_map(|(group, message)| peer_codec::encode(group, message));
        let batch = pb::PeerBatch { heartbeat: Some(heartbeat), messages: messages.collect() };
        let mut frame = BytesMut::new();
        frames::encode(&batch, &mut frame);
        self.sent_bytes.increment(frame.len() as u64);
        frame
    }

    /// The next frame for the task to write; `None`: there is none, and the task writes no more.
    fn next_frame(&self) -> Option<BytesMut> {
        let mut waiting = self.lock();
        if !waiting.rest.is_empty() {
            return Some(std::mem::take(&mut waiting.rest));
        }
        let taken = waiting.take();
        waiting.task_writes = taken.is_some();
        drop(waiting);
        taken.map(|taken| self.frame(taken))
    }

    /// Waits until there is something to say.
    pub(super) async fn wait(&self) {
        while self.lock().heartbeat.is_none() {
            self.ready.notified().await;
        }
    }

    /// Writes what is pushed to the stream, for as long as it goes.
    pub(super) async fn pump(&self, stream: &Arc<TcpStream>) -> io::Error {
        {
            let mut waiting = self.lock();
            waiting.stream = Some(Arc::clone(stream));
            waiting.task_writes = true;
        }
        loop {
            if let Some(error) = self.lock().failed.take() {
                return error;
            }
            let Some(frame) = self.next_frame() else {
                self.ready.notified().await;
                continue;
            };
            if let Err(error) = write_all(stream, &frame).await {
                return error;
            }
        }
    }

    /// The stream is gone, and with it what waited.
    pub(super) fn clear(&self) {
        let dropped = std::mem::take(&mut *self.lock());
        self.dropped.increment(dropped.messages.len() as u64);
    }
}

/// To a stream that others write to too, when it is their turn.
pub(super) async fn write_all(stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Ok(n) => bytes.advance(n),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn batch(sent_at: u64, pieces: usize, bytes: usize) -> PeerBatch {
        let piece = |n| PeerMessage::Piece {
            index: 1,
            term: 1,
            offset: n as u64,
            total: 1 << 40,
            bytes: Bytes::from(vec![0; bytes]),
        };
        PeerBatch {
            heartbeat: pb::PeerHeartbeat { sent_at, ..pb::PeerHeartbeat::default() },
            messages: (0..pieces).map(|n| (GroupId(1), piece(n))).collect(),
        }
    }

    fn taken(link: &Link) -> Option<Taken> {
        link.lock().take()
    }

    #[test]
    fn batches_are_merged_and_cut_and_the_newest_heartbeat_stays() {
        let link = Link::new("test", StoreId(1));
        assert!(taken(&link).is_none());
        assert!(link.push(batch(1, 0, 0)));
        assert!(link.push(batch(2, 3, 100)));
        let (heartbeat, messages) = taken(&link).unwrap();
        assert_eq!((heartbeat.sent_at, messages.len()), (2, 3));
        assert!(taken(&link).is_none());

        // Longer than a batch: it goes alone, and the rest in pieces.
        assert!(link.push(batch(3, 1, BATCH_BYTES_MAX + 1)));
        assert!(link.push(batch(4, 4, BATCH_BYTES_MAX / 5)));
        assert!(!link.push(batch(5, 2, BATCH_BYTES_MAX)));
        let sizes: Vec<usize> = std::iter::from_fn(|| taken(&link))
            .map(|(heartbeat, messages)| {
                assert_eq!(heartbeat.sent_at, 5);
                messages.len()
            })
            .collect();
        assert_eq!(sizes, [1, 4]);
        assert_eq!(link.lock().bytes, 0);
        assert!(link.push(batch(6, 2, BATCH_BYTES_MAX)));
        link.clear();
        assert!(taken(&link).is_none());
    }

    /// Both hands write to one stream that takes little at a time: nothing is torn, lost or out of order.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn frames_stay_whole_whoever_writes_them() {
        const BATCHES: u64 = 3000;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (read, _) = listener.accept().await.unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&stream, 4096).unwrap();
        rustix::net::sockopt::set_socket_recv_buffer_size(&read, 4096).unwrap();
        let (stream, link) = (Arc::new(stream), Arc::new(Link::new("test", StoreId(1))));
        let writes = {
            let (link, stream) = (Arc::clone(&link), Arc::clone(&stream));
            tokio::spawn(async move { link.pump(&stream).await })
        };
        let pushes = {
            let link = Arc::clone(&link);
            std::thread::spawn(move || {
                for n in 1..=BATCHES {
                    // Now and then one that only the task writes.
                    let bytes = if n % 500 == 0 { 2 * DIRECT_BYTES_MAX } else { (n % 700) as usize };
                    assert!(link.push(batch(n, 1, bytes)));
                    if n % 16 == 0 {
                        std::thread::sleep(std::time::Duration::from_micros(200));
                    }
                }
            })
        };
        let frames = frames::Frames::<pb::PeerBatch>::new(1 << 30);
        let mut frames = tokio_util::codec::FramedRead::new(read, frames);
        let (mut messages, mut last) = (0, 0);
        while messages < BATCHES {
            let read = futures_util::StreamExt::next(&mut frames).await;
            let batch = read.expect("a frame").expect("a whole one");
            let sent_at = batch.heartbeat.unwrap().sent_at;
            assert!(sent_at > last, "{sent_at} after {last}");
            (messages, last) = (messages + batch.messages.len() as u64, sent_at);
        }
        assert_eq!((messages, last), (BATCHES, BATCHES));
        pushes.join().unwrap();
        writes.abort();
    }
}
