//! Snapshots as files: `DIR/snapshots/GROUP.snap`, the newest of each group; `GROUP.TERM-INDEX.incoming`, what has come of
//! another store's.
//!
//! Layout ([`format`]), integers little-endian:
//!
//! ```text
//! magic "EGGSSNAP"  u32 version = 2  u32 group
//! pages: u32 length  u32 crc32 of the page  page = rows: u32 key length, key, u32 value length, value
//! end:   u32 0
//! footer: u64 index  u64 term  [u8;16] state hash  u64 bytes of all keys and values  Membership (protobuf)
//! u32 length of the footer  u32 crc32 of the footer
//! ```
//!
//! The footer is at the end, so that rows can stream.

mod format;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use bytes::Bytes;
use eggs_consensus_core::{GroupId, Piece, SnapshotMeta, SnapshotStore, StorageError};
use eggs_machine::Row;

use crate::sled_state::sync_directory;

/// (index, term)
type At = (u64, u64);
type Helper<R> = JoinHandle<Result<R, StorageError>>;

pub(crate) struct SnapshotFiles {
    directory: PathBuf,
    begun: Option<(GroupId, BufWriter<File>)>,
    sealing: Option<(GroupId, Helper<()>)>,
    /// The incoming file that is being added to.
    receiving: Option<(PathBuf, File)>,
    installing: Option<(GroupId, At, Helper<SnapshotMeta>)>,
}

impl SnapshotFiles {
    pub(crate) fn open(directory: PathBuf) -> Result<Self, StorageError> {
        fs::create_dir_all(&directory).map_err(|error| failed(&directory, &error))?;
        if let Some(parent) = directory.parent() {
            sync_directory(parent)?;
        }
        Ok(SnapshotFiles { directory, begun: None, sealing: None, receiving: None, installing: None })
    }

    fn path(&self, group: GroupId) -> PathBuf {
        self.directory.join(format!("{:05}.snap", group.0))
    }

    fn begun_path(&self) -> PathBuf {
        self.directory.join("taking.tmp")
    }

    fn incoming_path(&self, group: GroupId, (index, term): At) -> PathBuf {
        self.directory.join(format!("{:05}.{term}-{index}.incoming", group.0))
    }

    /// Removes what has come of other snapshots of a group.
    fn remove_incoming(&mut self, group: GroupId, but: Option<At>) -> Result<(), StorageError> {
        let keep = but.map(|at| self.incoming_path(group, at));
        let prefix = format!("{:05}.", group.0);
        let io_error = |error: io::Error| failed(&self.directory, &error);
        for entry in fs::read_dir(&self.directory).map_err(io_error)? {
            let path = entry.map_err(io_error)?.path();
            let of_group =
                path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(&prefix));
            let incoming = path.extension().is_some_and(|extension| extension == "incoming");
            if of_group && incoming && keep.as_ref() != Some(&path) {
                remove_file(&path)?;
            }
        }
        if self.receiving.as_ref().is_some_and(|(path, _)| !path.exists()) {
            self.receiving = None;
        }
        Ok(())
    }
}

fn failed(path: &Path, error: &io::Error) -> StorageError {
    StorageError::new(format!("{}: {error}", path.display()))
}

fn damaged(path: &Path, what: &str) -> StorageError {
    StorageError::damaged(format!("{}: snapshot damaged: {what}", path.display()))
}

fn remove_file(path: &Path) -> Result<(), StorageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed(path, &error)),
        _ => Ok(()),
    }
}

fn open_existing(path: &Path) -> Result<Option<File>, StorageError> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(path, &error)),
    }
}

fn joined<R>(helper: Helper<R>) -> Result<R, StorageError> {
    helper.join().unwrap_or_else(|_| Err(StorageError::new("the snapshot thread panicked")))
}

impl SnapshotStore for SnapshotFiles {
    fn latest(&self, group: GroupId) -> Result<Option<SnapshotMeta>, StorageError> {
        let path = self.path(group);
        let Some(file) = open_existing(&path)? else { return Ok(None) };
        format::read_meta(&path, &file).map(Some)
    }

    fn page(&self, group: GroupId, at: u64) -> Result<(Vec<Row>, Option<u64>), StorageError> {
        let path = self.path(group);
        let file = File::open(&path).map_err(|error| failed(&path, &error))?;
        let Some((page, next)) = format::read_page(&path, &file, group, at)? else {
            return Ok((Vec::new(), None));
        };
        let rows = format::decode_page(page).ok_or_else(|| damaged(&path, "a page has broken rows"))?;
        Ok((rows, Some(next)))
    }

    fn begin(&mut self, group: GroupId) -> Result<(), StorageError> {
        let path = self.begun_path();
        let io_error = |error: io::Error| failed(&path, &error);
        let mut writer = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(io_error)?);
        writer.write_all(&format::encode_header(group)).map_err(io_error)?;
        self.begun = Some((group, writer));
        Ok(())
    }

    fn add(&mut self, rows: &[Row]) -> Result<(), StorageError> {
        if rows.is_empty() {
            return Ok(());
        }
        let path = self.begun_path();
        let Some((_, writer)) = &mut self.begun else { return Err(StorageError::new("no snapshot begun")) };
        let page = format::encode_page(rows);
        let length =
            u32::try_from(page.len()).map_err(|_| StorageError::new("a page of a snapshot is too long"))?;
        let written = writer
            .write_all(&length.to_le_bytes())
            .and_then(|()| writer.write_all(&crc32fast::hash(&page).to_le_bytes()))
            .and_then(|()| writer.write_all(&page));
        written.map_err(|error| failed(&path, &error))
    }

    fn seal(&mut self, meta: SnapshotMeta) -> Result<bool, StorageError> {
        if let Some((_, sealing)) = &self.sealing {
            if !sealing.is_finished() {
                return Ok(false);
            }
        } else if let Some((group, writer)) = self.begun.take() {
            // The fsync of a large file takes long: not on the consensus thread.
            let (from, to) = (self.begun_path(), self.path(group));
            let sealing =
                helper(&self.directory, move |directory| seal(writer, &meta, &from, &to, directory))?;
            self.sealing = Some((group, sealing));
            return Ok(false);
        }
        match self.sealing.take() {
            Some((_, sealing)) => joined(sealing).map(|()| true),
            None => Err(StorageError::new("no snapshot begun")),
        }
    }

    fn piece(
        &self,
        group: GroupId,
        (index, term): At,
        offset: u64,
        max: usize,
    ) -> Result<Option<Piece>, StorageError> {
        let path = self.path(group);
        let Some(file) = open_existing(&path)? else { return Ok(None) };
        let meta = format::read_meta(&path, &file)?;
        if (meta.index, meta.term) != (index, term) {
            return Ok(None);
        }
        let io_error = |error: io::Error| failed(&path, &error);
        let total = file.metadata().map_err(io_error)?.len();
        let left = usize::try_from(total.saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; left.min(max)];
        file.read_exact_at(&mut bytes, offset.min(total)).map_err(io_error)?;
        Ok(Some(Piece { bytes: Bytes::from(bytes), total }))
    }

    fn received(&self, group: GroupId, at: At) -> Result<u64, StorageError> {
        let path = self.incoming_path(group, at);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
            Err(error) => Err(failed(&path, &error)),
        }
    }

    fn receive(&mut self, group: GroupId, at: At, offset: u64, bytes: &[u8]) -> Result<(), StorageError> {
        let path = self.incoming_path(group, at);
        let io_error = |error: io::Error| failed(&path, &error);
        if offset == 0 {
            self.receiving = None;
            self.remove_incoming(group, None)?;
        }
        if self.receiving.as_ref().is_none_or(|(of, _)| *of != path) {
            let file = OpenOptions::new().append(true).create(offset == 0).open(&path);
            match file {
                Ok(file) => self.receiving = Some((path.clone(), file)),
                Err(error) if error.kind() == ErrorKind::NotFound => return Err(not_the_next()),
                Err(error) => return Err(io_error(error)),
            }
        }
        let Some((_, file)) = &mut self.receiving else { return Err(not_the_next()) };
        if file.metadata().map_err(io_error)?.len() != offset {
            return Err(not_the_next());
        }
        if let Err(error) = file.write_all(bytes) {
            // A part of a piece must not stay: the disk is full, say.
            let _ = file.set_len(offset);
            return Err(io_error(error));
        }
        Ok(())
    }

    fn install(&mut self, group: GroupId, at: At) -> Result<Option<SnapshotMeta>, StorageError> {
        match self.installing.take() {
            Some((of, of_at, installing)) if !installing.is_finished() => {
                self.installing = Some((of, of_at, installing));
                return Ok(None);
            }
            Some((of, of_at, installing)) => {
                let installed = joined(installing);
                if (of, of_at) == (group, at) {
                    return installed.map(Some);
                }
                // Whoever waits for that one finds it installed, or gone, when it asks again.
            }
            None => {}
        }
        let from = self.incoming_path(group, at);
        if !from.exists() {
            let latest = self.latest(group)?.filter(|meta| (meta.index, meta.term) == at);
            return latest.map(Some).ok_or_else(|| StorageError::of_state("no such snapshot was received"));
        }
        self.receiving = None;
        let to = self.path(group);
        let work = move |directory: &Path| install(group, at, &from, &to, directory);
        self.installing = Some((group, at, helper(&self.directory, work)?));
        Ok(None)
    }

    fn remove(&mut self, group: GroupId) -> Result<(), StorageError> {
        // What is under way must not bring it back.
        if let Some((of, _, installing)) = self.installing.take_if(|(of, _, _)| *of == group) {
            debug_assert_eq!(of, group);
            let _ = joined(installing);
        }
        if let Some((_, sealing)) = self.sealing.take_if(|(of, _)| *of == group) {
            let _ = joined(sealing);
        }
        if self.begun.take_if(|(of, _)| *of == group).is_some() {
            remove_file(&self.begun_path())?;
        }
        self.remove_incoming(group, None)?;
        remove_file(&self.path(group))?;
        sync_directory(&self.directory)
    }
}

/// A piece that does not follow the one before: what was received can be fetched anew.
fn not_the_next() -> StorageError {
    StorageError::of_state("a piece of a snapshot that does not follow the one before")
}

/// Runs slow work on the directory in a thread of its own.
fn helper<R: Send + 'static>(
    directory: &Path,
    work: impl FnOnce(&Path) -> Result<R, StorageError> + Send + 'static,
) -> Result<Helper<R>, StorageError> {
    let directory = directory.to_owned();
    let thread = std::thread::Builder::new().name("snapshot".to_owned());
    let path = directory.clone();
    thread.spawn(move || work(&directory)).map_err(|error| failed(&path, &error))
}

fn seal(
    mut writer: BufWriter<File>,
    meta: &SnapshotMeta,
    from: &Path,
    to: &Path,
    directory: &Path,
) -> Result<(), StorageError> {
    let io_error = |error: io::Error| failed(from, &error);
    writer.write_all(&format::encode_end(meta)).map_err(io_error)?;
    let file = writer.into_inner().map_err(|error| io_error(error.into_error()))?;
    file.sync_all().map_err(io_error)?;
    put_in_place(meta, from, to, directory)
}

fn install(
    group: GroupId,
    at: At,
    from: &Path,
    to: &Path,
    directory: &Path,
) -> Result<SnapshotMeta, StorageError> {
    let file = File::open(from).map_err(|error| failed(from, &error))?;
    match whole(group, at, from, &file) {
        Ok(meta) => {
            file.sync_all().map_err(|error| failed(from, &error))?;
            put_in_place(&meta, from, to, directory)?;
            Ok(meta)
        }
        Err(error) => {
            remove_file(from)?;
            Err(StorageError::of_state(error.to_string()))
        }
    }
}

/// What a received file is, every byte of it verified.
fn whole(group: GroupId, at: At, path: &Path, file: &File) -> Result<SnapshotMeta, StorageError> {
    let meta = format::read_meta(path, file)?;
    if (meta.index, meta.term) != at {
        return Err(damaged(path, "it is of another index"));
    }
    let mut hash = eggs_machine::hash::StateHash::default();
    let read_to = format::read_pages(path, file, group, &mut |page| {
        let rows = format::decode_page(page).ok_or_else(|| damaged(path, "a page has broken rows"))?;
        for (key, value) in &rows {
            hash.insert(key, value);
        }
        Ok(())
    })?;
    let length = file.metadata().map_err(|error| failed(path, &error))?.len();
    if read_to != length {
        return Err(damaged(path, "bytes after its end"));
    }
    if hash != meta.hash {
        return Err(damaged(path, "its rows do not have its hash"));
    }
    Ok(meta)
}

/// Makes a durable file the group's newest snapshot, never in the place of a newer one.
fn put_in_place(meta: &SnapshotMeta, from: &Path, to: &Path, directory: &Path) -> Result<(), StorageError> {
    if let Some(file) = open_existing(to)?
        && let Ok(there) = format::read_meta(to, &file)
        && there.index > meta.index
    {
        remove_file(from)?;
        let (index, newer) = (meta.index, there.index);
        let what = format!("{}: a snapshot at {index} came after one at {newer}", to.display());
        return Err(StorageError::new(what));
    }
    fs::rename(from, to).map_err(|error| failed(from, &error))?;
    sync_directory(directory)
}

#[cfg(test)]
mod tests;
