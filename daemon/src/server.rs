//! One port for everything: gRPC (HTTP/2) and pages, JSON, metrics (HTTP/1.1 or 2).
//!
//! DA-3: a client can only hurt its own connection. What each can take is bounded: connections,
//! streams, header bytes, the time until its first request, silence (HTTP/2 pings, HTTP/1 header
//! timeout); sizes of messages are bounded where they are decoded ([`grpc`]).

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What one stream may have sent that nobody has read yet: a data message; a gigabyte a second where answers take a
/// millisecond.
pub const STREAM_WINDOW: u32 = 1 << 20;
/// What one connection may have sent that nobody has read yet. Where requests wait for a slow disk, that is what a
/// client costs in memory; streams that wait for one disk leave room to those for others.
pub const CONNECTION_WINDOW: u32 = 8 << 20;
/// A data message goes in one frame.
pub const FRAME_BYTES_MAX: u32 = 1 << 20;

/// Beyond this, new connections wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 4096;
/// Requests in flight on one connection.
const STREAMS_MAX: u32 = 4096;
const HEADER_BYTES_MAX: u32 = 32 << 10;
/// Bytes buffered to be sent, per stream.
const SEND_BUFFER_BYTES: usize = 2 << 20;
/// By then a client has said which protocol it speaks.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);
/// As long as HTTP/2's, the longest.
const PREFACE_BYTES: usize = 24;
/// Of a protocol that is not HTTP ([`Streams`]).
pub const MAGIC_BYTES: usize = 8;
/// The first packet has all of the magic, but for malice and very bad luck. Doubled each time.
const MAGIC_PAUSE: Duration = Duration::from_millis(5);
/// HTTP/1: from the connection, or the end of the last request, to the end of the next header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// How long requests in flight may take once the daemon is told to stop.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// After a failure to accept (out of file descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const UPKEEP_INTERVAL: Duration = Duration::from_secs(10);

/// The port cannot be had.
#[derive(Debug)]
pub struct BindError {
    pub address: SocketAddr,
    pub source: io::Error,
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = self.address;
        match self.source.kind() {
            io::ErrorKind::AddrInUse => write!(f, "cannot listen on {address}: address in use"),
            io::ErrorKind::AddrNotAvailable => {
                write!(f, "cannot listen on {address}: not an address of this host")
            }
            io::ErrorKind::PermissionDenied => write!(f, "cannot listen on {address}: permission denied"),
            _ => write!(f, "cannot listen on {address}: {}", self.source),
        }
    }
}

impl std::error::Error for BindError {}

/// A protocol of its own on the same port. Connections whose first bytes are its magic are given to it.
pub trait Streams: Send + Sync + 'static {
    /// No beginning of an HTTP request.
    fn magic(&self) -> [u8; MAGIC_BYTES];

    /// One connection, its magic unread, from its first byte to its last. Ends soon after `stop`, or is cut off.
    fn serve(&self, stream: TcpStream, stop: CancellationToken) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// What a port serves.
#[derive(Clone)]
pub struct Routes {
    router: Router,
    streams: Option<Arc<dyn Streams>>,
}

impl From<Router> for Routes {
    fn from(router: Router) -> Self {
        Routes { router, streams: None }
    }
}

impl Routes {
    #[must_use]
    pub fn with(self, streams: Arc<dyn Streams>) -> Self {
        Routes { streams: Some(streams), ..self }
    }
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Routes").field("router", &self.router).finish_non_exhaustive()
    }
}

/// Takes the port; connections wait in the kernel's queue until [`serve`].
///
/// # Errors
/// The address and why, in one line.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, source })
}

/// The routes of one gRPC service, to be merged with others. Set the service's message limits
/// before (`max_decoding_message_size`, `max_encoding_message_size`).
pub fn grpc<S>(service: S) -> Router
where
    S: tower::Service<Request, Error = Infallible>
        + tonic::server::NamedService
        + Clone
        + Send
        + Sync
        + 'static,
    S::Response: IntoResponse,
    S::Future: Send + 'static,
{
    Router::new().route_service(&format!("/{}/{{*rest}}", S::NAME), service)
}

/// Serves `routes` on `listener` until `stop`; then lets the requests in flight finish, for at most
/// ten seconds. Paths the router does not have are answered with a JSON 404 (gRPC: unimplemented);
/// it must have no fallback of its own.
pub async fn serve(listener: TcpListener, routes: impl Into<Routes>, stop: CancellationToken) {
    let Routes { router, streams } = routes.into();
    let router = router.fallback(unknown);
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    let mut upkeep = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &slots) => accepted,
            Some(_) = connections.join_next() => continue,
            _ = upkeep.tick() => {
                crate::metrics::upkeep();
                metrics::gauge!("eggs_connections").set(connections.len() as f64);
                continue;
            }
        };
        match accepted {
            Ok((stream, slot)) => {
                let (router, streams, stop) = (router.clone(), streams.clone(), stop.clone());
                connections.spawn(async move {
                    dispatch(stream, router, streams, stop).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_MAX, drained).await.is_err() {
        tracing::warn!(connections = connections.len(), "requests did not finish in time, cutting them off");
        connections.shutdown().await;
    }
}

type Slot = tokio::sync::OwnedSemaphorePermit;

/// Cancel safe: nothing is accepted before there is a slot for it.
async fn accept(listener: &TcpListener, slots: &Arc<Semaphore>) -> io::Result<(TcpStream, Slot)> {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, slot))
}

fn builder() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX as usize)
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADER_BYTES_MAX)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    builder
}

async fn dispatch(
    stream: TcpStream,
    router: Router,
    streams: Option<Arc<dyn Streams>>,
    stop: CancellationToken,
) {
    let preface = Instant::now() + PREFACE_TIMEOUT;
    let Some(streams) = streams else { return connection(stream, router, preface, stop).await };
    let found = tokio::select! {
        found = tokio::time::timeout_at(preface, begins_with(&stream, streams.magic())) => found,
        () = stop.cancelled() => return,
    };
    match found {
        Ok(Ok(true)) => streams.serve(stream, stop).await,
        Ok(Ok(false)) => connection(stream, router, preface, stop).await,
        // It said nothing, or is gone.
        Ok(Err(_)) | Err(_) => {}
    }
}

/// Whether the first bytes are `magic`; they stay unread.
async fn begins_with(stream: &TcpStream, magic: [u8; MAGIC_BYTES]) -> io::Result<bool> {
    let (mut first, mut pause) = ([0; MAGIC_BYTES], MAGIC_PAUSE);
    loop {
        let n = stream.peek(&mut first).await?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if n == MAGIC_BYTES || first[..n] != magic[..n] {
            return Ok(first == magic);
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
}

/// One connection from its first byte to its last. Its errors are the client's affair.
async fn connection(stream: TcpStream, router: Router, preface: Instant, stop: CancellationToken) {
    let received = Arc::new(AtomicUsize::new(0));
    let io = TokioIo::new(Counted { stream, received: Arc::clone(&received) });
    let builder = builder();
    let mut served = pin!(builder.serve_connection(io, TowerToHyperService::new(router)));
    let mut preface = pin!(tokio::time::sleep_until(preface));
    let (mut greeted, mut stopping) = (false, false);
    loop {
        tokio::select! {
            result = served.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection ended");
                }
                return;
            }
            () = preface.as_mut(), if !greeted => {
                // hyper waits for ever for the bytes that tell HTTP/1 from HTTP/2.
                if received.load(Ordering::Relaxed) < PREFACE_BYTES {
                    return;
                }
                greeted = true;
            }
            () = stop.cancelled(), if !stopping => {
                stopping = true;
                served.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Counts what comes in.
struct Counted {
    stream: TcpStream,
    received: Arc<AtomicUsize>,
}

impl AsyncRead for Counted {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        let poll = Pin::new(&mut this.stream).poll_read(context, buffer);
        this.received.fetch_add(buffer.filled().len() - before, Ordering::Relaxed);
        poll
    }
}

impl AsyncWrite for Counted {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, slices)
    }
}

/// gRPC's "unimplemented".
const GRPC_UNIMPLEMENTED: HeaderValue = HeaderValue::from_static("12");

async fn unknown(request: Request) -> Response {
    let kind = request.headers().get(header::CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        let kind = HeaderValue::from_static("application/grpc");
        return (
            [
                (header::CONTENT_TYPE, kind),
                (header::HeaderName::from_static("grpc-status"), GRPC_UNIMPLEMENTED),
            ],
            (),
        )
            .into_response();
    }
    (StatusCode::NOT_FOUND, axum::Json(serde_json::json!({ "error": "no such page" }))).into_response()
}
