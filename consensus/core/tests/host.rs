//! The host over stores in memory: proposals, crashes, rebuilding, snapshots.

use std::collections::BTreeMap;

use bytes::Bytes;
use eggs_consensus_core::memory::{MemoryLog, MemorySnapshots, MemoryState, rows};
use eggs_consensus_core::{
    GroupId, Host, HostOptions, LogChange, LogStore as _, LogWrite, Now, Proposal, ProposalId,
    StateStore as _, Turn,
};
use eggs_machine::group::Applied;
use eggs_machine::hash::StateHash;
use eggs_machine::{Machine, Outcome, Table, TableError, Tx};
use eggs_proto::{SessionId, StoreId, Time};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const GROUPS: u16 = 5;

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

const ME: StoreId = StoreId(7);

fn options() -> HostOptions {
    HostOptions { store: ME, seed: 1, lease: false, snapshot_bytes_per_second: 64 << 20 }
}

fn turn(host: &mut TestHost) -> Turn<()> {
    host.turn(Now::default(), &mut |_, _| panic!("a lonely store has nobody to tell")).unwrap()
}

fn open(log: MemoryLog, state: MemoryState, snapshots: MemorySnapshots) -> TestHost {
    let mut host = Host::open(options(), |_| Some(KeyValue), log, state, snapshots).unwrap();
    host.found(&(0..GROUPS).map(|id| (GroupId(id), vec![ME])).collect::<Vec<_>>()).unwrap();
    while host.has_work() {
        turn(&mut host);
    }
    assert!(!host.needs_ticks());
    host
}

fn new() -> TestHost {
    open(MemoryLog::default(), MemoryState::default(), MemorySnapshots::default())
}

fn propose(host: &mut TestHost, group: u16, command: String, sequence: u64) -> ProposalId {
    let session = SessionId(u64::from(group) + 1);
    let proposal = Proposal { time: Time(sequence), session, sequence, command: command.into() };
    host.propose(GroupId(group), proposal).unwrap()
}

fn reply(applied: &Applied<()>) -> Bytes {
    match applied {
        Applied::Ran(outcome) => outcome.reply.clone(),
        Applied::Repeated(reply) => reply.clone(),
        Applied::Stale | Applied::Malformed => panic!("not answered: {applied:?}"),
    }
}

fn hash_of(host: &TestHost, group: u16) -> StateHash {
    let mut hash = StateHash::default();
    for (key, value) in rows(host.local_view(GroupId(group)).unwrap()) {
        hash.insert(&key, &value);
    }
    hash
}

#[test]
fn one_turn_syncs_once_for_all_groups_and_rest_costs_nothing() {
    let mut host = new();
    let before = host.log().syncs();
    let waiting: Vec<_> = (0..GROUPS).map(|group| propose(&mut host, group, "a=1".into(), 1)).collect();
    let answers = turn(&mut host).answers;
    assert_eq!(host.log().syncs(), before + 1);
    let answered: Vec<_> = answers.iter().filter_map(|answer| answer.proposal).collect();
    assert_eq!(answered, waiting);
    assert!(!host.has_work());
    assert!(turn(&mut host).answers.is_empty());
    assert_eq!(host.log().syncs(), before + 1);
}

#[test]
fn a_failed_log_write_answers_nobody() {
    let mut host = new();
    propose(&mut host, 0, "a=1".into(), 1);
    host.log().fail_next("no space left on device");
    assert!(host.turn(Now::default(), &mut |_, _| {}).is_err());
}

#[test]
fn a_log_that_lost_entries_is_refused() {
    let mut host = new();
    host.log().skip_sync();
    propose(&mut host, 0, "a=1".into(), 1);
    assert_eq!(turn(&mut host).answers.len(), 1);
    let (log, state, snapshots) = host.into_stores();
    let (state, snapshots) = (state.crashed(), snapshots.crashed());
    let error = Host::open(options(), |_| Some(KeyValue), log.crashed(), state, snapshots).unwrap_err();
    assert!(error.to_string().contains("the log is missing or cut"), "{error}");
}

/// A replica was removed and came again, and the state has lost all of that.
#[test]
fn the_state_of_a_replica_that_was_here_before_is_not_used_and_no_damage() {
    for (removed, opens) in [(true, true), (false, false)] {
        let mut host = new();
        propose(&mut host, 0, "a=1".into(), 1);
        turn(&mut host);
        let (log, state, snapshots) = host.into_stores();
        let applied = state.applied(GroupId(0)).unwrap().unwrap();
        let floor = if removed { (applied.term, applied.index) } else { (applied.term, applied.index - 1) };
        let mut hard = log.load(GroupId(0)).unwrap().unwrap().hard;
        hard.commit = 0;
        // It has come as far as the first entry again.
        let mut entries = log.entries(GroupId(0), applied.index, applied.index + 1, u64::MAX).unwrap();
        entries[0].index = 1;
        let change = Some(LogChange::Restart { floor });
        log.write(vec![LogWrite { group: GroupId(0), hard: Some(hard), entries, change }]).unwrap();
        let host = Host::open(options(), |_| Some(KeyValue), log.crashed(), state, snapshots);
        match host {
            Ok(host) => {
                assert!(opens);
                assert_eq!(host.status(GroupId(0)).unwrap().applied_index, 0);
                assert!(host.local_view(GroupId(0)).is_none_or(|view| view.get(b"a").unwrap().is_none()));
            }
            Err(error) => {
                assert!(!opens, "{error}");
                assert!(error.to_string().contains("the log is missing or cut"), "{error}");
            }
        }
    }
}

#[test]
fn damaged_state_is_rebuilt_and_good_state_is_kept() {
    let mut host = new();
    for group in 0..GROUPS {
        propose(&mut host, group, "a=1".into(), 1);
    }
    turn(&mut host);
    let (log, mut state, snapshots) = host.into_stores();
    state.damage(GroupId(3));
    let host = open(log.crashed(), state.crashed(), snapshots);
    assert_eq!(host.rebuilt(), [GroupId(3)]);
    for group in 0..GROUPS {
        assert_eq!(host.view(GroupId(group)).unwrap().get(b"a").unwrap().unwrap(), "=1");
        assert_eq!(host.status(GroupId(group)).unwrap().state_hash, hash_of(&host, group));
    }
}

#[test]
fn a_snapshot_that_cannot_be_written_is_tried_again_later() {
    let mut snapshots = MemorySnapshots::default();
    snapshots.fail_next("no space left on device");
    let mut host = open(MemoryLog::default(), MemoryState::default(), snapshots);
    host.request_snapshot(GroupId(0));
    turn(&mut host);
    assert!(host.take_snapshot_failure().unwrap().to_string().contains("no space"));
    assert!(!host.has_work());
    propose(&mut host, 0, "a=1".into(), 1);
    assert_eq!(turn(&mut host).answers.len(), 1);
    host.request_snapshot(GroupId(0));
    while host.has_work() {
        turn(&mut host);
    }
    assert_eq!(host.status(GroupId(0)).unwrap().snapshot_index, 3);
}

#[test]
fn a_busy_group_is_snapshotted_once_per_growth() {
    let mut host = new();
    let value = "x".repeat(1 << 20);
    for n in 0..6 {
        propose(&mut host, 0, format!("k{n}={value}"), n + 1);
        turn(&mut host);
    }
    while host.has_work() {
        turn(&mut host);
    }
    assert_eq!(host.truncations(), 1);
}

/// Random proposals, snapshots and crashes against a map: what was answered is there, in order.
fn random_run(seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut host = new();
    let mut model: BTreeMap<(u16, String), String> = BTreeMap::new();
    let mut sequence = 1;
    let mut old_state = MemoryState::default();
    for _ in 0..300 {
        match random.random_range(0..20) {
            0 => host.request_snapshot(GroupId(random.random_range(0..GROUPS))),
            1 => old_state = host.state_mut().clone(),
            2 => {
                let (log, state, snapshots) = host.into_stores();
                let state = match random.random_range(0..5) {
                    0 => MemoryState::default(),
                    1 => {
                        let mut damaged = state.crashed();
                        damaged.damage(GroupId(random.random_range(0..GROUPS)));
                        damaged
                    }
                    2 => old_state.clone().crashed(),
                    3 => state.closed(),
                    _ => state.crashed(),
                };
                host = open(log.crashed(), state, snapshots.crashed());
                for group in 0..GROUPS {
                    let status = host.status(GroupId(group)).unwrap();
                    assert_eq!(status.state_hash, hash_of(&host, group), "seed {seed}");
                    // The old copies must not come back as closed in order.
                    assert!(status.applied_index >= status.snapshot_index, "seed {seed}");
                }
            }
            _ => {
                let mut waiting = BTreeMap::new();
                for _ in 0..random.random_range(1..40) {
                    let group = random.random_range(0..GROUPS);
                    let key = format!("k{}", random.random_range(0..50));
                    let value = format!("={}", random.random::<u32>());
                    let proposal = propose(&mut host, group, format!("{key}{value}"), sequence);
                    sequence += 1;
                    waiting.insert(proposal, (group, key, value));
                }
                for answer in turn(&mut host).answers {
                    let (group, key, value) = waiting.remove(&answer.proposal.unwrap()).unwrap();
                    let old = model.insert((group, key), value).unwrap_or_default();
                    assert_eq!(reply(&answer.applied), old, "seed {seed}");
                }
                assert!(waiting.is_empty(), "seed {seed}");
            }
        }
    }
    for ((group, key), value) in model {
        let stored = host.view(GroupId(group)).unwrap().get(key.as_bytes()).unwrap();
        assert_eq!(stored.unwrap(), value, "seed {seed}");
    }
}

#[test]
fn random_crashes_lose_nothing_answered() {
    for seed in 0..40 {
        random_run(seed);
    }
}

#[test]
fn a_snapshot_is_of_one_instant_while_the_group_goes_on() {
    let mut host = new();
    for n in 0..3000 {
        propose(&mut host, 0, format!("k{n:04}=first"), n + 1);
    }
    turn(&mut host);
    let at = host.status(GroupId(0)).unwrap();
    host.request_snapshot(GroupId(0));
    let mut sequence = 10_000;
    let mut changed = 0;
    while host.status(GroupId(0)).unwrap().snapshot_index == 0 {
        for n in [1, 1500, 2999, 3001 + changed] {
            sequence += 1;
            propose(&mut host, 0, format!("k{n:04}=second{changed}"), sequence);
        }
        changed += 1;
        turn(&mut host);
    }
    assert!(changed > 3, "the snapshot took more than one step");
    // The snapshot plus the rest of the log make the same state.
    let after = host.status(GroupId(0)).unwrap();
    assert_eq!(after.snapshot_index, at.applied_index + 4, "taken after the four of the first turn");
    let (log, _, snapshots) = host.into_stores();
    let host = open(log.crashed(), MemoryState::default(), snapshots);
    assert_eq!(host.status(GroupId(0)).unwrap().state_hash, after.state_hash);
    assert!(host.rebuilt().contains(&GroupId(0)));
}
