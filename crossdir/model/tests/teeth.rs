//! With a rule taken away the search finds what goes wrong; where it does not, the rule is not what keeps directories
//! a tree, and the reason is with the [`Weakness`].

use Weakness::{
    AnswerBeforeRecorded, AnyDriverClears, AnyDriverFinishes, AnyDriverFinishesSteps, ClaimOneOfTwo,
    ClaimWhenRecorded, ClearTheFinished, ClearUnchecked, ClearedKeepTheirPlace, DeathStaysOwned, DropClaims,
    ForgetWhatWasOver, IgnoreReplaced, LateView, OvertakeWaiting, PurgeUnlocked, RefuseUnchecked,
    RefusedKeepNoLocks, StepBeforeRecorded, ViewBeforeTakeOver,
};
use eggs_crossdir_model::{Protocol, Scenario, Weakness, search};

/// In one scope.
const STATES_MAX: usize = 1_000_000;

/// Each into the other.
fn swap(crashes: u8) -> Scenario {
    Scenario::new(&[0, 0], crashes).moved(1, 0, 2).moved(2, 0, 1)
}

/// Into what is below, while that is taken away: a loop before, none after.
fn into_what_leaves(crashes: u8) -> Scenario {
    Scenario::new(&[0, 1], crashes).moved(1, 0, 2).moved(2, 1, 0)
}

fn goes_wrong(scenario: Scenario, without: &[Weakness], wrong: &str) {
    let found = search(&Protocol::new(scenario, without), STATES_MAX);
    let trace = found.counterexample.unwrap_or_else(|| panic!("without {without:?} nothing goes wrong"));
    assert!(trace.contains(wrong), "without {without:?}, not for {wrong:?} but: {trace}");
    println!("without {without:?}, {} states: {trace}", found.states);
}

const LOOP: &str = "its own ancestor";

#[test]
fn without_claims_there_are_loops() {
    goes_wrong(swap(0), &[ClearUnchecked], LOOP);
    goes_wrong(swap(0), &[ClaimWhenRecorded], LOOP);
    goes_wrong(swap(0), &[ForgetWhatWasOver], LOOP);
    goes_wrong(swap(1), &[StepBeforeRecorded], LOOP);
}

#[test]
fn an_exchange_is_two_moves() {
    // What goes below the first moves below the second meanwhile.
    let exchange = |crashes| Scenario::new(&[0, 0, 1], crashes).exchange((3, 1), (2, 0)).moved(1, 0, 2);
    goes_wrong(exchange(0), &[ClaimOneOfTwo], LOOP);
    goes_wrong(exchange(0), &[ClearUnchecked], LOOP);
    goes_wrong(exchange(1), &[DropClaims], LOOP);
}

#[test]
fn a_new_driver_has_to_know_what_was_cleared() {
    goes_wrong(swap(1), &[DropClaims], LOOP);
    goes_wrong(swap(2), &[AnyDriverClears], LOOP);
    goes_wrong(swap(2), &[ViewBeforeTakeOver], LOOP);
    goes_wrong(swap(1).lingering(), &[ViewBeforeTakeOver], "waits for ever");
    goes_wrong(swap(3), &[LateView], LOOP);
    goes_wrong(swap(2), &[IgnoreReplaced], "waits for ever");
}

#[test]
fn refusals_have_to_be_true_and_durable() {
    goes_wrong(into_what_leaves(0), &[RefuseUnchecked], "refused for what is not so");
    goes_wrong(into_what_leaves(1), &[AnswerBeforeRecorded], "told two things");
    goes_wrong(into_what_leaves(1), &[AnyDriverFinishes], "waits for ever");
    // Where what leaves was, under the name of what wants to follow.
    let same_name = Scenario::new(&[0, 1], 1).rename(1, (0, 1), (2, 9)).rename(2, (1, 2), (0, 1));
    goes_wrong(same_name, &[RefusedKeepNoLocks, ClearedKeepTheirPlace], "waits for ever");
}

#[test]
fn the_dead_are_owned_once() {
    let dead = |crashes| Scenario::new(&[0, 0], crashes).dead(2);
    for new in [0, 1] {
        let both = [dead(0).undelete(0, new).purge(0), dead(0).undelete(0, new)];
        for scenario in both {
            goes_wrong(scenario, &[DeathStaysOwned], "SH-16");
        }
    }
    // It has an entry that died.
    let inside = Scenario::new(&[0, 1], 0).dead(1).dead(2).purge(0);
    goes_wrong(inside, &[PurgeUnlocked], "is purged, and is there, or something in it");
}

#[test]
fn what_is_not_needed_to_stay_a_tree() {
    let rules: [&[Weakness]; 5] = [
        &[OvertakeWaiting],
        &[ClearedKeepTheirPlace],
        &[RefusedKeepNoLocks],
        &[AnyDriverFinishesSteps],
        &[ClearTheFinished],
    ];
    for without in rules {
        let three = Scenario::new(&[0, 0, 0], 1).moved(1, 0, 2).moved(2, 0, 3).moved(3, 0, 1);
        for scenario in [swap(2), into_what_leaves(2), three] {
            let found = search(&Protocol::new(scenario, without), STATES_MAX);
            assert_eq!(found.counterexample, None, "without {without:?}");
        }
    }
}
