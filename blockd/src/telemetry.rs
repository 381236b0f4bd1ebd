//! What `/metrics` shows of the block services. Only once per block: these look up their labels.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use eggs_proto::{BlockServiceId, pb};
use metrics::{counter, gauge, histogram};

use crate::disk::Refusal;
use crate::store::Counters;

#[derive(Debug, Clone, Copy)]
pub enum Operation {
    Write,
    Fetch,
    Erase,
    WriteMany,
    FetchMany,
    Check,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Operation::Write => "write",
            Operation::Fetch => "fetch",
            Operation::Erase => "erase",
            Operation::WriteMany => "write_many",
            Operation::FetchMany => "fetch_many",
            Operation::Check => "check",
        }
    }
}

/// A request was answered.
pub fn done(operation: Operation, begun: Instant, result: Result<(), &Refusal>) {
    let name = operation.name();
    histogram!("eggs_block_seconds", "operation" => name).record(begun.elapsed().as_secs_f64());
    if let Err(refusal) = result {
        // Debug names of the variants are few and fixed.
        counter!("eggs_block_errors_total", "operation" => name, "error" => format!("{:?}", refusal.code))
            .increment(1);
    }
}

pub fn written(service: BlockServiceId, blocks: u64, bytes: u64) {
    let disk = service.to_string();
    counter!("eggs_blocks_written_total", "disk" => disk.clone()).increment(blocks);
    counter!("eggs_block_written_bytes_total", "disk" => disk).increment(bytes);
}

pub fn read(service: BlockServiceId, blocks: u64, bytes: u64) {
    let disk = service.to_string();
    counter!("eggs_block_fetches_total", "disk" => disk.clone()).increment(blocks);
    counter!("eggs_block_read_bytes_total", "disk" => disk).increment(bytes);
}

/// With every heartbeat: what the disk's store has counted since it was opened.
pub fn store(service: BlockServiceId, counters: &Counters, segments: u64) {
    let disk = service.to_string();
    let total = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    counter!("eggs_disk_syncs_total", "disk" => disk.clone()).absolute(total(&counters.syncs));
    counter!("eggs_disk_sync_waiters_total", "disk" => disk.clone()).absolute(total(&counters.sync_waiters));
    counter!("eggs_disk_batched_blocks_total", "disk" => disk.clone())
        .absolute(total(&counters.whole_blocks));
    counter!("eggs_disk_batches_total", "disk" => disk.clone()).absolute(total(&counters.whole_writes));
    counter!("eggs_disk_compacted_bytes_total", "disk" => disk.clone())
        .absolute(total(&counters.compacted_bytes));
    counter!("eggs_disk_compacted_segments_total", "disk" => disk.clone())
        .absolute(total(&counters.compacted_segments));
    gauge!("eggs_disk_segments", "disk" => disk).set(segments as f64);
}

/// With every heartbeat.
pub fn disk(report: &pb::BlockServiceReport) {
    let disk = BlockServiceId(report.id).to_string();
    gauge!("eggs_disk_capacity_bytes", "disk" => disk.clone()).set(report.capacity_bytes as f64);
    gauge!("eggs_disk_available_bytes", "disk" => disk.clone()).set(report.available_bytes as f64);
    gauge!("eggs_disk_used_bytes", "disk" => disk.clone()).set(report.used_bytes as f64);
    gauge!("eggs_disk_blocks", "disk" => disk.clone()).set(report.blocks as f64);
    counter!("eggs_disk_io_errors_total", "disk" => disk.clone()).absolute(report.io_errors);
    gauge!("eggs_disk_dead_bytes", "disk" => disk.clone()).set(report.dead_bytes as f64);
    gauge!("eggs_disk_read_only", "disk" => disk.clone()).set(f64::from(u8::from(report.read_only)));
    gauge!("eggs_disk_lost", "disk" => disk).set(if report.problem.is_empty() { 0.0 } else { 1.0 });
}
