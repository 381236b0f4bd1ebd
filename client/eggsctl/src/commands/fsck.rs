//! `fsck`: every invariant the cluster can check of itself.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use clap::Args;
use eggs_client::FsckReport;
use serde::Serialize;

use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::{Failure, Outcome};

/// Check the whole cluster's metadata; exit code 1 when something is wrong
///
/// Every shard checks its rows, then the tree is walked from the root, and what looks wrong is looked at again until it is
/// certain: the cluster may be in use. Nothing is changed.
#[derive(Debug, Args)]
pub struct Fsck {
    #[command(flatten)]
    json: JsonFlag,
}

#[derive(Debug, Serialize)]
struct JsonReport {
    clean: bool,
    findings: Vec<JsonFinding>,
    shards_checked: u32,
    rows: u64,
    directories: u64,
    files: u64,
    directories_reached: u64,
    entries: u64,
    orphans: u64,
}

#[derive(Debug, Serialize)]
struct JsonFinding {
    invariant: String,
    place: String,
    message: String,
}

impl Fsck {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let bar = std::io::stderr().is_terminal().then(indicatif::ProgressBar::new_spinner);
        let started = Instant::now();
        let report = client
            .fsck(|progress| {
                if let Some(bar) = bar.as_ref().filter(|_| started.elapsed() > Duration::from_secs(1)) {
                    bar.set_message(format!(
                        "{} shards, {} rows, {} directories, {} findings",
                        progress.shards_checked,
                        progress.rows,
                        progress.directories_reached,
                        progress.findings
                    ));
                    bar.tick();
                }
            })
            .await;
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        let report = report.map_err(|error| failure("", error))?;
        let clean = report.findings.is_empty();
        let mut out = context.out();
        if self.json.json {
            out.json(&json(report))?;
        } else {
            for finding in &report.findings {
                out.line(format_args!("{}: {}: {}", finding.place, finding.invariant, finding.message))?;
            }
            out.line(summary(&report))?;
        }
        out.finish()?;
        if clean { Ok(()) } else { Err(Failure::Reported) }
    }
}

fn summary(report: &FsckReport) -> String {
    let verdict = match report.findings.len() {
        0 => "clean".to_owned(),
        1 => "1 finding".to_owned(),
        findings => format!("{findings} findings"),
    };
    format!(
        "{verdict}: {} shards, {} rows, {} directories ({} reached from the root, {} that no entry leads to), {} files, {} entries",
        report.shards_checked,
        report.rows,
        report.directories,
        report.directories_reached,
        report.orphans,
        report.files,
        report.entries
    )
}

fn json(report: FsckReport) -> JsonReport {
    let findings = report.findings.into_iter();
    JsonReport {
        clean: findings.len() == 0,
        findings: findings
            .map(|finding| JsonFinding {
                invariant: finding.invariant,
                place: finding.place,
                message: finding.message,
            })
            .collect(),
        shards_checked: report.shards_checked,
        rows: report.rows,
        directories: report.directories,
        files: report.files,
        directories_reached: report.directories_reached,
        entries: report.entries,
        orphans: report.orphans,
    }
}
