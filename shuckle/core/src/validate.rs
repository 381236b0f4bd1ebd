//! What may come in: limits, lengths, ids (RG-6). The same rules for a heartbeat, before it is logged, and
//! for a command, when it is applied.

use std::collections::BTreeSet;

use eggs_proto::limits::{
    CLASS_INLINE, FAILURE_DOMAIN_BYTES_MAX, MEMBERS_MAX, PATH_BYTES_MAX, SHARDS, SLOW_TRANSACTIONS_MAX,
    TRANSACTION_STEP_BYTES_MAX,
};
use eggs_proto::{GroupId, InodeId, RegistryError, ServiceError, flags, pb};

use crate::schema::{kind_name, kind_of};

/// `host:port`.
pub const ADDRESS_BYTES_MAX: usize = 256;
/// Disks of one host.
pub const BLOCK_SERVICES_PER_HOST_MAX: usize = 1024;
/// What a host says of a disk that is lost.
pub const PROBLEM_BYTES_MAX: usize = 1024;
/// Blocks in one report.
pub const REPORT_BLOCKS_MAX: usize = 4096;
/// Block services whose flags one request sets, or that it forgets.
pub const SET_FLAGS_MAX: usize = 4096;
/// What a janitor does at a time; it leaves out what is least urgent.
pub const TASKS_MAX: usize = 256;
pub const TASK_STATE_BYTES_MAX: usize = 512;
/// Jobs that are under way.
pub const JOBS_MAX: usize = 256;
/// Jobs that are done and can still be looked at.
pub const JOBS_DONE_KEPT: usize = 16;
pub const CURSOR_BYTES_MAX: usize = 16 << 10;
/// Stores a cluster remembers.
pub const STORES_MAX: usize = 4096;
/// Shards, coordinator, registry.
pub const GROUPS_MAX: usize = SHARDS as usize + 2;
/// A host's name is the failure domain of what is on it.
pub const HOST_BYTES_MAX: usize = FAILURE_DOMAIN_BYTES_MAX;
const KEY_BYTES: usize = 32;

type Check = Result<(), pb::Error>;

fn malformed(what: impl std::fmt::Display) -> pb::Error {
    RegistryError::Malformed.with(what)
}

fn text(what: &str, text: &str, max: usize) -> Check {
    if text.len() > max {
        return Err(malformed(format_args!("{what} has {} bytes, more than {max}", text.len())));
    }
    if text.chars().any(char::is_control) {
        return Err(malformed(format_args!("{what} has control characters")));
    }
    Ok(())
}

pub fn address(address: &str) -> Check {
    text("address", address, ADDRESS_BYTES_MAX)?;
    let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port);
    match port.map(str::parse::<u16>) {
        Some(Ok(port)) if port != 0 => Ok(()),
        _ => Err(malformed(format_args!("address '{address}' is not host:port"))),
    }
}

pub fn failure_domain(domain: &str) -> Check {
    text("failure domain", domain, FAILURE_DOMAIN_BYTES_MAX)
}

/// `host_domain`: used where the disk names none.
pub fn block_service(report: &pb::BlockServiceReport, host_domain: &str) -> Check {
    if report.id == 0 {
        return Err(malformed("block service 0"));
    }
    if report.key.len() != KEY_BYTES || report.key.iter().all(|&byte| byte == 0) {
        return Err(malformed(format_args!("the key of block service {:#018x}", report.id)));
    }
    if report.storage_class <= u32::from(CLASS_INLINE) || report.storage_class > u32::from(u8::MAX) {
        return Err(malformed(format_args!("storage class {}", report.storage_class)));
    }
    failure_domain(&report.failure_domain)?;
    if report.failure_domain.is_empty() && host_domain.is_empty() {
        return Err(malformed(format_args!("block service {:#018x} has no failure domain", report.id)));
    }
    text("path", &report.path, PATH_BYTES_MAX)?;
    if report.problem.len() > PROBLEM_BYTES_MAX {
        return Err(malformed("problem is too long"));
    }
    if report.available_bytes > report.capacity_bytes {
        return Err(malformed("more space is available than there is"));
    }
    Ok(())
}

pub fn block_services(host: &str, host_domain: &str, reports: &[pb::BlockServiceReport]) -> Check {
    address(host)?;
    failure_domain(host_domain)?;
    if reports.len() > BLOCK_SERVICES_PER_HOST_MAX {
        return Err(malformed(format_args!("{} block services on one host", reports.len())));
    }
    let mut ids = BTreeSet::new();
    for report in reports {
        block_service(report, host_domain)?;
        if !ids.insert(report.id) {
            return Err(malformed(format_args!("block service {:#018x} is there twice", report.id)));
        }
    }
    Ok(())
}

pub fn host(host: &str) -> Check {
    text("host name", host, HOST_BYTES_MAX)?;
    if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c == ',') {
        return Err(malformed(format_args!("'{host}' is no host name")));
    }
    Ok(())
}

pub fn store(id: u64, kind: i32, host: &str, address: &str) -> Check {
    if id == 0 {
        return Err(malformed("store 0"));
    }
    if pb::StoreKind::try_from(kind).unwrap_or_default() == pb::StoreKind::StoreUnspecified {
        return Err(malformed(format_args!("kind of store {kind}")));
    }
    self::host(host)?;
    self::address(address)
}

/// A group that exists.
pub fn group(group: u32) -> Result<GroupId, pb::Error> {
    let id = u16::try_from(group).ok().map(GroupId).filter(|&id| kind_of(id).is_some());
    id.ok_or_else(|| malformed(format_args!("group {group}")))
}

/// Voters and learners: some, not too many, none twice.
pub fn members(voters: &[u64], learners: &[u64]) -> Check {
    if voters.is_empty() {
        return Err(malformed("a group without voters"));
    }
    if voters.len() + learners.len() > MEMBERS_MAX {
        return Err(malformed(format_args!("more than {MEMBERS_MAX} replicas of one group")));
    }
    let mut seen = BTreeSet::new();
    for &id in voters.iter().chain(learners) {
        if id == 0 || !seen.insert(id) {
            return Err(malformed(format_args!("store {id:#018x} is there twice, or is none")));
        }
    }
    Ok(())
}

pub fn register_store(op: &pb::RegisterStore) -> Check {
    store(op.id, op.kind, &op.host, &op.address)?;
    if op.problem.len() > PROBLEM_BYTES_MAX {
        return Err(malformed("problem is too long"));
    }
    if op.led.len() > GROUPS_MAX {
        return Err(malformed("more groups than there are"));
    }
    if op.slow_transactions.len() > SLOW_TRANSACTIONS_MAX {
        return Err(malformed("too many slow transactions"));
    }
    let long = |info: &pb::TransactionInfo| info.step.len().max(info.kind.len()) > TRANSACTION_STEP_BYTES_MAX;
    if op.slow_transactions.iter().any(long) {
        return Err(malformed("a slow transaction with too long a step"));
    }
    let mut seen = BTreeSet::new();
    for led in &op.led {
        let id = group(led.group)?;
        if kind_of(id) != Some(op.kind()) {
            return Err(malformed(format_args!("a {} store that leads {id}", kind_name(op.kind()))));
        }
        if !seen.insert(id) {
            return Err(malformed(format_args!("{id} is there twice")));
        }
        members(&led.voters, &led.learners)?;
        if led.progress.len() > MEMBERS_MAX {
            return Err(malformed(format_args!("more than {MEMBERS_MAX} replicas of one group")));
        }
    }
    Ok(())
}

pub fn set_flags(op: &pb::SetFlags) -> Check {
    if op.block_services.is_empty() || op.block_services.len() > SET_FLAGS_MAX {
        return Err(malformed("how many block services"));
    }
    if (op.set | op.clear) & !flags::SETTABLE != 0 {
        return Err(malformed("only NO_READ, NO_WRITE and DECOMMISSIONED can be set or cleared"));
    }
    if op.set & op.clear != 0 {
        return Err(malformed("a flag cannot be both set and cleared"));
    }
    Ok(())
}

pub fn forget_block_services(op: &pb::ForgetBlockServices) -> Check {
    if op.block_services.is_empty() || op.block_services.len() > SET_FLAGS_MAX {
        return Err(malformed("how many block services"));
    }
    Ok(())
}

pub fn register_janitor(op: &pb::RegisterJanitor) -> Check {
    if op.boot == 0 {
        return Err(malformed("a janitor without a number of its start"));
    }
    host(&op.host)?;
    address(&op.address)?;
    if op.tasks.len() > TASKS_MAX {
        return Err(malformed(format_args!("more than {TASKS_MAX} tasks")));
    }
    for task in &op.tasks {
        if pb::JanitorTaskKind::try_from(task.kind).unwrap_or_default()
            == pb::JanitorTaskKind::JanitorTaskUnspecified
        {
            return Err(malformed(format_args!("kind of task {}", task.kind)));
        }
        text("state of a task", &task.state, TASK_STATE_BYTES_MAX)?;
    }
    job_progress(&op.jobs)
}

pub fn job_progress(jobs: &[pb::JobProgress]) -> Check {
    if jobs.len() > JOBS_MAX {
        return Err(malformed(format_args!("more than {JOBS_MAX} jobs")));
    }
    let mut ids = BTreeSet::new();
    for job in jobs {
        if job.id == 0 || !ids.insert(job.id) || job.cursor.len() > CURSOR_BYTES_MAX {
            return Err(malformed(format_args!("progress of job {}", job.id)));
        }
    }
    Ok(())
}

pub fn put_job(op: &pb::PutJob) -> Check {
    if op.id != 0 {
        return if op.cancel { Ok(()) } else { Err(malformed("a job has its id from the registry")) };
    }
    let kind = pb::JanitorTaskKind::try_from(op.kind).unwrap_or_default();
    if op.cancel || kind != pb::JanitorTaskKind::JanitorTaskRestripe {
        return Err(malformed("there are jobs to restripe, and no others"));
    }
    if !InodeId(op.directory).is_directory() {
        return Err(malformed(format_args!("{} is no directory", InodeId(op.directory))));
    }
    // Paths are any bytes; this is for people, made text by who asks.
    text("path", &op.path, PATH_BYTES_MAX)
}

pub fn reported_blocks(op: &pb::ReportBlocks) -> Check {
    if op.blocks.len() > REPORT_BLOCKS_MAX {
        return Err(malformed("too many blocks in one report"));
    }
    for block in &op.blocks {
        let kind = pb::BadBlockKind::try_from(block.kind).unwrap_or_default();
        if block.block_service == 0 || block.block == 0 || kind == pb::BadBlockKind::BadBlockUnspecified {
            return Err(malformed("a report of no block"));
        }
    }
    Ok(())
}
