//! The search on its own: hints, silence, elections, lies.

use super::*;
use crate::retry::PAUSE_MAX;

const PATIENCE: Duration = Duration::from_secs(1);
const START: Duration = Duration::ZERO;

fn places(names: &[&str]) -> Vec<Arc<str>> {
    names.iter().map(|&name| name.into()).collect()
}

fn ask(name: &str) -> Next {
    Next::Ask(name.into())
}

fn elsewhere(hint: &str) -> Said {
    Said::Elsewhere((!hint.is_empty()).then(|| hint.into()))
}

/// The next thing to do of a search in which everybody is trusted.
fn next(search: &mut Search, places: &[Arc<str>], now: Duration) -> Next {
    search.next(places, |_| true, now, 1)
}

#[test]
fn a_hint_is_followed_at_once() {
    let (mut search, places) = (Search::new(PATIENCE), places(&["a", "b", "c"]));
    assert_eq!(next(&mut search, &places, START), ask("a"));
    assert_eq!(next(&mut search, &places, START), Next::Wait(PATIENCE));
    search.said("a", elsewhere("c"), START, 1);
    assert_eq!(next(&mut search, &places, START), ask("c"));
}

#[test]
fn without_a_hint_the_others_are_asked_and_then_there_is_a_pause() {
    let (mut search, places) = (Search::new(PATIENCE), places(&["a", "b", "c"]));
    for name in ["a", "b", "c"] {
        assert_eq!(next(&mut search, &places, START), ask(name));
        search.said(name, if name == "a" { Said::Gone } else { elsewhere("a") }, START, 1);
    }
    // They still name the one that is gone: it was asked in this round.
    let Next::Pause(wake) = next(&mut search, &places, START) else { panic!("a pause") };
    assert!(wake > START && wake <= PAUSE_MAX);
    assert_eq!(next(&mut search, &places, START), Next::Wait(wake));
    assert_eq!(next(&mut search, &places, wake), ask("a"));
}

#[test]
fn while_one_is_silent_another_is_asked() {
    let (mut search, places) = (Search::new(PATIENCE), places(&["a", "b", "c"]));
    assert_eq!(next(&mut search, &places, START), ask("a"));
    assert_eq!(next(&mut search, &places, PATIENCE), ask("b"));
    // The other one says that the silent one leads: it is waited for, and asked about again.
    search.said("b", elsewhere("a"), PATIENCE, 1);
    let again = PATIENCE + PATIENCE / ASKED_AGAIN;
    assert_eq!(next(&mut search, &places, PATIENCE), Next::Wait(again));
    assert_eq!(next(&mut search, &places, again), ask("b"));
    search.said("b", elsewhere("c"), again, 1);
    assert_eq!(next(&mut search, &places, again), ask("c"));
    let silent: Vec<_> = search.silent(2 * PATIENCE).map(|(name, since)| (&**name, since)).collect();
    assert_eq!(silent, [("a", 2 * PATIENCE - START), ("c", 2 * PATIENCE - again)]);
}

#[test]
fn while_there_is_an_election_the_others_are_asked_often() {
    let (mut search, places) = (Search::new(PATIENCE), places(&["a", "b"]));
    assert_eq!(next(&mut search, &places, START), ask("a"));
    assert_eq!(next(&mut search, &places, PATIENCE), ask("b"));
    search.said("b", elsewhere(""), PATIENCE, 1);
    let Next::Pause(wake) = next(&mut search, &places, PATIENCE) else { panic!("a pause") };
    assert!(wake <= PATIENCE + PAUSE_MAX, "{wake:?}");
    assert_eq!(next(&mut search, &places, wake), ask("b"), "the silent one is not asked twice");
}

#[test]
fn one_that_was_unreachable_just_now_comes_last_even_when_hinted_at() {
    let (mut search, places) = (Search::new(PATIENCE), places(&["b", "c", "a"]));
    let trusted = |name: &str| name != "a";
    assert_eq!(search.next(&places, trusted, START, 1), ask("b"));
    search.said("b", elsewhere("a"), START, 1);
    assert_eq!(search.next(&places, trusted, START, 1), ask("c"));
    search.said("c", elsewhere("a"), START, 1);
    assert_eq!(search.next(&places, trusted, START, 1), ask("a"));
    // And is not waited for.
    let Next::Wait(wake) = search.next(&places, trusted, START, 1) else { panic!("a pause") };
    assert!(wake <= PAUSE_MAX, "{wake:?}");
    search.next(&places, trusted, wake, 1);
    assert_eq!(search.next(&places, trusted, wake + PAUSE_MAX, 1), ask("b"));
}

#[test]
fn hints_that_lie_lead_nowhere_for_long() {
    let (mut search, places) = (Search::new(PATIENCE), places(&["a"]));
    let mut asked = 0;
    loop {
        let address = match next(&mut search, &places, START) {
            Next::Ask(place) => place,
            Next::Pause(_) => break,
            Next::Wait(_) => panic!("nobody is silent"),
        };
        asked += 1;
        search.said(&address, elsewhere(&format!("stranger-{asked}")), START, 1);
    }
    assert_eq!(asked, 1 + STRANGERS_MAX);
}

#[test]
fn a_place_that_says_later_is_asked_again_and_after_a_while_the_others() {
    let (mut search, places) = (Search::new(PATIENCE), places(&["a", "b"]));
    let mut now = START;
    let mut asked = Vec::new();
    while asked.len() < 10 {
        match next(&mut search, &places, now) {
            Next::Ask(place) => {
                let said = if &*place == "a" { Said::Later } else { elsewhere("a") };
                search.said(&place, said, now, 1);
                asked.push(place);
            }
            Next::Wait(wake) | Next::Pause(wake) => now = wake,
        }
    }
    let others = asked.iter().filter(|place| &***place == "b").count();
    assert!((1..=3).contains(&others), "{asked:?}");
}

#[test]
fn one_place_or_none_is_asked_for_ever_with_pauses() {
    let none: Vec<Arc<str>> = Vec::new();
    let mut search = Search::new(PATIENCE);
    assert!(matches!(next(&mut search, &none, START), Next::Pause(wake) if wake > START));
    let one = places(&["a"]);
    let mut now = START;
    for round in 0..50 {
        let wait = match next(&mut search, &one, now) {
            Next::Ask(_) => {
                search.said("a", Said::Gone, now, round);
                continue;
            }
            Next::Wait(wake) | Next::Pause(wake) => wake - now,
        };
        assert!(wait > START && wait <= PAUSE_MAX);
        now += wait;
    }
}
