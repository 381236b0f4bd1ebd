//! Who is to replicate and lead what: a pure function of the rows and of what is heard.
//!
//! In this order, for the stores and groups of each kind: found the groups once there are hosts enough;
//! replace stores that are lost, fill groups that have too few voters, empty hosts that are drained; and
//! only when nothing of that is left and every group is as it is to be, level how many replicas, and then how
//! many leaders, the stores have. Every levelling step makes the sum of the squares of the loads smaller,
//! so it ends. A group without a live leader is left alone: nobody could change it (RG-16).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use eggs_machine::{Table, TableError};
use eggs_proto::limits::CLOCK_OFFSET_MAX;
use eggs_proto::{GroupId, StoreId, Time, pb};
use pb::StoreKind;

use crate::health::Health;
use crate::machine::same_set;
use crate::schema::{self, groups_of};

/// Groups of a kind that are on their way to other members at once: each costs a snapshot.
const CHANGES_AT_ONCE: usize = 64;
/// Of those that move only to level the load: there is no hurry.
const MOVES_AT_ONCE: usize = 8;
/// Leaders moved at once; each costs its group a moment.
const TRANSFERS_AT_ONCE: usize = 8;
/// Stores whose numbers of replicas differ by this much are levelled.
const UNEVEN_REPLICAS: usize = 2;
/// And of leaders: one more, so that what people choose is not undone at once.
const UNEVEN_LEADERS: usize = 3;

/// What is to change about groups, to be logged as one `PutGroups`; nothing most of the time. To be asked
/// again only when that has been applied.
///
/// # Errors
/// When the table fails.
pub fn plan<T: Table + ?Sized>(
    view: &T,
    health: &Health,
    now: Time,
) -> Result<Vec<pb::PutGroup>, TableError> {
    let Some(meta) = schema::meta(view)? else { return Ok(Vec::new()) };
    let stores = schema::stores(view)?;
    let rows: BTreeMap<GroupId, pb::GroupRow> = schema::groups(view)?.into_iter().collect();
    let replicas = meta.replicas as usize;
    let mut puts = Vec::new();
    for kind in [StoreKind::StoreShuckle, StoreKind::StoreCrossdir, StoreKind::StoreShard] {
        let groups = groups_of(kind).take_while(|group| group.shard().is_none() || group.0 < health.shards);
        let groups = groups.filter_map(|group| Group::of(health, replicas, group, rows.get(&group), now));
        let mut plan = Plan::new(groups.collect());
        for (id, row) in stores.iter().filter(|(_, row)| row.kind() == kind) {
            plan.stores.insert(*id, Store::of(health, *id, row, &stores, now));
        }
        plan.run();
        puts.extend(plan.into_puts());
    }
    Ok(puts)
}

#[derive(Debug)]
struct Store {
    host: String,
    /// Heard of lately.
    alive: bool,
    draining: bool,
    /// Takes new replicas.
    usable: bool,
    /// Can lead, as far as its clock goes.
    on_time: bool,
    /// It will not come back: others are to take its place.
    lost: bool,
}

impl Store {
    fn of(
        health: &Health,
        id: StoreId,
        row: &pb::StoreRow,
        all: &[(StoreId, pb::StoreRow)],
        now: Time,
    ) -> Store {
        let heard = health.heard(id, now);
        let offset = heard.map_or(0, |heard| heard.clock_offset);
        // Its host has another disk in its place.
        let replaced = || {
            all.iter().any(|(other, its)| {
                its.kind == row.kind
                    && its.host == row.host
                    && its.registered_at > row.registered_at
                    && health.heard(*other, now).is_some()
            })
        };
        let silent = heard.is_none() && !health.patient(now);
        let on_time = u128::from(offset.unsigned_abs()) <= CLOCK_OFFSET_MAX.as_nanos();
        Store {
            host: row.host.clone(),
            alive: heard.is_some(),
            draining: row.draining,
            // That its clock is off is a problem for leaders only.
            usable: heard.is_some_and(|heard| heard.problem.is_empty() || !on_time) && !row.draining,
            on_time,
            lost: silent && (health.silent_for(id, now) >= health.replace_after || replaced()),
        }
    }
}

#[derive(Debug)]
struct Group {
    id: GroupId,
    /// Not even wanted by anybody yet.
    new: bool,
    /// The voters it is to have, and has been told so or (the registry's own at its founding) has already.
    voters: Vec<StoreId>,
    preferred: StoreId,
    /// How many voters it is to have: people may have forced fewer.
    replicas: usize,
    few: bool,
    /// People chose who leads: not levelled.
    leader_chosen: bool,
    /// Somebody leads it who could change it.
    led: bool,
    /// It has the members it is to have.
    settled: bool,
    changed: bool,
}

impl Group {
    /// `None`: the registry's own group before anything is known of it.
    fn of(
        health: &Health,
        replicas: usize,
        id: GroupId,
        row: Option<&pb::GroupRow>,
        now: Time,
    ) -> Option<Group> {
        let row = row.cloned().unwrap_or_default();
        let members = health.membership(id, &row);
        let wanted = row.wanted.as_ref();
        let voters = match (wanted, &members) {
            (Some(wanted), _) => &wanted.voters[..],
            (None, Some(members)) => &members.voters,
            (None, None) if id == GroupId::SHUCKLE => return None,
            (None, None) => &[],
        };
        let settled =
            members.as_ref().is_some_and(|now| now.learners.is_empty() && same_set(&now.voters, voters));
        let few = wanted.is_some_and(|wanted| wanted.few);
        Some(Group {
            replicas: if few { voters.len().min(replicas) } else { replicas },
            few,
            leader_chosen: wanted.is_some_and(|wanted| wanted.leader_chosen),
            id,
            new: voters.is_empty(),
            voters: voters.iter().copied().map(StoreId).collect(),
            preferred: StoreId(wanted.map_or(0, |wanted| wanted.preferred)),
            led: health.leader(id, now).is_some(),
            settled,
            changed: false,
        })
    }
}

#[derive(Debug)]
struct Plan {
    stores: BTreeMap<StoreId, Store>,
    groups: Vec<Group>,
    /// Replicas each store is to have, and groups it is to lead.
    load: BTreeMap<StoreId, usize>,
    leads: BTreeMap<StoreId, usize>,
}

impl Plan {
    fn new(groups: Vec<Group>) -> Plan {
        let (mut load, mut leads) = (BTreeMap::new(), BTreeMap::new());
        for group in &groups {
            for &id in &group.voters {
                *load.entry(id).or_default() += 1;
            }
            *leads.entry(group.preferred).or_default() += 1;
        }
        Plan { stores: BTreeMap::new(), groups, load, leads }
    }

    fn run(&mut self) {
        self.found();
        self.repair();
        self.name_leaders();
        // Anything but calm: levelling waits.
        let whole = |group: &Group| {
            group.voters.iter().all(|id| self.stores.get(id).is_some_and(|store| store.alive))
        };
        let calm = |group: &Group| group.led && group.settled && !group.changed && whole(group);
        if !self.groups.iter().all(calm) {
            return;
        }
        self.level_replicas();
        if self.groups.iter().all(|group| !group.changed) {
            self.level_leaders();
        }
    }

    fn into_puts(self) -> impl Iterator<Item = pb::PutGroup> {
        self.groups.into_iter().filter(|group| group.changed).map(|group| {
            let voters: Vec<u64> = group.voters.iter().map(|id| id.0).collect();
            pb::PutGroup {
                group: u32::from(group.id.0),
                founding: if group.new { voters.clone() } else { Vec::new() },
                wanted: Some(pb::WantedReplicas {
                    voters,
                    preferred: group.preferred.0,
                    few: group.few,
                    leader_chosen: group.leader_chosen,
                }),
                membership: None,
            }
        })
    }

    fn host(&self, id: StoreId) -> Option<&str> {
        self.stores.get(&id).map(|store| store.host.as_str())
    }

    fn load(&self, id: StoreId) -> usize {
        self.load.get(&id).copied().unwrap_or_default()
    }

    fn leads(&self, id: StoreId) -> usize {
        self.leads.get(&id).copied().unwrap_or_default()
    }

    fn set_voters(&mut self, at: usize, mut voters: Vec<StoreId>) {
        voters.sort_unstable();
        let group = &mut self.groups[at];
        let before = std::mem::replace(&mut group.voters, voters);
        group.changed = true;
        for &id in &group.voters {
            *self.load.entry(id).or_default() += 1;
        }
        for id in before {
            if let Some(load) = self.load.get_mut(&id) {
                *load = load.saturating_sub(1);
            }
        }
    }

    fn set_preferred(&mut self, at: usize, preferred: StoreId) {
        let before = std::mem::replace(&mut self.groups[at].preferred, preferred);
        // Whoever people chose cannot any more.
        self.groups[at].leader_chosen = false;
        self.groups[at].changed = true;
        *self.leads.entry(preferred).or_default() += 1;
        if let Some(leads) = self.leads.get_mut(&before) {
            *leads = leads.saturating_sub(1);
        }
    }

    // ---- what has to be done ----

    /// Once there are hosts enough: all groups of the kind at once.
    fn found(&mut self) {
        for at in 0..self.groups.len() {
            if self.groups[at].new {
                let voters = self.fill(&self.groups[at], Vec::new());
                if voters.len() < self.groups[at].replicas {
                    return;
                }
                self.set_voters(at, voters);
            }
        }
    }

    /// `voters`, and as many of the least loaded usable stores on other hosts as are needed and there are.
    fn fill(&self, group: &Group, mut voters: Vec<StoreId>) -> Vec<StoreId> {
        let mut hosts: BTreeSet<&str> = voters.iter().filter_map(|&id| self.host(id)).collect();
        let usable = self.stores.iter().filter(|(id, store)| store.usable && !voters.contains(id));
        let mut usable: Vec<(usize, u64, StoreId)> =
            usable.map(|(&id, _)| (self.load(id), mix(group.id, id), id)).collect();
        usable.sort_unstable();
        for (_, _, id) in usable {
            if voters.len() >= group.replicas {
                break;
            }
            if self.host(id).is_some_and(|host| hosts.insert(host)) {
                voters.push(id);
            }
        }
        voters
    }

    /// RG-15: lost ones first, then drained ones; a bounded number of groups at a time.
    fn repair(&mut self) {
        let mut moving = self.groups.iter().filter(|group| group.led && !group.settled).count();
        for urgent in [true, false] {
            for at in 0..self.groups.len() {
                let group = &self.groups[at];
                if group.new || group.changed || !group.led {
                    continue;
                }
                let short = group.voters.len() < group.replicas;
                let lost = |id: &StoreId| self.stores.get(id).is_none_or(|store| store.lost);
                if urgent != (short || group.voters.iter().any(lost)) {
                    continue;
                }
                // One that moves already may as well move elsewhere.
                if group.settled && moving >= CHANGES_AT_ONCE {
                    continue;
                }
                let voters = self.repaired(group);
                if voters.len() == group.voters.len() && voters.iter().all(|id| group.voters.contains(id)) {
                    continue;
                }
                moving += usize::from(group.settled);
                self.set_voters(at, voters);
            }
        }
    }

    /// The voters it should have: those that are well, others for those that are not; and when there are
    /// none, those that are not so well, the better ones first.
    fn repaired(&self, group: &Group) -> Vec<StoreId> {
        let mut ranked: Vec<(u8, StoreId)> =
            group.voters.iter().map(|&id| (self.stores.get(&id).map_or(9, rank), id)).collect();
        ranked.sort_unstable();
        let mut hosts = BTreeSet::new();
        let mut keep = Vec::new();
        let mut doubtful = Vec::new();
        for (rank, id) in ranked {
            if rank <= AWAY && self.host(id).is_some_and(|host| hosts.insert(host)) {
                keep.push(id);
            } else {
                doubtful.push(id);
            }
        }
        let mut voters = self.fill(group, keep);
        let enough = group.replicas.min(group.voters.len());
        // A host of its own is better than one that is taken.
        for shared in [false, true] {
            for &id in &doubtful {
                let taken = voters.iter().any(|&other| self.host(other) == self.host(id));
                if voters.len() < enough && taken == shared && !voters.contains(&id) {
                    voters.push(id);
                }
            }
        }
        voters
    }

    // ---- leaders ----

    /// Every group is to have somebody who is to lead it.
    fn name_leaders(&mut self) {
        for at in 0..self.groups.len() {
            let group = &self.groups[at];
            let new = group.new && group.changed;
            if group.voters.contains(&group.preferred)
                && self.stores.get(&group.preferred).is_some_and(can_lead)
                || !(group.led || new)
            {
                continue;
            }
            let able =
                |id: &&StoreId| self.stores.get(id).is_some_and(|store| can_lead(store) && store.alive);
            let best =
                group.voters.iter().filter(able).min_by_key(|&&id| (self.leads(id), mix(group.id, id)));
            match best.copied() {
                Some(best) => self.set_preferred(at, best),
                None if group.preferred != StoreId(0) && !group.voters.contains(&group.preferred) => {
                    self.set_preferred(at, StoreId(0));
                }
                None => {}
            }
        }
    }

    // ---- levelling ----

    fn usable(&self) -> Vec<StoreId> {
        self.stores.iter().filter(|(_, store)| store.usable).map(|(&id, _)| id).collect()
    }

    fn level_replicas(&mut self) {
        for _ in 0..MOVES_AT_ONCE {
            let Some((at, from, to)) = self.uneven() else { return };
            let mut voters = self.groups[at].voters.clone();
            voters.retain(|&id| id != from);
            voters.push(to);
            self.set_voters(at, voters);
            if self.groups[at].preferred == from {
                self.name_leaders();
            }
        }
    }

    /// A replica that makes the load more even by moving, the fullest and the emptiest store first.
    fn uneven(&self) -> Option<(usize, StoreId, StoreId)> {
        let mut stores = self.usable();
        stores.sort_by_key(|&id| (self.load(id), id));
        for &from in stores.iter().rev() {
            for &to in &stores {
                if self.load(from) < self.load(to) + UNEVEN_REPLICAS {
                    break;
                }
                let movable = |group: &Group| {
                    let others = || group.voters.iter().filter(|&&id| id != from);
                    let stays = group.changed || (group.leader_chosen && group.preferred == from);
                    !stays
                        && group.voters.contains(&from)
                        && others().all(|&id| id != to && self.host(id) != self.host(to))
                };
                // Rather not one that leads there; people try things on the low numbers, so rather not those.
                let found = self.groups.iter().enumerate().filter(|(_, group)| movable(group));
                let best = found.max_by_key(|(at, group)| (group.preferred != from, *at));
                if let Some((at, _)) = best {
                    return Some((at, from, to));
                }
            }
        }
        None
    }

    fn level_leaders(&mut self) {
        let mut moves = 0;
        while moves < TRANSFERS_AT_ONCE {
            let Some(path) = self.leader_path() else { return };
            moves += path.len();
            for (at, to) in path {
                self.set_preferred(at, to);
            }
        }
    }

    /// Transfers that take one group from the store that leads too many to one that leads fewer, through
    /// others when they share none: a shortest path.
    fn leader_path(&self) -> Option<Vec<(usize, StoreId)>> {
        let able: BTreeSet<StoreId> =
            self.usable().into_iter().filter(|id| self.stores.get(id).is_some_and(can_lead)).collect();
        let mut by_leads: Vec<StoreId> = able.iter().copied().collect();
        by_leads.sort_by_key(|&id| (std::cmp::Reverse(self.leads(id)), id));
        by_leads.into_iter().find_map(|from| self.leader_path_from(from, &able))
    }

    fn leader_path_from(&self, from: StoreId, able: &BTreeSet<StoreId>) -> Option<Vec<(usize, StoreId)>> {
        let most = self.leads(from);
        let mut came: BTreeMap<StoreId, (StoreId, usize)> = BTreeMap::new();
        let mut queue = VecDeque::from([from]);
        while let Some(here) = queue.pop_front() {
            if self.leads(here) + UNEVEN_LEADERS <= most {
                let (mut path, mut to) = (Vec::new(), here);
                while let Some(&(before, at)) = came.get(&to) {
                    path.push((at, to));
                    to = before;
                }
                return Some(path);
            }
            for (at, group) in self.groups.iter().enumerate().rev() {
                if group.preferred != here || group.leader_chosen {
                    continue;
                }
                for &to in group.voters.iter().filter(|id| able.contains(id) && **id != from) {
                    if let std::collections::btree_map::Entry::Vacant(entry) = came.entry(to) {
                        entry.insert((here, at));
                        queue.push_back(to);
                    }
                }
            }
        }
        None
    }
}

/// Up to here a store keeps what it has: it is well, or away for a moment.
const AWAY: u8 = 1;

/// How gladly a store's replicas are kept; 0 best.
fn rank(store: &Store) -> u8 {
    match (store.lost, store.draining, store.alive) {
        (false, false, true) => 0,
        (false, false, false) => AWAY,
        (false, true, true) => 2,
        (false, true, false) => 3,
        (true, ..) => 4,
    }
}

fn can_lead(store: &Store) -> bool {
    store.on_time && !store.lost && !store.draining
}

/// Which of equals, differently for every group, so that not always the same stores share groups
/// (SplitMix64's finalizer; Steele, Lea, Flood 2014).
fn mix(group: GroupId, store: StoreId) -> u64 {
    let mut z = store.0 ^ (u64::from(group.0) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
#[path = "planner_tests.rs"]
mod tests;
