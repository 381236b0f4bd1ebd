//! The protocol keeps its promises in every state of every scope here.

use std::time::Instant;

use eggs_crossdir_model::{Protocol, Scenario, Weakness, search};

/// In one scope; a few gigabytes.
const STATES_MAX: usize = 20_000_000;

fn all_is_well(what: &str, scenarios: Vec<Scenario>, without: &[Weakness]) {
    let (begun, scopes, mut states) = (Instant::now(), scenarios.len(), 0);
    for scenario in scenarios {
        let name = scenario.to_string();
        let found = search(&Protocol::new(scenario, without), STATES_MAX);
        assert_eq!(found.counterexample, None, "{name}, without {without:?}");
        states += found.states;
    }
    println!(
        "{what}, without {without:?}: {scopes} scopes, {states} states, {:.1} s",
        begun.elapsed().as_secs_f64()
    );
}

/// Three at once, and removals among them: what two cannot show.
fn chosen(crashes: u8) -> Vec<Scenario> {
    let tree = |parents: &[u8]| Scenario::new(parents, crashes);
    vec![
        // Each below the next: any two may go, not all three.
        tree(&[0, 0, 0]).moved(1, 0, 2).moved(2, 0, 3).moved(3, 0, 1),
        // The locks of the two meet nowhere, their ancestors do.
        tree(&[0, 0, 1, 2]).moved(1, 0, 4).moved(2, 0, 3),
        // An ancestor is emptied and removed while it is read.
        tree(&[0, 1, 0]).moved(2, 1, 0).rmdir(1, 0).moved(3, 0, 2),
        tree(&[0, 1, 0]).moved(3, 0, 2).moved(2, 1, 0).rmdir(1, 0),
        // Two want one name.
        tree(&[0, 0, 0]).rename(1, (0, 1), (3, 9)).rename(2, (0, 2), (3, 9)),
        // Exchanged, each would be below what the move makes of the other.
        tree(&[0, 0, 1]).exchange((3, 1), (2, 0)).moved(1, 0, 2).rmdir(3, 0),
        // A loop is refused, or not, as another takes the new parent away; and its own name is asked for again.
        tree(&[0, 1]).moved(1, 0, 2).moved(2, 1, 0).moved(1, 0, 2),
    ]
}

#[test]
fn every_two_transactions_on_four_directories() {
    all_is_well("pairs", Scenario::every_pair(3, 1), &[]);
}

#[test]
fn every_exchange_beside_another_transaction() {
    all_is_well("exchanges", Scenario::every_exchange(3, 2), &[]);
    all_is_well("exchanges on 5 directories", Scenario::every_exchange(4, 1), &[]);
}

#[test]
fn every_undelete_and_purge_beside_another_transaction() {
    all_is_well("undelete and purge", Scenario::every_undelete_and_purge(3, 1), &[]);
}

/// Three at once with the dead among them.
fn chosen_dead(crashes: u8) -> Vec<Scenario> {
    let tree = |parents: &[u8]| Scenario::new(parents, crashes);
    vec![
        // Three want the same death.
        tree(&[0, 0]).dead(2).undelete(0, 0).undelete(0, 1).purge(0),
        tree(&[0, 0]).dead(2).purge(0).undelete(0, 1).rmdir(1, 0),
        // It dies, comes back, and dies again; or is purged first.
        tree(&[0, 0]).rmdir(2, 0).undelete(0, 1).rmdir(2, 1),
        tree(&[0, 0]).rmdir(2, 0).purge(0).undelete(0, 1),
        // What died in a dead one goes first, or comes back into what comes back.
        tree(&[0, 1]).dead(1).dead(2).purge(1).purge(0).undelete(1, 0),
        tree(&[0, 1]).dead(1).dead(2).undelete(0, 0).undelete(1, 1).purge(0),
        // The new parent moves, and is moved below what comes back.
        tree(&[0, 0, 0]).dead(3).undelete(0, 1).moved(1, 0, 2).moved(2, 0, 3),
        tree(&[0, 0, 0]).dead(3).undelete(0, 1).moved(1, 0, 3).purge(0),
    ]
}

#[test]
fn three_transactions() {
    all_is_well("chosen", chosen(1), &[]);
    all_is_well("chosen with the dead", chosen_dead(1), &[]);
}

/// A driver that does not know that there is another goes on beside it.
#[test]
fn two_drivers() {
    all_is_well("pairs on 3 directories, two drivers", two_at_once(Scenario::every_pair(2, 1)), &[]);
    all_is_well("exchanges, two drivers", two_at_once(Scenario::every_exchange(3, 1)), &[]);
}

fn two_at_once(scenarios: Vec<Scenario>) -> Vec<Scenario> {
    scenarios.into_iter().map(Scenario::lingering).collect()
}

/// Minutes: `cargo test --release -p eggs-crossdir-model -- --ignored --nocapture`.
#[test]
#[ignore = "minutes"]
fn more_crashes_more_directories_three_of_any_kind() {
    all_is_well("chosen, 2 crashes", chosen(2), &[]);
    all_is_well("pairs, 2 crashes", Scenario::every_pair(3, 2), &[]);
    all_is_well("pairs on 5 directories", Scenario::every_pair(4, 1), &[]);
    all_is_well("three moves", Scenario::every_three_moves(3, 1), &[]);
    all_is_well("exchanges on 5 directories, 2 crashes", Scenario::every_exchange(4, 2), &[]);
}

#[test]
#[ignore = "minutes"]
fn two_drivers_on_more_directories() {
    all_is_well("pairs, two drivers", two_at_once(Scenario::every_pair(3, 1)), &[]);
    all_is_well("chosen, two drivers", two_at_once(chosen(1)), &[]);
}

#[test]
#[ignore = "minutes"]
fn the_dead_with_more_crashes_and_directories_and_two_drivers() {
    all_is_well("chosen with the dead, 2 crashes", chosen_dead(2), &[]);
    all_is_well("chosen with the dead, two drivers", two_at_once(chosen_dead(1)), &[]);
    all_is_well("undelete and purge, 2 crashes", Scenario::every_undelete_and_purge(3, 2), &[]);
    let two = two_at_once(Scenario::every_undelete_and_purge(3, 1));
    all_is_well("undelete and purge, two drivers", two, &[]);
    all_is_well("undelete and purge on 5 directories", Scenario::every_undelete_and_purge(4, 1), &[]);
}

/// As above, without what [`Weakness`] says no run needs.
#[test]
#[ignore = "minutes"]
fn what_is_not_needed_is_not_needed_in_larger_scopes_either() {
    for weakness in [Weakness::ClearedKeepTheirPlace, Weakness::AnyDriverFinishesSteps] {
        all_is_well("chosen, 2 crashes", chosen(2), &[weakness]);
        all_is_well("pairs, 2 crashes", Scenario::every_pair(3, 2), &[weakness]);
        all_is_well("three moves", Scenario::every_three_moves(3, 1), &[weakness]);
    }
}
