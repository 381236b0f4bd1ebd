//! A daemon's data directory: who has it open, and what it is.
//!
//! `LOCK` is held with flock(2) while a process has the directory open, and carries its process id
//! for people. `FORMAT` says what the directory is:
//!
//! ```text
//! eggsfs 2                                    magic and format version: line 1 stays as it is for ever
//! kind shuckle
//! cluster 00000000000000000000000000000000    zeros until the directory joins a cluster
//! store 0123456789abcdef                      the id of its replicas in their groups: random, made with the directory
//! crc 89abcdef                                CRC-32 (ISO-HDLC) of the lines above
//! ```
//!
//! It is replaced as a whole (written aside, synced, renamed), so it is never half there.
//!
//! A store whose log is damaged is put aside ([`DataDirectory::put_aside`]): what it held moves to
//! `damaged-<store>/`, and the directory goes on as another store. The folder's being there under the id that
//! `FORMAT` still has is the mark of a move that was cut short: the next opening finishes it.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use eggs_proto::limits::FORMAT_VERSION;
use eggs_proto::{ClusterId, StoreId};

const LOCK: &str = "LOCK";
const FORMAT: &str = "FORMAT";
const FORMAT_NEW: &str = "FORMAT.new";
const MAGIC: &str = "eggsfs";
/// mkfs makes this one: a fresh file system counts as empty.
const LOST_AND_FOUND: &str = "lost+found";
/// All that a store holds as one: the log, and what is of no use without it.
const STORE: [&str; 5] = ["log", "log.written", "state", "state.clean", "snapshots"];
/// The oldest format this build reads: before it, a directory had no store.
const FORMAT_VERSION_MIN: u32 = 2;
const FORMAT_BYTES_MAX: u64 = 4096;
const LOCK_TRIES: u32 = 10;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// An open data directory. Dropping it lets others open it.
#[derive(Debug)]
pub struct DataDirectory {
    path: PathBuf,
    kind: String,
    cluster: Option<ClusterId>,
    store: StoreId,
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
        let format = match read_format(path).map_err(error)? {
            Some(format) => format,
            None => {
                let format = Format { kind: kind.to_owned(), cluster: None, store: new_store().map_err(io)? };
                write_format(path, &format).map_err(io)?;
                sync_parent(path).map_err(io)?;
                format
            }
        };
        let Format { kind, cluster, store } = format;
        let mut directory = DataDirectory { path: path.to_owned(), kind, cluster, store, _lock: lock };
        if directory.aside().exists() {
            directory.put_aside()?;
        }
        Ok(directory)
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

    /// The id of the replicas in a directory of this `kind`; `None` for a new or absent one. Looks only.
    ///
    /// # Errors
    /// As [`DataDirectory::peek`].
    pub fn peek_store(path: &Path, kind: &str) -> Result<Option<StoreId>, DirectoryError> {
        let error = |problem| DirectoryError { path: path.to_owned(), problem };
        if !look(path, kind).map_err(error)? {
            return Ok(None);
        }
        Ok(read_format(path).map_err(error)?.map(|format| format.store))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The cluster it belongs to; `None` for a new one.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.cluster
    }

    /// The id of the replicas in it.
    pub fn store(&self) -> StoreId {
        self.store
    }

    /// Moves all that the store holds into a folder of its own, which comes back, and makes the directory
    /// another store of the same cluster, durably. The old id is never used again (DA-6): a voter that has
    /// forgotten what it promised would let two leaders be elected. Nothing may have the files open.
    ///
    /// # Errors
    /// When something cannot be moved or written. The next opening, or call, goes on where this one ended.
    pub fn put_aside(&mut self) -> Result<PathBuf, DirectoryError> {
        let (aside, path) = (self.aside(), self.path.clone());
        let io = |source| DirectoryError { path: path.clone(), problem: Problem::Io(source) };
        std::fs::create_dir_all(&aside).map_err(io)?;
        // From here on the next opening would finish it.
        sync(&self.path).map_err(io)?;
        for name in STORE {
            match std::fs::rename(self.path.join(name), aside.join(name)) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(io(error)),
                _ => {}
            }
        }
        sync(&aside).map_err(io)?;
        sync(&self.path).map_err(io)?;
        // Only now: an id that is new while the old log is still in place would vote with it.
        let store = new_store().map_err(io)?;
        let format = Format { kind: self.kind.clone(), cluster: self.cluster, store };
        write_format(&self.path, &format).map_err(io)?;
        self.store = store;
        Ok(aside)
    }

    fn aside(&self) -> PathBuf {
        self.path.join(format!("damaged-{:016x}", self.store.0))
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
                let (kind, store) = (self.kind.clone(), self.store);
                write_format(&self.path, &Format { kind, cluster: Some(cluster), store })
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
    store: StoreId,
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

fn encode(format: &Format) -> String {
    let Format { kind, cluster, store } = format;
    let cluster = cluster.unwrap_or(ClusterId([0; 16]));
    let body = format!("{MAGIC} {FORMAT_VERSION}\nkind {kind}\ncluster {cluster}\nstore {:016x}\n", store.0);
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
    if version < FORMAT_VERSION_MIN {
        return Err(Problem::OlderFormat { version });
    }
    let mut field = |name: &str| {
        lines.next().and_then(|line| line.strip_prefix(name)?.strip_prefix(' ')).ok_or(Problem::Damaged)
    };
    let (kind, cluster, store, crc) = (field("kind")?, field("cluster")?, field("store")?, field("crc")?);
    let body = text.rfind("crc ").and_then(|at| text.get(..at)).ok_or(Problem::Damaged)?;
    let expected = crc32fast::hash(body.as_bytes());
    if u32::from_str_radix(crc, 16) != Ok(expected) {
        return Err(Problem::Damaged);
    }
    let unclaimed = !cluster.is_empty() && cluster.bytes().all(|byte| byte == b'0');
    let cluster = if unclaimed { None } else { Some(cluster.parse().map_err(|_| Problem::Damaged)?) };
    let store = u64::from_str_radix(store, 16).ok().filter(|&store| store != 0).ok_or(Problem::Damaged)?;
    Ok(Format { kind: kind.to_owned(), cluster, store: StoreId(store) })
}

fn write_format(directory: &Path, format: &Format) -> io::Result<()> {
    let new = directory.join(FORMAT_NEW);
    let mut file = File::create(&new)?;
    file.write_all(encode(format).as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, directory.join(FORMAT))?;
    sync(directory)
}

fn new_store() -> io::Result<StoreId> {
    let id = getrandom::u64().map_err(|error| io::Error::other(error.to_string()))?;
    Ok(StoreId(id.max(1)))
}

/// Makes what was renamed in a directory durable.
fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Makes the entry of `path` in the directory above it durable.
pub(crate) fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    sync(parent)
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
    /// A build that is too old wrote it.
    OlderFormat {
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
            Problem::OlderFormat { version } => write!(
                f,
                "data directory {path} has format {version}, made by a build before replication: \
                 this build reads format {FORMAT_VERSION} only; choose another directory"
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

    fn format(kind: &str) -> Format {
        Format { kind: kind.to_owned(), cluster: Some(CLUSTER), store: StoreId(0x0a_0b0c) }
    }

    #[test]
    fn a_new_directory_is_made_claimed_and_found_again() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        let mut directory = DataDirectory::open(&path, "shard").unwrap();
        assert_eq!(directory.cluster(), None);
        directory.claim(CLUSTER).unwrap();
        directory.claim(CLUSTER).unwrap();
        let store = directory.store();
        drop(directory);
        let mut directory = DataDirectory::open(&path, "shard").unwrap();
        assert_eq!((directory.cluster(), directory.store()), (Some(CLUSTER), store));
        assert_ne!(DataDirectory::open(&root.path().join("c"), "shard").unwrap().store(), store);
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
        let newer = encode(&format("shard")).replacen("eggsfs 2", "eggsfs 3", 1);
        let older = encode(&format("shard")).replacen("eggsfs 2", "eggsfs 1", 1);
        let damaged = encode(&format("shard")).replacen("07", "17", 1);
        let other_kind = encode(&format("crossdir"));
        for (name, contents) in [
            ("holiday.jpg", "x"),
            (FORMAT, "disk format of another program"),
            (FORMAT, ""),
            (FORMAT, "eggsfs"),
            (FORMAT, &newer),
            (FORMAT, &older),
            (FORMAT, &damaged),
            (FORMAT, &other_kind),
        ] {
            std::fs::write(path.join(name), contents).unwrap();
            let before = files(path);
            let problem = problem(path, "shard");
            assert_eq!(files(path), before, "{problem:?}");
            let expected = match (name, contents) {
                ("holiday.jpg", _) => matches!(problem, Problem::Foreign { .. }),
                (_, text) if text == newer => matches!(problem, Problem::NewerFormat { version: 3 }),
                (_, text) if text == older => matches!(problem, Problem::OlderFormat { version: 1 }),
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
        let text = encode(&format("shuckle"));
        assert_eq!(
            text,
            "eggsfs 2\nkind shuckle\ncluster 07070707070707070707070707070707\nstore 00000000000a0b0c\ncrc cb69a971\n"
        );
        assert_eq!(decode(text.as_bytes()).unwrap(), format("shuckle"));
        for length in 0..text.len() - 1 {
            assert!(decode(&text.as_bytes()[..length]).is_err(), "{length}");
        }
    }
    fn fill(path: &Path) {
        for name in ["log", "state", "snapshots"] {
            std::fs::create_dir_all(path.join(name)).unwrap();
            std::fs::write(path.join(name).join("file"), name).unwrap();
        }
        std::fs::write(path.join("secret"), "not the store's").unwrap();
    }

    #[test]
    fn a_store_put_aside_is_whole_in_its_folder_and_another_takes_its_place() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        let mut directory = DataDirectory::open(path, "shard").unwrap();
        directory.claim(CLUSTER).unwrap();
        fill(path);
        let old = directory.store();
        let aside = directory.put_aside().unwrap();
        assert_eq!(aside, path.join(format!("damaged-{:016x}", old.0)));
        for name in ["log", "state", "snapshots"] {
            assert_eq!(std::fs::read(aside.join(name).join("file")).unwrap(), name.as_bytes());
            assert!(!path.join(name).exists());
        }
        assert!(path.join("secret").exists());
        let new = directory.store();
        assert_ne!(new, old);
        drop(directory);
        let directory = DataDirectory::open(path, "shard").unwrap();
        assert_eq!((directory.cluster(), directory.store()), (Some(CLUSTER), new));
    }

    /// DA-6: wherever the move was cut short, the next opening ends with all of the old store aside and
    /// another id; never with the old id and less than all of its files.
    #[test]
    fn a_move_that_was_cut_short_is_finished() {
        for moved in 0..=STORE.len() {
            let root = tempfile::tempdir().unwrap();
            let path = root.path();
            let directory = DataDirectory::open(path, "shard").unwrap();
            let old = directory.store();
            drop(directory);
            fill(path);
            let aside = path.join(format!("damaged-{:016x}", old.0));
            std::fs::create_dir(&aside).unwrap();
            for name in STORE.iter().take(moved).filter(|name| path.join(name).exists()) {
                std::fs::rename(path.join(name), aside.join(name)).unwrap();
            }
            let directory = DataDirectory::open(path, "shard").unwrap();
            assert_ne!(directory.store(), old, "{moved}");
            for name in ["log", "state", "snapshots"] {
                assert!(aside.join(name).join("file").exists() && !path.join(name).exists(), "{moved}");
            }
        }
    }
}
