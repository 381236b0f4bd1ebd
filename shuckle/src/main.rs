//! The registry daemon: `eggs-shuckle`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use eggs_consensus::peer_streams;
use eggs_daemon::args::{CommonArgs, DataArgs, HostArgs, ReplicaArgs, advertised_address};
use eggs_daemon::server::{self, Routes};
use eggs_daemon::{CancellationToken, metrics, systemd};
use eggs_shuckle::{Config, SecretSource, Service};

/// The registry of an EggsFS cluster: who replicates and leads what, which disks exist and how they feel.
/// Its port also has the dashboard, JSON under /api/v1/, /metrics and /healthz.
#[derive(Debug, Parser)]
#[command(
    name = "eggs-shuckle",
    version,
    mut_arg("listen", |arg| arg.required(false).default_value("127.0.0.1:5000")),
)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    host: HostArgs,
    #[command(flatten)]
    replica: ReplicaArgs,
    /// File with the cluster secret; the other daemons need a copy. Made when absent: with --peers only by the
    /// first of them, and every other host needs a copy before it starts [default: DIR/secret]
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// All shuckles the cluster begins with, as they advertise themselves, in the same order on every host. The
    /// first founds the cluster once all others are there, the others join it. Not needed to start again
    #[arg(long, value_name = "HOST:PORT,…", value_parser = advertised_address, value_delimiter = ',')]
    peers: Vec<String>,
    /// How many hosts have a copy of every piece of metadata: 1, 3 or 5. Decided when the cluster is founded, it
    /// stays [default: 3 with three --peers or more, else 1]
    #[arg(long, value_name = "COUNT", value_parser = replicas)]
    replicas: Option<u32>,
    /// Seconds without a sign of a store until other hosts get its replicas
    #[arg(long, value_name = "SECONDS", default_value_t = Config::REPLACE_AFTER.as_secs(), value_parser = clap::value_parser!(u64).range(10..))]
    replace_after: u64,
}

fn replicas(text: &str) -> Result<u32, String> {
    let known = text.parse().ok().filter(|count| eggs_proto::limits::REPLICAS.contains(count));
    known.ok_or_else(|| "1, 3 or 5 is expected".to_owned())
}

fn main() -> ExitCode {
    eggs_daemon::run(|args: &Args| &args.common, serve)
}

async fn serve(args: Args, stop: CancellationToken) -> anyhow::Result<()> {
    let host = args.host.name().map_err(anyhow::Error::msg)?;
    // The port first: when it is in use, nothing on disk is touched.
    let listener = server::bind(args.common.listen).await?;
    let address = listener.local_addr().context("cannot tell the port")?;
    let advertised = args.common.advertised(address).map_err(anyhow::Error::msg)?;
    let secret = match args.secret_file {
        Some(path) => SecretSource::File(path),
        None => SecretSource::InDirectory,
    };
    let config = Config {
        directory: args.data.data,
        secret,
        host,
        advertised,
        peers: args.peers,
        replicas: args.replicas.unwrap_or_default(),
        replace_after: Duration::from_secs(args.replace_after),
        read_lease: args.replica.read_lease,
        snapshot_bytes_per_second: args.replica.snapshot_bytes_per_second(),
        patience: Config::PATIENCE,
    };
    let service = Service::open(config).await?;
    let router = service.router().merge(metrics::router(service.health()));
    match service.cluster() {
        Some(cluster) => tracing::info!(%address, %cluster, version = eggs_daemon::VERSION, "ready"),
        None => tracing::info!(%address, version = eggs_daemon::VERSION, "ready to found or join a cluster"),
    }
    systemd::ready();
    // The port closes once another has taken over what was led here.
    let close = CancellationToken::new();
    let routes = Routes::from(router).with(peer_streams(vec![service.peers()]));
    let served = tokio::spawn(server::serve(listener, routes, close.clone()));
    let result = service.run(stop).await;
    close.cancel();
    served.await?;
    service.stop().await;
    Ok(result?)
}
