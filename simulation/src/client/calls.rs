//! Calls with retries: who leads, lanes, what is worth asking again (CL-10).
//!
//! Who does not lead says who does; whoever does not answer is passed over for the next replica. Now and then
//! a call that was answered is made once more: its answer must be the first one.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use eggs_client_core::retry::Backoff;
use eggs_janitor_core::Disks;
use eggs_proto::pb::crossdir_reply::Result as CrossdirAnswer;
use eggs_proto::pb::shard_reply::Result as ShardAnswer;
use eggs_proto::{
    BlockServiceId, CrossdirError, GroupId, Retry, ServiceError, SessionId, ShardError, ShardId, Time, flags,
    pb,
};
use rand::RngCore;

use super::port::Port;
use crate::bug::Bug;
use crate::kernel::{MILLISECOND, NodeId, Rpc, SECOND};
use crate::nodes::{decode, encode, leader_in, node_at, request_header, store_in};

const CALL_TIMEOUT: u64 = SECOND;
const SHORT_TIMEOUT: u64 = 200 * MILLISECOND;
/// Calls of the coordinator wait for a whole transaction.
const TRANSACTION_TIMEOUT: u64 = 5 * SECOND;

/// The client gave up: nothing is known of what it asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GaveUp;

/// What a locked name is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fate {
    There,
    Gone,
    /// To something else, since then.
    Leads(pb::Exchanged),
}

/// In percent: reads that go to any replica, as those of clients that were away for long do.
const ASTRAY: u32 = 15;
/// In percent: answered calls that are made again.
const REPEATED: u32 = 6;

/// The replicas of a group, and which of them is asked.
#[derive(Debug, Default, Clone)]
pub(crate) struct Replicas {
    nodes: Vec<NodeId>,
    asked: Option<NodeId>,
}

impl Replicas {
    fn of(map: &pb::ClusterMapReply, place: &pb::GroupPlace, before: Option<&Replicas>) -> Replicas {
        let stores = place.voters.iter().chain(&place.wanted);
        let mut nodes: Vec<NodeId> = stores.filter_map(|&store| store_in(map, store)).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let kept = before.and_then(|before| before.asked).filter(|node| nodes.contains(node));
        let asked = leader_in(map, place).or(kept).or_else(|| store_in(map, place.preferred));
        Replicas { asked: asked.or(nodes.first().copied()), nodes }
    }

    /// Another than `node`: who it says, or the next one.
    fn go_on(&mut self, node: NodeId, hint: &str) {
        if self.asked != Some(node) {
            return;
        }
        let at = self.nodes.iter().position(|&other| other == node).map_or(0, |at| at + 1);
        let next = self.nodes.get(at).or(self.nodes.first()).copied();
        self.asked = node_at(hint).or(next).or(self.asked);
    }
}

/// Where everything is, as the registry last told.
#[derive(Debug, Default)]
pub(crate) struct Places {
    pub shards: BTreeMap<ShardId, Replicas>,
    pub crossdir: Replicas,
    pub services: BTreeMap<BlockServiceId, (NodeId, u32)>,
    pub disks: Disks,
    /// Which of the registries is asked.
    registry: usize,
}

#[derive(Clone)]
pub(crate) struct Calls {
    pub port: Port,
    pub places: Rc<RefCell<Places>>,
    /// Answers that are not the first ones.
    pub complaints: Rc<RefCell<Vec<String>>>,
    /// It has the cluster's secret, as the janitor does.
    pub secret: bool,
}

impl Calls {
    pub fn new(port: Port) -> Calls {
        Calls { port, places: Rc::default(), complaints: Rc::default(), secret: false }
    }

    /// The same, with the cluster's secret.
    pub fn with_secret(&self) -> Calls {
        Calls { secret: true, ..self.clone() }
    }

    fn pause(&self, backoff: &mut Backoff) -> u64 {
        let entropy = self.port.random(RngCore::next_u64);
        u64::try_from(backoff.pause(entropy).as_nanos()).unwrap_or(MILLISECOND)
    }

    /// How long this client will try: mostly long enough for any crash, sometimes not.
    pub fn patience(&self) -> u64 {
        let patience =
            if self.port.chance(4) { self.port.below(2000) as u64 * MILLISECOND } else { 300 * SECOND };
        self.port.now() + patience
    }

    /// Whether there is a new map.
    pub async fn refresh(&self) -> bool {
        let header = request_header(&self.port.cluster, self.port.time(), false);
        let op = pb::registry_request::Op::Map(pb::ClusterMap { with_keys: false, known_version: 0 });
        let request = pb::RegistryRequest { header: Some(header), op: Some(op) };
        let at = self.places.borrow().registry;
        let registries = &self.port.cluster.registries;
        let registry = registries[at % registries.len()];
        let reply = self.port.call(registry, Rpc::Registry, vec![encode(&request)], CALL_TIMEOUT).await;
        let Some(reply) = reply.and_then(|parts| decode::<pb::RegistryReply>(&parts)) else {
            self.places.borrow_mut().registry = at + 1;
            return false;
        };
        self.port.observe(Time(reply.header.map_or(0, |header| header.time)));
        let map = match reply.result {
            Some(pb::registry_reply::Result::Map(map)) => map,
            Some(pb::registry_reply::Result::Error(error)) => {
                let hint = node_at(&error.leader);
                let leader = hint.and_then(|node| registries.iter().position(|&other| other == node));
                self.places.borrow_mut().registry = leader.unwrap_or(at + 1);
                return false;
            }
            _ => return false,
        };
        let service = |info: &pb::BlockServiceInfo| {
            Some((BlockServiceId(info.id), (node_at(&info.address)?, info.flags)))
        };
        let mut places = self.places.borrow_mut();
        for place in &map.groups {
            if let Ok(shard) = ShardId::try_from(place.group) {
                let replicas = Replicas::of(&map, place, places.shards.get(&shard));
                places.shards.insert(shard, replicas);
            } else if place.group == u32::from(GroupId::CROSSDIR.0) {
                places.crossdir = Replicas::of(&map, place, Some(&places.crossdir));
            }
        }
        places.disks = Disks::of(&map);
        places.services = map.block_services.iter().filter_map(service).collect();
        true
    }

    /// Tells whichever registry seems to lead; whether it was heard the next map shows.
    pub async fn set_flags(&self, block_services: Vec<u64>, set: u32) {
        let header = request_header(&self.port.cluster, self.port.time(), true);
        let op = pb::registry_request::Op::SetFlags(pb::SetFlags { block_services, set, clear: 0 });
        let request = pb::RegistryRequest { header: Some(header), op: Some(op) };
        let registries = &self.port.cluster.registries;
        let registry = registries[self.places.borrow().registry % registries.len()];
        self.port.call(registry, Rpc::Registry, vec![encode(&request)], CALL_TIMEOUT).await;
    }

    /// Waits until the cluster has everything this client needs.
    pub async fn join(&self, shards: usize) {
        loop {
            self.refresh().await;
            let joined = {
                let places = self.places.borrow();
                places.shards.len() >= shards && places.crossdir.asked.is_some() && places.services.len() >= 6
            };
            if joined {
                return;
            }
            self.port.sleep(100 * MILLISECOND).await;
        }
    }

    pub fn readable(&self, service: BlockServiceId) -> bool {
        self.places.borrow().services.get(&service).is_some_and(|(_, flags)| flags::readable(*flags))
    }

    /// Where a shard is replicated, as far as known.
    pub fn replicas_of(&self, shard: ShardId) -> Vec<NodeId> {
        self.places.borrow().shards.get(&shard).map(|replicas| replicas.nodes.clone()).unwrap_or_default()
    }

    /// Asks one replica, once; `None`: it did not answer, or does not lead.
    pub async fn shard_at(
        &self,
        node: NodeId,
        shard: ShardId,
        op: pb::shard_request::Op,
    ) -> Option<ShardAnswer> {
        let header = Some(request_header(&self.port.cluster, self.port.time(), false));
        let request = pb::ShardRequest { header, shard: u32::from(shard.0), op: Some(op) };
        let parts = self.port.call(node, Rpc::Shard, vec![encode(&request)], SHORT_TIMEOUT).await?;
        let reply = decode::<pb::ShardReply>(&parts)?;
        self.port.observe(Time(reply.header.map_or(0, |header| header.time)));
        reply.result.filter(|result| !matches!(result, ShardAnswer::Error(_)))
    }

    /// Whom to ask: what was so in the past any replica may know.
    fn place_of(&self, shard: ShardId, op: &pb::shard_request::Op, anywhere: &mut bool) -> Option<NodeId> {
        let of_the_past = match op {
            pb::shard_request::Op::Walk(walk) => walk.at != 0,
            pb::shard_request::Op::List(list) => list.at != 0,
            _ => false,
        };
        let places = self.places.borrow();
        let replicas = places.shards.get(&shard)?;
        let read = !matches!(op, pb::shard_request::Op::Write(_));
        let astray = (of_the_past || (read && self.port.chance(ASTRAY))) && std::mem::take(anywhere);
        if astray && !replicas.nodes.is_empty() {
            return Some(replicas.nodes[self.port.below(replicas.nodes.len())]);
        }
        replicas.asked
    }

    /// Asks a shard until it answers. Errors that say "later" are not answers.
    pub async fn shard(
        &self,
        shard: ShardId,
        op: pb::shard_request::Op,
        lane: Option<(SessionId, u64)>,
        until: u64,
    ) -> Result<Result<ShardAnswer, ShardError>, GaveUp> {
        let mut backoff = Backoff::default();
        // Once per call at most.
        let mut anywhere = self.port.chance(50);
        loop {
            let mut header = request_header(&self.port.cluster, self.port.time(), self.secret);
            if let Some((session, sequence)) = lane {
                (header.session, header.sequence) = (session.0, sequence);
            }
            let request =
                pb::ShardRequest { header: Some(header), shard: u32::from(shard.0), op: Some(op.clone()) };
            let place = self.place_of(shard, &op, &mut anywhere);
            let parts = match place {
                Some(host) => self.port.call(host, Rpc::Shard, vec![encode(&request)], CALL_TIMEOUT).await,
                None => None,
            };
            let go_on = |hint: &str| {
                if let (Some(node), Some(replicas)) = (place, self.places.borrow_mut().shards.get_mut(&shard))
                {
                    replicas.go_on(node, hint);
                }
            };
            if let Some(reply) = parts.and_then(|parts| decode::<pb::ShardReply>(&parts)) {
                self.port.observe(Time(reply.header.map_or(0, |header| header.time)));
                match reply.result {
                    Some(ShardAnswer::Error(error)) => match ShardError::from_code(error.code) {
                        Some(ShardError::NotLeader) => {
                            // The shard may be elsewhere by now.
                            if error.leader.is_empty() {
                                self.refresh().await;
                            }
                            go_on(&error.leader);
                        }
                        Some(error) if error.retry() == Retry::Never => return Ok(Err(error)),
                        _ => {}
                    },
                    Some(answer) => return Ok(Ok(answer)),
                    None => {}
                }
            } else {
                self.refresh().await;
                go_on("");
            }
            let pause = self.pause(&mut backoff);
            if self.port.now() + pause >= until {
                return Err(GaveUp);
            }
            self.port.sleep(pause).await;
        }
    }

    /// Writes until there is an answer for each operation; `Locked` and the like are asked again, anew.
    pub async fn write(
        &self,
        shard: ShardId,
        ops: Vec<pb::write_op::Op>,
        until: u64,
    ) -> Result<Vec<pb::WriteResult>, GaveUp> {
        let mut backoff = Backoff::default();
        let ops: Vec<pb::WriteOp> = ops.into_iter().map(|op| pb::WriteOp { op: Some(op) }).collect();
        loop {
            let write = pb::shard_request::Op::Write(pb::Write { ops: ops.clone() });
            let lane = self.port.next_in_lane();
            let answer = match self.shard(shard, write, Some(lane), until).await {
                Ok(answer) => answer,
                Err(GaveUp) => {
                    self.port.new_lane();
                    return Err(GaveUp);
                }
            };
            let results = match answer {
                Ok(ShardAnswer::Write(reply)) => {
                    self.again(shard, &ops, lane, &reply.results).await;
                    reply.results
                }
                Ok(_) => return Err(GaveUp),
                // A refusal of the whole request: nothing was done.
                Err(error) => {
                    let result = Some(pb::write_result::Result::Error(error.bare()));
                    return Ok(vec![pb::WriteResult { result, time: 0 }; ops.len()]);
                }
            };
            // Only whole requests are repeated here: what was done in one stays done.
            let later =
                |result: &pb::WriteResult| refusal(result).is_some_and(|error| error.retry() != Retry::Never);
            if ops.len() > 1 || !results.iter().any(later) {
                return Ok(results);
            }
            let pause = self.pause(&mut backoff);
            if self.port.now() + pause >= until {
                // It was answered: it did not happen.
                return Ok(results);
            }
            self.port.sleep(pause).await;
        }
    }

    /// Makes an answered call again, now and then: it must get its first answer.
    async fn again(
        &self,
        shard: ShardId,
        ops: &[pb::WriteOp],
        lane: (SessionId, u64),
        first: &[pb::WriteResult],
    ) {
        let eden =
            |result: &pb::WriteResult| matches!(result.result, Some(pb::write_result::Result::Eden(_)));
        // The certificates of placed blocks are signed anew each time.
        if !self.port.chance(REPEATED) || first.iter().any(eden) {
            return;
        }
        let write = pb::shard_request::Op::Write(pb::Write { ops: ops.to_vec() });
        let until = self.port.now() + 20 * SECOND;
        match self.shard(shard, write, Some(lane), until).await {
            Ok(Ok(ShardAnswer::Write(reply))) if reply.results == first => {}
            Err(GaveUp) => {}
            other => {
                let what = format!("{ops:?} of shard {shard} was answered {first:?}, and again {other:?}");
                self.complaints.borrow_mut().push(what);
            }
        }
    }

    /// What a move or an exchange had made of the name that it locks by an instant (`None`: by now); `None`: it is over,
    /// look again.
    pub async fn fate(&self, transaction: u64, at: Option<Time>, until: u64) -> Result<Option<Fate>, GaveUp> {
        let op = pb::crossdir_request::Op::ResolveMove(pb::ResolveMove { transaction });
        match self.crossdir_in((SessionId(0), 0), &op, until).await? {
            Ok(CrossdirAnswer::ResolveMove(reply)) => {
                let by_then = at.is_none_or(|at| reply.moved_at <= at.0);
                let (target, exchanged_at) = (reply.target, reply.moved_at);
                Ok(match reply.outcome() {
                    pb::MoveOutcome::MoveOver => None,
                    pb::MoveOutcome::MoveMade if by_then => Some(Fate::Gone),
                    pb::MoveOutcome::MoveExchanged if by_then => {
                        Some(Fate::Leads(pb::Exchanged { transaction, target, exchanged_at }))
                    }
                    _ => Some(Fate::There),
                })
            }
            other => {
                self.complaints.borrow_mut().push(format!("a move was resolved with {other:?}"));
                Err(GaveUp)
            }
        }
    }

    /// What an entry of a listing is, which may be locked by a move; `None`: it is not there.
    pub async fn settled(
        &self,
        entry: pb::Entry,
        directory: u64,
        at: u64,
        until: u64,
    ) -> Result<Option<pb::Entry>, GaveUp> {
        if entry.locked_by == 0 || self.port.cluster.bug == Some(Bug::UnresolvedMoves) {
            return Ok(Some(entry));
        }
        let instant = (at != 0).then_some(Time(at));
        let target = match self.fate(entry.locked_by, instant, until).await? {
            Some(Fate::There) => return Ok(Some(entry)),
            Some(Fate::Gone) => return Ok(None),
            Some(Fate::Leads(known)) => known.target,
            None => {
                let components = vec![entry.name.clone()];
                let walk = pb::Walk { start: directory, components, at, ..pb::Walk::default() };
                match self.walk(walk, until).await? {
                    Ok(ShardAnswer::Walk(reply)) if reply.stopped.is_none() => reply.inode,
                    _ => return Ok(None),
                }
            }
        };
        Ok(Some(pb::Entry { target, ..entry }))
    }

    /// Walks, asking what became of the moves it meets.
    pub async fn walk(
        &self,
        mut walk: pb::Walk,
        until: u64,
    ) -> Result<Result<ShardAnswer, ShardError>, GaveUp> {
        let at = (walk.at != 0).then_some(Time(walk.at));
        loop {
            let shard = eggs_proto::InodeId(walk.start).shard();
            let answer = self.shard(shard, pb::shard_request::Op::Walk(walk.clone()), None, until).await?;
            let Ok(ShardAnswer::Walk(pb::WalkReply { locked_by, .. })) = answer else { return Ok(answer) };
            if locked_by == 0 || self.port.cluster.bug == Some(Bug::UnresolvedMoves) {
                return Ok(answer);
            }
            match self.fate(locked_by, at, until).await? {
                Some(Fate::Gone) => walk.moved.push(locked_by),
                Some(Fate::There) => walk.not_moved.push(locked_by),
                Some(Fate::Leads(known)) => walk.exchanged.push(known),
                None => self.port.sleep(5 * MILLISECOND).await,
            }
        }
    }

    /// Asks the coordinator until it answers.
    pub async fn crossdir(
        &self,
        op: pb::crossdir_request::Op,
        until: u64,
    ) -> Result<Result<CrossdirAnswer, CrossdirError>, GaveUp> {
        let lane = self.port.next_in_lane();
        let Ok(answer) = self.crossdir_in(lane, &op, until).await else {
            self.port.new_lane();
            return Err(GaveUp);
        };
        if self.port.chance(REPEATED) {
            let until = self.port.now() + 20 * SECOND;
            if let Ok(again) = self.crossdir_in(lane, &op, until).await
                && again != answer
            {
                let what = format!("{op:?} was answered {answer:?}, and again {again:?}");
                self.complaints.borrow_mut().push(what);
            }
        }
        Ok(answer)
    }

    async fn crossdir_in(
        &self,
        (session, sequence): (SessionId, u64),
        op: &pb::crossdir_request::Op,
        until: u64,
    ) -> Result<Result<CrossdirAnswer, CrossdirError>, GaveUp> {
        let mut backoff = Backoff::default();
        loop {
            let mut header = request_header(&self.port.cluster, self.port.time(), false);
            (header.session, header.sequence) = (session.0, sequence);
            let request = pb::CrossdirRequest { header: Some(header), op: Some(op.clone()) };
            let place = self.places.borrow().crossdir.asked;
            let parts = match place {
                Some(host) => {
                    self.port.call(host, Rpc::Crossdir, vec![encode(&request)], TRANSACTION_TIMEOUT).await
                }
                None => None,
            };
            let go_on = |hint: &str| {
                if let Some(node) = place {
                    self.places.borrow_mut().crossdir.go_on(node, hint);
                }
            };
            if let Some(reply) = parts.and_then(|parts| decode::<pb::CrossdirReply>(&parts)) {
                self.port.observe(Time(reply.header.map_or(0, |header| header.time)));
                match reply.result {
                    Some(CrossdirAnswer::Error(error)) => match CrossdirError::from_code(error.code) {
                        Some(CrossdirError::NotLeader) => {
                            if error.leader.is_empty() {
                                self.refresh().await;
                            }
                            go_on(&error.leader);
                        }
                        Some(error) if error.retry() == Retry::Never => return Ok(Err(error)),
                        _ => {}
                    },
                    Some(answer) => return Ok(Ok(answer)),
                    None => {}
                }
            } else {
                self.refresh().await;
                go_on("");
            }
            let pause = self.pause(&mut backoff);
            if self.port.now() + pause >= until {
                return Err(GaveUp);
            }
            self.port.sleep(pause).await;
        }
    }
}

/// Why an operation was refused.
pub(crate) fn refusal(result: &pb::WriteResult) -> Option<ShardError> {
    match &result.result {
        Some(pb::write_result::Result::Error(error)) => {
            Some(ShardError::from_code(error.code).unwrap_or(ShardError::Internal))
        }
        _ => None,
    }
}
