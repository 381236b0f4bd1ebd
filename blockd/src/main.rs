//! The block service daemon: `eggs-blockd`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use eggs_blockd::args::{BlockdArgs, InspectArgs};
use eggs_blockd::{Config, DiskConfig, Service, known_cluster, refuse_other_cluster};
use eggs_daemon::registry::Registry;
use eggs_daemon::{CancellationToken, Secret, metrics, server, systemd};
use eggs_proto::ClusterId;

/// How long a host whose disks are all formatted waits for shuckle before it serves without.
const JOIN_PATIENCE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    if words.nth(1).is_some_and(|word| word == "inspect") {
        let args = InspectArgs::parse_from(std::iter::once("eggs-blockd inspect".into()).chain(words));
        return eggs_blockd::inspect::run(&args.disks);
    }
    eggs_daemon::run(|args: &BlockdArgs| &args.common, serve)
}

async fn serve(args: BlockdArgs, stop: CancellationToken) -> anyhow::Result<()> {
    let disks = args.disks.configs(&args.host).map_err(anyhow::Error::msg)?;
    let secret = Secret::load(&args.cluster.secret_file)?;
    let listener = server::bind(args.common.listen).await?;
    let bound = listener.local_addr()?;
    let advertised = args.common.advertised(bound).map_err(anyhow::Error::msg)?;
    let known = known_cluster(&disks);
    let shuckle = &args.cluster.shuckle;
    let joined = join(shuckle, &secret, known, &disks, &stop).await?;
    let Some((cluster, registry)) = joined else { return Ok(()) };
    let service = tokio::task::spawn_blocking(move || Service::open(Config { cluster, disks })).await??;

    let health = service.health();
    let router = service.router().merge(metrics::router(health));
    let served = tokio::spawn(server::serve(listener, router, stop.clone()));
    let result = async {
        let registry = match registry {
            Some(registry) => registry,
            None => Registry::join(shuckle, Some(secret), Some(cluster), &stop).await?,
        };
        let registered = || {
            tracing::info!(address = %bound, %cluster, version = eggs_daemon::VERSION, "ready");
            systemd::ready();
        };
        Ok(service.run_registration(&registry, advertised, registered, stop.clone()).await?)
    };
    let result: anyhow::Result<()> = result.await;
    stop.cancel();
    served.await?;
    service.stop().await;
    match result {
        Err(error) if is_stop(&error) => Ok(()),
        result => result,
    }
}

/// The cluster, and its registry if that answers and takes the secret. Without it, disks that were formatted before
/// can be served all the same; fresh ones must wait. `None`: told to stop meanwhile.
async fn join(
    shuckle: &[String],
    secret: &Secret,
    known: Option<ClusterId>,
    disks: &[DiskConfig],
    stop: &CancellationToken,
) -> anyhow::Result<Option<(ClusterId, Option<Registry>)>> {
    // Nothing is formatted before all that can be refused was.
    let joining = async {
        let registry = Registry::join(shuckle, Some(secret.clone()), None, stop).await?;
        refuse_other_cluster(disks, registry.cluster())?;
        registry.check_secret(stop).await?;
        anyhow::Ok(registry)
    };
    let joined = match known.filter(|_| !eggs_blockd::would_format(disks)) {
        None => joining.await,
        Some(cluster) => match tokio::time::timeout(JOIN_PATIENCE, joining).await {
            Ok(joined) => joined,
            Err(_) => {
                tracing::warn!(shuckle = shuckle.join(", "), %cluster, "shuckle does not answer, serving the disks without it");
                return Ok(Some((cluster, None)));
            }
        },
    };
    match joined {
        Ok(registry) => Ok(Some((registry.cluster(), Some(registry)))),
        Err(error) if is_stop(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_stop(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(eggs_daemon::registry::JoinError::Stopped { .. }))
}
