//! What happened, as a hash of everything and the last lines in words.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::rc::Rc;

/// Lines kept for a failure's report.
const LINES_MAX: usize = 4000;

#[derive(Debug, Default)]
struct Inner {
    hash: u64,
    events: u64,
    lines: VecDeque<String>,
    print: bool,
}

/// Shared by all parts of one run; outlives a panic inside it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Trace(Rc<RefCell<Inner>>);

impl Trace {
    pub fn new(print: bool) -> Trace {
        Trace(Rc::new(RefCell::new(Inner { hash: 0xcbf2_9ce4_8422_2325, print, ..Inner::default() })))
    }

    /// Takes one event into the hash; two runs with one hash did the same in the same order.
    pub fn event(&self, now: u64, line: fmt::Arguments<'_>, payload: &[u8]) {
        let mut inner = self.0.borrow_mut();
        let text = format!("{:>12.6} {line}", now as f64 / 1e9);
        for part in [u64::from(crc32fast::hash(text.as_bytes())), u64::from(crc32fast::hash(payload)), now] {
            // FNV-1a over words.
            inner.hash = (inner.hash ^ part).wrapping_mul(0x0100_0000_01b3);
        }
        inner.events += 1;
        if inner.print {
            println!("{text}");
        }
        if inner.lines.len() == LINES_MAX {
            inner.lines.pop_front();
        }
        inner.lines.push_back(text);
    }

    /// Whether every event is printed.
    pub fn prints(&self) -> bool {
        self.0.borrow().print
    }

    /// More of what the last event was, for people: no part of the hash.
    pub fn more(&self, text: &str) {
        println!("{:>12} {text}", "");
    }

    pub fn hash(&self) -> u64 {
        self.0.borrow().hash
    }

    pub fn events(&self) -> u64 {
        self.0.borrow().events
    }

    /// The last `count` lines.
    pub fn tail(&self, count: usize) -> Vec<String> {
        let inner = self.0.borrow();
        inner.lines.iter().skip(inner.lines.len().saturating_sub(count)).cloned().collect()
    }
}
