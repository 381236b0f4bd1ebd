//! Tests of the shard's state machine through the doors its users come by: prepare, apply, read.

mod dead;
mod fsck;
mod garbage;
mod golden;
mod hostile;
mod model;
mod operations;
mod reads;
mod repair;
mod steps;
mod support;
mod writing;
