//! One Prometheus recorder per process, and the routes that show it.
//!
//! Services only use the `metrics` macros; the process that owns the port adds [`router`] once
//! (services merged on one port would otherwise have it twice).

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();

/// Seconds; from a request served from memory to one that waits for a spinning disk.
const BUCKETS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Installs the process's recorder; later calls change nothing.
pub fn install() {
    HANDLE.get_or_init(|| {
        let builder = PrometheusBuilder::new();
        let recorder = match builder.set_buckets(BUCKETS) {
            Ok(builder) => builder.build_recorder(),
            // Only for an empty list of buckets.
            Err(_) => PrometheusBuilder::new().build_recorder(),
        };
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another metrics recorder is installed, /metrics stays empty");
        }
        metrics::gauge!("eggs_build_info", "version" => crate::VERSION).set(1.0);
        handle
    });
}

/// What /metrics answers; empty before [`install`].
pub fn render() -> String {
    let Some(handle) = HANDLE.get() else { return String::new() };
    process();
    handle.render()
}

/// Moves what histograms gathered into their buckets; without it they grow until somebody scrapes.
pub(crate) fn upkeep() {
    if let Some(handle) = HANDLE.get() {
        handle.run_upkeep();
    }
}

/// `/metrics` and `/healthz`. `health` says why the process is not well, if it is not.
pub fn router(health: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Router {
    install();
    let health = Arc::new(health);
    Router::new()
        .route(
            "/metrics",
            get(|| async {
                ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], render())
            }),
        )
        .route(
            "/healthz",
            get(move || {
                let health = Arc::clone(&health);
                async move {
                    match health() {
                        Ok(()) => (StatusCode::OK, "ok\n".to_owned()).into_response(),
                        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
                    }
                }
            }),
        )
}

/// The usual `process_*` gauges, read from /proc at every scrape.
fn process() {
    let page = rustix::param::page_size() as f64;
    if let Ok(statm) = std::fs::read_to_string("/proc/self/statm") {
        let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<f64>().ok());
        metrics::gauge!("process_resident_memory_bytes").set(pages.unwrap_or(0.0) * page);
    }
    if let Ok(stat) = std::fs::read_to_string("/proc/self/stat") {
        // Fields 14 and 15; counted from behind the command's name, which may hold blanks.
        let fields = stat.rsplit(')').next().unwrap_or("").split_ascii_whitespace();
        let ticks: f64 = fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum();
        let per_second = rustix::param::clock_ticks_per_second() as f64;
        metrics::gauge!("process_cpu_seconds_total").set(ticks / per_second);
    }
    if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
        metrics::gauge!("process_open_fds").set(files.count() as f64);
    }
}
