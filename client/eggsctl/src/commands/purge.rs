//! `purge`: takes what is dead away for good.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use clap::{Args, ValueEnum};
use eggs_client::{Client, Death, ListOptions, Refusal};
use eggs_proto::{InodeId, Time};
use serde::Serialize;

use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::{Failure, Outcome};
use crate::output::JsonPath;
use crate::paths::ClusterPath;
use crate::progress;
use crate::times;
use crate::tree::{self, Entered, Visitor};

/// Names purged at once.
const NAMES_AT_ONCE: usize = 256;

/// Take what was deleted away for good
///
/// PATH is a name that died: all its deaths go, with the files and directories that died there and everything dead in them.
/// Or it is a directory that is there: everything dead in it and below goes. What lives is never touched. The past does not
/// show purged names any more, and nothing brings them back; the blocks of purged files may be erased.
///
/// Without --yes nothing is done: it is counted what would go.
#[derive(Debug, Args)]
#[command(after_help = format!("Times are {}.", times::FORMS))]
pub struct Purge {
    /// Only what died longer ago than this: 30d, 12h
    #[arg(long, value_name = "AGE", value_parser = times::typed_duration, conflicts_with = "before")]
    older_than: Option<Duration>,
    /// Only what died before this time
    #[arg(long, value_name = "TIME", value_parser = times::typed)]
    before: Option<Time>,
    /// When a directory is there and others of its name died: which of the two
    #[arg(long, value_name = "WHAT")]
    only: Option<Only>,
    /// Do it
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    json: JsonFlag,
    /// A dead name, or a directory
    #[arg(value_name = "PATH", value_parser = ClusterPath::parser())]
    path: ClusterPath,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Only {
    /// What died under the name
    Name,
    /// What died in the directory that is there now, and below it
    Below,
}

#[derive(Debug, Serialize)]
struct JsonReport {
    #[serde(flatten)]
    path: JsonPath,
    /// False: only counted.
    done: bool,
    /// Names whose inode lives elsewhere, or is purged under another name.
    names: u64,
    files: u64,
    directories: u64,
    refused: u64,
}

impl Purge {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let counts = Arc::new(Counts::default());
        let visitor = PurgeTree {
            command: context.command,
            client: client.clone(),
            until: self.until(),
            counts: counts.clone(),
            yes: self.yes,
        };
        let Entered { children: nodes, broken } = self.roots(client, &visitor).await?;
        let outcome =
            progress::beside(|| so_far(&counts), tree::visit(Arc::new(visitor), nodes, context.command))
                .await;
        let count = |counter: &AtomicU64| counter.load(Relaxed);
        let (names, files) = (count(&counts.names), count(&counts.files));
        let directories = count(&counts.directories);
        let mut out = context.out();
        if self.json.json {
            out.json(&JsonReport {
                path: JsonPath::of(self.path.as_bytes()),
                done: self.yes,
                names,
                files,
                directories,
                refused: count(&counts.refused),
            })?;
        } else if self.yes {
            out.line(format_args!(
                "{}: {files} files, {directories} directories and {names} other dead names are gone",
                self.path
            ))?;
        }
        out.finish()?;
        outcome?;
        if broken {
            return Err(Failure::Reported);
        }
        if self.yes {
            return Ok(());
        }
        let reason = format!(
            "{files} files, {directories} directories and {names} other dead names would be gone for good; --yes does it"
        );
        Err(Failure::refused(&self.path, reason))
    }

    /// Unset: all that is dead, whenever it died.
    fn until(&self) -> Time {
        match (self.older_than, self.before) {
            (Some(age), _) => {
                let age = u64::try_from(age.as_nanos()).unwrap_or(u64::MAX);
                // Unset would be everything.
                Time(times::now().0.saturating_sub(age).max(1))
            }
            (None, before) => before.unwrap_or(Time::ZERO),
        }
    }

    /// Purges the deaths of the name that are no directories'; the others, and the directory that has it, are to be visited.
    async fn roots(&self, client: &Client, visitor: &PurgeTree) -> Outcome<Entered<Node>> {
        let path = &self.path;
        let living = match client.resolve(path.as_bytes()).await {
            Ok(inode) => Some(inode),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(failure(path, error)),
        };
        let mut deaths = Vec::new();
        if !path.is_root() {
            deaths =
                client.deaths(path.as_bytes(), Time::ZERO).await.map_err(|error| failure(path, error))?;
            deaths.retain(|death| visitor.is_due(death));
        }
        let mut directory = living.filter(|inode| inode.is_directory());
        match self.only {
            Some(Only::Name) => directory = None,
            Some(Only::Below) => deaths.clear(),
            None if directory.is_some() && !deaths.is_empty() => {
                let reason = "a directory is there, and others of its name died: say which of them with --only name \
                              (those that died) or --only below (what died in the one that is there)";
                return Err(Failure::refused(path, reason));
            }
            None => {}
        }
        if deaths.is_empty() && directory.is_none() {
            let reason = if self.until().is_unset() {
                "nothing of that name is dead"
            } else {
                "nothing of that name died before then"
            };
            return Err(Failure::refused(path, reason));
        }
        let there = directory.map(|inode| Node { inode, death: None, lives: true, path: path.clone() });
        let mut roots = Entered { children: there.into_iter().collect(), broken: false };
        if let Some(parent) = deaths.first().map(|death| death.directory) {
            visitor.purge(parent, &path.parent(), deaths, &mut roots).await?;
        }
        Ok(roots)
    }
}

#[derive(Debug, Default)]
struct Counts {
    names: AtomicU64,
    files: AtomicU64,
    directories: AtomicU64,
    refused: AtomicU64,
}

impl Counts {
    fn count(&self, death: &Death) {
        let counter = match (death.owned, death.target.is_directory()) {
            (false, _) => &self.names,
            (true, false) => &self.files,
            (true, true) => &self.directories,
        };
        counter.fetch_add(1, Relaxed);
    }
}

/// How far it is.
fn so_far(counts: &Counts) -> String {
    let count = |counter: &AtomicU64| counter.load(Relaxed);
    let (names, files, directories) =
        (count(&counts.names), count(&counts.files), count(&counts.directories));
    format!("{files} files, {directories} directories and {names} other dead names so far")
}

struct PurgeTree {
    command: &'static str,
    client: Client,
    /// What died before; unset: all.
    until: Time,
    counts: Arc<Counts>,
    yes: bool,
}

/// A directory in which what is dead goes.
struct Node {
    inode: InodeId,
    /// Of a removed one that goes itself.
    death: Option<Death>,
    lives: bool,
    path: ClusterPath,
}

impl Visitor for PurgeTree {
    type Node = Node;

    async fn enter(&self, node: &Node) -> Outcome<Entered<Node>> {
        let mut entered = Entered { children: Vec::new(), broken: false };
        if node.lives {
            self.living(node, &mut entered).await?;
        }
        let mut listing =
            self.client.list_inode(node.inode, ListOptions { dead: true, ..ListOptions::default() });
        while let Some(page) = listing.next_page().await.map_err(|error| failure(&node.path, error))? {
            let deaths = page.iter().filter_map(|entry| Death::of(node.inode, entry)).collect();
            self.purge(node.inode, &node.path, deaths, &mut entered).await?;
        }
        Ok(entered)
    }

    /// What was in it is gone: a removed directory goes itself.
    async fn leave(&self, node: &Node, broken: bool) -> Outcome {
        let Some(death) = node.death.as_ref().filter(|_| !broken) else { return Ok(()) };
        let purged = if self.yes { self.client.purge(death).await } else { Ok(()) };
        match purged {
            Ok(()) => self.counts.count(death),
            // Somebody else was faster.
            Err(error) if is_over(&error) => {}
            Err(error) => {
                self.counts.refused.fetch_add(1, Relaxed);
                return Err(failure(&node.path, error));
            }
        }
        Ok(())
    }
}

/// It is purged already, or lives again.
fn is_over(error: &eggs_client::ClientError) -> bool {
    matches!(error.refusal(), Some(Refusal::NotFound | Refusal::NotOwned))
}

impl PurgeTree {
    fn is_due(&self, death: &Death) -> bool {
        self.until.is_unset() || death.died_at < self.until
    }

    async fn living(&self, node: &Node, entered: &mut Entered<Node>) -> Outcome {
        let mut listing = self.client.list_inode(node.inode, ListOptions::default());
        while let Some(page) = listing.next_page().await.map_err(|error| failure(&node.path, error))? {
            let directories = page.into_iter().filter(|entry| entry.target.is_directory());
            entered.children.extend(directories.map(|entry| Node {
                inode: entry.target,
                death: None,
                lives: true,
                path: node.path.join(&entry.name),
            }));
        }
        Ok(())
    }

    /// Purges what is no directory; directories that died are entered first, also those that stay for what died in them.
    async fn purge(
        &self,
        directory: InodeId,
        path: &ClusterPath,
        deaths: Vec<Death>,
        entered: &mut Entered<Node>,
    ) -> Outcome {
        let (below, others): (Vec<_>, Vec<_>) =
            deaths.into_iter().partition(|death| death.owned && death.target.is_directory());
        for death in below {
            let path = path.join(&death.name);
            let inode = death.target;
            let death = Some(death).filter(|death| self.is_due(death));
            entered.children.push(Node { inode, death, lives: false, path });
        }
        let due: Vec<Death> = others.into_iter().filter(|death| self.is_due(death)).collect();
        for deaths in due.chunks(NAMES_AT_ONCE) {
            let purged = match self.yes {
                true => self.client.purge_many(directory, deaths).await,
                false => deaths.iter().map(|_| Ok(())).collect(),
            };
            for (death, purged) in deaths.iter().zip(purged) {
                match purged {
                    Ok(()) => self.counts.count(death),
                    Err(error) if is_over(&error) => {}
                    Err(error) => self.note(entered, failure(path.join(&death.name), error))?,
                }
            }
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
