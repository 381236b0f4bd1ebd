//! The identity file: what makes a folder a disk of a cluster.
//!
//! One small file per disk, written once when the disk is formatted, never changed. Binary, not text:
//! nobody is to edit it (the id and the key are what every block's certificate hangs on), and a CRC over
//! fixed places tells damage from a difference. All integers little-endian.
//!
//! ```text
//! offset  size  field
//!      0     8  magic "EGGSDISK"
//!      8     4  format version; a newer one is refused before anything after it is looked at
//!     12     4  length of the whole file in bytes, CRC included
//!     16    16  cluster id
//!     32     8  block service id, never 0
//!     40    32  secret key of the certificates
//!     72     8  when it was formatted, nanoseconds since the Unix epoch
//!     80     1  storage class, 2 and up
//!     81     1  n: bytes of the failure domain, 1 to 64
//!     82     n  failure domain it was formatted in, UTF-8 (for people: the configured one is what counts)
//!   82+n     4  CRC-32 (ISO-HDLC) of all the bytes before
//! ```

use eggs_proto::limits::{CLASS_INLINE, FAILURE_DOMAIN_BYTES_MAX};
use eggs_proto::{BlockServiceId, ClusterId, Time, mac};

/// Version of everything on a disk: 3 has segments, 2 had a file per block and is refused, as is what is newer.
pub const DISK_FORMAT: u32 = 3;

/// Name of the identity file in the folder of a disk.
pub const IDENTITY_FILE: &str = "identity";
/// The identity while a disk is being formatted: without the file above, the folder is not a disk yet.
pub const IDENTITY_FILE_NEW: &str = "identity.new";
/// Longest identity file of this version.
pub const IDENTITY_BYTES_MAX: usize = FIXED + FAILURE_DOMAIN_BYTES_MAX + CRC;

const MAGIC: [u8; 8] = *b"EGGSDISK";
const FIXED: usize = 82;
const CRC: usize = 4;

/// What a disk knows of itself.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    pub cluster: ClusterId,
    pub service: BlockServiceId,
    pub key: mac::Key,
    pub formatted_at: Time,
    /// 2 and up.
    pub storage_class: u8,
    /// 1 to 64 bytes.
    pub failure_domain: String,
}

impl std::fmt::Debug for Identity {
    /// Without the key: this ends up in logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("cluster", &self.cluster)
            .field("service", &self.service)
            .field("storage_class", &self.storage_class)
            .field("failure_domain", &self.failure_domain)
            .finish_non_exhaustive()
    }
}

/// Why bytes are no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("format version {found} is newer than this program's ({DISK_FORMAT})")]
    Newer { found: u32 },
    #[error(
        "format version {found} is not read any more (this program's is {DISK_FORMAT}): empty the disk, or use the program that wrote it"
    )]
    Older { found: u32 },
    #[error("the identity file is damaged: {0}")]
    Damaged(&'static str),
    #[error("invalid identity: {0}")]
    Invalid(&'static str),
}

impl Identity {
    /// The bytes of the identity file.
    ///
    /// # Errors
    /// `Invalid` when a field is not one that could be read back.
    pub fn encode(&self) -> Result<Vec<u8>, IdentityError> {
        self.validate().map_err(IdentityError::Invalid)?;
        let domain = self.failure_domain.as_bytes();
        let length = FIXED + domain.len() + CRC;
        let mut bytes = Vec::with_capacity(length);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&DISK_FORMAT.to_le_bytes());
        bytes.extend_from_slice(&(length as u32).to_le_bytes());
        bytes.extend_from_slice(&self.cluster.0);
        bytes.extend_from_slice(&self.service.0.to_le_bytes());
        bytes.extend_from_slice(&self.key);
        bytes.extend_from_slice(&self.formatted_at.0.to_le_bytes());
        bytes.push(self.storage_class);
        bytes.push(domain.len() as u8);
        bytes.extend_from_slice(domain);
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        debug_assert_eq!(bytes.len(), length);
        Ok(bytes)
    }

    /// # Errors
    /// `Newer` when a later version wrote it, `Damaged` for anything else that is not an identity.
    pub fn decode(bytes: &[u8]) -> Result<Identity, IdentityError> {
        let damaged = IdentityError::Damaged;
        if bytes.get(..8) != Some(&MAGIC[..]) {
            return Err(damaged("it does not begin with EGGSDISK"));
        }
        let version = u32_at(bytes, 8).ok_or(damaged("it is cut off"))?;
        if version > DISK_FORMAT {
            return Err(IdentityError::Newer { found: version });
        }
        if version == 0 {
            return Err(damaged("its version is 0"));
        }
        if version < DISK_FORMAT {
            return Err(IdentityError::Older { found: version });
        }
        let length = u32_at(bytes, 12).ok_or(damaged("it is cut off"))?;
        if length as usize != bytes.len() || bytes.len() < FIXED + CRC {
            return Err(damaged("it is not as long as it says"));
        }
        let (body, crc) = bytes.split_at(bytes.len() - CRC);
        if u32_at(crc, 0) != Some(crc32fast::hash(body)) {
            return Err(damaged("its CRC is wrong"));
        }
        if body.len() != FIXED + usize::from(body[81]) {
            return Err(damaged("its failure domain is not as long as it says"));
        }
        let identity = Identity {
            cluster: ClusterId::from_bytes(&body[16..32]).ok_or(damaged("its cluster id is null"))?,
            service: BlockServiceId(u64_at(body, 32).ok_or(damaged("it is cut off"))?),
            key: body[40..72].try_into().map_err(|_| damaged("it is cut off"))?,
            formatted_at: Time(u64_at(body, 72).ok_or(damaged("it is cut off"))?),
            storage_class: body[80],
            failure_domain: std::str::from_utf8(&body[FIXED..])
                .map_err(|_| damaged("its failure domain is not UTF-8"))?
                .to_owned(),
        };
        identity.validate().map_err(damaged)?;
        Ok(identity)
    }

    fn validate(&self) -> Result<(), &'static str> {
        if self.service.0 == 0 {
            return Err("the block service id is 0");
        }
        if self.storage_class <= CLASS_INLINE {
            return Err("the storage class is not a kind of disk");
        }
        failure_domain(&self.failure_domain)
    }
}

/// Whether `domain` can name a failure domain.
///
/// # Errors
/// What is wrong with it.
pub fn failure_domain(domain: &str) -> Result<(), &'static str> {
    if domain.is_empty() || domain.len() > FAILURE_DOMAIN_BYTES_MAX {
        return Err("a failure domain has 1 to 64 bytes");
    }
    if domain.chars().any(char::is_control) {
        return Err("a failure domain has no control characters");
    }
    Ok(())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn identity() -> Identity {
        Identity {
            cluster: ClusterId([0x11; 16]),
            service: BlockServiceId(0x2222_3333_4444_5555),
            key: [0x66; 32],
            formatted_at: Time(0x0102_0304_0506_0708),
            storage_class: 3,
            failure_domain: "rack-7".into(),
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn golden_identity() {
        let bytes = identity().encode().unwrap();
        let golden = concat!(
            "454747534449534b", // EGGSDISK
            "03000000",         // version
            "5c000000",         // 92 bytes
            "11111111111111111111111111111111",
            "5555444433332222",
            "6666666666666666666666666666666666666666666666666666666666666666",
            "0807060504030201",
            "03",
            "06",
            "7261636b2d37",
            "1f074bce",
        );
        assert_eq!(hex(&bytes), golden);
        assert_eq!(Identity::decode(&bytes), Ok(identity()));
    }

    #[test]
    fn the_longest_identity_fits() {
        let longest = Identity { failure_domain: "d".repeat(64), ..identity() };
        assert_eq!(longest.encode().unwrap().len(), IDENTITY_BYTES_MAX);
    }

    #[test]
    fn a_newer_version_is_told_from_damage() {
        let mut bytes = identity().encode().unwrap();
        bytes[8] = 4;
        assert_eq!(Identity::decode(&bytes), Err(IdentityError::Newer { found: 4 }));
        // Whatever a newer version holds after its version number is not looked at.
        assert_eq!(Identity::decode(&bytes[..12]), Err(IdentityError::Newer { found: 4 }));
        bytes[8] = 2;
        assert_eq!(Identity::decode(&bytes), Err(IdentityError::Older { found: 2 }));
        bytes[8] = 0;
        assert!(matches!(Identity::decode(&bytes), Err(IdentityError::Damaged(_))));
    }

    #[test]
    fn what_could_not_be_read_back_is_not_written() {
        for bad in [
            Identity { service: BlockServiceId(0), ..identity() },
            Identity { storage_class: CLASS_INLINE, ..identity() },
            Identity { failure_domain: String::new(), ..identity() },
            Identity { failure_domain: "x".repeat(65), ..identity() },
            Identity { failure_domain: "a\nb".into(), ..identity() },
        ] {
            assert!(matches!(bad.encode(), Err(IdentityError::Invalid(_))), "{bad:?}");
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let good = identity().encode().unwrap();
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Identity::decode(&bytes).is_err(), "bit {bit}");
        }
        for length in 0..good.len() {
            assert!(Identity::decode(&good[..length]).is_err(), "{length} bytes");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_an_error_or_an_identity(
            tail in proptest::collection::vec(any::<u8>(), 0..200),
            prefix in 0usize..4,
            fix_crc in any::<bool>(),
        ) {
            let mut bytes = Vec::new();
            if prefix > 0 { bytes.extend_from_slice(&MAGIC); }
            if prefix > 1 { bytes.extend_from_slice(&1u32.to_le_bytes()); }
            if prefix > 2 { bytes.extend_from_slice(&((20 + tail.len()) as u32).to_le_bytes()); }
            bytes.extend_from_slice(&tail);
            if fix_crc { let crc = crc32fast::hash(&bytes); bytes.extend_from_slice(&crc.to_le_bytes()); }
            if let Ok(identity) = Identity::decode(&bytes) {
                prop_assert_eq!(identity.encode().unwrap(), bytes);
            }
        }

        #[test]
        fn what_is_written_is_read(
            service in 1u64.., class in 2u8.., domain in "[a-zäöü0-9.-]{1,20}",
            key in any::<[u8; 32]>(), cluster in any::<[u8; 16]>(), at in any::<u64>(),
        ) {
            prop_assume!(cluster != [0; 16]);
            let identity = Identity {
                cluster: ClusterId(cluster), service: BlockServiceId(service), key,
                formatted_at: Time(at), storage_class: class, failure_domain: domain,
            };
            prop_assert_eq!(Identity::decode(&identity.encode().unwrap()), Ok(identity));
        }
    }
}
