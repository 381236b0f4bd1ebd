//! Many paths at once: each directory on the way is looked up once, and the names in it are taken from its listing when
//! they are many.

use std::collections::BTreeMap;

use bytes::Bytes;
use eggs_proto::InodeId;
use eggs_proto::limits::NAME_BYTES_MAX;
use futures_util::{StreamExt, stream};

use crate::Client;
use crate::error::{ClientError, Result};
use crate::path::Path;
use crate::types::ListOptions;
use crate::walk::{Start, Want};

/// Fewer names of a directory are looked up one by one.
const LIST_FROM: usize = 8;
/// A page of which fewer than one in so many entries were wanted was not worth it: the rest is looked up one by one.
const WANTED_PER_PAGE_MIN: usize = 16;
const PAGE: u32 = 1024;
/// Look-ups at the same time.
const IN_FLIGHT: usize = 16;

/// Names of one directory, with their places among the paths asked for.
type Names = Vec<(Bytes, usize)>;

impl Client {
    /// The inodes that paths lead to, links followed; in the order of the paths.
    pub async fn find_many(&self, paths: &[impl AsRef<[u8]> + Sync]) -> Vec<Result<InodeId>> {
        let mut answers: Vec<Option<Result<InodeId>>> = paths.iter().map(|_| None).collect();
        let mut directories = BTreeMap::<Vec<Bytes>, Names>::new();
        for (n, path) in paths.iter().enumerate() {
            match Path::parse(path.as_ref()).map(Path::split) {
                Ok(Some((parent, name))) => directories.entry(parent.names).or_default().push((name, n)),
                Ok(None) => answers[n] = Some(Ok(InodeId::ROOT)),
                Err(error) => answers[n] = Some(Err(error)),
            }
        }
        let listings = directories.into_values().filter(|names| names.len() >= LIST_FROM).map(|mut names| {
            let parent = Path::parse(paths[names[0].1].as_ref()).ok().and_then(Path::split);
            async move {
                names.sort_unstable();
                match parent {
                    Some((parent, _)) => self.find_in(parent, names).await,
                    None => Vec::new(),
                }
            }
        });
        let mut listings = stream::iter(listings.collect::<Vec<_>>()).buffer_unordered(IN_FLIGHT);
        while let Some(found) = listings.next().await {
            found.into_iter().for_each(|(n, inode)| answers[n] = Some(Ok(inode)));
        }
        // Those that were not listed, those that are not there, and links.
        let rest: Vec<usize> = (0..paths.len()).filter(|&n| answers[n].is_none()).collect();
        let walks = rest.into_iter().map(|n| async move { (n, self.follow(paths[n].as_ref()).await) });
        let mut walks = stream::iter(walks.collect::<Vec<_>>()).buffer_unordered(IN_FLIGHT);
        while let Some((n, found)) = walks.next().await {
            answers[n] = Some(found);
        }
        let missing = || Err(ClientError::protocol("no answer"));
        answers.into_iter().map(|answer| answer.unwrap_or_else(missing)).collect()
    }

    async fn follow(&self, path: &[u8]) -> Result<InodeId> {
        let path = Path::parse(path)?;
        let what = path.to_string();
        let want = Want { follow: true, ..Want::default() };
        Ok(self.walk(&Start::root(), path, want, &what).await?.inode)
    }

    /// What of the names, which are sorted, is in a directory's listing, as far as it is worth reading.
    async fn find_in(&self, directory: Path, names: Names) -> Vec<(usize, InodeId)> {
        let mut found = Vec::new();
        let text = directory.to_string();
        let Ok(directory) = self.directory_at(&Start::root(), directory, Some(&text)).await else {
            return found;
        };
        let mut names = names.into_iter().peekable();
        while let Some((next, _)) = names.peek() {
            let options = ListOptions { after: just_before(next), page: PAGE, ..ListOptions::default() };
            let page = self.list_inode(directory.inode(), options).next_page().await;
            let Ok(Some(page)) = page else { break };
            let Some(last) = page.last().map(|entry| entry.name.clone()) else { break };
            let before = found.len();
            let mut entries = page.iter().peekable();
            while let Some((name, n)) = names.next_if(|(name, _)| *name <= last) {
                while entries.next_if(|entry| entry.name < name).is_some() {}
                let entry = entries.peek().filter(|entry| entry.name == name && !entry.target.is_symlink());
                found.extend(entry.map(|entry| (n, entry.target)));
            }
            if (found.len() - before) * WANTED_PER_PAGE_MIN < page.len() {
                break;
            }
        }
        found
    }
}

/// A name before `name` with as little as possible between them.
fn just_before(name: &[u8]) -> Bytes {
    let Some((&last, head)) = name.split_last() else { return Bytes::new() };
    let mut before = head.to_vec();
    if let Some(less) = last.checked_sub(1).filter(|less| !matches!(less, 0 | b'/')) {
        before.push(less);
        before.resize((before.len() + 8).min(NAME_BYTES_MAX), 0xff);
    }
    before.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_just_before_a_name_is_before_it() {
        for name in [&b"a"[..], b"file0001", b"\x01", b"\x02", b"x0", b"0", &[b'z'; 255]] {
            let before = just_before(name);
            assert!(&before[..] < name && before.len() <= NAME_BYTES_MAX, "{name:?}");
        }
        assert!(just_before(b"b") > Bytes::from_static(b"a"));
    }
}
