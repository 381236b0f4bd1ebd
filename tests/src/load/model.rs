//! What a client knows: a register per name, and calls whose outcome it does not know.
//!
//! One client changes these names, one call at a time, so every answered read has one right answer, except for
//! names of calls that failed. Such a call may happen at any time after it was made, or never, but once at most and
//! as a whole: each of its names is as before or as after it; once seen as after, it stays so; in the end all of
//! its names tell the same story.

use std::collections::BTreeMap;

use bytes::Bytes;
use eggs_proto::InodeId;

/// Directory and name in it.
pub(super) type Key = (usize, String);

/// What is at a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    /// `inode`: where the cluster told.
    File {
        number: u64,
        inode: Option<InodeId>,
    },
    Directory {
        inode: Option<InodeId>,
    },
}

/// What one call does to names: before and after it.
#[derive(Debug, Clone)]
pub(super) struct Change {
    pub what: String,
    pub keys: Vec<(Key, Option<Node>, Option<Node>)>,
}

/// What was found at a name.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub inode: InodeId,
    pub directory: bool,
    /// Not told by a listing.
    pub size: Option<u64>,
    /// When they were read.
    pub contents: Option<Bytes>,
}

/// A call whose outcome is unknown.
#[derive(Debug)]
struct Doubt {
    change: Change,
    /// By name: it was seen as after the call.
    seen_after: Vec<bool>,
}

#[derive(Debug, Default)]
pub(super) struct Model {
    known: BTreeMap<Key, Node>,
    doubts: Vec<Doubt>,
}

/// Contents that say which they are; no two numbers have the same.
pub(super) fn contents(number: u64) -> Bytes {
    let size = usize::try_from(number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 53).unwrap_or(0);
    let mut bytes = number.to_be_bytes().to_vec();
    bytes.resize(8 + size, number.to_be_bytes()[7]);
    bytes.into()
}

impl Node {
    fn is(&self, seen: &Seen) -> bool {
        let same = |inode: &Option<InodeId>| inode.is_none_or(|inode| inode == seen.inode);
        match self {
            Node::Directory { inode } => seen.directory && same(inode),
            Node::File { number, inode } => {
                let contents = contents(*number);
                !seen.directory
                    && same(inode)
                    && seen.size.is_none_or(|size| size == contents.len() as u64)
                    && seen.contents.as_ref().is_none_or(|found| *found == contents)
            }
        }
    }
}

/// Whether what is there is what should be.
fn fits(expected: Option<&Node>, seen: Option<&Seen>) -> bool {
    match (expected, seen) {
        (None, None) => true,
        (Some(node), Some(seen)) => node.is(seen),
        _ => false,
    }
}

fn shown(seen: Option<&Seen>) -> String {
    let Some(seen) = seen else { return "nothing".to_owned() };
    let kind = if seen.directory { "directory" } else { "file" };
    let number =
        seen.contents.as_ref().and_then(|bytes| bytes.first_chunk()).map(|at| u64::from_be_bytes(*at));
    let length = seen.contents.as_ref().map(Bytes::len);
    format!("{kind} {} of size {:?}, number {number:?}, {length:?} bytes read", seen.inode, seen.size)
}

impl Model {
    /// What is known to be at a name.
    pub fn at(&self, key: &Key) -> Option<&Node> {
        self.known.get(key)
    }

    /// The call was answered: it has happened.
    pub fn acknowledge(&mut self, change: Change) {
        for (key, _, after) in change.keys {
            match after {
                Some(node) => self.known.insert(key, node),
                None => self.known.remove(&key),
            };
        }
    }

    /// The call failed: its names are nobody's from now on.
    pub fn doubt(&mut self, change: Change) {
        for (key, ..) in &change.keys {
            self.known.remove(key);
        }
        let seen_after = vec![false; change.keys.len()];
        self.doubts.push(Doubt { change, seen_after });
    }

    /// A name of some call whose outcome is unknown.
    pub fn doubtful(&self, random: usize) -> Option<Key> {
        let names = self.doubts.iter().flat_map(|doubt| &doubt.change.keys);
        let names: Vec<&Key> = names.map(|(key, ..)| key).collect();
        (!names.is_empty()).then(|| names[random % names.len()].clone())
    }

    /// Whether what was found at a name may be there.
    pub fn check(&mut self, key: &Key, seen: Option<&Seen>) -> Result<(), String> {
        for doubt in &mut self.doubts {
            let place = doubt.change.keys.iter().position(|(name, ..)| name == key);
            if let Some(place) = place {
                return doubt.check(place, seen);
            }
        }
        let expected = self.known.get(key);
        if fits(expected, seen) {
            return Ok(());
        }
        Err(format!("{key:?}: {expected:?} should be there, found {}", shown(seen)))
    }

    /// Whether a whole listing of a directory may be so.
    pub fn check_listing(&mut self, directory: usize, found: &BTreeMap<String, Seen>) -> Result<(), String> {
        let known = self.known.keys().filter(|(at, _)| *at == directory).map(|(_, name)| name);
        let doubtful = self.doubts.iter().flat_map(|doubt| &doubt.change.keys).map(|(key, ..)| key);
        let doubtful = doubtful.filter(|(at, _)| *at == directory).map(|(_, name)| name);
        let mut names: Vec<String> = known.chain(doubtful).chain(found.keys()).cloned().collect();
        names.sort_unstable();
        names.dedup();
        names.into_iter().try_for_each(|name| {
            let seen = found.get(&name);
            self.check(&(directory, name), seen).map_err(|wrong| format!("listing: {wrong}"))
        })
    }

    /// What is in a directory right now, for looking at this instant later; none while anything in it is in doubt.
    pub fn certain(&self, directory: usize) -> Option<BTreeMap<String, Node>> {
        let doubtful = self.doubts.iter().flat_map(|doubt| &doubt.change.keys);
        if doubtful.map(|(key, ..)| key).any(|(at, _)| *at == directory) {
            return None;
        }
        let known = self.known.iter().filter(|((at, _), _)| *at == directory);
        Some(known.map(|((_, name), node)| (name.clone(), node.clone())).collect())
    }

    /// All at rest: everything known is there, each call in doubt has happened as a whole or not at all.
    pub fn settle(&mut self, found: &BTreeMap<Key, Seen>) -> Vec<String> {
        let mut names: Vec<Key> = self.known.keys().chain(found.keys()).cloned().collect();
        names.sort_unstable();
        names.dedup();
        let mut wrong: Vec<String> =
            names.iter().filter_map(|key| self.check(key, found.get(key)).err()).collect();
        for doubt in &self.doubts {
            let keys = &doubt.change.keys;
            let before = keys
                .iter()
                .zip(&doubt.seen_after)
                .all(|((key, before, _), seen_after)| !seen_after && fits(before.as_ref(), found.get(key)));
            let after = keys.iter().all(|(key, _, after)| fits(after.as_ref(), found.get(key)));
            if !before && !after {
                let now: Vec<String> = keys.iter().map(|(key, ..)| shown(found.get(key))).collect();
                wrong.push(format!("neither done nor undone: {:?}; found {now:?}", doubt.change));
            }
        }
        wrong
    }
}

/// A listing as of an instant of the past.
pub(super) fn check_past(
    expected: &BTreeMap<String, Node>,
    found: &BTreeMap<String, Seen>,
) -> Result<(), String> {
    let names = expected.keys().chain(found.keys());
    match names.into_iter().find(|name| !fits(expected.get(*name), found.get(*name))) {
        None => Ok(()),
        Some(name) => Err(format!(
            "the past has changed: {name}: {:?} was there, found {}",
            expected.get(name),
            shown(found.get(name))
        )),
    }
}

impl Doubt {
    fn check(&mut self, place: usize, seen: Option<&Seen>) -> Result<(), String> {
        let (key, before, after) = &self.change.keys[place];
        let (is_before, is_after) = (fits(before.as_ref(), seen), fits(after.as_ref(), seen));
        if is_after && !is_before {
            self.seen_after[place] = true;
        }
        if is_after || (is_before && !self.seen_after[place]) {
            return Ok(());
        }
        let what = &self.change.what;
        let undone = if is_before { "was undone" } else { "is neither as before nor as after" };
        Err(format!("{key:?} {undone}: {what} failed; {before:?} → {after:?}, found {}", shown(seen)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        (0, name.to_owned())
    }

    fn file(number: u64) -> Option<Node> {
        Some(Node::File { number, inode: Some(InodeId(number)) })
    }

    fn seen(number: u64) -> Seen {
        let contents = contents(number);
        let size = Some(contents.len() as u64);
        Seen { inode: InodeId(number), directory: false, size, contents: Some(contents) }
    }

    fn change(keys: &[(&str, Option<Node>, Option<Node>)]) -> Change {
        let keys = keys.iter().map(|(name, before, after)| (key(name), before.clone(), after.clone()));
        Change { what: "test".to_owned(), keys: keys.collect() }
    }

    #[test]
    fn an_acknowledged_write_is_there_and_nothing_older() {
        let mut model = Model::default();
        model.acknowledge(change(&[("a", None, file(1))]));
        model.acknowledge(change(&[("a", file(1), file(2))]));
        model.check(&key("a"), Some(&seen(2))).unwrap();
        assert!(model.check(&key("a"), Some(&seen(1))).is_err(), "a stale read");
        assert!(model.check(&key("a"), None).is_err(), "a lost write");
        assert!(model.check(&key("b"), Some(&seen(2))).is_err(), "what nobody wrote");
        let torn = Seen { contents: Some(contents(1)), ..seen(2) };
        assert!(model.check(&key("a"), Some(&torn)).is_err(), "other contents");
        let listed = |names: &[(&str, u64)]| -> BTreeMap<String, Seen> {
            names.iter().map(|(name, number)| ((*name).to_owned(), seen(*number))).collect()
        };
        model.check_listing(0, &listed(&[("a", 2)])).unwrap();
        assert!(model.check_listing(0, &listed(&[])).is_err());
        assert!(model.check_listing(0, &listed(&[("a", 2), ("b", 3)])).is_err());
        model.acknowledge(change(&[("a", file(2), None)]));
        assert!(model.check(&key("a"), Some(&seen(2))).is_err(), "it was removed");
        model.check(&key("a"), None).unwrap();
    }

    #[test]
    fn a_call_in_doubt_happens_once_or_never_and_as_a_whole() {
        let renamed = || change(&[("a", file(1), None), ("b", file(2), file(1))]);
        let mut model = Model::default();
        model.doubt(renamed());
        model.check(&key("a"), Some(&seen(1))).unwrap();
        model.check(&key("b"), Some(&seen(2))).unwrap();
        assert!(model.check(&key("b"), None).is_err());
        assert!(model.check(&key("b"), Some(&seen(3))).is_err());
        model.check(&key("b"), Some(&seen(1))).unwrap();
        assert!(model.check(&key("b"), Some(&seen(2))).is_err(), "what has happened stays so");
        let found = |names: &[(&str, u64)]| -> BTreeMap<Key, Seen> {
            names.iter().map(|(name, number)| (key(name), seen(*number))).collect()
        };
        let settled = |names: &[(&str, u64)]| {
            let mut model = Model::default();
            model.doubt(renamed());
            model.settle(&found(names))
        };
        assert!(settled(&[("a", 1), ("b", 2)]).is_empty());
        assert!(settled(&[("b", 1)]).is_empty());
        assert!(!settled(&[("b", 2)]).is_empty(), "the file is lost");
        assert!(!settled(&[("a", 1), ("b", 1)]).is_empty(), "the file is doubled");
        assert!(!settled(&[]).is_empty());
        assert!(!settled(&[("a", 1), ("b", 2), ("c", 5)]).is_empty());
        assert!(!model.settle(&found(&[("a", 1), ("b", 2)])).is_empty(), "it was seen as done");
    }

    #[test]
    fn numbers_are_told_apart() {
        let all: std::collections::BTreeSet<Bytes> = (0..1000).map(contents).collect();
        assert_eq!(all.len(), 1000);
        assert!(all.iter().all(|bytes| bytes.len() < 4096), "small files");
        let past: BTreeMap<String, Node> = [("a".to_owned(), file(1).unwrap())].into();
        let now: BTreeMap<String, Seen> = [("a".to_owned(), seen(1))].into();
        check_past(&past, &now).unwrap();
        assert!(check_past(&past, &BTreeMap::new()).is_err());
        assert!(check_past(&BTreeMap::new(), &now).is_err());
    }
}
