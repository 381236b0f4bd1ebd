//! From the members a group has to those it is to have: one change at a time.

use eggs_proto::StoreId;
use eggs_proto::limits::MEMBERS_MAX;

use crate::membership::Membership;

/// The members a group is to have, as the registry decided.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Empty: nothing is decided, all stays.
    pub voters: Vec<StoreId>,
    /// Who is to lead while it can.
    pub preferred: Option<StoreId>,
    /// What the registry last heard of a leader: who is not in there, and knows of nothing later, was removed.
    pub known: Membership,
}

/// A change of the members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    AddLearner(StoreId),
    Promote(StoreId),
    Remove(StoreId),
}

/// What a leader does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Change(Change),
    Transfer(StoreId),
    /// Something has to happen first.
    Wait,
    /// All is as it is to be, or nothing can be done about it.
    Done,
}

/// How a member is, seen from the leader.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Member {
    /// Has nearly all of the log.
    pub caught_up: bool,
    /// Was heard of lately.
    pub alive: bool,
    /// Its clock is good enough to lead.
    pub on_time: bool,
    /// A learner whose store is there, and which yet has not answered for long: it has lost what the leader believes it has
    /// (it was removed on old news after it answered). It begins anew when it is added anew.
    pub lost: bool,
}

/// The next step of the leader `me`. Grows before it shrinks, and never takes a step after which the voters
/// that are alive and caught up are no quorum.
pub(crate) fn next_step(
    me: StoreId,
    membership: &Membership,
    wanted: &Wanted,
    member: impl Fn(StoreId) -> Member,
) -> Step {
    if wanted.voters.is_empty() {
        return Step::Done;
    }
    let fit = |store: StoreId| store == me || (member(store).alive && member(store).caught_up);
    let missing = wanted.voters.iter().copied().filter(|store| !membership.voters.contains(store));
    let mut waits = false;
    for store in missing {
        if !membership.learners.contains(&store) {
            if membership.voters.len() + membership.learners.len() >= MEMBERS_MAX {
                waits = true;
                continue;
            }
            return Step::Change(Change::AddLearner(store));
        }
        if member(store).lost {
            return Step::Change(Change::Remove(store));
        }
        let fit_voters = membership.voters.iter().filter(|&&voter| fit(voter)).count() + 1;
        if fit(store) && fit_voters > membership.voters.len().div_ceil(2) {
            return Step::Change(Change::Promote(store));
        }
        waits = true;
    }
    if waits {
        return Step::Wait;
    }
    let lead = |&store: &StoreId| {
        store != me && membership.voters.contains(&store) && fit(store) && member(store).on_time
    };
    let preferred = wanted.preferred.filter(|store| wanted.voters.contains(store)).filter(lead);
    if !wanted.voters.contains(&me) {
        // Who leads does not remove itself.
        let other = preferred.or_else(|| wanted.voters.iter().copied().find(lead));
        return other.map_or(Step::Wait, Step::Transfer);
    }
    // The dead first: they are no help any more.
    let mut surplus: Vec<StoreId> =
        membership.voters.iter().copied().filter(|store| !wanted.voters.contains(store)).collect();
    surplus.sort_by_key(|&store| fit(store));
    for &store in &surplus {
        let left = membership.voters.iter().filter(|&&voter| voter != store);
        let (count, fit_count) = (left.clone().count(), left.filter(|&&voter| fit(voter)).count());
        if fit_count > count / 2 {
            return Step::Change(Change::Remove(store));
        }
    }
    if !surplus.is_empty() {
        return Step::Wait;
    }
    if let Some(&learner) = membership.learners.iter().find(|learner| !wanted.voters.contains(learner)) {
        return Step::Change(Change::Remove(learner));
    }
    match preferred {
        Some(store) => Step::Transfer(store),
        None => Step::Done,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const ME: StoreId = StoreId(1);
    const LOST: StoreId = StoreId(99);

    fn stores(ids: &[u64]) -> Vec<StoreId> {
        ids.iter().copied().map(StoreId).collect()
    }

    fn membership(voters: &[u64], learners: &[u64]) -> Membership {
        Membership { voters: stores(voters), learners: stores(learners), index: 9 }
    }

    fn step(now: &Membership, wanted: &[u64], preferred: u64, dead: &[u64], behind: &[u64]) -> Step {
        let preferred = (preferred != 0).then_some(StoreId(preferred));
        let wanted = Wanted { voters: stores(wanted), preferred, known: Membership::default() };
        next_step(ME, now, &wanted, |store| Member {
            alive: !dead.contains(&store.0),
            caught_up: !behind.contains(&store.0),
            on_time: true,
            lost: store == LOST,
        })
    }

    #[test]
    fn it_grows_before_it_shrinks() {
        let three = membership(&[1, 2, 3], &[]);
        assert_eq!(step(&three, &[1, 2, 4], 0, &[3], &[]), Step::Change(Change::AddLearner(StoreId(4))));
        let learning = membership(&[1, 2, 3], &[4]);
        assert_eq!(step(&learning, &[1, 2, 4], 0, &[3], &[4]), Step::Wait);
        assert_eq!(step(&learning, &[1, 2, 4], 0, &[3], &[]), Step::Change(Change::Promote(StoreId(4))));
        let four = membership(&[1, 2, 3, 4], &[]);
        assert_eq!(step(&four, &[1, 2, 4], 0, &[3], &[]), Step::Change(Change::Remove(StoreId(3))));
        assert_eq!(step(&membership(&[1, 2, 4], &[]), &[1, 2, 4], 1, &[], &[]), Step::Done);
    }

    #[test]
    fn a_learner_that_is_lost_is_added_anew() {
        let learning = membership(&[1, 2, 3], &[99]);
        assert_eq!(step(&learning, &[1, 2, 99], 0, &[], &[99]), Step::Change(Change::Remove(LOST)));
        let three = membership(&[1, 2, 3], &[]);
        assert_eq!(step(&three, &[1, 2, 99], 0, &[], &[]), Step::Change(Change::AddLearner(LOST)));
    }

    #[test]
    fn a_live_quorum_is_never_given_up() {
        // Two of three are dead: 4 would make it 2 of 4.
        assert_eq!(step(&membership(&[1, 2, 3], &[4]), &[1, 2, 4], 0, &[2, 3], &[]), Step::Wait);
        // Removing 2 leaves 1 and the dead 3.
        assert_eq!(step(&membership(&[1, 2, 3], &[]), &[1, 3], 0, &[3], &[]), Step::Wait);
        // The dead one goes first, then the other can.
        assert_eq!(
            step(&membership(&[1, 2, 3], &[]), &[1], 0, &[3], &[]),
            Step::Change(Change::Remove(StoreId(3)))
        );
        assert_eq!(
            step(&membership(&[1, 2], &[]), &[1], 0, &[], &[]),
            Step::Change(Change::Remove(StoreId(2)))
        );
    }

    #[test]
    fn who_leads_hands_over_before_it_goes() {
        let four = membership(&[1, 2, 3, 4], &[]);
        assert_eq!(step(&four, &[2, 3, 4], 3, &[], &[]), Step::Transfer(StoreId(3)));
        assert_eq!(step(&four, &[2, 3, 4], 3, &[3], &[]), Step::Transfer(StoreId(2)));
        let three = membership(&[1, 2, 3], &[]);
        assert_eq!(step(&three, &[1, 2, 3], 2, &[], &[]), Step::Transfer(StoreId(2)));
        assert_eq!(step(&three, &[1, 2, 3], 2, &[2], &[]), Step::Done);
        assert_eq!(step(&three, &[1, 2, 3], 2, &[], &[2]), Step::Done);
        assert_eq!(step(&three, &[], 2, &[], &[]), Step::Done);
    }

    /// From every membership to every wanted set, with every set of dead that leaves both a quorum: it gets
    /// there when leadership can move, and every step keeps a live quorum.
    #[test]
    fn it_always_gets_there() {
        let sets = |sizes: std::ops::RangeInclusive<usize>| {
            (1u64..64)
                .map(|bits| (1..=6).filter(|n| bits >> (n - 1) & 1 == 1).collect::<BTreeSet<u64>>())
                .filter(move |set| sizes.contains(&set.len()))
        };
        let quorum = |set: &BTreeSet<u64>, dead: &BTreeSet<u64>| set.difference(dead).count() > set.len() / 2;
        for from in sets(1..=4) {
            for to in sets(1..=3) {
                for dead in sets(1..=2).chain([BTreeSet::new()]) {
                    if !quorum(&from, &dead) || to.iter().any(|store| dead.contains(store)) {
                        continue;
                    }
                    go(&from, &to, &dead);
                }
            }
        }
    }

    fn go(from: &BTreeSet<u64>, to: &BTreeSet<u64>, dead: &BTreeSet<u64>) {
        let ids = |set: &BTreeSet<u64>| set.iter().copied().map(StoreId).collect::<Vec<_>>();
        let mut now = Membership { voters: ids(from), ..Membership::default() };
        let wanted = Wanted { voters: ids(to), ..Wanted::default() };
        let alive = |store: StoreId| !dead.contains(&store.0);
        let mut leader = now.voters.iter().copied().find(|&store| alive(store)).unwrap();
        for _ in 0..40 {
            let member =
                |store| Member { alive: alive(store), caught_up: alive(store), on_time: true, lost: false };
            match next_step(leader, &now, &wanted, member) {
                Step::Done => {
                    assert_eq!((now.voters, now.learners), (wanted.voters, vec![]));
                    return;
                }
                Step::Wait => panic!("{from:?} to {to:?} without {dead:?} waits at {now:?}"),
                Step::Transfer(store) => leader = store,
                Step::Change(Change::AddLearner(store)) => now.learners.push(store),
                Step::Change(Change::Promote(store)) => {
                    now.learners.retain(|&learner| learner != store);
                    now.voters.push(store);
                    now.voters.sort_unstable();
                }
                Step::Change(Change::Remove(store)) => {
                    assert_ne!(store, leader);
                    now.voters.retain(|&voter| voter != store);
                    now.learners.retain(|&learner| learner != store);
                }
            }
            let live = now.voters.iter().filter(|&&store| alive(store)).count();
            assert!(live > now.voters.len() / 2, "{now:?} without {dead:?}");
        }
        panic!("{from:?} to {to:?} without {dead:?} does not end");
    }
}
