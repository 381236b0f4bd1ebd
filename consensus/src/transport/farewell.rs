//! How a stream ends: the one who reads it says why, the one who writes it hears that.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use eggs_proto::pb;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::codec::Decoder as _;

use super::frames::{self, Frames};

/// A stream is closed no later than this after it was refused.
const FAREWELL_MAX: Duration = Duration::from_secs(1);
/// Longer than any farewell.
const FAREWELL_BYTES_MAX: usize = 4 << 10;

pub(super) const STOPPED: &str = "this store has stopped";

/// Why a stream is ended, in one line.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) String);

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Refusal(error.to_string())
    }
}

pub(super) fn refused(why: impl Into<String>) -> Refusal {
    Refusal(why.into())
}

/// Tells the other side why. Closed before it was read to its end, a stream would be reset, and the words lost.
pub(super) async fn say_farewell(mut stream: TcpStream, why: String) {
    let mut frame = BytesMut::new();
    frames::encode(&pb::PeerFarewell { why }, &mut frame);
    let part = async {
        stream.write_all(&frame).await?;
        stream.shutdown().await?;
        let mut rest = [0; 1 << 10];
        while stream.read(&mut rest).await? > 0 {}
        Ok::<(), io::Error>(())
    };
    // Who does not listen need not hear it.
    let _ = tokio::time::timeout(FAREWELL_MAX, part).await;
}

/// Why the other side ends the stream; `None`: it does not say.
pub(super) async fn hear_farewell(stream: &TcpStream) -> io::Result<Option<String>> {
    let mut words = Frames::<pb::PeerFarewell>::new(FAREWELL_BYTES_MAX);
    let mut buffer = BytesMut::new();
    loop {
        match stream.readable().await.and_then(|()| stream.try_read_buf(&mut buffer)) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        if let Some(farewell) = words.decode(&mut buffer)? {
            return Ok(Some(farewell.why.replace('\n', " ")));
        }
    }
}
