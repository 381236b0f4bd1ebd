//! HTTP/2 by hand: what well-behaved libraries cannot send.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;
const FRAME_BYTES_MAX: usize = 16 << 10;
/// The setting that says how much of a stream may be sent before it is read, and what it is when nobody says.
const INITIAL_WINDOW: [u8; 2] = [0, 4];
const WINDOW_BYTES: usize = 65_535;
const PATIENCE: Duration = Duration::from_secs(20);

/// A frame as it is on the wire.
#[derive(Debug, Clone)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).expect("length");
        let mut bytes = length.to_be_bytes()[1..].to_vec();
        bytes.extend([self.kind, self.flags]);
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }
}

/// A connection that speaks HTTP/2, up to the first request.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    next: u32,
    /// Of a new stream.
    window: usize,
    /// Frames that came while a request was being sent.
    early: VecDeque<Frame>,
}

impl Connection {
    /// # Panics
    /// When nobody who speaks HTTP/2 listens.
    pub fn open(address: SocketAddr) -> Connection {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(20)).expect("connect");
        let _ = stream.set_nodelay(true);
        // Room for any answer: initial windows of 1 GiB.
        let settings = [&[0, 4][..], &(1u32 << 30).to_be_bytes()].concat();
        let mut hello = PREFACE.to_vec();
        hello.extend(Frame { kind: SETTINGS, flags: 0, stream: 0, payload: settings }.bytes());
        let window = (1u32 << 30).to_be_bytes().to_vec();
        hello.extend(Frame { kind: WINDOW_UPDATE, flags: 0, stream: 0, payload: window }.bytes());
        stream.write_all(&hello).expect("send");
        let mut connection = Connection { stream, next: 1, window: WINDOW_BYTES, early: VecDeque::new() };
        // Its windows hold from the acknowledgement on.
        let deadline = Instant::now() + PATIENCE;
        let settings = loop {
            let frame = connection.frame(deadline).expect("settings");
            if frame.kind == SETTINGS {
                break frame.payload;
            }
        };
        if let Some(window) = settings.chunks_exact(6).find(|setting| setting[..2] == INITIAL_WINDOW) {
            connection.window = number(&window[2..]);
        }
        let ack = Frame { kind: SETTINGS, flags: ACK, stream: 0, payload: Vec::new() };
        assert!(connection.send(&ack.bytes()), "closed at once");
        connection
    }

    /// Sends anything; false when the other side has closed.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.set_write_timeout(Some(Duration::from_secs(20))).expect("timeout");
        self.stream.write_all(bytes).is_ok()
    }

    /// Sends a request with this body, as fast as it is read or until it is answered; the number of its stream.
    pub fn post(&mut self, path: &str, body: &[u8]) -> Option<u32> {
        let stream = self.begin(path)?;
        let pieces: Vec<&[u8]> = body.chunks(FRAME_BYTES_MAX).collect();
        let mut window = self.window;
        for (n, piece) in pieces.iter().enumerate() {
            while window < piece.len() {
                let frame = self.frame(Instant::now() + PATIENCE)?;
                match frame.kind {
                    WINDOW_UPDATE if frame.stream == stream => window += number(&frame.payload),
                    // An answer before the end, or a farewell.
                    HEADERS | DATA | RST_STREAM | GOAWAY => {
                        self.early.push_back(frame);
                        return Some(stream);
                    }
                    _ => self.acknowledge(frame),
                }
            }
            window -= piece.len();
            let flags = if n + 1 == pieces.len() { END_STREAM } else { 0 };
            let frame = Frame { kind: DATA, flags, stream, payload: piece.to_vec() };
            if !self.send(&frame.bytes()) {
                return None;
            }
        }
        if pieces.is_empty() {
            self.send(&Frame { kind: DATA, flags: END_STREAM, stream, payload: Vec::new() }.bytes());
        }
        Some(stream)
    }

    /// Sends the headers of a request.
    pub fn begin(&mut self, path: &str) -> Option<u32> {
        let stream = self.next;
        self.next += 2;
        let mut headers = Vec::new();
        for (name, value) in [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "eggs"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ] {
            // Literal without indexing, new name, no Huffman.
            headers.push(0);
            for text in [name, value] {
                headers.push(u8::try_from(text.len()).ok().filter(|&length| length < 127).expect("length"));
                headers.extend(text.as_bytes());
            }
        }
        let frame = Frame { kind: HEADERS, flags: END_HEADERS, stream, payload: headers };
        self.send(&frame.bytes()).then_some(stream)
    }

    /// Reads until the stream ends: the bytes of its data. `None`: reset, closed or nothing in time.
    pub fn answer(&mut self, stream: u32, patience: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + patience;
        let mut data = Vec::new();
        loop {
            let frame = match self.early.pop_front() {
                Some(frame) => frame,
                None => self.frame(deadline)?,
            };
            match frame.kind {
                GOAWAY => return None,
                RST_STREAM if frame.stream == stream => return None,
                DATA | HEADERS if frame.stream == stream => {
                    if frame.kind == DATA {
                        data.extend(frame.payload);
                    }
                    if frame.flags & END_STREAM != 0 {
                        return Some(data);
                    }
                }
                _ => self.acknowledge(frame),
            }
        }
    }

    fn acknowledge(&mut self, frame: Frame) {
        if matches!(frame.kind, SETTINGS | PING) && frame.flags & ACK == 0 {
            let payload = if frame.kind == PING { frame.payload } else { Vec::new() };
            self.send(&Frame { kind: frame.kind, flags: ACK, stream: 0, payload }.bytes());
        }
    }

    fn frame(&mut self, deadline: Instant) -> Option<Frame> {
        let mut head = [0; 9];
        self.read(&mut head, deadline)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        self.read(&mut payload, deadline)?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & (u32::MAX >> 1);
        Some(Frame { kind: head[3], flags: head[4], stream, payload })
    }

    fn read(&mut self, into: &mut [u8], deadline: Instant) -> Option<()> {
        let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        self.stream.set_read_timeout(Some(left)).ok()?;
        self.stream.read_exact(into).ok()
    }
}

/// Four bytes of a frame.
fn number(bytes: &[u8]) -> usize {
    bytes.iter().take(4).fold(0, |number, byte| number << 8 | usize::from(*byte))
}

/// A message as gRPC frames it.
pub fn grpc_message(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).expect("length");
    [&[0][..], &length.to_be_bytes(), message].concat()
}

/// The message of an answer; `None` when it has none (the call failed).
pub fn answer_bytes(data: &[u8]) -> Option<&[u8]> {
    let length = u32::from_be_bytes(data.get(1..5)?.try_into().ok()?) as usize;
    data.get(5..5 + length)
}
