//! `ls`: directories, living and dead, now and then.
//!
//! Printed page by page: a directory of millions needs no memory here. Names come in the order of
//! their bytes, those that begin with a dot like all others.

use clap::Args;
use eggs_client::{Client, Entry, ListOptions, Listing, Resolved};
use eggs_proto::{InodeId, InodeType, Time};
use futures_util::StreamExt as _;
use jiff::tz::TimeZone;
use serde::Serialize;

use crate::cli::JsonFlag;
use crate::context::{Context, failure};
use crate::failure::{Operands, Outcome};
use crate::output::{JsonName, JsonPath, Out, json_time, octal, permissions};
use crate::paths::ClusterPath;
use crate::times;

/// Symbolic links read at the same time for `-l`.
const LINKS_AT_ONCE: usize = 16;

/// List directories
#[derive(Debug, Args)]
#[command(after_help = format!(
    "Times are {}.\n--dead prints what died: the name, and with -l when it died, when it was made, whether it was deleted \
     (`eggsctl undelete` brings it back) or not (it was moved away, or undeleted since), and the inode. The same name may have \
     died many times.",
    times::FORMS
))]
pub struct Ls {
    /// Permissions, owner, size and modification time too
    #[arg(short, long)]
    long: bool,
    /// A directory itself instead of what is in it
    #[arg(short, long, conflicts_with_all = ["recursive", "dead"])]
    directory: bool,
    /// Directories in directories too
    #[arg(short = 'R', long, conflicts_with = "dead")]
    recursive: bool,
    /// No effect: names that begin with a dot are always listed
    #[arg(short, long, hide = true)]
    all: bool,
    /// What was deleted, replaced or moved away, instead of what is there
    #[arg(long)]
    dead: bool,
    /// Only what was deleted and can be undeleted: not what was moved away, or undeleted since
    #[arg(long, requires = "dead")]
    deleted: bool,
    /// Only what died at this time or later
    #[arg(long, value_name = "TIME", requires = "dead", value_parser = times::typed)]
    since: Option<Time>,
    /// Only what died before this time
    #[arg(long, value_name = "TIME", requires = "dead", value_parser = times::typed)]
    until: Option<Time>,
    /// What was there at this time
    #[arg(long, value_name = "TIME", value_parser = times::typed)]
    at: Option<Time>,
    #[command(flatten)]
    json: JsonFlag,
    /// Directories and files
    #[arg(value_name = "PATH", default_value = "/", value_parser = ClusterPath::parser())]
    paths: Vec<ClusterPath>,
}

/// One line of output.
#[derive(Debug)]
struct Row {
    path: ClusterPath,
    name: Vec<u8>,
    entry: Entry,
    link: Option<Vec<u8>>,
}

#[derive(Debug, Serialize)]
struct JsonRow {
    #[serde(flatten)]
    name: JsonName,
    #[serde(flatten)]
    path: JsonPath,
    inode: String,
    #[serde(rename = "type")]
    kind: &'static str,
    created_at_ns: u64,
    created_at: Option<String>,
    #[serde(flatten)]
    attributes: Option<JsonAttributes>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    link: Option<JsonLink>,
    #[serde(flatten)]
    death: Option<JsonDeath>,
}

#[derive(Debug, Serialize)]
struct JsonAttributes {
    size: u64,
    mtime_ns: u64,
    mtime: Option<String>,
    mode: String,
    uid: u32,
    gid: u32,
}

#[derive(Debug, Serialize)]
struct JsonDeath {
    died_at_ns: u64,
    died_at: Option<String>,
    owned: bool,
}

/// What a symbolic link says.
#[derive(Debug, Serialize)]
pub struct JsonLink {
    pub target: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_hex: Option<String>,
}

impl JsonLink {
    pub fn of(target: &[u8]) -> JsonLink {
        let JsonName { name, name_hex } = JsonName::of(target);
        JsonLink { target: name, target_hex: name_hex }
    }
}

impl Ls {
    pub async fn run(self, context: &Context) -> Outcome {
        let client = context.client().await?;
        let mut printer = Printer { out: context.out(), ls: &self, zone: TimeZone::system(), rows: 0 };
        if self.json.json {
            printer.out.bytes(b"[")?;
        }
        let mut operands = Operands::new(context.command);
        let titled = self.recursive || self.paths.len() > 1;
        for path in &self.paths {
            let listed = self.operand(client, path, titled, &mut printer).await;
            printer.out.flush()?;
            operands.note(listed)?;
        }
        if self.json.json {
            printer.out.bytes(if printer.rows == 0 { b"]\n" } else { b"\n]\n" })?;
        }
        printer.out.finish()?;
        operands.finish()
    }

    async fn operand(
        &self,
        client: &Client,
        path: &ClusterPath,
        titled: bool,
        printer: &mut Printer<'_>,
    ) -> Outcome {
        let at = self.at.unwrap_or(Time::ZERO);
        let found = client.resolve_at(path.as_bytes(), at).await.map_err(|error| failure(path, error))?;
        let inode = self.behind_link(client, path, &found).await;
        if self.directory || !inode.is_directory() {
            if path.means_directory() && !inode.is_directory() {
                return Err(crate::failure::Failure::refused(path, "not a directory"));
            }
            let row = row_of(path, found);
            return printer.page(client, vec![row]).await;
        }
        let mut waiting = vec![(path.clone(), inode)];
        while let Some((path, inode)) = waiting.pop() {
            if titled {
                printer.title(&path)?;
            }
            let mut directories = Vec::new();
            let mut listing = client.list_inode(inode, self.options());
            self.pages(client, &path, &mut listing, printer, &mut directories).await?;
            if self.recursive {
                waiting.extend(directories.into_iter().rev());
            }
        }
        Ok(())
    }

    /// As `ls` does: a link to a directory is that directory when it was typed with a `/` at its end or
    /// nothing is asked about the link itself.
    async fn behind_link(&self, client: &Client, path: &ClusterPath, found: &Resolved) -> InodeId {
        let follow = path.means_directory() || !(self.long || self.directory || self.json.json);
        if !found.inode.is_symlink() || !follow || self.at.is_some() {
            return found.inode;
        }
        client.directory(path.as_bytes()).await.map_or(found.inode, |directory| directory.inode())
    }

    async fn pages(
        &self,
        client: &Client,
        path: &ClusterPath,
        listing: &mut Listing,
        printer: &mut Printer<'_>,
        directories: &mut Vec<(ClusterPath, InodeId)>,
    ) -> Outcome {
        while let Some(entries) = listing.next_page().await.map_err(|error| failure(path, error))? {
            let rows: Vec<Row> = entries
                .into_iter()
                .filter(|entry| entry.owned || !self.deleted)
                .map(|entry| Row {
                    path: path.join(&entry.name),
                    name: entry.name.to_vec(),
                    entry,
                    link: None,
                })
                .collect();
            if self.recursive {
                let below = rows.iter().filter(|row| row.entry.target.is_directory());
                directories.extend(below.map(|row| (row.path.clone(), row.entry.target)));
            }
            printer.page(client, rows).await?;
        }
        Ok(())
    }

    fn options(&self) -> ListOptions {
        ListOptions {
            at: if self.dead { Time::ZERO } else { self.at.unwrap_or(Time::ZERO) },
            dead: self.dead,
            since: self.since.unwrap_or(Time::ZERO),
            until: self.until.unwrap_or(Time::ZERO),
            attributes: self.detailed(),
            ..ListOptions::default()
        }
    }

    fn detailed(&self) -> bool {
        self.json.json || (self.long && !self.dead)
    }
}

/// A path that is listed as itself.
fn row_of(path: &ClusterPath, found: Resolved) -> Row {
    let entry = Entry {
        name: path.name().unwrap_or(b"/").to_vec().into(),
        target: found.inode,
        created_at: found.created_at,
        died_at: None,
        owned: true,
        metadata: Some(found.metadata),
    };
    Row { path: path.clone(), name: path.as_bytes().to_vec(), entry, link: None }
}

struct Printer<'a> {
    out: Out,
    ls: &'a Ls,
    zone: TimeZone,
    rows: u64,
}

impl Printer<'_> {
    fn title(&mut self, path: &ClusterPath) -> Outcome {
        if self.ls.json.json {
            return Ok(());
        }
        if self.rows > 0 {
            self.out.bytes(b"\n")?;
        }
        self.rows += 1;
        self.out.named_line("", path.as_bytes(), None, b":")
    }

    async fn page(&mut self, client: &Client, mut rows: Vec<Row>) -> Outcome {
        if self.ls.detailed() {
            read_links(client, &mut rows).await?;
        }
        if self.ls.json.json {
            for row in &rows {
                self.out.bytes(if self.rows == 0 { b"\n" } else { b",\n" })?;
                self.rows += 1;
                let text = serde_json::to_vec(&json_row(row))
                    .map_err(|error| crate::failure::Failure::refused(&row.path, error))?;
                self.out.bytes(&text)?;
            }
            return Ok(());
        }
        let before = match (self.ls.long, self.ls.dead) {
            (false, _) => vec![String::new(); rows.len()],
            (true, false) => long_lines(&rows, &self.zone),
            (true, true) => dead_lines(&rows),
        };
        for (row, before) in rows.iter().zip(before) {
            self.rows += 1;
            let after = match &row.link {
                Some(target) => [b" -> ", target.as_slice()].concat(),
                None => Vec::new(),
            };
            self.out.named_line(&before, &row.name, Some(row.entry.kind()), &after)?;
        }
        Ok(())
    }
}

async fn read_links(client: &Client, rows: &mut [Row]) -> Outcome {
    let links = rows.iter_mut().filter(|row| row.entry.target.is_symlink());
    let mut reads = futures_util::stream::iter(links)
        .map(|row| async move {
            match client.read_link_inode(row.entry.target).await {
                Ok(target) => row.link = Some(target.to_vec()),
                // Gone since it was listed.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(failure(&row.path, error)),
            }
            Ok(())
        })
        .buffer_unordered(LINKS_AT_ONCE);
    while let Some(read) = reads.next().await {
        read?;
    }
    Ok(())
}

/// What stands before the names, columns aligned within the page.
fn long_lines(rows: &[Row], zone: &TimeZone) -> Vec<String> {
    let columns: Vec<[String; 5]> = rows
        .iter()
        .map(|row| {
            let kind = row.entry.target.kind();
            match &row.entry.metadata {
                Some(found) => [
                    permissions(kind, found.mode),
                    found.uid.to_string(),
                    found.gid.to_string(),
                    if kind == Some(InodeType::Directory) { "-".to_owned() } else { found.size.to_string() },
                    times::local(found.mtime, zone),
                ],
                None => [permissions(kind, 0), "?".into(), "?".into(), "?".into(), "?".into()],
            }
        })
        .collect();
    let width = |column: usize| columns.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let [uid, gid, size, time] = [width(1), width(2), width(3), width(4)];
    columns
        .iter()
        .map(|row| {
            format!("{} {:>uid$} {:>gid$} {:>size$} {:<time$} ", row[0], row[1], row[2], row[3], row[4])
        })
        .collect()
}

fn dead_lines(rows: &[Row]) -> Vec<String> {
    rows.iter()
        .map(|row| {
            let died = times::rfc3339(row.entry.died_at.unwrap_or(Time::ZERO));
            let created = times::rfc3339(row.entry.created_at);
            let fate = if row.entry.owned { "deleted" } else { "moved" };
            format!("{died} {created} {fate:<7} {} ", row.entry.target)
        })
        .collect()
}

fn json_row(row: &Row) -> JsonRow {
    let entry = &row.entry;
    JsonRow {
        name: JsonName::of(&entry.name),
        path: JsonPath::of(row.path.as_bytes()),
        inode: entry.target.to_string(),
        kind: entry.kind().as_str(),
        created_at_ns: entry.created_at.0,
        created_at: json_time(entry.created_at),
        attributes: entry.metadata.as_ref().map(|found| JsonAttributes {
            size: found.size,
            mtime_ns: found.mtime.0,
            mtime: json_time(found.mtime),
            mode: octal(found.mode),
            uid: found.uid,
            gid: found.gid,
        }),
        link: row.link.as_deref().map(JsonLink::of),
        death: entry.died_at.map(|died_at| JsonDeath {
            died_at_ns: died_at.0,
            died_at: json_time(died_at),
            owned: entry.owned,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use eggs_client::Metadata;
    use eggs_proto::ShardId;

    fn row(name: &str, kind: InodeType, size: u64) -> Row {
        let inode = InodeId::new(kind, ShardId(1), 3);
        let metadata = Metadata {
            inode,
            kind,
            size,
            created_at: Time(5),
            mtime: Time(1_700_000_000_123_456_789),
            atime: Time(5),
            mode: 0o755,
            uid: 0,
            gid: 1000,
            crc: None,
            parent: None,
            xattrs: Vec::new(),
            policies: None,
        };
        let entry = Entry {
            name: name.as_bytes().to_vec().into(),
            target: inode,
            created_at: Time(1_700_000_000_000_000_001),
            died_at: None,
            owned: true,
            metadata: Some(metadata),
        };
        let path = ClusterPath::parse(b"/d").unwrap().join(name.as_bytes());
        Row { path, name: name.as_bytes().to_vec(), entry, link: None }
    }

    #[test]
    fn golden_long_listing() {
        let rows = [row("a", InodeType::Directory, 0), row("b", InodeType::File, 12345)];
        assert_eq!(
            long_lines(&rows, &TimeZone::UTC),
            ["drwxr-xr-x 0 1000     - 2023-11-14 22:13:20 ", "-rwxr-xr-x 0 1000 12345 2023-11-14 22:13:20 ",]
        );
    }

    #[test]
    fn golden_dead_listing() {
        let mut dead = row("b", InodeType::File, 1);
        dead.entry.died_at = Some(Time(1_700_000_001_000_000_000));
        dead.entry.owned = false;
        assert_eq!(
            dead_lines(&[dead]),
            ["2023-11-14T22:13:21.000000000Z 2023-11-14T22:13:20.000000001Z moved   0x2020000000000003 "]
        );
    }

    #[test]
    fn golden_json_row() {
        let mut link = row("l", InodeType::Symlink, 4);
        link.link = Some(b"b\xff".to_vec());
        link.entry.died_at = Some(Time(7));
        assert_eq!(
            serde_json::to_string(&json_row(&link)).unwrap(),
            concat!(
                r#"{"name":"l","path":"/d/l","inode":"0x4020000000000003","type":"SYMLINK","#,
                r#""created_at_ns":1700000000000000001,"created_at":"2023-11-14T22:13:20.000000001Z","#,
                r#""size":4,"mtime_ns":1700000000123456789,"mtime":"2023-11-14T22:13:20.123456789Z","#,
                r#""mode":"0755","uid":0,"gid":1000,"target":"b�","target_hex":"62ff","#,
                r#""died_at_ns":7,"died_at":"1970-01-01T00:00:00.000000007Z","owned":true}"#
            )
        );
    }
}
