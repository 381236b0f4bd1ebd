//! Absolute paths, taken apart.

use std::fmt;

use bytes::Bytes;
use eggs_proto::limits::PATH_BYTES_MAX;

use crate::error::{ClientError, Refusal, Result};

/// The names on the way from the root. `.` and empty names are left out; `..` takes one back, as text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Path {
    pub names: Vec<Bytes>,
}

impl Path {
    pub fn parse(text: &[u8]) -> Result<Path> {
        let lossy = || String::from_utf8_lossy(text).into_owned();
        if text.first() != Some(&b'/') {
            return Err(ClientError::Invalid(format!("'{}' is not an absolute path", lossy())));
        }
        if text.len() > PATH_BYTES_MAX {
            return Err(ClientError::refused(Refusal::NameTooLong, "file name too long", lossy()));
        }
        let mut path = Path::default();
        path.extend(text);
        Ok(path)
    }

    /// Goes on from here along a relative path.
    pub fn extend(&mut self, text: &[u8]) {
        for name in text.split(|&byte| byte == b'/') {
            match name {
                b"" | b"." => {}
                b".." => {
                    self.names.pop();
                }
                name => self.names.push(Bytes::copy_from_slice(name)),
            }
        }
    }

    /// The path of the directory, and the last name; `None` for the root.
    pub fn split(mut self) -> Option<(Path, Bytes)> {
        let name = self.names.pop()?;
        Some((self, name))
    }

    #[must_use]
    pub fn join(&self, name: &[u8]) -> Path {
        let mut names = self.names.clone();
        names.push(Bytes::copy_from_slice(name));
        Path { names }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.names.is_empty() {
            return f.write_str("/");
        }
        self.names.iter().try_for_each(|name| write!(f, "/{}", String::from_utf8_lossy(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let shown = |text: &str| Path::parse(text.as_bytes()).unwrap().to_string();
        assert_eq!(shown("/"), "/");
        assert_eq!(shown("//a/./b/"), "/a/b");
        assert_eq!(shown("/a/../b/../../c"), "/c");
        assert!(Path::parse(b"a").is_err() && Path::parse(b"").is_err());
        assert!(Path::parse(&[b'/'; PATH_BYTES_MAX + 1]).is_err());
        let (parent, name) = Path::parse(b"/a/b").unwrap().split().unwrap();
        assert_eq!((parent.to_string(), &name[..]), ("/a".to_owned(), &b"b"[..]));
        assert!(Path::default().split().is_none());
    }
}
