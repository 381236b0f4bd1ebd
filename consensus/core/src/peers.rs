//! The other stores: when they were last heard of, whether they restarted, how far their clocks are off.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use eggs_proto::limits::CLOCK_OFFSET_MAX;
use eggs_proto::{GroupId, StoreId, pb};

use crate::peer::{Now, PeerBatch, PeerMessage};

/// A peer that has been told nothing for this long is told that we are here.
const HEARTBEAT_TICKS: u64 = 3;
/// A round trip longer than this says little about the clocks.
const ROUND_TRIP_MAX: Duration = Duration::from_secs(1);
/// Stores that have no group in common with this one, and yet speak to it: somebody makes them members.
const STRANGERS_MAX: usize = 64;
/// Ticks after which a measured offset is not the best any more, however short its round trip.
const OFFSET_TICKS: u64 = 100;

/// Entries that are decided without their receiver wait so long for others, or for any other message to it …
const HELD_MAX: Duration = Duration::from_millis(5);
/// … and no longer when they are as many bytes.
const HELD_BYTES_MAX: usize = 256 << 10;

/// What news of a peer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    AsEver,
    /// It was silent before.
    Back,
    /// It leads nothing of what it led.
    Restarted,
}

#[derive(Debug, Default)]
struct Peer {
    boot: u64,
    heard_at: u64,
    silent: bool,
    /// No member of any group here, but it spoke: it has to hear that we are there.
    stranger: bool,
    leaving: bool,
    told_at: u64,
    /// Its last heartbeat: when it was sent (its clock), when it came (ours).
    echo: Option<(u64, Duration)>,
    offset: Option<Offset>,
}

/// How far a peer's wall clock is ahead, and how well that is known.
#[derive(Debug, Clone, Copy)]
struct Offset {
    nanos: i64,
    round_trip: Duration,
    at: u64,
}

/// All peers, and what is to be sent to them.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    boot: u64,
    leaving: bool,
    peers: BTreeMap<StoreId, Peer>,
    outbox: BTreeMap<StoreId, Vec<(GroupId, PeerMessage)>>,
    held: BTreeMap<StoreId, Held>,
}

/// What is said to a peer together.
#[derive(Debug)]
struct Held {
    /// Of the first, by our monotonic clock.
    since: Duration,
    bytes: usize,
    messages: Vec<(GroupId, PeerMessage)>,
}

impl Held {
    fn until(&self) -> Duration {
        if self.bytes >= HELD_BYTES_MAX { Duration::ZERO } else { self.since + HELD_MAX }
    }
}

impl Peers {
    pub(crate) fn new(boot: u64) -> Self {
        Peers { boot: boot | 1, ..Peers::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }

    pub(crate) fn has_mail(&self) -> bool {
        !self.outbox.is_empty() || self.held_until() == Some(Duration::ZERO)
    }

    /// When what is held is to be sent at the latest, by our monotonic clock.
    pub(crate) fn held_until(&self) -> Option<Duration> {
        self.held.values().map(Held::until).min()
    }

    /// From now on these are the peers.
    pub(crate) fn set(&mut self, stores: &BTreeSet<StoreId>, tick: u64) {
        self.peers.retain(|store, peer| peer.stranger || stores.contains(store));
        for &store in stores {
            // Given the time to say something before it counts as silent.
            let peer = self.peers.entry(store).or_insert_with(|| Peer { heard_at: tick, ..Peer::default() });
            peer.stranger = false;
        }
    }

    pub(crate) fn post(&mut self, to: StoreId, group: GroupId, message: PeerMessage) {
        self.outbox.entry(to).or_default().push((group, message));
    }

    /// What need not be said at once: `bytes` of entries.
    pub(crate) fn hold(&mut self, to: StoreId, group: GroupId, message: PeerMessage, bytes: usize, now: Now) {
        let held = Held { since: now.monotonic, bytes: 0, messages: Vec::new() };
        let held = self.held.entry(to).or_insert(held);
        held.bytes += bytes;
        held.messages.push((group, message));
    }

    /// What was held goes before what came after it.
    fn release(&mut self, now: Now) {
        let outbox = &self.outbox;
        let due = |to: &StoreId, held: &mut Held| held.until() <= now.monotonic || outbox.contains_key(to);
        let due: Vec<_> = self.held.extract_if(.., due).collect();
        for (to, held) in due {
            let messages = self.outbox.entry(to).or_default();
            let later = std::mem::replace(messages, held.messages);
            messages.extend(later);
        }
    }

    /// Takes in a heartbeat.
    pub(crate) fn heard(
        &mut self,
        from: StoreId,
        heartbeat: &pb::PeerHeartbeat,
        tick: u64,
        now: Now,
    ) -> Heard {
        if !self.peers.contains_key(&from) {
            let strangers = self.peers.values().filter(|peer| peer.stranger).count();
            if strangers >= STRANGERS_MAX {
                return Heard::AsEver;
            }
            self.peers.insert(from, Peer { stranger: true, ..Peer::default() });
        }
        let Some(peer) = self.peers.get_mut(&from) else { return Heard::AsEver };
        let restarted = peer.boot != 0 && peer.boot != heartbeat.boot;
        let back = std::mem::take(&mut peer.silent);
        peer.boot = heartbeat.boot;
        peer.leaving = heartbeat.leaving;
        peer.heard_at = tick;
        peer.echo = Some((heartbeat.sent_at, now.monotonic));
        if heartbeat.echo_sent_at != 0 {
            peer.measure(heartbeat, tick, now);
        }
        match (restarted, back) {
            (true, _) => Heard::Restarted,
            (false, true) => Heard::Back,
            (false, false) => Heard::AsEver,
        }
    }

    /// Peers that have been silent for `ticks` since this very tick.
    pub(crate) fn fallen_silent(&mut self, tick: u64, ticks: u64) -> Vec<StoreId> {
        self.peers.retain(|_, peer| !peer.stranger || tick.saturating_sub(peer.heard_at) < ticks);
        let fallen = |(&store, peer): (&StoreId, &mut Peer)| {
            let fallen = !peer.silent && tick.saturating_sub(peer.heard_at) >= ticks;
            peer.silent |= fallen;
            fallen.then_some(store)
        };
        self.peers.iter_mut().filter_map(fallen).collect()
    }

    pub(crate) fn is_silent(&self, store: StoreId) -> bool {
        self.peers.get(&store).is_some_and(|peer| peer.silent)
    }

    /// Whether it can be counted on: heard of, and not about to stop.
    pub(crate) fn is_staying(&self, store: StoreId) -> bool {
        self.peers.get(&store).is_none_or(|peer| !peer.silent && !peer.leaving)
    }

    /// From now on the others are told that this store is about to stop.
    pub(crate) fn leave(&mut self) {
        self.leaving = true;
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// How far our wall clock is ahead of the others', by their median, in nanoseconds; 0 when too
    /// little is known.
    pub(crate) fn own_offset(&self) -> i64 {
        let mut offsets: Vec<i64> = self
            .peers
            .values()
            .filter(|peer| !peer.silent)
            .filter_map(|peer| Some(peer.offset?.nanos))
            .collect();
        offsets.push(0);
        offsets.sort_unstable();
        let (low, high) = (offsets[(offsets.len() - 1) / 2], offsets[offsets.len() / 2]);
        // Of two who disagree nobody knows which is wrong.
        let median = if low.unsigned_abs() <= high.unsigned_abs() { low } else { high };
        median.saturating_neg()
    }

    /// Whether our clock may be trusted with leading.
    pub(crate) fn clock_is_good(&self) -> bool {
        u128::from(self.own_offset().unsigned_abs()) <= CLOCK_OFFSET_MAX.as_nanos()
    }

    /// Whether leadership may be handed to a store: its clock is as good as ours has to be.
    pub(crate) fn may_lead(&self, store: StoreId) -> bool {
        let ahead_of_us =
            self.peers.get(&store).and_then(|peer| peer.offset).map_or(0, |offset| offset.nanos);
        let ahead = ahead_of_us.saturating_add(self.own_offset());
        u128::from(ahead.unsigned_abs()) <= CLOCK_OFFSET_MAX.as_nanos()
    }

    /// Ticks until somebody is to be told that we are here.
    pub(crate) fn heartbeat_in(&self, tick: u64) -> u64 {
        let due = self.peers.values().map(|peer| (peer.told_at + HEARTBEAT_TICKS).saturating_sub(tick));
        due.min().unwrap_or(HEARTBEAT_TICKS)
    }

    /// Sends what is posted, what was held for long enough, and heartbeats to those that have heard nothing for a while.
    pub(crate) fn flush(&mut self, tick: u64, now: Now, send: &mut dyn FnMut(StoreId, PeerBatch)) {
        self.release(now);
        for (store, messages) in std::mem::take(&mut self.outbox) {
            let heartbeat = match self.peers.get_mut(&store) {
                Some(peer) => peer.heartbeat((self.boot, self.leaving), tick, now),
                None => Peer::default().heartbeat((self.boot, self.leaving), tick, now),
            };
            send(store, PeerBatch { heartbeat, messages });
        }
        // When one is told, so are the others that were told nothing now: all are due together from then on.
        let is_due = self.heartbeat_in(tick) == 0;
        for (&store, peer) in &mut self.peers {
            if is_due && peer.told_at < tick {
                let heartbeat = peer.heartbeat((self.boot, self.leaving), tick, now);
                send(store, PeerBatch { heartbeat, messages: Vec::new() });
            }
        }
    }
}

impl Peer {
    fn heartbeat(&mut self, (boot, leaving): (u64, bool), tick: u64, now: Now) -> pb::PeerHeartbeat {
        self.told_at = tick;
        let (echo_sent_at, echo_age) = match self.echo {
            Some((sent_at, came_at)) => (sent_at, nanos(now.monotonic.saturating_sub(came_at))),
            None => (0, 0),
        };
        let sent_at = nanos(now.monotonic).max(1);
        pb::PeerHeartbeat { boot, sent_at, wall: now.wall.0, echo_sent_at, echo_age, leaving }
    }

    /// As NTP: half of the round trip is the way here. The shortest round trip of late counts.
    fn measure(&mut self, heartbeat: &pb::PeerHeartbeat, tick: u64, now: Now) {
        let since = nanos(now.monotonic).checked_sub(heartbeat.echo_sent_at);
        let Some(round_trip) = since.and_then(|since| since.checked_sub(heartbeat.echo_age)) else { return };
        let round_trip = Duration::from_nanos(round_trip);
        let better = self
            .offset
            .is_none_or(|best| round_trip <= best.round_trip || tick.saturating_sub(best.at) >= OFFSET_TICKS);
        if round_trip <= ROUND_TRIP_MAX && better {
            let theirs = i128::from(heartbeat.wall) + i128::from(nanos(round_trip) / 2);
            let ahead = theirs - i128::from(now.wall.0);
            let nanos = i64::try_from(ahead).unwrap_or(if ahead > 0 { i64::MAX } else { i64::MIN });
            self.offset = Some(Offset { nanos, round_trip, at: tick });
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
