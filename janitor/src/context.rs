//! What all parts of the janitor share.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use eggs_client::Client;
use eggs_daemon::registry::{MapWatch, Registry, RegistryCallError};
use eggs_janitor_core::Disks;
use eggs_proto::pb::registry_reply::Result as Answer;
use eggs_proto::pb::registry_request::Op;
use eggs_proto::{BlockServiceId, Time, flags, pb};
use tokio::sync::Notify;

use crate::args::Settings;
use crate::board::Board;
use crate::budget::Budget;

/// Files in one page of a listing: their spans are asked for before the next page.
pub(crate) const PAGE: u32 = 512;

#[derive(Debug)]
pub(crate) struct Context {
    pub client: Client,
    pub registry: Registry,
    pub map: MapWatch,
    pub settings: Settings,
    /// Random at each start: how the registry tells janitors apart.
    pub boot: u64,
    pub board: Board,
    pub repair: Budget,
    pub scrub: Budget,
    /// There is garbage: blocks that were replaced.
    pub garbage: Notify,
    /// There may be something to repair.
    pub damage: Notify,
    /// Disks to be emptied that are empty.
    empty: Mutex<BTreeSet<BlockServiceId>>,
    /// Of jobs under way, until the registry has them.
    pub jobs: Mutex<Vec<pb::JobProgress>>,
}

impl Context {
    pub fn new(client: Client, registry: Registry, map: MapWatch, settings: Settings, boot: u64) -> Context {
        let mb = |rate: u64| rate.saturating_mul(1_000_000);
        Context {
            repair: Budget::new(mb(settings.repair_rate), settings.disk_share, settings.repair_memory),
            scrub: Budget::new(mb(settings.scrub_rate), settings.disk_share, 1),
            client,
            registry,
            map,
            settings,
            boot,
            board: Board::default(),
            garbage: Notify::new(),
            damage: Notify::new(),
            empty: Mutex::default(),
            jobs: Mutex::default(),
        }
    }

    pub fn now(&self) -> Time {
        self.client.now()
    }

    pub fn disks(&self) -> Disks {
        Disks::of(&self.map.get())
    }

    /// The registry has chosen this one.
    pub fn works(&self) -> bool {
        self.is_chosen(&self.map.get())
    }

    fn is_chosen(&self, map: &pb::ClusterMapReply) -> bool {
        map.janitor.as_ref().is_some_and(|janitor| janitor.alive && janitor.boot == self.boot)
    }

    pub async fn until_it_works(&self) {
        let mut maps = self.map.receiver();
        let over = maps.wait_for(|map| self.is_chosen(map)).await.is_err();
        if over {
            // No map comes any more: the daemon is about to end.
            std::future::pending::<()>().await;
        }
    }

    /// Disks to be emptied that have nothing on them any more.
    pub fn empty(&self) -> BTreeSet<BlockServiceId> {
        self.empty.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Disks are to be emptied and are not: what moves without need waits.
    pub fn is_repairing(&self) -> bool {
        let (map, empty) = (self.map.get(), self.empty());
        let mut emptied = map.block_services.iter().filter(|info| info.flags & flags::DECOMMISSIONED != 0);
        emptied.any(|info| !empty.contains(&BlockServiceId(info.id)))
    }

    pub fn set_empty(&self, empty: BTreeSet<BlockServiceId>) {
        *self.empty.lock().unwrap_or_else(PoisonError::into_inner) = empty;
    }

    /// Forgets reports of blocks that are right now, and says which there are.
    pub async fn bad_blocks(
        &self,
        forget: Vec<pb::BadBlock>,
    ) -> Result<Vec<pb::BadBlock>, RegistryCallError> {
        match self.registry.call(Op::ListBadBlocks(pb::ListBadBlocks { forget })).await? {
            Answer::ListBadBlocks(reply) => Ok(reply.blocks),
            _ => Ok(Vec::new()),
        }
    }

    /// One heartbeat. A janitor that stands by has nothing to tell.
    pub fn heartbeat(&self, host: &str, address: &str) -> Op {
        let works = self.works();
        let tasks = if works { self.board.tasks(self.now()) } else { Vec::new() };
        let jobs = to_tell(&mut self.jobs.lock().unwrap_or_else(PoisonError::into_inner), works);
        Op::RegisterJanitor(pb::RegisterJanitor {
            boot: self.boot,
            host: host.to_owned(),
            address: address.to_owned(),
            tasks,
            jobs,
        })
    }
}

/// How far jobs are. One that stands by forgets it: another is further by then, and what the registry has counts.
fn to_tell(jobs: &mut Vec<pb::JobProgress>, works: bool) -> Vec<pb::JobProgress> {
    if !works {
        jobs.clear();
    }
    jobs.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_janitor_that_was_relieved_tells_no_old_progress_when_it_works_again() {
        let mut jobs = vec![pb::JobProgress { id: 1, ..Default::default() }];
        assert_eq!(to_tell(&mut jobs, true).len(), 1);
        assert_eq!(to_tell(&mut jobs, false), []);
        assert_eq!(to_tell(&mut jobs, true), [], "the registry has it from the other one");
    }
}
