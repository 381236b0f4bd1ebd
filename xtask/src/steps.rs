//! Running other programs as named, timed steps.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The top of the checkout. `cargo run` says where it is: a target folder used by several checkouts may hold a
/// program another one built.
pub fn root() -> PathBuf {
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&manifest).parent().unwrap_or(Path::new(".")).to_owned()
}

/// `cargo`, the one that runs us, at the top of the checkout.
pub fn cargo(arguments: &[&str]) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(program);
    command.args(arguments).current_dir(root()).stdin(Stdio::null());
    command
}

/// Whether `cargo NAME` exists.
pub fn cargo_has(name: &str) -> bool {
    let mut command = cargo(&[name, "--version"]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Runs a program to its end; a failure is an error that says what was run.
pub fn run(mut command: Command) -> Result<()> {
    let shown = shown(&command);
    let status = command.status().with_context(|| format!("cannot run {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

fn shown(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Steps that are all tried, whatever becomes of the ones before: one run shows everything that is wrong.
#[derive(Debug, Default)]
pub struct Steps {
    done: Vec<Done>,
}

#[derive(Debug)]
struct Done {
    name: &'static str,
    took: Duration,
    error: Option<anyhow::Error>,
}

impl Steps {
    pub fn step(&mut self, name: &'static str, work: impl FnOnce() -> Result<()>) {
        eprintln!("==> {name}");
        let began = Instant::now();
        let error = work().err();
        let took = began.elapsed();
        match &error {
            None => eprintln!("<== {name}: ok, {:.1} s\n", took.as_secs_f64()),
            Some(error) => eprintln!("<== {name}: FAILED, {:.1} s: {error:#}\n", took.as_secs_f64()),
        }
        self.done.push(Done { name, took, error });
    }

    /// Prints what became of each step; an error when one failed.
    pub fn finish(self) -> Result<()> {
        for done in &self.done {
            let word = if done.error.is_some() { "FAILED" } else { "ok" };
            eprintln!("{:<12} {word:<7} {:>7.1} s", done.name, done.took.as_secs_f64());
        }
        let failed: Vec<&str> = self.done.iter().filter(|d| d.error.is_some()).map(|d| d.name).collect();
        if !failed.is_empty() {
            bail!("failed: {}", failed.join(", "));
        }
        Ok(())
    }
}
