//! A client's way into the world: calls go out, replies and timeouts come in.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use bytes::Bytes;
use eggs_proto::time::HybridClock;
use eggs_proto::{SessionId, Time};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::kernel::{NodeId, Rpc, wall};
use crate::nodes::{Cluster, Me};

pub(crate) struct Outgoing {
    pub tag: u64,
    pub timeout: u64,
    /// `None`: only the timeout is wanted.
    pub message: Option<(NodeId, Rpc, Vec<Bytes>)>,
}

struct Inner {
    now: u64,
    skew: i64,
    clock: HybridClock,
    rng: ChaCha8Rng,
    outbox: Vec<Outgoing>,
    /// `None`: asked, nothing came yet; then the reply, or that it took too long.
    calls: BTreeMap<u64, Option<Option<Vec<Bytes>>>>,
    next_tag: u64,
    lane: (SessionId, u64),
}

/// Cheap to clone; all clones are one.
#[derive(Clone)]
pub(crate) struct Port {
    inner: Rc<RefCell<Inner>>,
    pub cluster: Rc<Cluster>,
}

impl Port {
    pub fn new(me: &Me, cluster: &Cluster, seed: u64) -> Port {
        let inner = Inner {
            now: 0,
            skew: me.skew,
            clock: HybridClock::default(),
            rng: ChaCha8Rng::seed_from_u64(seed),
            outbox: Vec::new(),
            calls: BTreeMap::new(),
            // No two lives of any node use the same.
            next_tag: (me.id.0 as u64) << 48 | me.life << 32 | 1,
            lane: (SessionId(0), 0),
        };
        let port = Port { inner: Rc::new(RefCell::new(inner)), cluster: Rc::new(cluster.clone()) };
        port.new_lane();
        port
    }

    // ---- the world's side ----

    pub fn set_now(&self, now: u64) {
        self.inner.borrow_mut().now = now;
    }

    /// Whether anybody waits for it.
    pub fn arrived(&self, tag: u64, parts: Option<Vec<Bytes>>) -> bool {
        match self.inner.borrow_mut().calls.get_mut(&tag) {
            Some(call @ None) => {
                *call = Some(parts);
                true
            }
            _ => false,
        }
    }

    pub fn take_outbox(&self) -> Vec<Outgoing> {
        std::mem::take(&mut self.inner.borrow_mut().outbox)
    }

    // ---- the client's side ----

    pub fn now(&self) -> u64 {
        self.inner.borrow().now
    }

    /// The client's hybrid clock.
    pub fn time(&self) -> Time {
        let mut inner = self.inner.borrow_mut();
        let wall = wall(inner.now, inner.skew);
        inner.clock.now(wall)
    }

    pub fn observe(&self, time: Time) {
        let mut inner = self.inner.borrow_mut();
        let wall = wall(inner.now, inner.skew);
        inner.clock.observe(time, wall);
    }

    pub fn random<R>(&self, choose: impl FnOnce(&mut ChaCha8Rng) -> R) -> R {
        choose(&mut self.inner.borrow_mut().rng)
    }

    /// A number below `end`.
    pub fn below(&self, end: usize) -> usize {
        self.random(|rng| rng.random_range(0..end))
    }

    pub fn chance(&self, percent: u32) -> bool {
        self.random(|rng| rng.random_range(0..100) < percent)
    }

    /// The next write's place in this client's lane.
    pub fn next_in_lane(&self) -> (SessionId, u64) {
        let mut inner = self.inner.borrow_mut();
        inner.lane.1 += 1;
        inner.lane
    }

    /// After a write whose answer is not waited for any longer: its lane is not used again (CL-10).
    pub fn new_lane(&self) {
        let session = self.random(|rng| rng.random::<u64>().max(1));
        self.inner.borrow_mut().lane = (SessionId(session), 0);
    }

    /// Sends a request; its reply, or a timeout, comes under the tag returned.
    pub fn send(&self, to: NodeId, rpc: Rpc, parts: Vec<Bytes>, timeout: u64) -> u64 {
        self.ask(timeout, Some((to, rpc, parts)))
    }

    fn ask(&self, timeout: u64, message: Option<(NodeId, Rpc, Vec<Bytes>)>) -> u64 {
        let mut inner = self.inner.borrow_mut();
        let tag = inner.next_tag;
        inner.next_tag += 1;
        inner.calls.insert(tag, None);
        inner.outbox.push(Outgoing { tag, timeout, message });
        tag
    }

    /// The reply to one of the calls, whichever came; `None` for one that took too long.
    pub async fn any(&self, tags: &[u64]) -> (u64, Option<Vec<Bytes>>) {
        poll_fn(|_| {
            let mut inner = self.inner.borrow_mut();
            let come = tags.iter().copied().find(|tag| matches!(inner.calls.get(tag), Some(Some(_))));
            match come {
                Some(tag) => Poll::Ready((tag, inner.calls.remove(&tag).flatten().flatten())),
                None => Poll::Pending,
            }
        })
        .await
    }

    pub async fn call(&self, to: NodeId, rpc: Rpc, parts: Vec<Bytes>, timeout: u64) -> Option<Vec<Bytes>> {
        let tag = self.send(to, rpc, parts, timeout);
        self.any(&[tag]).await.1
    }

    /// Nobody waits for these any more.
    pub fn forget(&self, tags: &[u64]) {
        let mut inner = self.inner.borrow_mut();
        for tag in tags {
            inner.calls.remove(tag);
        }
    }

    pub async fn sleep(&self, delay: u64) {
        let tag = self.ask(delay, None);
        self.any(&[tag]).await;
    }
}
