//! The bytes of a snapshot file; the layout stands at the top of [`snapshot_files`](super).

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;
use eggs_consensus_core::{GroupId, Membership, SnapshotMeta, StorageError};
use eggs_machine::Row;
use eggs_machine::hash::StateHash;
use eggs_proto::{limits, pb};
use prost::Message;

use super::{damaged, failed};

const MAGIC: &[u8; 8] = b"EGGSSNAP";
const VERSION: u32 = 2;
/// The footer without the membership.
const FOOTER_BYTES_MIN: usize = 40;
/// Twenty bytes for each member, twice as many as there may be.
const FOOTER_BYTES_MAX: usize = FOOTER_BYTES_MIN + 64 + 20 * 2 * limits::MEMBERS_MAX;
/// Length and checksum of the footer.
const TAIL_BYTES: usize = 8;
/// A page longer than this is not one (rows are bounded by messages of 8 MiB).
const PAGE_BYTES_MAX: u32 = 1 << 30;

pub(super) fn encode_header(group: GroupId) -> [u8; 16] {
    let mut header = [0; 16];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..].copy_from_slice(&u32::from(group.0).to_le_bytes());
    header
}

/// Everything after the last page.
pub(super) fn encode_end(meta: &SnapshotMeta) -> Vec<u8> {
    let mut footer = Vec::with_capacity(FOOTER_BYTES_MAX);
    footer.extend_from_slice(&meta.index.to_le_bytes());
    footer.extend_from_slice(&meta.term.to_le_bytes());
    footer.extend_from_slice(&meta.hash.to_bytes());
    footer.extend_from_slice(&meta.bytes.to_le_bytes());
    footer.extend_from_slice(&pb::Membership::from(&meta.membership).encode_to_vec());
    let length = footer.len() as u32;
    let crc = crc32fast::hash(&footer);
    [&0u32.to_le_bytes()[..], &footer, &length.to_le_bytes(), &crc.to_le_bytes()].concat()
}

fn decode_footer(footer: &[u8]) -> Option<SnapshotMeta> {
    let (fixed, membership) = footer.split_first_chunk::<FOOTER_BYTES_MIN>()?;
    let number = |at: usize| fixed[at..at + 8].iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte));
    let mut hash = [0; 16];
    hash.copy_from_slice(&fixed[16..32]);
    let membership = Membership::from(&pb::Membership::decode(membership).ok()?);
    let hash = StateHash::from_bytes(hash);
    Some(SnapshotMeta { index: number(0), term: number(8), hash, bytes: number(32), membership })
}

/// The footer of a file whose header is right.
pub(super) fn read_meta(path: &Path, file: &File) -> Result<SnapshotMeta, StorageError> {
    let io_error = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => damaged(path, "too short"),
        _ => failed(path, &error),
    };
    let mut header = [0; 16];
    file.read_exact_at(&mut header, 0).map_err(io_error)?;
    check_version(path, &header)?;
    let length = file.metadata().map_err(io_error)?.len();
    let mut end = vec![0; (FOOTER_BYTES_MAX + TAIL_BYTES).min(usize::try_from(length).unwrap_or(usize::MAX))];
    let from = length - end.len() as u64;
    file.read_exact_at(&mut end, from).map_err(io_error)?;
    let meta = (|| {
        let (rest, crc) = end.split_last_chunk::<4>()?;
        let (rest, length) = rest.split_last_chunk::<4>()?;
        let footer = rest.get(rest.len().checked_sub(u32::from_le_bytes(*length) as usize)?..)?;
        (crc32fast::hash(footer) == u32::from_le_bytes(*crc)).then(|| decode_footer(footer))?
    })();
    meta.ok_or_else(|| damaged(path, "wrong checksum of the footer"))
}

fn check_version(path: &Path, header: &[u8; 16]) -> Result<(), StorageError> {
    if !header.starts_with(MAGIC) {
        return Err(damaged(path, "it is not a snapshot"));
    }
    let version = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
    if version != VERSION {
        let path = path.display();
        return Err(StorageError::new(format!(
            "{path}: a snapshot of version {version}, this build reads version {VERSION}"
        )));
    }
    Ok(())
}

/// The page at `at` (0: the first) and where the next begins; `None` after the last.
pub(super) fn read_page(
    path: &Path,
    file: &File,
    group: GroupId,
    at: u64,
) -> Result<Option<(Bytes, u64)>, StorageError> {
    let io_error = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => damaged(path, "too short"),
        _ => failed(path, &error),
    };
    let mut at = at;
    if at == 0 {
        let mut header = [0; 16];
        At { file, at }.read_exact(&mut header).map_err(io_error)?;
        check_version(path, &header)?;
        if header != encode_header(group) {
            return Err(damaged(path, "it is not a snapshot of this group"));
        }
        at = header.len() as u64;
    }
    let mut reader = At { file, at };
    let length = read_u32(&mut reader).map_err(io_error)?;
    if length == 0 {
        return Ok(None);
    }
    let crc = read_u32(&mut reader).map_err(io_error)?;
    if length > PAGE_BYTES_MAX {
        return Err(damaged(path, "a page is too long"));
    }
    let mut page = Vec::new();
    reader.take(u64::from(length)).read_to_end(&mut page).map_err(io_error)?;
    if page.len() != length as usize || crc32fast::hash(&page) != crc {
        return Err(damaged(path, "wrong checksum of a page"));
    }
    Ok(Some((Bytes::from(page), at + 8 + u64::from(length))))
}

/// Calls `each` with every page; answers where the file should end.
pub(super) fn read_pages(
    path: &Path,
    file: &File,
    group: GroupId,
    each: &mut dyn FnMut(Bytes) -> Result<(), StorageError>,
) -> Result<u64, StorageError> {
    let io_error = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => damaged(path, "too short"),
        _ => failed(path, &error),
    };
    let mut reader = BufReader::with_capacity(1 << 20, At { file, at: 0 });
    let mut header = [0; 16];
    reader.read_exact(&mut header).map_err(io_error)?;
    check_version(path, &header)?;
    if header != encode_header(group) {
        return Err(damaged(path, "it is not a snapshot of this group"));
    }
    let mut at = header.len() as u64;
    loop {
        let length = read_u32(&mut reader).map_err(io_error)?;
        if length == 0 {
            break;
        }
        let crc = read_u32(&mut reader).map_err(io_error)?;
        if length > PAGE_BYTES_MAX {
            return Err(damaged(path, "a page is too long"));
        }
        let mut page = Vec::new();
        (&mut reader).take(u64::from(length)).read_to_end(&mut page).map_err(io_error)?;
        if page.len() != length as usize || crc32fast::hash(&page) != crc {
            return Err(damaged(path, "wrong checksum of a page"));
        }
        each(Bytes::from(page))?;
        at += 8 + u64::from(length);
    }
    let mut end = Vec::new();
    let max = (FOOTER_BYTES_MAX + TAIL_BYTES) as u64;
    (&mut reader).take(max).read_to_end(&mut end).map_err(io_error)?;
    // The footer is checked where it is read; here only that it follows the pages at once.
    let length =
        end.len().checked_sub(TAIL_BYTES).and_then(|length| Some((length, end.get(length..length + 4)?)));
    if length.is_none_or(|(length, stored)| stored != (length as u32).to_le_bytes()) {
        return Err(damaged(path, "its pages do not end at its footer"));
    }
    Ok(at + 4 + end.len() as u64)
}

/// A file read from its beginning, whoever else reads it.
struct At<'a> {
    file: &'a File,
    at: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

fn read_u32(reader: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    reader.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

pub(super) fn encode_page(rows: &[Row]) -> Vec<u8> {
    let bytes = rows.iter().map(|(key, value)| key.len() + value.len() + 8).sum();
    let mut page = Vec::with_capacity(bytes);
    for part in rows.iter().flat_map(|(key, value)| [key, value]) {
        // Keys and values are far below 4 GiB (messages are bounded by 8 MiB).
        page.extend_from_slice(&(part.len() as u32).to_le_bytes());
        page.extend_from_slice(part);
    }
    page
}

pub(super) fn decode_page(mut page: Bytes) -> Option<Vec<Row>> {
    let mut part = || -> Option<Bytes> {
        let length = page.get(..4)?;
        let length = u32::from_le_bytes(length.try_into().ok()?) as usize;
        let part = (page.len() - 4 >= length).then(|| page.slice(4..4 + length))?;
        page = page.slice(4 + length..);
        Some(part)
    };
    let mut rows = Vec::new();
    while let Some(key) = part() {
        // Copied: a row must not keep its whole page in memory.
        rows.push((Bytes::copy_from_slice(&key), Bytes::copy_from_slice(&part()?)));
    }
    page.is_empty().then_some(rows)
}

#[cfg(test)]
mod tests {
    use eggs_proto::StoreId;

    use super::*;

    #[test]
    fn golden_bytes() {
        let membership = Membership { voters: vec![StoreId(1)], learners: vec![StoreId(2)], index: 4 };
        let meta =
            SnapshotMeta { index: 1, term: 2, hash: StateHash::from_bytes([9; 16]), bytes: 3, membership };
        let end = encode_end(&meta);
        assert_eq!(end[..20], [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(end[20..44], [[9; 16].as_slice(), &[3, 0, 0, 0, 0, 0, 0, 0]].concat());
        let membership =
            [&[10, 8, 1, 0, 0, 0, 0, 0, 0, 0][..], &[18, 8, 2, 0, 0, 0, 0, 0, 0, 0, 24, 4]].concat();
        assert_eq!(end[44..66], membership);
        assert_eq!(end[66..70], [62, 0, 0, 0]);
        assert_eq!(end.len(), 74);
        assert_eq!(decode_footer(&end[4..66]), Some(meta));
        assert_eq!(encode_header(GroupId(0x0102)), *b"EGGSSNAP\x02\x00\x00\x00\x02\x01\x00\x00");
        let page = encode_page(&[(Bytes::from_static(b"k"), Bytes::from_static(b"vv"))]);
        assert_eq!(page, [1, 0, 0, 0, b'k', 2, 0, 0, 0, b'v', b'v']);
    }
}
