//! Names in a directory that was found before: no look-up on the way.

use std::sync::Arc;

use bytes::Bytes;
use eggs_client_core::layout::Rules;
use eggs_proto::limits::BATCH_OPS_MAX;
use eggs_proto::pb::{crossdir_reply, crossdir_request, write_op};
use eggs_proto::{InodeId, Time, pb, policy};

use crate::error::{ClientError, Result};
use crate::listing::Listing;
use crate::names::{DIRECTORY_MODE, NewParent, RenameWords, attributes_or, check_name, done, link_reply};
use crate::path::Path;
use crate::types::{CreateOptions, ListOptions, NewAttributes, Policies, Replace, Resolved};
use crate::walk::{Start, Want};
use crate::{Client, Directory, FileReader};

const LINK_MODE: u32 = 0o777;

impl Directory {
    pub(crate) fn new(
        client: &Client,
        inode: InodeId,
        policies: Policies,
        text: String,
    ) -> Result<Directory> {
        let rules = Rules::new(&policies).map_err(ClientError::protocol)?;
        Ok(Directory {
            client: client.clone(),
            inode,
            policies: Arc::new(policy::inherit(policies, &policy::defaults())),
            rules: Arc::new(rules),
            text: text.into(),
        })
    }

    fn start(&self) -> Start {
        Start { inode: self.inode, policies: (*self.policies).clone() }
    }

    /// The path of a name in it, for people.
    pub(crate) fn what(&self, name: &[u8]) -> String {
        let between = if self.text.ends_with('/') { "" } else { "/" };
        format!("{}{between}{}", self.text, String::from_utf8_lossy(name))
    }

    pub fn inode(&self) -> InodeId {
        self.inode
    }

    /// The policies in force here when it was found.
    pub fn policies(&self) -> &Policies {
        &self.policies
    }

    pub fn list(&self, options: ListOptions) -> Listing {
        Listing::new(&self.client, self.inode, options, self.text.clone())
    }

    /// Resolves one name.
    pub async fn lookup(&self, name: impl AsRef<[u8]>) -> Result<Resolved> {
        let what = self.what(name.as_ref());
        let path = Path::default().join(check_name(name.as_ref(), &what)?);
        let want = Want { attributes: true, ..Want::default() };
        self.client.walk(&self.start(), path, want, &what).await?.resolved(&what)
    }

    /// The directory of that name in this one.
    pub async fn directory(&self, name: impl AsRef<[u8]>) -> Result<Directory> {
        let what = self.what(name.as_ref());
        let path = Path::default().join(check_name(name.as_ref(), &what)?);
        let want = Want { attributes: true, follow: true, ..Want::default() };
        let walked = self.client.walk(&self.start(), path, want, &what).await?;
        self.client.directory_of(walked, &what, what.clone())
    }

    /// Makes a directory in this one.
    pub async fn mkdir(
        &self,
        name: impl AsRef<[u8]>,
        attributes: Option<NewAttributes>,
    ) -> Result<Directory> {
        let what = self.what(name.as_ref());
        let name = Bytes::copy_from_slice(check_name(name.as_ref(), &what)?);
        let attributes = Some(attributes_or(attributes.as_ref(), DIRECTORY_MODE));
        let op = crossdir_request::Op::Mkdir(pb::Mkdir { parent: self.inode.0, name, attributes });
        match self.client.shared.crossdir_write(op).await? {
            Ok(crossdir_reply::Result::Mkdir(reply)) => Ok(Directory {
                client: self.client.clone(),
                inode: InodeId(reply.inode),
                policies: self.policies.clone(),
                rules: self.rules.clone(),
                text: what.into(),
            }),
            Ok(_) => Err(ClientError::other_reply("mkdir")),
            Err(error) => Err(ClientError::from_crossdir(&error, what)),
        }
    }

    pub async fn rmdir(&self, name: impl AsRef<[u8]>) -> Result<Time> {
        let what = self.what(name.as_ref());
        let path = Path::default().join(check_name(name.as_ref(), &what)?);
        self.client.rmdir_from(&self.start(), path, &what).await
    }

    pub async fn symlink(
        &self,
        name: impl AsRef<[u8]>,
        target: impl AsRef<[u8]>,
        options: &CreateOptions,
    ) -> Result<InodeId> {
        let what = self.what(name.as_ref());
        let op = pb::PutSmall {
            directory: self.inode.0,
            name: Bytes::copy_from_slice(check_name(name.as_ref(), &what)?),
            bytes: Bytes::copy_from_slice(target.as_ref()),
            symlink: true,
            attributes: Some(attributes_or(options.attributes.as_ref(), LINK_MODE)),
            replace: options.replace.to_wire(),
        };
        let result = self.client.write_one(self.inode, write_op::Op::PutSmall(op)).await?;
        Ok(InodeId(link_reply(result, &what)?.0.inode))
    }

    /// Renames within this directory.
    pub async fn rename(
        &self,
        from: impl AsRef<[u8]>,
        to: impl AsRef<[u8]>,
        replace: Replace,
    ) -> Result<Option<InodeId>> {
        let (from_text, to_text) = (self.what(from.as_ref()), self.what(to.as_ref()));
        let old = Bytes::copy_from_slice(check_name(from.as_ref(), &from_text)?);
        let new = Bytes::copy_from_slice(check_name(to.as_ref(), &to_text)?);
        let words = RenameWords { from: &from_text, to: &to_text };
        self.client.rename_within(self.inode, old, new, replace, words).await
    }

    /// Moves what has a name here to a name of another directory; returns what it replaced.
    pub async fn rename_to(
        &self,
        from: impl AsRef<[u8]>,
        directory: &Directory,
        to: impl AsRef<[u8]>,
        replace: Replace,
    ) -> Result<Option<InodeId>> {
        let (from_text, to_text) = (self.what(from.as_ref()), directory.what(to.as_ref()));
        let old = Bytes::copy_from_slice(check_name(from.as_ref(), &from_text)?);
        let new = Bytes::copy_from_slice(check_name(to.as_ref(), &to_text)?);
        let words = RenameWords { from: &from_text, to: &to_text };
        let path = Path::default().join(&old);
        let new = (NewParent::Is(directory.inode), new);
        self.client.rename_from(&self.start(), (path, old), new, replace, words).await
    }

    pub async fn unlink(&self, name: impl AsRef<[u8]>) -> Result<()> {
        let what = self.what(name.as_ref());
        let name = Bytes::copy_from_slice(check_name(name.as_ref(), &what)?);
        let op = pb::Unlink { directory: self.inode.0, name, expected: 0 };
        done(self.client.write_one(self.inode, write_op::Op::Unlink(op)).await?, &what)
    }

    /// Removes many files and links, many to a request; answers in the order of the names.
    pub async fn unlink_many(&self, names: Vec<Bytes>) -> Vec<Result<()>> {
        let op = |name: &Bytes| pb::WriteOp {
            op: Some(write_op::Op::Unlink(pb::Unlink {
                directory: self.inode.0,
                name: name.clone(),
                expected: 0,
            })),
        };
        let mut answers = Vec::with_capacity(names.len());
        for batch in names.chunks(BATCH_OPS_MAX) {
            match self.client.shared.shard_write(self.inode.shard(), batch.iter().map(op).collect()).await {
                Ok(results) => {
                    let named = results.into_iter().zip(batch);
                    answers.extend(named.map(|(result, name)| done(result, &self.what(name))));
                }
                Err(error) => answers.extend(batch.iter().map(|_| Err(error.clone()))),
            }
        }
        answers
    }

    pub async fn open(&self, name: impl AsRef<[u8]>) -> Result<FileReader> {
        let what = self.what(name.as_ref());
        let path = Path::default().join(check_name(name.as_ref(), &what)?);
        self.client.open_from(&self.start(), path, Time::ZERO, &what).await
    }
}
