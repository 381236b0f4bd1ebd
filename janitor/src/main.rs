//! The janitor daemon: `eggs-janitor`.

use std::process::ExitCode;

use eggs_daemon::{CancellationToken, Secret, metrics, server, systemd};
use eggs_janitor::args::JanitorArgs;
use eggs_janitor::{Config, Service};

fn main() -> ExitCode {
    eggs_daemon::run(|args: &JanitorArgs| &args.common, serve)
}

async fn serve(args: JanitorArgs, stop: CancellationToken) -> anyhow::Result<()> {
    let secret = Secret::load(&args.cluster.secret_file)?;
    let host = args.host.name().map_err(anyhow::Error::msg)?;
    let listener = server::bind(args.common.listen).await?;
    let bound = listener.local_addr()?;
    let advertised = args.common.advertised(bound).map_err(anyhow::Error::msg)?;
    let close = CancellationToken::new();
    let served = tokio::spawn(server::serve(listener, metrics::router(|| Ok(())), close.clone()));
    let config = Config {
        shuckle: args.cluster.shuckle,
        secret,
        cluster: None,
        host,
        advertised,
        settings: args.settings,
    };
    let registered = || {
        tracing::info!(address = %bound, version = eggs_daemon::VERSION, "ready");
        systemd::ready();
    };
    let result = Box::pin(Service::new(config).run(registered, stop)).await;
    close.cancel();
    served.await?;
    Ok(result?)
}
