//! The coordinator's life: open, join the cluster, drive, stop.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use axum::Router;
use eggs_consensus::{ConsensusError, Options, Runner};
use eggs_crossdir_core::CrossdirMachine;
use eggs_daemon::directory::DirectoryError;
use eggs_daemon::registry::{JoinError, Registry, RegistryCallError};
use eggs_daemon::space::Space;
use eggs_daemon::{CancellationToken, DataDirectory, Secret, server};
use eggs_proto::limits::MESSAGE_BYTES_MAX;
use eggs_proto::pb;
use eggs_proto::pb::crossdir_service_server::{CrossdirService, CrossdirServiceServer};
use eggs_proto::pb::registry_request::Op as RegistryOp;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use crate::config::Config;
use crate::driving::{self, Event, GROUP};
use crate::handler::Handler;
use crate::shards::Shards;

/// Why the service cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("{}: {error}", path.display())]
    Consensus { path: PathBuf, error: ConsensusError },
    /// It ran elsewhere, or from another directory, before.
    #[error("{} is new and empty, but the coordinator ran at {address} before: start with the directory that holds it (is its disk mounted?)", path.display())]
    Replaces { path: PathBuf, address: String },
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    Registry(#[from] RegistryCallError),
    #[error("the coordinator stopped: {0}")]
    Failed(String),
}

/// The coordinator in one process.
#[derive(Debug)]
pub struct Service {
    handler: Handler,
    /// For the driving task, once there are shards to drive.
    events: Mutex<Option<mpsc::UnboundedReceiver<Event>>>,
    directory: Mutex<DataDirectory>,
    runner: Runner,
    shuckle: String,
    secret: Secret,
}

impl Service {
    /// Opens the data directory and brings the state up to its log. Blocks.
    pub fn open(config: Config) -> Result<Service, StartError> {
        let directory = DataDirectory::open(&config.data, "crossdir")?;
        let options =
            Options { name: "crossdir", directory: directory.path().to_owned(), groups: vec![GROUP] };
        let (driving, events) = driving::channel();
        let effects = driving.events.clone();
        let on_effects = move |_, batch| {
            // Without a task there is nothing to drive: it starts from the rows.
            let _ = effects.send(Event::Effects(batch));
        };
        let (consensus, runner) = eggs_consensus::spawn(&options, |_| CrossdirMachine, on_effects)
            .map_err(|error| StartError::Consensus { path: config.data.clone(), error })?;
        let handler = Handler {
            consensus,
            driving,
            joined: Arc::new(OnceLock::new()),
            space: Arc::new(Space::new(directory.path().to_owned())),
            made: Arc::new(AtomicU64::new(first())),
        };
        Ok(Service {
            handler,
            events: Mutex::new(Some(events)),
            directory: Mutex::new(directory),
            runner,
            shuckle: config.shuckle,
            secret: config.secret,
        })
    }

    /// Its part of the port.
    pub fn router(&self) -> Router {
        let service = CrossdirServiceServer::new(Transport { handler: self.handler.clone() })
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        server::grpc(service)
    }

    /// Why it is not well, if it is not.
    pub fn health(&self) -> Result<(), String> {
        match self.handler.joined.get() {
            Some(_) => Ok(()),
            None => Err("not joined a cluster yet".to_owned()),
        }
    }

    /// Joins the cluster, registers as `advertised`, and carries transactions through until `stop`.
    ///
    /// # Errors
    /// What no retry helps against, and a consensus thread that has stopped.
    pub async fn run(&self, advertised: &str, stop: CancellationToken) -> Result<(), StartError> {
        let expected = self.directory.lock().unwrap_or_else(PoisonError::into_inner).cluster();
        let joined = Registry::join(&self.shuckle, Some(self.secret.clone()), expected, &stop).await;
        let registry = match joined {
            Err(JoinError::Stopped { .. }) => return Ok(()),
            joined => joined?,
        };
        if expected.is_none() {
            // A new directory has no transactions; the shards remember those of the old one.
            let address = registry.map(false).await?.crossdir_address;
            if !address.is_empty() {
                let path = self.directory.lock().unwrap_or_else(PoisonError::into_inner).path().to_owned();
                return Err(StartError::Replaces { path, address });
            }
        }
        self.directory.lock().unwrap_or_else(PoisonError::into_inner).claim(registry.cluster())?;
        let map = registry.watch(false, stop.clone());
        let shards =
            Shards::new(map, self.handler.consensus.clone(), registry.cluster(), self.secret.clone());
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner).take();
        let events = events.ok_or_else(|| StartError::Failed("run was called twice".to_owned()))?;
        let consensus = self.handler.consensus.clone();
        let driving = driving::drive(events, self.handler.driving.clone(), consensus, shards.clone());
        let _ = self.handler.joined.set((registry.cluster(), shards));
        let report = || {
            let transactions = self.handler.driving.unfinished.load(Ordering::Relaxed);
            let transactions = u32::try_from(transactions).unwrap_or(u32::MAX);
            std::future::ready(RegistryOp::RegisterCrossdir(pb::RegisterCrossdir {
                address: advertised.to_owned(),
                transactions,
            }))
        };
        let heartbeat = registry.heartbeat(report, || tracing::info!("coordinating"), stop.clone());
        tokio::select! {
            result = heartbeat => result.map_err(StartError::from),
            result = driving => result.map_err(StartError::Failed),
            why = self.handler.consensus.stopped() => {
                Err(StartError::Failed(why.unwrap_or_else(|| "stopped".to_owned())))
            }
        }
    }

    /// Finishes what was accepted and makes the state durable. Blocks for as long as that takes.
    /// Transactions on their way are carried on after the next start.
    pub fn stop(self) {
        self.runner.stop();
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
