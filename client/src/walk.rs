//! From a path to an inode: one request per host on the way, symbolic links followed here.

use bytes::Bytes;
use eggs_proto::limits::WALK_COMPONENTS_MAX;
use eggs_proto::pb::{shard_reply, shard_request};
use eggs_proto::{InodeId, ServiceError, ShardError, Time, pb, policy};

use crate::Client;
use crate::error::{ClientError, Refusal, Result};
use crate::moves::Moves;
use crate::path::Path;
use crate::types::{Metadata, Policies, Resolved};

/// Links in one path; as Linux has it.
const LINKS_MAX: usize = 40;

/// How far to go and what to bring.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Want {
    pub at: Time,
    pub attributes: bool,
    pub spans: bool,
    /// Follow a link at the end too.
    pub follow: bool,
    /// What is missing is no error: the walk ends at the last directory there is.
    pub as_far: bool,
}

/// Where a walk ended.
#[derive(Debug)]
pub(crate) struct Walked {
    pub inode: InodeId,
    /// Of the last edge; null when there was none.
    pub directory: InodeId,
    pub created_at: Time,
    pub attributes: Option<pb::Attributes>,
    pub spans: Vec<pb::Span>,
    pub all_spans: bool,
    /// Of the directories on the way, nearer ones winning; without the defaults.
    pub policies: Policies,
    /// With [`Want::as_far`]: the names that are missing.
    pub rest: Vec<Bytes>,
}

/// Where to begin: a directory and what is inherited there.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    pub inode: InodeId,
    pub policies: Policies,
}

impl Start {
    pub fn root() -> Start {
        Start::at(InodeId::ROOT)
    }

    /// Nothing is inherited there.
    pub fn at(inode: InodeId) -> Start {
        Start { inode, policies: Policies::default() }
    }
}

impl Walked {
    pub fn resolved(self, what: &str) -> Result<Resolved> {
        let attributes = self.attributes.ok_or_else(|| ClientError::not_found(what))?;
        Ok(Resolved {
            inode: self.inode,
            directory: self.directory,
            created_at: self.created_at,
            metadata: Metadata::from_wire(self.inode, attributes)?,
            policies: policy::inherit(self.policies, &policy::defaults()),
        })
    }
}

impl Client {
    /// Walks from `start` along `path`; `what` is the path for people.
    pub(crate) async fn walk(&self, start: &Start, path: Path, want: Want, what: &str) -> Result<Walked> {
        let mut path = path;
        // Names at its end that are not of a link's target.
        let mut own = path.names.len();
        for _ in 0..=LINKS_MAX {
            let (walked, consumed) = self.walk_to_link(start, &path, want, what).await?;
            let at_end = consumed == path.names.len();
            let rest = path.names.split_off(consumed);
            if !walked.inode.is_symlink() || (at_end && !want.follow) {
                // A link that leads nowhere.
                if rest.len() > own {
                    return Err(ClientError::not_found(what));
                }
                return Ok(Walked { rest, ..walked });
            }
            own = rest.len();
            let target = self.link_target(walked.inode, walked.spans, walked.all_spans).await?;
            if target.first() == Some(&b'/') {
                if start.inode != InodeId::ROOT {
                    // An absolute target leaves the directory the walk began in.
                    let mut path = Path::parse(&target)?;
                    path.names.extend(rest);
                    return Box::pin(self.walk(&Start::root(), path, want, what)).await;
                }
                path.names.clear();
            } else {
                path.names.pop();
            }
            path.extend(&target);
            path.names.extend(rest);
        }
        Err(ClientError::refused(Refusal::TooDeep, "too many levels of symbolic links", what))
    }

    /// Walks until the end or the first link; says how many names were consumed.
    async fn walk_to_link(
        &self,
        start: &Start,
        path: &Path,
        want: Want,
        what: &str,
    ) -> Result<(Walked, usize)> {
        let mut walked = Walked {
            inode: start.inode,
            directory: InodeId::NULL,
            created_at: Time::ZERO,
            attributes: None,
            spans: Vec::new(),
            all_spans: false,
            policies: start.policies.clone(),
            rest: Vec::new(),
        };
        let mut consumed = 0;
        let mut moves = Moves::new(self, want.at);
        // Each round gets further or ends: a name at least, what became of a move, or the attributes where the names end.
        loop {
            let names = &path.names[consumed..];
            let names = &names[..names.len().min(WALK_COMPONENTS_MAX)];
            let reply = self
                .walk_once(walked.inode, names, want, &moves)
                .await?
                .map_err(|error| ClientError::from_shard(&error, what))?;
            let step = reply.consumed as usize;
            let stays = reply.inode == walked.inode.0;
            if step > names.len() || (step == 0 && !stays) {
                return Err(ClientError::other_reply("walk"));
            }
            consumed += step;
            let asked_at = walked.inode;
            walked.inode = InodeId(reply.inode);
            if step > 0 {
                (walked.directory, walked.created_at) = (InodeId(reply.directory), Time(reply.created_at));
            }
            walked.policies = policy::inherit(reply.policies.unwrap_or_default(), &walked.policies);
            (walked.attributes, walked.spans) = (reply.attributes, reply.spans);
            walked.all_spans = reply.all_spans;
            if reply.locked_by != 0 {
                moves.fate(self, reply.locked_by).await?;
                continue;
            }
            if walked.inode.is_symlink() && (consumed < path.names.len() || want.follow) {
                return Ok((walked, consumed));
            }
            if let Some(error) = reply.stopped {
                let missing = error.code == ShardError::NotFound.code() && walked.inode.is_directory();
                if want.as_far && missing {
                    return Ok((walked, consumed));
                }
                return Err(stopped(&error, path, consumed, what));
            }
            if consumed == path.names.len() {
                let described = walked.attributes.is_some() || !(want.attributes || want.spans);
                // Asked where it lives, and not there: gone.
                if described || asked_at == walked.inode {
                    return Ok((walked, consumed));
                }
            } else if step == 0 && asked_at == walked.inode {
                return Err(ClientError::other_reply("walk"));
            }
        }
    }

    pub(crate) async fn walk_once(
        &self,
        start: InodeId,
        names: &[Bytes],
        want: Want,
        moves: &Moves,
    ) -> Result<Result<pb::WalkReply, pb::Error>> {
        let op = shard_request::Op::Walk(pb::Walk {
            start: start.0,
            components: names.to_vec(),
            at: want.at.0,
            want_attributes: want.attributes || want.spans,
            want_spans: want.spans,
            moved: moves.moved.clone(),
            not_moved: moves.not_moved.clone(),
            exchanged: moves.exchanged.clone(),
        });
        match self.shared.shard_read(start.shard(), op).await? {
            Ok(shard_reply::Result::Walk(reply)) => Ok(Ok(reply)),
            Ok(_) => Err(ClientError::other_reply("walk")),
            Err(error) => Ok(Err(error)),
        }
    }
}

/// Why there is no way on, said of the part of the path that was reached.
fn stopped(error: &pb::Error, path: &Path, consumed: usize, what: &str) -> ClientError {
    // A file on the way: named itself. Anything missing: the whole path, as POSIX tools do.
    if ShardError::from_code(error.code) == Some(ShardError::NotDirectory) && consumed < path.names.len() {
        return ClientError::refused(Refusal::NotDirectory, ShardError::NotDirectory, what);
    }
    ClientError::from_shard(error, what)
}
