//! Which shards a daemon serves: as people write it, and as its data directory remembers it.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use eggs_proto::ShardId;

/// A set of shards: `0..127`, `3`, `0..9,12,200..255`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardList(BTreeSet<ShardId>);

/// What was typed is no list of shards.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no list of shards: expected numbers from 0 to 255 and ranges, as in 0..127 or 1,5,10..20")]
pub struct ShardListError(String);

impl ShardList {
    /// All 256.
    pub fn all() -> Self {
        ShardList(ShardId::all().collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = ShardId> + '_ {
        self.0.iter().copied()
    }

    pub fn contains(&self, shard: ShardId) -> bool {
        self.0.contains(&shard)
    }

    /// Never empty.
    #[expect(clippy::len_without_is_empty, reason = "a list is never empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

impl FromStr for ShardList {
    type Err = ShardListError;

    /// Ranges include both ends.
    fn from_str(text: &str) -> Result<Self, ShardListError> {
        let wrong = || ShardListError(text.to_owned());
        let mut shards = BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once("..").unwrap_or((part, part));
            let first: u8 = first.trim().parse().map_err(|_| wrong())?;
            let last: u8 = last.trim().parse().map_err(|_| wrong())?;
            if first > last {
                return Err(wrong());
            }
            shards.extend((first..=last).map(ShardId));
        }
        Ok(ShardList(shards))
    }
}

impl fmt::Display for ShardList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut shards = self.0.iter().map(|shard| shard.0).peekable();
        while let Some(first) = shards.next() {
            let mut last = first;
            while let Some(next) = shards.next_if(|&next| next == last + 1) {
                last = next;
            }
            match last == first {
                true => write!(f, "{separator}{first}")?,
                false => write!(f, "{separator}{first}..{last}")?,
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_read_back_what_they_print() {
        for (text, printed) in [
            ("0..255", "0..255"),
            ("3", "3"),
            ("5,4,4,3", "3..5"),
            ("0..9, 12,200..255", "0..9,12,200..255"),
            ("254,255", "254..255"),
        ] {
            let list: ShardList = text.parse().unwrap();
            assert_eq!(list.to_string(), printed);
            assert_eq!(list.to_string().parse(), Ok(list));
        }
        assert_eq!(ShardList::all().len(), 256);
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in ["", "256", "-1", "9..3", "a", "1,,2", "0...5", "1..2..3"] {
            assert!(text.parse::<ShardList>().is_err(), "{text}");
        }
    }
}
