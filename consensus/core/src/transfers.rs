//! Snapshots on their way between stores: fetched by the follower in pieces, as fast as the sender allows.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use eggs_proto::{GroupId, StoreId};
use raft::eraftpb;

use crate::host::HostError;
use crate::peer::PeerMessage;
use crate::peers::Peers;
use crate::storage::{Piece, SnapshotMeta, SnapshotStore, StorageError};

/// Bytes of one piece: heartbeats wait behind it.
const PIECE_BYTES: usize = 256 << 10;
/// Snapshots fetched at once; more wait for their turn.
const FETCHES_MAX: usize = 8;
/// A piece that does not come is asked for again …
const ASK_AGAIN_TICKS: u64 = 20;
/// … and a transfer nothing is heard of is given up.
const GIVE_UP_TICKS: u64 = 100;

/// A snapshot this store asks another for.
struct Fetch {
    from: StoreId,
    at: (u64, u64),
    /// For raft, once the snapshot is here.
    message: eraftpb::Message,
    offset: u64,
    total: u64,
    /// 0: not yet begun.
    asked_at: u64,
    heard_at: u64,
    complete: bool,
}

/// A snapshot another store asks this one for.
struct Sending {
    sent: u64,
    total: u64,
    heard_at: u64,
}

/// All transfers of a store.
pub(crate) struct Transfers {
    fetches: BTreeMap<GroupId, Fetch>,
    installing: Option<GroupId>,
    sendings: BTreeMap<(GroupId, StoreId), Sending>,
    /// Asked for, and not yet allowed by the rate: (to, group, at, offset).
    asked: VecDeque<(StoreId, GroupId, (u64, u64), u64)>,
    bytes_per_tick: u64,
    budget: u64,
}

impl Transfers {
    pub(crate) fn new(bytes_per_tick: u64) -> Self {
        let bytes_per_tick = bytes_per_tick.max(PIECE_BYTES as u64);
        Transfers {
            fetches: BTreeMap::new(),
            installing: None,
            sendings: BTreeMap::new(),
            asked: VecDeque::new(),
            bytes_per_tick,
            budget: bytes_per_tick,
        }
    }

    // ---- receiving ----

    pub(crate) fn is_fetching(&self, group: GroupId) -> bool {
        self.fetches.contains_key(&group)
    }

    pub(crate) fn has_work(&self) -> bool {
        self.installing.is_some() || self.fetches.values().any(|fetch| fetch.complete)
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.fetches.is_empty()
            && self.sendings.is_empty()
            && self.asked.is_empty()
            && self.installing.is_none()
    }

    pub(crate) fn is_installing(&self) -> bool {
        self.installing.is_some()
    }

    /// The leader says that this group needs its snapshot.
    pub(crate) fn fetch(&mut self, group: GroupId, from: StoreId, message: eraftpb::Message, tick: u64) {
        let metadata = message.get_snapshot().get_metadata();
        let at = (metadata.index, metadata.term);
        if let Some(fetch) = self.fetches.get_mut(&group) {
            let same = fetch.from == from && fetch.at == at;
            if same || self.installing == Some(group) {
                if same {
                    fetch.message = message;
                }
                return;
            }
        }
        let fetch =
            Fetch { from, at, message, offset: 0, total: 0, asked_at: 0, heard_at: tick, complete: false };
        self.fetches.insert(group, fetch);
    }

    pub(crate) fn forget(&mut self, group: GroupId) {
        if self.installing != Some(group) {
            self.fetches.remove(&group);
        }
        self.sendings.retain(|&(of, _), _| of != group);
    }

    /// Asks for the next pieces of what is to be fetched.
    pub(crate) fn ask(
        &mut self,
        snapshots: &impl SnapshotStore,
        peers: &mut Peers,
        tick: u64,
    ) -> Result<(), StorageError> {
        self.fetches.retain(|&group, fetch| {
            self.installing == Some(group)
                || fetch.complete
                || tick.saturating_sub(fetch.heard_at) < GIVE_UP_TICKS
        });
        let active = self.fetches.iter_mut().filter(|(_, fetch)| !fetch.complete).take(FETCHES_MAX);
        for (&group, fetch) in active {
            let due = fetch.asked_at == 0 || tick.saturating_sub(fetch.asked_at) >= ASK_AGAIN_TICKS;
            if due {
                if fetch.asked_at == 0 {
                    fetch.offset = snapshots.received(group, fetch.at)?;
                }
                fetch.want(group, peers, tick);
            }
        }
        Ok(())
    }

    /// Takes in a piece.
    pub(crate) fn piece(
        &mut self,
        group: GroupId,
        from: StoreId,
        at: (u64, u64),
        (offset, total, bytes): (u64, u64, &Bytes),
        snapshots: &mut impl SnapshotStore,
        (peers, tick): (&mut Peers, u64),
    ) -> Result<(), StorageError> {
        let Some(fetch) = self.fetches.get_mut(&group) else { return Ok(()) };
        if fetch.from != from || fetch.at != at || fetch.complete || fetch.offset != offset {
            return Ok(());
        }
        let end = offset.saturating_add(bytes.len() as u64);
        if total == 0 || end > total || (bytes.is_empty() && end < total) {
            // The leader has another snapshot by now, and will say so.
            self.fetches.remove(&group);
            return Ok(());
        }
        if let Err(error) = snapshots.receive(group, at, offset, bytes) {
            // A full disk, say: the leader announces its snapshot again after a while.
            self.fetches.remove(&group);
            return Err(error);
        }
        (fetch.offset, fetch.total, fetch.heard_at) = (end, total, tick);
        fetch.complete = end == total;
        if !fetch.complete {
            fetch.want(group, peers, tick);
        }
        Ok(())
    }

    /// One step of making what came durable: the group's new newest snapshot and the message it came with.
    /// `unfit`: groups that do not need it any more.
    pub(crate) fn install(
        &mut self,
        snapshots: &mut impl SnapshotStore,
        unfit: impl Fn(GroupId, (u64, u64)) -> bool,
    ) -> Result<Option<(GroupId, SnapshotMeta, eraftpb::Message)>, HostError> {
        let group = match self.installing {
            Some(group) => group,
            None => {
                let Some((&group, fetch)) = self.fetches.iter().find(|(_, fetch)| fetch.complete) else {
                    return Ok(None);
                };
                if unfit(group, fetch.at) {
                    self.fetches.remove(&group);
                    return Ok(None);
                }
                group
            }
        };
        let Some(fetch) = self.fetches.get(&group) else {
            self.installing = None;
            return Ok(None);
        };
        match snapshots.install(group, fetch.at) {
            Ok(None) => {
                self.installing = Some(group);
                Ok(None)
            }
            Ok(Some(meta)) => {
                self.installing = None;
                Ok(self.fetches.remove(&group).map(|fetch| (group, meta, fetch.message)))
            }
            Err(error) => {
                self.installing = None;
                self.fetches.remove(&group);
                // What came is no snapshot, or the disk is full: the leader announces it again after a while.
                Err(HostError { group, error })
            }
        }
    }

    // ---- sending ----

    /// Raft has sent the message that makes the follower ask.
    pub(crate) fn announced(&mut self, group: GroupId, to: StoreId, tick: u64) {
        self.sendings.insert((group, to), Sending { sent: 0, total: 0, heard_at: tick });
    }

    pub(crate) fn is_sending(&self, group: GroupId) -> bool {
        self.sendings.range((group, StoreId(0))..=(group, StoreId(u64::MAX))).next().is_some()
    }

    /// Bytes sent, of how many.
    pub(crate) fn sent(&self, group: GroupId, to: StoreId) -> (u64, u64) {
        self.sendings.get(&(group, to)).map_or((0, 0), |sending| (sending.sent, sending.total))
    }

    /// The follower has it, or does not need it any more.
    pub(crate) fn settled(&mut self, still: impl Fn(GroupId, StoreId) -> bool) {
        self.sendings.retain(|&(group, to), _| still(group, to));
    }

    /// Transfers nothing was heard of for long; told once.
    pub(crate) fn given_up(&mut self, tick: u64) -> Vec<(GroupId, StoreId)> {
        let old = |sending: &Sending| tick.saturating_sub(sending.heard_at) >= GIVE_UP_TICKS;
        let given_up: Vec<_> =
            self.sendings.iter().filter(|(_, sending)| old(sending)).map(|(&of, _)| of).collect();
        self.sendings.retain(|_, sending| !old(sending));
        given_up
    }

    /// A follower asks for a piece; it gets it when the rate allows. False: there is no such snapshot.
    pub(crate) fn wanted(&mut self, to: StoreId, group: GroupId, at: (u64, u64), offset: u64, tick: u64) {
        if let Some(sending) = self.sendings.get_mut(&(group, to)) {
            sending.heard_at = tick;
        }
        self.asked.retain(|&(store, of, ..)| (store, of) != (to, group));
        self.asked.push_back((to, group, at, offset));
    }

    pub(crate) fn refill(&mut self) {
        self.budget = self.bytes_per_tick;
    }

    /// Sends what the rate allows; answers the transfers whose snapshot is gone.
    pub(crate) fn serve(
        &mut self,
        snapshots: &impl SnapshotStore,
        peers: &mut Peers,
    ) -> Result<Vec<(GroupId, StoreId)>, StorageError> {
        let mut gone = Vec::new();
        while self.budget > 0
            && let Some((to, group, at, offset)) = self.asked.pop_front()
        {
            let piece = snapshots.piece(group, at, offset, PIECE_BYTES)?;
            let Piece { bytes, total } = match piece {
                Some(piece) => piece,
                None => {
                    self.sendings.remove(&(group, to));
                    gone.push((group, to));
                    Piece { bytes: Bytes::new(), total: 0 }
                }
            };
            self.budget = self.budget.saturating_sub(bytes.len() as u64);
            if let Some(sending) = self.sendings.get_mut(&(group, to)) {
                sending.sent = offset + bytes.len() as u64;
                sending.total = total;
            }
            let (index, term) = at;
            peers.post(to, group, PeerMessage::Piece { index, term, offset, total, bytes });
        }
        Ok(gone)
    }
}

impl Fetch {
    fn want(&mut self, group: GroupId, peers: &mut Peers, tick: u64) {
        self.asked_at = tick.max(1);
        let (index, term) = self.at;
        peers.post(self.from, group, PeerMessage::Want { index, term, offset: self.offset });
    }
}
