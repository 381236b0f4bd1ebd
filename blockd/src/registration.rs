//! What shuckle is told, every heartbeat.

use std::collections::BTreeMap;

use eggs_daemon::CancellationToken;
use eggs_daemon::registry::{Registry, RegistryCallError};
use eggs_proto::flags::{LOST, STALE};
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{BlockServiceId, pb};

use crate::disk::Disk;
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
        let report = || async {
            self.recall(registry).await;
            Op::RegisterBlockServices(self.registration(&address))
        };
        registry.heartbeat(report, registered, stop).await
    }

    /// One heartbeat. Disks that were lost before this process ever saw them are in it once the
    /// cluster has told their ids.
    pub fn registration(&self, address: &str) -> pb::RegisterBlockServices {
        let block_services = self.reports();
        block_services.iter().for_each(telemetry::disk);
        pb::RegisterBlockServices {
            address: address.to_owned(),
            failure_domain: self
                .disks()
                .first()
                .map(|disk| disk.config().failure_domain.clone())
                .unwrap_or_default(),
            block_services,
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
