//! Reads of a span whose block services are slow, silent or wrong, made up in this process.

use std::collections::BTreeMap;
use std::pin::Pin;

use bytes::BytesMut;
use eggs_client_core::encode::encode;
use eggs_client_core::layout::Layout;
use eggs_client_core::span::{Body, StoredBlock};
use eggs_proto::pb::block_service_server::{BlockService, BlockServiceServer};
use eggs_proto::pb::{self, fetch_block_reply::Part};
use eggs_proto::{BlockError, ClusterId, ServiceError};
use futures_util::stream::{self, Stream};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::connection::Shared;
use crate::types::Options;

const SLOW: Duration = Duration::from_millis(100);

/// Block services on one port, a block on each: how long each takes, and its block.
#[derive(Clone)]
struct Host(Arc<BTreeMap<u64, (Duration, Bytes)>>);

type Answers = Pin<Box<dyn Stream<Item = Result<pb::FetchBlockReply, Status>> + Send>>;

#[tonic::async_trait]
impl BlockService for Host {
    type FetchStream = Answers;

    async fn fetch(&self, request: Request<pb::FetchBlockRequest>) -> Result<Response<Answers>, Status> {
        let request = request.into_inner();
        let parts = match self.0.get(&request.block_service) {
            None => vec![Part::Error(BlockError::UnknownBlock.with("no such block"))],
            Some((delay, block)) => {
                sleep(*delay).await;
                let range = request.offset as usize..(request.offset + request.length) as usize;
                vec![Part::Data(block.slice(range)), Part::Crc(0)]
            }
        };
        let replies = parts.into_iter().map(|part| Ok(pb::FetchBlockReply { part: Some(part) }));
        Ok(Response::new(Box::pin(stream::iter(replies))))
    }

    async fn write(
        &self,
        _: Request<Streaming<pb::WriteBlockRequest>>,
    ) -> Result<Response<pb::WriteBlockReply>, Status> {
        Err(Status::unimplemented("write"))
    }

    async fn erase(
        &self,
        _: Request<pb::EraseBlocksRequest>,
    ) -> Result<Response<pb::EraseBlocksReply>, Status> {
        Err(Status::unimplemented("erase"))
    }

    async fn write_many(
        &self,
        _: Request<pb::WriteBlocksRequest>,
    ) -> Result<Response<pb::WriteBlocksReply>, Status> {
        Err(Status::unimplemented("write_many"))
    }

    async fn fetch_many(
        &self,
        _: Request<pb::FetchBlocksRequest>,
    ) -> Result<Response<pb::FetchBlocksReply>, Status> {
        Err(Status::unimplemented("fetch_many"))
    }

    async fn check(
        &self,
        _: Request<pb::CheckBlocksRequest>,
    ) -> Result<Response<pb::CheckBlocksReply>, Status> {
        Err(Status::unimplemented("check"))
    }

    async fn stats(
        &self,
        _: Request<pb::BlockStatsRequest>,
    ) -> Result<Response<pb::BlockStatsReply>, Status> {
        Err(Status::unimplemented("stats"))
    }
}

struct World {
    span: Arc<StoredSpan>,
    plain: Vec<u8>,
    address: String,
    _server: tokio_util::task::AbortOnDropHandle<()>,
}

impl World {
    /// A span of 4+2 blocks on services 1 to 6, each answering after `delay`; of those without one the block is missing.
    async fn start(delay: impl Fn(u64) -> Option<Duration>) -> World {
        let plain: Vec<u8> =
            (0..1_000_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
        let layout = Layout::choose(plain.len() as u32, 4, 2, 16 << 10).unwrap();
        let encoded = encode(BytesMut::from(&plain[..]), layout, &mut Vec::new()).unwrap();
        let new = encoded.new_blocks(3, Vec::new());
        let stored = new.blocks.into_iter().zip(1..).map(|(block, n)| StoredBlock {
            service: BlockServiceId(n),
            block: BlockId(n),
            crc: block.crc,
            cell_crcs: block.cell_crcs,
        });
        let body = Body::Blocks { layout, blocks: stored.collect() };
        let size = plain.len() as u32;
        let span = Arc::new(StoredSpan { offset: 0, size, crc: encoded.crc, storage_class: 3, body });
        let block = |n: u64| Some((n, (delay(n)?, encoded.slices(n as usize - 1).concat().into())));
        let host = Host(Arc::new((1..=6).filter_map(block).collect()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = tonic::transport::Server::builder().add_service(BlockServiceServer::new(host));
        let serving = async move {
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        };
        let _server = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(serving));
        World { span, plain, address, _server }
    }

    fn reading(&self, hedge: bool) -> Reading {
        let options =
            Options { hedge, timeout: Duration::from_secs(5), ..Options::new(self.address.clone()) };
        let shared = Arc::new(Shared::new(options, ClusterId([1; 16])));
        let service = |id| pb::BlockServiceInfo { id, address: self.address.clone(), ..Default::default() };
        let block_services = (1..=6).map(service).collect();
        shared.learn(&pb::ClusterMapReply { block_services, ..Default::default() });
        Reading::new(&Client { shared }, InodeId(1), "/f")
    }

    /// How long reads of 4 KiB all over the span take, sorted.
    async fn random_reads(&self, reading: &Reading, count: u32) -> Vec<Duration> {
        let mut took = Vec::new();
        for n in 0..count {
            let at = n.wrapping_mul(2_654_435_761) % (self.plain.len() as u32 - 4096);
            let started = Instant::now();
            let bytes =
                reading.read(&self.span, Wanted::Bytes(at..at + 4096)).await.unwrap().unwrap().concat();
            took.push(started.elapsed());
            assert_eq!(bytes, self.plain[at as usize..at as usize + 4096]);
        }
        took.sort_unstable();
        took
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_slow_disk_does_not_make_reads_slow() {
    let world = World::start(|n| Some(if n == 2 { SLOW } else { Duration::ZERO })).await;
    let patient = world.random_reads(&world.reading(false), 40).await;
    assert!(*patient.last().unwrap() >= SLOW, "without hedges somebody waits: {patient:?}");
    let hedged = world.random_reads(&world.reading(true), 400).await;
    // The first ones know nothing yet; afterwards it is found out anew now and then.
    assert!(hedged[400 * 98 / 100] < SLOW / 2, "{:?}", &hedged[380..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_silent_disks_are_read_around() {
    let silent = Duration::from_secs(3600);
    let world = World::start(|n| Some(if n < 3 { silent } else { Duration::ZERO })).await;
    let reading = world.reading(true);
    let took = world.random_reads(&reading, 100).await;
    assert!(took[50] < SLOW, "{took:?}");
    // Nobody has the budget for a hedge of each read for ever: but then they are known.
    assert!(
        reading.client.shared.is_slow(BlockServiceId(1)) || reading.client.shared.is_slow(BlockServiceId(2))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_blocks_are_computed_from_the_others_and_the_reader_is_told() {
    let world = World::start(|n| (n != 2 && n != 6).then_some(Duration::ZERO)).await;
    let mut reading = world.reading(true);
    let listener = Arc::new(Listener::new());
    reading.listener = Some(listener.clone());
    let Body::Blocks { layout, blocks } = &world.span.body else { panic!() };
    for (index, right) in blocks.iter().enumerate() {
        let wanted = Wanted::Block(index, 0..layout.stripes());
        let block = reading.read(&world.span, wanted).await.unwrap().unwrap().concat();
        assert_eq!(crc32fast::hash(&block), right.crc, "block {index}");
    }
    let told = lock(&listener.fetches);
    assert!(told.iter().any(|fetch| fetch.index == 1 && fetch.end == FetchEnd::Missing));
    assert!(told.iter().any(|fetch| fetch.index == 0 && fetch.end == FetchEnd::Came));
}
