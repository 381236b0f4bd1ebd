//! Three stores in one process, over real connections: writes are replicated, whoever was away catches up, leaders change,
//! strangers are refused.

mod cluster;
mod strangers;

use std::time::Duration;

use bytes::Bytes;
use cluster::{Cluster, GROUP, OTHER, eventually, reply};
use eggs_consensus::{Applied, ConsensusError, GroupId};
use eggs_proto::{SessionId, pb};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_are_replicated_and_followers_say_who_leads() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader(GROUP).await;
    assert_eq!(cluster.write(GROUP, 1, b"a").await, reply(b"a"));
    assert_eq!(cluster.write(GROUP, 2, b"b").await, reply(b"ab"));
    cluster.same_everywhere(GROUP, b"ab").await;
    for store in cluster.stores() {
        let leads = store.id() == leader;
        let written = store.handle().write(GROUP, SessionId(9), 1, |_, _| Ok(Bytes::new())).await;
        let read = store.handle().read(vec![GROUP], |views, _| cluster::row(views.get(GROUP))).await;
        let unconfirmed = store.handle().read(vec![], |views, _| views.get(GROUP).is_some()).await;
        assert_eq!(unconfirmed, Ok(leads));
        if leads {
            assert_eq!(read, Ok(Bytes::from_static(b"ab")));
            assert!(written.is_ok());
        } else {
            let address = cluster.address(leader);
            assert_eq!(written, Err(ConsensusError::NotLeader { leader: Some(address.clone()) }));
            assert_eq!(read, Err(ConsensusError::NotLeader { leader: Some(address) }));
            assert_eq!(store.handle().leader(GROUP), Some(leader));
        }
    }
    cluster.stop().await;
}

/// What a read looks at is confirmed for every group, however it learns of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_of_many_groups_run_again_until_all_they_saw_is_confirmed() {
    let mut cluster = Cluster::start(3).await;
    for group in [GROUP, OTHER] {
        cluster.lead_from(group, 0).await;
    }
    cluster.write(GROUP, 1, b"a").await;
    cluster.write(OTHER, 1, b"b").await;
    let mut runs = 0;
    let read = cluster.store(0).handle().read(vec![GROUP], move |views, _| {
        runs += 1;
        (cluster::row(views.get(GROUP)), cluster::row(views.get(OTHER)), runs)
    });
    // Once with the first group confirmed, once with both.
    assert_eq!(read.await, Ok((Bytes::from_static(b"a"), Bytes::from_static(b"b"), 2)));
    // Isolated, it still believes that it leads; but it cannot confirm anything.
    cluster.isolate(0).await;
    let believes = cluster.store(0).handle().local(|views, _| views.get(GROUP).is_some()).await;
    assert_eq!(believes, Ok(true));
    let read = cluster.store(0).handle().read(vec![], |views, _| cluster::row(views.get(GROUP)));
    assert!(matches!(read.await, Err(ConsensusError::NotLeader { .. })));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_away_catches_up_also_from_another_address() {
    let mut cluster = Cluster::start(3).await;
    cluster.lead_from(GROUP, 0).await;
    cluster.write(GROUP, 1, b"a").await;
    cluster.stop_one(2).await;
    for sequence in 2..=20 {
        cluster.write(GROUP, sequence, b"b").await;
    }
    cluster.start_one(2).await;
    cluster.same_everywhere(GROUP, b"abbbbbbbbbbbbbbbbbbb").await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_store_leads_and_gives_the_first_answer() {
    let mut cluster = Cluster::start(3).await;
    cluster.lead_from(GROUP, 0).await;
    assert_eq!(cluster.write(GROUP, 1, b"a").await, reply(b"a"));
    cluster.isolate(0).await;
    // By then no stream of the old leader is left.
    cluster.leader(GROUP).await;
    let before = cluster.store(0).handle().clone();
    let lost = before.write(GROUP, SessionId(1), 2, |_, _| Ok(Bytes::from_static(b"lost"))).await;
    // Repeated elsewhere: the answer that was given, and not a second time.
    assert_eq!(cluster.write(GROUP, 1, b"a").await, reply(b"a"));
    assert_eq!(cluster.write(GROUP, 2, b"b").await, reply(b"ab"));
    assert!(matches!(lost, Err(ConsensusError::NotLeader { .. })), "{lost:?}");
    cluster.heal(0).await;
    cluster.same_everywhere(GROUP, b"ab").await;
    assert_eq!(cluster.write(GROUP, 2, b"b").await, reply(b"ab"));
    // An orderly stop hands over first.
    let leader = cluster.leader_position(GROUP).await;
    let stopped = std::time::Instant::now();
    cluster.stop_one(leader).await;
    assert_eq!(cluster.write(GROUP, 3, b"c").await, reply(b"abc"));
    assert!(stopped.elapsed() < Duration::from_secs(3), "{:?}", stopped.elapsed());
    cluster.stop().await;
}

/// An empty directory comes in the place of a store that is gone: the map says so, and the rest follows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_store_gets_a_snapshot_and_becomes_a_voter() {
    let mut cluster = Cluster::start(3).await;
    cluster.lead_from(GROUP, 0).await;
    let big = Bytes::from(vec![b'x'; 100_000]);
    let mut expected = Vec::new();
    for sequence in 1..=20 {
        expected.extend_from_slice(&big);
        cluster.write_bytes(GROUP, sequence, big.clone()).await;
    }
    let first = cluster.store(0).handle();
    first.snapshot(GROUP).unwrap();
    eventually("a snapshot is taken", async || {
        first.status().await.iter().any(|status| status.group == GROUP && status.snapshot_index > 20)
    })
    .await;
    cluster.stop_one(2).await;
    let new = cluster.add_one().await;
    let wanted: Vec<u64> = [0, 1, new].iter().map(|&position| cluster.store(position).id().0).collect();
    let group = pb::GroupPlace { group: u32::from(GROUP.0), wanted, ..pb::GroupPlace::default() };
    cluster.follow(vec![group]);
    eventually("the new store is a voter and the old one is not", async || {
        let membership = cluster.membership(0, GROUP).await;
        membership.voters.contains(&cluster.store(new).id())
            && !membership.voters.contains(&cluster.store(2).id())
    })
    .await;
    let status = cluster.store(new).status(GROUP).await.unwrap();
    assert!(status.snapshot_index > 20, "{status:?}");
    cluster.write(GROUP, 21, b"!").await;
    expected.push(b'!');
    cluster.same_everywhere(GROUP, &expected).await;
    // The two that are left can lose the old leader.
    cluster.isolate(0).await;
    assert_eq!(cluster.write(GROUP, 21, b"!").await, Applied::Reply(expected.into()));
    cluster.stop().await;
}

/// Without the others nothing is decided, and nobody waits for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_decides_nothing() {
    let mut cluster = Cluster::start(3).await;
    cluster.lead_from(GROUP, 0).await;
    cluster.isolate(1).await;
    cluster.isolate(2).await;
    let write = cluster.store(0).handle().write(GROUP, SessionId(1), 1, |_, _| Ok(Bytes::from_static(b"a")));
    let answer = tokio::time::timeout(Duration::from_secs(10), write).await.unwrap();
    assert_eq!(answer, Err(ConsensusError::NotLeader { leader: None }));
    cluster.heal(1).await;
    eventually("two lead again", async || {
        let leader = cluster.try_leader(GROUP).await;
        leader.is_some()
    })
    .await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_at_rest_go_to_sleep_and_wake_when_asked() {
    let mut cluster = Cluster::start(3).await;
    let asleep = |status: &eggs_consensus::GroupStatus| status.asleep;
    eventually("all sleep", async || {
        let mut statuses = Vec::new();
        for store in cluster.stores() {
            statuses.extend(store.handle().status().await);
        }
        statuses.len() == 6 && statuses.iter().all(asleep)
    })
    .await;
    cluster.write(GROUP, 1, b"a").await;
    cluster.same_everywhere(GROUP, b"a").await;
    let leader = cluster.leader_position(OTHER).await;
    cluster.isolate(leader).await;
    // Its group sleeps everywhere; that it is gone is noticed all the same.
    cluster.write(OTHER, 1, b"b").await;
    let unknown = cluster.store(0).handle().write(GroupId(300), SessionId(1), 1, |_, _| Ok(Bytes::new()));
    assert_eq!(unknown.await, Err(ConsensusError::NotLeader { leader: None }));
    cluster.stop().await;
}
