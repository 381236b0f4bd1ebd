//! Clusters that things happen to, and what the planner makes of them.

use std::time::Duration;

use eggs_machine::MemoryTable;
use eggs_proto::limits::STALE_AFTER;
use pb::StoreKind::{StoreCrossdir, StoreShard, StoreShuckle};
use pb::registry_command::Command;
use pb::registry_reply::Result as Reply;
use pb::registry_request::Op;
use proptest::prelude::*;

use super::*;
use crate::machine::tests::{apply, founded};
use crate::{Step, kind_of};

const SHARDS: u16 = 12;
/// More rounds than it can take: each replica may move once, a few at a time.
const ROUNDS_MAX: usize = 200;

/// A store as it really is.
#[derive(Debug, Clone)]
struct Real {
    id: u64,
    kind: StoreKind,
    host: usize,
    up: bool,
    offset: i64,
}

/// A group as it really is.
#[derive(Debug, Clone, Default)]
struct Replicated {
    voters: Vec<u64>,
    index: u64,
    term: u64,
    leader: u64,
}

/// A cluster whose leaders do what the registry wants in one round, when they have a quorum.
struct World {
    table: MemoryTable,
    health: Health,
    now: u64,
    replicas: usize,
    stores: Vec<Real>,
    groups: BTreeMap<GroupId, Replicated>,
    next: u64,
}

impl World {
    fn new(replicas: u32) -> World {
        let mut table = MemoryTable::default();
        apply(&mut table, 1, founded(1, replicas));
        let health = Health::new(Time(1 << 40), Duration::ZERO).with_shards(SHARDS);
        let mut world = World {
            table,
            health,
            now: 1 << 40,
            replicas: replicas as usize,
            stores: Vec::new(),
            groups: BTreeMap::new(),
            next: 1,
        };
        world.host(0);
        let first = world.stores.iter().find(|store| store.kind == StoreShuckle).unwrap().id;
        world.groups.insert(GroupId::SHUCKLE, Replicated { voters: vec![first], ..Replicated::default() });
        world
    }

    /// A host with a store of every kind.
    fn host(&mut self, host: usize) {
        for kind in [StoreShard, StoreCrossdir, StoreShuckle] {
            self.disk(host, kind);
        }
    }

    /// A new disk, in the place of the one that was there.
    fn disk(&mut self, host: usize, kind: StoreKind) {
        self.stores.retain(|store| store.host != host || store.kind != kind);
        self.stores.push(Real { id: self.next, kind, host, up: true, offset: 0 });
        self.next += 1;
    }

    fn up(&self, id: u64) -> bool {
        self.stores.iter().any(|store| store.id == id && store.up)
    }

    /// As far as the registry knows.
    fn heard(&self, id: u64) -> bool {
        self.health.heard(StoreId(id), Time(self.now)).is_some()
    }

    fn ask(&mut self, op: &Op) -> Option<Reply> {
        self.now += 1;
        match self.health.request(&self.table, op, true, Time(self.now)).unwrap() {
            Step::Answer(reply) => Some(reply),
            Step::Log(command) => Some(apply(&mut self.table, self.now, command.command.unwrap())),
        }
    }

    fn wanted(&self, group: GroupId) -> pb::WantedReplicas {
        schema::group(&self.table, group).unwrap().and_then(|row| row.wanted).unwrap_or_default()
    }

    /// Groups found themselves, elect, change their members; everybody registers.
    fn live(&mut self) {
        self.now += 1_000_000_000;
        for (group, row) in schema::groups(&self.table).unwrap() {
            let real = self.groups.entry(group).or_default();
            if real.voters.is_empty() {
                assert!(!row.founding.is_empty(), "{group}");
                real.voters.clone_from(&row.founding);
            }
        }
        for group in self.groups.keys().copied().collect::<Vec<_>>() {
            let (mut real, wanted) = (self.groups[&group].clone(), self.wanted(group));
            let live: Vec<u64> = real.voters.iter().copied().filter(|&id| self.up(id)).collect();
            let quorum = live.len() > real.voters.len() / 2;
            let there = wanted.voters.iter().all(|id| real.voters.contains(id) || self.up(*id));
            if quorum && there && !wanted.voters.is_empty() && !same_set(&wanted.voters, &real.voters) {
                real.voters.clone_from(&wanted.voters);
                real.index += 1;
            }
            let live: Vec<u64> = real.voters.iter().copied().filter(|&id| self.up(id)).collect();
            let leader = match live.len() > real.voters.len() / 2 {
                true if live.contains(&wanted.preferred) => wanted.preferred,
                true if live.contains(&real.leader) => real.leader,
                true => live[0],
                false => 0,
            };
            real.term += u64::from(leader != real.leader);
            real.leader = leader;
            self.groups.insert(group, real);
        }
        for store in self.stores.clone().into_iter().filter(|store| store.up) {
            let led = self.groups.iter().filter(|(_, real)| real.leader == store.id);
            let led = led.map(|(group, real)| pb::LedGroup {
                group: u32::from(group.0),
                term: real.term,
                voters: real.voters.clone(),
                conf_index: real.index,
                ..Default::default()
            });
            let op = Op::RegisterStore(pb::RegisterStore {
                id: store.id,
                kind: store.kind.into(),
                host: format!("h{}", store.host),
                address: format!("h{}:{}", store.host, 5000 + store.kind as i32),
                led: led.collect(),
                boot: 1,
                clock_offset: store.offset,
                ..Default::default()
            });
            for _ in 0..2 {
                let reply = self.ask(&op);
                assert_eq!(reply, Some(Reply::Registered(pb::Registered {})), "{store:?}");
            }
        }
    }

    /// Plans and applies; how many groups.
    fn plan(&mut self) -> usize {
        let groups = plan(&self.table, &self.health, Time(self.now)).unwrap();
        assert_eq!(groups, plan(&self.table, &self.health, Time(self.now)).unwrap(), "the same again");
        for put in &groups {
            self.check(put);
        }
        let planned = groups.len();
        if planned > 0 {
            let reply = apply(&mut self.table, self.now, Command::PutGroups(pb::PutGroups { groups }));
            assert_eq!(reply, Reply::Registered(pb::Registered {}), "RG-10");
        }
        planned
    }

    fn host_of(&self, id: u64) -> Option<String> {
        schema::store(&self.table, StoreId(id)).unwrap().map(|row| row.host)
    }

    /// Live hosts that may take replicas of the group.
    fn hosts_for(&self, group: GroupId) -> BTreeSet<String> {
        let rows = schema::stores(&self.table).unwrap().into_iter();
        let usable =
            rows.filter(|(id, row)| Some(row.kind()) == kind_of(group) && !row.draining && self.heard(id.0));
        usable.map(|(_, row)| row.host).collect()
    }

    /// RG-15.
    fn check(&self, put: &pb::PutGroup) {
        let group = GroupId(u16::try_from(put.group).unwrap());
        let wanted = put.wanted.as_ref().unwrap();
        let before = self.wanted(group).voters;
        let hosts: BTreeSet<String> = wanted.voters.iter().filter_map(|&id| self.host_of(id)).collect();
        let possible = self.hosts_for(group);
        let replicas = if wanted.few { before.len() } else { self.replicas };
        assert!(wanted.voters.len() >= replicas.min(possible.len()), "{group}: {wanted:?}");
        assert!(before.len() < replicas || wanted.voters.len() >= replicas, "{group}: {wanted:?}");
        assert!(wanted.preferred == 0 || wanted.voters.contains(&wanted.preferred));
        if possible.len() >= self.replicas {
            assert_eq!(hosts.len(), wanted.voters.len(), "two voters on one host: {group}: {wanted:?}");
        }
        for id in wanted.voters.iter().filter(|id| !before.contains(id)) {
            assert!(self.heard(*id) || before.is_empty(), "{group}: {id} is not there");
        }
    }

    /// Until nothing is left to do.
    fn settle(&mut self) -> usize {
        self.now += u64::try_from(STALE_AFTER.as_nanos()).unwrap();
        for round in 0..ROUNDS_MAX {
            self.live();
            if self.plan() == 0 {
                self.live();
                assert_eq!(self.plan(), 0, "it moves on from rest");
                return round;
            }
        }
        panic!("no rest after {ROUNDS_MAX} rounds");
    }

    fn replace_now(&mut self) {
        self.live();
        let replace_after = u64::try_from(self.health.replace_after.as_nanos()).unwrap();
        // Those who are up are heard of all the while.
        self.now += replace_after;
        self.live();
    }

    /// What must be so at rest.
    fn check_rest(&self) {
        let rows: BTreeMap<u64, pb::StoreRow> =
            schema::stores(&self.table).unwrap().into_iter().map(|(id, row)| (id.0, row)).collect();
        for kind in [StoreShard, StoreCrossdir, StoreShuckle] {
            let groups: Vec<GroupId> = groups_of(kind).filter(|id| self.groups.contains_key(id)).collect();
            let usable: Vec<u64> = rows
                .iter()
                .filter(|(id, row)| row.kind() == kind && !row.draining && self.up(**id))
                .map(|(&id, _)| id)
                .collect();
            let mut load: BTreeMap<u64, usize> = usable.iter().map(|&id| (id, 0)).collect();
            let mut leads = load.clone();
            let mut calm = true;
            for &group in &groups {
                let (mut wanted, real) = (self.wanted(group), &self.groups[&group]);
                if wanted.voters.is_empty() {
                    // The registry's own, before there is anything to decide about it.
                    wanted.voters.clone_from(&real.voters);
                }
                calm &= real.leader != 0 && wanted.voters.iter().all(|&id| self.up(id));
                if real.leader == 0 {
                    continue;
                }
                let hosts = self.hosts_for(group);
                if hosts.len() >= self.replicas {
                    let bad: Vec<_> = wanted
                        .voters
                        .iter()
                        .filter(|id| rows.get(id).is_none_or(|row| row.draining))
                        .collect();
                    assert!(bad.is_empty(), "{group} has drained replicas: {bad:?}");
                }
                assert!(wanted.few || wanted.voters.len() >= self.replicas.min(hosts.len()), "{group}");
                for id in &wanted.voters {
                    *load.entry(*id).or_default() += 1;
                }
                *leads.entry(wanted.preferred).or_default() += 1;
            }
            if !calm || groups.is_empty() {
                continue;
            }
            let spread = |of: &BTreeMap<u64, usize>| {
                let of: Vec<usize> =
                    usable.iter().map(|id| of.get(id).copied().unwrap_or_default()).collect();
                of.iter().max().unwrap_or(&0) - of.iter().min().unwrap_or(&0)
            };
            assert!(spread(&load) < UNEVEN_REPLICAS, "{kind:?}: {load:?}");
            let on_time = self.stores.iter().all(|store| store.offset == 0);
            let everywhere = usable.iter().all(|id| load[id] >= 2);
            if on_time && everywhere {
                assert!(spread(&leads) < UNEVEN_LEADERS, "{kind:?} lead: {leads:?}");
            }
        }
    }
}

#[test]
fn groups_are_founded_when_there_are_hosts_enough() {
    let mut world = World::new(3);
    world.settle();
    world.host(1);
    world.settle();
    assert_eq!(world.groups.len(), 1, "two hosts of three: only the registry");
    assert_eq!(world.wanted(GroupId::SHUCKLE).voters.len(), 2);
    world.host(2);
    world.live();
    assert_eq!(world.plan(), usize::from(SHARDS) + 2);
    world.settle();
    assert_eq!(world.groups.len(), usize::from(SHARDS) + 2);
    assert!(world.groups.values().all(|real| real.voters.len() == 3));
    world.check_rest();
    let leads = |id: u64| world.groups.values().filter(|real| real.leader == id).count();
    let shards: Vec<usize> =
        world.stores.iter().filter(|store| store.kind == StoreShard).map(|s| leads(s.id)).collect();
    assert_eq!(shards, [4, 4, 4]);
}

fn five_hosts() -> World {
    let mut world = World::new(3);
    (1..5).for_each(|host| world.host(host));
    world.settle();
    world.check_rest();
    world
}

#[test]
fn a_silent_store_is_replaced_in_time_and_not_before() {
    let mut world = five_hosts();
    let dead = world.stores.iter().position(|store| store.host == 2 && store.kind == StoreShard).unwrap();
    let id = world.stores[dead].id;
    world.stores[dead].up = false;
    let holds = |world: &World| world.groups.values().filter(|real| real.voters.contains(&id)).count();
    let before = holds(&world);
    assert!(before > 0);
    for _ in 0..60 {
        world.live();
        assert_eq!(world.plan(), 0, "it may come back");
    }
    world.replace_now();
    world.settle();
    assert_eq!(holds(&world), 0);
    world.check_rest();
    // It comes back, and gets its share again.
    world.stores[dead].up = true;
    world.settle();
    world.check_rest();
}

#[test]
fn an_empty_disk_takes_the_place_of_the_old_at_once() {
    let mut world = World::new(3);
    world.host(1);
    world.host(2);
    world.settle();
    let old = world.stores.iter().find(|store| store.host == 1 && store.kind == StoreShard).unwrap().id;
    world.disk(1, StoreShard);
    world.settle();
    assert!(world.groups.values().all(|real| real.voters.len() == 3 && !real.voters.contains(&old)));
    assert_eq!(world.host_of(old), None, "RG-12");
    world.check_rest();
}

#[test]
fn a_drained_host_is_emptied_when_others_can_take_it() {
    let mut world = World::new(3);
    world.host(1);
    world.host(2);
    world.settle();
    let drain = |undo| Op::DrainHost(pb::DrainHost { host: "h1".into(), undo });
    world.ask(&drain(false));
    world.settle();
    let left = |world: &World| {
        let on: Vec<u64> =
            world.stores.iter().filter(|store| store.host == 1).map(|store| store.id).collect();
        let replicas =
            world.groups.values().filter(|real| real.voters.iter().any(|id| on.contains(id))).count();
        let leaders = world.groups.values().filter(|real| on.contains(&real.leader)).count();
        (replicas, leaders)
    };
    assert_eq!(
        left(&world),
        (usize::from(SHARDS) + 2, 0),
        "nobody can take them: it keeps them, and leads none"
    );
    world.host(3);
    world.settle();
    assert_eq!(left(&world), (0, 0));
    world.check_rest();
    world.ask(&drain(true));
    world.settle();
    assert!(left(&world).0 > 0, "it takes part again");
    world.check_rest();
}

#[test]
fn what_people_choose_is_kept_while_it_is_well() {
    let mut world = five_hosts();
    let wanted = world.wanted(GroupId(0));
    let others =
        world.stores.iter().filter(|store| store.kind == StoreShard && !wanted.voters.contains(&store.id));
    let other = others.map(|store| store.id).next().unwrap();
    let voters: Vec<u64> = wanted.voters.iter().copied().chain([other]).collect();
    let op = Op::SetReplicas(pb::SetReplicas { group: 0, wanted: voters, preferred: other, force: false });
    world.ask(&op);
    world.settle();
    assert_eq!(world.wanted(GroupId(0)).voters.len(), 4, "more than it has to have");
    assert_eq!(world.groups[&GroupId(0)].leader, other);
}

#[test]
fn fewer_replicas_that_people_forced_are_not_filled_up() {
    let mut world = five_hosts();
    let ask = |world: &mut World, wanted: &[u64], force| {
        let op = pb::SetReplicas { group: 3, wanted: wanted.to_vec(), preferred: 0, force };
        world.ask(&Op::SetReplicas(op));
        world.settle();
        world.wanted(GroupId(3)).voters
    };
    let all = world.wanted(GroupId(3)).voters;
    assert_eq!(ask(&mut world, &all[..2], true), all[..2]);
    // One of the two has to go: there are to be two.
    let gone = all[0];
    let host = world.host_of(gone).unwrap();
    world.ask(&Op::DrainHost(pb::DrainHost { host, undo: false }));
    world.settle();
    let left = world.wanted(GroupId(3)).voters;
    assert!(left.len() == 2 && !left.contains(&gone), "{left:?}");
    // As it should be again, it stays so.
    let third = world
        .stores
        .iter()
        .find(|store| store.kind == StoreShard && !left.contains(&store.id) && store.id != gone);
    let three: Vec<u64> = left.iter().copied().chain(third.map(|store| store.id)).collect();
    assert_eq!(ask(&mut world, &three, false).len(), 3);
    assert!(!world.wanted(GroupId(3)).few);
}

#[test]
fn leaders_that_people_chose_lead_until_they_cannot() {
    let mut world = five_hosts();
    let chosen = world.stores.iter().find(|store| store.host == 2 && store.kind == StoreShard).unwrap().id;
    let groups: Vec<GroupId> =
        (0..SHARDS).map(GroupId).filter(|&group| world.wanted(group).voters.contains(&chosen)).collect();
    assert!(groups.len() > 4);
    for group in &groups {
        let op =
            pb::SetReplicas { group: u32::from(group.0), wanted: vec![], preferred: chosen, force: false };
        world.ask(&Op::SetReplicas(op));
    }
    world.settle();
    assert!(groups.iter().all(|group| world.groups[group].leader == chosen), "however uneven");
    let drain = |undo| Op::DrainHost(pb::DrainHost { host: "h2".into(), undo });
    world.ask(&drain(false));
    world.settle();
    assert!(groups.iter().all(|group| world.groups[group].leader != chosen));
    world.ask(&drain(true));
    world.settle();
    world.check_rest();
}

#[test]
fn a_host_whose_clock_is_off_leads_nothing() {
    let mut world = five_hosts();
    for store in world.stores.iter_mut().filter(|store| store.host == 1) {
        store.offset = 900_000_000;
    }
    world.settle();
    let on: Vec<u64> = world.stores.iter().filter(|store| store.host == 1).map(|store| store.id).collect();
    assert!(world.groups.values().all(|real| !on.contains(&real.leader)));
}

#[test]
fn a_cluster_without_replication_moves_too() {
    let mut world = World::new(1);
    world.settle();
    world.host(1);
    world.settle();
    world.check_rest();
    assert_eq!(world.groups[&GroupId::SHUCKLE].voters.len(), 1);
}

/// Levelling 256 shards over a fourth host takes long, and ends.
#[test]
fn a_new_host_gets_its_share_of_all_shards_slowly() {
    let mut world = World::new(3);
    world.health = Health::new(Time(world.now), Duration::ZERO);
    world.host(1);
    world.host(2);
    world.settle();
    world.host(3);
    for _ in 0..3 {
        world.live();
        assert!(world.plan() <= 2 * MOVES_AT_ONCE);
    }
    world.settle();
    world.check_rest();
    let newest = world.stores.iter().rfind(|store| store.kind == StoreShard).unwrap().id;
    assert_eq!(world.groups.values().filter(|real| real.voters.contains(&newest)).count(), 192);
}

#[derive(Debug, Clone)]
enum Happens {
    Host(usize),
    Disk(usize, StoreKind),
    Down(usize),
    Up(usize),
    Drain(usize, bool),
    Clock(usize, bool),
    Replace,
    Stale,
    Ask(u16, Vec<usize>, bool),
    Steps(usize),
}

fn happens() -> impl Strategy<Value = Happens> {
    let kind = prop_oneof![Just(StoreShard), Just(StoreCrossdir), Just(StoreShuckle)];
    prop_oneof![
        3 => (0usize..7).prop_map(Happens::Host),
        1 => (0usize..7, kind).prop_map(|(host, kind)| Happens::Disk(host, kind)),
        3 => (0usize..7).prop_map(Happens::Down),
        3 => (0usize..7).prop_map(Happens::Up),
        2 => (0usize..7, any::<bool>()).prop_map(|(host, undo)| Happens::Drain(host, undo)),
        1 => (0usize..7, any::<bool>()).prop_map(|(host, off)| Happens::Clock(host, off)),
        2 => Just(Happens::Replace),
        1 => Just(Happens::Stale),
        2 => (0..SHARDS, prop::collection::vec(0usize..20, 0..5), any::<bool>())
            .prop_map(|(group, stores, force)| Happens::Ask(group, stores, force)),
        2 => (0usize..4).prop_map(Happens::Steps),
    ]
}

fn happen(world: &mut World, event: Happens) {
    match event {
        // A host that is there keeps its disks.
        Happens::Host(host) if world.stores.iter().any(|store| store.host == host) => {}
        Happens::Host(host) => world.host(host),
        Happens::Disk(host, kind) => {
            if world.stores.iter().any(|store| store.host == host && store.up) {
                world.disk(host, kind);
            }
        }
        Happens::Down(on) => {
            world.stores.iter_mut().filter(|store| store.host == on).for_each(|s| s.up = false);
        }
        Happens::Up(on) => world.stores.iter_mut().filter(|store| store.host == on).for_each(|s| s.up = true),
        Happens::Drain(host, undo) => {
            world.ask(&Op::DrainHost(pb::DrainHost { host: format!("h{host}"), undo }));
        }
        Happens::Clock(on, off) => {
            let offset = if off { -2_000_000_000 } else { 0 };
            world.stores.iter_mut().filter(|store| store.host == on).for_each(|store| store.offset = offset);
        }
        Happens::Replace => world.replace_now(),
        Happens::Stale => {
            world.now += u64::try_from(STALE_AFTER.as_nanos()).unwrap();
            world.live();
        }
        Happens::Ask(group, stores, force) => {
            let wanted: Vec<u64> =
                stores.iter().filter_map(|&at| world.stores.get(at)).map(|store| store.id).collect();
            let op = pb::SetReplicas { group: u32::from(group), wanted, preferred: 0, force };
            world.ask(&Op::SetReplicas(op));
        }
        Happens::Steps(steps) => {
            for _ in 0..steps {
                world.live();
                world.plan();
            }
        }
    }
}

proptest! {
    /// RG-15, RG-16: whatever happens, what is planned is allowed, and comes to rest.
    #[test]
    fn whatever_happens_the_planner_comes_to_rest(
        replicas in prop_oneof![Just(1u32), Just(3), Just(5)],
        events in prop::collection::vec(happens(), 0..30),
    ) {
        let mut world = World::new(replicas);
        for event in events {
            happen(&mut world, event);
            world.live();
            world.plan();
        }
        world.settle();
        world.check_rest();
        world.replace_now();
        world.settle();
        world.check_rest();
        // Everybody comes back: all is well.
        world.stores.iter_mut().for_each(|store| (store.up, store.offset) = (true, 0));
        world.settle();
        world.check_rest();
    }
}
