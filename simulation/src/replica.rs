//! One host of replicated groups on stores in memory, with what a crash leaves of them.

use std::collections::BTreeMap;

use bytes::Bytes;
use eggs_consensus_core::memory::{MemoryLog, MemorySnapshots, MemoryState};
use eggs_consensus_core::{Answer, GroupId, Host, Proposal, ProposalId, StateStore};
use eggs_machine::hash::StateHash;
use eggs_machine::{Machine, MemoryTable, Table, group};
use eggs_proto::time::HybridClock;
use eggs_proto::{SessionId, Time, pb};
use rand::Rng;

use crate::kernel::{Envelope, Kernel, NodeId};

type MemoryHost<M> = Host<M, MemoryLog, MemoryState, MemorySnapshots>;

/// What is found of the state store after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StateAfter {
    Kept,
    Lost,
    Damaged(GroupId),
    /// As it was some time ago.
    Earlier,
    /// The host was stopped in order: nothing is lost.
    Closed,
}

/// What the shell's consensus thread is in a daemon.
pub(crate) struct Replica<M: Machine> {
    machines: Vec<(GroupId, M)>,
    host: Option<MemoryHost<M>>,
    stores: Option<(MemoryLog, MemoryState, MemorySnapshots)>,
    earlier: Option<MemoryState>,
    pub clock: HybridClock,
    waiting: BTreeMap<ProposalId, Waiter>,
    pub turn_due: bool,
}

/// Who asked, and where the answer goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waiter {
    pub from: NodeId,
    pub tag: u64,
    pub session: SessionId,
    pub sequence: u64,
}

impl Waiter {
    pub fn new(request: &Envelope, header: Option<&pb::RequestHeader>) -> Waiter {
        let (session, sequence) = header.map_or((0, 0), |header| (header.session, header.sequence));
        Waiter { from: request.from, tag: request.tag, session: SessionId(session), sequence }
    }
}

/// The outcome of an offered write.
pub(crate) enum Offered {
    /// Its answer comes with a turn.
    Proposed,
    /// A repetition: the first answer.
    Repeated(Bytes),
    /// `prepare` refused it; nothing was logged.
    Refused(pb::Error),
    NotLeader,
    Busy,
}

impl<M: Machine + Clone> Replica<M> {
    pub fn new(machines: Vec<(GroupId, M)>, skip_fsync: bool) -> Replica<M> {
        let log = MemoryLog::default();
        if skip_fsync {
            log.skip_sync();
        }
        Replica {
            machines,
            host: None,
            stores: Some((log, MemoryState::default(), MemorySnapshots::default())),
            earlier: None,
            clock: HybridClock::default(),
            waiting: BTreeMap::new(),
            turn_due: false,
        }
    }

    /// Opens and catches up, as a daemon does before it serves.
    pub fn open(&mut self, wall: Time) -> Result<(), String> {
        let Some((log, state, snapshots)) = self.stores.take() else { return Err("is open".to_owned()) };
        let mut host = Host::open(self.machines.clone(), log, state, snapshots).map_err(|e| e.to_string())?;
        while host.has_entries() {
            host.turn().map_err(|error| error.to_string())?;
        }
        self.clock = HybridClock::default();
        self.clock.now(wall);
        for (id, _) in &self.machines {
            let view = host.view(*id).ok_or_else(|| format!("{id} is not led after opening"))?;
            let time = group::clock(view).map_err(|error| error.to_string())?;
            self.clock.observe(time, Time::MAX);
        }
        self.host = Some(host);
        self.turn_due = false;
        Ok(())
    }

    /// Leaves only what is durable, and of the state store what chance leaves.
    pub fn crash(&mut self, state_after: StateAfter) -> Result<(), String> {
        self.waiting.clear();
        self.turn_due = false;
        let Some(mut host) = self.host.take() else { return Ok(()) };
        let mut state_after = state_after;
        while state_after == StateAfter::Closed && host.has_entries() {
            // A host whose log fails while it stops has not stopped in order.
            if host.turn().is_err() {
                state_after = StateAfter::Kept;
            }
        }
        let (log, state, snapshots) = host.into_stores();
        let state = match state_after {
            StateAfter::Kept => state.crashed(),
            StateAfter::Closed => state.closed(),
            StateAfter::Lost => MemoryState::default(),
            StateAfter::Earlier => self.earlier.clone().unwrap_or_default().crashed(),
            StateAfter::Damaged(group) => {
                let mut state = state.crashed();
                state.damage(group);
                state
            }
        };
        self.stores = Some((log.crashed(), state, snapshots.crashed()));
        Ok(())
    }

    pub fn host(&self) -> Option<&MemoryHost<M>> {
        self.host.as_ref()
    }

    pub fn host_mut(&mut self) -> Option<&mut MemoryHost<M>> {
        self.host.as_mut()
    }

    pub fn view(&self, group: GroupId) -> Option<&MemoryTable> {
        self.host.as_ref()?.view(group)
    }

    /// The state store as it is now may be what a later crash leaves.
    pub fn remember_state(&mut self) {
        if let Some(host) = &mut self.host {
            self.earlier = Some(host.state_mut().clone());
        }
    }

    /// As `eggs-consensus` takes in a write: repetitions, `prepare` on the state as it is, proposal.
    pub fn write(
        &mut self,
        id: GroupId,
        session: SessionId,
        sequence: u64,
        wall: Time,
        waiter: Option<Waiter>,
        prepare: impl FnOnce(&MemoryTable, Time) -> Result<Bytes, pb::Error>,
    ) -> Result<Offered, String> {
        let Some(host) = &mut self.host else { return Ok(Offered::NotLeader) };
        let Some(view) = host.view(id) else { return Ok(Offered::NotLeader) };
        if session.0 != 0
            && let Some(reply) =
                group::repeated(view, session, sequence).map_err(|error| error.to_string())?
        {
            return Ok(Offered::Repeated(reply));
        }
        let time = self.clock.now(wall);
        let command = match prepare(view, time) {
            Ok(command) => command,
            Err(error) => return Ok(Offered::Refused(error)),
        };
        match host.propose(id, Proposal { time, session, sequence, command }) {
            Ok(proposal) => {
                if let Some(waiter) = waiter {
                    self.waiting.insert(proposal, waiter);
                }
                Ok(Offered::Proposed)
            }
            Err(eggs_consensus_core::ProposeError::Busy) => Ok(Offered::Busy),
            Err(_) => Ok(Offered::NotLeader),
        }
    }

    /// One turn; answers with who waits for them.
    #[allow(clippy::type_complexity)]
    pub fn turn(&mut self) -> Result<Vec<(Option<Waiter>, Answer<M::Effect>)>, String> {
        let Some(host) = &mut self.host else { return Ok(Vec::new()) };
        let answers = host.turn().map_err(|error| error.to_string())?;
        for answer in &answers {
            if let Some(view) = host.view(answer.group) {
                // Commands of one turn have instants after another.
                self.clock.observe(group::clock(view).map_err(|error| error.to_string())?, Time::MAX);
            }
        }
        let waiting = &mut self.waiting;
        Ok(answers
            .into_iter()
            .map(|answer| (answer.proposal.and_then(|proposal| waiting.remove(&proposal)), answer))
            .collect())
    }

    pub fn has_entries(&self) -> bool {
        self.host.as_ref().is_some_and(MemoryHost::has_entries)
    }

    pub fn has_work(&self) -> bool {
        self.host.as_ref().is_some_and(MemoryHost::has_work)
    }

    /// The state of some time ago, when it was remembered.
    pub fn stale_view(&self, group: GroupId) -> Option<&MemoryTable> {
        self.earlier.as_ref().map(|state| state.table(group))
    }

    /// What chance leaves of the state store.
    pub fn random_state_after(&self, kernel: &mut Kernel) -> StateAfter {
        match kernel.rng.random_range(0..6) {
            0 => StateAfter::Lost,
            1 => {
                let at = kernel.rng.random_range(0..self.machines.len());
                StateAfter::Damaged(self.machines[at].0)
            }
            2 => StateAfter::Earlier,
            3 => StateAfter::Closed,
            _ => StateAfter::Kept,
        }
    }

    /// State from snapshot and log alone has the same hash as the state that is served.
    pub fn rebuild_equals(&mut self, wall: Time) -> Result<(), String> {
        let before = self.hashes();
        self.crash(StateAfter::Lost)?;
        self.open(wall)?;
        let after = self.hashes();
        for (group, (kept, rebuilt)) in before.iter().zip(&after).map(|(a, b)| (a.0, (a.1, b.1))) {
            if kept != rebuilt {
                return Err(format!("{group}: state {kept:?}, rebuilt {rebuilt:?}"));
            }
        }
        Ok(())
    }

    /// The hash each group says it has, and the one its rows have.
    pub fn hashes(&self) -> Vec<(GroupId, (StateHash, StateHash))> {
        let Some(host) = &self.host else { return Vec::new() };
        let of_rows = |table: &MemoryTable| {
            let mut hash = StateHash::default();
            for (key, value) in table.iter() {
                hash.insert(key, value);
            }
            hash
        };
        host.groups()
            .filter_map(|id| {
                let said = host.status(id)?.state_hash;
                Some((id, (said, of_rows(host.local_view(id)?))))
            })
            .collect()
    }

    /// Rows of a table, for the checkers.
    pub fn rows(&self, group: GroupId) -> Vec<eggs_machine::Row> {
        self.view(group).and_then(|view| view.page(&[], &[], usize::MAX).ok()).unwrap_or_default()
    }
}
