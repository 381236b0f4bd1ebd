//! Paths inside the cluster, as typed: absolute, any bytes, no working directory.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;

use eggs_proto::names::{self, NameError};

/// An absolute path inside the cluster: `/`, or `/` and names with `/` between them. Repeated
/// slashes and `.` are dropped; `..` is refused, since its meaning would depend on symlinks.
#[derive(Clone)]
pub struct ClusterPath {
    bytes: Vec<u8>,
    into: bool,
}

impl ClusterPath {
    pub fn parse(typed: &[u8]) -> Result<ClusterPath, String> {
        if typed.first() != Some(&b'/') {
            return Err(format!(
                "paths in the cluster are absolute, there is no working directory; try '/{}'",
                escape(typed.strip_prefix(b"./").unwrap_or(typed))
            ));
        }
        let mut bytes = Vec::with_capacity(typed.len());
        for name in typed.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".") {
            if name == b".." {
                return Err("'..' cannot be used in a path in the cluster; write the path out".to_owned());
            }
            // Too long is for the cluster to refuse (exit code 1): the words were understood.
            names::validate(name).or_else(|error| match error {
                NameError::TooLong => Ok(()),
                error => Err(error.to_string()),
            })?;
            bytes.push(b'/');
            bytes.extend_from_slice(name);
        }
        if bytes.is_empty() {
            bytes.push(b'/');
        }
        Ok(ClusterPath { bytes, into: typed.ends_with(b"/") || typed.ends_with(b"/.") })
    }

    pub fn typed(typed: &OsStr) -> Result<ClusterPath, String> {
        ClusterPath::parse(typed.as_bytes())
    }

    /// For clap: a relative path is wrong usage, with the fix in the message.
    pub fn parser() -> impl clap::builder::TypedValueParser<Value = ClusterPath> {
        use clap::builder::TypedValueParser as _;
        clap::builder::OsStringValueParser::new().try_map(|typed| ClusterPath::typed(&typed))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// It was typed with a `/` at its end: a directory is meant.
    pub fn means_directory(&self) -> bool {
        self.into
    }

    pub fn is_root(&self) -> bool {
        self.bytes == b"/"
    }

    /// The last name; `None` for the root.
    pub fn name(&self) -> Option<&[u8]> {
        self.components().next_back()
    }

    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.bytes.split(|&byte| byte == b'/').filter(|name| !name.is_empty())
    }

    /// The directory it is in; the root is in itself.
    #[must_use]
    pub fn parent(&self) -> ClusterPath {
        let cut = self.bytes.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
        ClusterPath { bytes: self.bytes[..cut.max(1)].to_vec(), into: false }
    }

    /// The path of `name` in this directory.
    #[must_use]
    pub fn join(&self, name: &[u8]) -> ClusterPath {
        let mut bytes = if self.is_root() { Vec::new() } else { self.bytes.clone() };
        bytes.push(b'/');
        bytes.extend_from_slice(name);
        ClusterPath { bytes, into: false }
    }

    /// Whether `self` is `other` or below it.
    pub fn is_within(&self, other: &ClusterPath) -> bool {
        other.is_root()
            || self
                .bytes
                .strip_prefix(other.as_bytes())
                .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }
}

/// However it was typed.
impl PartialEq for ClusterPath {
    fn eq(&self, other: &ClusterPath) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for ClusterPath {}

impl fmt::Display for ClusterPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escape(&self.bytes))
    }
}

impl fmt::Debug for ClusterPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Bytes for people: UTF-8 as it is, control letters and bytes that are not UTF-8 as `\xHH`.
pub fn escape(bytes: &[u8]) -> String {
    use fmt::Write as _;
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for letter in chunk.valid().chars() {
            if letter.is_control() {
                let mut utf8 = [0; 4];
                for byte in letter.encode_utf8(&mut utf8).bytes() {
                    let _ = write!(text, "\\x{byte:02x}");
                }
            } else {
                text.push(letter);
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> ClusterPath {
        ClusterPath::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn paths_are_normalised() {
        for (typed, expected) in
            [("/", "/"), ("//", "/"), ("/a", "/a"), ("/a/", "/a"), ("//a/./b//", "/a/b"), ("/a/.", "/a")]
        {
            assert_eq!(path(typed).to_string(), expected, "{typed}");
        }
        assert!(path("/a/").means_directory());
        assert!(!path("/a").means_directory());
    }

    #[test]
    fn a_relative_path_is_refused_with_the_fix() {
        let error = ClusterPath::parse(b"data/x").unwrap_err();
        assert!(error.contains("try '/data/x'"), "{error}");
        let error = ClusterPath::parse(b"./x").unwrap_err();
        assert!(error.contains("try '/x'"), "{error}");
        assert!(ClusterPath::parse(b"").is_err());
        assert!(ClusterPath::parse(b"/a/../b").is_err());
        assert!(ClusterPath::parse(&[&b"/"[..], &[b'x'; 5000]].concat()).is_ok(), "the cluster refuses it");
        assert!(ClusterPath::parse(b"/a\0b").is_err());
    }

    #[test]
    fn parents_and_names() {
        assert_eq!(path("/a/b").parent(), path("/a"));
        assert_eq!(path("/a").parent(), path("/"));
        assert_eq!(path("/").parent(), path("/"));
        assert_eq!(path("/a/b").name(), Some(b"b".as_slice()));
        assert_eq!(path("/").name(), None);
        assert_eq!(path("/").join(b"x"), path("/x"));
        assert_eq!(path("/a").join(b"x"), path("/a/x"));
        assert_eq!(path("/a/b/c").components().count(), 3);
    }

    #[test]
    fn within() {
        assert!(path("/a/b").is_within(&path("/a")));
        assert!(path("/a").is_within(&path("/a")));
        assert!(path("/a").is_within(&path("/")));
        assert!(!path("/ab").is_within(&path("/a")));
    }

    #[test]
    fn names_that_are_not_utf8_are_printable() {
        assert_eq!(ClusterPath::parse(b"/a\xff\n").unwrap().to_string(), "/a\\xff\\x0a");
        assert_eq!(escape("grün".as_bytes()), "grün");
    }
}
