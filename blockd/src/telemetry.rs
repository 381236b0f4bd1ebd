//! What `/metrics` shows of the block services. Only once per block: these look up their labels.

use std::time::Instant;

use eggs_proto::{BlockServiceId, pb};
use metrics::{counter, gauge, histogram};

use crate::disk::Refusal;

#[derive(Debug, Clone, Copy)]
pub enum Operation {
    Write,
    Fetch,
    Erase,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Operation::Write => "write",
            Operation::Fetch => "fetch",
            Operation::Erase => "erase",
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

pub fn written(service: BlockServiceId, bytes: u32) {
    let disk = service.to_string();
    counter!("eggs_blocks_written_total", "disk" => disk.clone()).increment(1);
    counter!("eggs_block_written_bytes_total", "disk" => disk).increment(u64::from(bytes));
}

pub fn read(service: BlockServiceId, bytes: u32) {
    let disk = service.to_string();
    counter!("eggs_block_fetches_total", "disk" => disk.clone()).increment(1);
    counter!("eggs_block_read_bytes_total", "disk" => disk).increment(u64::from(bytes));
}

/// With every heartbeat.
pub fn disk(report: &pb::BlockServiceReport) {
    let disk = BlockServiceId(report.id).to_string();
    gauge!("eggs_disk_capacity_bytes", "disk" => disk.clone()).set(report.capacity_bytes as f64);
    gauge!("eggs_disk_available_bytes", "disk" => disk.clone()).set(report.available_bytes as f64);
    gauge!("eggs_disk_used_bytes", "disk" => disk.clone()).set(report.used_bytes as f64);
    gauge!("eggs_disk_blocks", "disk" => disk.clone()).set(report.blocks as f64);
    counter!("eggs_disk_io_errors_total", "disk" => disk.clone()).absolute(report.io_errors);
    gauge!("eggs_disk_lost", "disk" => disk).set(if report.problem.is_empty() { 0.0 } else { 1.0 });
}
