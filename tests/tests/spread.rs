//! Spans that are under-spread because the cluster was small: they are shown, and spread when it has grown.

use std::fs;
use std::time::Duration;

use eggs_tests::{Ctl, Daemons, assert_same_tree, bytes, get, json, problems, scratch, seed, until};
use serde_json::Value;

/// Of spreading, on a busy machine.
const LIMIT: Duration = Duration::from_secs(180);
/// As many as a span of the default policies has blocks, with the two that are there from the beginning.
const NEW_HOSTS: [&str; 4] = ["blockd-c", "blockd-d", "blockd-e", "blockd-f"];

/// Of files, what `stat` says: spans that are under-spread, all that have blocks, and their blocks.
fn counted(ctl: &Ctl, files: &[String]) -> (u64, u64, u64) {
    let (mut under_spread, mut spans, mut blocks) = (0, 0, 0);
    for file in files {
        for span in ctl.ok(&format!("stat --json /data/{file}")).json()["spans"].as_array().unwrap() {
            let Some(of_span) = span["blocks"].as_array().filter(|blocks| !blocks.is_empty()) else {
                continue;
            };
            spans += 1;
            blocks += of_span.len() as u64;
            under_spread += u64::from(span["under_spread"] == true);
        }
    }
    (under_spread, spans, blocks)
}

/// What `repairs` and the dashboard say, once they say this.
fn wait_until_told(daemons: &Daemons, ctl: &Ctl, (spans, of): (u64, u64)) -> Value {
    let wanted = serde_json::json!({ "spans": spans, "of": of });
    until("the under-spread spans are counted", LIMIT, || {
        let told = ctl.ok("repairs --json").json();
        let dashboard = json(daemons.shuckle(), "/api/v1/janitor");
        let task = told["tasks"].as_array().unwrap().iter().find(|task| task["kind"] == "spread")?.clone();
        (told["under_spread"] == wanted && dashboard["under_spread"] == wanted).then_some(task)
    })
}

#[test]
fn what_a_small_cluster_has_put_together_is_spread_when_it_has_grown() {
    seed();
    let folder = scratch();
    let source = folder.path().join("source");
    fs::create_dir(&source).unwrap();
    let mut files = Vec::new();
    for (n, size) in [100, 5000, 70_000, 300_000, 1 << 20, 3_500_000].into_iter().enumerate() {
        for copy in 0..2 {
            let name = format!("{size}-{copy}");
            fs::write(source.join(&name), bytes(size, (n * 10 + copy) as u64)).unwrap();
            files.push(name);
        }
    }
    let mut daemons = Daemons::start(&folder.path().join("cluster"));
    let ctl = daemons.ctl().with_secret(daemons.secret()).in_folder(folder.path());
    ctl.ok("put -r source /data");
    let (near, all, blocks) = counted(&ctl, &files);
    assert!(near == all && all > 0, "two failure domains are too few for any of {all}: {near}");

    daemons.launch("janitor-spread");
    let task = wait_until_told(&daemons, &ctl, (near, all));
    assert_eq!(task["state"], format!("{near} of {all} spans are under-spread"), "{task}");
    assert!(ctl.ok("repairs").text().contains("are under-spread"));
    assert_eq!(
        problems(&json(daemons.shuckle(), "/api/v1/status")),
        Vec::<String>::new(),
        "it is no problem"
    );

    NEW_HOSTS.into_iter().for_each(|host| daemons.launch(host));
    let task = wait_until_told(&daemons, &ctl, (0, all));
    assert_eq!(task["bytes_done"], task["bytes_total"], "{task}");
    assert_eq!(counted(&ctl, &files), (0, all, blocks));
    let metrics = get(daemons.address("janitor-spread"), "/metrics").body;
    assert!(metrics.lines().any(|line| line == "eggs_janitor_under_spread_spans 0"), "{metrics}");
    assert!(metrics.contains("eggs_janitor_spread_blocks_total"), "{metrics}");
    ctl.ok("get -r /data back");
    assert_same_tree(&source, &folder.path().join("back"));
    let _ = ctl.run(["verify", "-r", "/"]).code(0);
    ctl.assert_clean();

    until("what was moved is erased", LIMIT, || {
        let disks = json(daemons.shuckle(), "/api/v1/block-services")["block_services"].clone();
        let on_disks =
            disks.as_array().unwrap().iter().filter_map(|disk| disk["blocks"].as_u64()).sum::<u64>();
        (on_disks == blocks).then_some(())
    });
    daemons.stop("janitor-spread");
}
