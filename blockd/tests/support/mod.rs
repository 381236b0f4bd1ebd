//! A block service on loopback, and a client that says exactly what a test wants.
#![allow(dead_code, reason = "each test file uses its part of it")]

use std::path::Path;

use bytes::Bytes;
use eggs_blockd::{Config, DiskConfig, Service};
use eggs_blockd_core::{Extent, Identity};
use eggs_daemon::{CancellationToken, channel, server};
use eggs_proto::limits::{MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
use eggs_proto::pb::block_service_client::BlockServiceClient;
use eggs_proto::pb::write_block_request::Part;
use eggs_proto::{BlockError, BlockId, BlockServiceId, ClusterId, ServiceError, ShardId, mac, pb};
use tonic::transport::Channel;

pub const CLUSTER: ClusterId = ClusterId([7; 16]);

pub fn disk(path: impl AsRef<Path>) -> DiskConfig {
    DiskConfig {
        path: path.as_ref().to_owned(),
        storage_class: 3,
        failure_domain: "here".to_owned(),
        expect_existing: false,
        options: Default::default(),
    }
}

pub fn open(disks: Vec<DiskConfig>) -> Service {
    Service::open(Config { cluster: CLUSTER, disks }).unwrap()
}

/// Why the disks cannot be served.
pub fn refusal(disks: Vec<DiskConfig>) -> String {
    Service::open(Config { cluster: CLUSTER, disks }).unwrap_err().to_string()
}

/// The identity of the disk at `path`.
pub fn identity(path: impl AsRef<Path>) -> Identity {
    Identity::decode(&std::fs::read(path.as_ref().join("identity")).unwrap()).unwrap()
}

pub fn client(address: &str) -> BlockServiceClient<Channel> {
    BlockServiceClient::new(channel::connect(address).unwrap())
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(4 * MESSAGE_BYTES_MAX)
}

pub async fn write_many(
    client: &BlockServiceClient<Channel>,
    blocks: Vec<pb::WholeBlock>,
) -> Vec<Result<Bytes, BlockError>> {
    let count = blocks.len();
    let request = pb::WriteBlocksRequest { header: Some(header()), blocks };
    let reply = match client.clone().write_many(request).await {
        Ok(reply) => reply.into_inner(),
        // Sent back unread.
        Err(status) if status.code() == tonic::Code::ResourceExhausted => {
            return vec![Err(BlockError::Busy); count];
        }
        Err(status) => panic!("{status}"),
    };
    if let Some(error) = reply.error {
        return vec![Err(code(&error)); count];
    }
    let result = |result: pb::ProvenBlock| match result.result.unwrap() {
        pb::proven_block::Result::Proof(proof) => Ok(proof),
        pb::proven_block::Result::Error(error) => Err(code(&error)),
    };
    reply.results.into_iter().map(result).collect()
}

pub struct Daemon {
    pub service: Service,
    pub address: String,
    pub client: BlockServiceClient<Channel>,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<()>,
}

impl Daemon {
    pub async fn start(disks: Vec<DiskConfig>) -> Daemon {
        let service = open(disks);
        let listener = server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        let served = tokio::spawn(server::serve(listener, service.router(), stop.clone()));
        let client = client(&address);
        Daemon { service, address, client, stop, served }
    }

    pub async fn stop(self) {
        self.stop.cancel();
        drop(self.client);
        self.served.await.unwrap();
        self.service.stop().await;
    }

    pub async fn write(&self, messages: Vec<pb::WriteBlockRequest>) -> Result<Bytes, BlockError> {
        self.write_stream(tokio_stream::iter(messages)).await
    }

    pub async fn write_stream(
        &self,
        messages: impl tokio_stream::Stream<Item = pb::WriteBlockRequest> + Send + 'static,
    ) -> Result<Bytes, BlockError> {
        let reply = self.client.clone().write(messages).await.unwrap().into_inner();
        assert_eq!(reply.header.unwrap().version, PROTOCOL_VERSION);
        match reply.result.unwrap() {
            pb::write_block_reply::Result::Proof(proof) => Ok(proof),
            pb::write_block_reply::Result::Error(error) => Err(code(&error)),
        }
    }

    pub async fn fetch(
        &self,
        disk: &Identity,
        block: BlockId,
        offset: u32,
        length: u32,
    ) -> Result<Bytes, BlockError> {
        self.fetch_request(fetch(disk, block, offset, length)).await.map(|bytes| bytes.0.into())
    }

    /// The bytes, and in how many pieces they came.
    pub async fn fetch_request(
        &self,
        request: pb::FetchBlockRequest,
    ) -> Result<(Vec<u8>, usize), BlockError> {
        let mut stream = self.client.clone().fetch(request).await.unwrap().into_inner();
        let (mut bytes, mut pieces) = (Vec::new(), 0);
        loop {
            match stream.message().await.unwrap().unwrap().part.unwrap() {
                pb::fetch_block_reply::Part::Data(piece) => {
                    bytes.extend_from_slice(&piece);
                    pieces += 1;
                }
                pb::fetch_block_reply::Part::Error(error) => return Err(code(&error)),
                pb::fetch_block_reply::Part::Crc(crc) => {
                    assert_eq!(crc, crc32fast::hash(&bytes));
                    assert!(stream.message().await.unwrap().is_none());
                    return Ok((bytes, pieces));
                }
            }
        }
    }

    pub async fn erase(&self, block: pb::EraseBlock) -> Result<Bytes, BlockError> {
        let request = pb::EraseBlocksRequest { header: Some(header()), blocks: vec![block] };
        let reply = self.client.clone().erase(request).await.unwrap().into_inner();
        match reply.results[0].result.clone().unwrap() {
            pb::proven_block::Result::Proof(proof) => Ok(proof),
            pb::proven_block::Result::Error(error) => Err(code(&error)),
        }
    }

    /// The file a block lies in, and where in it.
    pub fn place(&self, disk: &Identity, block: BlockId) -> (std::path::PathBuf, Extent) {
        self.service.place_of(disk.service, block).unwrap()
    }

    pub async fn write_many(&self, blocks: Vec<pb::WholeBlock>) -> Vec<Result<Bytes, BlockError>> {
        write_many(&self.client, blocks).await
    }

    pub async fn fetch_many(&self, ranges: Vec<pb::BlockRange>) -> Vec<Result<Bytes, BlockError>> {
        let request = pb::FetchBlocksRequest { header: Some(header()), ranges };
        let reply = self.client.clone().fetch_many(request).await.unwrap().into_inner();
        assert_eq!(reply.error, None);
        let result = |range: pb::FetchedRange| match range.result.unwrap() {
            pb::fetched_range::Result::Data(data) => {
                assert_eq!(range.crc, crc32fast::hash(&data));
                Ok(data)
            }
            pb::fetched_range::Result::Error(error) => Err(code(&error)),
        };
        reply.results.into_iter().map(result).collect()
    }

    pub async fn check(&self, blocks: Vec<pb::ExpectedBlock>) -> Vec<Option<BlockError>> {
        let request = pb::CheckBlocksRequest { header: Some(header()), blocks };
        let reply = self.client.clone().check(request).await.unwrap().into_inner();
        assert_eq!(reply.error, None);
        reply.results.into_iter().map(|checked| checked.error.map(|error| code(&error))).collect()
    }

    pub async fn stats(&self) -> Vec<pb::BlockServiceStats> {
        let request = pb::BlockStatsRequest { header: Some(header()) };
        let reply = self.client.clone().stats(request).await.unwrap().into_inner();
        assert_eq!(reply.error, None);
        reply.block_services
    }

    /// Waits until the statistics are as wanted.
    pub async fn until(
        &self,
        wanted: impl Fn(&[pb::BlockServiceStats]) -> bool,
    ) -> Vec<pb::BlockServiceStats> {
        for _ in 0..2000 {
            let stats = self.stats().await;
            if wanted(&stats) {
                return stats;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        panic!("the statistics stayed {:?}", self.stats().await);
    }
}

fn code(error: &pb::Error) -> BlockError {
    BlockError::from_code(error.code).unwrap_or_else(|| panic!("unknown error {error:?}"))
}

pub fn header() -> pb::RequestHeader {
    pb::RequestHeader {
        version: PROTOCOL_VERSION,
        cluster_id: CLUSTER.0.to_vec().into(),
        ..Default::default()
    }
}

pub fn block(n: u64) -> BlockId {
    BlockId::new(ShardId(n as u8), n)
}

/// Bytes without a pattern that repeats.
pub fn contents(seed: u64, length: usize) -> Bytes {
    let byte =
        |i: u64| (i ^ (seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23).wrapping_mul(5) >> 40;
    (0..length as u64).map(|i| byte(i) as u8).collect::<Vec<_>>().into()
}

pub fn start(disk: &Identity, block: BlockId, size: u32, crc: u32) -> pb::WriteStart {
    let certificate = mac::write_certificate(&disk.key, disk.service, block, size, crc);
    pb::WriteStart {
        header: Some(header()),
        block_service: disk.service.0,
        block: block.0,
        size,
        crc,
        certificate: certificate.to_vec().into(),
    }
}

pub fn message(part: Part) -> pb::WriteBlockRequest {
    pb::WriteBlockRequest { part: Some(part) }
}

pub fn data(bytes: impl Into<Bytes>) -> pb::WriteBlockRequest {
    message(Part::Data(bytes.into()))
}

/// All the messages of a good write.
pub fn write(disk: &Identity, block: BlockId, bytes: &Bytes) -> Vec<pb::WriteBlockRequest> {
    let start = start(disk, block, bytes.len() as u32, crc32fast::hash(bytes));
    let mut messages = vec![message(Part::Start(start))];
    let mut rest = bytes.clone();
    while !rest.is_empty() {
        messages.push(data(rest.split_to(rest.len().min(1 << 20))));
    }
    messages
}

pub fn proof(disk: &Identity, block: BlockId, bytes: &[u8]) -> Bytes {
    mac::write_proof(&disk.key, disk.service, block, bytes.len() as u32, crc32fast::hash(bytes))
        .to_vec()
        .into()
}

pub fn fetch(disk: &Identity, block: BlockId, offset: u32, length: u32) -> pb::FetchBlockRequest {
    pb::FetchBlockRequest {
        header: Some(header()),
        block_service: disk.service.0,
        block: block.0,
        offset,
        length,
    }
}

pub fn erase(disk: &Identity, block: BlockId) -> pb::EraseBlock {
    pb::EraseBlock {
        block_service: disk.service.0,
        block: block.0,
        certificate: mac::erase_certificate(&disk.key, disk.service, block).to_vec().into(),
    }
}

pub fn erased(disk: &Identity, block: BlockId) -> Bytes {
    mac::erase_proof(&disk.key, disk.service, block).to_vec().into()
}

pub fn whole(disk: &Identity, block: BlockId, bytes: &Bytes) -> pb::WholeBlock {
    let start = start(disk, block, bytes.len() as u32, crc32fast::hash(bytes));
    pb::WholeBlock {
        block_service: start.block_service,
        block: start.block,
        crc: start.crc,
        certificate: start.certificate,
        data: bytes.clone(),
    }
}

pub fn range(disk: &Identity, block: BlockId, offset: u32, length: u32) -> pb::BlockRange {
    pb::BlockRange { block_service: disk.service.0, block: block.0, offset, length }
}

pub fn expected(disk: &Identity, block: BlockId, bytes: &[u8]) -> pb::ExpectedBlock {
    pb::ExpectedBlock {
        block_service: disk.service.0,
        block: block.0,
        size: bytes.len() as u32,
        crc: crc32fast::hash(bytes),
    }
}

pub fn other(id: BlockServiceId) -> u64 {
    id.0 ^ 1
}
