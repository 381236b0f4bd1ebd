//! `eggs-shard`: serves metadata shards.

use std::process::ExitCode;

use clap::Parser;
use eggs_daemon::args::{ClusterArgs, CommonArgs, DataArgs};
use eggs_daemon::{CancellationToken, Secret, metrics, run, server, systemd};
use eggs_shard::{Config, Service, ShardList};

/// Serves EggsFS metadata shards: directories, files and where their contents are
#[derive(Debug, Parser)]
#[command(name = "eggs-shard", version)]
#[command(mut_arg("listen", |arg| arg.default_value("127.0.0.1:5001")))]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    cluster: ClusterArgs,

    /// Which of the 256 shards to serve: numbers and ranges, as in 0..127 or 1,5,10..20
    #[arg(long, value_name = "LIST", default_value = "0..255")]
    shards: ShardList,
}

fn main() -> ExitCode {
    run(|args: &Args| &args.common, daemon)
}

async fn daemon(args: Args, stop: CancellationToken) -> anyhow::Result<()> {
    let secret = Secret::load(&args.cluster.secret_file)?;
    let listener = server::bind(args.common.listen).await?;
    let address = listener.local_addr()?;
    let advertised = args.common.advertised(address).map_err(anyhow::Error::msg)?;
    let config = Config { data: args.data.data, shards: args.shards, secret, shuckle: args.cluster.shuckle };
    let service = tokio::task::spawn_blocking(|| Service::open(config)).await??;
    let service = std::sync::Arc::new(service);
    let health = std::sync::Arc::downgrade(&service);
    let router = service.router().merge(metrics::router(move || match health.upgrade() {
        Some(service) => service.health(),
        None => Err("stopping".to_owned()),
    }));
    tracing::info!(%address, "listening");
    systemd::ready();
    let served = tokio::spawn(server::serve(listener, router, stop.clone()));
    let result = service.run(&advertised, stop.clone()).await;
    stop.cancel();
    served.await?;
    if let Some(service) = std::sync::Arc::into_inner(service) {
        tokio::task::spawn_blocking(|| service.stop()).await?;
    }
    Ok(result?)
}
