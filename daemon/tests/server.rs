//! The port under hostile clients, and its end.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use eggs_daemon::server::{self, MAGIC_BYTES, Routes, Streams};
use eggs_daemon::{CancellationToken, channel, metrics, registry};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

struct Running {
    address: SocketAddr,
    stop: CancellationToken,
    served: JoinHandle<()>,
}

/// Answers what it is sent, to the end.
struct Echo;

impl Streams for Echo {
    fn magic(&self) -> [u8; MAGIC_BYTES] {
        *b"testecho"
    }

    fn serve(&self, mut stream: TcpStream, _: CancellationToken) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(async move {
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        })
    }
}

async fn start(router: Router) -> Running {
    let listener = server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let served =
        tokio::spawn(server::serve(listener, Routes::from(router).with(Arc::new(Echo)), stop.clone()));
    Running { address, stop, served }
}

/// Sends bytes, says no more, and takes what comes until the end or a timeout.
fn exchange(address: SocketAddr, bytes: &[u8], end: bool) -> Vec<u8> {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let _ = stream.write_all(bytes);
    if end {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        answer.extend_from_slice(&buffer[..length]);
    }
    answer
}

fn page(address: SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    String::from_utf8(exchange(address, request.as_bytes(), false)).unwrap()
}

/// splitmix64: hostile bytes need no quality, only a seed.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    (0..length)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (mixed >> 56) as u8
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_bytes_hurt_nobody_else() {
    let running = start(metrics::router(|| Ok(()))).await;
    let address = running.address;
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    tokio::task::spawn_blocking(move || {
        let mut attacks: Vec<Vec<u8>> = vec![
            Vec::new(),
            b"P".to_vec(),
            PREFACE[..20].to_vec(),
            b"GET / HTTP/1.1\r\nhost".to_vec(),
            b"GET /healthz HTTP/9.9\r\n\r\n".to_vec(),
            [&b"GET / HTTP/1.1\r\nx: "[..], &vec![b'a'; 1 << 20]].concat(),
            [&b"GET /"[..], &vec![b'a'; 1 << 20]].concat(),
            [&b"GET / HTTP/1.1\r\n"[..], &b"a: b\r\n".repeat(100_000)].concat(),
            b"POST / HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n".to_vec(),
            b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n".to_vec(),
            // A SETTINGS frame that claims 16 MiB, a HEADERS frame on stream 0, a DATA frame from nowhere.
            [PREFACE, &[0xff, 0xff, 0xff, 4, 0, 0, 0, 0, 0]].concat(),
            [PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0], &[0, 0, 1, 1, 4, 0, 0, 0, 0, 0]].concat(),
            [PREFACE, &[0, 0, 0, 4, 0, 0, 0, 0, 0], &[0, 0, 1, 0, 0, 0, 0, 0, 7, 0]].concat(),
        ];
        for seed in 0..40 {
            attacks.push(noise(seed, 1 + seed as usize * 37));
            attacks.push([PREFACE, &noise(seed, 100 + seed as usize * 91)].concat());
        }
        std::thread::scope(|scope| {
            for chunk in attacks.chunks(12) {
                scope.spawn(move || {
                    for bytes in chunk {
                        exchange(address, bytes, true);
                        exchange(address, bytes, false);
                    }
                });
            }
        });
        assert!(page(address, "/healthz").ends_with("ok\n"));
        assert!(page(address, "/metrics").contains("process_resident_memory_bytes"));
        assert!(page(address, "/nowhere").starts_with("HTTP/1.1 404"));
        assert!(page(address, "/nowhere").ends_with(r#"{"error":"no such page"}"#));
    })
    .await
    .unwrap();
    running.stop.cancel();
    running.served.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_bytes_tell_who_a_connection_is_for() {
    let running = start(Router::new().route("/", get(|| async { "page" }))).await;
    let address = running.address;
    let all = tokio::task::spawn_blocking(move || {
        let mut slow = std::net::TcpStream::connect(address).unwrap();
        slow.set_nodelay(true).unwrap();
        for byte in b"testecho" {
            slow.write_all(&[*byte]).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        slow.write_all(b"more").unwrap();
        slow.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        slow.read_to_end(&mut answer).unwrap();
        (
            answer,
            exchange(address, b"testechoes", true),
            exchange(address, b"testech", true),
            page(address, "/"),
        )
    });
    let (slow, whole, cut, page) = all.await.unwrap();
    assert_eq!((&slow[..], &whole[..], &cut[..]), (&b"testechomore"[..], &b"testechoes"[..], &b""[..]));
    assert!(page.ends_with("page"), "{page}");
    // One that begins so and says no more holds nobody up.
    let _silent = std::net::TcpStream::connect(address).unwrap().write_all(b"test");
    running.stop.cancel();
    running.served.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_lets_requests_finish_and_refuses_new_ones() {
    let (entered, mut waiting) = tokio::sync::mpsc::channel(1);
    let (go, gone) = tokio::sync::watch::channel(false);
    let slow = get(move || {
        let (entered, mut gone) = (entered.clone(), gone.clone());
        async move {
            entered.send(()).await.unwrap();
            gone.wait_for(|gone| *gone).await.unwrap();
            "finished"
        }
    });
    let running = start(Router::new().route("/slow", slow)).await;
    let address = running.address;
    // Half-open clients must not hold the end up.
    let idle = std::net::TcpStream::connect(address).unwrap();
    let request = tokio::task::spawn_blocking(move || {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    waiting.recv().await.unwrap();
    running.stop.cancel();
    while std::net::TcpStream::connect(address).is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(!running.served.is_finished());
    go.send(true).unwrap();
    assert!(request.await.unwrap().ends_with("finished"));
    let since = Instant::now();
    running.served.await.unwrap();
    assert!(since.elapsed() < Duration::from_secs(5), "an idle connection held the end up");
    drop(idle);
}

#[tokio::test]
async fn a_port_in_use_is_one_clear_line() {
    let listener = server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let error = server::bind(address).await.unwrap_err();
    assert_eq!(error.to_string(), format!("cannot listen on {address}: address in use"));
    let error = server::bind("192.0.2.1:0".parse().unwrap()).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot listen on 192.0.2.1:0: not an address of this host");
}

#[tokio::test]
async fn grpc_to_a_service_that_is_not_here_is_unimplemented() {
    let running = start(Router::new()).await;
    let channel = channel::connect(&running.address.to_string()).unwrap();
    let mut client = eggs_proto::pb::registry_service_client::RegistryServiceClient::new(channel);
    let status = client.call(eggs_proto::pb::RegistryRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unimplemented);
    let stop = CancellationToken::new();
    let error =
        registry::Registry::join(&[running.address.to_string()], None, None, &stop).await.unwrap_err();
    assert!(error.to_string().contains("it is not a shuckle"), "{error}");
}
