//! Where the data of `eggsctl up` is, and which process has it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

/// Said in the help of `up` and `down`.
pub const DEFAULT_DATA: &str = "$XDG_DATA_HOME/eggsfs, else ~/.local/share/eggsfs";

const PID_FILE: &str = "eggsctl.pid";
const PID_FILE_NEW: &str = ".eggsctl.pid.new";

/// The data directory: what was typed, else one per user, so that `down` finds what `up` started
/// whatever the working directory is. Without a home it is `./eggs-data`.
pub fn data(typed: Option<&Path>) -> io::Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let path = match typed {
        Some(typed) => typed.to_owned(),
        None => match (set("XDG_DATA_HOME").filter(|path| path.is_absolute()), set("HOME")) {
            (Some(data), _) => data.join("eggsfs"),
            (None, Some(home)) => home.join(".local/share/eggsfs"),
            (None, None) => PathBuf::from("eggs-data"),
        },
    };
    std::path::absolute(path)
}

/// Says which process runs a cluster in a directory: `eggsctl.pid` there holds its id and is locked
/// with flock(2) while it lives, however it ends. The file gets its name only with both done, so the
/// id in a locked file is that of the process that holds the lock (never a later one of that number).
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    _locked: File,
}

impl PidFile {
    /// Only for who has the data directory open.
    pub fn create(data: &Path) -> io::Result<PidFile> {
        let (new, path) = (data.join(PID_FILE_NEW), data.join(PID_FILE));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&new)?;
        file.lock()?;
        writeln!(file, "{}", std::process::id())?;
        std::fs::rename(&new, &path)?;
        Ok(PidFile { path, _locked: file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A process that runs a cluster.
#[derive(Debug)]
pub struct Running {
    pub pid: i32,
    file: File,
}

impl Running {
    /// `None` when nothing runs in the directory.
    pub fn find(data: &Path) -> io::Result<Option<Running>> {
        let mut file = match File::open(data.join(PID_FILE)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut text = String::new();
        (&mut file).take(32).read_to_string(&mut text)?;
        let pid = text.trim().parse().ok().filter(|&pid: &i32| pid > 1);
        let pid = pid.ok_or_else(|| io::Error::other(format!("{PID_FILE} holds no process id")))?;
        let running = Running { pid, file };
        Ok(if running.is_gone()? { None } else { Some(running) })
    }

    /// Whether some process has the directory open, though none of ours says so: one that is starting
    /// or stopping, or another program. Only its id, when it left one.
    pub fn unnamed(data: &Path) -> io::Result<Option<String>> {
        let mut file = match File::open(data.join("LOCK")) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                (&mut file).take(32).read_to_string(&mut text)?;
                Ok(Some(text.trim().to_owned()))
            }
        }
    }

    /// Its lock is free: it has ended.
    pub fn is_gone(&self) -> io::Result<bool> {
        match self.file.try_lock_shared() {
            Ok(()) => {
                self.file.unlock()?;
                Ok(true)
            }
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// Asks it to drain and exit.
    pub fn terminate(&self) -> io::Result<()> {
        let pid = rustix::process::Pid::from_raw(self.pid).ok_or(io::ErrorKind::InvalidData)?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_process_is_found_and_a_dead_one_is_not() {
        let data = tempfile::tempdir().unwrap();
        assert!(Running::find(data.path()).unwrap().is_none());
        let pid_file = PidFile::create(data.path()).unwrap();
        let running = Running::find(data.path()).unwrap().unwrap();
        assert_eq!(running.pid.unsigned_abs(), std::process::id());
        assert!(!running.is_gone().unwrap());
        drop(pid_file);
        assert!(running.is_gone().unwrap());
        assert!(Running::find(data.path()).unwrap().is_none());
        assert_eq!(std::fs::read_dir(data.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_left_behind_by_a_killed_process_stops_nobody() {
        let data = tempfile::tempdir().unwrap();
        std::fs::write(data.path().join(PID_FILE), format!("{}\n", std::process::id())).unwrap();
        assert!(Running::find(data.path()).unwrap().is_none());
        for nonsense in ["", "x", "0", "-1", "1"] {
            std::fs::write(data.path().join(PID_FILE), nonsense).unwrap();
            assert!(Running::find(data.path()).is_err(), "{nonsense}");
        }
        PidFile::create(data.path()).unwrap();
    }

    #[test]
    fn the_typed_directory_is_used() {
        assert_eq!(data(Some(Path::new("/x"))).unwrap(), Path::new("/x"));
        assert!(data(Some(Path::new("x"))).unwrap().is_absolute());
        assert!(data(None).unwrap().is_absolute());
    }
}
