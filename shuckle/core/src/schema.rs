//! The registry's rows.
//!
//! | key | value |
//! |---|---|
//! | `M` | [`pb::RegistryMetaRow`] |
//! | `B` block service id (u64, big endian) | [`pb::BlockServiceRow`] |
//! | `G` group (u16, big endian) | [`pb::GroupRow`]: who replicates it, and who is to |
//! | `J` job id (u64, big endian) | [`pb::Job`] |
//! | `S` store id (u64, big endian) | [`pb::StoreRow`] |

use std::ops::RangeInclusive;

use bytes::Bytes;
use eggs_machine::table::scan;
use eggs_machine::{Table, TableError};
use eggs_proto::limits::SHARDS;
use eggs_proto::{BlockServiceId, GroupId, StoreId, pb};
use pb::StoreKind;
use prost::Message;

pub(crate) const META: &[u8] = b"M";
const BLOCK_SERVICES: &[u8] = b"B";
const BLOCK_SERVICES_END: &[u8] = b"C";
const GROUPS: &[u8] = b"G";
const GROUPS_END: &[u8] = b"H";
const JOBS: &[u8] = b"J";
const JOBS_END: &[u8] = b"K";
const STORES: &[u8] = b"S";
const STORES_END: &[u8] = b"T";

/// The kind of store that holds replicas of the group; `None` for what is no group.
pub fn kind_of(group: GroupId) -> Option<StoreKind> {
    match group {
        GroupId::CROSSDIR => Some(StoreKind::StoreCrossdir),
        GroupId::SHUCKLE => Some(StoreKind::StoreShuckle),
        GroupId(shard) if shard < SHARDS => Some(StoreKind::StoreShard),
        GroupId(_) => None,
    }
}

/// The groups whose replicas are on stores of that kind.
pub fn groups_of(kind: StoreKind) -> impl DoubleEndedIterator<Item = GroupId> + Clone {
    let range: RangeInclusive<u16> = match kind {
        StoreKind::StoreShard => 0..=SHARDS - 1,
        StoreKind::StoreCrossdir => GroupId::CROSSDIR.0..=GroupId::CROSSDIR.0,
        StoreKind::StoreShuckle => GroupId::SHUCKLE.0..=GroupId::SHUCKLE.0,
        // Empty.
        StoreKind::StoreUnspecified => RangeInclusive::new(1, 0),
    };
    range.map(GroupId)
}

/// As people call a store of that kind.
pub fn kind_name(kind: StoreKind) -> &'static str {
    match kind {
        StoreKind::StoreShard => "shard",
        StoreKind::StoreCrossdir => "crossdir",
        StoreKind::StoreShuckle => "shuckle",
        StoreKind::StoreUnspecified => "unknown",
    }
}

pub(crate) fn block_service_key(id: BlockServiceId) -> Vec<u8> {
    key(BLOCK_SERVICES, &id.0.to_be_bytes())
}

pub(crate) fn group_key(group: GroupId) -> Vec<u8> {
    key(GROUPS, &group.0.to_be_bytes())
}

pub(crate) fn store_key(store: StoreId) -> Vec<u8> {
    key(STORES, &store.0.to_be_bytes())
}

pub(crate) fn job_key(id: u64) -> Vec<u8> {
    key(JOBS, &id.to_be_bytes())
}

fn key(tag: &[u8], id: &[u8]) -> Vec<u8> {
    [tag, id].concat()
}

pub(crate) fn meta<T: Table + ?Sized>(table: &T) -> Result<Option<pb::RegistryMetaRow>, TableError> {
    get(table, META, "meta row")
}

pub(crate) fn block_service<T: Table + ?Sized>(
    table: &T,
    id: BlockServiceId,
) -> Result<Option<pb::BlockServiceRow>, TableError> {
    get(table, &block_service_key(id), "block service row")
}

pub(crate) fn group<T: Table + ?Sized>(
    table: &T,
    group: GroupId,
) -> Result<Option<pb::GroupRow>, TableError> {
    get(table, &group_key(group), "group row")
}

pub(crate) fn store<T: Table + ?Sized>(
    table: &T,
    store: StoreId,
) -> Result<Option<pb::StoreRow>, TableError> {
    get(table, &store_key(store), "store row")
}

/// In the order of the ids.
pub(crate) fn block_services<T: Table + ?Sized>(
    table: &T,
) -> Result<Vec<(BlockServiceId, pb::BlockServiceRow)>, TableError> {
    let id = |key| BlockServiceId(u64::from_be_bytes(key));
    all(table, BLOCK_SERVICES, BLOCK_SERVICES_END, id, "block service row")
}

pub(crate) fn count_block_services<T: Table + ?Sized>(table: &T) -> Result<usize, TableError> {
    let mut count = 0;
    scan(table, BLOCK_SERVICES, BLOCK_SERVICES_END, |_, _| {
        count += 1;
        Ok(true)
    })?;
    Ok(count)
}

/// In the order of the groups.
pub(crate) fn groups<T: Table + ?Sized>(table: &T) -> Result<Vec<(GroupId, pb::GroupRow)>, TableError> {
    let id = |key| GroupId(u16::from_be_bytes(key));
    all(table, GROUPS, GROUPS_END, id, "group row")
}

pub(crate) fn job<T: Table + ?Sized>(table: &T, id: u64) -> Result<Option<pb::Job>, TableError> {
    get(table, &job_key(id), "job row")
}

/// In the order of their ids: the oldest first.
pub(crate) fn jobs<T: Table + ?Sized>(table: &T) -> Result<Vec<pb::Job>, TableError> {
    let rows = all(table, JOBS, JOBS_END, u64::from_be_bytes, "job row")?;
    Ok(rows.into_iter().map(|(_, job)| job).collect())
}

/// In the order of the ids.
pub(crate) fn stores<T: Table + ?Sized>(table: &T) -> Result<Vec<(StoreId, pb::StoreRow)>, TableError> {
    let id = |key| StoreId(u64::from_be_bytes(key));
    all(table, STORES, STORES_END, id, "store row")
}

fn all<T: Table + ?Sized, I, R: Message + Default, const N: usize>(
    table: &T,
    from: &[u8],
    to: &[u8],
    id: impl Fn([u8; N]) -> I,
    what: &str,
) -> Result<Vec<(I, R)>, TableError> {
    let mut all = Vec::new();
    scan(table, from, to, |key, value| {
        let id = key.get(1..).and_then(|key| key.try_into().ok()).map(&id);
        let id = id.ok_or_else(|| TableError(format!("the key of a {what} is not {} bytes", N + 1)))?;
        all.push((id, decode(value, what)?));
        Ok(true)
    })?;
    Ok(all)
}

fn get<T: Table + ?Sized, R: Message + Default>(
    table: &T,
    key: &[u8],
    what: &str,
) -> Result<Option<R>, TableError> {
    table.get(key)?.map(|bytes| decode(&bytes, what)).transpose()
}

fn decode<R: Message + Default>(bytes: &Bytes, what: &str) -> Result<R, TableError> {
    R::decode(bytes.clone()).map_err(|error| TableError(format!("{what}: {error}")))
}
