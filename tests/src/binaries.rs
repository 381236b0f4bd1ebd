//! The programs under test: in `EGGS_BIN_DIR`, else built once per run beside the tests' own binaries.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

const PACKAGES: [&str; 6] =
    ["eggsctl", "eggs-shuckle", "eggs-shard", "eggs-crossdir", "eggs-blockd", "eggs-janitor"];

/// The path of a program.
///
/// # Panics
/// When it cannot be built.
pub fn binary(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let path = FOLDER.get_or_init(folder).join(name);
    assert!(path.is_file(), "{} is missing", path.display());
    path
}

fn folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("EGGS_BIN_DIR").filter(|folder| !folder.is_empty()) {
        return std::path::absolute(folder).expect("EGGS_BIN_DIR");
    }
    // TARGET/PROFILE/deps/tour-0123456789abcdef
    let test = std::env::current_exe().expect("path of this program");
    let folder = test.parent().and_then(Path::parent).expect("tests are in TARGET/PROFILE/deps").to_owned();
    build_once(&folder);
    folder
}

/// With nextest every test is a process of its own: the first one builds, the others of the run wait.
fn build_once(folder: &Path) {
    let stamp = folder.join(".eggs-tests-built");
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&stamp);
    let mut lock: File = open.unwrap_or_else(|error| panic!("{}: {error}", stamp.display()));
    lock.lock().expect("lock of the build");
    let run = std::env::var("NEXTEST_RUN_ID").unwrap_or_default();
    let mut built = String::new();
    lock.read_to_string(&mut built).expect("stamp of the build");
    if !run.is_empty() && built == run {
        return;
    }
    build(folder);
    lock.set_len(0)
        .and_then(|()| lock.rewind())
        .and_then(|()| lock.write_all(run.as_bytes()))
        .expect("stamp");
}

fn build(folder: &Path) {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let profile = match name(folder).as_str() {
        "debug" => "dev".to_owned(),
        other => other.to_owned(),
    };
    let target = folder.parent().expect("target directory");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.arg("build").arg("--quiet").arg("--profile").arg(profile).arg("--target-dir").arg(target);
    cargo.args(PACKAGES.iter().flat_map(|package| ["-p", package]));
    cargo.current_dir(checkout());
    let status = cargo.stdin(Stdio::null()).status().expect("cargo");
    assert!(status.success(), "the programs under test do not build: {status}");
}

/// The top of the checkout. The runner of the tests says where it is: a target folder used by several checkouts may
/// hold tests another one built.
pub fn checkout() -> PathBuf {
    let manifest =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&manifest).parent().expect("a folder above tests").to_owned()
}
