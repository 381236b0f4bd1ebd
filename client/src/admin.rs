//! The cluster as a whole: who serves what, and its transactions.

use eggs_proto::pb::block_service_client::BlockServiceClient;
use eggs_proto::pb::{
    crossdir_reply, crossdir_request, registry_reply, registry_request, shard_reply, shard_request,
};
use eggs_proto::{InodeId, ShardId, pb};
use futures_util::{StreamExt, stream};

use crate::Client;
use crate::ask::status_words;
use crate::error::{ClientError, Result, block_error_words};
use crate::types::ShardState;

const SHARDS_IN_FLIGHT: usize = 8;
const EDEN_PAGE: u32 = 1000;

impl Client {
    /// Who serves what, and how the disks feel, fresh from shuckle.
    pub async fn cluster_map(&self) -> Result<pb::ClusterMapReply> {
        let map = self.shared.fetch_map(self.shared.options.timeout).await?;
        self.shared.learn(&map);
        Ok(map)
    }

    /// Every shard asked itself, in order of shards; those that do not answer carry the error.
    pub async fn shard_states(&self) -> Result<Vec<ShardState>> {
        self.cluster_map().await?;
        let asks = stream::iter(ShardId::all()).map(|shard| async move {
            let op = shard_request::Op::Status(pb::ShardStatus {});
            let status = match self.shared.shard_read(shard, op).await {
                Ok(Ok(shard_reply::Result::Status(status))) => Ok(status),
                Ok(Ok(_)) => Err(ClientError::other_reply("status")),
                Ok(Err(error)) => Err(ClientError::from_shard(&error, format_args!("shard {shard}"))),
                Err(error) => Err(error),
            };
            ShardState { shard: shard.0.into(), status }
        });
        Ok(asks.buffered(SHARDS_IN_FLIGHT).collect().await)
    }

    /// Block services asked themselves, by address.
    pub async fn block_stats(&self) -> Result<Vec<(String, Result<Vec<pb::BlockServiceStats>>)>> {
        self.cluster_map().await?;
        let asks = stream::iter(self.shared.map().block_peers()).map(|peer| async move {
            let address = peer.address.to_string();
            let mut client = BlockServiceClient::new(peer.meta);
            let request = pb::BlockStatsRequest { header: Some(self.shared.header()) };
            let patience = self.shared.options.block_timeout;
            let unreachable = |words: String| ClientError::Unreachable {
                tried: format!("block services at {address}: {words}"),
                after: patience,
            };
            let stats = match tokio::time::timeout(patience, client.stats(request)).await {
                Err(_) => Err(unreachable("no answer".to_owned())),
                Ok(Err(status)) => Err(unreachable(status_words(&status))),
                Ok(Ok(reply)) => match reply.into_inner() {
                    pb::BlockStatsReply { error: Some(error), .. } => {
                        Err(unreachable(block_error_words(&error)))
                    }
                    reply => Ok(reply.block_services),
                },
            };
            (address, stats)
        });
        Ok(asks.buffered(SHARDS_IN_FLIGHT).collect().await)
    }

    /// Transactions the coordinator has in flight.
    pub async fn transactions(&self) -> Result<Vec<pb::TransactionInfo>> {
        let op = crossdir_request::Op::ListTransactions(pb::ListTransactions {});
        match self.shared.crossdir_read(op).await? {
            Ok(crossdir_reply::Result::ListTransactions(reply)) => Ok(reply.transactions),
            Ok(_) => Err(ClientError::other_reply("transactions")),
            Err(error) => Err(ClientError::from_crossdir(&error, "the coordinator")),
        }
    }

    /// Sets and clears flags (`eggs_proto::flags`) of block services.
    pub async fn set_flags(&self, services: &[u64], set: u32, clear: u32) -> Result<()> {
        let flags = pb::SetFlags { block_services: services.to_vec(), set, clear };
        self.shared.registry(registry_request::Op::SetFlags(flags), self.shared.options.timeout).await?;
        Ok(())
    }

    /// Takes disks off the list. Refused unless they are decommissioned and gone, and the janitor has found them empty.
    pub async fn forget_block_services(&self, services: &[u64]) -> Result<()> {
        let forget = pb::ForgetBlockServices { block_services: services.to_vec() };
        let op = registry_request::Op::ForgetBlockServices(forget);
        self.shared.registry(op, self.shared.options.timeout).await?;
        Ok(())
    }

    /// Gives the janitor a job: a directory, below which every file is to be stored as the policies have it now. `path`: for
    /// people. A job for that directory that is under way already is the answer to who asks again.
    pub async fn put_restripe(&self, directory: InodeId, path: &str) -> Result<pb::Job> {
        let kind = pb::JanitorTaskKind::JanitorTaskRestripe.into();
        self.put_job(pb::PutJob { id: 0, cancel: false, kind, directory: directory.0, path: path.to_owned() })
            .await
    }

    /// Ends a job. What it has done stays done.
    pub async fn cancel_job(&self, id: u64) -> Result<pb::Job> {
        self.put_job(pb::PutJob { id, cancel: true, ..pb::PutJob::default() }).await
    }

    async fn put_job(&self, job: pb::PutJob) -> Result<pb::Job> {
        let op = registry_request::Op::PutJob(job);
        match self.shared.registry(op, self.shared.options.timeout).await? {
            registry_reply::Result::Job(job) => Ok(job),
            _ => Err(ClientError::other_reply("a job")),
        }
    }

    /// Files being written, of one shard.
    pub async fn eden_files(&self, shard: u8) -> Result<Vec<pb::EdenFile>> {
        let shard = ShardId(shard);
        let mut files: Vec<pb::EdenFile> = Vec::new();
        loop {
            let after_file = files.last().map_or(0, |file| file.file);
            let op = shard_request::Op::ListEden(pb::ListEden { after_file, limit: EDEN_PAGE });
            let page = match self.shared.shard_read(shard, op).await? {
                Ok(shard_reply::Result::ListEden(page)) => page,
                Ok(_) => return Err(ClientError::other_reply("files in writing")),
                Err(error) => return Err(ClientError::from_shard(&error, format_args!("shard {shard}"))),
            };
            let forward = page.files.last().is_some_and(|last| last.file > after_file);
            if page.more && !forward {
                return Err(ClientError::protocol(
                    "a page of files in writing does not follow the one before",
                ));
            }
            files.extend(page.files);
            if !page.more {
                return Ok(files);
            }
        }
    }
}
