//! What is known of the cluster only while it is heard of: who is alive, space, troubles.
//!
//! Volatile: a registry that starts has heard of nobody. For its `patience` after it was made it takes
//! its rows' word for who is where, so that a restart of the registry alone disturbs nobody; and a place
//! is not given to another host before then. A process that knows that it holds the whole cluster (its
//! directories are locked) has none.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use eggs_machine::{Table, TableError};
use eggs_proto::limits::{BLOCK_SERVICES_MAX, STALE_AFTER};
use eggs_proto::{BlockServiceId, RegistryError, ServiceError, ShardId, Time, flags, pb};
use pb::registry_command::Command;
use pb::registry_reply::Result as Reply;
use pb::registry_request::Op;

use crate::{machine, schema, validate};

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
    started_at: Time,
    patience: Duration,
    shards: BTreeMap<ShardId, ShardHealth>,
    crossdir: Option<CrossdirHealth>,
    services: BTreeMap<BlockServiceId, ServiceHealth>,
    reports: BTreeMap<BlockServiceId, Reports>,
    /// In all `reports`.
    remembered: usize,
}

#[derive(Debug, Clone)]
pub(crate) struct ShardHealth {
    address: String,
    last_seen: Time,
    leader: bool,
    applied_index: u64,
    log_bytes: u64,
}

#[derive(Debug, Clone)]
struct CrossdirHealth {
    address: String,
    last_seen: Time,
    transactions: u32,
}

#[derive(Debug, Clone)]
struct ServiceHealth {
    last_seen: Time,
    address: String,
    capacity_bytes: u64,
    available_bytes: u64,
    used_bytes: u64,
    blocks: u64,
    io_errors: u64,
    problem: String,
}

#[derive(Debug, Default)]
struct Reports {
    blocks: BTreeMap<u64, Reported>,
    /// Not remembered one by one.
    more: u64,
}

impl Health {
    /// `patience`: [`STALE_AFTER`], or zero (see the module).
    pub fn new(now: Time, patience: Duration) -> Health {
        Health {
            started_at: now,
            patience,
            shards: BTreeMap::new(),
            crossdir: None,
            services: BTreeMap::new(),
            reports: BTreeMap::new(),
            remembered: 0,
        }
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
            Op::RegisterShards(_) | Op::RegisterCrossdir(_) | Op::RegisterBlockServices(_) if !authorized => {
                Err(RegistryError::Unauthorized.bare())
            }
            Op::RegisterShards(op) => self.register_shards(view, op, now)?,
            Op::RegisterCrossdir(op) => self.register_crossdir(view, op, now)?,
            Op::RegisterBlockServices(op) => self.register_block_services(view, op, now)?,
        };
        Ok(step.unwrap_or_else(|error| Step::Answer(Reply::Error(error))))
    }

    fn fresh(last_seen: Time, now: Time) -> bool {
        !last_seen.is_unset() && now.since(last_seen) < STALE_AFTER
    }

    /// Not heard of since the start, and it is too early to make anything of that.
    fn patient(&self, now: Time) -> bool {
        now.since(self.started_at) < self.patience
    }

    // ---- shards and coordinator ----

    fn register_shards<T: Table + ?Sized>(
        &mut self,
        view: &T,
        op: &pb::RegisterShards,
        now: Time,
    ) -> Result<Result<Step, pb::Error>, TableError> {
        if let Err(error) = validate::shards(&op.address, op.shards.iter().map(|report| report.shard)) {
            return Ok(Err(error));
        }
        let mut changed = Vec::new();
        let mut heard = Vec::with_capacity(op.shards.len());
        for report in &op.shards {
            let Ok(shard) = ShardId::try_from(report.shard) else { continue };
            let place = schema::place(view, shard)?.map(|row| row.address);
            let here = place.as_ref() == Some(&op.address);
            // A replica that does not lead has no say in who serves the shard.
            if !report.leader && !here {
                continue;
            }
            if report.leader
                && let Some(other) =
                    self.holder(shard, place.as_deref(), now).filter(|other| *other != op.address)
            {
                let what = format!("shard {shard} is served by {other}, asked for {}", op.address);
                return Ok(Err(RegistryError::ShardTaken.with(what)));
            }
            if !here {
                changed.push(report.shard);
            }
            heard.push((shard, report));
        }
        for (shard, report) in heard {
            let health = ShardHealth {
                address: op.address.clone(),
                last_seen: now,
                leader: report.leader,
                applied_index: report.applied_index,
                log_bytes: report.log_bytes,
            };
            self.shards.insert(shard, health);
        }
        if changed.is_empty() {
            return Ok(Ok(registered()));
        }
        let put = pb::PutShardPlaces { address: op.address.clone(), shards: changed };
        Ok(Ok(log(Command::PutShardPlaces(put))))
    }

    /// RG-5: the live host that leads the shard.
    fn holder<'a>(&'a self, shard: ShardId, place: Option<&'a str>, now: Time) -> Option<&'a str> {
        match self.shards.get(&shard) {
            Some(health) => {
                (health.leader && Self::fresh(health.last_seen, now)).then_some(health.address.as_str())
            }
            None => place.filter(|_| self.patient(now)),
        }
    }

    fn register_crossdir<T: Table + ?Sized>(
        &mut self,
        view: &T,
        op: &pb::RegisterCrossdir,
        now: Time,
    ) -> Result<Result<Step, pb::Error>, TableError> {
        if let Err(error) = validate::address(&op.address) {
            return Ok(Err(error));
        }
        let place = schema::crossdir(view)?.map(|row| row.address);
        let holder = match &self.crossdir {
            Some(health) => Self::fresh(health.last_seen, now).then_some(&health.address),
            None => place.as_ref().filter(|_| self.patient(now)),
        };
        if let Some(other) = holder.filter(|other| **other != op.address) {
            let what = format!("the coordinator is {other}, asked for {}", op.address);
            return Ok(Err(RegistryError::ShardTaken.with(what)));
        }
        self.crossdir = Some(CrossdirHealth {
            address: op.address.clone(),
            last_seen: now,
            transactions: op.transactions,
        });
        if place.as_ref() == Some(&op.address) {
            return Ok(Ok(registered()));
        }
        Ok(Ok(log(Command::PutCrossdir(pb::PutCrossdir { address: op.address.clone() }))))
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

    // ---- the map ----

    /// Who serves what and how every disk feels, in the order of the ids. Never a key unless asked for (RG-8).
    ///
    /// # Errors
    /// When the table fails.
    pub fn map<T: Table + ?Sized>(
        &self,
        view: &T,
        now: Time,
        with_keys: bool,
    ) -> Result<pb::ClusterMapReply, TableError> {
        let places = schema::places(view)?.into_iter();
        let shards = places.map(|(shard, row)| self.shard_place(shard, row, now)).collect();
        let crossdir_address = schema::crossdir(view)?.map(|row| row.address).unwrap_or_default();
        let crossdir_alive = match &self.crossdir {
            Some(health) => health.address == crossdir_address && Self::fresh(health.last_seen, now),
            None => !crossdir_address.is_empty() && self.patient(now),
        };
        // A host that is heard of speaks for all its disks.
        let mut hosts: BTreeMap<&str, Time> = BTreeMap::new();
        for service in self.services.values() {
            let seen = hosts.entry(&service.address).or_default();
            *seen = service.last_seen.max(*seen);
        }
        let services = schema::block_services(view)?.into_iter();
        let block_services = services
            .map(|(id, row)| {
                let host_seen = hosts.get(row.address.as_str()).copied().unwrap_or_default();
                self.block_service_info(id, row, host_seen, now, with_keys)
            })
            .collect();
        Ok(pb::ClusterMapReply {
            shards,
            crossdir_address,
            crossdir_alive,
            block_services,
            crossdir_transactions: self.crossdir.as_ref().map_or(0, |health| health.transactions),
        })
    }

    fn shard_place(&self, shard: ShardId, row: pb::PlaceRow, now: Time) -> pb::ShardPlace {
        // Another address: its registration is not logged yet.
        let health = self.shards.get(&shard).filter(|health| health.address == row.address);
        let alive = match health {
            Some(health) => health.leader && Self::fresh(health.last_seen, now),
            None => self.patient(now) && !self.shards.contains_key(&shard),
        };
        pb::ShardPlace {
            shard: u32::from(shard.0),
            address: row.address,
            alive,
            last_seen: health.map_or(0, |health| health.last_seen.0),
            applied_index: health.map_or(0, |health| health.applied_index),
            log_bytes: health.map_or(0, |health| health.log_bytes),
        }
    }

    fn block_service_info(
        &self,
        id: BlockServiceId,
        row: pb::BlockServiceRow,
        host_seen: Time,
        now: Time,
        with_keys: bool,
    ) -> pb::BlockServiceInfo {
        let health = self.services.get(&id);
        let fresh = match health {
            Some(health) => Self::fresh(health.last_seen, now),
            None => self.patient(now),
        };
        let mut problem = health.map(|health| health.problem.clone()).unwrap_or_default();
        if !fresh && problem.is_empty() && Self::fresh(host_seen, now) {
            "its host no longer has it".clone_into(&mut problem);
        }
        // Not heard of yet, but believed to be there: it will refuse what it has no room for.
        let unheard = if fresh { row.capacity_bytes } else { 0 };
        let stale = if fresh { 0 } else { flags::STALE };
        let lost = if problem.is_empty() { 0 } else { flags::LOST };
        let reports = self.reports.get(&id);
        pb::BlockServiceInfo {
            id: id.0,
            storage_class: row.storage_class,
            failure_domain: row.failure_domain,
            address: row.address,
            flags: row.flags | stale | lost,
            capacity_bytes: health.map_or(row.capacity_bytes, |health| health.capacity_bytes),
            available_bytes: health.map_or(unheard, |health| health.available_bytes),
            used_bytes: health.map_or(0, |health| health.used_bytes),
            blocks: health.map_or(0, |health| health.blocks),
            last_seen: health.map_or(0, |health| health.last_seen.0),
            registered_at: row.registered_at,
            path: row.path,
            io_errors: health.map_or(0, |health| health.io_errors),
            reported_blocks: reports.map_or(0, |reports| reports.blocks.len() as u64 + reports.more),
            problem,
            key: if with_keys { row.key } else { bytes::Bytes::new() },
        }
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

fn registered() -> Step {
    Step::Answer(Reply::Registered(pb::Registered {}))
}

fn log(command: Command) -> Step {
    Step::Log(pb::RegistryCommand { command: Some(command) })
}

#[cfg(test)]
#[path = "health_tests.rs"]
mod tests;
