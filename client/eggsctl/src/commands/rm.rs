//! `rm`: removes files and links, and with `-r` whole directories.

use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use eggs_client::{Client, Directory, ListOptions, Refusal};

use crate::context::{Context, failure};
use crate::failure::{Failure, Operands, Outcome};
use crate::paths::ClusterPath;
use crate::tree::{self, Entered, Visitor};

/// Names in one request.
const NAMES_AT_ONCE: usize = 256;

/// Remove files, links and (with -r) directories
///
/// Nothing is gone at once: what was removed stays in the dead map (`eggsctl ls --dead`) for as long as
/// the snapshot policy of its directory says; `eggsctl undelete` brings it back.
#[derive(Debug, Args)]
pub struct Rm {
    /// Remove directories and everything in them
    #[arg(short, long, visible_short_alias = 'R')]
    recursive: bool,
    /// What does not exist is fine
    #[arg(short, long)]
    force: bool,
    /// What to remove
    #[arg(required_unless_present = "force", value_name = "PATH", value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

impl Rm {
    pub async fn run(self, context: &Context) -> Outcome {
        if self.paths.is_empty() {
            return Ok(());
        }
        let client = context.client().await?;
        let mut operands = Operands::new(context.command);
        for path in &self.paths {
            operands.note(self.remove(client, path, context.command).await)?;
        }
        operands.finish()
    }

    async fn remove(&self, client: &Client, path: &ClusterPath, command: &'static str) -> Outcome {
        if path.is_root() {
            return Err(Failure::refused(path, "the root directory cannot be removed"));
        }
        let error = match client.unlink(path.as_bytes()).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        match error.refusal() {
            Some(Refusal::NotFound) if self.force => Ok(()),
            Some(Refusal::IsDirectory) if self.recursive => {
                let found = client.directory(path.as_bytes()).await.map_err(|error| failure(path, error))?;
                let above = path.parent();
                let parent =
                    client.directory(above.as_bytes()).await.map_err(|error| failure(&above, error))?;
                let node = Node { directory: found, parent, path: path.clone() };
                let visitor = RemoveTree { command, force: self.force };
                tree::visit(Arc::new(visitor), vec![node], command).await
            }
            Some(Refusal::IsDirectory) => {
                Err(Failure::refused(path, "is a directory; -r removes directories"))
            }
            _ => Err(failure(path, error)),
        }
    }
}

struct RemoveTree {
    command: &'static str,
    force: bool,
}

struct Node {
    directory: Directory,
    parent: Directory,
    path: ClusterPath,
}

impl Visitor for RemoveTree {
    type Node = Node;

    /// Removes the files, finds the directories.
    async fn enter(&self, node: &Node) -> Outcome<Entered<Node>> {
        let mut entered = Entered { children: Vec::new(), broken: false };
        let mut listing = node.directory.list(ListOptions::default());
        while let Some(page) = listing.next_page().await.map_err(|error| failure(&node.path, error))? {
            let (below, files): (Vec<_>, Vec<_>) =
                page.into_iter().partition(|entry| entry.target.is_directory());
            for entry in below {
                let path = node.path.join(&entry.name);
                match node.directory.directory(&entry.name).await {
                    Ok(directory) => {
                        entered.children.push(Node { directory, parent: node.directory.clone(), path });
                    }
                    Err(error) if error.is_not_found() => {}
                    Err(error) => self.note(&mut entered, failure(&path, error))?,
                }
            }
            for names in files.chunks(NAMES_AT_ONCE) {
                let names: Vec<Bytes> = names.iter().map(|entry| entry.name.clone()).collect();
                let removed = node.directory.unlink_many(names.clone()).await;
                for (name, removed) in names.iter().zip(removed) {
                    match removed {
                        Ok(()) => {}
                        // Somebody else was faster.
                        Err(error) if error.is_not_found() => {}
                        Err(error) => self.note(&mut entered, failure(node.path.join(name), error))?,
                    }
                }
            }
        }
        Ok(entered)
    }

    async fn leave(&self, node: &Node, broken: bool) -> Outcome {
        let name = node.path.name().filter(|_| !broken);
        let Some(name) = name else { return Ok(()) };
        match node.parent.rmdir(name).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_not_found() && self.force => Ok(()),
            Err(error) => Err(failure(&node.path, error)),
        }
    }
}

impl RemoveTree {
    fn note(&self, entered: &mut Entered<Node>, failure: Failure) -> Outcome {
        if failure.is_final() {
            return Err(failure);
        }
        failure.print(self.command);
        entered.broken = true;
        Ok(())
    }
}
