//! How long a client had to wait: the time between two answers in a row.

use std::time::{Duration, Instant};

/// When one client's operations were answered or given up.
#[derive(Debug)]
pub(super) struct Timeline {
    client: usize,
    began: Instant,
    answers: Vec<(Instant, &'static str)>,
    failures: Vec<(Instant, String)>,
}

/// What the clients saw while something went on.
#[derive(Debug, Clone)]
pub struct Phase {
    pub name: String,
    /// The longest time any client was without an answer.
    pub longest: Duration,
    /// Who it was, and what it waited for.
    pub what: String,
    /// Calls that failed.
    pub failures: usize,
}

impl Phase {
    /// The name up to a colon: `kill: host-1` is a `kill`.
    pub fn kind(&self) -> &str {
        self.name.split(':').next().unwrap_or_default()
    }
}

impl Timeline {
    pub fn new(client: usize) -> Timeline {
        Timeline { client, began: Instant::now(), answers: Vec::new(), failures: Vec::new() }
    }

    pub fn answered(&mut self, what: &'static str) {
        self.answers.push((Instant::now(), what));
    }

    pub fn failed(&mut self, what: String) {
        self.failures.push((Instant::now(), what));
    }

    pub fn len(&self) -> usize {
        self.answers.len()
    }

    pub fn failures(&self) -> impl Iterator<Item = &str> {
        self.failures.iter().map(|(_, what)| what.as_str())
    }

    /// From, to, and what was answered at last.
    fn gaps(&self) -> impl Iterator<Item = (Instant, Instant, &'static str)> {
        let mut last = self.began;
        self.answers.iter().map(move |&(at, what)| (std::mem::replace(&mut last, at), at, what))
    }
}

/// The longest gap of each phase. A gap is of the phase that most of it lies in.
pub(super) fn phases(begun: &[(Instant, String)], timelines: &[&Timeline]) -> Vec<Phase> {
    let empty = |(_, name): &(Instant, String)| Phase {
        name: name.clone(),
        longest: Duration::ZERO,
        what: String::new(),
        failures: 0,
    };
    let mut phases: Vec<Phase> = begun.iter().map(empty).collect();
    let at = |instant: Instant| begun.iter().rposition(|(began, _)| *began <= instant);
    for timeline in timelines {
        for (from, to, what) in timeline.gaps() {
            let Some(phase) = mostly(begun, from, to) else { continue };
            if to - from > phases[phase].longest {
                phases[phase].longest = to - from;
                phases[phase].what = format!("client {}, {what}", timeline.client);
            }
        }
        for (instant, _) in &timeline.failures {
            if let Some(phase) = at(*instant) {
                phases[phase].failures += 1;
            }
        }
    }
    phases
}

fn mostly(begun: &[(Instant, String)], from: Instant, to: Instant) -> Option<usize> {
    let overlap = |n: usize| {
        let end = begun.get(n + 1).map_or(to, |(next, _)| (*next).min(to));
        end.saturating_duration_since(begun[n].0.max(from))
    };
    (0..begun.len()).filter(|&n| begun[n].0 <= to).max_by_key(|&n| overlap(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_of_the_phase_that_most_of_it_lies_in() {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let begun =
            [(at(0), "calm".to_owned()), (at(1000), "kill: a".to_owned()), (at(2000), "calm".to_owned())];
        let answers = [(100, "put"), (990, "stat"), (1900, "rename"), (1990, "put"), (2100, "list")];
        let timeline = Timeline {
            client: 3,
            began,
            answers: answers.map(|(ms, what)| (at(ms), what)).into(),
            failures: vec![(at(1500), "no".to_owned())],
        };
        let phases = phases(&begun, &[&timeline]);
        let longest: Vec<u128> = phases.iter().map(|phase| phase.longest.as_millis()).collect();
        assert_eq!(longest, [890, 910, 110]);
        assert_eq!(
            (phases[1].what.as_str(), phases[1].failures, phases[1].kind()),
            ("client 3, rename", 1, "kill")
        );
    }
}
