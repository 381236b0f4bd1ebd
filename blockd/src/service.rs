//! The requests, as plain functions over the messages: any transport can serve them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use eggs_blockd_core::admission::check_header;
use eggs_blockd_core::{Extent, Identity, WriteAdmission};
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

use crate::disk::{Disk, DiskConfig, Ids, Refusal};
use crate::limits::{
    BATCHES_BYTES_MAX, CHECK_INTERVAL, DRAIN_MAX, MAINTENANCE_INTERVAL, MAINTENANCE_PAUSE, PIECES_QUEUED,
    READS_MAX, SILENCE_MAX, TRANSFER_MAX, WAIT_MAX, WAITING_MAX, WRITES_MAX, WRITES_PER_DISK_MAX,
};
use crate::store::{Contents, OpenError, OpenProblem, inspect, segment_path};
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
    /// Random: tells this process from one that has, or had, copies of its disks.
    boot: u64,
    disks: Vec<Arc<Disk>>,
    writes: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    waiting_writes: Semaphore,
    /// Apart: a crowd of writers must not keep readers away.
    waiting_reads: Semaphore,
    /// Bytes that requests of several blocks hold.
    batches: Arc<Semaphore>,
    closing: CancellationToken,
    monitors: tokio::sync::Mutex<JoinSet<()>>,
    _close_on_drop: DropGuard,
}

/// A place among the blocks in flight: the disk's and the process's.
#[derive(Debug)]
pub(crate) struct Place {
    _disk: OwnedSemaphorePermit,
    _total: OwnedSemaphorePermit,
}

/// The cluster that all the formatted ones among `disks` belong to; `None` when there is none yet, or more than one.
/// Changes nothing.
pub fn known_cluster(disks: &[DiskConfig]) -> Option<ClusterId> {
    let mut known = disks.iter().filter_map(|disk| cluster_of(&disk.path));
    let first = known.next()?;
    known.all(|other| other == first).then_some(first)
}

fn cluster_of(path: &Path) -> Option<ClusterId> {
    match inspect(path) {
        Ok(Contents::Disk(Identity { cluster, .. })) => Some(cluster),
        _ => None,
    }
}

/// Refuses disks of another cluster when none is of this: it is the cluster that is the wrong one, and nothing is to be
/// formatted for it. Changes nothing.
///
/// # Errors
/// The first of them.
pub fn refuse_other_cluster(disks: &[DiskConfig], ours: ClusterId) -> Result<(), OpenError> {
    let mut foreign = None;
    for disk in disks {
        match cluster_of(&disk.path) {
            Some(cluster) if cluster == ours => return Ok(()),
            Some(theirs) => _ = foreign.get_or_insert((&disk.path, theirs)),
            None => {}
        }
    }
    let Some((path, theirs)) = foreign else { return Ok(()) };
    Err(OpenError { path: path.clone(), problem: OpenProblem::AnotherCluster { theirs, ours } })
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
    /// When no disk can be served and people must see to one: in use, of another cluster, newer, damaged, not ours.
    /// Beside others such a disk is lost, and looked for.
    pub fn open(config: Config) -> Result<Service, OpenError> {
        let Config { cluster, disks } = config;
        refuse_same_paths(&disks)?;
        refuse_other_cluster(&disks, cluster)?;
        let closing = CancellationToken::new();
        let ids = Ids::default();
        let mut opened = Vec::with_capacity(disks.len());
        let mut refusal = None;
        for mut disk in disks {
            disk.path = std::path::absolute(&disk.path).unwrap_or(disk.path);
            let (disk, error) = Disk::open(disk, cluster, Arc::clone(&ids));
            opened.push(disk);
            let loss =
                |error: &OpenError, disk: &Disk| disk.config().expect_existing && error.problem.is_loss();
            refusal = refusal.or(error.filter(|error| opened.last().is_some_and(|disk| !loss(error, disk))));
        }
        if let Some(error) = refusal.filter(|_| opened.iter().all(|disk| disk.store().is_err())) {
            return Err(error);
        }
        let mut monitors = JoinSet::new();
        let mut disks = Vec::with_capacity(opened.len());
        for disk in opened {
            let disk = Arc::new(disk);
            monitors.spawn(monitor(Arc::clone(&disk), closing.clone()));
            monitors.spawn(maintain(Arc::clone(&disk), closing.clone()));
            disks.push(disk);
        }
        Ok(Service {
            inner: Arc::new(Inner {
                cluster,
                // Without entropy it does not say: 0.
                boot: getrandom::u64().unwrap_or(0),
                disks,
                writes: Arc::new(Semaphore::new(WRITES_MAX)),
                reads: Arc::new(Semaphore::new(READS_MAX)),
                waiting_writes: Semaphore::new(WAITING_MAX),
                waiting_reads: Semaphore::new(WAITING_MAX),
                batches: Arc::new(Semaphore::new(BATCHES_BYTES_MAX)),
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

    /// Blocks that are being written to a disk right now; for tests.
    pub fn arriving(&self, service: BlockServiceId) -> usize {
        let disk = self.inner.disks.iter().find(|disk| disk.id() == Some(service));
        disk.map_or(0, |disk| WRITES_PER_DISK_MAX - disk.writes.available_permits())
    }

    /// The file a block lies in, and where in it; for tests.
    pub fn place_of(&self, service: BlockServiceId, block: BlockId) -> Option<(PathBuf, Extent)> {
        let disk = self.inner.disks.iter().find(|disk| disk.id() == Some(service))?;
        let place = disk.store().ok()?.read(block).ok()?.place();
        Some((segment_path(disk.path(), place.segment), place.extent()))
    }

    pub(crate) fn boot(&self) -> u64 {
        self.inner.boot
    }

    pub(crate) fn disks(&self) -> &[Arc<Disk>] {
        &self.inner.disks
    }

    /// For `/healthz`: not well when every disk is lost or refused.
    pub fn health(&self) -> impl Fn() -> Result<(), String> + Send + Sync + 'static {
        let inner = Arc::downgrade(&self.inner);
        move || {
            let Some(inner) = inner.upgrade() else { return Err("stopping".to_owned()) };
            if inner.disks.iter().all(|disk| disk.store().is_err()) {
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
        let place = self.write_place(&disk).await?;
        let (pieces, receiver) = mpsc::channel(PIECES_QUEUED);
        let task = {
            let disk = Arc::clone(&disk);
            tokio::task::spawn_blocking(move || {
                let _place = place;
                let result = receive(&store, admission, receiver).map_err(|error| disk.fault(&error));
                if result.is_ok() {
                    telemetry::written(store.identity().service, 1, u64::from(admission.size));
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
        let place = self.read_place(&disk).await?;
        let deadline = Instant::now() + TRANSFER_MAX;
        let (block, offset, length) = (BlockId(request.block), request.offset, request.length);
        let (pieces, runtime) = (pieces.clone(), Handle::current());
        let task = tokio::task::spawn_blocking(move || {
            let _place = place;
            let result =
                send(&store, block, offset, length, |piece| give(&runtime, &pieces, piece, deadline));
            if result.is_ok() {
                telemetry::read(store.identity().service, 1, u64::from(length));
            }
            result.map_err(|error| disk.fault(&error))
        });
        outcome(task, deadline, || format!("block {block}")).await
    }

    /// What the disks hold; from memory.
    pub fn stats(&self, request: &pb::BlockStatsRequest) -> pb::BlockStatsReply {
        let checked = check_header(request.header.as_ref(), self.inner.cluster);
        let block_services = match checked {
            Err(_) => Vec::new(),
            Ok(()) => {
                let mut stats: Vec<_> = self.reports().into_iter().map(stats_of).collect();
                for disk in &self.inner.disks {
                    let segments = disk.report().totals.segments;
                    let id = disk.id().map(|id| id.0);
                    stats.iter_mut().filter(|of| Some(of.id) == id).for_each(|of| of.segments = segments);
                }
                stats
            }
        };
        pb::BlockStatsReply {
            header: Some(reply_header()),
            error: checked.err().map(|error| error.with("statistics")),
            block_services,
        }
    }

    /// The disk a request is for, when the request is for us at all.
    fn admit(&self, header: Option<&pb::RequestHeader>, service: u64) -> Result<Arc<Disk>, Refusal> {
        self.check_request(header)?;
        self.disk(service)
    }

    /// The disk with this id.
    pub(crate) fn disk(&self, service: u64) -> Result<Arc<Disk>, Refusal> {
        let id = BlockServiceId(service);
        let disk = self.inner.disks.iter().find(|disk| disk.id() == Some(id));
        disk.cloned().ok_or_else(|| Refusal::new(BlockError::UnknownBlockService, id.to_string()))
    }

    /// A place to write to a disk.
    pub(crate) async fn write_place(&self, disk: &Disk) -> Result<Place, Refusal> {
        place(&self.inner.waiting_writes, &disk.writes, &self.inner.writes).await
    }

    /// A place to read from a disk.
    pub(crate) async fn read_place(&self, disk: &Disk) -> Result<Place, Refusal> {
        place(&self.inner.waiting_reads, &disk.reads, &self.inner.reads).await
    }

    /// Memory for a request of several blocks. Not waited for: what waits is in memory already (BL-9).
    pub(crate) fn batch_memory(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Refusal> {
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        Arc::clone(&self.inner.batches)
            .try_acquire_many_owned(permits)
            .map_err(|_| Refusal::new(BlockError::Busy, "too many blocks in flight"))
    }

    /// What every request must have right.
    pub(crate) fn check_request(&self, header: Option<&pb::RequestHeader>) -> Result<(), Refusal> {
        check_header(header, self.inner.cluster).map_err(|error| Refusal::new(error, "request"))?;
        if self.inner.closing.is_cancelled() {
            return Err(Refusal::new(BlockError::Busy, "the daemon is stopping"));
        }
        Ok(())
    }
}

/// A place for a block in flight; waits for one, but not long, and not in any crowd (BL-9).
async fn place(waiting: &Semaphore, disk: &Arc<Semaphore>, total: &Arc<Semaphore>) -> Result<Place, Refusal> {
    let busy = || Refusal::new(BlockError::Busy, "too many blocks in flight");
    let _waiting = waiting.try_acquire().map_err(|_| busy())?;
    let both = async {
        // The disk's first: a hung disk's queue must not take places from the others.
        let of_disk = Arc::clone(disk).acquire_owned().await.map_err(|_| busy())?;
        let of_total = Arc::clone(total).acquire_owned().await.map_err(|_| busy())?;
        Ok(Place { _disk: of_disk, _total: of_total })
    };
    timeout(WAIT_MAX, both).await.unwrap_or_else(|_| Err(busy()))
}

pub(crate) fn reply_header() -> pb::ReplyHeader {
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
        read_only: report.read_only,
        dead_bytes: report.dead_bytes,
        segments: 0,
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
            _ = look => {}
        }
    }
}

/// Gives a disk's dead room back, until the service closes.
async fn maintain(disk: Arc<Disk>, closing: CancellationToken) {
    let mut pause = MAINTENANCE_INTERVAL;
    loop {
        tokio::select! {
            () = closing.cancelled() => return,
            () = sleep(pause) => {}
        }
        let (disk, stop) = (Arc::clone(&disk), closing.clone());
        let done = tokio::task::spawn_blocking(move || {
            let Ok(store) = disk.store() else { return true };
            let result = store.maintain(&|| stop.is_cancelled());
            if let Err(error) = &result {
                tracing::warn!(path = %store.path().display(), %error, "the disk was not tidied up");
            }
            result.is_ok()
        });
        tokio::select! {
            () = closing.cancelled() => return,
            done = done => {
                pause = if matches!(done, Ok(true)) { MAINTENANCE_INTERVAL } else { MAINTENANCE_PAUSE };
            }
        }
    }
}
