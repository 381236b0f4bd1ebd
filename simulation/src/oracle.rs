//! What consensus must never do, seen from outside while it runs: two leaders of one term, two entries in one
//! place, a membership that nobody agreed on.
//!
//! Leaders are known by what they send, entries by what is in the logs: nothing is asked of the code under test
//! but its bytes.

use std::collections::BTreeMap;

use eggs_consensus_core::eraftpb::{Entry, MessageType};
use eggs_consensus_core::{GroupId, Membership, PeerBatch, PeerMessage};
use eggs_proto::StoreId;

/// Failures kept; one is enough to fail a run.
const FAILURES_MAX: usize = 20;

/// An entry as it was first seen at its index and term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    crc: u32,
    /// Of the entry before it, when that was seen with it.
    term_before: Option<u64>,
}

#[derive(Debug, Default)]
pub(crate) struct Oracle {
    /// Who led a group in a term.
    leaders: BTreeMap<(GroupId, u64), StoreId>,
    newest: Option<StoreId>,
    entries: BTreeMap<(GroupId, u64, u64), Seen>,
    /// Term of the committed entry at an index, and who was first seen to have it so.
    committed: BTreeMap<(GroupId, u64), (u64, StoreId)>,
    memberships: BTreeMap<(GroupId, u64), (Vec<StoreId>, Vec<StoreId>)>,
    /// How far each store's log was looked at: committed index, last index and term.
    looked: BTreeMap<(StoreId, GroupId), (u64, u64, u64)>,
    pub failures: Vec<String>,
    /// Batches between stores, and messages in them.
    pub batches: u64,
    pub messages: u64,
    pub snapshots_sent: u64,
    pub reads_waited: u64,
    pub reads_leased: u64,
}

/// What a store's log of a group is like now.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogEnds {
    pub first: u64,
    pub last: u64,
    pub committed: u64,
}

impl Oracle {
    fn fail(&mut self, what: String) {
        if self.failures.len() < FAILURES_MAX {
            self.failures.push(what);
        }
    }

    /// Terms somebody led, of all groups.
    pub fn elections(&self) -> usize {
        self.leaders.len()
    }

    /// Memberships that came after the founding one.
    pub fn membership_changes(&self) -> usize {
        self.memberships.keys().filter(|(_, index)| *index > 0).count()
    }

    /// Whoever was last seen to lead anything anew.
    pub fn newest_leader(&self) -> Option<StoreId> {
        self.newest
    }

    pub fn leads(&mut self, group: GroupId, term: u64, store: StoreId) {
        let known = *self.leaders.entry((group, term)).or_insert_with(|| {
            self.newest = Some(store);
            store
        });
        if known != store {
            self.fail(format!("{group}: {known} and {store} both lead in term {term}"));
        }
    }

    /// What a store sends.
    pub fn sends(&mut self, from: StoreId, batch: &PeerBatch) {
        self.batches += 1;
        self.messages += batch.messages.len() as u64;
        for (group, message) in &batch.messages {
            match message {
                PeerMessage::Raft(message) => {
                    let of_leader = matches!(
                        message.get_msg_type(),
                        MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot
                    );
                    if of_leader {
                        self.leads(*group, message.term, from);
                    }
                }
                PeerMessage::Sleep { term, .. } => self.leads(*group, *term, from),
                PeerMessage::Piece { offset: 0, total, .. } if *total > 0 => self.snapshots_sent += 1,
                PeerMessage::Want { .. } | PeerMessage::Piece { .. } => {}
            }
        }
    }

    /// Whether it is new.
    pub fn member(&mut self, group: GroupId, store: StoreId, membership: &Membership) -> bool {
        let now = (membership.voters.clone(), membership.learners.clone());
        let count = self.memberships.len();
        let known = self.memberships.entry((group, membership.index)).or_insert_with(|| now.clone());
        if *known != now {
            let what =
                format!("{group}: {store} has members {now:?} since {}, others {known:?}", membership.index);
            self.fail(what);
        }
        self.memberships.len() > count
    }

    /// From which index on entries of a store's log are to be shown to [`Oracle::log`]; `None`: nothing new.
    pub fn look_from(&self, store: StoreId, group: GroupId, ends: LogEnds, last_term: u64) -> Option<u64> {
        let looked = self.looked.get(&(store, group)).copied().unwrap_or_default();
        if looked == (ends.committed, ends.last, last_term) {
            return None;
        }
        // The entry before the first new one is shown too: what follows what is part of it.
        Some(looked.0.min(ends.committed).max(ends.first))
    }

    /// Entries of a store's log, without gaps (log matching, state machine safety).
    pub fn log(&mut self, store: StoreId, group: GroupId, entries: &[Entry], ends: LogEnds) {
        let mut before = None;
        for entry in entries {
            let seen = Seen { crc: crc32fast::hash(&entry.data), term_before: before };
            before = Some(entry.term);
            let known = self.entries.entry((group, entry.index, entry.term)).or_insert(seen);
            let differs = known.crc != seen.crc
                || matches!((known.term_before, seen.term_before), (Some(a), Some(b)) if a != b);
            known.term_before = known.term_before.or(seen.term_before);
            if differs {
                let what = format!(
                    "{group}: the entry {} of term {} is another at {store}",
                    entry.index, entry.term
                );
                self.fail(what);
            }
            if entry.index <= ends.committed {
                let known = *self.committed.entry((group, entry.index)).or_insert((entry.term, store));
                if known.0 != entry.term {
                    let (index, term) = (entry.index, entry.term);
                    self.fail(format!(
                        "{group}: entry {index} was committed with term and at {known:?}, and with {term} at {store}"
                    ));
                }
            }
        }
        let last_term = entries.last().map_or(0, |entry| entry.term);
        self.looked.insert((store, group), (ends.committed, ends.last, last_term));
    }

    /// The last entry of the group that is known to be committed anywhere.
    pub fn committed(&self, group: GroupId) -> u64 {
        self.committed.range((group, 0)..=(group, u64::MAX)).next_back().map_or(0, |(&(_, index), _)| index)
    }

    /// The store's log is another one now (a crash).
    pub fn forget(&mut self, store: StoreId) {
        self.looked.retain(|(of, _), _| *of != store);
    }
}
