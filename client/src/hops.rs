//! Which hosts an operation asked for metadata, and how long each took: kept only for who wants to know.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use eggs_proto::GroupId;

use crate::map::Map;

/// Of more, the first.
const HOPS_MAX: usize = 10_000;

/// One question to one host.
#[derive(Debug, Clone)]
pub struct Hop {
    /// Which group was asked: a shard, the coordinator, the registry.
    pub group: GroupId,
    pub address: Arc<str>,
    /// The machine, when the map knows it.
    pub host: Option<String>,
    pub took: Duration,
}

tokio::task_local! {
    static HOPS: RefCell<Vec<Hop>>;
}

/// Notes a question, when somebody listens.
pub(crate) fn tell(map: &Map, group: GroupId, address: &Arc<str>, took: Duration) {
    let _ = HOPS.try_with(|hops| {
        let mut hops = hops.borrow_mut();
        if hops.len() < HOPS_MAX {
            let host = map.host(address).map(str::to_owned);
            hops.push(Hop { group, address: address.clone(), host, took });
        }
    });
}

/// Does `work`, and says what was asked for it.
pub(crate) async fn heard<T>(work: impl Future<Output = T>) -> (T, Vec<Hop>) {
    HOPS.scope(RefCell::default(), async {
        let done = work.await;
        (done, HOPS.with(RefCell::take))
    })
    .await
}
