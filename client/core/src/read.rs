//! Reading a range of one span: the cells needed, others when those cannot be had (CL-1, CL-2, CL-3).
//!
//! A whole block, of data or parity, is read the same way when it is to be written again elsewhere.
//!
//! The driver asks [`ReadSpan::poll`] what to do until it says nothing, does it, and tells what came of it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use eggs_proto::{BlockId, BlockServiceId};

use crate::layout::Layout;
use crate::span::{Body, StoredBlock, StoredSpan};

mod assemble;

pub use assemble::take_bytes;

/// Bytes of a range of a block to be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    pub id: u32,
    /// Which block of the span.
    pub index: usize,
    pub service: BlockServiceId,
    pub block: BlockId,
    pub offset: u32,
    pub length: u32,
}

/// What is wrong with a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    Missing,
    Corrupt,
}

/// A block that must be repaired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadBlock {
    pub index: usize,
    pub service: BlockServiceId,
    pub block: BlockId,
    pub damage: Damage,
}

/// Why a fetch brought nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FetchFailure {
    /// The block service answered that the block is not there, or not right: it needs repair.
    Damaged(Damage),
    /// The block service answered that it cannot give the block: its disk is lost, say.
    Refused(String),
    /// No answer, or one that says nothing about the block: it may come later.
    Unreachable(String),
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadStep {
    Fetch(Fetch),
    /// Tell the registry (once for each block).
    Report(BadBlock),
    /// The bytes of the range, in order.
    Done(Vec<Bytes>),
    /// They cannot be had; what is missing, for people.
    Lost(String),
}

/// What is thought of a block service before it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Good,
    /// It has kept readers waiting lately.
    Slow,
    /// The registry says it is not to be read, or is not heard of.
    Avoided,
}

impl From<bool> for Standing {
    fn from(readable: bool) -> Standing {
        if readable { Standing::Good } else { Standing::Avoided }
    }
}

/// How much a block is worth asking. Lower is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Good,
    Slow,
    Avoided,
    /// Asked, and has not answered for a while.
    Late,
    Failed,
}

#[derive(Debug, Clone)]
enum Cell {
    Unasked,
    Asked,
    Have(Bytes),
    Bad,
}

/// What the read is after.
#[derive(Debug, Clone, Copy)]
enum Target {
    /// The bytes of the range.
    Bytes,
    /// The cells of one block, of data or parity.
    Block(usize),
}

#[derive(Debug)]
struct Pending {
    block: usize,
    stripes: Range<usize>,
}

/// A range of a span on its way in.
#[derive(Debug)]
pub struct ReadSpan {
    span: Arc<StoredSpan>,
    target: Target,
    range: Range<usize>,
    /// Stripes the range touches.
    stripes: Range<usize>,
    /// Of those stripes, block by block within a stripe.
    cells: Vec<Cell>,
    ranks: Vec<Rank>,
    why: BTreeMap<usize, String>,
    reported: Vec<bool>,
    pending: BTreeMap<u32, Pending>,
    next_fetch: u32,
    /// Which mirror is asked first.
    turn: usize,
    steps: VecDeque<ReadStep>,
    over: bool,
}

impl ReadSpan {
    /// Reads `range` (clipped to the span, counted from its beginning). `standing` says what is thought of a
    /// service (`true` and `false`: whether it is readable at all); `turn` spreads readers over mirrors.
    pub fn new<S: Into<Standing>>(
        span: Arc<StoredSpan>,
        range: Range<u32>,
        standing: impl Fn(BlockServiceId) -> S,
        turn: usize,
    ) -> ReadSpan {
        let end = range.end.min(span.size) as usize;
        let range = (range.start as usize).min(end)..end;
        let mut read = ReadSpan::idle(span, Target::Bytes, range.clone(), turn);
        let span = read.span.clone();
        match &span.body {
            _ if range.is_empty() => read.finish(Vec::new()),
            Body::Zeros => read.finish(vec![BytesMut::zeroed(range.len()).freeze()]),
            Body::Inline(bytes) if crc32fast::hash(bytes) == span.crc => {
                read.finish(vec![bytes.slice(range)]);
            }
            Body::Inline(_) => read.lose("the inline bytes are corrupt".to_owned()),
            Body::Blocks { layout, blocks } => {
                let stripe = layout.stripe_size();
                let stripes = range.start / stripe..range.end.div_ceil(stripe);
                read.begin(*layout, blocks, stripes, standing);
            }
        }
        read
    }

    /// Reads the cells of one block of a span in blocks, of data or parity, in some stripes: from where the
    /// block is, or computed from the others.
    pub fn block<S: Into<Standing>>(
        span: Arc<StoredSpan>,
        index: usize,
        stripes: Range<usize>,
        standing: impl Fn(BlockServiceId) -> S,
        turn: usize,
    ) -> ReadSpan {
        let mut read = ReadSpan::idle(span, Target::Block(index), 0..0, turn);
        let span = read.span.clone();
        match &span.body {
            Body::Blocks { layout, blocks }
                if index < layout.blocks()
                    && stripes.start < stripes.end
                    && stripes.end <= layout.stripes() =>
            {
                read.begin(*layout, blocks, stripes, standing);
            }
            _ => read.lose("the span has no such block".to_owned()),
        }
        read
    }

    fn idle(span: Arc<StoredSpan>, target: Target, range: Range<usize>, turn: usize) -> ReadSpan {
        ReadSpan {
            span,
            target,
            range,
            stripes: 0..0,
            cells: Vec::new(),
            ranks: Vec::new(),
            why: BTreeMap::new(),
            reported: Vec::new(),
            pending: BTreeMap::new(),
            next_fetch: 0,
            turn,
            steps: VecDeque::new(),
            over: false,
        }
    }

    /// The next thing to do, if there is one now.
    pub fn poll(&mut self) -> Option<ReadStep> {
        self.steps.pop_front()
    }

    /// Whether a fetch is still waited for; what is left when the read is over may be dropped.
    pub fn waits_for(&self, fetch: u32) -> bool {
        !self.over && self.pending.contains_key(&fetch)
    }

    /// The bytes of a fetch, in pieces.
    pub fn fetched(&mut self, fetch: u32, pieces: Vec<Bytes>) {
        let Some((layout, pending)) = self.take(fetch) else { return };
        let expected = pending.stripes.len() * layout.cell_size();
        if pieces.iter().map(Bytes::len).sum::<usize>() != expected {
            return self.fail(pending, FetchFailure::Unreachable("a wrong number of bytes".to_owned()));
        }
        let span = self.span.clone();
        let Body::Blocks { blocks, .. } = &span.body else { return };
        let mut pieces = VecDeque::from(pieces);
        for stripe in pending.stripes.clone() {
            let cell = take_bytes(&mut pieces, layout.cell_size());
            let right = blocks[pending.block].cell_crcs[stripe] == crc32fast::hash(&cell);
            let at = self.at(layout, stripe, pending.block);
            self.cells[at] = if right { Cell::Have(cell) } else { Cell::Bad };
            if !right {
                self.why.insert(pending.block, "corrupt".to_owned());
                self.report(pending.block, Damage::Corrupt);
            }
        }
        if self.ranks[pending.block] == Rank::Late {
            self.ranks[pending.block] = Rank::Good;
        }
        self.advance(layout);
    }

    /// A fetch came to nothing.
    pub fn failed(&mut self, fetch: u32, failure: FetchFailure) {
        if let Some((_, pending)) = self.take(fetch) {
            self.fail(pending, failure);
        }
    }

    /// A fetch takes long: others are asked too, and whichever comes first is used.
    pub fn late(&mut self, fetch: u32) {
        let Body::Blocks { layout, .. } = self.span.clone().body else { return };
        if let (false, Some(pending)) = (self.over, self.pending.get(&fetch)) {
            let rank = &mut self.ranks[pending.block];
            *rank = (*rank).max(Rank::Late);
            self.advance(layout);
        }
    }

    fn take(&mut self, fetch: u32) -> Option<(Layout, Pending)> {
        let pending = self.pending.remove(&fetch)?;
        match self.span.body {
            Body::Blocks { layout, .. } if !self.over => Some((layout, pending)),
            _ => None,
        }
    }

    fn fail(&mut self, pending: Pending, failure: FetchFailure) {
        let Body::Blocks { layout, .. } = self.span.body else { return };
        let words = match failure {
            FetchFailure::Damaged(damage) => {
                self.report(pending.block, damage);
                if damage == Damage::Missing { "missing".to_owned() } else { "corrupt".to_owned() }
            }
            FetchFailure::Refused(why) | FetchFailure::Unreachable(why) => why,
        };
        self.why.insert(pending.block, words);
        self.ranks[pending.block] = Rank::Failed;
        for stripe in pending.stripes {
            let at = self.at(layout, stripe, pending.block);
            self.cells[at] = Cell::Bad;
        }
        self.advance(layout);
    }

    fn report(&mut self, index: usize, damage: Damage) {
        let Body::Blocks { blocks, .. } = &self.span.body else { return };
        if !std::mem::replace(&mut self.reported[index], true) {
            let StoredBlock { service, block, .. } = blocks[index];
            self.steps.push_back(ReadStep::Report(BadBlock { index, service, block, damage }));
        }
    }

    fn finish(&mut self, bytes: Vec<Bytes>) {
        self.over = true;
        self.steps.push_back(ReadStep::Done(bytes));
    }

    fn lose(&mut self, what: String) {
        self.over = true;
        self.steps.push_back(ReadStep::Lost(what));
    }

    fn begin<S: Into<Standing>>(
        &mut self,
        layout: Layout,
        blocks: &[StoredBlock],
        stripes: Range<usize>,
        standing: impl Fn(BlockServiceId) -> S,
    ) {
        self.stripes = stripes;
        let rank = |block: &StoredBlock| match standing(block.service).into() {
            Standing::Good => Rank::Good,
            Standing::Slow => Rank::Slow,
            Standing::Avoided => Rank::Avoided,
        };
        self.ranks = blocks.iter().map(rank).collect();
        self.reported = vec![false; blocks.len()];
        self.cells = vec![Cell::Unasked; self.stripes.len() * blocks.len()];
        self.padding(layout);
        self.advance(layout);
    }

    /// Cells that are all padding are known to be zeros (CL-8): no need to fetch them.
    fn padding(&mut self, layout: Layout) {
        let cell_size = layout.cell_size();
        let first = (self.span.size as usize).div_ceil(cell_size);
        let last = self.stripes.end * layout.data();
        if layout.is_mirrored() || first >= last {
            return;
        }
        let zeros = BytesMut::zeroed(cell_size).freeze();
        for n in first.max(self.stripes.start * layout.data())..last {
            let at = self.at(layout, n / layout.data(), n % layout.data());
            self.cells[at] = Cell::Have(zeros.clone());
        }
    }

    fn at(&self, layout: Layout, stripe: usize, block: usize) -> usize {
        (stripe - self.stripes.start) * layout.blocks() + block
    }

    /// The blocks of a stripe whose cells are wanted.
    fn columns(&self, layout: Layout, stripe: usize) -> Range<usize> {
        if let Target::Block(index) = self.target {
            return index..index + 1;
        }
        let start = stripe * layout.stripe_size();
        let from = self.range.start.saturating_sub(start);
        let to = (self.range.end - start).min(layout.stripe_size());
        from / layout.cell_size()..to.div_ceil(layout.cell_size())
    }

    /// Asks for what is missing; ends the read when nothing is, or when it never will be there.
    fn advance(&mut self, layout: Layout) {
        let mut asks: Vec<(usize, usize)> = Vec::new();
        let mut complete = true;
        for stripe in self.stripes.clone() {
            match self.plan(layout, stripe) {
                Plan::Complete => {}
                Plan::Wait => complete = false,
                Plan::Ask(blocks) => {
                    complete = false;
                    for &block in &blocks {
                        let at = self.at(layout, stripe, block);
                        self.cells[at] = Cell::Asked;
                    }
                    asks.extend(blocks.into_iter().map(|block| (block, stripe)));
                }
                Plan::Lost => return self.lose(self.what_is_missing(layout, stripe)),
            }
        }
        if complete {
            return match self.assemble(layout) {
                Ok(bytes) => self.finish(bytes),
                Err(what) => self.lose(what),
            };
        }
        self.ask(layout, asks);
    }

    fn plan(&self, layout: Layout, stripe: usize) -> Plan {
        let base = self.at(layout, stripe, 0);
        let cells = &self.cells[base..base + layout.blocks()];
        let have = |cell: &Cell| matches!(cell, Cell::Have(_));
        let columns = self.columns(layout, stripe);
        if cells[columns.clone()].iter().all(have)
            || cells.iter().filter(|cell| have(cell)).count() >= layout.data()
        {
            return Plan::Complete;
        }
        // On its way from a block that is not late, or here.
        let sure = |n: usize| match cells[n] {
            Cell::Have(_) => true,
            Cell::Asked => self.ranks[n] < Rank::Late,
            _ => false,
        };
        let askable = |n: usize| matches!(cells[n], Cell::Unasked) && self.ranks[n] != Rank::Failed;
        let good = |n: usize| askable(n) && self.ranks[n] == Rank::Good;
        if !layout.is_mirrored() && columns.clone().all(|n| sure(n) || good(n)) {
            let blocks: Vec<usize> = columns.filter(|&n| !sure(n)).collect();
            return if blocks.is_empty() { Plan::Wait } else { Plan::Ask(blocks) };
        }
        // Some cell must be rebuilt: any `data` cells will do, those at hand and the best others.
        let coming = (0..layout.blocks()).filter(|&n| sure(n)).count();
        let mut others: Vec<usize> = (0..layout.blocks()).filter(|&n| askable(n)).collect();
        let turn = |n: usize| if layout.is_mirrored() { (n + self.turn) % layout.blocks() } else { n };
        others.sort_by_key(|&n| (self.ranks[n], turn(n)));
        let needed = layout.data().saturating_sub(coming);
        if needed == 0 {
            return Plan::Wait;
        }
        let waiting = cells.iter().filter(|cell| matches!(cell, Cell::Asked | Cell::Have(_))).count();
        if waiting + others.len() < layout.data() {
            return Plan::Lost;
        }
        others.truncate(needed);
        // No way around slow ones: then the cells themselves, which are fewer.
        let worth = |n: usize| askable(n) && self.ranks[n] <= Rank::Slow;
        if !layout.is_mirrored()
            && others.iter().any(|&n| self.ranks[n] > Rank::Good)
            && columns.clone().all(|n| sure(n) || worth(n))
        {
            others = columns.filter(|&n| !sure(n)).collect();
        }
        if others.is_empty() { Plan::Wait } else { Plan::Ask(others) }
    }

    /// One fetch for neighbouring cells of a block.
    fn ask(&mut self, layout: Layout, mut asks: Vec<(usize, usize)>) {
        asks.sort_unstable();
        let span = self.span.clone();
        let Body::Blocks { blocks, .. } = &span.body else { return };
        for run in asks.chunk_by(|a, b| a.0 == b.0 && a.1 + 1 == b.1) {
            let (block, first) = run[0];
            let id = self.next_fetch;
            self.next_fetch += 1;
            self.pending.insert(id, Pending { block, stripes: first..first + run.len() });
            self.steps.push_back(ReadStep::Fetch(Fetch {
                id,
                index: block,
                service: blocks[block].service,
                block: blocks[block].block,
                offset: (first * layout.cell_size()) as u32,
                length: (run.len() * layout.cell_size()) as u32,
            }));
        }
    }

    fn what_is_missing(&self, layout: Layout, stripe: usize) -> String {
        let base = self.at(layout, stripe, 0);
        let Body::Blocks { blocks, .. } = &self.span.body else { return String::new() };
        let bad = (0..layout.blocks())
            .filter(|&n| self.ranks[n] == Rank::Failed || matches!(self.cells[base + n], Cell::Bad));
        let words: Vec<String> = bad
            .map(|n| {
                let why = self.why.get(&n).map_or("failed", String::as_str);
                format!("block {} on {}: {why}", blocks[n].block, blocks[n].service)
            })
            .collect();
        format!("{} of {} blocks are needed; {}", layout.data(), layout.blocks(), words.join("; "))
    }
}

enum Plan {
    /// The cells wanted are here or can be computed.
    Complete,
    Wait,
    Ask(Vec<usize>),
    Lost,
}

#[cfg(test)]
mod tests;
