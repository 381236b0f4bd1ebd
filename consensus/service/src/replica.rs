//! A store in its cluster: join, register, follow the map, stop.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use eggs_consensus::{Event, GroupId, GroupStatus, Handle, PeerHandler, Runner};
use eggs_daemon::registry::{JoinError, MapWatch, Registry};
use eggs_daemon::space::Space;
use eggs_daemon::{CancellationToken, DataDirectory, Secret};
use eggs_machine::Machine;
use eggs_proto::limits::CLOCK_OFFSET_MAX;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{ClusterId, pb};
use tokio::sync::Notify;

use crate::quorum::Quorum;
use crate::start::{StartError, StoreOptions, start};

/// How long a store with a damaged log waits for shuckle to say whether others have what it held.
const ASK_MAX: Duration = Duration::from_secs(10);
/// How long an orderly stop waits for others to take over.
const HAND_OVER_MAX: Duration = Duration::from_secs(1);
/// Between looks whether they have.
const HAND_OVER_PAUSE: Duration = Duration::from_millis(20);

/// Between two tellings of a map that has not changed.
const REPEAT_INTERVAL: Duration = Duration::from_secs(30);
/// Heartbeats out of turn while a change of members gets no further.
const EAGER_BEATS: u32 = 20;

/// What the coordinator has in flight, where it leads; nothing elsewhere.
#[derive(Debug, Clone, Default)]
pub struct InFlight {
    pub transactions: u32,
    /// Those of them that take long, the oldest first; at most [`SLOW_TRANSACTIONS_MAX`].
    ///
    /// [`SLOW_TRANSACTIONS_MAX`]: eggs_proto::limits::SLOW_TRANSACTIONS_MAX
    pub slow: Vec<pb::TransactionInfo>,
}

/// What a store needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its data directory; made when absent.
    pub data: PathBuf,
    pub kind: pb::StoreKind,
    /// The machine it is on: no two replicas of a group share one.
    pub host: String,
    /// Of the cluster: shown to shuckle and to the other stores.
    pub secret: Secret,
    /// `HOST:PORT` of each shuckle that is known.
    pub shuckle: Vec<String>,
    pub read_lease: bool,
    pub snapshot_bytes_per_second: u64,
}

/// One store of replicas in this process.
#[derive(Debug)]
pub struct Replica {
    kind: pb::StoreKind,
    name: &'static str,
    host: String,
    secret: Secret,
    shuckle: Vec<String>,
    directory: Mutex<DataDirectory>,
    cluster: Arc<OnceLock<ClusterId>>,
    handle: Handle,
    runner: Runner,
    space: Arc<Space>,
    quorum: Arc<Quorum>,
    /// Tells this run from those before.
    boot: u64,
    /// Somebody leads a group that another one led, or members have changed.
    news: Arc<Notify>,
    /// How far changes of members were when last looked at, and how often they were there.
    changing: Mutex<(Option<u64>, u32)>,
}

/// The cluster, once a store is part of it.
#[derive(Debug, Clone)]
pub struct Joined {
    pub registry: Registry,
    pub map: MapWatch,
}

impl Joined {
    pub fn cluster(&self) -> ClusterId {
        self.registry.cluster()
    }
}

impl Replica {
    /// Opens the data directory and brings every replica up to its log. Blocks; must be called within a tokio
    /// runtime, on a thread that may block.
    ///
    /// # Errors
    /// A directory that is not ours, a log that cannot be read; a damaged log where no other replica has what
    /// it held.
    pub fn open<M, Of, On>(settings: Settings, machine_of: Of, on_event: On) -> Result<Replica, StartError>
    where
        M: Machine + Send + 'static,
        M::Effect: Send + 'static,
        Of: Fn(GroupId) -> Option<M> + Clone + Send + 'static,
        On: FnMut(Event<M::Effect>) + Clone + Send + 'static,
    {
        let news = Arc::new(Notify::new());
        let (told, mut on_event) = (Arc::clone(&news), on_event);
        let on_event = move |event: Event<M::Effect>| {
            if matches!(event, Event::Role(..)) {
                told.notify_one();
            }
            on_event(event);
        };
        let Settings { data, kind, host, secret, shuckle, read_lease, snapshot_bytes_per_second } = settings;
        let boot = getrandom::u64().map_err(|error| StartError::Entropy(error.to_string()))?;
        let name = name(kind);
        let mut directory = DataDirectory::open(&data, name)?;
        let cluster = directory.cluster();
        let options = StoreOptions { name, read_lease, snapshot_bytes_per_second };
        let may_start_anew = || others_have_it(&shuckle, &secret, cluster);
        let (handle, runner) = start(&mut directory, &options, may_start_anew, machine_of, on_event)?;
        let known = OnceLock::new();
        if let Some(cluster) = cluster {
            // Without shuckle too, it is known whom to believe.
            handle.join(cluster, secret.to_array());
            let _ = known.set(cluster);
        }
        Ok(Replica {
            kind,
            name,
            host,
            secret,
            shuckle,
            space: Arc::new(Space::new(directory.path().to_owned())),
            directory: Mutex::new(directory),
            cluster: Arc::new(known),
            quorum: Arc::new(Quorum::new(handle.clone())),
            handle,
            runner,
            boot,
            news,
            changing: Mutex::default(),
        })
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// The room on the disk that holds the data.
    pub fn space(&self) -> &Arc<Space> {
        &self.space
    }

    /// The cluster, as soon as it is known.
    pub fn cluster(&self) -> &Arc<OnceLock<ClusterId>> {
        &self.cluster
    }

    /// Finds words for groups that do not get on.
    pub fn quorum(&self) -> &Arc<Quorum> {
        &self.quorum
    }

    /// What answers the other stores: for the one `peer_streams` of the port.
    pub fn peers(&self) -> PeerHandler {
        self.handle.peers()
    }

    /// Why it is not well, if it is not.
    pub fn health(&self) -> Result<(), String> {
        if self.cluster.get().is_none() {
            return Err("not joined a cluster yet".to_owned());
        }
        match clock_problem(self.handle.clock_offset()) {
            Some(problem) => Err(problem),
            None => Ok(()),
        }
    }

    /// Finds the cluster, claims the directory for it and begins to watch its map. `None`: told to stop meanwhile.
    ///
    /// # Errors
    /// What no retry helps against.
    pub async fn join(
        &self,
        with_keys: bool,
        stop: &CancellationToken,
    ) -> Result<Option<Joined>, StartError> {
        let expected = self.directory().cluster();
        let joined = Registry::join(&self.shuckle, Some(self.secret.clone()), expected, stop).await;
        let registry = match joined {
            Err(JoinError::Stopped { .. }) => return Ok(None),
            joined => joined?,
        };
        self.claim(registry.cluster())?;
        let map = registry.watch(with_keys, stop.clone());
        self.quorum.watch(map.clone());
        Ok(Some(Joined { registry, map }))
    }

    /// Makes the store one of a cluster that is known otherwise: the registry's own, which founds it.
    ///
    /// # Errors
    /// The directory is another cluster's, or cannot be written.
    pub fn claim(&self, cluster: ClusterId) -> Result<(), StartError> {
        self.directory().claim(cluster)?;
        let _ = self.cluster.set(cluster);
        self.handle.join(cluster, self.secret.to_array());
        Ok(())
    }

    /// Registers as `advertised`, goes on telling how the store is, and does what the map says, until `stop`;
    /// then hands over what it leads.
    ///
    /// # Errors
    /// What no retry helps against, and a consensus thread that has stopped.
    pub async fn serve<F: Future<Output = InFlight>>(
        &self,
        joined: &Joined,
        advertised: &str,
        in_flight: impl Fn() -> F,
        stop: CancellationToken,
    ) -> Result<(), StartError> {
        let report = || {
            let in_flight = in_flight();
            async { self.report(advertised, in_flight.await, &joined.map).await }
        };
        let registered = || tracing::info!(store = %self.handle.store(), host = self.host, "registered");
        let heartbeat = joined.registry.heartbeat_with_news(report, registered, &self.news, stop);
        tokio::select! {
            result = heartbeat => result?,
            () = follow(&self.handle, joined.map.clone()) => {}
            why = self.handle.stopped() => {
                let why = why.unwrap_or_else(|| "told to".to_owned());
                return Err(StartError::Failed { name: self.name, why });
            }
        }
        self.hand_over().await;
        Ok(())
    }

    /// Finishes what was accepted and makes the state durable. Blocks for as long as that takes.
    pub fn stop(self) {
        self.runner.stop();
    }

    fn directory(&self) -> MutexGuard<'_, DataDirectory> {
        self.directory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn report(&self, advertised: &str, in_flight: InFlight, map: &MapWatch) -> Op {
        let status = self.handle.status().await;
        let led: Vec<pb::LedGroup> = status.into_iter().filter(|status| status.leader).map(led).collect();
        // Until they are as wanted, others wait for each step; but not for steps that do not come.
        let mark = changing(&led, &map.get());
        let mut last = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        *last = if mark == last.0 { (mark, last.1.saturating_add(1)) } else { (mark, 0) };
        if mark.is_some() && last.1 < EAGER_BEATS {
            self.news.notify_one();
        }
        drop(last);
        let clock_offset = self.handle.clock_offset();
        let full = || self.space.is_almost_full().then(|| "the disk with its data is almost full".to_owned());
        Op::RegisterStore(pb::RegisterStore {
            id: self.handle.store().0,
            kind: self.kind as i32,
            host: self.host.clone(),
            address: advertised.to_owned(),
            clock_offset,
            problem: clock_problem(clock_offset).or_else(full).unwrap_or_default(),
            led,
            transactions: in_flight.transactions,
            slow_transactions: in_flight.slow,
            boot: self.boot,
        })
    }

    /// Others lead when this store goes, without having to notice that it has gone.
    async fn hand_over(&self) {
        let leads = |status: &GroupStatus| status.leader && status.membership.voters.len() > 1;
        if !self.handle.status().await.iter().any(leads) {
            return;
        }
        self.handle.hand_over();
        let handed_over = async {
            while self.handle.status().await.iter().any(leads) {
                tokio::time::sleep(HAND_OVER_PAUSE).await;
            }
        };
        if tokio::time::timeout(HAND_OVER_MAX, handed_over).await.is_err() {
            tracing::warn!("not all groups led here could be handed over");
        }
    }
}

/// Does what each map says, and says it again now and then: a replica may have come that did not exist before.
async fn follow(handle: &Handle, mut map: MapWatch) {
    loop {
        match tokio::time::timeout(REPEAT_INTERVAL, map.changed()).await {
            Ok(true) | Err(_) => handle.follow(map.get()),
            Ok(false) => std::future::pending::<()>().await,
        }
    }
}

/// Whether the cluster keeps more than one replica, so that others have what a damaged log held.
fn others_have_it(shuckle: &[String], secret: &Secret, cluster: Option<ClusterId>) -> Result<(), String> {
    let asking = async {
        let stop = CancellationToken::new();
        tokio::time::timeout(ASK_MAX, Registry::join(shuckle, Some(secret.clone()), cluster, &stop)).await
    };
    match tokio::runtime::Handle::current().block_on(asking) {
        Ok(Ok(registry)) if registry.replicas() > 1 => Ok(()),
        Ok(Ok(_)) => {
            Err("the cluster keeps one replica of everything, restore the directory from a backup".to_owned())
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!(
            "shuckle at {} cannot be reached to ask whether other replicas have what it held; \
             start again when it can, or restore the directory from a backup",
            shuckle.join(", ")
        )),
    }
}

fn name(kind: pb::StoreKind) -> &'static str {
    match kind {
        pb::StoreKind::StoreShard => "shard",
        pb::StoreKind::StoreCrossdir => "crossdir",
        pb::StoreKind::StoreShuckle => "shuckle",
        pb::StoreKind::StoreUnspecified => "store",
    }
}

/// What is said of a clock that is too far from the others' to lead.
fn clock_problem(offset_ns: i64) -> Option<String> {
    let off = Duration::from_nanos(offset_ns.unsigned_abs());
    if off <= CLOCK_OFFSET_MAX {
        return None;
    }
    let side = if offset_ns > 0 { "ahead of" } else { "behind" };
    Some(format!("its clock is {} ms {side} the other hosts', so it does not lead", off.as_millis()))
}

/// Something that is another with every step of the groups led here whose members are not what the map wants them to be,
/// or not what it knows; `None` when there are none.
fn changing(led: &[pb::LedGroup], map: &pb::ClusterMapReply) -> Option<u64> {
    let differs = |led: &&pb::LedGroup| {
        let place = map.groups.iter().find(|place| place.group == led.group);
        place.is_some_and(|place| {
            !led.learners.is_empty()
                || led.conf_index != place.conf_index
                || place.wanted.len() != led.voters.len()
                || !place.wanted.iter().all(|store| led.voters.contains(store))
        })
    };
    led.iter().filter(differs).fold(None, |mark, led| {
        let sent: u64 = led.progress.iter().map(|progress| progress.snapshot_sent).sum();
        Some(mark.unwrap_or(0).wrapping_add(led.conf_index).wrapping_add(sent).wrapping_add(1))
    })
}

fn led(status: GroupStatus) -> pb::LedGroup {
    let progress = status.progress.iter().map(|progress| pb::ReplicaProgress {
        store: progress.store.0,
        matched_index: progress.matched_index,
        snapshot_sent: progress.snapshot_sent,
        snapshot_total: progress.snapshot_total,
    });
    let membership = pb::Membership::from(&status.membership);
    pb::LedGroup {
        group: u32::from(status.group.0),
        term: status.term,
        applied_index: status.applied_index,
        log_bytes: status.log_bytes,
        progress: progress.collect(),
        voters: membership.voters,
        learners: membership.learners,
        conf_index: membership.index,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_that_are_as_wanted_are_at_rest() {
        let place = pb::GroupPlace { group: 1, conf_index: 4, wanted: vec![1, 2], ..Default::default() };
        let map = pb::ClusterMapReply { groups: vec![place], ..Default::default() };
        let led = pb::LedGroup { group: 1, conf_index: 4, voters: vec![2, 1], ..Default::default() };
        assert_eq!(changing(std::slice::from_ref(&led), &map), None);
        let steps = [
            pb::LedGroup { learners: vec![3], ..led.clone() },
            pb::LedGroup { conf_index: 5, ..led.clone() },
            pb::LedGroup { conf_index: 6, voters: vec![1], ..led },
        ];
        let marks = steps.map(|led| changing(&[led], &map));
        assert!(marks.iter().all(Option::is_some) && marks[0] != marks[1] && marks[1] != marks[2]);
    }

    #[test]
    fn a_clock_within_the_bound_is_no_problem() {
        let bound = i64::try_from(CLOCK_OFFSET_MAX.as_nanos()).unwrap();
        assert_eq!((clock_problem(bound), clock_problem(-bound), clock_problem(0)), (None, None, None));
        assert!(clock_problem(bound + 1).unwrap().contains("ms ahead of"));
        assert!(clock_problem(i64::MIN).unwrap().contains("ms behind"));
    }
}
