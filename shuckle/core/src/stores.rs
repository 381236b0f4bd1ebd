//! Stores: what their heartbeats say, who is alive, who leads what.

use std::time::Duration;

use eggs_machine::{Table, TableError};
use eggs_proto::{GroupId, StoreId, Time, pb};
use pb::StoreKind;
use pb::registry_command::Command;

use crate::health::{Health, Step, log, registered};
use crate::machine::conflict;
use crate::schema::kind_name;
use crate::{machine, schema, validate};

/// What a store said last.
#[derive(Debug, Clone)]
pub(crate) struct StoreHealth {
    kind: StoreKind,
    host: String,
    pub(crate) address: String,
    boot: u64,
    /// The start before this one: its process must be gone.
    former_boot: Option<u64>,
    pub(crate) last_seen: Time,
    pub(crate) clock_offset: i64,
    pub(crate) problem: String,
}

/// What the leader of a group said last.
#[derive(Debug, Clone)]
pub(crate) struct Lead {
    pub(crate) store: StoreId,
    pub(crate) term: u64,
    /// It did not step down since.
    leading: bool,
    pub(crate) last_seen: Time,
    pub(crate) applied_index: u64,
    pub(crate) log_bytes: u64,
    membership: pb::Membership,
    pub(crate) progress: Vec<pb::ReplicaProgress>,
}

impl Health {
    /// A heartbeat. RG-5, RG-7.
    pub(crate) fn register_store<T: Table + ?Sized>(
        &mut self,
        view: &T,
        op: &pb::RegisterStore,
        now: Time,
    ) -> Result<Result<Step, pb::Error>, TableError> {
        if let Err(error) = validate::register_store(op) {
            return Ok(Err(error));
        }
        let id = StoreId(op.id);
        let row = schema::store(view, id)?;
        let others = schema::stores(view)?;
        let full = row.is_none() && others.len() >= validate::STORES_MAX;
        if full || (!self.stores.contains_key(&id) && self.stores.len() >= 2 * validate::STORES_MAX) {
            let error =
                pb::Error { message: "the cluster has no room for more stores".into(), ..malformed() };
            return Ok(Err(error));
        }
        if let Err(error) = self.one_of_a_kind(row.as_ref(), &others, id, op, now) {
            return Ok(Err(error));
        }
        self.remember(&others, id, op, now);
        let moved = row.is_none_or(|row| row.host != op.host || row.address != op.address);
        if moved {
            let (host, address) = (op.host.clone(), op.address.clone());
            return Ok(Ok(log(Command::PutStore(pb::PutStore { id: op.id, kind: op.kind, host, address }))));
        }
        let groups = self.new_memberships(view, id, op)?;
        if groups.is_empty() {
            return Ok(Ok(registered()));
        }
        Ok(Ok(log(Command::PutGroups(pb::PutGroups { groups }))))
    }

    /// RG-5: one live process per store, one live store of a kind per host.
    fn one_of_a_kind(
        &self,
        row: Option<&pb::StoreRow>,
        others: &[(StoreId, pb::StoreRow)],
        id: StoreId,
        op: &pb::RegisterStore,
        now: Time,
    ) -> Result<(), pb::Error> {
        if let Some(row) = row {
            machine::same_kind(id, row, op.kind())?;
        }
        let heard = self.stores.get(&id);
        let known = heard.map(|heard| &heard.address).or(row.map(|row| &row.address));
        let copies = |at: &str| {
            let text = format!(
                "store {id} of host {} is alive at {at}, asked for {}: two copies of one data directory?",
                op.host, op.address
            );
            Err(conflict(text))
        };
        if let Some(address) = known.filter(|address| **address != op.address && self.alive(id, now)) {
            return copies(address);
        }
        if let Some(heard) = heard {
            if heard.kind != op.kind() {
                return Err(conflict(format!("store {id} is a {} store", kind_name(heard.kind))));
            }
            // A process that was followed by another at its address, and yet speaks.
            let by = self.replaced.get(&id).filter(|by| heard.boot == op.boot && self.alive(**by, now));
            if by.is_some() || (heard.former_boot == Some(op.boot) && self.alive(id, now)) {
                return copies(&heard.address);
            }
        }
        // Same address: the process that had the port is gone, and its disk with it.
        let other = self
            .on_host(others, op)
            .find(|(other, address)| *other != id && *address != op.address && self.alive(*other, now));
        let Some((other, address)) = other else { return Ok(()) };
        let kind = kind_name(op.kind());
        Err(conflict(format!(
            "host {} has a live {kind} store {other} at {address}, asked for {id} at {}: give each host its own --host",
            op.host, op.address
        )))
    }

    /// The stores of that kind on that host, with their addresses.
    fn on_host<'a>(
        &'a self,
        rows: &'a [(StoreId, pb::StoreRow)],
        op: &'a pb::RegisterStore,
    ) -> impl Iterator<Item = (StoreId, &'a str)> {
        let heard = self.stores.iter().filter(|(_, heard)| heard.kind == op.kind() && heard.host == op.host);
        let heard = heard.map(|(&id, heard)| (id, heard.address.as_str()));
        let unheard = rows
            .iter()
            .filter(|(id, row)| !self.stores.contains_key(id) && row.kind == op.kind && row.host == op.host);
        heard.chain(unheard.map(|(id, row)| (*id, row.address.as_str())))
    }

    fn remember(&mut self, rows: &[(StoreId, pb::StoreRow)], id: StoreId, op: &pb::RegisterStore, now: Time) {
        let replaced: Vec<StoreId> = self
            .on_host(rows, op)
            .filter(|(other, at)| *other != id && *at == op.address)
            .map(|(other, _)| other)
            .collect();
        self.replaced.extend(replaced.into_iter().map(|other| (other, id)));
        self.replaced.remove(&id);
        let before = self.stores.get(&id);
        let former_boot = match before {
            Some(before) if before.boot != op.boot => Some(before.boot),
            Some(before) => before.former_boot,
            None => None,
        };
        let health = StoreHealth {
            kind: op.kind(),
            host: op.host.clone(),
            address: op.address.clone(),
            boot: op.boot,
            former_boot,
            last_seen: now,
            clock_offset: op.clock_offset,
            problem: op.problem.clone(),
        };
        self.stores.insert(id, health);
        for lead in self.leads.values_mut().filter(|lead| lead.store == id) {
            lead.leading = false;
        }
        for led in &op.led {
            let Ok(group) = validate::group(led.group) else { continue };
            // RG-13: of two claims the higher term wins.
            if self.leads.get(&group).is_some_and(|lead| lead.store != id && lead.term > led.term) {
                continue;
            }
            if group == GroupId::CROSSDIR {
                self.transactions = op.transactions;
                self.slow_transactions.clone_from(&op.slow_transactions);
            }
            self.leads.insert(group, Lead::of(id, led, now));
        }
    }

    /// RG-7: those that say something new.
    fn new_memberships<T: Table + ?Sized>(
        &self,
        view: &T,
        id: StoreId,
        op: &pb::RegisterStore,
    ) -> Result<Vec<pb::PutGroup>, TableError> {
        let mut puts = Vec::new();
        for led in &op.led {
            let Ok(group) = validate::group(led.group) else { continue };
            let Some(lead) = self.leads.get(&group).filter(|lead| lead.store == id) else { continue };
            let known = schema::group(view, group)?.and_then(|row| row.membership);
            let news = match &known {
                None => true,
                Some(known) => known.index <= lead.membership.index && *known != lead.membership,
            };
            if news {
                let membership = Some(lead.membership.clone());
                puts.push(pb::PutGroup { group: led.group, founding: Vec::new(), wanted: None, membership });
            }
        }
        Ok(puts)
    }

    // ---- what is known ----

    /// Heard of lately; or not since the start, and it is too early to make anything of that.
    pub(crate) fn alive(&self, id: StoreId, now: Time) -> bool {
        match self.stores.get(&id) {
            _ if self.replaced.contains_key(&id) => false,
            Some(heard) => Self::fresh(heard.last_seen, now),
            None => self.patient(now),
        }
    }

    /// Not heard of since the start, and not known to be gone.
    pub(crate) fn is_awaited(&self, id: StoreId) -> bool {
        !self.stores.contains_key(&id) && !self.replaced.contains_key(&id)
    }

    /// Heard of lately.
    pub(crate) fn heard(&self, id: StoreId, now: Time) -> Option<&StoreHealth> {
        self.stores.get(&id).filter(|_| self.alive(id, now))
    }

    /// How long it has not been heard of; of one never heard of: since the registry started.
    pub(crate) fn silent_for(&self, id: StoreId, now: Time) -> Duration {
        now.since(self.stores.get(&id).map_or(self.started_at, |heard| heard.last_seen))
    }

    /// The store that leads the group, as heard lately.
    pub(crate) fn leader(&self, group: GroupId, now: Time) -> Option<&Lead> {
        self.leads.get(&group).filter(|lead| lead.leading && self.heard(lead.store, now).is_some())
    }

    /// What the last leader said, also when it is gone.
    pub(crate) fn last_lead(&self, group: GroupId) -> Option<&Lead> {
        self.leads.get(&group)
    }

    /// Who replicates the group: as logged, or as heard since.
    pub(crate) fn membership(&self, group: GroupId, row: &pb::GroupRow) -> Option<pb::Membership> {
        let heard = self.leads.get(&group).map(|lead| &lead.membership);
        match (heard, &row.membership) {
            (Some(heard), Some(logged)) if heard.index < logged.index => Some(logged.clone()),
            (Some(heard), _) => Some(heard.clone()),
            (None, logged) => logged.clone(),
        }
    }
}

impl Lead {
    fn of(store: StoreId, led: &pb::LedGroup, now: Time) -> Lead {
        let sorted = |ids: &[u64]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids
        };
        Lead {
            store,
            term: led.term,
            leading: true,
            last_seen: now,
            applied_index: led.applied_index,
            log_bytes: led.log_bytes,
            membership: pb::Membership {
                voters: sorted(&led.voters),
                learners: sorted(&led.learners),
                index: led.conf_index,
            },
            progress: led.progress.clone(),
        }
    }
}

fn malformed() -> pb::Error {
    use eggs_proto::{RegistryError, ServiceError};
    RegistryError::Malformed.bare()
}

/// As people name a group of stores' trouble: `shard store 0x… on host c`.
pub(crate) fn name(id: StoreId, row: &pb::StoreRow) -> String {
    format!("{} store {id} on host {}", kind_name(row.kind()), row.host)
}
