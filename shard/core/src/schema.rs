//! Keys and rows of a shard's tables.
//!
//! A key is a tag byte, then big-endian integers and raw name bytes, so that keys sort as what they
//! mean. A name holds no zero byte: where something follows it, a zero ends it, and names still sort
//! by bytes (`"a"` before `"a!"`) because the zero is below all of theirs.
//!
//! ```text
//! D dir                    DirectoryRow      owner 0: removed
//! L dir name               EdgeRow           the living map
//! X dir name 0 died_at     DeadEdgeRow       the dead map; deaths of one name in order of time
//! F file                   FileRow           published files and symlinks
//! S file last              Span              `last` is the offset of its last byte: the span that holds
//!                                            an offset is the first key not below it, one seek
//! E file                   EdenRow           files in writing, and what is left of those given up
//! B block_service file     BlockCountRow     reverse index for migration
//! T transaction step       TransactionRow    outcome of a coordinator's step
//! M                        ShardMetaRow      counters
//! ```

use bytes::Bytes;
use eggs_machine::{Table, TableError};
use eggs_proto::{BlockServiceId, InodeId, Time, TransactionId};
use prost::Message;

pub const DIRECTORY: u8 = b'D';
pub const LIVING: u8 = b'L';
pub const DEAD: u8 = b'X';
pub const FILE: u8 = b'F';
pub const SPAN: u8 = b'S';
pub const EDEN: u8 = b'E';
pub const BLOCKS: u8 = b'B';
pub const TRANSACTION: u8 = b'T';
pub const META: u8 = b'M';

/// Coordinator steps as T keys hold them: their numbers in `WriteOp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    CreateDirectory = 20,
    DiscardDirectory = 21,
    LockDirectory = 22,
    UnlockDirectory = 23,
    LockEdge = 24,
    UnlockEdge = 25,
    LinkEdge = 26,
    UnlinkEdge = 27,
    SetOwner = 28,
    RemoveDirectory = 30,
    CreateDirectories = 32,
    DiscardDirectories = 33,
    ExchangeEdge = 34,
    SettleEdge = 35,
    SetOwners = 36,
    ReviveDirectory = 42,
    UndeleteEdge = 43,
    LockDeadEdge = 44,
    FreeDeadEdge = 45,
    PurgeDeadEdge = 46,
    PurgeFile = 47,
    PurgeDirectory = 48,
}

impl Step {
    pub fn from_byte(byte: u8) -> Option<Step> {
        use Step::*;
        [
            CreateDirectory,
            DiscardDirectory,
            LockDirectory,
            UnlockDirectory,
            LockEdge,
            UnlockEdge,
            LinkEdge,
            UnlinkEdge,
            SetOwner,
            RemoveDirectory,
            CreateDirectories,
            DiscardDirectories,
            ExchangeEdge,
            SettleEdge,
            SetOwners,
            ReviveDirectory,
            UndeleteEdge,
            LockDeadEdge,
            FreeDeadEdge,
            PurgeDeadEdge,
            PurgeFile,
            PurgeDirectory,
        ]
        .into_iter()
        .find(|step| *step as u8 == byte)
    }
}

/// `tag id`, the prefix of most keys.
pub fn id_key(tag: u8, id: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(9);
    key.push(tag);
    key.extend_from_slice(&id.to_be_bytes());
    key
}

fn two_ids(tag: u8, first: u64, second: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(17);
    key.push(tag);
    key.extend_from_slice(&first.to_be_bytes());
    key.extend_from_slice(&second.to_be_bytes());
    key
}

pub fn directory_key(directory: InodeId) -> Vec<u8> {
    id_key(DIRECTORY, directory.0)
}

pub fn living_key(directory: InodeId, name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(9 + name.len());
    key.push(LIVING);
    key.extend_from_slice(&directory.0.to_be_bytes());
    key.extend_from_slice(name);
    key
}

pub fn dead_key(directory: InodeId, name: &[u8], died_at: Time) -> Vec<u8> {
    let mut key = Vec::with_capacity(18 + name.len());
    key.push(DEAD);
    key.extend_from_slice(&directory.0.to_be_bytes());
    key.extend_from_slice(name);
    key.push(0);
    key.extend_from_slice(&died_at.0.to_be_bytes());
    key
}

/// After every death of `name`, before those of the next name.
pub fn dead_name_end(directory: InodeId, name: &[u8]) -> Vec<u8> {
    let mut key = id_key(DEAD, directory.0);
    key.extend_from_slice(name);
    key.push(1);
    key
}

pub fn file_key(file: InodeId) -> Vec<u8> {
    id_key(FILE, file.0)
}

/// `last`: the offset of the span's last byte.
pub fn span_key(file: InodeId, last: u64) -> Vec<u8> {
    two_ids(SPAN, file.0, last)
}

pub fn eden_key(file: InodeId) -> Vec<u8> {
    id_key(EDEN, file.0)
}

pub fn blocks_key(service: BlockServiceId, file: InodeId) -> Vec<u8> {
    two_ids(BLOCKS, service.0, file.0)
}

pub fn transaction_key(transaction: TransactionId, step: Step) -> Vec<u8> {
    let mut key = id_key(TRANSACTION, transaction.0);
    key.push(step as u8);
    key
}

pub const META_KEY: &[u8] = &[META];

/// A key taken apart. `None` when it is none of ours (SH-1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key<'a> {
    Directory(InodeId),
    Living(InodeId, &'a [u8]),
    Dead(InodeId, &'a [u8], Time),
    File(InodeId),
    Span(InodeId, u64),
    Eden(InodeId),
    Blocks(BlockServiceId, InodeId),
    Transaction(TransactionId, Step),
    Meta,
}

impl<'a> Key<'a> {
    pub fn parse(key: &'a [u8]) -> Option<Key<'a>> {
        let (&tag, rest) = key.split_first()?;
        if tag == META {
            return rest.is_empty().then_some(Key::Meta);
        }
        let (first, rest) = take_u64(rest)?;
        let only = |key: Key<'a>| rest.is_empty().then_some(key);
        let then_u64 = || take_u64(rest).filter(|(_, rest)| rest.is_empty()).map(|(second, _)| second);
        match tag {
            DIRECTORY => only(Key::Directory(InodeId(first))),
            LIVING => (!rest.is_empty()).then_some(Key::Living(InodeId(first), rest)),
            DEAD => {
                let (name, death) = rest.split_at_checked(rest.len().checked_sub(9)?)?;
                let (&zero, died_at) = death.split_first()?;
                let (died_at, _) = take_u64(died_at)?;
                (zero == 0 && !name.is_empty()).then_some(Key::Dead(InodeId(first), name, Time(died_at)))
            }
            FILE => only(Key::File(InodeId(first))),
            SPAN => Some(Key::Span(InodeId(first), then_u64()?)),
            EDEN => only(Key::Eden(InodeId(first))),
            BLOCKS => Some(Key::Blocks(BlockServiceId(first), InodeId(then_u64()?))),
            TRANSACTION => match rest {
                [step] => Some(Key::Transaction(TransactionId(first), Step::from_byte(*step)?)),
                _ => None,
            },
            _ => None,
        }
    }
}

fn take_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (first, rest) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*first), rest))
}

/// Decodes a stored value; bytes that do not decode are damage, not an answer.
pub fn decode<R: Message + Default>(value: Bytes) -> Result<R, TableError> {
    R::decode(value).map_err(|error| TableError(format!("stored row: {error}")))
}

/// The row under `key`, decoded.
pub fn get<R: Message + Default, T: Table + ?Sized>(table: &T, key: &[u8]) -> Result<Option<R>, TableError> {
    table.get(key)?.map(decode).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIR: InodeId = InodeId(0x0020_0000_0000_0102);
    const FILE_ID: InodeId = InodeId(0x2020_0000_0000_0003);

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Golden: keys are a stored format.
    #[test]
    fn golden_keys() {
        let cases: [(Vec<u8>, &str, Key<'_>); 9] = [
            (directory_key(DIR), "440020000000000102", Key::Directory(DIR)),
            (living_key(DIR, b"ab"), "4c00200000000001026162", Key::Living(DIR, b"ab")),
            (
                dead_key(DIR, b"ab", Time(5)),
                "5800200000000001026162000000000000000005",
                Key::Dead(DIR, b"ab", Time(5)),
            ),
            (file_key(FILE_ID), "462020000000000003", Key::File(FILE_ID)),
            (span_key(FILE_ID, 255), "53202000000000000300000000000000ff", Key::Span(FILE_ID, 255)),
            (eden_key(FILE_ID), "452020000000000003", Key::Eden(FILE_ID)),
            (
                blocks_key(BlockServiceId(7), FILE_ID),
                "4200000000000000072020000000000003",
                Key::Blocks(BlockServiceId(7), FILE_ID),
            ),
            (
                transaction_key(TransactionId(9), Step::LinkEdge),
                "5400000000000000091a",
                Key::Transaction(TransactionId(9), Step::LinkEdge),
            ),
            (META_KEY.to_vec(), "4d", Key::Meta),
        ];
        for (key, golden, parsed) in cases {
            assert_eq!(hex(&key), golden);
            assert_eq!(Key::parse(&key), Some(parsed));
        }
    }

    #[test]
    fn keys_that_are_none() {
        for key in [
            &b""[..],
            b"Q00000000",
            b"D0000000",
            b"D000000000",
            b"L00000000",
            b"X00000000\x0000000000",
            b"X00000000a\x0100000000",
            b"S00000000",
            b"T00000000\x01",
            b"M0",
        ] {
            assert_eq!(Key::parse(key), None, "{key:?}");
        }
    }

    #[test]
    fn deaths_sort_by_name_then_time() {
        let mut keys = vec![
            dead_key(DIR, b"a", Time(1)),
            dead_key(DIR, b"a", Time(u64::MAX)),
            dead_name_end(DIR, b"a"),
            dead_key(DIR, b"a\x01", Time(0)),
            dead_key(DIR, b"a!", Time(0)),
            dead_key(DIR, b"b", Time(0)),
        ];
        let sorted = keys.clone();
        keys.sort();
        // A name may go on with the byte 1, so the end of "a" may not hide its deaths.
        assert_eq!(keys, sorted);
    }
}
