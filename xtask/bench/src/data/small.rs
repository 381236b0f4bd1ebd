//! Many files of one size, in and out, many to a request: 10,000 of 1 KiB, 2,000 of 64 KiB, 1,000 of 1 MiB.

use anyhow::{Result, ensure};
use bytes::Bytes;
use eggs_client::{Client, Directory, Replace, SmallFile};
use eggs_proto::InodeId;

use super::costed;
use crate::Setup;
use crate::report::{Report, Sample};

/// Files given to the library at once.
const CALL: usize = 1000;

struct Rows {
    files: usize,
    bytes: usize,
    put: &'static str,
    fsyncs: &'static str,
    written: &'static str,
    get: &'static str,
}

const ROWS: [Rows; 3] = [
    Rows {
        files: 10_000,
        bytes: 1 << 10,
        put: "put_1k",
        fsyncs: "put_1k_fsyncs",
        written: "put_1k_written",
        get: "get_1k",
    },
    Rows {
        files: 2_000,
        bytes: 64 << 10,
        put: "put_64k",
        fsyncs: "put_64k_fsyncs",
        written: "put_64k_written",
        get: "get_64k",
    },
    Rows {
        files: 1_000,
        bytes: 1 << 20,
        put: "put_1m",
        fsyncs: "put_1m_fsyncs",
        written: "put_1m_written",
        get: "get_1m",
    },
];

pub async fn run(setup: &Setup, report: &mut Report, random: &Bytes) -> Result<()> {
    let cluster = setup.cluster()?;
    let client = cluster.client().await?;
    for rows in ROWS {
        let [mut puts, mut gets, mut fsyncs, mut written]: [Vec<Sample>; 4] = Default::default();
        for run in 0..setup.runs {
            let directory = made(&client, &format!("/bench-{}-{run}", rows.put)).await?;
            let mut inodes = Vec::new();
            let cost = costed(&cluster, async || put(&directory, &rows, random, &mut inodes).await).await?;
            puts.push(cost.rate(rows.files as f64));
            fsyncs.push((cost.fsyncs / rows.files as f64).into());
            written.push((cost.written / (rows.files * rows.bytes) as f64).into());
            let cost = costed(&cluster, async || get(&client, &rows, random, &inodes).await).await?;
            gets.push(cost.rate(rows.files as f64));
        }
        report.row(rows.put, 1, "files/s", &puts);
        report.row(rows.fsyncs, 1, "/file", &fsyncs);
        report.row(rows.written, 1, "B/B", &written);
        report.row(rows.get, 1, "files/s", &gets);
    }
    client.close().await;
    cluster.stop()
}

fn contents(rows: &Rows, random: &Bytes, n: usize) -> Bytes {
    let at = n * rows.bytes % (random.len() - rows.bytes);
    random.slice(at..at + rows.bytes)
}

async fn put(directory: &Directory, rows: &Rows, random: &Bytes, inodes: &mut Vec<InodeId>) -> Result<()> {
    let all: Vec<usize> = (0..rows.files).collect();
    for call in all.chunks(CALL) {
        let file = |&n: &usize| SmallFile {
            name: format!("file-{n}").into(),
            contents: contents(rows, random, n),
            attributes: None,
            replace: Replace::Refuse,
        };
        for published in directory.put_many(call.iter().map(file).collect()).await {
            inodes.push(published?.inode);
        }
    }
    Ok(())
}

async fn get(client: &Client, rows: &Rows, random: &Bytes, inodes: &[InodeId]) -> Result<()> {
    let mut reader = client.read_many(inodes.iter().copied());
    let mut n = 0;
    while let Some(file) = reader.next().await {
        let right = file?.contents.is_some_and(|bytes| bytes == contents(rows, random, n));
        ensure!(right, "file-{n}: not what went in");
        n += 1;
    }
    ensure!(n == rows.files, "{n} files came");
    Ok(())
}

async fn made(client: &Client, path: &str) -> Result<Directory> {
    client.mkdir(path, None).await?;
    Ok(client.directory(path).await?)
}
