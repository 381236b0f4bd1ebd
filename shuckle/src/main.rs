//! The registry daemon: `eggs-shuckle`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use eggs_daemon::args::{CommonArgs, DataArgs};
use eggs_daemon::{CancellationToken, metrics, server, systemd};
use eggs_shuckle::{Config, SecretSource, Service};

/// The registry of an EggsFS cluster: who serves which shard, which disks exist and how they feel.
/// Its port also has the dashboard, JSON under /api/v1/, /metrics and /healthz.
#[derive(Debug, Parser)]
#[command(
    name = "eggs-shuckle",
    version,
    mut_arg("listen", |arg| arg.required(false).default_value("127.0.0.1:5000")),
    mut_arg("advertise", |arg| arg.hide(true)),
)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    data: DataArgs,
    /// File with the cluster secret, made when absent; the other daemons need a copy [default:
    /// DIR/secret]
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
}

fn main() -> ExitCode {
    eggs_daemon::run(|args: &Args| &args.common, serve)
}

async fn serve(args: Args, stop: CancellationToken) -> anyhow::Result<()> {
    // The port first: when it is in use, nothing on disk is touched.
    let listener = server::bind(args.common.listen).await?;
    let address = listener.local_addr().context("cannot tell the port")?;
    let secret = match args.secret_file {
        Some(path) => SecretSource::File(path),
        None => SecretSource::InDirectory,
    };
    let config = Config { directory: args.data.data, secret, patience: Config::PATIENCE };
    let service = Service::open(config).await?;
    let failed = service.failed();
    let health = service.health();
    let router = service.router().merge(metrics::router(health));
    tracing::info!(%address, cluster = %service.cluster(), version = eggs_daemon::VERSION, "ready");
    systemd::ready();
    let served = server::serve(listener, router, stop.clone());
    let result = tokio::select! {
        () = served => Ok(()),
        why = failed => Err(anyhow::anyhow!("{why}")),
    };
    service.stop().await;
    result
}
