//! A slow disk: what a block service answers comes later by some time. Everything else is as it is.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

const CHUNK: usize = 64 << 10;
/// Chunks on their way: more than a block service sends in the time of the delay.
const CHUNKS: usize = 4096;

/// Passes connections on until it is dropped.
pub struct Proxy {
    pub address: SocketAddr,
    delay_ns: Arc<AtomicU64>,
    listener: Option<TcpListener>,
    task: Option<AbortOnDropHandle<()>>,
}

impl Proxy {
    /// Its address is known before that of the one behind it.
    pub async fn bind() -> Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        Ok(Proxy {
            address: listener.local_addr()?,
            delay_ns: Arc::default(),
            listener: Some(listener),
            task: None,
        })
    }

    /// Passes on to `behind`.
    pub fn pass(&mut self, behind: SocketAddr) {
        let Some(listener) = self.listener.take() else { return };
        let delay_ns = Arc::clone(&self.delay_ns);
        let accept = async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let delay_ns = Arc::clone(&delay_ns);
                connections.spawn(async move {
                    // Either end may go at any time.
                    let _ = connection(near, behind, &delay_ns).await;
                });
            }
        };
        self.task = Some(AbortOnDropHandle::new(tokio::spawn(accept)));
    }

    /// From now on answers come later by this.
    pub fn set_delay(&self, delay: Duration) {
        self.delay_ns.store(u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

async fn connection(near: TcpStream, behind: SocketAddr, delay_ns: &AtomicU64) -> std::io::Result<()> {
    let far = TcpStream::connect(behind).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (mut from_near, mut to_near) = near.into_split();
    let (mut from_far, mut to_far) = far.into_split();
    let (late, mut due) = mpsc::channel::<(Instant, Vec<u8>)>(CHUNKS);
    let ask = async { tokio::io::copy(&mut from_near, &mut to_far).await.map(|_| ()) };
    let hear = async {
        loop {
            let mut chunk = Vec::with_capacity(CHUNK);
            if from_far.read_buf(&mut chunk).await? == 0 {
                return Ok(());
            }
            let at = Instant::now() + Duration::from_nanos(delay_ns.load(Ordering::Relaxed));
            if late.send((at, chunk)).await.is_err() {
                return Ok(());
            }
        }
    };
    let answer = async {
        while let Some((at, chunk)) = due.recv().await {
            tokio::time::sleep_until(at.into()).await;
            to_near.write_all(&chunk).await?;
        }
        Ok(())
    };
    tokio::select! { done = ask => done, done = hear => done, done = answer => done }
}
