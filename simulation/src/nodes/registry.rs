//! A store of the registry, as `eggs-shuckle` is.

use std::convert::Infallible;
use std::time::Duration;

use eggs_consensus_core::{GroupId, Role};
use eggs_machine::group::Applied;
use eggs_proto::limits::{PROTOCOL_VERSION, STALE_AFTER};
use eggs_proto::pb::registry_command::Command;
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{RegistryError, ServiceError, SessionId, Time, pb};
use eggs_shuckle_core::{Health, RegistryMachine, Step, plan};
use prost::Message;

use super::{Cluster, Daemon, Me, RegistryLine, Stop, decode, encode, register, reply_header};
use crate::kernel::{Envelope, Kernel, PeerEnvelope, Rpc, SECOND, Timer};
use crate::replica::{Offered, Replica, Turned, Waiter};

pub(crate) const GROUP: GroupId = GroupId::SHUCKLE;

/// A store that is silent for this long is replaced: runs last a minute.
pub(crate) const REPLACE_AFTER: Duration = Duration::from_secs(25);

pub(crate) struct Registry {
    pub me: Me,
    cluster: Cluster,
    pub replica: Replica<RegistryMachine>,
    line: RegistryLine,
    /// While it leads.
    health: Option<Health>,
}

impl Registry {
    pub fn new(kernel: &mut Kernel, me: Me, cluster: Cluster) -> Registry {
        let replica = Replica::new(kernel, &cluster, |id| (id == GROUP).then_some(RegistryMachine));
        Registry { me, cluster, replica, line: RegistryLine::default(), health: None }
    }

    /// Once, at the beginning of the world.
    pub fn found(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        const TURNS_MAX: usize = 100;
        self.replica.open(kernel, &self.me)?;
        self.replica.found_alone(GROUP)?;
        let cluster_id = bytes::Bytes::copy_from_slice(&self.cluster.id.0);
        let found = pb::FoundCluster { cluster_id, replicas: self.cluster.replicas };
        let mut proposed = false;
        for _ in 0..TURNS_MAX {
            let (_, rest) = self.replica.turn(kernel, &self.me)?;
            rest?;
            if self.replica.view(GROUP).is_some() && !proposed {
                proposed = true;
                self.log(kernel, Command::Found(found.clone()), None)?;
            }
        }
        self.replica.crash(kernel, &self.me, crate::replica::StateAfter::Closed);
        Ok(())
    }

    /// The registry's even clock.
    fn even(&self, kernel: &Kernel) -> Time {
        Time(u64::try_from(self.me.now(kernel).monotonic.as_nanos()).unwrap_or(u64::MAX))
    }

    fn log(
        &mut self,
        kernel: &mut Kernel,
        command: Command,
        waiter: Option<Waiter>,
    ) -> Result<Offered, String> {
        let command = encode(&pb::RegistryCommand { command: Some(command) });
        let wall = self.me.wall(kernel);
        let offered = self.replica.write(GROUP, SessionId(0), 0, wall, waiter, |_, _| Ok(command))?;
        self.replica.go_on(kernel, &self.me);
        Ok(offered)
    }

    fn not_leader(&self) -> Answer {
        let leader = self.replica.hint(GROUP);
        Answer::Error(pb::Error { leader, ..RegistryError::NotLeader.bare() })
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
        let now = self.even(kernel);
        let (Some(health), Some(view)) = (&mut self.health, self.replica.view(GROUP)) else {
            return Ok(Some(self.not_leader()));
        };
        let waiter = Waiter::new(request, Some(&header));
        let step = health.request(view, &op, authorized, now);
        match step.map_err(|error| Stop::Storage(error.to_string()))? {
            Step::Answer(reply) => Ok(Some(reply)),
            Step::Log(pb::RegistryCommand { command: Some(command) }) => {
                match self.log(kernel, command, Some(waiter)).map_err(Stop::Storage)? {
                    Offered::Proposed => Ok(None),
                    Offered::Refused(error) => Ok(Some(Answer::Error(error))),
                    Offered::Repeated(_) | Offered::Busy => refused(RegistryError::Busy),
                    Offered::NotLeader => Ok(Some(self.not_leader())),
                }
            }
            Step::Log(_) => refused(RegistryError::Internal),
        }
    }

    /// What the leader decides by itself, about once a second.
    fn plan(&mut self, kernel: &mut Kernel) -> Result<(), Stop> {
        let now = self.even(kernel);
        let (Some(health), Some(view)) = (&self.health, self.replica.view(GROUP)) else { return Ok(()) };
        let groups = plan(view, health, now).map_err(|error| Stop::Storage(error.to_string()))?;
        if !groups.is_empty() {
            kernel.note(format_args!("{} plans {} groups: {:?}", self.me.id, groups.len(), groups[0]));
            self.log(kernel, Command::PutGroups(pb::PutGroups { groups }), None).map_err(Stop::Storage)?;
        }
        Ok(())
    }

    fn heartbeat(&mut self, kernel: &mut Kernel) {
        let offset = self.replica.host().map_or(0, eggs_consensus_core::Host::clock_offset);
        let kind = pb::StoreKind::StoreShuckle;
        let register = register(&self.me, self.replica.store, kind, offset, self.replica.led_groups());
        let time = self.replica.clock.now(self.me.wall(kernel));
        let ops =
            vec![Op::RegisterStore(register), Op::Map(pb::ClusterMap { with_keys: false, known_version: 0 })];
        self.line.ask(kernel, &self.me, &self.cluster, time, ops);
        let pause = if kernel.now < SECOND { self.line.pause().min(SECOND / 10) } else { self.line.pause() };
        self.me.timer(kernel, pause, Timer::Heartbeat);
    }

    fn answer(&mut self, kernel: &mut Kernel, waiter: Waiter, result: Answer) {
        let time = self.replica.clock.now(self.me.wall(kernel));
        let reply = pb::RegistryReply { header: reply_header(time), result: Some(result) };
        self.me.reply(kernel, waiter.from, waiter.tag, Rpc::Registry, vec![encode(&reply)]);
    }

    fn turn(&mut self, kernel: &mut Kernel) -> Result<(), Stop> {
        let (early, rest) = self.replica.turn(kernel, &self.me).map_err(Stop::Storage)?;
        self.told(kernel, early)?;
        self.told(kernel, rest.map_err(Stop::Storage)?)
    }

    /// What half a turn came to.
    fn told(&mut self, kernel: &mut Kernel, turned: Turned<Infallible>) -> Result<(), Stop> {
        for (waiter, answer) in turned.answers {
            let (Some(waiter), Applied::Ran(outcome)) = (waiter, answer.applied) else { continue };
            let reply = pb::RegistryReply::decode(outcome.reply).ok().and_then(|reply| reply.result);
            self.answer(kernel, waiter, reply.unwrap_or(Answer::Error(RegistryError::Internal.bare())));
        }
        for waiter in turned.dropped {
            let answer = self.not_leader();
            self.answer(kernel, waiter, answer);
        }
        if let Some((_, role)) = turned.roles.last() {
            let leads = matches!(role, Role::Leader { .. });
            let health = || {
                let shards = self.cluster.shards as u16;
                let health = Health::new(self.even(kernel), STALE_AFTER);
                health.with_replace_after(REPLACE_AFTER).with_shards(shards)
            };
            self.health = leads.then(health);
            if leads {
                let (delay, life) = (SECOND / 10, self.me.life);
                kernel.timer(self.me.id, life, delay, Timer::Tick);
            }
        }
        Ok(())
    }

    /// The map as this registry has it, when it leads.
    pub fn map(&self, kernel: &Kernel) -> Option<pb::ClusterMapReply> {
        self.health.as_ref()?.map(self.replica.view(GROUP)?, self.even(kernel), false).ok()
    }
}

impl Daemon for Registry {
    fn start(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.replica.open(kernel, &self.me)?;
        self.me.timer(kernel, 0, Timer::Heartbeat);
        Ok(())
    }

    fn crash(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.health = None;
        let state = self.replica.random_state_after(kernel);
        self.replica.crash(kernel, &self.me, state);
        Ok(())
    }

    fn on_request(&mut self, kernel: &mut Kernel, request: Envelope) -> Result<(), Stop> {
        if let Some(answer) = self.take(kernel, &request)? {
            self.answer(kernel, Waiter::new(&request, None), answer);
        }
        Ok(())
    }

    fn on_reply(&mut self, kernel: &mut Kernel, reply: Envelope) -> Result<(), Stop> {
        if let Some((time, map)) = self.line.heard(&self.cluster, &reply) {
            self.replica.clock.observe(time, self.me.wall(kernel));
            self.replica.follow(kernel, &self.me, &map).map_err(Stop::Storage)?;
        }
        Ok(())
    }

    fn on_timer(&mut self, kernel: &mut Kernel, timer: Timer) -> Result<(), Stop> {
        match timer {
            Timer::Turn => self.turn(kernel)?,
            Timer::Held => self.replica.go_on(kernel, &self.me),
            Timer::RaftTick(at) => self.replica.tick(kernel, &self.me, at).map_err(Stop::Storage)?,
            Timer::Heartbeat => self.heartbeat(kernel),
            Timer::Tick if self.health.is_some() => {
                self.plan(kernel)?;
                let pause = if kernel.now < 3 * SECOND { SECOND / 10 } else { SECOND };
                self.me.timer(kernel, pause, Timer::Tick);
            }
            Timer::Tick | Timer::Expired(_) | Timer::Disk(_) => {}
        }
        Ok(())
    }

    fn on_peer(&mut self, kernel: &mut Kernel, envelope: PeerEnvelope) -> Result<(), Stop> {
        self.replica.receive(kernel, &self.me, envelope).map_err(Stop::Storage)
    }
}
