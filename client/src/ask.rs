//! One retry loop for every metadata request: shards, coordinator, registry (CL-10, CL-11, CL-12).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use eggs_client_core::search::{Next, Said, Search};
use eggs_proto::{GroupId, Retry, ServiceError, pb};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tonic::{Code, Status};

use crate::connection::{Peer, Shared, entropy};
use crate::error::{ClientError, Result, shortened};
use crate::hops;
use crate::map::Map;

/// Hosts an error names.
const NAMED_MAX: usize = 9;

/// How long an operation may take, and since when it does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    started: Instant,
    timeout: Duration,
}

impl Patience {
    pub fn new(timeout: Duration) -> Patience {
        Patience { started: Instant::now(), timeout }
    }

    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    pub fn left(&self) -> Duration {
        self.timeout.saturating_sub(self.elapsed())
    }

    /// Waits for `pause` or as long as there is patience; false when there is none left.
    pub async fn sleep(&self, pause: Duration) -> bool {
        let left = self.left();
        tokio::time::sleep(pause.min(left)).await;
        !left.is_zero()
    }
}

/// Which replicas of a group can answer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// The one that leads.
    Leader(GroupId),
    /// Any one, about an instant in the past; the leader when it has not come that far.
    Any(GroupId),
}

impl Target {
    pub fn group(self) -> GroupId {
        match self {
            Target::Leader(group) | Target::Any(group) => group,
        }
    }
}

/// What one try came to.
pub(crate) enum Outcome<T> {
    Done(T),
    /// It does not lead; who does, if it knows; its words.
    Elsewhere(Option<String>, String),
    /// It leads, but not now.
    Later(String),
    /// It could not be reached.
    Gone(String),
    /// Asking again would not help.
    Fatal(ClientError),
}

impl<T> Outcome<T> {
    /// A refusal; `Err` when it is the answer.
    pub fn of_refusal<E: ServiceError>(error: pb::Error) -> Result<Outcome<T>, pb::Error> {
        let words = shortened(&error.message);
        match E::from_code(error.code).map(ServiceError::retry) {
            Some(Retry::Elsewhere) => {
                Ok(Outcome::Elsewhere(Some(error.leader).filter(|hint| !hint.is_empty()), words))
            }
            Some(Retry::Later) => Ok(Outcome::Later(words)),
            _ => Err(error),
        }
    }
}

/// What a transport failure says for people: the innermost reason.
pub(crate) fn status_words(status: &Status) -> String {
    let mut words = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        words = error.to_string();
        source = error.source();
    }
    if words.is_empty() {
        words = status.code().to_string();
    }
    shortened(&words)
}

fn silent(waited: Duration) -> String {
    format!("no answer for {:.1} s", waited.as_secs_f64())
}

/// One try within `limit`. Everything but an answer is words.
pub(crate) async fn within<R, T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<R>, Status>>,
) -> Result<R, Outcome<T>> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) if matches!(status.code(), Code::OutOfRange | Code::Unimplemented) => {
            // Too large a message, or not our protocol at all: the same again next time.
            Err(Outcome::Fatal(ClientError::protocol(status_words(&status))))
        }
        Ok(Err(status)) => Err(Outcome::Gone(status_words(&status))),
        Err(_) => Err(Outcome::Gone(silent(limit))),
    }
}

/// A request that is not answered for so long is worth a word more than the answer to the one before.
const LONG_SILENCE: Duration = Duration::from_secs(1);

/// Who was asked, and what each said last: for the error.
struct Tried {
    group: GroupId,
    said: BTreeMap<Arc<str>, String>,
}

impl Tried {
    fn note(&mut self, address: &Arc<str>, words: String) {
        if self.said.len() < NAMED_MAX || self.said.contains_key(address) {
            self.said.insert(address.clone(), words);
        }
    }

    /// What it said before says more, unless it has been silent for long since.
    fn is_silent(&mut self, address: &Arc<str>, waited: Duration) {
        if waited >= LONG_SILENCE || !self.said.contains_key(address) {
            self.note(address, silent(waited));
        }
    }

    fn error(&self, map: &Map, after: Duration) -> ClientError {
        let what = match self.group {
            GroupId::CROSSDIR => "the coordinator".to_owned(),
            group => group.to_string(),
        };
        let place = |address: &Arc<str>| match map.host(address) {
            Some(host) if !host.is_empty() => format!("{} at {address}", shortened(host)),
            _ => address.to_string(),
        };
        let said: Vec<String> =
            self.said.iter().map(|(address, words)| format!("{}: {words}", place(address))).collect();
        let tried = match &said[..] {
            [] => format!("{what}: the registry knows of no replica of it"),
            said => format!("{what}: {}", said.join("; ")),
        };
        ClientError::Unreachable { tried, after }
    }
}

impl Shared {
    /// Where to ask, the likeliest first; those that were unreachable just now last.
    fn places(&self, target: Target, map: &Map) -> Vec<Arc<str>> {
        let group = target.group();
        let mut places: Vec<Arc<str>> = self.leader(group, map).into_iter().collect();
        let mut add = |address: &Arc<str>| {
            if !places.contains(address) {
                places.push(address.clone());
            }
        };
        map.group(group).for_each(&mut add);
        if group == GroupId::SHUCKLE {
            self.options.shuckle.iter().for_each(|address| add(&address.as_str().into()));
            map.shuckles().iter().for_each(&mut add);
        }
        if let (Target::Any(_), 2..) = (target, places.len()) {
            let at = self.turn() % places.len();
            places[..=at].rotate_right(1);
        }
        places.sort_by_key(|address| !self.is_trusted(address));
        places
    }

    /// Asks `target` until there is an answer or no patience left. `attempt` sends the request once: every
    /// time the same one, with the same session and sequence (CL-10).
    pub async fn ask<T, F: Future<Output = Outcome<T>>>(
        self: &Arc<Self>,
        target: Target,
        patience: Patience,
        attempt: impl Fn(Peer) -> F,
    ) -> Result<T> {
        let group = target.group();
        let mut search = Search::new(self.options.another_after);
        let mut tries = FuturesUnordered::new();
        let mut tried = Tried { group, said: BTreeMap::new() };
        // The registry is where maps come from: it is asked with the one at hand.
        let map = || if group == GroupId::SHUCKLE { self.map_at_hand() } else { self.map() };
        loop {
            let known = map();
            let places = self.places(target, &known);
            let now = patience.elapsed();
            let wake = match search.next(&places, |address| self.is_trusted(address), now, entropy()) {
                Next::Ask(address) => {
                    match self.peer(&address) {
                        Ok(peer) => {
                            let (asking, started) = (attempt(peer), Instant::now());
                            tries.push(async move { (address, started, asking.await) });
                        }
                        Err(error) => {
                            tried.note(&address, error.to_string());
                            search.said(&address, Said::Gone, now, entropy());
                        }
                    }
                    continue;
                }
                Next::Wait(wake) => wake,
                Next::Pause(wake) => {
                    if group != GroupId::SHUCKLE {
                        self.renew_soon(known.fetched);
                    }
                    wake
                }
            };
            let pause = wake.min(patience.timeout).saturating_sub(patience.elapsed());
            tokio::select! {
                biased;
                Some((address, started, outcome)) = tries.next() => {
                    tracing::trace!(%group, %address, took = ?started.elapsed(), "asked");
                    hops::tell(&known, group, &address, started.elapsed());
                    let said = match outcome {
                        Outcome::Done(answer) => {
                            self.answered(target, &address, &known);
                            return Ok(answer);
                        }
                        Outcome::Fatal(error) if places.len() <= 1 => return Err(error),
                        outcome => self.note(target, &address, outcome, &mut tried),
                    };
                    search.said(&address, said, patience.elapsed(), entropy());
                }
                () = tokio::time::sleep(pause) => {}
            }
            if patience.left().is_zero() {
                for (address, waited) in search.silent(patience.elapsed()) {
                    tried.is_silent(address, waited);
                }
                return Err(tried.error(&known, patience.elapsed()));
            }
        }
    }

    fn answered(&self, target: Target, address: &Arc<str>, map: &Map) {
        self.trust(address);
        if let Target::Leader(group) = target
            && self.leader(group, map).as_ref() != Some(address)
        {
            self.learn_leader(group, address);
        }
    }

    /// What a try that did not bring the answer teaches.
    fn note<T>(&self, target: Target, address: &Arc<str>, outcome: Outcome<T>, tried: &mut Tried) -> Said {
        let group = target.group();
        match outcome {
            Outcome::Elsewhere(hint, words) => {
                self.trust(address);
                tried.note(address, words);
                let hint: Option<Arc<str>> = hint
                    .filter(|hint| self.peer(hint).is_ok())
                    .map(Into::into)
                    .filter(|hint| hint != address);
                match &hint {
                    Some(hint) => self.learn_leader(group, hint),
                    None => self.forget_leader(group, address),
                }
                Said::Elsewhere(hint)
            }
            Outcome::Later(words) => {
                self.trust(address);
                tried.note(address, words);
                Said::Later
            }
            Outcome::Gone(words) => {
                self.suspect(address);
                self.forget_leader(group, address);
                tried.note(address, words);
                Said::Gone
            }
            Outcome::Fatal(error) => {
                tried.note(address, error.to_string());
                Said::Elsewhere(None)
            }
            Outcome::Done(_) => Said::Later,
        }
    }
}
