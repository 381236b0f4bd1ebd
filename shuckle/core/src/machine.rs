//! What is kept of the cluster, replicated: its id, its disks, its stores, who replicates what, flags.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use eggs_machine::{Machine, Outcome, Table, TableError, Tx};
use eggs_proto::limits::{BLOCK_SERVICES_MAX, PROTOCOL_VERSION, REPLICAS};
use eggs_proto::{BlockServiceId, ClusterId, GroupId, RegistryError, ServiceError, StoreId, Time, flags, pb};
use pb::registry_command::Command;
use pb::registry_reply::Result as Reply;
use prost::Message;

use crate::{forgetting, janitor, schema, validate};

/// The registry's replicated state machine. Its reply is an encoded [`pb::RegistryReply`] without a
/// header: `hello` to a `FoundCluster`, `registered` to the others, or an error.
#[derive(Debug, Clone, Copy, Default)]
pub struct RegistryMachine;

enum Stop {
    Refused(pb::Error),
    Failed(TableError),
}

impl From<TableError> for Stop {
    fn from(error: TableError) -> Self {
        Stop::Failed(error)
    }
}

impl From<pb::Error> for Stop {
    fn from(error: pb::Error) -> Self {
        Stop::Refused(error)
    }
}

impl Machine for RegistryMachine {
    type Effect = Infallible;

    fn apply<T: Table + ?Sized>(
        &self,
        tx: &mut Tx<'_, T>,
        time: Time,
        command: &[u8],
    ) -> Result<Outcome<Infallible>, TableError> {
        let command = pb::RegistryCommand::decode(command).ok().and_then(|command| command.command);
        let result = match command {
            Some(Command::Found(op)) => found(tx, time, &op),
            Some(Command::PutBlockServices(op)) => put_block_services(tx, time, &op),
            Some(Command::SetFlags(op)) => set_flags(tx, &op),
            Some(Command::PutStore(op)) => put_store(tx, time, &op),
            Some(Command::PutGroups(op)) => put_groups(tx, &op),
            Some(Command::DrainHost(op)) => drain_host(tx, &op),
            Some(Command::PutJob(op)) => put_job(tx, time, &op),
            Some(Command::PutJobProgress(op)) => put_job_progress(tx, &op),
            Some(Command::ForgetBlockServices(op)) => forget_block_services(tx, &op),
            None => Err(RegistryError::Malformed.with("command").into()),
        };
        let result = match result {
            Ok(reply) => reply,
            Err(Stop::Refused(error)) => Reply::Error(error),
            Err(Stop::Failed(error)) => return Err(error),
        };
        let reply = pb::RegistryReply { header: None, result: Some(result) };
        Ok(Outcome { reply: reply.encode_to_vec().into(), effects: Vec::new() })
    }
}

/// RG-1: the first id stays; who comes later is told it.
fn found<T: Table + ?Sized>(tx: &mut Tx<'_, T>, time: Time, op: &pb::FoundCluster) -> Result<Reply, Stop> {
    if let Some(hello) = hello(tx)? {
        return Ok(Reply::Hello(hello));
    }
    if ClusterId::from_bytes(&op.cluster_id).is_none() {
        return Err(RegistryError::Malformed.with("a cluster id is 16 bytes, not all zero").into());
    }
    if !REPLICAS.contains(&op.replicas) {
        let what = format_args!("{} replicas: there can be 1, 3 or 5", op.replicas);
        return Err(RegistryError::Malformed.with(what).into());
    }
    let row = pb::RegistryMetaRow {
        cluster_id: op.cluster_id.clone(),
        created_at: time.0,
        replicas: op.replicas,
        next_job: 0,
    };
    tx.put(schema::META, row.encode_to_vec())?;
    Ok(Reply::Hello(hello_of(row)))
}

/// RG-2: all of them, or none.
fn put_block_services<T: Table + ?Sized>(
    tx: &mut Tx<'_, T>,
    time: Time,
    op: &pb::PutBlockServices,
) -> Result<Reply, Stop> {
    validate::block_services(&op.address, &op.failure_domain, &op.block_services)?;
    let mut rows = Vec::with_capacity(op.block_services.len());
    let mut new = 0;
    for report in &op.block_services {
        let id = BlockServiceId(report.id);
        let known = schema::block_service(tx, id)?;
        if let Some(known) = &known {
            same_disk(id, known, report)?;
        } else {
            new += 1;
        }
        let mut row = row_of(&op.address, &op.failure_domain, report);
        row.flags = known.as_ref().map_or(0, |known| known.flags);
        row.registered_at = known.as_ref().map_or(time.0, |known| known.registered_at);
        rows.push((id, row));
    }
    if new > 0 && schema::count_block_services(tx)? + new > BLOCK_SERVICES_MAX {
        return Err(RegistryError::Malformed.with("the cluster has no room for more block services").into());
    }
    for (id, row) in rows {
        tx.put(schema::block_service_key(id), row.encode_to_vec())?;
    }
    Ok(Reply::Registered(pb::Registered {}))
}

/// RG-3: an id belongs to one disk for ever, and the key is what tells disks apart.
pub(crate) fn same_disk(
    id: BlockServiceId,
    known: &pb::BlockServiceRow,
    report: &pb::BlockServiceReport,
) -> Result<(), pb::Error> {
    if known.key == report.key {
        return Ok(());
    }
    Err(RegistryError::Conflict.with(format_args!(
        "block service {id} at {} ({}), asked for {}",
        known.address, known.path, report.path
    )))
}

/// What a report says of a disk, as a row; flags and registration are not its to say.
pub(crate) fn row_of(
    address: &str,
    host_domain: &str,
    report: &pb::BlockServiceReport,
) -> pb::BlockServiceRow {
    let own = !report.failure_domain.is_empty();
    pb::BlockServiceRow {
        key: report.key.clone(),
        storage_class: report.storage_class,
        failure_domain: if own { report.failure_domain.clone() } else { host_domain.to_owned() },
        address: address.to_owned(),
        path: report.path.clone(),
        flags: 0,
        registered_at: 0,
        capacity_bytes: report.capacity_bytes,
    }
}

/// A store that is new, or has moved; its kind stays (RG-5).
fn put_store<T: Table + ?Sized>(tx: &mut Tx<'_, T>, time: Time, op: &pb::PutStore) -> Result<Reply, Stop> {
    validate::store(op.id, op.kind, &op.host, &op.address)?;
    let id = StoreId(op.id);
    let known = schema::store(tx, id)?;
    if let Some(known) = &known {
        same_kind(id, known, op.kind())?;
    }
    let others = schema::stores(tx)?;
    if known.is_none() && others.len() >= validate::STORES_MAX {
        return Err(RegistryError::Malformed.with("the cluster has no room for more stores").into());
    }
    let mut on_host = others.iter().filter(|(_, other)| other.host == op.host);
    let row = pb::StoreRow {
        kind: op.kind,
        host: op.host.clone(),
        address: op.address.clone(),
        registered_at: known.map_or(time.0, |known| known.registered_at),
        // A host is drained as a whole: what is new there takes nothing either.
        draining: on_host.any(|(_, other)| other.draining),
    };
    tx.put(schema::store_key(id), row.encode_to_vec())?;
    forget_replaced(tx)?;
    Ok(Reply::Registered(pb::Registered {}))
}

pub(crate) fn same_kind(id: StoreId, known: &pb::StoreRow, kind: pb::StoreKind) -> Result<(), pb::Error> {
    if known.kind() == kind {
        return Ok(());
    }
    let (was, is) = (schema::kind_name(known.kind()), schema::kind_name(kind));
    Err(conflict(format!("store {id} on host {} is a {was} store, not a {is} store", known.host)))
}

/// RG-12: of a host's stores of a kind, those that a later one has replaced are forgotten with their
/// last replica.
fn forget_replaced<T: Table + ?Sized>(tx: &mut Tx<'_, T>) -> Result<(), TableError> {
    let stores = schema::stores(tx)?;
    let mut newest: BTreeMap<(i32, &str), u64> = BTreeMap::new();
    for (_, row) in &stores {
        let at = newest.entry((row.kind, &row.host)).or_default();
        *at = row.registered_at.max(*at);
    }
    let replaced =
        |row: &pb::StoreRow| newest.get(&(row.kind, &row.host)).is_some_and(|&at| row.registered_at < at);
    let mut replaced: Vec<StoreId> =
        stores.iter().filter(|(_, row)| replaced(row)).map(|&(id, _)| id).collect();
    if replaced.is_empty() {
        return Ok(());
    }
    let named = named_in_groups(tx)?;
    replaced.retain(|id| !named.contains(id));
    for id in replaced {
        tx.delete(schema::store_key(id))?;
    }
    Ok(())
}

/// Stores that a group has or is to have a replica on.
fn named_in_groups<T: Table + ?Sized>(tx: &Tx<'_, T>) -> Result<BTreeSet<StoreId>, TableError> {
    let mut named = BTreeSet::new();
    for (_, row) in schema::groups(tx)? {
        let wanted = row.wanted.iter().flat_map(|wanted| &wanted.voters);
        let members = row.membership.iter().flat_map(|now| now.voters.iter().chain(&now.learners));
        named.extend(wanted.chain(members).chain(&row.founding).copied().map(StoreId));
    }
    Ok(named)
}

/// RG-2: all of them, or none; a membership older than the one known is no news and changes nothing.
fn put_groups<T: Table + ?Sized>(tx: &mut Tx<'_, T>, op: &pb::PutGroups) -> Result<Reply, Stop> {
    let mut rows = Vec::with_capacity(op.groups.len().min(validate::GROUPS_MAX));
    let mut seen = BTreeSet::new();
    for put in &op.groups {
        let group = validate::group(put.group)?;
        if !seen.insert(group) {
            return Err(RegistryError::Malformed.with(format_args!("{group} is there twice")).into());
        }
        let row = schema::group(tx, group)?.unwrap_or_default();
        rows.push((group, changed_group(tx, group, row, put)?));
    }
    for (group, row) in &rows {
        tx.put(schema::group_key(*group), row.encode_to_vec())?;
    }
    forget_replaced(tx)?;
    Ok(Reply::Registered(pb::Registered {}))
}

fn changed_group<T: Table + ?Sized>(
    tx: &Tx<'_, T>,
    group: GroupId,
    mut row: pb::GroupRow,
    put: &pb::PutGroup,
) -> Result<pb::GroupRow, Stop> {
    if !put.founding.is_empty() {
        if row.wanted.is_some() || row.membership.is_some() || group == GroupId::SHUCKLE {
            return Err(conflict(format!("{group} is founded already")).into());
        }
        stores_of_group(tx, group, &put.founding)?;
        row.founding.clone_from(&put.founding);
    }
    if let Some(wanted) = &put.wanted {
        stores_of_group(tx, group, &wanted.voters)?;
        if wanted.preferred != 0 && !wanted.voters.contains(&wanted.preferred) {
            let what = format_args!("{group} is to be led by one that is no voter of it");
            return Err(RegistryError::Malformed.with(what).into());
        }
        row.wanted = Some(wanted.clone());
    }
    if let Some(membership) = &put.membership {
        validate::members(&membership.voters, &membership.learners)?;
        if row.membership.as_ref().is_none_or(|known| known.index <= membership.index) {
            row.membership = Some(membership.clone());
        }
    }
    // RG-11: nobody founds a group whose members have changed or are to.
    let wanted = row.wanted.as_ref().map_or(&[][..], |wanted| &wanted.voters);
    if row.membership.as_ref().is_some_and(|now| now.index > 0) || !same_set(wanted, &row.founding) {
        row.founding.clear();
    }
    Ok(row)
}

/// RG-10: known stores of the right kind.
fn stores_of_group<T: Table + ?Sized>(tx: &Tx<'_, T>, group: GroupId, ids: &[u64]) -> Result<(), Stop> {
    validate::members(ids, &[])?;
    for id in ids.iter().copied().map(StoreId) {
        let row = schema::store(tx, id)?;
        let row = row.ok_or_else(|| RegistryError::UnknownMember.with(format_args!("store {id}")))?;
        of_kind(group, id, &row)?;
    }
    Ok(())
}

pub(crate) fn of_kind(group: GroupId, id: StoreId, row: &pb::StoreRow) -> Result<(), pb::Error> {
    if schema::kind_of(group) == Some(row.kind()) {
        return Ok(());
    }
    let (host, kind) = (&row.host, schema::kind_name(row.kind()));
    Err(RegistryError::Malformed
        .with(format_args!("store {id} on host {host} is a {kind} store, asked for {group}")))
}

pub(crate) fn same_set(a: &[u64], b: &[u64]) -> bool {
    a.len() == b.len() && a.iter().all(|id| b.contains(id))
}

fn drain_host<T: Table + ?Sized>(tx: &mut Tx<'_, T>, op: &pb::DrainHost) -> Result<Reply, Stop> {
    let mut stores = schema::stores(tx)?;
    stores.retain(|(_, row)| row.host == op.host);
    if stores.is_empty() {
        return Err(unknown_host(&op.host).into());
    }
    for (id, mut row) in stores {
        row.draining = !op.undo;
        tx.put(schema::store_key(id), row.encode_to_vec())?;
    }
    Ok(Reply::Registered(pb::Registered {}))
}

pub(crate) fn unknown_host(host: &str) -> pb::Error {
    let host: String = host.chars().filter(|c| !c.is_control()).take(validate::HOST_BYTES_MAX).collect();
    RegistryError::UnknownMember.with(format_args!("host '{host}'"))
}

/// Two that claim to be the same; the code's own words are about disks.
pub(crate) fn conflict(message: String) -> pb::Error {
    pb::Error { message, ..RegistryError::Conflict.bare() }
}

/// RG-2, RG-4.
fn set_flags<T: Table + ?Sized>(tx: &mut Tx<'_, T>, op: &pb::SetFlags) -> Result<Reply, Stop> {
    validate::set_flags(op)?;
    let mut rows = Vec::with_capacity(op.block_services.len());
    for id in op.block_services.iter().copied().map(BlockServiceId) {
        let row = schema::block_service(tx, id)?;
        let mut row = row.ok_or_else(|| RegistryError::NotFound.with(id))?;
        row.flags = (row.flags | op.set) & !op.clear;
        rows.push((id, row));
    }
    for (id, row) in rows {
        tx.put(schema::block_service_key(id), row.encode_to_vec())?;
    }
    Ok(Reply::Registered(pb::Registered {}))
}

/// RG-2, RG-20.
fn forget_block_services<T: Table + ?Sized>(
    tx: &mut Tx<'_, T>,
    op: &pb::ForgetBlockServices,
) -> Result<Reply, Stop> {
    validate::forget_block_services(op)?;
    for id in op.block_services.iter().copied().map(BlockServiceId) {
        let row = schema::block_service(tx, id)?.ok_or_else(|| RegistryError::NotFound.with(id))?;
        if row.flags & flags::DECOMMISSIONED == 0 {
            return Err(conflict(forgetting::not_given_up(id)).into());
        }
    }
    for &id in &op.block_services {
        tx.delete(schema::block_service_key(BlockServiceId(id)))?;
    }
    Ok(Reply::Registered(pb::Registered {}))
}

/// RG-19. Adds a job, or ends one; answers it.
fn put_job<T: Table + ?Sized>(tx: &mut Tx<'_, T>, time: Time, op: &pb::PutJob) -> Result<Reply, Stop> {
    validate::put_job(op)?;
    if op.id != 0 {
        let job = schema::job(tx, op.id)?.ok_or_else(|| no_job(op.id))?;
        tx.delete(schema::job_key(op.id))?;
        return Ok(Reply::Job(job));
    }
    let jobs = schema::jobs(tx)?;
    if let Some(job) = jobs.iter().find(|job| janitor::is_same(job, op)) {
        return Ok(Reply::Job(job.clone()));
    }
    let open = jobs.iter().filter(|job| !janitor::is_done(job)).count();
    if open >= validate::JOBS_MAX {
        let what = format_args!("{open} jobs are under way already: cancel some, or wait");
        return Err(RegistryError::Malformed.with(what).into());
    }
    let mut meta =
        schema::meta(tx)?.ok_or_else(|| RegistryError::Busy.with("the cluster is being founded"))?;
    let id = meta.next_job.max(1);
    meta.next_job = id + 1;
    let job = pb::Job {
        id,
        kind: op.kind,
        directory: op.directory,
        path: op.path.clone(),
        asked_at: time.0,
        progress: None,
    };
    tx.put(schema::META, meta.encode_to_vec())?;
    tx.put(schema::job_key(id), job.encode_to_vec())?;
    Ok(Reply::Job(job))
}

fn no_job(id: u64) -> pb::Error {
    pb::Error { message: format!("there is no job {id}"), ..RegistryError::NotFound.bare() }
}

/// RG-19. Of jobs that were cancelled meanwhile nothing is kept.
fn put_job_progress<T: Table + ?Sized>(tx: &mut Tx<'_, T>, op: &pb::PutJobProgress) -> Result<Reply, Stop> {
    validate::job_progress(&op.jobs)?;
    for progress in &op.jobs {
        if let Some(job) = schema::job(tx, progress.id)?.filter(|job| !janitor::is_done(job)) {
            let job = pb::Job { progress: Some(progress.clone()), ..job };
            tx.put(schema::job_key(job.id), job.encode_to_vec())?;
        }
    }
    for id in janitor::to_forget(&schema::jobs(tx)?) {
        tx.delete(schema::job_key(id))?;
    }
    Ok(Reply::Registered(pb::Registered {}))
}

/// Which cluster this is; `None` before it is founded.
///
/// # Errors
/// When the table fails.
pub fn hello<T: Table + ?Sized>(view: &T) -> Result<Option<pb::HelloReply>, TableError> {
    Ok(schema::meta(view)?.map(hello_of))
}

fn hello_of(row: pb::RegistryMetaRow) -> pb::HelloReply {
    pb::HelloReply {
        cluster_id: row.cluster_id,
        created_at: row.created_at,
        version: PROTOCOL_VERSION,
        replicas: row.replicas,
        store: 0,
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
pub(crate) mod tests;
