//! What each service refuses, and whether asking again can help.
//!
//! One enum per service. On the wire an error is a [`pb::Error`](crate::pb::Error): a code (stable,
//! listed here) and a message for people. A code this build does not know decodes as `Internal`
//! with the code in the message.

use crate::pb;

/// Whether the same request can succeed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The answer will be the same.
    Never,
    /// Ask again, after a pause.
    Later,
    /// Ask again elsewhere: refresh the cluster map first.
    Elsewhere,
}

/// What the error enums have in common.
pub trait ServiceError: Copy + std::fmt::Display {
    fn code(self) -> u32;
    fn from_code(code: u32) -> Option<Self>;
    fn retry(self) -> Retry;

    /// A wire error; `what` is what failed on what.
    fn with(self, what: impl std::fmt::Display) -> pb::Error {
        pb::Error { message: format!("{what}: {self}"), ..self.bare() }
    }

    /// A wire error with nothing to add.
    fn bare(self) -> pb::Error {
        pb::Error { code: self.code(), message: self.to_string(), ..pb::Error::default() }
    }
}

macro_rules! service_error {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal, $retry:ident, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
        pub enum $name {
            $($(#[$vdoc])* #[error($text)] $variant,)*
        }

        impl $name {
            /// Every variant, in the order of the codes.
            pub const ALL: &[$name] = &[$($name::$variant,)*];
        }

        impl ServiceError for $name {
            fn code(self) -> u32 {
                match self { $($name::$variant => $code,)* }
            }

            fn from_code(code: u32) -> Option<Self> {
                match code { $($code => Some($name::$variant),)* _ => None }
            }

            fn retry(self) -> Retry {
                match self { $($name::$variant => Retry::$retry,)* }
            }
        }

        impl From<$name> for pb::Error {
            fn from(error: $name) -> pb::Error {
                error.bare()
            }
        }
    };
}

service_error! {
    /// What a metadata shard refuses.
    ShardError {
        /// A bug, or bytes that make no sense in a stored row.
        Internal = 1, Never, "internal error";
        /// The request is not one: missing or contradictory fields.
        Malformed = 2, Never, "invalid argument";
        UnsupportedVersion = 3, Never, "protocol version not supported";
        /// The request names another cluster.
        WrongCluster = 4, Never, "request is for another cluster";
        /// The cluster secret is missing or wrong.
        Unauthorized = 5, Never, "permission denied: the cluster secret is required";
        /// This host does not lead that shard.
        NotLeader = 6, Elsewhere, "this host does not lead the shard";
        /// Queues are full, or the daemon is starting or stopping.
        Busy = 7, Later, "resource temporarily unavailable";
        /// An older sequence of a session that has gone on.
        StaleSession = 8, Never, "a later request of this session was already answered";
        /// The sender's clock is too far ahead.
        ClockAhead = 9, Never, "the sender's clock is too far ahead";
        NotFound = 20, Never, "no such file or directory";
        Exists = 21, Never, "file exists";
        NotDirectory = 22, Never, "not a directory";
        IsDirectory = 23, Never, "is a directory";
        NotEmpty = 24, Never, "directory not empty";
        InvalidName = 25, Never, "invalid name";
        NameTooLong = 26, Never, "file name too long";
        TooLarge = 27, Never, "file too large";
        /// Something else has the name by now.
        Changed = 28, Never, "it was changed meanwhile";
        /// The edge is held by a cross-directory transaction.
        Locked = 29, Later, "resource busy: a directory operation is in progress";
        NoAttribute = 30, Never, "no such attribute";
        /// The root directory cannot be moved or removed.
        IsRoot = 31, Never, "the root directory cannot be moved or removed";
        /// No such eden file, or the cookie is not its writer's.
        NotWriter = 40, Never, "no such file in writing, or not its writer";
        /// The deadline of the eden file has passed.
        Expired = 41, Never, "the time to finish the file has passed";
        /// A span or certification out of order.
        BadSpan = 42, Never, "span not acceptable";
        /// A proof does not fit its block.
        BadProof = 43, Never, "proof of a written block not valid";
        /// Not enough writable block services in different places.
        NoBlockServices = 44, Later, "not enough disks take blocks";
        /// The disk that holds the metadata is almost full; names can still be removed.
        NoSpace = 45, Never, "no space left on device";
        /// A dead entry that does not own its inode: this one lives elsewhere, or died later.
        NotOwned = 60, Never, "it was moved away or undeleted since, not deleted";
    }
}

service_error! {
    /// What the cross-directory coordinator refuses.
    CrossdirError {
        Internal = 1, Never, "internal error";
        Malformed = 2, Never, "invalid argument";
        UnsupportedVersion = 3, Never, "protocol version not supported";
        WrongCluster = 4, Never, "request is for another cluster";
        NotLeader = 6, Elsewhere, "this host does not lead the coordinator";
        /// Too many transactions are waiting.
        Busy = 7, Later, "resource temporarily unavailable";
        StaleSession = 8, Never, "a later request of this session was already answered";
        ClockAhead = 9, Never, "the sender's clock is too far ahead";
        /// Accepted, and carried on by the coordinator; ask again for the answer.
        InProgress = 10, Later, "accepted, still in progress";
        NotFound = 20, Never, "no such file or directory";
        Exists = 21, Never, "file exists";
        NotDirectory = 22, Never, "not a directory";
        IsDirectory = 23, Never, "is a directory";
        NotEmpty = 24, Never, "directory not empty";
        InvalidName = 25, Never, "invalid name";
        NameTooLong = 26, Never, "file name too long";
        Changed = 28, Never, "it was changed meanwhile";
        IsRoot = 31, Never, "the root directory cannot be moved or removed";
        /// A directory cannot be moved into itself.
        Loop = 32, Never, "cannot move a directory into itself";
        TooDeep = 33, Never, "too many levels of directories";
        /// The disk that holds the coordinator's log is almost full; names can still be removed.
        NoSpace = 34, Never, "no space left on device";
        /// A dead entry that does not own its inode: this one lives elsewhere, or died later.
        NotOwned = 60, Never, "it was moved away or undeleted since, not deleted";
    }
}

service_error! {
    /// What the registry refuses.
    RegistryError {
        Internal = 1, Never, "internal error";
        Malformed = 2, Never, "invalid argument";
        UnsupportedVersion = 3, Never, "protocol version not supported";
        WrongCluster = 4, Never, "request is for another cluster";
        Unauthorized = 5, Never, "permission denied: the cluster secret is required";
        NotLeader = 6, Elsewhere, "this host does not lead the registry";
        Busy = 7, Later, "resource temporarily unavailable";
        NotFound = 20, Never, "no such block service";
        /// A block service id is registered with another key: two disks with one id.
        Conflict = 21, Never, "another disk is registered with this id";
        /// A store, host or group that is not known.
        UnknownMember = 23, Never, "not known to the registry";
        /// Fewer replicas than are safe.
        TooFewReplicas = 24, Never, "too few replicas would be left";
    }
}

service_error! {
    /// What a block service refuses.
    BlockError {
        Internal = 1, Never, "internal error";
        Malformed = 2, Never, "invalid argument";
        UnsupportedVersion = 3, Never, "protocol version not supported";
        WrongCluster = 4, Never, "request is for another cluster";
        Busy = 7, Later, "resource temporarily unavailable";
        UnknownBlockService = 20, Elsewhere, "no such block service on this host";
        UnknownBlock = 21, Never, "no such block";
        BadCertificate = 22, Never, "certificate not valid";
        WrongSize = 23, Never, "the data is not of the size certified";
        WrongCrc = 24, Never, "the data does not have the CRC certified";
        OutOfRange = 25, Never, "range outside the block";
        NoSpace = 26, Never, "no space left on device";
        /// The disk is gone, failing or not this cluster's.
        DiskLost = 27, Never, "the disk is lost";
        Io = 28, Never, "input/output error";
        /// What is on disk is not what was written.
        Corrupt = 29, Never, "the stored block is corrupt";
        /// The disk is right, and takes no changes.
        ReadOnly = 30, Never, "the disk is read-only";
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes_are_distinct_and_read_back<E: ServiceError + PartialEq + std::fmt::Debug + 'static>(all: &[E]) {
        let mut codes: Vec<u32> = all.iter().map(|error| error.code()).collect();
        codes.dedup();
        assert_eq!(codes.len(), all.len());
        assert!(codes.is_sorted());
        for &error in all {
            assert_eq!(E::from_code(error.code()), Some(error));
        }
        assert_eq!(E::from_code(0), None);
    }

    #[test]
    fn codes() {
        codes_are_distinct_and_read_back(ShardError::ALL);
        codes_are_distinct_and_read_back(CrossdirError::ALL);
        codes_are_distinct_and_read_back(RegistryError::ALL);
        codes_are_distinct_and_read_back(BlockError::ALL);
    }
}
