//! What people ask of the members of groups: other replicas, another leader, a host drained. Each
//! refusal says in one line which stores and hosts it is about.

use std::collections::{BTreeMap, BTreeSet};

use eggs_machine::{Table, TableError};
use eggs_proto::limits::STALE_AFTER;
use eggs_proto::{GroupId, RegistryError, ServiceError, StoreId, Time, pb};
use pb::registry_command::Command;

use crate::health::{Health, Step, log, registered};
use crate::machine::{of_kind, same_set, unknown_host};
use crate::stores::name;
use crate::{schema, validate};

type Rows = BTreeMap<StoreId, pb::StoreRow>;

impl Health {
    /// Sets the voters a group is to have, and who is to lead it. RG-14. `Busy` instead of a refusal while this leader may
    /// only not have heard of a store yet.
    pub(crate) fn set_replicas<T: Table + ?Sized>(
        &self,
        view: &T,
        op: &pb::SetReplicas,
        now: Time,
    ) -> Result<Result<Step, pb::Error>, TableError> {
        let group = match validate::group(op.group) {
            Ok(group) => group,
            Err(error) => return Ok(Err(error)),
        };
        let replicas = schema::meta(view)?.map_or(1, |meta| meta.replicas) as usize;
        let row = schema::group(view, group)?.unwrap_or_default();
        let rows: Rows = schema::stores(view)?.into_iter().collect();
        let present = self.membership(group, &row);
        let current = row.wanted.clone().or_else(|| {
            let voters = present.as_ref()?.voters.clone();
            Some(pb::WantedReplicas { voters, ..pb::WantedReplicas::default() })
        });
        let (Some(current), Some(present)) = (current, present) else {
            let what = format_args!("{group}, which has not had a leader yet,");
            return Ok(Err(RegistryError::UnknownMember.with(what)));
        };
        let mut voters = if op.wanted.is_empty() { current.voters.clone() } else { op.wanted.clone() };
        voters.sort_unstable();
        let preferred = match op.preferred {
            0 if voters.contains(&current.preferred) => current.preferred,
            preferred => preferred,
        };
        let wanted = pb::WantedReplicas {
            few: voters.len() < replicas && (op.force || current.few),
            leader_chosen: op.preferred != 0 || (current.leader_chosen && preferred == current.preferred),
            voters,
            preferred,
        };
        let check = Check { health: self, rows: &rows, group, replicas, now };
        let checked = check.possible(&wanted).and_then(|()| match op.force {
            true => Ok(()),
            false => check.safe(&wanted, &current, &present, op.preferred),
        });
        if let Err(error) = checked {
            let unheard = wanted.voters.iter().chain(&present.voters).any(|&id| {
                let id = StoreId(id);
                rows.contains_key(&id) && !self.stores.contains_key(&id)
            });
            let is_new = now.since(self.started_at) < STALE_AFTER;
            if is_new && unheard && error.code == RegistryError::TooFewReplicas.code() {
                // It may be wrong; asked again, it is right in a moment.
                let what = format_args!(
                    "it leads since a moment ago, and as far as it has heard: {}",
                    error.message
                );
                return Ok(Err(RegistryError::Busy.with(what)));
            }
            return Ok(Err(error));
        }
        let same = pb::WantedReplicas { voters: current.voters.clone(), ..wanted.clone() } == current;
        if same && same_set(&wanted.voters, &current.voters) {
            return Ok(Ok(registered()));
        }
        let put =
            pb::PutGroup { group: op.group, founding: Vec::new(), wanted: Some(wanted), membership: None };
        Ok(Ok(log(Command::PutGroups(pb::PutGroups { groups: vec![put] }))))
    }
}

pub(crate) fn drain_host<T: Table + ?Sized>(
    view: &T,
    op: &pb::DrainHost,
) -> Result<Result<Step, pb::Error>, TableError> {
    let mut stores = schema::stores(view)?;
    stores.retain(|(_, row)| row.host == op.host);
    if stores.is_empty() {
        return Ok(Err(unknown_host(&op.host)));
    }
    let changes = stores.iter().any(|(_, row)| row.draining == op.undo);
    Ok(Ok(if changes { log(Command::DrainHost(op.clone())) } else { registered() }))
}

struct Check<'a> {
    health: &'a Health,
    rows: &'a Rows,
    group: GroupId,
    replicas: usize,
    now: Time,
}

impl Check<'_> {
    /// What no force makes possible.
    fn possible(&self, wanted: &pb::WantedReplicas) -> Result<(), pb::Error> {
        validate::members(&wanted.voters, &[])?;
        for id in wanted.voters.iter().copied().map(StoreId) {
            let row = self.rows.get(&id);
            let row = row.ok_or_else(|| RegistryError::UnknownMember.with(format_args!("store {id}")))?;
            of_kind(self.group, id, row)?;
        }
        if wanted.preferred != 0 && !wanted.voters.contains(&wanted.preferred) {
            let what =
                format_args!("store {} is not to be a voter of {}", StoreId(wanted.preferred), self.group);
            return Err(RegistryError::Malformed.with(what));
        }
        Ok(())
    }

    /// What needs force.
    fn safe(
        &self,
        wanted: &pb::WantedReplicas,
        current: &pb::WantedReplicas,
        present: &pb::Membership,
        leader: u64,
    ) -> Result<(), pb::Error> {
        let mut hosts: BTreeMap<&str, StoreId> = BTreeMap::new();
        for id in wanted.voters.iter().copied().map(StoreId) {
            let Some(row) = self.rows.get(&id) else { continue };
            if let Some(other) = hosts.insert(&row.host, id) {
                let (group, host) = (self.group, &row.host);
                return Err(too_few(format!(
                    "{group}: stores {other} and {id} are both on host {host}, which fails as a whole"
                )));
            }
            let is_new = !current.voters.contains(&id.0);
            if is_new && row.draining {
                return Err(too_few(format!("{}: the {} is being drained", self.group, name(id, row))));
            }
            if (is_new || id.0 == leader) && self.health.heard(id, self.now).is_none() {
                return Err(too_few(format!("{}: the {} is not alive", self.group, name(id, row))));
            }
        }
        let (count, grows) =
            (wanted.voters.len(), current.voters.iter().all(|id| wanted.voters.contains(id)));
        if count < self.replicas && !grows {
            let (group, replicas) = (self.group, self.replicas);
            return Err(too_few(format!("{group}: {count} of {replicas} replicas would be left")));
        }
        self.quorum(&wanted.voters, "would have")?;
        self.quorum(&present.voters, "has")
    }

    fn quorum(&self, voters: &[u64], has: &str) -> Result<(), pb::Error> {
        let away = voters.iter().copied().map(StoreId).filter(|&id| !self.health.alive(id, self.now));
        let away: Vec<StoreId> = away.collect();
        if voters.len() - away.len() > voters.len() / 2 {
            return Ok(());
        }
        let hosts: BTreeSet<&str> =
            away.iter().filter_map(|id| self.rows.get(id)).map(|row| row.host.as_str()).collect();
        let hosts: Vec<&str> = hosts.into_iter().collect();
        Err(too_few(format!("{} {has} no quorum: not alive on {}", self.group, hosts.join(", "))))
    }
}

fn too_few(what: String) -> pb::Error {
    pb::Error {
        message: format!("{what} (--force to do it all the same)"),
        ..RegistryError::TooFewReplicas.bare()
    }
}
