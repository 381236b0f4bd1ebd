//! The block services as the leader of a shard knows them: where new blocks can go, and the keys
//! that certificates and proofs are made with.

use std::collections::BTreeMap;

use eggs_proto::{BlockServiceId, flags, mac, pb};

/// What placement and signing need of the cluster map.
#[derive(Clone, Default)]
pub struct Cluster {
    pub(crate) services: BTreeMap<u64, Service>,
    /// Storage class → its block services that take new blocks.
    pub(crate) writable: BTreeMap<u32, Vec<Candidate>>,
}

#[derive(Clone)]
pub(crate) struct Service {
    pub key: Option<mac::Key>,
    pub domain: Domain,
    /// Its blocks are not coming back, or go with it.
    pub gone: bool,
}

/// A failure domain, by a number instead of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Domain(pub usize);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    pub id: BlockServiceId,
    pub domain: Domain,
    pub capacity_bytes: u64,
    pub available_bytes: u64,
}

impl Cluster {
    /// From a map that was asked for with keys. Services without a key of 32 bytes get no blocks.
    pub fn from_map(map: &pb::ClusterMapReply) -> Cluster {
        let mut cluster = Cluster::default();
        let mut domains: BTreeMap<&str, Domain> = BTreeMap::new();
        for info in map.block_services.iter().filter(|info| info.id != 0) {
            let key: Option<mac::Key> = info.key[..].try_into().ok();
            let next = Domain(domains.len());
            let domain = *domains.entry(&info.failure_domain).or_insert(next);
            let gone = info.flags & (flags::DECOMMISSIONED | flags::LOST) != 0;
            if cluster.services.insert(info.id, Service { key, domain, gone }).is_some() {
                continue;
            }
            if key.is_some() && flags::writable(info.flags) && !info.read_only {
                cluster.writable.entry(info.storage_class).or_default().push(Candidate {
                    id: BlockServiceId(info.id),
                    domain,
                    capacity_bytes: info.capacity_bytes,
                    available_bytes: info.available_bytes,
                });
            }
        }
        cluster
    }

    /// Whether there was a map yet.
    pub(crate) fn is_known(&self) -> bool {
        !self.services.is_empty()
    }

    /// Whether the service is gone for good, or about to be, with all its blocks. One that is not known here may be newer than
    /// this map: that it is not, the janitor has made sure.
    pub(crate) fn is_gone(&self, service: BlockServiceId) -> bool {
        self.services.get(&service.0).is_none_or(|service| service.gone)
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
