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

use crate::forgetting::is_forgotten;
use crate::janitor::JanitorHealth;
use crate::stores::{Lead, StoreHealth};
use crate::{janitor, machine, members, schema, validate};

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
    /// The next listing of them begins here.
    pub(crate) reports_from: BlockServiceId,
    /// In all `reports`.
    remembered: usize,
    pub(crate) janitor: Option<JanitorHealth>,
}

#[derive(Debug, Clone)]
pub(crate) struct ServiceHealth {
    pub(crate) last_seen: Time,
    pub(crate) address: String,
    /// 0: it does not say.
    boot: u64,
    /// The start before this one: its process must be gone.
    former_boot: Option<u64>,
    pub(crate) capacity_bytes: u64,
    pub(crate) available_bytes: u64,
    pub(crate) used_bytes: u64,
    pub(crate) blocks: u64,
    pub(crate) io_errors: u64,
    pub(crate) problem: String,
    pub(crate) read_only: bool,
    pub(crate) dead_bytes: u64,
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

    pub(crate) fn blocks(&self) -> impl ExactSizeIterator<Item = (u64, Reported)> {
        self.blocks.iter().map(|(&block, &reported)| (block, reported))
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
            reports_from: BlockServiceId(0),
            remembered: 0,
            janitor: None,
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
            // RG-17.
            _ if !authorized => Err(RegistryError::Unauthorized.bare()),
            Op::SetFlags(op) => set_flags(view, op)?,
            Op::RegisterStore(op) => self.register_store(view, op, now)?,
            Op::RegisterBlockServices(op) => self.register_block_services(view, op, now)?,
            Op::SetReplicas(op) => self.set_replicas(view, op, now)?,
            Op::DrainHost(op) => members::drain_host(view, op)?,
            Op::RegisterJanitor(op) => self.register_janitor(view, op, now)?,
            Op::ListBadBlocks(op) => self.list_bad_blocks(op),
            Op::PutJob(op) => janitor::put_job(view, op)?,
            Op::ForgetBlockServices(op) => self.forget_block_services(view, op, now)?,
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
        let mut heard = Vec::new();
        let mut new = 0;
        let mut conflict: Option<pb::Error> = None;
        for report in &op.block_services {
            let id = BlockServiceId(report.id);
            let known = schema::block_service(view, id)?;
            if is_forgotten(known.as_ref(), report) {
                continue;
            }
            if let Some(row) = &known
                && let Err(error) =
                    machine::same_disk(id, row, report).and_then(|()| self.one_disk(id, row, op, report, now))
            {
                conflict.get_or_insert(error).block_services.push(id.0);
                continue;
            }
            heard.push(report);
            new += usize::from(!self.services.contains_key(&id));
            let row = machine::row_of(&op.address, &op.failure_domain, report);
            if known.is_none_or(|known| worth_logging(&known, &row)) {
                changed.push(report.clone());
            }
        }
        if let Some(error) = conflict {
            return Ok(Err(error));
        }
        if self.services.len() + new > BLOCK_SERVICES_MAX {
            return Ok(Err(RegistryError::Malformed.with("the cluster has no room for more block services")));
        }
        for report in heard {
            let id = BlockServiceId(report.id);
            let health = ServiceHealth::of(op, report, self.services.get(&id), now);
            self.services.insert(id, health);
        }
        if changed.is_empty() {
            return Ok(Ok(registered()));
        }
        let (address, failure_domain) = (op.address.clone(), op.failure_domain.clone());
        let put = pb::PutBlockServices { address, failure_domain, block_services: changed };
        Ok(Ok(log(Command::PutBlockServices(put))))
    }

    /// RG-3: a disk that is well is served by one process, and a copy of it by none. One that its host says is lost
    /// may have moved to another.
    fn one_disk(
        &self,
        id: BlockServiceId,
        row: &pb::BlockServiceRow,
        op: &pb::RegisterBlockServices,
        report: &pb::BlockServiceReport,
        now: Time,
    ) -> Result<(), pb::Error> {
        if op.boot == 0 {
            return Ok(());
        }
        let taken = match self.services.get(&id) {
            // Not heard of since the start, and too early to make anything of that.
            None => (row.address != op.address && self.patient(now)).then_some(row.address.as_str()),
            Some(heard) => {
                let alive = Self::fresh(heard.last_seen, now);
                // A process that was followed by another at its address, and yet speaks.
                let followed = heard.former_boot == Some(op.boot) && heard.boot != op.boot;
                let elsewhere = heard.address != op.address && heard.boot != op.boot;
                let well = heard.problem.is_empty() || !report.problem.is_empty();
                (alive && (followed || elsewhere && well)).then_some(heard.address.as_str())
            }
        };
        let Some(at) = taken else { return Ok(()) };
        Err(machine::conflict(format!(
            "block service {id} is alive at {at} ({}), asked for {} ({}): two copies of one disk?",
            row.path, op.address, report.path
        )))
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

    /// Nothing that was heard of it is kept.
    pub(crate) fn forget_service(&mut self, service: BlockServiceId) {
        self.services.remove(&service);
        let reports = self.reports.remove(&service);
        self.remembered -= reports.map_or(0, |reports| reports.blocks.len());
    }

    /// The bad blocks reported of a block service, by block id.
    pub fn reported(&self, service: BlockServiceId) -> impl Iterator<Item = (u64, Reported)> {
        self.reports.get(&service).into_iter().flat_map(Reports::blocks)
    }

    /// It is repaired, or was not bad.
    pub(crate) fn forget_report(&mut self, service: BlockServiceId, block: u64) {
        let Some(reports) = self.reports.get_mut(&service) else { return };
        if reports.blocks.remove(&block).is_some() {
            self.remembered -= 1;
        }
        // Those that were only counted are reported again by whoever reads them.
        if reports.blocks.is_empty() {
            self.reports.remove(&service);
        }
    }
}

impl ServiceHealth {
    fn of(
        op: &pb::RegisterBlockServices,
        report: &pb::BlockServiceReport,
        before: Option<&ServiceHealth>,
        now: Time,
    ) -> ServiceHealth {
        ServiceHealth {
            last_seen: now,
            address: op.address.clone(),
            boot: op.boot,
            former_boot: before.and_then(|before| match before.boot == op.boot {
                true => before.former_boot,
                false => Some(before.boot),
            }),
            capacity_bytes: report.capacity_bytes,
            available_bytes: report.available_bytes,
            used_bytes: report.used_bytes,
            blocks: report.blocks,
            io_errors: report.io_errors,
            problem: report.problem.clone(),
            read_only: report.read_only,
            dead_bytes: report.dead_bytes,
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
