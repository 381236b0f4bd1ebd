//! Disks that vanish, lie, or are full.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use eggs_blockd_core::Extent;
use eggs_tests::{
    Ctl, StoredBlock, TOO_LONG, Up, assert_same_tree, bytes, json, rng, scratch, seed, stored_blocks, until,
};
use rand::Rng as _;

/// Files stored in all ways, many of them in blocks.
fn local_tree(folder: &Path) -> PathBuf {
    let root = folder.join("source");
    fs::create_dir_all(root.join("below")).unwrap();
    for (n, size) in [0, 100, 5000, 66_000, 200_000, 1 << 20, 2_500_000].into_iter().enumerate() {
        for copy in 0..3 {
            let name = format!("{size}-{copy}");
            fs::write(root.join(&name), bytes(size, (n * 10 + copy) as u64)).unwrap();
            fs::write(root.join("below").join(&name), bytes(size, (n * 10 + copy + 500) as u64)).unwrap();
        }
    }
    root
}

/// Everything reads right, out of `ctl`'s cluster.
fn check(ctl: &Ctl, folder: &Path, source: &Path, name: &str) {
    ctl.ok(&format!("get -r /data {name}"));
    assert_same_tree(source, &folder.join(name));
    fs::remove_dir_all(folder.join(name)).unwrap();
}

/// The folders of the disks that are said to be lost, here and there.
fn lost(up: &Up) -> (BTreeSet<String>, BTreeSet<String>) {
    let name = |path: &serde_json::Value| path.as_str().unwrap().rsplit('/').next().unwrap().to_owned();
    let disks = json(up.address(), "/api/v1/block-services")["block_services"].clone();
    let disks = disks.as_array().unwrap().iter().filter(|disk| disk["state"] == "lost");
    let api = disks.map(|disk| name(&disk["path"])).collect();
    let disks = up.ctl().ok("status --json").json()["disks"].clone();
    let disks = disks.as_array().unwrap().iter();
    let lost = disks.filter(|disk| disk["flags"].as_array().unwrap().contains(&"LOST".into()));
    (api, lost.map(|disk| name(&disk["path"])).collect())
}

fn wait_for_lost(up: &Up, expected: &[&str]) {
    let expected: BTreeSet<String> = expected.iter().map(|&name| name.to_owned()).collect();
    until("the lost disks are known", TOO_LONG, || {
        let (api, status) = lost(up);
        (api == expected && status == expected).then_some(())
    });
}

#[test]
fn two_disks_vanish_while_it_runs() {
    let folder = scratch();
    let source = local_tree(folder.path());
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl().in_folder(folder.path());
    ctl.ok("put -r source /data");
    for disk in ["02", "05"] {
        fs::remove_dir_all(up.data().join("disks").join(disk)).unwrap();
    }
    // At once, before anybody can know.
    check(&ctl, folder.path(), &source, "back");
    ctl.run_with(["put", "-", "/new"], &bytes(3_000_000, 1)).ok();
    assert_eq!(ctl.ok("cat /new").stdout, bytes(3_000_000, 1));
    wait_for_lost(&up, &["02", "05"]);
    ctl.run_with(["put", "-", "/newer"], &bytes(3_000_000, 2)).ok();
    assert_eq!(ctl.ok("cat /newer").stdout, bytes(3_000_000, 2));
    check(&ctl, folder.path(), &source, "back");
    let status = ctl.run(["status", "--check"]).code(1);
    assert!(status.text().contains("degraded") && status.text().contains("disks/02"), "{}", status.text());
    assert_eq!(json(up.address(), "/api/v1/status")["health"]["state"], "degraded");
    assert_eq!(eggs_tests::get(up.address(), "/healthz").status, 200, "the process is well");
    ctl.assert_clean();
    // Nothing is made in their place, now or at the next start.
    let data = up.data().to_owned();
    up.stop();
    let up = Up::start(&data);
    wait_for_lost(&up, &["02", "05"]);
    assert!(!data.join("disks/02/identity").exists());
    check(&up.ctl().in_folder(folder.path()), folder.path(), &source, "back");
    up.stop();
}

#[test]
fn two_disks_vanish_while_it_is_down_and_come_back() {
    let folder = scratch();
    let source = local_tree(folder.path());
    let data = folder.path().join("data");
    let up = Up::start(&data);
    up.ctl().in_folder(folder.path()).ok("put -r source /data");
    up.kill();
    for disk in ["00", "07"] {
        fs::rename(data.join("disks").join(disk), folder.path().join(disk)).unwrap();
    }
    let up = Up::start(&data);
    let ctl = up.ctl().in_folder(folder.path());
    wait_for_lost(&up, &["00", "07"]);
    check(&ctl, folder.path(), &source, "back");
    ctl.run_with(["put", "-", "/new"], &bytes(3_000_000, 1)).ok();
    assert_eq!(ctl.ok("cat /new").stdout, bytes(3_000_000, 1));
    // Somebody finds them and puts them back, without a restart.
    for disk in ["00", "07"] {
        let _ = fs::remove_dir_all(data.join("disks").join(disk));
        fs::rename(folder.path().join(disk), data.join("disks").join(disk)).unwrap();
    }
    wait_for_lost(&up, &[]);
    check(&ctl, folder.path(), &source, "back");
    ctl.assert_clean();
    up.stop();
}

#[test]
fn three_disks_are_too_many_and_it_says_so() {
    let folder = scratch();
    let up = Up::start_with(&folder.path().join("data"), &["--disks", "6"]);
    let ctl = up.ctl();
    ctl.run_with(["put", "-", "/f"], &bytes(1_000_000, 1)).ok();
    for disk in ["00", "01", "02"] {
        fs::remove_dir_all(up.data().join("disks").join(disk)).unwrap();
    }
    // Until it is noticed, what is open can be read.
    wait_for_lost(&up, &["00", "01", "02"]);
    ctl.refused("cat /f", &["/f", "input/output error", "data lost"]);
    ctl.ok("stat /f");
    // Small files need no disk; large ones have nowhere to go, and say that.
    ctl.run_with(["put", "-", "/small"], b"small").ok();
    ctl.run_with(["put", "-", "/large"], &bytes(1_000_000, 2)).refused(&[
        "/large",
        "4+2 needs",
        "FLASH disk",
        "blocks, there are",
    ]);
    ctl.refused("stat /large", &["no such file or directory"]);
    ctl.assert_clean();
    up.stop();
}

#[derive(Debug, Clone, Copy)]
enum Harm {
    /// One bit in the block's bytes.
    Flip,
    /// One bit in its checksums.
    FlipSums,
    /// Its second half.
    Half,
    Zero,
    /// All there is of it.
    Wipe,
}

fn harm(block: &StoredBlock, kind: Harm, rng: &mut impl rand::Rng) {
    let file = fs::File::options().read(true).write(true).open(&block.file).unwrap();
    let Extent { offset, data_at, end } = block.extent;
    let mut flip = |from: u32, to: u32| {
        let at = u64::from(rng.random_range(from..to));
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ (1 << rng.random_range(0..8))], at).unwrap();
    };
    let zero = |from: u32, length: u32| {
        file.write_all_at(&vec![0; length as usize], u64::from(from)).unwrap();
    };
    match kind {
        Harm::Flip => flip(data_at, data_at + block.size),
        Harm::FlipSums => flip(block.extent.sums_at(), block.extent.sums_at() + 4),
        Harm::Half => zero(data_at + block.size / 2, block.size - block.size / 2),
        Harm::Zero => zero(data_at + (block.size - 100) / 2, 100),
        Harm::Wipe => zero(offset, end - offset),
    }
}

#[test]
fn damaged_blocks_are_read_around_and_reported() {
    seed();
    let mut rng = rng("harm");
    let folder = scratch();
    let source = local_tree(folder.path());
    // So that what is reported stays so.
    let up = Up::start_with(&folder.path().join("data"), &["--no-janitor"]);
    let ctl = up.ctl().in_folder(folder.path());
    ctl.ok("put -r source /data");
    let status = || json(up.address(), "/api/v1/status");
    assert_eq!(status()["health"]["state"], "healthy");
    // Every block of two disks: no span loses more than it can.
    let mut harmed = 0;
    for disk in ["01", "04"] {
        let blocks = stored_blocks(&up.data().join("disks").join(disk));
        assert!(blocks.len() > 5, "{} blocks", blocks.len());
        for (block, kind) in blocks
            .iter()
            .zip([Harm::Flip, Harm::FlipSums, Harm::Half, Harm::Zero, Harm::Wipe, Harm::Flip].iter().cycle())
        {
            harm(block, *kind, &mut rng);
            harmed += 1;
        }
    }
    for _ in 0..2 {
        check(&ctl, folder.path(), &source, "back");
    }
    let reported = |disks: &serde_json::Value| -> BTreeSet<String> {
        let bad = disks.as_array().unwrap().iter().filter(|disk| disk["reported_blocks"].as_u64() > Some(0));
        bad.map(|disk| disk["path"].as_str().unwrap().rsplit('/').next().unwrap().to_owned()).collect()
    };
    let expected: BTreeSet<String> = ["01", "04"].map(str::to_owned).into();
    until("the damage is reported", TOO_LONG, || {
        (reported(&json(up.address(), "/api/v1/block-services")["block_services"]) == expected).then_some(())
    });
    let text = ctl.run(["status", "--check"]).code(1).text();
    assert!(text.contains("degraded") && text.contains("bad blocks reported"), "{harmed} harmed: {text}");
    assert_eq!(reported(&ctl.ok("status --json").json()["disks"]), expected);
    let state = status();
    assert_eq!(state["health"]["state"], "degraded");
    assert!(state["health"]["reasons"].to_string().contains("missing or corrupt"), "{state}");
    // Parts of files too, wherever they begin.
    let whole = fs::read(source.join("2500000-1")).unwrap();
    for _ in 0..10 {
        let (offset, length) = (rng.random_range(0..whole.len()), rng.random_range(1..300_000));
        let part = ctl.ok(&format!("cat --offset {offset} --length {length} /data/2500000-1")).stdout;
        assert!(part == whole[offset..whole.len().min(offset + length)], "{offset} {length}");
    }
    up.stop();
}

/// A small file system, unmounted when dropped.
struct Small(PathBuf);

impl Small {
    /// `None` where mounting is not allowed; says so.
    fn mount(at: &Path, bytes: u64) -> Option<Small> {
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"]).arg(at);
        match mount.output() {
            Ok(output) if output.status.success() => Some(Small(at.to_owned())),
            Ok(output) => {
                println!("skipped: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                println!("skipped: mount: {error}");
                None
            }
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_passed_by() {
    const ROOM: u64 = 96 << 20;
    let folder = scratch();
    let data = folder.path().join("data");
    Up::start_with(&data, &["--disks", "7"]).stop();
    // Disk 03 moves to a file system of its own, the others to another of that size: all look alike.
    let (disks, disk) = (data.join("disks"), data.join("disks/03"));
    let aside = folder.path().join("aside");
    fs::rename(&disks, &aside).unwrap();
    fs::create_dir(&disks).unwrap();
    let Some(_others) = Small::mount(&disks, ROOM) else { return };
    fs::create_dir(&disk).unwrap();
    let Some(_small) = Small::mount(&disk, ROOM) else { return };
    let copy = std::process::Command::new("cp").arg("-a").arg(aside.join(".")).arg(&disks).status().unwrap();
    assert!(copy.success());

    let up = Up::start(&data);
    let ctl = up.ctl();
    let mut files = 0;
    let mut put = |count: u64| {
        for _ in 0..count {
            ctl.run_with(["put", "-", &format!("/{files}")], &bytes(600_000, files)).ok();
            files += 1;
        }
        files
    };
    let blocks = || stored_blocks(&disk).len();
    // It takes its share …
    put(5);
    assert!(blocks() > 0);
    // … and is full from one moment to the next; for a second only its host knows.
    let room = rustix::fs::statvfs(&disk).unwrap();
    let filler = usize::try_from(room.f_bavail * room.f_frsize - (64 << 10)).unwrap();
    fs::write(disk.join("filler"), vec![1; filler]).unwrap();
    let before = blocks();
    put(10);
    assert_eq!(blocks(), before, "nothing more goes there");
    let available = || {
        let disks = json(up.address(), "/api/v1/block-services")["block_services"].clone();
        let mut disks = disks.as_array().unwrap().iter();
        disks.find(|disk| disk["path"].as_str().unwrap().ends_with("03")).unwrap()["available_bytes"].clone()
    };
    until("the registry knows that it is full", TOO_LONG, || (available() == 0).then_some(()));
    let files = put(5);
    assert_eq!(blocks(), before);
    for n in 0..files {
        assert!(ctl.ok(&format!("cat /{n}")).stdout == bytes(600_000, n), "/{n}");
    }
    // Room again: it is used again.
    fs::remove_file(disk.join("filler")).unwrap();
    until("the registry knows that it is not", TOO_LONG, || (available() != 0).then_some(()));
    let mut more = files;
    until("it is used again", TOO_LONG, || {
        ctl.run_with(["put", "-", &format!("/{more}")], &bytes(600_000, more)).ok();
        more += 1;
        // The shards hear of it later; meanwhile the others must not run full.
        std::thread::sleep(Duration::from_millis(200));
        (blocks() > before).then_some(())
    });
    ctl.assert_clean();
    up.stop();
}
