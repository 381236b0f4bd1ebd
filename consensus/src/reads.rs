//! Reads that wait to be confirmed.
//!
//! A read runs on the state as it is. What it looked at and was not confirmed is confirmed afterwards, and then it runs
//! again: only a run that saw nothing but confirmed groups is answered.

use std::collections::{BTreeMap, BTreeSet};

use eggs_consensus_core::{GroupId, ReadTicket};
use eggs_proto::Time;
use tokio::sync::oneshot;

use crate::handle::{ConsensusError, Look, Views};

/// Reads waiting for a confirmation; more are answered `Busy`.
const READS_MAX: usize = 16_384;

/// A read, and who waits for its answer.
pub(crate) trait Reading: Send {
    fn run(&mut self, views: &Views<'_>, now: Time);
    /// Answers what the last run came to, or the error.
    fn finish(self: Box<Self>, result: Result<(), ConsensusError>);
}

struct Read<R, F> {
    read: F,
    result: Option<R>,
    answer: oneshot::Sender<Result<R, ConsensusError>>,
}

pub(crate) fn reading<R: Send + 'static>(
    read: impl FnMut(&Views<'_>, Time) -> R + Send + 'static,
    answer: oneshot::Sender<Result<R, ConsensusError>>,
) -> Box<dyn Reading> {
    Box::new(Read { read, result: None, answer })
}

impl<R: Send, F: FnMut(&Views<'_>, Time) -> R + Send> Reading for Read<R, F> {
    fn run(&mut self, views: &Views<'_>, now: Time) {
        self.result = Some((self.read)(views, now));
    }

    fn finish(self: Box<Self>, result: Result<(), ConsensusError>) {
        let Read { result: last, answer, .. } = *self;
        // Nobody waits any more: nothing to do.
        let _ = answer.send(result.and_then(|()| last.ok_or(ConsensusError::Stopped)));
    }
}

/// A read with the groups it may look at.
pub(crate) struct Waiting {
    pub(crate) reading: Box<dyn Reading>,
    pub(crate) confirmed: BTreeSet<GroupId>,
    /// One of those that are being confirmed, for the hint when it is lost.
    pub(crate) asked: Vec<GroupId>,
    tickets: BTreeSet<ReadTicket>,
}

impl Waiting {
    pub(crate) fn new(reading: Box<dyn Reading>) -> Self {
        Waiting { reading, confirmed: BTreeSet::new(), asked: Vec::new(), tickets: BTreeSet::new() }
    }

    /// Runs it; answers the groups it looked at that are not confirmed.
    pub(crate) fn run(&mut self, look: &dyn Look, now: Time) -> Vec<GroupId> {
        let views = Views::new(look);
        self.reading.run(&views, now);
        let asked = views.asked.into_inner();
        asked.into_iter().filter(|group| !self.confirmed.contains(group)).collect()
    }
}

/// All that wait.
#[derive(Default)]
pub(crate) struct Reads {
    waiting: BTreeMap<u64, Waiting>,
    by_ticket: BTreeMap<ReadTicket, Vec<u64>>,
    next: u64,
}

impl Reads {
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.waiting.len() >= READS_MAX
    }

    /// Keeps a read until all tickets are confirmed. They are some groups' each.
    pub(crate) fn wait(&mut self, mut waiting: Waiting, tickets: Vec<(GroupId, ReadTicket)>) {
        let id = self.next;
        self.next += 1;
        waiting.asked = tickets.iter().map(|&(group, _)| group).collect();
        for (_, ticket) in tickets {
            waiting.tickets.insert(ticket);
            self.by_ticket.entry(ticket).or_default().push(id);
        }
        self.waiting.insert(id, waiting);
    }

    /// The reads that wait for nothing more.
    pub(crate) fn confirmed(&mut self, tickets: &[ReadTicket]) -> Vec<Waiting> {
        let mut ready = Vec::new();
        for ticket in tickets {
            for id in self.by_ticket.remove(ticket).unwrap_or_default() {
                let Some(waiting) = self.waiting.get_mut(&id) else { continue };
                waiting.tickets.remove(ticket);
                if waiting.tickets.is_empty()
                    && let Some(mut waiting) = self.waiting.remove(&id)
                {
                    waiting.confirmed.extend(std::mem::take(&mut waiting.asked));
                    ready.push(waiting);
                }
            }
        }
        ready
    }

    /// The reads that cannot be confirmed here.
    pub(crate) fn lost(&mut self, tickets: &[ReadTicket]) -> Vec<Waiting> {
        let ids = tickets.iter().flat_map(|ticket| self.by_ticket.remove(ticket).unwrap_or_default());
        let lost: Vec<Waiting> = ids.filter_map(|id| self.waiting.remove(&id)).collect();
        for waiting in &lost {
            // Its other tickets may still be confirmed; nobody waits for that any more.
            for ticket in &waiting.tickets {
                if let Some(ids) = self.by_ticket.get_mut(ticket) {
                    ids.retain(|id| self.waiting.contains_key(id));
                    if ids.is_empty() {
                        self.by_ticket.remove(ticket);
                    }
                }
            }
        }
        lost
    }

    pub(crate) fn take_all(&mut self) -> Vec<Waiting> {
        self.by_ticket.clear();
        std::mem::take(&mut self.waiting).into_values().collect()
    }
}
