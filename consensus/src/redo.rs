//! What a turn changes, in one row that is written before the changes: a crash between them is mended with it.
//!
//! sled's own batches are atomic too, but each costs two writes of its file. Its log is a sequence, and a crash cuts it
//! somewhere: when the row is there and the changes are not all there, they are made once more. They say what rows
//! are, not how they change, so twice is as good as once.
//!
//! Layout, little-endian, per group: group u16, index before u64, applied row (length u32, bytes), changes u32, and for
//! each: key (length u32, bytes), kind u8 (0 deleted, 1 value), value (length u32, bytes).

use bytes::{Buf, BufMut, Bytes};
use eggs_consensus_core::{AppliedRow, GroupCommit, GroupId};
use eggs_machine::Batch;

/// Turns with more than this are a batch of sled's: there its two writes cost little.
pub(crate) const BYTES_MAX: usize = 128 << 10;

/// One group's part of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    /// Its index before the turn; 0: it had no state.
    pub before: u64,
    pub commit: GroupCommit,
}

/// `None`: more than fits.
pub(crate) fn encode(changes: &[(u64, &GroupCommit)]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(1024);
    for (before, commit) in changes {
        let applied = commit.applied.to_bytes();
        out.put_u16_le(commit.group.0);
        out.put_u64_le(*before);
        put(&mut out, &applied)?;
        out.put_u32_le(u32::try_from(commit.batch.changes.len()).ok()?);
        for (key, value) in &commit.batch.changes {
            put(&mut out, key)?;
            out.put_u8(u8::from(value.is_some()));
            put(&mut out, value.as_deref().unwrap_or_default())?;
            if out.len() > BYTES_MAX {
                return None;
            }
        }
    }
    Some(out)
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) -> Option<()> {
    out.put_u32_le(u32::try_from(bytes.len()).ok()?);
    out.put_slice(bytes);
    Some(())
}

/// `None`: it is no such row.
pub(crate) fn decode(mut row: Bytes) -> Option<Vec<Change>> {
    let mut changes = Vec::new();
    while row.has_remaining() {
        let group = GroupId(row.try_get_u16_le().ok()?);
        let before = row.try_get_u64_le().ok()?;
        let applied = AppliedRow::from_bytes(&take(&mut row)?)?;
        let mut batch = Batch::default();
        for _ in 0..row.try_get_u32_le().ok()? {
            let key = take(&mut row)?;
            let kind = row.try_get_u8().ok()?;
            let value = take(&mut row)?;
            batch.changes.push((key, (kind != 0).then_some(value)));
        }
        changes.push(Change { before, commit: GroupCommit { group, batch, applied } });
    }
    Some(changes)
}

fn take(row: &mut Bytes) -> Option<Bytes> {
    let length = row.try_get_u32_le().ok()? as usize;
    (length <= row.len()).then(|| row.split_to(length))
}

#[cfg(test)]
mod tests {
    use eggs_consensus_core::Membership;
    use eggs_machine::hash::StateHash;
    use eggs_proto::StoreId;

    use super::*;

    fn commit() -> GroupCommit {
        let changes = vec![
            (Bytes::from_static(b"key"), Some(Bytes::from_static(b"value"))),
            (Bytes::from_static(b""), None),
        ];
        let membership = Membership::founding(&[StoreId(7)]);
        let applied = AppliedRow { index: 9, term: 1, hash: StateHash::default(), membership };
        GroupCommit { group: GroupId(257), batch: Batch { changes }, applied }
    }

    #[test]
    fn it_comes_back_whole_or_not_at_all() {
        let row = Bytes::from(encode(&[(8, &commit()), (0, &commit())]).unwrap());
        let changes = [8, 0].map(|before| Change { before, commit: commit() });
        assert_eq!(decode(row.clone()), Some(changes.to_vec()));
        let whole = encode(&[(8, &commit())]).unwrap().len();
        for cut in (1..row.len()).filter(|&cut| cut != whole) {
            assert_eq!(decode(row.slice(..cut)), None, "{cut}");
        }
    }

    #[test]
    fn what_is_large_is_left_to_sled() {
        let value = Some(Bytes::from(vec![1; BYTES_MAX]));
        let batch = Batch { changes: vec![(Bytes::from_static(b"key"), value)] };
        assert_eq!(encode(&[(8, &GroupCommit { batch, ..commit() })]), None);
    }
}
