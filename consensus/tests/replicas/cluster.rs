//! Stores that replicate a few groups, each behind a port of its own on loopback.

#![allow(dead_code, reason = "not every test uses all of it")]

use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_consensus::{
    Applied, ConsensusError, GroupId, GroupStatus, Handle, Membership, Options, Runner, peer_streams, spawn,
};
use eggs_daemon::server::{self, Routes};
use eggs_machine::{Machine, Outcome, Table, TableError, Tx};
use eggs_proto::{ClusterId, SessionId, StoreId, Time, pb};
use std::sync::Arc;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub const GROUP: GroupId = GroupId(3);
pub const OTHER: GroupId = GroupId(4);
pub const CLUSTER: ClusterId = ClusterId([7; 16]);
pub const SECRET: [u8; 32] = [9; 32];
/// Nothing answers there: the port is reserved.
const NOWHERE: &str = "127.0.0.1:1";
const PATIENCE: Duration = Duration::from_secs(30);

/// Appends the command to the one row and answers the whole.
pub struct Append;

impl Machine for Append {
    type Effect = ();

    fn apply<T: Table + ?Sized>(
        &self,
        tx: &mut Tx<'_, T>,
        _time: Time,
        command: &[u8],
    ) -> Result<Outcome<()>, TableError> {
        let mut row = tx.get(b"row")?.unwrap_or_default().to_vec();
        row.extend_from_slice(command);
        tx.put(&b"row"[..], row.clone())?;
        Ok(Outcome { reply: row.into(), effects: Vec::new() })
    }
}

pub fn reply(bytes: &'static [u8]) -> Applied {
    Applied::Reply(Bytes::from_static(bytes))
}

pub fn row(table: Option<&dyn Table>) -> Bytes {
    table.and_then(|table| table.get(b"row").unwrap()).unwrap_or_default()
}

/// Looks again and again until it is so.
pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

struct Running {
    handle: Handle,
    runner: Runner,
    server: Option<(CancellationToken, JoinHandle<()>)>,
}

pub struct Store {
    id: StoreId,
    directory: TempDir,
    address: String,
    isolated: bool,
    running: Option<Running>,
}

impl Store {
    pub fn id(&self) -> StoreId {
        self.id
    }

    pub fn handle(&self) -> &Handle {
        &self.running.as_ref().expect("it runs").handle
    }

    pub async fn status(&self, group: GroupId) -> Option<GroupStatus> {
        self.handle().status().await.into_iter().find(|status| status.group == group)
    }

    async fn start(&mut self) {
        let options = Options {
            name: "test",
            directory: self.directory.path().to_owned(),
            store: self.id,
            lease: false,
            snapshot_bytes_per_second: 64 << 20,
        };
        let (handle, runner) =
            tokio::task::spawn_blocking(move || spawn(&options, machine_of, |_| {})).await.unwrap().unwrap();
        handle.join(CLUSTER, SECRET);
        self.running = Some(Running { handle, runner, server: None });
        self.serve().await;
    }

    async fn serve(&mut self) {
        let running = self.running.as_mut().expect("it runs");
        let listener = server::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        self.address = listener.local_addr().unwrap().to_string();
        let stop = CancellationToken::new();
        let routes = Routes::from(axum::Router::new()).with(peer_streams(vec![running.handle.peers()]));
        let serving = tokio::spawn(server::serve(listener, routes, stop.clone()));
        running.server = Some((stop, serving));
    }

    async fn stop(&mut self) {
        let Some(running) = self.running.take() else { return };
        if let Some((stop, serving)) = running.server {
            stop.cancel();
            serving.await.unwrap();
        }
        tokio::task::spawn_blocking(move || running.runner.stop()).await.unwrap();
        assert_eq!(running.handle.stopped().await, None);
    }
}

fn machine_of(group: GroupId) -> Option<Append> {
    (group.0 < 256).then_some(Append)
}

pub struct Cluster {
    stores: Vec<Store>,
}

impl Cluster {
    pub async fn start(stores: usize) -> Cluster {
        Cluster::start_with(stores, &[GROUP, OTHER]).await
    }

    pub async fn start_with(stores: usize, groups: &[GroupId]) -> Cluster {
        let mut cluster = Cluster { stores: Vec::new() };
        for _ in 0..stores {
            cluster.add_one().await;
        }
        let voters: Vec<StoreId> = cluster.stores.iter().map(Store::id).collect();
        for store in &cluster.stores {
            store.handle().found(groups.iter().map(|&group| (group, voters.clone())).collect());
        }
        for &group in groups {
            cluster.leader(group).await;
        }
        cluster
    }

    /// Another store in an empty directory; answers its position.
    pub async fn add_one(&mut self) -> usize {
        let position = self.stores.len();
        let mut store = Store {
            id: StoreId(1000 + position as u64),
            directory: tempfile::tempdir().unwrap(),
            address: String::new(),
            isolated: false,
            running: None,
        };
        store.start().await;
        self.stores.push(store);
        self.tell_addresses();
        position
    }

    pub fn stores(&self) -> impl Iterator<Item = &Store> {
        self.stores.iter().filter(|store| store.running.is_some())
    }

    pub fn store(&self, position: usize) -> &Store {
        &self.stores[position]
    }

    pub fn address(&self, id: StoreId) -> String {
        self.stores.iter().find(|store| store.id == id).unwrap().address.clone()
    }

    fn tell_addresses(&self) {
        for store in self.stores() {
            let seen = |other: &Store| {
                let apart = store.id != other.id && (store.isolated || other.isolated);
                let address = if apart { NOWHERE.to_owned() } else { other.address.clone() };
                (other.id, address)
            };
            store.handle().addresses(self.stores.iter().map(seen).collect());
        }
    }

    /// As the registry's map would say.
    pub fn follow(&self, groups: Vec<pb::GroupPlace>) {
        let stores = self.stores.iter().map(|store| pb::StoreInfo {
            id: store.id.0,
            address: store.address.clone(),
            ..pb::StoreInfo::default()
        });
        let map = Arc::new(pb::ClusterMapReply { stores: stores.collect(), groups, ..Default::default() });
        for store in self.stores() {
            store.handle().follow(Arc::clone(&map));
        }
    }

    /// No connection in or out of it any more; it runs on.
    pub async fn isolate(&mut self, position: usize) {
        let store = &mut self.stores[position];
        store.isolated = true;
        if let Some((_, serving)) = store.running.as_mut().and_then(|running| running.server.take()) {
            serving.abort();
            let _ = serving.await;
        }
        self.tell_addresses();
    }

    pub async fn heal(&mut self, position: usize) {
        let store = &mut self.stores[position];
        store.isolated = false;
        store.serve().await;
        self.tell_addresses();
    }

    pub async fn stop_one(&mut self, position: usize) {
        self.stores[position].stop().await;
    }

    pub async fn start_one(&mut self, position: usize) {
        self.stores[position].start().await;
        self.tell_addresses();
    }

    pub async fn stop(&mut self) {
        for store in &mut self.stores {
            // Quicker than waiting for others to take over.
            store.stop().await;
        }
    }

    /// Where a group is led, as those say who can lead it.
    pub async fn try_leader(&self, group: GroupId) -> Option<usize> {
        for (position, store) in self.stores.iter().enumerate() {
            if store.running.is_none() || store.isolated {
                continue;
            }
            if store.status(group).await.is_some_and(|status| status.leader) {
                return Some(position);
            }
        }
        None
    }

    pub async fn leader_position(&self, group: GroupId) -> usize {
        let mut leader = None;
        eventually("somebody leads", async || {
            leader = self.try_leader(group).await;
            leader.is_some()
        })
        .await;
        leader.unwrap()
    }

    pub async fn leader(&self, group: GroupId) -> StoreId {
        self.stores[self.leader_position(group).await].id
    }

    /// Has a group led from there, as the registry would.
    pub async fn lead_from(&self, group: GroupId, position: usize) {
        let wanted: Vec<u64> = self.stores().map(|store| store.id.0).collect();
        let preferred = self.stores[position].id.0;
        let place = pb::GroupPlace { group: u32::from(group.0), wanted, preferred, ..Default::default() };
        self.follow(vec![place]);
        eventually("the preferred store leads", async || self.try_leader(group).await == Some(position))
            .await;
    }

    pub async fn membership(&self, position: usize, group: GroupId) -> Membership {
        self.stores[position].status(group).await.unwrap().membership
    }

    pub async fn write(&self, group: GroupId, sequence: u64, command: &'static [u8]) -> Applied {
        self.write_bytes(group, sequence, Bytes::from_static(command)).await
    }

    /// Wherever it is led, until it is answered.
    pub async fn write_bytes(&self, group: GroupId, sequence: u64, command: Bytes) -> Applied {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let leader = self.leader_position(group).await;
            let command = command.clone();
            let handle = self.stores[leader].handle();
            match handle.write(group, SessionId(1), sequence, move |_, _| Ok(command)).await {
                Ok(applied) => return applied,
                Err(ConsensusError::NotLeader { .. } | ConsensusError::Busy) => {}
                Err(error) => panic!("{error}"),
            }
            assert!(Instant::now() < deadline, "no write within {PATIENCE:?}");
        }
    }

    /// All that run and are members come to the same state, this one.
    pub async fn same_everywhere(&self, group: GroupId, expected: &[u8]) {
        for store in self.stores().filter(|store| !store.isolated) {
            eventually("the row is as expected", async || {
                let row = store.handle().local(move |views, _| row(views.local(group))).await.unwrap();
                row == expected
            })
            .await;
        }
        let mut hashes = Vec::new();
        for store in self.stores().filter(|store| !store.isolated) {
            let status = store.status(group).await.unwrap();
            hashes.push((status.applied_index, status.state_hash));
        }
        hashes.dedup_by_key(|(_, hash)| *hash);
        assert_eq!(hashes.len(), 1, "{hashes:?}");
    }
}
