//! What commands print: names, tables, JSON documents; and the standard output they go to.
//!
//! Standard output may be a terminal, a file or a pipe whose reader leaves early. Names are any bytes:
//! a terminal gets them escaped, everything else gets them raw; in JSON `name` is text and, when the
//! bytes are not UTF-8, `name_hex` holds them exactly.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, BufWriter, IsTerminal, Stdout, Write};
use std::sync::Mutex;

use eggs_proto::{InodeType, Time};
pub use eggs_shuckle_core::repairs::bytes as size;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::failure::{Failure, Outcome};
use crate::paths::escape;
use crate::times;

/// When output is coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    Always,
    Never,
}

/// Standard output.
#[derive(Debug)]
pub struct Out {
    writer: BufWriter<Stdout>,
    terminal: bool,
    color: bool,
}

impl Out {
    pub fn new(color: Color) -> Out {
        let terminal = io::stdout().is_terminal();
        let color = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        };
        Out { writer: BufWriter::with_capacity(64 << 10, io::stdout()), terminal, color }
    }

    /// Raw bytes: file contents.
    pub fn bytes(&mut self, bytes: &[u8]) -> Outcome {
        self.writer.write_all(bytes).map_err(|error| Failure::output(&error))
    }

    /// A line of text.
    pub fn line(&mut self, text: impl fmt::Display) -> Outcome {
        writeln!(self.writer, "{text}").map_err(|error| Failure::output(&error))
    }

    /// A line that ends with a name.
    pub fn named_line(
        &mut self,
        before: &str,
        name: &[u8],
        kind: Option<InodeType>,
        after: &[u8],
    ) -> Outcome {
        self.bytes(before.as_bytes())?;
        let name = self.shown(name).into_owned();
        match kind.filter(|_| self.color).and_then(color_of) {
            Some(color) => {
                self.bytes(color.as_bytes())?;
                self.bytes(&name)?;
                self.bytes(b"\x1b[0m")?;
            }
            None => self.bytes(&name)?,
        }
        let after = self.shown(after).into_owned();
        self.bytes(&after)?;
        self.bytes(b"\n")
    }

    /// One document.
    pub fn json(&mut self, document: &impl Serialize) -> Outcome {
        serde_json::to_writer_pretty(&mut self.writer, document)
            .map_err(|error| Failure::output(&io::Error::from(error)))?;
        self.bytes(b"\n")
    }

    /// Nothing printed stays behind.
    pub fn finish(mut self) -> Outcome {
        self.flush()
    }

    pub fn flush(&mut self) -> Outcome {
        self.writer.flush().map_err(|error| Failure::output(&error))
    }

    /// Names for whoever reads: escaped for people, as they are for programs.
    fn shown<'a>(&self, name: &'a [u8]) -> Cow<'a, [u8]> {
        if self.terminal { Cow::Owned(escape(name).into_bytes()) } else { Cow::Borrowed(name) }
    }
}

fn color_of(kind: InodeType) -> Option<&'static str> {
    match kind {
        InodeType::Directory => Some("\x1b[1;34m"),
        InodeType::Symlink => Some("\x1b[36m"),
        InodeType::File => None,
    }
}

/// The progress bar on the screen: lines on standard error go above it.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

pub fn set_bar(bar: ProgressBar) {
    *BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(bar);
}

/// Wipes the bar off the screen.
pub fn take_bar() {
    if let Some(bar) = BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
        bar.finish_and_clear();
    }
}

/// A line on standard error. Nobody can be told when that fails.
pub fn complain(line: &str) {
    let write = || drop(writeln!(io::stderr().lock(), "{line}"));
    match &*BAR.lock().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// A name in JSON: text, and the bytes when the text cannot say them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JsonName {
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name_hex: Option<String>,
}

impl JsonName {
    pub fn of(name: &[u8]) -> JsonName {
        match std::str::from_utf8(name) {
            Ok(text) => JsonName { name: text.to_owned(), name_hex: None },
            Err(_) => {
                JsonName { name: String::from_utf8_lossy(name).into_owned(), name_hex: Some(hex(name)) }
            }
        }
    }
}

/// A path in JSON, as [`JsonName`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JsonPath {
    pub path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_hex: Option<String>,
}

impl JsonPath {
    pub fn of(path: &[u8]) -> JsonPath {
        let JsonName { name, name_hex } = JsonName::of(path);
        JsonPath { path: name, path_hex: name_hex }
    }
}

/// RFC 3339 for JSON; nothing for a time that is unset.
pub fn json_time(time: Time) -> Option<String> {
    (!time.is_unset()).then(|| times::rfc3339(time))
}

/// `0644`.
pub fn octal(mode: u32) -> String {
    format!("{:04o}", mode & 0o7777)
}

pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// `drwxr-xr-x`, as `ls` has it.
pub fn permissions(kind: Option<InodeType>, mode: u32) -> String {
    let kind = match kind {
        Some(InodeType::Directory) => 'd',
        Some(InodeType::Symlink) => 'l',
        Some(InodeType::File) => '-',
        None => '?',
    };
    let mut text = String::with_capacity(10);
    text.push(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (false, false) => '-',
            (false, true) => 'x',
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
        });
    }
    text
}

/// `37 %`; `-` of nothing.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".to_owned();
    }
    format!("{} %", u128::from(part) * 100 / u128::from(whole))
}

/// A table without frames: columns two spaces apart, numbers to the right.
pub fn table(header: &[&str], right: &[usize]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_content_arrangement(comfy_table::ContentArrangement::Disabled);
    table.set_header(header);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if right.contains(&index) {
            column.set_cell_alignment(comfy_table::CellAlignment::Right);
        }
    }
    table
}

/// The lines of a table without the blanks at their ends.
pub fn table_text(table: &comfy_table::Table) -> String {
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_read_as_in_ls() {
        assert_eq!(permissions(Some(InodeType::Directory), 0o755), "drwxr-xr-x");
        assert_eq!(permissions(Some(InodeType::File), 0o4751), "-rwsr-x--x");
        assert_eq!(permissions(Some(InodeType::File), 0o2640), "-rw-r-S---");
        assert_eq!(permissions(Some(InodeType::Directory), 0o1777), "drwxrwxrwt");
        assert_eq!(permissions(Some(InodeType::Symlink), 0o777), "lrwxrwxrwx");
    }

    #[test]
    fn json_names_lose_nothing() {
        assert_eq!(JsonName::of(b"a"), JsonName { name: "a".into(), name_hex: None });
        let name = JsonName::of(b"a\xff");
        assert_eq!(name.name_hex.as_deref(), Some("61ff"));
        assert_eq!(name.name, "a\u{fffd}");
    }

    #[test]
    fn sizes_and_shares() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(percent(1, 0), "-");
        assert_eq!(percent(u64::MAX, u64::MAX), "100 %");
        assert_eq!(octal(0o100_644), "0644");
    }

    #[test]
    fn tables_have_no_frames() {
        let mut table = table(&["NAME", "SIZE"], &[1]);
        table.add_row(["a", "1"]);
        table.add_row(["longer", "1000"]);
        assert_eq!(table_text(&table), "NAME    SIZE\na          1\nlonger  1000");
    }
}
