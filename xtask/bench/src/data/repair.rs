//! A disk is lost and given up; the janitor makes its blocks anew, as fast as it can.

use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Bytes;
use eggs_client::{ClusterSecret, CreateOptions, Options};
use eggs_proto::flags;

use super::{Code, coded_directory, disk_folder, large, raw, until};
use crate::Setup;
use crate::cluster::Cluster;
use crate::report::{Report, Sample};

const CODE: Code = Code { data: 4, parity: 2 };
const SPAN_BYTES: u32 = 64 << 20;
const FILE_BYTES: u64 = 3 << 30;

pub async fn run(setup: &Setup, report: &mut Report, random: &Bytes) -> Result<()> {
    let (mut rates, mut begins): (Vec<Sample>, Vec<Sample>) = Default::default();
    for _ in 0..setup.runs {
        let data = setup.scratch.fresh("cluster")?;
        let cluster = Cluster::start_with_disks(&setup.eggsctl, &data, CODE.data + CODE.parity + 1)?;
        let secret = secret(&data)?;
        let client = cluster.client_with(|options| Options { secret: Some(secret), ..options }).await?;
        coded_directory(&client, "/bench-repair", CODE, SPAN_BYTES).await?;
        let path = "/bench-repair/file";
        let options = CreateOptions { size_hint: Some(FILE_BYTES), ..CreateOptions::default() };
        large::put(&client, path, FILE_BYTES, random, &options).await?;

        let folder = disk_folder(setup, 0);
        let gone = client.cluster_map().await?.block_services.into_iter();
        let gone = gone.filter(|service| folder == *service.path).map(|service| service.id).next();
        let gone = gone.context("the disk is not known")?;
        let file = client.open(path).await?.metadata().inode;
        let left = || async {
            let spans = client.spans(file).await?;
            let on_it = |span: &eggs_client::Span| {
                let blocks = span.blocks.iter().flat_map(|blocks| &blocks.blocks);
                let of_it = blocks.filter(|block| block.block_service == gone).count() as u64;
                of_it * span.blocks.as_ref().map_or(0, |all| u64::from(all.stripes * all.cell_size))
            };
            anyhow::Ok(spans.iter().map(on_it).sum::<u64>())
        };
        let lost = left().await?;
        std::fs::rename(&folder, folder.with_extension("gone"))?;
        let began = Instant::now();
        client.set_flags(&[gone], flags::DECOMMISSIONED, 0).await?;
        let first = Cell::new(None::<(Duration, u64)>);
        until(|| async {
            let left = left().await?;
            if left < lost && first.get().is_none() {
                first.set(Some((began.elapsed(), left)));
            }
            Ok(left == 0)
        })
        .await
        .context("repair")?;
        let (waited, then_left) = first.get().unwrap_or_default();
        rates.push(raw::sample(then_left, (began.elapsed() - waited).as_secs_f64(), 0.0).value.into());
        begins.push(waited.as_secs_f64().into());
        client.close().await;
        cluster.stop()?;
    }
    report.row("repair", 1, "MB/s", &rates);
    report.row("repair_begins", 1, "s", &begins);
    Ok(())
}

/// Of a cluster of ours: its file holds hexadecimal digits.
fn secret(data: &Path) -> Result<ClusterSecret> {
    let digits = std::fs::read_to_string(data.join("secret"))?;
    let bytes = digits.trim().as_bytes().chunks(2).map(|pair| {
        let pair = std::str::from_utf8(pair)?;
        anyhow::Ok(u8::from_str_radix(pair, 16)?)
    });
    Ok(ClusterSecret::new(bytes.collect::<Result<Vec<u8>>>()?))
}
