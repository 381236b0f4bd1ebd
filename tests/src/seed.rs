//! Chance from one seed.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::OnceLock;

use rand::{RngCore as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// The seed of this run: `EGGS_TEST_SEED`, else a new one; printed when first asked for.
///
/// # Panics
/// When the variable is no number.
pub fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        let seed = match std::env::var("EGGS_TEST_SEED") {
            Ok(text) => text.parse().expect("EGGS_TEST_SEED is a number"),
            Err(_) => RandomState::new().build_hasher().finish() >> 32,
        };
        println!("seed {seed}: EGGS_TEST_SEED={seed} plays it again");
        seed
    })
}

/// A source of chance for one part of a test; parts do not disturb each other.
pub fn rng(part: &str) -> ChaCha8Rng {
    let part = part.bytes().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    ChaCha8Rng::seed_from_u64(seed() ^ part.rotate_left(32))
}

/// Contents that tell where a byte is from: no two files of other numbers are alike.
pub fn bytes(size: usize, number: u64) -> Vec<u8> {
    let mut bytes = vec![0; size];
    ChaCha8Rng::seed_from_u64(number).fill_bytes(&mut bytes);
    bytes
}
