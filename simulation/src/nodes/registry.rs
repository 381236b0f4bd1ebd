//! The registry, as `eggs-shuckle` is.

use eggs_consensus_core::GroupId;
use eggs_machine::group::Applied;
use eggs_proto::limits::{PROTOCOL_VERSION, STALE_AFTER};
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{RegistryError, ServiceError, SessionId, Time, pb};
use eggs_shuckle_core::{Health, RegistryMachine, Step};
use prost::Message;

use super::{Cluster, Daemon, Me, Stop, decode, encode, reply_header, turn_delay};
use crate::kernel::{Envelope, Kernel, Rpc, Timer};
use crate::replica::{Offered, Replica, Waiter};

pub(crate) const GROUP: GroupId = GroupId(257);

pub(crate) struct Registry {
    pub me: Me,
    cluster: Cluster,
    pub replica: Replica<RegistryMachine>,
    health: Option<Health>,
}

impl Registry {
    pub fn new(me: Me, cluster: Cluster) -> Registry {
        let replica = Replica::new(vec![(GROUP, RegistryMachine)], false);
        Registry { me, cluster, replica, health: None }
    }

    /// Once, at the beginning of the world.
    pub fn found(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.replica.open(self.me.wall(kernel))?;
        let found = pb::FoundCluster { cluster_id: bytes::Bytes::copy_from_slice(&self.cluster.id.0) };
        let command = pb::RegistryCommand { command: Some(pb::registry_command::Command::Found(found)) };
        let wall = self.me.wall(kernel);
        self.replica.write(GROUP, SessionId(0), 0, wall, None, |_, _| Ok(encode(&command)))?;
        while self.replica.has_entries() {
            self.replica.turn()?;
        }
        self.replica.crash(crate::replica::StateAfter::Closed)
    }

    fn take(&mut self, kernel: &mut Kernel, request: &Envelope) -> Result<Option<Answer>, Stop> {
        let refused = |error: RegistryError| Ok(Some(Answer::Error(error.bare())));
        let Some(message) = decode::<pb::RegistryRequest>(&request.parts) else {
            return refused(RegistryError::Malformed);
        };
        let (Some(header), Some(op)) = (message.header, message.op) else {
            return refused(RegistryError::Malformed);
        };
        if header.version != PROTOCOL_VERSION {
            return refused(RegistryError::UnsupportedVersion);
        }
        if header.cluster_id != self.cluster.id.0[..] && !matches!(op, Op::Hello(_)) {
            return refused(RegistryError::WrongCluster);
        }
        let (wall, authorized) = (self.me.wall(kernel), header.secret == self.cluster.secret);
        self.replica.clock.observe(Time(header.time), wall);
        let Some(health) = &mut self.health else { return refused(RegistryError::Busy) };
        let waiter = Waiter::new(request, Some(&header));
        let mut answer = None;
        let offered = self
            .replica
            .write(GROUP, SessionId(0), 0, wall, Some(waiter), |view, now| {
                match health.request(view, &op, authorized, now) {
                    Ok(Step::Log(command)) => Ok(encode(&command)),
                    Ok(Step::Answer(reply)) => {
                        answer = Some(reply);
                        Err(pb::Error::default())
                    }
                    Err(error) => Err(RegistryError::Internal.with(error)),
                }
            })
            .map_err(Stop::Storage)?;
        match offered {
            Offered::Proposed => {
                self.schedule_turn(kernel);
                Ok(None)
            }
            Offered::Refused(error) => Ok(Some(answer.unwrap_or(Answer::Error(error)))),
            Offered::Repeated(_) | Offered::Busy => refused(RegistryError::Busy),
            Offered::NotLeader => refused(RegistryError::NotLeader),
        }
    }

    fn schedule_turn(&mut self, kernel: &mut Kernel) {
        if !self.replica.turn_due {
            self.replica.turn_due = true;
            let delay = turn_delay(kernel);
            self.me.timer(kernel, delay, Timer::Turn);
        }
    }

    fn answer(&mut self, kernel: &mut Kernel, waiter: Waiter, result: Answer) {
        let time = self.replica.clock.now(self.me.wall(kernel));
        let reply = pb::RegistryReply { header: reply_header(time), result: Some(result) };
        self.me.reply(kernel, waiter.from, waiter.tag, Rpc::Registry, vec![encode(&reply)]);
    }
}

impl Daemon for Registry {
    fn start(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        let wall = self.me.wall(kernel);
        self.replica.open(wall)?;
        self.health = Some(Health::new(self.replica.clock.now(wall), STALE_AFTER));
        Ok(())
    }

    fn crash(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.health = None;
        let state = self.replica.random_state_after(kernel);
        self.replica.crash(state)
    }

    fn on_request(&mut self, kernel: &mut Kernel, request: Envelope) -> Result<(), Stop> {
        if let Some(answer) = self.take(kernel, &request)? {
            self.answer(kernel, Waiter::new(&request, None), answer);
        }
        Ok(())
    }

    fn on_reply(&mut self, _kernel: &mut Kernel, _reply: Envelope) -> Result<(), Stop> {
        Ok(())
    }

    fn on_timer(&mut self, kernel: &mut Kernel, timer: Timer) -> Result<(), Stop> {
        if timer != Timer::Turn {
            return Ok(());
        }
        self.replica.turn_due = false;
        for (waiter, answer) in self.replica.turn().map_err(Stop::Storage)? {
            let (Some(waiter), Applied::Ran(outcome)) = (waiter, answer.applied) else { continue };
            let reply = pb::RegistryReply::decode(outcome.reply).ok().and_then(|reply| reply.result);
            self.answer(kernel, waiter, reply.unwrap_or(Answer::Error(RegistryError::Internal.bare())));
        }
        if self.replica.has_work() {
            self.schedule_turn(kernel);
        }
        Ok(())
    }
}
