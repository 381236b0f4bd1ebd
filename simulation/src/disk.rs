//! A disk: what is written is there at once, but stays only when it was synced.

use std::collections::BTreeMap;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// A disk writes a sector or does not.
const SECTOR: usize = 512;

/// Files by path. Names are durable at once; whoever makes one syncs its folder.
#[derive(Debug, Default)]
pub(crate) struct VirtualDisk {
    files: BTreeMap<String, File>,
    capacity_bytes: u64,
}

#[derive(Debug, Default)]
struct File {
    bytes: Vec<u8>,
    /// Sectors written since the last sync: what was there before, empty beyond the end.
    unsynced: BTreeMap<usize, Vec<u8>>,
    synced_length: usize,
}

/// The disk is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoSpace;

impl VirtualDisk {
    pub fn new(capacity_bytes: u64) -> VirtualDisk {
        VirtualDisk { capacity_bytes, ..VirtualDisk::default() }
    }

    /// Writes into a file, which is made when there is none, and lengthened with zeros.
    pub fn write(&mut self, path: &str, at: u32, bytes: &[u8]) -> Result<(), NoSpace> {
        let length = self.files.get(path).map_or(0, |file| file.bytes.len());
        let end = at as usize + bytes.len();
        if self.used_bytes() + end.saturating_sub(length) as u64 > self.capacity_bytes {
            return Err(NoSpace);
        }
        self.files.entry(path.to_owned()).or_default().write(at as usize, bytes);
        Ok(())
    }

    pub fn sync(&mut self, path: &str) {
        if let Some(file) = self.files.get_mut(path) {
            file.unsynced.clear();
            file.synced_length = file.bytes.len();
        }
    }

    pub fn read(&self, path: &str) -> Option<&[u8]> {
        self.files.get(path).map(|file| file.bytes.as_slice())
    }

    pub fn truncate(&mut self, path: &str, length: u32) {
        if let Some(file) = self.files.get_mut(path) {
            file.bytes.truncate(length as usize);
            file.synced_length = file.synced_length.min(length as usize);
        }
    }

    pub fn remove(&mut self, path: &str) {
        self.files.remove(path);
    }

    pub fn used_bytes(&self) -> u64 {
        self.files.values().map(|file| file.bytes.len() as u64).sum()
    }

    pub fn paths(&self) -> Vec<String> {
        self.files.keys().cloned().collect()
    }

    pub fn wipe(&mut self) {
        self.files.clear();
    }

    /// What a crash leaves: of each file all that was not synced, none of it, or any sectors.
    pub fn crash(&mut self, rng: &mut ChaCha8Rng) {
        for file in self.files.values_mut() {
            let keep = match rng.random_range(0..4) {
                0 => 0.0,
                1 => 1.0,
                _ => 0.5,
            };
            for (sector, before) in std::mem::take(&mut file.unsynced) {
                if rng.random_bool(keep) {
                    continue;
                }
                let at = sector * SECTOR;
                let end = file.bytes.len().min(at + SECTOR);
                let now = &mut file.bytes[at.min(end)..end];
                now.fill(0);
                let same = before.len().min(now.len());
                now[..same].copy_from_slice(&before[..same]);
            }
            if keep == 0.0 {
                file.bytes.truncate(file.synced_length);
            }
            file.synced_length = file.bytes.len();
        }
    }

    /// Flips one bit of a file.
    pub fn flip(&mut self, path: &str, at: u32, bit: u8) {
        if let Some(byte) = self.files.get_mut(path).and_then(|file| file.bytes.get_mut(at as usize)) {
            *byte ^= 1 << (bit % 8);
        }
    }
}

impl File {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        for sector in at / SECTOR..end.div_ceil(SECTOR) {
            let of = self.bytes.len().min(sector * SECTOR)..self.bytes.len().min((sector + 1) * SECTOR);
            let before = &self.bytes[of];
            self.unsynced.entry(sector).or_insert_with(|| before.to_vec());
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[at..end].copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn what_was_synced_survives_and_what_was_not_may_not() {
        let (mut lost, mut torn) = (0, 0);
        for seed in 0..40 {
            let mut disk = VirtualDisk::new(10_000);
            disk.write("file", 0, b"kept").unwrap();
            disk.sync("file");
            disk.write("file", 4, &[b'x'; 3000]).unwrap();
            disk.crash(&mut ChaCha8Rng::seed_from_u64(seed));
            let bytes = disk.read("file").unwrap();
            assert_eq!(&bytes[..4], b"kept");
            let late = bytes[4..].iter().filter(|&&byte| byte == b'x').count();
            lost += usize::from(late == 0);
            torn += usize::from(late > 0 && late < 3000);
        }
        assert!((1..40).contains(&lost) && (1..40).contains(&torn), "{lost} {torn}");
    }

    #[test]
    fn a_full_disk_takes_nothing() {
        let mut disk = VirtualDisk::new(4);
        assert_eq!(disk.write("a", 0, b"12345"), Err(NoSpace));
        assert_eq!(disk.write("a", 0, b"1234"), Ok(()));
        assert_eq!(disk.write("a", 2, b"56"), Ok(()));
        assert_eq!(disk.write("b", 0, b"1"), Err(NoSpace));
        assert_eq!(disk.read("a"), Some(b"1256".as_slice()));
    }
}
