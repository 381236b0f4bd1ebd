//! The cluster secret: 32 random bytes that daemons show each other, in a file only they can read.
//!
//! The file is 64 hexadecimal digits and a newline, mode 0600.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

const LENGTH: usize = 32;

/// Shown with every request that only daemons may make.
#[derive(Clone)]
pub struct Secret {
    bytes: [u8; LENGTH],
    /// Where it was read.
    file: Option<Arc<Path>>,
}

impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        self.matches(&other.bytes)
    }
}

impl Eq for Secret {}

impl Secret {
    pub fn from_bytes(bytes: [u8; LENGTH]) -> Secret {
        Secret { bytes, file: None }
    }

    /// A fresh one from the system's entropy.
    ///
    /// # Errors
    /// When the system has none to give.
    pub fn random() -> io::Result<Secret> {
        let mut bytes = [0; LENGTH];
        getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Secret::from_bytes(bytes))
    }

    /// For those who greet without a header.
    pub fn to_array(&self) -> [u8; LENGTH] {
        self.bytes
    }

    /// For a request's header.
    pub fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.bytes)
    }

    /// Whether `shown` is this secret, in constant time.
    pub fn matches(&self, shown: &[u8]) -> bool {
        shown.len() == LENGTH && self.bytes.iter().zip(shown).fold(0, |seen, (a, b)| seen | (a ^ b)) == 0
    }

    /// Reads the secret from `path`.
    ///
    /// # Errors
    /// One line each: no such file, readable by others, not a secret.
    pub fn load(path: &Path) -> Result<Secret, SecretError> {
        let error = |problem| SecretError { path: path.to_owned(), problem };
        let mut file = File::open(path).map_err(|source| {
            error(match source.kind() {
                ErrorKind::NotFound => Problem::Missing,
                _ => Problem::Io("read", source),
            })
        })?;
        let metadata = file.metadata().map_err(|source| error(Problem::Io("read", source)))?;
        if metadata.is_dir() {
            return Err(error(Problem::Directory));
        }
        let mode = metadata.mode();
        if mode & 0o077 != 0 {
            return Err(error(Problem::Exposed(mode & 0o777)));
        }
        let mut text = String::new();
        (&mut file).take(4096).read_to_string(&mut text).map_err(|source| {
            error(match source.kind() {
                ErrorKind::InvalidData => Problem::Malformed,
                _ => Problem::Io("read", source),
            })
        })?;
        let secret = parse(text.trim()).ok_or_else(|| error(Problem::Malformed))?;
        Ok(Secret { file: Some(path.into()), ..secret })
    }

    /// Writes a fresh secret to `path`, which must not exist.
    ///
    /// # Errors
    /// When it exists or cannot be written.
    pub fn create(path: &Path) -> Result<Secret, SecretError> {
        Secret::random()
            .and_then(|secret| secret.write(path).map(|()| secret))
            .map_err(|source| SecretError { path: path.to_owned(), problem: Problem::Io("create", source) })
    }

    /// [`load`](Secret::load), or [`create`](Secret::create) when there is no such file.
    pub fn load_or_create(path: &Path) -> Result<Secret, SecretError> {
        match Secret::load(path) {
            Err(SecretError { problem: Problem::Missing, .. }) => Secret::create(path),
            result => result,
        }
    }

    /// Under another name first, so that nobody ever loads half a secret; then linked, so that an
    /// existing one is never replaced.
    fn write(&self, path: &Path) -> io::Result<()> {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(name);
        let result = (|| {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            let text: String = self.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(file, "{text}")?;
            file.sync_all()?;
            std::fs::hard_link(&temporary, path)?;
            crate::directory::sync_parent(path)
        })();
        let _ = std::fs::remove_file(&temporary);
        result
    }
}

fn parse(text: &str) -> Option<Secret> {
    if text.len() != 2 * LENGTH || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; LENGTH];
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(Secret::from_bytes(bytes))
}

/// What it is and where it is from, never its bytes.
impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "the cluster secret in {}", file.display()),
            None => f.write_str("the cluster secret"),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The secret file is no use.
#[derive(Debug)]
pub struct SecretError {
    path: PathBuf,
    problem: Problem,
}

#[derive(Debug)]
enum Problem {
    Missing,
    Malformed,
    Directory,
    Exposed(u32),
    Io(&'static str, io::Error),
}

impl fmt::Display for SecretError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.problem {
            Problem::Missing => {
                write!(f, "secret file {path} does not exist: copy it from the host that runs shuckle")
            }
            Problem::Malformed => {
                write!(f, "secret file {path} is not one: {} hexadecimal digits are expected", 2 * LENGTH)
            }
            Problem::Directory => write!(f, "secret file {path} is a directory"),
            Problem::Exposed(mode) => {
                write!(f, "secret file {path} is open to other users (mode {mode:03o}): chmod 600 it")
            }
            Problem::Io(what, error) => write!(f, "cannot {what} secret file {path}: {error}"),
        }
    }
}

impl std::error::Error for SecretError {}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_created_secret_reads_back_and_is_never_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("secret");
        let secret = Secret::load_or_create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(Secret::load_or_create(&path).unwrap(), secret);
        assert!(Secret::create(&path).is_err());
        assert_eq!(Secret::load(&path).unwrap(), secret);
        let words = format!("the cluster secret in {}", path.display());
        assert_eq!(Secret::load(&path).unwrap().to_string(), words);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        assert!(secret.matches(&secret.to_bytes()));
        assert!(!secret.matches(&secret.to_bytes()[1..]));
        assert!(!secret.matches(&[0; LENGTH]));
        assert_eq!(format!("{secret:?}"), "Secret(…)");
    }

    #[test]
    fn what_is_no_secret_is_refused_in_one_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("secret");
        let refusal = || Secret::load(&path).unwrap_err().to_string();
        assert!(refusal().contains("does not exist"));
        std::fs::create_dir(&path).unwrap();
        assert!(refusal().ends_with("is a directory"), "{}", refusal());
        std::fs::remove_dir(&path).unwrap();
        for bytes in [&b""[..], b"short", &[0xff; 64], &[b'g'; 64]] {
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
            assert!(refusal().contains("64 hexadecimal digits"), "{}", refusal());
        }
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        assert!(refusal().contains("mode 644"));
        assert!(!refusal().contains('\n'));
    }
}
