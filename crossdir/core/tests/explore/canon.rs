//! One number for all states that go on alike.
//!
//! A state holds two things that say how it was come to and not how it goes on: instants of the past and tags of
//! requests. They are taken out before it is hashed:
//! - Instants up to now count as one. A machine compares them in one place (an edge does not die before it was made, or in
//!   time to come); messages carry the clock here as they do outside, so that holds in every order. Instants to
//!   come, the driver's timers, count by their distance, rounded.
//! - A tag counts as whom the driver asked with it.

use std::fmt::Write;
use std::hash::{DefaultHasher, Hasher};

use bytes::Bytes;
use eggs_crossdir_core::{CrossdirMachine, Driver};
use eggs_proto::pb;
use eggs_shard_core::ShardMachine;
use prost::Message;

use super::world::tables::Group;
use crate::state::{BEGINNING, MS};

/// The commands of one run move the clocks by less.
const SMALL: u64 = 4 * MS;
/// An hour: no run is as long.
const LONGEST: u64 = 3_600_000 * MS;
const DIGITS: usize = 16;

pub fn hash(text: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(text);
    hasher.finish()
}

/// What to make of the numbers in a text.
#[derive(Debug)]
pub struct Canon {
    now: u64,
    /// Tags the driver waits for, and whom it asked.
    tags: Vec<(u64, String)>,
}

impl Canon {
    /// And the hash of the driver itself.
    pub fn of(driver: &Driver, now: u64) -> (Canon, u64) {
        let text = format!("{driver:?}");
        let start = text.find("tags: {").expect("a driver has tags") + "tags: {".len();
        let end = start + text[start..].find('}').expect("they end");
        let mut tags: Vec<(u64, String)> = Vec::new();
        for entry in text[start..end].split(", ").filter(|entry| !entry.is_empty()) {
            let (tag, asked) = entry.split_once(": ").expect("a tag and whom it asks");
            let before = tags.iter().filter(|(_, other)| other.starts_with(asked)).count();
            tags.push((tag.parse().expect("a number"), format!("{asked}#{before}")));
        }
        let canon = Canon { now, tags };
        let mut own = String::with_capacity(text.len());
        canon.rewrite(&text[..start], &mut own);
        canon.rewrite(&text[end..], &mut own);
        let own = hash(own.as_bytes());
        (canon, own)
    }

    pub fn rewrite(&self, text: &str, to: &mut String) {
        let bytes = text.as_bytes();
        let (mut at, mut copied) = (0, 0);
        // All of them begin alike.
        while let Some(found) = bytes[at..].iter().position(|&byte| byte == b'1') {
            at += found;
            let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            let whole = at == 0 || !bytes[at - 1].is_ascii_digit();
            if digits == DIGITS
                && whole
                && let Ok(number) = text[at..at + digits].parse::<u64>()
                && (BEGINNING..BEGINNING + LONGEST).contains(&number)
            {
                to.push_str(&text[copied..at]);
                copied = at + digits;
                self.number(number, to);
            }
            at += digits;
        }
        to.push_str(&text[copied..]);
    }

    fn number(&self, number: u64, to: &mut String) {
        if let Some((_, asked)) = self.tags.iter().find(|(tag, _)| *tag == number) {
            to.push_str(asked);
            return;
        }
        match number.saturating_sub(self.now) {
            0..=SMALL => to.push('~'),
            far => {
                // What was set a few short timers earlier is no different.
                let unit = if far > 500 * MS { 50 } else { 1 };
                let _ = write!(to, "+{}", (far / MS + unit / 2) / unit);
            }
        }
    }
}

/// A shard's rows without their instants.
pub fn of_shard(group: &Group<ShardMachine>) -> u64 {
    let mut hasher = DefaultHasher::new();
    for (key, value) in group.table.iter() {
        match key[0] {
            // Clock and sessions; no step uses a session.
            0 => {}
            b'D' => {
                let row: pb::DirectoryRow = decode(value);
                hasher.write(key);
                hasher.write_u64(row.owner);
                hasher.write_u64(row.transaction);
            }
            b'L' => {
                let row: pb::EdgeRow = decode(value);
                hasher.write(key);
                hasher.write_u64(row.target);
                hasher.write_u64(row.transaction);
            }
            b'X' => {
                let row: pb::DeadEdgeRow = decode(value);
                hasher.write(&key[..key.len() - 8]);
                hasher.write_u64(row.target);
                hasher.write_u8(row.owned.into());
                hasher.write_u64(row.transaction);
            }
            b'T' => {
                let mut row: pb::TransactionRow = decode(value);
                if let Some(outcome) = &mut row.outcome {
                    outcome.time = 0;
                    if let Some(pb::write_result::Result::Link(link)) = &mut outcome.result {
                        link.created_at = 0;
                    }
                }
                hasher.write(key);
                hasher.write(&row.encode_to_vec());
            }
            b'F' => hasher.write(key),
            _ => {
                hasher.write(key);
                hasher.write(value);
            }
        }
    }
    hasher.finish()
}

/// The coordinator's rows without their instants.
pub fn of_coordinator(group: &Group<CrossdirMachine>) -> u64 {
    let mut hasher = DefaultHasher::new();
    let reply = |hasher: &mut DefaultHasher, reply: Option<pb::CrossdirReply>| {
        use pb::crossdir_reply::Result;
        let result = reply.and_then(|reply| reply.result).map(|result| match result {
            Result::Mkdir(made) => Result::Mkdir(pb::MkdirReply { created_at: 0, ..made }),
            Result::Rmdir(_) => Result::Rmdir(pb::RmdirReply::default()),
            Result::MkdirPath(made) => Result::MkdirPath(pb::MkdirPathReply { created_at: 0, ..made }),
            Result::Exchange(_) => Result::Exchange(pb::ExchangeReply::default()),
            Result::UndeleteInode(_) => Result::UndeleteInode(pb::UndeleteInodeReply::default()),
            other => other,
        });
        hasher.write(&pb::CrossdirReply { header: None, result }.encode_to_vec());
    };
    for (key, value) in group.table.iter().filter(|(key, _)| key[0] != 0) {
        hasher.write(key);
        match key[0] {
            b'T' => {
                let row: pb::CrossdirTransactionRow = decode(value);
                hasher.write(&row.begin);
                hasher.write_u8(row.cleared.into());
                hasher.write_u8(row.reply.is_some().into());
                reply(&mut hasher, row.reply);
            }
            b'S' => {
                let row: pb::CrossdirSessionRow = decode(value);
                hasher.write_u64(row.transaction);
                hasher.write_u8(row.reply.is_some().into());
                reply(&mut hasher, row.reply);
            }
            _ => hasher.write(value),
        }
    }
    hasher.finish()
}

fn decode<R: Message + Default>(bytes: &Bytes) -> R {
    R::decode(bytes.clone()).expect("a row of its table")
}
