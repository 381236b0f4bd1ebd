//! Suite `data`: one file of 1 GiB in and out, beside the raw limits of the machine.
//!
//! The contents are random and come from memory, so that neither the reading of a source nor zeros that cost nothing
//! flatter the figure. What comes out is compared by CRC with what went in, and then forgotten. Reads are of files
//! just written: the page cache of the disks' host is warm.

use std::time::Instant;

use anyhow::{Result, ensure};
use bytes::Bytes;
use eggs_client::{Client, CreateOptions, Published};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::cluster::Cluster;
use super::report::{Report, Sample};
use super::{Setup, raw};

const GIB: u64 = 1 << 30;

/// Random bytes to go round in: longer than any cache, shorter than memory.
const RANDOM_BYTES: usize = 64 << 20;

pub async fn run(setup: &Setup, report: &mut Report) -> Result<()> {
    let random = random_bytes();
    let cluster = setup.cluster()?;
    let client = cluster.client().await?;
    let options = CreateOptions { size_hint: Some(GIB), ..CreateOptions::default() };
    let (mut puts, mut gets, mut disk, mut network) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let directory = format!("/bench-data-{}", std::process::id());
    client.mkdir(&directory, None).await?;
    for run in 0..setup.runs {
        disk.push(raw::write_fsync(setup.scratch.path(), GIB, &random)?);
        network.push(raw::loopback(GIB, &random)?);
        let path = format!("{directory}/file-{run}");
        puts.push(timed(&cluster, || put(&client, &path, GIB, &random, &options)).await?);
        gets.push(timed(&cluster, || get(&client, &path)).await?);
        client.unlink(&path).await?;
    }
    client.close().await;
    cluster.stop()?;
    report.row("put_1gib", 1, "MB/s", &puts);
    report.row("get_1gib", 1, "MB/s", &gets);
    report.row("raw_write_fsync", 1, "MB/s", &disk);
    report.row("raw_loopback", 1, "MB/s", &network);
    Ok(())
}

/// Times one transfer of 1 GiB, and counts its CPU.
async fn timed<T>(cluster: &Cluster, transfer: impl AsyncFnOnce() -> Result<T>) -> Result<Sample> {
    let (cpu, began) = (cluster.cpu()?, Instant::now());
    transfer().await?;
    let took = began.elapsed().as_secs_f64();
    Ok(raw::sample(GIB, took, cluster.cpu()? - cpu))
}

/// The same bytes on every machine.
pub fn random_bytes() -> Bytes {
    let mut bytes = vec![0; RANDOM_BYTES];
    ChaCha8Rng::seed_from_u64(1).fill_bytes(&mut bytes);
    bytes.into()
}

/// Writes a file of `total` bytes from memory.
pub async fn put(
    client: &Client,
    path: &str,
    total: u64,
    random: &Bytes,
    options: &CreateOptions,
) -> Result<Published> {
    let mut writer = client.create(path, options).await?;
    for chunk in raw::chunks(total, random) {
        writer.write(&chunk).await?;
    }
    let published = writer.finish().await?;
    ensure!(published.size == total, "{path} has {} bytes", published.size);
    Ok(published)
}

/// Reads a whole file and checks it against the CRC it was published with.
async fn get(client: &Client, path: &str) -> Result<u64> {
    let reader = client.open(path).await?;
    let mut stream = reader.stream(0);
    let mut crc = crc32fast::Hasher::new();
    let mut length = 0;
    while let Some(bytes) = stream.next().await? {
        crc.update(&bytes);
        length += bytes.len() as u64;
    }
    ensure!(length == reader.size(), "{path}: {length} bytes came");
    ensure!(reader.metadata().crc == Some(crc.finalize()), "{path}: not what went in");
    Ok(length)
}
