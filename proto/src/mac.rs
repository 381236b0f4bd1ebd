//! Certificates and proofs: keyed BLAKE3 under a block service's secret key, shared by the block
//! service and the shards (never by clients), cut to 16 bytes.
//!
//! Each kind of statement starts with its own domain byte, so one can never stand for another.

use crate::ids::{BlockId, BlockServiceId};

/// Secret of one block service.
pub type Key = [u8; 32];
/// 128 bits: forging one needs 2^127 tries against a live service.
pub type Mac = [u8; 16];

const WRITE: u8 = 1;
const PROOF: u8 = 2;
const ERASE: u8 = 3;
const ERASED: u8 = 4;

/// Allows a block of exactly this size and CRC to be written.
pub fn write_certificate(key: &Key, service: BlockServiceId, block: BlockId, size: u32, crc: u32) -> Mac {
    statement(key, WRITE, service, block, size, crc)
}

/// Says that exactly this block is durable there.
pub fn write_proof(key: &Key, service: BlockServiceId, block: BlockId, size: u32, crc: u32) -> Mac {
    statement(key, PROOF, service, block, size, crc)
}

/// Allows a block to be erased.
pub fn erase_certificate(key: &Key, service: BlockServiceId, block: BlockId) -> Mac {
    statement(key, ERASE, service, block, 0, 0)
}

/// Says that the block is not there (any more).
pub fn erase_proof(key: &Key, service: BlockServiceId, block: BlockId) -> Mac {
    statement(key, ERASED, service, block, 0, 0)
}

/// Whether `given` is `expected`, in constant time.
pub fn matches(expected: &Mac, given: &[u8]) -> bool {
    given.len() == expected.len()
        && expected.iter().zip(given).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

fn statement(key: &Key, kind: u8, service: BlockServiceId, block: BlockId, size: u32, crc: u32) -> Mac {
    let mut message = [0u8; 25];
    message[0] = kind;
    message[1..9].copy_from_slice(&service.0.to_le_bytes());
    message[9..17].copy_from_slice(&block.0.to_le_bytes());
    message[17..21].copy_from_slice(&size.to_le_bytes());
    message[21..25].copy_from_slice(&crc.to_le_bytes());
    let mut mac = [0; 16];
    mac.copy_from_slice(&blake3::keyed_hash(key, &message).as_bytes()[..16]);
    mac
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_and_kind_changes_the_mac() {
        let (key, service, block) = ([7; 32], BlockServiceId(1), BlockId(2));
        let all = [
            write_certificate(&key, service, block, 3, 4),
            write_certificate(&[8; 32], service, block, 3, 4),
            write_certificate(&key, BlockServiceId(9), block, 3, 4),
            write_certificate(&key, service, BlockId(9), 3, 4),
            write_certificate(&key, service, block, 9, 4),
            write_certificate(&key, service, block, 3, 9),
            write_proof(&key, service, block, 3, 4),
            erase_certificate(&key, service, block),
            erase_proof(&key, service, block),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(matches(a, a));
            assert!(!matches(a, &a[..15]));
            for b in &all[..i] {
                assert!(!matches(a, b));
            }
        }
    }

    #[test]
    fn golden_certificate() {
        // Stored nowhere, but both ends of the wire must agree across versions.
        let mac = write_certificate(&[1; 32], BlockServiceId(2), BlockId(3), 4, 5);
        assert_eq!(hex(&mac), GOLDEN);
    }

    const GOLDEN: &str = "07577de0879dff32cea6fb01c6c29d28";

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
