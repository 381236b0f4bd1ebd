//! The life of a janitor: it joins, tells the registry that it is there, and works while it is the one that does.

use std::sync::Arc;
use std::time::Duration;

use eggs_client::{Client, ClientError, ClusterSecret, Options};
use eggs_daemon::registry::{JoinError, Registry, RegistryCallError};
use eggs_daemon::{CancellationToken, Secret};
use eggs_proto::ClusterId;

use crate::args::Settings;
use crate::context::Context;
use crate::{garbage, lost, rebalance, repair, restripe, scrub, spread};

/// Between tries to get to know the cluster: it may be on its way up.
const RETRY: Duration = Duration::from_millis(500);

/// What a janitor is told.
#[derive(Debug, Clone)]
pub struct Config {
    pub shuckle: Vec<String>,
    pub secret: Secret,
    /// Unset: whichever cluster shuckle serves.
    pub cluster: Option<ClusterId>,
    /// The machine it runs on.
    pub host: String,
    /// Where its metrics are.
    pub advertised: String,
    pub settings: Settings,
}

/// Why a janitor ended.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Registry(#[from] RegistryCallError),
    #[error("no random numbers: {0}")]
    Random(String),
}

/// The janitor. [`Service::run`] is all of its life.
#[derive(Debug)]
pub struct Service {
    config: Config,
}

impl Service {
    pub fn new(config: Config) -> Service {
        Service { config }
    }

    /// Joins the cluster and works until `stop`. `registered` is called once, when the registry knows of it. Stopping
    /// half-way is safe at any instant: what was not swapped in is garbage after a while.
    ///
    /// # Errors
    /// What no retry helps against.
    pub async fn run(self, registered: impl FnOnce(), stop: CancellationToken) -> Result<(), Ended> {
        let Config { shuckle, secret, cluster, host, advertised, settings } = self.config;
        let registry = match Registry::join(&shuckle, Some(secret.clone()), cluster, &stop).await {
            Err(JoinError::Stopped { .. }) => return Ok(()),
            joined => joined?,
        };
        let boot = getrandom::u64().map_err(|error| Ended::Random(error.to_string()))?.max(1);
        let options =
            Options { shuckle, secret: Some(ClusterSecret::new(secret.to_bytes())), ..Options::default() };
        let client = tokio::select! {
            client = connect(options) => client?,
            () = stop.cancelled() => return Ok(()),
        };
        let map = registry.watch(false, stop.clone());
        let context = Arc::new(Context::new(client, registry, map, settings, boot));
        let beat = context.registry.heartbeat(
            || async { context.heartbeat(&host, &advertised) },
            registered,
            stop.clone(),
        );
        // Boxed: what all kinds of work keep between two steps together is large.
        let work = Box::pin(async {
            tokio::join!(
                repair::run(&context),
                lost::run(&context),
                scrub::run(&context),
                garbage::run(&context),
                rebalance::run(&context),
                restripe::run(&context),
                spread::run(&context),
            );
        });
        let result = tokio::select! {
            result = beat => result,
            () = work => Ok(()),
            () = stop.cancelled() => Ok(()),
        };
        Ok(result?)
    }
}

/// Tries until the cluster can be reached.
async fn connect(options: Options) -> Result<Client, ClientError> {
    loop {
        match Client::connect(options.clone()).await {
            Err(ClientError::Unreachable { tried, .. }) => {
                tracing::debug!(tried, "the cluster is not there yet");
                tokio::time::sleep(RETRY).await;
            }
            connected => return connected,
        }
    }
}
