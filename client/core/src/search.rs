//! Who to ask next: the search for the one replica of a group that can answer.
//!
//! A request goes to whoever is thought to lead. Who does not lead says who does (a *hint*), if it knows;
//! who is gone says nothing. The search goes round the replicas until one answers, follows hints at once, and
//! asks another one while the first is silent: the same request with the same session and sequence may be
//! under way to several (CL-10), the first answer counts. No clock: `now` is the time since the search began.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::retry::Backoff;

/// Addresses that no map names are asked this often in a round: hints may be ahead of the map, and may lie.
pub const STRANGERS_MAX: usize = 3;
/// After its patience with one that is silent, a search asks the others this many times in as long again: who
/// leads may change any moment.
const ASKED_AGAIN: u32 = 2;
/// Of answers "later" in a row from one place, every so many sends the search to the others too: who is about
/// to stop says "later" until it is gone.
const LATER_ROUND: u32 = 4;

/// What to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Send the request there; the answer goes to [`Search::said`].
    Ask(Arc<str>),
    /// Ask again at this instant, or when something was said.
    Wait(Duration),
    /// As `Wait`; everybody has been asked: perhaps the map is old.
    Pause(Duration),
}

/// What came of asking, when it was not the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// "I do not lead", and who does, if it knows.
    Elsewhere(Option<Arc<str>>),
    /// It leads, but not now: queues are full, work is in progress.
    Later,
    /// It could not be reached, or broke off.
    Gone,
}

#[derive(Debug)]
struct Asked {
    address: Arc<str>,
    trusted: bool,
    at: Duration,
}

/// One request's way through the replicas of a group (CL-11, CL-12).
#[derive(Debug)]
pub struct Search {
    /// A silent place is waited for this long before another one is asked.
    patience: Duration,
    in_flight: Vec<Asked>,
    /// Asked in this round.
    round: BTreeSet<Arc<str>>,
    hint: Option<Arc<str>>,
    strangers: usize,
    /// Somebody said in this round that it knows of no leader: an election is on.
    electing: bool,
    later: u32,
    wake: Duration,
    backoff: Backoff,
}

impl Search {
    pub fn new(patience: Duration) -> Search {
        Search {
            patience,
            in_flight: Vec::new(),
            round: BTreeSet::new(),
            hint: None,
            strangers: 0,
            electing: false,
            later: 0,
            wake: Duration::ZERO,
            backoff: Backoff::default(),
        }
    }

    /// `places`: the replicas, the likeliest first. `trusted`: not known to have been unreachable just now.
    pub fn next(
        &mut self,
        places: &[Arc<str>],
        trusted: impl Fn(&str) -> bool,
        now: Duration,
        entropy: u64,
    ) -> Next {
        if now < self.wake {
            return Next::Wait(self.wake);
        }
        if let Some(address) = self.choose(places, &trusted) {
            let trusted = trusted(&address);
            let alone = self.in_flight.is_empty();
            let patience = match trusted {
                true if alone => self.patience,
                true => self.patience / ASKED_AGAIN,
                false => self.backoff.pause(entropy),
            };
            self.wake = now + patience;
            self.round.insert(address.clone());
            self.in_flight.push(Asked { address: address.clone(), trusted, at: now });
            return Next::Ask(address);
        }
        let waiting = self.in_flight.iter().any(|asked| asked.trusted) && !self.electing;
        self.begin_round();
        let pause = if waiting { self.patience / ASKED_AGAIN } else { self.backoff.pause(entropy) };
        self.wake = now + pause;
        Next::Pause(self.wake)
    }

    /// Where a hint leads, else the first that was not asked in this round. A hint to a place that was
    /// unreachable just now waits for the others: followers name a dead leader until they have elected.
    fn choose(&mut self, places: &[Arc<str>], trusted: &impl Fn(&str) -> bool) -> Option<Arc<str>> {
        let fresh = places.iter().find(|place| self.is_fresh(place)).cloned();
        let Some(hint) = self.hint.take().filter(|hint| self.is_fresh(hint)) else { return fresh };
        if !trusted(&hint) && fresh.as_ref().is_some_and(|fresh| *fresh != hint) {
            self.hint = Some(hint);
            return fresh;
        }
        if places.contains(&hint) {
            return Some(hint);
        }
        if self.strangers == STRANGERS_MAX {
            return fresh;
        }
        self.strangers += 1;
        Some(hint)
    }

    fn is_fresh(&self, place: &Arc<str>) -> bool {
        !self.round.contains(place) && !self.is_in_flight(place)
    }

    fn is_in_flight(&self, place: &str) -> bool {
        self.in_flight.iter().any(|asked| &*asked.address == place)
    }

    fn begin_round(&mut self) {
        self.round.clear();
        self.strangers = 0;
        self.electing = false;
    }

    /// What came of asking `address`.
    pub fn said(&mut self, address: &str, said: Said, now: Duration, entropy: u64) {
        self.in_flight.retain(|asked| &*asked.address != address);
        match said {
            Said::Elsewhere(Some(hint)) if self.is_waited_for(&hint) => {
                // The one that is silent leads, as far as is known here: wait for it.
                self.begin_round();
                self.wake = now + self.patience / ASKED_AGAIN;
            }
            Said::Elsewhere(hint) => {
                self.electing |= hint.is_none();
                self.hint = hint.or(self.hint.take());
                self.wake = now;
            }
            Said::Later => {
                self.later += 1;
                if !self.later.is_multiple_of(LATER_ROUND) {
                    self.round.remove(address);
                }
                self.wake = now + self.backoff.pause(entropy);
            }
            Said::Gone => self.wake = now,
        }
    }

    fn is_waited_for(&self, place: &str) -> bool {
        self.in_flight.iter().any(|asked| asked.trusted && &*asked.address == place)
    }

    /// Those that were asked and have not said anything to it yet, and for how long.
    pub fn silent(&self, now: Duration) -> impl Iterator<Item = (&Arc<str>, Duration)> {
        self.in_flight.iter().map(move |asked| (&asked.address, now.saturating_sub(asked.at)))
    }
}

#[cfg(test)]
mod tests;
