//! The daemons: for each the thin glue that its shell has in async code, once more in plain calls.
//!
//! A request is taken, prepared on the state as it is and proposed; a later turn makes it durable and
//! applies it; the answer is signed and sent. What is in flight when a node crashes is lost with it.

pub(crate) mod blocks;
pub(crate) mod coordinator;
pub(crate) mod registry;
pub(crate) mod segments;
pub(crate) mod shards;

use std::time::Duration;

use bytes::Bytes;
use eggs_consensus_core::Now;
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::{ClusterId, RegistryError, ServiceError, StoreId, Time, pb};
use prost::Message;
use rand::Rng;

use crate::bug::Bug;
use crate::kernel::{
    Envelope, Kernel, MICROSECOND, MILLISECOND, NodeId, PeerEnvelope, Rpc, SECOND, Timer, wall,
};

/// What every daemon and client knows from its start.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    pub id: ClusterId,
    pub secret: Bytes,
    /// Where a registry may be, the first founder first.
    pub registries: Vec<NodeId>,
    /// Replicas every group is to have.
    pub replicas: u32,
    /// Metadata shards, 1 to 256.
    pub shards: usize,
    /// Leaders answer reads on a lease.
    pub lease: bool,
    pub bug: Option<Bug>,
}

/// Who a node is, in this life.
#[derive(Debug, Clone)]
pub(crate) struct Me {
    pub id: NodeId,
    /// Counts its starts: timers of an earlier life mean nothing.
    pub life: u64,
    /// How far its wall clock is off, in nanoseconds.
    pub skew: i64,
    /// How much faster than others' its clock runs, in millionths.
    pub drift: i64,
    /// The machine it runs on: what fails at once.
    pub machine: usize,
}

impl Me {
    /// Its own clock at an instant of the world's.
    pub fn monotonic(&self, now: u64) -> u64 {
        let drifted = i128::from(now) * i128::from(1_000_000 + self.drift) / 1_000_000;
        u64::try_from(drifted).unwrap_or(0)
    }

    /// Its wall clock: set right again and again, so it does not drift away.
    pub fn wall(&self, kernel: &Kernel) -> Time {
        wall(kernel.now, self.skew)
    }

    pub fn now(&self, kernel: &Kernel) -> Now {
        // No two machines were started at once.
        let since_boot = self.monotonic(kernel.now) + self.machine as u64 * 1000 * SECOND;
        Now { monotonic: Duration::from_nanos(since_boot), wall: self.wall(kernel) }
    }

    /// The host it registers as.
    pub fn host(&self) -> String {
        format!("host{}", self.machine)
    }

    /// A tick when its own clock is there.
    pub fn raft_tick(&self, kernel: &mut Kernel, at: Duration) {
        self.timer_at(kernel, at, Timer::RaftTick(at));
    }

    /// When its own clock is there, within a nanosecond.
    pub fn timer_at(&self, kernel: &mut Kernel, at: Duration, timer: Timer) {
        let delay = at.saturating_sub(self.now(kernel).monotonic).as_nanos() as i64;
        let delay = delay - delay * self.drift / 1_000_000;
        self.timer(kernel, delay.unsigned_abs(), timer);
    }

    pub fn timer(&self, kernel: &mut Kernel, delay: u64, timer: Timer) {
        kernel.timer(self.id, self.life, delay, timer);
    }

    pub fn reply(&self, kernel: &mut Kernel, to: NodeId, tag: u64, rpc: Rpc, parts: Vec<Bytes>) {
        kernel.send(Envelope { from: self.id, to, tag, rpc, reply: true, parts });
    }

    pub fn call(&self, kernel: &mut Kernel, to: NodeId, tag: u64, rpc: Rpc, parts: Vec<Bytes>) {
        kernel.send(Envelope { from: self.id, to, tag, rpc, reply: false, parts });
    }
}

/// Why a node cannot go on.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Its storage failed: as every daemon then, it ends.
    Storage(String),
}

/// Every daemon of the cluster, seen from the world.
pub(crate) trait Daemon {
    /// Begins to serve; its stores are as the last crash left them.
    fn start(&mut self, kernel: &mut Kernel) -> Result<(), String>;
    /// Loses everything that is not durable.
    fn crash(&mut self, kernel: &mut Kernel) -> Result<(), String>;
    fn on_request(&mut self, kernel: &mut Kernel, request: Envelope) -> Result<(), Stop>;
    fn on_reply(&mut self, kernel: &mut Kernel, reply: Envelope) -> Result<(), Stop>;
    fn on_timer(&mut self, kernel: &mut Kernel, timer: Timer) -> Result<(), Stop>;
    /// Another store has something to say.
    fn on_peer(&mut self, _kernel: &mut Kernel, _envelope: PeerEnvelope) -> Result<(), Stop> {
        Ok(())
    }
}

/// Address of a node, as the registry keeps it.
pub(crate) fn address(node: NodeId) -> String {
    format!("10.0.0.1:{}", 5000 + node.0)
}

/// The node at an address.
pub(crate) fn node_at(address: &str) -> Option<NodeId> {
    let port: usize = address.rsplit_once(':')?.1.parse().ok()?;
    port.checked_sub(5000).map(NodeId)
}

/// How long one fsync of a log takes.
pub(crate) fn turn_delay(kernel: &mut Kernel, node: NodeId) -> u64 {
    if kernel.slow_disks.get(&node).is_some_and(|until| *until > kernel.now) {
        return kernel.rng.random_range(20 * MILLISECOND..400 * MILLISECOND);
    }
    match kernel.rng.random_range(0..50) {
        0 => kernel.rng.random_range(MILLISECOND..100 * MILLISECOND),
        _ => kernel.rng.random_range(30 * MICROSECOND..2 * MILLISECOND),
    }
}

/// Where the cluster map says that a group is led.
pub(crate) fn leader_in(map: &pb::ClusterMapReply, place: &pb::GroupPlace) -> Option<NodeId> {
    store_in(map, place.leader)
}

/// The node a store of the cluster map is on.
pub(crate) fn store_in(map: &pb::ClusterMapReply, store: u64) -> Option<NodeId> {
    let info = map.stores.iter().find(|info| store != 0 && info.id == store)?;
    node_at(&info.address)
}

pub(crate) fn reply_header(time: Time) -> Option<pb::ReplyHeader> {
    Some(pb::ReplyHeader { version: PROTOCOL_VERSION, time: time.0 })
}

pub(crate) fn request_header(cluster: &Cluster, time: Time, with_secret: bool) -> pb::RequestHeader {
    pb::RequestHeader {
        version: PROTOCOL_VERSION,
        time: time.0,
        cluster_id: Bytes::copy_from_slice(&cluster.id.0),
        session: 0,
        sequence: 0,
        secret: if with_secret { cluster.secret.clone() } else { Bytes::new() },
    }
}

pub(crate) fn encode(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

/// One message of one part; `None` for what is none (dropped, as a transport would).
pub(crate) fn decode<M: Message + Default>(parts: &[Bytes]) -> Option<M> {
    M::decode(parts.first()?.clone()).ok()
}

/// Hints in a row that a daemon follows.
const HINTS_MAX: usize = 3;

/// A daemon's way to the registry: one of its addresses after the other, until one leads.
#[derive(Debug, Clone, Default)]
pub(crate) struct RegistryLine {
    /// Which of the addresses is asked.
    at: usize,
    /// Which was asked last without being hinted at, and hints followed since: two that know nothing may name each other.
    turn: usize,
    hints: usize,
    /// Asked, and nothing came back yet.
    waiting: bool,
    /// The last answer was one.
    pub good: bool,
}

impl RegistryLine {
    /// Asks whoever seems to lead.
    pub fn ask(
        &mut self,
        kernel: &mut Kernel,
        me: &Me,
        cluster: &Cluster,
        time: Time,
        ops: Vec<pb::registry_request::Op>,
    ) {
        if std::mem::replace(&mut self.waiting, true) {
            self.next();
        }
        let to = cluster.registries[self.at % cluster.registries.len()];
        for op in ops {
            let header = Some(request_header(cluster, time, true));
            let request = pb::RegistryRequest { header, op: Some(op) };
            let tag = kernel.tag();
            me.call(kernel, to, tag, Rpc::Registry, vec![encode(&request)]);
        }
    }

    /// Takes in a reply: the cluster map when it is one.
    pub fn heard(&mut self, cluster: &Cluster, reply: &Envelope) -> Option<(Time, pb::ClusterMapReply)> {
        let message: pb::RegistryReply = decode(&reply.parts)?;
        self.waiting = false;
        let time = Time(message.header.map_or(0, |header| header.time));
        match message.result? {
            pb::registry_reply::Result::Map(map) => {
                (self.good, self.hints) = (true, 0);
                Some((time, map))
            }
            pb::registry_reply::Result::Error(error) => {
                let asked = cluster.registries[self.at % cluster.registries.len()];
                let not_leader = RegistryError::from_code(error.code) == Some(RegistryError::NotLeader);
                // Of several answers of one registry the first counts.
                if not_leader && reply.from == asked {
                    let hint = node_at(&error.leader);
                    let at = hint.and_then(|node| cluster.registries.iter().position(|&other| other == node));
                    match at {
                        Some(at) if self.hints < HINTS_MAX => {
                            (self.good, self.at) = (false, at);
                            self.hints += 1;
                        }
                        _ => self.next(),
                    }
                }
                None
            }
            _ => None,
        }
    }

    fn next(&mut self) {
        self.turn += 1;
        (self.good, self.at, self.hints) = (false, self.turn, 0);
    }

    /// How long until the next heartbeat.
    pub fn pause(&self) -> u64 {
        if self.good { SECOND } else { 100 * MILLISECOND }
    }
}

/// What a store says of itself each second.
pub(crate) fn register(
    me: &Me,
    store: StoreId,
    kind: pb::StoreKind,
    clock_offset: i64,
    led: Vec<pb::LedGroup>,
) -> pb::RegisterStore {
    pb::RegisterStore {
        id: store.0,
        kind: kind.into(),
        host: me.host(),
        address: address(me.id),
        clock_offset,
        led,
        boot: me.life + 1,
        ..pb::RegisterStore::default()
    }
}
