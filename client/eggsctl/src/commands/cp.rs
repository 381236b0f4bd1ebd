//! `cp`: copies within the cluster.

use std::sync::Arc;

use clap::Args;
use eggs_client::{Client, Directory, Entry, ListOptions, Replace};

use super::mv::{inside, into_directory, split};
use crate::context::{Context, attributes, create_options, failure};
use crate::failure::{Failure, Operands, Outcome};
use crate::paths::ClusterPath;
use crate::progress::Progress;
use crate::transfer::{Budget, each};
use crate::tree::{self, Entered, Visitor};

/// Copy files, links and (with -r) directories within the cluster
///
/// Into DST when that is a directory, else to exactly DST. Permissions are kept; the modification time
/// is that of the copy.
#[derive(Debug, Args)]
pub struct Cp {
    /// Copy directories and everything in them
    #[arg(short, long, visible_short_alias = 'R')]
    recursive: bool,
    /// Refuse to replace a file
    #[arg(short = 'n', long)]
    no_clobber: bool,
    /// Copy to exactly DST, even when it is a directory: its contents and those of SRC are merged
    #[arg(short = 'T', long)]
    no_target_directory: bool,
    /// What to copy, and where to
    #[arg(required = true, num_args = 2.., value_names = ["SRC", "DST"], value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

struct CopyTree {
    client: Client,
    replace: Replace,
    budget: Budget,
    progress: Progress,
    command: &'static str,
}

struct Node {
    from: ClusterPath,
    to: ClusterPath,
    /// Where `to` is; its own name is made there.
    parent: Directory,
    mode: u32,
}

impl Cp {
    pub async fn run(self, context: &Context) -> Outcome {
        let (sources, destination) = split(&self.paths)?;
        let client = context.client().await?;
        let into = into_directory(client, sources.len(), destination, self.no_target_directory).await?;
        let (progress, _shown) = Progress::start();
        let copier = Arc::new(CopyTree {
            client: client.clone(),
            replace: if self.no_clobber { Replace::Refuse } else { Replace::File },
            budget: Budget::new(),
            progress,
            command: context.command,
        });
        let mut operands = Operands::new(context.command);
        for source in sources {
            let to = if into { inside(source, destination)? } else { destination.clone() };
            operands.note(self.copy(&copier, source, to).await)?;
        }
        operands.finish()
    }

    async fn copy(&self, copier: &Arc<CopyTree>, source: &ClusterPath, to: ClusterPath) -> Outcome {
        let client = &copier.client;
        let found = client.stat(source.as_bytes()).await.map_err(|error| failure(source, error))?;
        if !found.is_directory() {
            if source == &to {
                return Err(Failure::refused(source, "source and destination are the same file"));
            }
            let kind = (found.is_symlink() && self.recursive, found.mode, found.size);
            return copier.copy_file(source, &to, kind).await;
        }
        if !self.recursive {
            return Err(Failure::refused(source, "is a directory; -r copies directories"));
        }
        if to.is_within(source) {
            return Err(Failure::refused(&to, "cannot copy a directory into itself"));
        }
        let above = to.parent();
        let parent = client.directory(above.as_bytes()).await.map_err(|error| failure(&above, error))?;
        let node = Node { from: source.clone(), to, parent, mode: found.mode };
        tree::visit(copier.clone(), vec![node], copier.command).await
    }
}

impl CopyTree {
    async fn copy_file(&self, from: &ClusterPath, to: &ClusterPath, kind: (bool, u32, u64)) -> Outcome {
        let (as_link, mode, size) = kind;
        let options = create_options(mode, None, self.replace);
        if as_link {
            let client = &self.client;
            let target = client.read_link(from.as_bytes()).await.map_err(|error| failure(from, error))?;
            let made = client.symlink(to.as_bytes(), &target, &options).await;
            made.map_err(|error| failure(to, error))?;
        } else {
            let _room = self.budget.room(size).await?;
            self.progress.expect_bytes(size);
            let mut before = 0;
            let mut count = |so_far: u64| {
                self.progress.bytes(so_far.saturating_sub(before));
                before = so_far;
            };
            let copied = self.client.copy(from.as_bytes(), to.as_bytes(), &options, &mut count).await;
            copied.map_err(|error| match error.refusal() {
                Some(eggs_client::Refusal::Exists | eggs_client::Refusal::IsDirectory) => failure(to, error),
                _ => failure(from, error),
            })?;
        }
        self.progress.files(1);
        Ok(())
    }
}

impl Visitor for CopyTree {
    type Node = Node;

    async fn enter(&self, node: &Node) -> Outcome<Entered<Node>> {
        let directory = match node.to.name() {
            Some(name) => make_or_find(&node.parent, name, node.mode, None).await,
            None => Ok(node.parent.clone()),
        };
        let directory = directory.map_err(|error| failure(&node.to, error))?;
        let mut entered = Entered { children: Vec::new(), broken: false };
        let options = ListOptions { attributes: true, ..ListOptions::default() };
        let listing = self.client.list(node.from.as_bytes(), options).await;
        let mut listing = listing.map_err(|error| failure(&node.from, error))?;
        while let Some(page) = listing.next_page().await.map_err(|error| failure(&node.from, error))? {
            let (below, files): (Vec<Entry>, Vec<Entry>) =
                page.into_iter().partition(|entry| entry.target.is_directory());
            entered.children.extend(below.into_iter().map(|entry| Node {
                from: node.from.join(&entry.name),
                to: node.to.join(&entry.name),
                parent: directory.clone(),
                mode: entry.metadata.map_or(0o755, |found| found.mode),
            }));
            entered.broken |= each(files, self.command, |entry| async move {
                let (from, to) = (node.from.join(&entry.name), node.to.join(&entry.name));
                let (mode, size) = entry.metadata.map_or((0o644, 0), |found| (found.mode, found.size));
                self.copy_file(&from, &to, (entry.target.is_symlink(), mode, size)).await
            })
            .await?;
        }
        Ok(entered)
    }

    async fn leave(&self, _: &Node, _: bool) -> Outcome {
        Ok(())
    }
}

/// The directory `name` in `parent`, made when it is not there.
pub async fn make_or_find(
    parent: &Directory,
    name: &[u8],
    mode: u32,
    mtime: Option<eggs_proto::Time>,
) -> eggs_client::Result<Directory> {
    match parent.mkdir(name, Some(attributes(mode, mtime))).await {
        Err(error) if error.is_exists() => parent.directory(name).await,
        made => made,
    }
}
