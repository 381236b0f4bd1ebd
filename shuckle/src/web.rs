//! The dashboard and the JSON behind it. Everything is in the binary: no files, no other hosts.

use axum::extract::State;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use serde_json::json;

use crate::registry::Registry;
use crate::state::Known;

const PAGE: &str = include_str!("web/index.html");
const STYLE: &str = include_str!("web/style.css");
const SCRIPT: &str = include_str!("web/app.js");
const ICON: &str = include_str!("web/egg.svg");

/// Nothing but our own files may run or load, whatever gets into the page.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page and the API; to be merged with the other routes of the port.
pub fn router(registry: Registry) -> Router {
    Router::new()
        .route("/", get(|| async { file("text/html; charset=utf-8", PAGE) }))
        .route("/assets/style.css", get(|| async { file("text/css; charset=utf-8", STYLE) }))
        .route("/assets/app.js", get(|| async { file("text/javascript; charset=utf-8", SCRIPT) }))
        .route("/assets/egg.svg", get(|| async { file("image/svg+xml", ICON) }))
        .route("/favicon.ico", get(|| async { file("image/svg+xml", ICON) }))
        .nest("/api/v1", api())
        .nest("/api", api())
        .with_state(registry)
}

fn api() -> Router<Registry> {
    Router::new()
        .route("/cluster", get(|registry| answer(registry, Known::cluster)))
        .route("/status", get(|registry| answer(registry, Known::summary)))
        .route("/summary", get(|registry| answer(registry, Known::summary)))
        .route("/stores", get(|registry| answer(registry, |known| json!({ "stores": known.stores() }))))
        .route("/hosts", get(|registry| answer(registry, |known| json!({ "hosts": known.summary().hosts }))))
        .route("/shards", get(|registry| answer(registry, |known| json!({ "shards": known.shards() }))))
        .route(
            "/block-services",
            get(|registry| answer(registry, |known| json!({ "block_services": known.block_services() }))),
        )
        .route(
            "/transactions",
            get(|registry| {
                answer(registry, |known| {
                    let crossdir = known.summary().crossdir;
                    json!({ "transactions": crossdir.transactions, "slow": crossdir.slow_transactions })
                })
            }),
        )
        .route("/janitor", get(|registry| answer(registry, Known::upkeep)))
        .route("/version", get(|| async { Json(json!({ "version": eggs_daemon::VERSION, "api": 1 })) }))
}

async fn answer<T: Serialize>(State(registry): State<Registry>, of: fn(&Known) -> T) -> Response {
    const NO_STORE: [(HeaderName, HeaderValue); 1] =
        [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    match registry.known().await {
        Ok(known) => (NO_STORE, Json(of(&known))).into_response(),
        Err(error) => {
            let body = Json(json!({ "error": error.message }));
            (StatusCode::SERVICE_UNAVAILABLE, NO_STORE, body).into_response()
        }
    }
}

fn file(kind: &'static str, body: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        // A page of the last version must not talk to the API of the next.
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, body).into_response()
}
