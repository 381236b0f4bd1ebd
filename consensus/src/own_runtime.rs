//! The consensus thread's own runtime: where it waits, and reads the streams that carry much.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle, Runtime};

use crate::handle::Message;
use crate::inbox::{Inbox, News};

/// How long the streams read on it have to say farewell.
const FAREWELLS_MAX: Duration = Duration::from_millis(200);
const FAREWELLS_LOOK: Duration = Duration::from_millis(5);

/// Of one thread: whoever waits on it drives it.
pub(crate) struct OwnRuntime {
    runtime: Runtime,
}

impl OwnRuntime {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(OwnRuntime { runtime: Builder::new_current_thread().enable_all().build()? })
    }

    pub(crate) fn handle(&self) -> &Handle {
        self.runtime.handle()
    }

    fn has_streams(&self) -> bool {
        self.handle().metrics().num_alive_tasks() > 0
    }

    /// Waits as [`Inbox::take`] does. What peers have sent by then is in it, also when there was something before.
    pub(crate) fn wait(
        &self,
        inbox: &Inbox,
        requests: &mut VecDeque<Message>,
        until: Option<Instant>,
    ) -> News {
        let waits =
            requests.is_empty() && inbox.is_empty() && until.is_none_or(|until| until > Instant::now());
        let has_streams = self.has_streams();
        self.runtime.block_on(async {
            if !waits && has_streams {
                // Looks which streams have something …
                tokio::task::yield_now().await;
                // … and reads them.
                tokio::task::yield_now().await;
            }
            inbox.take(requests, until).await
        })
    }

    /// The streams say why they end.
    pub(crate) fn farewells(&self) {
        self.runtime.block_on(async {
            let latest = Instant::now() + FAREWELLS_MAX;
            while self.has_streams() && Instant::now() < latest {
                tokio::time::sleep(FAREWELLS_LOOK).await;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use eggs_consensus_core::PeerBatch;
    use eggs_proto::{StoreId, Time, pb};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::Semaphore;

    use super::*;
    use crate::inbox::Mail;

    /// A thread that never rests reads all the same.
    #[test]
    fn who_is_busy_reads_what_has_come() {
        let (own, inbox) = (OwnRuntime::new().unwrap(), Arc::new(Inbox::default()));
        let (mut peer, mut socket) = own.runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            (peer, listener.accept().await.unwrap().0)
        });
        let to = Arc::clone(&inbox);
        let room = Arc::new(Semaphore::new(100));
        own.handle().spawn(async move {
            while let Ok(sent_at) = socket.read_u64().await {
                let heartbeat = pb::PeerHeartbeat { sent_at, ..pb::PeerHeartbeat::default() };
                let batch = PeerBatch { heartbeat, messages: Vec::new() };
                let room = Arc::clone(&room).try_acquire_owned().unwrap();
                let mail = Mail {
                    from: StoreId(1),
                    batch,
                    bytes: 8,
                    came: Instant::now(),
                    wall: Time(1),
                    _room: room,
                };
                to.post(mail);
            }
        });
        for n in 1..=20 {
            own.runtime.block_on(peer.write_u64(n)).unwrap();
            inbox.tell(|news| news.hand_over = true);
            let news = own.wait(&inbox, &mut VecDeque::new(), Some(Instant::now()));
            assert!(news.hand_over);
            let sent: Vec<u64> = news.mail.iter().map(|mail| mail.batch.heartbeat.sent_at).collect();
            assert_eq!(sent, [n]);
        }
    }
}
