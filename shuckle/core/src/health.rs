//! What is known of the cluster only while it is heard of: who is alive, space, troubles.
//!
//! Volatile: a registry that starts, or begins to lead, has heard of nobody. For its `patience` after it
//! was made it takes its rows' word for who is where, so that a restart of the registry alone disturbs
//! nobody. A process that knows that it holds the whole cluster (its directories are locked) has none.
//!
//! [`crate::stores`] has the half that is about stores and who leads what, [`crate::map`] makes the
//! cluster map, [`crate::members`] checks what people ask of the members of groups.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use eggs_machine::{Table, TableError};
use eggs_proto::limits::{BLOCK_SERVICES_MAX, SHARDS, STALE_AFTER};
use eggs_proto::{BlockServiceId, GroupId, RegistryError, ServiceError, StoreId, Time, pb};
use pb::registry_command::Command;
use pb::registry_reply::Result as Reply;
use pb::registry_request::Op;

use crate::stores::{Lead, StoreHealth};
use crate::{machine, members, schema, validate};

/// A store not heard of for this long is replaced, unless told otherwise.
pub const REPLACE_AFTER: Duration = Duration::from_secs(300);
/// Bad blocks remembered of one block service; more are only counted.
pub const REPORTED_PER_SERVICE_MAX: usize = 1024;
/// And of all.
pub const REPORTED_MAX: usize = 65_536;
/// Capacity is logged anew when it has changed by more than one part in this many: file systems that
/// are shared report a little less every second.
const CAPACITY_PARTS: u64 = 16;

/// What to do about a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Answer this.
    Answer(Reply),
    /// Log this; the machine's reply is the answer.
    Log(pb::RegistryCommand),
}

/// A block that could not be read right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reported {
    pub file: u64,
    pub kind: pb::BadBlockKind,
    pub at: Time,
}

/// The volatile half of the registry.
#[derive(Debug)]
pub struct Health {
    pub(crate) started_at: Time,
    patience: Duration,
    pub(crate) replace_after: Duration,
    /// Shards from 0 on that are founded; all but in simulations.
    pub(crate) shards: u16,
    pub(crate) stores: BTreeMap<StoreId, StoreHealth>,
    /// Stores whose place at their address another has taken, and which.
    pub(crate) replaced: BTreeMap<StoreId, StoreId>,
    pub(crate) leads: BTreeMap<GroupId, Lead>,
    /// In flight, as the coordinator's leader says.
    pub(crate) transactions: u32,
    pub(crate) slow_transactions: Vec<pb::TransactionInfo>,
    pub(crate) services: BTreeMap<BlockServiceId, ServiceHealth>,
    pub(crate) reports: BTreeMap<BlockServiceId, Reports>,
    /// In all `reports`.
    remembered: usize,
}

#[derive(Debug, Clone)]
pub(crate) struct ServiceHealth {
    pub(crate) last_seen: Time,
    pub(crate) address: String,
    pub(crate) capacity_bytes: u64,
    pub(crate) available_bytes: u64,
    pub(crate) used_bytes: u64,
    pub(crate) blocks: u64,
    pub(crate) io_errors: u64,
    pub(crate) problem: String,
}

#[derive(Debug, Default)]
pub(crate) struct Reports {
    blocks: BTreeMap<u64, Reported>,
    /// Not remembered one by one.
    more: u64,
}

impl Reports {
    pub(crate) fn count(&self) -> u64 {
        (self.blocks.len() as u64).saturating_add(self.more)
    }
}

impl Health {
    /// `patience`: [`STALE_AFTER`], or zero (see the module).
    pub fn new(now: Time, patience: Duration) -> Health {
        Health {
            started_at: now,
            patience,
            replace_after: REPLACE_AFTER,
            shards: SHARDS,
            stores: BTreeMap::new(),
            replaced: BTreeMap::new(),
            leads: BTreeMap::new(),
            transactions: 0,
            slow_transactions: Vec::new(),
            services: BTreeMap::new(),
            reports: BTreeMap::new(),
            remembered: 0,
        }
    }

    /// With another time after which a silent store is replaced.
    #[must_use]
    pub fn with_replace_after(self, replace_after: Duration) -> Health {
        Health { replace_after, ..self }
    }

    /// Of a cluster that has only the first `shards` shards: small simulations.
    #[must_use]
    pub fn with_shards(self, shards: u16) -> Health {
        Health { shards, ..self }
    }

    /// What to do about a request. `authorized`: it carries the cluster secret.
    ///
    /// # Errors
    /// When the table fails.
    pub fn request<T: Table + ?Sized>(
        &mut self,
        view: &T,
        op: &Op,
        authorized: bool,
        now: Time,
    ) -> Result<Step, TableError> {
        let step = match op {
            Op::Hello(_) => match machine::hello(view)? {
                Some(hello) => Ok(Step::Answer(Reply::Hello(hello))),
                None => Err(RegistryError::Busy.with("the cluster is being founded")),
            },
            Op::Map(op) if op.with_keys && !authorized => Err(RegistryError::Unauthorized.bare()),
            Op::Map(op) => Ok(Step::Answer(Reply::Map(self.map(view, now, op.with_keys)?))),
            Op::ReportBlocks(op) => self.report_blocks(view, op, now)?,
            Op::SetFlags(op) => set_flags(view, op)?,
            _ if !authorized => Err(RegistryError::Unauthorized.bare()),
            Op::RegisterStore(op) => self.register_store(view, op, now)?,
            Op::RegisterBlockServices(op) => self.register_block_services(view, op, now)?,
            Op::SetReplicas(op) => self.set_replicas(view, op, now)?,
            Op::DrainHost(op) => members::drain_host(view, op)?,
        };
        Ok(step.unwrap_or_else(|error| Step::Answer(Reply::Error(error))))
    }

    pub(crate) fn fresh(last_seen: Time, now: Time) -> bool {
        !last_seen.is_unset() && now.since(last_seen) < STALE_AFTER
    }

    /// Not heard of since the start, and it is too early to make anything of that.
    pub(crate) fn patient(&self, now: Time) -> bool {
        now.since(self.started_at) < self.patience
    }

    // ---- block services ----

    fn register_block_services<T: Table + ?Sized>(
        &mut self,
        view: &T,
        op: &pb::RegisterBlockServices,
        now: Time,
    ) -> Result<Result<Step, pb::Error>, TableError> {
        if let Err(error) = validate::block_services(&op.address, &op.failure_domain, &op.block_services) {
            return Ok(Err(error));
        }
        let mut changed = Vec::new();
        let mut new = 0;
        for report in &op.block_services {
            let id = BlockServiceId(report.id);
            let known = schema::block_service(view, id)?;
            if let Some(Err(error)) = known.as_ref().map(|row| machine::same_disk(id, row, report)) {
                return Ok(Err(error));
            }
            new += usize::from(!self.services.contains_key(&id));
            let row = machine::row_of(&op.address, &op.failure_domain, report);
            if known.is_none_or(|known| worth_logging(&known, &row)) {
                changed.push(report.clone());
            }
        }
        if self.services.len() + new > BLOCK_SERVICES_MAX {
            return Ok(Err(RegistryError::Malformed.with("the cluster has no room for more block services")));
        }
        for report in &op.block_services {
            self.services.insert(BlockServiceId(report.id), ServiceHealth::of(&op.address, report, now));
        }
        if changed.is_empty() {
            return Ok(Ok(registered()));
        }
        let (address, failure_domain) = (op.address.clone(), op.failure_domain.clone());
        let put = pb::PutBlockServices { address, failure_domain, block_services: changed };
        Ok(Ok(log(Command::PutBlockServices(put))))
    }

    fn report_blocks<T: Table + ?Sized>(
        &mut self,
        view: &T,
        op: &pb::ReportBlocks,
        now: Time,
    ) -> Result<Result<Step, pb::Error>, TableError> {
        if let Err(error) = validate::reported_blocks(op) {
            return Ok(Err(error));
        }
        let mut known = BTreeSet::new();
        for block in &op.blocks {
            let id = BlockServiceId(block.block_service);
            if !known.contains(&id) {
                if schema::block_service(view, id)?.is_none() {
                    return Ok(Err(RegistryError::NotFound.with(id)));
                }
                known.insert(id);
            }
        }
        for block in &op.blocks {
            let reported = Reported { file: block.file, kind: block.kind(), at: now };
            let reports = self.reports.entry(BlockServiceId(block.block_service)).or_default();
            if reports.blocks.contains_key(&block.block) {
                reports.blocks.insert(block.block, reported);
            } else if reports.blocks.len() < REPORTED_PER_SERVICE_MAX && self.remembered < REPORTED_MAX {
                reports.blocks.insert(block.block, reported);
                self.remembered += 1;
            } else {
                reports.more = reports.more.saturating_add(1);
            }
        }
        Ok(Ok(registered()))
    }

    /// The bad blocks reported of a block service, by block id.
    pub fn reported(&self, service: BlockServiceId) -> impl Iterator<Item = (u64, Reported)> {
        let blocks = self.reports.get(&service).into_iter().flat_map(|reports| &reports.blocks);
        blocks.map(|(&block, &reported)| (block, reported))
    }
}

impl ServiceHealth {
    fn of(address: &str, report: &pb::BlockServiceReport, now: Time) -> ServiceHealth {
        ServiceHealth {
            last_seen: now,
            address: address.to_owned(),
            capacity_bytes: report.capacity_bytes,
            available_bytes: report.available_bytes,
            used_bytes: report.used_bytes,
            blocks: report.blocks,
            io_errors: report.io_errors,
            problem: report.problem.clone(),
        }
    }
}

/// RG-7: a heartbeat that says nothing new is not logged.
fn worth_logging(known: &pb::BlockServiceRow, row: &pb::BlockServiceRow) -> bool {
    let moved = known.address != row.address
        || known.storage_class != row.storage_class
        || known.failure_domain != row.failure_domain
        || known.path != row.path;
    // A lost disk has no capacity to tell of.
    let capacity = row.capacity_bytes != 0
        && known.capacity_bytes.abs_diff(row.capacity_bytes) > known.capacity_bytes / CAPACITY_PARTS;
    moved || capacity
}

fn set_flags<T: Table + ?Sized>(view: &T, op: &pb::SetFlags) -> Result<Result<Step, pb::Error>, TableError> {
    if let Err(error) = validate::set_flags(op) {
        return Ok(Err(error));
    }
    let mut changes = false;
    for id in op.block_services.iter().copied().map(BlockServiceId) {
        let Some(row) = schema::block_service(view, id)? else {
            return Ok(Err(RegistryError::NotFound.with(id)));
        };
        changes |= (row.flags | op.set) & !op.clear != row.flags;
    }
    Ok(Ok(if changes { log(Command::SetFlags(op.clone())) } else { registered() }))
}

pub(crate) fn registered() -> Step {
    Step::Answer(Reply::Registered(pb::Registered {}))
}

pub(crate) fn log(command: Command) -> Step {
    Step::Log(pb::RegistryCommand { command: Some(command) })
}

#[cfg(test)]
#[path = "health_tests.rs"]
mod tests;
