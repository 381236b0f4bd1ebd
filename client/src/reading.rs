//! Reading what one span has: the plan's fetches made, late ones hedged, failures tried again (CL-1, CL-2, CL-13).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_client_core::read::{BadBlock, Damage, Fetch, FetchFailure, ReadSpan, ReadStep};
use eggs_client_core::retry::Backoff;
use eggs_client_core::span::{Body, StoredSpan};
use eggs_proto::{BlockId, BlockServiceId, InodeId};
use futures_util::future::Either;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::sleep;

use crate::Client;
use crate::connection::{entropy, lock};
use crate::error::{ClientError, Result};

/// Fetches of one read that are told of; of more, the first.
const FETCHES_TOLD_MAX: usize = 100_000;

/// What is to be read of a span.
#[derive(Debug, Clone)]
pub(crate) enum Wanted {
    /// Bytes, counted from its beginning.
    Bytes(Range<u32>),
    /// The cells of one block in some stripes.
    Block(usize, Range<usize>),
}

/// One fetch that a read made ([`Client::explain`]).
#[derive(Debug, Clone)]
pub struct FetchTold {
    /// Where the span begins.
    pub span: u64,
    /// Which block of the span.
    pub index: usize,
    pub service: BlockServiceId,
    pub block: BlockId,
    pub offset: u32,
    pub length: u32,
    /// Since the read began.
    pub started: Duration,
    pub took: Duration,
    /// It took so long that others were asked too.
    pub late: bool,
    pub end: FetchEnd,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FetchEnd {
    /// It was answered.
    Came,
    /// The bytes were there before it was answered.
    GivenUp,
    Missing,
    Corrupt,
    Failed(String),
}

/// Hears of every fetch.
#[derive(Debug)]
pub(crate) struct Listener {
    pub began: Instant,
    pub fetches: Mutex<Vec<FetchTold>>,
}

impl Listener {
    pub fn new() -> Listener {
        Listener { began: Instant::now(), fetches: Mutex::default() }
    }
}

/// A file as what reads its spans needs it.
#[derive(Debug, Clone)]
pub(crate) struct Reading {
    pub client: Client,
    pub file: InodeId,
    /// The path, for people.
    pub what: Arc<str>,
    pub listener: Option<Arc<Listener>>,
    /// Blocks were found to be elsewhere by now: what is known of the spans is to be forgotten.
    pub moved: Arc<AtomicBool>,
    /// How long it is tried again when block services do not answer.
    pub patience: Duration,
}

struct Attempt {
    end: AttemptEnd,
    /// Blocks that are not where the span says.
    missing: Vec<BadBlock>,
}

enum AttemptEnd {
    Read(Vec<Bytes>),
    /// `away`: some block services did not answer.
    Lost {
        missing: String,
        away: bool,
    },
}

enum Event {
    Fetched(u32, Result<Vec<Bytes>, FetchFailure>),
    Late(u32),
}

/// Fetches of one attempt, kept while somebody listens.
struct Told<'a> {
    listener: Option<&'a Listener>,
    span: u64,
    fetches: Vec<(Fetch, Instant, bool)>,
}

impl Reading {
    pub fn new(client: &Client, file: InodeId, what: &str) -> Reading {
        Reading {
            client: client.clone(),
            file,
            what: what.into(),
            listener: None,
            moved: Arc::default(),
            patience: client.shared.options.timeout,
        }
    }

    pub fn corrupt(&self, what: String) -> ClientError {
        ClientError::Corrupt { file: self.file, path: self.what.to_string(), what }
    }

    /// Block services that do not answer may be back soon: with too few blocks because of them it tries again
    /// for as long as it has patience. `None`: the span's blocks are elsewhere by now (repaired, or stored another way), and too few
    /// are left where they were; look it up again.
    pub async fn read(&self, span: &Arc<StoredSpan>, wanted: Wanted) -> Result<Option<Vec<Bytes>>> {
        let shared = &self.client.shared;
        let (started, mut backoff) = (Instant::now(), Backoff::default());
        loop {
            let seen = shared.map_time();
            let attempt = self.read_once(span, &wanted).await?;
            let (missing, away) = match attempt.end {
                AttemptEnd::Read(pieces) => {
                    // Nobody waits for what became of the missing ones, and once is enough.
                    let new = |bad: &BadBlock| !shared.is_reported(bad.service.0, bad.block.0);
                    if attempt.missing.iter().any(new) {
                        let (reading, span) = (self.clone(), Arc::clone(span));
                        shared.tasks.spawn(async move { reading.find_out(&span, &attempt.missing).await });
                    }
                    return Ok(Some(pieces));
                }
                AttemptEnd::Lost { .. } if self.find_out(span, &attempt.missing).await => return Ok(None),
                AttemptEnd::Lost { missing, away } => (missing, away),
            };
            if !away {
                let (file, path, offset) = (self.file, self.what.to_string(), span.offset);
                return Err(ClientError::DataLost { file, path, offset, missing });
            }
            let pause = backoff.pause(entropy());
            if started.elapsed() + pause > self.patience {
                return Err(ClientError::Unreachable { tried: missing, after: started.elapsed() });
            }
            shared.renew_within(seen, pause).await;
            sleep(pause).await;
        }
    }

    /// Whether the span is in other blocks by now. If not, blocks that are missing need repair. When nobody can be asked, it is
    /// taken to be where it was.
    async fn find_out(&self, span: &StoredSpan, missing: &[BadBlock]) -> bool {
        let Body::Blocks { blocks, .. } = &span.body else { return false };
        let Ok((page, _)) = self.client.span_page(self.file, span.offset).await else { return false };
        let now = page.first().and_then(|now| now.blocks.as_ref());
        let now = now.map_or(&[][..], |now| &now.blocks[..]);
        let moved = !blocks.iter().map(|block| block.block.0).eq(now.iter().map(|block| block.block));
        if moved {
            self.moved.store(true, Ordering::Relaxed);
        } else {
            missing.iter().for_each(|bad| self.client.shared.report(self.file, bad));
        }
        moved
    }

    async fn read_once(&self, span: &Arc<StoredSpan>, wanted: &Wanted) -> Result<Attempt> {
        let shared = &self.client.shared;
        let (standing, turn) = (shared.standing(), shared.turn());
        let mut machine = match wanted.clone() {
            Wanted::Bytes(range) => ReadSpan::new(span.clone(), range, standing, turn),
            Wanted::Block(index, stripes) => ReadSpan::block(span.clone(), index, stripes, standing, turn),
        };
        let mut told = Told { listener: self.listener.as_deref(), span: span.offset, fetches: Vec::new() };
        let mut events = FuturesUnordered::new();
        let (mut away, mut missing) = (false, Vec::new());
        loop {
            match machine.poll() {
                Some(ReadStep::Fetch(fetch)) => {
                    told.began(fetch);
                    events.push(Either::Left(self.fetch(fetch)));
                    if shared.options.hedge {
                        events.push(Either::Right(self.hedge(fetch)));
                    }
                }
                Some(ReadStep::Report(bad)) if bad.damage == Damage::Missing => missing.push(bad),
                Some(ReadStep::Report(bad)) => {
                    told.corrupt(&bad);
                    shared.report(self.file, &bad);
                }
                Some(ReadStep::Done(bytes)) => return Ok(Attempt { end: AttemptEnd::Read(bytes), missing }),
                Some(ReadStep::Lost(words)) => {
                    return Ok(Attempt { end: AttemptEnd::Lost { missing: words, away }, missing });
                }
                None => match events.next().await {
                    Some(Event::Fetched(id, fetched)) => {
                        told.ended(id, &fetched);
                        match fetched {
                            Ok(pieces) => machine.fetched(id, pieces),
                            Err(failure) => {
                                away |= matches!(failure, FetchFailure::Unreachable(_));
                                machine.failed(id, failure);
                            }
                        }
                    }
                    Some(Event::Late(id)) if machine.waits_for(id) => {
                        if let Some(service) = told.late(id) {
                            shared.fetch_late(service);
                        }
                        machine.late(id);
                    }
                    Some(Event::Late(_)) => {}
                    None => return Err(self.corrupt("a read came to no end".to_owned())),
                },
            }
        }
    }

    async fn fetch(&self, fetch: Fetch) -> Event {
        let (shared, started) = (&self.client.shared, Instant::now());
        let fetched = shared.fetch_block(fetch).await;
        match &fetched {
            Ok(_) => shared.fetch_answered(fetch.service, fetch.length, started.elapsed()),
            Err(FetchFailure::Unreachable(why)) => {
                tracing::debug!(block = %fetch.block, block_service = %fetch.service, %why, "block not fetched");
            }
            Err(_) => {}
        }
        Event::Fetched(fetch.id, fetched)
    }

    /// Says when a fetch is late: at once when there is budget for a hedge, else when it has taken far too long.
    async fn hedge(&self, fetch: Fetch) -> Event {
        let shared = &self.client.shared;
        let after = shared.hedge_after(fetch.service, fetch.length);
        sleep(after).await;
        if !shared.pay_hedge() {
            sleep(shared.options.hedge_after_max.saturating_sub(after)).await;
        }
        Event::Late(fetch.id)
    }
}

impl Told<'_> {
    fn began(&mut self, fetch: Fetch) {
        self.fetches.push((fetch, Instant::now(), false));
    }

    fn late(&mut self, id: u32) -> Option<BlockServiceId> {
        let (fetch, _, late) = self.fetches.iter_mut().find(|(fetch, ..)| fetch.id == id)?;
        *late = true;
        Some(fetch.service)
    }

    fn ended(&mut self, id: u32, fetched: &Result<Vec<Bytes>, FetchFailure>) {
        let Some(at) = self.fetches.iter().position(|(fetch, ..)| fetch.id == id) else { return };
        let (fetch, started, late) = self.fetches.swap_remove(at);
        let end = match fetched {
            Ok(_) => FetchEnd::Came,
            Err(FetchFailure::Damaged(Damage::Missing)) => FetchEnd::Missing,
            Err(FetchFailure::Damaged(Damage::Corrupt)) => FetchEnd::Corrupt,
            Err(FetchFailure::Refused(why) | FetchFailure::Unreachable(why)) => FetchEnd::Failed(why.clone()),
        };
        self.tell(fetch, started, late, end);
    }

    /// What came was not what was written.
    fn corrupt(&self, bad: &BadBlock) {
        let Some(listener) = self.listener.filter(|_| bad.damage == Damage::Corrupt) else { return };
        let mut fetches = lock(&listener.fetches);
        let is_it = |fetch: &&mut FetchTold| {
            fetch.span == self.span && fetch.index == bad.index && fetch.end == FetchEnd::Came
        };
        if let Some(fetch) = fetches.iter_mut().rev().find(is_it) {
            fetch.end = FetchEnd::Corrupt;
        }
    }

    fn tell(&self, fetch: Fetch, started: Instant, late: bool, end: FetchEnd) {
        let Some(listener) = self.listener else { return };
        let mut fetches = lock(&listener.fetches);
        if fetches.len() < FETCHES_TOLD_MAX {
            fetches.push(FetchTold {
                span: self.span,
                index: fetch.index,
                service: fetch.service,
                block: fetch.block,
                offset: fetch.offset,
                length: fetch.length,
                started: started.duration_since(listener.began),
                took: started.elapsed(),
                late,
                end,
            });
        }
    }
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        for (fetch, started, late) in std::mem::take(&mut self.fetches) {
            self.tell(fetch, started, late, FetchEnd::GivenUp);
        }
    }
}

#[cfg(test)]
mod tests;
