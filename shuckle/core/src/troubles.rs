//! What is wrong with stores, hosts and groups, in words.

use std::collections::{BTreeMap, BTreeSet};

use eggs_proto::limits::{CLOCK_OFFSET_MAX, SHARDS};
use eggs_proto::{GroupId, StoreId, Time, pb};
use pb::StoreKind;

use crate::schema::{groups_of, kind_name, kind_of};
use crate::summary::{Reason, State};

/// Things named one by one in a reason; more are counted.
const NAMED_MAX: usize = 4;

/// A machine of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    pub name: String,
    /// Some store on it is alive.
    pub alive: bool,
    pub stores: u32,
    pub stores_alive: u32,
    /// On all its stores.
    pub replicas: u32,
    pub leaders: u32,
    pub draining: bool,
    /// Groups whose wanted voters are on it still: what a drain has to move.
    pub to_move: u32,
    /// Of those: no other host can take them.
    pub stuck: u32,
    /// The largest, in ns.
    pub clock_offset: i64,
}

impl Host {
    /// How its drain is going; `None` when it is not drained or nothing is left on it.
    pub fn drain(&self) -> Option<String> {
        let left = self.replicas.max(self.to_move);
        if !self.draining || left == 0 {
            return None;
        }
        let replicas = count(left as usize, "replica", "replicas");
        Some(match self.stuck {
            0 => format!("{replicas} still to move"),
            stuck => format!(
                "{replicas} still to move, {stuck} of them wait for another live host that can take them"
            ),
        })
    }
}

/// The map, with what is looked up in it again and again.
pub(crate) struct Picture<'a> {
    map: &'a pb::ClusterMapReply,
    stores: BTreeMap<u64, &'a pb::StoreInfo>,
    groups: BTreeMap<u32, &'a pb::GroupPlace>,
}

/// By name.
pub fn hosts(map: &pb::ClusterMapReply) -> Vec<Host> {
    Picture::of(map).hosts()
}

impl<'a> Picture<'a> {
    pub(crate) fn of(map: &'a pb::ClusterMapReply) -> Picture<'a> {
        let stores = map.stores.iter().map(|info| (info.id, info)).collect();
        let groups = map.groups.iter().map(|place| (place.group, place)).collect();
        Picture { map, stores, groups }
    }

    pub(crate) fn alive(&self, group: GroupId) -> bool {
        self.groups.get(&u32::from(group.0)).is_some_and(|place| place.alive)
    }

    /// Shards with a live leader.
    pub(crate) fn shards_alive(&self) -> usize {
        groups_of(StoreKind::StoreShard).filter(|&shard| self.alive(shard)).count()
    }

    fn host(&self, store: u64) -> String {
        self.stores
            .get(&store)
            .map_or_else(|| format!("of store {}", StoreId(store)), |info| info.host.clone())
    }

    fn store_alive(&self, store: u64) -> bool {
        self.stores.get(&store).is_some_and(|info| info.alive)
    }

    pub(crate) fn hosts(&self) -> Vec<Host> {
        let mut hosts: BTreeMap<&str, Host> = BTreeMap::new();
        for info in self.map.stores.iter().filter(|info| !self.is_gone(info)) {
            let host = hosts.entry(&info.host).or_default();
            host.name.clone_from(&info.host);
            host.alive |= info.alive;
            host.stores += 1;
            host.stores_alive += u32::from(info.alive);
            host.replicas += info.replicas;
            host.leaders += info.leaders;
            host.draining |= info.draining;
            if info.clock_offset.unsigned_abs() > host.clock_offset.unsigned_abs() {
                host.clock_offset = info.clock_offset;
            }
        }
        for place in &self.map.groups {
            let draining = |id: &&u64| self.stores.get(id).is_some_and(|info| info.draining);
            for id in place.wanted.iter().filter(draining) {
                let stuck = !self.can_move(place, *id);
                if let Some(host) = self.stores.get(id).and_then(|info| hosts.get_mut(info.host.as_str())) {
                    host.to_move += 1;
                    host.stuck += u32::from(stuck);
                }
            }
        }
        hosts.into_values().collect()
    }

    /// Nothing is on it, and nobody misses it: a later store of its host took its place, or it was
    /// drained and put away.
    fn is_gone(&self, info: &pb::StoreInfo) -> bool {
        let newer = |other: &pb::StoreInfo| {
            other.kind == info.kind && other.host == info.host && other.registered_at > info.registered_at
        };
        !info.alive && info.replicas == 0 && (info.draining || self.map.stores.iter().any(newer))
    }

    /// Whether some other host can take the replica.
    fn can_move(&self, place: &pb::GroupPlace, from: u64) -> bool {
        let kind = u16::try_from(place.group).ok().and_then(|group| kind_of(GroupId(group)));
        let others = place.wanted.iter().filter(|&&id| id != from);
        let taken: BTreeSet<&str> =
            others.filter_map(|id| self.stores.get(id)).map(|info| info.host.as_str()).collect();
        self.map.stores.iter().any(|info| {
            Some(info.kind()) == kind
                && info.alive
                && !info.draining
                && (info.problem.is_empty() || clock_off(info.clock_offset))
                && info.id != from
                && !taken.contains(info.host.as_str())
        })
    }

    // ---- reasons ----

    pub(crate) fn reasons(&self) -> Vec<Reason> {
        let mut reasons = Vec::new();
        for kind in [StoreKind::StoreShard, StoreKind::StoreCrossdir] {
            reasons.extend(self.not_founded(kind));
        }
        self.group_reasons(&mut reasons);
        self.store_reasons(&mut reasons);
        for host in self.hosts() {
            if clock_off(host.clock_offset) {
                let off = host.clock_offset / 1_000_000;
                let text = format!("the clock of host {} is off by {off:+} ms: it does not lead", host.name);
                reasons.push(Reason { state: State::Degraded, text });
            }
            if let Some(drain) = host.drain() {
                reasons.push(Reason {
                    state: State::Degraded,
                    text: format!("draining host {}: {drain}", host.name),
                });
            }
        }
        reasons
    }

    fn not_founded(&self, kind: StoreKind) -> Option<Reason> {
        if groups_of(kind).any(|group| self.groups.contains_key(&u32::from(group.0))) {
            return None;
        }
        let alive: BTreeSet<&str> = self
            .map
            .stores
            .iter()
            .filter(|info| info.kind() == kind && info.alive && !info.draining)
            .map(|info| info.host.as_str())
            .collect();
        let wanted = self.map.replicas.max(1) as usize;
        let (what, state, cannot) = match kind {
            StoreKind::StoreShard => ("shards", State::Unavailable, "nothing can be stored"),
            _ => ("the coordinator", State::Degraded, "mkdir, rmdir and mv between directories cannot work"),
        };
        let waits = match (alive.len(), kind) {
            (0, StoreKind::StoreShard) => "no shard host has registered".to_owned(),
            (0, _) => "no coordinator has registered".to_owned(),
            (some, _) => format!("{what} wait for {wanted} hosts, {some} registered ({})", names(&alive)),
        };
        Some(Reason { state, text: format!("{waits}: {cannot}") })
    }

    /// Groups in the same trouble, with the same stores missing, in one reason.
    fn group_reasons(&self, reasons: &mut Vec<Reason>) {
        let mut lost: BTreeMap<Vec<String>, Vec<GroupId>> = BTreeMap::new();
        let mut fewer: BTreeMap<Vec<String>, Vec<GroupId>> = BTreeMap::new();
        let mut headless: Vec<GroupId> = Vec::new();
        for place in &self.map.groups {
            let Ok(group) = u16::try_from(place.group).map(GroupId) else { continue };
            let voters = if place.voters.is_empty() { &place.wanted } else { &place.voters };
            let away: Vec<u64> = voters.iter().copied().filter(|&id| !self.store_alive(id)).collect();
            let hosts: BTreeSet<String> = away.iter().map(|&id| self.host(id)).collect();
            let hosts: Vec<String> = hosts.into_iter().collect();
            if voters.len() - away.len() <= voters.len() / 2 {
                lost.entry(hosts).or_default().push(group);
                continue;
            }
            if !place.alive {
                headless.push(group);
            }
            if voters.len() - away.len() < self.map.replicas as usize {
                fewer.entry(hosts).or_default().push(group);
            }
        }
        for (hosts, groups) in lost {
            let text =
                format!("quorum lost: {} cannot work without {}", name_groups(&groups), missing(&hosts));
            reasons.push(Reason { state: worst(&groups), text });
        }
        if !headless.is_empty() {
            let text = match headless.iter().filter(|group| group.shard().is_some()).count() {
                all if all == usize::from(SHARDS) => "no shard has a live leader".to_owned(),
                _ => format!("no live leader: {}", name_groups(&headless)),
            };
            reasons.push(Reason { state: worst(&headless), text });
        }
        for (hosts, groups) in fewer {
            let (groups, wanted) = (name_groups(&groups), self.map.replicas);
            let text = match hosts.is_empty() {
                false => format!("under-replicated: {groups}, without {}", missing(&hosts)),
                true => format!("under-replicated: {groups} with fewer than {wanted} replicas"),
            };
            reasons.push(Reason { state: State::Degraded, text });
        }
    }

    fn store_reasons(&self, reasons: &mut Vec<Reason>) {
        let now = Time(self.map.now);
        // By host and what there is to say of it: all parts of a dead host in one line.
        let mut dead: BTreeMap<&str, (Vec<&str>, u64)> = BTreeMap::new();
        for info in self.map.stores.iter().filter(|info| !self.is_gone(info)) {
            if !info.alive {
                let (kinds, seen) = dead.entry(&info.host).or_default();
                kinds.push(kind_name(info.kind()));
                *seen = (*seen).max(info.last_seen);
            } else if !info.problem.is_empty() && !clock_off(info.clock_offset) {
                // A clock that is off is said once for the host.
                let text = format!("{} on host {}: {}", kind_name(info.kind()), info.host, info.problem);
                reasons.push(Reason { state: State::Degraded, text });
            }
        }
        for (host, (kinds, seen)) in dead {
            let since = match seen {
                0 => "since this replica of the registry leads".to_owned(),
                seen => format!("for {}", duration(now.since(Time(seen)).as_secs())),
            };
            let text = format!("host {host} not heard of {since}: {}", kinds.join(", "));
            reasons.push(Reason { state: State::Degraded, text });
        }
    }
}

/// Without the shards, or the registry, nothing goes; without the coordinator, most does.
fn worst(groups: &[GroupId]) -> State {
    let only_crossdir = groups.iter().all(|&group| group == GroupId::CROSSDIR);
    if only_crossdir { State::Degraded } else { State::Unavailable }
}

fn clock_off(offset_ns: i64) -> bool {
    u128::from(offset_ns.unsigned_abs()) > CLOCK_OFFSET_MAX.as_nanos()
}

fn missing(hosts: &[String]) -> String {
    let word = if hosts.len() == 1 { "host" } else { "hosts" };
    format!("{word} {}", hosts.join(", "))
}

fn names(hosts: &BTreeSet<&str>) -> String {
    let mut text = hosts.iter().take(NAMED_MAX).copied().collect::<Vec<_>>().join(", ");
    if hosts.len() > NAMED_MAX {
        text.push_str(", …");
    }
    text
}

/// `shards 0-3, 7, the coordinator`.
pub(crate) fn name_groups(groups: &[GroupId]) -> String {
    let shards: Vec<u32> =
        groups.iter().filter_map(|group| group.shard()).map(|shard| u32::from(shard.0)).collect();
    let mut parts = Vec::new();
    match shards[..] {
        [] => {}
        [one] => parts.push(format!("shard {one}")),
        _ if shards.len() == usize::from(SHARDS) => parts.push(format!("all {SHARDS} shards")),
        _ => parts.push(format!("shards {}", ranges(&shards))),
    }
    if groups.contains(&GroupId::CROSSDIR) {
        parts.push("the coordinator".to_owned());
    }
    if groups.contains(&GroupId::SHUCKLE) {
        parts.push("the registry".to_owned());
    }
    parts.join(", ")
}

/// `0-3, 7, 9-11`; of many runs how many there are in all.
fn ranges(sorted: &[u32]) -> String {
    let runs: Vec<&[u32]> = sorted.chunk_by(|a, b| a + 1 == *b).collect();
    let named = runs.iter().take(NAMED_MAX).map(|run| match run {
        [one] => one.to_string(),
        [first, .., last] => format!("{first}-{last}"),
        [] => String::new(),
    });
    let mut text = named.collect::<Vec<_>>().join(", ");
    if runs.len() > NAMED_MAX {
        text.push_str(&format!(", … ({} of {SHARDS})", sorted.len()));
    }
    text
}

fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

pub(crate) fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}
