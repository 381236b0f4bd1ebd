//! gRPC channels between daemons and from clients, tuned as the [server](crate::server) is.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use crate::server::{CONNECTION_WINDOW, FRAME_BYTES_MAX, STREAM_WINDOW};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Without keep-alive a channel stays broken after a partition heals (measured; see HACKING).
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(2);

/// An address that is none.
#[derive(Debug, thiserror::Error)]
#[error("'{address}' is not an address: HOST:PORT is expected")]
pub struct AddressError {
    pub address: String,
}

/// A channel to `address` ("host:port"). It connects at the first request and again when it breaks.
///
/// # Errors
/// Only when `address` is not one. Must be called within a tokio runtime.
pub fn connect(address: &str) -> Result<Channel, AddressError> {
    let wrong = || AddressError { address: address.to_owned() };
    let authority: http::uri::Authority = address.parse().map_err(|_| wrong())?;
    if authority.port_u16().is_none() || authority.host().is_empty() {
        return Err(wrong());
    }
    let endpoint = Endpoint::from_shared(format!("http://{authority}")).map_err(|_| wrong())?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES_MAX)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .connect_lazy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_addresses_are_accepted() {
        for address in ["127.0.0.1:5000", "localhost:1", "[::1]:80"] {
            assert!(connect(address).is_ok(), "{address}");
        }
        for address in ["", ":", ":5000", "localhost", "a b:1", "http://x:1", "host:port", "host:99999"] {
            assert!(connect(address).is_err(), "{address}");
        }
    }
}
