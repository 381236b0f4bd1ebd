//! Everything that can happen to a few transactions: every order of every message, with the driver dying in
//! between, on the real cores.
//!
//! Each pair of a list of operations on one small tree ([`scenario`]) is run from every state in every way it can go on
//! ([`state`]), each state once ([`canon`], [`search`]). At each instant a moved inode has one name for
//! who reads then (XD-12); an answer is true when it is given (XD-9) and stays (XD-2); at the end the namespace is whole
//! (XD-11), everything is forgotten and retired (XD-4), what comes after that changes nothing (XD-10), and answers and tree
//! are those of one order of the calls, in which one answered before another began is before it ([`judge`]).
//!
//! In each state can happen: a call begins; a request is executed; an answer comes to the driver; a proposal is
//! applied; the driver's next timer runs out, if it is a short one or nothing else is on its way; the driver dies and
//! another takes over, which loses the answers on their way and leaves the requests to come late, or never (at the end
//! all come once more), and the proposals to be applied before the other takes over, or after that for nothing. Messages
//! are not lost otherwise, unless [`Bounds::losses`] says so, and are doubled only by repetition. With
//! [`Bounds::lives_on`] the driver does not die: it goes on with what the shards answer, and hears nothing of the log.
//!
//! What a shard does alone, such as to give a name in its directory another, is one step that comes at any moment at which
//! it meets no lock ([`local`]).
//!
//! Within seconds that is done for pairs that are in each other's way, with one crash, and for some of everything else.
//! `EGGS_EXPLORE=full cargo nextest run -p eggs-crossdir-core --test explore` does all pairs, without the reductions of
//! [`Bounds::brief`], triples with a crash, and pairs with two, with a lost message, or with two drivers: many minutes.
//!
//! Bugs put into the cores by hand, each of which it found: a move that does not wait for those that are clear, or does not
//! read again; what is clear not taken up by the next driver, or not recorded; a loop answered, or its locks released,
//! before it is recorded; clearances or ends of a replaced driver that count. Of exchanges: one that claims
//! one of its two targets, reads one of its two new parents, or does not lock what it moves; a locked name that is said to be
//! gone, or as it was while that is decided; one that changes at an instant of its own. Earlier, before moves were cleared:
//! no loop check; a file move answered before its link; a refused move not unlocked; the old name dead at an instant of its
//! own; a recovered driver that says "not made"; no locks for mkdir, or for moves; the target of rmdir locked shared; rmdir
//! not undone; no exclusive lock on the directory that is undeleted or purged; a file undeleted elsewhere answered before
//! its dead edge is freed; the newest taken up first; the floor not raised; forgetting above the floor at once. Not found, as
//! no driver can show it: UnlockEdge that does not forbid a LockEdge still to come; cleared moves taken up in the order
//! they began (an older one that is not clear shares no lock with them).

#[path = "../world/mod.rs"]
mod world;

mod canon;
mod judge;
mod local;
mod scenario;
mod search;
mod state;

use eggs_proto::{CrossdirError, ServiceError};
use scenario::{Operation, Tree};
use search::Explored;
use state::Bounds;

const UNDISTURBED: Bounds =
    Bounds { crashes: 0, losses: 0, hasty_ms: 0, brief: true, lives_on: false, in_order: false };
/// Longer than the timers that collect ends …
const HASTY_MS: u64 = 10;
/// … and than those that collect what is forgotten, shorter than those that repeat.
const FORGETTING_MS: u64 = 1500;
const CRASH: Bounds = Bounds { crashes: 1, ..UNDISTURBED };

fn full() -> bool {
    std::env::var("EGGS_EXPLORE").is_ok_and(|value| value == "full")
}

/// All sets of operations from `sets`, each within its bounds.
fn explore<'a>(tree: &Tree, sets: impl IntoIterator<Item = (Vec<&'a Operation>, Bounds)>) -> Explored {
    let mut all = Explored::default();
    for (operations, bounds) in sets {
        let names: Vec<&str> = operations.iter().map(|operation| operation.name).collect();
        let explored = search::explore(&names, tree.state(&operations, bounds));
        println!(
            "{:>8} states {:>8} transitions: {}",
            explored.states,
            explored.transitions,
            names.join(" | ")
        );
        all.add(&explored);
    }
    println!("{all:?}");
    all
}

fn pairs(operations: &[Operation]) -> impl Iterator<Item = (&Operation, &Operation)> {
    let all = operations.iter().enumerate();
    all.flat_map(|(n, first)| operations[n..].iter().map(move |second| (first, second)))
}

#[test]
fn every_pair_in_every_order() {
    let tree = scenario::plant();
    let operations = scenario::operations(&tree.places);
    let explored = explore(
        &tree,
        pairs(&operations).map(|(first, second)| {
            let bounds = match (full(), first.meets(second)) {
                (true, _) => Bounds { hasty_ms: HASTY_MS, brief: false, ..CRASH },
                // Moved directories have states enough of their own.
                (false, true) => {
                    let late = first.moves_directory() || second.moves_directory();
                    Bounds { hasty_ms: if late { 0 } else { HASTY_MS }, ..CRASH }
                }
                // What has nothing in common meets in the driver only.
                (false, false) => UNDISTURBED,
            };
            (vec![first, second], bounds)
        }),
    );
    // So that it does not shrink unnoticed.
    assert!(explored.states > 900_000, "{explored:?}");
    for refusal in
        [CrossdirError::Exists, CrossdirError::NotEmpty, CrossdirError::Loop, CrossdirError::NotFound]
    {
        assert!(explored.codes.contains_key(&refusal.code()), "the operations are too tame: {refusal:?}");
    }
}

#[test]
fn some_triples() {
    let tree = scenario::plant();
    let operations = scenario::operations(&tree.places);
    let bounds = if full() {
        Bounds { hasty_ms: HASTY_MS, ..CRASH }
    } else {
        Bounds { in_order: true, ..UNDISTURBED }
    };
    let sets = scenario::TRIPLES.iter().map(|names| (scenario::named(&operations, names), bounds));
    let explored = explore(&tree, sets);
    assert!(explored.states > 20_000, "{explored:?}");
}

/// XD-8: the first move, run again after the others, would find a loop; or none any more, and what it moves half removed.
#[test]
fn a_move_and_those_that_turn_the_tree_round() {
    let tree = scenario::plant();
    let mut operations = scenario::operations(&tree.places);
    operations.push(scenario::below_itself(&tree.places));
    let bounds = Bounds { in_order: !full(), ..CRASH };
    let sets = scenario::TURNS.iter().map(|names| (scenario::named(&operations, names), bounds));
    let explored = explore(&tree, sets);
    assert!(explored.states > 65_000, "{explored:?}");
}

/// Pairs in each other's way; a few of them unless all are asked for.
fn conflicts(operations: &[Operation]) -> impl Iterator<Item = Vec<&Operation>> {
    let asked = |names: [&str; 2]| full() || scenario::FEW.contains(&names);
    pairs(operations)
        .filter(move |(first, second)| first.meets(second) && asked([first.name, second.name]))
        .map(|(first, second)| vec![first, second])
}

#[test]
fn two_crashes() {
    let tree = scenario::plant();
    let operations = scenario::operations(&tree.places);
    let bounds = Bounds { crashes: 2, ..UNDISTURBED };
    let explored = explore(&tree, conflicts(&operations).map(|calls| (calls, bounds)));
    assert!(explored.states > 15_000, "{explored:?}");
}

/// XD-8: what a driver does that does not know that it was replaced.
#[test]
fn a_replaced_driver_lives_on() {
    let tree = scenario::plant();
    let operations = scenario::operations(&tree.places);
    let bounds = Bounds { lives_on: true, in_order: !full(), ..CRASH };
    let sets: Vec<_> = if full() {
        conflicts(&operations).collect()
    } else {
        scenario::LIVING_ON.iter().map(|names| scenario::named(&operations, names)).collect()
    };
    let explored = explore(&tree, sets.into_iter().map(|calls| (calls, bounds)));
    assert!(explored.states > 35_000, "{explored:?}");
}

/// XD-10: no late step of a transaction runs that the shards forgot while an older one was still running.
#[test]
fn forgetting_beside_an_older_one() {
    let tree = scenario::plant();
    let operations = scenario::operations(&tree.places);
    let bounds = Bounds { hasty_ms: FORGETTING_MS, brief: false, in_order: !full(), ..CRASH };
    let calls = scenario::named(&operations, &["mkdir /a/b/x", "mkdir /c/b"]);
    let explored = explore(&tree, [(calls, bounds)]);
    assert!(explored.states > 40_000, "{explored:?}");
}

#[test]
fn a_lost_message() {
    let tree = scenario::plant();
    let operations = scenario::operations(&tree.places);
    let bounds = Bounds { losses: 1, crashes: u32::from(full()), ..UNDISTURBED };
    let explored = explore(&tree, conflicts(&operations).map(|calls| (calls, bounds)));
    assert!(explored.states > 4_000, "{explored:?}");
}

/// The explorer finds what is wrong: the first run that shows it panics with `what`.
fn finds(what: &str, names: &[&str], spoil: impl Fn(&mut state::State)) {
    let tree = scenario::plant();
    let operations = scenario::operations(&tree.places);
    let mut state = tree.state(&scenario::named(&operations, names), CRASH);
    spoil(&mut state);
    let run = std::panic::AssertUnwindSafe(|| search::explore(names, state));
    let panic = std::panic::catch_unwind(run).expect_err("nothing was found");
    let said = panic.downcast_ref::<String>().expect("a message");
    assert!(said.contains(what), "{said}");
}

#[test]
fn a_shard_that_forgets_its_answers_is_found() {
    finds("answered otherwise before", &["/c/g to /a/g", "mkdir /c/b"], |state| state.forgetful = true);
}

#[test]
fn a_loop_is_found() {
    finds("is in a loop", &["/a to /c/a", "/c to /a/c"], |state| state.blind = true);
}
