//! Restriping: files below a directory are stored anew where the policies have changed since.
//!
//! The job's cursor is the way down to where it is: for each directory on the way its id and the name it has come to. It
//! is in the registry with every heartbeat; a janitor that starts goes on there.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use bytes::Bytes;
use eggs_client::{ClientError, Directory, ListOptions};
use eggs_proto::limits::SWAP_SPANS_MAX;
use eggs_proto::{InodeId, pb};
use pb::JanitorTaskKind::JanitorTaskRestripe as Restripe;
use prost::Message;

use crate::context::Context;

const LOOK: Duration = Duration::from_secs(1);
/// Entries of a directory in one page.
const PAGE: u32 = 256;
/// A tree deeper than this cannot be told in a cursor.
const DEPTH: usize = 64;
const CURSOR_BYTES_MAX: usize = 16 << 10;

/// A directory on the way, and the last name in it that is done or being done.
#[derive(Clone, PartialEq, Message)]
struct Step {
    #[prost(fixed64, tag = "1")]
    directory: u64,
    #[prost(bytes = "bytes", tag = "2")]
    after: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct Cursor {
    #[prost(message, repeated, tag = "1")]
    way: Vec<Step>,
}

pub(crate) async fn run(context: &Context) {
    loop {
        context.until_it_works().await;
        let jobs = open_jobs(context);
        context.board.retain(Restripe, |about| jobs.iter().any(|job| job.directory == about));
        forget_done(context, &jobs);
        if let Some(job) = jobs.first() {
            work(context, job).await;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What is not done, as far as the registry knows and we do.
fn open_jobs(context: &Context) -> Vec<pb::Job> {
    let ours: BTreeMap<u64, pb::JobProgress> =
        progress(context).iter().map(|job| (job.id, job.clone())).collect();
    let map = context.map.get();
    let jobs = map.jobs.iter().filter(|job| job.kind() == Restripe).map(|job| {
        let progress = ours.get(&job.id).cloned().or_else(|| job.progress.clone());
        pb::Job { progress, ..job.clone() }
    });
    jobs.filter(|job| !job.progress.as_ref().is_some_and(|progress| progress.done)).collect()
}

fn progress(context: &Context) -> std::sync::MutexGuard<'_, Vec<pb::JobProgress>> {
    context.jobs.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the registry knows to be done need not be told any more, nor what was cancelled.
fn forget_done(context: &Context, open: &[pb::Job]) {
    let map = context.map.get();
    let told = |id: u64| {
        map.jobs.iter().any(|job| job.id == id && job.progress.as_ref().is_some_and(|progress| progress.done))
    };
    progress(context).retain(|job| open.iter().any(|one| one.id == job.id) || (job.done && !told(job.id)));
}

fn tell(context: &Context, job: &pb::Job, now: &pb::JobProgress, state: &str) {
    let mut jobs = progress(context);
    jobs.retain(|other| other.id != job.id);
    jobs.push(now.clone());
    drop(jobs);
    context.board.update(Restripe, job.directory, context.now(), |task| {
        task.spans_done = now.files_done;
        task.bytes_done = now.bytes_done;
        state.clone_into(&mut task.state);
    });
}

/// Goes on with a job until it is done, cancelled, or cannot go on now.
async fn work(context: &Context, job: &pb::Job) {
    let mut progress = job.progress.clone().unwrap_or(pb::JobProgress { id: job.id, ..Default::default() });
    let cursor = Cursor::decode(progress.cursor.clone()).unwrap_or_default();
    let mut way = cursor.way;
    if way.is_empty() {
        way.push(Step { directory: job.directory, after: Bytes::new() });
    }
    while let Some(step) = way.last().cloned() {
        match context.map.get().jobs.iter().any(|open| open.id == job.id) && context.works() {
            true => {}
            false => return,
        }
        match page(context, &step, &mut progress, &mut way, job).await {
            Ok(()) => {}
            Err(error) if gone(&error) => drop(way.pop()),
            Err(error) => {
                tracing::debug!(%error, path = job.path, "restriping goes on later");
                tell(context, job, &progress, &error.to_string());
                return;
            }
        }
        progress.cursor = Cursor { way: way.clone() }.encode_to_vec().into();
        if progress.cursor.len() > CURSOR_BYTES_MAX {
            // Names of kilobytes in every step: begin the deepest again after a restart.
            progress.cursor = Bytes::new();
        }
        tell(context, job, &progress, &format!("below {}", job.path));
    }
    progress.done = true;
    progress.cursor = Bytes::new();
    tell(context, job, &progress, "done");
    tracing::info!(
        path = job.path,
        files = progress.files_done,
        failed = progress.files_failed,
        bytes = progress.bytes_done,
        "restriped"
    );
}

fn gone(error: &ClientError) -> bool {
    use eggs_client::Refusal;
    matches!(error.refusal(), Some(Refusal::NotFound | Refusal::NotDirectory))
}

/// The next page of the deepest directory: files are stored anew, the first directory is gone down into.
async fn page(
    context: &Context,
    step: &Step,
    progress: &mut pb::JobProgress,
    way: &mut Vec<Step>,
    job: &pb::Job,
) -> Result<(), ClientError> {
    let directory = context.client.directory_inode(InodeId(step.directory)).await?;
    let options = ListOptions { after: step.after.clone(), page: PAGE, ..ListOptions::default() };
    let Some(entries) = directory.list(options).next_page().await?.filter(|page| !page.is_empty()) else {
        way.pop();
        return Ok(());
    };
    for entry in entries {
        if let Some(here) = way.last_mut() {
            here.after = entry.name.clone();
        }
        if entry.target.is_directory() {
            if way.len() < DEPTH {
                way.push(Step { directory: entry.target.0, after: Bytes::new() });
            } else {
                progress.files_failed += 1;
            }
            return Ok(());
        }
        if entry.target.is_file() {
            match file(context, &directory, entry.target).await {
                Ok(0) => {}
                Ok(bytes) => {
                    progress.files_done += 1;
                    progress.bytes_done += bytes;
                }
                Err(error) if gone(&error) => {}
                Err(error) => {
                    tracing::warn!(file = %entry.target, %error, path = job.path, "file not restriped");
                    progress.files_failed += 1;
                }
            }
        }
    }
    Ok(())
}

/// Stores a file anew if it is to be; the bytes written, 0: it is as it is to be.
async fn file(context: &Context, directory: &Directory, file: InodeId) -> Result<u64, ClientError> {
    let spans = context.client.spans(file).await?;
    if !directory.would_store_otherwise(&spans) {
        return Ok(0);
    }
    if file.shard() != directory.inode().shard() {
        let words = format!("inode {file} was moved here from another shard: copy it instead");
        return Err(ClientError::Invalid(words));
    }
    let size = spans.iter().map(|span| u64::from(span.size)).sum();
    can_be_swapped(file, spans.len() as u64, directory.spans_to_store(size))?;
    drop(spans);
    let mut rewrite = context.client.rewrite(file, directory).await?;
    while let Some(bytes) = rewrite.read().await? {
        // Piece by piece: repair gets its turn between.
        context.repair.take(bytes.len() as u64).await;
        rewrite.write(&bytes).await?;
    }
    let written = rewrite.finish().await?;
    context.garbage.notify_one();
    metrics::counter!("eggs_janitor_restriped_bytes_total").increment(written);
    Ok(written)
}

/// The shard refuses to swap more spans at once: that is to be known before the file is written.
fn can_be_swapped(file: InodeId, has: u64, would_have: u64) -> Result<(), ClientError> {
    match has.max(would_have) {
        spans if spans > SWAP_SPANS_MAX as u64 => Err(ClientError::Invalid(format!(
            "inode {file} has {has} spans and would have {would_have}, of {SWAP_SPANS_MAX} that can be swapped at once: copy \
             it instead"
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_too_many_spans_is_refused_before_it_is_written() {
        let max = SWAP_SPANS_MAX as u64;
        assert!(can_be_swapped(InodeId(5), max, max).is_ok());
        assert!(can_be_swapped(InodeId(5), max + 1, 1).is_err(), "as it is");
        assert!(can_be_swapped(InodeId(5), 1, max + 1).is_err(), "as it would be");
    }

    #[test]
    fn golden_cursor() {
        let way = vec![Step { directory: 1, after: "a".into() }, Step { directory: 2, after: Bytes::new() }];
        let cursor = Cursor { way };
        let bytes = cursor.encode_to_vec();
        assert_eq!(bytes, b"\x0a\x0c\x09\x01\0\0\0\0\0\0\0\x12\x01a\x0a\x09\x09\x02\0\0\0\0\0\0\0");
        assert_eq!(Cursor::decode(&bytes[..]).unwrap(), cursor);
    }
}
