//! Many files from memory at once: a request places the spans of many files, another publishes them, and between
//! them each host gets many blocks of many files in one request.
//!
//! A file of 64 KiB on its own costs two metadata requests and three block requests, each with its share of a
//! sync; in a batch it costs a share of each. Up to [`SMALL_FILE_BYTES_MAX`] that share is what matters; of longer
//! files it is the bytes, and those are better streamed. What goes wrong with one file is that file's: its blocks
//! are written again one by one and placed anew where that fails, as any writer does it.
//!
//! Memory: [`BATCHES_IN_FLIGHT`] batches of [`BATCH_BYTES_MAX`], each with its copies coded and on the wire.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use bytes::{Bytes, BytesMut};
use eggs_client_core::crc::Crc;
use eggs_client_core::encode::Encoded;
use eggs_client_core::write::{WriteBlock, WriteSpan, WriteStep};
use eggs_proto::limits::{BATCH_OPS_MAX, INLINE_BYTES_MAX};
use eggs_proto::pb::write_op;
use eggs_proto::{InodeId, pb};
use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use tokio::sync::Semaphore;

use crate::blocks_many::NotWritten;
use crate::connection::lock;
use crate::eden::{Prepared, SpanWriter, Spare, eden_reply};
use crate::error::{ClientError, Result};
use crate::names::{check_name, file_attributes};
use crate::types::{CreateOptions, Published, SmallFile};
use crate::writer::{blocking, published, put_small};
use crate::{Client, Directory};

/// Longer files are written one by one.
pub const SMALL_FILE_BYTES_MAX: u64 = 1 << 20;
/// Contents of one batch: inline, far below the limit of a message.
const BATCH_BYTES_MAX: usize = 2 << 20;
const BATCHES_IN_FLIGHT: usize = 4;
/// Long files at the same time.
const FILES_IN_FLIGHT: usize = 4;
/// Files of one batch that are placed anew at the same time because there is too much to do where they were: each block is a
/// request then, and that is more to do.
const ANEW_IN_FLIGHT: usize = 8;
/// Services remembered as bad for the batches to come.
const AVOID_MAX: usize = 16;

type Numbered = (usize, SmallFile);
type Answers = Vec<(usize, Result<Published>)>;

/// A file whose span has been placed.
struct Placed {
    n: usize,
    file: InodeId,
    cookie: u64,
    what: Arc<str>,
    sum: Crc,
    /// None for a span without blocks.
    blocks: Option<(WriteSpan, Encoded)>,
}

/// Gives up the files that have not got their names when it is dropped.
struct Unpublished {
    client: Client,
    directory: InodeId,
    files: BTreeMap<usize, (InodeId, u64)>,
}

impl Directory {
    /// Many files from memory, many to a request; answers in the order of the files.
    pub async fn put_many(&self, files: Vec<SmallFile>) -> Vec<Result<Published>> {
        let inline = self.rules.inline_bytes_max().min(INLINE_BYTES_MAX) as usize;
        let small = self.rules.span_bytes_max().min(SMALL_FILE_BYTES_MAX as u32) as usize;
        let mut answers: Vec<Option<Result<Published>>> = files.iter().map(|_| None).collect();
        let (short, others): (Vec<_>, Vec<_>) =
            files.into_iter().enumerate().partition(|(_, file)| file.contents.len() <= inline);
        let (middle, long): (Vec<_>, Vec<_>) =
            others.into_iter().partition(|(_, file)| file.contents.len() <= small);
        let avoid = Mutex::default();
        let short = batches(short).into_iter().map(|batch| (batch, true));
        let middle = batches(middle).into_iter().map(|batch| (batch, false));
        let batches = stream::iter(short.chain(middle)).map(|(batch, inline)| {
            let avoid = &avoid;
            async move {
                if inline { self.put_inline_batch(batch).await } else { self.put_batch(batch, avoid).await }
            }
        });
        let mut batches = batches.buffer_unordered(BATCHES_IN_FLIGHT);
        while let Some(batch) = batches.next().await {
            for (n, answer) in batch {
                answers[n] = Some(answer);
            }
        }
        let long = stream::iter(long).map(|(n, file)| async move {
            let options = options_of(&file);
            (n, self.put_bytes(&file.name, file.contents, &options).await)
        });
        let mut long = long.buffer_unordered(FILES_IN_FLIGHT);
        while let Some((n, answer)) = long.next().await {
            answers[n] = Some(answer);
        }
        let missing = || Err(ClientError::protocol("no answer"));
        answers.into_iter().map(|answer| answer.unwrap_or_else(missing)).collect()
    }

    /// Files that live in the metadata: one request makes, fills and names them.
    async fn put_inline_batch(&self, files: Vec<Numbered>) -> Answers {
        let ops = files.iter().map(|(_, file)| {
            let op = put_small(self.inode, file.name.clone(), file.contents.clone(), &options_of(file));
            pb::WriteOp { op: Some(op) }
        });
        match self.client.shared.shard_write(self.inode.shard(), ops.collect()).await {
            Err(error) => files.into_iter().map(|(n, _)| (n, Err(error.clone()))).collect(),
            Ok(results) => {
                let pairs = files.into_iter().zip(results);
                let answer = |((n, file), result): (Numbered, pb::WriteResult)| {
                    let (size, crc) = (file.contents.len() as u64, crc32fast::hash(&file.contents));
                    (n, published(result, size, crc, &self.what(&file.name)))
                };
                pairs.map(answer).collect()
            }
        }
    }

    /// Files of one span: placed in one request, written, published in one request.
    async fn put_batch(&self, files: Vec<Numbered>, avoid: &Mutex<BTreeSet<u64>>) -> Answers {
        let rules = self.rules.clone();
        let prepare = move || {
            let prepared = files.into_iter().map(|(n, file)| {
                let SmallFile { name, contents, attributes, replace } = file;
                let span = contents.try_into_mut().unwrap_or_else(|bytes| BytesMut::from(&bytes[..]));
                let options = CreateOptions { attributes, replace, size_hint: None };
                (n, name, options, Prepared::new(span, &rules, &mut Spare::default()))
            });
            prepared.collect::<Vec<_>>()
        };
        let prepared = match blocking(prepare).await {
            Ok(prepared) => prepared,
            // Without threads there is no going on.
            Err(error) => {
                tracing::error!(%error, "files could not be coded");
                return Vec::new();
            }
        };
        let mut answers = Answers::new();
        let mut starting = Vec::new();
        let mut links = BTreeMap::new();
        for (n, name, options, prepared) in prepared {
            let what: Arc<str> = self.what(&name).into();
            match check_name(&name, &what).and(prepared) {
                Ok(prepared) => {
                    links.insert(n, (name, options.replace));
                    starting.push((n, what, options, prepared));
                }
                Err(error) => answers.push((n, Err(error))),
            }
        }
        let mut unpublished =
            Unpublished { client: self.client.clone(), directory: self.inode, files: BTreeMap::new() };
        let placed = self.place(starting, avoid, &mut unpublished, &mut answers).await;
        let written = self.write_blocks(placed, avoid, &mut answers).await;
        let mut ops = Vec::with_capacity(written.len());
        for (placed, proofs) in &written {
            let Some((name, replace)) = links.remove(&placed.n) else { continue };
            let certify = (!proofs.is_empty()).then(|| pb::CertifySpan { offset: 0, proofs: proofs.clone() });
            let op = write_op::Op::LinkEden(pb::LinkEden {
                file: placed.file.0,
                cookie: placed.cookie,
                certify,
                directory: self.inode.0,
                name,
                replace: replace.to_wire(),
                size: placed.sum.length,
                crc: placed.sum.value,
            });
            ops.push(pb::WriteOp { op: Some(op) });
        }
        if ops.is_empty() {
            return answers;
        }
        match self.client.shared.shard_write(self.inode.shard(), ops).await {
            Err(error) => answers.extend(written.iter().map(|(placed, _)| (placed.n, Err(error.clone())))),
            Ok(results) => {
                for ((placed, _), result) in written.into_iter().zip(results) {
                    let linked = published(result, placed.sum.length, placed.sum.value, &placed.what);
                    if linked.is_ok() {
                        unpublished.files.remove(&placed.n);
                    }
                    answers.push((placed.n, linked));
                }
            }
        }
        answers
    }

    async fn place(
        &self,
        starting: Vec<(usize, Arc<str>, CreateOptions, Prepared)>,
        avoid: &Mutex<BTreeSet<u64>>,
        unpublished: &mut Unpublished,
        answers: &mut Answers,
    ) -> Vec<Placed> {
        if starting.is_empty() {
            return Vec::new();
        }
        let avoid: Vec<u64> = lock(avoid).iter().copied().collect();
        let (mut ops, mut asked) = (Vec::new(), Vec::new());
        for (n, what, options, prepared) in starting {
            let (span, blocks) = prepared.describe(0, avoid.clone());
            let op = write_op::Op::StartEden(pb::StartEden {
                directory: self.inode.0,
                attributes: Some(file_attributes(&options)),
                note: what.to_string(),
                span: Some(span),
            });
            ops.push(pb::WriteOp { op: Some(op) });
            asked.push((n, what, prepared, blocks));
        }
        let results = match self.client.shared.shard_write(self.inode.shard(), ops).await {
            Ok(results) => results,
            Err(error) => {
                answers.extend(asked.into_iter().map(|(n, ..)| (n, Err(error.clone()))));
                return Vec::new();
            }
        };
        let mut placed = Vec::with_capacity(asked.len());
        for ((n, what, prepared, blocks), result) in asked.into_iter().zip(results) {
            let sum = prepared.sum();
            let begun = eden_reply(result, &what).and_then(|reply| {
                unpublished.files.insert(n, (InodeId(reply.file), reply.cookie));
                let blocks = match (prepared.into_encoded(), blocks) {
                    (Some(encoded), Some(blocks)) => {
                        let machine =
                            WriteSpan::new(&blocks, &reply.blocks).map_err(ClientError::protocol)?;
                        Some((machine, encoded))
                    }
                    _ => None,
                };
                let (file, cookie) = (InodeId(reply.file), reply.cookie);
                Ok(Placed { n, file, cookie, what, sum, blocks })
            });
            match begun {
                Ok(begun) => placed.push(begun),
                Err(error) => answers.push((n, Err(error))),
            }
        }
        placed
    }

    /// Writes all blocks of all files; the proofs of those that are durable.
    async fn write_blocks(
        &self,
        mut placed: Vec<Placed>,
        avoid: &Mutex<BTreeSet<u64>>,
        answers: &mut Answers,
    ) -> Vec<(Placed, Vec<Bytes>)> {
        let mut blocks: Vec<(usize, WriteBlock)> = Vec::new();
        let mut whole = Vec::new();
        for (at, file) in placed.iter_mut().enumerate() {
            let Some((machine, encoded)) = &mut file.blocks else { continue };
            while let Some(step) = machine.poll() {
                let WriteStep::Write(block) = step else { continue };
                whole.push(pb::WholeBlock {
                    block_service: block.service.0,
                    block: block.block.0,
                    crc: block.crc,
                    certificate: block.certificate.clone(),
                    data: in_one_piece(encoded.slices(block.index)),
                });
                blocks.push((at, block));
            }
        }
        let results = self.client.shared.write_many(whole).await;
        // Blocks to be written again one by one.
        let mut again: Vec<Vec<WriteBlock>> = placed.iter().map(|_| Vec::new()).collect();
        let mut crowded: BTreeSet<usize> = BTreeSet::new();
        for ((at, block), result) in blocks.into_iter().zip(results) {
            let Some((machine, _)) = &mut placed[at].blocks else { continue };
            match result {
                Ok(proof) => machine.written(block.index, block.attempt, proof),
                Err(NotWritten::Failed(why)) => {
                    tracing::debug!(block = %block.block, block_service = %block.service, %why, "block not written with others");
                    again[at].push(block);
                }
                Err(NotWritten::Busy(why)) => {
                    tracing::debug!(block = %block.block, block_service = %block.service, %why, "too much to do; placing the block elsewhere");
                    machine.failed(block.index, block.attempt, why);
                    crowded.insert(at);
                }
            }
        }
        // Those that are done come to their end at once, the others write what is left one by one.
        let crowd = Semaphore::new(ANEW_IN_FLIGHT);
        let ends = placed.into_iter().zip(again).enumerate().map(|(at, (mut placed, again))| {
            let crowd = crowded.contains(&at).then_some(&crowd);
            async move {
                let _place = match crowd {
                    Some(crowd) => crowd.acquire().await.ok(),
                    None => None,
                };
                let Some((machine, encoded)) = placed.blocks.take() else { return (placed, Ok(Vec::new())) };
                let writer = SpanWriter {
                    shared: self.client.shared.clone(),
                    file: placed.file,
                    cookie: placed.cookie,
                    what: placed.what.clone(),
                };
                let written = writer.run(machine, encoded, again).await.map(|written| {
                    let mut avoid = lock(avoid);
                    avoid.extend(written.avoid);
                    if avoid.len() > AVOID_MAX {
                        // So many: the trouble was not theirs.
                        avoid.clear();
                    }
                    written.proofs
                });
                (placed, written)
            }
        });
        let mut written = Vec::new();
        for (placed, proofs) in join_all(ends).await {
            match proofs {
                Ok(proofs) => written.push((placed, proofs)),
                Err(error) => answers.push((placed.n, Err(error))),
            }
        }
        written
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        if self.files.is_empty() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let ops = self.files.values().map(|&(file, cookie)| pb::WriteOp {
            op: Some(write_op::Op::AbandonEden(pb::AbandonEden { file: file.0, cookie })),
        });
        let (ops, client, directory) = (ops.collect(), self.client.clone(), self.directory);
        let tasks = client.shared.tasks.clone();
        tasks.spawn_on(
            async move {
                if let Err(error) = client.shared.shard_write(directory.shard(), ops).await {
                    tracing::debug!(%error, "files in writing not abandoned; their deadlines will");
                }
            },
            &runtime,
        );
    }
}

fn in_one_piece(mut pieces: Vec<Bytes>) -> Bytes {
    match (pieces.len(), pieces.pop()) {
        (1, Some(piece)) => piece,
        (_, last) => {
            let mut whole = BytesMut::new();
            pieces.iter().chain(&last).for_each(|piece| whole.extend_from_slice(piece));
            whole.freeze()
        }
    }
}

fn options_of(file: &SmallFile) -> CreateOptions {
    CreateOptions { attributes: file.attributes, replace: file.replace, size_hint: None }
}

/// Cut so that no request is too long.
fn batches(files: Vec<Numbered>) -> Vec<Vec<Numbered>> {
    let mut batches: Vec<Vec<Numbered>> = Vec::new();
    let mut bytes = 0;
    for file in files {
        let size = file.1.contents.len() + file.1.name.len();
        match batches.last_mut() {
            Some(batch) if batch.len() < BATCH_OPS_MAX && bytes + size <= BATCH_BYTES_MAX => {
                bytes += size;
                batch.push(file);
            }
            _ => {
                bytes = size;
                batches.push(vec![file]);
            }
        }
    }
    batches
}
