//! How messages lie on a stream: its magic, then frames of `length: u32 | crc: u32 | message`, little endian, the CRC-32
//! over the message's bytes.

use std::io;
use std::marker::PhantomData;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use eggs_daemon::server::MAGIC_BYTES;
use prost::Message;
use tokio_util::codec::Decoder;

/// The first bytes of a stream.
pub(super) const MAGIC: [u8; MAGIC_BYTES] = *b"eggspeer";

const HEAD_BYTES: usize = 8;

/// Appends a frame.
pub(super) fn encode(message: &impl Message, to: &mut BytesMut) {
    let length = message.encoded_len();
    to.reserve(HEAD_BYTES + length);
    // Longer than any batch.
    to.put_u32_le(u32::try_from(length).unwrap_or(u32::MAX));
    let crc_at = to.len();
    to.put_u32_le(0);
    // There is room: it was made.
    let _ = message.encode(to);
    let crc = crc32fast::hash(&to[crc_at + 4..]);
    to[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Takes frames of messages apart. After an error the stream is of no use.
#[derive(Debug)]
pub(super) struct Frames<M> {
    /// Of a message: what is said to be longer is not waited for.
    bytes_max: usize,
    message: PhantomData<fn() -> M>,
}

impl<M> Frames<M> {
    pub(super) fn new(bytes_max: usize) -> Self {
        Frames { bytes_max, message: PhantomData }
    }
}

impl<M: Message + Default> Decoder for Frames<M> {
    type Item = M;
    type Error = io::Error;

    fn decode(&mut self, from: &mut BytesMut) -> io::Result<Option<M>> {
        let Some(head) = from.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
        let mut head = &head[..];
        let (length, crc) = (head.get_u32_le() as usize, head.get_u32_le());
        if length > self.bytes_max {
            return Err(malformed("a frame that is too long"));
        }
        if from.len() < HEAD_BYTES + length {
            from.reserve(HEAD_BYTES + length - from.len());
            return Ok(None);
        }
        from.advance(HEAD_BYTES);
        let bytes: Bytes = from.split_to(length).freeze();
        if crc32fast::hash(&bytes) != crc {
            return Err(malformed("a frame with a wrong checksum"));
        }
        M::decode(bytes).map(Some).map_err(|_| malformed("a frame that is no message"))
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed: {what}"))
}

#[cfg(test)]
mod tests {
    use eggs_proto::pb;

    use super::*;

    fn farewell(why: &str) -> pb::PeerFarewell {
        pb::PeerFarewell { why: why.to_owned() }
    }

    #[test]
    fn what_comes_in_bits_is_whole_in_the_end() {
        let mut sent = BytesMut::new();
        let messages = [farewell("one"), farewell(""), farewell(&"long".repeat(100))];
        messages.iter().for_each(|message| encode(message, &mut sent));
        let (mut frames, mut buffer, mut got) =
            (Frames::<pb::PeerFarewell>::new(500), BytesMut::new(), Vec::new());
        for byte in sent {
            buffer.put_u8(byte);
            got.extend(frames.decode(&mut buffer).unwrap());
        }
        assert_eq!(got, messages);
    }

    #[test]
    fn golden_frame() {
        let mut sent = BytesMut::new();
        encode(&farewell("bye"), &mut sent);
        assert_eq!(sent[..], *b"\x05\0\0\0\x74\x08\x51\x16\x0a\x03bye");
    }

    /// Each bit of a frame flipped: an error, or it waits for more.
    #[test]
    fn damage_is_noticed() {
        let mut sent = BytesMut::new();
        encode(&farewell("bye"), &mut sent);
        for bit in 0..sent.len() * 8 {
            let mut bad = sent.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let decoded = Frames::<pb::PeerFarewell>::new(100).decode(&mut bad);
            assert!(decoded.is_err() || decoded.is_ok_and(|message| message.is_none()), "bit {bit}");
        }
    }

    #[test]
    fn nothing_is_kept_for_a_frame_that_is_too_long() {
        let mut bytes = BytesMut::from(&[0xff; 8][..]);
        let error = Frames::<pb::PeerFarewell>::new(100).decode(&mut bytes).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
        assert!(bytes.capacity() < 1000);
    }
}
