//! What people ask about files: are they right, what are their sums, why was a read as it was, how are they stored.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use eggs_tests::{Outcome, StoredBlock, TOO_LONG, Up, bytes, run, scratch, stored_blocks, until};

/// What it prints holds all of `words`.
fn prints(outcome: &Outcome, words: &[&str]) {
    for word in words {
        assert!(outcome.text().contains(word), "no '{word}' in: {}", outcome.text());
    }
}

/// One bit of every block of a disk.
fn flip(up: &Up, disk: &str) -> usize {
    let blocks = stored_blocks(&up.data().join("disks").join(disk));
    blocks.iter().for_each(flip_block);
    blocks.len()
}

fn flip_block(block: &StoredBlock) {
    let file = fs::File::options().read(true).write(true).open(&block.file).unwrap();
    let at = u64::from(block.extent.data_at + block.size / 2);
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 16], at).unwrap();
}

/// A disk that is gone is read from until its daemon looks for it.
fn wait_for_lost(up: &Up, count: usize) {
    until("the lost disks are known", TOO_LONG, || {
        let disks = up.ctl().ok("status --json").json()["disks"].clone();
        let is_lost = |disk: &&serde_json::Value| disk["flags"].as_array().unwrap().contains(&"LOST".into());
        (disks.as_array().unwrap().iter().filter(is_lost).count() == count).then_some(())
    });
}

#[test]
fn verify_finds_what_is_wrong_and_reports_it() {
    let folder = scratch();
    // Nobody mends what is damaged here before it is looked at.
    let up = Up::start_with(&folder.path().join("data"), &["--disks", "6", "--no-janitor"]);
    let ctl = up.ctl();
    ctl.ok("mkdir -p /d/below");
    for (name, size) in
        [("/d/inline", 100), ("/d/below/mirrored", 20_000), ("/d/coded", 3_000_000), ("/d/empty", 0)]
    {
        ctl.run_with(["put", "-", name], &bytes(size, 1)).ok();
    }
    prints(&ctl.ok("verify -r /"), &["4 files", "9 blocks", "nothing is wrong"]);
    let clean = ctl.ok("verify -r /d --json").json();
    assert_eq!(clean["faults"], 0);
    assert_eq!(clean["bytes"], 3_020_100);
    ctl.ok("ln -s /d/coded /d/link");
    for (args, words) in [
        (vec!["verify", "/d"], ["/d", "is a directory"]),
        (vec!["verify", "/nope"], ["/nope", "no such file or directory"]),
        (vec!["verify", "/d/link", "-r"], ["/d/link", "is a symbolic link"]),
    ] {
        let refused = ctl.run(args.iter().copied()).refused(&words);
        prints(&refused, &["0 files", "NOT VERIFIED: 1 refused"]);
        assert!(!refused.text().contains("nothing is wrong"), "{}", refused.text());
    }
    let part = ctl.run(["verify", "/nope", "/d/coded", "--json"]).refused(&["/nope"]).json();
    assert_eq!((&part["files"], &part["faults"], &part["not_verified"]), (&1.into(), &0.into(), &1.into()));
    assert_eq!(part["refused"][0]["path"], "/nope");
    assert_eq!(part["refused"][0]["reason"], "no such file or directory");
    assert_eq!(clean["refused"].as_array().map(Vec::len), Some(0), "{clean}");

    assert!(flip(&up, "02") > 0, "six disks: (4,2) is on each");
    let wrong = ctl.run(["verify", "-r", "/", "--report=false"]).code(1);
    prints(&wrong, &["/d/coded: span at 0: block", "corrupt", "disks/02", "no data lost"]);
    let reported = || -> u64 {
        let disks = ctl.ok("status --json").json()["disks"].clone();
        disks.as_array().unwrap().iter().map(|disk| disk["reported_blocks"].as_u64().unwrap()).sum()
    };
    assert_eq!(reported(), 0, "not asked to");
    let found = ctl.run(["verify", "/d/coded", "--json"]).code(1).json();
    assert_eq!((found["faults"].as_u64(), found["files_lost"].as_u64()), (Some(1), Some(0)), "{found}");
    assert_eq!(found["findings"][0]["kind"], "corrupt");
    assert!(found["findings"][0]["block"]["path"].as_str().unwrap().ends_with("disks/02"));
    assert_eq!(reported(), 1);

    // Parity is looked at too: whichever disks have it.
    for disk in ["03", "04"] {
        fs::remove_dir_all(up.data().join("disks").join(disk)).unwrap();
    }
    wait_for_lost(&up, 2);
    let lost = ctl.run(["verify", "/d/coded"]).code(1);
    prints(&lost, &["too few blocks are right", "1 of them have lost data"]);
    up.stop();
}

#[test]
fn sums_are_those_of_other_tools() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let ctl = up.ctl();
    ctl.run_with(["put", "-", "/abc"], b"abc").ok();
    prints(&ctl.ok("checksum /abc"), &["352441c2  /abc"]);
    prints(&ctl.ok("checksum -a crc32 --read /abc"), &["352441c2  /abc"]);
    prints(
        &ctl.ok("checksum -a sha256 /abc"),
        &["ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  /abc"],
    );
    // Names that would break a line, as `sha256sum` has them: it checks what is printed.
    let local = folder.path().join("local");
    fs::create_dir(&local).unwrap();
    ctl.ok(&format!("mkdir -p {}", local.display()));
    let mut sums = Vec::new();
    for name in ["a\nb", "back\\slash", "return\r", "plain"] {
        let path = local.join(name);
        fs::write(&path, b"abc").unwrap();
        let path = path.to_str().unwrap();
        ctl.run_with(["put", "-", path], b"abc").ok();
        sums.extend(ctl.run(["checksum", "-a", "sha256", path]).ok().stdout);
    }
    assert_eq!(sums.iter().filter(|&&byte| byte == b'\n').count(), 4, "{}", String::from_utf8_lossy(&sums));
    let mut check = std::process::Command::new("sha256sum");
    let checked = run(check.args(["--check", "--strict"]), &sums, TOO_LONG).ok();
    assert_eq!(checked.text().matches(": OK").count(), 4, "{}", checked.text());
    let sums = ctl.run(["checksum", "-a", "blake3", "/abc", "/none", "--json"]).code(1);
    assert_eq!(
        sums.json()[0]["checksum"],
        "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
    );
    up.stop();
}

#[test]
fn why_tells_what_was_fetched_and_what_was_rebuilt() {
    let folder = scratch();
    let up = Up::start_with(&folder.path().join("data"), &["--disks", "6"]);
    let ctl = up.ctl();
    ctl.run_with(["put", "-", "/f"], &bytes(3_000_000, 1)).ok();
    let told = ctl.ok("why /f --json").json();
    assert_eq!(told["read"]["crc_right"], true);
    assert_eq!(told["read"]["bytes"], 3_000_000);
    assert!(!told["resolve"]["hops"].as_array().unwrap().is_empty());
    let span = &told["spans"][0];
    assert_eq!(
        (&span["data"], &span["parity"], &span["under_spread"]),
        (&4.into(), &2.into(), &false.into())
    );
    let fetches = span["fetches"].as_array().unwrap();
    assert!(fetches.iter().all(|fetch| fetch["end"] == "fetched" || fetch["end"] == "given up"), "{told}");
    // A cell and no more.
    let small = ctl.ok("why /f --offset 1000 --length 10 --json").json();
    assert_eq!(small["spans"][0]["fetches"].as_array().unwrap().len(), 1, "{small}");

    // The disk of the first data block goes.
    let first = span["blocks"][0]["path"].as_str().unwrap().to_owned();
    fs::remove_dir_all(&first).unwrap();
    wait_for_lost(&up, 1);
    let told = ctl.ok("why /f --json").json();
    assert_eq!(told["read"]["crc_right"], true);
    assert!(told["spans"][0]["rebuilt"].as_array().unwrap().contains(&0.into()), "{told}");
    prints(&ctl.ok("why /f"), &["rebuilt from the others: data blocks 0", "the file's CRC is right"]);
    prints(&ctl.ok("stat /f"), &["layout=4+2", "domain=", &first]);
    up.stop();
}

#[test]
fn why_explains_a_read_that_fails_up_to_there() {
    let folder = scratch();
    let up = Up::start_with(&folder.path().join("data"), &["--disks", "6"]);
    let ctl = up.ctl();
    ctl.ok("policy set / span=1M:2+1");
    ctl.run_with(["put", "-", "/f"], &bytes(4 << 20, 1)).ok();
    let spans = ctl.ok("stat /f --json").json()["spans"].clone();
    // Two blocks of the second span; of the others none.
    for block in &spans[1]["blocks"].as_array().unwrap()[..2] {
        let disk = Path::new(block["path"].as_str().unwrap());
        let id = block["id"].as_str().unwrap();
        let mut stored = stored_blocks(disk).into_iter();
        flip_block(&stored.find(|stored| format!("{:#018x}", stored.id) == id).unwrap());
    }
    let told = ctl.run(["why", "/f"]).refused(&["/f", "data lost"]);
    prints(
        &told,
        &["found in", "fetched in", "span at 1048576", "CORRUPT", "1048576 bytes read in", "READ FAILED"],
    );
    let told = ctl.run(["why", "/f", "--json"]).refused(&["/f", "data lost"]).json();
    assert!(told["error"].as_str().unwrap().contains("data lost"), "{told}");
    assert_eq!(
        (&told["read"]["bytes"], &told["read"]["crc_right"]),
        (&(1 << 20).into(), &serde_json::Value::Null)
    );
    assert!(
        told["spans"][1]["fetches"].as_array().unwrap().iter().any(|fetch| fetch["end"] == "corrupt"),
        "{told}"
    );
    assert!(ctl.ok("why /f --length 1000 --json").json()["error"].is_null());
    up.stop();
}

#[test]
fn policies_are_set_as_they_are_printed() {
    let folder = scratch();
    let up = Up::start_with(&folder.path().join("data"), &["--disks", "6"]);
    let ctl = up.ctl();
    ctl.ok("mkdir -p /p/below");
    let set = ctl.ok("policy set /p span=8K:mirror2,1M:2+1 stripe=64K snapshot=30d,5v");
    prints(&set, &["span=8K:mirror2,1M:2+1\n", "stripe=64K\n", "restripe /p"]);
    let got = ctl.ok("policy get /p/below --json").json();
    assert_eq!(got["text"]["span"], "8K:mirror2,1M:2+1");
    assert_eq!(got["text"]["snapshot"], "30d,5v");
    assert!(got["own"]["span"].is_null());
    ctl.run_with(["put", "-", "/p/below/f"], &bytes(1_500_000, 1)).ok();
    let spans = ctl.ok("stat /p/below/f --json").json()["spans"].clone();
    let layout =
        |n: usize| (spans[n]["size"].as_u64(), spans[n]["data"].as_u64(), spans[n]["parity"].as_u64());
    assert_eq!(layout(0), (Some(1 << 20), Some(2), Some(1)));
    assert_eq!(spans.as_array().unwrap().len(), 2);
    assert_eq!(ctl.ok("cat /p/below/f").stdout, bytes(1_500_000, 1));
    prints(&ctl.ok("policy set /p span=1M:10+4"), &["needs 14 FLASH disks, there are 6"]);
    ctl.ok("ln -s /p /link");
    prints(&ctl.ok("policy set /link stripe=128K"), &["restripe /link"]);
    let secret = up.data().join("secret");
    ctl.with_secret(secret).ok("restripe /link");
    ctl.ok("policy unset /p all");
    prints(&ctl.ok("policy get /p"), &["span=4K:inline,64K:mirror3,64M:4+2 (inherited)"]);
    let wrong = ctl.run(["policy", "set", "/p", "span=1M:inline"]).code(2);
    assert!(wrong.stderr.contains("over the limit"), "{}", wrong.stderr);
    ctl.refused("policy set /none span=1M:2+1", &["/none", "no such file or directory"]);
    up.stop();
}
