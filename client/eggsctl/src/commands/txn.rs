//! `txn`: the coordinator's transactions.

use clap::{Args, Subcommand};
use eggs_proto::{Time, TransactionId};
use serde::Serialize;

use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::Outcome;
use crate::output::{json_time, table, table_text};
use crate::times;

/// Look at operations that cross directories
#[derive(Debug, Args)]
pub struct Txn {
    #[command(subcommand)]
    command: TxnCommand,
}

#[derive(Debug, Subcommand)]
enum TxnCommand {
    /// List the transactions in flight: mkdir, rmdir and mv that the coordinator has accepted
    List(TxnList),
}

#[derive(Debug, Args)]
struct TxnList {
    #[command(flatten)]
    json: JsonFlag,
    /// Also those that have finished and are still remembered
    #[arg(short, long)]
    all: bool,
}

#[derive(Debug, Serialize)]
struct JsonTransaction {
    transaction: String,
    kind: String,
    started_at_ns: u64,
    started_at: Option<String>,
    step: String,
    finished: bool,
}

impl Txn {
    pub async fn run(self, context: &Context) -> Outcome {
        let TxnCommand::List(TxnList { json: JsonFlag { json }, all }) = self.command;
        let client = context.client().await?;
        let mut transactions = client.transactions().await.map_err(|error| failure("", error))?;
        transactions.retain(|found| all || !found.finished);
        let mut out = context.out();
        let id = |id: u64| TransactionId(id).to_string();
        if json {
            let rows = transactions.into_iter().map(|found| JsonTransaction {
                transaction: id(found.transaction),
                kind: found.kind,
                started_at_ns: found.started_at,
                started_at: json_time(Time(found.started_at)),
                step: found.step,
                finished: found.finished,
            });
            out.json(&rows.collect::<Vec<_>>())?;
        } else if transactions.is_empty() {
            out.line("no transactions in flight")?;
        } else {
            let now = times::now();
            let mut table = table(&["TRANSACTION", "KIND", "STARTED", "STEP"], &[]);
            for found in transactions {
                let step = if found.finished { "finished".to_owned() } else { found.step };
                table.add_row([
                    id(found.transaction),
                    found.kind,
                    times::age(Time(found.started_at), now),
                    step,
                ]);
            }
            out.line(table_text(&table))?;
        }
        out.finish()
    }
}
