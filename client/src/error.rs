//! What can go wrong, in POSIX words, with the path it went wrong on.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use eggs_proto::errors::{BlockError, CrossdirError, RegistryError, ServiceError, ShardError};
use eggs_proto::{InodeId, pb};

pub type Result<T, E = ClientError> = std::result::Result<T, E>;

/// Why an operation was not done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The cluster answered no; asking again gives the same answer.
    #[error("{reason}: {path}")]
    Refused {
        kind: Refusal,
        /// POSIX words: "no such file or directory".
        reason: String,
        /// What it was refused on: a path, or an inode id.
        path: String,
    },
    /// No answer in time.
    #[error("cluster unreachable: {tried}; gave up after {:.1} s", after.as_secs_f64())]
    Unreachable {
        /// Which addresses were asked, and what came of it.
        tried: String,
        after: Duration,
    },
    /// Too many blocks of a span are missing or damaged.
    #[error("data lost: {path} ({file}), span at {offset}: {missing}")]
    DataLost { file: InodeId, path: String, offset: u64, missing: String },
    /// What was read is not what was written, and it cannot be repaired from here.
    #[error("corrupt: {path} ({file}): {what}")]
    Corrupt { file: InodeId, path: String, what: String },
    /// A block could not be written anywhere.
    #[error("input/output error: {path}: {what}")]
    WriteFailed { path: String, what: String },
    /// The caller's argument makes no sense.
    #[error("invalid argument: {0}")]
    Invalid(String),
    /// A server's answer makes no sense.
    #[error("protocol error: {0}")]
    Protocol(String),
    /// Reading the input or writing the output on this host failed.
    #[error("{what}: {error}")]
    Local { what: String, error: Arc<std::io::Error> },
}

/// What a refusal means to a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    NotFound,
    Exists,
    NotDirectory,
    IsDirectory,
    NotEmpty,
    InvalidName,
    NameTooLong,
    TooLarge,
    /// Something else has the name by now.
    Changed,
    /// A directory operation held the name until the deadline.
    Busy,
    NoAttribute,
    /// A dead name whose inode lives: it was moved away, or undeleted since.
    NotOwned,
    /// The root directory cannot be moved or removed.
    IsRoot,
    /// A directory cannot be moved into itself.
    Loop,
    /// Too many levels of directories or of symbolic links.
    TooDeep,
    NoSpace,
    /// The time to finish the file has passed.
    Expired,
    PermissionDenied,
    /// The cluster says the request makes no sense.
    Invalid,
    /// Anything else: version, cluster, internal.
    Other,
}

impl ClientError {
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            ClientError::Refused { kind, .. } => Some(*kind),
            _ => None,
        }
    }

    pub fn is_not_found(&self) -> bool {
        self.refusal() == Some(Refusal::NotFound)
    }

    pub fn is_exists(&self) -> bool {
        self.refusal() == Some(Refusal::Exists)
    }

    pub fn is_unreachable(&self) -> bool {
        matches!(self, ClientError::Unreachable { .. })
    }

    pub(crate) fn refused(kind: Refusal, reason: impl fmt::Display, path: impl fmt::Display) -> ClientError {
        ClientError::Refused { kind, reason: reason.to_string(), path: path.to_string() }
    }

    pub(crate) fn not_found(path: impl fmt::Display) -> ClientError {
        ClientError::refused(Refusal::NotFound, ShardError::NotFound, path)
    }

    pub(crate) fn local(what: impl fmt::Display, error: std::io::Error) -> ClientError {
        ClientError::Local { what: what.to_string(), error: Arc::new(error) }
    }

    pub(crate) fn protocol(what: impl fmt::Display) -> ClientError {
        ClientError::Protocol(what.to_string())
    }

    /// The same error, said of `path`.
    #[must_use]
    pub(crate) fn on(mut self, on: impl fmt::Display) -> ClientError {
        match &mut self {
            ClientError::Refused { path, .. }
            | ClientError::DataLost { path, .. }
            | ClientError::Corrupt { path, .. }
            | ClientError::WriteFailed { path, .. } => *path = on.to_string(),
            _ => {}
        }
        self
    }

    pub(crate) fn from_shard(error: &pb::Error, path: impl fmt::Display) -> ClientError {
        use ShardError as E;
        let Some(code) = E::from_code(error.code) else { return ClientError::unknown(error, path) };
        let kind = match code {
            E::NotFound => Refusal::NotFound,
            E::Exists => Refusal::Exists,
            E::NotDirectory => Refusal::NotDirectory,
            E::IsDirectory => Refusal::IsDirectory,
            E::NotEmpty => Refusal::NotEmpty,
            E::InvalidName => Refusal::InvalidName,
            E::NameTooLong => Refusal::NameTooLong,
            E::TooLarge => Refusal::TooLarge,
            E::Changed => Refusal::Changed,
            E::Locked | E::Busy => Refusal::Busy,
            E::NoAttribute => Refusal::NoAttribute,
            E::NotOwned => Refusal::NotOwned,
            E::IsRoot => Refusal::IsRoot,
            E::Expired => Refusal::Expired,
            E::NoBlockServices => {
                // Which disks there are too few of, and why: space may not be what lacks.
                let code = format!(": {code}");
                let reason = shortened(error.message.strip_suffix(&code).unwrap_or(&error.message));
                return ClientError::refused(Refusal::NoSpace, reason, path);
            }
            E::NoSpace => Refusal::NoSpace,
            E::Unauthorized => Refusal::PermissionDenied,
            E::Malformed => {
                return ClientError::refused(Refusal::Invalid, shortened(&error.message), path);
            }
            _ => return ClientError::unknown(error, path),
        };
        ClientError::refused(kind, code, path)
    }

    pub(crate) fn from_crossdir(error: &pb::Error, path: impl fmt::Display) -> ClientError {
        use CrossdirError as E;
        let Some(code) = E::from_code(error.code) else { return ClientError::unknown(error, path) };
        let kind = match code {
            E::NoSpace => Refusal::NoSpace,
            E::NotOwned => Refusal::NotOwned,
            E::NotFound => Refusal::NotFound,
            E::Exists => Refusal::Exists,
            E::NotDirectory => Refusal::NotDirectory,
            E::IsDirectory => Refusal::IsDirectory,
            E::NotEmpty => Refusal::NotEmpty,
            E::InvalidName => Refusal::InvalidName,
            E::NameTooLong => Refusal::NameTooLong,
            E::Changed => Refusal::Changed,
            E::Busy | E::InProgress => Refusal::Busy,
            E::IsRoot => Refusal::IsRoot,
            E::Loop => Refusal::Loop,
            E::TooDeep => Refusal::TooDeep,
            _ => return ClientError::unknown(error, path),
        };
        ClientError::refused(kind, code, path)
    }

    pub(crate) fn from_registry(error: &pb::Error) -> ClientError {
        let kind = match RegistryError::from_code(error.code) {
            Some(RegistryError::NotFound) => Refusal::NotFound,
            Some(RegistryError::Unauthorized) => Refusal::PermissionDenied,
            _ => Refusal::Other,
        };
        ClientError::refused(kind, shortened(&error.message), "registry")
    }

    /// A reply of another kind than was asked for.
    pub(crate) fn other_reply(what: &str) -> ClientError {
        ClientError::Protocol(format!("{what}: the answer is to something else"))
    }

    fn unknown(error: &pb::Error, path: impl fmt::Display) -> ClientError {
        let reason = format!("{} (code {})", shortened(&error.message), error.code);
        ClientError::refused(Refusal::Other, reason, path)
    }
}

/// What a block service refused, for people.
pub(crate) fn block_error_words(error: &pb::Error) -> String {
    match BlockError::from_code(error.code) {
        Some(code) => code.to_string(),
        None => format!("{} (code {})", shortened(&error.message), error.code),
    }
}

/// A peer's words, cut to what fits a line.
pub(crate) fn shortened(message: &str) -> String {
    message.chars().filter(|c| !c.is_control()).take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_disks_there_are_too_few_of_is_said() {
        let few = ShardError::NoBlockServices.with("4+2 needs 6 FLASH disks that take blocks, there are 4");
        let error = ClientError::from_shard(&few, "/f");
        assert_eq!(error.refusal(), Some(Refusal::NoSpace));
        assert_eq!(error.to_string(), "4+2 needs 6 FLASH disks that take blocks, there are 4: /f");
        let bare = ClientError::from_shard(&ShardError::NoBlockServices.bare(), "/f");
        assert_eq!(bare.to_string(), "not enough disks take blocks: /f");
    }
}
