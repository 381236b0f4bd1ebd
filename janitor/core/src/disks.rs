//! The disks of a cluster, as its map shows them.

use std::collections::BTreeMap;

use eggs_proto::{BlockServiceId, flags, pb};

/// Whether a disk's blocks can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Presence {
    /// They can be read.
    Here,
    /// Not heard of, or its host says it has lost it, and nobody has given it up: it may come back.
    Away,
    /// Given up, or not known to the registry at all: its blocks are lost.
    Gone,
}

/// What is known of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub storage_class: u32,
    pub failure_domain: String,
    pub flags: u32,
    pub capacity_bytes: u64,
    pub available_bytes: u64,
    /// Takes no writes, as its host says.
    pub read_only: bool,
}

impl Disk {
    pub fn of(info: &pb::BlockServiceInfo) -> Disk {
        Disk {
            storage_class: info.storage_class,
            failure_domain: info.failure_domain.clone(),
            flags: info.flags,
            capacity_bytes: info.capacity_bytes,
            available_bytes: info.available_bytes,
            read_only: info.read_only,
        }
    }

    pub fn presence(&self) -> Presence {
        let given_up = self.flags & flags::DECOMMISSIONED != 0;
        match (flags::readable(self.flags), given_up) {
            (true, _) => Presence::Here,
            (false, true) => Presence::Gone,
            // NO_READ alone: people have asked for a moment's peace.
            (false, false) => Presence::Away,
        }
    }

    /// Nothing is to stay on it.
    pub fn to_be_emptied(&self) -> bool {
        self.flags & flags::DECOMMISSIONED != 0
    }

    /// New blocks may go there.
    pub fn takes_blocks(&self) -> bool {
        flags::writable(self.flags) && !self.read_only
    }

    /// Bytes that are not available.
    pub fn filled_bytes(&self) -> u64 {
        self.capacity_bytes.saturating_sub(self.available_bytes)
    }
}

/// All disks, by id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Disks(BTreeMap<BlockServiceId, Disk>);

impl Disks {
    pub fn of(map: &pb::ClusterMapReply) -> Disks {
        map.block_services.iter().map(|info| (BlockServiceId(info.id), Disk::of(info))).collect()
    }

    pub fn get(&self, id: BlockServiceId) -> Option<&Disk> {
        self.0.get(&id)
    }

    /// Whether there is such a disk here; 0, which is none, counts. One that there is not was forgotten, or is newer than the map
    /// these are of: who forgets something for it asks for the map again first.
    pub fn knows(&self, id: BlockServiceId) -> bool {
        id.0 == 0 || self.0.contains_key(&id)
    }

    /// One that is not known is gone: the registry forgets no disk that exists. See [`Disks::knows`].
    pub fn presence(&self, id: BlockServiceId) -> Presence {
        self.get(id).map_or(Presence::Gone, Disk::presence)
    }

    pub fn iter(&self) -> impl Iterator<Item = (BlockServiceId, &Disk)> {
        self.0.iter().map(|(&id, disk)| (id, disk))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether, since these were looked at, another disk is to be emptied, or one that was to be emptied is gone: what can be
    /// lost least is other spans now.
    pub fn are_overtaken(&self, now: &Disks) -> bool {
        now.to_be_emptied().any(|id| {
            let was = self.get(id).filter(|disk| disk.to_be_emptied()).map(Disk::presence);
            was.is_none_or(|was| was != Presence::Gone && now.presence(id) == Presence::Gone)
        })
    }

    /// Those whose blocks are to be on other disks, in the order of their ids.
    pub fn to_be_emptied(&self) -> impl Iterator<Item = BlockServiceId> {
        self.iter().filter(|(_, disk)| disk.to_be_emptied()).map(|(id, _)| id)
    }
}

impl FromIterator<(BlockServiceId, Disk)> for Disks {
    fn from_iter<I: IntoIterator<Item = (BlockServiceId, Disk)>>(disks: I) -> Disks {
        Disks(disks.into_iter().collect())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn disk(domain: &str, flags: u32) -> Disk {
        Disk {
            storage_class: 2,
            failure_domain: domain.to_owned(),
            flags,
            capacity_bytes: 1000,
            available_bytes: 500,
            read_only: false,
        }
    }

    #[test]
    fn a_disk_that_is_away_is_gone_only_when_somebody_gave_it_up() {
        use flags::{DECOMMISSIONED, LOST, NO_READ, NO_WRITE, STALE};
        for (flags, presence, emptied) in [
            (0, Presence::Here, false),
            (NO_WRITE, Presence::Here, false),
            (STALE, Presence::Away, false),
            (LOST, Presence::Away, false),
            (STALE | LOST, Presence::Away, false),
            (NO_READ, Presence::Away, false),
            (DECOMMISSIONED, Presence::Here, true),
            (DECOMMISSIONED | STALE, Presence::Gone, true),
            (DECOMMISSIONED | LOST, Presence::Gone, true),
            (DECOMMISSIONED | NO_READ, Presence::Gone, true),
        ] {
            let disk = disk("a", flags);
            assert_eq!((disk.presence(), disk.to_be_emptied()), (presence, emptied), "{flags}");
        }
        assert_eq!(Disks::default().presence(BlockServiceId(7)), Presence::Gone);
        let disks: Disks = [(BlockServiceId(8), disk("a", DECOMMISSIONED | LOST))].into_iter().collect();
        assert_eq!([0, 7, 8].map(|id| disks.knows(BlockServiceId(id))), [true, false, true]);
    }

    #[test]
    fn another_disk_that_is_lost_overtakes_a_look() {
        use flags::{DECOMMISSIONED, LOST, STALE};
        let disks = |flags: &[u32]| -> Disks {
            (1u64..).zip(flags).map(|(id, &flags)| (BlockServiceId(id), disk("a", flags))).collect()
        };
        let before = disks(&[DECOMMISSIONED | LOST, DECOMMISSIONED, 0]);
        for (now, overtaken) in [
            ([DECOMMISSIONED | LOST, DECOMMISSIONED, 0], false),
            ([DECOMMISSIONED | LOST, DECOMMISSIONED, STALE], false),
            ([DECOMMISSIONED, 0, 0], false),
            ([DECOMMISSIONED | LOST, DECOMMISSIONED, DECOMMISSIONED], true),
            ([DECOMMISSIONED | LOST, DECOMMISSIONED, DECOMMISSIONED | LOST], true),
            ([DECOMMISSIONED | LOST, DECOMMISSIONED | STALE, 0], true),
        ] {
            assert_eq!(before.are_overtaken(&disks(&now)), overtaken, "{now:?}");
        }
    }
}
