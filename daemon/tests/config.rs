//! Where settings come from, and what is said about wrong ones.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use eggs_daemon::args::{ClusterArgs, CommonArgs, DataArgs, HostArgs, ReplicaArgs};
use eggs_daemon::config::{ConfigError, try_parse};

/// A daemon for the tests
#[derive(Debug, Parser)]
#[command(name = "eggs-test", version, mut_arg("listen", |arg| arg.required(false).default_value("127.0.0.1:5009")))]
struct Settings {
    #[command(flatten)]
    common: CommonArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    host: HostArgs,
    #[command(flatten)]
    replica: ReplicaArgs,
    /// A disk
    #[arg(long)]
    disk: Vec<String>,
    /// A switch
    #[arg(long)]
    read_only: bool,
    /// A number
    #[arg(long, default_value_t = 3)]
    copies: u8,
}

struct Case {
    arguments: &'static [&'static str],
    environment: &'static [(&'static str, &'static str)],
    file: &'static str,
}

const EMPTY: Case = Case { arguments: &[], environment: &[], file: "" };

fn run(case: &Case) -> Result<Settings, String> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("eggs.toml");
    let mut arguments: Vec<OsString> = vec!["eggs-test".into()];
    arguments.extend(case.arguments.iter().map(OsString::from));
    if !case.file.is_empty() {
        std::fs::write(&file, case.file).unwrap();
        arguments.extend(["--config".into(), file.clone().into()]);
    }
    let environment = |name: &str| {
        case.environment.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
    };
    try_parse(arguments, &environment).map_err(|error| match error {
        ConfigError::Display(text) => format!("DISPLAY {text}"),
        ConfigError::Invalid(line) => line.replace(&file.display().to_string(), "FILE"),
    })
}

const REQUIRED: &str = "data = '/file'\nsecret-file = '/s'\n";

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let file: &str = "data = '/file'\nsecret_file = '/s'\nlisten = '127.0.0.1:1'\ndisk = ['a', 'b']\nread-only = true\ncopies = 4";
    let environment: &[_] = &[
        ("EGGS_DATA", "/env"),
        ("EGGS_LISTEN", "127.0.0.1:2"),
        ("EGGS_DISK", "c, d,e"),
        ("EGGS_READ_ONLY", "no"),
        ("EGGS_COPIES", "5"),
        ("EGGS_SHUCKLE", ""),
    ];
    let flags: &[_] =
        &["--data", "/flag", "--listen", "127.0.0.1:3", "--disk", "f", "--read-only", "--copies=6"];
    let shape = |settings: Settings| {
        (
            settings.data.data,
            settings.common.listen.port(),
            settings.disk,
            settings.read_only,
            settings.copies,
            settings.cluster.shuckle,
        )
    };
    let expect = |data: &str, port: u16, disks: &[&str], read_only, copies| {
        let disks = disks.iter().map(ToString::to_string).collect();
        (PathBuf::from(data), port, disks, read_only, copies, vec!["127.0.0.1:5000".to_owned()])
    };
    let table = [
        (Case { file, ..EMPTY }, expect("/file", 1, &["a", "b"], true, 4)),
        (Case { file, environment, ..EMPTY }, expect("/env", 2, &["c", "d", "e"], false, 5)),
        (Case { file, environment, arguments: flags }, expect("/flag", 3, &["f"], true, 6)),
        (Case { file, arguments: flags, ..EMPTY }, expect("/flag", 3, &["f"], true, 6)),
        (Case { file: REQUIRED, ..EMPTY }, expect("/file", 5009, &[], false, 3)),
        (
            Case { environment: &[("EGGS_DATA", "/env"), ("EGGS_SECRET_FILE", "/s")], ..EMPTY },
            expect("/env", 5009, &[], false, 3),
        ),
    ];
    for (case, expected) in table {
        assert_eq!(shape(run(&case).unwrap()), expected);
    }
}

#[test]
fn shuckle_is_a_list_however_it_is_given() {
    let two = ["a:1", "b:2"];
    for (arguments, environment, file) in [
        (&["--shuckle", "a:1,b:2"][..], &[][..], ""),
        (&["--shuckle", "a:1", "--shuckle", "b:2"], &[], ""),
        (&[], &[("EGGS_SHUCKLE", "a:1, b:2")], ""),
        (&[], &[], "shuckle = 'a:1, b:2'\n"),
        (&[], &[], "shuckle = ['a:1', 'b:2']\n"),
    ] {
        let file = format!("{file}{REQUIRED}").leak();
        assert_eq!(run(&Case { arguments, environment, file }).unwrap().cluster.shuckle, two);
    }
}

#[test]
fn the_host_has_a_name() {
    let named = run(&Case { file: REQUIRED, arguments: &["--host", "rack-7"], ..EMPTY }).unwrap();
    assert_eq!(named.host.name().unwrap(), "rack-7");
    let unnamed = run(&Case { file: REQUIRED, ..EMPTY }).unwrap();
    assert!(!unnamed.host.name().unwrap().is_empty());
    assert!(!unnamed.replica.read_lease);
    assert_eq!(unnamed.replica.snapshot_bytes_per_second(), 64 << 20);
}

#[test]
fn the_file_can_be_named_in_the_environment() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("eggs.toml");
    std::fs::write(&file, "data = '/from-file'\nsecret-file = '/s'").unwrap();
    let environment = |name: &str| (name == "EGGS_CONFIG").then(|| file.clone().into_os_string());
    let settings: Settings = try_parse(["eggs-test"], &environment).unwrap();
    assert_eq!(settings.data.data, PathBuf::from("/from-file"));
}

#[test]
fn wrong_settings_are_one_line_that_says_where() {
    let table = [
        (
            Case { file: "data = '/d'\nsecret-file = '/s'\nlissten = 'x'", ..EMPTY },
            "FILE: 'lissten' is not a setting",
        ),
        (Case { file: "config = 'x'", ..EMPTY }, "FILE: 'config' is not a setting"),
        (Case { file: "data = '/d'\ncopies = 'many'", ..EMPTY }, "FILE: 'copies': invalid value 'many'"),
        (
            Case { file: "copies = 300", ..EMPTY },
            "FILE: 'copies': invalid value '300': 300 is not in 0..=255",
        ),
        (Case { file: "copies = -1", ..EMPTY }, "FILE: 'copies': invalid value '-1'"),
        (Case { file: "copies = [1]", ..EMPTY }, "FILE: 'copies': one value is expected"),
        (Case { file: "read-only = 'x'", ..EMPTY }, "FILE: 'read-only': true or false is expected"),
        (
            Case { file: "disk = [{a = 1}]", ..EMPTY },
            "FILE: 'disk': a text, a number, true or false is expected",
        ),
        (Case { file: "[server]\nlisten = 'x'", ..EMPTY }, "FILE: 'server' is not a setting"),
        (Case { file: "data = '/d'\n\nlisten = = 1", ..EMPTY }, "FILE: line 3: "),
        (Case { file: "secret-file = '/a'\nsecret_file = '/b'", ..EMPTY }, "'secret_file' is set twice"),
        (
            Case { file: "listen = 'nowhere'", ..EMPTY },
            "FILE: 'listen': invalid value 'nowhere': ADDR:PORT is expected",
        ),
        (
            Case { file: REQUIRED, environment: &[("EGGS_COPIES", "x")], ..EMPTY },
            "environment variable EGGS_COPIES: invalid value 'x'",
        ),
        (
            Case { file: REQUIRED, environment: &[("EGGS_READ_ONLY", "maybe")], ..EMPTY },
            "environment variable EGGS_READ_ONLY: 'maybe' is not true or false",
        ),
        (
            Case { file: REQUIRED, environment: &[("EGGS_LOG", "a=b=c")], ..EMPTY },
            "EGGS_LOG: invalid value 'a=b=c'",
        ),
        (
            Case { file: REQUIRED, arguments: &["--copies", "x"], ..EMPTY },
            "invalid value 'x' for '--copies <COPIES>'",
        ),
        (
            Case { file: REQUIRED, arguments: &["--copiess", "1"], ..EMPTY },
            "unexpected argument '--copiess' found; tip:",
        ),
        (
            Case { arguments: &["--config", "/nowhere/at.all"], ..EMPTY },
            "configuration file /nowhere/at.all: No such file",
        ),
        (
            Case { ..EMPTY },
            "the following required arguments were not provided: --data <DIR> --secret-file <FILE>",
        ),
        (Case { file: REQUIRED, arguments: &["--shuckle", "x"], ..EMPTY }, "HOST:PORT is expected"),
        (Case { file: REQUIRED, arguments: &["--shuckle", "a:1,x"], ..EMPTY }, "HOST:PORT is expected"),
        (Case { file: REQUIRED, arguments: &["--host", "a b"], ..EMPTY }, "without spaces and commas"),
        (Case { file: REQUIRED, arguments: &["--snapshot-rate", "0"], ..EMPTY }, "0 is not in 1.."),
    ];
    for (case, expected) in table {
        let line = run(&case).unwrap_err();
        assert!(line.contains(expected) && !line.contains('\n'), "expected {expected:?}, got {line:?}");
    }
}

#[test]
fn help_names_flags_and_variables_and_needs_nothing() {
    for (arguments, expected) in [
        (
            &["--help"][..],
            vec!["--secret-file <FILE>", "[env: EGGS_SECRET_FILE]", "[env: EGGS_LOG]", "127.0.0.1:5009"],
        ),
        (&["--version"][..], vec!["eggs-test 0."]),
    ] {
        let text = run(&Case { arguments, ..EMPTY }).unwrap_err();
        for part in expected {
            assert!(text.starts_with("DISPLAY ") && text.contains(part), "{part} is missing in {text}");
        }
    }
}

#[test]
fn what_to_advertise() {
    let settings = |arguments| run(&Case { arguments, file: REQUIRED, ..EMPTY }).unwrap().common;
    let loopback: SocketAddr = "127.0.0.1:7".parse().unwrap();
    let all: SocketAddr = "0.0.0.0:7".parse().unwrap();
    assert_eq!(settings(&[]).advertised(loopback).unwrap(), "127.0.0.1:7");
    assert!(settings(&[]).advertised(all).unwrap_err().contains("--advertise"));
    assert_eq!(settings(&["--advertise", "host:9"]).advertised(all).unwrap(), "host:9");
}
