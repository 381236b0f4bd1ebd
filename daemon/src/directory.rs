//! A daemon's data directory: who has it open, and what it is.
//!
//! `LOCK` is held with flock(2) while a process has the directory open, and carries its process id
//! for people. `FORMAT` says what the directory is:
//!
//! ```text
//! eggsfs 1                                    magic and format version: line 1 stays as it is for ever
//! kind shuckle
//! cluster 00000000000000000000000000000000    zeros until the directory joins a cluster
//! crc 89abcdef                                CRC-32 (ISO-HDLC) of the lines above
//! ```
//!
//! It is replaced as a whole (written aside, synced, renamed), so it is never half there.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use eggs_proto::ClusterId;
use eggs_proto::limits::FORMAT_VERSION;

const LOCK: &str = "LOCK";
const FORMAT: &str = "FORMAT";
const FORMAT_NEW: &str = "FORMAT.new";
const MAGIC: &str = "eggsfs";
/// mkfs makes this one: a fresh file system counts as empty.
const LOST_AND_FOUND: &str = "lost+found";
const FORMAT_BYTES_MAX: u64 = 4096;
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// An open data directory. Dropping it lets others open it.
#[derive(Debug)]
pub struct DataDirectory {
    path: PathBuf,
    kind: String,
    cluster: Option<ClusterId>,
    _lock: Lock,
}

impl DataDirectory {
    /// Opens the directory for a service of this `kind` (one word), making it when it is absent or
    /// empty.
    ///
    /// # Errors
    /// See [`Problem`]; nothing in a refused directory is changed (DA-1).
    pub fn open(path: &Path, kind: &str) -> Result<DataDirectory, DirectoryError> {
        debug_assert!(!kind.is_empty() && kind.bytes().all(|byte| byte.is_ascii_lowercase()), "{kind}");
        let error = |problem| DirectoryError { path: path.to_owned(), problem };
        let io = |source| error(Problem::Io(source));
        // Looked at before the lock too: the lock file of a foreign folder must not appear.
        if !look(path, kind).map_err(error)? {
            std::fs::create_dir_all(path).map_err(io)?;
        }
        let lock = Lock::take(path)?;
        look(path, kind).map_err(error)?;
        let cluster = match read_format(path).map_err(error)? {
            Some(format) => format.cluster,
            None => {
                write_format(path, kind, None).map_err(io)?;
                sync_parent(path).map_err(io)?;
                None
            }
        };
        Ok(DataDirectory { path: path.to_owned(), kind: kind.to_owned(), cluster, _lock: lock })
    }

    /// The cluster a directory of this `kind` belongs to; `None` for a new or absent one. Looks only:
    /// takes no lock, changes nothing.
    ///
    /// # Errors
    /// As [`DataDirectory::open`], but for its being in use.
    pub fn peek(path: &Path, kind: &str) -> Result<Option<ClusterId>, DirectoryError> {
        let error = |problem| DirectoryError { path: path.to_owned(), problem };
        if !look(path, kind).map_err(error)? {
            return Ok(None);
        }
        Ok(read_format(path).map_err(error)?.and_then(|format| format.cluster))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cluster it belongs to; `None` for a new one.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.cluster
    }

    /// Makes the directory one of `cluster`, durably; nothing to do when it is one already.
    ///
    /// # Errors
    /// When it belongs to another cluster, or cannot be written.
    pub fn claim(&mut self, cluster: ClusterId) -> Result<(), DirectoryError> {
        let error = |problem| DirectoryError { path: self.path.clone(), problem };
        match self.cluster {
            Some(own) if own == cluster => Ok(()),
            Some(own) => Err(error(Problem::AnotherCluster { own, wanted: cluster })),
            None => {
                write_format(&self.path, &self.kind, Some(cluster))
                    .map_err(|source| error(Problem::Io(source)))?;
                self.cluster = Some(cluster);
                Ok(())
            }
        }
    }
}

/// The right to use a directory, held until dropped or the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Locks `directory` through its `LOCK` file, which is made when absent.
    ///
    /// # Errors
    /// [`Problem::InUse`] when another process (or part of this one) holds it.
    pub fn take(directory: &Path) -> Result<Lock, DirectoryError> {
        let error = |problem| DirectoryError { path: directory.to_owned(), problem };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(directory.join(LOCK))
            .map_err(|source| error(Problem::Io(source)))?;
        let mut locked = file.try_lock();
        for _ in 0..LOCK_TRIES {
            // A process that was killed may take a moment to be gone.
            if !matches!(locked, Err(TryLockError::WouldBlock)) {
                break;
            }
            std::thread::sleep(LOCK_PAUSE);
            locked = file.try_lock();
        }
        match locked {
            Ok(()) => {}
            Err(TryLockError::Error(source)) => return Err(error(Problem::Io(source))),
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                let _ = (&mut file).take(32).read_to_string(&mut text);
                return Err(error(Problem::InUse { process: text.trim().parse().ok() }));
            }
        }
        // For people only: a failure to write it harms nothing.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Lock { _file: file })
    }
}

/// Whether the directory exists (and may be used); changes nothing.
fn look(path: &Path, kind: &str) -> Result<bool, Problem> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) if error.kind() == ErrorKind::NotADirectory => return Err(Problem::NotADirectory),
        Err(error) => return Err(Problem::Io(error)),
    };
    match read_format(path)? {
        Some(format) if format.kind != kind => {
            Err(Problem::AnotherKind { own: format.kind, wanted: kind.to_owned() })
        }
        Some(_) => Ok(true),
        None => {
            for entry in entries {
                let name = entry.map_err(Problem::Io)?.file_name();
                if ![LOCK, FORMAT_NEW, LOST_AND_FOUND].iter().any(|known| name == **known) {
                    return Err(Problem::Foreign { example: name.to_string_lossy().into_owned() });
                }
            }
            Ok(true)
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Format {
    kind: String,
    cluster: Option<ClusterId>,
}

fn read_format(directory: &Path) -> Result<Option<Format>, Problem> {
    let file = match File::open(directory.join(FORMAT)) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Problem::Io(error)),
    };
    let mut bytes = Vec::new();
    file.take(FORMAT_BYTES_MAX).read_to_end(&mut bytes).map_err(Problem::Io)?;
    decode(&bytes).map(Some)
}

fn encode(kind: &str, cluster: Option<ClusterId>) -> String {
    let cluster = cluster.unwrap_or(ClusterId([0; 16]));
    let body = format!("{MAGIC} {FORMAT_VERSION}\nkind {kind}\ncluster {cluster}\n");
    let crc = crc32fast::hash(body.as_bytes());
    format!("{body}crc {crc:08x}\n")
}

fn decode(bytes: &[u8]) -> Result<Format, Problem> {
    let text = std::str::from_utf8(bytes).map_err(|_| Problem::NotOurs)?;
    let mut lines = text.lines();
    let version = lines.next().and_then(|line| line.strip_prefix(MAGIC)).ok_or(Problem::NotOurs)?;
    let version: u32 = version.trim_start().parse().map_err(|_| Problem::NotOurs)?;
    if version > FORMAT_VERSION {
        return Err(Problem::NewerFormat { version });
    }
    let mut field = |name: &str| {
        lines.next().and_then(|line| line.strip_prefix(name)?.strip_prefix(' ')).ok_or(Problem::Damaged)
    };
    let (kind, cluster, crc) = (field("kind")?, field("cluster")?, field("crc")?);
    let body = text.rfind("crc ").and_then(|at| text.get(..at)).ok_or(Problem::Damaged)?;
    let expected = crc32fast::hash(body.as_bytes());
    if u32::from_str_radix(crc, 16) != Ok(expected) {
        return Err(Problem::Damaged);
    }
    let unclaimed = !cluster.is_empty() && cluster.bytes().all(|byte| byte == b'0');
    let cluster = if unclaimed { None } else { Some(cluster.parse().map_err(|_| Problem::Damaged)?) };
    Ok(Format { kind: kind.to_owned(), cluster })
}

fn write_format(directory: &Path, kind: &str, cluster: Option<ClusterId>) -> io::Result<()> {
    let new = directory.join(FORMAT_NEW);
    let mut file = File::create(&new)?;
    file.write_all(encode(kind, cluster).as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, directory.join(FORMAT))?;
    File::open(directory)?.sync_all()
}

/// Makes the entry of `path` in the directory above it durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)?.sync_all()
}

/// A data directory was refused: one line that names it and says what to do.
#[derive(Debug)]
pub struct DirectoryError {
    pub path: PathBuf,
    pub problem: Problem,
}

/// Why a directory was refused.
#[derive(Debug)]
pub enum Problem {
    /// Another process has it open.
    InUse {
        process: Option<u32>,
    },
    /// A newer build wrote it.
    NewerFormat {
        version: u32,
    },
    /// It is the directory of another kind of service.
    AnotherKind {
        own: String,
        wanted: String,
    },
    AnotherCluster {
        own: ClusterId,
        wanted: ClusterId,
    },
    /// It has files in it and no `FORMAT`.
    Foreign {
        example: String,
    },
    /// Its `FORMAT` is somebody else's.
    NotOurs,
    /// Its `FORMAT` does not check.
    Damaged,
    NotADirectory,
    Io(io::Error),
}

impl fmt::Display for DirectoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.problem {
            Problem::InUse { process: Some(process) } => {
                write!(
                    f,
                    "data directory {path} is in use by process {process}: stop it first, or choose another directory"
                )
            }
            Problem::InUse { process: None } => {
                write!(
                    f,
                    "data directory {path} is in use by another process: stop it first, or choose another directory"
                )
            }
            Problem::NewerFormat { version } => write!(
                f,
                "data directory {path} has format {version}, this build reads up to {FORMAT_VERSION}: use a newer build"
            ),
            Problem::AnotherKind { own, wanted } => {
                write!(f, "data directory {path} belongs to {own}, not to {wanted}: choose another directory")
            }
            Problem::AnotherCluster { own, wanted } => write!(
                f,
                "data directory {path} belongs to cluster {own}, not to {wanted}: choose another directory or another shuckle"
            ),
            Problem::Foreign { example } => write!(
                f,
                "directory {path} is not empty and not a data directory (it has '{example}'): choose an empty one"
            ),
            Problem::NotOurs => {
                write!(f, "directory {path} has a FORMAT file of something else: choose an empty directory")
            }
            Problem::Damaged => {
                write!(f, "data directory {path}: its FORMAT file is damaged, restore it from a backup")
            }
            Problem::NotADirectory => write!(f, "{path} is not a directory: choose another data directory"),
            Problem::Io(error) => write!(f, "cannot use data directory {path}: {error}"),
        }
    }
}

impl std::error::Error for DirectoryError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(path: &Path, kind: &str) -> Problem {
        let error = DataDirectory::open(path, kind).unwrap_err();
        let line = error.to_string();
        assert!(line.contains(&path.display().to_string()) && !line.contains('\n'), "{line}");
        error.problem
    }

    fn files(path: &Path) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<_> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| {
                (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap_or_default())
            })
            .collect();
        files.sort();
        files
    }

    const CLUSTER: ClusterId = ClusterId([7; 16]);

    #[test]
    fn a_new_directory_is_made_claimed_and_found_again() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        let mut directory = DataDirectory::open(&path, "shard").unwrap();
        assert_eq!(directory.cluster(), None);
        directory.claim(CLUSTER).unwrap();
        directory.claim(CLUSTER).unwrap();
        drop(directory);
        let mut directory = DataDirectory::open(&path, "shard").unwrap();
        assert_eq!(directory.cluster(), Some(CLUSTER));
        let error = directory.claim(ClusterId([8; 16])).unwrap_err();
        assert!(matches!(error.problem, Problem::AnotherCluster { own: CLUSTER, .. }));
    }

    #[test]
    fn only_one_has_it_open() {
        let root = tempfile::tempdir().unwrap();
        let open = DataDirectory::open(root.path(), "shard").unwrap();
        let process = Some(std::process::id());
        assert!(matches!(problem(root.path(), "shard"), Problem::InUse { process: p } if p == process));
        drop(open);
        DataDirectory::open(root.path(), "shard").unwrap();
    }

    #[test]
    fn what_is_not_ours_is_refused_untouched() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        let newer = encode("shard", Some(CLUSTER)).replacen("eggsfs 1", "eggsfs 2", 1);
        let damaged = encode("shard", Some(CLUSTER)).replacen("07", "17", 1);
        let other_kind = encode("crossdir", None);
        for (name, contents) in [
            ("holiday.jpg", "x"),
            (FORMAT, "disk format of another program"),
            (FORMAT, ""),
            (FORMAT, "eggsfs"),
            (FORMAT, &newer),
            (FORMAT, &damaged),
            (FORMAT, &other_kind),
        ] {
            std::fs::write(path.join(name), contents).unwrap();
            let before = files(path);
            let problem = problem(path, "shard");
            assert_eq!(files(path), before, "{problem:?}");
            let expected = match (name, contents) {
                ("holiday.jpg", _) => matches!(problem, Problem::Foreign { .. }),
                (_, text) if text == newer => matches!(problem, Problem::NewerFormat { version: 2 }),
                (_, text) if text == damaged => matches!(problem, Problem::Damaged),
                (_, text) if text == other_kind => matches!(problem, Problem::AnotherKind { .. }),
                _ => matches!(problem, Problem::NotOurs),
            };
            assert!(expected, "{name} {contents:?}: {problem:?}");
            std::fs::remove_file(path.join(name)).unwrap();
        }
        let file = path.join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(matches!(problem(&file, "shard"), Problem::NotADirectory));
    }

    #[test]
    fn a_crash_while_it_was_made_is_no_obstacle() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join(LOCK), "12").unwrap();
        std::fs::write(root.path().join(FORMAT_NEW), "eggs").unwrap();
        std::fs::create_dir(root.path().join(LOST_AND_FOUND)).unwrap();
        DataDirectory::open(root.path(), "shard").unwrap();
    }

    #[test]
    fn golden_format_file() {
        let text = encode("shuckle", Some(CLUSTER));
        assert_eq!(text, "eggsfs 1\nkind shuckle\ncluster 07070707070707070707070707070707\ncrc 4ec6baca\n");
        assert_eq!(
            decode(text.as_bytes()).unwrap(),
            Format { kind: "shuckle".to_owned(), cluster: Some(CLUSTER) }
        );
        for length in 0..text.len() - 1 {
            assert!(decode(&text.as_bytes()[..length]).is_err(), "{length}");
        }
    }
}
