//! The block services as the leader of a shard knows them: where new blocks can go, and the keys
//! that certificates and proofs are made with.

use std::collections::BTreeMap;

use eggs_proto::{BlockServiceId, flags, mac, pb};

/// What placement and signing need of the cluster map.
#[derive(Clone, Default)]
pub struct Cluster {
    pub(crate) services: BTreeMap<u64, Service>,
    /// Storage class → failure domain → its block services that take new blocks.
    pub(crate) writable: BTreeMap<u32, Vec<Domain>>,
}

#[derive(Clone)]
pub(crate) struct Service {
    pub key: Option<mac::Key>,
    /// Which of its class's `writable` domains it is in; `None` when it takes no new blocks. A service
    /// of another class has none of theirs.
    pub domain: Option<(u32, usize)>,
}

#[derive(Debug, Clone)]
pub(crate) struct Domain {
    pub services: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    pub id: BlockServiceId,
    pub available_bytes: u64,
}

impl Cluster {
    /// From a map that was asked for with keys. Services without a key of 32 bytes get no blocks.
    pub fn from_map(map: &pb::ClusterMapReply) -> Cluster {
        let mut services = BTreeMap::new();
        let mut by_domain: BTreeMap<(u32, &str), Vec<Candidate>> = BTreeMap::new();
        for info in map.block_services.iter().filter(|info| info.id != 0) {
            let key: Option<mac::Key> = info.key[..].try_into().ok();
            if services.insert(info.id, Service { key, domain: None }).is_some() {
                continue;
            }
            if key.is_some() && flags::writable(info.flags) {
                by_domain
                    .entry((info.storage_class, &info.failure_domain))
                    .or_default()
                    .push(Candidate { id: BlockServiceId(info.id), available_bytes: info.available_bytes });
            }
        }
        let mut writable: BTreeMap<u32, Vec<Domain>> = BTreeMap::new();
        for ((class, _), candidates) in by_domain {
            let domains = writable.entry(class).or_default();
            for candidate in &candidates {
                if let Some(service) = services.get_mut(&candidate.id.0) {
                    service.domain = Some((class, domains.len()));
                }
            }
            domains.push(Domain { services: candidates });
        }
        Cluster { services, writable }
    }

    /// The secret of a block service; `None` when the map does not have it.
    pub fn key(&self, service: BlockServiceId) -> Option<&mac::Key> {
        self.services.get(&service.0)?.key.as_ref()
    }
}

/// Without the keys.
impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("services", &self.services.len())
            .field("writable", &self.writable)
            .finish()
    }
}
