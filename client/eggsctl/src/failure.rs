//! Why a command did not do what it was told, and the exit code each reason has.
//!
//! A message is one line: `eggsctl: COMMAND: SUBJECT: REASON`, the reason in POSIX words.

use std::fmt;
use std::io;

/// Everything went as asked.
pub const DONE: u8 = 0;
/// The cluster, the local system or a check said no.
pub const REFUSED: u8 = 1;
/// The command line makes no sense (clap uses the same code).
pub const USAGE: u8 = 2;
/// No cluster answered.
pub const UNREACHABLE: u8 = 3;

/// The end of a command that failed.
#[derive(Debug)]
pub enum Failure {
    /// `subject` is the path (or address, or disk) that was refused.
    Refused { subject: String, reason: String },
    /// What was typed contradicts itself.
    Usage(String),
    /// What was tried, and for how long.
    Unreachable(String),
    /// Everything that failed has been printed already.
    Reported,
    /// Whoever reads our output has gone (`| head`): nothing is wrong.
    OutputClosed,
}

/// What commands return.
pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    pub fn refused(subject: impl fmt::Display, reason: impl fmt::Display) -> Failure {
        Failure::Refused { subject: subject.to_string(), reason: reason.to_string() }
    }

    /// A local file or directory that could not be read or written.
    pub fn io(subject: impl fmt::Display, error: &io::Error) -> Failure {
        Failure::refused(subject, posix_words(error))
    }

    /// Standard output could not be written.
    pub fn output(error: &io::Error) -> Failure {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Failure::OutputClosed
        } else {
            Failure::io("standard output", error)
        }
    }

    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Refused { .. } | Failure::Reported => REFUSED,
            Failure::Usage(_) => USAGE,
            Failure::Unreachable(_) => UNREACHABLE,
            Failure::OutputClosed => DONE,
        }
    }

    /// The rest of the operands would fare no better.
    pub fn is_final(&self) -> bool {
        !matches!(self, Failure::Refused { .. } | Failure::Reported)
    }

    /// Why, in words of one line, without the subject; empty when there is nothing to say.
    pub fn reason(&self) -> String {
        match self {
            Failure::Refused { reason: words, .. } | Failure::Usage(words) | Failure::Unreachable(words) => {
                one_line(words)
            }
            Failure::Reported | Failure::OutputClosed => String::new(),
        }
    }

    /// The line for standard error; `None` when there is nothing to say.
    pub fn line(&self, command: &str) -> Option<String> {
        match self {
            Failure::Refused { subject, reason } if subject.is_empty() => {
                Some(format!("eggsctl: {command}: {}", one_line(reason)))
            }
            Failure::Refused { subject, reason } => {
                Some(format!("eggsctl: {command}: {}: {}", one_line(subject), one_line(reason)))
            }
            Failure::Usage(message) | Failure::Unreachable(message) => {
                Some(format!("eggsctl: {command}: {}", one_line(message)))
            }
            Failure::Reported | Failure::OutputClosed => None,
        }
    }

    /// Prints the line, when there is one.
    pub fn print(&self, command: &str) {
        if let Some(line) = self.line(command) {
            crate::output::complain(&line);
        }
    }
}

/// `No such file or directory (os error 2)` as `no such file or directory`.
pub fn posix_words(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = text.chars();
    match letters.next() {
        // Acronyms stay as they are.
        Some(first) if letters.clone().next().is_some_and(char::is_lowercase) => {
            first.to_lowercase().chain(letters).collect()
        }
        _ => text.to_owned(),
    }
}

/// Names come from anybody: a message stays one line and cannot steer the terminal.
fn one_line(text: &str) -> String {
    text.chars().flat_map(escaped).collect()
}

fn escaped(letter: char) -> Box<dyn Iterator<Item = char>> {
    if letter.is_control() { Box::new(letter.escape_default()) } else { Box::new(std::iter::once(letter)) }
}

/// Commands with several operands go on after a refusal, as `rm` and `cat` do, and fail at the end.
#[derive(Debug)]
pub struct Operands {
    command: &'static str,
    refused: bool,
}

impl Operands {
    pub fn new(command: &'static str) -> Operands {
        Operands { command, refused: false }
    }

    /// Prints a refusal and goes on; what is final is returned.
    pub fn note(&mut self, outcome: Outcome) -> Outcome {
        match outcome {
            Err(failure) if failure.is_final() => Err(failure),
            Err(failure) => {
                failure.print(self.command);
                self.refused = true;
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    pub fn finish(self) -> Outcome {
        if self.refused { Err(Failure::Reported) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_path_and_the_reason() {
        let failure = Failure::refused("/data", "file exists");
        assert_eq!(failure.line("mkdir").as_deref(), Some("eggsctl: mkdir: /data: file exists"));
        assert_eq!(failure.exit_code(), 1);
    }

    #[test]
    fn io_errors_lose_their_number_and_capital() {
        let error = io::Error::from_raw_os_error(2);
        assert_eq!(posix_words(&error), "no such file or directory");
        assert_eq!(posix_words(&io::Error::other("IO broke")), "IO broke");
    }

    #[test]
    fn a_message_is_one_line_whatever_the_name() {
        let failure = Failure::refused("/a\nb\x1b[31m", "no");
        assert_eq!(failure.line("ls").as_deref(), Some("eggsctl: ls: /a\\nb\\u{1b}[31m: no"));
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        let failure = Failure::output(&io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(failure.exit_code(), DONE);
        assert!(failure.line("ls").is_none());
    }

    #[test]
    fn operands_after_a_refusal_are_still_done() {
        let mut operands = Operands::new("rm");
        operands.note(Err(Failure::refused("/a", "no such file or directory"))).unwrap();
        operands.note(Ok(())).unwrap();
        assert!(operands.note(Err(Failure::Unreachable("x".into()))).is_err());
        assert!(matches!(operands.finish(), Err(Failure::Reported)));
    }
}
