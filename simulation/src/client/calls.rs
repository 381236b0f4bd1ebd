//! Calls with retries: where a shard is, lanes, what is worth asking again (CL-10).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use eggs_client_core::retry::Backoff;
use eggs_proto::pb::crossdir_reply::Result as CrossdirAnswer;
use eggs_proto::pb::shard_reply::Result as ShardAnswer;
use eggs_proto::{
    BlockServiceId, CrossdirError, Retry, ServiceError, SessionId, ShardError, ShardId, Time, flags, pb,
};
use rand::RngCore;

use super::port::Port;
use crate::kernel::{MILLISECOND, NodeId, Rpc, SECOND};
use crate::nodes::{decode, encode, node_at, request_header};

const CALL_TIMEOUT: u64 = SECOND;
/// Calls of the coordinator wait for a whole transaction.
const TRANSACTION_TIMEOUT: u64 = 5 * SECOND;

/// The client gave up: nothing is known of what it asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GaveUp;

/// Where everything is, as the registry last told.
#[derive(Debug, Default)]
pub(crate) struct Places {
    pub shards: BTreeMap<ShardId, NodeId>,
    pub crossdir: Option<NodeId>,
    pub services: BTreeMap<BlockServiceId, (NodeId, u32)>,
}

#[derive(Clone)]
pub(crate) struct Calls {
    pub port: Port,
    pub places: Rc<RefCell<Places>>,
}

impl Calls {
    pub fn new(port: Port) -> Calls {
        Calls { port, places: Rc::default() }
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

    pub async fn refresh(&self) {
        let header = request_header(&self.port.cluster, self.port.time(), false);
        let op = pb::registry_request::Op::Map(pb::ClusterMap { with_keys: false });
        let request = pb::RegistryRequest { header: Some(header), op: Some(op) };
        let registry = self.port.cluster.registry;
        let reply = self.port.call(registry, Rpc::Registry, vec![encode(&request)], CALL_TIMEOUT).await;
        let Some(reply) = reply.and_then(|parts| decode::<pb::RegistryReply>(&parts)) else { return };
        self.port.observe(Time(reply.header.map_or(0, |header| header.time)));
        let Some(pb::registry_reply::Result::Map(map)) = reply.result else { return };
        let shard =
            |place: &pb::ShardPlace| Some((ShardId::try_from(place.shard).ok()?, node_at(&place.address)?));
        let service = |info: &pb::BlockServiceInfo| {
            Some((BlockServiceId(info.id), (node_at(&info.address)?, info.flags)))
        };
        *self.places.borrow_mut() = Places {
            shards: map.shards.iter().filter_map(shard).collect(),
            crossdir: node_at(&map.crossdir_address),
            services: map.block_services.iter().filter_map(service).collect(),
        };
    }

    /// Waits until the cluster has everything this client needs.
    pub async fn join(&self, shards: usize) {
        loop {
            self.refresh().await;
            let joined = {
                let places = self.places.borrow();
                places.shards.len() >= shards && places.crossdir.is_some() && places.services.len() >= 6
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

    /// Asks a shard until it answers. Errors that say "later" are not answers.
    pub async fn shard(
        &self,
        shard: ShardId,
        op: pb::shard_request::Op,
        lane: Option<(SessionId, u64)>,
        until: u64,
    ) -> Result<Result<ShardAnswer, ShardError>, GaveUp> {
        let mut backoff = Backoff::default();
        loop {
            let mut header = request_header(&self.port.cluster, self.port.time(), false);
            if let Some((session, sequence)) = lane {
                (header.session, header.sequence) = (session.0, sequence);
            }
            let request =
                pb::ShardRequest { header: Some(header), shard: u32::from(shard.0), op: Some(op.clone()) };
            let place = self.places.borrow().shards.get(&shard).copied();
            let parts = match place {
                Some(host) => self.port.call(host, Rpc::Shard, vec![encode(&request)], CALL_TIMEOUT).await,
                None => None,
            };
            if let Some(reply) = parts.and_then(|parts| decode::<pb::ShardReply>(&parts)) {
                self.port.observe(Time(reply.header.map_or(0, |header| header.time)));
                match reply.result {
                    Some(ShardAnswer::Error(error)) => match ShardError::from_code(error.code) {
                        Some(error) if error.retry() == Retry::Never => return Ok(Err(error)),
                        _ => {}
                    },
                    Some(answer) => return Ok(Ok(answer)),
                    None => {}
                }
            } else {
                self.refresh().await;
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
                Ok(ShardAnswer::Write(reply)) => reply.results,
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

    /// Asks the coordinator until it answers.
    pub async fn crossdir(
        &self,
        op: pb::crossdir_request::Op,
        until: u64,
    ) -> Result<Result<CrossdirAnswer, CrossdirError>, GaveUp> {
        let mut backoff = Backoff::default();
        let (session, sequence) = self.port.next_in_lane();
        loop {
            let mut header = request_header(&self.port.cluster, self.port.time(), false);
            (header.session, header.sequence) = (session.0, sequence);
            let request = pb::CrossdirRequest { header: Some(header), op: Some(op.clone()) };
            let place = self.places.borrow().crossdir;
            let parts = match place {
                Some(host) => {
                    self.port.call(host, Rpc::Crossdir, vec![encode(&request)], TRANSACTION_TIMEOUT).await
                }
                None => None,
            };
            if let Some(reply) = parts.and_then(|parts| decode::<pb::CrossdirReply>(&parts)) {
                self.port.observe(Time(reply.header.map_or(0, |header| header.time)));
                match reply.result {
                    Some(CrossdirAnswer::Error(error)) => match CrossdirError::from_code(error.code) {
                        Some(error) if error.retry() == Retry::Never => return Ok(Err(error)),
                        _ => {}
                    },
                    Some(answer) => return Ok(Ok(answer)),
                    None => {}
                }
            } else {
                self.refresh().await;
            }
            let pause = self.pause(&mut backoff);
            if self.port.now() + pause >= until {
                self.port.new_lane();
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
