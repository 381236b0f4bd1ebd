//! What writing and reading blocks costs: the store alone, then over gRPC on loopback.
//!
//! `cargo run --release -p eggs-blockd --example throughput -- FOLDER [BLOCKS [MEGABYTES [IN_FLIGHT [PIECE_KIB]]]]`
//! makes eight disks in FOLDER, writes 96 blocks of 16 MiB by default with 12 in flight, reads them back (from
//! the page cache), and prints MB/s and CPU seconds per GiB of both ends together.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use eggs_blockd::store::{Begun, Store};
use eggs_blockd::{Config, DiskConfig, Service};
use eggs_blockd_core::{Identity, WriteAdmission};
use eggs_daemon::{CancellationToken, channel, server};
use eggs_proto::limits::{DATA_MESSAGE_BYTES, MESSAGE_BYTES_MAX, PROTOCOL_VERSION};
use eggs_proto::pb::block_service_client::BlockServiceClient;
use eggs_proto::pb::write_block_request::Part;
use eggs_proto::{BlockId, ClusterId, mac, pb};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

const CLUSTER: ClusterId = ClusterId([7; 16]);
const DISKS: usize = 8;

struct Measure {
    name: &'static str,
    begun: Instant,
    cpu: f64,
}

fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or("").split_ascii_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

impl Measure {
    fn begin(name: &'static str) -> Measure {
        Measure { name, begun: Instant::now(), cpu: cpu_seconds() }
    }

    fn end(self, bytes: usize) {
        let (seconds, cpu) = (self.begun.elapsed().as_secs_f64(), cpu_seconds() - self.cpu);
        let gib = bytes as f64 / (1u64 << 30) as f64;
        println!(
            "{:12} {:6.0} MB/s  {:5.2} CPU-s/GiB  {seconds:.2} s",
            self.name,
            bytes as f64 / 1e6 / seconds,
            cpu / gib
        );
    }
}

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let folder = PathBuf::from(args.next().unwrap_or_else(|| panic!("a folder is needed")));
    let mut number = |default| args.next().and_then(|arg| arg.parse().ok()).unwrap_or(default);
    let (blocks, size, in_flight) = (number(96), number(16) << 20, number(12));
    let piece = number(DATA_MESSAGE_BYTES >> 10) << 10;
    let bytes: Bytes =
        (0..size as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect();
    let total = blocks * size;

    let paths: Vec<PathBuf> = (0..DISKS).map(|n| folder.join(format!("{n:02}"))).collect();
    let disk = |path: &PathBuf| DiskConfig {
        path: path.clone(),
        storage_class: 3,
        failure_domain: "here".into(),
        expect_existing: false,
    };
    let config = Config { cluster: CLUSTER, disks: paths.iter().map(disk).collect() };
    Service::open(config.clone()).unwrap().stop().await;

    // The store alone, as many threads as blocks in flight.
    let stores: Vec<_> = paths.iter().map(|path| Arc::new(Store::open(path, CLUSTER).unwrap())).collect();
    let measure = Measure::begin("store write");
    each(blocks, in_flight, |n| {
        let (store, bytes) = (Arc::clone(&stores[n % DISKS]), bytes.clone());
        async move { tokio::task::spawn_blocking(move || store_write(&store, n, &bytes)).await.unwrap() }
    })
    .await;
    measure.end(total);
    for n in 0..blocks {
        stores[n % DISKS].erase(BlockId(n as u64)).unwrap();
    }
    drop(stores);

    let identities: Vec<_> = paths
        .iter()
        .map(|path| Identity::decode(&std::fs::read(path.join("identity")).unwrap()).unwrap())
        .collect();
    let service = Service::open(config).unwrap();
    let listener = server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let stop = CancellationToken::new();
    let served = tokio::spawn(server::serve(listener, service.router(), stop.clone()));
    let client = BlockServiceClient::new(channel::connect(&address).unwrap())
        .max_decoding_message_size(MESSAGE_BYTES_MAX);

    let measure = Measure::begin("grpc write");
    each(blocks, in_flight, |n| {
        rpc_write(client.clone(), identities[n % DISKS].clone(), n, bytes.clone(), piece)
    })
    .await;
    measure.end(total);
    for round in ["grpc read", "grpc read 2"] {
        let measure = Measure::begin(round);
        each(blocks, in_flight, |n| rpc_read(client.clone(), identities[n % DISKS].clone(), n, size as u32))
            .await;
        measure.end(total);
    }
    stop.cancel();
    drop(client);
    served.await.unwrap();
    service.stop().await;
}

async fn each<F>(blocks: usize, in_flight: usize, work: impl Fn(usize) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(in_flight));
    let mut tasks = JoinSet::new();
    for n in 0..blocks {
        let place = Arc::clone(&places).acquire_owned().await.unwrap();
        let work = work(n);
        tasks.spawn(async move {
            work.await;
            drop(place);
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.unwrap();
    }
}

fn store_write(store: &Arc<Store>, n: usize, bytes: &[u8]) {
    let (size, crc) = (bytes.len() as u32, crc32fast::hash(bytes));
    let admission = WriteAdmission { block: BlockId(n as u64), size, crc, proof: [0; 16] };
    let Begun::Arriving(mut incoming) = store.begin(admission).unwrap() else { panic!("written already") };
    bytes.chunks(DATA_MESSAGE_BYTES).for_each(|piece| incoming.append(piece).unwrap());
    incoming.finish().unwrap();
}

fn header() -> Option<pb::RequestHeader> {
    Some(pb::RequestHeader {
        version: PROTOCOL_VERSION,
        cluster_id: CLUSTER.0.to_vec().into(),
        ..Default::default()
    })
}

type Client = BlockServiceClient<tonic::transport::Channel>;

async fn rpc_write(mut client: Client, disk: Identity, n: usize, bytes: Bytes, piece: usize) {
    let (size, crc, block) = (bytes.len() as u32, crc32fast::hash(&bytes), BlockId(n as u64));
    let start = pb::WriteStart {
        header: header(),
        block_service: disk.service.0,
        block: block.0,
        size,
        crc,
        certificate: mac::write_certificate(&disk.key, disk.service, block, size, crc).to_vec().into(),
    };
    let pieces = (0..bytes.len())
        .step_by(piece)
        .map(move |at| Part::Data(bytes.slice(at..bytes.len().min(at + piece))));
    let messages = std::iter::once(Part::Start(start)).chain(pieces);
    let stream = tokio_stream::iter(messages.map(|part| pb::WriteBlockRequest { part: Some(part) }));
    let reply = client.write(stream).await.unwrap().into_inner();
    assert!(matches!(reply.result, Some(pb::write_block_reply::Result::Proof(_))), "{reply:?}");
}

async fn rpc_read(mut client: Client, disk: Identity, n: usize, size: u32) {
    let request = pb::FetchBlockRequest {
        header: header(),
        block_service: disk.service.0,
        block: n as u64,
        offset: 0,
        length: size,
    };
    let mut stream = client.fetch(request).await.unwrap().into_inner();
    let (mut hasher, mut crc) = (crc32fast::Hasher::new(), None);
    while let Some(reply) = stream.message().await.unwrap() {
        match reply.part {
            Some(pb::fetch_block_reply::Part::Data(piece)) => hasher.update(&piece),
            Some(pb::fetch_block_reply::Part::Crc(sent)) => crc = Some(sent),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(crc, Some(hasher.finalize()));
}
