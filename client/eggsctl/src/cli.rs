//! The command line: what can be typed. One file per command under `commands/`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::commands;
use crate::context::Context;
use crate::failure::Outcome;
use crate::output::Color;
use crate::{place, times};

/// EggsFS: a filesystem spread over many disks.
///
/// `eggsctl up` runs a whole cluster in one process; the other commands talk to it, or to any cluster
/// that `--shuckle` (or EGGS_SHUCKLE) names. Paths in the cluster are absolute.
#[derive(Debug, Parser)]
#[command(
    name = "eggsctl",
    version,
    subcommand_required = true,
    arg_required_else_help = true,
    propagate_version = true,
    max_term_width = 100,
    after_help = "Exit codes: 0 done; 1 refused, or something was found; 2 wrong usage; 3 no cluster answered in time.\n\
                  Names are any bytes: a terminal gets them escaped, pipes get them raw. In JSON, names that are not\n\
                  UTF-8 have their bytes in `name_hex` beside `name`; inodes are hexadecimal strings; times are\n\
                  nanoseconds since 1970 (`…_ns`) and RFC 3339."
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Where shuckle, the registry of the cluster, listens; several with commas, one that answers is enough
    #[arg(
        long,
        global = true,
        env = "EGGS_SHUCKLE",
        value_name = "HOST:PORT",
        default_value = eggs_client::DEFAULT_SHUCKLE,
        value_delimiter = ',',
        value_parser = shuckle_address
    )]
    pub shuckle: Vec<String>,

    /// How long to try before the cluster counts as unreachable: 30s, 500ms, 2m [default: 30s]. Commands that
    /// wait for something wait this long for it [default: until it is so]
    #[arg(long = "timeout", global = true, env = "EGGS_TIMEOUT", value_name = "TIME", value_parser = times::typed_duration)]
    typed_timeout: Option<Duration>,

    /// Say what is going on, on standard error; twice for more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// When to use colours
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value_t)]
    pub color: Color,
}

impl Global {
    /// How long one operation is tried.
    pub fn timeout(&self) -> Duration {
        self.typed_timeout.unwrap_or(eggs_client::DEFAULT_TIMEOUT)
    }

    /// How long something is waited for that the cluster does in its own time.
    pub fn wait_timeout(&self) -> Duration {
        /// As good as for ever.
        const NO_END: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
        self.typed_timeout.unwrap_or(NO_END)
    }
}

fn shuckle_address(text: &str) -> Result<String, String> {
    let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    match address.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) => {
            Ok(address.to_owned())
        }
        _ => Err("HOST:PORT is expected, as in 127.0.0.1:5000".to_owned()),
    }
}

/// Prints JSON instead of text.
#[derive(Debug, Clone, Copy, Args)]
pub struct JsonFlag {
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// What commands take that change the cluster itself.
#[derive(Debug, Clone, Args)]
pub struct SecretArgs {
    #[arg(long, env = "EGGS_SECRET_FILE", value_name = "FILE", help = format!("The file with the cluster's secret [default: secret in the data directory of `eggsctl up`, which is EGGS_DATA, else {}]", place::DEFAULT_DATA))]
    pub secret_file: Option<PathBuf>,
}

macro_rules! commands {
    ($($(#[$doc:meta])* $variant:ident($module:ident) = $name:literal;)*) => {
        /// One variant per command, in the order of the help.
        #[derive(Debug, Subcommand)]
        pub enum Command {
            $($(#[$doc])* #[command(name = $name)] $variant(commands::$module::$variant),)*
        }

        impl Command {
            /// The name its messages start with.
            pub fn name(&self) -> &'static str {
                match self { $(Command::$variant(_) => $name,)* }
            }

            pub async fn run(self, context: &Context) -> Outcome {
                match self { $(Command::$variant(command) => Box::pin(command.run(context)).await,)* }
            }
        }
    };
}

commands! {
    Up(up) = "up";
    Down(down) = "down";
    Status(status) = "status";
    Host(host) = "host";
    Shard(shard) = "shard";
    Drain(drain) = "drain";
    Df(df) = "df";
    Disk(disk) = "disk";
    Repairs(repairs) = "repairs";
    Scrub(scrub) = "scrub";
    Restripe(restripe) = "restripe";
    Ls(ls) = "ls";
    Stat(stat) = "stat";
    Cat(cat) = "cat";
    Put(put) = "put";
    Get(get) = "get";
    Mkdir(mkdir) = "mkdir";
    Rmdir(rmdir) = "rmdir";
    Mv(mv) = "mv";
    Cp(cp) = "cp";
    Rm(rm) = "rm";
    Undelete(undelete) = "undelete";
    Purge(purge) = "purge";
    Ln(ln) = "ln";
    Readlink(readlink) = "readlink";
    Chmod(chmod) = "chmod";
    Touch(touch) = "touch";
    CreateTestFile(create_test_file) = "create-test-file";
    Policy(policy) = "policy";
    Checksum(checksum) = "checksum";
    Verify(verify) = "verify";
    Why(why) = "why";
    Txn(txn) = "txn";
    Fsck(fsck) = "fsck";
    Completions(completions) = "completions";
    Man(man) = "man";
}

impl Command {
    /// `up` drains on a signal by itself; every other command is simply dropped.
    pub fn handles_signals(&self) -> bool {
        matches!(self, Command::Up(_))
    }

    /// `up` says where its logs go.
    pub fn is_up(&self) -> bool {
        matches!(self, Command::Up(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    fn code(arguments: &[&str]) -> i32 {
        match Cli::try_parse_from(std::iter::once(&"eggsctl").chain(arguments)) {
            Ok(_) => 0,
            Err(error) => error.exit_code(),
        }
    }

    #[test]
    fn what_makes_no_sense_is_usage() {
        for arguments in [
            &["mkdir"][..],
            &["mkdir", "relative"],
            &["nonsense"],
            &["ls", "--since", "5m", "/"],
            &["ls", "--since", "blue", "--dead", "/"],
            &["ls", "--shuckle", "nowhere", "/"],
            &["ls", "--timeout", "0", "/"],
            &["put", "only-source"],
            &["mv", "/only"],
            &["mkdir", "-m", "99", "/a"],
            &["up", "--replicas", "2"],
            &["shard"],
            &["shard", "replicas", "256"],
            &["shard", "add-replica", "7"],
            &["shard", "move-replica", "7", "a"],
            &["drain"],
            &["drain", "a", "--undo", "--no-wait", "b"],
            &["undelete"],
            &["undelete", "/a", "/b"],
            &["undelete", "/a", "--to", "relative"],
            &["policy", "set", "/a"],
            &["policy", "set", "/a", "span=64M:4-2"],
            &["policy", "unset", "/a", "spam"],
            &["checksum", "-a", "md5", "/a"],
            &["verify"],
            &["purge"],
            &["purge", "/a", "--older-than", "1d", "--before", "now"],
            &["ls", "--deleted", "/"],
            &["disk"],
            &["disk", "drain"],
            &["disk", "drain", "a", "--undo", "--wait"],
            &["disk", "set-flags", "a", "--set", "LOST"],
            &["restripe"],
            &["restripe", "cancel", "0"],
            &["up", "--scrub-period", "1s"],
        ] {
            assert_eq!(code(arguments), 2, "{arguments:?}");
        }
    }

    #[test]
    fn what_makes_sense_is_taken() {
        for arguments in [
            &["up", "--data", "d", "--listen", "127.0.0.1:0", "--disks", "3", "--detach"][..],
            &["up", "--replicas", "3", "--read-lease"],
            &["down"],
            &["status", "--shuckle", "a:5000,b:5000,c:5000", "--check"],
            &["shard", "replicas"],
            &["shard", "replicas", "0-15", "crossdir,shuckle", "--json"],
            &["shard", "add-replica", "7", "d", "--no-wait", "--secret-file", "s"],
            &["shard", "remove-replica", "all", "d", "--force"],
            &["shard", "move-replica", "0..255", "a", "d", "--timeout", "10m"],
            &["shard", "transfer-leader", "crossdir", "b"],
            &["drain", "a", "--no-wait"],
            &["drain", "a", "--undo", "--json"],
            &["host", "ls", "--json"],
            &["disk", "ls", "--json"],
            &["disk", "drain", "0x12", "/disks/01", "--wait"],
            &["disk", "decommission", "12", "--yes"],
            &["disk", "set-flags", "12", "--set", "no_read,NO_WRITE", "--clear", "decommissioned"],
            &["repairs", "--watch"],
            &["scrub", "--json"],
            &["restripe", "/a", "--wait"],
            &["restripe", "ls"],
            &["restripe", "cancel", "3"],
            &["up", "--lost-after", "2min", "--no-rebalance", "--repair-rate", "100"],
            &["hosts"],
            &["mkdir", "-p", "-m", "0750", "/a/b", "/c"],
            &["ls"],
            &["ls", "-lR", "--json", "/a"],
            &["ls", "--dead", "--since", "5m ago", "--until", "now", "/a"],
            &["ls", "-d", "/a", "--shuckle", "localhost:5000", "--timeout", "2s"],
            &["put", "-r", "a", "b", "/c/"],
            &["put", "-", "/c"],
            &["get", "-r", "/a", "."],
            &["cat", "/a", "-", "--offset", "3", "--length", "9"],
            &["rm", "-rf", "/a"],
            &["undelete", "/a"],
            &["undelete", "-r", "/a", "--at", "5m ago", "--to", "/b", "--json"],
            &["purge", "/a", "--older-than", "30d", "--yes", "--json"],
            &["purge", "/", "--before", "2026-01-01"],
            &["ls", "--dead", "--deleted", "/a"],
            &["ln", "-s", "target", "/link"],
            &["policy", "get", "/a"],
            &["policy", "set", "/a", "span=64K:mirror3,64M:4+2", "stripe=1M", "--json"],
            &["policy", "unset", "/a", "span", "all"],
            &["checksum", "-a", "blake3", "/a", "/b", "--json"],
            &["verify", "-r", "/", "--report=false", "--json"],
            &["why", "/a", "--offset", "3", "--length", "9", "--json"],
            &["txn", "list", "--json"],
            &["completions", "bash"],
            &["man", "/tmp/x"],
        ] {
            assert_eq!(code(arguments), 0, "{arguments:?}");
        }
    }
}
