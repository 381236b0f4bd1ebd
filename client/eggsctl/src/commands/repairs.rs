//! `repairs`: what the janitor is doing.

use std::time::Duration;

use clap::Args;
use eggs_proto::limits::NOTHING_AT_RISK;
use eggs_proto::{BlockServiceId, Time, pb};
use eggs_shuckle_core::repairs::{left, task_kind, under_spread};
use pb::JanitorTaskKind as Kind;
use serde::Serialize;

use crate::cli::JsonFlag;
use crate::context::Context;
use crate::failure::Outcome;
use crate::members::heard_map;
use crate::output::{json_time, size, table, table_text};
use crate::times;

/// Between two pictures of --watch.
const WATCH: Duration = Duration::from_secs(1);

/// Show what the janitor is doing: repair, scrub, balancing, spreading, garbage, jobs
///
/// Of each: how far it is, how fast, how long it takes, and the fewest blocks that a span it is about can still lose.
/// "spread": how many spans have several blocks in one failure domain, and how many of those can be spread now.
/// Example: eggsctl repairs --watch
#[derive(Debug, Args)]
#[command(visible_alias = "repair")]
pub struct Repairs {
    #[command(flatten)]
    json: JsonFlag,
    /// Print again every second until interrupted
    #[arg(short, long)]
    watch: bool,
}

#[derive(Debug, Serialize)]
struct JsonRepairs {
    janitor: Option<JsonJanitor>,
    tasks: Vec<JsonTask>,
    jobs: Vec<JsonJob>,
    /// Null: nobody has counted yet.
    under_spread: Option<JsonUnderSpread>,
}

/// Spans two of whose blocks share a disk or a failure domain.
#[derive(Debug, Serialize)]
struct JsonUnderSpread {
    spans: u64,
    /// All spans with blocks.
    of: u64,
}

#[derive(Debug, Serialize)]
struct JsonJanitor {
    host: String,
    address: String,
    alive: bool,
    last_seen_ns: u64,
    last_seen: Option<String>,
}

/// A task in JSON.
#[derive(Debug, Serialize)]
pub struct JsonTask {
    /// "repair", "scrub", "rebalance", "garbage", "restripe", "spread".
    kind: &'static str,
    /// The disk or directory; null: everything.
    about: Option<String>,
    path: Option<String>,
    state: String,
    started_at_ns: u64,
    started_at: Option<String>,
    spans_done: u64,
    spans_total: u64,
    bytes_done: u64,
    bytes_total: u64,
    bytes_per_second: u64,
    seconds_left: Option<u64>,
    spans_lost: u64,
    /// Null: nothing is at risk.
    least_redundancy: Option<u32>,
}

/// A job in JSON.
#[derive(Debug, Serialize)]
pub struct JsonJob {
    id: u64,
    kind: &'static str,
    directory: String,
    path: String,
    asked_at_ns: u64,
    asked_at: Option<String>,
    files_done: u64,
    files_failed: u64,
    bytes_done: u64,
    done: bool,
}

impl JsonJob {
    pub fn of(job: &pb::Job) -> JsonJob {
        let progress = job.progress.clone().unwrap_or_default();
        JsonJob {
            id: job.id,
            kind: task_kind(job.kind()),
            directory: eggs_proto::InodeId(job.directory).to_string(),
            path: job.path.clone(),
            asked_at_ns: job.asked_at,
            asked_at: json_time(Time(job.asked_at)),
            files_done: progress.files_done,
            files_failed: progress.files_failed,
            bytes_done: progress.bytes_done,
            done: progress.done,
        }
    }
}

impl Repairs {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        loop {
            let map = heard_map(client).await?;
            let mut out = context.out();
            if self.json.json {
                out.json(&json(&map))?;
            } else {
                out.line(text(&map))?;
            }
            out.finish()?;
            if !self.watch {
                return Ok(());
            }
            tokio::time::sleep(WATCH).await;
        }
    }
}

/// What a task is about, as people know it.
fn about(map: &pb::ClusterMapReply, task: &pb::JanitorTask) -> Option<String> {
    match task.kind() {
        _ if task.about == 0 => None,
        Kind::JanitorTaskRestripe => {
            let job = map.jobs.iter().find(|job| job.directory == task.about);
            Some(job.map_or_else(|| eggs_proto::InodeId(task.about).to_string(), |job| job.path.clone()))
        }
        _ => {
            let disk = map.block_services.iter().find(|info| info.id == task.about);
            Some(disk.map_or_else(|| BlockServiceId(task.about).to_string(), |info| info.path.clone()))
        }
    }
}

fn json(map: &pb::ClusterMapReply) -> JsonRepairs {
    let task = |task: &pb::JanitorTask| JsonTask {
        kind: task_kind(task.kind()),
        about: (task.about != 0).then(|| BlockServiceId(task.about).to_string()),
        path: about(map, task),
        state: task.state.clone(),
        started_at_ns: task.started_at,
        started_at: json_time(Time(task.started_at)),
        spans_done: task.spans_done,
        spans_total: task.spans_total,
        bytes_done: task.bytes_done,
        bytes_total: task.bytes_total,
        bytes_per_second: task.bytes_per_second,
        seconds_left: left(task).map(|left| left.as_secs()),
        spans_lost: task.spans_lost,
        least_redundancy: Some(task.least_redundancy).filter(|&least| least != NOTHING_AT_RISK),
    };
    let janitor = map.janitor.as_ref().map(|janitor| JsonJanitor {
        host: janitor.host.clone(),
        address: janitor.address.clone(),
        alive: janitor.alive,
        last_seen_ns: janitor.last_seen,
        last_seen: json_time(Time(janitor.last_seen)),
    });
    let tasks = map.janitor.iter().flat_map(|janitor| &janitor.tasks).map(task).collect();
    let under_spread = under_spread(map).map(|(spans, of)| JsonUnderSpread { spans, of });
    JsonRepairs { janitor, tasks, jobs: map.jobs.iter().map(JsonJob::of).collect(), under_spread }
}

fn text(map: &pb::ClusterMapReply) -> String {
    let Some(janitor) = &map.janitor else {
        return "no janitor has registered: nothing is repaired, checked or erased (start eggs-janitor)"
            .to_owned();
    };
    let mut text = match janitor.alive {
        true => format!("janitor on host {} at {}", janitor.host, janitor.address),
        false => format!(
            "janitor on host {} at {}: AWAY, last seen {}",
            janitor.host,
            janitor.address,
            times::age(Time(janitor.last_seen), Time(map.now))
        ),
    };
    if janitor.tasks.is_empty() {
        text.push_str("\nnothing to do");
        return text;
    }
    let header = ["TASK", "ABOUT", "DONE", "OF", "RATE", "LEFT", "CAN LOSE", "STATE"];
    let mut table = table(&header, &[2, 3, 4, 5, 6]);
    for task in &janitor.tasks {
        table.add_row(row(map, task));
    }
    text.push('\n');
    text.push_str(&table_text(&table));
    text
}

fn row(map: &pb::ClusterMapReply, task: &pb::JanitorTask) -> [String; 8] {
    let none = || "-".to_owned();
    let repair = task.kind() == Kind::JanitorTaskRepair && task.about != 0;
    let least = match task.least_redundancy {
        NOTHING_AT_RISK => none(),
        _ if task.spans_lost > 0 => format!("LOST {}", task.spans_lost),
        least if repair && task.spans_total > 0 => least.to_string(),
        _ => none(),
    };
    let total = if task.bytes_total == 0 { none() } else { size(task.bytes_total) };
    let rate = if task.bytes_per_second == 0 { none() } else { format!("{}/s", size(task.bytes_per_second)) };
    let state = match task.state.is_empty() {
        true if repair && task.least_redundancy == NOTHING_AT_RISK => "done: the disk is empty".to_owned(),
        true if task.spans_total > 0 => format!("{} of {} spans", task.spans_done, task.spans_total),
        _ => crate::paths::escape(task.state.as_bytes()),
    };
    [
        task_kind(task.kind()).to_owned(),
        about(map, task).map_or_else(none, |about| crate::paths::escape(about.as_bytes())),
        size(task.bytes_done),
        total,
        rate,
        left(task).map_or_else(none, |left| humantime::format_duration(left).to_string()),
        least,
        state,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_repairs() {
        let task = pb::JanitorTask {
            kind: Kind::JanitorTaskRepair.into(),
            about: 7,
            spans_done: 12,
            spans_total: 100,
            bytes_done: 100 << 20,
            bytes_total: 500 << 20,
            bytes_per_second: 100 << 20,
            least_redundancy: 1,
            ..Default::default()
        };
        let done = pb::JanitorTask { about: 8, least_redundancy: NOTHING_AT_RISK, ..Default::default() };
        let done = pb::JanitorTask { kind: Kind::JanitorTaskRepair.into(), ..done };
        let spread = pb::JanitorTask {
            kind: Kind::JanitorTaskSpread.into(),
            state: "3 of 40 spans are under-spread".into(),
            spans_done: 37,
            spans_total: 40,
            ..Default::default()
        };
        let janitor = pb::JanitorInfo {
            host: "a".into(),
            address: "a:5005".into(),
            alive: true,
            tasks: vec![task, done, spread],
            ..Default::default()
        };
        let disk = |id, path: &str| pb::BlockServiceInfo { id, path: path.into(), ..Default::default() };
        let map = pb::ClusterMapReply {
            janitor: Some(janitor),
            block_services: vec![disk(7, "/disks/00"), disk(8, "/disks/01")],
            ..Default::default()
        };
        let text = text(&map);
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        assert_eq!(lines[0], "janitor on host a at a:5005");
        let words: Vec<&str> = lines[2].split_whitespace().collect();
        assert_eq!(words.join(" "), "repair /disks/00 100.0 MiB 500.0 MiB 100.0 MiB/s 4s 1 12 of 100 spans");
        assert!(lines[3].ends_with("done: the disk is empty"), "{}", lines[3]);
        assert!(lines[4].ends_with("3 of 40 spans are under-spread"), "{}", lines[4]);
        let json = json(&map);
        assert_eq!(json.tasks[1].least_redundancy, None);
        assert_eq!(json.under_spread.map(|counted| (counted.spans, counted.of)), Some((3, 40)));
    }

    #[test]
    fn without_a_janitor_it_is_said() {
        assert!(text(&pb::ClusterMapReply::default()).contains("no janitor"));
    }
}
