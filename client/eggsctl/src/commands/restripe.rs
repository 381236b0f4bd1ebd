//! `restripe`: files are stored anew as the policies have it now.

use clap::{Args, Subcommand};
use eggs_client::Client;
use eggs_proto::pb;

use crate::cli::{JsonFlag, SecretArgs};
use crate::commands::repairs::JsonJob;
use crate::context::{Context, failure};
use crate::failure::{Failure, Outcome};
use crate::members::heard_map;
use crate::output::{size, table, table_text};
use crate::paths::{ClusterPath, escape};
use crate::progress::Line;

/// Store the files below a directory anew, as its policies have it now
///
/// A changed policy is for new files; this has the janitor rewrite the old ones, in the background. Only files that
/// would be stored otherwise are rewritten; readers never notice. Examples: eggsctl restripe /archive --wait;
/// eggsctl restripe ls; eggsctl restripe cancel 3
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Restripe {
    #[command(subcommand)]
    command: Option<RestripeCommand>,
    /// The directory
    #[arg(value_name = "PATH", value_parser = ClusterPath::parser(), required = true)]
    path: Option<ClusterPath>,
    /// Wait until it is done, however long it takes without --timeout
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    json: JsonFlag,
    #[command(flatten)]
    secret: SecretArgs,
}

#[derive(Debug, Subcommand)]
enum RestripeCommand {
    /// List the jobs: those under way, and the last that are done
    Ls(RestripeList),
    /// End a job; what it has rewritten stays so
    Cancel(RestripeCancel),
}

#[derive(Debug, Args)]
struct RestripeList {
    #[command(flatten)]
    json: JsonFlag,
}

#[derive(Debug, Args)]
struct RestripeCancel {
    /// The job's number, as `eggsctl restripe ls` prints it
    #[arg(value_name = "ID", value_parser = clap::value_parser!(u64).range(1..))]
    id: u64,
    #[command(flatten)]
    json: JsonFlag,
    #[command(flatten)]
    secret: SecretArgs,
}

impl Restripe {
    pub async fn run(self, context: &Context) -> Outcome {
        match (&self.command, &self.path) {
            (Some(RestripeCommand::Ls(list)), _) => {
                let map = heard_map(context.client().await?).await?;
                print(context, &map.jobs, list.json.json)
            }
            (Some(RestripeCommand::Cancel(cancel)), _) => {
                let client = context.admin(&cancel.secret).await?;
                let job = client.cancel_job(cancel.id).await.map_err(|error| failure("", error))?;
                print(context, &[job], cancel.json.json)
            }
            (None, Some(path)) => self.begin(context, path).await,
            (None, None) => Err(Failure::Usage("which directory?".to_owned())),
        }
    }

    async fn begin(&self, context: &Context, path: &ClusterPath) -> Outcome {
        let client = context.admin(&self.secret).await?;
        let on_path = |error| failure(path, error);
        // Links are followed, as `policy set` does.
        let found = client.directory(path.as_bytes()).await.map_err(on_path)?;
        let words = escape(path.as_bytes());
        let mut job = client.put_restripe(found.inode(), &words).await.map_err(on_path)?;
        if self.wait {
            job = wait(context, client, job).await?;
        }
        print(context, &[job], self.json.json)
    }
}

async fn wait(context: &Context, client: &Client, job: pb::Job) -> Outcome<pb::Job> {
    let (mut line, timeout) = (Line::start(), context.global.wait_timeout());
    let mut last = job.clone();
    let done = client.wait_for(timeout, |map| {
        // Cancelled, or forgotten among many that are done.
        let Some(now) = map.jobs.iter().find(|now| now.id == job.id) else { return Some(last.clone()) };
        last = now.clone();
        let progress = now.progress.clone().unwrap_or_default();
        line.say(&format!("{}: {} files, {}", now.path, progress.files_done, size(progress.bytes_done)));
        progress.done.then(|| now.clone())
    });
    match done.await.map_err(|error| failure(&job.path, error))? {
        Some(job) => Ok(job),
        None => {
            let reason =
                format!("not done after {:.0} s; the cluster goes on with it", timeout.as_secs_f64());
            Err(Failure::refused(&job.path, reason))
        }
    }
}

fn print(context: &Context, jobs: &[pb::Job], json: bool) -> Outcome {
    let mut out = context.out();
    if json {
        out.json(&jobs.iter().map(JsonJob::of).collect::<Vec<_>>())?;
    } else if jobs.is_empty() {
        out.line("no jobs")?;
    } else {
        let mut table = table(&["JOB", "STATE", "FILES", "FAILED", "BYTES", "PATH"], &[0, 2, 3, 4]);
        for job in jobs {
            let progress = job.progress.clone().unwrap_or_default();
            let state = match (progress.done, job.progress.is_some()) {
                (true, _) => "done",
                (false, true) => "going",
                (false, false) => "waiting",
            };
            table.add_row([
                job.id.to_string(),
                state.to_owned(),
                progress.files_done.to_string(),
                progress.files_failed.to_string(),
                size(progress.bytes_done),
                job.path.clone(),
            ]);
        }
        out.line(table_text(&table))?;
    }
    out.finish()
}
