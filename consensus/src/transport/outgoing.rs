//! What goes to another store.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use eggs_consensus_core::{GroupId, PeerBatch, PeerMessage};
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::peer_service_client::PeerServiceClient;
use eggs_proto::{StoreId, pb};
use prost::Message as _;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use super::{BATCH_BYTES_MAX, DECODED_BYTES_MAX, label, snapshot_bytes};
use crate::peer_codec;
use crate::places::{Joined, Shared};

/// Waiting for one store; what comes beyond is dropped. A heartbeat waits behind that much: well under an election timeout.
const QUEUE_BYTES_MAX: usize = 16 << 20;
const QUEUE_MESSAGES_MAX: usize = 65_536;
/// Between attempts to open a stream; doubled each time, and drawn by chance below it.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A stream that held this long was a good one.
const GOOD_STREAM: Duration = Duration::from_secs(2);

/// All peers; owned by the consensus thread.
pub(crate) struct Outbox {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    links: BTreeMap<StoreId, Link>,
}

struct Link {
    queue: Arc<Queue>,
    task: AbortHandle,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Outbox {
    pub(crate) fn new(shared: Arc<Shared>, runtime: tokio::runtime::Handle) -> Self {
        Outbox { shared, runtime, links: BTreeMap::new() }
    }

    /// False: there was no room for all of it.
    pub(crate) fn send(&mut self, to: StoreId, batch: PeerBatch) -> bool {
        let link = self.links.entry(to).or_insert_with(|| {
            let queue = Arc::new(Queue::new(self.shared.name, to));
            let sender =
                Sender { shared: Arc::clone(&self.shared), queue: Arc::clone(&queue), to, told: None };
            Link { queue, task: self.runtime.spawn(sender.run()).abort_handle() }
        });
        link.queue.push(batch)
    }
}

/// What waits for one store.
struct Queue {
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
}

impl Queue {
    fn new(name: &'static str, to: StoreId) -> Self {
        Queue {
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

    fn push(&self, batch: PeerBatch) -> bool {
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
        drop(waiting);
        self.ready.notify_one();
        fits
    }

    /// The next batch as it goes out: as much of what waits as fits one.
    fn take(&self) -> Option<pb::PeerBatch> {
        let mut taken = Vec::new();
        let heartbeat = {
            let mut waiting = self.lock();
            let heartbeat = waiting.heartbeat?;
            let mut bytes = 0;
            while let Some((_, message)) = waiting.messages.front() {
                let cost = peer_codec::cost(message);
                if bytes > 0 && bytes + cost > BATCH_BYTES_MAX {
                    break;
                }
                bytes += cost;
                taken.extend(waiting.messages.pop_front());
            }
            waiting.bytes = waiting.bytes.saturating_sub(bytes);
            if waiting.messages.is_empty() {
                waiting.heartbeat = None;
            }
            heartbeat
        };
        for (_, message) in &taken {
            if let Some((bytes, last)) = snapshot_bytes(message) {
                self.snapshot_bytes.increment(bytes);
                self.snapshots.increment(u64::from(last));
            }
        }
        let messages = taken.into_iter().filter_map(|(group, message)| peer_codec::encode(group, message));
        let batch =
            pb::PeerBatch { greeting: None, heartbeat: Some(heartbeat), messages: messages.collect() };
        self.sent.increment(batch.messages.len() as u64);
        self.sent_bytes.increment(batch.encoded_len() as u64);
        Some(batch)
    }

    async fn next(&self) -> pb::PeerBatch {
        loop {
            if let Some(batch) = self.take() {
                return batch;
            }
            self.ready.notified().await;
        }
    }

    async fn wait(&self) {
        while self.lock().heartbeat.is_none() {
            self.ready.notified().await;
        }
    }

    fn clear(&self) {
        let dropped = std::mem::take(&mut *self.lock());
        self.dropped.increment(dropped.messages.len() as u64);
    }
}

/// Keeps the stream to one store.
struct Sender {
    shared: Arc<Shared>,
    queue: Arc<Queue>,
    to: StoreId,
    /// Why the last stream ended, as it was logged.
    told: Option<String>,
}

impl Sender {
    async fn run(mut self) {
        let mut joined = self.shared.joined.subscribe();
        let mut addresses = self.shared.addresses.subscribe();
        let mut backoff = BACKOFF_MIN;
        loop {
            // Both senders are in `shared`, which is kept.
            let Some((joined, address)) = self.whither(&mut joined, &mut addresses).await else { return };
            self.queue.wait().await;
            let started = Instant::now();
            tokio::select! {
                why = self.exchange(joined, &address) => self.ended(&address, why),
                () = moved(&mut addresses, self.to, &address) => {
                    tracing::debug!(host = self.shared.name, peer = %self.to, "peer moved");
                }
            }
            self.queue.clear();
            let to = self.to;
            self.shared.inbox.tell(|news| {
                news.unreachable.insert(to);
            });
            if started.elapsed() > GOOD_STREAM {
                backoff = BACKOFF_MIN;
                self.told = None;
            }
            tokio::select! {
                () = tokio::time::sleep(jittered(backoff)) => backoff = (backoff * 2).min(BACKOFF_MAX),
                () = moved(&mut addresses, self.to, &address) => backoff = BACKOFF_MIN,
            }
        }
    }

    /// Waits until it is known which cluster this is and where the peer is.
    async fn whither(
        &self,
        joined: &mut watch::Receiver<Option<Joined>>,
        addresses: &mut watch::Receiver<Arc<BTreeMap<StoreId, String>>>,
    ) -> Option<(Joined, String)> {
        let joined = joined.wait_for(Option::is_some).await.ok()?.clone()?;
        let address = addresses.wait_for(|known| known.contains_key(&self.to)).await.ok()?;
        let address = address.get(&self.to)?.clone();
        Some((joined, address))
    }

    /// One stream from its greeting to its end; answers why it ended.
    async fn exchange(&self, joined: Joined, address: &str) -> String {
        let channel = match eggs_daemon::channel::connect(address) {
            Ok(channel) => channel,
            Err(error) => return error.to_string(),
        };
        let mut client = PeerServiceClient::new(channel).max_encoding_message_size(DECODED_BYTES_MAX);
        let greeting = pb::PeerGreeting {
            version: PROTOCOL_VERSION,
            cluster_id: joined.cluster.0.to_vec().into(),
            secret: joined.secret.to_vec().into(),
            from_store: self.shared.store.0,
            to_store: self.to.0,
        };
        let queue = Arc::clone(&self.queue);
        let batches = futures_util::stream::unfold((queue, Some(greeting)), async |(queue, greeting)| {
            let batch = pb::PeerBatch { greeting, ..queue.next().await };
            Some((batch, (queue, None)))
        });
        match client.exchange(batches).await {
            Ok(_) => "the peer ended the stream".to_owned(),
            Err(status) => reason(&status),
        }
    }

    /// Once for each reason while it stays the same.
    fn ended(&mut self, address: &str, why: String) {
        if self.told.as_ref() != Some(&why) {
            tracing::warn!(host = self.shared.name, peer = %self.to, %address, %why, "no stream to the peer");
            self.told = Some(why);
        }
    }
}

/// One line, with the cause of a broken connection.
fn reason(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text.replace('\n', " ")
}

/// Waits until the peer is elsewhere.
async fn moved(addresses: &mut watch::Receiver<Arc<BTreeMap<StoreId, String>>>, to: StoreId, address: &str) {
    // The sender of addresses outlives this; without it nobody moves.
    let _ = addresses.wait_for(|known| known.get(&to).is_none_or(|known| known != address)).await;
}

fn jittered(backoff: Duration) -> Duration {
    // Without entropy there is no jitter.
    let drawn = getrandom::u32().unwrap_or(u32::MAX);
    backoff.mul_f64(0.5 + f64::from(drawn) / f64::from(u32::MAX) / 2.0)
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

    #[test]
    fn batches_are_merged_and_cut_and_the_newest_heartbeat_stays() {
        let queue = Queue::new("test", StoreId(1));
        assert!(queue.take().is_none());
        assert!(queue.push(batch(1, 0, 0)));
        assert!(queue.push(batch(2, 3, 100)));
        let taken = queue.take().unwrap();
        assert_eq!((taken.heartbeat.unwrap().sent_at, taken.messages.len()), (2, 3));
        assert!(queue.take().is_none());

        // Longer than a batch: it goes alone, and the rest in pieces.
        assert!(queue.push(batch(3, 1, BATCH_BYTES_MAX + 1)));
        assert!(queue.push(batch(4, 4, BATCH_BYTES_MAX / 5)));
        assert!(!queue.push(batch(5, 2, BATCH_BYTES_MAX)));
        let sizes: Vec<usize> = std::iter::from_fn(|| queue.take())
            .map(|batch| {
                assert_eq!(batch.heartbeat.unwrap().sent_at, 5);
                batch.messages.len()
            })
            .collect();
        assert_eq!(sizes, [1, 4]);
        assert_eq!(queue.lock().bytes, 0);
        assert!(queue.push(batch(6, 2, BATCH_BYTES_MAX)));
        queue.clear();
        assert!(queue.take().is_none());
    }

    #[test]
    fn backoff_is_drawn_below_its_bound() {
        for _ in 0..100 {
            let drawn = jittered(BACKOFF_MAX);
            assert!(drawn >= BACKOFF_MAX / 2 && drawn <= BACKOFF_MAX, "{drawn:?}");
        }
    }
}
