//! Requests about several blocks: grouped by disk, one thread and one durable step for each disk, the answers
//! in the order of the questions. A disk that is lost, busy or slow answers for its own blocks only.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use eggs_blockd_core::WriteAdmission;
use eggs_blockd_core::admission::{admit_erase, check_range};
use eggs_blockd_core::record::PAGE_BYTES;
use eggs_proto::limits::BLOCK_BYTES_MAX;
use eggs_proto::{BlockError, BlockId, mac, pb};
use futures_util::future::join_all;
use tokio::time::timeout;

use crate::disk::{Disk, Refusal};
use crate::limits::{BATCH_BLOCKS_MAX, BATCH_BYTES_MAX, CHECK_REQUEST_MAX, TRANSFER_MAX, WAIT_MAX};
use crate::service::{Service, reply_header};
use crate::store::{Store, StoreError, Wanted};
use crate::telemetry::{self, Operation};
use crate::transfer::outcome;

/// What becomes of one of several blocks.
type Answer<T> = Result<T, Refusal>;
/// On the disk's thread; `None`: there was no time to look at it.
type Answers<T> = Vec<Option<Result<T, StoreError>>>;

/// What is done to a disk: each way has its own places.
#[derive(Debug, Clone, Copy)]
enum Way {
    Write,
    Read,
    Check,
}

impl Service {
    /// Writes several whole blocks; each is answered once it is durable (BL-1).
    pub async fn write_many(&self, request: pb::WriteBlocksRequest) -> pb::WriteBlocksReply {
        let begun = Instant::now();
        let bytes = request.blocks.iter().map(|block| block.data.len()).sum();
        let checked = self.check_batch(request.header.as_ref(), request.blocks.len(), bytes);
        let (error, results) = match checked.and_then(|()| self.batch_memory(bytes)) {
            Err(refusal) => (Some(refusal), Vec::new()),
            Ok(memory) => {
                let blocks = request.blocks.into_iter().map(|block| (block.block_service, block));
                // As long as any disk works on it: the request may be given up before.
                let memory = Arc::new(memory);
                let work = move |store: &Arc<Store>, blocks| {
                    let _held = &memory;
                    write_blocks(store, blocks)
                };
                (None, all(self.by_disk(blocks.collect(), Way::Write, work).await))
            }
        };
        finish(Operation::WriteMany, begun, error.as_ref(), &results);
        pb::WriteBlocksReply {
            header: Some(reply_header()),
            error: error.map(Into::into),
            results: results.into_iter().map(proven).collect(),
        }
    }

    /// Reads ranges of several blocks (BL-8).
    pub async fn fetch_many(&self, request: pb::FetchBlocksRequest) -> pb::FetchBlocksReply {
        let begun = Instant::now();
        // Each as long as a block at most, so the sum does not overflow.
        let length = |range: &pb::BlockRange| range.length.min(BLOCK_BYTES_MAX) as usize;
        let bytes = request.ranges.iter().map(length).sum();
        let checked = self.check_batch(request.header.as_ref(), request.ranges.len(), bytes);
        // Whole pages are read, and their checksums.
        let held = bytes + request.ranges.len() * 3 * PAGE_BYTES as usize;
        // Until the reply is made, and as long as any disk works on it.
        let memory = checked.and_then(|()| self.batch_memory(held)).map(Arc::new);
        let (error, results) = match &memory {
            Err(refusal) => (Some(refusal.clone()), Vec::new()),
            Ok(memory) => {
                let memory = Arc::clone(memory);
                let ranges = request.ranges.into_iter().map(|range| (range.block_service, range));
                let work = move |store: &Arc<Store>, ranges| {
                    let _held = &memory;
                    read_ranges(store, ranges)
                };
                (None, all(self.by_disk(ranges.collect(), Way::Read, work).await))
            }
        };
        finish(Operation::FetchMany, begun, error.as_ref(), &results);
        let fetched = |answer: Answer<Bytes>| match answer {
            Ok(data) => {
                let crc = crc32fast::hash(&data);
                pb::FetchedRange { result: Some(pb::fetched_range::Result::Data(data)), crc }
            }
            Err(refusal) => pb::FetchedRange {
                result: Some(pb::fetched_range::Result::Error(Refusal::into(refusal))),
                crc: 0,
            },
        };
        pb::FetchBlocksReply {
            header: Some(reply_header()),
            error: error.map(Into::into),
            results: results.into_iter().map(fetched).collect(),
        }
    }

    /// Removes blocks; answered once that is durable (BL-5).
    pub async fn erase(&self, request: pb::EraseBlocksRequest) -> pb::EraseBlocksReply {
        let begun = Instant::now();
        let checked = self.check_batch(request.header.as_ref(), request.blocks.len(), 0);
        let (error, results) = match checked {
            Err(refusal) => (Some(refusal), Vec::new()),
            Ok(()) => {
                let blocks = request.blocks.into_iter().map(|block| (block.block_service, block));
                let work = |store: &Arc<Store>, blocks| erase_blocks(store, blocks);
                (None, all(self.by_disk(blocks.collect(), Way::Write, work).await))
            }
        };
        finish(Operation::Erase, begun, error.as_ref(), &results);
        pb::EraseBlocksReply {
            header: Some(reply_header()),
            error: error.map(Into::into),
            results: results.into_iter().map(proven).collect(),
        }
    }

    /// Reads blocks where they lie and compares them with what is expected. Answers for as many, from the first on, as
    /// it could look at in its time.
    pub async fn check(&self, request: pb::CheckBlocksRequest) -> pb::CheckBlocksReply {
        let begun = Instant::now();
        let (error, results) = match self.check_batch(request.header.as_ref(), request.blocks.len(), 0) {
            Err(refusal) => (Some(refusal), Vec::new()),
            Ok(()) => {
                let blocks = request.blocks.into_iter().map(|block| (block.block_service, block));
                let work =
                    move |store: &Arc<Store>, blocks| check_blocks(store, blocks, begun + CHECK_REQUEST_MAX);
                let answers = self.by_disk(blocks.collect(), Way::Check, work).await;
                (None, answers.into_iter().map_while(|answer| answer).collect())
            }
        };
        finish(Operation::Check, begun, error.as_ref(), &results);
        let checked = |answer: Answer<()>| pb::CheckedBlock { error: answer.err().map(Into::into) };
        pb::CheckBlocksReply {
            header: Some(reply_header()),
            error: error.map(Into::into),
            results: results.into_iter().map(checked).collect(),
        }
    }

    /// Whether a request of several blocks is one.
    fn check_batch(
        &self,
        header: Option<&pb::RequestHeader>,
        blocks: usize,
        bytes: usize,
    ) -> Result<(), Refusal> {
        self.check_request(header)?;
        if blocks > BATCH_BLOCKS_MAX || bytes > BATCH_BYTES_MAX {
            let what =
                format!("more than {BATCH_BLOCKS_MAX} blocks or {BATCH_BYTES_MAX} bytes in one request");
            return Err(Refusal::new(BlockError::Malformed, what));
        }
        Ok(())
    }

    /// Does the work of each disk on a thread of its own. The answers are in the order of the items.
    async fn by_disk<I, T>(
        &self,
        items: Vec<(u64, I)>,
        way: Way,
        work: impl Fn(&Arc<Store>, Vec<I>) -> Answers<T> + Clone + Send + 'static,
    ) -> Vec<Option<Answer<T>>>
    where
        I: Send + 'static,
        T: Send + 'static,
    {
        let count = items.len();
        let mut groups: BTreeMap<u64, (Vec<usize>, Vec<I>)> = BTreeMap::new();
        for (number, (service, item)) in items.into_iter().enumerate() {
            let group = groups.entry(service).or_default();
            group.0.push(number);
            group.1.push(item);
        }
        let disks = groups.into_iter().map(|(service, (numbers, items))| {
            let work = work.clone();
            async move {
                let answers = match self.on_disk(service, items, way, work).await {
                    Ok(answers) => answers,
                    Err(refusal) => numbers.iter().map(|_| Some(Err(refusal.clone()))).collect(),
                };
                (numbers, answers)
            }
        });
        let mut answers: Vec<Option<Answer<T>>> = (0..count).map(|_| None).collect();
        for (numbers, of_disk) in join_all(disks).await {
            for (number, answer) in numbers.into_iter().zip(of_disk) {
                answers[number] = answer;
            }
        }
        answers
    }

    async fn on_disk<I, T>(
        &self,
        service: u64,
        items: Vec<I>,
        way: Way,
        work: impl Fn(&Arc<Store>, Vec<I>) -> Answers<T> + Send + 'static,
    ) -> Result<Vec<Option<Answer<T>>>, Refusal>
    where
        I: Send + 'static,
        T: Send + 'static,
    {
        let disk = self.disk(service)?;
        let store = disk.store()?;
        let checking = match way {
            Way::Check => Some(check_place(&disk).await?),
            Way::Read | Way::Write => None,
        };
        let place = match way {
            Way::Write => self.write_place(&disk).await?,
            Way::Read | Way::Check => self.read_place(&disk).await?,
        };
        let path = disk.path().display().to_string();
        let task = tokio::task::spawn_blocking(move || {
            let _places = (place, checking);
            let answers = work(&store, items).into_iter();
            Ok(answers
                .map(|answer| answer.map(|answer| answer.map_err(|error| disk.fault(&error))))
                .collect())
        });
        outcome(task, Instant::now() + TRANSFER_MAX, || format!("blocks on {path}")).await
    }
}

/// One of the few places to check a disk's blocks: the janitor waits its turn, readers do not wait for it.
async fn check_place(disk: &Disk) -> Result<tokio::sync::OwnedSemaphorePermit, Refusal> {
    let busy = || Refusal::new(BlockError::Busy, "its blocks are being checked already");
    let place = timeout(WAIT_MAX, Arc::clone(&disk.checks).acquire_owned()).await;
    place.map_err(|_| busy())?.map_err(|_| busy())
}

fn write_blocks(store: &Arc<Store>, blocks: Vec<pb::WholeBlock>) -> Answers<mac::Mac> {
    let mut answers: Answers<mac::Mac> = Vec::with_capacity(blocks.len());
    let mut numbers = Vec::new();
    let mut wanted = Vec::new();
    let mut bytes = 0;
    for (number, block) in blocks.into_iter().enumerate() {
        let size = u32::try_from(block.data.len()).unwrap_or(u32::MAX);
        let start = pb::WriteStart {
            header: None,
            block_service: block.block_service,
            block: block.block,
            size,
            crc: block.crc,
            certificate: block.certificate,
        };
        match WriteAdmission::decide(store.identity(), &start) {
            Ok(admission) => {
                numbers.push(number);
                bytes += u64::from(size);
                wanted.push(Wanted { admission, data: block.data });
                answers.push(None);
            }
            Err(error) => answers.push(Some(Err(error.into()))),
        }
    }
    let blocks = wanted.len();
    for (number, answer) in numbers.into_iter().zip(store.write_many(wanted)) {
        answers[number] = Some(answer);
    }
    telemetry::written(store.identity().service, blocks as u64, bytes);
    answers
}

fn read_ranges(store: &Arc<Store>, ranges: Vec<pb::BlockRange>) -> Answers<Bytes> {
    let mut bytes = 0;
    let blocks = ranges.len();
    let read = |range: pb::BlockRange| {
        let block = store.read(BlockId(range.block))?;
        check_range(block.size(), range.offset, range.length)?;
        let data = block.read_at(range.offset, range.length)?;
        if (range.offset, range.length) == (0, block.size()) {
            block.check_crc(crc32fast::hash(&data))?;
        }
        bytes += data.len() as u64;
        Ok(data)
    };
    let answers = ranges.into_iter().map(read).map(Some).collect();
    telemetry::read(store.identity().service, blocks as u64, bytes);
    answers
}

fn erase_blocks(store: &Arc<Store>, requests: Vec<pb::EraseBlock>) -> Answers<mac::Mac> {
    let admitted: Vec<_> = requests.iter().map(|request| admit_erase(store.identity(), request)).collect();
    let blocks: Vec<BlockId> = requests
        .iter()
        .zip(&admitted)
        .filter(|(_, admitted)| admitted.is_ok())
        .map(|(request, _)| BlockId(request.block))
        .collect();
    let mut erased = store.erase_many(&blocks).into_iter();
    let answer = |admitted: Result<mac::Mac, BlockError>| {
        let proof = admitted?;
        erased.next().unwrap_or(Err(BlockError::Internal.into())).map(|()| proof)
    };
    admitted.into_iter().map(answer).map(Some).collect()
}

fn check_blocks(store: &Arc<Store>, blocks: Vec<pb::ExpectedBlock>, deadline: Instant) -> Answers<()> {
    let check = |(number, expected): (usize, pb::ExpectedBlock)| {
        // The first is looked at in any case: whoever asks again gets on.
        if number > 0 && Instant::now() >= deadline {
            return None;
        }
        let verdict =
            store.read(BlockId(expected.block)).and_then(|block| block.check(expected.size, expected.crc));
        Some(verdict)
    };
    blocks.into_iter().enumerate().map(check).collect()
}

fn all<T>(answers: Vec<Option<Answer<T>>>) -> Vec<Answer<T>> {
    let none = || Err(Refusal::new(BlockError::Internal, "no answer"));
    answers.into_iter().map(|answer| answer.unwrap_or_else(none)).collect()
}

fn proven(answer: Answer<mac::Mac>) -> pb::ProvenBlock {
    use pb::proven_block::Result::{Error, Proof};
    let result = match answer {
        Ok(proof) => Proof(Bytes::copy_from_slice(&proof)),
        Err(refusal) => Error(refusal.into()),
    };
    pb::ProvenBlock { result: Some(result) }
}

fn finish<T>(operation: Operation, begun: Instant, error: Option<&Refusal>, answers: &[Answer<T>]) {
    let first = error.or_else(|| answers.iter().find_map(|answer| answer.as_ref().err()));
    telemetry::done(operation, begun, first.map_or(Ok(()), Err));
}
