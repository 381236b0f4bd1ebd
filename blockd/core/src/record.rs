//! How a block lies in a segment: a *record* of header, page checksums and bytes.
//!
//! A segment is nothing but records, one after the other, each beginning at a multiple of 64 bytes. The
//! header is written when the record's place is given out, before its bytes and before any later record's
//! header: so the sync that makes a record durable makes every header before it durable, and a walk from
//! header to header comes to all that was ever acknowledged ([`crate::scan`]). Nothing says "this record is
//! complete": its CRC does, and that is known from the certificate before the first byte comes. A record that
//! is not needed any more has its header overwritten by one that says so; 64 bytes lie in one sector, so a
//! crash leaves the old one or the new one. All integers little-endian.
//!
//! ```text
//! offset  size  field
//!      0     8  magic "EGGSBLOC"
//!      8     2  format version
//!     10     2  kind: 1 a block, 2 a block that is erased, 3 the end of a sealed segment
//!     12     4  size of the block in bytes
//!     16    16  cluster id
//!     32     8  block service id
//!     40     8  block id
//!     48     4  CRC-32 (ISO-HDLC) of the block's bytes
//!     52     4  zeros
//!     56     8  the first bytes of BLAKE3, keyed with the disk's key, of the 56 bytes before, the segment's
//!               number (4) and the record's offset in it (8)
//!     64    4n  a CRC for each page of 4 KiB of the block ([`page_crc`])
//!               zeros up to a page of the file, when the block has 64 KiB or more
//!            s  the block
//!               up to a multiple of 64 bytes
//! ```
//!
//! The keyed hash is what tells a header from a block's bytes that look like one: whoever writes a block
//! knows its cluster and service, but not the key. It names the place too, so a segment under another name
//! or bytes in another place are nothing.

use eggs_proto::limits::BLOCK_BYTES_MAX;
use eggs_proto::{BlockId, BlockServiceId, ClusterId, mac};

use crate::identity::{DISK_FORMAT, Identity};

/// Bytes of a record's header.
pub const RECORD_HEADER_BYTES: usize = 64;
/// Records begin at multiples of this: a header then lies within a sector, and a block of a KiB costs 128
/// bytes, not a page.
pub const RECORD_ALIGN: u32 = 64;
/// Bytes under one checksum. The smallest read there is (a cell has at least 4 KiB) reads no byte that it
/// does not return, and the checksums are a thousandth of the data.
pub const PAGE_BYTES: u32 = 4096;
/// From this size on a block's bytes begin on a page of the file: cells are read page by page and holes are
/// punched whole. It costs at most a sixteenth; for smaller blocks it would cost more than it gives.
pub const ALIGNED_BYTES_MIN: u32 = 64 << 10;
/// Longest segment. Offsets fit 32 bits; the largest block fits many times; a disk of 20 TB has 20,000 of
/// them, which are listed in a moment; compacting one takes seconds (docs/adr/0019).
pub const SEGMENT_BYTES_MAX: u32 = 1 << 30;

const MAGIC: [u8; 8] = *b"EGGSBLOC";
const MAC_AT: usize = 56;

const _: () = assert!(BLOCK_BYTES_MAX + BLOCK_BYTES_MAX / 1024 + 2 * PAGE_BYTES < SEGMENT_BYTES_MAX);

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Block,
    /// Its space is free; nothing but this header is left of it.
    Erased,
    /// The segment is complete: every record before is whole or erased, and durable.
    Seal,
}

/// The header of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    pub kind: Kind,
    pub block: BlockId,
    /// 1 to [`BLOCK_BYTES_MAX`]; 0 for a seal.
    pub size: u32,
    /// CRC-32 of the block's bytes.
    pub crc: u32,
}

/// Why bytes are not a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Not one, a damaged one, or one that belongs somewhere else.
    #[error("its header is damaged")]
    Damaged,
    #[error("its header's format version {0} is newer than this program's")]
    Newer(u16),
}

/// What all headers of one disk have in common, and the key that makes them.
#[derive(Clone, Copy)]
pub struct Seal<'a> {
    pub key: &'a mac::Key,
    pub cluster: ClusterId,
    pub service: BlockServiceId,
}

impl std::fmt::Debug for Seal<'_> {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seal").field("service", &self.service).finish_non_exhaustive()
    }
}

impl<'a> From<&'a Identity> for Seal<'a> {
    fn from(identity: &'a Identity) -> Seal<'a> {
        Seal { key: &identity.key, cluster: identity.cluster, service: identity.service }
    }
}

impl Record {
    pub fn block(block: BlockId, size: u32, crc: u32) -> Record {
        Record { kind: Kind::Block, block, size, crc }
    }

    pub fn seal() -> Record {
        Record { kind: Kind::Seal, block: BlockId(0), size: 0, crc: 0 }
    }

    /// The same record, erased.
    pub fn erased(self) -> Record {
        Record { kind: Kind::Erased, ..self }
    }

    /// The header of this record at `offset` of a segment.
    pub fn encode(&self, seal: Seal<'_>, segment: u32, offset: u64) -> [u8; RECORD_HEADER_BYTES] {
        let mut bytes = [0; RECORD_HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&(DISK_FORMAT as u16).to_le_bytes());
        let kind: u16 = match self.kind {
            Kind::Block => 1,
            Kind::Erased => 2,
            Kind::Seal => 3,
        };
        bytes[10..12].copy_from_slice(&kind.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.size.to_le_bytes());
        bytes[16..32].copy_from_slice(&seal.cluster.0);
        bytes[32..40].copy_from_slice(&seal.service.0.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.block.0.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.crc.to_le_bytes());
        let mac = mac_of(&bytes, seal.key, segment, offset);
        bytes[MAC_AT..].copy_from_slice(&mac);
        bytes
    }

    /// # Errors
    /// `Newer` or `Damaged`.
    pub fn decode(
        bytes: &[u8; RECORD_HEADER_BYTES],
        seal: Seal<'_>,
        segment: u32,
        offset: u64,
    ) -> Result<Record, RecordError> {
        if bytes[..8] != MAGIC || bytes[MAC_AT..] != mac_of(bytes, seal.key, segment, offset) {
            return Err(RecordError::Damaged);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if u32::from(version) > DISK_FORMAT {
            return Err(RecordError::Newer(version));
        }
        let kind = match u16::from_le_bytes([bytes[10], bytes[11]]) {
            1 => Kind::Block,
            2 => Kind::Erased,
            3 => Kind::Seal,
            _ => return Err(RecordError::Damaged),
        };
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut id = [0; 8];
        id.copy_from_slice(&bytes[40..48]);
        let record =
            Record { kind, block: BlockId(u64::from_le_bytes(id)), size: u32_at(12), crc: u32_at(48) };
        let sizes = if kind == Kind::Seal { 0..=0 } else { 1..=BLOCK_BYTES_MAX };
        let ours = bytes[16..32] == seal.cluster.0 && bytes[32..40] == seal.service.0.to_le_bytes();
        if ours && sizes.contains(&record.size) { Ok(record) } else { Err(RecordError::Damaged) }
    }

    /// Where its parts lie when it begins at `offset`.
    pub fn extent(&self, offset: u32) -> Extent {
        Extent::new(offset, self.size)
    }
}

/// Whether these bytes may begin a header: a quick look before the hash is computed.
pub fn looks_like_a_header(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

fn mac_of(bytes: &[u8; RECORD_HEADER_BYTES], key: &mac::Key, segment: u32, offset: u64) -> [u8; 8] {
    // Not 25 bytes long: never a certificate's statement.
    let mut message = [0; MAC_AT + 12];
    message[..MAC_AT].copy_from_slice(&bytes[..MAC_AT]);
    message[MAC_AT..MAC_AT + 4].copy_from_slice(&segment.to_le_bytes());
    message[MAC_AT + 4..].copy_from_slice(&offset.to_le_bytes());
    let mut mac = [0; 8];
    mac.copy_from_slice(&blake3::keyed_hash(key, &message).as_bytes()[..8]);
    mac
}

/// Where the parts of a record lie in its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub offset: u32,
    /// The block's first byte.
    pub data_at: u32,
    /// Where the next record may begin.
    pub end: u32,
}

impl Extent {
    /// Of a block of `size` bytes. Saturates; what is given out is inside a segment.
    pub fn new(offset: u32, size: u32) -> Extent {
        if size == 0 {
            let end = offset.saturating_add(RECORD_ALIGN);
            return Extent { offset, data_at: end, end };
        }
        let behind_sums = offset.saturating_add(RECORD_HEADER_BYTES as u32).saturating_add(4 * pages(size));
        let data_at = if size < ALIGNED_BYTES_MIN { behind_sums } else { round_up(behind_sums, PAGE_BYTES) };
        Extent { offset, data_at, end: round_up(data_at.saturating_add(size), RECORD_ALIGN) }
    }

    pub fn sums_at(self) -> u32 {
        self.offset + RECORD_HEADER_BYTES as u32
    }

    /// Bytes it takes in the segment.
    pub fn bytes(self) -> u64 {
        u64::from(self.end - self.offset)
    }

    /// What can be given back when the record is erased: whole pages of the file behind the header.
    pub fn hole(self) -> Option<(u32, u32)> {
        let start = round_up(self.sums_at(), PAGE_BYTES);
        let end = self.end / PAGE_BYTES * PAGE_BYTES;
        (start < end).then_some((start, end))
    }
}

/// The most bytes a block of `size` bytes can take in a segment.
pub fn record_bytes_max(size: u32) -> u64 {
    let padding = if size < ALIGNED_BYTES_MIN { RECORD_ALIGN } else { PAGE_BYTES + RECORD_ALIGN };
    RECORD_HEADER_BYTES as u64 + 4 * u64::from(pages(size)) + u64::from(size) + u64::from(padding)
}

/// How many checksums a block of `size` bytes has.
pub fn pages(size: u32) -> u32 {
    size.div_ceil(PAGE_BYTES)
}

/// The checksum of a page of a block: CRC-32 that begins with something of the block and the page instead of
/// zero, so that another block's or another page's bytes in the place of these are found too.
pub fn page_crc(block: BlockId, page: u32, bytes: &[u8]) -> u32 {
    let seed = (block.0 >> 32) as u32 ^ (block.0 as u32).rotate_left(16) ^ page.wrapping_mul(0x9e37_79b9);
    let mut hasher = crc32fast::Hasher::new_with_initial(!seed);
    hasher.update(bytes);
    hasher.finalize()
}

/// The checksums of a block's pages while its bytes come, in pieces of any length.
#[derive(Debug, Clone)]
pub struct PageSums {
    block: BlockId,
    sums: Vec<u8>,
    page: Vec<u8>,
    pages: u32,
}

impl PageSums {
    pub fn new(block: BlockId, size: u32) -> PageSums {
        PageSums { block, sums: Vec::with_capacity(4 * pages(size) as usize), page: Vec::new(), pages: 0 }
    }

    pub fn push(&mut self, mut piece: &[u8]) {
        const PAGE: usize = PAGE_BYTES as usize;
        if !self.page.is_empty() {
            let taken = piece.len().min(PAGE - self.page.len());
            self.page.extend_from_slice(&piece[..taken]);
            piece = &piece[taken..];
            if self.page.len() == PAGE {
                let page = std::mem::take(&mut self.page);
                self.add(&page);
            }
        }
        let mut whole = piece.chunks_exact(PAGE);
        for page in &mut whole {
            self.add(page);
        }
        self.page.extend_from_slice(whole.remainder());
    }

    /// As they are stored.
    pub fn finish(mut self) -> Vec<u8> {
        if !self.page.is_empty() {
            let page = std::mem::take(&mut self.page);
            self.add(&page);
        }
        self.sums
    }

    fn add(&mut self, page: &[u8]) {
        self.sums.extend_from_slice(&page_crc(self.block, self.pages, page).to_le_bytes());
        self.pages += 1;
    }
}

/// The pages that hold a range of a block: first page, and one past the last.
pub fn pages_of(offset: u32, length: u32) -> (u32, u32) {
    if length == 0 {
        return (0, 0);
    }
    (offset / PAGE_BYTES, (offset + (length - 1)) / PAGE_BYTES + 1)
}

/// Whether `bytes`, which begin with page `first` of the block, have the checksums `sums` as stored.
pub fn pages_match(block: BlockId, first: u32, bytes: &[u8], sums: &[u8]) -> bool {
    let stored = sums.as_chunks::<4>().0;
    let pages = bytes.chunks(PAGE_BYTES as usize);
    pages.len() == stored.len()
        && (first..)
            .zip(pages)
            .zip(stored)
            .all(|((page, bytes), stored)| page_crc(block, page, bytes) == u32::from_le_bytes(*stored))
}

fn round_up(bytes: u32, to: u32) -> u32 {
    bytes.checked_next_multiple_of(to).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use eggs_proto::ShardId;
    use proptest::prelude::*;

    const KEY: mac::Key = [9; 32];

    fn seal() -> Seal<'static> {
        Seal { key: &KEY, cluster: ClusterId([0x11; 16]), service: BlockServiceId(0x2222_3333_4444_5555) }
    }

    fn record() -> Record {
        Record::block(BlockId::new(ShardId(0xab), 0x0000_1234_5678_9abc), 0x0010_0000, 0xdead_beef)
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn golden_header() {
        let golden = concat!(
            "45474753424c4f43", // EGGSBLOC
            "03000100",
            "00001000",
            "11111111111111111111111111111111",
            "5555444433332222",
            "bc9a7856341200ab",
            "efbeadde",
            "00000000",
        );
        let bytes = record().encode(seal(), 7, 4096);
        assert_eq!(hex(&bytes[..56]), golden);
        assert_eq!(hex(&bytes[56..]), "7b9c11639c41eb01");
        for record in [record(), record().erased(), Record::seal()] {
            assert_eq!(Record::decode(&record.encode(seal(), 7, 64), seal(), 7, 64), Ok(record));
        }
    }

    #[test]
    fn every_flipped_bit_and_every_other_place_is_found() {
        let good = record().encode(seal(), 7, 4096);
        for bit in 0..RECORD_HEADER_BYTES * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::decode(&bytes, seal(), 7, 4096), Err(RecordError::Damaged), "bit {bit}");
        }
        let damaged = Err(RecordError::Damaged);
        assert_eq!(Record::decode(&good, seal(), 8, 4096), damaged);
        assert_eq!(Record::decode(&good, seal(), 7, 4160), damaged);
        let other = [8; 32];
        assert_eq!(Record::decode(&good, Seal { key: &other, ..seal() }, 7, 4096), damaged);
        assert_eq!(Record::decode(&good, Seal { service: BlockServiceId(1), ..seal() }, 7, 4096), damaged);
    }

    #[test]
    fn small_blocks_cost_little_and_large_ones_begin_on_a_page() {
        assert_eq!(Extent::new(0, 1), Extent { offset: 0, data_at: 68, end: 128 });
        assert_eq!(Extent::new(128, 1024), Extent { offset: 128, data_at: 196, end: 1280 });
        assert_eq!(Extent::new(64, 65_536), Extent { offset: 64, data_at: 4096, end: 4096 + 65_536 });
        assert_eq!(Extent::new(64, 65_536).hole(), Some((4096, 4096 + 65_536)));
        assert_eq!(Extent::new(64, 1024).hole(), None);
        assert_eq!(Extent::new(4096 - 64, 8192).hole(), Some((4096, 12_288)));
    }

    #[test]
    fn golden_page_crc() {
        assert_eq!(page_crc(BlockId(0), 0, b"123456789"), 3_523_400_311);
        assert_eq!(page_crc(record().block, 3, b"123456789"), 3_004_460_966);
    }

    proptest! {
        #[test]
        fn extents_hold_their_block(offset in 0u32..1 << 20, size in 1u32..1 << 22) {
            let offset = offset * RECORD_ALIGN;
            let extent = Extent::new(offset, size);
            prop_assert!(extent.data_at >= extent.sums_at() + 4 * pages(size));
            prop_assert!(extent.end >= extent.data_at + size && extent.end.is_multiple_of(RECORD_ALIGN));
            prop_assert!(extent.bytes() <= record_bytes_max(size));
            if size >= ALIGNED_BYTES_MIN {
                prop_assert!(extent.data_at.is_multiple_of(PAGE_BYTES));
            }
            if let Some((start, end)) = extent.hole() {
                prop_assert!(start >= extent.sums_at() && end <= extent.end && start < end);
            }
        }

        #[test]
        fn sums_do_not_depend_on_the_pieces_and_find_a_flipped_bit(
            bytes in proptest::collection::vec(any::<u8>(), 1..20_000),
            cut in 1usize..9999,
            bit in any::<proptest::sample::Index>(),
        ) {
            let block = BlockId(77);
            let size = bytes.len() as u32;
            let sums = |cut: usize| {
                let mut sums = PageSums::new(block, size);
                bytes.chunks(cut).for_each(|piece| sums.push(piece));
                sums.finish()
            };
            let whole = sums(bytes.len());
            prop_assert_eq!(&sums(cut), &whole);
            prop_assert_eq!(whole.len(), 4 * pages(size) as usize);
            prop_assert!(pages_match(block, 0, &bytes, &whole));
            prop_assert!(!pages_match(BlockId(78), 0, &bytes, &whole));
            prop_assert!(!pages_match(block, 1, &bytes, &whole));
            let mut flipped = bytes.clone();
            let bit = bit.index(bytes.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!pages_match(block, 0, &flipped, &whole));
        }

        #[test]
        fn hostile_headers_are_an_error_or_read_back(
            bytes in proptest::collection::vec(any::<u8>(), RECORD_HEADER_BYTES),
            help in any::<bool>(),
        ) {
            let mut bytes: [u8; RECORD_HEADER_BYTES] = bytes.try_into().unwrap();
            if help {
                bytes[..8].copy_from_slice(&MAGIC);
                let (kind, size) = (bytes[10] % 4, bytes[12]);
                bytes[8..16].copy_from_slice(&[3, 0, kind, 0, size, 0, 0, 0]);
                bytes[16..32].copy_from_slice(&seal().cluster.0);
                bytes[32..40].copy_from_slice(&seal().service.0.to_le_bytes());
                bytes[52..56].fill(0);
                let mac = mac_of(&bytes, &KEY, 1, 64);
                bytes[56..].copy_from_slice(&mac);
            }
            if let Ok(record) = Record::decode(&bytes, seal(), 1, 64) {
                prop_assert_eq!(record.encode(seal(), 1, 64), bytes);
            }
        }
    }
}
