//! Evening out how full disks are: blocks move from the fullest disk to those that are emptier than the rest (JA-7).

use std::time::Duration;

use eggs_client::ClientError;
use eggs_janitor_core::SpanKey;
use eggs_janitor_core::rebalance::{Plan, can_move, plan};
use eggs_proto::pb;
use futures_util::stream::{self, StreamExt};
use pb::JanitorTaskKind::JanitorTaskRebalance as Rebalance;

use crate::context::Context;
use crate::{find, fix};

/// Between looks at how full disks are: what was moved must have been heard of.
const LOOK: Duration = Duration::from_secs(60);
/// Spans that one plan moves: then it is looked again, and nothing more than this is remembered.
const SPANS_MAX: usize = 4096;

pub(crate) async fn run(context: &Context) {
    if context.settings.no_rebalance {
        std::future::pending::<()>().await;
    }
    loop {
        tokio::time::sleep(LOOK).await;
        context.until_it_works().await;
        let disks = context.disks();
        // Repair first: it needs the disks, and changes how full they are.
        let Some(plan) = plan(&disks).filter(|_| !context.is_repairing()) else {
            context.board.retain(Rebalance, |_| false);
            continue;
        };
        context.board.retain(Rebalance, |about| about == plan.from.0);
        if let Err(error) = carry_out(context, &plan).await {
            tracing::debug!(%error, "balancing goes on later");
            context.board.say(Rebalance, plan.from.0, context.now(), error);
        }
    }
}

async fn carry_out(context: &Context, plan: &Plan) -> Result<(), ClientError> {
    let disks = context.disks();
    let (mut keys, mut bytes) = (Vec::new(), 0u64);
    let mut unanswered = find::Unanswered::default();
    find::on_disk(context, plan.from, &mut unanswered, |key, span| {
        let wanted = bytes < plan.bytes && keys.len() < SPANS_MAX;
        if wanted && can_move(span, &disks, plan.from, &plan.to) {
            bytes = bytes.saturating_add(u64::from(find::block_bytes(span)));
            keys.push(key);
        }
    })
    .await;
    let total = keys.len() as u64;
    context.board.update(Rebalance, plan.from.0, context.now(), |task| {
        task.spans_total = task.spans_done + total;
        task.bytes_total = task.bytes_done + bytes;
        task.state.clear();
    });
    let only: Vec<u64> = plan.to.iter().map(|id| id.0).collect();
    let moves = keys.into_iter().map(|key: SpanKey| {
        let only = &only;
        async move { (key, fix::relieve(context, key, plan.from, only).await) }
    });
    let mut moves = stream::iter(moves).buffer_unordered(context.settings.repairs_in_flight as usize);
    while let Some((key, moved)) = moves.next().await {
        match moved {
            Ok(fixed) => context.board.update(Rebalance, plan.from.0, context.now(), |task| {
                task.spans_done += 1;
                task.bytes_done += fixed.bytes();
            }),
            // No taker is free for it, say.
            Err(error) => tracing::debug!(file = %key.file, %error, "span not moved"),
        }
    }
    unanswered.result()
}
