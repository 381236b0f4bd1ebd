//! Several hosts and a network between them: elections, catching up, members that come and go, reads, sleep.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use eggs_consensus_core::eraftpb::MessageType;
use eggs_consensus_core::memory::{MemoryLog, MemorySnapshots, MemoryState, rows};
use eggs_consensus_core::{
    Grant, GroupId, Host, HostOptions, Now, PeerBatch, PeerMessage, Proposal, ProposalId, ReadTicket, Role,
    TICK, Wanted, eraftpb,
};
use eggs_machine::group::Applied;
use eggs_machine::{Machine, Outcome, Table, TableError, Tx};
use eggs_proto::{SessionId, StoreId, Time};

/// `key=value` stores a row and answers the old value.
struct KeyValue;

impl Machine for KeyValue {
    type Effect = ();

    fn genesis<T: Table + ?Sized>(&self, tx: &mut Tx<'_, T>) -> Result<(), TableError> {
        tx.put(&b"born"[..], &b"yes"[..])
    }

    fn apply<T: Table + ?Sized>(
        &self,
        tx: &mut Tx<'_, T>,
        _time: Time,
        command: &[u8],
    ) -> Result<Outcome<()>, TableError> {
        let at = command.iter().position(|&byte| byte == b'=').unwrap_or(command.len());
        let (key, value) = (command[..at].to_vec(), command[at..].to_vec());
        let old = tx.get(&key)?.unwrap_or_default();
        tx.put(key, value)?;
        Ok(Outcome { reply: old, effects: Vec::new() })
    }
}

type TestHost = Host<KeyValue, MemoryLog, MemoryState, MemorySnapshots>;

const GROUP: GroupId = GroupId(3);

/// Hosts by store, and batches on their way.
struct Net {
    hosts: BTreeMap<u64, TestHost>,
    stores: BTreeMap<u64, (MemoryLog, MemoryState, MemorySnapshots)>,
    mail: VecDeque<(u64, u64, PeerBatch)>,
    /// Pairs (from, to) whose mail is lost.
    cut: BTreeSet<(u64, u64)>,
    now: u64,
    skew: BTreeMap<u64, i64>,
    boots: u64,
    lease: bool,
    answered: BTreeMap<(u64, ProposalId), Applied<()>>,
    dropped: BTreeSet<(u64, ProposalId)>,
    confirmed: BTreeSet<(u64, ReadTicket)>,
    lost: BTreeSet<(u64, ReadTicket)>,
    sent: u64,
}

fn stores(ids: &[u64]) -> Vec<StoreId> {
    ids.iter().copied().map(StoreId).collect()
}

impl Net {
    fn new(ids: &[u64], groups: &[GroupId], lease: bool) -> Net {
        let mut net = Net {
            hosts: BTreeMap::new(),
            stores: BTreeMap::new(),
            mail: VecDeque::new(),
            cut: BTreeSet::new(),
            now: 1_000,
            skew: BTreeMap::new(),
            boots: 0,
            lease,
            answered: BTreeMap::new(),
            dropped: BTreeSet::new(),
            confirmed: BTreeSet::new(),
            lost: BTreeSet::new(),
            sent: 0,
        };
        for &id in ids {
            net.start(id);
            let groups: Vec<_> = groups.iter().map(|&group| (group, stores(ids))).collect();
            net.hosts.get_mut(&id).unwrap().found(&groups).unwrap();
        }
        net
    }

    fn start(&mut self, id: u64) {
        self.boots += 1;
        let (log, state, snapshots) = self.stores.remove(&id).unwrap_or_default();
        let seed = self.boots * 77;
        let options =
            HostOptions { store: StoreId(id), seed, lease: self.lease, snapshot_bytes_per_second: 64 << 20 };
        self.hosts.insert(id, Host::open(options, |_| Some(KeyValue), log, state, snapshots).unwrap());
    }

    fn crash(&mut self, id: u64) {
        let (log, state, snapshots) = self.hosts.remove(&id).unwrap().into_stores();
        self.stores.insert(id, (log.crashed(), state.crashed(), snapshots.crashed()));
        self.mail.retain(|&(from, to, _)| from != id && to != id);
    }

    fn clock(&self, id: u64) -> Now {
        let wall = (self.now as i64 + 1_000_000_000_000 + self.skew.get(&id).copied().unwrap_or(0)) as u64;
        Now { monotonic: std::time::Duration::from_nanos(self.now), wall: Time(wall) }
    }

    fn host(&mut self, id: u64) -> &mut TestHost {
        self.hosts.get_mut(&id).unwrap()
    }

    /// Turns and mail until nothing moves, and nothing is held any more.
    fn settle(&mut self) {
        loop {
            self.exchange();
            let held = self.hosts.iter().filter_map(|(&id, host)| Some((host.held_until()?, id)));
            let Some((at, id)) = held.min() else { return };
            self.now = self.now.max(at.as_nanos() as u64);
            self.turn(id);
        }
    }

    /// Turns and mail until nothing moves.
    fn exchange(&mut self) {
        loop {
            let mut moved = false;
            for id in self.hosts.keys().copied().collect::<Vec<_>>() {
                while self.hosts[&id].has_work() {
                    moved = true;
                    self.turn(id);
                }
            }
            while let Some((from, to, batch)) = self.mail.pop_front() {
                self.now += 10_000;
                let now = self.clock(to);
                if !self.cut.contains(&(from, to))
                    && let Some(host) = self.hosts.get_mut(&to)
                {
                    host.receive(StoreId(from), batch, now).unwrap();
                    moved = true;
                }
            }
            if !moved {
                return;
            }
        }
    }

    fn turn(&mut self, id: u64) {
        let now = self.clock(id);
        let mut out = Vec::new();
        let turn = self.host(id).turn(now, &mut |to, batch| out.push((to, batch))).unwrap();
        self.sent += out.len() as u64;
        self.mail.extend(out.into_iter().map(|(to, batch)| (id, to.0, batch)));
        let answers = turn.answers.into_iter();
        self.answered.extend(answers.filter_map(|answer| Some(((id, answer.proposal?), answer.applied))));
        self.dropped.extend(turn.dropped.into_iter().map(|proposal| (id, proposal)));
        self.confirmed.extend(turn.confirmed.into_iter().map(|ticket| (id, ticket)));
        self.lost.extend(turn.lost.into_iter().map(|ticket| (id, ticket)));
    }

    fn tick(&mut self) {
        self.now += TICK.as_nanos() as u64;
        for id in self.hosts.keys().copied().collect::<Vec<_>>() {
            self.host(id).tick().unwrap();
            self.turn(id);
        }
        self.settle();
    }

    fn ticks(&mut self, count: u32) {
        for _ in 0..count {
            self.tick();
        }
    }

    fn leader_of(&self, group: GroupId) -> Option<u64> {
        let mut leaders =
            self.hosts.iter().filter(|(_, host)| matches!(host.role(group), Role::Leader { .. }));
        leaders.next().map(|(&id, _)| id)
    }

    fn elect(&mut self) -> u64 {
        self.settle();
        for _ in 0..60 {
            if let Some(leader) = self.leader_of(GROUP) {
                return leader;
            }
            self.tick();
        }
        let all: Vec<_> = self.hosts.values().map(|host| host.status(GROUP)).collect();
        panic!("no leader within 6 s: {all:#?}");
    }

    fn propose(&mut self, id: u64, sequence: u64, command: &str) -> ProposalId {
        let command = Bytes::copy_from_slice(command.as_bytes());
        let proposal = Proposal { time: Time(sequence), session: SessionId(1), sequence, command };
        self.host(id).propose(GROUP, proposal).unwrap()
    }

    fn write(&mut self, id: u64, sequence: u64, command: &str) -> Bytes {
        let proposal = self.propose(id, sequence, command);
        self.settle();
        match self.answered.remove(&(id, proposal)) {
            Some(Applied::Ran(outcome)) => outcome.reply,
            Some(Applied::Repeated(reply)) => reply,
            other => panic!("{command}: {other:?}"),
        }
    }

    fn want(&mut self, group: GroupId, voters: &[u64], preferred: Option<u64>) {
        let wanted = Wanted {
            voters: stores(voters),
            preferred: preferred.map(StoreId),
            known: eggs_consensus_core::Membership::default(),
        };
        for host in self.hosts.values_mut() {
            host.want(group, wanted.clone()).unwrap();
        }
    }

    fn same_everywhere(&self, ids: &[u64]) {
        let all: Vec<_> = ids.iter().map(|id| rows(self.hosts[id].local_view(GROUP).unwrap())).collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
        let status = self.hosts[&ids[0]].status(GROUP).unwrap();
        for id in ids {
            let other = self.hosts[id].status(GROUP).unwrap();
            assert_eq!((other.state_hash, other.applied_index), (status.state_hash, status.applied_index));
        }
    }
}

#[test]
fn what_is_answered_survives_the_leader_and_is_answered_the_same_again() {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], false);
    let leader = net.elect();
    assert_eq!(net.write(leader, 1, "a=1"), "");
    assert_eq!(net.write(leader, 2, "a=2"), "=1");
    net.crash(leader);
    let next = net.elect();
    assert_ne!(next, leader);
    assert_eq!(net.write(next, 2, "a=2"), "=1", "the first answer again");
    assert_eq!(net.write(next, 3, "a=3"), "=2");
    net.start(leader);
    net.ticks(30);
    net.same_everywhere(&[1, 2, 3]);
}

#[test]
fn a_leader_that_is_cut_off_answers_nothing_and_gives_up() {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], false);
    let leader = net.elect();
    let others: Vec<u64> = (1..=3).filter(|&id| id != leader).collect();
    for &other in &others {
        net.cut.extend([(leader, other), (other, leader)]);
    }
    let proposal = net.propose(leader, 1, "a=lost");
    let now = net.clock(leader);
    let Ok(Grant::Later(ticket)) = net.host(leader).read(GROUP, now) else { panic!("read without asking") };
    net.ticks(30);
    assert!(!net.answered.contains_key(&(leader, proposal)));
    assert!(net.dropped.contains(&(leader, proposal)), "it has to say so");
    assert!(net.lost.contains(&(leader, ticket)) && !net.confirmed.contains(&(leader, ticket)));
    let next = net.elect();
    assert!(others.contains(&next));
    assert_eq!(net.write(next, 1, "a=kept"), "");
    net.cut.clear();
    net.ticks(30);
    net.same_everywhere(&[1, 2, 3]);
    let stored = net.hosts[&leader].local_view(GROUP).unwrap().get(b"a").unwrap().unwrap();
    assert_eq!(stored, "=kept");
}

/// A group at rest with a leader; the follower that is hurried for, and the other.
fn led() -> (Net, u64, u64, u64) {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], false);
    let leader = net.elect();
    net.write(leader, 1, "a=1");
    (net, leader, leader % 3 + 1, (leader + 1) % 3 + 1)
}

fn last_in_log(net: &Net, id: u64) -> u64 {
    net.hosts[&id].log().ends(GROUP).unwrap().1
}

#[test]
fn what_a_quorum_decides_comes_to_the_others_a_little_later_and_together() {
    let (mut net, leader, hurried, other) = led();
    let before = last_in_log(&net, other);
    let began = net.now;
    for sequence in 2..5 {
        let proposal = net.propose(leader, sequence, "a=2");
        net.exchange();
        assert!(net.answered.contains_key(&(leader, proposal)), "decided by two");
    }
    assert_eq!((last_in_log(&net, hurried), last_in_log(&net, other)), (before + 3, before));
    assert!(net.now - began < 5_000_000);
    let sent = net.sent;
    let due = net.hosts[&leader].held_until().unwrap();
    assert!(due.as_nanos() as u64 <= began + 6_000_000);
    net.now = due.as_nanos() as u64;
    net.turn(leader);
    assert_eq!(net.sent, sent + 1, "all in one batch");
    net.exchange();
    assert_eq!(last_in_log(&net, other), before + 3);
}

/// What was decided is told, and read, while what came since is not even written.
#[test]
fn a_turn_answers_before_it_writes() {
    let (mut net, leader, hurried, _) = led();
    let first = net.propose(leader, 2, "a=2");
    net.turn(leader);
    while let Some((from, to, batch)) = net.mail.pop_front() {
        let now = net.clock(to);
        net.host(to).receive(StoreId(from), batch, now).unwrap();
        if to == hurried {
            net.turn(hurried);
        }
    }
    // Its answer is there; what is proposed now cannot be written.
    let second = net.propose(leader, 3, "a=3");
    net.hosts[&leader].log().fail_next("input/output error");
    let now = net.clock(leader);
    let (turn, begun) = net.host(leader).begin_turn(now, &mut |_, _| {}).unwrap();
    let answered: Vec<_> = turn.answers.iter().filter_map(|answer| answer.proposal).collect();
    assert_eq!(answered, [first]);
    assert!(matches!(net.host(leader).read(GROUP, now), Ok(Grant::Later(_))));
    assert_eq!(net.host(leader).local_view(GROUP).unwrap().get(b"a").unwrap().unwrap(), "=2");
    assert!(net.host(leader).end_turn(begun, now, &mut |_, _| {}).is_err());
    assert!(!net.answered.contains_key(&(leader, second)));
}

#[test]
fn without_the_one_it_hurries_for_a_leader_decides_with_the_other() {
    let (mut net, leader, hurried, other) = led();
    net.cut.extend([(leader, hurried), (hurried, leader)]);
    for sequence in 2..10 {
        let began = net.now;
        net.write(leader, sequence, "a=2");
        assert!(net.now - began < 6_000_000, "{sequence}");
    }
    // By now it is the other that is hurried for.
    let proposal = net.propose(leader, 10, "a=3");
    net.exchange();
    assert!(net.answered.contains_key(&(leader, proposal)));
    assert_eq!(last_in_log(&net, other), last_in_log(&net, leader));
    net.cut.clear();
    net.ticks(30);
    net.same_everywhere(&[1, 2, 3]);
}

#[test]
fn reads_are_confirmed_by_the_others() {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], false);
    let leader = net.elect();
    let now = net.clock(leader);
    let Ok(Grant::Later(ticket)) = net.host(leader).read(GROUP, now) else { panic!("read without asking") };
    net.settle();
    assert!(net.confirmed.contains(&(leader, ticket)));
    // Also when everybody sleeps.
    net.ticks(40);
    assert!(net.hosts.values().all(|host| host.status(GROUP).unwrap().asleep));
    let now = net.clock(leader);
    let Ok(Grant::Later(ticket)) = net.host(leader).read(GROUP, now) else { panic!("read without asking") };
    net.settle();
    assert!(net.confirmed.contains(&(leader, ticket)));
}

/// As shells do at rest: all ticks but the last at once, each store by its own count.
#[test]
fn at_rest_time_passes_in_steps_from_heartbeat_to_heartbeat() {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], false);
    let leader = net.elect();
    net.ticks(40);
    // Ticks from one waking to the next, and those that are left.
    let mut due: BTreeMap<u64, (u64, u64)> = (1..=3).map(|id| (id, (1, 1))).collect();
    let mut step = |net: &mut Net| {
        net.now += TICK.as_nanos() as u64;
        for (&id, (ticks, left)) in &mut due {
            *left -= 1;
            if *left > 0 {
                continue;
            }
            if net.hosts.contains_key(&id) {
                net.host(id).pass(*ticks - 1);
                net.host(id).tick().unwrap();
                net.turn(id);
                *ticks = net.hosts[&id].rest_ticks();
            }
            *left = *ticks;
        }
        net.settle();
    };
    let (before, mut slept) = (net.sent, 0);
    for _ in 0..300 {
        step(&mut net);
        slept += net.hosts.values().filter(|host| host.rest_ticks() > 1).count();
        assert!(net.hosts.values().all(|host| host.status(GROUP).unwrap().asleep));
    }
    assert_eq!(net.leader_of(GROUP), Some(leader));
    assert!(slept > 800, "{slept} of 900");
    // Each tells two others every three ticks; once in ten seconds the rhythm is broken.
    assert!((600..=640).contains(&(net.sent - before)), "{}", net.sent - before);
    net.crash(leader);
    let mut passed = 0;
    while net.leader_of(GROUP).is_none() {
        step(&mut net);
        passed += 1;
        assert!(passed <= 25, "nobody notices");
    }
    assert!(passed >= 4, "a store is not silent after {passed} ticks");
}

#[test]
fn who_was_asked_for_a_vote_before_it_noticed_that_the_leader_is_dead_stands_in_its_turn() {
    let groups: Vec<GroupId> = (0..32).map(GroupId).collect();
    let mut net = Net::new(&[1, 2, 3], &groups, false);
    net.ticks(60);
    let led: Vec<GroupId> = groups.into_iter().filter(|&id| net.leader_of(id) == Some(1)).collect();
    assert!(led.len() > 4, "{led:?}");
    assert!(net.hosts.values().all(|host| led.iter().all(|&id| host.status(id).unwrap().asleep)));
    net.crash(1);
    // At rest one may notice three ticks before the other.
    for _ in 0..3 {
        net.host(2).tick().unwrap();
        net.turn(2);
        net.settle();
    }
    let mut passed = 0;
    while led.iter().all(|&id| net.leader_of(id).is_none()) {
        net.tick();
        passed += 1;
        // Seven of silence.
        assert!(passed <= 7, "it was woken, and does not know what for");
    }
}

#[test]
fn a_lease_ends_before_another_can_lead() {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], true);
    let leader = net.elect();
    let now = net.clock(leader);
    assert!(matches!(net.host(leader).read(GROUP, now), Ok(Grant::Later(_))));
    net.settle();
    let now = net.clock(leader);
    assert_eq!(net.host(leader).read(GROUP, now), Ok(Grant::Now));
    for other in (1..=3).filter(|&id| id != leader) {
        net.cut.extend([(leader, other), (other, leader)]);
    }
    for _ in 0..40 {
        net.tick();
        let now = net.clock(leader);
        let reads = net.host(leader).read(GROUP, now) == Ok(Grant::Now);
        let other = net
            .hosts
            .iter()
            .any(|(&id, host)| id != leader && matches!(host.role(GROUP), Role::Leader { .. }));
        assert!(!(reads && other), "two can be read");
    }
    let now = net.clock(leader);
    assert_ne!(net.host(leader).read(GROUP, now), Ok(Grant::Now));
}

#[test]
fn a_store_comes_by_snapshot_and_another_goes() {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], false);
    let leader = net.elect();
    let value = "v".repeat(400_000);
    for n in 1..=5 {
        net.write(leader, n, &format!("k{n}={value}"));
    }
    net.start(4);
    let gone = (1..=3).find(|&id| id != leader).unwrap();
    let mut voters: Vec<u64> = (1..=4).filter(|&id| id != gone).collect();
    net.want(GROUP, &voters, None);
    net.ticks(40);
    let status = net.hosts[&leader].status(GROUP).unwrap();
    assert_eq!(status.membership.voters, stores(&voters));
    assert_eq!(net.hosts[&gone].role(GROUP), Role::Removed);
    net.same_everywhere(&voters);
    // It comes again, with nothing left of its first life but its votes.
    voters = vec![1, 2, 3, 4];
    net.want(GROUP, &voters, None);
    net.ticks(40);
    net.write(leader, 6, "k6=6");
    net.ticks(5);
    net.same_everywhere(&voters);
    for id in voters {
        net.crash(id);
        net.start(id);
    }
    net.elect();
    net.ticks(10);
    net.same_everywhere(&[1, 2, 3, 4]);
}

#[test]
fn an_empty_disk_is_a_new_store_and_the_dead_one_is_replaced() {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], false);
    let leader = net.elect();
    net.write(leader, 1, "a=1");
    let dead = (1..=3).find(|&id| id != leader).unwrap();
    net.crash(dead);
    net.stores.remove(&dead);
    net.ticks(10);
    net.start(9);
    let voters: Vec<u64> = (1..=3).filter(|&id| id != dead).chain([9]).collect();
    net.want(GROUP, &voters, Some(9));
    net.ticks(80);
    assert_eq!(net.leader_of(GROUP), Some(9), "preferred");
    assert_eq!(net.hosts[&9].status(GROUP).unwrap().membership.voters, stores(&voters));
    net.same_everywhere(&voters);
}

#[test]
fn who_leads_hands_over_before_it_is_removed() {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], false);
    let leader = net.elect();
    net.write(leader, 1, "a=1");
    let voters: Vec<u64> = (1..=3).filter(|&id| id != leader).collect();
    net.want(GROUP, &voters, None);
    net.ticks(60);
    let next = net.leader_of(GROUP).unwrap();
    assert_ne!(next, leader);
    assert_eq!(net.hosts[&leader].role(GROUP), Role::Removed);
    assert_eq!(net.write(next, 2, "a=2"), "=1");
}

#[test]
fn many_groups_at_rest_say_nothing_but_that_they_are_there() {
    let groups: Vec<GroupId> = (0..256).map(GroupId).collect();
    let mut net = Net::new(&[1, 2, 3], &groups, false);
    net.settle();
    net.ticks(60);
    assert!(groups.iter().all(|&group| net.leader_of(group).is_some()));
    let asleep = |net: &Net| {
        let of = |host: &TestHost| groups.iter().filter(|&&group| host.status(group).unwrap().asleep).count();
        net.hosts.values().map(of).sum::<usize>()
    };
    assert_eq!(asleep(&net), 3 * 256);
    let syncs: u64 = net.hosts.values().map(|host| host.log().syncs()).sum();
    net.sent = 0;
    net.ticks(100);
    assert_eq!(net.hosts.values().map(|host| host.log().syncs()).sum::<u64>(), syncs, "rest syncs nothing");
    // Three stores tell two others every third tick.
    assert!(net.sent <= 6 * 35, "{} batches in 100 ticks", net.sent);
    // The leader of some dies: all of those have another within the election bound.
    let dead = net.leader_of(groups[0]).unwrap();
    net.crash(dead);
    net.ticks(20);
    assert!(groups.iter().all(|&group| net.leader_of(group).is_some()));
    net.ticks(40);
    assert_eq!(asleep(&net), 2 * 256, "and sleeps without the dead");
    net.start(dead);
    net.ticks(60);
    assert_eq!(asleep(&net), 3 * 256);
}

#[test]
fn a_restarted_leader_of_a_sleeping_group_is_noticed() {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], false);
    let leader = net.elect();
    net.ticks(40);
    net.crash(leader);
    net.start(leader);
    net.ticks(25);
    let next = net.leader_of(GROUP).expect("a leader");
    net.write(next, 1, "a=1");
    net.ticks(5);
    net.same_everywhere(&[1, 2, 3]);
}

#[test]
fn a_host_whose_clock_is_off_leads_nothing() {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], false);
    let leader = net.elect();
    net.skew.insert(leader, 3_000_000_000);
    net.write(leader, 1, "a=1");
    net.ticks(150);
    let next = net.leader_of(GROUP).unwrap();
    assert_ne!(next, leader);
    let offset = net.hosts[&leader].clock_offset();
    assert!((2_900_000_000..3_100_000_000).contains(&offset), "{offset}");
    let others = net.hosts.iter().filter(|&(&id, _)| id != leader);
    assert!(others.clone().all(|(_, host)| host.clock_offset().abs() < 100_000_000));
}

#[test]
fn damaged_state_is_found_when_the_group_goes_to_sleep() {
    let mut net = Net::new(&[1, 2, 3], &[GROUP], false);
    let leader = net.elect();
    net.write(leader, 1, "a=1");
    let follower = (1..=3).find(|&id| id != leader).unwrap();
    // A bug that applies something else: the row changes and the hash with it.
    net.ticks(2);
    net.host(follower).state_mut().damage(GROUP);
    net.crash(follower);
    net.start(follower);
    net.ticks(40);
    net.same_everywhere(&[1, 2, 3]);
}

#[test]
fn a_replica_that_waits_for_its_first_snapshot_elects_nobody() {
    let mut net = Net::new(&[9], &[], false);
    let now = net.clock(9);
    let mut said = Vec::new();
    for (from, kind, term) in [(1, MessageType::MsgHeartbeat, 5), (2, MessageType::MsgRequestVote, 7)] {
        let mut message = eraftpb::Message { from, to: 9, term, ..eraftpb::Message::default() };
        message.set_msg_type(kind);
        let messages = vec![(GROUP, PeerMessage::Raft(message))];
        net.host(9).receive(StoreId(from), PeerBatch { messages, ..PeerBatch::default() }, now).unwrap();
        net.host(9).turn(now, &mut |to, batch| said.push((to, batch))).unwrap();
    }
    let answers = said.iter().flat_map(|(to, batch)| batch.messages.iter().map(move |message| (to, message)));
    let to: Vec<_> = answers.map(|(to, _)| to.0).collect();
    assert!(to.contains(&1), "it follows who leads");
    assert!(!to.contains(&2), "it may have known more once than who asks");
}

#[test]
fn a_first_voter_that_was_down_when_the_group_was_founded_gets_it_later() {
    let mut net = Net::new(&[], &[], false);
    for id in [1, 2] {
        net.start(id);
        net.host(id).found(&[(GROUP, stores(&[1, 2, 3]))]).unwrap();
    }
    let leader = net.elect();
    net.write(leader, 1, "a=1");
    net.ticks(60);
    assert!(net.hosts.values().all(|host| host.status(GROUP).unwrap().asleep), "without the third");
    net.start(3);
    net.ticks(30);
    net.same_everywhere(&[1, 2, 3]);
}
