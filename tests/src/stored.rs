//! Blocks where they lie on a disk, found by the public layout of its segments: to be counted and damaged.

use std::fs;
use std::path::{Path, PathBuf};

use eggs_blockd_core::record::{Kind, Seal};
use eggs_blockd_core::recovery::walk;
use eggs_blockd_core::{Extent, Identity};

/// A block's record.
#[derive(Debug, Clone)]
pub struct StoredBlock {
    pub id: u64,
    pub file: PathBuf,
    pub extent: Extent,
    pub size: u32,
}

/// The blocks on a disk that are not erased, in the order they lie; of one that is in use, those of some instant.
///
/// # Panics
/// When it is no disk.
pub fn stored_blocks(disk: &Path) -> Vec<StoredBlock> {
    let identity =
        fs::read(disk.join("identity")).unwrap_or_else(|error| panic!("{}: {error}", disk.display()));
    let identity = Identity::decode(&identity).expect("identity");
    let mut blocks = Vec::new();
    for file in crate::files_below(&disk.join("segments")) {
        let name = file.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
        let Ok(number) = u32::from_str_radix(name, 16) else { continue };
        let bytes = fs::read(&file).expect("segment");
        let found = walk(Seal::from(&identity), number, bytes.len() as u32, |at, into| {
            let bytes = bytes.get(at as usize..at as usize + into.len());
            bytes.map(|bytes| into.copy_from_slice(bytes)).is_some()
        });
        let live = found.records.into_iter().filter(|(_, record)| record.kind == Kind::Block);
        blocks.extend(live.map(|(offset, record)| StoredBlock {
            id: record.block.0,
            file: file.clone(),
            extent: record.extent(offset),
            size: record.size,
        }));
    }
    blocks
}
