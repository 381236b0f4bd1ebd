//! The consensus thread on real files: answers, restarts, damaged state, storage that fails.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use eggs_consensus::{Applied, ConsensusError, Event, GroupId, Handle, Options, Role, Runner, spawn};
use eggs_machine::{Machine, Outcome, Table, TableError, Tx};
use eggs_proto::{SessionId, StoreId, Time};
use tokio::sync::mpsc;

const STORE: StoreId = StoreId(7);

/// Appends the command to the one row and answers the whole; the effect is the command.
struct Append;

impl Machine for Append {
    type Effect = Bytes;

    fn apply<T: Table + ?Sized>(
        &self,
        tx: &mut Tx<'_, T>,
        _time: Time,
        command: &[u8],
    ) -> Result<Outcome<Bytes>, TableError> {
        let mut row = tx.get(b"row")?.unwrap_or_default().to_vec();
        row.extend_from_slice(command);
        tx.put(&b"row"[..], row.clone())?;
        Ok(Outcome { reply: row.into(), effects: vec![Bytes::copy_from_slice(command)] })
    }
}

fn options(directory: &Path) -> Options {
    Options {
        name: "test",
        directory: directory.to_owned(),
        store: STORE,
        lease: false,
        snapshot_bytes_per_second: 64 << 20,
    }
}

fn machine_of(group: GroupId) -> Option<Append> {
    (group.0 < 256).then_some(Append)
}

type Events = mpsc::UnboundedReceiver<Event<Bytes>>;

fn start_told(options: &Options) -> (Handle, Runner, Events) {
    let (sender, events) = mpsc::unbounded_channel();
    let (handle, runner) = spawn(options, machine_of, move |event| drop(sender.send(event))).unwrap();
    handle.found((0..300).map(|group| (GroupId(group), vec![STORE])).collect());
    (handle, runner, events)
}

/// Leads its 256 groups.
async fn start(directory: &Path) -> (Handle, Runner) {
    start_with(&options(directory)).await
}

async fn start_with(options: &Options) -> (Handle, Runner) {
    let (handle, runner, mut events) = start_told(options);
    let mut led = 0;
    while led < 256 {
        if let Event::Role(_, Role::Leader { .. }) = events.recv().await.unwrap() {
            led += 1;
        }
    }
    (handle, runner)
}

async fn write(handle: &Handle, group: u16, sequence: u64, command: &'static [u8]) -> Applied {
    let command = Bytes::from_static(command);
    handle.write(GroupId(group), SessionId(1), sequence, move |_, _| Ok(command)).await.unwrap()
}

fn reply(bytes: &'static [u8]) -> Applied {
    Applied::Reply(Bytes::from_static(bytes))
}

async fn row(handle: &Handle, group: u16) -> Bytes {
    let group = GroupId(group);
    let read = handle
        .read(vec![], move |views, _| views.get(group).unwrap().get(b"row").unwrap().unwrap_or_default());
    read.await.unwrap()
}

/// Leaves the files as a crash would: without the orderly stop's marker.
fn crash(runner: Runner, directory: &Path) {
    runner.stop();
    fs::remove_file(directory.join("state.clean")).unwrap();
}

#[tokio::test]
async fn answers_once_and_survives_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let (handle, runner) = start(directory.path()).await;
    assert_eq!(write(&handle, 3, 1, b"a").await, reply(b"a"));
    assert_eq!(write(&handle, 3, 1, b"a").await, reply(b"a"));
    let refusal =
        handle.write(GroupId(3), SessionId(2), 1, |_, _| Err(Bytes::from_static(b"no"))).await.unwrap();
    assert_eq!(refusal, Applied::Refused(Bytes::from_static(b"no")));
    runner.stop();
    assert_eq!(handle.stopped().await, None);
    let (handle, runner) = start(directory.path()).await;
    assert_eq!(write(&handle, 3, 1, b"a").await, reply(b"a"));
    assert_eq!(write(&handle, 3, 2, b"b").await, reply(b"ab"));
    assert_eq!(write(&handle, 3, 1, b"a").await, Applied::Stale);
    assert_eq!(
        handle.write(GroupId(999), SessionId(1), 1, |_, _| Ok(Bytes::new())).await,
        Err(ConsensusError::NotLeader { leader: None })
    );
    crash(runner, directory.path());
    let (handle, runner) = start(directory.path()).await;
    assert_eq!(row(&handle, 3).await, "ab");
    runner.stop();
}

#[tokio::test]
async fn state_that_is_gone_or_damaged_is_rebuilt() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let (handle, runner) = start(directory.path()).await;
    for (sequence, group) in (0..256).enumerate() {
        write(&handle, group, sequence as u64 + 1, b"a").await;
    }
    handle.snapshot(GroupId(5)).unwrap();
    while handle.status().await[5].snapshot_index == 0 {
        tokio::task::yield_now().await;
    }
    write(&handle, 5, 1000, b"b").await;
    runner.stop();

    let damages: [&dyn Fn(); 4] = [
        &|| fs::remove_dir_all(&state).unwrap(),
        &|| {
            let path = state.join("db");
            let mut bytes = fs::read(&path).unwrap();
            let middle = bytes.len() / 3;
            bytes[middle..middle + 3000].fill(0xa5);
            fs::write(&path, bytes).unwrap();
        },
        &|| fs::write(state.join("conf"), b"not a configuration").unwrap(),
        &|| {
            let path = state.join("db");
            let length = fs::metadata(&path).unwrap().len();
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length / 2).unwrap();
        },
    ];
    for (n, damage) in damages.iter().enumerate() {
        damage();
        let (handle, runner) = start(directory.path()).await;
        for group in 0..256 {
            let expected = if group == 5 { "ab" } else { "a" };
            assert_eq!(row(&handle, group).await, expected, "damage {n}, group {group}");
        }
        runner.stop();
    }
}

#[tokio::test]
async fn a_damaged_snapshot_whose_log_is_cut_is_an_error_not_an_empty_group() {
    let directory = tempfile::tempdir().unwrap();
    let (handle, runner) = start(directory.path()).await;
    write(&handle, 5, 1, b"a").await;
    handle.snapshot(GroupId(5)).unwrap();
    while handle.status().await[5].snapshot_index == 0 {
        tokio::task::yield_now().await;
    }
    write(&handle, 5, 2, b"b").await;
    runner.stop();
    fs::remove_file(directory.path().join("snapshots/00005.snap")).unwrap();
    let error = spawn(&options(directory.path()), machine_of, |_| {}).unwrap_err();
    assert!(matches!(&error, ConsensusError::Damaged(why) if why.contains("snapshot")), "{error:?}");
}

#[tokio::test]
async fn records_that_were_acknowledged_and_are_damaged_are_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let (handle, runner) = start(directory.path()).await;
    let path = directory.path().join("log/0000000000000001.raftlog");
    write(&handle, 3, 1, b"a").await;
    let before = fs::metadata(&path).unwrap().len();
    drop(handle);
    crash(runner, directory.path());
    let length = fs::metadata(&path).unwrap().len();
    assert!(before >= length, "the file is longer than what is written while it is open");
    let mut bytes = fs::read(&path).unwrap();
    for at in [bytes.len() / 2, bytes.len() - 3] {
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let written = fs::read(directory.path().join("log.written")).unwrap();
        let error = spawn(&options(directory.path()), machine_of, |_| {}).unwrap_err();
        assert!(matches!(&error, ConsensusError::Damaged(why) if why.contains("log")), "{error:?}");
        assert!(!error.to_string().contains('\n'));
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        fs::write(directory.path().join("log.written"), written).unwrap();
    }
    let (handle, runner) = start(directory.path()).await;
    assert_eq!(row(&handle, 3).await, "a");
    runner.stop();
}

#[tokio::test]
async fn effects_follow_the_role_they_are_for() {
    let directory = tempfile::tempdir().unwrap();
    let (handle, runner, mut events) = start_told(&options(directory.path()));
    let group = GroupId(3);
    let mut of_group = Vec::new();
    for (sequence, command) in [&b"a"[..], b"b"].into_iter().enumerate() {
        // Founding and leading take a turn.
        while let Err(error) = handle
            .write(group, SessionId(1), sequence as u64 + 1, move |_, _| Ok(Bytes::from_static(command)))
            .await
        {
            assert_eq!(error, ConsensusError::NotLeader { leader: None });
        }
    }
    runner.stop();
    while let Some(event) = events.recv().await {
        match event {
            Event::Role(of, role) if of == group => of_group.push(format!("{role:?}")),
            Event::Effects(of, effects) if of == group => of_group.push(format!("{effects:?}")),
            _ => {}
        }
    }
    let leads = of_group.iter().position(|event| event.starts_with("Leader")).unwrap();
    assert_eq!(of_group[leads + 1..], ["[b\"a\"]", "[b\"b\"]"], "{of_group:?}");
    assert_eq!(handle.leader(group), Some(STORE));
    assert_eq!(handle.leader_address(group), None);
}

/// Rest is rest: no thread of consensus runs when nobody asks. (sled and raft-engine have timers of their own.)
#[tokio::test]
async fn a_store_alone_sleeps() {
    let directory = tempfile::tempdir().unwrap();
    let (handle, runner) = start_with(&Options { name: "rest", ..options(directory.path()) }).await;
    write(&handle, 3, 1, b"a").await;
    let switches = || {
        let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
        let ours = tasks.filter(|task| {
            fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "rest-consensus\n")
        });
        let status: Vec<_> = ours.filter_map(|task| fs::read_to_string(task.join("status")).ok()).collect();
        assert!(!status.is_empty());
        status
            .iter()
            .flat_map(|status| status.lines())
            .filter(|line| line.contains("ctxt_switches"))
            .map(|line| line.rsplit_once('\t').unwrap().1.parse::<u64>().unwrap())
            .sum::<u64>()
    };
    handle.local(|_, _| ()).await.unwrap();
    let before = switches();
    // Time is what is measured here: fifteen ticks.
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    let after = switches();
    runner.stop();
    assert!(after <= before + 3, "{} switches at rest", after - before);
}
