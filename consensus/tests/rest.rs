//! What 256 replicated groups cost while nobody asks for anything. Alone in its process: it measures it.

#[path = "replicas/cluster.rs"]
mod cluster;

use std::fs;
use std::time::Duration;

use cluster::{Cluster, eventually};
use eggs_consensus::GroupId;

/// Of one core, all three stores together: 3 % is the goal on a machine that does nothing else.
const BUSY_MAX: f64 = 0.06;
const MEASURED: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_at_rest_cost_almost_nothing() {
    let groups: Vec<GroupId> = (0..256).map(GroupId).collect();
    let mut cluster = Cluster::start_with(3, &groups).await;
    eventually("all sleep", async || {
        let mut asleep = 0;
        for store in cluster.stores() {
            asleep += store.handle().status().await.iter().filter(|status| status.asleep).count();
        }
        asleep == 3 * groups.len()
    })
    .await;
    let before = cpu();
    // Time is what is measured here.
    tokio::time::sleep(MEASURED).await;
    let busy = (cpu() - before).as_secs_f64() / MEASURED.as_secs_f64();
    println!("{:.2} % of a core at rest", 100.0 * busy);
    cluster.stop().await;
    assert!(busy < BUSY_MAX, "{busy}");
}

/// CPU time of this process so far.
fn cpu() -> Duration {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let nanos = tasks.filter_map(|task| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanos.sum())
}
