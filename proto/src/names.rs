//! Names of directory entries.

use crate::limits::NAME_BYTES_MAX;

/// Why a name cannot be one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("a name cannot be empty")]
    Empty,
    #[error("'.' and '..' are not names")]
    Dots,
    #[error("a name cannot contain '/' or a zero byte")]
    Separator,
    #[error("file name too long (more than {NAME_BYTES_MAX} bytes)")]
    TooLong,
}

/// Any bytes but `/` and 0, 1 to 255 of them, not `.` or `..`; as POSIX has it.
pub fn validate(name: &[u8]) -> Result<(), NameError> {
    match name {
        [] => Err(NameError::Empty),
        b"." | b".." => Err(NameError::Dots),
        _ if name.len() > NAME_BYTES_MAX => Err(NameError::TooLong),
        _ if name.iter().any(|&byte| byte == b'/' || byte == 0) => Err(NameError::Separator),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_posix_allows() {
        assert_eq!(validate(b"a"), Ok(()));
        assert_eq!(validate(&[0xff; 255]), Ok(()));
        assert_eq!(validate(b""), Err(NameError::Empty));
        assert_eq!(validate(b".."), Err(NameError::Dots));
        assert_eq!(validate(b"a/b"), Err(NameError::Separator));
        assert_eq!(validate(b"a\0"), Err(NameError::Separator));
        assert_eq!(validate(&[b'x'; 256]), Err(NameError::TooLong));
    }
}
