//! What the leader chooses before it logs a write: cookies, places of blocks, and whether proofs are
//! good (only the leader has the keys). Everything else is decided when the command is applied.

use bytes::Bytes;
use eggs_machine::{Table, TableError};
use eggs_proto::limits::{BATCH_OPS_MAX, MESSAGE_BYTES_MAX};
use eggs_proto::pb::write_op::Op;
use eggs_proto::policy::layout_name;
use eggs_proto::{BlockId, BlockServiceId, InodeId, ServiceError, ShardError, ShardId, Time, mac, pb};
use prost::Message;

use crate::cluster::Cluster;
use crate::context::{Stop, local};
use crate::eden::cut_note;
use crate::ops::place_replacements::{Meant, meant};
use crate::ops::replace_blocks::{check_indexes, pending_blocks};
use crate::placement::{self, Wanted};
use crate::{schema, span};

/// Makes the choices for a write on the leader's current state.
///
/// `authorized`: the sender has the cluster secret, so coordinator steps are allowed. `entropy` gives
/// random numbers.
///
/// # Errors
/// The whole request is refused and nothing is to be logged. An operation that is refused on its own
/// is logged as such, so that its batch keeps its answers in order.
pub fn prepare<T: Table + ?Sized>(
    shard: ShardId,
    view: &T,
    write: pb::Write,
    authorized: bool,
    now: Time,
    entropy: &mut dyn FnMut() -> u64,
    cluster: &Cluster,
) -> Result<pb::ShardCommand, pb::Error> {
    if write.ops.is_empty() || write.ops.len() > BATCH_OPS_MAX {
        return Err(ShardError::Malformed.with(format_args!("{} operations", write.ops.len())));
    }
    if write.encoded_len() > MESSAGE_BYTES_MAX {
        return Err(ShardError::TooLarge.with("write request"));
    }
    if !authorized && write.ops.iter().any(|op| op.op.as_ref().is_some_and(needs_secret)) {
        return Err(ShardError::Unauthorized.bare());
    }
    let mut preparation = Preparation { shard, view, now, entropy, cluster };
    let ops = write.ops.into_iter().map(|op| preparation.choose(op)).collect::<Result<_, TableError>>();
    match ops {
        Ok(ops) => Ok(pb::ShardCommand { ops }),
        Err(error) => Err(ShardError::Internal.with(error)),
    }
}

/// Steps of the coordinator, and what the janitor does.
fn needs_secret(op: &Op) -> bool {
    matches!(
        op,
        Op::CreateDirectory(_)
            | Op::DiscardDirectory(_)
            | Op::LockDirectory(_)
            | Op::UnlockDirectory(_)
            | Op::LockEdge(_)
            | Op::UnlockEdge(_)
            | Op::LinkEdge(_)
            | Op::UnlinkEdge(_)
            | Op::SetOwner(_)
            | Op::RemoveDirectory(_)
            | Op::CreateDirectories(_)
            | Op::DiscardDirectories(_)
            | Op::ExchangeEdge(_)
            | Op::SettleEdge(_)
            | Op::SetOwners(_)
            | Op::ForgetTransactions(_)
            | Op::ReviveDirectory(_)
            | Op::UndeleteEdge(_)
            | Op::LockDeadEdge(_)
            | Op::FreeDeadEdge(_)
            | Op::PurgeDeadEdge(_)
            | Op::PurgeFile(_)
            | Op::PurgeDirectory(_)
            | Op::PlaceReplacements(_)
            | Op::SwapBlocks(_)
            | Op::SwapContents(_)
            | Op::RecordScrub(_)
            | Op::ForgetGarbage(_)
    )
}

struct Preparation<'a, T: ?Sized> {
    shard: ShardId,
    view: &'a T,
    now: Time,
    entropy: &'a mut dyn FnMut() -> u64,
    cluster: &'a Cluster,
}

impl<T: Table + ?Sized> Preparation<'_, T> {
    fn choose(&mut self, mut op: pb::WriteOp) -> Result<pb::ChosenOp, TableError> {
        let mut chosen = pb::ChosenOp::default();
        let outcome = match &mut op.op {
            Some(Op::StartEden(op)) => self.start_eden(op, &mut chosen),
            Some(Op::ExtendEden(op)) => self.extend_eden(op, &mut chosen),
            Some(Op::ReplaceBlocks(op)) => self.replace_blocks(op, &mut chosen),
            Some(Op::LinkEden(op)) => self.verify(op.file, op.cookie, op.certify.as_mut(), &mut chosen),
            Some(Op::PlaceReplacements(op)) => self.place_replacements(op, &mut chosen),
            Some(Op::SwapBlocks(op)) => self.swap_blocks(op, &mut chosen),
            Some(Op::SwapContents(op)) => self.verify(op.eden, op.cookie, op.certify.as_mut(), &mut chosen),
            Some(Op::ForgetGarbage(op)) => self.forget_garbage(op).map_err(Stop::Refused),
            _ => Ok(()),
        };
        match outcome {
            Ok(()) => chosen.op = Some(op),
            // What was refused need not be in the log.
            Err(Stop::Refused(error)) => chosen.refused = Some(error),
            Err(Stop::Failed(error)) => return Err(error),
        }
        Ok(chosen)
    }

    fn start_eden(&mut self, op: &mut pb::StartEden, chosen: &mut pb::ChosenOp) -> Result<(), Stop> {
        op.note = cut_note(std::mem::take(&mut op.note));
        chosen.cookie = (self.entropy)().max(1);
        self.place(op.span.as_mut(), chosen)
    }

    fn extend_eden(&mut self, op: &mut pb::ExtendEden, chosen: &mut pb::ChosenOp) -> Result<(), Stop> {
        self.verify(op.file, op.cookie, op.certify.as_mut(), chosen)?;
        self.place(op.span.as_mut(), chosen)
    }

    fn place(&mut self, new: Option<&mut pb::NewSpan>, chosen: &mut pb::ChosenOp) -> Result<(), Stop> {
        let Some(new) = new else { return Ok(()) };
        span::validate(new)?;
        let Some(pb::new_span::Body::Blocks(blocks)) = &mut new.body else { return Ok(()) };
        let wanted = Wanted {
            storage_class: blocks.storage_class,
            blocks: blocks.blocks.len(),
            block_size: span::block_size(blocks.stripes, blocks.cell_size),
            holding: &[],
            avoid: &std::mem::take(&mut blocks.avoid),
            only: &[],
            per_domain: usize::MAX,
        };
        self.services(&wanted, &layout_name(blocks.data, blocks.parity), chosen)?;
        Ok(())
    }

    fn services(
        &mut self,
        wanted: &Wanted<'_>,
        layout: &str,
        chosen: &mut pb::ChosenOp,
    ) -> Result<(), pb::Error> {
        let placement = placement::choose(self.cluster, wanted, self.entropy).ok_or_else(|| {
            ShardError::NoBlockServices.with(placement::shortage(self.cluster, wanted, layout))
        })?;
        chosen.block_services = placement.services;
        chosen.under_spread = placement.under_spread;
        Ok(())
    }

    fn replace_blocks(&mut self, op: &mut pb::ReplaceBlocks, chosen: &mut pb::ChosenOp) -> Result<(), Stop> {
        let mut row = self.eden(op.file, op.cookie)?;
        let storage_class = row.pending.as_ref().map_or(0, |span| span.storage_class);
        let blocks = pending_blocks(&mut row)?;
        let indexes = check_indexes(&op.indexes, blocks.blocks.len())?;
        let (mut holding, mut avoid) = (Vec::new(), std::mem::take(&mut op.avoid));
        for (index, block) in blocks.blocks.iter().enumerate() {
            let list = if indexes.contains(&index) { &mut avoid } else { &mut holding };
            list.push(block.block_service);
        }
        let wanted = Wanted {
            storage_class,
            blocks: indexes.len(),
            block_size: span::block_size(blocks.stripes, blocks.cell_size),
            holding: &holding,
            avoid: &avoid,
            only: &[],
            per_domain: usize::MAX,
        };
        self.services(&wanted, &layout_name(blocks.data, blocks.parity), chosen)?;
        Ok(())
    }

    fn place_replacements(
        &mut self,
        op: &mut pb::PlaceReplacements,
        chosen: &mut pb::ChosenOp,
    ) -> Result<(), Stop> {
        let meant = meant(self.shard, self.view, op)?;
        let (avoid, only) = (std::mem::take(&mut op.avoid), std::mem::take(&mut op.only));
        chosen.cookie = (self.entropy)().max(1);
        let elsewhere = [&avoid[..], &meant.replaced()].concat();
        let mut wanted = Wanted {
            storage_class: meant.span.storage_class,
            blocks: meant.indexes.len(),
            block_size: span::block_size(meant.blocks.stripes, meant.blocks.cell_size),
            holding: &meant.kept(),
            avoid: &elsewhere,
            only: &only,
            // What is moved without need does not come closer to the others than it was.
            per_domain: if only.is_empty() { usize::MAX } else { self.least_shared(&meant) },
        };
        let layout = layout_name(meant.blocks.data, meant.blocks.parity);
        if self.services(&wanted, &layout, chosen).is_err() {
            // A damaged block may come back to the disk it is on, if that is all there is.
            wanted.avoid = &avoid;
            self.services(&wanted, &layout, chosen)?;
        }
        Ok(())
    }

    /// Blocks of the span in the failure domain of one that is to be replaced; of several the least.
    fn least_shared(&self, meant: &Meant) -> usize {
        let domain = |service: u64| self.cluster.services.get(&service).map(|service| service.domain);
        let shared = |service: u64| {
            let same = |block: &&pb::Block| domain(block.block_service) == domain(service);
            meant.blocks.blocks.iter().filter(same).count()
        };
        meant.replaced().into_iter().map(shared).min().unwrap_or(0)
    }

    fn swap_blocks(&mut self, op: &mut pb::SwapBlocks, chosen: &mut pb::ChosenOp) -> Result<(), Stop> {
        let proofs = std::mem::take(&mut op.proofs);
        let row = self.eden(op.eden, op.cookie)?;
        let blocks = row.replacement.and(row.pending).and_then(|pending| pending.blocks);
        // That it holds no copies is said when it is applied.
        let Some(blocks) = blocks else { return Ok(()) };
        Ok(self.prove(&blocks, &proofs, chosen)?)
    }

    /// Keeps what is proven to be erased, and what is on block services that are gone for good.
    fn forget_garbage(&self, op: &mut pb::ForgetGarbage) -> Result<(), pb::Error> {
        if !self.cluster.is_known() {
            return Err(ShardError::Busy.with("the block services are not known yet"));
        }
        op.blocks.retain_mut(|erased| {
            let proof = std::mem::take(&mut erased.proof);
            let (service, block) = (BlockServiceId(erased.block_service), BlockId(erased.block));
            if proof.is_empty() {
                return self.cluster.is_gone(service);
            }
            let key = self.cluster.key(service);
            key.is_some_and(|key| mac::matches(&mac::erase_proof(key, service, block), &proof))
        });
        if op.blocks.is_empty() {
            return Err(ShardError::BadProof.with("no block is proven to be erased"));
        }
        Ok(())
    }

    /// Checks the proofs of a certification against the span in progress, and notes which blocks they
    /// are of: by the time of applying it may be others (SH-14).
    fn verify(
        &mut self,
        file: u64,
        cookie: u64,
        certify: Option<&mut pb::CertifySpan>,
        chosen: &mut pb::ChosenOp,
    ) -> Result<(), Stop> {
        let Some(certify) = certify else { return Ok(()) };
        let proofs = std::mem::take(&mut certify.proofs);
        let row = self.eden(file, cookie)?;
        let Some(span) = row.pending.filter(|span| span.offset == certify.offset) else { return Ok(()) };
        let Some(blocks) = span.blocks else { return Ok(()) };
        Ok(self.prove(&blocks, &proofs, chosen)?)
    }

    /// Checks the proofs of blocks that were written, one for each in order.
    fn prove(
        &self,
        blocks: &pb::Blocks,
        proofs: &[Bytes],
        chosen: &mut pb::ChosenOp,
    ) -> Result<(), pb::Error> {
        if proofs.len() != blocks.blocks.len() {
            let what = format_args!("{} proofs for {} blocks", proofs.len(), blocks.blocks.len());
            return Err(ShardError::BadProof.with(what));
        }
        let size = span::block_size(blocks.stripes, blocks.cell_size) as u32;
        for (index, (block, proof)) in blocks.blocks.iter().zip(proofs).enumerate() {
            let (service, id) = (BlockServiceId(block.block_service), BlockId(block.block));
            let key = self.cluster.key(service).ok_or_else(|| {
                ShardError::Busy.with(format_args!("the key of block service {service} is not known yet"))
            })?;
            if !mac::matches(&mac::write_proof(key, service, id, size, block.crc), proof) {
                return Err(ShardError::BadProof.with(format_args!("block {index}")));
            }
            chosen.proven_blocks.push(block.block);
        }
        Ok(())
    }

    /// As [`crate::context::Context::eden`], but on the leader's view.
    fn eden(&self, file: u64, cookie: u64) -> Result<pb::EdenRow, Stop> {
        let file: InodeId = local(self.shard, file)?;
        let row: Option<pb::EdenRow> = schema::get(self.view, &schema::eden_key(file))?;
        let row = row
            .filter(|row| cookie != 0 && row.cookie == cookie)
            .ok_or_else(|| ShardError::NotWriter.with(format_args!("file {file}")))?;
        if row.expired || row.deadline < self.now.0 {
            return Err(ShardError::Expired.with(format_args!("file {file}")).into());
        }
        Ok(row)
    }
}
