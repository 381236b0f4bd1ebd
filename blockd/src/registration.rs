//! What shuckle is told, every heartbeat.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use eggs_daemon::CancellationToken;
use eggs_daemon::registry::{Registry, RegistryCallError};
use eggs_proto::flags::{LOST, STALE};
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{BlockServiceId, pb};

use crate::disk::{Disk, lock};
use crate::service::Service;
use crate::telemetry;

const PROBLEM_BYTES_MAX: usize = 1000;

impl Service {
    /// Registers the disks at `address` with shuckle and keeps telling it how they feel, until `stop`.
    /// `registered` is called once, when shuckle has taken the first report.
    ///
    /// # Errors
    /// What no retry helps against.
    pub async fn run_registration(
        &self,
        registry: &Registry,
        address: String,
        registered: impl FnOnce(),
        stop: CancellationToken,
    ) -> Result<(), RegistryCallError> {
        let told = Mutex::new(BTreeSet::new());
        let report = || async {
            self.recall(registry).await;
            let registration = self.registration(&address);
            *lock(&told) = registration.block_services.iter().map(|disk| disk.id).collect();
            Op::RegisterBlockServices(registration)
        };
        let answered = |refusal: Option<&pb::Error>| self.answered(&lock(&told), refusal);
        registry.heartbeat_with_answers(report, registered, answered, stop).await
    }

    /// What shuckle says to a heartbeat that told of these disks. Whether the next one is without some of them, which
    /// must not keep the others from being heard of.
    fn answered(&self, told: &BTreeSet<u64>, refusal: Option<&pb::Error>) -> bool {
        let told = |disk: &&Arc<Disk>| disk.id().is_some_and(|id| told.contains(&id.0));
        let Some(error) = refusal else {
            self.disks().iter().filter(told).for_each(|disk| disk.accept());
            return false;
        };
        let blamed = |disk: &&Arc<Disk>| disk.id().is_some_and(|id| error.block_services.contains(&id.0));
        let (blamed, others): (Vec<_>, Vec<_>) = self.disks().iter().filter(told).partition(blamed);
        blamed.iter().for_each(|disk| disk.refuse(&error.message));
        !blamed.is_empty() && !others.is_empty()
    }

    /// One heartbeat. Disks that were lost before this process ever saw them are in it once the
    /// cluster has told their ids; those that it refused a moment ago are not, so that the others are heard of.
    pub fn registration(&self, address: &str) -> pb::RegisterBlockServices {
        let mut block_services = self.reports();
        block_services.iter().for_each(telemetry::disk);
        let refused: BTreeSet<u64> = self
            .disks()
            .iter()
            .filter(|disk| disk.is_refused())
            .filter_map(|disk| Some(disk.id()?.0))
            .collect();
        // When there is no other, it asks again and again.
        if block_services.iter().any(|report| !refused.contains(&report.id)) {
            block_services.retain(|report| !refused.contains(&report.id));
        }
        for store in self.disks().iter().filter_map(|disk| disk.store().ok()) {
            telemetry::store(store.identity().service, &store.counters, store.totals().segments);
        }
        pb::RegisterBlockServices {
            address: address.to_owned(),
            failure_domain: self
                .disks()
                .first()
                .map(|disk| disk.config().failure_domain.clone())
                .unwrap_or_default(),
            block_services,
            boot: self.boot(),
        }
    }

    /// Of every disk whose id is known. Disks on one file system report an equal share of it each, so
    /// that the cluster's sum is true.
    pub(crate) fn reports(&self) -> Vec<pb::BlockServiceReport> {
        let reports: Vec<_> = self.disks().iter().map(|disk| (disk, disk.report())).collect();
        let mut sharing = BTreeMap::<u64, u64>::new();
        for device in reports.iter().filter_map(|(_, report)| report.device) {
            *sharing.entry(device).or_default() += 1;
        }
        let told = reports.into_iter().filter_map(|(disk, report)| {
            let (id, key) = report.known?;
            let share = report.device.and_then(|device| sharing.get(&device)).copied().unwrap_or(1);
            Some(pb::BlockServiceReport {
                id: id.0,
                key: key.to_vec().into(),
                storage_class: disk.config().storage_class.into(),
                failure_domain: disk.config().failure_domain.clone(),
                path: disk.path().display().to_string(),
                capacity_bytes: report.space.capacity_bytes / share,
                available_bytes: report.space.available_bytes() / share,
                used_bytes: report.totals.used_bytes,
                blocks: report.totals.blocks,
                io_errors: report.io_errors,
                problem: shortened(report.problem),
                read_only: report.read_only,
                dead_bytes: report.totals.dead_bytes,
            })
        });
        told.collect()
    }

    /// Asks the cluster which ids the disks had that were gone before this process started.
    async fn recall(&self, registry: &Registry) {
        let unknown: Vec<_> = self.disks().iter().filter(|disk| disk.id().is_none()).collect();
        if unknown.is_empty() {
            return;
        }
        match registry.map(true).await {
            Ok(map) => unknown.into_iter().for_each(|disk| recall(disk, &map)),
            // The heartbeat that follows will complain.
            Err(error) => tracing::debug!(%error, "the ids of lost disks are not known yet"),
        }
    }
}

/// Paths can be long, and the registry takes no more than a kibibyte.
fn shortened(mut problem: String) -> String {
    problem.truncate(problem.floor_char_boundary(PROBLEM_BYTES_MAX));
    problem
}

/// The one block service that was at this path, in this failure domain, of this class, and that nobody serves now.
fn recall(disk: &Disk, map: &pb::ClusterMapReply) {
    let (config, path) = (disk.config(), disk.path().display().to_string());
    let mut fitting = map.block_services.iter().filter(|service| {
        service.path == path
            && service.failure_domain == config.failure_domain
            && service.storage_class == u32::from(config.storage_class)
            && service.flags & (STALE | LOST) != 0
    });
    let (Some(service), None) = (fitting.next(), fitting.next()) else { return };
    let Ok(key) = <[u8; 32]>::try_from(service.key.as_ref()) else { return };
    disk.remember(BlockServiceId(service.id), key);
    tracing::info!(path, id = %BlockServiceId(service.id), "the cluster remembers the lost disk's id");
}
