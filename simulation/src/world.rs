//! The world: nodes, faults, and the loop that turns it until the clients are done and all is quiet.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use eggs_proto::{ClusterId, ShardId};
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore};

use crate::Options;
use crate::client::workload::{self, Common};
use crate::client::{Client, Task};
use crate::faults::Fault;
use crate::history::History;
use crate::kernel::{Event, Kernel, MILLISECOND, NodeId, SECOND, Weather};
use crate::nodes::blocks::{BlockHost, Disk};
use crate::nodes::coordinator::Coordinator;
use crate::nodes::registry::Registry;
use crate::nodes::shards::ShardHost;
use crate::nodes::{Cluster, Daemon, Me, Stop};
use crate::trace::Trace;

/// Disks on one host.
pub(crate) const DISKS_PER_HOST: usize = 2;
/// Disks that may be lost or damaged in one run: what the parity of every span bears.
pub(crate) const BAD_DISKS: usize = 2;
/// A run that is not over by then hangs.
const CHAOS_MAX: u64 = 3600 * SECOND;
const QUIET_MAX: u64 = 900 * SECOND;
const EVENTS_MAX: u64 = 5_000_000;

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
    pub(crate) up: Vec<bool>,
    pub common: Rc<Common>,
    pub counts: Counts,
    /// (host, disk) that faults may destroy.
    pub(crate) bad_disks: Vec<(NodeId, usize)>,
    /// Nodes that crash right after their next so many events: in the middle of what they do.
    pub(crate) armed: BTreeMap<NodeId, u32>,
    /// How far wall clocks are off.
    skew_max: i64,
    pub(crate) chaos: bool,
    pub(crate) faults: bool,
    pub seed: u64,
}

impl World {
    pub fn new(seed: u64, options: &Options, trace: Trace) -> Result<World, String> {
        let mut kernel = Kernel::new(seed, trace);
        let mut id = [0; 16];
        kernel.rng.fill_bytes(&mut id);
        id[0] |= 1;
        let skews = [MILLISECOND, 20 * MILLISECOND, 3 * SECOND];
        let skew_max = skews.choose(&mut kernel.rng).map_or(0, |&skew| skew as i64);
        let mut secret = vec![0; 32];
        kernel.rng.fill_bytes(&mut secret);
        let cluster =
            Cluster { id: ClusterId(id), secret: Bytes::from(secret), registry: NodeId(0), bug: options.bug };
        let common = Rc::new(Common {
            seed,
            shards: options.shards,
            history: RefCell::new(History::default()),
            directories: RefCell::default(),
            recent: RefCell::default(),
            left: RefCell::new(options.operations),
        });
        let mut world = World {
            kernel,
            nodes: Vec::new(),
            up: Vec::new(),
            common,
            counts: Counts::default(),
            bad_disks: Vec::new(),
            armed: BTreeMap::new(),
            skew_max,
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
        let skew = self.kernel.rng.random_range(-self.skew_max..=self.skew_max);
        Me { id: NodeId(self.nodes.len()), life: 0, skew }
    }

    fn add(&mut self, node: Node) {
        self.nodes.push(node);
        self.up.push(false);
    }

    // ---- lives ----

    pub(crate) fn start(&mut self, id: NodeId) -> Result<(), String> {
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

    pub(crate) fn crash(&mut self, id: NodeId) -> Result<(), String> {
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

    /// Now, or a few of its events from now.
    pub(crate) fn crash_soon(&mut self, id: NodeId) -> Result<(), String> {
        if self.kernel.chance(300) {
            return self.crash_for(id);
        }
        let events = self.kernel.rng.random_range(1..12);
        self.armed.insert(id, events);
        Ok(())
    }

    pub(crate) fn crash_for(&mut self, id: NodeId) -> Result<(), String> {
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

    /// A daemon whose storage failed ends, and is started again; so does one whose hour has come.
    fn stopped(&mut self, id: NodeId, result: Result<(), Stop>) -> Result<(), String> {
        let Err(Stop::Storage(why)) = result else {
            let Some(left) = self.armed.get_mut(&id) else { return Ok(()) };
            *left = left.saturating_sub(1);
            if *left > 0 {
                return Ok(());
            }
            self.armed.remove(&id);
            return self.crash_for(id);
        };
        self.kernel.note(format_args!("{id} stops: {why}"));
        if why.contains("input/output error") {
            return self.crash_for(id);
        }
        Err(format!("{id} stopped: {why}"))
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
        self.armed.clear();
        self.kernel.weather = Weather::default();
        self.kernel.cut.clear();
        self.kernel.note(format_args!("quiet"));
        for at in 0..self.nodes.len() {
            if !matches!(self.nodes[at], Node::Client(_)) {
                self.start(NodeId(at))?;
            }
            match &mut self.nodes[at] {
                Node::Blocks(host) => host.disks.iter_mut().for_each(|disk| disk.full = false),
                Node::Shards(host) => host.fail_next_write = false,
                _ => {}
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
