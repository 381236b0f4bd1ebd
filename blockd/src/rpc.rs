//! gRPC around the [`Service`]. Every refusal is in the reply; a status is for transport troubles only.

use std::pin::Pin;

use eggs_proto::limits::MESSAGE_BYTES_MAX;
use eggs_proto::pb;
use eggs_proto::pb::block_service_server::{BlockService, BlockServiceServer};
use futures_util::{Stream, StreamExt};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::service::Service;

impl Service {
    /// Its routes, to be merged with others on one port.
    pub fn router(&self) -> axum::Router {
        let server = BlockServiceServer::new(Rpc(self.clone()))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        eggs_daemon::server::grpc(server)
    }
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
        request: Request<pb::EraseBlockRequest>,
    ) -> Result<Response<pb::EraseBlockReply>, Status> {
        Ok(Response::new(self.0.erase(request.into_inner()).await))
    }

    async fn stats(
        &self,
        request: Request<pb::BlockStatsRequest>,
    ) -> Result<Response<pb::BlockStatsReply>, Status> {
        Ok(Response::new(self.0.stats(&request.into_inner())))
    }
}
