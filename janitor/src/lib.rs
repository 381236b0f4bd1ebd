//! The janitor daemon: the only thing that moves or erases data unasked.
//!
//! What is to be done and in which order is decided in `eggs-janitor-core` (JA-1 …). Here: [`service`] (its life),
//! `context` (what all parts share), `board` (what it is doing, for people), `budget` (how fast, how much memory), and a
//! file for each kind of work: `repair` (rounds), `find` (what needs repair), `fix` (one span), `lost` (disks that are
//! away), `scrub`, `garbage`, `rebalance`, `spread`, `restripe`.
//!
//! It keeps nothing on disk. Where blocks are and when files were looked at is in the metadata, how far jobs are in the
//! registry: one that is killed goes on where it was, and another can take its place. What two of them do at the same
//! time is done twice at worst: every change of the metadata is conditional.

pub mod args;
mod board;
mod budget;
mod context;
mod find;
mod fix;
mod garbage;
mod lost;
mod lost_spans;
mod rebalance;
mod repair;
mod restripe;
mod scrub;
pub mod service;
mod spread;

pub use args::Settings;
pub use service::{Config, Service};
