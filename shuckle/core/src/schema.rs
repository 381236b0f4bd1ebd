//! The registry's rows.
//!
//! | key | value |
//! |---|---|
//! | `M` | [`pb::RegistryMetaRow`] |
//! | `B` block service id (u64, big endian) | [`pb::BlockServiceRow`] |
//! | `P` shard (u8) | [`pb::PlaceRow`]: who serves it |
//! | `X` | [`pb::PlaceRow`]: who is the coordinator |

use bytes::Bytes;
use eggs_machine::table::scan;
use eggs_machine::{Table, TableError};
use eggs_proto::{BlockServiceId, ShardId, pb};
use prost::Message;

pub(crate) const META: &[u8] = b"M";
pub(crate) const CROSSDIR: &[u8] = b"X";
const BLOCK_SERVICES: &[u8] = b"B";
const BLOCK_SERVICES_END: &[u8] = b"C";
const PLACES: &[u8] = b"P";
const PLACES_END: &[u8] = b"Q";

pub(crate) fn block_service_key(id: BlockServiceId) -> Vec<u8> {
    let mut key = BLOCK_SERVICES.to_vec();
    key.extend_from_slice(&id.0.to_be_bytes());
    key
}

pub(crate) fn place_key(shard: ShardId) -> Vec<u8> {
    vec![PLACES[0], shard.0]
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

pub(crate) fn place<T: Table + ?Sized>(
    table: &T,
    shard: ShardId,
) -> Result<Option<pb::PlaceRow>, TableError> {
    get(table, &place_key(shard), "place row")
}

pub(crate) fn crossdir<T: Table + ?Sized>(table: &T) -> Result<Option<pb::PlaceRow>, TableError> {
    get(table, CROSSDIR, "place row")
}

/// In the order of the ids.
pub(crate) fn block_services<T: Table + ?Sized>(
    table: &T,
) -> Result<Vec<(BlockServiceId, pb::BlockServiceRow)>, TableError> {
    let mut all = Vec::new();
    scan(table, BLOCK_SERVICES, BLOCK_SERVICES_END, |key, value| {
        let id = key.get(1..).and_then(|id| id.try_into().ok()).map(u64::from_be_bytes);
        let id = id.ok_or_else(|| TableError("the key of a block service row is not 9 bytes".to_owned()))?;
        all.push((BlockServiceId(id), decode(value, "block service row")?));
        Ok(true)
    })?;
    Ok(all)
}

pub(crate) fn count_block_services<T: Table + ?Sized>(table: &T) -> Result<usize, TableError> {
    let mut count = 0;
    scan(table, BLOCK_SERVICES, BLOCK_SERVICES_END, |_, _| {
        count += 1;
        Ok(true)
    })?;
    Ok(count)
}

/// In the order of the shards.
pub(crate) fn places<T: Table + ?Sized>(table: &T) -> Result<Vec<(ShardId, pb::PlaceRow)>, TableError> {
    let mut all = Vec::new();
    scan(table, PLACES, PLACES_END, |key, value| {
        let [_, shard] = key[..] else {
            return Err(TableError("the key of a place row is not 2 bytes".to_owned()));
        };
        all.push((ShardId(shard), decode(value, "place row")?));
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
