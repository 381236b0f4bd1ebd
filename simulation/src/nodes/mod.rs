//! The daemons: for each the thin glue that its shell has in async code, once more in plain calls.
//!
//! A request is taken, prepared on the state as it is and proposed; a later turn makes it durable and
//! applies it; the answer is signed and sent. What is in flight when a node crashes is lost with it.

pub(crate) mod blocks;
pub(crate) mod coordinator;
pub(crate) mod registry;
pub(crate) mod shards;

use bytes::Bytes;
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::{ClusterId, Time, pb};
use prost::Message;
use rand::Rng;

use crate::bug::Bug;
use crate::kernel::{Envelope, Kernel, MICROSECOND, MILLISECOND, NodeId, Rpc, Timer};

/// What every daemon and client knows from its start.
#[derive(Debug, Clone)]
pub(crate) struct Cluster {
    pub id: ClusterId,
    pub secret: Bytes,
    pub registry: NodeId,
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
}

impl Me {
    pub fn wall(&self, kernel: &Kernel) -> Time {
        kernel.wall(self.skew)
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
pub(crate) fn turn_delay(kernel: &mut Kernel) -> u64 {
    match kernel.rng.random_range(0..50) {
        0 => kernel.rng.random_range(MILLISECOND..300 * MILLISECOND),
        _ => kernel.rng.random_range(30 * MICROSECOND..2 * MILLISECOND),
    }
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

/// What the registry is told every second, and asked for.
pub(crate) fn ask_registry(
    kernel: &mut Kernel,
    me: &Me,
    cluster: &Cluster,
    time: Time,
    ops: Vec<pb::registry_request::Op>,
) {
    for op in ops {
        let request = pb::RegistryRequest { header: Some(request_header(cluster, time, true)), op: Some(op) };
        let tag = kernel.tag();
        me.call(kernel, cluster.registry, tag, Rpc::Registry, vec![encode(&request)]);
    }
}

/// The cluster map in a registry's reply.
pub(crate) fn map_in(reply: &Envelope) -> Option<(Time, pb::ClusterMapReply)> {
    let reply: pb::RegistryReply = decode(&reply.parts)?;
    let time = Time(reply.header.map_or(0, |header| header.time));
    match reply.result {
        Some(pb::registry_reply::Result::Map(map)) => Some((time, map)),
        _ => None,
    }
}
