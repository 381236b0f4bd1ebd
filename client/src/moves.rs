//! Names that a move or an exchange has locked: whether they are still there is known to the coordinator.

use eggs_client_core::retry::Backoff;
use eggs_proto::pb::{crossdir_reply, crossdir_request};
use eggs_proto::{InodeId, Time, TransactionId, pb};

use crate::Client;
use crate::ask::Patience;
use crate::connection::entropy;
use crate::error::{ClientError, Result};

/// What a locked name is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    There,
    Gone,
    /// It leads to this inode instead, since then.
    Leads(InodeId, Time),
}

/// What one who reads has learned of moves, all as of one instant.
#[derive(Debug)]
pub(crate) struct Moves {
    at: Time,
    pub moved: Vec<u64>,
    pub not_moved: Vec<u64>,
    pub exchanged: Vec<pb::Exchanged>,
    patience: Patience,
    backoff: Backoff,
}

impl Moves {
    /// `at` unset: now.
    pub fn new(client: &Client, at: Time) -> Moves {
        let (patience, backoff) = (client.shared.patience(), Backoff::default());
        let (moved, not_moved, exchanged) = (Vec::new(), Vec::new(), Vec::new());
        Moves { at, moved, not_moved, exchanged, patience, backoff }
    }

    /// What the name was by the instant; asks the coordinator once. `None`: the move is over, and nothing is locked by it
    /// any more: to be looked at again.
    pub async fn fate(&mut self, client: &Client, transaction: u64) -> Result<Option<Fate>> {
        if self.moved.contains(&transaction) {
            return Ok(Some(Fate::Gone));
        }
        if self.not_moved.contains(&transaction) {
            return Ok(Some(Fate::There));
        }
        if let Some(known) = self.exchanged.iter().find(|known| known.transaction == transaction) {
            return Ok(Some(Fate::Leads(InodeId(known.target), Time(known.exchanged_at))));
        }
        let reply = client.resolve_move(TransactionId(transaction)).await?;
        let by_then = self.at.is_unset() || reply.moved_at <= self.at.0;
        let fate = match reply.outcome() {
            pb::MoveOutcome::MoveMade if by_then => Fate::Gone,
            pb::MoveOutcome::MoveExchanged if by_then => {
                Fate::Leads(InodeId(reply.target), Time(reply.moved_at))
            }
            pb::MoveOutcome::MoveNotMade | pb::MoveOutcome::MoveMade | pb::MoveOutcome::MoveExchanged => {
                Fate::There
            }
            pb::MoveOutcome::MoveOver => {
                // A replica that has not heard of it yet will.
                if !self.patience.sleep(self.backoff.pause(entropy())).await {
                    return Err(ClientError::protocol("a name stays locked by a move that is over"));
                }
                return Ok(None);
            }
        };
        match fate {
            Fate::Gone => self.moved.push(transaction),
            Fate::There => self.not_moved.push(transaction),
            Fate::Leads(target, at) => {
                let (target, exchanged_at) = (target.0, at.0);
                self.exchanged.push(pb::Exchanged { transaction, target, exchanged_at });
            }
        }
        Ok(Some(fate))
    }
}

impl Client {
    /// What has become of a move that locks a name.
    pub(crate) async fn resolve_move(&self, transaction: TransactionId) -> Result<pb::ResolveMoveReply> {
        let op = crossdir_request::Op::ResolveMove(pb::ResolveMove { transaction: transaction.0 });
        match self.shared.crossdir_read(op).await? {
            Ok(crossdir_reply::Result::ResolveMove(reply)) => Ok(reply),
            Ok(_) => Err(ClientError::other_reply("resolve move")),
            Err(error) => Err(ClientError::from_crossdir(&error, "the coordinator")),
        }
    }
}
