//! `cluster.toml`: what an embedded cluster consists of.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use eggs_proto::limits::REPLICAS;
use serde::{Deserialize, Serialize};

const FILE: &str = "cluster.toml";
const TEXT: &str = "# An EggsFS cluster in one process, made by `eggsctl up`. Its parts are in the folders beside this file.\n";
/// Version of this file.
const FORMAT: u32 = 2;

/// Disks of a new cluster: one host has two to spare for RS(4,2), several find six when one of them is away.
pub(crate) const fn disks_default(hosts: u32) -> usize {
    match hosts {
        1 => 8,
        3 => 9,
        hosts => 2 * hosts as usize,
    }
}
/// Two digits name a disk's folder.
pub(crate) const DISKS_MAX: usize = 100;

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Manifest {
    format: u32,
    /// Each runs all services; more than one have folders `host-1` up to this many.
    pub(crate) hosts: u32,
    /// Of everything.
    pub(crate) replicas: u32,
    /// Folders `disks/00` up to this many, of all hosts together.
    pub(crate) disks: usize,
    /// Places whose disk is gone for good, and empty: the next start may make a new one there.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub(crate) free: BTreeSet<usize>,
}

impl Manifest {
    pub(crate) fn new(hosts: u32, disks: usize) -> Self {
        Manifest { format: FORMAT, hosts, replicas: hosts, disks, free: BTreeSet::new() }
    }

    #[must_use]
    pub(crate) fn with_free(self, free: BTreeSet<usize>) -> Self {
        Manifest { free, ..self }
    }

    /// `None`: the cluster was never completed.
    pub(crate) fn read(directory: &Path) -> io::Result<Option<Manifest>> {
        let text = match fs::read_to_string(directory.join(FILE)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidData, format!("{FILE}: {what}"));
        let manifest: Manifest = toml::from_str(&text).map_err(|error| wrong(error.message().to_owned()))?;
        match manifest {
            Manifest { format, .. } if format > FORMAT => {
                Err(wrong(format!("format {format} is newer than this build knows ({FORMAT})")))
            }
            Manifest { hosts, replicas, .. } if hosts != replicas || !REPLICAS.contains(&replicas) => {
                Err(wrong(format!("{hosts} hosts with {replicas} replicas are not 1, 3 or 5")))
            }
            Manifest { disks, .. } if disks == 0 || disks > DISKS_MAX => {
                Err(wrong(format!("{disks} disks are not 1 to {DISKS_MAX}")))
            }
            manifest => Ok(Some(manifest)),
        }
    }

    pub(crate) fn write(&self, directory: &Path) -> io::Result<()> {
        let aside = directory.join("cluster.toml.new");
        let mut file = File::create(&aside)?;
        let text = toml::to_string(self).map_err(io::Error::other)?;
        file.write_all(TEXT.as_bytes())?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&aside, directory.join(FILE))?;
        File::open(directory)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_what_it_wrote_and_nothing_newer() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Manifest::read(directory.path()).unwrap(), None);
        Manifest::new(3, 8).write(directory.path()).unwrap();
        assert_eq!(Manifest::read(directory.path()).unwrap(), Some(Manifest::new(3, 8)));
        let free = Manifest::new(1, 8).with_free(BTreeSet::from([2, 5]));
        free.write(directory.path()).unwrap();
        assert_eq!(Manifest::read(directory.path()).unwrap(), Some(free));
        for text in [
            "format = 3\nhosts = 1\nreplicas = 1\ndisks = 8",
            "format = 2\nhosts = 1\nreplicas = 1\ndisks = 0",
            "format = 2\nhosts = 3\nreplicas = 1\ndisks = 8",
            "format = 2\nhosts = 2\nreplicas = 2\ndisks = 8",
            "format = 2\ndisks = 8",
            "format = 2",
            "disks",
            "format = 2\nhosts = 1\nreplicas = 1\ndisks = 8\nx = 1",
        ] {
            fs::write(directory.path().join(FILE), text).unwrap();
            assert!(Manifest::read(directory.path()).is_err(), "{text}");
        }
    }
}
