//! `disk`: disks looked at, emptied, given up, flagged.

use clap::{Args, Subcommand};
use eggs_client::Client;
use eggs_proto::{BlockServiceId, flags, pb};
use eggs_shuckle_core::repairs::{Emptying, emptying, progress};
use serde::Serialize;

use crate::cli::{JsonFlag, SecretArgs};
use crate::commands::df::{JsonDisk, disk_table, in_order};
use crate::commands::policy::shortages;
use crate::context::{Context, failure};
use crate::failure::{Failure, Outcome};
use crate::members::heard_map;
use crate::output::complain;
use crate::progress::Line;

/// Look at disks, empty them, give them up
#[derive(Debug, Args)]
#[command(visible_alias = "disks")]
pub struct Disk {
    #[command(subcommand)]
    command: DiskCommand,
}

#[derive(Debug, Subcommand)]
enum DiskCommand {
    /// List the disks: space, flags, what is the matter, and how far those are that are to be emptied
    ///
    /// Example: eggsctl disk ls
    Ls(DiskList),
    /// Empty disks that work: no new blocks, and the janitor moves what is there to others
    ///
    /// Every file stays as safe as it is: blocks are copied before they go. Can be undone until the disk is taken
    /// away. Example: eggsctl disk drain 0x00c0ffee00c0ffee --wait; later: eggsctl disk drain 0x00c0ffee00c0ffee --undo
    Drain(DiskDrain),
    /// Give up disks that are gone for good or not to be trusted: their blocks are made anew from the others
    ///
    /// The janitor does it by itself when a disk was away for --lost-after, if it is not too many at once. Nothing is
    /// read from them any more: for a disk that works, `disk drain` is safer.
    /// Example: eggsctl disk decommission 0x00c0ffee00c0ffee --wait
    Decommission(DiskDecommission),
    /// Take disks off the list that are gone for good: given up, away or lost, and empty
    ///
    /// Until then `disk ls` has them, so that nobody forgets what is still to be repaired. A disk that comes back later is as a
    /// new one. A cluster of `eggsctl up` makes a new disk in the empty or missing folder of one that was given up and is
    /// empty, or was forgotten, when it is stopped and started again.
    /// Example: eggsctl disk forget 0x00c0ffee00c0ffee
    Forget(Chosen),
    /// Set and clear flags of disks: NO_READ, NO_WRITE, DECOMMISSIONED
    ///
    /// Example: eggsctl disk set-flags /disks/03 --set NO_WRITE
    SetFlags(DiskSetFlags),
}

#[derive(Debug, Args)]
struct DiskList {
    #[command(flatten)]
    json: JsonFlag,
}

/// Which disks.
#[derive(Debug, Args)]
struct Chosen {
    /// Disks: their ids as `eggsctl disk ls` prints them, or their folders when only one disk has that
    #[arg(value_name = "DISK", required = true)]
    disks: Vec<String>,
    #[command(flatten)]
    json: JsonFlag,
    #[command(flatten)]
    secret: SecretArgs,
}

#[derive(Debug, Args)]
struct DiskDrain {
    #[command(flatten)]
    chosen: Chosen,
    /// They take part again; what was moved stays where it is
    #[arg(long, conflicts_with = "wait")]
    undo: bool,
    /// Wait until they are empty, however long it takes without --timeout
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Args)]
struct DiskDecommission {
    #[command(flatten)]
    chosen: Chosen,
    /// Also disks that can be read, or several at once
    #[arg(short, long)]
    yes: bool,
    /// Wait until all of their blocks are made anew, however long it takes without --timeout
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, Args)]
struct DiskSetFlags {
    #[command(flatten)]
    chosen: Chosen,
    /// Flags to set, with commas between
    #[arg(long, value_name = "FLAG,…", value_delimiter = ',', value_parser = flag)]
    set: Vec<u32>,
    /// Flags to clear
    #[arg(long, value_name = "FLAG,…", value_delimiter = ',', value_parser = flag)]
    clear: Vec<u32>,
}

fn flag(text: &str) -> Result<u32, String> {
    match text.to_ascii_uppercase().replace('-', "_").as_str() {
        "NO_READ" => Ok(flags::NO_READ),
        "NO_WRITE" => Ok(flags::NO_WRITE),
        "DECOMMISSIONED" => Ok(flags::DECOMMISSIONED),
        _ => Err("NO_READ, NO_WRITE or DECOMMISSIONED is expected; the others follow from what is heard"
            .to_owned()),
    }
}

#[derive(Debug, Serialize)]
struct JsonListed {
    #[serde(flatten)]
    disk: JsonDisk,
    /// Of one that is to be emptied: "empty", "going", "waiting".
    #[serde(skip_serializing_if = "Option::is_none")]
    emptying: Option<&'static str>,
    /// How far, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<String>,
}

impl Disk {
    pub async fn run(self, context: &Context) -> Outcome {
        match self.command {
            DiskCommand::Ls(list) => {
                let map = heard_map(context.client().await?).await?;
                print(context, map, &[], list.json.json)
            }
            DiskCommand::Drain(drain) => {
                let set = flags::DECOMMISSIONED;
                if drain.undo {
                    return drain
                        .chosen
                        .change(context, 0, flags::DECOMMISSIONED | flags::NO_READ, |_, _| Ok(()))
                        .await;
                }
                drain.chosen.change(context, set, 0, |_, _| Ok(())).await?;
                drain.chosen.wait(context, drain.wait).await
            }
            DiskCommand::Decommission(given_up) => {
                let yes = given_up.yes;
                let set = flags::DECOMMISSIONED | flags::NO_READ;
                let judge =
                    |map: &pb::ClusterMapReply, ids: &[u64]| if yes { Ok(()) } else { risk(map, ids) };
                given_up.chosen.change(context, set, 0, judge).await?;
                given_up.chosen.wait(context, given_up.wait).await
            }
            DiskCommand::Forget(chosen) => chosen.forget(context).await,
            DiskCommand::SetFlags(typed) => {
                let all = |flags: &[u32]| flags.iter().fold(0, |all, flag| all | flag);
                let (set, clear) = (all(&typed.set), all(&typed.clear));
                if set | clear == 0 {
                    return Err(Failure::Usage("nothing to change: say --set or --clear".to_owned()));
                }
                if set & clear != 0 {
                    return Err(Failure::Usage("the same flag is to be set and cleared".to_owned()));
                }
                typed.chosen.change(context, set, clear, |_, _| Ok(())).await
            }
        }
    }
}

impl Chosen {
    /// Sets and clears flags, unless `judge` finds it too dangerous.
    async fn change(
        &self,
        context: &Context,
        set: u32,
        clear: u32,
        judge: impl FnOnce(&pb::ClusterMapReply, &[u64]) -> Outcome,
    ) -> Outcome {
        let client = context.admin(&self.secret).await?;
        let map = heard_map(client).await?;
        let ids = self.ids(&map)?;
        judge(&map, &ids)?;
        client.set_flags(&ids, set, clear).await.map_err(|error| failure("", error))?;
        let map = client.cluster_map().await.map_err(|error| failure("", error))?;
        let takes_away = set & (flags::DECOMMISSIONED | flags::NO_WRITE) != 0;
        let warnings = match client.policies("/").await {
            Ok(policies) if takes_away => shortages(&policies.effective, &map.block_services),
            _ => Vec::new(),
        };
        print(context, map, &ids, self.json.json)?;
        for warning in warnings {
            complain(&format!("warning: {warning}"));
        }
        Ok(())
    }

    async fn forget(&self, context: &Context) -> Outcome {
        let client = context.admin(&self.secret).await?;
        let map = heard_map(client).await?;
        let ids = self.ids(&map)?;
        client.forget_block_services(&ids).await.map_err(|error| failure("", error))?;
        let forgotten: Vec<JsonDisk> =
            map.block_services.iter().filter(|info| ids.contains(&info.id)).map(JsonDisk::of).collect();
        let mut out = context.out();
        if self.json.json {
            out.json(&forgotten)?;
        }
        out.finish()
    }

    fn ids(&self, map: &pb::ClusterMapReply) -> Outcome<Vec<u64>> {
        self.disks.iter().map(|typed| find(map, typed)).collect()
    }

    async fn wait(&self, context: &Context, wait: bool) -> Outcome {
        if !wait {
            return Ok(());
        }
        let client: &Client = context.client().await?;
        let map = client.cluster_map().await.map_err(|error| failure("", error))?;
        let ids = self.ids(&map)?;
        let (mut line, mut left) = (Line::start(), String::new());
        let timeout = context.global.wait_timeout();
        let done = client.wait_for(timeout, |map| match not_empty(map, &ids) {
            None => Some(()),
            Some(words) => {
                left = words;
                line.say(&left);
                None
            }
        });
        match done.await.map_err(|error| failure("", error))? {
            Some(()) => Ok(()),
            None => {
                let seconds = timeout.as_secs_f64();
                let reason = format!("not empty after {seconds:.0} s: {left}; the cluster goes on with it");
                Err(Failure::refused("", reason))
            }
        }
    }
}

/// The first disk that is not empty, and how far it is.
fn not_empty(map: &pb::ClusterMapReply, ids: &[u64]) -> Option<String> {
    let mut waited = emptying(map).into_iter().filter(|(info, _)| ids.contains(&info.id));
    let (info, state) = waited.find(|(_, state)| *state != Emptying::Empty)?;
    Some(format!("{}: {}", info.path, words(info, &state)))
}

fn words(info: &pb::BlockServiceInfo, state: &Emptying<'_>) -> String {
    match state {
        Emptying::Empty if info.flags & (flags::STALE | flags::LOST) != 0 => {
            "gone, and nothing of it is missed: `eggsctl disk forget` takes it off this list".to_owned()
        }
        Emptying::Empty => "empty: it can be taken away".to_owned(),
        Emptying::Going(task) => progress(task),
        Emptying::Waiting => "it waits for the janitor".to_owned(),
    }
}

/// A disk by its id or its folder.
fn find(map: &pb::ClusterMapReply, typed: &str) -> Outcome<u64> {
    let number = typed.strip_prefix("0x").unwrap_or(typed);
    let id = u64::from_str_radix(number, 16).ok();
    let fits = |info: &&pb::BlockServiceInfo| Some(info.id) == id || info.path == typed;
    let mut found = map.block_services.iter().filter(fits);
    match (found.next(), found.next()) {
        (Some(info), None) => Ok(info.id),
        (Some(_), Some(_)) => Err(Failure::refused(typed, "several disks have this folder: say the id")),
        (None, _) => Err(Failure::refused(typed, "no such disk; `eggsctl disk ls` lists them")),
    }
}

/// What may be lost when these are given up.
fn risk(map: &pb::ClusterMapReply, ids: &[u64]) -> Outcome {
    let asked = |info: &&pb::BlockServiceInfo| ids.contains(&info.id);
    if let Some(alive) = map.block_services.iter().filter(asked).find(|info| flags::readable(info.flags)) {
        let reason = "it can be read: `eggsctl disk drain` moves its blocks and no file is less safe meanwhile; --yes gives it up";
        return Err(Failure::refused(&alive.path, reason));
    }
    let states = emptying(map);
    let gone = states.iter().filter(|(info, state)| {
        *state != Emptying::Empty && !flags::readable(info.flags) && !ids.contains(&info.id)
    });
    let gone = gone.count() + ids.len();
    if gone > 1 {
        let reason = format!(
            "{gone} disks would be given up at the same time: files with less parity would be lost if one of them can come back; --yes does it"
        );
        return Err(Failure::refused("", reason));
    }
    Ok(())
}

/// These disks, or all.
fn print(context: &Context, map: pb::ClusterMapReply, ids: &[u64], json: bool) -> Outcome {
    let states: Vec<(u64, Emptying<'_>)> =
        emptying(&map).into_iter().map(|(info, state)| (info.id, state)).collect();
    let state_of = |id: u64| states.iter().find(|(of, _)| *of == id).map(|(_, state)| state);
    let mut disks: Vec<pb::BlockServiceInfo> =
        map.block_services.iter().filter(|info| ids.is_empty() || ids.contains(&info.id)).cloned().collect();
    in_order(&mut disks);
    let mut out = context.out();
    if json {
        let listed = |info: &pb::BlockServiceInfo| JsonListed {
            disk: JsonDisk::of(info),
            emptying: state_of(info.id).map(|state| match state {
                Emptying::Empty => "empty",
                Emptying::Going(_) => "going",
                Emptying::Waiting => "waiting",
            }),
            progress: state_of(info.id).map(|state| words(info, state)),
        };
        out.json(&disks.iter().map(listed).collect::<Vec<_>>())?;
    } else if disks.is_empty() {
        out.line("no disks have registered yet")?;
    } else {
        out.line(disk_table(&disks, eggs_proto::Time(map.now)))?;
        for disk in &disks {
            if let Some(words) = state_of(disk.id).map(|state| words(disk, state)) {
                out.line(format_args!("{}: {words}", BlockServiceId(disk.id)))?;
            }
        }
    }
    out.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(flags: &[u32]) -> pb::ClusterMapReply {
        let info = |(id, &flags): (u64, &u32)| pb::BlockServiceInfo {
            id,
            flags,
            path: format!("/disks/{id}"),
            ..pb::BlockServiceInfo::default()
        };
        pb::ClusterMapReply { block_services: (0xa0..).zip(flags).map(info).collect(), ..Default::default() }
    }

    #[test]
    fn disks_are_found_by_id_and_folder() {
        let mut map = map(&[0, 0]);
        assert_eq!(find(&map, "0x00000000000000a1").unwrap(), 0xa1);
        assert_eq!(find(&map, "a1").unwrap(), 0xa1);
        assert_eq!(find(&map, "/disks/160").unwrap(), 0xa0);
        assert!(find(&map, "/disks/9").is_err());
        map.block_services[1].path = "/disks/160".to_owned();
        assert!(find(&map, "/disks/160").is_err(), "two have it");
    }

    #[test]
    fn what_may_lose_data_needs_yes() {
        assert!(risk(&map(&[0, 0]), &[0xa0]).is_err(), "it can be read");
        assert!(risk(&map(&[flags::LOST, 0]), &[0xa0]).is_ok());
        assert!(risk(&map(&[flags::LOST, flags::STALE]), &[0xa0, 0xa1]).is_err(), "two at once");
        assert!(
            risk(&map(&[flags::LOST, flags::LOST | flags::DECOMMISSIONED]), &[0xa0]).is_err(),
            "a second one"
        );
    }

    #[test]
    fn flags_are_typed_as_they_are_printed() {
        assert_eq!(flag("no-write"), Ok(flags::NO_WRITE));
        assert_eq!(flag("DECOMMISSIONED"), Ok(flags::DECOMMISSIONED));
        assert!(flag("LOST").is_err());
    }
}
