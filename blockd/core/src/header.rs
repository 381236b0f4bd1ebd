//! What a block's file begins with, and where it lies.
//!
//! A block's file is one page of header, then the block's bytes: with the header in a page of its own
//! the bytes begin on a page, so reads of whole cells touch no page twice. It costs nothing: files
//! take whole pages anyway. The header says what the file is without the metadata, so that a disk alone
//! tells what it holds. All integers little-endian.
//!
//! ```text
//! offset  size  field
//!      0     8  magic "EGGSBLOC"
//!      8     4  format version
//!     12     4  size of the block in bytes: the file is 4096 + size bytes long
//!     16    16  cluster id
//!     32     8  block service id
//!     40     8  block id
//!     48     4  CRC-32 (ISO-HDLC) of the block's bytes
//!     52     8  zeros
//!     60     4  CRC-32 of the 60 bytes before
//!     64  4032  zeros
//!   4096  size  the block
//! ```

use std::fmt;

use eggs_proto::limits::{BLOCK_BYTES_MAX, FORMAT_VERSION};
use eggs_proto::{BlockId, BlockServiceId, ClusterId};

/// Bytes before the block's own in its file: one page.
pub const HEADER_BYTES: u32 = 4096;
/// Of those, the ones that say something.
pub const HEADER_USED_BYTES: usize = 64;

const MAGIC: [u8; 8] = *b"EGGSBLOC";
const CRC_AT: usize = 60;

/// The header of a block's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockHeader {
    pub cluster: ClusterId,
    pub service: BlockServiceId,
    pub block: BlockId,
    /// 1 to [`BLOCK_BYTES_MAX`].
    pub size: u32,
    /// CRC-32 of the block's bytes.
    pub crc: u32,
}

/// Why bytes are not the header of the block looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("its header is damaged")]
    Damaged,
    #[error("its header's format version {0} is newer than this program's")]
    Newer(u32),
    #[error("its header is of another block")]
    AnotherBlock,
}

impl BlockHeader {
    pub fn encode(&self) -> [u8; HEADER_USED_BYTES] {
        let mut bytes = [0; HEADER_USED_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.size.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.cluster.0);
        bytes[32..40].copy_from_slice(&self.service.0.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.block.0.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// # Errors
    /// `Newer` or `Damaged`; whose block it is, is for [`BlockHeader::expect`].
    pub fn decode(bytes: &[u8; HEADER_USED_BYTES]) -> Result<BlockHeader, HeaderError> {
        if bytes[..8] != MAGIC || u32_at(bytes, CRC_AT) != crc32fast::hash(&bytes[..CRC_AT]) {
            return Err(HeaderError::Damaged);
        }
        let version = u32_at(bytes, 8);
        if version > FORMAT_VERSION {
            return Err(HeaderError::Newer(version));
        }
        let mut cluster = [0; 16];
        cluster.copy_from_slice(&bytes[16..32]);
        let header = BlockHeader {
            cluster: ClusterId::from_bytes(&cluster).ok_or(HeaderError::Damaged)?,
            service: BlockServiceId(u64_at(bytes, 32)),
            block: BlockId(u64_at(bytes, 40)),
            size: u32_at(bytes, 12),
            crc: u32_at(bytes, 48),
        };
        let sound = version > 0 && (1..=BLOCK_BYTES_MAX).contains(&header.size) && bytes[52..60] == [0; 8];
        if sound { Ok(header) } else { Err(HeaderError::Damaged) }
    }

    /// Decodes, and refuses the header of any other block.
    ///
    /// # Errors
    /// As [`BlockHeader::decode`], and `AnotherBlock`.
    pub fn expect(
        bytes: &[u8; HEADER_USED_BYTES],
        cluster: ClusterId,
        service: BlockServiceId,
        block: BlockId,
    ) -> Result<BlockHeader, HeaderError> {
        let header = BlockHeader::decode(bytes)?;
        let ours = header.cluster == cluster && header.service == service && header.block == block;
        if ours { Ok(header) } else { Err(HeaderError::AnotherBlock) }
    }

    /// Length of the whole file.
    pub fn file_bytes(&self) -> u64 {
        file_bytes(self.size)
    }
}

/// Length of the file of a block of `size` bytes.
pub fn file_bytes(size: u32) -> u64 {
    u64::from(HEADER_BYTES) + u64::from(size)
}

/// Where a block lies under `blocks/`: `GG/SS/BBBBBBBBBBBBBBBB`, hexadecimal.
///
/// SS is the shard that chose the id; GG are bits 12–19 of its counter. So blocks made one after the
/// other share a folder (an empty disk has few folders and few of them to make durable), and a
/// full one has 65,536 of them, filled evenly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockPath {
    pub block: BlockId,
}

/// The folder of a block: both levels in one number, `GG << 8 | SS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Folder(pub u16);

impl Folder {
    /// Name of the first level.
    pub fn upper(self) -> String {
        format!("{:02x}", self.0 >> 8)
    }

    /// Path of both levels under `blocks/`.
    pub fn path(self) -> String {
        format!("{:02x}/{:02x}", self.0 >> 8, self.0 & 0xff)
    }
}

impl BlockPath {
    pub fn new(block: BlockId) -> BlockPath {
        BlockPath { block }
    }

    pub fn folder(self) -> Folder {
        let generation = (self.block.0 >> 12) & 0xff;
        let shard = self.block.0 >> 56;
        Folder((generation << 8 | shard) as u16)
    }

    /// Name of the file in its folder.
    pub fn name(self) -> String {
        format!("{:016x}", self.block.0)
    }

    /// The block whose file has this name; `None` for names no block has.
    pub fn of_name(name: &[u8]) -> Option<BlockPath> {
        let lower_hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
        if name.len() != 16 || !name.iter().all(lower_hex) {
            return None;
        }
        let id = u64::from_str_radix(std::str::from_utf8(name).ok()?, 16).ok()?;
        Some(BlockPath::new(BlockId(id)))
    }
}

impl fmt::Display for BlockPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.folder().path(), self.name())
    }
}

fn u32_at(bytes: &[u8; HEADER_USED_BYTES], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8; HEADER_USED_BYTES], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use eggs_proto::ShardId;
    use proptest::prelude::*;

    fn header() -> BlockHeader {
        BlockHeader {
            cluster: ClusterId([0x11; 16]),
            service: BlockServiceId(0x2222_3333_4444_5555),
            block: BlockId::new(ShardId(0xab), 0x0000_1234_5678_9abc),
            size: 0x0010_0000,
            crc: 0xdead_beef,
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn golden_header() {
        let golden = concat!(
            "45474753424c4f43", // EGGSBLOC
            "02000000",
            "00001000",
            "11111111111111111111111111111111",
            "5555444433332222",
            "bc9a7856341200ab",
            "efbeadde",
            "0000000000000000",
            "506fa0ff",
        );
        assert_eq!(hex(&header().encode()), golden);
        assert_eq!(BlockHeader::decode(&header().encode()), Ok(header()));
    }

    #[test]
    fn golden_paths() {
        let path = BlockPath::new(header().block);
        assert_eq!(path.to_string(), "89/ab/ab00123456789abc");
        assert_eq!(path.folder(), Folder(0x89ab));
        assert_eq!(path.folder().upper(), "89");
        let first = BlockPath::new(BlockId::new(ShardId(1), 1));
        assert_eq!(first.to_string(), "00/01/0100000000000001");
    }

    #[test]
    fn neighbours_share_a_folder() {
        let folder = |counter| BlockPath::new(BlockId::new(ShardId(1), counter)).folder();
        assert_eq!(folder(4096), folder(8191));
        assert_ne!(folder(4095), folder(4096));
    }

    #[test]
    fn every_flipped_bit_is_found() {
        for bit in 0..HEADER_USED_BYTES * 8 {
            let mut bytes = header().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(BlockHeader::decode(&bytes), Err(HeaderError::Damaged), "bit {bit}");
        }
    }

    #[test]
    fn another_block_is_refused() {
        let (h, bytes) = (header(), header().encode());
        assert_eq!(BlockHeader::expect(&bytes, h.cluster, h.service, h.block), Ok(h));
        let another = Err(HeaderError::AnotherBlock);
        assert_eq!(BlockHeader::expect(&bytes, ClusterId([1; 16]), h.service, h.block), another);
        assert_eq!(BlockHeader::expect(&bytes, h.cluster, BlockServiceId(1), h.block), another);
        assert_eq!(BlockHeader::expect(&bytes, h.cluster, h.service, BlockId(1)), another);
    }

    proptest! {
        #[test]
        fn hostile_headers_are_an_error_or_read_back(
            mut bytes in proptest::collection::vec(any::<u8>(), HEADER_USED_BYTES),
            help in any::<bool>(),
        ) {
            if help {
                bytes[..8].copy_from_slice(&MAGIC);
                bytes[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
                bytes[15] = 0;
                bytes[52..60].fill(0);
                let crc = crc32fast::hash(&bytes[..CRC_AT]);
                bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
            }
            let bytes: [u8; HEADER_USED_BYTES] = bytes.try_into().unwrap();
            if let Ok(header) = BlockHeader::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }

        #[test]
        fn names_read_back(id in any::<u64>()) {
            let path = BlockPath::new(BlockId(id));
            prop_assert_eq!(BlockPath::of_name(path.name().as_bytes()), Some(path));
        }

        #[test]
        fn other_names_are_no_blocks(name in proptest::collection::vec(any::<u8>(), 0..20)) {
            if let Some(path) = BlockPath::of_name(&name) {
                prop_assert_eq!(path.name().into_bytes(), name);
            }
        }
    }
}
