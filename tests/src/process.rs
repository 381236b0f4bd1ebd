//! A process that ends with its test, and what it says.

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How often what cannot be waited for is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// A running program. Killed with SIGKILL when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    said: Arc<Said>,
    status: Option<ExitStatus>,
}

#[derive(Debug, Default)]
struct Said {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    /// Streams that have ended, of two.
    ended: usize,
}

impl Said {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(self: &Arc<Self>, stream: impl Read + Send + 'static) {
        let said = Arc::clone(self);
        std::thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                said.state().lines.push(String::from_utf8_lossy(line.trim_ascii_end()).into_owned());
                said.changed.notify_all();
                line.clear();
            }
            said.state().ended += 1;
            said.changed.notify_all();
        });
    }
}

/// The most memory a process had resident, since it began or [`forget_peak`]; `None` once it has ended.
pub fn peak_bytes(process: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    peak.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// From now on the most it has counts.
///
/// # Panics
/// When it has ended.
pub fn forget_peak(process: u32) {
    std::fs::write(format!("/proc/{process}/clear_refs"), "5").expect("a process of ours");
}

impl Process {
    /// # Panics
    /// When the program cannot be run.
    pub fn spawn(name: &str, command: &mut Command) -> Process {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
        let said = Arc::new(Said::default());
        said.listen(child.stdout.take().expect("stdout"));
        said.listen(child.stderr.take().expect("stderr"));
        Process { name: name.to_owned(), child, said, status: None }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// All it has said so far, on both streams.
    pub fn said(&self) -> String {
        self.said.state().lines.join("\n")
    }

    /// The first line that `find` takes something from.
    ///
    /// # Panics
    /// When it ends, or `limit` passes, without such a line.
    pub fn wait_for<T>(&self, what: &str, limit: Duration, find: impl Fn(&str) -> Option<T>) -> T {
        match self.try_wait_for(limit, find) {
            Some(found) => found,
            None => {
                panic!("{}: ended, or took {limit:?}, without {what}; it said:\n{}", self.name, self.said())
            }
        }
    }

    /// As [`Process::wait_for`]; `None` when it ends or the time passes without.
    pub fn try_wait_for<T>(&self, limit: Duration, find: impl Fn(&str) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + limit;
        let mut state = self.said.state();
        let mut seen = 0;
        loop {
            if let Some(found) = state.lines[seen..].iter().find_map(|line| find(line)) {
                return Some(found);
            }
            seen = state.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.ended == 2 {
                return None;
            }
            state = self.said.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.ended().is_none()
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("wait for a child");
        }
        self.status
    }

    /// # Panics
    /// When it is gone already.
    pub fn signal(&mut self, signal: Signal) {
        assert!(self.is_running(), "{} is gone; it said:\n{}", self.name, self.said());
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("process id")).expect("process id");
        kill_process(pid, signal).expect("kill");
    }

    /// SIGSTOP; returns when all its threads stand still. SIGCONT lets it go on.
    ///
    /// # Panics
    /// When they do not.
    pub fn hold(&mut self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.id());
        crate::until("all threads stand still", Duration::from_secs(20), || {
            let mut tasks = std::fs::read_dir(&tasks).expect("threads");
            let held = tasks.all(|task| {
                let stat = task.and_then(|task| std::fs::read_to_string(task.path().join("stat")));
                stat.is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T")))
            });
            held.then_some(())
        });
    }

    /// Its exit status.
    ///
    /// # Panics
    /// When it does not end within `limit`.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            assert!(Instant::now() < deadline, "{} does not end; it said:\n{}", self.name, self.said());
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// SIGKILL, without waiting for its end.
    pub fn send_kill(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
        }
    }

    /// SIGKILL; returns when it is gone.
    pub fn kill(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            self.status = self.child.wait().ok();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let said = self.said();
            let lines: Vec<&str> = said.lines().collect();
            let tail = lines[lines.len().saturating_sub(40)..].join("\n");
            println!("--- {} ({}) said:\n{tail}\n---", self.name, self.id());
        }
    }
}
