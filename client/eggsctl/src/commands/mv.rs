//! `mv`: moves files, links and directories within the cluster.

use clap::Args;
use eggs_client::{Client, Refusal, Replace};

use crate::context::{Context, failure};
use crate::failure::{Failure, Operands, Outcome};
use crate::paths::ClusterPath;

/// Move or rename files, links and directories
///
/// Into DST when that is a directory, else to exactly DST. A file of that name is replaced; it stays
/// in the dead map. A directory is never replaced. With --exchange both names exist and lead to each other's file, link or
/// directory afterwards; there is no moment at which they do not.
#[derive(Debug, Args)]
pub struct Mv {
    /// Refuse to replace a file
    #[arg(short = 'n', long)]
    no_clobber: bool,
    /// Move to exactly DST, even when it is a directory
    #[arg(short = 'T', long)]
    no_target_directory: bool,
    /// Exchange SRC and exactly DST, of whatever kind they are, instead of moving
    #[arg(long, conflicts_with = "no_clobber")]
    exchange: bool,
    /// What to move, and where to
    #[arg(required = true, num_args = 2.., value_names = ["SRC", "DST"], value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

impl Mv {
    pub async fn run(self, context: &Context) -> Outcome {
        let (sources, destination) = split(&self.paths)?;
        let client = context.client().await?;
        if self.exchange {
            return exchange(client, sources, destination).await;
        }
        let into = into_directory(client, sources.len(), destination, self.no_target_directory).await?;
        let replace = if self.no_clobber { Replace::Refuse } else { Replace::File };
        let mut operands = Operands::new(context.command);
        for source in sources {
            operands.note(move_one(client, source, destination, into, replace).await)?;
        }
        operands.finish()
    }
}

async fn exchange(client: &Client, sources: &[ClusterPath], destination: &ClusterPath) -> Outcome {
    let [source] = sources else {
        return Err(Failure::Usage("--exchange takes two paths".to_owned()));
    };
    if source == destination {
        return Err(Failure::refused(source, "source and destination are the same file"));
    }
    for path in [source, destination] {
        if path.means_directory() {
            let found = client.stat(path.as_bytes()).await.map_err(|error| failure(path, error))?;
            if !found.is_directory() {
                return Err(Failure::refused(format!("{path}/"), "not a directory"));
            }
        }
    }
    let exchanged = client.exchange(source.as_bytes(), destination.as_bytes()).await;
    exchanged.map_err(|error| failure(source, error))
}

async fn move_one(
    client: &Client,
    source: &ClusterPath,
    destination: &ClusterPath,
    into: bool,
    replace: Replace,
) -> Outcome {
    let to = if into { inside(source, destination)? } else { destination.clone() };
    if source == &to {
        return Err(Failure::refused(source, "source and destination are the same file"));
    }
    if destination.means_directory() && !into {
        // `mv file new/` is a mistake, `mv directory new/` is not.
        let found = client.stat(source.as_bytes()).await.map_err(|error| failure(source, error))?;
        if !found.is_directory() {
            return Err(Failure::refused(format!("{destination}/"), "not a directory"));
        }
    }
    let moved = client.rename(source.as_bytes(), to.as_bytes(), replace).await;
    let Err(error) = moved else { return Ok(()) };
    Err(match error.refusal() {
        // Files are replaced: what cannot be is a directory, or would become one.
        Some(Refusal::Exists) if replace == Replace::File && is_directory_itself(client, source).await => {
            Failure::refused(&to, "not a directory")
        }
        // These speak of where it should go.
        Some(Refusal::Exists | Refusal::IsDirectory | Refusal::NotEmpty) => failure(&to, error),
        _ => failure(source, error),
    })
}

async fn is_directory_itself(client: &Client, path: &ClusterPath) -> bool {
    client.stat(path.as_bytes()).await.is_ok_and(|found| found.is_directory())
}

/// The last path is the destination.
pub fn split(paths: &[ClusterPath]) -> Outcome<(&[ClusterPath], &ClusterPath)> {
    match paths.split_last() {
        Some((destination, sources)) if !sources.is_empty() => Ok((sources, destination)),
        _ => Err(Failure::Usage("a source and a destination are needed".to_owned())),
    }
}

/// `source`'s name in the directory `destination`.
pub fn inside(source: &ClusterPath, destination: &ClusterPath) -> Outcome<ClusterPath> {
    match source.name() {
        Some(name) => Ok(destination.join(name)),
        None => Err(Failure::refused(source, "the root directory cannot be moved or copied into another")),
    }
}

/// Whether sources go *into* the destination, rather than become it.
pub async fn into_directory(
    client: &Client,
    sources: usize,
    destination: &ClusterPath,
    exactly: bool,
) -> Outcome<bool> {
    if exactly && sources > 1 {
        return Err(Failure::Usage("--no-target-directory takes one source".to_owned()));
    }
    let directory = !exactly && is_directory(client, destination).await?;
    if sources > 1 && !directory {
        return Err(Failure::refused(destination, "not a directory"));
    }
    Ok(directory)
}

/// Whether there is a directory (or a link to one) at the path.
pub async fn is_directory(client: &Client, path: &ClusterPath) -> Outcome<bool> {
    match client.directory(path.as_bytes()).await {
        Ok(_) => Ok(true),
        Err(error) => match error.refusal() {
            Some(Refusal::NotFound | Refusal::NotDirectory | Refusal::TooDeep) => Ok(false),
            _ => Err(failure(path, error)),
        },
    }
}
