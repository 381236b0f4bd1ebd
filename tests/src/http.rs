//! Pages over HTTP/1.1, and raw bytes.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(20);

/// An answer.
#[derive(Debug, Clone)]
pub struct Page {
    pub status: u16,
    pub headers: String,
    pub body: String,
}

/// # Panics
/// When nothing like HTTP is answered.
pub fn get(address: SocketAddr, path: &str) -> Page {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n").expect("send");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("receive");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (headers, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{path}: {answer}"));
    let status = headers.split(' ').nth(1).and_then(|code| code.parse().ok());
    let chunked = headers.to_ascii_lowercase().contains("transfer-encoding: chunked");
    Page {
        status: status.unwrap_or_else(|| panic!("{path}: {headers}")),
        headers: headers.to_owned(),
        body: if chunked { unchunked(body) } else { body.to_owned() },
    }
}

fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("size of a chunk");
        let Some(chunk) = rest.get(..size).filter(|chunk| !chunk.is_empty()) else { break };
        whole.push_str(chunk);
        body = rest[size..].trim_start_matches("\r\n");
    }
    whole
}

/// # Panics
/// When the answer is not 200 with JSON.
pub fn json(address: SocketAddr, path: &str) -> serde_json::Value {
    let page = get(address, path);
    assert_eq!(page.status, 200, "{path}: {}", page.body);
    assert!(page.headers.to_ascii_lowercase().contains("content-type: application/json"), "{}", page.headers);
    serde_json::from_str(&page.body).unwrap_or_else(|error| panic!("{path}: {error} in {}", page.body))
}

/// What is wrong by what shuckle's `/api/v1/status` says, but for the machine's own disk being nearly full.
///
/// # Panics
/// When it is no such status.
pub fn problems(status: &serde_json::Value) -> Vec<String> {
    let reasons = status["health"]["reasons"].as_array().unwrap_or_else(|| panic!("no reasons: {status}"));
    let texts = reasons.iter().map(|reason| reason["text"].as_str().unwrap_or_default().to_owned());
    texts.filter(|text| !text.contains("nearly full")).collect()
}

/// Sends bytes on a connection of their own, says that no more will come, and reads what is answered
/// until the other side closes or `patience` passes.
pub fn send_raw(address: SocketAddr, bytes: &[u8], patience: Duration) -> Vec<u8> {
    let mut answer = Vec::new();
    let Ok(mut stream) = TcpStream::connect_timeout(&address, PATIENCE) else { return answer };
    let _ = stream.set_read_timeout(Some(patience));
    let _ = stream.set_write_timeout(Some(patience));
    // The other side may close in the middle: that is an answer too.
    if stream.write_all(bytes).is_ok() {
        let _ = stream.shutdown(std::net::Shutdown::Write);
    }
    let _ = (&mut stream).take(1 << 20).read_to_end(&mut answer);
    answer
}
