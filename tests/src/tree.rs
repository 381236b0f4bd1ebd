//! Local trees: making odd ones, and comparing them byte for byte.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Permissions};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rand::Rng as _;

use crate::{bytes, rng};

/// Sizes on both sides of everything that is stored another way.
const SIZES: [usize; 14] =
    [0, 1, 2, 4095, 4096, 4097, 16_384, 16_385, 65_535, 65_536, 65_537, 1 << 20, (1 << 20) + 1, 3_333_333];

/// Names that people and programs make, and that programs get wrong.
pub fn odd_names() -> Vec<OsString> {
    let mut names: Vec<OsString> = [
        "plain",
        "with blank",
        " blank first",
        "blank last ",
        "-leading-dash",
        "--",
        "-",
        "..hidden",
        ".dot",
        "grün",
        "日本語",
        "👩‍👩‍👧",
        "e\u{301} decomposed",
        "quote'and\"double",
        "back\\slash",
        "new\nline",
        "tab\tname",
        "*?[glob]",
        "$HOME;`id`|&<>",
        "%s%n",
        "~",
        "#",
        "a:b",
        "CON",
        "bell\u{7}",
        "\u{feff}bom",
    ]
    .map(OsString::from)
    .into();
    names.push(OsString::from("x".repeat(255)));
    names.push(OsString::from("é".repeat(127)));
    names.push(OsString::from_vec(b"not utf-8 \xff\xfe\x80".to_vec()));
    names.push(OsString::from_vec(vec![0x80]));
    names.push(OsString::from_vec((1..=255u8).filter(|&byte| byte != b'/').collect()));
    names
}

/// A generated tree.
#[derive(Debug)]
pub struct Tree {
    pub root: PathBuf,
    pub files: usize,
    pub directories: usize,
    pub symlinks: usize,
}

impl Tree {
    /// Makes a tree with every odd name as a file, a directory and a link, and all sizes.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn generate(root: &Path) -> Tree {
        let mut rng = rng("tree");
        let mut tree = Tree { root: root.to_owned(), files: 0, directories: 0, symlinks: 0 };
        tree.directory("");
        for (n, size) in SIZES.into_iter().enumerate() {
            tree.file(OsStr::new(&format!("size-{size}")), &bytes(size, n as u64));
        }
        tree.file(OsStr::new("zeros"), &vec![0; 1_000_000]);
        for (n, name) in odd_names().iter().enumerate() {
            let size = SIZES[rng.random_range(0..7)];
            tree.directory("odd");
            tree.file(join("odd", name), &bytes(size, 100 + n as u64));
            let folder = join("odd-folders", name);
            tree.directory(&folder);
            if rng.random_bool(0.5) {
                tree.file(join(&folder, name), &bytes(rng.random_range(0..10_000), 200 + n as u64));
            }
            tree.directory("odd-links");
            tree.symlink(join("odd-links", name), name);
        }
        tree.symlink(OsStr::new("link-to-nowhere"), OsStr::new("/no/such/place"));
        tree.symlink(OsStr::new("link-up"), OsStr::new("../.."));
        tree.symlink(OsStr::new("link-long"), OsStr::new(&"a/".repeat(1500)));
        tree.directory("empty");
        let deep: PathBuf = std::iter::repeat_n("deep", 40).collect();
        tree.directory(&deep);
        tree.file(deep.join("file"), b"down here");
        tree.directory("many");
        for n in 0..400 {
            tree.file(OsStr::new(&format!("many/{n:04}")), format!("file {n}\n").as_bytes());
        }
        for mode in [0o400, 0o600, 0o755, 0o777, 0o4755] {
            let name = format!("mode-{mode:o}");
            tree.file(OsStr::new(&name), b"mode");
            fs::set_permissions(root.join(&name), Permissions::from_mode(mode)).expect("chmod");
        }
        tree
    }

    fn directory(&mut self, path: impl AsRef<Path>) {
        let path = self.root.join(path);
        let new = path.ancestors().take_while(|above| !above.exists()).count();
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        self.directories += new;
    }

    fn file(&mut self, path: impl AsRef<Path>, contents: &[u8]) {
        let path = self.root.join(path);
        fs::write(&path, contents).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        self.files += 1;
    }

    fn symlink(&mut self, path: impl AsRef<Path>, target: &OsStr) {
        std::os::unix::fs::symlink(target, self.root.join(path)).expect("symlink");
        self.symlinks += 1;
    }
}

fn join(folder: impl AsRef<Path>, name: &OsStr) -> PathBuf {
    folder.as_ref().join(name)
}

/// Everything below a folder by path: kind, permissions and contents.
///
/// # Panics
/// When it cannot be read.
pub fn listing(root: &Path) -> BTreeMap<Vec<u8>, String> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(folder) = waiting.pop() {
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        for entry in entries {
            let path = entry.expect("entry").path();
            let metadata = fs::symlink_metadata(&path).expect("metadata");
            let mode = metadata.permissions().mode() & 0o7777;
            let what = if metadata.is_dir() {
                waiting.push(path.clone());
                format!("directory {mode:o}")
            } else if metadata.is_symlink() {
                format!("link to {:?}", fs::read_link(&path).expect("link"))
            } else {
                let contents = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                let crc = crc32fast::hash(&contents);
                format!("file {mode:o} {} bytes, crc {crc:08x}, mtime {}", contents.len(), metadata.mtime())
            };
            found.insert(path.strip_prefix(root).expect("below").as_os_str().as_bytes().to_vec(), what);
        }
    }
    found
}

/// Same names, kinds, permissions, times of files, targets and bytes.
///
/// # Panics
/// When they differ; says where.
pub fn assert_same_tree(left: &Path, right: &Path) {
    let (left, right) = (listing(left), listing(right));
    assert!(!left.is_empty(), "nothing to compare");
    for (path, what) in &left {
        let shown = String::from_utf8_lossy(path);
        assert_eq!(right.get(path), Some(what), "{shown:?}");
    }
    let more: Vec<_> = right.keys().filter(|path| !left.contains_key(*path)).collect();
    assert!(more.is_empty(), "more than there should be: {more:?}");
}
