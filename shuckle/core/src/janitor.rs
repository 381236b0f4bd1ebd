//! The janitor, as the registry knows it: which one works, what it does, which jobs it has, which blocks it is to look at.
//!
//! What it does is only heard (RG-18); the jobs people gave it are kept (RG-19).

use std::collections::BTreeSet;

use eggs_machine::{Table, TableError};
use eggs_proto::{BlockServiceId, RegistryError, ServiceError, Time, pb};
use pb::registry_command::Command;
use pb::registry_reply::Result as Reply;

use crate::health::{Health, REPORTED_PER_SERVICE_MAX, Reported, Step, log, registered};
use crate::{schema, validate};

/// Reported blocks in one answer, of whole block services: all of them travel in some answers.
pub const BAD_BLOCKS_PER_REPLY: usize = 4096;
const _: () = assert!(REPORTED_PER_SERVICE_MAX <= BAD_BLOCKS_PER_REPLY);

/// What the janitor that works said last.
#[derive(Debug, Clone)]
pub(crate) struct JanitorHealth {
    boot: u64,
    host: String,
    address: String,
    last_seen: Time,
    tasks: Vec<pb::JanitorTask>,
}

impl Health {
    /// RG-18: the first one works until it is not heard of any more; the others see in the map that it is another.
    pub(crate) fn register_janitor<T: Table + ?Sized>(
        &mut self,
        view: &T,
        op: &pb::RegisterJanitor,
        now: Time,
    ) -> Result<Result<Step, pb::Error>, TableError> {
        if let Err(error) = validate::register_janitor(op) {
            return Ok(Err(error));
        }
        let other = self.janitor.as_ref().filter(|known| known.boot != op.boot);
        // Same place: the process that had the port is gone. Every host has an address of its own that is 127.0.0.1.
        let same_place = |other: &JanitorHealth| other.address == op.address && other.host == op.host;
        if other.is_some_and(|other| Health::fresh(other.last_seen, now) && !same_place(other)) {
            return Ok(Ok(registered()));
        }
        self.janitor = Some(JanitorHealth {
            boot: op.boot,
            host: op.host.clone(),
            address: op.address.clone(),
            last_seen: now,
            tasks: op.tasks.clone(),
        });
        let mut jobs = Vec::new();
        for progress in &op.jobs {
            // One that was cancelled meanwhile is not there any more; RG-7.
            let known = schema::job(view, progress.id)?;
            if known.is_some_and(|job| job.progress.as_ref() != Some(progress)) {
                jobs.push(progress.clone());
            }
        }
        if jobs.is_empty() {
            return Ok(Ok(registered()));
        }
        Ok(Ok(log(Command::PutJobProgress(pb::PutJobProgress { jobs }))))
    }

    pub(crate) fn janitor_info(&self, now: Time) -> Option<pb::JanitorInfo> {
        let known = self.janitor.as_ref()?;
        Some(pb::JanitorInfo {
            boot: known.boot,
            host: known.host.clone(),
            address: known.address.clone(),
            alive: Health::fresh(known.last_seen, now),
            last_seen: known.last_seen.0,
            tasks: known.tasks.clone(),
        })
    }

    /// Forgets what was repaired and says what was reported, by block service and block.
    pub(crate) fn list_bad_blocks(&mut self, op: &pb::ListBadBlocks) -> Result<Step, pb::Error> {
        if op.forget.len() > validate::REPORT_BLOCKS_MAX {
            return Err(RegistryError::Malformed.with("too many blocks to forget at once"));
        }
        for block in &op.forget {
            self.forget_report(BlockServiceId(block.block_service), block.block);
        }
        // In turns: those of disks that nobody can look at now stay, and are not to hide the others.
        let from = std::mem::take(&mut self.reports_from);
        let mut blocks = Vec::new();
        for (&service, reports) in self.reports.range(from..).chain(self.reports.range(..from)) {
            if blocks.len() + reports.blocks().len() > BAD_BLOCKS_PER_REPLY {
                self.reports_from = service;
                break;
            }
            blocks.extend(reports.blocks().map(|(block, reported)| bad_block(service, block, &reported)));
        }
        Ok(Step::Answer(Reply::ListBadBlocks(pb::ListBadBlocksReply { blocks })))
    }
}

fn bad_block(service: BlockServiceId, block: u64, reported: &Reported) -> pb::BadBlock {
    pb::BadBlock { block_service: service.0, block, file: reported.file, kind: reported.kind.into() }
}

/// A job that is asked for; one that is there already for that directory is the answer to who asks again.
pub(crate) fn put_job<T: Table + ?Sized>(
    view: &T,
    op: &pb::PutJob,
) -> Result<Result<Step, pb::Error>, TableError> {
    if let Err(error) = validate::put_job(op) {
        return Ok(Err(error));
    }
    if op.id == 0
        && let Some(job) = schema::jobs(view)?.into_iter().find(|job| is_same(job, op))
    {
        return Ok(Ok(Step::Answer(Reply::Job(job))));
    }
    Ok(Ok(log(Command::PutJob(op.clone()))))
}

/// It is under way, and about the same.
pub(crate) fn is_same(job: &pb::Job, op: &pb::PutJob) -> bool {
    !is_done(job) && job.kind == op.kind && job.directory == op.directory
}

pub(crate) fn is_done(job: &pb::Job) -> bool {
    job.progress.as_ref().is_some_and(|progress| progress.done)
}

/// Jobs that are over and are only there to be seen: all but the last few of them.
pub(crate) fn to_forget(jobs: &[pb::Job]) -> BTreeSet<u64> {
    let done: Vec<u64> = jobs.iter().filter(|job| is_done(job)).map(|job| job.id).collect();
    let kept = done.len().saturating_sub(validate::JOBS_DONE_KEPT);
    done[..kept].iter().copied().collect()
}

#[cfg(test)]
#[path = "janitor_tests.rs"]
mod tests;
