//! What is dead: the deaths of a name, bringing their targets back, and purging them for good.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use eggs_proto::limits::{BATCH_OPS_MAX, DEPTH_MAX};
use eggs_proto::pb::{crossdir_reply, crossdir_request, write_op};
use eggs_proto::{InodeId, ShardError, Time, pb};

use crate::Client;
use crate::error::{ClientError, Refusal, Result};
use crate::names::{check_name, done, link_reply};
use crate::path::Path;
use crate::types::{Death, Entry, ListOptions};
use crate::walk::{Start, Want};

/// Deaths no further apart than this are of one removal ([`Client::removal_began`]).
const ONE_REMOVAL: Duration = Duration::from_secs(60);

impl Death {
    /// `None`: the entry is of a living map.
    pub fn of(directory: InodeId, entry: &Entry) -> Option<Death> {
        Some(Death {
            directory,
            name: entry.name.clone(),
            target: entry.target,
            created_at: entry.created_at,
            died_at: entry.died_at?,
            owned: entry.owned,
        })
    }

    /// The name was there at that instant.
    pub fn was_there(&self, at: Time) -> bool {
        self.created_at <= at && at < self.died_at
    }

    /// Whether the directory's shard can purge it without the coordinator.
    fn is_local(&self) -> bool {
        !self.owned || (!self.target.is_directory() && self.target.shard() == self.directory.shard())
    }

    fn purge(&self) -> write_op::Op {
        write_op::Op::Purge(pb::Purge {
            directory: self.directory.0,
            name: self.name.clone(),
            died_at: self.died_at.0,
            target: self.target.0,
            owned: self.owned,
        })
    }

    fn undelete(&self, new_name: &Bytes) -> write_op::Op {
        write_op::Op::Undelete(pb::Undelete {
            directory: self.directory.0,
            name: self.name.clone(),
            died_at: self.died_at.0,
            target: self.target.0,
            new_name: new_name.clone(),
        })
    }
}

impl Client {
    /// Every death of the last name of a path, oldest first. The directories on the way are those of `at`; unset is now.
    ///
    /// # Errors
    /// No such directory then. That nothing died there is no error.
    pub async fn deaths(&self, path: impl AsRef<[u8]>, at: Time) -> Result<Vec<Death>> {
        let path = Path::parse(path.as_ref())?;
        let what = path.to_string();
        let Some((parent, name)) = path.split() else {
            return Err(ClientError::refused(Refusal::IsRoot, ShardError::IsRoot, what));
        };
        check_name(&name, &what)?;
        let want = Want { at, follow: true, ..Want::default() };
        let walked = self.walk(&Start::root(), parent, want, &what).await?;
        if !walked.inode.is_directory() {
            return Err(ClientError::refused(Refusal::NotDirectory, ShardError::NotDirectory, what));
        }
        let options = ListOptions { dead: true, prefix: name.clone(), ..ListOptions::default() };
        let mut listing = self.list_inode(walked.inode, options);
        let mut deaths = Vec::new();
        // Longer names with that prefix come after it.
        while let Some(entry) = listing.next().await?.filter(|entry| entry.name == name) {
            deaths.extend(Death::of(walked.inode, &entry));
        }
        Ok(deaths)
    }

    /// The death that undeleting a path undoes: with `at`, of what was there at that instant; else the newest of those
    /// that own what died.
    ///
    /// # Errors
    /// `NotFound`: nothing died there. `NotOwned`: what was there was moved away, or undeleted since. `Exists`: it lives.
    pub async fn death_of(&self, path: impl AsRef<[u8]>, at: Time) -> Result<Death> {
        let path = path.as_ref();
        let what = String::from_utf8_lossy(path).into_owned();
        let deaths = self.deaths(path, at).await?;
        let death = if at.is_unset() {
            let newest = deaths.iter().rev().find(|death| death.owned).or(deaths.last());
            newest.cloned().ok_or_else(|| {
                ClientError::refused(Refusal::NotFound, "nothing of that name was deleted here", &what)
            })?
        } else if let Some(death) = deaths.into_iter().find(|death| death.was_there(at)) {
            death
        } else {
            // It was there and never died, or the past has nothing of that name.
            self.resolve_at(path, at).await?;
            return Err(ClientError::refused(Refusal::Exists, "it was not deleted since then", &what));
        };
        if !death.owned {
            return Err(ClientError::refused(Refusal::NotOwned, ShardError::NotOwned, &what));
        }
        Ok(death)
    }

    /// Brings back what died, under a name that is free: the target of the death lives again from now on. A directory comes
    /// back empty, with its dead entries. Returns when its new name came.
    ///
    /// # Errors
    /// `NotOwned`: it was moved away, or undeleted since. `Exists`: the name is taken. `NotFound`: it was purged, or
    /// `directory` is removed itself.
    pub async fn undelete(&self, death: &Death, directory: InodeId, name: impl AsRef<[u8]>) -> Result<Time> {
        let what = String::from_utf8_lossy(name.as_ref()).into_owned();
        let new_name = Bytes::copy_from_slice(check_name(name.as_ref(), &what)?);
        let undeleted = if death.directory == directory && !death.target.is_directory() {
            let result = self.write_one(directory, death.undelete(&new_name)).await?;
            link_reply(result, &what).map(|(reply, _)| Time(reply.created_at))
        } else {
            let op = pb::UndeleteInode {
                directory: death.directory.0,
                name: death.name.clone(),
                died_at: death.died_at.0,
                target: death.target.0,
                new_directory: directory.0,
                new_name,
            };
            match self.shared.crossdir_write(crossdir_request::Op::UndeleteInode(op)).await? {
                Ok(crossdir_reply::Result::UndeleteInode(reply)) => Ok(Time(reply.created_at)),
                Ok(_) => Err(ClientError::other_reply("undelete")),
                Err(error) => Err(ClientError::from_crossdir(&error, &what)),
            }
        };
        undeleted.map_err(|error| not_there(error, &what))
    }

    /// Brings back many files and links of one directory under the names they had, many to a request; answers in the order
    /// of the deaths.
    pub async fn undelete_many(&self, directory: InodeId, deaths: &[Death]) -> Vec<Result<()>> {
        self.batch(directory, deaths, |death| death.undelete(&death.name)).await
    }

    /// Takes a dead entry away for good. When it owns what died, that goes with it: a file, whose blocks may be erased then;
    /// a directory only when it has no dead entries left. The past does not show the name any more.
    ///
    /// # Errors
    /// `NotFound`: it is gone already. `NotEmpty`: dead entries are left in the directory. `NotOwned`: the directory lives
    /// again.
    pub async fn purge(&self, death: &Death) -> Result<()> {
        let what = String::from_utf8_lossy(&death.name).into_owned();
        if death.is_local() {
            return done(self.write_one(death.directory, death.purge()).await?, &what);
        }
        let op = pb::PurgeInode {
            directory: death.directory.0,
            name: death.name.clone(),
            died_at: death.died_at.0,
            target: death.target.0,
        };
        match self.shared.crossdir_write(crossdir_request::Op::PurgeInode(op)).await? {
            Ok(crossdir_reply::Result::PurgeInode(_)) => Ok(()),
            Ok(_) => Err(ClientError::other_reply("purge")),
            Err(error) => Err(ClientError::from_crossdir(&error, &what)),
        }
    }

    /// Purges many deaths of one directory, many to a request where its shard can do it alone; answers in the order of the
    /// deaths.
    pub async fn purge_many(&self, directory: InodeId, deaths: &[Death]) -> Vec<Result<()>> {
        let local: Vec<Death> = deaths.iter().filter(|death| death.is_local()).cloned().collect();
        let mut purged = self.batch(directory, &local, Death::purge).await.into_iter();
        let mut answers = Vec::with_capacity(deaths.len());
        for death in deaths {
            answers.push(match death.is_local() {
                true => purged.next().unwrap_or_else(|| Err(ClientError::other_reply("write"))),
                false => self.purge(death).await,
            });
        }
        answers
    }

    async fn batch(
        &self,
        directory: InodeId,
        deaths: &[Death],
        op: impl Fn(&Death) -> write_op::Op,
    ) -> Vec<Result<()>> {
        let mut answers = Vec::with_capacity(deaths.len());
        for batch in deaths.chunks(BATCH_OPS_MAX) {
            let ops = batch.iter().map(|death| pb::WriteOp { op: Some(op(death)) }).collect();
            match self.shared.shard_write(directory.shard(), ops).await {
                Ok(results) => {
                    let named = results.into_iter().zip(batch);
                    answers.extend(
                        named.map(|(result, death)| done(result, &String::from_utf8_lossy(&death.name))),
                    );
                }
                Err(error) => answers.extend(batch.iter().map(|_| Err(error.clone()))),
            }
        }
        answers
    }

    /// When the removal began that ended with this death of a directory: going back from it, the last deaths of names in the
    /// directory and below that follow one another within a minute are of one removal.
    pub async fn removal_began(&self, death: &Death) -> Result<Time> {
        self.began(death.target, death.died_at, DEPTH_MAX).await
    }

    fn began(
        &self,
        directory: InodeId,
        died_at: Time,
        depth: usize,
    ) -> Pin<Box<dyn Future<Output = Result<Time>> + Send + '_>> {
        Box::pin(async move {
            let options = ListOptions { dead: true, until: died_at.next(), ..ListOptions::default() };
            let mut listing = self.list_inode(directory, options);
            let mut last = LastDeaths::new(directory);
            let mut deaths = Vec::new();
            let mut take = |death: Death| {
                if death.owned {
                    deaths.push((death.died_at, death.target));
                }
            };
            while let Some(page) = listing.next_page().await? {
                page.iter().filter_map(|entry| last.next(entry)).for_each(&mut take);
            }
            last.end().into_iter().for_each(&mut take);
            deaths.sort_unstable();
            let mut began = died_at;
            for (died_at, target) in deaths.into_iter().rev() {
                if began.since(died_at) > ONE_REMOVAL {
                    break;
                }
                began = began.min(died_at);
                if target.is_directory() && depth > 0 {
                    began = began.min(self.began(target, died_at, depth - 1).await?);
                }
            }
            Ok(began)
        })
    }
}

/// Of each name in a listing of the dead, the last death: what was there before it was replaced or came back.
#[derive(Debug)]
pub struct LastDeaths {
    directory: InodeId,
    last: Option<Death>,
}

impl LastDeaths {
    pub fn new(directory: InodeId) -> LastDeaths {
        LastDeaths { directory, last: None }
    }

    /// The last death of the name before, when the entry is of another.
    pub fn next(&mut self, entry: &Entry) -> Option<Death> {
        let before = self.last.take();
        self.last = Death::of(self.directory, entry);
        before.filter(|before| before.name != entry.name)
    }

    /// That of the last name.
    pub fn end(&mut self) -> Option<Death> {
        self.last.take()
    }
}

fn not_there(error: ClientError, what: &str) -> ClientError {
    if error.is_not_found() {
        let reason = "it was purged, or the directory it is to be in is deleted itself";
        return ClientError::refused(Refusal::NotFound, reason, what);
    }
    error
}
