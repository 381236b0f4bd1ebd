//! gRPC around the [`Service`]. Every refusal is in the reply; a status is for transport troubles only.

use std::pin::Pin;
use std::sync::Arc;

use axum::extract::State;
use axum::middleware::{Next, from_fn_with_state};
use eggs_proto::limits::MESSAGE_BYTES_MAX;
use eggs_proto::pb;
use eggs_proto::pb::block_service_server::{BlockService, BlockServiceServer};
use futures_util::{Stream, StreamExt};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::limits::{BATCHES_RECEIVED_MAX, TRANSFER_MAX, WAIT_MAX};
use crate::service::Service;

impl Service {
    /// Its routes, to be merged with others on one port.
    pub fn router(&self) -> axum::Router {
        let server = BlockServiceServer::new(Rpc(self.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let receiving = Arc::new(Semaphore::new(BATCHES_RECEIVED_MAX));
        eggs_daemon::server::grpc(server).layer(from_fn_with_state(receiving, bounded))
    }
}

/// A request with the contents of many blocks is put together in memory before anybody sees it. So it has its place before it is read;
/// until then it waits where it came from, behind its stream's window (BL-9).
async fn bounded(
    State(receiving): State<Arc<Semaphore>>,
    request: axum::extract::Request,
    next: Next,
) -> axum::response::Response {
    if !request.uri().path().ends_with("/WriteMany") {
        return next.run(request).await;
    }
    let busy = || Status::resource_exhausted("too many blocks in flight").into_http();
    let Ok(Ok(_place)) = timeout(WAIT_MAX, receiving.acquire_owned()).await else { return busy() };
    timeout(TRANSFER_MAX, next.run(request)).await.unwrap_or_else(|_| busy())
}

#[derive(Debug)]
struct Rpc(Service);

#[tonic::async_trait]
impl BlockService for Rpc {
    async fn write(
        &self,
        request: Request<Streaming<pb::WriteBlockRequest>>,
    ) -> Result<Response<pb::WriteBlockReply>, Status> {
        Ok(Response::new(self.0.write(request.into_inner()).await))
    }

    type FetchStream = Pin<Box<dyn Stream<Item = Result<pb::FetchBlockReply, Status>> + Send>>;

    async fn fetch(
        &self,
        request: Request<pb::FetchBlockRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let pieces = ReceiverStream::new(self.0.fetch(request.into_inner()));
        Ok(Response::new(Box::pin(pieces.map(Ok))))
    }

    async fn erase(
        &self,
        request: Request<pb::EraseBlocksRequest>,
    ) -> Result<Response<pb::EraseBlocksReply>, Status> {
        Ok(Response::new(self.0.erase(request.into_inner()).await))
    }

    async fn write_many(
        &self,
        request: Request<pb::WriteBlocksRequest>,
    ) -> Result<Response<pb::WriteBlocksReply>, Status> {
        Ok(Response::new(self.0.write_many(request.into_inner()).await))
    }

    async fn fetch_many(
        &self,
        request: Request<pb::FetchBlocksRequest>,
    ) -> Result<Response<pb::FetchBlocksReply>, Status> {
        Ok(Response::new(self.0.fetch_many(request.into_inner()).await))
    }

    async fn check(
        &self,
        request: Request<pb::CheckBlocksRequest>,
    ) -> Result<Response<pb::CheckBlocksReply>, Status> {
        Ok(Response::new(self.0.check(request.into_inner()).await))
    }

    async fn stats(
        &self,
        request: Request<pb::BlockStatsRequest>,
    ) -> Result<Response<pb::BlockStatsReply>, Status> {
        Ok(Response::new(self.0.stats(&request.into_inner())))
    }
}
