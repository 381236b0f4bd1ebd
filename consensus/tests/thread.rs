//! The consensus thread on real files: answers, restarts, damaged state, storage that fails.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use eggs_consensus::{Applied, ConsensusError, GroupId, Handle, Options, Runner, spawn};
use eggs_machine::{Machine, Outcome, Table, TableError, Tx};
use eggs_proto::{SessionId, Time};

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

fn start(directory: &Path) -> (Handle, Runner) {
    let options =
        Options { name: "test", directory: directory.to_owned(), groups: (0..256).map(GroupId).collect() };
    spawn(&options, |_| Append, |_, _| {}).unwrap()
}

async fn write(handle: &Handle, group: u16, sequence: u64, command: &'static [u8]) -> Applied {
    let command = Bytes::from_static(command);
    handle.write(GroupId(group), SessionId(1), sequence, move |_, _| Ok(command)).await.unwrap()
}

fn reply(bytes: &'static [u8]) -> Applied {
    Applied::Reply(Bytes::from_static(bytes))
}

async fn row(handle: &Handle, group: u16) -> Bytes {
    handle
        .read(move |views, _| views.get(GroupId(group)).unwrap().get(b"row").unwrap().unwrap_or_default())
        .await
        .unwrap()
}

/// Leaves the files as a crash would: without the orderly stop's marker.
fn crash(runner: Runner, directory: &Path) {
    runner.stop();
    fs::remove_file(directory.join("state.clean")).unwrap();
}

#[tokio::test]
async fn answers_once_and_survives_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let (handle, runner) = start(directory.path());
    assert_eq!(write(&handle, 3, 1, b"a").await, reply(b"a"));
    assert_eq!(write(&handle, 3, 1, b"a").await, reply(b"a"));
    let refusal =
        handle.write(GroupId(3), SessionId(2), 1, |_, _| Err(Bytes::from_static(b"no"))).await.unwrap();
    assert_eq!(refusal, Applied::Refused(Bytes::from_static(b"no")));
    runner.stop();
    assert_eq!(handle.stopped().await, None);
    let (handle, runner) = start(directory.path());
    assert_eq!(write(&handle, 3, 1, b"a").await, reply(b"a"));
    assert_eq!(write(&handle, 3, 2, b"b").await, reply(b"ab"));
    assert_eq!(write(&handle, 3, 1, b"a").await, Applied::Stale);
    assert_eq!(
        handle.write(GroupId(999), SessionId(1), 1, |_, _| Ok(Bytes::new())).await,
        Err(ConsensusError::NotLeader)
    );
    crash(runner, directory.path());
    let (handle, runner) = start(directory.path());
    assert_eq!(row(&handle, 3).await, "ab");
    runner.stop();
}

#[tokio::test]
async fn state_that_is_gone_or_damaged_is_rebuilt() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state");
    let (handle, runner) = start(directory.path());
    for (sequence, group) in (0..256).enumerate() {
        write(&handle, group, sequence as u64 + 1, b"a").await;
    }
    handle.snapshot(GroupId(5)).unwrap();
    while handle.status().await.unwrap()[5].snapshot_index == 0 {
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
        let (handle, runner) = start(directory.path());
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
    let (handle, runner) = start(directory.path());
    write(&handle, 5, 1, b"a").await;
    handle.snapshot(GroupId(5)).unwrap();
    while handle.status().await.unwrap()[5].snapshot_index == 0 {
        tokio::task::yield_now().await;
    }
    write(&handle, 5, 2, b"b").await;
    runner.stop();
    fs::remove_file(directory.path().join("snapshots/00005.snap")).unwrap();
    let options = Options { name: "test", directory: directory.path().to_owned(), groups: vec![GroupId(5)] };
    let error = spawn(&options, |_| Append, |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("snapshot"), "{error}");
}
