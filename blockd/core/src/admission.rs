//! What is let in: headers, certificates, sizes, ranges, room on the disk, and the bytes as they arrive.
//!
//! Everything here answers with a [`BlockError`]; who asked and for what is added by the caller.

use eggs_proto::limits::{BLOCK_BYTES_MAX, DATA_MESSAGE_BYTES, PROTOCOL_VERSION};
use eggs_proto::{BlockError, BlockId, BlockServiceId, ClusterId, mac, pb};

use crate::identity::Identity;
use crate::record::record_bytes_max;

/// The part of a disk that is kept free is 1/64 of it …
const RESERVE_SHARE: u64 = 64;
/// … but at least room for a few folders and the file system's own needs …
const RESERVE_BYTES_MIN: u64 = 1 << 20;
/// … and no more than this: a large disk does not need it.
const RESERVE_BYTES_MAX: u64 = 4 << 30;
/// Metadata on the same file system (`eggsctl up`, one-disk hosts) must have room when blocks have none:
/// names can then still be removed. At least this much, or …
const METADATA_BYTES: u64 = 128 << 20;
/// … this share of a small file system.
const METADATA_SHARE: u64 = 4;

/// Checks what travels with every request.
///
/// # Errors
/// `Malformed` without a header, `UnsupportedVersion`, `WrongCluster`.
pub fn check_header(header: Option<&pb::RequestHeader>, cluster: ClusterId) -> Result<(), BlockError> {
    let header = header.ok_or(BlockError::Malformed)?;
    if header.version != PROTOCOL_VERSION {
        return Err(BlockError::UnsupportedVersion);
    }
    if ClusterId::from_bytes(&header.cluster_id) != Some(cluster) {
        return Err(BlockError::WrongCluster);
    }
    Ok(())
}

/// A write that may begin: exactly these bytes may become this block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteAdmission {
    pub block: BlockId,
    /// 1 to [`BLOCK_BYTES_MAX`].
    pub size: u32,
    pub crc: u32,
    /// What the writer gets once the block is durable (BL-1).
    pub proof: mac::Mac,
}

impl WriteAdmission {
    /// Decides from the first message of a write (BL-3).
    ///
    /// # Errors
    /// `UnknownBlockService`, `WrongSize`, `BadCertificate`.
    pub fn decide(identity: &Identity, start: &pb::WriteStart) -> Result<WriteAdmission, BlockError> {
        if BlockServiceId(start.block_service) != identity.service {
            return Err(BlockError::UnknownBlockService);
        }
        if !(1..=BLOCK_BYTES_MAX).contains(&start.size) {
            return Err(BlockError::WrongSize);
        }
        let (key, service, block) = (&identity.key, identity.service, BlockId(start.block));
        let expected = mac::write_certificate(key, service, block, start.size, start.crc);
        if !mac::matches(&expected, &start.certificate) {
            return Err(BlockError::BadCertificate);
        }
        let proof = mac::write_proof(key, service, block, start.size, start.crc);
        Ok(WriteAdmission { block, size: start.size, crc: start.crc, proof })
    }
}

/// Decides whether a block may be erased (BL-3); the proof for when its absence is durable (BL-5).
///
/// # Errors
/// `UnknownBlockService`, `BadCertificate`.
pub fn admit_erase(identity: &Identity, request: &pb::EraseBlock) -> Result<mac::Mac, BlockError> {
    if BlockServiceId(request.block_service) != identity.service {
        return Err(BlockError::UnknownBlockService);
    }
    let (key, service, block) = (&identity.key, identity.service, BlockId(request.block));
    if !mac::matches(&mac::erase_certificate(key, service, block), &request.certificate) {
        return Err(BlockError::BadCertificate);
    }
    Ok(mac::erase_proof(key, service, block))
}

/// Whether `length` bytes from `offset` lie inside a block of `size` bytes.
///
/// # Errors
/// `OutOfRange`.
pub fn check_range(size: u32, offset: u32, length: u32) -> Result<(), BlockError> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(BlockError::OutOfRange),
    }
}

/// Bytes of a disk that are not for blocks (BL-10).
pub fn reserve(capacity_bytes: u64) -> u64 {
    let for_metadata = METADATA_BYTES.min(capacity_bytes / METADATA_SHARE);
    (capacity_bytes / RESERVE_SHARE).max(for_metadata).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX)
}

/// Room on a disk as its file system tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Space {
    pub capacity_bytes: u64,
    /// Free for us, before the reserve.
    pub free_bytes: u64,
}

impl Space {
    /// What blocks may still take.
    pub fn available_bytes(self) -> u64 {
        self.free_bytes.saturating_sub(reserve(self.capacity_bytes))
    }

    /// Whether a block of `size` bytes may begin while others that are arriving may still take
    /// `promised_bytes` (BL-10).
    ///
    /// # Errors
    /// `NoSpace`.
    pub fn admit(self, size: u32, promised_bytes: u64) -> Result<(), BlockError> {
        self.admit_bytes(record_bytes_max(size), promised_bytes)
    }

    /// The same for records of `bytes` together.
    ///
    /// # Errors
    /// `NoSpace`.
    pub fn admit_bytes(self, bytes: u64, promised_bytes: u64) -> Result<(), BlockError> {
        let wanted = bytes.saturating_add(promised_bytes);
        if wanted <= self.available_bytes() { Ok(()) } else { Err(BlockError::NoSpace) }
    }
}

/// The bytes of one block while they arrive: counts them and computes their CRC.
#[derive(Debug, Clone)]
pub struct Receiving {
    size: u32,
    crc: u32,
    received: u32,
    hasher: crc32fast::Hasher,
}

impl Receiving {
    pub fn new(size: u32, crc: u32) -> Receiving {
        Receiving { size, crc, received: 0, hasher: crc32fast::Hasher::new() }
    }

    /// Takes in the next piece.
    ///
    /// # Errors
    /// `Malformed` for an empty or oversized piece (endless empty ones would hold a place for
    /// nothing), `WrongSize` when there is more than was certified.
    pub fn push(&mut self, piece: &[u8]) -> Result<(), BlockError> {
        if piece.is_empty() || piece.len() > DATA_MESSAGE_BYTES {
            return Err(BlockError::Malformed);
        }
        if piece.len() > self.missing() as usize {
            return Err(BlockError::WrongSize);
        }
        self.received += piece.len() as u32;
        self.hasher.update(piece);
        Ok(())
    }

    /// Takes in all of a block that came in one piece.
    ///
    /// # Errors
    /// `WrongSize` when it is not as long as was certified.
    pub fn push_all(&mut self, bytes: &[u8]) -> Result<(), BlockError> {
        if bytes.len() != self.missing() as usize {
            return Err(BlockError::WrongSize);
        }
        self.received = self.size;
        self.hasher.update(bytes);
        Ok(())
    }

    /// Bytes still to come.
    pub fn missing(&self) -> u32 {
        self.size - self.received
    }

    /// What has come is all, and right.
    ///
    /// # Errors
    /// `WrongSize` when bytes are missing, `WrongCrc`.
    pub fn finish(self) -> Result<(), BlockError> {
        if self.missing() > 0 {
            return Err(BlockError::WrongSize);
        }
        if self.hasher.finalize() != self.crc {
            return Err(BlockError::WrongCrc);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use eggs_proto::Time;
    use proptest::prelude::*;

    fn identity() -> Identity {
        Identity {
            cluster: ClusterId([1; 16]),
            service: BlockServiceId(7),
            key: [9; 32],
            formatted_at: Time(1),
            storage_class: 3,
            failure_domain: "a".into(),
        }
    }

    fn start(size: u32) -> pb::WriteStart {
        let certificate = mac::write_certificate(&[9; 32], BlockServiceId(7), BlockId(5), size, 77);
        pb::WriteStart {
            header: None,
            block_service: 7,
            block: 5,
            size,
            crc: 77,
            certificate: certificate.to_vec().into(),
        }
    }

    #[test]
    fn a_write_needs_its_own_certificate() {
        let admitted = WriteAdmission::decide(&identity(), &start(10)).unwrap();
        assert_eq!((admitted.block, admitted.size, admitted.crc), (BlockId(5), 10, 77));
        assert_eq!(admitted.proof, mac::write_proof(&[9; 32], BlockServiceId(7), BlockId(5), 10, 77));

        let refused = |change: fn(&mut pb::WriteStart)| {
            let mut start = start(10);
            change(&mut start);
            WriteAdmission::decide(&identity(), &start).unwrap_err()
        };
        assert_eq!(refused(|s| s.size = 11), BlockError::BadCertificate);
        assert_eq!(refused(|s| s.crc = 78), BlockError::BadCertificate);
        assert_eq!(refused(|s| s.block = 6), BlockError::BadCertificate);
        assert_eq!(refused(|s| s.certificate = vec![].into()), BlockError::BadCertificate);
        assert_eq!(refused(|s| s.certificate = vec![0; 1000].into()), BlockError::BadCertificate);
        assert_eq!(refused(|s| s.block_service = 8), BlockError::UnknownBlockService);
    }

    #[test]
    fn sizes_have_limits_even_when_certified() {
        for size in [0, BLOCK_BYTES_MAX + 1, u32::MAX] {
            assert_eq!(WriteAdmission::decide(&identity(), &start(size)), Err(BlockError::WrongSize));
        }
        assert!(WriteAdmission::decide(&identity(), &start(BLOCK_BYTES_MAX)).is_ok());
    }

    #[test]
    fn a_write_certificate_does_not_erase() {
        let mut request = pb::EraseBlock { block_service: 7, block: 5, certificate: start(10).certificate };
        assert_eq!(admit_erase(&identity(), &request), Err(BlockError::BadCertificate));
        let certificate = mac::erase_certificate(&[9; 32], BlockServiceId(7), BlockId(5));
        request.certificate = certificate.to_vec().into();
        let proof = mac::erase_proof(&[9; 32], BlockServiceId(7), BlockId(5));
        assert_eq!(admit_erase(&identity(), &request), Ok(proof));
        request.block = 6;
        assert_eq!(admit_erase(&identity(), &request), Err(BlockError::BadCertificate));
    }

    #[test]
    fn requests_for_others_are_refused() {
        let cluster = ClusterId([1; 16]);
        let good = pb::RequestHeader {
            version: PROTOCOL_VERSION,
            cluster_id: vec![1; 16].into(),
            ..Default::default()
        };
        assert_eq!(check_header(Some(&good), cluster), Ok(()));
        assert_eq!(check_header(None, cluster), Err(BlockError::Malformed));
        assert_eq!(check_header(Some(&good), ClusterId([2; 16])), Err(BlockError::WrongCluster));
        let nobody = pb::RequestHeader { cluster_id: vec![].into(), ..good.clone() };
        assert_eq!(check_header(Some(&nobody), cluster), Err(BlockError::WrongCluster));
        let newer = pb::RequestHeader { version: PROTOCOL_VERSION + 1, ..good };
        assert_eq!(check_header(Some(&newer), cluster), Err(BlockError::UnsupportedVersion));
    }

    #[test]
    fn the_last_bytes_of_a_disk_are_not_for_blocks() {
        let space = |free_bytes| Space { capacity_bytes: 64 << 20, free_bytes };
        assert_eq!(reserve(1 << 20), 1 << 20);
        assert_eq!(reserve(64 << 20), 16 << 20);
        assert_eq!(reserve(1 << 30), 128 << 20);
        assert_eq!(reserve(64 << 30), 1 << 30);
        assert_eq!(reserve(u64::MAX), 4 << 30);
        let enough = (16 << 20) + record_bytes_max(100);
        assert_eq!(space(enough).admit(100, 0), Ok(()));
        assert_eq!(space(enough - 1).admit(100, 0), Err(BlockError::NoSpace));
        assert_eq!(space(enough).admit(100, 1), Err(BlockError::NoSpace));
        assert_eq!(space(0).available_bytes(), 0);
        assert_eq!(space(u64::MAX).admit(100, u64::MAX), Err(BlockError::NoSpace));
    }

    #[test]
    fn pieces_have_limits() {
        let mut receiving = Receiving::new(3, crc32fast::hash(b"abc"));
        assert_eq!(receiving.push(b""), Err(BlockError::Malformed));
        assert_eq!(receiving.push(&vec![0; DATA_MESSAGE_BYTES + 1]), Err(BlockError::Malformed));
        assert_eq!(receiving.push(b"abcd"), Err(BlockError::WrongSize));
        assert_eq!(receiving.push(b"ab"), Ok(()));
        assert_eq!(receiving.clone().finish(), Err(BlockError::WrongSize));
        assert_eq!(receiving.clone().push(b"cc"), Err(BlockError::WrongSize));
        assert_eq!(receiving.push(b"c"), Ok(()));
        assert_eq!(receiving.finish(), Ok(()));
    }

    proptest! {
        #[test]
        fn any_cut_of_the_right_bytes_is_right_and_a_flipped_bit_is_not(
            bytes in proptest::collection::vec(any::<u8>(), 1..5000),
            cut in 1usize..999,
            bit in any::<proptest::sample::Index>(),
        ) {
            let size = bytes.len() as u32;
            let crc = crc32fast::hash(&bytes);
            let receive = |bytes: &[u8]| {
                let mut receiving = Receiving::new(size, crc);
                for piece in bytes.chunks(cut) {
                    receiving.push(piece)?;
                }
                receiving.finish()
            };
            prop_assert_eq!(receive(&bytes), Ok(()));
            let mut flipped = bytes.clone();
            let bit = bit.index(bytes.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(receive(&flipped), Err(BlockError::WrongCrc));
            prop_assert_eq!(receive(&bytes[1..]), Err(BlockError::WrongSize));
        }

        #[test]
        fn ranges_do_not_overflow(size in any::<u32>(), offset in any::<u32>(), length in any::<u32>()) {
            let inside = u64::from(offset) + u64::from(length) <= u64::from(size);
            prop_assert_eq!(check_range(size, offset, length).is_ok(), inside);
        }
    }
}
