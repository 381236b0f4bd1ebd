//! `verify`: reads everything files have, every block and all parity, and says what is not as it was written.

use std::sync::{Arc, Mutex, PoisonError};

use clap::{ArgAction, Args};
use eggs_client::{Client, Finding, ListOptions, Verified};
use eggs_proto::InodeId;
use serde_json::{Value, json};

use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::{Failure, Operands, Outcome};
use crate::output::{JsonPath, Out, size};
use crate::paths::ClusterPath;
use crate::progress::Progress;
use crate::spread::Disks;
use crate::transfer::{Budget, each};
use crate::tree::{self, Entered, Visitor};

/// What a file in the works takes of the memory at most: a round of a span's blocks, decoded.
const ROOM: u64 = 32 << 20;
/// Findings, and refusals, kept for the JSON document; all are counted.
const FINDINGS_MAX: usize = 10_000;

/// Read everything files have and check it
///
/// Of every file all blocks are read, those of parity too, and checked: the CRCs of cells, blocks, spans and the file, and
/// that the parity is that of the data. What is wrong is printed, and reported to the registry so that it is repaired. Files
/// stay readable while enough blocks are right: "lost" is said where they are not.
///
/// The exit code is 0 when everything could be verified and nothing is wrong, else 1.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  eggsctl verify /data/f\n  eggsctl verify -r / --json\n  eggsctl verify -r /data --report=false"
)]
pub struct Verify {
    /// Directories and everything in them
    #[arg(short, long, visible_short_alias = 'R')]
    recursive: bool,
    /// Tell the registry of blocks that are missing or damaged
    #[arg(long, default_value_t = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set, value_name = "BOOL")]
    report: bool,
    #[command(flatten)]
    json: JsonFlag,
    /// Files and directories
    #[arg(required = true, value_name = "PATH", value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

#[derive(Default)]
struct Sum {
    files: u64,
    files_wrong: u64,
    files_lost: u64,
    bytes: u64,
    spans: u64,
    blocks: u64,
    block_bytes: u64,
    findings: u64,
    kept: Vec<Value>,
    not_verified: u64,
    refused: Vec<Value>,
}

struct VerifyTree {
    client: Client,
    report: bool,
    json: bool,
    disks: Disks,
    budget: Budget,
    progress: Progress,
    command: &'static str,
    sum: Mutex<Sum>,
    out: Mutex<Out>,
}

struct Node {
    path: ClusterPath,
    inode: InodeId,
}

impl Verify {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let map = client.cluster_map().await.map_err(|error| failure("", error))?;
        let (progress, shown) = Progress::start();
        let verifier = Arc::new(VerifyTree {
            client: client.clone(),
            report: self.report,
            json: self.json.json,
            disks: Disks::of(map),
            budget: Budget::new(),
            progress,
            command: context.command,
            sum: Mutex::default(),
            out: Mutex::new(context.out()),
        });
        let mut operands = Operands::new(context.command);
        let (mut files, mut trees) = (Vec::new(), Vec::new());
        for path in &self.paths {
            let found = client.stat(path.as_bytes()).await.map_err(|error| failure(path, error));
            let sorted = found.and_then(|found| {
                let node = Node { path: path.clone(), inode: found.inode };
                match (found.is_directory(), self.recursive) {
                    (true, false) => Err(Failure::refused(path, "is a directory; -r verifies what is in it")),
                    (true, true) => {
                        trees.push(node);
                        Ok(())
                    }
                    (false, _) if found.is_file() => {
                        files.push((node, found.size));
                        Ok(())
                    }
                    (false, _) => Err(Failure::refused(path, "is a symbolic link; it has no blocks")),
                }
            });
            operands.note(sorted.map_err(|failure| verifier.refused(path, failure)))?;
        }
        files.iter().for_each(|(_, size)| verifier.progress.expect_bytes(*size));
        let broken = each(files, context.command, |(node, size)| {
            let verifier = verifier.clone();
            async move { verifier.file(&node.path, node.inode, size).await }
        })
        .await?;
        operands.note(tree::visit(verifier.clone(), trees, context.command).await)?;
        drop(shown);
        let wrong = verifier.finish(context)?;
        if broken || wrong {
            operands.note(Err(Failure::Reported))?;
        }
        operands.finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VerifyTree {
    async fn file(&self, path: &ClusterPath, inode: InodeId, size: u64) -> Outcome {
        let _room = self.budget.room((2 * size).min(ROOM)).await?;
        let mut before = 0;
        let mut count = |so_far: u64| {
            self.progress.bytes(so_far.saturating_sub(before));
            before = so_far;
        };
        let verified = self.client.verify(inode, self.report, &mut count).await;
        let verified = match verified {
            // Removed since it was listed.
            Err(error) if error.is_not_found() => return Ok(()),
            verified => verified.map_err(|error| self.refused(path, failure(path, error)))?,
        };
        self.progress.files(1);
        self.add(path, &verified)
    }

    /// Remembers what was not verified.
    fn refused(&self, path: &ClusterPath, failure: Failure) -> Failure {
        let mut sum = lock(&self.sum);
        sum.not_verified += 1;
        if self.json && sum.refused.len() < FINDINGS_MAX {
            let JsonPath { path, path_hex } = JsonPath::of(path.as_bytes());
            let mut document = json!({ "path": path, "reason": failure.reason() });
            if let Some(hex) = path_hex {
                document["path_hex"] = hex.into();
            }
            sum.refused.push(document);
        }
        failure
    }

    fn add(&self, path: &ClusterPath, verified: &Verified) -> Outcome {
        let mut sum = lock(&self.sum);
        sum.files += 1;
        sum.files_wrong += u64::from(!verified.findings.is_empty());
        sum.files_lost += u64::from(verified.lost);
        sum.bytes += verified.bytes;
        sum.spans += verified.spans;
        sum.blocks += verified.blocks;
        sum.block_bytes += verified.block_bytes;
        sum.findings += verified.findings.len() as u64;
        for finding in &verified.findings {
            if self.json {
                if sum.kept.len() < FINDINGS_MAX {
                    sum.kept.push(self.document(path, finding));
                }
            } else {
                let mut out = lock(&self.out);
                out.named_line("", path.as_bytes(), None, self.words(finding).as_bytes())?;
                out.flush()?;
            }
        }
        Ok(())
    }

    fn words(&self, finding: &Finding) -> String {
        let mut words = String::new();
        if let Some(span) = finding.span {
            words += &format!(": span at {span}");
        }
        if let Some((index, service, block)) = finding.block {
            words += &format!(": block {index} ({block}) on {service}{}", self.disks.words(service.0));
        }
        format!("{words}: {}: {}", finding.kind, finding.message)
    }

    fn document(&self, path: &ClusterPath, finding: &Finding) -> Value {
        let JsonPath { path, path_hex } = JsonPath::of(path.as_bytes());
        let mut document =
            json!({ "path": path, "span": finding.span, "kind": finding.kind, "message": finding.message });
        if let Some(hex) = path_hex {
            document["path_hex"] = hex.into();
        }
        if let Some((index, service, block)) = finding.block {
            let mut about = json!({
                "index": index,
                "id": format!("{:#018x}", block.0),
                "block_service": service.to_string(),
            });
            self.disks.describe(service.0, &mut about);
            document["block"] = about;
        }
        document
    }

    /// Prints the sum; true when something is wrong.
    fn finish(&self, context: &Context) -> Outcome<bool> {
        let mut sum = lock(&self.sum);
        let mut out = context.out();
        if self.json {
            out.json(&json!({
                "files": sum.files,
                "files_wrong": sum.files_wrong,
                "files_lost": sum.files_lost,
                "bytes": sum.bytes,
                "spans": sum.spans,
                "blocks": sum.blocks,
                "block_bytes": sum.block_bytes,
                "faults": sum.findings,
                "findings": std::mem::take(&mut sum.kept),
                "not_verified": sum.not_verified,
                "refused": std::mem::take(&mut sum.refused),
            }))?;
        } else {
            let mut end = match (sum.findings, sum.files_lost) {
                (0, _) if sum.files == 0 && sum.not_verified > 0 => String::new(),
                (0, _) => "nothing is wrong".to_owned(),
                (faults, 0) => format!("{faults} faults in {} files, no data lost", sum.files_wrong),
                (faults, lost) => {
                    format!("{faults} faults in {} files, {lost} of them have lost data", sum.files_wrong)
                }
            };
            if sum.not_verified > 0 {
                end += if end.is_empty() { "" } else { "; " };
                end += &format!("NOT VERIFIED: {} refused", sum.not_verified);
            }
            out.line(format_args!(
                "{} files, {} in {} spans; {} blocks, {} with parity: {end}",
                sum.files,
                size(sum.bytes),
                sum.spans,
                sum.blocks,
                size(sum.block_bytes)
            ))?;
        }
        out.finish()?;
        Ok(sum.findings > 0)
    }
}

impl Visitor for VerifyTree {
    type Node = Node;

    async fn enter(&self, node: &Node) -> Outcome<Entered<Node>> {
        let mut entered = Entered { children: Vec::new(), broken: false };
        let options = ListOptions { attributes: true, ..ListOptions::default() };
        let mut listing = self.client.list_inode(node.inode, options);
        let refused = |error| self.refused(&node.path, failure(&node.path, error));
        while let Some(page) = listing.next_page().await.map_err(refused)? {
            let mut files = Vec::with_capacity(page.len());
            for entry in page {
                let path = node.path.join(&entry.name);
                if entry.target.is_directory() {
                    entered.children.push(Node { path, inode: entry.target });
                } else if !entry.target.is_symlink() {
                    let size = entry.metadata.as_ref().map_or(0, |found| found.size);
                    self.progress.expect_bytes(size);
                    files.push((path, entry.target, size));
                }
            }
            let verify = |(path, inode, size)| async move { self.file(&path, inode, size).await };
            entered.broken |= each(files, self.command, verify).await?;
        }
        Ok(entered)
    }

    async fn leave(&self, _: &Node, _: bool) -> Outcome {
        Ok(())
    }
}
