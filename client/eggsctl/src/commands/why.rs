//! `why`: reads a file and explains: who was asked, what came from where, what was rebuilt, and how long each took.

use std::collections::BTreeSet;
use std::time::Duration;

use clap::Args;
use eggs_client::{Explanation, FetchEnd, FetchTold, Hop, Span};
use eggs_proto::pb::Blocks;
use serde_json::{Value, json};

use super::stat::json_span;
use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::{Failure, Outcome};
use crate::output::{JsonPath, size};
use crate::paths::ClusterPath;
use crate::policies::class_name;
use crate::policy_text::layout;
use crate::spread::Disks;

/// Read a file and explain how that went
///
/// Which hosts were asked for the path and how long each took; how the spans are stored; which blocks were fetched, from
/// where and in how many milliseconds, which were late so that others were asked too, which were missing or corrupt, and
/// what was rebuilt from the others. The bytes are checked and thrown away. A read that fails is explained up to there, and
/// the exit code is 1.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  eggsctl why /data/f\n  eggsctl why /data/f --offset 1000000 --length 4096\n  eggsctl why /data/f --json"
)]
pub struct Why {
    /// Where to begin
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    offset: u64,
    /// How much to read [default: to the end]
    #[arg(long, value_name = "BYTES")]
    length: Option<u64>,
    #[command(flatten)]
    json: JsonFlag,
    /// The file
    #[arg(value_name = "PATH", value_parser = ClusterPath::parser())]
    path: ClusterPath,
}

impl Why {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let length = self.length.unwrap_or(u64::MAX);
        let told = client.explain(self.path.as_bytes(), self.offset, length).await;
        let mut told = told.map_err(|error| failure(&self.path, error))?;
        let disks = Disks::of(std::mem::take(&mut told.map));
        let failed = told.failed.take().map(|error| failure(&self.path, error));
        let mut out = context.out();
        if self.json.json {
            let mut document = self.document(&told, &disks);
            document["error"] = json!(failed.as_ref().map(Failure::reason));
            out.json(&document)?;
        } else {
            out.named_line("", self.path.as_bytes(), None, b"")?;
            for line in self.lines(&told, failed.is_some(), &disks) {
                out.line(line)?;
            }
        }
        out.finish()?;
        failed.map_or(Ok(()), Err)
    }

    fn end(&self, told: &Explanation) -> u64 {
        self.offset.saturating_add(told.bytes)
    }

    fn lines(&self, told: &Explanation, failed: bool, disks: &Disks) -> Vec<String> {
        let found = &told.metadata;
        let mut lines = vec![
            format!(
                "inode {}, {} bytes, CRC {:#010x}",
                found.inode,
                found.size,
                found.crc.unwrap_or_default()
            ),
            format!("found in {}", ms(told.resolve_took)),
        ];
        lines.extend(told.resolved.iter().chain(&told.mapped).map(|hop| {
            let host = hop.host.as_deref().map(|host| format!(" ({host})")).unwrap_or_default();
            format!("  {} at {}{host}: {}", hop.group, hop.address, ms(hop.took))
        }));
        for span in &told.spans {
            lines.extend(self.span_lines(told, span, disks));
        }
        let seconds = told.read_took.as_secs_f64();
        let rate = if seconds > 0.0 { told.bytes as f64 / 1e6 / seconds } else { 0.0 };
        let right = match told.crc_right {
            _ if failed => ", then the READ FAILED",
            Some(true) => ", the file's CRC is right",
            Some(false) => ", THE FILE'S CRC IS WRONG",
            None => "",
        };
        lines.push(format!("{} bytes read in {} ({rate:.0} MB/s){right}", told.bytes, ms(told.read_took)));
        lines
    }

    fn span_lines(&self, told: &Explanation, span: &Span, disks: &Disks) -> Vec<String> {
        let mut first = format!(
            "span at {}: {} {}, CRC {:#010x}",
            span.offset,
            size(u64::from(span.size)),
            class_name(span.storage_class),
            span.crc
        );
        let Some(blocks) = &span.blocks else { return vec![first] };
        first += &format!(
            ", {}, {} stripes of cells of {}",
            layout(blocks.data, blocks.parity),
            blocks.stripes,
            size(u64::from(blocks.cell_size))
        );
        if let Some(why) = disks.under_spread(blocks) {
            first += &format!(", under-spread: {why}");
        }
        let mut lines = vec![first];
        for fetch in of_span(told, span) {
            lines.push(format!(
                "  +{} block {} {}..{} from {}{}: {}",
                ms(fetch.started),
                fetch.index,
                fetch.offset,
                u64::from(fetch.offset) + u64::from(fetch.length),
                fetch.service,
                disks.words(fetch.service.0),
                end_words(fetch)
            ));
        }
        let rebuilt = rebuilt(told, span, blocks, self.offset..self.end(told));
        if !rebuilt.is_empty() {
            let rebuilt: Vec<String> = rebuilt.iter().map(usize::to_string).collect();
            lines.push(format!("  rebuilt from the others: data blocks {}", rebuilt.join(", ")));
        }
        lines
    }

    fn document(&self, told: &Explanation, disks: &Disks) -> Value {
        let JsonPath { path, path_hex } = JsonPath::of(self.path.as_bytes());
        let spans = told.spans.iter().map(|span| {
            let mut document = json_span(span, disks);
            document["fetches"] = of_span(told, span).map(|fetch| json_fetch(fetch, disks)).collect();
            if let Some(blocks) = &span.blocks {
                document["rebuilt"] = json!(rebuilt(told, span, blocks, self.offset..self.end(told)));
            }
            document
        });
        let hop = |hop: &Hop| {
            json!({
                "group": hop.group.to_string(),
                "address": *hop.address,
                "host": hop.host,
                "ms": millis(hop.took),
            })
        };
        let mut document = json!({
            "path": path,
            "inode": told.metadata.inode.to_string(),
            "size": told.metadata.size,
            "crc": told.metadata.crc.map(|crc| format!("{crc:#010x}")),
            "resolve": {
                "ms": millis(told.resolve_took),
                "hops": told.resolved.iter().map(hop).collect::<Vec<_>>(),
            },
            "map": { "hops": told.mapped.iter().map(hop).collect::<Vec<_>>() },
            "spans": spans.collect::<Vec<_>>(),
            "read": {
                "offset": self.offset,
                "bytes": told.bytes,
                "ms": millis(told.read_took),
                "crc_right": told.crc_right,
            },
        });
        if let Some(hex) = path_hex {
            document["path_hex"] = hex.into();
        }
        document
    }
}

fn of_span<'a>(told: &'a Explanation, span: &Span) -> impl Iterator<Item = &'a FetchTold> {
    let offset = span.offset;
    told.fetches.iter().filter(move |fetch| fetch.span == offset)
}

/// Data blocks the range needed and that did not come, or not right.
fn rebuilt(told: &Explanation, span: &Span, blocks: &Blocks, range: std::ops::Range<u64>) -> Vec<usize> {
    let data = blocks.data as usize;
    let from = range.start.saturating_sub(span.offset);
    let to = range.end.saturating_sub(span.offset).min(span.size.into());
    let cell = u64::from(blocks.cell_size.max(1));
    if data < 2 || from >= to {
        return Vec::new();
    }
    let cells = from / cell..to.div_ceil(cell);
    let needed = cells.take(data * blocks.stripes as usize).map(|n| (n % data as u64) as usize);
    let needed: BTreeSet<usize> = needed.collect();
    let came: BTreeSet<usize> =
        of_span(told, span).filter(|fetch| fetch.end == FetchEnd::Came).map(|fetch| fetch.index).collect();
    needed.difference(&came).copied().collect()
}

fn end_words(fetch: &FetchTold) -> String {
    let late = if fetch.late { ", late: others were asked too" } else { "" };
    let end = match &fetch.end {
        FetchEnd::Came => format!("fetched in {}", ms(fetch.took)),
        FetchEnd::GivenUp => format!("not waited for after {}", ms(fetch.took)),
        FetchEnd::Missing => format!("MISSING, said after {}", ms(fetch.took)),
        FetchEnd::Corrupt => format!("CORRUPT, after {}", ms(fetch.took)),
        FetchEnd::Failed(why) => format!("failed after {}: {why}", ms(fetch.took)),
    };
    end + late
}

fn json_fetch(fetch: &FetchTold, disks: &Disks) -> Value {
    let (end, why) = match &fetch.end {
        FetchEnd::Came => ("fetched", None),
        FetchEnd::GivenUp => ("given up", None),
        FetchEnd::Missing => ("missing", None),
        FetchEnd::Corrupt => ("corrupt", None),
        FetchEnd::Failed(why) => ("failed", Some(why.clone())),
    };
    let mut document = json!({
        "index": fetch.index,
        "id": format!("{:#018x}", fetch.block.0),
        "block_service": fetch.service.to_string(),
        "offset": fetch.offset,
        "length": fetch.length,
        "started_ms": millis(fetch.started),
        "ms": millis(fetch.took),
        "late": fetch.late,
        "end": end,
        "why": why,
    });
    disks.describe(fetch.service.0, &mut document);
    document
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}
