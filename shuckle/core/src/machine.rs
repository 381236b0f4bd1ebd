//! What is kept of the cluster, replicated: its id, its disks, who serves what, flags.

use std::convert::Infallible;

use eggs_machine::{Machine, Outcome, Table, TableError, Tx};
use eggs_proto::limits::{BLOCK_SERVICES_MAX, PROTOCOL_VERSION};
use eggs_proto::{BlockServiceId, ClusterId, RegistryError, ServiceError, ShardId, Time, pb};
use pb::registry_command::Command;
use pb::registry_reply::Result as Reply;
use prost::Message;

use crate::{schema, validate};

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
            Some(Command::PutShardPlaces(op)) => put_shard_places(tx, &op),
            Some(Command::PutCrossdir(op)) => put_crossdir(tx, &op),
            Some(Command::SetFlags(op)) => set_flags(tx, &op),
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
    let row = pb::RegistryMetaRow { cluster_id: op.cluster_id.clone(), created_at: time.0 };
    tx.put(schema::META, row.encode_to_vec())?;
    Ok(Reply::Hello(pb::HelloReply {
        cluster_id: row.cluster_id,
        created_at: time.0,
        version: PROTOCOL_VERSION,
    }))
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

fn put_shard_places<T: Table + ?Sized>(tx: &mut Tx<'_, T>, op: &pb::PutShardPlaces) -> Result<Reply, Stop> {
    validate::shards(&op.address, op.shards.iter().copied())?;
    let row = pb::PlaceRow { address: op.address.clone() }.encode_to_vec();
    for shard in op.shards.iter().filter_map(|&shard| ShardId::try_from(shard).ok()) {
        tx.put(schema::place_key(shard), row.clone())?;
    }
    Ok(Reply::Registered(pb::Registered {}))
}

fn put_crossdir<T: Table + ?Sized>(tx: &mut Tx<'_, T>, op: &pb::PutCrossdir) -> Result<Reply, Stop> {
    validate::address(&op.address)?;
    tx.put(schema::CROSSDIR, pb::PlaceRow { address: op.address.clone() }.encode_to_vec())?;
    Ok(Reply::Registered(pb::Registered {}))
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

/// Which cluster this is; `None` before it is founded.
///
/// # Errors
/// When the table fails.
pub fn hello<T: Table + ?Sized>(view: &T) -> Result<Option<pb::HelloReply>, TableError> {
    Ok(schema::meta(view)?.map(|row| pb::HelloReply {
        cluster_id: row.cluster_id,
        created_at: row.created_at,
        version: PROTOCOL_VERSION,
    }))
}

#[cfg(test)]
#[path = "machine_tests.rs"]
pub(crate) mod tests;
