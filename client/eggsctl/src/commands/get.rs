//! `get`: files and directories out of the cluster.
//!
//! Each file is written under a temporary name beside its own and renamed when it is whole, so that
//! nobody sees half a file whatever happens (GE-1). Temporary files go when they are dropped.
//!
//! Of a directory the small files are read many at once, and many are written here by one thread.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use clap::Args;
use eggs_client::{Client, Entry, FileReader, ListOptions, Metadata, ReadFile, SMALL_FILE_BYTES_MAX};
use eggs_proto::{InodeId, Time};
use rustix::fs::{AtFlags, CWD, RenameFlags, Timespec, Timestamps, UTIME_OMIT};
use tokio::task::JoinHandle;

use crate::context::{Context, failure};
use crate::failure::{Failure, Operands, Outcome};
use crate::paths::ClusterPath;
use crate::progress::Progress;
use crate::transfer::{Budget, each, local_time};
use crate::tree::{self, Entered, Visitor};

/// Small files are written here in batches of so many …
const BATCH_FILES: usize = 128;
/// … or so many bytes, …
const BATCH_BYTES: usize = 4 << 20;
/// … while so many batches before them are being written.
const BATCHES_IN_FLIGHT: usize = 2;
/// What the small files of a directory take of the budget at most: the windows of the library that reads them, and these
/// batches.
const MANY_ROOM: u64 = 24 << 20;

/// Copy files and directories out of the cluster
///
/// One file becomes DST, or gets its own name in DST when that is a directory. One directory (with -r)
/// becomes DST: its contents are put into DST, which is made when absent. With several sources, or a
/// `/` at the end of DST, DST must be a directory and every source gets its own name in it.
///
/// Permissions and modification times are kept, symbolic links in directories too. A file is written
/// under a temporary name and renamed when it is whole.
#[derive(Debug, Args)]
pub struct Get {
    /// Copy directories and everything in them
    #[arg(short, long, visible_short_alias = 'R')]
    recursive: bool,
    /// Refuse to replace a local file
    #[arg(short = 'n', long)]
    no_clobber: bool,
    /// Files and directories in the cluster
    #[arg(required = true, value_name = "SRC", value_parser = ClusterPath::parser())]
    sources: Vec<ClusterPath>,
    /// Local file or directory
    #[arg(required = true, value_name = "DST")]
    destination: PathBuf,
}

struct GetTree {
    client: Client,
    no_clobber: bool,
    budget: Budget,
    progress: Progress,
    command: &'static str,
}

/// A small file that is here, to be written.
struct Small {
    local: PathBuf,
    metadata: Metadata,
    contents: Bytes,
}

struct Node {
    path: ClusterPath,
    inode: InodeId,
    local: PathBuf,
    /// Of the directory; none where a local one of the user's choice is filled.
    attributes: Option<(u32, Time)>,
}

impl Get {
    pub async fn run(self, context: &Context) -> Outcome {
        if self.destination.as_os_str() == "-" {
            let words =
                "get writes files: `eggsctl cat` writes to standard output, ./- is a file of that name";
            return Err(Failure::Usage(words.to_owned()));
        }
        let client = context.client().await?;
        let (progress, _shown) = Progress::start();
        let getter = Arc::new(GetTree {
            client: client.clone(),
            no_clobber: self.no_clobber,
            budget: Budget::new(),
            progress,
            command: context.command,
        });
        let destination = &self.destination;
        let is_directory = destination.is_dir();
        let into = self.sources.len() > 1 || destination.as_os_str().as_bytes().ends_with(b"/");
        if into && !is_directory {
            let reason = if destination.exists() { "not a directory" } else { "no such file or directory" };
            return Err(Failure::refused(destination.display(), reason));
        }
        let mut operands = Operands::new(context.command);
        let (mut files, mut trees) = (Vec::new(), Vec::new());
        for source in &self.sources {
            let sorted = self.sort(client, source, is_directory, into, &mut files, &mut trees).await;
            operands.note(sorted)?;
        }
        let broken = each(files, context.command, |(path, local): (ClusterPath, PathBuf)| {
            let getter = &getter;
            async move {
                let file =
                    getter.client.open(path.as_bytes()).await.map_err(|error| failure(&path, error))?;
                getter.progress.expect_bytes(file.size());
                let _room = getter.budget.room(file.size()).await?;
                getter.fetch(&path, file, local).await
            }
        })
        .await?;
        if broken {
            operands.note(Err(Failure::Reported))?;
        }
        operands.note(tree::visit(getter, trees, context.command).await)?;
        operands.finish()
    }

    /// Says what is to be done with a source.
    async fn sort(
        &self,
        client: &Client,
        source: &ClusterPath,
        is_directory: bool,
        into: bool,
        files: &mut Vec<(ClusterPath, PathBuf)>,
        trees: &mut Vec<Node>,
    ) -> Outcome {
        let mut found = client.stat(source.as_bytes()).await.map_err(|error| failure(source, error))?;
        if found.is_symlink()
            && let Ok(directory) = client.directory(source.as_bytes()).await
        {
            let behind = client.stat_inode(directory.inode()).await;
            found = behind.map_err(|error| failure(source, error))?;
        }
        let inside = || {
            let name = source
                .name()
                .ok_or_else(|| Failure::refused(source, "has no name; name the destination exactly"))?;
            Ok(self.destination.join(OsStr::from_bytes(name)))
        };
        if !found.is_directory() {
            if source.means_directory() {
                return Err(Failure::refused(source, "not a directory"));
            }
            files.push((source.clone(), if is_directory { inside()? } else { self.destination.clone() }));
            return Ok(());
        }
        if !self.recursive {
            return Err(Failure::refused(source, "is a directory; -r copies directories"));
        }
        let local = if into { inside()? } else { self.destination.clone() };
        let attributes = (into || !is_directory).then_some((found.mode, found.mtime));
        trees.push(Node { path: source.clone(), inode: found.inode, local, attributes });
        Ok(())
    }
}

impl GetTree {
    async fn get_entry(&self, node: &Node, entry: Entry) -> Outcome {
        let path = node.path.join(&entry.name);
        let local = node.local.join(OsStr::from_bytes(&entry.name));
        if entry.target.is_symlink() {
            let target = self.client.read_link_inode(entry.target).await;
            let target = target.map_err(|error| failure(&path, error))?;
            make_link(&local, &target, entry.metadata.as_ref(), self.no_clobber)
                .map_err(|error| Failure::io(local.display(), &error))?;
            self.progress.files(1);
            return Ok(());
        }
        let size = entry.metadata.as_ref().map_or(0, |found| found.size);
        let _room = self.budget.room(size).await?;
        let file = self.client.open_inode(entry.target).await.map_err(|error| failure(&path, error))?;
        self.fetch(&path, file, local).await
    }

    /// The small files of a directory, many at once; true when some were refused.
    async fn get_small(&self, node: &Node, entries: Vec<Entry>) -> Outcome<bool> {
        let bytes: u64 =
            entries.iter().filter_map(|entry| entry.metadata.as_ref()).map(|found| found.size).sum();
        let _room = self.budget.room(bytes.min(MANY_ROOM)).await?;
        let mut operands = Operands::new(self.command);
        let mut reader = self.client.read_many(entries.iter().map(|entry| entry.target));
        let (mut batch, mut held) = (Vec::new(), 0);
        let mut writing = VecDeque::new();
        for entry in entries {
            let Some(read) = reader.next().await else { break };
            let path = node.path.join(&entry.name);
            let local = node.local.join(OsStr::from_bytes(&entry.name));
            match read {
                Ok(ReadFile { file, contents: Some(contents) }) => {
                    held += contents.len();
                    let metadata = file.metadata().clone();
                    batch.push(Small { local, metadata, contents });
                }
                // It is another one by now, and long.
                Ok(ReadFile { file, contents: None }) => {
                    operands.note(self.fetch(&path, file, local).await)?;
                }
                // Removed since it was listed: so it is not there.
                Err(error) if error.is_not_found() => {}
                Err(error) => operands.note(Err(failure(&path, error)))?,
            }
            if batch.len() >= BATCH_FILES || held >= BATCH_BYTES {
                if writing.len() >= BATCHES_IN_FLIGHT {
                    self.written(writing.pop_front(), &mut operands).await?;
                }
                writing.push_back(self.write_batch(std::mem::take(&mut batch)));
                held = 0;
            }
        }
        writing.push_back(self.write_batch(batch));
        while let Some(batch) = writing.pop_front() {
            self.written(Some(batch), &mut operands).await?;
        }
        Ok(operands.finish().is_err())
    }

    fn write_batch(&self, batch: Vec<Small>) -> JoinHandle<Vec<Outcome<usize>>> {
        let no_clobber = self.no_clobber;
        tokio::task::spawn_blocking(move || batch.into_iter().map(|file| file.write(no_clobber)).collect())
    }

    async fn written(
        &self,
        batch: Option<JoinHandle<Vec<Outcome<usize>>>>,
        operands: &mut Operands,
    ) -> Outcome {
        let Some(batch) = batch else { return Ok(()) };
        let outcomes =
            batch.await.map_err(|error| Failure::refused("", format!("a task ended early: {error}")))?;
        for outcome in outcomes {
            let outcome = outcome.map(|bytes| {
                self.progress.bytes(bytes as u64);
                self.progress.files(1);
            });
            operands.note(outcome)?;
        }
        Ok(())
    }

    async fn fetch(&self, path: &ClusterPath, file: FileReader, local: PathBuf) -> Outcome {
        let on_local = |error: std::io::Error| Failure::io(local.display(), &error);
        if local.is_dir() {
            return Err(Failure::refused(local.display(), "is a directory"));
        }
        if self.no_clobber && local.symlink_metadata().is_ok() {
            return Err(Failure::refused(local.display(), "file exists"));
        }
        let metadata = file.metadata().clone();
        let partial = Partial::beside(&local);
        let output = partial.create().map_err(on_local)?;
        let mut before = 0;
        let mut count = |so_far: u64| {
            self.progress.bytes(so_far.saturating_sub(before));
            before = so_far;
        };
        let twin = output.try_clone().map_err(on_local)?;
        file.copy_to_file(twin, &mut count).await.map_err(|error| failure(path, error))?;
        set_attributes(&output, &metadata).map_err(on_local)?;
        partial.rename(&local, self.no_clobber).map_err(on_local)?;
        self.progress.files(1);
        Ok(())
    }
}

impl Visitor for GetTree {
    type Node = Node;

    async fn enter(&self, node: &Node) -> Outcome<Entered<Node>> {
        if node.attributes.is_some() {
            make_directory(&node.local).map_err(|error| Failure::io(node.local.display(), &error))?;
        }
        let mut entered = Entered { children: Vec::new(), broken: false };
        let options = ListOptions { attributes: true, ..ListOptions::default() };
        let mut listing = self.client.list_inode(node.inode, options);
        while let Some(page) = listing.next_page().await.map_err(|error| failure(&node.path, error))? {
            let mut files = Vec::with_capacity(page.len());
            for entry in page {
                // They become local paths: a name that is none must not lead elsewhere.
                if let Err(error) = eggs_proto::names::validate(&entry.name) {
                    Failure::refused(node.path.join(&entry.name), error).print(self.command);
                    entered.broken = true;
                } else if entry.target.is_directory() {
                    let attributes = entry.metadata.as_ref().map(|found| (found.mode, found.mtime));
                    entered.children.push(Node {
                        path: node.path.join(&entry.name),
                        inode: entry.target,
                        local: node.local.join(OsStr::from_bytes(&entry.name)),
                        attributes: Some(attributes.unwrap_or((0o755, Time::ZERO))),
                    });
                } else {
                    self.progress.expect_bytes(entry.metadata.as_ref().map_or(0, |found| found.size));
                    files.push(entry);
                }
            }
            let is_small = |entry: &Entry| {
                !entry.target.is_symlink()
                    && entry.metadata.as_ref().is_some_and(|found| found.size <= SMALL_FILE_BYTES_MAX)
            };
            let (small, others): (Vec<_>, Vec<_>) = files.into_iter().partition(is_small);
            if !small.is_empty() {
                entered.broken |= self.get_small(node, small).await?;
            }
            entered.broken |= each(others, self.command, |entry| self.get_entry(node, entry)).await?;
        }
        Ok(entered)
    }

    /// Only now: a directory without write permission can still be filled, and filling it changes its
    /// modification time.
    async fn leave(&self, node: &Node, _: bool) -> Outcome {
        let Some((mode, mtime)) = node.attributes else { return Ok(()) };
        let set = || {
            let directory = File::open(&node.local)?;
            if !mtime.is_unset() {
                directory.set_modified(local_time(mtime))?;
            }
            directory.set_permissions(Permissions::from_mode(mode & 0o7777))
        };
        set().map_err(|error| Failure::io(node.local.display(), &error))
    }
}

impl Small {
    /// Its bytes, when it has its name.
    fn write(self, no_clobber: bool) -> Outcome<usize> {
        let Small { local, metadata, contents } = self;
        let write = || {
            let found = local.symlink_metadata();
            if found.is_ok() && no_clobber {
                return Err(std::io::Error::from(rustix::io::Errno::EXIST));
            }
            // Also a link to one.
            if found.is_ok() && local.is_dir() {
                return Err(std::io::Error::from(rustix::io::Errno::ISDIR));
            }
            let partial = Partial::beside(&local);
            let output = partial.create()?;
            (&output).write_all(&contents)?;
            set_attributes(&output, &metadata)?;
            partial.rename(&local, no_clobber)
        };
        write().map(|()| contents.len()).map_err(|error| Failure::io(local.display(), &error))
    }
}

/// A directory that is there is fine; a link to one is not ours to follow.
fn make_directory(local: &Path) -> std::io::Result<()> {
    match std::fs::create_dir(local) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            if local.symlink_metadata()?.is_dir() {
                Ok(())
            } else {
                Err(std::io::Error::from(rustix::io::Errno::NOTDIR))
            }
        }
        made => made,
    }
}

fn set_attributes(file: &File, metadata: &Metadata) -> std::io::Result<()> {
    file.set_permissions(Permissions::from_mode(metadata.mode & 0o7777))?;
    file.set_modified(local_time(metadata.mtime))
}

fn make_link(
    local: &Path,
    target: &[u8],
    metadata: Option<&Metadata>,
    no_clobber: bool,
) -> std::io::Result<()> {
    if local.symlink_metadata().is_ok_and(|found| found.is_dir()) {
        return Err(std::io::Error::from(rustix::io::Errno::ISDIR));
    }
    let partial = Partial::beside(local);
    std::os::unix::fs::symlink(OsStr::from_bytes(target), &partial.path)?;
    if let Some(metadata) = metadata {
        let seconds = i64::try_from(metadata.mtime.0 / 1_000_000_000).unwrap_or(i64::MAX);
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: (metadata.mtime.0 % 1_000_000_000) as _ },
        };
        rustix::fs::utimensat(CWD, &partial.path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    partial.rename(local, no_clobber)
}

/// A file that is not whole yet; removed when dropped.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
    gone: bool,
}

impl Partial {
    /// A name in the same directory that nobody else uses.
    fn beside(local: &Path) -> Partial {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!(".eggsctl-{}-{}.partial", std::process::id(), NEXT.fetch_add(1, Relaxed));
        Partial { path: local.with_file_name(name), gone: false }
    }

    fn create(&self) -> std::io::Result<File> {
        OpenOptions::new().write(true).create_new(true).open(&self.path)
    }

    fn rename(mut self, local: &Path, no_clobber: bool) -> std::io::Result<()> {
        if no_clobber {
            rustix::fs::renameat_with(CWD, &self.path, CWD, local, RenameFlags::NOREPLACE)?;
        } else {
            std::fs::rename(&self.path, local)?;
        }
        self.gone = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.gone {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_file_goes_when_it_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let local = directory.path().join("f");
        let partial = Partial::beside(&local);
        partial.create().unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        drop(partial);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_whole_file_gets_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let local = directory.path().join("f");
        for (contents, no_clobber, works) in [("a", true, true), ("b", true, false), ("c", false, true)] {
            let partial = Partial::beside(&local);
            partial.create().unwrap().write_all(contents.as_bytes()).unwrap();
            assert_eq!(partial.rename(&local, no_clobber).is_ok(), works, "{contents}");
        }
        assert_eq!(std::fs::read(&local).unwrap(), b"c");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn links_keep_their_time_and_replace_files() {
        let directory = tempfile::tempdir().unwrap();
        let local = directory.path().join("l");
        std::fs::write(&local, "x").unwrap();
        assert!(make_link(&local, b"t", None, true).is_err());
        make_link(&local, b"t\xff", None, false).unwrap();
        assert_eq!(std::fs::read_link(&local).unwrap().as_os_str().as_bytes(), b"t\xff");
        std::fs::create_dir(directory.path().join("d")).unwrap();
        assert!(make_link(&directory.path().join("d"), b"t", None, false).is_err());
    }

    #[test]
    fn directories_are_not_made_through_links() {
        let directory = tempfile::tempdir().unwrap();
        let real = directory.path().join("real");
        make_directory(&real).unwrap();
        make_directory(&real).unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let error = make_directory(&link).unwrap_err();
        assert_eq!(crate::failure::posix_words(&error), "not a directory");
    }
}
