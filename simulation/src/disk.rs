//! A disk: what is written is there at once, but stays only when it was synced.

use std::collections::BTreeMap;

use bytes::Bytes;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Files by path. Names and contents are durable apart, as on a real file system.
#[derive(Debug, Default)]
pub(crate) struct VirtualDisk {
    files: BTreeMap<String, File>,
    /// Renames whose folder was not synced yet: (from, to).
    renames: Vec<(String, String)>,
    capacity_bytes: u64,
}

#[derive(Debug, Clone)]
struct File {
    bytes: Bytes,
    synced: bool,
}

/// The disk is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoSpace;

impl VirtualDisk {
    pub fn new(capacity_bytes: u64) -> VirtualDisk {
        VirtualDisk { capacity_bytes, ..VirtualDisk::default() }
    }

    pub fn write(&mut self, path: &str, bytes: Bytes) -> Result<(), NoSpace> {
        if self.used_bytes() + bytes.len() as u64 > self.capacity_bytes {
            return Err(NoSpace);
        }
        self.files.insert(path.to_owned(), File { bytes, synced: false });
        Ok(())
    }

    pub fn sync(&mut self, path: &str) {
        if let Some(file) = self.files.get_mut(path) {
            file.synced = true;
        }
    }

    pub fn rename(&mut self, from: &str, to: &str) {
        if let Some(file) = self.files.remove(from) {
            self.files.insert(to.to_owned(), file);
            self.renames.push((from.to_owned(), to.to_owned()));
        }
    }

    pub fn sync_folders(&mut self) {
        self.renames.clear();
    }

    pub fn read(&self, path: &str) -> Option<&Bytes> {
        self.files.get(path).map(|file| &file.bytes)
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
        self.renames.clear();
    }

    /// What a crash leaves: each unsynced name old or new, each unsynced content whole, cut, or zeros.
    pub fn crash(&mut self, rng: &mut ChaCha8Rng) {
        for (from, to) in std::mem::take(&mut self.renames).into_iter().rev() {
            if rng.random_bool(0.5)
                && let Some(file) = self.files.remove(&to)
            {
                self.files.insert(from, file);
            }
        }
        let unsynced: Vec<String> =
            self.files.iter().filter(|(_, file)| !file.synced).map(|(path, _)| path.clone()).collect();
        for path in unsynced {
            match rng.random_range(0..4) {
                0 => self.remove(&path),
                1 => self.change(&path, |bytes| {
                    let cut = bytes.len() / 2;
                    bytes.truncate(cut);
                }),
                2 => self.change(&path, |bytes| {
                    let half = bytes.len() / 2;
                    bytes[half..].fill(0);
                }),
                _ => {}
            }
            self.sync(&path);
        }
    }

    /// Flips one bit of a file.
    pub fn flip(&mut self, path: &str, at: usize, bit: u8) {
        self.change(path, |bytes| {
            let length = bytes.len();
            if length > 0 {
                bytes[at % length] ^= 1 << (bit % 8);
            }
        });
    }

    fn change(&mut self, path: &str, change: impl FnOnce(&mut Vec<u8>)) {
        if let Some(file) = self.files.get_mut(path) {
            let mut bytes = file.bytes.to_vec();
            change(&mut bytes);
            file.bytes = bytes.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn what_was_synced_survives_and_what_was_not_may_not() {
        let mut lost = 0;
        for seed in 0..40 {
            let mut disk = VirtualDisk::new(1000);
            disk.write("kept", Bytes::from_static(b"kept")).unwrap();
            disk.sync("kept");
            disk.write("tmp", Bytes::from_static(b"moved")).unwrap();
            disk.sync("tmp");
            disk.rename("tmp", "final");
            disk.write("late", Bytes::from_static(b"unsynced")).unwrap();
            disk.crash(&mut ChaCha8Rng::seed_from_u64(seed));
            assert_eq!(disk.read("kept").unwrap(), "kept");
            assert!(disk.read("final").or(disk.read("tmp")).unwrap() == "moved");
            lost += usize::from(disk.read("late").is_none_or(|bytes| bytes != "unsynced"));
        }
        assert!((10..40).contains(&lost), "{lost}");
    }

    #[test]
    fn a_full_disk_takes_nothing() {
        let mut disk = VirtualDisk::new(4);
        assert_eq!(disk.write("a", Bytes::from_static(b"12345")), Err(NoSpace));
        assert_eq!(disk.write("a", Bytes::from_static(b"1234")), Ok(()));
        assert_eq!(disk.write("b", Bytes::from_static(b"1")), Err(NoSpace));
    }
}
