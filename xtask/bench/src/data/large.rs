//! One file of 1 GiB: in, out, and out again with as many disks gone as its code allows.

use anyhow::{Result, ensure};
use bytes::Bytes;
use eggs_client::{Client, CreateOptions};

use super::{Code, coded_directory, costed, raw, take_disks};
use crate::Setup;
use crate::cluster::Cluster;
use crate::report::Report;

const GIB: u64 = 1 << 30;
const SPAN_BYTES: u32 = 64 << 20;

struct Rows {
    code: Code,
    put: &'static str,
    get: &'static str,
    degraded: &'static str,
    written: &'static str,
    fsyncs: &'static str,
    ratio: &'static str,
}

const ROWS: [Rows; 2] = [
    Rows {
        code: Code { data: 4, parity: 2 },
        put: "put_1gib",
        get: "get_1gib",
        degraded: "get_1gib_degraded",
        written: "put_1gib_written",
        fsyncs: "put_1gib_fsyncs",
        ratio: "degraded_ratio",
    },
    Rows {
        code: Code { data: 10, parity: 4 },
        put: "put_1gib_10_4",
        get: "get_1gib_10_4",
        degraded: "get_1gib_10_4_degraded",
        written: "put_1gib_10_4_written",
        fsyncs: "put_1gib_10_4_fsyncs",
        ratio: "degraded_ratio_10_4",
    },
];

pub async fn run(setup: &Setup, report: &mut Report, random: &Bytes) -> Result<()> {
    for rows in ROWS {
        let blocks = rows.code.data + rows.code.parity;
        let (mut puts, mut gets, mut degraded) = (Vec::new(), Vec::new(), Vec::new());
        let (mut written, mut fsyncs, mut ratio) = (Vec::new(), Vec::new(), Vec::new());
        let cluster = Cluster::start_with_disks(&setup.eggsctl, &setup.scratch.fresh("cluster")?, blocks)?;
        let client = cluster.client().await?;
        let directory = "/bench-large";
        coded_directory(&client, directory, rows.code, SPAN_BYTES).await?;
        let options = CreateOptions { size_hint: Some(GIB), ..CreateOptions::default() };
        for run in 0..setup.runs {
            let path = format!("{directory}/file-{run}");
            let cost = costed(&cluster, async || put(&client, &path, GIB, random, &options).await).await?;
            puts.push(cost.throughput(GIB));
            written.push((cost.written / GIB as f64).into());
            fsyncs.push(cost.fsyncs.into());
            let cost = costed(&cluster, async || get(&client, &path).await).await?;
            gets.push(cost.throughput(GIB));
        }
        take_disks(setup, &client, 0..rows.code.parity).await?;
        for run in 0..setup.runs {
            let path = format!("{directory}/file-{run}");
            let cost = costed(&cluster, async || get(&client, &path).await).await?;
            degraded.push(cost.throughput(GIB));
            ratio.push((degraded[run as usize].value / gets[run as usize].value).into());
        }
        client.close().await;
        cluster.stop()?;
        report.row(rows.put, 1, "MB/s", &puts);
        report.row(rows.written, 1, "B/B", &written);
        report.row(rows.fsyncs, 1, "/file", &fsyncs);
        report.row(rows.get, 1, "MB/s", &gets);
        report.row(rows.degraded, 1, "MB/s", &degraded);
        report.row(rows.ratio, 1, "", &ratio);
    }
    Ok(())
}

/// Writes a file of `total` bytes from memory.
pub async fn put(
    client: &Client,
    path: &str,
    total: u64,
    random: &Bytes,
    options: &CreateOptions,
) -> Result<()> {
    let mut writer = client.create(path, options).await?;
    for chunk in raw::chunks(total, random) {
        writer.write(&chunk).await?;
    }
    let published = writer.finish().await?;
    ensure!(published.size == total, "{path} has {} bytes", published.size);
    Ok(())
}

/// Reads a whole file and checks it against the CRC it was published with.
pub async fn get(client: &Client, path: &str) -> Result<()> {
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
    Ok(())
}
