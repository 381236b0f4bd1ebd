//! The order-independent hash of a group's state.

use std::fmt;

use xxhash_rust::xxh3::Xxh3;

/// Sum modulo 2^128 of XXH3-128 over the rows: a batch updates it by what it changes, two replicas
/// with the same rows have the same one, and a scan of the table verifies it.
///
/// It finds damage and divergence, not forgery.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct StateHash(u128);

impl StateHash {
    pub fn insert(&mut self, key: &[u8], value: &[u8]) {
        self.0 = self.0.wrapping_add(row(key, value));
    }

    pub fn remove(&mut self, key: &[u8], value: &[u8]) {
        self.0 = self.0.wrapping_sub(row(key, value));
    }

    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        StateHash(u128::from_be_bytes(bytes))
    }
}

/// The key's length goes in, so that no two rows share an input.
fn row(key: &[u8], value: &[u8]) -> u128 {
    let mut hasher = Xxh3::new();
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key);
    hasher.update(value);
    hasher.digest128()
}

impl fmt::Debug for StateHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for StateHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
