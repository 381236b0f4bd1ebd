//! The world: nodes, faults, and the loop that turns it until the clients are done and all is quiet.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::Bytes;
use eggs_consensus_core::{GroupId, GroupStatus};
use eggs_proto::{ClusterId, ShardId, StoreId, pb};
use rand::seq::IndexedRandom;
use rand::{Rng, RngCore};

use crate::Options;
use crate::client::workload::{self, Common};
use crate::client::{Client, Task, janitor};
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
/// The network when nothing in particular is wrong with it.
pub(crate) const FAIR: Weather = Weather { lost: 5, duplicated: 10, slow: 10, broken: 1 };
/// A run that is not over by then hangs.
const CHAOS_MAX: u64 = 3600 * SECOND;
const EVENTS_MAX: u64 = 8_000_000;

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

    /// What kind of store it is.
    pub fn kind(&self) -> Option<pb::StoreKind> {
        match self {
            Node::Registry(_) => Some(pb::StoreKind::StoreShuckle),
            Node::Shards(_) => Some(pb::StoreKind::StoreShard),
            Node::Coordinator(_) => Some(pb::StoreKind::StoreCrossdir),
            Node::Blocks(_) | Node::Client(_) => None,
        }
    }

    pub fn is_store(&self) -> bool {
        self.kind().is_some()
    }

    pub fn me(&mut self) -> &mut Me {
        match self {
            Node::Registry(node) => &mut node.me,
            Node::Shards(node) => &mut node.me,
            Node::Coordinator(node) => &mut node.me,
            Node::Blocks(node) => &mut node.me,
            Node::Client(node) => &mut node.me,
        }
    }
}

/// Calls an expression with the replica of a node, whatever its kind, and who the node is.
macro_rules! with_replica {
    ($node:expr, |$replica:ident, $me:ident| $body:expr) => {
        match $node {
            $crate::world::Node::Registry(node) => {
                let ($replica, $me) = (&mut node.replica, node.me.clone());
                let _ = &$me;
                Some($body)
            }
            $crate::world::Node::Shards(node) => {
                let ($replica, $me) = (&mut node.replica, node.me.clone());
                let _ = &$me;
                Some($body)
            }
            $crate::world::Node::Coordinator(node) => {
                let ($replica, $me) = (&mut node.replica, node.me.clone());
                let _ = &$me;
                Some($body)
            }
            $crate::world::Node::Blocks(_) | $crate::world::Node::Client(_) => None,
        }
    };
}
pub(crate) use with_replica;

/// Numbers of a run, for its report.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    pub crashes: u64,
    pub disks_lost: u64,
    pub bits_flipped: u64,
    /// Faults by kind.
    pub faults: BTreeMap<&'static str, u64>,
}

impl Counts {
    pub fn fault(&mut self, kind: &'static str) {
        *self.faults.entry(kind).or_default() += 1;
    }
}

pub(crate) struct World {
    pub kernel: Kernel,
    pub nodes: Vec<Node>,
    pub(crate) up: Vec<bool>,
    pub common: Rc<Common>,
    pub counts: Counts,
    /// Where the janitor runs.
    pub(crate) janitor: NodeId,
    /// Nodes that crash right after their next so many events: in the middle of what they do.
    pub(crate) armed: BTreeMap<NodeId, u32>,
    /// Nodes that do nothing until then, and then go on as if nothing had been.
    pub(crate) paused: BTreeMap<NodeId, u64>,
    /// The next leader that is elected is cut off, and those that voted crash.
    pub(crate) ambush: bool,
    /// Machines that come up only later.
    pub(crate) late: Vec<NodeId>,
    /// When somebody last asked for fewer voters than the cluster is to have.
    pub(crate) forced_at: u64,
    /// Machines whose stores are to be empty.
    pub(crate) drained: BTreeSet<usize>,
    /// How far each machine's clock is off when nothing has happened to it.
    pub(crate) skews: Vec<i64>,
    /// Clocks of the machines: skew and drift.
    pub(crate) clocks: Vec<(i64, i64)>,
    pub(crate) cluster: Cluster,
    /// How far wall clocks of clients and disks are off.
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
        let chosen = [1, 3, 3, 3, 3, 3, 3, 5].choose(&mut kernel.rng).copied().unwrap_or(3);
        let replicas = options.replicas.unwrap_or(chosen);
        let cluster = Cluster {
            id: ClusterId(id),
            secret: Bytes::from(secret),
            registries: Vec::new(),
            replicas,
            shards: options.shards,
            lease: options.lease.unwrap_or_else(|| kernel.chance(500)),
            bug: options.bug,
        };
        let common = Rc::new(Common {
            seed,
            shards: options.shards,
            history: RefCell::new(History::default()),
            directories: RefCell::default(),
            recent: RefCell::default(),
            left: RefCell::new(options.operations),
            janitor_rests: Cell::new(false),
            moving: RefCell::default(),
            missing: RefCell::default(),
            repaired: Cell::new(0),
        });
        let mut world = World {
            kernel,
            nodes: Vec::new(),
            up: Vec::new(),
            common,
            counts: Counts::default(),
            janitor: NodeId(usize::MAX),
            armed: BTreeMap::new(),
            paused: BTreeMap::new(),
            ambush: false,
            late: Vec::new(),
            drained: BTreeSet::new(),
            forced_at: 0,
            clocks: Vec::new(),
            skews: Vec::new(),
            cluster,
            skew_max,
            chaos: true,
            faults: options.faults,
            seed,
        };
        world.build(options)?;
        Ok(world)
    }

    /// How the machines' clocks go: close together, but in some runs those of a minority are far off.
    fn set_clocks(&mut self, machines: usize) {
        let replicas = self.cluster.replicas as usize;
        let drift_max = [100, 10_000, 40_000].choose(&mut self.kernel.rng).copied().unwrap_or(100);
        for _ in 0..machines {
            let skew = self.kernel.rng.random_range(-100 * MILLISECOND as i64..=100 * MILLISECOND as i64);
            self.clocks.push((skew, self.kernel.rng.random_range(-drift_max..=drift_max)));
        }
        if self.faults && replicas >= 3 && self.kernel.chance(200) {
            let far = self.kernel.rng.random_range(700 * MILLISECOND..5 * SECOND) as i64;
            self.clocks[machines - 1].0 = if self.kernel.chance(500) { far } else { -far };
        }
        self.skews = self.clocks.iter().map(|(skew, _)| *skew).collect();
    }

    fn build(&mut self, options: &Options) -> Result<(), String> {
        let replicas = self.cluster.replicas as usize;
        let spare = match replicas {
            1 => 1,
            _ => usize::from(self.faults && self.kernel.chance(600)),
        };
        let machines = replicas + spare;
        self.set_clocks(machines);
        self.cluster.registries = (0..machines).map(NodeId).collect();
        let cluster = self.cluster.clone();
        for machine in 0..machines {
            let me = self.me_on(machine);
            let registry = Registry::new(&mut self.kernel, me, cluster.clone());
            self.add(Node::Registry(Box::new(registry)));
        }
        if let Node::Registry(first) = &mut self.nodes[0] {
            first.found(&mut self.kernel)?;
        }
        for machine in 0..machines {
            let me = self.me_on(machine);
            let host = ShardHost::new(&mut self.kernel, me, cluster.clone());
            self.add(Node::Shards(Box::new(host)));
        }
        for machine in 0..machines {
            let me = self.me_on(machine);
            let coordinator = Coordinator::new(&mut self.kernel, me, cluster.clone());
            self.add(Node::Coordinator(Box::new(coordinator)));
        }
        for n in 0..options.block_hosts {
            let me = self.me(machines + n);
            let host = BlockHost::new(me, cluster.clone(), DISKS_PER_HOST, &mut self.kernel);
            self.add(Node::Blocks(Box::new(host)));
        }
        // The first of the clients is the janitor.
        self.janitor = NodeId(self.nodes.len());
        for n in 0..=options.clients {
            let me = self.me(machines + options.block_hosts + n);
            self.add(Node::Client(Box::new(Client::new(me, cluster.clone()))));
        }
        // The spare machine may join later.
        let joins_late = spare > 0 && self.faults && self.kernel.chance(500);
        for at in 0..self.nodes.len() {
            let is_late = self.nodes[at].is_store() && self.nodes[at].me().machine == replicas;
            if joins_late && is_late {
                self.late.push(NodeId(at));
            } else {
                self.start(NodeId(at))?;
            }
        }
        if options.faults {
            self.kernel.weather = FAIR;
            self.kernel.at(2 * SECOND, Event::Fault(Fault::Next));
            let late = self.kernel.rng.random_range(2 * SECOND..15 * SECOND);
            self.kernel.at(late, Event::Fault(Fault::Join));
        }
        Ok(())
    }

    fn me(&mut self, machine: usize) -> Me {
        let skew = self.kernel.rng.random_range(-self.skew_max..=self.skew_max);
        Me { id: NodeId(self.nodes.len()), life: 0, skew, drift: 0, machine }
    }

    fn me_on(&mut self, machine: usize) -> Me {
        let (skew, drift) = self.clocks[machine];
        Me { id: NodeId(self.nodes.len()), life: 0, skew, drift, machine }
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
                let is_janitor = id == self.janitor;
                client.start(&mut self.kernel, seed, |port| -> Task {
                    match is_janitor {
                        true => Box::pin(janitor::run(port, common)),
                        false => Box::pin(workload::run(id.0, life, port, common)),
                    }
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
        self.kernel.break_links(id);
        self.paused.remove(&id);
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

    pub(crate) fn turn(&mut self) -> Result<bool, String> {
        let Some(event) = self.kernel.next() else { return Ok(false) };
        let to = match &event {
            Event::Deliver(envelope) => Some(envelope.to),
            Event::Peer(envelope) => Some(envelope.to),
            Event::Timer { node, .. } => Some(*node),
            Event::Fault(_) => None,
        };
        if let Some(to) = to
            && let Some(&until) = self.paused.get(&to)
        {
            if until > self.kernel.now {
                self.kernel.at(until, event);
                return Ok(true);
            }
            self.paused.remove(&to);
        }
        let elections = self.kernel.oracle.elections();
        self.dispatch(event)?;
        if self.ambush && self.kernel.oracle.elections() > elections {
            self.spring_ambush()?;
        }
        if let Some(failure) = self.kernel.oracle.failures.first() {
            return Err(failure.clone());
        }
        Ok(true)
    }

    fn dispatch(&mut self, event: Event) -> Result<(), String> {
        let node = match &event {
            Event::Deliver(envelope) => envelope.to,
            Event::Peer(envelope) => envelope.to,
            Event::Timer { node, .. } => *node,
            Event::Fault(_) => return self.dispatch_one(event),
        };
        let spoiled = with_replica!(&mut self.nodes[node.0], |replica, me| replica.spoiled) == Some(true);
        if !spoiled {
            return self.dispatch_one(event);
        }
        // What raft cannot read it panics of: the process ends then.
        let attempt = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.dispatch_one(event)));
        attempt.unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            self.kernel.note(format_args!("{node} panics: {text}"));
            self.crash_for(node)
        })
    }

    fn dispatch_one(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Deliver(envelope) => {
                let to = envelope.to;
                if !self.up[to.0] {
                    return Ok(());
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
            Event::Peer(envelope) => {
                let to = envelope.to;
                if !self.up[to.0] || !self.kernel.connected(&envelope) {
                    return Ok(());
                }
                let hash = envelope.fingerprint();
                let count = envelope.batch.messages.len();
                let line = format_args!("{} -> {to} {count} of peers {hash:08x}", envelope.from);
                self.kernel.trace.event(self.kernel.now, line, &[]);
                if self.kernel.trace.prints() {
                    envelope.says().iter().for_each(|text| self.kernel.trace.more(text));
                }
                let kernel = &mut self.kernel;
                let result =
                    self.nodes[to.0].daemon().map_or(Ok(()), |daemon| daemon.on_peer(kernel, envelope));
                self.stopped(to, result)?;
            }
            Event::Timer { node: id, life, timer } => {
                if !self.up[id.0] || self.nodes[id.0].me().life != life {
                    return Ok(());
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
        Ok(())
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
        let spoiled = with_replica!(&mut self.nodes[id.0], |replica, me| replica.spoiled);
        let expected = why.contains("input/output error") || why.contains("no space left");
        if expected || (spoiled == Some(true) && why.contains("damaged")) {
            return self.crash_for(id);
        }
        Err(format!("{id} stopped: {why}"))
    }

    // ---- the run ----

    /// Until every client has done its part.
    pub fn run_clients(&mut self) -> Result<(), String> {
        loop {
            let janitor = self.janitor.0;
            let done = |(at, (node, up)): (usize, (&Node, &bool))| match node {
                Node::Client(client) => at == janitor || (*up && client.is_done()),
                _ => true,
            };
            if *self.common.left.borrow() == 0 && self.nodes.iter().zip(&self.up).enumerate().all(done) {
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

    // ---- looking from outside ----

    pub fn store_of(&self, id: NodeId) -> Option<StoreId> {
        match &self.nodes[id.0] {
            Node::Registry(node) => Some(node.replica.store),
            Node::Shards(node) => Some(node.replica.store),
            Node::Coordinator(node) => Some(node.replica.store),
            Node::Blocks(_) | Node::Client(_) => None,
        }
    }

    /// Stores that came back as others.
    pub fn put_aside(&self) -> usize {
        let of = |node: &Node| match node {
            Node::Registry(node) => node.replica.put_aside.len(),
            Node::Shards(node) => node.replica.put_aside.len(),
            Node::Coordinator(node) => node.replica.put_aside.len(),
            Node::Blocks(_) | Node::Client(_) => 0,
        };
        self.nodes.iter().map(of).sum()
    }

    /// How a group is on a node.
    pub fn status(&self, id: NodeId, group: GroupId) -> Option<GroupStatus> {
        match &self.nodes[id.0] {
            Node::Registry(node) => node.replica.host()?.status(group),
            Node::Shards(node) => node.replica.host()?.status(group),
            Node::Coordinator(node) => node.replica.host()?.status(group),
            Node::Blocks(_) | Node::Client(_) => None,
        }
    }

    /// Who leads a group: the one of the highest term who thinks so.
    pub fn leading(&self, group: GroupId) -> Option<(NodeId, GroupStatus)> {
        let all = (0..self.nodes.len()).map(NodeId);
        let leading = all.filter_map(|id| Some((id, self.status(id, group).filter(|status| status.leader)?)));
        leading.max_by_key(|(_, status)| status.term)
    }

    /// The cluster map, as the registry that leads has it.
    pub fn map(&self) -> Option<pb::ClusterMapReply> {
        let (id, _) = self.leading(GroupId::SHUCKLE)?;
        match &self.nodes[id.0] {
            Node::Registry(node) => node.map(&self.kernel),
            _ => None,
        }
    }

    pub fn shards(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.common.shards).map(|n| ShardId(n as u8))
    }

    /// The host that leads a shard.
    pub fn shard_host(&self, shard: ShardId) -> Option<&ShardHost> {
        let (id, _) = self.leading(crate::nodes::shards::group_of(shard))?;
        match &self.nodes[id.0] {
            Node::Shards(host) => Some(host),
            _ => None,
        }
    }

    pub fn coordinator(&self) -> Option<&Coordinator> {
        let (id, _) = self.leading(GroupId::CROSSDIR)?;
        match &self.nodes[id.0] {
            Node::Coordinator(node) => Some(node),
            _ => None,
        }
    }

    /// All disks that ever were.
    pub fn disks(&self) -> impl Iterator<Item = &Disk> {
        self.nodes.iter().flat_map(|node| match node {
            Node::Blocks(host) => &host.disks[..],
            _ => &[],
        })
    }

    /// Lets the world go on for a while.
    pub fn run_for(&mut self, duration: u64) -> Result<(), String> {
        let until = self.kernel.now + duration;
        while self.kernel.next_at().is_some_and(|at| at <= until) {
            self.turn()?;
        }
        self.kernel.now = self.kernel.now.max(until);
        Ok(())
    }

    /// Groups that do not sleep, and where.
    pub fn awake(&self) -> Vec<(NodeId, GroupStatus)> {
        let nodes = (0..self.nodes.len()).map(NodeId);
        let groups = |id| {
            let all = self.map().map(|map| map.groups).unwrap_or_default();
            let ids = all.into_iter().filter_map(|place| u16::try_from(place.group).ok());
            ids.filter_map(move |group| Some((id, self.status(id, GroupId(group))?))).collect::<Vec<_>>()
        };
        nodes.flat_map(groups).filter(|(_, status)| !status.asleep).collect()
    }

    /// Begins one more task in the place of a client.
    pub fn begin_task(&mut self, task: impl FnOnce(crate::client::port::Port) -> Task) -> Result<(), String> {
        let id = self.nodes.len() - 1;
        let seed = self.kernel.rng.next_u64();
        let Node::Client(client) = &mut self.nodes[id] else { return Err("no client".to_owned()) };
        client.me.life += 1;
        self.up[id] = true;
        client.start(&mut self.kernel, seed, task);
        Ok(())
    }

    /// Runs the task that was begun to its end.
    pub fn end_task(&mut self) -> Result<(), String> {
        let id = self.nodes.len() - 1;
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

    /// Runs one more task in the place of a client, to its end.
    pub fn run_task(&mut self, task: impl FnOnce(crate::client::port::Port) -> Task) -> Result<(), String> {
        self.begin_task(task)?;
        self.end_task()
    }
}
