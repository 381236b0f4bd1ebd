//! What stores say to one another, to and from the bytes of the wire.
//!
//! Raft's messages go as bytes of their own: nothing of them is decoded before their sender is known to be of the cluster
//! (the decoder of protobuf 2 does not bound its recursion).

use bytes::Bytes;
use eggs_consensus_core::eraftpb;
use eggs_consensus_core::{GroupId, PeerBatch, PeerMessage};
use eggs_machine::hash::StateHash;
use eggs_proto::{StoreId, pb};
use protobuf::Message as _;

/// A piece of a snapshot is 256 KiB at most; what is longer is none.
const PIECE_BYTES_MAX: usize = 1 << 20;

/// Bytes are no message of an honest store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed: {0}")]
pub(crate) struct Malformed(&'static str);

/// About how many bytes a message becomes.
pub(crate) fn cost(message: &PeerMessage) -> usize {
    match message {
        PeerMessage::Raft(message) => {
            let entries = message.entries.iter().map(|entry| entry.data.len() + entry.context.len() + 32);
            128 + message.context.len() + entries.sum::<usize>()
        }
        PeerMessage::Piece { bytes, .. } => 64 + bytes.len(),
        PeerMessage::Sleep { .. } | PeerMessage::Want { .. } => 64,
    }
}

/// `None`: raft's encoder refused it, which it does only for missing required fields; raft has none.
pub(crate) fn encode(group: GroupId, message: PeerMessage) -> Option<pb::PeerMessage> {
    use pb::peer_message::Body;
    let body = match message {
        PeerMessage::Raft(message) => Body::Raft(message.write_to_bytes().ok()?.into()),
        PeerMessage::Sleep { term, index, hash } => {
            let hash = Bytes::copy_from_slice(&hash.to_bytes());
            Body::Sleep(pb::PeerSleep { term, index, hash })
        }
        PeerMessage::Want { index, term, offset } => Body::Want(pb::SnapshotWant { index, term, offset }),
        PeerMessage::Piece { index, term, offset, total, bytes } => {
            let crc = crc32fast::hash(&bytes);
            Body::Piece(pb::SnapshotPiece { index, term, offset, total, bytes, crc })
        }
    };
    Some(pb::PeerMessage { group: u32::from(group.0), body: Some(body) })
}

/// A batch from a store that has shown that it is `from`.
pub(crate) fn decode_batch(from: StoreId, to: StoreId, batch: pb::PeerBatch) -> Result<PeerBatch, Malformed> {
    let messages = batch.messages.into_iter().map(|message| decode(from, to, message));
    Ok(PeerBatch {
        heartbeat: batch.heartbeat.ok_or(Malformed("a batch without a heartbeat"))?,
        messages: messages.collect::<Result<_, _>>()?,
    })
}

fn decode(from: StoreId, to: StoreId, message: pb::PeerMessage) -> Result<(GroupId, PeerMessage), Malformed> {
    use pb::peer_message::Body;
    let group = u16::try_from(message.group).map_err(|_| Malformed("a group that is none"))?;
    let message = match message.body.ok_or(Malformed("an empty message"))? {
        Body::Raft(bytes) => {
            let message =
                eraftpb::Message::parse_from_bytes(&bytes).map_err(|_| Malformed("a raft message"))?;
            if (message.from, message.to) != (from.0, to.0) {
                return Err(Malformed("a raft message of somebody else"));
            }
            PeerMessage::Raft(message)
        }
        Body::Sleep(pb::PeerSleep { term, index, hash }) => {
            let hash = <[u8; 16]>::try_from(&hash[..]).map_err(|_| Malformed("a state hash"))?;
            PeerMessage::Sleep { term, index, hash: StateHash::from_bytes(hash) }
        }
        Body::Want(pb::SnapshotWant { index, term, offset }) => PeerMessage::Want { index, term, offset },
        Body::Piece(pb::SnapshotPiece { index, term, offset, total, bytes, crc }) => {
            if bytes.len() > PIECE_BYTES_MAX {
                return Err(Malformed("a piece of a snapshot that is too long"));
            }
            if crc32fast::hash(&bytes) != crc {
                return Err(Malformed("a piece of a snapshot with a wrong checksum"));
            }
            PeerMessage::Piece { index, term, offset, total, bytes }
        }
    };
    Ok((GroupId(group), message))
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    const FROM: StoreId = StoreId(7);
    const TO: StoreId = StoreId(9);

    fn messages() -> Vec<(GroupId, PeerMessage)> {
        let entry =
            eraftpb::Entry { index: 3, term: 2, data: vec![1, 2, 3].into(), ..eraftpb::Entry::default() };
        let raft = eraftpb::Message {
            from: FROM.0,
            to: TO.0,
            term: 2,
            entries: vec![entry].into(),
            ..eraftpb::Message::default()
        };
        let bytes = Bytes::from_static(b"piece");
        vec![
            (GroupId(0), PeerMessage::Raft(raft)),
            (GroupId(257), PeerMessage::Sleep { term: 1, index: 2, hash: StateHash::from_bytes([3; 16]) }),
            (GroupId(1), PeerMessage::Want { index: 1, term: 2, offset: 3 }),
            (GroupId(2), PeerMessage::Piece { index: 1, term: 2, offset: 3, total: 8, bytes }),
        ]
    }

    fn encoded() -> pb::PeerBatch {
        let messages = messages().into_iter().filter_map(|(group, message)| encode(group, message)).collect();
        pb::PeerBatch { heartbeat: Some(pb::PeerHeartbeat::default()), messages }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let batch = pb::PeerBatch::decode(&encoded().encode_to_vec()[..]).unwrap();
        let decoded = decode_batch(FROM, TO, batch).unwrap();
        assert_eq!(decoded.messages, messages());
    }

    #[test]
    fn what_is_malformed_is_refused() {
        let wrong = |change: &dyn Fn(&mut pb::PeerBatch)| {
            let mut batch = encoded();
            change(&mut batch);
            decode_batch(FROM, TO, batch).unwrap_err()
        };
        wrong(&|batch| batch.heartbeat = None);
        wrong(&|batch| batch.messages[0].group = 65_536);
        wrong(&|batch| batch.messages[0].body = None);
        wrong(&|batch| {
            batch.messages[0].body = Some(pb::peer_message::Body::Raft(Bytes::from_static(b"\xff\xff")));
        });
        wrong(&|batch| {
            let Some(pb::peer_message::Body::Piece(piece)) = &mut batch.messages[3].body else { panic!() };
            piece.crc ^= 1;
        });
        wrong(&|batch| {
            let Some(pb::peer_message::Body::Sleep(sleep)) = &mut batch.messages[1].body else { panic!() };
            sleep.hash = Bytes::new();
        });
        assert!(decode_batch(TO, FROM, encoded()).is_err());
    }

    /// Each byte of a batch flipped, whatever comes of it: no panic.
    #[test]
    fn hostile_bytes_do_not_panic() {
        let good = encoded().encode_to_vec();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                if let Ok(batch) = pb::PeerBatch::decode(&bad[..]) {
                    let _ = decode_batch(FROM, TO, batch);
                }
            }
        }
    }
}
