//! What goes to another store.

use std::collections::BTreeMap;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use eggs_consensus_core::PeerBatch;
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::{StoreId, pb};
use rustix::net::sockopt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::farewell::hear_farewell;
use super::frames;
use super::link::{Link, write_all};
use crate::places::{Joined, Shared};

/// Connecting within a cluster takes a round trip. Longer than this, the packets are lost: a fresh attempt gets through
/// sooner than the kernel's ever slower repetitions.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// The kernel gives a connection up whose bytes are not acknowledged, or not read, for so long; heartbeats see to it that
/// there are some. Shorter, and a peer that is held up by its disk would lose what it has not read yet.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(3);
/// When a stream breaks, why may still be on its way.
const FAREWELL_WAIT: Duration = Duration::from_millis(100);
/// Between attempts to open a stream; doubled each time, and drawn by chance below it.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A stream that held this long was a good one.
const GOOD_STREAM: Duration = Duration::from_secs(2);

/// All peers; owned by the consensus thread.
pub(crate) struct Outbox {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    peers: BTreeMap<StoreId, Peer>,
}

struct Peer {
    link: Arc<Link>,
    task: AbortHandle,
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Outbox {
    pub(crate) fn new(shared: Arc<Shared>, runtime: tokio::runtime::Handle) -> Self {
        Outbox { shared, runtime, peers: BTreeMap::new() }
    }

    /// Whether anything was ever sent.
    pub(crate) fn has_peers(&self) -> bool {
        !self.peers.is_empty()
    }

    /// False: there was no room for all of it.
    pub(crate) fn send(&mut self, to: StoreId, batch: PeerBatch) -> bool {
        let peer = self.peers.entry(to).or_insert_with(|| {
            let link = Arc::new(Link::new(self.shared.name, to));
            let sender = Sender { shared: Arc::clone(&self.shared), link: Arc::clone(&link), to, told: None };
            Peer { link, task: self.runtime.spawn(sender.run()).abort_handle() }
        });
        peer.link.push(batch)
    }
}

/// Keeps the stream to one store.
struct Sender {
    shared: Arc<Shared>,
    link: Arc<Link>,
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
            self.link.wait().await;
            let started = Instant::now();
            tokio::select! {
                why = self.exchange(joined, &address) => self.ended(&address, why),
                () = moved(&mut addresses, self.to, &address) => {
                    tracing::debug!(host = self.shared.name, peer = %self.to, "peer moved");
                }
            }
            self.link.clear();
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
        let stream = match tokio::time::timeout(CONNECT_TIMEOUT, connect(address)).await {
            Ok(Ok(stream)) => Arc::new(stream),
            Ok(Err(error)) => return format!("cannot connect: {error}"),
            Err(_) => return "cannot connect: no answer".to_owned(),
        };
        let greeting = pb::PeerGreeting {
            version: PROTOCOL_VERSION,
            cluster_id: joined.cluster.0.to_vec().into(),
            secret: joined.secret.to_vec().into(),
            from_store: self.shared.store.0,
            to_store: self.to.0,
        };
        let mut hello = BytesMut::from(&frames::MAGIC[..]);
        frames::encode(&greeting, &mut hello);
        let write = async {
            match write_all(&stream, &hello).await {
                Ok(()) => self.link.pump(&stream).await,
                Err(error) => error,
            }
        };
        let mut words = pin!(hear_farewell(&stream));
        let error = tokio::select! {
            words = &mut words => return match words {
                Ok(Some(words)) => words,
                Ok(None) => "the peer ended the stream".to_owned(),
                Err(error) => error.to_string(),
            },
            error = write => error,
        };
        match tokio::time::timeout(FAREWELL_WAIT, words).await {
            Ok(Ok(Some(words))) => words,
            _ => error.to_string(),
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

async fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let unacknowledged = u32::try_from(UNACKNOWLEDGED_MAX.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(&stream, unacknowledged)?;
    Ok(stream)
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
    use super::*;

    #[test]
    fn backoff_is_drawn_below_its_bound() {
        for _ in 0..100 {
            let drawn = jittered(BACKOFF_MAX);
            assert!(drawn >= BACKOFF_MAX / 2 && drawn <= BACKOFF_MAX, "{drawn:?}");
        }
    }
}
