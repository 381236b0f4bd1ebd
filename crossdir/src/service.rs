//! The coordinator's life: open, join the cluster, drive while it leads, stop.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use axum::Router;
use eggs_consensus::{GroupId, PeerHandler};
use eggs_crossdir_core::CrossdirMachine;
use eggs_daemon::{CancellationToken, Secret, server};
use eggs_proto::limits::MESSAGE_BYTES_MAX;
use eggs_proto::pb;
use eggs_proto::pb::crossdir_service_server::{CrossdirService, CrossdirServiceServer};
use eggs_replica::{Replica, Settings, StartError};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use crate::config::Config;
use crate::driving::{self, Event, GROUP};
use crate::handler::Handler;
use crate::shards::Shards;

/// The coordinator's replica in one process.
#[derive(Debug)]
pub struct Service {
    handler: Handler,
    /// For the driving task, once there are shards to drive.
    events: Mutex<Option<mpsc::UnboundedReceiver<Event>>>,
    replica: Replica,
    secret: Secret,
}

impl Service {
    /// Opens the data directory and brings the state up to its log. Blocks; must be called within a tokio
    /// runtime, on a thread that may block.
    ///
    /// # Errors
    /// See [`Replica::open`].
    pub fn open(config: Config) -> Result<Service, StartError> {
        let Config { data, secret, shuckle, host, read_lease, snapshot_bytes_per_second } = config;
        let kind = pb::StoreKind::StoreCrossdir;
        let settings = Settings {
            data,
            kind,
            host,
            secret: secret.clone(),
            shuckle,
            read_lease,
            snapshot_bytes_per_second,
        };
        let (driving, events) = driving::channel();
        let told = driving.events.clone();
        let on_event = move |event| {
            // Without a task there is nothing to drive: it starts from the rows.
            let _ = told.send(Event::Consensus(event));
        };
        let machine = |group: GroupId| (group == GROUP).then_some(CrossdirMachine);
        let replica = Replica::open(settings, machine, on_event)?;
        let handler = Handler {
            consensus: replica.handle().clone(),
            driving,
            joined: Arc::new(OnceLock::new()),
            space: Arc::clone(replica.space()),
            quorum: Arc::clone(replica.quorum()),
            made: Arc::new(AtomicU64::new(first())),
        };
        Ok(Service { handler, events: Mutex::new(Some(events)), replica, secret })
    }

    /// Its part of the port, but for what the other stores ask: see [`peers`](Service::peers).
    pub fn router(&self) -> Router {
        let service = CrossdirServiceServer::new(Transport { handler: self.handler.clone() })
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        server::grpc(service)
    }

    /// What answers the other stores; the port has one `peer_streams` for all stores behind it.
    pub fn peers(&self) -> PeerHandler {
        self.replica.peers()
    }

    /// Why it is not well, if it is not.
    ///
    /// # Errors
    /// For people.
    pub fn health(&self) -> Result<(), String> {
        self.replica.health()
    }

    /// Joins the cluster, registers as `advertised`, and carries transactions through while it leads, until
    /// `stop`.
    ///
    /// # Errors
    /// What no retry helps against, and a consensus thread that has stopped.
    pub async fn run(&self, advertised: &str, stop: CancellationToken) -> Result<(), StartError> {
        let Some(joined) = self.replica.join(false, &stop).await? else { return Ok(()) };
        let consensus = self.replica.handle().clone();
        let shards =
            Shards::new(joined.map.clone(), consensus.clone(), joined.cluster(), self.secret.clone());
        let failed = |why| StartError::Failed { name: "crossdir", why };
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner).take();
        let events = events.ok_or_else(|| failed("run was called twice".to_owned()))?;
        let driving = driving::drive(events, self.handler.driving.clone(), consensus, shards.clone());
        let _ = self.handler.joined.set((joined.cluster(), shards));
        let in_flight = || self.handler.in_flight();
        tokio::select! {
            result = self.replica.serve(&joined, advertised, in_flight, stop) => result,
            result = driving => result.map_err(failed),
        }
    }

    /// Finishes what was accepted and makes the state durable. Blocks for as long as that takes.
    /// Transactions on their way are carried on by whoever leads next.
    pub fn stop(self) {
        self.replica.stop();
    }
}

/// Where going round the shards begins: elsewhere after each start.
fn first() -> u64 {
    getrandom::u64().unwrap_or(0) >> 1
}

struct Transport {
    handler: Handler,
}

#[tonic::async_trait]
impl CrossdirService for Transport {
    async fn call(
        &self,
        request: Request<pb::CrossdirRequest>,
    ) -> Result<Response<pb::CrossdirReply>, Status> {
        Ok(Response::new(self.handler.call(request.into_inner()).await))
    }
}
