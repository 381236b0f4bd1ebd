//! Where the parts of each host are, and whether what is there may be used.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use eggs_blockd::DiskConfig;
use eggs_daemon::DataDirectory;
use eggs_daemon::directory::{DirectoryError, Problem};
use eggs_proto::flags::{LOST, STALE};
use eggs_proto::limits::CLASS_FLASH;
use eggs_proto::{ClusterId, pb};
use eggs_shuckle_core::repairs::{Emptying, emptying};

use crate::error::StartError;
use crate::manifest::{DISKS_MAX, Manifest, disks_default};

/// The parts of a host that hold replicas.
pub(crate) const PARTS: [&str; 3] = ["shuckle", "shard", "crossdir"];

/// What a cluster is made of.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub data: PathBuf,
    pub hosts: u32,
    pub disks: usize,
    /// Disks that were there before.
    held: usize,
    /// Of those the places whose disk is gone for good.
    free: BTreeSet<usize>,
    /// It was complete once.
    pub complete: bool,
}

impl Layout {
    /// What the directory has, or what is asked of a new one.
    pub fn of(
        data: &Path,
        manifest: Option<&Manifest>,
        replicas: Option<u32>,
        disks: Option<usize>,
    ) -> Result<Layout, StartError> {
        let path = || data.to_owned();
        let hosts = match (manifest, replicas) {
            (Some(manifest), Some(asked)) if asked != manifest.replicas => {
                return Err(StartError::OtherReplicas { path: path(), held: manifest.replicas, asked });
            }
            (Some(manifest), _) => manifest.hosts,
            (None, asked) => asked.unwrap_or(1),
        };
        let held = manifest.map_or(0, |manifest| manifest.disks);
        let disks = disks.unwrap_or(if held == 0 { disks_default(hosts) } else { held });
        if !(1..=DISKS_MAX).contains(&disks) {
            return Err(StartError::DiskCount { asked: disks });
        }
        if disks < held {
            return Err(StartError::FewerDisks { path: path(), held, asked: disks });
        }
        let free = manifest.map(|manifest| manifest.free.clone()).unwrap_or_default();
        Ok(Layout { data: path(), hosts, disks, held, free, complete: manifest.is_some() })
    }

    /// As a host is called.
    pub fn name(host: u32) -> String {
        format!("host-{}", host + 1)
    }

    /// A host's folder; hosts are numbered from 0.
    pub fn folder(&self, host: u32) -> PathBuf {
        if self.hosts == 1 { self.data.clone() } else { self.data.join(Layout::name(host)) }
    }

    /// A host's disks.
    pub fn disks_of(&self, host: u32) -> Vec<DiskConfig> {
        let hosts = self.hosts as usize;
        let disk = |n: usize| DiskConfig {
            path: self.place(n),
            storage_class: CLASS_FLASH,
            // In one process nothing can fail alone but a disk; with several hosts, it is they that are stopped.
            failure_domain: if hosts == 1 { format!("disk-{n:02}") } else { Layout::name(host) },
            expect_existing: n < self.held && !(self.free.contains(&n) && is_vacant(&self.place(n))),
            options: Default::default(),
        };
        (0..self.disks).filter(|n| n % hosts == host as usize).map(disk).collect()
    }

    /// A disk's folder; all disks are numbered from 0.
    fn place(&self, n: usize) -> PathBuf {
        let host = (n % self.hosts as usize) as u32;
        self.folder(host).join("disks").join(format!("{n:02}"))
    }

    /// Places without a disk.
    pub fn vacant(&self) -> Vec<usize> {
        (0..self.disks).filter(|&n| is_vacant(&self.place(n))).collect()
    }

    /// Of the places without a disk those whose disk is not missed: it was forgotten, or given up and nothing is on it any more.
    pub fn free(&self, map: &pb::ClusterMapReply) -> BTreeSet<usize> {
        let gone = |info: &&pb::BlockServiceInfo| info.flags & (STALE | LOST) != 0;
        let empty: BTreeSet<u64> = emptying(map)
            .into_iter()
            .filter(|(info, state)| gone(info) && *state == Emptying::Empty)
            .map(|(info, _)| info.id)
            .collect();
        let missed: BTreeSet<&str> = map
            .block_services
            .iter()
            .filter(gone)
            .filter(|info| !empty.contains(&info.id))
            .map(|info| info.path.as_str())
            .collect();
        let paths: Vec<String> = (0..self.disks).map(|n| self.place(n).display().to_string()).collect();
        // Of a disk that was elsewhere nobody knows which place it had.
        if map.listening || missed.iter().any(|missed| !paths.iter().any(|path| path == missed)) {
            return BTreeSet::new();
        }
        self.vacant().into_iter().filter(|&n| !missed.contains(paths[n].as_str())).collect()
    }

    /// Refuses parts that are missing or not of this cluster while none has been opened: opening changes them.
    /// Of replicated parts a minority may be missing: empty, they are others' replicas and are filled again.
    pub fn check(&self, cluster: Option<ClusterId>) -> Result<(), StartError> {
        for part in PARTS {
            let mut missing = Vec::new();
            let mut stores = BTreeMap::new();
            for host in 0..self.hosts {
                let path = self.folder(host).join(part);
                if let Some(store) = DataDirectory::peek_store(&path, part)?
                    && let Some(original) = stores.insert(store, path.clone())
                {
                    return Err(StartError::Copy { path, original });
                }
                let own = DataDirectory::peek(&path, part)?;
                if let (Some(own), Some(wanted)) = (own, cluster)
                    && own != wanted
                {
                    return Err(
                        DirectoryError { path, problem: Problem::AnotherCluster { own, wanted } }.into()
                    );
                }
                if !path.exists() {
                    missing.push(path);
                } else if !path.join("FORMAT").exists() {
                    // Empty: it would come up with nothing in it.
                    missing.push(path.join("FORMAT"));
                }
            }
            // A first start that was cut short had made only some of them.
            if self.complete && 2 * missing.len() >= self.hosts as usize {
                return Err(StartError::PartMissing(missing.swap_remove(0)));
            }
        }
        let secret = self.data.join("secret");
        if self.complete && !secret.exists() {
            return Err(StartError::PartMissing(secret));
        }
        Ok(())
    }
}

/// Missing or empty: there is nothing that could be a disk.
fn is_vacant(path: &Path) -> bool {
    match path.read_dir() {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use eggs_proto::flags::{DECOMMISSIONED, NO_READ};
    use eggs_proto::limits::NOTHING_AT_RISK;

    fn layout(hosts: u32, disks: usize) -> Layout {
        Layout { data: "/d".into(), hosts, disks, held: 0, free: BTreeSet::new(), complete: false }
    }

    #[test]
    fn a_place_is_free_when_its_disk_is_not_missed() {
        let data = tempfile::tempdir().unwrap();
        let layout = Layout { data: data.path().to_owned(), held: 3, ..layout(1, 3) };
        std::fs::create_dir_all(layout.place(0)).unwrap();
        std::fs::write(layout.place(0).join("identity"), "a disk").unwrap();
        std::fs::create_dir_all(layout.place(1)).unwrap();
        assert_eq!(layout.vacant(), [1, 2]);
        let info = |id: u64, flags| pb::BlockServiceInfo {
            id: id + 1,
            flags,
            path: layout.place(id as usize).display().to_string(),
            ..Default::default()
        };
        let given_up = LOST | DECOMMISSIONED | NO_READ;
        let map = |services: Vec<pb::BlockServiceInfo>, empty: &[u64]| {
            let task = |&about| pb::JanitorTask {
                kind: pb::JanitorTaskKind::JanitorTaskRepair.into(),
                about,
                least_redundancy: NOTHING_AT_RISK,
                ..Default::default()
            };
            let janitor = pb::JanitorInfo { tasks: empty.iter().map(task).collect(), ..Default::default() };
            pb::ClusterMapReply { block_services: services, janitor: Some(janitor), ..Default::default() }
        };
        let free =
            |services, empty: &[u64]| layout.free(&map(services, empty)).into_iter().collect::<Vec<_>>();
        let all = |one, two| vec![info(0, 0), info(1, one), info(2, two)];
        assert_eq!(free(all(LOST, LOST), &[2, 3]), [0; 0], "not given up");
        assert_eq!(free(all(given_up, LOST), &[]), [0; 0], "not empty");
        assert_eq!(free(all(given_up, LOST), &[2]), [1]);
        assert_eq!(free(vec![info(0, 0), info(1, LOST)], &[]), [2], "forgotten");
        assert_eq!(free(vec![info(0, LOST)], &[]), [1, 2], "what has a disk is never free");
        let mut moved = info(1, LOST);
        moved.path = "/elsewhere/01".to_owned();
        assert_eq!(free(vec![info(0, 0), moved], &[]), [0; 0], "which place had it?");
        let listening = pb::ClusterMapReply { listening: true, ..map(vec![], &[]) };
        assert!(layout.free(&listening).is_empty());

        let expected = |layout: &Layout| -> Vec<bool> {
            layout.disks_of(0).iter().map(|disk| disk.expect_existing).collect()
        };
        assert_eq!(expected(&layout), [true; 3]);
        let layout = Layout { free: BTreeSet::from([0, 1]), ..layout };
        assert_eq!(expected(&layout), [true, false, true], "0 has something in it");
    }

    #[test]
    fn disks_are_dealt_evenly_and_keep_their_host() {
        let paths = |layout: Layout, host| -> Vec<String> {
            layout.disks_of(host).iter().map(|disk| disk.path.display().to_string()).collect()
        };
        assert_eq!(paths(layout(1, 2), 0), ["/d/disks/00", "/d/disks/01"]);
        assert_eq!(
            paths(layout(3, 8), 1),
            ["/d/host-2/disks/01", "/d/host-2/disks/04", "/d/host-2/disks/07"]
        );
        assert_eq!(paths(layout(3, 8), 2), ["/d/host-3/disks/02", "/d/host-3/disks/05"]);
        for hosts in [1, 3, 5] {
            let all: usize = (0..hosts).map(|host| layout(hosts, 10).disks_of(host).len()).sum();
            assert_eq!(all, 10);
            // RS(4,2) finds six disks even when one of several hosts is away, and no host has three of six.
            let each = disks_default(hosts) / hosts as usize;
            assert!(hosts == 1 || disks_default(hosts) - each >= 6);
        }
        assert_eq!(layout(3, 8).disks_of(1)[0].failure_domain, "host-2");
        assert_eq!(layout(1, 8).disks_of(0)[1].failure_domain, "disk-01");
    }
}
