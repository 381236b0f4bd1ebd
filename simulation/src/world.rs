//! The world: nodes, faults, and the loop that turns it until the clients are done and all is quiet.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;
use eggs_proto::{ClusterId, ShardId};
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore};

use crate::Options;
use crate::client::workload::{self, Common};
use crate::client::{Client, Task};
use crate::history::History;
use crate::kernel::{Event, Kernel, MILLISECOND, NodeId, SECOND, Weather};
use crate::nodes::blocks::{BlockHost, Disk};
use crate::nodes::coordinator::Coordinator;
use crate::nodes::registry::Registry;
use crate::nodes::shards::ShardHost;
use crate::nodes::{Cluster, Daemon, Me, Stop};
use crate::trace::Trace;

/// Disks on one host.
const DISKS_PER_HOST: usize = 2;
/// Disks that may be lost or damaged in one run: what the parity of every span bears.
pub(crate) const BAD_DISKS: usize = 2;
/// A run that is not over by then hangs.
const CHAOS_MAX: u64 = 3600 * SECOND;
const QUIET_MAX: u64 = 900 * SECOND;
const EVENTS_MAX: u64 = 5_000_000;

#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Something goes wrong now, and something else later.
    Next,
    Restart(NodeId),
    /// The pair hears each other again.
    Mend(NodeId, NodeId),
    DiskHasRoom(NodeId, usize),
    Calm,
}

pub(crate) enum Node {
    Registry(Box<Registry>),
    Shards(Box<ShardHost>),
    Coordinator(Box<Coordinator>),
    Blocks(Box<BlockHost>),
    Client(Box<Client>),
}

impl Node {
    fn daemon(&mut self) -> Option<&mut dyn Daemon> {
        match self {
            Node::Registry(node) => Some(&mut **node),
            Node::Shards(node) => Some(&mut **node),
            Node::Coordinator(node) => Some(&mut **node),
            Node::Blocks(node) => Some(&mut **node),
            Node::Client(_) => None,
        }
    }

    fn me(&mut self) -> &mut Me {
        match self {
            Node::Registry(node) => &mut node.me,
            Node::Shards(node) => &mut node.me,
            Node::Coordinator(node) => &mut node.me,
            Node::Blocks(node) => &mut node.me,
            Node::Client(node) => &mut node.me,
        }
    }
}

/// Numbers of a run, for its report.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    pub crashes: u64,
    pub disks_lost: u64,
    pub bits_flipped: u64,
}

pub(crate) struct World {
    pub kernel: Kernel,
    pub nodes: Vec<Node>,
    up: Vec<bool>,
    pub common: Rc<Common>,
    pub counts: Counts,
    /// (host, disk) that faults may destroy.
    bad_disks: Vec<(NodeId, usize)>,
    chaos: bool,
    faults: bool,
    pub seed: u64,
}

impl World {
    pub fn new(seed: u64, options: &Options, trace: Trace) -> Result<World, String> {
        let mut kernel = Kernel::new(seed, trace);
        let mut id = [0; 16];
        kernel.rng.fill_bytes(&mut id);
        id[0] |= 1;
        let mut secret = vec![0; 32];
        kernel.rng.fill_bytes(&mut secret);
        let cluster =
            Cluster { id: ClusterId(id), secret: Bytes::from(secret), registry: NodeId(0), bug: options.bug };
        let common = Rc::new(Common {
            seed,
            shards: options.shards,
            history: RefCell::new(History::default()),
            directories: RefCell::default(),
            left: RefCell::new(options.operations),
        });
        let mut world = World {
            kernel,
            nodes: Vec::new(),
            up: Vec::new(),
            common,
            counts: Counts::default(),
            bad_disks: Vec::new(),
            chaos: true,
            faults: options.faults,
            seed,
        };
        world.build(&cluster, options)?;
        Ok(world)
    }

    fn build(&mut self, cluster: &Cluster, options: &Options) -> Result<(), String> {
        let me = self.me();
        let mut registry = Registry::new(me, cluster.clone());
        registry.found(&mut self.kernel)?;
        self.add(Node::Registry(Box::new(registry)));
        let mut hosts: Vec<Vec<ShardId>> = vec![Vec::new(); options.shard_hosts.max(1)];
        for n in 0..options.shards {
            // Always with the root's shard, 1.
            hosts[n % options.shard_hosts.max(1)].push(ShardId(((n + 1) % 256) as u8));
        }
        for mut shards in hosts {
            shards.sort_unstable();
            let me = self.me();
            self.add(Node::Shards(Box::new(ShardHost::new(me, cluster.clone(), shards))));
        }
        let me = self.me();
        self.add(Node::Coordinator(Box::new(Coordinator::new(me, cluster.clone()))));
        let mut disks = Vec::new();
        for _ in 0..options.block_hosts {
            let me = self.me();
            disks.extend((0..DISKS_PER_HOST).map(|disk| (me.id, disk)));
            let host = BlockHost::new(me, cluster.clone(), DISKS_PER_HOST, &mut self.kernel);
            self.add(Node::Blocks(Box::new(host)));
        }
        self.bad_disks = disks.choose_multiple(&mut self.kernel.rng, BAD_DISKS).copied().collect();
        for _ in 0..options.clients {
            let me = self.me();
            self.add(Node::Client(Box::new(Client::new(me, cluster.clone()))));
        }
        for at in 0..self.nodes.len() {
            self.start(NodeId(at))?;
        }
        if options.faults {
            self.kernel.weather = Weather { lost: 5, duplicated: 10, slow: 10 };
            self.kernel.at(SECOND, Event::Fault(Fault::Next));
        }
        Ok(())
    }

    fn me(&mut self) -> Me {
        let skew = self.kernel.rng.random_range(-20..20) * MILLISECOND as i64;
        Me { id: NodeId(self.nodes.len()), life: 0, skew }
    }

    fn add(&mut self, node: Node) {
        self.nodes.push(node);
        self.up.push(false);
    }

    // ---- lives ----

    fn start(&mut self, id: NodeId) -> Result<(), String> {
        if std::mem::replace(&mut self.up[id.0], true) {
            return Ok(());
        }
        let node = &mut self.nodes[id.0];
        node.me().life += 1;
        let life = node.me().life;
        self.kernel.note(format_args!("start {id} (life {life})"));
        match node {
            Node::Client(client) => {
                let (common, seed) = (Rc::clone(&self.common), self.kernel.rng.next_u64());
                client.start(&mut self.kernel, seed, |port| -> Task {
                    Box::pin(workload::run(id.0, life, port, common))
                });
                Ok(())
            }
            node => match node.daemon() {
                Some(daemon) => {
                    daemon.start(&mut self.kernel).map_err(|why| format!("{id} does not start: {why}"))
                }
                None => Ok(()),
            },
        }
    }

    fn crash(&mut self, id: NodeId) -> Result<(), String> {
        if !std::mem::replace(&mut self.up[id.0], false) {
            return Ok(());
        }
        self.counts.crashes += 1;
        self.kernel.note(format_args!("crash {id}"));
        // Timers of this life mean nothing from here on.
        self.nodes[id.0].me().life += 1;
        match &mut self.nodes[id.0] {
            Node::Client(client) => {
                client.crash();
                Ok(())
            }
            node => node.daemon().map_or(Ok(()), |daemon| daemon.crash(&mut self.kernel)),
        }
    }

    fn crash_for(&mut self, id: NodeId) -> Result<(), String> {
        self.crash(id)?;
        let down = match self.kernel.rng.random_range(0..4) {
            0 => self.kernel.rng.random_range(SECOND..8 * SECOND),
            _ => self.kernel.rng.random_range(MILLISECOND..SECOND),
        };
        self.kernel.at(self.kernel.now + down, Event::Fault(Fault::Restart(id)));
        Ok(())
    }

    // ---- events ----

    fn turn(&mut self) -> Result<bool, String> {
        let Some(event) = self.kernel.next() else { return Ok(false) };
        match event {
            Event::Deliver(envelope) => {
                let to = envelope.to;
                if !self.up[to.0] {
                    return Ok(true);
                }
                let payload = envelope.parts.first().cloned().unwrap_or_default();
                let kind = if envelope.reply { "reply" } else { "request" };
                let line =
                    format_args!("{} -> {to} {:?} {kind} #{}", envelope.from, envelope.rpc, envelope.tag);
                self.kernel.trace.event(self.kernel.now, line, &payload);
                let kernel = &mut self.kernel;
                let result = match &mut self.nodes[to.0] {
                    Node::Client(client) => {
                        if envelope.reply {
                            client.on_reply(kernel, envelope);
                        }
                        Ok(())
                    }
                    node => match node.daemon() {
                        Some(daemon) if envelope.reply => daemon.on_reply(kernel, envelope),
                        Some(daemon) => daemon.on_request(kernel, envelope),
                        None => Ok(()),
                    },
                };
                self.stopped(to, result)?;
            }
            Event::Timer { node: id, life, timer } => {
                if !self.up[id.0] || self.nodes[id.0].me().life != life {
                    return Ok(true);
                }
                let kernel = &mut self.kernel;
                let result = match &mut self.nodes[id.0] {
                    Node::Client(client) => {
                        client.on_timer(kernel, timer);
                        Ok(())
                    }
                    node => node.daemon().map_or(Ok(()), |daemon| daemon.on_timer(kernel, timer)),
                };
                self.stopped(id, result)?;
            }
            Event::Fault(fault) => self.fault(fault)?,
        }
        Ok(true)
    }

    /// A daemon whose storage failed ends, and is started again.
    fn stopped(&mut self, id: NodeId, result: Result<(), Stop>) -> Result<(), String> {
        let Err(Stop::Storage(why)) = result else { return Ok(()) };
        self.kernel.note(format_args!("{id} stops: {why}"));
        if why.contains("input/output error") {
            return self.crash_for(id);
        }
        Err(format!("{id} stopped: {why}"))
    }

    // ---- faults ----

    fn fault(&mut self, fault: Fault) -> Result<(), String> {
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
            Fault::Mend(a, b) => {
                self.kernel.cut.remove(&(a, b));
                self.kernel.cut.remove(&(b, a));
                Ok(())
            }
            Fault::DiskHasRoom(host, disk) => {
                if let Node::Blocks(host) = &mut self.nodes[host.0] {
                    host.disks[disk].full = false;
                }
                Ok(())
            }
            Fault::Calm => {
                self.kernel.weather = Weather { lost: 5, duplicated: 10, slow: 10 };
                Ok(())
            }
        }
    }

    fn random_node(&mut self, is: impl Fn(&Node) -> bool) -> NodeId {
        let all: Vec<usize> =
            self.nodes.iter().enumerate().filter(|(_, node)| is(node)).map(|(at, _)| at).collect();
        NodeId(all.choose(&mut self.kernel.rng).copied().unwrap_or_default())
    }

    fn something(&mut self) -> Result<(), String> {
        match self.kernel.rng.random_range(0..100) {
            0..22 => {
                let id = self.random_node(|node| matches!(node, Node::Shards(_)));
                self.crash_for(id)
            }
            22..36 => {
                let id = self.random_node(|node| matches!(node, Node::Coordinator(_)));
                self.crash_for(id)
            }
            36..40 => {
                let id = self.random_node(|node| matches!(node, Node::Registry(_)));
                self.crash_for(id)
            }
            40..50 => {
                let id = self.random_node(|node| matches!(node, Node::Blocks(_)));
                self.crash_for(id)
            }
            50..54 => {
                let id = self.random_node(|node| matches!(node, Node::Client(_)));
                self.crash_for(id)
            }
            54..64 => {
                self.snapshot();
                Ok(())
            }
            64..72 => {
                self.remember_state();
                Ok(())
            }
            72..76 => {
                let id = self.random_node(|node| matches!(node, Node::Shards(_)));
                if let Node::Shards(host) = &mut self.nodes[id.0] {
                    host.fail_next_write = true;
                }
                Ok(())
            }
            76..84 => {
                self.partition();
                Ok(())
            }
            84..94 => {
                self.spoil_disk();
                Ok(())
            }
            _ => {
                self.kernel.weather = Weather { lost: 100, duplicated: 100, slow: 100 };
                let calm = self.kernel.rng.random_range(100 * MILLISECOND..2 * SECOND);
                self.kernel.at(self.kernel.now + calm, Event::Fault(Fault::Calm));
                Ok(())
            }
        }
    }

    fn snapshot(&mut self) {
        let id = self.random_node(|node| !matches!(node, Node::Client(_) | Node::Blocks(_)));
        if !self.up[id.0] {
            return;
        }
        match &mut self.nodes[id.0] {
            Node::Shards(host) => host.request_snapshot(&mut self.kernel),
            Node::Coordinator(node) => node.request_snapshot(&mut self.kernel),
            _ => {}
        }
    }

    fn remember_state(&mut self) {
        for (node, up) in self.nodes.iter_mut().zip(&self.up) {
            match node {
                _ if !up => {}
                Node::Shards(host) => host.replica.remember_state(),
                Node::Coordinator(node) => node.replica.remember_state(),
                Node::Registry(node) => node.replica.remember_state(),
                Node::Blocks(_) | Node::Client(_) => {}
            }
        }
    }

    fn partition(&mut self) {
        let (a, b) = (self.random_node(|_| true), self.random_node(|_| true));
        if a == b {
            return;
        }
        self.kernel.note(format_args!("cut {a} from {b}"));
        self.kernel.cut.insert((a, b));
        if self.kernel.chance(500) {
            self.kernel.cut.insert((b, a));
        }
        let mend = self.kernel.rng.random_range(50 * MILLISECOND..4 * SECOND);
        self.kernel.at(self.kernel.now + mend, Event::Fault(Fault::Mend(a, b)));
    }

    fn spoil_disk(&mut self) {
        let Some(&(bad, disk)) = self.bad_disks.choose(&mut self.kernel.rng) else { return };
        let choice = self.kernel.rng.random_range(0..10);
        if choice >= 8 {
            let full = self.random_node(|node| matches!(node, Node::Blocks(_)));
            let disk = self.kernel.rng.random_range(0..DISKS_PER_HOST);
            if let Node::Blocks(host) = &mut self.nodes[full.0] {
                host.disks[disk].full = true;
            }
            let room = self.kernel.rng.random_range(SECOND..5 * SECOND);
            self.kernel.at(self.kernel.now + room, Event::Fault(Fault::DiskHasRoom(full, disk)));
            return;
        }
        let Node::Blocks(host) = &mut self.nodes[bad.0] else { return };
        let disk = &mut host.disks[disk];
        if choice == 0 && self.kernel.now > 10 * SECOND {
            self.kernel.note(format_args!("lose disk {} of {bad}", disk.identity.service));
            self.counts.disks_lost += u64::from(!disk.lost);
            disk.lost = true;
            disk.files.wipe();
            return;
        }
        for path in disk.files.paths() {
            if !path.starts_with("tmp/") && self.kernel.rng.random_range(0..4) == 0 {
                let (at, bit) =
                    (self.kernel.rng.random_range(0..1 << 20), self.kernel.rng.random_range(0..8));
                disk.files.flip(&path, at, bit);
                self.counts.bits_flipped += 1;
            }
        }
    }

    // ---- the run ----

    /// Until every client has done its part.
    pub fn run_clients(&mut self) -> Result<(), String> {
        loop {
            let done = |(node, up): (&Node, &bool)| match node {
                Node::Client(client) => *up && client.is_done(),
                _ => true,
            };
            if *self.common.left.borrow() == 0 && self.nodes.iter().zip(&self.up).all(done) {
                return Ok(());
            }
            if !self.turn()? || self.kernel.now > CHAOS_MAX || self.kernel.trace.events() > EVENTS_MAX {
                return Err("the clients do not come to an end".to_owned());
            }
            if let Some(failure) = self.common.history.borrow().failures.first() {
                return Err(failure.clone());
            }
        }
    }

    /// No more faults; everything is up and what is on its way arrives.
    pub fn quiet(&mut self) -> Result<(), String> {
        self.chaos = false;
        self.kernel.weather = Weather::default();
        self.kernel.cut.clear();
        self.kernel.note(format_args!("quiet"));
        for at in 0..self.nodes.len() {
            if !matches!(self.nodes[at], Node::Client(_)) {
                self.start(NodeId(at))?;
            }
            if let Node::Blocks(host) = &mut self.nodes[at] {
                host.disks.iter_mut().for_each(|disk| disk.full = false);
            }
        }
        // Longer than any message takes and any map is believed.
        let earliest = self.kernel.now + if self.faults { 8 * SECOND } else { SECOND };
        let latest = self.kernel.now + QUIET_MAX;
        while self.kernel.now < earliest || !self.is_quiet() {
            if !self.turn()? || self.kernel.now > latest {
                let list =
                    self.coordinator().and_then(|node| node.driver.as_ref()).map(|driver| driver.list(5));
                return Err(format!("transactions do not come to an end: {list:?}"));
            }
        }
        Ok(())
    }

    fn is_quiet(&self) -> bool {
        self.coordinator().is_some_and(Coordinator::is_idle)
    }

    pub fn coordinator(&self) -> Option<&Coordinator> {
        self.nodes.iter().find_map(|node| match node {
            Node::Coordinator(node) => Some(&**node),
            _ => None,
        })
    }

    /// Disks that faults did not spoil.
    pub fn good_disks(&self) -> Vec<&Disk> {
        let mut good = Vec::new();
        for node in &self.nodes {
            if let Node::Blocks(host) = node {
                let is_good = |(disk, _): &(usize, &Disk)| !self.bad_disks.contains(&(host.me.id, *disk));
                good.extend(host.disks.iter().enumerate().filter(is_good).map(|(_, disk)| disk));
            }
        }
        good
    }

    pub fn shard_hosts(&self) -> impl Iterator<Item = &ShardHost> {
        self.nodes.iter().filter_map(|node| match node {
            Node::Shards(host) => Some(&**host),
            _ => None,
        })
    }

    /// Runs one more task in the place of a client, to its end.
    pub fn run_task(&mut self, task: impl FnOnce(crate::client::port::Port) -> Task) -> Result<(), String> {
        let id = self.nodes.len() - 1;
        let seed = self.kernel.rng.next_u64();
        let Node::Client(client) = &mut self.nodes[id] else { return Err("no client".to_owned()) };
        client.me.life += 1;
        self.up[id] = true;
        client.start(&mut self.kernel, seed, task);
        loop {
            if let Node::Client(client) = &self.nodes[id]
                && client.is_done()
            {
                return Ok(());
            }
            if !self.turn()? || self.kernel.trace.events() > EVENTS_MAX {
                return Err("the audit does not come to an end".to_owned());
            }
        }
    }
}
