//! Spans that have lost more blocks than their parity: counted, named in the log, shown (JA-3).

use std::collections::BTreeSet;

use eggs_janitor_core::SpanKey;
use eggs_janitor_core::queue::QUEUE_MAX;

use crate::context::Context;

/// Files named at once.
const NAMED_MAX: usize = 16;

/// Those that a round has met, each once; more than the queue holds are not told apart (JA-5).
#[derive(Debug, Default)]
pub(crate) struct LostSpans {
    all: BTreeSet<SpanKey>,
    /// Those whose damaged blocks are on no disk that is to be emptied: no disk's task counts them.
    elsewhere: BTreeSet<SpanKey>,
}

impl LostSpans {
    /// `counted`: in the task of a disk.
    pub fn insert(&mut self, key: SpanKey, counted: bool) {
        let room = self.all.len() < QUEUE_MAX;
        let new = room && self.all.insert(key);
        if counted {
            self.elsewhere.remove(&key);
        } else if new {
            self.elsewhere.insert(key);
        }
    }

    /// Those of a round before, for one that has not met all.
    pub fn extend(&mut self, before: &LostSpans) {
        for &key in &before.all {
            self.insert(key, !before.elsewhere.contains(&key));
        }
    }

    /// Shows how many there are, and names those in the log that were not there before.
    pub fn tell(&self, context: &Context, before: &LostSpans) {
        metrics::gauge!("eggs_janitor_lost_spans").set(self.all.len() as f64);
        let elsewhere = self.elsewhere.len() as u64;
        context.board.repair_on_the_whole(context.now(), |task| {
            (task.spans_lost, task.spans_total) = (elsewhere, elsewhere);
        });
        let (spans, files) = self.new_since(before);
        if spans > 0 {
            tracing::error!(
                spans,
                files,
                "spans have lost more blocks than their parity; `eggsctl verify -r /` says which files that is"
            );
        }
    }

    /// How many are new, and of which files.
    fn new_since(&self, before: &LostSpans) -> (usize, String) {
        let new = || self.all.difference(&before.all);
        let files: BTreeSet<_> = new().map(|key| key.file).collect();
        let mut named = files.iter().take(NAMED_MAX).map(ToString::to_string).collect::<Vec<_>>().join(", ");
        if files.len() > NAMED_MAX {
            named.push_str(&format!(" and {} more", files.len() - NAMED_MAX));
        }
        (new().count(), named)
    }
}

#[cfg(test)]
mod tests {
    use eggs_proto::InodeId;

    use super::*;

    fn key(file: u64, offset: u64) -> SpanKey {
        SpanKey { file: InodeId(file), offset }
    }

    #[test]
    fn each_lost_span_is_counted_once_by_its_disk_or_on_the_whole() {
        let mut lost = LostSpans::default();
        lost.insert(key(1, 0), false);
        lost.insert(key(1, 0), true);
        lost.insert(key(2, 0), true);
        lost.insert(key(2, 0), false);
        lost.insert(key(3, 0), false);
        assert_eq!((lost.all.len(), lost.elsewhere.len()), (3, 1));
        let mut next = LostSpans::default();
        next.insert(key(3, 0), true);
        next.extend(&lost);
        assert_eq!((next.all.len(), next.elsewhere.len()), (3, 0), "a round that met one keeps the others");
    }

    #[test]
    fn what_is_new_is_named_and_not_more_than_fits_a_line() {
        let (mut before, mut now) = (LostSpans::default(), LostSpans::default());
        before.insert(key(1, 0), false);
        now.extend(&before);
        assert_eq!(now.new_since(&before), (0, String::new()));
        now.insert(key(1, 100), false);
        now.insert(key(1, 200), false);
        assert_eq!(now.new_since(&before), (2, InodeId(1).to_string()));
        for file in 0..100 {
            now.insert(key(file, 300), false);
        }
        let (spans, named) = now.new_since(&before);
        assert!(spans == 102 && named.ends_with("and 84 more"), "{spans} {named}");
    }
}
