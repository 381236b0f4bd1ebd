//! The pages on shuckle's port.

use std::collections::BTreeSet;

use eggs_tests::{TOO_LONG, Up, bytes, get, json, scratch, until};

#[test]
fn the_page_needs_nothing_from_elsewhere() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    let page = get(up.address(), "/");
    assert_eq!(page.status, 200);
    assert!(page.headers.to_ascii_lowercase().contains("content-type: text/html"), "{}", page.headers);
    assert!(page.body.contains("EggsFS"), "{}", page.body);
    let mut files = vec![("/".to_owned(), page.body.clone())];
    for attribute in ["src=\"", "href=\""] {
        for reference in page.body.split(attribute).skip(1) {
            let reference = reference.split('"').next().unwrap();
            assert!(reference.starts_with('/') && !reference.starts_with("//"), "{reference}");
            let found = get(up.address(), reference);
            assert_eq!(found.status, 200, "{reference}");
            files.push((reference.to_owned(), found.body));
        }
    }
    assert!(files.len() >= 3, "a style and a script at least");
    for (name, text) in files.iter().filter(|(name, _)| name != "/metrics") {
        // The name of a language is no address.
        let text = text.replace("http://www.w3.org/", "");
        for elsewhere in ["http://", "https://", "@import", "ws://"] {
            assert!(!text.contains(elsewhere), "{name}: {elsewhere}");
        }
    }
    let lost = get(up.address(), "/no/such/page");
    assert_eq!(lost.status, 404);
    assert!(serde_json::from_str::<serde_json::Value>(&lost.body).unwrap()["error"].is_string());
    up.stop();
}

#[test]
fn the_json_behind_it_counts_right() {
    let folder = scratch();
    let up = Up::start_with(&folder.path().join("data"), &["--disks", "7"]);
    let address = up.address();
    for prefix in ["/api", "/api/v1"] {
        for page in ["cluster", "status", "shards", "block-services", "transactions", "version"] {
            assert!(json(address, &format!("{prefix}/{page}")).is_object(), "{page}");
        }
    }
    let status = json(address, "/api/v1/status");
    assert_eq!(status["health"]["state"], "healthy", "{status}");
    assert_eq!(status["cluster_id"], up.ctl().ok("status --json").json()["cluster_id"]);
    let counts = &status["shard_counts"];
    assert_eq!((&counts["alive"], &counts["stale"], &counts["missing"]), (&256.into(), &0.into(), &0.into()));
    assert_eq!(
        (&status["block_service_counts"]["total"], &status["block_service_counts"]["ok"]),
        (&7.into(), &7.into())
    );
    assert_eq!(status["failure_domains"].as_array().unwrap().len(), 7);
    assert_eq!(status["crossdir"]["alive"], true);
    assert_eq!(json(address, "/api/v1/version")["api"], 1);

    let shards = json(address, "/api/v1/shards")["shards"].clone();
    let shards = shards.as_array().unwrap();
    assert_eq!(shards.len(), 256);
    for (n, shard) in shards.iter().enumerate() {
        assert_eq!((&shard["shard"], &shard["state"]), (&n.into(), &"alive".into()));
        assert_eq!(shard["address"], address.to_string());
    }
    let disks = json(address, "/api/v1/block-services")["block_services"].clone();
    let disks = disks.as_array().unwrap();
    let distinct =
        |field: &str| disks.iter().map(|disk| disk[field].to_string()).collect::<BTreeSet<_>>().len();
    assert_eq!((distinct("id"), distinct("path"), distinct("failure_domain")), (7, 7, 7));
    for disk in disks {
        assert_eq!((&disk["state"], &disk["class_name"]), (&"ok".into(), &"FLASH".into()), "{disk}");
        assert!(disk["capacity_bytes"].as_u64().unwrap() >= disk["available_bytes"].as_u64().unwrap());
        assert_eq!(disk["blocks"], 0, "{disk}");
    }

    // Three files of one span each: six blocks of 4 + 2 each.
    for n in 0..3 {
        up.ctl().run_with(["put", "-", &format!("/{n}")], &bytes(1_000_000, n)).ok();
    }
    let total = until("the blocks are counted", TOO_LONG, || {
        let total = json(address, "/api/v1/status")["total"].clone();
        (total["blocks"] == 18).then_some(total)
    });
    let used = total["used_bytes"].as_u64().unwrap();
    assert!((4_500_000..6_000_000).contains(&used), "{total}");
    let df = up.ctl().ok("df --json").json();
    assert_eq!(df["classes"][0]["blocks"], 18, "{df}");
    up.stop();
}

/// The page as a browser has it after some seconds; `None` where there is no browser: says so.
fn rendered(address: std::net::SocketAddr) -> Option<String> {
    let mut browser = std::process::Command::new("chromium");
    browser.args(["--headless", "--no-sandbox", "--virtual-time-budget=5000", "--dump-dom"]);
    match browser.arg(format!("http://{address}/")).output() {
        Ok(output) => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        Err(error) => {
            println!("skipped: chromium: {error}");
            None
        }
    }
}

#[test]
fn a_repair_that_is_done_is_no_alarm() {
    let folder = scratch();
    let up = Up::start_with(&folder.path().join("data"), &["--disks", "7", "--lost-after", "1s"]);
    for n in 0..3 {
        up.ctl().run_with(["put", "-", &format!("/{n}")], &bytes(1_000_000, n)).ok();
    }
    std::fs::remove_dir_all(up.data().join("disks/02")).unwrap();
    let is_empty = |disk: &serde_json::Value| disk["emptying"] == "empty";
    until("the disk is empty", 2 * TOO_LONG, || {
        up.ctl().ok("disk ls --json").json().as_array().unwrap().iter().any(is_empty).then_some(())
    });
    let Some(page) = rendered(up.address()) else { return };
    let part = |from: &str, to: &str| {
        let part = page.split_once(from).unwrap_or_else(|| panic!("no {from} in {page}")).1;
        part.split_once(to).unwrap().0.to_owned()
    };
    let tasks = part("id=\"tasks\"", "</table>");
    assert!(tasks.contains("the disk is empty") && tasks.contains("data-level=\"good\""), "{tasks}");
    assert!(!tasks.contains("data-level=\"bad\""), "{tasks}");
    let note = part("id=\"tile-disks\"", "</div>");
    assert!(note.contains("1 given up") && !note.contains("LOST") && !note.contains("note bad"), "{note}");
    let disks = part("id=\"disks\"", "</table>");
    assert!(disks.contains("given up") && !disks.contains("tag bad"), "{disks}");
    up.stop();
}

#[test]
fn metrics_and_health() {
    let folder = scratch();
    let up = Up::start(&folder.path().join("data"));
    up.ctl().ok("mkdir /d");
    up.ctl().run_with(["put", "-", "/d/f"], &bytes(100_000, 1)).ok();
    up.ctl().ok("cat /d/f");
    let health = get(up.address(), "/healthz");
    assert_eq!(health.status, 200, "{}", health.body);
    let families = until("every part has counted", TOO_LONG, || {
        let families = metrics(&get(up.address(), "/metrics").body);
        let all = ["eggs_shuckle_shards", "eggs_shard_", "eggs_crossdir_"];
        all.iter().all(|part| families.iter().any(|name| name.starts_with(part))).then_some(families)
    });
    assert!(
        families.iter().all(|name| name.starts_with("eggs_") || name.starts_with("process_")),
        "{families:?}"
    );
    up.stop();
}

/// Reads the Prometheus text format; the families that have values.
fn metrics(text: &str) -> BTreeSet<String> {
    let mut declared = BTreeSet::new();
    let mut families = BTreeSet::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(comment) = line.strip_prefix('#') {
            let mut words = comment.split_whitespace();
            let kind = words.next().unwrap();
            assert!(["TYPE", "HELP"].contains(&kind), "{line}");
            let name = words.next().unwrap();
            if kind == "TYPE" {
                assert!(declared.insert(name.to_owned()), "declared twice: {line}");
                let kinds = ["counter", "gauge", "histogram", "summary", "untyped"];
                assert!(kinds.contains(&words.next().unwrap()), "{line}");
            }
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        assert!(value.parse::<f64>().is_ok(), "{line}");
        let (name, labels) = name.split_once('{').unwrap_or((name, "}"));
        assert!(labels.ends_with('}'), "{line}");
        assert!(
            name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':'),
            "{line}"
        );
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        let family = family.filter(|family| declared.contains(*family)).unwrap_or(name);
        assert!(declared.contains(family), "not declared: {line}");
        families.insert(family.to_owned());
    }
    families
}
