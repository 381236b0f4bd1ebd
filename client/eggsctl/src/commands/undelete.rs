//! `undelete`: brings back what was deleted, one name or a whole tree.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use clap::Args;
use eggs_client::{Client, Death, LastDeaths, ListOptions, Refusal};
use eggs_proto::{InodeId, Time};
use serde::Serialize;

use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::{Failure, Outcome};
use crate::output::{JsonPath, json_time};
use crate::paths::ClusterPath;
use crate::progress;
use crate::times;
use crate::tree::{self, Entered, Visitor};

/// Names in one request.
const NAMES_AT_ONCE: usize = 256;

/// Bring back what was deleted
///
/// Without --at the newest deletion of the name is undone. What comes back is there from now on: the past still shows when it
/// was not. Nothing is replaced: a name that is taken is refused, and --to gives another.
///
/// A directory comes back empty, with its dead entries; with -r all that was removed with it comes back too: going back from
/// its own deletion, the last deletions of names in it and below that follow one another within a minute are taken for one
/// removal. With -r and --at it becomes as it was at that time, and so does a directory that is still there: what was in it then and
/// was deleted since comes back. What was moved elsewhere stays where it is.
///
/// `eggsctl ls --dead --deleted` lists what can be undeleted in a directory.
#[derive(Debug, Args)]
#[command(after_help = format!("Times are {}.", times::FORMS))]
pub struct Undelete {
    /// What was there at this time, under the directories of that time
    #[arg(long, value_name = "TIME", value_parser = times::typed)]
    at: Option<Time>,
    /// Under exactly this name
    #[arg(long, value_name = "NEWPATH", value_parser = ClusterPath::parser())]
    to: Option<ClusterPath>,
    /// What was in a directory too
    #[arg(short, long, visible_short_alias = 'R')]
    recursive: bool,
    #[command(flatten)]
    json: JsonFlag,
    /// What was deleted
    #[arg(value_name = "PATH", value_parser = ClusterPath::parser())]
    path: ClusterPath,
}

#[derive(Debug, Serialize)]
struct JsonReport {
    #[serde(flatten)]
    path: JsonPath,
    inode: String,
    directories: u64,
    files: u64,
    refused: u64,
    /// With -r: the instant whose tree came back, or when its removal began.
    #[serde(flatten)]
    what: Option<JsonWhat>,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum JsonWhat {
    AsOf { as_of_ns: u64, as_of: Option<String> },
    Since { removed_since_ns: u64, removed_since: Option<String> },
}

impl Undelete {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let counts = Arc::new(Counts::default());
        let (root, path) = match self.living_directory(client).await? {
            Some(inode) => (inode, self.path.clone()),
            None => self.one(client, &counts).await?,
        };
        let what = root.what.filter(|_| self.recursive && root.inode.is_directory());
        let outcome = match what {
            Some(what) => {
                let node = Node { inode: root.inode, path: path.clone() };
                let visitor = UndeleteTree {
                    command: context.command,
                    client: client.clone(),
                    what,
                    counts: counts.clone(),
                };
                progress::beside(
                    || so_far(&counts),
                    tree::visit(Arc::new(visitor), vec![node], context.command),
                )
                .await
            }
            None => Ok(()),
        };
        let mut out = context.out();
        let count = |counter: &AtomicU64| counter.load(Relaxed);
        if self.json.json {
            out.json(&JsonReport {
                path: JsonPath::of(path.as_bytes()),
                inode: root.inode.to_string(),
                directories: count(&counts.directories),
                files: count(&counts.files),
                refused: count(&counts.refused),
                what: what.map(What::json),
            })?;
        } else if let Some(what) = what {
            let (directories, files) = (count(&counts.directories), count(&counts.files));
            out.line(format_args!("{path}: {directories} directories and {files} files are back, {what}"))?;
        }
        out.finish()?;
        outcome
    }

    /// With -r and --at: the directory that is there now, when there is one.
    async fn living_directory(&self, client: &Client) -> Outcome<Option<Root>> {
        let (true, Some(at), None) = (self.recursive, self.at, &self.to) else { return Ok(None) };
        let now = client.resolve(self.path.as_bytes()).await;
        match now {
            // Only when it is the one that was there.
            Ok(inode) if inode.is_directory() => match client.resolve_at(self.path.as_bytes(), at).await {
                Ok(then) if then.inode == inode => Ok(Some(Root { inode, what: Some(What::AsOf(at)) })),
                Ok(_) => Ok(None),
                Err(error) => Err(failure(&self.path, error)),
            },
            Ok(_) => Ok(None),
            Err(error) if matches!(error.refusal(), Some(Refusal::NotFound | Refusal::NotDirectory)) => {
                Ok(None)
            }
            Err(error) => Err(failure(&self.path, error)),
        }
    }

    /// Brings back the name itself.
    async fn one(&self, client: &Client, counts: &Counts) -> Outcome<(Root, ClusterPath)> {
        let at = self.at.unwrap_or(Time::ZERO);
        let death = match client.death_of(self.path.as_bytes(), at).await {
            Ok(death) => death,
            Err(error) if error.is_not_found() && at.is_unset() => {
                return Err(self.not_found(client, error).await);
            }
            Err(error) => return Err(failure(&self.path, error)),
        };
        let is_directory = death.target.is_directory();
        // Before it is back: its own death is the end of the removal.
        let what = match self.at {
            Some(at) => Some(What::AsOf(at)),
            None if is_directory && self.recursive => {
                let began = client.removal_began(&death).await;
                Some(What::RemovedSince(began.map_err(|error| failure(&self.path, error))?))
            }
            None => None,
        };
        let path = self.to.clone().unwrap_or_else(|| self.path.clone());
        let name = path.name().ok_or_else(|| Failure::refused(&path, "file exists"))?;
        let directory = match &self.to {
            None => death.directory,
            Some(to) => {
                let above = to.parent();
                let found = client.directory(above.as_bytes()).await;
                found.map_err(|error| failure(&above, error))?.inode()
            }
        };
        client.undelete(&death, directory, name).await.map_err(|error| failure(&path, error))?;
        if is_directory { &counts.directories } else { &counts.files }.fetch_add(1, Relaxed);
        Ok((Root { inode: death.target, what }, path))
    }

    /// Why nothing of that path can be found now.
    async fn not_found(&self, client: &Client, error: eggs_client::ClientError) -> Failure {
        let above = self.path.parent();
        match client.resolve(above.as_bytes()).await {
            Err(gone) if gone.is_not_found() => Failure::refused(
                &above,
                "is deleted itself; undelete it first, or say when all was there (--at) and where it is to be (--to)",
            ),
            _ => failure(&self.path, error),
        }
    }
}

/// What came back, and what below it is to come back.
struct Root {
    inode: InodeId,
    what: Option<What>,
}

#[derive(Debug, Clone, Copy)]
enum What {
    /// What was there at an instant and was deleted since.
    AsOf(Time),
    /// What every name had last, if it was deleted at that instant or later.
    RemovedSince(Time),
}

impl What {
    /// Deaths before are of no interest.
    fn since(self) -> Time {
        match self {
            What::AsOf(at) => at.next(),
            What::RemovedSince(since) => since,
        }
    }

    fn json(self) -> JsonWhat {
        match self {
            What::AsOf(at) => JsonWhat::AsOf { as_of_ns: at.0, as_of: json_time(at) },
            What::RemovedSince(at) => {
                JsonWhat::Since { removed_since_ns: at.0, removed_since: json_time(at) }
            }
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            What::AsOf(at) => write!(f, "as of {}", times::rfc3339(*at)),
            What::RemovedSince(at) => write!(f, "removed since {}", times::rfc3339(*at)),
        }
    }
}

#[derive(Debug, Default)]
struct Counts {
    directories: AtomicU64,
    files: AtomicU64,
    refused: AtomicU64,
}

/// How far it is.
fn so_far(counts: &Counts) -> String {
    let (directories, files) = (counts.directories.load(Relaxed), counts.files.load(Relaxed));
    format!("{directories} directories and {files} files are back so far")
}

struct UndeleteTree {
    command: &'static str,
    client: Client,
    what: What,
    counts: Arc<Counts>,
}

struct Node {
    inode: InodeId,
    path: ClusterPath,
}

impl Visitor for UndeleteTree {
    type Node = Node;

    /// Brings back the files, then the directories, and goes on in these and in those that were not deleted.
    async fn enter(&self, node: &Node) -> Outcome<Entered<Node>> {
        let mut entered = Entered { children: Vec::new(), broken: false };
        if let What::AsOf(at) = self.what {
            self.living(node, at, &mut entered).await?;
        }
        let options = ListOptions { dead: true, since: self.what.since(), ..ListOptions::default() };
        let mut listing = self.client.list_inode(node.inode, options);
        let mut last = LastDeaths::new(node.inode);
        loop {
            let page = listing.next_page().await.map_err(|error| failure(&node.path, error))?;
            let ended = page.is_none();
            let page = page.unwrap_or_default();
            let mut deaths: Vec<Death> = match self.what {
                What::AsOf(at) => {
                    let deaths = page.iter().filter_map(|entry| Death::of(node.inode, entry));
                    deaths.filter(|death| death.was_there(at)).collect()
                }
                What::RemovedSince(_) => page.iter().filter_map(|entry| last.next(entry)).collect(),
            };
            deaths.extend(if ended { last.end() } else { None });
            deaths.retain(|death| death.owned);
            self.undelete(node, deaths, &mut entered).await?;
            if ended {
                break;
            }
        }
        Ok(entered)
    }

    async fn leave(&self, _node: &Node, _broken: bool) -> Outcome {
        Ok(())
    }
}

impl UndeleteTree {
    async fn undelete(&self, node: &Node, deaths: Vec<Death>, entered: &mut Entered<Node>) -> Outcome {
        let (directories, files): (Vec<_>, Vec<_>) =
            deaths.into_iter().partition(|death| death.target.is_directory());
        for deaths in files.chunks(NAMES_AT_ONCE) {
            let undeleted = self.client.undelete_many(node.inode, deaths).await;
            for (death, undeleted) in deaths.iter().zip(undeleted) {
                match undeleted {
                    Ok(()) => drop(self.counts.files.fetch_add(1, Relaxed)),
                    Err(error) => self.note(entered, failure(node.path.join(&death.name), error))?,
                }
            }
        }
        for death in directories {
            let path = node.path.join(&death.name);
            match self.client.undelete(&death, node.inode, &death.name).await {
                Ok(_) => {
                    self.counts.directories.fetch_add(1, Relaxed);
                    entered.children.push(Node { inode: death.target, path });
                }
                Err(error) => self.note(entered, failure(&path, error))?,
            }
        }
        Ok(())
    }

    /// The directories that were there then and are still.
    async fn living(&self, node: &Node, at: Time, entered: &mut Entered<Node>) -> Outcome {
        let mut listing = self.client.list_inode(node.inode, ListOptions::default());
        while let Some(page) = listing.next_page().await.map_err(|error| failure(&node.path, error))? {
            let old = |entry: &eggs_client::Entry| entry.target.is_directory() && entry.created_at <= at;
            let nodes = page
                .iter()
                .filter(|entry| old(entry))
                .map(|entry| Node { inode: entry.target, path: node.path.join(&entry.name) });
            entered.children.extend(nodes);
        }
        Ok(())
    }

    fn note(&self, entered: &mut Entered<Node>, failure: Failure) -> Outcome {
        if failure.is_final() {
            return Err(failure);
        }
        failure.print(self.command);
        self.counts.refused.fetch_add(1, Relaxed);
        entered.broken = true;
        Ok(())
    }
}
