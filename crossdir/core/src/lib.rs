//! Cross-directory transactions as deterministic state machines.
//!
//! Two cores. The [`CrossdirMachine`] is replicated and remembers: which transactions were begun, for
//! whom, and how they ended. The [`Driver`] is volatile and acts: it queues transactions on locks,
//! sends their steps to the shards, repeats what is uncertain, answers, and has the machine record the
//! end. It can be thrown away at any moment and made again from the machine's rows.
//!
//! A transaction's life: `Begin` is logged → its steps on the shards → the caller is answered →
//! `Finish` is logged (in batches) → the shards forget it (in batches) → `Retire` is logged (in
//! batches).
//!
//! A call, as its shell sees it: [`Driver::admit`] → [`prepare`] and log, with the call's session → the
//! machine's [`TransactionAccepted`](eggs_proto::pb::TransactionAccepted) → [`Driver::reply`], or wait for
//! [`Output::Answer`]; a transaction the driver does not know is over: [`answer`]. When the caller's time
//! is up first: `InProgress`; the same call again finds the same transaction.
//!
//! Reading order: [`machine`], `transaction/` (one file each, steps and undo at the top), [`locks`], `moves`,
//! [`driver`].
//!
//! # Invariants
//!
//! - **XD-1** A step repeated gets the shard's first answer to it (a shard keeps the outcome, refusals
//!   too, under transaction and kind of step), so a transaction run again comes to the same end.
//! - **XD-2** A call (session, sequence) becomes one transaction at most, and gets the same answer
//!   whenever it is repeated, until its session begins a newer one or is unused for `SESSION_TTL`.
//! - **XD-3** The shards are told to forget a transaction only once its answer is durable (`Finish` is
//!   applied).
//! - **XD-4** A transaction is retired only once it is finished and every shard that may remember it has
//!   acknowledged forgetting it.
//! - **XD-5** A new driver takes up what is unfinished in the order it was begun, before anything newer; moves that were
//!   cleared before all others, as these may wait for them.
//! - **XD-6** No two transactions that conflict run at once.
//! - **XD-7** Of two transactions that conflict, the one begun first runs first; every transaction runs
//!   once those begun before it are done.
//! - **XD-8** What a transaction decides by looking at more than the shards' memory of it (today: that a move or an exchange
//!   of directories makes no loop) is recorded before it acts on it, is not made wrong by what others do until it is over,
//!   and is not decided again after a crash. Only the newest driver's decisions are recorded.
//! - **XD-9** A caller is answered once: when the outcome is certain and nothing is left that the caller
//!   could tell from its being done (XD-12). An uncertain outcome is never answered; the step is repeated.
//! - **XD-10** A step of a transaction never runs after the shard forgot it: the floor that goes with
//!   `ForgetTransactions` is the oldest unfinished transaction; those above it are forgotten only when
//!   they have been finished for longer than a message can be late.
//! - **XD-11** After a transaction, whatever crashed on the way, the namespace is as if it had run at one
//!   go, or not at all.
//! - **XD-12** At every instant a moved inode has exactly one name: the old one dies at the instant the new one
//!   comes, and while the old one is locked who reads it asks what became of the move. So has each of two that are
//!   exchanged, and each of their names leads to one of them.

pub mod driver;
pub mod locks;
pub mod machine;
mod moves;
mod prepare;
mod schema;
mod transaction;

pub use driver::{Driver, Input, MoveState, Output, Received};
pub use machine::{
    Answer, CrossdirMachine, Effect, Pending, answer, finished_not_retired, reply_of, unfinished,
};
pub use prepare::prepare;
