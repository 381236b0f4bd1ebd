//! Programs that run to their end, `eggsctl` above all.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io::{Read, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::binary;

/// No single step of a test takes this long on any machine.
pub const TOO_LONG: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// A program without the settings of whoever runs the tests.
pub fn program(name: &str) -> Command {
    let mut command = Command::new(binary(name));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("EGGS") {
            command.env_remove(name);
        }
    }
    command.env_remove("XDG_DATA_HOME").env_remove("NOTIFY_SOCKET").env("TZ", "UTC");
    command
}

/// How a program ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub command: String,
    /// None: a signal.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

/// Runs a program to its end; its standard input is `input`.
///
/// # Panics
/// When it cannot be run, or takes longer than `limit`.
pub fn run(command: &mut Command, input: &[u8], limit: Duration) -> Outcome {
    let shown = format!("{command:?}");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{shown}: {error}"));
    let mut stdin = child.stdin.take().expect("stdin");
    let input = input.to_owned();
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let stdout = reader(child.stdout.take().expect("stdout"));
    let stderr = reader(child.stderr.take().expect("stderr"));
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().expect("wait for a child") {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{shown}: not done after {limit:?}");
        }
        std::thread::sleep(LOOK_INTERVAL);
    };
    writer.join().expect("writer");
    Outcome {
        command: shown,
        code: status.code(),
        stdout: stdout.join().expect("reader"),
        stderr: String::from_utf8_lossy(&stderr.join().expect("reader")).into_owned(),
    }
}

fn reader(mut stream: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        bytes
    })
}

impl Outcome {
    /// # Panics
    /// When the exit code is another one.
    #[must_use]
    pub fn code(self, code: i32) -> Outcome {
        assert_eq!(
            self.code,
            Some(code),
            "{}\nstdout: {}\nstderr: {}",
            self.command,
            self.text(),
            self.stderr
        );
        self
    }

    /// Exit code 0, and nothing on standard error.
    ///
    /// # Panics
    /// When not.
    pub fn ok(self) -> Outcome {
        let this = self.code(0);
        assert_eq!(this.stderr, "", "{}", this.command);
        this
    }

    /// Exit code 1 and exactly one line on standard error, with all of `words` in it.
    ///
    /// # Panics
    /// When not.
    pub fn refused(self, words: &[&str]) -> Outcome {
        let this = self.code(1);
        this.says(words);
        this
    }

    /// One line on standard error, with all of `words` in it.
    ///
    /// # Panics
    /// When not.
    pub fn says(&self, words: &[&str]) {
        assert_eq!(self.stderr.lines().count(), 1, "{}: {}", self.command, self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "{}: no '{word}' in: {}", self.command, self.stderr);
        }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// # Panics
    /// When the output is no JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("{}: {error} in: {}", self.command, self.text()))
    }
}

/// `eggsctl` and the cluster it talks to.
#[derive(Debug, Clone)]
pub struct Ctl {
    address: String,
    folder: PathBuf,
    secret: Option<PathBuf>,
}

impl Ctl {
    pub fn new(address: impl Display) -> Ctl {
        Ctl { address: address.to_string(), folder: std::env::temp_dir(), secret: None }
    }

    /// The same, for commands that need the cluster's secret.
    #[must_use]
    pub fn with_secret(&self, file: impl Into<PathBuf>) -> Ctl {
        Ctl { secret: Some(file.into()), ..self.clone() }
    }

    /// The same, with another working directory.
    #[must_use]
    pub fn in_folder(&self, folder: impl Into<PathBuf>) -> Ctl {
        Ctl { folder: folder.into(), ..self.clone() }
    }

    pub fn run(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Outcome {
        self.run_with(arguments, b"")
    }

    /// With bytes on its standard input.
    pub fn run_with(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>, input: &[u8]) -> Outcome {
        let mut command = program("eggsctl");
        command.current_dir(&self.folder).env("EGGS_SHUCKLE", &self.address).args(arguments);
        if let Some(secret) = &self.secret {
            command.env("EGGS_SECRET_FILE", secret);
        }
        run(&mut command, input, TOO_LONG)
    }

    /// Words separated by blanks; exit code 0.
    pub fn ok(&self, words: &str) -> Outcome {
        self.run(words.split_whitespace()).ok()
    }

    /// Words separated by blanks; exit code 1.
    pub fn refused(&self, words: &str, reasons: &[&str]) -> Outcome {
        self.run(words.split_whitespace()).refused(reasons)
    }

    /// A command with operands that are any bytes.
    pub fn with(&self, words: &str, operands: &[&OsStr]) -> Outcome {
        let words = words.split_whitespace().map(OsString::from);
        self.run(words.chain(operands.iter().map(OsString::from)))
    }

    /// The names in a directory.
    pub fn names(&self, directory: &str) -> Vec<String> {
        self.run(["ls", directory]).ok().text().lines().map(str::to_owned).collect()
    }

    /// # Panics
    /// When the check finds something.
    pub fn assert_clean(&self) -> serde_json::Value {
        let report = self.ok("fsck --json").json();
        assert_eq!(report["clean"], true, "{report}");
        assert_eq!(report["shards_checked"], 256, "{report}");
        report
    }
}

/// Looks until `look` has an answer.
///
/// # Panics
/// When it has none within `limit`.
pub fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
