//! Disks that are gone for good are forgotten when people say so and nothing is on them (RG-20).

use eggs_machine::{Table, TableError};
use eggs_proto::flags::{DECOMMISSIONED, LOST, STALE};
use eggs_proto::{BlockServiceId, RegistryError, ServiceError, Time, pb};
use pb::registry_command::Command;

use crate::health::{Health, Step, log};
use crate::machine::conflict;
use crate::repairs::{Emptying, emptying};
use crate::validate;

impl Health {
    /// What only is heard is judged here; that they are decommissioned, where it is applied too.
    pub(crate) fn forget_block_services<T: Table + ?Sized>(
        &mut self,
        view: &T,
        op: &pb::ForgetBlockServices,
        now: Time,
    ) -> Result<Result<Step, pb::Error>, TableError> {
        if let Err(error) = validate::forget_block_services(op) {
            return Ok(Err(error));
        }
        let map = self.map(view, now, false)?;
        for id in op.block_services.iter().copied().map(BlockServiceId) {
            if let Err(error) = may_be_forgotten(&map, id) {
                return Ok(Err(error));
            }
        }
        for id in op.block_services.iter().copied().map(BlockServiceId) {
            self.forget_service(id);
        }
        Ok(Ok(log(Command::ForgetBlockServices(op.clone()))))
    }
}

pub(crate) fn not_given_up(id: BlockServiceId) -> String {
    format!("disk {id} is not decommissioned: it belongs to the cluster (`eggsctl disk decommission`)")
}

fn may_be_forgotten(map: &pb::ClusterMapReply, id: BlockServiceId) -> Result<(), pb::Error> {
    let info = map.block_services.iter().find(|info| info.id == id.0);
    let info = info.ok_or_else(|| RegistryError::NotFound.with(id))?;
    if info.flags & DECOMMISSIONED == 0 {
        return Err(conflict(not_given_up(id)));
    }
    if info.flags & (STALE | LOST) == 0 {
        return Err(conflict(format!("disk {id} is there: it can be forgotten when it was taken away")));
    }
    if !map.janitor.as_ref().is_some_and(|janitor| janitor.alive) {
        return Err(conflict(format!("no janitor is heard of: who knows whether disk {id} is empty?")));
    }
    match emptying(map).into_iter().find(|(info, _)| info.id == id.0) {
        Some((_, Emptying::Empty)) => Ok(()),
        _ => Err(conflict(format!("disk {id} is not empty yet: `eggsctl disk ls` says how far it is"))),
    }
}

/// Nobody needs to hear of a disk for the first time when it is lost: it is one that was forgotten.
pub(crate) fn is_forgotten(known: Option<&pb::BlockServiceRow>, report: &pb::BlockServiceReport) -> bool {
    known.is_none() && !report.problem.is_empty()
}
