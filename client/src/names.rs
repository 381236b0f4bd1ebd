//! Names by path: look-ups, directories, links, moves, attributes, policies.

use bytes::Bytes;
use eggs_client_core::span::{Body, check_page};
use eggs_proto::limits::{DEPTH_MAX, MKDIR_NAMES_MAX, PATH_BYTES_MAX};
use eggs_proto::pb::{crossdir_reply, crossdir_request, shard_reply, shard_request, write_op, write_result};
use eggs_proto::{CrossdirError, InodeId, ServiceError, ShardError, Time, names, pb, policy};

use crate::error::{ClientError, Refusal, Result};
use crate::listing::Listing;
use crate::path::Path;
use crate::types::{
    AttributeChanges, CreateOptions, DirectoryPolicies, ListOptions, Metadata, NewAttributes, Policies,
    PolicyKind, Replace, Resolved,
};
use crate::walk::{Start, Walked, Want};
use crate::{Client, Directory};

const FILE_MODE: u32 = 0o644;
pub(crate) const DIRECTORY_MODE: u32 = 0o755;

/// What the caller says of a new inode, or what is usual.
pub(crate) fn attributes_or(given: Option<&NewAttributes>, mode: u32) -> NewAttributes {
    given.copied().unwrap_or(NewAttributes { mode, uid: 0, gid: 0, mtime: None })
}

pub(crate) fn file_attributes(options: &CreateOptions) -> NewAttributes {
    attributes_or(options.attributes.as_ref(), FILE_MODE)
}

pub(crate) fn check_name<'a>(name: &'a [u8], what: &dyn std::fmt::Display) -> Result<&'a [u8]> {
    names::validate(name).map(|()| name).map_err(|error| match error {
        names::NameError::TooLong => {
            ClientError::refused(Refusal::NameTooLong, ShardError::NameTooLong, what)
        }
        error => ClientError::refused(Refusal::InvalidName, error, what),
    })
}

/// A write operation on one name or inode, and its answer.
pub(crate) fn link_reply(
    result: pb::WriteResult,
    what: &dyn std::fmt::Display,
) -> Result<(pb::LinkReply, Time)> {
    match result.result {
        Some(write_result::Result::Link(reply)) => Ok((reply, Time(result.time))),
        Some(write_result::Result::Error(error)) => Err(ClientError::from_shard(&error, what)),
        _ => Err(ClientError::other_reply("write")),
    }
}

pub(crate) fn done(result: pb::WriteResult, what: &dyn std::fmt::Display) -> Result<()> {
    match result.result {
        Some(write_result::Result::Done(_) | write_result::Result::Link(_)) => Ok(()),
        Some(write_result::Result::Error(error)) => Err(ClientError::from_shard(&error, what)),
        _ => Err(ClientError::other_reply("write")),
    }
}

pub(crate) fn optional(inode: u64) -> Option<InodeId> {
    (inode != 0).then_some(InodeId(inode))
}

impl Client {
    pub(crate) async fn write_one(&self, at: InodeId, op: write_op::Op) -> Result<pb::WriteResult> {
        let results = self.shared.shard_write(at.shard(), vec![pb::WriteOp { op: Some(op) }]).await?;
        results.into_iter().next().ok_or_else(|| ClientError::other_reply("write"))
    }

    /// The inode a path leads to, now.
    pub async fn resolve(&self, path: impl AsRef<[u8]>) -> Result<InodeId> {
        let path = Path::parse(path.as_ref())?;
        let what = path.to_string();
        Ok(self.walk(&Start::root(), path, Want::default(), &what).await?.inode)
    }

    /// Everything about what a path leads to; `at` unset is now.
    pub async fn resolve_at(&self, path: impl AsRef<[u8]>, at: Time) -> Result<Resolved> {
        let path = Path::parse(path.as_ref())?;
        let what = path.to_string();
        let want = Want { at, attributes: true, ..Want::default() };
        self.walk(&Start::root(), path, want, &what).await?.resolved(&what)
    }

    /// Attributes (as lstat: of a link itself).
    pub async fn stat(&self, path: impl AsRef<[u8]>) -> Result<Metadata> {
        Ok(self.resolve_at(path, Time::ZERO).await?.metadata)
    }

    pub async fn stat_inode(&self, inode: InodeId) -> Result<Metadata> {
        let op = shard_request::Op::Stat(pb::Stat { inode: inode.0 });
        match self.shared.shard_read(inode.shard(), op).await? {
            Ok(shard_reply::Result::Stat(pb::StatReply { attributes: Some(attributes) })) => {
                Metadata::from_wire(inode, attributes)
            }
            Ok(_) => Err(ClientError::other_reply("stat")),
            Err(error) => Err(ClientError::from_shard(&error, format_args!("inode {inode}"))),
        }
    }

    /// The directory at a path.
    pub async fn directory(&self, path: impl AsRef<[u8]>) -> Result<Directory> {
        self.directory_at(&Start::root(), Path::parse(path.as_ref())?, None).await
    }

    /// The directory at the end of a path, links followed; `what` when the path is only part of one.
    pub(crate) async fn directory_at(
        &self,
        start: &Start,
        path: Path,
        what: Option<&str>,
    ) -> Result<Directory> {
        let text = path.to_string();
        let what = what.unwrap_or(&text);
        let want = Want { attributes: true, follow: true, ..Want::default() };
        let walked = self.walk(start, path, want, what).await?;
        self.directory_of(walked, what, text.clone())
    }

    pub(crate) fn directory_of(&self, walked: Walked, what: &str, text: String) -> Result<Directory> {
        if !walked.inode.is_directory() {
            return Err(ClientError::refused(Refusal::NotDirectory, ShardError::NotDirectory, what));
        }
        if walked.attributes.is_none() {
            return Err(ClientError::not_found(what));
        }
        Directory::new(self, walked.inode, walked.policies, text)
    }

    /// The directory of an inode; its policies are gathered from its parents.
    pub async fn directory_inode(&self, inode: InodeId) -> Result<Directory> {
        let mut policies = Policies::default();
        let mut here = inode;
        for _ in 0..DEPTH_MAX {
            let metadata = self.stat_inode(here).await?;
            let Some(parent) = metadata.parent else {
                let what = format_args!("inode {here}");
                return Err(ClientError::refused(Refusal::NotDirectory, ShardError::NotDirectory, what));
            };
            policies = policy::inherit(policies, &metadata.policies.unwrap_or_default());
            if parent == here || parent.is_null() {
                break;
            }
            here = parent;
        }
        Directory::new(self, inode, policies, format!("inode {inode}"))
    }

    /// The directory a path's last name is in, and that name.
    pub(crate) async fn parent_of(&self, path: &[u8]) -> Result<(Directory, Bytes)> {
        let path = Path::parse(path)?;
        let what = path.to_string();
        let (parent, name) = path
            .split()
            .ok_or_else(|| ClientError::refused(Refusal::IsDirectory, ShardError::IsDirectory, "/"))?;
        Ok((self.directory_at(&Start::root(), parent, Some(&what)).await?, name))
    }

    pub async fn list(&self, path: impl AsRef<[u8]>, options: ListOptions) -> Result<Listing> {
        let path = Path::parse(path.as_ref())?;
        let what = path.to_string();
        let want = Want { at: options.at, follow: true, ..Want::default() };
        let walked = self.walk(&Start::root(), path, want, &what).await?;
        if !walked.inode.is_directory() {
            return Err(ClientError::refused(Refusal::NotDirectory, ShardError::NotDirectory, what));
        }
        Ok(Listing::new(self, walked.inode, options, what.into()))
    }

    /// No request is made until the first page is asked for.
    pub fn list_inode(&self, directory: InodeId, options: ListOptions) -> Listing {
        Listing::new(self, directory, options, format!("inode {directory}").into())
    }

    /// Makes a directory.
    pub async fn mkdir(&self, path: impl AsRef<[u8]>, attributes: Option<NewAttributes>) -> Result<InodeId> {
        if Path::parse(path.as_ref())?.names.is_empty() {
            return Err(ClientError::refused(Refusal::Exists, ShardError::Exists, "/"));
        }
        let (parent, name) = self.parent_of(path.as_ref()).await?;
        Ok(parent.mkdir(name, attributes).await?.inode)
    }

    /// Makes a directory and those on the way; one that exists is fine.
    pub async fn mkdir_all(&self, path: impl AsRef<[u8]>) -> Result<InodeId> {
        self.mkdir_all_with(path, None).await
    }

    /// As [`Client::mkdir_all`]. What is missing is made in one request: who sees one of the new directories sees all.
    /// Those on the way have the usual mode.
    ///
    /// # Errors
    /// "too deep" when more than [`MKDIR_NAMES_MAX`] are missing.
    pub async fn mkdir_all_with(
        &self,
        path: impl AsRef<[u8]>,
        attributes: Option<NewAttributes>,
    ) -> Result<InodeId> {
        let path = Path::parse(path.as_ref())?;
        let what = path.to_string();
        let attributes = attributes_or(attributes.as_ref(), DIRECTORY_MODE);
        let on_the_way = NewAttributes { mode: DIRECTORY_MODE, mtime: None, ..attributes };
        // Again when somebody else has made or removed some of them meanwhile.
        let mut again = 2 * path.names.len();
        loop {
            let want = Want { follow: true, as_far: true, ..Want::default() };
            let walked = self.walk(&Start::root(), path.clone(), want, &what).await?;
            if walked.rest.is_empty() {
                return match walked.inode.is_directory() {
                    true => Ok(walked.inode),
                    false => Err(ClientError::refused(Refusal::Exists, ShardError::Exists, what)),
                };
            }
            let missing = walked.rest.len();
            if missing > MKDIR_NAMES_MAX {
                let why =
                    format!("{missing} directories are missing, at most {MKDIR_NAMES_MAX} are made at once");
                return Err(ClientError::refused(Refusal::TooDeep, why, what));
            }
            let op = pb::MkdirPath {
                parent: walked.inode.0,
                names: walked.rest,
                on_the_way: Some(on_the_way),
                attributes: Some(attributes),
            };
            match self.shared.crossdir_write(crossdir_request::Op::MkdirPath(op)).await? {
                Ok(crossdir_reply::Result::MkdirPath(reply)) if reply.inodes.len() == missing => {
                    return Ok(InodeId(reply.inodes[missing - 1]));
                }
                Ok(_) => return Err(ClientError::other_reply("mkdir")),
                Err(error) => {
                    let error = ClientError::from_crossdir(&error, &what);
                    if again == 0 || !(error.is_exists() || error.is_not_found()) {
                        return Err(error);
                    }
                    again -= 1;
                }
            }
        }
    }

    /// Removes an empty directory; returns when it died.
    pub async fn rmdir(&self, path: impl AsRef<[u8]>) -> Result<Time> {
        let path = Path::parse(path.as_ref())?;
        let what = path.to_string();
        if path.names.is_empty() {
            return Err(ClientError::refused(Refusal::IsRoot, ShardError::IsRoot, what));
        }
        self.rmdir_from(&Start::root(), path, &what).await
    }

    pub(crate) async fn rmdir_from(&self, start: &Start, path: Path, what: &str) -> Result<Time> {
        let name = path.names.last().cloned().unwrap_or_default();
        let mut again = true;
        loop {
            let walked = self.walk(start, path.clone(), Want::default(), what).await?;
            if !walked.inode.is_directory() {
                return Err(ClientError::refused(Refusal::NotDirectory, ShardError::NotDirectory, what));
            }
            let op = pb::Rmdir { parent: walked.directory.0, name: name.clone(), target: walked.inode.0 };
            match self.shared.crossdir_write(crossdir_request::Op::Rmdir(op)).await? {
                Ok(crossdir_reply::Result::Rmdir(reply)) => return Ok(Time(reply.died_at)),
                Ok(_) => return Err(ClientError::other_reply("rmdir")),
                Err(error) if again && error.code == CrossdirError::Changed.code() => again = false,
                Err(error) => return Err(ClientError::from_crossdir(&error, what)),
            }
        }
    }

    /// Moves a file, link or directory to exactly `to`; returns what it replaced.
    pub async fn rename(
        &self,
        from: impl AsRef<[u8]>,
        to: impl AsRef<[u8]>,
        replace: Replace,
    ) -> Result<Option<InodeId>> {
        let (from, to) = (Path::parse(from.as_ref())?, Path::parse(to.as_ref())?);
        let is_root = || ClientError::refused(Refusal::IsRoot, ShardError::IsRoot, "/");
        let (from_text, to_text) = (from.to_string(), to.to_string());
        let old_name = from.names.last().cloned().ok_or_else(is_root)?;
        let (parent, new_name) = to.split().ok_or_else(is_root)?;
        check_name(&new_name, &to_text)?;
        let words = RenameWords { from: &from_text, to: &to_text };
        let new = (NewParent::At(parent), new_name);
        self.rename_from(&Start::root(), (from, old_name), new, replace, words).await
    }

    /// What is at a path goes under a name of a directory.
    pub(crate) async fn rename_from(
        &self,
        start: &Start,
        (from, old_name): (Path, Bytes),
        (parent, new_name): (NewParent, Bytes),
        replace: Replace,
        words: RenameWords<'_>,
    ) -> Result<Option<InodeId>> {
        let mut again = true;
        loop {
            let old = self.walk(start, from.clone(), Want::default(), words.from);
            let (old, new_directory) = match &parent {
                NewParent::Is(directory) => (old.await?, *directory),
                NewParent::At(path) => {
                    let (root, want) = (Start::root(), Want { follow: true, ..Want::default() });
                    let new = self.walk(&root, path.clone(), want, words.to);
                    let (old, new) = futures_util::future::try_join(old, new).await?;
                    (old, new.inode)
                }
            };
            if !new_directory.is_directory() {
                return Err(ClientError::refused(Refusal::NotDirectory, ShardError::NotDirectory, words.to));
            }
            if old.directory == new_directory {
                return self.rename_within(new_directory, old_name, new_name, replace, words).await;
            }
            let op = pb::Move {
                old_directory: old.directory.0,
                old_name: old_name.clone(),
                target: old.inode.0,
                new_directory: new_directory.0,
                new_name: new_name.clone(),
                replace: replace.to_wire(),
            };
            match self.shared.crossdir_write(crossdir_request::Op::Move(op)).await? {
                Ok(crossdir_reply::Result::Move(reply)) => return Ok(optional(reply.replaced)),
                Ok(_) => return Err(ClientError::other_reply("move")),
                Err(error) if again && error.code == CrossdirError::Changed.code() => again = false,
                Err(error) => return Err(words.say(ClientError::from_crossdir(&error, words.from))),
            }
        }
    }

    /// Exchanges what two paths lead to, at one instant: files, links and directories in any mix. Both have to exist; neither
    /// may be above the other.
    pub async fn exchange(&self, one: impl AsRef<[u8]>, other: impl AsRef<[u8]>) -> Result<()> {
        let (one, other) = (Path::parse(one.as_ref())?, Path::parse(other.as_ref())?);
        let (one_text, other_text) = (one.to_string(), other.to_string());
        let is_root = || ClientError::refused(Refusal::IsRoot, ShardError::IsRoot, "/");
        let name = one.names.last().cloned().ok_or_else(is_root)?;
        let other_name = other.names.last().cloned().ok_or_else(is_root)?;
        let what = format!("{one_text} <-> {other_text}");
        let mut again = true;
        loop {
            let root = Start::root();
            let first = self.walk(&root, one.clone(), Want::default(), &one_text);
            let second = self.walk(&root, other.clone(), Want::default(), &other_text);
            let (first, second) = futures_util::future::try_join(first, second).await?;
            if first.directory == second.directory {
                let op = pb::Exchange { directory: first.directory.0, name, other_name };
                let result = self.write_one(first.directory, write_op::Op::Exchange(op)).await?;
                return link_reply(result, &what).map(drop);
            }
            let op = pb::ExchangeAcross {
                directory: first.directory.0,
                name: name.clone(),
                target: first.inode.0,
                other_directory: second.directory.0,
                other_name: other_name.clone(),
                other_target: second.inode.0,
            };
            let error = if first.inode == second.inode {
                // It was moved from the one to the other between the two looks.
                CrossdirError::Changed.bare()
            } else {
                match self.shared.crossdir_write(crossdir_request::Op::Exchange(op)).await? {
                    Ok(crossdir_reply::Result::Exchange(_)) => return Ok(()),
                    Ok(_) => return Err(ClientError::other_reply("exchange")),
                    Err(error) => error,
                }
            };
            if !std::mem::take(&mut again) || error.code != CrossdirError::Changed.code() {
                return Err(ClientError::from_crossdir(&error, &what));
            }
        }
    }

    pub(crate) async fn rename_within(
        &self,
        directory: InodeId,
        old_name: Bytes,
        new_name: Bytes,
        replace: Replace,
        words: RenameWords<'_>,
    ) -> Result<Option<InodeId>> {
        let op = pb::Rename { directory: directory.0, old_name, new_name, replace: replace.to_wire() };
        let result = self.write_one(directory, write_op::Op::Rename(op)).await?;
        match link_reply(result, &words.from) {
            Ok((reply, _)) => Ok(optional(reply.replaced)),
            Err(error) => Err(words.say(error)),
        }
    }

    /// Removes a file or link; its entry moves to the dead map.
    pub async fn unlink(&self, path: impl AsRef<[u8]>) -> Result<()> {
        let path = Path::parse(path.as_ref())?;
        let what = path.to_string();
        let (parent, name) = path
            .split()
            .ok_or_else(|| ClientError::refused(Refusal::IsDirectory, ShardError::IsDirectory, "/"))?;
        let want = Want { follow: true, ..Want::default() };
        let walked = self.walk(&Start::root(), parent, want, &what).await?;
        if !walked.inode.is_directory() {
            return Err(ClientError::refused(Refusal::NotDirectory, ShardError::NotDirectory, what));
        }
        let op = pb::Unlink { directory: walked.inode.0, name, expected: 0 };
        done(self.write_one(walked.inode, write_op::Op::Unlink(op)).await?, &what)
    }

    /// Makes a symbolic link at `path` that says `target`.
    pub async fn symlink(
        &self,
        path: impl AsRef<[u8]>,
        target: impl AsRef<[u8]>,
        options: &CreateOptions,
    ) -> Result<InodeId> {
        let (parent, name) = self.parent_of(path.as_ref()).await?;
        parent.symlink(name, target, options).await
    }

    pub async fn read_link(&self, path: impl AsRef<[u8]>) -> Result<Bytes> {
        let path = Path::parse(path.as_ref())?;
        let what = path.to_string();
        let want = Want { spans: true, ..Want::default() };
        let walked = self.walk(&Start::root(), path, want, &what).await?;
        if !walked.inode.is_symlink() {
            return Err(ClientError::refused(Refusal::Invalid, "not a symbolic link", what));
        }
        self.link_target(walked.inode, walked.spans, walked.all_spans).await.map_err(|error| error.on(what))
    }

    pub async fn read_link_inode(&self, link: InodeId) -> Result<Bytes> {
        if !link.is_symlink() {
            let what = format_args!("inode {link}");
            return Err(ClientError::refused(Refusal::Invalid, "not a symbolic link", what));
        }
        self.link_target(link, Vec::new(), false).await
    }

    /// What a link says; from its spans when they came along.
    pub(crate) async fn link_target(&self, link: InodeId, spans: Vec<pb::Span>, all: bool) -> Result<Bytes> {
        let what = format!("inode {link}");
        let spans = if all { spans } else { self.span_page(link, 0).await?.0 };
        let size = spans.first().map_or(0, |span| u64::from(span.size));
        let spans = check_page(spans, 0, false, size, true).map_err(ClientError::protocol)?;
        match &spans[..] {
            [span] if size < PATH_BYTES_MAX as u64 => match &span.body {
                Body::Inline(target) if crc32fast::hash(target) == span.crc => Ok(target.clone()),
                _ => {
                    let what_is = "what the link says".to_owned();
                    Err(ClientError::Corrupt { file: link, path: what, what: what_is })
                }
            },
            _ => Err(ClientError::other_reply("symbolic link")),
        }
    }

    /// A page of a file's spans from the one that holds `offset`, and whether there are more.
    pub(crate) async fn span_page(&self, file: InodeId, offset: u64) -> Result<(Vec<pb::Span>, bool)> {
        let op = shard_request::Op::GetSpans(pb::GetSpans { file: file.0, offset, limit: 256 });
        match self.shared.shard_read(file.shard(), op).await? {
            Ok(shard_reply::Result::GetSpans(reply)) => Ok((reply.spans, reply.more)),
            Ok(_) => Err(ClientError::other_reply("spans")),
            Err(error) => Err(ClientError::from_shard(&error, format_args!("inode {file}"))),
        }
    }

    pub async fn set_attributes(&self, path: impl AsRef<[u8]>, changes: AttributeChanges) -> Result<()> {
        let inode = self.resolve(path.as_ref()).await?;
        let what = String::from_utf8_lossy(path.as_ref()).into_owned();
        self.set_attributes_inode(inode, changes).await.map_err(|error| error.on(what))
    }

    pub async fn set_attributes_inode(&self, inode: InodeId, changes: AttributeChanges) -> Result<()> {
        let xattr = |(name, value)| pb::ExtendedAttribute { name, value };
        let op = pb::SetAttributes {
            inode: inode.0,
            mode: changes.mode,
            uid: changes.uid,
            gid: changes.gid,
            mtime: changes.mtime.map(|time| time.0),
            atime: changes.atime.map(|time| time.0),
            set_xattrs: changes.set_xattrs.into_iter().map(xattr).collect(),
            remove_xattrs: changes.remove_xattrs,
        };
        let result = self.write_one(inode, write_op::Op::SetAttributes(op)).await?;
        done(result, &format_args!("inode {inode}"))
    }

    pub async fn policies(&self, path: impl AsRef<[u8]>) -> Result<DirectoryPolicies> {
        let path = Path::parse(path.as_ref())?;
        let what = path.to_string();
        let want = Want { attributes: true, follow: true, ..Want::default() };
        let resolved = self.walk(&Start::root(), path, want, &what).await?.resolved(&what)?;
        let own = resolved
            .metadata
            .policies
            .ok_or_else(|| ClientError::refused(Refusal::NotDirectory, ShardError::NotDirectory, what))?;
        Ok(DirectoryPolicies { own, effective: resolved.policies })
    }

    /// Sets the policy of `kind` (that field of `value`); `None` unsets it: inherited again.
    pub async fn set_policy(
        &self,
        path: impl AsRef<[u8]>,
        kind: PolicyKind,
        value: Option<Policies>,
    ) -> Result<()> {
        if let Some(value) = &value {
            policy::validate(value).map_err(ClientError::Invalid)?;
        }
        let directory = self.directory(path).await?;
        let op = pb::SetPolicy { directory: directory.inode.0, kind: kind as i32, value };
        let result = self.write_one(directory.inode, write_op::Op::SetPolicy(op)).await?;
        done(result, &directory.text)
    }
}

/// The directory something is moved to.
pub(crate) enum NewParent {
    Is(InodeId),
    At(Path),
}

/// Which of the two paths of a move a refusal is about.
#[derive(Clone, Copy)]
pub(crate) struct RenameWords<'a> {
    pub from: &'a str,
    pub to: &'a str,
}

impl RenameWords<'_> {
    fn say(&self, error: ClientError) -> ClientError {
        match error.refusal() {
            // The directories are ones: what is none is what has the new name.
            Some(
                Refusal::Exists
                | Refusal::NotDirectory
                | Refusal::IsDirectory
                | Refusal::InvalidName
                | Refusal::NameTooLong,
            ) => error.on(self.to),
            Some(Refusal::Loop) => error.on(format_args!("{} -> {}", self.from, self.to)),
            _ => error.on(self.from),
        }
    }
}
