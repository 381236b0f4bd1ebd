//! `eggs-crossdir`: the coordinator of operations that touch more than one directory.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use eggs_consensus::peer_streams;
use eggs_crossdir::{Config, Service};
use eggs_daemon::args::{ClusterArgs, CommonArgs, DataArgs, HostArgs, ReplicaArgs};
use eggs_daemon::server::{self, Routes};
use eggs_daemon::{CancellationToken, Secret, metrics, run, systemd};

/// Coordinates EggsFS operations that touch more than one directory: mkdir, rmdir, mv
#[derive(Debug, Parser)]
#[command(name = "eggs-crossdir", version)]
#[command(mut_arg("listen", |arg| arg.default_value("127.0.0.1:5002")))]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    host: HostArgs,
    #[command(flatten)]
    replica: ReplicaArgs,
}

fn main() -> ExitCode {
    run(|args: &Args| &args.common, daemon)
}

async fn daemon(args: Args, stop: CancellationToken) -> anyhow::Result<()> {
    let secret = Secret::load(&args.cluster.secret_file)?;
    let host = args.host.name().map_err(anyhow::Error::msg)?;
    let listener = server::bind(args.common.listen).await?;
    let address = listener.local_addr()?;
    let advertised = args.common.advertised(address).map_err(anyhow::Error::msg)?;
    let config = Config {
        data: args.data.data,
        secret,
        shuckle: args.cluster.shuckle,
        host,
        read_lease: args.replica.read_lease,
        snapshot_bytes_per_second: args.replica.snapshot_bytes_per_second(),
    };
    let service = Arc::new(tokio::task::spawn_blocking(|| Service::open(config)).await??);
    let health = Arc::downgrade(&service);
    let router = service.router().merge(metrics::router(move || match health.upgrade() {
        Some(service) => service.health(),
        None => Err("stopping".to_owned()),
    }));
    tracing::info!(%address, "listening");
    systemd::ready();
    // The port closes once others have taken over what was led here.
    let close = CancellationToken::new();
    let routes = Routes::from(router).with(peer_streams(vec![service.peers()]));
    let served = tokio::spawn(server::serve(listener, routes, close.clone()));
    let result = service.run(&advertised, stop).await;
    close.cancel();
    served.await?;
    if let Some(service) = Arc::into_inner(service) {
        tokio::task::spawn_blocking(|| service.stop()).await?;
    }
    Ok(result?)
}
