//! What writing and reading blocks costs: the store alone, then over gRPC on loopback.
//!
//! `cargo run --release -p eggs-blockd --example throughput -- FOLDER [BLOCKS [MEGABYTES [IN_FLIGHT [PIECE_KIB]]]]`
//! makes eight disks in FOLDER, writes 96 blocks of 16 MiB by default with 12 in flight, reads them back (from
//! the page cache), and prints MB/s and CPU seconds per GiB of both ends together. Then small blocks through requests
//! of many, and how long a disk of a million blocks takes to open, with its journal and without.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use eggs_blockd::store::{Begun, Options, Store, Wanted};
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
        options: Default::default(),
    };
    let config = Config { cluster: CLUSTER, disks: paths.iter().map(disk).collect() };
    Service::open(config.clone()).unwrap().stop().await;

    // The store alone, as many threads as blocks in flight.
    let stores: Vec<_> =
        paths.iter().map(|path| Store::open(path, CLUSTER, Options::default()).unwrap()).collect();
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
    for size in [1 << 10, 64 << 10] {
        let per_request = (4 << 20) / size;
        let count = if size == 1 << 10 { 40_000 } else { 8_000 };
        let data = bytes.slice(..size);
        let begun = Instant::now();
        each(count / per_request, 4, |n| {
            let first = (1 << 32) + (size * 1_000_000 + n * per_request) as u64;
            rpc_write_many(client.clone(), identities.clone(), first, per_request, data.clone())
        })
        .await;
        let seconds = begun.elapsed().as_secs_f64();
        let written = count / per_request * per_request;
        println!(
            "{:12} {:6.0} blocks/s of {size} bytes, {written} blocks",
            "write_many",
            written as f64 / seconds
        );
    }
    stop.cancel();
    drop(client);
    served.await.unwrap();
    service.stop().await;
    tokio::task::spawn_blocking(move || open_full(&folder.join("full"))).await.unwrap();
}

/// A disk of a million small blocks: opened as after a clean stop, and without its journal.
fn open_full(path: &std::path::Path) {
    const BLOCKS: u64 = 1_000_000;
    let identity = Identity {
        cluster: CLUSTER,
        service: eggs_proto::BlockServiceId(7),
        key: [9; 32],
        formatted_at: eggs_proto::Time(1),
        storage_class: 3,
        failure_domain: "here".into(),
    };
    eggs_blockd::store::format(path, &identity).unwrap();
    let open = || Store::open(path, CLUSTER, Options::default()).unwrap();
    let store = open();
    let data = Bytes::from(vec![7; 512]);
    let crc = crc32fast::hash(&data);
    let begun = Instant::now();
    for first in (0..BLOCKS).step_by(4000) {
        let wanted = |n| Wanted {
            admission: WriteAdmission { block: BlockId(n), size: 512, crc, proof: [0; 16] },
            data: data.clone(),
        };
        store.write_many((first..first + 4000).map(wanted).collect()).into_iter().for_each(|result| {
            result.unwrap();
        });
    }
    println!(
        "{:12} {:6.0} blocks/s of 512 bytes, 4000 per sync",
        "store many",
        BLOCKS as f64 / begun.elapsed().as_secs_f64()
    );
    drop(store);
    for what in ["open", "open again", "no journal"] {
        if what == "no journal" {
            std::fs::remove_file(path.join("journal")).unwrap();
        }
        let begun = Instant::now();
        let store = open();
        println!("{what:12} {:?} for {} blocks", begun.elapsed(), store.totals().blocks);
    }
}

async fn rpc_write_many(mut client: Client, disks: Vec<Identity>, first: u64, count: usize, data: Bytes) {
    let (size, crc) = (data.len() as u32, crc32fast::hash(&data));
    let whole = |n: u64| {
        let disk = &disks[(n % DISKS as u64) as usize];
        let certificate = mac::write_certificate(&disk.key, disk.service, BlockId(n), size, crc);
        pb::WholeBlock {
            block_service: disk.service.0,
            block: n,
            crc,
            certificate: certificate.to_vec().into(),
            data: data.clone(),
        }
    };
    let blocks = (first..first + count as u64).map(whole).collect();
    let request = pb::WriteBlocksRequest { header: header(), blocks };
    let reply = client.write_many(request).await.unwrap().into_inner();
    let proven = |result: &pb::ProvenBlock| matches!(result.result, Some(pb::proven_block::Result::Proof(_)));
    assert!(reply.error.is_none() && reply.results.iter().all(proven), "{:?}", reply.error);
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

fn store_write(store: &Arc<Store>, n: usize, bytes: &Bytes) {
    let (size, crc) = (bytes.len() as u32, crc32fast::hash(bytes));
    let admission = WriteAdmission { block: BlockId(n as u64), size, crc, proof: [0; 16] };
    let Begun::Arriving(mut incoming) = store.begin(admission).unwrap() else { panic!("written already") };
    let cut = |at: usize| bytes.slice(at..bytes.len().min(at + DATA_MESSAGE_BYTES));
    (0..bytes.len()).step_by(DATA_MESSAGE_BYTES).for_each(|at| incoming.append(&cut(at)).unwrap());
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
