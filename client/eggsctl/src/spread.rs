//! Where the blocks of a span are, and whether they are far enough from each other.

use std::collections::BTreeMap;

use eggs_janitor_core::spread::{Place, shared};
use eggs_proto::pb::{BlockServiceInfo, Blocks, ClusterMapReply};
use eggs_proto::{BlockServiceId, flags};
use serde_json::{Value, json};

/// The disks of a cluster by id.
#[derive(Debug, Default)]
pub struct Disks(BTreeMap<u64, BlockServiceInfo>);

impl Disks {
    pub fn of(map: ClusterMapReply) -> Disks {
        Disks(map.block_services.into_iter().map(|disk| (disk.id, disk)).collect())
    }

    pub fn get(&self, service: u64) -> Option<&BlockServiceInfo> {
        self.0.get(&service)
    }

    /// ` domain=… path=… flags=…`; of a disk nobody knows, that.
    pub fn words(&self, service: u64) -> String {
        let Some(disk) = self.get(service) else { return " (not in the cluster)".to_owned() };
        let mut words =
            format!(" domain={} address={} path={}", disk.failure_domain, disk.address, disk.path);
        if disk.flags != 0 {
            words += &format!(" flags={}", flags::names(disk.flags).join(","));
        }
        words
    }

    /// What is added to a block in JSON.
    pub fn describe(&self, service: u64, document: &mut Value) {
        let disk = self.get(service);
        document["address"] = disk.map(|disk| disk.address.clone()).into();
        document["failure_domain"] = disk.map(|disk| disk.failure_domain.clone()).into();
        document["path"] = disk.map(|disk| disk.path.clone()).into();
        document["flags"] = json!(disk.map(|disk| flags::names(disk.flags)));
    }

    /// Why the blocks are not as far from each other as they should be: two on a disk, or in a failure domain.
    pub fn under_spread(&self, blocks: &Blocks) -> Option<String> {
        let domain = |id: BlockServiceId| self.get(id.0).map(|disk| &disk.failure_domain[..]);
        let (place, there) = shared(blocks, domain)?;
        let place = match place {
            Place::Disk(id) => format!("disk {id}"),
            Place::FailureDomain(name) => format!("failure domain {name}"),
        };
        let there: Vec<String> = there.iter().map(usize::to_string).collect();
        Some(format!("blocks {} share the {place}", there.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use eggs_proto::pb::Block;

    use super::*;

    #[test]
    fn blocks_too_near_each_other_are_seen() {
        let disk = |id: u64, domain: &str| BlockServiceInfo {
            id,
            failure_domain: domain.to_owned(),
            ..BlockServiceInfo::default()
        };
        let block_services = vec![disk(1, "a"), disk(2, "b"), disk(3, "b")];
        let disks = Disks::of(ClusterMapReply { block_services, ..ClusterMapReply::default() });
        let spread = |services: &[u64]| {
            let block = |&block_service: &u64| Block { block_service, ..Block::default() };
            let blocks = services.iter().map(block).collect();
            disks.under_spread(&Blocks { blocks, ..Blocks::default() })
        };
        assert_eq!(spread(&[1, 2]), None);
        assert_eq!(spread(&[1, 9]), None, "where nobody knows");
        assert_eq!(spread(&[1, 2, 3]).as_deref(), Some("blocks 1, 2 share the failure domain b"));
        assert!(spread(&[1, 2, 1]).unwrap().starts_with("blocks 0, 2 share the disk 0x"));
    }
}
