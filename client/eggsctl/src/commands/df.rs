//! `df`: space, by storage class and by disk.

use std::collections::BTreeMap;

use clap::Args;
use eggs_proto::pb::BlockServiceInfo;
use eggs_proto::{BlockServiceId, Time, flags};
use serde::Serialize;

use crate::cli::JsonFlag;
use crate::context::Context;
use crate::failure::Outcome;
use crate::members::heard_map;
use crate::output::{json_time, percent, size, table, table_text};
use crate::policies::class_name;
use crate::times;

/// Print space used and free, by storage class and by disk
#[derive(Debug, Args)]
pub struct Df {
    #[command(flatten)]
    json: JsonFlag,
}

#[derive(Debug, Serialize)]
struct JsonDf {
    classes: Vec<Class>,
    disks: Vec<JsonDisk>,
}

/// All disks of one kind.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct Class {
    storage_class: u32,
    class: String,
    disks: u64,
    /// Those that new blocks can go to.
    disks_writable: u64,
    capacity_bytes: u64,
    used_bytes: u64,
    available_bytes: u64,
    blocks: u64,
}

/// A disk, as `df` and `status` say it.
#[derive(Debug, Serialize)]
pub struct JsonDisk {
    id: String,
    storage_class: u32,
    class: String,
    failure_domain: String,
    address: String,
    path: String,
    flags: Vec<&'static str>,
    capacity_bytes: u64,
    used_bytes: u64,
    available_bytes: u64,
    blocks: u64,
    last_seen_ns: u64,
    last_seen: Option<String>,
    io_errors: u64,
    reported_blocks: u64,
    /// Takes no writes, as its host says.
    read_only: bool,
    /// Of blocks that are not needed any more and whose space is not given back yet.
    dead_bytes: u64,
    problem: String,
}

impl JsonDisk {
    pub fn of(disk: &BlockServiceInfo) -> JsonDisk {
        JsonDisk {
            id: BlockServiceId(disk.id).to_string(),
            storage_class: disk.storage_class,
            class: class_name(disk.storage_class),
            failure_domain: disk.failure_domain.clone(),
            address: disk.address.clone(),
            path: disk.path.clone(),
            flags: flags::names(disk.flags),
            capacity_bytes: disk.capacity_bytes,
            used_bytes: disk.used_bytes,
            available_bytes: disk.available_bytes,
            blocks: disk.blocks,
            last_seen_ns: disk.last_seen,
            last_seen: json_time(Time(disk.last_seen)),
            io_errors: disk.io_errors,
            reported_blocks: disk.reported_blocks,
            read_only: disk.read_only,
            dead_bytes: disk.dead_bytes,
            problem: disk.problem.clone(),
        }
    }
}

impl Df {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let map = heard_map(client).await?;
        let mut disks = map.block_services;
        in_order(&mut disks);
        let classes = classes(&disks);
        let mut out = context.out();
        if self.json.json {
            out.json(&JsonDf { classes, disks: disks.iter().map(JsonDisk::of).collect() })?;
        } else if disks.is_empty() {
            out.line("no disks have registered yet")?;
        } else {
            out.line(class_table(&classes))?;
            out.line("")?;
            out.line(disk_table(&disks, client.now()))?;
        }
        out.finish()
    }
}

/// By class, host and folder: as people think of them.
pub fn in_order(disks: &mut [BlockServiceInfo]) {
    disks.sort_by(|a, b| (a.storage_class, &a.address, &a.path).cmp(&(b.storage_class, &b.address, &b.path)));
}

fn classes(disks: &[BlockServiceInfo]) -> Vec<Class> {
    let mut classes = BTreeMap::<u32, Class>::new();
    for disk in disks {
        let class = classes.entry(disk.storage_class).or_insert_with(|| Class {
            storage_class: disk.storage_class,
            class: class_name(disk.storage_class),
            ..Class::default()
        });
        class.disks += 1;
        if flags::writable(disk.flags) {
            class.disks_writable += 1;
            class.available_bytes = class.available_bytes.saturating_add(disk.available_bytes);
        }
        class.capacity_bytes = class.capacity_bytes.saturating_add(disk.capacity_bytes);
        class.used_bytes = class.used_bytes.saturating_add(disk.used_bytes);
        class.blocks = class.blocks.saturating_add(disk.blocks);
    }
    classes.into_values().collect()
}

fn class_table(classes: &[Class]) -> String {
    let mut table =
        table(&["CLASS", "DISKS", "CAPACITY", "USED", "AVAILABLE", "USE", "BLOCKS"], &[1, 2, 3, 4, 5, 6]);
    for class in classes {
        let disks = if class.disks_writable == class.disks {
            class.disks.to_string()
        } else {
            format!("{} of {}", class.disks_writable, class.disks)
        };
        table.add_row([
            class.class.clone(),
            disks,
            size(class.capacity_bytes),
            size(class.used_bytes),
            size(class.available_bytes),
            percent(class.used_bytes, class.used_bytes.saturating_add(class.available_bytes)),
            class.blocks.to_string(),
        ]);
    }
    table_text(&table)
}

/// One line per disk.
pub fn disk_table(disks: &[BlockServiceInfo], now: Time) -> String {
    let header = ["DISK", "CLASS", "DOMAIN", "CAPACITY", "USED", "AVAILABLE", "BLOCKS", "STATE", "PATH"];
    let mut table = table(&header, &[3, 4, 5, 6]);
    for disk in disks {
        table.add_row([
            BlockServiceId(disk.id).to_string(),
            class_name(disk.storage_class),
            disk.failure_domain.clone(),
            size(disk.capacity_bytes),
            size(disk.used_bytes),
            size(disk.available_bytes),
            disk.blocks.to_string(),
            disk_state(disk, now),
            format!("{} {}", disk.address, disk.path),
        ]);
    }
    table_text(&table)
}

/// `ok`, or everything that is the matter.
pub fn disk_state(disk: &BlockServiceInfo, now: Time) -> String {
    let mut words: Vec<String> = flags::names(disk.flags).into_iter().map(str::to_owned).collect();
    if disk.flags & flags::STALE != 0 {
        words.push(format!("last seen {}", times::age(Time(disk.last_seen), now)));
    }
    if disk.read_only {
        words.push("read-only".to_owned());
    }
    if disk.io_errors > 0 {
        words.push(format!("{} io errors", disk.io_errors));
    }
    if disk.reported_blocks > 0 {
        words.push(format!("{} bad blocks reported", disk.reported_blocks));
    }
    if !disk.problem.is_empty() {
        words.push(crate::paths::escape(disk.problem.as_bytes()));
    }
    if words.is_empty() { "ok".to_owned() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(class: u32, flags: u32) -> BlockServiceInfo {
        BlockServiceInfo {
            id: 7,
            storage_class: class,
            failure_domain: "rack1".into(),
            address: "127.0.0.1:5000".into(),
            path: "/disks/00".into(),
            flags,
            capacity_bytes: 1 << 40,
            available_bytes: 3 << 38,
            used_bytes: 1 << 38,
            blocks: 12,
            last_seen: 1_000_000_000,
            ..BlockServiceInfo::default()
        }
    }

    #[test]
    fn space_is_summed_by_class() {
        let classes = classes(&[disk(3, 0), disk(2, 0), disk(3, flags::LOST)]);
        assert_eq!(classes.len(), 2);
        assert_eq!((classes[0].class.as_str(), classes[0].disks), ("HDD", 1));
        assert_eq!(
            (classes[1].disks, classes[1].disks_writable, classes[1].available_bytes),
            (2, 1, 3 << 38),
            "nothing can be written to a lost disk"
        );
    }

    #[test]
    fn golden_tables() {
        assert_eq!(
            class_table(&classes(&[disk(3, 0), disk(3, flags::LOST)])),
            "CLASS   DISKS  CAPACITY       USED  AVAILABLE   USE  BLOCKS\n\
             FLASH  1 of 2   2.0 TiB  512.0 GiB  768.0 GiB  40 %      24"
        );
        assert_eq!(
            disk_table(&[disk(3, flags::STALE)], Time(10_000_000_000)),
            "DISK                CLASS  DOMAIN  CAPACITY       USED  AVAILABLE  BLOCKS  STATE                    PATH\n\
             0x0000000000000007  FLASH  rack1    1.0 TiB  256.0 GiB  768.0 GiB      12  STALE, last seen 9s ago  127.0.0.1:5000 /disks/00"
                .replace("0x0000000000000007", &BlockServiceId(7).to_string())
        );
    }
}
