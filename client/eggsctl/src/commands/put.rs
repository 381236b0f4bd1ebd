//! `put`: local files and directories into the cluster.
//!
//! Directories are made from the top, many at once; in each, small files go many to a request, the others are streamed, all
//! within a common budget of memory.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use eggs_client::{AttributeChanges, Client, Directory, Refusal, Replace, SMALL_FILE_BYTES_MAX, SmallFile};
use tokio::io::AsyncRead;

use super::cp::make_or_find;
use crate::context::{Context, attributes, create_options, failure};
use crate::failure::{Failure, Operands, Outcome, posix_words};
use crate::paths::ClusterPath;
use crate::progress::Progress;
use crate::transfer::{Budget, each, time_of};
use crate::tree::{self, Entered, Visitor};

/// Files in one batch of small ones …
const BATCH_FILES: usize = 512;
/// … and their bytes.
const BATCH_BYTES: u64 = 4 << 20;
/// What a batch takes of the budget: its bytes, and on their way three copies of each.
const BATCH_ROOM: u64 = 4 * BATCH_BYTES;

/// Copy local files and directories into the cluster
///
/// One file becomes DST, or gets its own name in DST when that is a directory. One directory (with -r)
/// becomes DST: its contents are put into DST, which is made when absent. With several sources, or a
/// `/` at the end of DST, DST must be a directory and every source gets its own name in it.
///
/// Permissions and modification times are kept, symbolic links in directories too. A file appears
/// whole or not at all; one of the same name is replaced and stays in the dead map.
#[derive(Debug, Args)]
pub struct Put {
    /// Copy directories and everything in them
    #[arg(short, long, visible_short_alias = 'R')]
    recursive: bool,
    /// Refuse to replace a file
    #[arg(short = 'n', long)]
    no_clobber: bool,
    /// Local files and directories (`-` is standard input), and the path in the cluster to copy them to
    #[arg(required = true, num_args = 2.., value_names = ["SRC", "DST"])]
    paths: Vec<OsString>,
}

struct PutTree {
    client: Client,
    replace: Replace,
    budget: Budget,
    progress: Progress,
    command: &'static str,
}

struct Node {
    local: PathBuf,
    local_metadata: Metadata,
    path: ClusterPath,
    place: Place,
}

enum Place {
    Existing(Directory),
    /// To be made (or found) in this one.
    In(Directory),
}

/// A local file on its way.
struct LocalFile {
    path: PathBuf,
    name: Bytes,
    metadata: Metadata,
}

impl Put {
    pub async fn run(self, context: &Context) -> Outcome {
        let (destination, sources) = match self.paths.split_last() {
            Some((destination, sources)) if !sources.is_empty() => (destination, sources),
            _ => return Err(Failure::Usage("a source and a destination are needed".to_owned())),
        };
        let destination = ClusterPath::typed(destination)
            .map_err(|error| Failure::Usage(format!("destination '{}': {error}", destination.display())))?;
        let client = context.client().await?;
        let (progress, _shown) = Progress::start();
        let sender = Arc::new(PutTree {
            client: client.clone(),
            replace: if self.no_clobber { Replace::Refuse } else { Replace::File },
            budget: Budget::new(),
            progress: progress.clone(),
            command: context.command,
        });
        let found = find_directory(client, &destination).await?;
        let into = sources.len() > 1 || destination.means_directory();
        if into && found.is_none() {
            let there = client.stat(destination.as_bytes()).await;
            there.map_err(|error| failure(&destination, error))?;
            return Err(Failure::refused(&destination, "not a directory"));
        }
        let mut operands = Operands::new(context.command);
        let (mut files, mut trees) = (Vec::new(), Vec::new());
        for source in sources {
            let sorted = if source.as_bytes() == b"-" {
                sender.put_stdin(&destination, found.is_some()).await
            } else {
                self.sort(
                    &sender,
                    Path::new(source),
                    &destination,
                    found.as_ref(),
                    into,
                    &mut files,
                    &mut trees,
                )
                .await
            };
            operands.note(sorted)?;
        }
        progress.scan(trees.iter().map(|node: &Node| node.local.clone()).collect());
        operands.note(sender.put_operands(files, &destination, found.as_ref()).await)?;
        operands.note(tree::visit(sender.clone(), trees, context.command).await)?;
        operands.finish()
    }

    /// Says what is to be done with a source.
    #[allow(clippy::too_many_arguments)]
    async fn sort(
        &self,
        sender: &PutTree,
        source: &Path,
        destination: &ClusterPath,
        found: Option<&Directory>,
        into: bool,
        files: &mut Vec<LocalFile>,
        trees: &mut Vec<Node>,
    ) -> Outcome {
        let metadata = std::fs::metadata(source).map_err(|error| Failure::io(source.display(), &error))?;
        if !metadata.is_dir() && !metadata.is_file() {
            // A pipe or device that was named is read to its end, as `cat` would.
            let to = match found {
                Some(_) => destination.join(own_name(source)?.as_bytes()),
                None => destination.clone(),
            };
            let input = tokio::fs::File::open(source).await;
            let input = input.map_err(|error| Failure::io(source.display(), &error))?;
            return sender.put_stream(input, &to).await;
        }
        if metadata.is_file() {
            let name = Bytes::copy_from_slice(own_name(source)?.as_bytes());
            sender.progress.expect_bytes(metadata.len());
            files.push(LocalFile { path: source.to_owned(), name, metadata });
            return Ok(());
        }
        if !self.recursive {
            return Err(Failure::refused(source.display(), "is a directory; -r copies directories"));
        }
        let (path, place) = match found {
            Some(directory) if into => {
                (destination.join(own_name(source)?.as_bytes()), Place::In(directory.clone()))
            }
            Some(directory) => (destination.clone(), Place::Existing(directory.clone())),
            None => {
                let above = destination.parent();
                let parent = sender.client.directory(above.as_bytes()).await;
                (destination.clone(), Place::In(parent.map_err(|error| failure(&above, error))?))
            }
        };
        trees.push(Node { local: source.to_owned(), local_metadata: metadata, path, place });
        Ok(())
    }
}

/// `None` when there is none (yet).
async fn find_directory(client: &Client, path: &ClusterPath) -> Outcome<Option<Directory>> {
    match client.directory(path.as_bytes()).await {
        Ok(directory) => Ok(Some(directory)),
        Err(error) => match error.refusal() {
            Some(Refusal::NotFound | Refusal::NotDirectory) => Ok(None),
            _ => Err(failure(path, error)),
        },
    }
}

/// The name a source has of its own: of `.` and `..`, that of the directory they are.
fn own_name(source: &Path) -> Outcome<OsString> {
    if let Some(name) = source.file_name() {
        return Ok(name.to_owned());
    }
    let real = source.canonicalize().map_err(|error| Failure::io(source.display(), &error))?;
    real.file_name()
        .map(OsStr::to_owned)
        .ok_or_else(|| Failure::refused(source.display(), "has no name; name the destination exactly"))
}

impl PutTree {
    async fn put_stdin(&self, destination: &ClusterPath, is_directory: bool) -> Outcome {
        if is_directory {
            return Err(Failure::refused(
                destination,
                "is a directory; standard input needs the name of a file",
            ));
        }
        self.put_stream(tokio::io::stdin(), destination).await
    }

    async fn put_stream(&self, mut input: impl AsyncRead + Unpin + Send, to: &ClusterPath) -> Outcome {
        let options = create_options(0o644, None, self.replace);
        let mut count = self.counter();
        let put = self.client.put(to.as_bytes(), &mut input, &options, &mut count).await;
        put.map_err(|error| failure(to, error))?;
        self.progress.files(1);
        Ok(())
    }

    /// Files named one by one.
    async fn put_operands(
        &self,
        files: Vec<LocalFile>,
        destination: &ClusterPath,
        found: Option<&Directory>,
    ) -> Outcome {
        if let Some(directory) = found {
            let broken = self.put_files(directory, destination, files).await?;
            return if broken { Err(Failure::Reported) } else { Ok(()) };
        }
        // Without a directory there is only one source.
        for file in files {
            check_regular(&file)?;
            let options = options_of(&file, self.replace);
            let mut count = self.counter();
            let put = self.client.put_file(destination.as_bytes(), &file.path, &options, &mut count).await;
            put.map_err(|error| failure(destination, error))?;
            self.progress.files(1);
        }
        Ok(())
    }

    /// The library says how far it is; the bar wants to know how much further.
    fn counter(&self) -> impl FnMut(u64) + Send + use<> {
        let progress = self.progress.clone();
        let mut before = 0;
        move |so_far: u64| {
            progress.bytes(so_far.saturating_sub(before));
            before = so_far;
        }
    }

    /// All the files of one directory; true when some were refused.
    async fn put_files(
        &self,
        directory: &Directory,
        path: &ClusterPath,
        files: Vec<LocalFile>,
    ) -> Outcome<bool> {
        let limit = small_bytes(directory);
        let (small, large): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| {
            file.metadata.is_symlink() || (file.metadata.is_file() && file.metadata.len() <= limit)
        });
        let (links, small): (Vec<_>, Vec<_>) = small.into_iter().partition(|file| file.metadata.is_symlink());
        let mut broken =
            each(batches(small), self.command, |batch| self.put_batch(directory, path, batch, limit)).await?;
        broken |= each(links, self.command, |link| self.put_link(directory, path, link)).await?;
        broken |= each(large, self.command, |file| self.put_large(directory, path, file)).await?;
        Ok(broken)
    }

    async fn put_link(&self, directory: &Directory, path: &ClusterPath, link: LocalFile) -> Outcome {
        let target =
            std::fs::read_link(&link.path).map_err(|error| Failure::io(link.path.display(), &error))?;
        let options = options_of(&link, self.replace);
        let made = directory.symlink(&link.name, target.as_os_str().as_bytes(), &options).await;
        made.map_err(|error| failure(path.join(&link.name), error))?;
        self.progress.files(1);
        Ok(())
    }

    async fn put_large(&self, directory: &Directory, path: &ClusterPath, file: LocalFile) -> Outcome {
        check_regular(&file)?;
        let _room = self.budget.room(file.metadata.len()).await?;
        let options = options_of(&file, self.replace);
        let mut count = self.counter();
        let put = directory.put_file(&file.name, &file.path, &options, &mut count).await;
        put.map_err(|error| failure(path.join(&file.name), error))?;
        self.progress.files(1);
        Ok(())
    }

    async fn put_batch(
        &self,
        directory: &Directory,
        path: &ClusterPath,
        batch: Vec<LocalFile>,
        limit: u64,
    ) -> Outcome {
        let bytes: u64 = batch.iter().map(|file| file.metadata.len()).sum();
        let room = self.budget.room((4 * bytes).min(BATCH_ROOM)).await?;
        let (batch, contents) = tokio::task::spawn_blocking(move || {
            let contents: Vec<_> = batch.iter().map(|file| read_small(&file.path, limit)).collect();
            (batch, contents)
        })
        .await
        .map_err(|error| Failure::refused(path, format!("a task ended early: {error}")))?;
        let (mut ready, mut grown) = (Vec::new(), Vec::new());
        let mut refused = false;
        for (file, contents) in batch.into_iter().zip(contents) {
            match contents {
                Ok(Some(contents)) => {
                    let attributes = options_of(&file, self.replace).attributes;
                    let name = file.name.clone();
                    ready.push(SmallFile { name, contents, attributes, replace: self.replace });
                }
                Ok(None) => grown.push(file),
                Err(error) => {
                    Failure::io(file.path.display(), &error).print(self.command);
                    refused = true;
                }
            }
        }
        let sent: Vec<(Bytes, u64)> =
            ready.iter().map(|file| (file.name.clone(), file.contents.len() as u64)).collect();
        let answers = directory.put_many(ready).await;
        drop(room);
        for ((name, bytes), answer) in sent.into_iter().zip(answers) {
            match answer.map_err(|error| failure(path.join(&name), error)) {
                Ok(_) => {
                    self.progress.files(1);
                    self.progress.bytes(bytes);
                }
                Err(error) if error.is_final() => return Err(error),
                Err(error) => {
                    error.print(self.command);
                    refused = true;
                }
            }
        }
        for file in grown {
            self.put_large(directory, path, file).await?;
        }
        if refused { Err(Failure::Reported) } else { Ok(()) }
    }
}

impl Visitor for PutTree {
    type Node = Node;

    async fn enter(&self, node: &Node) -> Outcome<Entered<Node>> {
        let directory = match (&node.place, node.path.name()) {
            (Place::Existing(directory), _) => directory.clone(),
            (Place::In(parent), Some(name)) => {
                let mode = node.local_metadata.permissions().mode();
                make_or_find(parent, name, mode, None).await.map_err(|error| failure(&node.path, error))?
            }
            (Place::In(parent), None) => parent.clone(),
        };
        let local = node.local.clone();
        let found = tokio::task::spawn_blocking(move || read_directory(&local)).await;
        let found = found.map_err(|error| Failure::refused(node.local.display(), error))?;
        let (found, unreadable) = found.map_err(|error| Failure::io(node.local.display(), &error))?;
        for (path, error) in &unreadable {
            Failure::io(path.display(), error).print(self.command);
        }
        let (below, files): (Vec<_>, Vec<_>) = found.into_iter().partition(|file| file.metadata.is_dir());
        let children = below
            .into_iter()
            .map(|found| Node {
                path: node.path.join(&found.name),
                local: found.path,
                local_metadata: found.metadata,
                place: Place::In(directory.clone()),
            })
            .collect();
        let broken = self.put_files(&directory, &node.path, files).await? | !unreadable.is_empty();
        Ok(Entered { children, broken })
    }

    /// Only now: what was put into it has changed its modification time.
    async fn leave(&self, node: &Node, _: bool) -> Outcome {
        if matches!(node.place, Place::Existing(_)) {
            return Ok(());
        }
        let Ok(modified) = node.local_metadata.modified() else { return Ok(()) };
        let changes = AttributeChanges { mtime: Some(time_of(modified)), ..AttributeChanges::default() };
        let set = self.client.set_attributes(node.path.as_bytes(), changes).await;
        set.map_err(|error| failure(&node.path, error))
    }
}

/// What a directory has in it, by name, and what could not be looked at.
type Contents = (Vec<LocalFile>, Vec<(PathBuf, std::io::Error)>);

fn read_directory(local: &Path) -> std::io::Result<Contents> {
    let (mut found, mut unreadable) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(local)? {
        let entry = entry?;
        match entry.metadata() {
            Ok(metadata) => {
                let name = Bytes::copy_from_slice(entry.file_name().as_bytes());
                found.push(LocalFile { path: entry.path(), name, metadata });
            }
            Err(error) => unreadable.push((entry.path(), error)),
        }
    }
    found.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok((found, unreadable))
}

/// `None` when it is longer by now than what is small.
fn read_small(path: &Path, limit: u64) -> std::io::Result<Option<Bytes>> {
    let mut contents = Vec::new();
    let read = File::open(path)?.take(limit + 1).read_to_end(&mut contents)?;
    Ok((read as u64 <= limit).then(|| contents.into()))
}

/// The longest file that goes to this directory together with others: one span.
fn small_bytes(directory: &Directory) -> u64 {
    let rules = directory.policies().span.as_ref().map_or(&[][..], |span| &span.rules);
    let span = rules.last().map_or(0, |rule| u64::from(rule.max_size));
    span.min(SMALL_FILE_BYTES_MAX)
}

fn batches(files: Vec<LocalFile>) -> Vec<Vec<LocalFile>> {
    let mut batches: Vec<Vec<LocalFile>> = Vec::new();
    let mut bytes = u64::MAX;
    for file in files {
        let length = file.metadata.len();
        match batches.last_mut() {
            Some(batch) if batch.len() < BATCH_FILES && bytes.saturating_add(length) <= BATCH_BYTES => {
                bytes += length;
                batch.push(file);
            }
            _ => {
                bytes = length;
                batches.push(vec![file]);
            }
        }
    }
    batches
}

fn options_of(file: &LocalFile, replace: Replace) -> eggs_client::CreateOptions {
    let mtime = file.metadata.modified().ok().map(time_of);
    let attributes = attributes(file.metadata.permissions().mode(), mtime);
    let size_hint = file.metadata.is_file().then_some(file.metadata.len());
    eggs_client::CreateOptions { attributes: Some(attributes), replace, size_hint }
}

/// Devices, pipes and sockets have no contents to copy; a pipe would be waited for.
fn check_regular(file: &LocalFile) -> Outcome {
    let kind = file.metadata.file_type();
    let what = if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_block_device() || kind.is_char_device() {
        "a device"
    } else if let Err(error) = File::open(&file.path) {
        return Err(Failure::refused(file.path.display(), posix_words(&error)));
    } else {
        return Ok(());
    };
    Err(Failure::refused(file.path.display(), format!("is {what}, not a regular file")))
}
