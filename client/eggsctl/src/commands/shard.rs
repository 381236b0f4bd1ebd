//! `shard`: who replicates and leads the shards, the coordinator and the registry, and changes of it.

use clap::{Args, Subcommand};
use eggs_client::Client;
use eggs_proto::{GroupId, StoreId, pb};
use serde::Serialize;

use crate::cli::{JsonFlag, SecretArgs};
use crate::context::{Context, failure};
use crate::failure::{Failure, Outcome};
use crate::members::{GROUPS_HELP, Groups, JsonStore, View, is_settled, same_set, wanted};
use crate::output::{table, table_text};
use crate::progress::Line;

/// Look at replicas of metadata, add, remove and move them, and say who leads
///
/// Every shard, the coordinator (crossdir) and the registry (shuckle) is a group of replicas on different
/// hosts. The cluster keeps their number and spreads them by itself; these commands are for who wants it
/// otherwise.
#[derive(Debug, Args)]
pub struct Shard {
    #[command(subcommand)]
    command: ShardCommand,
}

#[derive(Debug, Subcommand)]
enum ShardCommand {
    /// Print who replicates and leads each group, and how far behind each replica is
    ///
    /// Example: eggsctl shard replicas 0-15,crossdir
    Replicas(Replicas),
    /// Give a group one more replica: it gets a copy first, then a vote
    ///
    /// Example: eggsctl shard add-replica 7 host-d
    AddReplica(OneHost),
    /// Take the replica on a host away
    ///
    /// Refused when too few would be left to be safe; --force does it all the same.
    /// Example: eggsctl shard remove-replica 7 host-a
    RemoveReplica(OneHost),
    /// Move a replica to another host: the new one gets its copy and its vote before the old one goes
    ///
    /// Example: eggsctl shard move-replica 0-15 host-a host-d
    MoveReplica(TwoHosts),
    /// Have the replica on a host lead
    ///
    /// It goes on being preferred, when it has been away and is back too, until the cluster spreads its leaders
    /// anew: it keeps them even.
    /// Example: eggsctl shard transfer-leader 0-85 host-a
    TransferLeader(OneHost),
}

#[derive(Debug, Args)]
struct Replicas {
    #[arg(value_name = "SHARD", value_parser = Groups::parse, help = format!("{GROUPS_HELP} [default: all]"))]
    groups: Vec<Groups>,
    #[command(flatten)]
    json: JsonFlag,
}

#[derive(Debug, Args)]
struct OneHost {
    #[arg(value_name = "SHARD", value_parser = Groups::parse, help = GROUPS_HELP)]
    groups: Groups,
    /// The host, by name: `eggsctl host ls` lists them
    #[arg(value_name = "HOST")]
    host: String,
    #[command(flatten)]
    change: Change,
}

#[derive(Debug, Args)]
struct TwoHosts {
    #[arg(value_name = "SHARD", value_parser = Groups::parse, help = GROUPS_HELP)]
    groups: Groups,
    /// The host that has the replica
    #[arg(value_name = "FROM")]
    from: String,
    /// The host that is to have it
    #[arg(value_name = "TO")]
    to: String,
    #[command(flatten)]
    change: Change,
}

#[derive(Debug, Args)]
struct Change {
    /// Even when too few replicas would be left to be safe, or a host is away
    #[arg(long)]
    force: bool,
    /// Do not wait until it is so
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    json: JsonFlag,
    #[command(flatten)]
    secret: SecretArgs,
}

/// A look may be at what was before we asked; so many in a row are not.
const OVERRULED_LOOKS: u32 = 5;

/// What is to become of a group.
struct Goal {
    group: GroupId,
    wanted: Vec<StoreId>,
    leader: Option<StoreId>,
}

impl Goal {
    /// The members are as wanted, and it is led by who is to lead.
    fn is_reached(&self, place: &pb::GroupPlace) -> bool {
        let wanted: Vec<u64> = self.wanted.iter().map(|store| store.0).collect();
        let place = pb::GroupPlace { wanted, ..place.clone() };
        is_settled(&place) && self.leader.is_none_or(|leader| leader.0 == place.leader)
    }

    /// The group is to be something else by now.
    fn is_overruled(&self, place: &pb::GroupPlace) -> bool {
        let goal: Vec<u64> = self.wanted.iter().map(|store| store.0).collect();
        let other_leader = |leader: StoreId| place.preferred != 0 && place.preferred != leader.0;
        !same_set(&goal, wanted(place)) || self.leader.is_some_and(other_leader)
    }
}

impl Shard {
    pub async fn run(self, context: &Context) -> Outcome {
        match self.command {
            ShardCommand::Replicas(command) => command.run(context).await,
            ShardCommand::AddReplica(OneHost { groups, host, change }) => {
                let add = |view: &View<'_>, place: &pb::GroupPlace, group| {
                    let (mut wanted, new) = (stores(place), view.store_on(&host, group)?);
                    if !wanted.contains(&new) {
                        wanted.push(new);
                    }
                    Ok(Goal { group, wanted, leader: None })
                };
                change.run(context, &groups, add).await
            }
            ShardCommand::RemoveReplica(OneHost { groups, host, change }) => {
                let remove = |view: &View<'_>, place: &pb::GroupPlace, group| {
                    let old = replica_on(view, place, group, &host)?;
                    let mut wanted = stores(place);
                    wanted.retain(|&store| store != old);
                    if wanted.is_empty() {
                        return Err(Failure::refused(
                            group,
                            "its only replica cannot be taken away: move it",
                        ));
                    }
                    Ok(Goal { group, wanted, leader: None })
                };
                change.run(context, &groups, remove).await
            }
            ShardCommand::MoveReplica(TwoHosts { groups, from, to, change }) => {
                let exchange = |view: &View<'_>, place: &pb::GroupPlace, group| {
                    let (old, new) = (replica_on(view, place, group, &from)?, view.store_on(&to, group)?);
                    let mut wanted = stores(place);
                    if wanted.contains(&new) {
                        return Err(Failure::refused(group, format!("{to} has a replica of it already")));
                    }
                    wanted.retain(|&store| store != old);
                    wanted.push(new);
                    // Who replaces the one that was to lead is to lead.
                    let leader = (place.preferred == old.0).then_some(new);
                    Ok(Goal { group, wanted, leader })
                };
                change.run(context, &groups, exchange).await
            }
            ShardCommand::TransferLeader(OneHost { groups, host, change }) => {
                let transfer = |view: &View<'_>, place: &pb::GroupPlace, group| {
                    let leader = Some(replica_on(view, place, group, &host)?);
                    Ok(Goal { group, wanted: stores(place), leader })
                };
                change.run(context, &groups, transfer).await
            }
        }
    }
}

fn stores(place: &pb::GroupPlace) -> Vec<StoreId> {
    wanted(place).iter().copied().map(StoreId).collect()
}

/// The replica of a group on a host; an older store of the host may have it.
fn replica_on(view: &View<'_>, place: &pb::GroupPlace, group: GroupId, host: &str) -> Outcome<StoreId> {
    let on_host = |store: &&u64| view.store(**store).is_some_and(|store| store.host == host);
    if let Some(&store) = wanted(place).iter().find(on_host) {
        return Ok(StoreId(store));
    }
    view.store_on(host, group)?;
    let on = view.hosts(wanted(place));
    Err(Failure::refused(group, format!("it has no replica on {host}: it is on {on}")))
}

impl Change {
    async fn run(
        self,
        context: &Context,
        groups: &Groups,
        goal: impl Fn(&View<'_>, &pb::GroupPlace, GroupId) -> Outcome<Goal>,
    ) -> Outcome {
        let client = context.admin(&self.secret).await?;
        let map = client.cluster_map().await.map_err(|error| failure("", error))?;
        let view = View::new(&map);
        // All of it makes sense before any of it is asked for.
        let goals = Groups::of(std::slice::from_ref(groups))
            .into_iter()
            .map(|group| goal(&view, view.group(group)?, group))
            .collect::<Outcome<Vec<Goal>>>()?;
        for goal in &goals {
            let asked = client.set_replicas(goal.group, &goal.wanted, goal.leader, self.force).await;
            // The registry's words name the group.
            asked.map_err(|error| failure("", error))?;
        }
        if !self.no_wait {
            wait(context, client, &goals).await?;
        }
        let map = client.cluster_map().await.map_err(|error| failure("", error))?;
        let groups: Vec<GroupId> = goals.iter().map(|goal| goal.group).collect();
        print(context, &map, &groups, self.json)
    }
}

/// Where the way to a goal has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Something else has been wanted for so many looks.
    Open {
        overruled: u32,
    },
    /// It was so; what the cluster does of its own accord after that is not waited for.
    Reached,
    Overruled,
}

impl Goal {
    fn look(&self, way: Way, view: &View<'_>) -> Way {
        let (Way::Open { overruled }, Ok(place)) = (way, view.group(self.group)) else { return way };
        match self.is_overruled(place) {
            _ if self.is_reached(place) => Way::Reached,
            true if overruled + 1 >= OVERRULED_LOOKS => Way::Overruled,
            true => Way::Open { overruled: overruled + 1 },
            false => Way::Open { overruled: 0 },
        }
    }
}

/// Until everything is as it is to be, or is to be something else. Without --timeout: however long it takes.
async fn wait(context: &Context, client: &Client, goals: &[Goal]) -> Outcome {
    let mut line = Line::start();
    let mut left = String::new();
    let mut ways = vec![Way::Open { overruled: 0 }; goals.len()];
    let timeout = context.global.wait_timeout();
    let done = client.wait_for(timeout, |map| {
        let view = View::new(map);
        goals.iter().zip(&mut ways).for_each(|(goal, way)| *way = goal.look(*way, &view));
        let are_open = goals.iter().zip(&ways).filter(|(_, way)| matches!(way, Way::Open { .. }));
        let open: Vec<&Goal> = are_open.map(|(goal, _)| goal).collect();
        let Some(first) = open.first() else {
            let mut overruled = goals.iter().zip(&ways).filter(|(_, way)| **way == Way::Overruled);
            return Some(overruled.next().map(|(goal, _)| overruled_words(&view, goal, overruled.count())));
        };
        let about = view.group(first.group);
        let about = about.map_or_else(|_| "-".to_owned(), |place| missing(&view, first, place));
        left = match (goals.len(), open.len()) {
            (1, _) => format!("{}: {about}", first.group),
            (all, open) => format!("{} of {all} done; {}: {about}", all - open, first.group),
        };
        line.say(&left);
        None
    });
    match done.await.map_err(|error| failure("", error))? {
        Some(None) => Ok(()),
        Some(Some(overruled)) => Err(Failure::refused("", overruled)),
        None => {
            let seconds = timeout.as_secs_f64();
            Err(Failure::refused(
                left,
                format!("not yet so after {seconds:.0} s; the cluster goes on with it"),
            ))
        }
    }
}

fn overruled_words(view: &View<'_>, goal: &Goal, more: usize) -> String {
    let now = match view.group(goal.group) {
        Ok(place) if place.preferred != 0 => {
            format!("on {}, led by {}", view.hosts(wanted(place)), view.host(place.preferred))
        }
        Ok(place) => format!("on {}", view.hosts(wanted(place))),
        Err(_) => "nowhere".to_owned(),
    };
    let more = if more == 0 { String::new() } else { format!(" (and {more} more)") };
    format!(
        "{}{more}: the cluster, or somebody else, has decided otherwise since: it is to be {now}",
        goal.group
    )
}

/// What a group waits for.
fn missing(view: &View<'_>, goal: &Goal, place: &pb::GroupPlace) -> String {
    if !place.alive {
        return "it has no leader".to_owned();
    }
    let goal_stores: Vec<u64> = goal.wanted.iter().map(|store| store.0).collect();
    let new = goal_stores.iter().find(|store| !place.voters.contains(store));
    if let Some(&new) = new {
        let host = view.host(new);
        return match place.progress.iter().find(|progress| progress.store == new) {
            _ if !view.is_alive(new) => format!("waits for {host}, which is away"),
            Some(progress) if progress.snapshot_total > 0 => {
                let percent = crate::output::percent(progress.snapshot_sent, progress.snapshot_total);
                format!("{host} gets its copy, {percent}")
            }
            Some(progress) => format!("{host} catches up, {} behind", lag(place, progress)),
            None if place.learners.contains(&new) => format!("{host} gets its copy"),
            None => format!("{host} is to be added"),
        };
    }
    if let Some(&old) = place.voters.iter().find(|store| !goal_stores.contains(store)) {
        return format!("{} is to be taken away", view.host(old));
    }
    match goal.leader {
        Some(leader) if leader.0 != place.leader => {
            format!("led by {}, to be led by {}", view.host(place.leader), view.host(leader.0))
        }
        _ => "waits for its leader".to_owned(),
    }
}

fn lag(place: &pb::GroupPlace, progress: &pb::ReplicaProgress) -> u64 {
    place.applied_index.saturating_sub(progress.matched_index)
}

// ---- what is printed ----

#[derive(Debug, Serialize)]
struct JsonGroup {
    /// 0 to 255 the shards, 256 the coordinator, 257 the registry.
    group: u16,
    name: String,
    alive: bool,
    leader: Option<JsonStore>,
    term: u64,
    applied_index: u64,
    log_bytes: u64,
    voters: Vec<JsonReplica>,
    learners: Vec<JsonReplica>,
    wanted: Vec<JsonStore>,
    preferred: Option<JsonStore>,
    /// Has a leader and exactly the voters it is to have.
    settled: bool,
}

#[derive(Debug, Serialize)]
struct JsonReplica {
    #[serde(flatten)]
    store: JsonStore,
    /// Entries it is behind the leader; not known of one whose leader does not say.
    lag: Option<u64>,
    matched_index: Option<u64>,
    snapshot_sent_bytes: u64,
    snapshot_total_bytes: u64,
}

impl Replicas {
    async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let map = client.cluster_map().await.map_err(|error| failure("", error))?;
        let mut groups = Groups::of(&self.groups);
        if self.groups.is_empty() {
            // Those there are.
            let view = View::new(&map);
            groups.retain(|&group| view.group(group).is_ok());
        }
        print(context, &map, &groups, self.json)
    }
}

fn print(context: &Context, map: &pb::ClusterMapReply, groups: &[GroupId], json: JsonFlag) -> Outcome {
    let view = View::new(map);
    let places = groups.iter().map(|&group| view.group(group)).collect::<Outcome<Vec<&pb::GroupPlace>>>()?;
    let mut out = context.out();
    if json.json {
        out.json(&places.iter().map(|place| json_group(&view, place)).collect::<Vec<_>>())?;
    } else if places.is_empty() {
        out.line("no group has replicas yet: too few hosts have registered")?;
    } else {
        out.line(group_table(&view, &places))?;
    }
    out.finish()
}

fn group_table(view: &View<'_>, places: &[&pb::GroupPlace]) -> String {
    let mut table = table(&["GROUP", "LEADER", "VOTERS", "LEARNERS", "WANTED", "PREFERRED", "STATE"], &[]);
    for place in places {
        let leader = if place.alive { view.host(place.leader) } else { "-".to_owned() };
        let preferred = if place.preferred == 0 { "-".to_owned() } else { view.host(place.preferred) };
        table.add_row([
            group_of(place).to_string(),
            leader,
            replicas(view, place, &place.voters),
            replicas(view, place, &place.learners),
            view.hosts(wanted(place)),
            preferred,
            state(view, place).to_owned(),
        ]);
    }
    table_text(&table)
}

fn group_of(place: &pb::GroupPlace) -> GroupId {
    GroupId(u16::try_from(place.group).unwrap_or(u16::MAX))
}

fn state(view: &View<'_>, place: &pb::GroupPlace) -> &'static str {
    let voters = wanted(place);
    let alive = voters.iter().filter(|&&store| view.is_alive(store)).count();
    match () {
        () if alive * 2 <= voters.len() => "quorum lost",
        () if !place.alive => "no leader",
        () if !is_settled(place) => "changing",
        () if alive < voters.len() => "a replica is away",
        () => "ok",
    }
}

/// `a, b (12 behind), c (away)`.
fn replicas(view: &View<'_>, place: &pb::GroupPlace, stores: &[u64]) -> String {
    let one = |&store: &u64| {
        let host = view.host(store);
        let progress = place.progress.iter().find(|progress| progress.store == store);
        match progress {
            _ if !view.is_alive(store) => format!("{host} (away)"),
            Some(progress) if progress.snapshot_total > 0 => {
                let percent = crate::output::percent(progress.snapshot_sent, progress.snapshot_total);
                format!("{host} (copy {percent})")
            }
            Some(progress) if store != place.leader && lag(place, progress) > 0 => {
                format!("{host} ({} behind)", lag(place, progress))
            }
            _ => host,
        }
    };
    let mut texts: Vec<String> = stores.iter().map(one).collect();
    texts.sort_unstable();
    if texts.is_empty() { "-".to_owned() } else { texts.join(", ") }
}

fn json_group(view: &View<'_>, place: &pb::GroupPlace) -> JsonGroup {
    let replica = |&store: &u64| {
        let progress = place.progress.iter().find(|progress| progress.store == store);
        let own = (store == place.leader).then_some(place.applied_index);
        JsonReplica {
            store: view.json(store),
            lag: own.map(|_| 0).or(progress.map(|progress| lag(place, progress))),
            matched_index: own.or(progress.map(|progress| progress.matched_index)),
            snapshot_sent_bytes: progress.map_or(0, |progress| progress.snapshot_sent),
            snapshot_total_bytes: progress.map_or(0, |progress| progress.snapshot_total),
        }
    };
    let known = |store: u64| (store != 0).then(|| view.json(store));
    JsonGroup {
        group: group_of(place).0,
        name: group_of(place).to_string(),
        alive: place.alive,
        leader: known(place.leader).filter(|_| place.alive),
        term: place.term,
        applied_index: place.applied_index,
        log_bytes: place.log_bytes,
        voters: place.voters.iter().map(replica).collect(),
        learners: place.learners.iter().map(replica).collect(),
        wanted: wanted(place).iter().map(|&store| view.json(store)).collect(),
        preferred: known(place.preferred),
        settled: is_settled(place),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::tests::map;

    #[test]
    fn golden_replicas() {
        let mut map = map();
        map.stores[0].alive = false;
        let place = &mut map.groups[1];
        (place.learners, place.wanted) = (vec![14], vec![12, 13, 14]);
        place.progress.push(pb::ReplicaProgress {
            store: 14,
            snapshot_sent: 1,
            snapshot_total: 4,
            matched_index: 0,
        });
        map.groups[2].alive = false;
        let new = pb::StoreInfo { id: 14, host: "d".into(), ..map.stores[3].clone() };
        map.stores.push(new);
        let view = View::new(&map);
        let places: Vec<&pb::GroupPlace> = map.groups[..3].iter().chain(&map.groups[256..]).collect();
        assert_eq!(
            group_table(&view, &places),
            "GROUP     LEADER  VOTERS                    LEARNERS       WANTED   PREFERRED  STATE\n\
             shard 0   b       a (away), b, c (7 behind)  -              a, b, c  b          a replica is away\n\
             shard 1   b       a (away), b, c (7 behind)  d (copy 25 %)  b, c, d  b          changing\n\
             shard 2   -       a (away), b, c (7 behind)  -              a, b, c  b          no leader\n\
             crossdir  b       a, b, c (7 behind)         -              a, b, c  b          ok\n\
             shuckle   b       a, b, c (7 behind)         -              a, b, c  b          ok"
                .replace("VOTERS                    LEARNERS", "VOTERS                     LEARNERS")
        );
    }

    #[test]
    fn a_goal_is_reached_step_by_step() {
        let mut map = map();
        let new = pb::StoreInfo { id: 14, host: "d".into(), ..map.stores[3].clone() };
        map.stores.push(new);
        let goal = Goal {
            group: GroupId(0),
            wanted: vec![StoreId(12), StoreId(13), StoreId(14)],
            leader: Some(StoreId(14)),
        };
        let mut place = map.groups[0].clone();
        let step = |place: &pb::GroupPlace| (goal.is_reached(place), missing(&View::new(&map), &goal, place));
        assert_eq!(step(&place), (false, "d is to be added".to_owned()));
        place.learners = vec![14];
        assert_eq!(step(&place), (false, "d gets its copy".to_owned()));
        place.progress.push(pb::ReplicaProgress { store: 14, matched_index: 58, ..Default::default() });
        assert_eq!(step(&place), (false, "d catches up, 42 behind".to_owned()));
        (place.learners, place.voters) = (vec![], vec![11, 12, 13, 14]);
        assert_eq!(step(&place), (false, "a is to be taken away".to_owned()));
        place.voters = vec![12, 13, 14];
        assert_eq!(step(&place), (false, "led by b, to be led by d".to_owned()));
        place.leader = 14;
        assert!(step(&place).0);
    }

    #[test]
    fn a_wait_ends_when_it_was_so_or_is_to_be_something_else() {
        let map = map();
        let goal = |wanted: &[u64], leader| Goal {
            group: GroupId(0),
            wanted: wanted.iter().copied().map(StoreId).collect(),
            leader,
        };
        let begin = Way::Open { overruled: 0 };
        let two = goal(&[11, 12], None);
        let ways = (0..OVERRULED_LOOKS).scan(begin, |way, _| {
            *way = two.look(*way, &View::new(&map));
            Some(*way)
        });
        assert_eq!(ways.last(), Some(Way::Overruled));
        assert_eq!(
            overruled_words(&View::new(&map), &two, 2),
            "shard 0 (and 2 more): the cluster, or somebody else, has decided otherwise since: it is to be on a, b, c, led by b"
        );
        let led = goal(&[11, 12, 13], Some(StoreId(12)));
        assert_eq!(led.look(begin, &View::new(&map)), Way::Reached);
        let other = goal(&[11, 12, 13], Some(StoreId(13)));
        assert_eq!(other.look(begin, &View::new(&map)), Way::Open { overruled: 1 });
        assert_eq!(other.look(Way::Reached, &View::new(&map)), Way::Reached, "it was so");
    }
}
