//! Bugs put in on purpose, to see that the checkers find them. None touches the cores' code: a bug is
//! a store, a shell or a table that does not do what it should.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use eggs_machine::table::prefix_end;
use eggs_machine::{Machine, Outcome, Table, TableError, Tx};
use eggs_proto::pb::write_op::Op;
use eggs_proto::{InodeId, Time, TransactionId, pb};
use eggs_shard_core::ShardMachine;
use eggs_shard_core::schema::{
    BLOCKS, Key, SPAN, Step, dead_key, eden_key, file_key, id_key, transaction_key,
};
use prost::Message;

macro_rules! bugs {
    ($($(#[$doc:meta])* $variant:ident = $name:literal;)*) => {
        /// A bug to plant.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Bug { $($(#[$doc])* $variant,)* }

        impl Bug {
            /// Every bug, in the order they are documented.
            pub const ALL: &[Bug] = &[$(Bug::$variant,)*];

            /// As it is typed.
            pub fn name(self) -> &'static str {
                match self { $(Bug::$variant => $name,)* }
            }
        }
    };
}

bugs! {
    /// The shards' logs say that they are durable and are not.
    SkipFsync = "skip-fsync";
    /// A shard answers a write before it is in the log.
    AckBeforeCommit = "ack-before-commit";
    /// Shards run a coordinator's step again when it is repeated.
    NoTransactionCheck = "no-transaction-check";
    /// Shards do not remember the last reply of a session (C rows).
    NoSessionCheck = "no-session-check";
    /// Whoever thinks that it leads answers reads without asking the others.
    StaleReads = "stale-reads";
    /// Stores do not write down whom they voted for.
    ForgetVote = "forget-vote";
    /// Stores that start again apply their last entries once more.
    ApplyTwice = "apply-twice";
    /// Snapshots come without the sessions' last answers.
    SnapshotWithoutSessions = "snapshot-without-sessions";
    /// A store whose log is damaged cuts it there and goes on under its old id.
    DamagedLogKept = "damaged-log-kept";
    /// A directory that was moved still says it belongs to its old parent.
    NoSetOwner = "no-set-owner";
    /// Of an exchange only the one name changes: the other is unlocked as it was.
    HalfExchange = "half-exchange";
    /// Of several directories to be made, the last one is not.
    HalfPath = "half-path";
    /// Now and then a shard loses an entry of the dead map.
    ForgetDeadMap = "forget-dead-map";
    /// A shard's clock now and then goes back.
    ClockGoesBack = "clock-goes-back";
    /// A death still owns what was undeleted from it.
    UndeleteKeepsDeath = "undelete-keeps-death";
    /// A file is purged, and nobody knows its blocks any more.
    PurgeForgetsBlocks = "purge-forgets-blocks";
    /// A purged name stays in the dead map.
    PurgeKeepsName = "purge-keeps-name";
    /// Readers believe a name that a move has locked.
    UnresolvedMoves = "unresolved-moves";
    /// The coordinator takes every directory for one of the root's when it looks for loops.
    UnclearedMoves = "uncleared-moves";
    /// The coordinator does not take up what it had begun before it stopped.
    NoRecovery = "no-recovery";
    /// A block service proves a block before it is durable.
    ProofBeforeSync = "proof-before-sync";
    /// A reader believes every cell it gets.
    IgnoreCellCrc = "ignore-cell-crc";
    /// Copies are swapped in whatever the span has by now.
    SwapBlindly = "swap-blindly";
    /// Copies are swapped in that nobody has written.
    SwapUnproven = "swap-unproven";
    /// What copies took the place of is not listed to be erased.
    SwapForgetsBlocks = "swap-forgets-blocks";
    /// A block of a living file is listed to be erased now and then.
    EraseLive = "erase-live";
}

impl fmt::Display for Bug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Bug {
    type Err = String;

    fn from_str(name: &str) -> Result<Bug, String> {
        Bug::ALL.iter().copied().find(|bug| bug.name() == name).ok_or_else(|| {
            let names: Vec<&str> = Bug::ALL.iter().map(|bug| bug.name()).collect();
            format!("no such bug; there are {}", names.join(", "))
        })
    }
}

/// The shard's machine with a bug around it, or without.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BuggyShard {
    pub machine: ShardMachine,
    pub bug: Option<Bug>,
}

impl Machine for BuggyShard {
    type Effect = std::convert::Infallible;

    fn genesis<T: Table + ?Sized>(&self, tx: &mut Tx<'_, T>) -> Result<(), TableError> {
        self.machine.genesis(tx)
    }

    fn apply<T: Table + ?Sized>(
        &self,
        tx: &mut Tx<'_, T>,
        time: Time,
        command: &[u8],
    ) -> Result<Outcome<Self::Effect>, TableError> {
        let mut time = time;
        let mut command = Cow::Borrowed(command);
        match self.bug {
            Some(Bug::NoTransactionCheck) => forget_steps(tx, &command)?,
            Some(Bug::NoSetOwner) => command = without_set_owner(&command).into(),
            Some(bug @ (Bug::HalfExchange | Bug::HalfPath)) => command = by_half(&command, bug).into(),
            Some(Bug::SwapBlindly) => bless_swaps(tx, &command)?,
            Some(Bug::NoSessionCheck) => delete(tx, &[0, b'C'], 0, 1)?,
            Some(Bug::ClockGoesBack) if time.0.is_multiple_of(8) => time = Time(time.0 - 20_000_000),
            _ => {}
        }
        let before = self.bug.map_or(Ok(Vec::new()), |bug| named_dead(bug, tx, &command))?;
        let outcome = self.machine.apply(tx, time, &command)?;
        self.bug.map_or(Ok(()), |bug| spoil_dead(bug, tx, &command, before))?;
        if self.bug == Some(Bug::SwapForgetsBlocks) {
            forget_swapped(tx, &command)?;
        }
        if self.bug == Some(Bug::ForgetDeadMap) {
            // Deterministic, as a machine must be: by what is in the command's time.
            delete(tx, b"X", time.0, 8)?;
        }
        Ok(outcome)
    }
}

/// What every swap of a command means to replace becomes what is there, whatever that is.
fn bless_swaps<T: Table + ?Sized>(tx: &mut Tx<'_, T>, command: &[u8]) -> Result<(), TableError> {
    let command = pb::ShardCommand::decode(command).unwrap_or_default();
    for op in command.ops.into_iter().filter_map(|op| op.op?.op) {
        let Op::SwapBlocks(swap) = op else { continue };
        let key = eden_key(InodeId(swap.eden));
        let Some(mut row) = tx.get(&key)?.and_then(|row| pb::EdenRow::decode(row).ok()) else { continue };
        let Some(replacement) = &mut row.replacement else { continue };
        let prefix = id_key(SPAN, replacement.file);
        let spans = tx.page(&prefix, &prefix_end(&prefix), ROWS_MAX)?;
        let spans = spans.into_iter().filter_map(|(_, span)| pb::Span::decode(span).ok());
        let there = spans.into_iter().find(|span| span.offset == replacement.offset);
        let Some(blocks) = there.and_then(|span| span.blocks) else { continue };
        for (index, block) in replacement.indexes.iter().zip(&mut replacement.blocks) {
            *block = blocks.blocks.get(*index as usize).map_or(*block, |there| there.block);
        }
        tx.put(key, row.encode_to_vec())?;
    }
    Ok(())
}

/// The eden files of swaps, which list what was replaced, are gone.
fn forget_swapped<T: Table + ?Sized>(tx: &mut Tx<'_, T>, command: &[u8]) -> Result<(), TableError> {
    let command = pb::ShardCommand::decode(command).unwrap_or_default();
    for op in command.ops.into_iter().filter_map(|op| op.op?.op) {
        let Op::SwapBlocks(swap) = op else { continue };
        let key = eden_key(InodeId(swap.eden));
        let row = tx.get(&key)?.and_then(|row| pb::EdenRow::decode(row).ok());
        if row.is_some_and(|row| row.expired && row.replacement.is_none()) {
            tx.delete(key)?;
        }
    }
    Ok(())
}

/// [`Bug::SwapUnproven`]: a leader that takes every proof of a swap for a good one.
pub(crate) fn believe_swaps(view: &dyn Table, asked: pb::Write, command: &mut pb::ShardCommand) {
    for (asked, chosen) in asked.ops.into_iter().zip(&mut command.ops) {
        let Some(Op::SwapBlocks(swap)) = &asked.op else { continue };
        let row = view.get(&eden_key(InodeId(swap.eden))).ok().flatten();
        let pending = row.and_then(|row| pb::EdenRow::decode(row).ok()).and_then(|row| row.pending);
        let Some(blocks) = pending.and_then(|span| span.blocks) else { continue };
        chosen.refused = None;
        chosen.proven_blocks = blocks.blocks.iter().map(|block| block.block).collect();
        chosen.op = Some(asked);
    }
}

/// [`Bug::EraseLive`]: a block of a published file.
pub(crate) fn living_block(view: &dyn Table) -> Option<pb::GarbageBlock> {
    let spans = view.page(&[SPAN], &prefix_end(&[SPAN]), ROWS_MAX).ok()?;
    spans.into_iter().find_map(|(key, value)| {
        let Some(Key::Span(file, _)) = Key::parse(&key) else { return None };
        view.get(&file_key(file)).ok()??;
        let block = pb::Span::decode(value).ok()?.blocks?.blocks.into_iter().next()?;
        Some(pb::GarbageBlock {
            file: file.0,
            block_service: block.block_service,
            block: block.block,
            ..Default::default()
        })
    })
}

/// The dead rows that the operations of a command name.
fn named_dead<T: Table + ?Sized>(
    bug: Bug,
    tx: &Tx<'_, T>,
    command: &[u8],
) -> Result<Vec<(Vec<u8>, bytes::Bytes)>, TableError> {
    if bug != Bug::UndeleteKeepsDeath && bug != Bug::PurgeKeepsName {
        return Ok(Vec::new());
    }
    let command = pb::ShardCommand::decode(command).unwrap_or_default();
    let mut rows = Vec::new();
    for op in command.ops.into_iter().filter_map(|op| op.op?.op) {
        let (directory, name, died_at) = match (bug, op) {
            (Bug::UndeleteKeepsDeath, Op::Undelete(op)) => (op.directory, op.name, op.died_at),
            (Bug::PurgeKeepsName, Op::Purge(op)) => (op.directory, op.name, op.died_at),
            _ => continue,
        };
        let key = dead_key(InodeId(directory), &name, Time(died_at));
        if let Some(row) = tx.get(&key)? {
            rows.push((key, row));
        }
    }
    Ok(rows)
}

/// Undoes a part of what a command did to what is dead.
fn spoil_dead<T: Table + ?Sized>(
    bug: Bug,
    tx: &mut Tx<'_, T>,
    command: &[u8],
    before: Vec<(Vec<u8>, bytes::Bytes)>,
) -> Result<(), TableError> {
    for (key, row) in before {
        tx.put(key, row)?;
    }
    if bug != Bug::PurgeForgetsBlocks {
        return Ok(());
    }
    let command = pb::ShardCommand::decode(command).unwrap_or_default();
    for op in command.ops.into_iter().filter_map(|op| op.op?.op) {
        let file = match op {
            Op::Purge(op) => op.target,
            Op::PurgeFile(op) => op.file,
            _ => continue,
        };
        if tx.get(&eden_key(InodeId(file)))?.is_some() {
            delete(tx, &eden_key(InodeId(file)), 0, 1)?;
            delete(tx, &id_key(SPAN, file), 0, 1)?;
            let counts = tx.page(&[BLOCKS], &prefix_end(&[BLOCKS]), ROWS_MAX)?;
            for (key, _) in counts.into_iter().filter(|(key, _)| key.ends_with(&file.to_be_bytes())) {
                tx.delete(key)?;
            }
        }
    }
    Ok(())
}

/// More than any table of a run has.
const ROWS_MAX: usize = 1 << 20;

/// Deletes the rows under a prefix when `by` is a multiple of `one_in`.
fn delete<T: Table + ?Sized>(
    tx: &mut Tx<'_, T>,
    prefix: &[u8],
    by: u64,
    one_in: u64,
) -> Result<(), TableError> {
    if !by.is_multiple_of(one_in) {
        return Ok(());
    }
    let rows = tx.page(prefix, &prefix_end(prefix), ROWS_MAX)?;
    let one = if one_in > 1 { 1 } else { rows.len() };
    for (key, _) in rows.into_iter().take(one) {
        tx.delete(key)?;
    }
    Ok(())
}

/// The outcomes of the steps that are about to be repeated.
fn forget_steps<T: Table + ?Sized>(tx: &mut Tx<'_, T>, command: &[u8]) -> Result<(), TableError> {
    let command = pb::ShardCommand::decode(command).unwrap_or_default();
    for op in command.ops.into_iter().filter_map(|op| op.op?.op) {
        let (transaction, step) = match op {
            Op::CreateDirectory(op) => (op.transaction, Step::CreateDirectory),
            Op::DiscardDirectory(op) => (op.transaction, Step::DiscardDirectory),
            Op::LockDirectory(op) => (op.transaction, Step::LockDirectory),
            Op::UnlockDirectory(op) => (op.transaction, Step::UnlockDirectory),
            Op::LockEdge(op) => (op.transaction, Step::LockEdge),
            Op::UnlockEdge(op) => (op.transaction, Step::UnlockEdge),
            Op::LinkEdge(op) => (op.transaction, Step::LinkEdge),
            Op::UnlinkEdge(op) => (op.transaction, Step::UnlinkEdge),
            Op::SetOwner(op) => (op.transaction, Step::SetOwner),
            Op::RemoveDirectory(op) => (op.transaction, Step::RemoveDirectory),
            Op::CreateDirectories(op) => (op.transaction, Step::CreateDirectories),
            Op::DiscardDirectories(op) => (op.transaction, Step::DiscardDirectories),
            Op::ExchangeEdge(op) => (op.transaction, Step::ExchangeEdge),
            Op::SettleEdge(op) => (op.transaction, Step::SettleEdge),
            Op::SetOwners(op) => (op.transaction, Step::SetOwners),
            Op::ReviveDirectory(op) => (op.transaction, Step::ReviveDirectory),
            Op::UndeleteEdge(op) => (op.transaction, Step::UndeleteEdge),
            Op::LockDeadEdge(op) => (op.transaction, Step::LockDeadEdge),
            Op::FreeDeadEdge(op) => (op.transaction, Step::FreeDeadEdge),
            Op::PurgeDeadEdge(op) => (op.transaction, Step::PurgeDeadEdge),
            Op::PurgeFile(op) => (op.transaction, Step::PurgeFile),
            Op::PurgeDirectory(op) => (op.transaction, Step::PurgeDirectory),
            _ => continue,
        };
        tx.delete(transaction_key(TransactionId(transaction), step))?;
    }
    Ok(())
}

/// The command with an attribute change that changes nothing in the place of SetOwner.
fn without_set_owner(command: &[u8]) -> Vec<u8> {
    let mut command = pb::ShardCommand::decode(command).unwrap_or_default();
    for op in command.ops.iter_mut().filter_map(|op| op.op.as_mut()) {
        let directory = match &op.op {
            Some(Op::SetOwner(set)) => set.directory,
            Some(Op::SetOwners(set)) => set.owners.first().map_or(0, |owner| owner.directory),
            _ => continue,
        };
        let nothing = pb::SetAttributes { inode: directory, ..pb::SetAttributes::default() };
        op.op = Some(Op::SetAttributes(nothing));
    }
    command.encode_to_vec()
}

/// The command without half of what it should do.
fn by_half(command: &[u8], bug: Bug) -> Vec<u8> {
    let mut command = pb::ShardCommand::decode(command).unwrap_or_default();
    for op in command.ops.iter_mut().filter_map(|op| op.op.as_mut()) {
        match (&mut op.op, bug) {
            (Some(Op::SettleEdge(step)), Bug::HalfExchange) => {
                let (transaction, directory) = (step.transaction, step.directory);
                let name = std::mem::take(&mut step.name);
                op.op = Some(Op::UnlockEdge(pb::UnlockEdge { transaction, directory, name }));
            }
            (Some(Op::CreateDirectories(step)), Bug::HalfPath) => drop(step.names.pop()),
            _ => {}
        }
    }
    command.encode_to_vec()
}
