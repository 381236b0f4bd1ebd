//! The requests, as plain functions over the messages: any transport can serve them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_blockd_core::admission::{admit_erase, check_header};
use eggs_blockd_core::{Identity, WriteAdmission};
use eggs_daemon::CancellationToken;
use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::write_block_request::Part;
use eggs_proto::{BlockError, BlockId, BlockServiceId, ClusterId, ServiceError, mac, pb};
use futures_util::Stream;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::DropGuard;

use crate::disk::{Disk, DiskConfig, Ids, Look, Refusal};
use crate::limits::{
    CHECK_INTERVAL, DRAIN_MAX, PIECES_QUEUED, READS_MAX, SILENCE_MAX, TRANSFER_MAX, WAIT_MAX, WAITING_MAX,
    WRITES_MAX,
};
use crate::store::{Contents, OpenError, OpenProblem, inspect};
use crate::telemetry::{self, Operation};
use crate::transfer::{forward, give, next_part, outcome, receive, send};

/// Between looks whether the threads have let go of the disks.
const RELEASE_INTERVAL: Duration = Duration::from_millis(2);

/// What a block service is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// Empty folders are formatted for it; disks of another one are refused.
    pub cluster: ClusterId,
    /// At least one.
    pub disks: Vec<DiskConfig>,
}

/// Serves the blocks of a set of disks. Cheap to clone; ends with [`Service::stop`] or the last clone.
#[derive(Debug, Clone)]
pub struct Service {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    cluster: ClusterId,
    disks: Vec<Arc<Disk>>,
    writes: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    closing: CancellationToken,
    monitors: tokio::sync::Mutex<JoinSet<()>>,
    _close_on_drop: DropGuard,
}

/// A place among the blocks in flight: the disk's and the process's.
#[derive(Debug)]
struct Place {
    _disk: OwnedSemaphorePermit,
    _total: OwnedSemaphorePermit,
}

/// The cluster that the formatted ones among `disks` belong to; `None` when there is none yet. Changes nothing.
///
/// # Errors
/// Disks that do not go together, or that cannot be used; as [`Service::open`].
pub fn known_cluster(disks: &[DiskConfig]) -> Result<Option<ClusterId>, OpenError> {
    refuse_same_paths(disks)?;
    let mut known = None;
    for disk in disks {
        match inspect(&disk.path) {
            Ok(Contents::Disk(Identity { cluster, .. })) => {
                let ours = *known.get_or_insert(cluster);
                if ours != cluster {
                    let problem = OpenProblem::AnotherCluster { theirs: cluster, ours };
                    return Err(OpenError { path: disk.path.clone(), problem });
                }
            }
            Ok(Contents::Absent | Contents::Empty) => {}
            Err(error) if disk.expect_existing && error.problem.is_loss() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(known)
}

/// Whether [`Service::open`] would format any of them.
pub fn would_format(disks: &[DiskConfig]) -> bool {
    disks.iter().any(|disk| {
        !disk.expect_existing && matches!(inspect(&disk.path), Ok(Contents::Absent | Contents::Empty))
    })
}

fn refuse_same_paths(disks: &[DiskConfig]) -> Result<(), OpenError> {
    let mut paths: Vec<PathBuf> = Vec::with_capacity(disks.len());
    for disk in disks {
        let path = std::fs::canonicalize(&disk.path).or_else(|_| std::path::absolute(&disk.path));
        let path = path.unwrap_or_else(|_| disk.path.clone());
        if paths.contains(&path) {
            let problem = OpenProblem::Mismatch("it is given twice".to_owned());
            return Err(OpenError { path: disk.path.clone(), problem });
        }
        paths.push(path);
    }
    Ok(())
}

impl Service {
    /// Opens the disks, formatting empty folders, and begins to watch them. Call it in a tokio runtime.
    ///
    /// # Errors
    /// The first disk that people must see to: in use, of another cluster, newer, damaged, not ours.
    pub fn open(config: Config) -> Result<Service, OpenError> {
        let Config { cluster, disks } = config;
        // All are looked at before any is formatted.
        if let Some(theirs) = known_cluster(&disks)?.filter(|&theirs| theirs != cluster) {
            let problem = OpenProblem::AnotherCluster { theirs, ours: cluster };
            let of_theirs = |disk: &&DiskConfig| matches!(inspect(&disk.path), Ok(Contents::Disk(_)));
            let path = disks.iter().find(of_theirs).map(|disk| disk.path.clone()).unwrap_or_default();
            return Err(OpenError { path, problem });
        }
        let closing = CancellationToken::new();
        let ids = Ids::default();
        let mut opened = Vec::with_capacity(disks.len());
        for mut disk in disks {
            disk.path = std::path::absolute(&disk.path).unwrap_or(disk.path);
            opened.push(Disk::open(disk, cluster, Arc::clone(&ids))?);
        }
        let mut monitors = JoinSet::new();
        let mut disks = Vec::with_capacity(opened.len());
        for (disk, look) in opened {
            let disk = Arc::new(disk);
            count_blocks(look, &closing);
            monitors.spawn(monitor(Arc::clone(&disk), closing.clone()));
            disks.push(disk);
        }
        Ok(Service {
            inner: Arc::new(Inner {
                cluster,
                disks,
                writes: Arc::new(Semaphore::new(WRITES_MAX)),
                reads: Arc::new(Semaphore::new(READS_MAX)),
                waiting: Arc::new(Semaphore::new(WAITING_MAX)),
                monitors: tokio::sync::Mutex::new(monitors),
                _close_on_drop: closing.clone().drop_guard(),
                closing,
            }),
        })
    }

    /// The cluster it serves.
    pub fn cluster(&self) -> ClusterId {
        self.inner.cluster
    }

    pub(crate) fn disks(&self) -> &[Arc<Disk>] {
        &self.inner.disks
    }

    /// For `/healthz`: not well when every disk is lost.
    pub fn health(&self) -> impl Fn() -> Result<(), String> + Send + Sync + 'static {
        let inner = Arc::downgrade(&self.inner);
        move || {
            let Some(inner) = inner.upgrade() else { return Err("stopping".to_owned()) };
            let problems = inner.disks.iter().map(|disk| disk.report().problem);
            if problems.into_iter().all(|problem| !problem.is_empty()) {
                return Err("all disks are lost".to_owned());
            }
            Ok(())
        }
    }

    /// Takes no new requests, lets those in flight finish for a while, and lets go of the disks.
    pub async fn stop(&self) {
        let inner = &self.inner;
        inner.closing.cancel();
        let drained = async {
            let _ = inner.writes.acquire_many(WRITES_MAX as u32).await;
            let _ = inner.reads.acquire_many(READS_MAX as u32).await;
        };
        if timeout(DRAIN_MAX, drained).await.is_err() {
            tracing::warn!("blocks in flight did not finish in time");
        }
        let mut monitors = inner.monitors.lock().await;
        let joined = async { while monitors.join_next().await.is_some() {} };
        let _ = timeout(DRAIN_MAX, joined).await;
        let closed: Vec<_> = inner.disks.iter().map(|disk| disk.close()).collect();
        let released = async {
            while closed.iter().any(|store| store.strong_count() > 0) {
                sleep(RELEASE_INTERVAL).await;
            }
        };
        // A hung disk is not waited for.
        let _ = timeout(CHECK_INTERVAL, released).await;
    }

    /// A block comes in: a start, then data until it is whole. Answered once it is durable (BL-1).
    pub async fn write<S, E>(&self, messages: S) -> pb::WriteBlockReply
    where
        S: Stream<Item = Result<pb::WriteBlockRequest, E>> + Unpin,
    {
        let begun = Instant::now();
        let result = self.try_write(messages).await;
        telemetry::done(Operation::Write, begun, result.as_ref().map(|_| ()));
        use pb::write_block_reply::Result::{Error, Proof};
        let result = match result {
            Ok(proof) => Proof(Bytes::copy_from_slice(&proof)),
            Err(refusal) => Error(refusal.into()),
        };
        pb::WriteBlockReply { header: Some(reply_header()), result: Some(result) }
    }

    async fn try_write<S, E>(&self, mut messages: S) -> Result<mac::Mac, Refusal>
    where
        S: Stream<Item = Result<pb::WriteBlockRequest, E>> + Unpin,
    {
        let deadline = Instant::now() + TRANSFER_MAX;
        let Some(Part::Start(start)) = next_part(&mut messages, deadline).await? else {
            return Err(Refusal::new(BlockError::Malformed, "a write begins with what is to be written"));
        };
        let disk = self.admit(start.header.as_ref(), start.block_service)?;
        let store = disk.store()?;
        let what = || format!("block {} on {}", BlockId(start.block), disk.path().display());
        let admission =
            WriteAdmission::decide(store.identity(), &start).map_err(|error| Refusal::new(error, what()))?;
        let place = self.place(&disk.writes, &self.inner.writes).await?;
        let (pieces, receiver) = mpsc::channel(PIECES_QUEUED);
        let task = {
            let disk = Arc::clone(&disk);
            tokio::task::spawn_blocking(move || {
                let _place = place;
                let result = receive(&store, admission, receiver).map_err(|error| disk.fault(&error));
                if result.is_ok() {
                    telemetry::written(store.identity().service, admission.size);
                }
                result
            })
        };
        let forwarded = forward(&mut messages, &pieces, admission.size, deadline).await;
        // The thread ends with the queue: whole, or cut off.
        drop(pieces);
        let result = outcome(task, deadline, what).await;
        match (forwarded, result) {
            // The reason it was cut off says more than that it was.
            (Err(refusal), Err(Refusal { code: BlockError::WrongSize, .. })) => Err(refusal),
            (_, result) => result,
        }
    }

    /// A range of a block goes out: pieces, then their CRC; or an error, at any point (BL-8).
    pub fn fetch(&self, request: pb::FetchBlockRequest) -> mpsc::Receiver<pb::FetchBlockReply> {
        let (pieces, receiver) = mpsc::channel(PIECES_QUEUED);
        let service = self.clone();
        // Ends with the receiver, or by its deadlines.
        tokio::spawn(async move {
            let begun = Instant::now();
            let result = service.try_fetch(&request, &pieces).await;
            telemetry::done(Operation::Fetch, begun, result.as_ref().map(|_| ()));
            use pb::fetch_block_reply::Part;
            let last = match result {
                Ok(crc) => Part::Crc(crc),
                Err(refusal) => Part::Error(refusal.into()),
            };
            let _ = timeout(SILENCE_MAX, pieces.send(pb::FetchBlockReply { part: Some(last) })).await;
        });
        receiver
    }

    async fn try_fetch(
        &self,
        request: &pb::FetchBlockRequest,
        pieces: &mpsc::Sender<pb::FetchBlockReply>,
    ) -> Result<u32, Refusal> {
        let disk = self.admit(request.header.as_ref(), request.block_service)?;
        let store = disk.store()?;
        let place = self.place(&disk.reads, &self.inner.reads).await?;
        let deadline = Instant::now() + TRANSFER_MAX;
        let (block, offset, length) = (BlockId(request.block), request.offset, request.length);
        let (pieces, runtime) = (pieces.clone(), Handle::current());
        let task = tokio::task::spawn_blocking(move || {
            let _place = place;
            let result =
                send(&store, block, offset, length, |piece| give(&runtime, &pieces, piece, deadline));
            if result.is_ok() {
                telemetry::read(store.identity().service, length);
            }
            result.map_err(|error| disk.fault(&error))
        });
        outcome(task, deadline, || format!("block {block}")).await
    }

    /// Removes a block; answered once that is durable (BL-5).
    pub async fn erase(&self, request: pb::EraseBlockRequest) -> pb::EraseBlockReply {
        let begun = Instant::now();
        let result = self.try_erase(&request).await;
        telemetry::done(Operation::Erase, begun, result.as_ref().map(|_| ()));
        use pb::erase_block_reply::Result::{Error, Proof};
        let result = match result {
            Ok(proof) => Proof(Bytes::copy_from_slice(&proof)),
            Err(refusal) => Error(refusal.into()),
        };
        pb::EraseBlockReply { header: Some(reply_header()), result: Some(result) }
    }

    async fn try_erase(&self, request: &pb::EraseBlockRequest) -> Result<mac::Mac, Refusal> {
        let disk = self.admit(request.header.as_ref(), request.block_service)?;
        let store = disk.store()?;
        let block = BlockId(request.block);
        let what = || format!("block {block} on {}", disk.path().display());
        let proof = admit_erase(store.identity(), request).map_err(|error| Refusal::new(error, what()))?;
        let place = self.place(&disk.writes, &self.inner.writes).await?;
        let task = {
            let disk = Arc::clone(&disk);
            tokio::task::spawn_blocking(move || {
                let _place = place;
                store.erase(block).map_err(|error| disk.fault(&error))
            })
        };
        outcome(task, Instant::now() + TRANSFER_MAX, what).await?;
        Ok(proof)
    }

    /// What the disks hold; from memory.
    pub fn stats(&self, request: &pb::BlockStatsRequest) -> pb::BlockStatsReply {
        let checked = check_header(request.header.as_ref(), self.inner.cluster);
        let block_services = match checked {
            Err(_) => Vec::new(),
            Ok(()) => self.reports().into_iter().map(stats_of).collect(),
        };
        pb::BlockStatsReply {
            header: Some(reply_header()),
            error: checked.err().map(|error| error.with("statistics")),
            block_services,
        }
    }

    /// The disk a request is for, when the request is for us at all.
    fn admit(&self, header: Option<&pb::RequestHeader>, service: u64) -> Result<Arc<Disk>, Refusal> {
        let id = BlockServiceId(service);
        check_header(header, self.inner.cluster)
            .map_err(|error| Refusal::new(error, format!("request to block service {id}")))?;
        if self.inner.closing.is_cancelled() {
            return Err(Refusal::new(BlockError::Busy, "the daemon is stopping"));
        }
        let disk = self.inner.disks.iter().find(|disk| disk.id() == Some(id));
        disk.cloned().ok_or_else(|| Refusal::new(BlockError::UnknownBlockService, id.to_string()))
    }

    /// A place for a block in flight; waits for one, but not long, and not in any crowd (BL-9).
    async fn place(&self, disk: &Arc<Semaphore>, total: &Arc<Semaphore>) -> Result<Place, Refusal> {
        let busy = || Refusal::new(BlockError::Busy, "too many blocks in flight");
        let _waiting = self.inner.waiting.try_acquire().map_err(|_| busy())?;
        let both = async {
            // The disk's first: a hung disk's queue must not take places from the others.
            let of_disk = Arc::clone(disk).acquire_owned().await.map_err(|_| busy())?;
            let of_total = Arc::clone(total).acquire_owned().await.map_err(|_| busy())?;
            Ok(Place { _disk: of_disk, _total: of_total })
        };
        timeout(WAIT_MAX, both).await.unwrap_or_else(|_| Err(busy()))
    }
}

fn reply_header() -> pb::ReplyHeader {
    pb::ReplyHeader { version: PROTOCOL_VERSION, time: eggs_daemon::clock::wall().0 }
}

fn stats_of(report: pb::BlockServiceReport) -> pb::BlockServiceStats {
    pb::BlockServiceStats {
        id: report.id,
        storage_class: report.storage_class,
        capacity_bytes: report.capacity_bytes,
        available_bytes: report.available_bytes,
        used_bytes: report.used_bytes,
        blocks: report.blocks,
        io_errors: report.io_errors,
        problem: report.problem,
    }
}

/// Looks at a disk every second, until the service closes.
async fn monitor(disk: Arc<Disk>, closing: CancellationToken) {
    loop {
        tokio::select! {
            () = closing.cancelled() => return,
            () = sleep(CHECK_INTERVAL) => {}
        }
        let looking = Arc::clone(&disk);
        let look = tokio::task::spawn_blocking(move || looking.look());
        tokio::select! {
            // A hung disk is left to itself.
            () = closing.cancelled() => return,
            look = look => if let Ok(look) = look { count_blocks(look, &closing) },
        }
    }
}

/// Counts a disk's blocks in the background.
fn count_blocks(look: Look, closing: &CancellationToken) {
    let Look::Opened(store) = look else { return };
    let closing = closing.clone();
    // Not joined: it ends with the service, and holds nothing but the disk.
    tokio::task::spawn_blocking(move || {
        let begun = Instant::now();
        let path = store.path().display();
        match store.scan(|| closing.is_cancelled() || store.check().is_err()) {
            Ok(()) => {
                let totals = store.totals();
                tracing::debug!(%path, blocks = totals.blocks, bytes = totals.used_bytes, elapsed = ?begun.elapsed(), "blocks counted");
            }
            Err(error) => tracing::warn!(%path, %error, "blocks were not counted"),
        }
    });
}
