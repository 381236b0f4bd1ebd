//! `scrub`: when everything was looked at last.

use clap::Args;
use eggs_proto::pb;
use pb::JanitorTaskKind::JanitorTaskScrub;
use serde::Serialize;

use crate::cli::JsonFlag;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::members::heard_map;

/// Show how far scrub is: when every file was looked at last, what is due, what was found
///
/// The janitor looks at every block of every file once per --scrub-period (30 days unless told otherwise); what is bad is
/// repaired. Example: eggsctl scrub
#[derive(Debug, Args)]
pub struct Scrub {
    #[command(flatten)]
    json: JsonFlag,
}

#[derive(Debug, Serialize)]
struct JsonScrub {
    /// Of this round, of 256.
    shards_done: u64,
    bytes_checked: u64,
    bytes_per_second: u64,
    state: String,
    /// Blocks that readers or scrub have found bad and that are not repaired yet.
    bad_blocks: u64,
}

impl Scrub {
    pub async fn run(self, context: &Context) -> Outcome {
        let map = heard_map(context.client().await?).await?;
        let Some(janitor) = map.janitor.filter(|janitor| janitor.alive) else {
            return Err(Failure::refused("", "no janitor is alive: nothing is checked (start eggs-janitor)"));
        };
        let task = janitor.tasks.into_iter().find(|task| task.kind() == JanitorTaskScrub).unwrap_or_default();
        let bad_blocks = map.block_services.iter().map(|info| info.reported_blocks).sum::<u64>();
        let state = if task.state.is_empty() { "no round has begun yet".to_owned() } else { task.state };
        let mut out = context.out();
        if self.json.json {
            out.json(&JsonScrub {
                shards_done: task.spans_done,
                bytes_checked: task.bytes_done,
                bytes_per_second: task.bytes_per_second,
                state,
                bad_blocks,
            })?;
        } else {
            out.line(format_args!("{state}\n{bad_blocks} bad blocks wait for repair"))?;
        }
        out.finish()
    }
}
