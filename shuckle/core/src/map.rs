//! The cluster map: rows and what is heard, put together.

use std::collections::BTreeMap;

use eggs_machine::{Table, TableError};
use eggs_proto::limits::STALE_AFTER;
use eggs_proto::{BlockServiceId, GroupId, StoreId, Time, flags, pb};

use crate::health::{Health, Reports};
use crate::machine::same_set;
use crate::schema;

impl Health {
    /// Who serves what and how every store and disk feels, in the order of the ids. Never a key unless
    /// asked for (RG-8).
    ///
    /// # Errors
    /// When the table fails.
    pub fn map<T: Table + ?Sized>(
        &self,
        view: &T,
        now: Time,
        with_keys: bool,
    ) -> Result<pb::ClusterMapReply, TableError> {
        let groups = schema::groups(view)?.into_iter();
        let groups: Vec<pb::GroupPlace> = groups.map(|(group, row)| self.place(group, row, now)).collect();
        let mut replicas: BTreeMap<u64, (u32, u32)> = BTreeMap::new();
        for place in &groups {
            let members = place.voters.iter().chain(&place.learners);
            // Not founded yet: those that are to be.
            let wanted = if place.voters.is_empty() { &place.wanted[..] } else { &[] };
            members.chain(wanted).for_each(|&id| replicas.entry(id).or_default().0 += 1);
            if place.leader != 0 {
                replicas.entry(place.leader).or_default().1 += 1;
            }
        }
        let rows = schema::stores(view)?;
        let mut unheard = rows.iter().any(|(id, _)| self.is_awaited(*id));
        let stores = rows.into_iter().map(|(id, row)| {
            let (replicas, leaders) = replicas.get(&id.0).copied().unwrap_or_default();
            pb::StoreInfo { replicas, leaders, ..self.store_info(id, row, now) }
        });
        // A host that is heard of speaks for all its disks.
        let mut hosts: BTreeMap<&str, Time> = BTreeMap::new();
        for service in self.services.values() {
            let seen = hosts.entry(&service.address).or_default();
            *seen = service.last_seen.max(*seen);
        }
        let services = schema::block_services(view)?;
        unheard |= services.iter().any(|(id, _)| !self.services.contains_key(id));
        let block_services = services.into_iter().map(|(id, row)| {
            let host_seen = hosts.get(row.address.as_str()).copied().unwrap_or_default();
            self.block_service_info(id, row, host_seen, now, with_keys)
        });
        Ok(pb::ClusterMapReply {
            stores: stores.collect(),
            block_services: block_services.collect(),
            groups,
            crossdir_transactions: self.transactions,
            slow_transactions: self.slow_transactions.clone(),
            janitor: self.janitor_info(now),
            jobs: schema::jobs(view)?,
            replicas: schema::meta(view)?.map_or(0, |meta| meta.replicas),
            now: now.0,
            version: 0,
            unchanged: false,
            listening: unheard && now.since(self.started_at) < STALE_AFTER,
        })
    }

    fn store_info(&self, id: StoreId, row: pb::StoreRow, now: Time) -> pb::StoreInfo {
        let heard = self.stores.get(&id);
        pb::StoreInfo {
            id: id.0,
            kind: row.kind,
            host: row.host,
            address: row.address,
            alive: self.alive(id, now),
            last_seen: heard.map_or(0, |heard| heard.last_seen.0),
            draining: row.draining,
            clock_offset: heard.map_or(0, |heard| heard.clock_offset),
            problem: heard.map(|heard| heard.problem.clone()).unwrap_or_default(),
            replicas: 0,
            leaders: 0,
            registered_at: row.registered_at,
        }
    }

    fn place(&self, group: GroupId, row: pb::GroupRow, now: Time) -> pb::GroupPlace {
        let membership = self.membership(group, &row);
        let (leader, last) = (self.leader(group, now), self.last_lead(group));
        let alive = match last {
            Some(_) => leader.is_some(),
            None => self.patient(now) && membership.is_some(),
        };
        let membership = membership.unwrap_or_default();
        let wanted = row.wanted.unwrap_or_default();
        // RG-11. The row forgets them too, once what is heard is logged.
        let unchanged = membership.index == 0 && same_set(&row.founding, &wanted.voters);
        pb::GroupPlace {
            group: u32::from(group.0),
            leader: leader.map_or(0, |lead| lead.store.0),
            alive,
            last_seen: last.map_or(0, |lead| lead.last_seen.0),
            term: last.map_or(0, |lead| lead.term),
            applied_index: last.map_or(0, |lead| lead.applied_index),
            log_bytes: last.map_or(0, |lead| lead.log_bytes),
            voters: membership.voters,
            learners: membership.learners,
            conf_index: membership.index,
            wanted: wanted.voters,
            preferred: wanted.preferred,
            founding: if unchanged { row.founding } else { Vec::new() },
            progress: leader.map(|lead| lead.progress.clone()).unwrap_or_default(),
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
            reported_blocks: self.reports.get(&id).map_or(0, Reports::count),
            problem,
            read_only: health.is_some_and(|health| health.read_only),
            dead_bytes: health.map_or(0, |health| health.dead_bytes),
            key: if with_keys { row.key } else { bytes::Bytes::new() },
        }
    }
}
