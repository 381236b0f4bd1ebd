//! gRPC channels between daemons and from clients, tuned as the [server](crate::server) is.

use std::time::Duration;

use tonic::transport::{Channel, Endpoint};

use crate::server::{CONNECTION_WINDOW, FRAME_BYTES_MAX, STREAM_WINDOW};

/// Connecting within a cluster takes a round trip. Longer than this, the packets are lost: a fresh attempt gets through
/// sooner than the kernel's ever slower repetitions.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Without keep-alive a channel stays broken after a partition heals (measured). A channel with a request on it that is
/// not answered for the two together is given up and opened anew.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(1000);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_millis(1000);
/// One without requests is the kernel's to watch: that wakes nobody.
const QUIET_INTERVAL: Duration = Duration::from_secs(2);
const QUIET_RETRIES: u32 = 2;

/// An address that is none.
#[derive(Debug, thiserror::Error)]
#[error("'{address}' is not an address: HOST:PORT is expected")]
pub struct AddressError {
    pub address: String,
}

/// Whether [`connect`] would take it.
///
/// # Errors
/// When `address` is not HOST:PORT.
pub fn validate(address: &str) -> Result<(), AddressError> {
    endpoint(address).map(drop)
}

/// A channel to `address` ("host:port"). It connects at the first request and again when it breaks; a request while it
/// cannot connect fails within a second.
///
/// # Errors
/// Only when `address` is not one. Must be called within a tokio runtime.
pub fn connect(address: &str) -> Result<Channel, AddressError> {
    Ok(endpoint(address)?.connect_lazy())
}

fn endpoint(address: &str) -> Result<Endpoint, AddressError> {
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
        .tcp_keepalive(Some(QUIET_INTERVAL))
        .tcp_keepalive_interval(Some(QUIET_INTERVAL))
        .tcp_keepalive_retries(Some(QUIET_RETRIES)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_addresses_are_accepted() {
        for address in ["127.0.0.1:5000", "localhost:1", "[::1]:80"] {
            assert!(validate(address).is_ok() && connect(address).is_ok(), "{address}");
        }
        for address in ["", ":", ":5000", "localhost", "a b:1", "http://x:1", "host:port", "host:99999"] {
            assert!(validate(address).is_err() && connect(address).is_err(), "{address}");
        }
    }
}
