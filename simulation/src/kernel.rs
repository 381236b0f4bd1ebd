//! What every part of the world shares: the virtual clock, the one source of chance, the event queue
//! and the network.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use eggs_consensus_core::PeerBatch;
use eggs_proto::{StoreId, Time};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::faults::Fault;
use crate::oracle::Oracle;
use crate::trace::Trace;

pub(crate) const MICROSECOND: u64 = 1_000;
pub(crate) const MILLISECOND: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1_000_000_000;
/// Wall time when a run begins: some day of 2026.
const WALL_START: u64 = 1_780_000_000 * SECOND;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct NodeId(pub usize);

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Which call of which service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rpc {
    Shard,
    Crossdir,
    Registry,
    WriteBlock,
    FetchBlock,
    EraseBlocks,
    CheckBlocks,
}

/// Encoded messages on their way; a stream is several.
#[derive(Debug, Clone)]
pub(crate) struct Envelope {
    pub from: NodeId,
    pub to: NodeId,
    /// Chosen by the caller; its reply carries the same.
    pub tag: u64,
    pub rpc: Rpc,
    pub reply: bool,
    pub parts: Vec<Bytes>,
}

/// What one store says to another, on the stream between them.
#[derive(Debug, Clone)]
pub(crate) struct PeerEnvelope {
    pub from: NodeId,
    pub to: NodeId,
    pub from_store: StoreId,
    pub to_store: StoreId,
    /// The stream it is on: what is on its way when a stream breaks never comes.
    stream: u64,
    pub batch: PeerBatch,
}

impl PeerEnvelope {
    /// What it says, for people.
    pub fn says(&self) -> Vec<String> {
        use eggs_consensus_core::PeerMessage;
        let says = self.batch.messages.iter().map(|(group, message)| {
            let kind = match message {
                PeerMessage::Raft(raft) => format!(
                    "{:?} of term {} at {} ({} entries, commit {}, log term {}{})",
                    raft.get_msg_type(),
                    raft.term,
                    raft.index,
                    raft.entries.len(),
                    raft.commit,
                    raft.log_term,
                    if raft.reject { ", rejected" } else { "" }
                ),
                PeerMessage::Sleep { term, index, .. } => format!("sleeps in term {term} at {index}"),
                PeerMessage::Want { index, offset, .. } => {
                    format!("wants the snapshot at {index} from {offset}")
                }
                PeerMessage::Piece { index, offset, total, bytes, .. } => {
                    format!("{} bytes from {offset} of {total} of the snapshot at {index}", bytes.len())
                }
            };
            format!("{group}: {kind}")
        });
        says.collect()
    }

    /// Of what it says, for the trace.
    pub fn fingerprint(&self) -> u32 {
        use eggs_consensus_core::PeerMessage;
        let mut hash = crc32fast::Hasher::new();
        for (group, message) in &self.batch.messages {
            let numbers = match message {
                PeerMessage::Raft(raft) => {
                    let kind = raft.get_msg_type() as u64;
                    raft.entries.iter().for_each(|entry| hash.update(&entry.data));
                    [kind, raft.term, raft.index, raft.commit, u64::from(raft.reject), raft.log_term]
                }
                PeerMessage::Sleep { term, index, .. } => [100, *term, *index, 0, 0, 0],
                PeerMessage::Want { index, term, offset } => [101, *term, *index, *offset, 0, 0],
                PeerMessage::Piece { index, term, offset, total, bytes } => {
                    hash.update(bytes);
                    [102, *term, *index, *offset, *total, 0]
                }
            };
            hash.update(&group.0.to_le_bytes());
            numbers.iter().for_each(|number| hash.update(&number.to_le_bytes()));
        }
        hash.finalize()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Timer {
    /// A replica's next turn.
    Turn,
    /// A replica has held something long enough.
    Held,
    /// A tick: the node's own clock is there.
    RaftTick(Duration),
    /// The coordinator's driver, the registry's health, a daemon's heartbeat.
    Tick,
    Heartbeat,
    /// A call has waited long enough, or a client has slept enough.
    Expired(u64),
    /// A disk's next step of a write.
    Disk(u64),
}

#[derive(Debug, Clone)]
pub(crate) enum Event {
    Deliver(Envelope),
    Peer(PeerEnvelope),
    /// For this life of the node only.
    Timer {
        node: NodeId,
        life: u64,
        timer: Timer,
    },
    Fault(Fault),
}

/// How bad the network is, in parts of a thousand.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Weather {
    pub lost: u32,
    pub duplicated: u32,
    pub slow: u32,
    /// Streams between stores that break at a message.
    pub broken: u32,
}

/// The stream from one node's store to another's: in order while it lasts.
#[derive(Debug, Clone, Copy, Default)]
struct Link {
    stream: u64,
    last_arrival: u64,
    /// Not connected until then.
    down_until: u64,
    /// Since when what is sent does not arrive.
    silent_since: Option<u64>,
}

/// How long a stream that is cut looks as if it were none (keep-alive).
const KEEP_ALIVE: u64 = SECOND;

pub(crate) struct Kernel {
    /// Nanoseconds since the run began.
    pub now: u64,
    pub rng: ChaCha8Rng,
    pub trace: Trace,
    pub weather: Weather,
    /// Pairs that do not hear each other (in that direction).
    pub cut: BTreeSet<(NodeId, NodeId)>,
    /// Pairs whose stores do not hear each other, while everything else goes through.
    pub peers_cut: BTreeSet<(NodeId, NodeId)>,
    /// Nodes whose disk takes long, until when.
    pub slow_disks: BTreeMap<NodeId, u64>,
    /// What the consensus of the whole cluster was seen to do.
    pub oracle: Oracle,
    links: BTreeMap<(NodeId, NodeId), Link>,
    queue: BTreeMap<(u64, u64), Event>,
    sequence: u64,
    next_tag: u64,
}

impl Kernel {
    pub fn new(seed: u64, trace: Trace) -> Kernel {
        Kernel {
            now: 0,
            rng: ChaCha8Rng::seed_from_u64(seed),
            trace,
            weather: Weather::default(),
            cut: BTreeSet::new(),
            peers_cut: BTreeSet::new(),
            slow_disks: BTreeMap::new(),
            oracle: Oracle::default(),
            links: BTreeMap::new(),
            queue: BTreeMap::new(),
            sequence: 0,
            next_tag: 1,
        }
    }

    pub fn tag(&mut self) -> u64 {
        self.next_tag += 1;
        self.next_tag
    }

    pub fn note(&self, line: fmt::Arguments<'_>) {
        self.trace.event(self.now, line, &[]);
    }

    pub fn at(&mut self, when: u64, event: Event) {
        self.sequence += 1;
        self.queue.insert((when.max(self.now), self.sequence), event);
    }

    pub fn timer(&mut self, node: NodeId, life: u64, delay: u64, timer: Timer) {
        self.at(self.now + delay, Event::Timer { node, life, timer });
    }

    /// When the next event is.
    pub fn next_at(&self) -> Option<u64> {
        self.queue.first_key_value().map(|((when, _), _)| *when)
    }

    /// The next event; the clock moves to it.
    pub fn next(&mut self) -> Option<Event> {
        let ((when, _), event) = self.queue.pop_first()?;
        self.now = self.now.max(when);
        Some(event)
    }

    pub fn chance(&mut self, permille: u32) -> bool {
        permille > 0 && self.rng.random_range(0..1000) < permille
    }

    /// Nothing happens for a long time; what was due meanwhile is late.
    pub fn jump(&mut self, duration: u64) {
        self.now += duration;
    }

    /// Hands a message to the network: it comes late, twice, never, or out of order.
    pub fn send(&mut self, envelope: Envelope) {
        if self.cut.contains(&(envelope.from, envelope.to)) || self.chance(self.weather.lost) {
            self.note(format_args!(
                "lost {} -> {} {:?} #{}",
                envelope.from, envelope.to, envelope.rpc, envelope.tag
            ));
            return;
        }
        if self.chance(self.weather.duplicated) {
            let delay = self.delay() + self.rng.random_range(0..2 * SECOND);
            self.at(self.now + delay, Event::Deliver(envelope.clone()));
        }
        let delay = self.delay();
        self.at(self.now + delay, Event::Deliver(envelope));
    }

    /// Hands a batch to the stream between two stores. False: there is none, the sender knows at once.
    pub fn send_peer(
        &mut self,
        (from, from_store): (NodeId, StoreId),
        (to, to_store): (NodeId, StoreId),
        batch: PeerBatch,
    ) -> bool {
        self.oracle.batches += 1;
        let cut = self.cut.contains(&(from, to)) || self.peers_cut.contains(&(from, to));
        let (now, breaks, delay) = (self.now, self.chance(self.weather.broken), self.delay());
        let again = self.rng.random_range(MILLISECOND..300 * MILLISECOND);
        let link = self.links.entry((from, to)).or_default();
        if cut {
            let since = *link.silent_since.get_or_insert(now);
            link.stream += u64::from(since == now);
            return now - since < KEEP_ALIVE;
        }
        if link.silent_since.take().is_some() || breaks {
            link.stream += 1;
            link.down_until = now + again;
        }
        if now < link.down_until {
            return false;
        }
        link.last_arrival = link.last_arrival.max(now + delay);
        let (when, stream) = (link.last_arrival, link.stream);
        self.at(when, Event::Peer(PeerEnvelope { from, to, from_store, to_store, stream, batch }));
        true
    }

    /// Whether the stream it came on is still there.
    pub fn connected(&self, envelope: &PeerEnvelope) -> bool {
        self.links.get(&(envelope.from, envelope.to)).is_some_and(|link| link.stream == envelope.stream)
    }

    /// The node is gone: its streams break.
    pub fn break_links(&mut self, node: NodeId) {
        for ((from, to), link) in &mut self.links {
            if *from == node || *to == node {
                link.stream += 1;
                link.last_arrival = 0;
            }
        }
    }

    fn delay(&mut self) -> u64 {
        if self.chance(self.weather.slow) {
            return self.rng.random_range(MILLISECOND..800 * MILLISECOND);
        }
        self.rng.random_range(20 * MICROSECOND..200 * MICROSECOND)
    }
}

/// Wall clock of a node whose clock is off by `skew` nanoseconds.
pub(crate) fn wall(now: u64, skew: i64) -> Time {
    Time((WALL_START + now).saturating_add_signed(skew))
}
