//! Settings: flags > `EGGS_*` environment > TOML file (`--config`) > defaults.
//!
//! Settings are declared once, as a clap derive struct. [`parse`] gives every long flag an
//! environment variable (`--secret-file`: `EGGS_SECRET_FILE`) and a key in the file (`secret-file`,
//! `secret_file` is the same). The lower layers go in as clap's *default values*, so clap itself does
//! the precedence, the conversion and the check; each value is tried alone first, so that a bad one
//! is reported with where it came from.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use clap::builder::{OsStr, StyledStr};
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};

/// Exit code for settings that cannot be used.
pub const EXIT_USAGE: u8 = 2;

/// Why there are no settings.
#[derive(Debug)]
pub enum ConfigError {
    /// `--help` or `--version`: not an error, the text to print.
    Display(Box<StyledStr>),
    /// One line for people.
    Invalid(String),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigError::Display(text) => fmt::Display::fmt(text, f),
            ConfigError::Invalid(line) => f.write_str(line),
        }
    }
}

impl std::error::Error for ConfigError {}

/// The settings of this process; prints and exits when there are none to be had (0 for help, 2 for
/// what is wrong).
pub fn parse<A: CommandFactory + FromArgMatches>() -> A {
    match try_parse(std::env::args_os(), &|name| std::env::var_os(name)) {
        Ok(settings) => settings,
        Err(ConfigError::Display(text)) => {
            use std::io::IsTerminal;
            if std::io::stdout().is_terminal() {
                print!("{}", text.ansi());
            } else {
                print!("{text}");
            }
            std::process::exit(0)
        }
        Err(ConfigError::Invalid(line)) => {
            eprintln!("error: {line}");
            std::process::exit(EXIT_USAGE.into())
        }
    }
}

/// The settings that `args` (the program's name first) and the environment give.
///
/// # Errors
/// What is wrong, in one line; or the text that `--help` or `--version` asked for.
pub fn try_parse<A: CommandFactory + FromArgMatches>(
    args: impl IntoIterator<Item = impl Into<OsString>>,
    environment: &dyn Fn(&str) -> Option<OsString>,
) -> Result<A, ConfigError> {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let mut command = A::command();
    // Argument ids and actions are final only in a built command.
    command.build();
    let mut layers: BTreeMap<String, Vec<OsString>> = BTreeMap::new();
    if let Some(path) = file_path(&command, &args, environment) {
        from_file(&command, &path, &mut layers)?;
    }
    from_environment(&command, environment, &mut layers)?;

    let mut command = A::command();
    let settings: Vec<String> = settings(&command).map(|arg| arg.get_id().to_string()).collect();
    for id in settings {
        let values = layers.remove(&id);
        command = command.mut_arg(&id, |arg| with_layer(arg, values));
    }
    let matches = command.clone().try_get_matches_from(args).map_err(|error| from_clap(&error))?;
    A::from_arg_matches(&matches).map_err(|error| from_clap(&error))
}

/// The arguments that are settings: those with a long name.
fn settings(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|arg| {
        arg.get_long().is_some() && !matches!(arg.get_id().as_str(), "help" | "version") && !is_display(arg)
    })
}

fn is_display(arg: &Arg) -> bool {
    matches!(
        arg.get_action(),
        ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version
    )
}

fn is_switch(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::SetFalse)
}

fn variable(arg: &Arg) -> String {
    let name = arg.get_long().unwrap_or_default();
    format!("EGGS_{}", name.to_ascii_uppercase().replace('-', "_"))
}

/// The argument with the values of the lower layers as its default, and the variable in its help.
fn with_layer(arg: Arg, values: Option<Vec<OsString>>) -> Arg {
    let note = format!("[env: {}]", variable(&arg));
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let long = arg.get_long_help().map(|long| format!("{long} {note}"));
    let mut arg = arg.help(format!("{help} {note}"));
    if let Some(long) = long {
        arg = arg.long_help(long);
    }
    match values {
        None => arg,
        Some(values) => arg.required(false).default_values(values.into_iter().map(OsStr::from)),
    }
}

/// `--config` from the command line, however wrong the rest of that is, or from the environment.
fn file_path(
    command: &Command,
    args: &[OsString],
    environment: &dyn Fn(&str) -> Option<OsString>,
) -> Option<PathBuf> {
    let arg = settings(command).find(|arg| arg.get_id() == "config")?;
    let lenient = command.clone().ignore_errors(true).try_get_matches_from(args).ok();
    let given = |matches: &ArgMatches| matches.try_get_one::<PathBuf>("config").ok().flatten().cloned();
    lenient
        .as_ref()
        .and_then(given)
        .or_else(|| environment(&variable(arg)).filter(|value| !value.is_empty()).map(PathBuf::from))
}

fn from_environment(
    command: &Command,
    environment: &dyn Fn(&str) -> Option<OsString>,
    layers: &mut BTreeMap<String, Vec<OsString>>,
) -> Result<(), ConfigError> {
    for arg in settings(command) {
        let name = variable(arg);
        // An empty variable is an unset one, as shells make no difference easily.
        let Some(value) = environment(&name).filter(|value| !value.is_empty()) else { continue };
        let values = match (is_switch(arg), value.to_str()) {
            (true, Some(text)) => vec![switch(text).ok_or_else(|| {
                ConfigError::Invalid(format!("environment variable {name}: '{text}' is not true or false"))
            })?],
            // Lists are separated by commas; a single setting may hold one.
            (false, Some(text)) if matches!(arg.get_action(), ArgAction::Append) => {
                text.split(',').map(|item| OsString::from(item.trim())).collect()
            }
            _ => vec![value],
        };
        check(arg, &values, &format!("environment variable {name}"))?;
        layers.insert(arg.get_id().to_string(), values);
    }
    Ok(())
}

fn switch(text: &str) -> Option<OsString> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Some("true".into()),
        "0" | "false" | "no" | "off" => Some("false".into()),
        _ => None,
    }
}

fn from_file(
    command: &Command,
    path: &Path,
    layers: &mut BTreeMap<String, Vec<OsString>>,
) -> Result<(), ConfigError> {
    let file = path.display();
    let invalid = |what: String| ConfigError::Invalid(format!("configuration file {file}: {what}"));
    let text = std::fs::read_to_string(path).map_err(|error| invalid(error.to_string()))?;
    let table: toml::Table = toml::from_str(&text).map_err(|error| {
        let line = error.span().map_or(1, |span| 1 + text[..span.start].matches('\n').count());
        invalid(format!("line {line}: {}", one_line(error.message())))
    })?;
    for (key, value) in &table {
        let long = key.replace('_', "-");
        let arg = settings(command)
            .find(|arg| arg.get_long() == Some(&long) && arg.get_id() != "config")
            .ok_or_else(|| invalid(format!("'{key}' is not a setting (--help lists them)")))?;
        let values = file_values(arg, value).map_err(|what| invalid(format!("'{key}': {what}")))?;
        check(arg, &values, &format!("configuration file {file}: '{key}'"))?;
        if layers.insert(arg.get_id().to_string(), values).is_some() {
            return Err(invalid(format!("'{key}' is set twice")));
        }
    }
    Ok(())
}

fn file_values(arg: &Arg, value: &toml::Value) -> Result<Vec<OsString>, String> {
    let list = matches!(arg.get_action(), ArgAction::Append);
    match value {
        toml::Value::Boolean(set) if is_switch(arg) => Ok(vec![set.to_string().into()]),
        _ if is_switch(arg) => Err("true or false is expected".to_owned()),
        toml::Value::Array(items) if list => items.iter().map(scalar).collect(),
        toml::Value::String(text) if list && arg.get_value_delimiter() == Some(',') => {
            Ok(text.split(',').map(|item| OsString::from(item.trim())).collect())
        }
        toml::Value::Array(_) => Err("one value is expected, not a list".to_owned()),
        _ => scalar(value).map(|value| vec![value]),
    }
}

fn scalar(value: &toml::Value) -> Result<OsString, String> {
    match value {
        toml::Value::String(text) => Ok(text.into()),
        toml::Value::Integer(number) => Ok(number.to_string().into()),
        toml::Value::Float(number) => Ok(number.to_string().into()),
        toml::Value::Boolean(set) => Ok(set.to_string().into()),
        _ => Err("a text, a number, true or false is expected".to_owned()),
    }
}

/// Tries the values alone, to say where a bad one came from.
fn check(arg: &Arg, values: &[OsString], source: &str) -> Result<(), ConfigError> {
    if is_switch(arg) {
        return Ok(());
    }
    let lonely = Arg::new("value")
        .long("value")
        .value_parser(arg.get_value_parser().clone())
        .action(ArgAction::Append)
        .allow_hyphen_values(true);
    let args = values.iter().map(|value| {
        let mut arg = OsString::from("--value=");
        arg.push(value);
        arg
    });
    let command = Command::new("check").no_binary_name(true).disable_help_flag(true).arg(lonely);
    let error = match command.try_get_matches_from(args) {
        Ok(_) => return Ok(()),
        Err(error) => error,
    };
    let line = match from_clap(&error) {
        ConfigError::Invalid(line) => line,
        ConfigError::Display(_) => String::new(),
    };
    Err(ConfigError::Invalid(format!("{source}: {}", line.replace(" for '--value <value>'", ""))))
}

/// Clap's error as one line: the first paragraph and the tip, without the usage.
fn from_clap(error: &clap::Error) -> ConfigError {
    let text = error.render();
    if !error.use_stderr() {
        return ConfigError::Display(Box::new(text));
    }
    let text = text.to_string();
    let mut paragraphs = text.split("\n\n");
    let mut line = one_line(paragraphs.next().unwrap_or_default());
    for tip in paragraphs.map(one_line).filter(|paragraph| paragraph.starts_with("tip:")) {
        line = format!("{line}; {tip}");
    }
    ConfigError::Invalid(line.strip_prefix("error: ").unwrap_or(&line).to_owned())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
