//! Who replicates what: looking at it, changing it, waiting until it is so.

use std::time::{Duration, Instant};

use eggs_proto::pb::registry_request;
use eggs_proto::{GroupId, StoreId, pb};

use crate::Client;
use crate::error::Result;

/// Between looks at a cluster that is being waited for.
const LOOKED_EVERY: Duration = Duration::from_millis(200);

impl Client {
    /// Every data directory that holds replicas, fresh from shuckle, in the order of the ids.
    pub async fn stores(&self) -> Result<Vec<pb::StoreInfo>> {
        Ok(self.cluster_map().await?.stores)
    }

    /// Every replicated group, fresh from shuckle: who leads, who has a vote, how far each is.
    pub async fn groups(&self) -> Result<Vec<pb::GroupPlace>> {
        Ok(self.cluster_map().await?.groups)
    }

    /// Says which stores are to have a vote in `group`, and which of them is to lead (`None`: as it is). The
    /// group's leader gets it there step by step: [`Client::wait_for`]. `force`: even when too few would be
    /// left to be safe. Needs [`crate::Options::secret`].
    pub async fn set_replicas(
        &self,
        group: GroupId,
        wanted: &[StoreId],
        preferred: Option<StoreId>,
        force: bool,
    ) -> Result<()> {
        let op = pb::SetReplicas {
            group: group.0.into(),
            wanted: wanted.iter().map(|store| store.0).collect(),
            preferred: preferred.map_or(0, |store| store.0),
            force,
        };
        let op = registry_request::Op::SetReplicas(op);
        self.shared.registry(op, self.shared.options.timeout).await.map(drop)
    }

    /// Has every replica moved off a host, or (`undo`) lets it take part again. Needs
    /// [`crate::Options::secret`].
    pub async fn drain_host(&self, host: &str, undo: bool) -> Result<()> {
        let op = registry_request::Op::DrainHost(pb::DrainHost { host: host.to_owned(), undo });
        self.shared.registry(op, self.shared.options.timeout).await.map(drop)
    }

    /// Looks at fresh maps until `judge` is content; `None` when it is not within `timeout`. It sees every
    /// map, to tell of progress. A shuckle that is away meanwhile is waited for too.
    pub async fn wait_for<T>(
        &self,
        timeout: Duration,
        mut judge: impl FnMut(&pb::ClusterMapReply) -> Option<T>,
    ) -> Result<Option<T>> {
        let started = Instant::now();
        loop {
            let left = timeout.saturating_sub(started.elapsed());
            match self.shared.fetch_map(left.clamp(LOOKED_EVERY, self.shared.options.timeout)).await {
                Ok(map) => {
                    self.shared.learn(&map);
                    if let Some(found) = judge(&map) {
                        return Ok(Some(found));
                    }
                }
                Err(error) if error.is_unreachable() && !left.is_zero() => {
                    tracing::debug!(%error, "waiting for shuckle");
                }
                Err(error) => return Err(error),
            }
            if left.is_zero() {
                return Ok(None);
            }
            tokio::time::sleep(LOOKED_EVERY.min(left)).await;
        }
    }
}
