//! What every part of the world shares: the virtual clock, the one source of chance, the event queue
//! and the network.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bytes::Bytes;
use eggs_proto::Time;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::faults::Fault;
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Timer {
    /// A replica's next turn.
    Turn,
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
}

pub(crate) struct Kernel {
    /// Nanoseconds since the run began.
    pub now: u64,
    pub rng: ChaCha8Rng,
    pub trace: Trace,
    pub weather: Weather,
    /// Pairs that do not hear each other (in that direction).
    pub cut: BTreeSet<(NodeId, NodeId)>,
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
            queue: BTreeMap::new(),
            sequence: 0,
            next_tag: 1,
        }
    }

    /// Wall clock of a node whose clock is off by `skew` nanoseconds.
    pub fn wall(&self, skew: i64) -> Time {
        wall(self.now, skew)
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

    fn delay(&mut self) -> u64 {
        if self.chance(self.weather.slow) {
            return self.rng.random_range(MILLISECOND..800 * MILLISECOND);
        }
        self.rng.random_range(20 * MICROSECOND..200 * MICROSECOND)
    }
}

pub(crate) fn wall(now: u64, skew: i64) -> Time {
    Time((WALL_START + now).saturating_add_signed(skew))
}
