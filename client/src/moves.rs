//! Names that a move has locked: whether they are still there is known to the coordinator.

use eggs_client_core::retry::Backoff;
use eggs_proto::pb::{crossdir_reply, crossdir_request};
use eggs_proto::{Time, TransactionId, pb};

use crate::Client;
use crate::ask::Patience;
use crate::connection::entropy;
use crate::error::{ClientError, Result};

/// What one who reads has learned of moves, all as of one instant.
#[derive(Debug)]
pub(crate) struct Moves {
    at: Time,
    pub moved: Vec<u64>,
    pub not_moved: Vec<u64>,
    patience: Patience,
    backoff: Backoff,
}

impl Moves {
    /// `at` unset: now.
    pub fn new(client: &Client, at: Time) -> Moves {
        let (moved, not_moved) = (Vec::new(), Vec::new());
        Moves { at, moved, not_moved, patience: client.shared.patience(), backoff: Backoff::default() }
    }

    /// Whether the old name was gone by the instant; asks the coordinator once. `None`: the move is over, and nothing is
    /// locked by it any more: to be looked at again.
    pub async fn is_gone(&mut self, client: &Client, transaction: u64) -> Result<Option<bool>> {
        if self.moved.contains(&transaction) {
            return Ok(Some(true));
        }
        if self.not_moved.contains(&transaction) {
            return Ok(Some(false));
        }
        let reply = client.resolve_move(TransactionId(transaction)).await?;
        let gone = match reply.outcome() {
            pb::MoveOutcome::MoveNotMade => false,
            pb::MoveOutcome::MoveMade => self.at.is_unset() || reply.moved_at <= self.at.0,
            pb::MoveOutcome::MoveOver => {
                // A replica that has not heard of it yet will.
                if !self.patience.sleep(self.backoff.pause(entropy())).await {
                    return Err(ClientError::protocol("a name stays locked by a move that is over"));
                }
                return Ok(None);
            }
        };
        let known = if gone { &mut self.moved } else { &mut self.not_moved };
        known.push(transaction);
        Ok(Some(gone))
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
