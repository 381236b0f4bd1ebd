//! CRC-32 (ISO-HDLC) of pieces, put together without reading the bytes again.

use crc32fast::Hasher;

/// The CRC of some bytes and how many they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Crc {
    pub value: u32,
    pub length: u64,
}

impl Crc {
    pub fn of(bytes: &[u8]) -> Crc {
        Crc { value: crc32fast::hash(bytes), length: bytes.len() as u64 }
    }

    pub fn new(value: u32, length: u64) -> Crc {
        Crc { value, length }
    }

    /// Of these bytes followed by those of `next`.
    #[must_use]
    pub fn then(self, next: Crc) -> Crc {
        let mut hasher = Hasher::new_with_initial_len(self.value, self.length);
        hasher.combine(&Hasher::new_with_initial_len(next.value, next.length));
        Crc { value: hasher.finalize(), length: self.length + next.length }
    }

    /// Of `length` zero bytes, in logarithmic time.
    pub fn of_zeros(length: u64) -> Crc {
        let (mut sum, mut power, mut rest) = (Crc::default(), Crc::of(&[0]), length);
        while rest > 0 {
            if rest & 1 == 1 {
                sum = sum.then(power);
            }
            rest >>= 1;
            if rest > 0 {
                power = power.then(power);
            }
        }
        sum
    }
}

/// Of several pieces in order.
pub fn join(pieces: impl IntoIterator<Item = Crc>) -> Crc {
    pieces.into_iter().fold(Crc::default(), Crc::then)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_to_the_whole() {
        let bytes: Vec<u8> = (0..1000u32).map(|n| (n * 7) as u8).collect();
        for cut in [0, 1, 499, 1000] {
            assert_eq!(Crc::of(&bytes[..cut]).then(Crc::of(&bytes[cut..])), Crc::of(&bytes));
        }
        assert_eq!(join([]), Crc::of(&[]));
        assert_eq!(join(bytes.chunks(33).map(Crc::of)), Crc::of(&bytes));
    }

    #[test]
    fn zeros() {
        for length in [0usize, 1, 2, 3, 10, 255, 4096, 100_001] {
            assert_eq!(Crc::of_zeros(length as u64), Crc::of(&vec![0; length]));
        }
        // Takes no time for any length.
        assert_eq!(Crc::of_zeros(1 << 60).length, 1 << 60);
    }
}
