//! Tests of the shard's state machine through the doors its users come by: prepare, apply, read.

mod dead;
mod fsck;
mod golden;
mod hostile;
mod model;
mod operations;
mod reads;
mod steps;
mod support;
mod writing;
