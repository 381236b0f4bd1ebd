//! What goes wrong: crashes of processes, machines and all at once, partitions of every shape, bad weather, slow
//! and full disks, writes that fail, bits that flip, clocks that jump, processes that stand still; and what
//! people do meanwhile: members changed, hosts drained, machines added.

use std::collections::BTreeSet;

use bytes::Bytes;
use eggs_consensus_core::GroupId;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{BlockId, StoreId, Time, pb};
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};

use crate::kernel::{Envelope, Event, MILLISECOND, NodeId, Rpc, SECOND, Weather, wall};
use crate::nodes::{encode, request_header};
use crate::redundancy::Redundancy;
use crate::world::{FAIR, Node, World, with_replica};

#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Something goes wrong now, and something else later.
    Next,
    Restart(NodeId),
    /// These hear each other again.
    Mend(Partition),
    /// The partition comes or goes, so many times more.
    Flap(Partition, u32),
    DiskHasRoom(NodeId, usize),
    /// An empty disk comes for one that was lost.
    NewDisk(NodeId),
    LogHasRoom(NodeId),
    /// A machine's clock is what it was.
    ClockBack(usize, i64),
    /// The spare machine comes up.
    Join,
    /// Of a group's three voters the first, who leads, stands still, the log of the second is damaged, and the
    /// third, who missed something, is back.
    BadLuck(GroupId, [NodeId; 3]),
    /// A host is drained no more.
    Undrain(usize),
    Calm,
}

/// Who does not hear whom.
#[derive(Debug, Clone)]
pub(crate) struct Partition {
    pairs: Vec<(NodeId, NodeId)>,
    /// Only what stores say to one another is lost.
    peers: bool,
}

impl World {
    pub(crate) fn fault(&mut self, fault: Fault) -> Result<(), String> {
        match fault {
            Fault::Next => {
                if self.chaos {
                    self.something()?;
                    let pause = self.kernel.rng.random_range(20 * MILLISECOND..900 * MILLISECOND);
                    self.kernel.at(self.kernel.now + pause, Event::Fault(Fault::Next));
                }
                Ok(())
            }
            Fault::Restart(id) => self.start(id),
            Fault::Mend(partition) => {
                self.mend(&partition);
                Ok(())
            }
            Fault::Flap(partition, left) => {
                if !self.chaos {
                    return Ok(());
                }
                if left % 2 == 1 {
                    self.cut(&partition);
                } else {
                    self.mend(&partition);
                }
                if left > 0 {
                    let pause = self.kernel.rng.random_range(40 * MILLISECOND..900 * MILLISECOND);
                    self.kernel.at(self.kernel.now + pause, Event::Fault(Fault::Flap(partition, left - 1)));
                }
                Ok(())
            }
            Fault::DiskHasRoom(host, disk) => {
                if let Node::Blocks(host) = &mut self.nodes[host.0] {
                    host.disks[disk].full = false;
                }
                Ok(())
            }
            Fault::NewDisk(host) => {
                self.add_disk(host);
                Ok(())
            }
            Fault::LogHasRoom(id) => {
                self.set_full(id, false);
                Ok(())
            }
            Fault::ClockBack(machine, skew) => {
                if self.chaos {
                    self.set_skew(machine, skew);
                }
                Ok(())
            }
            Fault::Join => {
                for id in std::mem::take(&mut self.late) {
                    self.counts.fault("joined");
                    self.start(id)?;
                }
                Ok(())
            }
            Fault::BadLuck(group, nodes) => self.bad_luck_strikes(group, nodes),
            Fault::Undrain(machine) => {
                self.drained.remove(&machine);
                self.operator(Op::DrainHost(pb::DrainHost { host: format!("host{machine}"), undo: true }));
                Ok(())
            }
            Fault::Calm => {
                self.kernel.weather = FAIR;
                Ok(())
            }
        }
    }

    pub(crate) fn random_node(&mut self, is: impl Fn(&Node) -> bool) -> NodeId {
        let all: Vec<usize> =
            self.nodes.iter().enumerate().filter(|(_, node)| is(node)).map(|(at, _)| at).collect();
        NodeId(all.choose(&mut self.kernel.rng).copied().unwrap_or_default())
    }

    /// Machines with stores.
    fn machines(&self) -> usize {
        self.clocks.len()
    }

    fn random_machine(&mut self) -> usize {
        let machines = self.machines();
        self.kernel.rng.random_range(0..machines)
    }

    /// The stores of a machine.
    fn on_machine(&mut self, machine: usize) -> Vec<NodeId> {
        let all = (0..self.nodes.len()).map(NodeId);
        all.filter(|id| self.nodes[id.0].is_store() && self.nodes[id.0].me().machine == machine).collect()
    }

    fn crash_one(&mut self, kind: &'static str, is: impl Fn(&Node) -> bool) -> Result<(), String> {
        let id = self.random_node(is);
        if self.late.contains(&id) {
            return Ok(());
        }
        self.counts.fault(kind);
        self.crash_soon(id)
    }

    pub(crate) fn something(&mut self) -> Result<(), String> {
        match self.kernel.rng.random_range(0..1000) {
            0..130 => self.crash_one("crash", |node| matches!(node, Node::Shards(_)))?,
            130..200 => self.crash_one("crash", |node| matches!(node, Node::Coordinator(_)))?,
            200..230 => self.crash_one("crash", |node| matches!(node, Node::Registry(_)))?,
            230..270 => self.crash_one("crash of disks", |node| matches!(node, Node::Blocks(_)))?,
            270..290 => self.deafen_leader(),
            290..320 => self.crash_one("crash of a client", |node| matches!(node, Node::Client(_)))?,
            320..360 => self.crash_machine()?,
            360..375 => self.power_cut()?,
            375..410 => self.spring_later(),
            410..470 => self.snapshot(),
            470..500 => self.remember_state(),
            500..520 => self.bad_luck(),
            520..550 => self.failing_write(),
            550..570 => self.full_log(),
            570..600 => self.slow_disk(),
            600..660 => self.partition(),
            660..690 => self.flap(),
            690..705 => self.pause(),
            705..730 => self.deafen_leader(),
            730..740 => self.jump_clock(),
            740..770 => self.spoil_log()?,
            770..780 => self.bad_luck(),
            780..860 => self.spoil_disk(),
            860..940 => self.change_members(),
            _ => {
                self.counts.fault("bad weather");
                self.kernel.weather = Weather { lost: 100, duplicated: 100, slow: 100, broken: 20 };
                let calm = self.kernel.rng.random_range(100 * MILLISECOND..2 * SECOND);
                self.kernel.at(self.kernel.now + calm, Event::Fault(Fault::Calm));
            }
        }
        Ok(())
    }

    // ---- crashes ----

    /// All that runs on a machine, at once.
    fn crash_machine(&mut self) -> Result<(), String> {
        let machine = self.random_machine();
        self.counts.fault("crash of a machine");
        for id in self.on_machine(machine) {
            self.crash_store(id)?;
        }
        Ok(())
    }

    /// Every machine at once.
    fn power_cut(&mut self) -> Result<(), String> {
        self.counts.fault("power cut");
        for at in 0..self.nodes.len() {
            if self.nodes[at].is_store() {
                self.crash_store(NodeId(at))?;
            }
        }
        Ok(())
    }

    fn crash_store(&mut self, id: NodeId) -> Result<(), String> {
        if self.late.contains(&id) { Ok(()) } else { self.crash_for(id) }
    }

    /// Whoever is elected next is cut off at once, and those that elected it crash.
    fn spring_later(&mut self) {
        self.counts.fault("ambush");
        self.ambush = true;
        // Somebody has to be elected.
        if let Some(leader) = self.random_leader(|_| true) {
            let until = self.kernel.now + self.kernel.rng.random_range(SECOND..3 * SECOND);
            if self.kernel.chance(500) {
                self.paused.insert(leader, until);
            } else {
                self.isolate(leader, until, true);
            }
        }
    }

    pub(crate) fn spring_ambush(&mut self) -> Result<(), String> {
        let Some(store) = self.kernel.oracle.newest_leader() else { return Ok(()) };
        let all = (0..self.nodes.len()).map(NodeId);
        let Some(leader) = all.into_iter().find(|&id| self.store_of(id) == Some(store)) else {
            return Ok(());
        };
        let kind = self.nodes[leader.0].kind();
        self.ambush = false;
        self.kernel.note(format_args!("ambush of {leader}"));
        // Those who were apart hear each other again, but not the new leader.
        self.kernel.cut.clear();
        self.kernel.peers_cut.clear();
        let until = self.kernel.now + self.kernel.rng.random_range(SECOND..4 * SECOND);
        self.isolate(leader, until, true);
        for at in 0..self.nodes.len() {
            let id = NodeId(at);
            if id != leader && self.nodes[at].kind() == kind && self.up[at] && !self.paused.contains_key(&id)
            {
                self.crash(id)?;
                let down = self.kernel.rng.random_range(MILLISECOND..30 * MILLISECOND);
                self.kernel.at(self.kernel.now + down, Event::Fault(Fault::Restart(id)));
            }
        }
        let paused: Vec<NodeId> = self.paused.keys().copied().collect();
        for id in paused {
            let wakes = self.kernel.now + self.kernel.rng.random_range(MILLISECOND..100 * MILLISECOND);
            self.paused.insert(id, wakes);
        }
        Ok(())
    }

    /// A process stands still for a while: it was paged out, or its virtual machine was moved.
    fn pause(&mut self) {
        self.counts.fault("pause");
        let id = self.random_node(Node::is_store);
        let until = self.kernel.now + self.kernel.rng.random_range(100 * MILLISECOND..4 * SECOND);
        self.kernel.note(format_args!("{id} stands still"));
        self.paused.insert(id, until);
    }

    /// A leader stands still and hears of nothing for a while after: it goes on as if it led.
    fn deafen_leader(&mut self) {
        let shards = self.kernel.chance(800);
        let Some(leader) = self.random_leader(|node| !shards || matches!(node, Node::Shards(_))) else {
            return;
        };
        self.counts.fault("deaf leader");
        self.kernel.note(format_args!("{leader} stands still and is deaf"));
        let resumes = self.kernel.now + self.kernel.rng.random_range(SECOND..3 * SECOND);
        let hears = resumes + self.kernel.rng.random_range(200 * MILLISECOND..2 * SECOND);
        self.isolate(leader, hears, true);
        self.paused.insert(leader, resumes);
    }

    fn random_leader(&mut self, is: impl Fn(&Node) -> bool) -> Option<NodeId> {
        let mut leaders = Vec::new();
        for (at, node) in self.nodes.iter_mut().enumerate().filter(|(_, node)| is(node)) {
            if with_replica!(node, |replica, me| !replica.led().is_empty()) == Some(true) {
                leaders.push(NodeId(at));
            }
        }
        leaders.choose(&mut self.kernel.rng).copied()
    }

    // ---- storage ----

    pub(crate) fn snapshot(&mut self) {
        let id = self.random_node(Node::is_store);
        let kernel = &mut self.kernel;
        with_replica!(&mut self.nodes[id.0], |replica, me| replica.request_snapshot(kernel, &me));
    }

    pub(crate) fn remember_state(&mut self) {
        for node in &mut self.nodes {
            with_replica!(node, |replica, me| replica.remember_state());
        }
    }

    fn failing_write(&mut self) {
        self.counts.fault("failing write");
        let id = self.random_node(Node::is_store);
        let kernel = &mut self.kernel;
        with_replica!(&mut self.nodes[id.0], |replica, me| replica.fail_next_write(kernel));
    }

    fn set_full(&mut self, id: NodeId, full: bool) {
        if let Node::Shards(host) = &mut self.nodes[id.0] {
            host.full = full;
        }
        with_replica!(&mut self.nodes[id.0], |replica, me| replica.set_full(full));
    }

    fn full_log(&mut self) {
        self.counts.fault("full disk");
        let id = self.random_node(Node::is_store);
        self.kernel.note(format_args!("{id} has no room"));
        self.set_full(id, true);
        let room = self.kernel.rng.random_range(200 * MILLISECOND..4 * SECOND);
        self.kernel.at(self.kernel.now + room, Event::Fault(Fault::LogHasRoom(id)));
    }

    fn slow_disk(&mut self) {
        self.counts.fault("slow disk");
        let id = self.random_node(Node::is_store);
        let until = self.kernel.now + self.kernel.rng.random_range(SECOND..6 * SECOND);
        self.kernel.slow_disks.insert(id, until);
    }

    /// A bit of a log flips, or a machine comes back with an empty disk: as long as the others can bear it.
    fn spoil_log(&mut self) -> Result<(), String> {
        let id = self.random_node(Node::is_store);
        if !self.bears_loss_of(id) {
            return Ok(());
        }
        let kernel = &mut self.kernel;
        if kernel.chance(700) {
            let flipped =
                with_replica!(&mut self.nodes[id.0], |replica, me| replica.flip_log(kernel, &me, None));
            if flipped == Some(true) {
                self.counts.fault("bit of a log");
                // Noticed when it is read: now and then soon.
                if self.kernel.chance(600) {
                    return self.crash_for(id);
                }
            }
            return Ok(());
        }
        self.counts.fault("empty disk");
        self.crash(id)?;
        self.kernel.note(format_args!("{id} comes back with an empty disk"));
        let kernel = &mut self.kernel;
        with_replica!(&mut self.nodes[id.0], |replica, me| replica.replace_disk(kernel));
        let down = self.kernel.rng.random_range(MILLISECOND..4 * SECOND);
        self.kernel.at(self.kernel.now + down, Event::Fault(Fault::Restart(id)));
        Ok(())
    }

    /// What is on two of three replicas is lost to one of them while the other does not answer.
    fn bad_luck(&mut self) {
        let Some(map) = self.map() else { return };
        let Some(place) = map.groups.choose(&mut self.kernel.rng) else { return };
        let Ok(group) = u16::try_from(place.group).map(GroupId) else { return };
        let Some((leader, status)) = self.leading(group) else { return };
        let others: Vec<NodeId> = (0..self.nodes.len())
            .map(NodeId)
            .filter(|&id| {
                let store = self.store_of(id).filter(|_| id != leader);
                store.is_some_and(|store| status.membership.voters.contains(&store))
            })
            .collect();
        let &[damaged, behind] = &others[..] else { return };
        if !self.bears_loss_of(damaged) {
            return;
        }
        let strikes = self.kernel.now + self.kernel.rng.random_range(300 * MILLISECOND..3 * SECOND);
        self.isolate(behind, strikes, true);
        self.kernel.at(strikes, Event::Fault(Fault::BadLuck(group, [leader, damaged, behind])));
    }

    fn bad_luck_strikes(
        &mut self,
        group: GroupId,
        [leader, damaged, behind]: [NodeId; 3],
    ) -> Result<(), String> {
        let leads = self.leading(group).is_some_and(|(id, _)| id == leader);
        if !self.chaos || !leads || !self.bears_loss_of(damaged) || !self.up[behind.0] {
            return Ok(());
        }
        let kernel = &mut self.kernel;
        let flipped = with_replica!(&mut self.nodes[damaged.0], |replica, me| replica.flip_log(
            kernel,
            &me,
            Some(group)
        ));
        if flipped == Some(true) {
            self.counts.fault("bad luck");
            self.crash(damaged)?;
            let down = self.kernel.rng.random_range(MILLISECOND..50 * MILLISECOND);
            self.kernel.at(self.kernel.now + down, Event::Fault(Fault::Restart(damaged)));
            let wakes = self.kernel.now + self.kernel.rng.random_range(SECOND..4 * SECOND);
            self.paused.insert(leader, wakes);
        }
        Ok(())
    }

    /// Whether every group of this node's kind has three good voters or more, and nothing is left of an earlier
    /// loss.
    fn bears_loss_of(&mut self, id: NodeId) -> bool {
        let Some(kind) = self.nodes[id.0].kind() else { return false };
        let Some(map) = self.map() else { return false };
        let shrinks = map.groups.iter().any(|place| place.wanted.len() < 3);
        if shrinks || self.kernel.now < self.forced_at + 3 * SECOND {
            return false;
        }
        let same: Vec<NodeId> =
            (0..self.nodes.len()).map(NodeId).filter(|id| self.nodes[id.0].kind() == Some(kind)).collect();
        let spoiled = same
            .iter()
            .any(|id| with_replica!(&mut self.nodes[id.0], |replica, me| replica.spoiled) == Some(true));
        let stores: Vec<StoreId> = same.iter().filter_map(|&id| self.store_of(id)).collect();
        let groups = map.groups.iter().filter_map(|place| {
            let group = GroupId(u16::try_from(place.group).ok()?);
            (eggs_shuckle_core::kind_of(group) == Some(kind)).then_some(group)
        });
        let mut some = false;
        for group in groups {
            some = true;
            let Some((_, status)) = self.leading(group) else { return false };
            let members = &status.membership;
            let good = members.members().all(|store| stores.contains(&store));
            // All of them are there with all of the log: what the others do not have yet is not lost either.
            let has_all = |&store: &StoreId| {
                let node = same.iter().find(|&&id| self.store_of(id) == Some(store));
                let there = node.and_then(|&id| self.status(id, group));
                // Founding members are of index 0, as of who was not founded yet.
                there.is_some_and(|there| there.membership == *members)
            };
            if members.voters.len() < 3 || !good || !members.voters.iter().all(has_all) {
                return false;
            }
        }
        some && !spoiled
    }

    // ---- network ----

    fn cut(&mut self, partition: &Partition) {
        let set = if partition.peers { &mut self.kernel.peers_cut } else { &mut self.kernel.cut };
        set.extend(partition.pairs.iter().copied());
    }

    fn mend(&mut self, partition: &Partition) {
        let set = if partition.peers { &mut self.kernel.peers_cut } else { &mut self.kernel.cut };
        for pair in &partition.pairs {
            set.remove(pair);
        }
    }

    /// Nobody hears this node, or it hears nobody, or both.
    fn isolate(&mut self, id: NodeId, until: u64, peers: bool) {
        let others = (0..self.nodes.len()).map(NodeId).filter(|&other| other != id);
        let pairs = others.flat_map(|other| [(id, other), (other, id)]).collect();
        let partition = Partition { pairs, peers };
        self.cut(&partition);
        self.kernel.at(until, Event::Fault(Fault::Mend(partition)));
    }

    /// A random partition: of two nodes, of a machine from the rest, of the machines in two halves; both ways or
    /// one, of all traffic or of what stores say to one another.
    fn random_partition(&mut self) -> Partition {
        let nodes: Vec<NodeId> = (0..self.nodes.len()).map(NodeId).collect();
        let (left, right): (Vec<NodeId>, Vec<NodeId>) = match self.kernel.rng.random_range(0..3) {
            0 => (vec![self.random_node(|_| true)], vec![self.random_node(|_| true)]),
            shape => {
                let mut machines: Vec<usize> = (0..self.machines()).collect();
                machines.shuffle(&mut self.kernel.rng);
                machines.truncate(if shape == 1 { 1 } else { self.machines() / 2 });
                let inside: Vec<NodeId> =
                    machines.into_iter().flat_map(|machine| self.on_machine(machine)).collect();
                let outside = nodes.iter().copied().filter(|node| !inside.contains(node));
                let outside: Vec<NodeId> = outside.collect();
                (inside, outside)
            }
        };
        let both = self.kernel.chance(500);
        let mut pairs = Vec::new();
        for &a in &left {
            for &b in right.iter().filter(|&&b| b != a) {
                pairs.push((a, b));
                if both {
                    pairs.push((b, a));
                }
            }
        }
        if !both && self.kernel.chance(500) {
            pairs.iter_mut().for_each(|(a, b)| std::mem::swap(a, b));
        }
        Partition { pairs, peers: self.kernel.chance(500) }
    }

    pub(crate) fn partition(&mut self) {
        let partition = self.random_partition();
        self.counts.fault(if partition.peers { "partition of stores" } else { "partition" });
        let (pairs, peers) = (partition.pairs.len(), partition.peers);
        self.kernel.note(format_args!("cut {pairs} ways, from {:?}; peers {peers}", partition.pairs.first()));
        self.cut(&partition);
        let mend = self.kernel.rng.random_range(50 * MILLISECOND..5 * SECOND);
        self.kernel.at(self.kernel.now + mend, Event::Fault(Fault::Mend(partition)));
    }

    fn flap(&mut self) {
        self.counts.fault("flapping partition");
        let partition = self.random_partition();
        let times = self.kernel.rng.random_range(3..10);
        self.kernel.at(self.kernel.now, Event::Fault(Fault::Flap(partition, times * 2 - 1)));
    }

    // ---- clocks ----

    pub(crate) fn set_skew(&mut self, machine: usize, skew: i64) {
        self.clocks[machine].0 = skew;
        for id in self.on_machine(machine) {
            self.nodes[id.0].me().skew = skew;
        }
    }

    fn jump_clock(&mut self) {
        self.counts.fault("clock jump");
        let machine = self.random_machine();
        let before = self.clocks[machine].0;
        let jump = self.kernel.rng.random_range(-3 * SECOND as i64..3 * SECOND as i64);
        self.kernel.note(format_args!("the clock of machine {machine} jumps by {jump}"));
        self.set_skew(machine, before + jump);
        let back = self.kernel.rng.random_range(SECOND..8 * SECOND);
        self.kernel.at(self.kernel.now + back, Event::Fault(Fault::ClockBack(machine, before)));
    }

    // ---- members ----

    /// As people do with `eggsctl`: nobody waits for the answer.
    pub(crate) fn operator(&mut self, op: Op) {
        let Some((registry, _)) = self.leading(GroupId::SHUCKLE) else { return };
        self.kernel.note(format_args!("asked for {op:?}"));
        let header = request_header(&self.cluster, wall(self.kernel.now, 0).max(Time(1)), true);
        let request = pb::RegistryRequest { header: Some(header), op: Some(op) };
        let parts: Vec<Bytes> = vec![encode(&request)];
        let from = NodeId(self.nodes.len() - 1);
        let tag = self.kernel.tag();
        self.kernel.send(Envelope { from, to: registry, tag, rpc: Rpc::Registry, reply: false, parts });
    }

    /// A change of members or leader, sometimes together with a partition or a snapshot.
    fn change_members(&mut self) {
        let Some(map) = self.map() else { return };
        if self.kernel.chance(100) {
            let machine = self.random_machine();
            self.drained.insert(machine);
            self.counts.fault("drain");
            self.operator(Op::DrainHost(pb::DrainHost { host: format!("host{machine}"), undo: false }));
            if self.kernel.chance(900) {
                let undo = self.kernel.rng.random_range(2 * SECOND..20 * SECOND);
                self.kernel.at(self.kernel.now + undo, Event::Fault(Fault::Undrain(machine)));
            }
        } else if let Some(set) = self.random_members(&map) {
            self.counts.fault(if set.wanted.is_empty() {
                "transfer of leadership"
            } else {
                "change of members"
            });
            let group = set.group;
            self.operator(Op::SetReplicas(set));
            if self.kernel.chance(400) {
                self.counts.fault("snapshot in a change of members");
                for node in &mut self.nodes {
                    with_replica!(node, |replica, me| {
                        if let Some(host) = replica.host_mut() {
                            host.request_snapshot(GroupId(group as u16));
                        }
                        replica.go_on(&mut self.kernel, &me);
                    });
                }
            }
        }
        if self.kernel.chance(400) {
            self.counts.fault("partition in a change of members");
            self.partition();
        }
    }

    fn random_members(&mut self, map: &pb::ClusterMapReply) -> Option<pb::SetReplicas> {
        let place = map.groups.choose(&mut self.kernel.rng)?.clone();
        let group = GroupId(u16::try_from(place.group).ok()?);
        let kind = eggs_shuckle_core::kind_of(group)?;
        let of_kind = map.stores.iter().filter(|store| store.kind == i32::from(kind) && store.alive);
        let stores: Vec<u64> = of_kind.map(|store| store.id).collect();
        let spare: Vec<u64> = stores.iter().copied().filter(|store| !place.wanted.contains(store)).collect();
        let mut set = pb::SetReplicas { group: place.group, ..pb::SetReplicas::default() };
        // Nobody forces a group below three while one of its stores is known (to us) to be damaged.
        let whole = self
            .nodes
            .iter_mut()
            .all(|node| with_replica!(node, |replica, me| replica.spoiled) != Some(true));
        let rng = &mut self.kernel.rng;
        match (rng.random_range(0..4), spare.choose(rng)) {
            // Move.
            (0 | 1, Some(&new)) => {
                set.wanted = place.wanted.clone();
                let at = rng.random_range(0..set.wanted.len().max(1));
                *set.wanted.get_mut(at)? = new;
            }
            // Add.
            (2, Some(&new)) => {
                set.wanted = place.wanted.clone();
                set.wanted.push(new);
            }
            // Remove: below what the cluster is to have only by force.
            (2, None) if place.wanted.len() > 1 => {
                set.wanted = place.wanted.clone();
                set.wanted.remove(rng.random_range(0..place.wanted.len()));
                set.force = rng.random_range(0..4) == 0 && whole;
                if set.force {
                    self.forced_at = self.kernel.now;
                }
            }
            _ => set.preferred = *place.wanted.choose(rng)?,
        }
        Some(set)
    }

    // ---- disks of blocks ----

    pub(crate) fn add_disk(&mut self, host: NodeId) {
        let kernel = &mut self.kernel;
        if let Node::Blocks(host) = &mut self.nodes[host.0] {
            host.add_disk(kernel);
        }
    }

    fn random_disk(&mut self) -> (NodeId, usize) {
        let id = self.random_node(|node| matches!(node, Node::Blocks(_)));
        let Node::Blocks(host) = &self.nodes[id.0] else { return (id, 0) };
        (id, self.kernel.rng.random_range(0..host.disks.len()))
    }

    pub(crate) fn spoil_disk(&mut self) {
        let (id, at) = self.random_disk();
        match self.kernel.rng.random_range(0..10) {
            0..2 => {
                if let Node::Blocks(host) = &mut self.nodes[id.0] {
                    host.disks[at].full = true;
                }
                let room = self.kernel.rng.random_range(SECOND..5 * SECOND);
                self.kernel.at(self.kernel.now + room, Event::Fault(Fault::DiskHasRoom(id, at)));
            }
            2..6 => {
                self.lose_disk(id, at);
                // Several at once, while the code bears it.
                while self.kernel.chance(400) {
                    let (id, at) = self.random_disk();
                    self.lose_disk(id, at);
                }
            }
            _ => self.flip_bits(id, at),
        }
    }

    /// All that is on a disk is lost, if the code bears it; later another comes.
    fn lose_disk(&mut self, id: NodeId, at: usize) {
        let Some(mut redundancy) = Redundancy::of(self) else { return };
        let Node::Blocks(host) = &mut self.nodes[id.0] else { return };
        let disk = &mut host.disks[at];
        if disk.lost || !redundancy.take_disk(disk.identity.service.0) {
            return;
        }
        self.kernel.note(format_args!("lose disk {} of {id}", disk.identity.service));
        self.counts.disks_lost += 1;
        disk.lost = true;
        disk.segments.wipe();
        let new = self.kernel.rng.random_range(SECOND..6 * SECOND);
        self.kernel.at(self.kernel.now + new, Event::Fault(Fault::NewDisk(id)));
    }

    /// Bits of some blocks of a disk flip, as many as the code bears.
    fn flip_bits(&mut self, id: NodeId, at: usize) {
        let Some(mut redundancy) = Redundancy::of(self) else { return };
        let Node::Blocks(host) = &mut self.nodes[id.0] else { return };
        let disk = &mut host.disks[at];
        let service = disk.identity.service.0;
        let needed: BTreeSet<BlockId> = redundancy.blocks_on(service).collect();
        for block in disk.segments.blocks().collect::<Vec<_>>() {
            // Some of what nobody needs is spoiled, too.
            if self.kernel.rng.random_range(0..2) == 0
                && (!needed.contains(&block) || redundancy.take_block(service, block))
            {
                self.kernel.note(format_args!("rot {block} on disk {}", disk.identity.service));
                disk.segments.rot(block, &mut self.kernel.rng);
                disk.damaged.insert(block);
                self.counts.bits_flipped += 1;
            }
        }
    }
}
