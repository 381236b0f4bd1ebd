//! The end of a run: no more faults, and the cluster comes to rest; or why it does not.

use eggs_consensus_core::GroupId;
use eggs_proto::{StoreId, pb};

use crate::kernel::{MILLISECOND, NodeId, SECOND, Weather};
use crate::world::{Node, World, with_replica};

/// A cluster that is not at rest by then never is.
const QUIET_MAX: u64 = 900 * SECOND;

impl World {
    /// No more faults; everything is up and what is on its way arrives, every group is as it is to be.
    pub fn quiet(&mut self) -> Result<(), String> {
        self.chaos = false;
        self.common.janitor_rests.set(true);
        self.ambush = false;
        self.armed.clear();
        self.paused.clear();
        self.kernel.weather = Weather::default();
        self.kernel.cut.clear();
        self.kernel.peers_cut.clear();
        self.kernel.slow_disks.clear();
        self.kernel.note(format_args!("quiet"));
        // Clocks that jumped were set right; those that are far off stay so.
        for machine in 0..self.clocks.len() {
            self.set_skew(machine, self.skews[machine]);
        }
        for at in 0..self.nodes.len() {
            let id = NodeId(at);
            // Damage that nobody has noticed yet is noticed now.
            let spoiled = with_replica!(&mut self.nodes[at], |replica, me| {
                replica.set_full(false);
                replica.spoiled
            });
            if spoiled == Some(true) {
                self.crash(id)?;
            }
            match &mut self.nodes[at] {
                Node::Blocks(host) => host.disks.iter_mut().for_each(|disk| disk.full = false),
                Node::Shards(host) => (host.fail_next_write, host.full) = (false, false),
                _ => {}
            }
            if !matches!(self.nodes[at], Node::Client(_)) {
                self.start(id)?;
            }
        }
        // As many as are needed stay.
        while self.clocks.len() - self.drained.len() < self.cluster.replicas as usize {
            self.drained.pop_first();
        }
        // Longer than any message takes and any map is believed.
        let earliest = self.kernel.now + if self.faults { 8 * SECOND } else { SECOND };
        let latest = self.kernel.now + QUIET_MAX;
        let mut look_at = earliest;
        loop {
            if self.kernel.now >= look_at {
                look_at = self.kernel.now + 200 * MILLISECOND;
                self.drain_right();
                let Some(why) = self.unsettled() else { return Ok(()) };
                if self.kernel.now > latest {
                    for store in self.map().map(|map| map.stores).unwrap_or_default() {
                        let age = store.last_seen;
                        self.kernel.note(format_args!(
                            "store {:#x} of kind {} at {} {}: alive {} draining {} offset {} seen {age} {}",
                            store.id,
                            store.kind,
                            store.host,
                            store.address,
                            store.alive,
                            store.draining,
                            store.clock_offset,
                            store.problem
                        ));
                    }
                    self.note_groups();
                    return Err(format!("the cluster does not come to rest: {why}"));
                }
            }
            if !self.turn()? {
                return Err("nothing happens any more".to_owned());
            }
        }
    }

    /// How every replica of every group is, for those who look for what went wrong.
    fn note_groups(&mut self) {
        let Some(map) = self.map() else { return };
        for group in map.groups.iter().filter_map(|place| u16::try_from(place.group).ok()).map(GroupId) {
            for id in (0..self.nodes.len()).map(NodeId) {
                let Some(status) = self.status(id, group) else { continue };
                let store = self.store_of(id);
                self.kernel.note(format_args!(
                    "{group} on {id} {store:?}: leader {} of {:?}, term {}, applied {} of {}, {:?}",
                    status.leader,
                    status.leader_store,
                    status.term,
                    status.applied_index,
                    status.committed_index,
                    status.membership
                ));
            }
        }
    }

    /// Asks again for what was lost of what was asked for about drained hosts.
    fn drain_right(&mut self) {
        let Some(map) = self.map() else { return };
        for machine in 0..self.clocks.len() {
            let (host, drained) = (format!("host{machine}"), self.drained.contains(&machine));
            if map.stores.iter().any(|store| store.host == host && store.draining != drained) {
                self.operator(pb::registry_request::Op::DrainHost(pb::DrainHost { host, undo: !drained }));
            }
        }
    }

    /// Why the cluster is not at rest; `None`: it is.
    fn unsettled(&self) -> Option<String> {
        let Some(coordinator) = self.coordinator() else { return Some("no coordinator leads".to_owned()) };
        if !coordinator.is_idle() {
            let list = coordinator.driver.as_ref().map(|driver| driver.list(5));
            return Some(format!("transactions: {list:?}"));
        }
        let Some(map) = self.map() else { return Some("no registry leads".to_owned()) };
        for id in self.nodes.iter().enumerate().filter(|(at, _)| self.up[*at]).map(|(at, _)| NodeId(at)) {
            let store = self.store_of(id);
            if let Some(store) = store
                && !map.stores.iter().any(|info| info.id == store.0)
            {
                return Some(format!("{id} is not registered as {store}"));
            }
        }
        let founded = map.groups.iter().filter(|place| !place.wanted.is_empty()).count();
        if founded < self.common.shards + 2 {
            return Some(format!("{founded} groups are founded"));
        }
        map.groups.iter().find_map(|place| self.unsettled_group(&map, place))
    }

    fn unsettled_group(&self, map: &pb::ClusterMapReply, place: &pb::GroupPlace) -> Option<String> {
        let group = GroupId(u16::try_from(place.group).ok()?);
        let Some((_, status)) = self.leading(group) else { return Some(format!("nobody leads {group}")) };
        let mut wanted: Vec<StoreId> = place.wanted.iter().copied().map(StoreId).collect();
        wanted.sort_unstable();
        let now = &status.membership;
        let strays = (0..self.nodes.len()).map(NodeId).filter(|&id| {
            self.status(id, group).is_some() && self.store_of(id).is_some_and(|store| !now.contains(store))
        });
        let strays: Vec<NodeId> = strays.collect();
        if !strays.is_empty() {
            return Some(format!("{group} is also on {strays:?}, which are no members: {now:?}"));
        }
        if now.voters != wanted || !now.learners.is_empty() {
            return Some(format!("{group} has {now:?}, wanted are {wanted:?}"));
        }
        for store in wanted {
            let gone = !map.stores.iter().any(|info| info.id == store.0);
            let there = self.nodes.iter().enumerate().find_map(|(at, _)| {
                (self.store_of(NodeId(at)) == Some(store)).then(|| self.status(NodeId(at), group))?
            });
            match there {
                Some(there) if there.applied_index == status.applied_index => {}
                other => {
                    return Some(format!("{store} (gone: {gone}) of {group} is {other:?}, not {status:?}"));
                }
            }
        }
        None
    }
}
