//! A file on its way in: spans placed, written, certified, and at last the name (CL-4, CL-9).

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use eggs_client_core::crc::Crc;
use eggs_client_core::encode::{Encoded, encode, is_zero};
use eggs_client_core::layout::{Rules, Storage};
use eggs_client_core::write::{WriteBlock, WriteSpan, WriteStep};
use eggs_proto::pb::{new_span, write_op, write_result};
use eggs_proto::{InodeId, ServiceError, ShardError, Time, pb};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio_util::task::AbortOnDropHandle;

use crate::connection::Shared;
use crate::error::{ClientError, Result};
use crate::names::{link_reply, optional};
use crate::types::{NewAttributes, Published, Replace};
use crate::upkeep::done;
use crate::{Client, Directory};

/// Services remembered as bad for the spans to come.
const AVOID_MAX: usize = 16;

/// A span cut and coded, not yet placed.
#[derive(Debug)]
pub(crate) struct Prepared {
    size: u32,
    crc: u32,
    body: Form,
}

#[derive(Debug)]
enum Form {
    Zeros,
    Inline(Bytes),
    Blocks { encoded: Encoded, storage_class: u8 },
}

/// Buffers whose spans are done: new ones would have to be cleared by the kernel, page by page.
#[derive(Debug, Default)]
pub(crate) struct Spare {
    pub data: Vec<BytesMut>,
    parity: Vec<BytesMut>,
}

impl Prepared {
    /// Cuts and codes a span as the policies have it. Computes: not for an async thread when it is long.
    pub fn new(span: BytesMut, rules: &Rules, spare: &mut Spare) -> Result<Prepared> {
        if is_zero(&span) {
            let prepared = Prepared::zeros(span.len());
            spare.data.push(span);
            return prepared;
        }
        match rules.storage(span.len() as u32).map_err(ClientError::protocol)? {
            Storage::Inline => {
                let prepared = Prepared::inline(Bytes::copy_from_slice(&span));
                spare.data.push(span);
                Ok(prepared)
            }
            storage @ Storage::Blocks { .. } => Prepared::blocks(span, storage, spare),
        }
    }

    pub fn zeros(size: usize) -> Result<Prepared> {
        let size = u32::try_from(size).map_err(ClientError::protocol)?;
        Ok(Prepared { size, crc: Crc::of_zeros(size.into()).value, body: Form::Zeros })
    }

    pub fn inline(bytes: Bytes) -> Prepared {
        Prepared { size: bytes.len() as u32, crc: crc32fast::hash(&bytes), body: Form::Inline(bytes) }
    }

    pub fn blocks(span: BytesMut, storage: Storage, spare: &mut Spare) -> Result<Prepared> {
        let Storage::Blocks { layout, storage_class } = storage else {
            return Ok(Prepared::inline(span.freeze()));
        };
        let encoded = encode(span, layout, &mut spare.parity).map_err(ClientError::protocol)?;
        Ok(Prepared { size: encoded.size, crc: encoded.crc, body: Form::Blocks { encoded, storage_class } })
    }

    /// What the shard is asked to place at `offset`, and of it the blocks.
    pub fn describe(&self, offset: u64, avoid: Vec<u64>) -> (pb::NewSpan, Option<pb::NewBlocks>) {
        let (body, blocks) = match &self.body {
            Form::Zeros => (new_span::Body::Zeros(pb::Done {}), None),
            Form::Inline(bytes) => (new_span::Body::Inline(bytes.clone()), None),
            Form::Blocks { encoded, storage_class } => {
                let blocks = encoded.new_blocks(*storage_class, avoid);
                (new_span::Body::Blocks(blocks.clone()), Some(blocks))
            }
        };
        (pb::NewSpan { offset, size: self.size, crc: self.crc, body: Some(body) }, blocks)
    }

    pub fn sum(&self) -> Crc {
        Crc::new(self.crc, self.size.into())
    }

    /// What is to be written; nothing for a span without blocks.
    pub fn into_encoded(self) -> Option<Encoded> {
        match self.body {
            Form::Blocks { encoded, .. } => Some(encoded),
            _ => None,
        }
    }
}

/// Who is written, for whom.
#[derive(Debug)]
pub(crate) struct EdenFile {
    client: Client,
    directory: InodeId,
    /// The path, for people.
    what: Arc<str>,
    attributes: NewAttributes,
    /// The inode and the cookie, once there is a first span.
    ids: Option<(InodeId, u64)>,
    /// Size and CRC of the spans placed.
    sum: Crc,
    avoid: BTreeSet<u64>,
    in_flight: Option<InFlight>,
}

#[derive(Debug)]
struct InFlight {
    offset: u64,
    /// None for a span without blocks: nothing to wait for.
    writing: Option<AbortOnDropHandle<Result<Written>>>,
}

pub(crate) struct Written {
    pub proofs: Vec<Bytes>,
    encoded: Encoded,
    pub avoid: Vec<u64>,
}

impl EdenFile {
    pub fn new(directory: &Directory, what: Arc<str>, attributes: NewAttributes) -> EdenFile {
        EdenFile {
            client: directory.client.clone(),
            directory: directory.inode,
            what,
            attributes,
            ids: None,
            sum: Crc::default(),
            avoid: BTreeSet::new(),
            in_flight: None,
        }
    }

    /// Bytes placed.
    pub fn size(&self) -> u64 {
        self.sum.length
    }

    /// Places the next span and begins to write its blocks; waits for those of the span before. One
    /// request certifies that one and places this one.
    pub async fn push(&mut self, span: Prepared, spare: &mut Spare) -> Result<()> {
        let certify = self.settle(spare).await?;
        let offset = self.sum.length;
        let (new, new_blocks) = span.describe(offset, self.avoid.iter().copied().collect());
        let op = match self.ids {
            None => write_op::Op::StartEden(pb::StartEden {
                directory: self.directory.0,
                attributes: Some(self.attributes),
                note: self.what.to_string(),
                span: Some(new),
            }),
            Some((file, cookie)) => {
                let (file, span) = (file.0, Some(new));
                write_op::Op::ExtendEden(pb::ExtendEden { file, cookie, certify, span })
            }
        };
        let reply = self.client.write_one(self.directory, op).await?;
        let reply = eden_reply(reply, &self.what)?;
        self.ids = Some((InodeId(reply.file), reply.cookie));
        self.sum = self.sum.then(span.sum());
        let writing = match (span.into_encoded(), new_blocks) {
            (Some(encoded), Some(new_blocks)) => {
                let machine = WriteSpan::new(&new_blocks, &reply.blocks).map_err(ClientError::protocol)?;
                let writer = SpanWriter {
                    shared: self.client.shared.clone(),
                    file: InodeId(reply.file),
                    cookie: reply.cookie,
                    what: self.what.clone(),
                };
                Some(AbortOnDropHandle::new(tokio::spawn(writer.run(machine, encoded, Vec::new()))))
            }
            _ => None,
        };
        self.in_flight = Some(InFlight { offset, writing });
        Ok(())
    }

    /// Waits for the span in flight; what is needed to certify it.
    async fn settle(&mut self, spare: &mut Spare) -> Result<Option<pb::CertifySpan>> {
        let Some(InFlight { offset, writing }) = self.in_flight.take() else { return Ok(None) };
        let Some(writing) = writing else { return Ok(None) };
        let written = writing.await.map_err(|error| ClientError::WriteFailed {
            path: self.what.to_string(),
            what: error.to_string(),
        })??;
        if self.avoid.len() + written.avoid.len() <= AVOID_MAX {
            self.avoid.extend(written.avoid);
        } else {
            // So many: the trouble was not theirs.
            self.avoid.clear();
        }
        let (data, parity) = written.encoded.into_buffers();
        spare.data.extend(data);
        spare.parity.extend(parity);
        Ok(Some(pb::CertifySpan { offset, proofs: written.proofs }))
    }

    /// Certifies the last span and gives the file its name, in one request.
    pub async fn link(mut self, name: &Bytes, replace: Replace) -> Result<Published> {
        let certify = self.settle(&mut Spare::default()).await?;
        let (file, cookie) = self.ids.ok_or_else(|| ClientError::protocol("a file without spans"))?;
        let op = write_op::Op::LinkEden(pb::LinkEden {
            file: file.0,
            cookie,
            certify,
            directory: self.directory.0,
            name: name.clone(),
            replace: replace.to_wire(),
            size: self.sum.length,
            crc: self.sum.value,
        });
        let result = self.client.write_one(self.directory, op).await?;
        let (reply, _) = link_reply(result, &self.what)?;
        if InodeId(reply.inode) != file {
            return Err(ClientError::other_reply("link"));
        }
        // It has its name: nothing to abandon.
        self.ids = None;
        Ok(Published {
            inode: file,
            size: self.sum.length,
            crc: self.sum.value,
            created_at: Time(reply.created_at),
            replaced: optional(reply.replaced),
        })
    }

    /// Certifies the last span and puts all of them in the place of a published file's; the bytes.
    pub async fn replace(mut self, published: InodeId) -> Result<u64> {
        let certify = self.settle(&mut Spare::default()).await?;
        let (eden, cookie) = self.ids.ok_or_else(|| ClientError::protocol("a file without spans"))?;
        let swap = pb::SwapContents { file: published.0, eden: eden.0, cookie, certify };
        let result = self.client.write_one(self.directory, write_op::Op::SwapContents(swap)).await?;
        done(result, published.0)?;
        // What it holds now is garbage already: nothing to abandon.
        self.ids = None;
        Ok(self.sum.length)
    }

    fn abandon_op(&mut self) -> Option<write_op::Op> {
        self.in_flight = None;
        let (file, cookie) = self.ids.take()?;
        Some(write_op::Op::AbandonEden(pb::AbandonEden { file: file.0, cookie }))
    }

    pub async fn abandon(mut self) {
        if let Some(op) = self.abandon_op()
            && let Err(error) = self.client.write_one(self.directory, op).await
        {
            tracing::debug!(%error, path = %self.what, "file in writing not abandoned; its deadline will");
        }
    }
}

impl Drop for EdenFile {
    fn drop(&mut self) {
        let Some(op) = self.abandon_op() else { return };
        // Without a runtime there is nothing to send with: the deadline does it.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (client, directory) = (self.client.clone(), self.directory);
        let tasks = client.shared.tasks.clone();
        tasks.spawn_on(
            async move {
                if let Err(error) = client.write_one(directory, op).await {
                    tracing::debug!(%error, "file in writing not abandoned; its deadline will");
                }
            },
            &runtime,
        );
    }
}

pub(crate) fn eden_reply(result: pb::WriteResult, what: &str) -> Result<pb::EdenReply> {
    match result.result {
        Some(write_result::Result::Eden(reply)) => Ok(reply),
        Some(write_result::Result::Error(error)) => Err(ClientError::from_shard(&error, what)),
        _ => Err(ClientError::other_reply("write")),
    }
}

/// Writes the blocks of one span, all at once.
pub(crate) struct SpanWriter {
    pub shared: Arc<Shared>,
    pub file: InodeId,
    pub cookie: u64,
    pub what: Arc<str>,
}

impl SpanWriter {
    /// `again`: blocks the machine has asked for already.
    pub async fn run(
        self,
        mut machine: WriteSpan,
        encoded: Encoded,
        again: Vec<WriteBlock>,
    ) -> Result<Written> {
        let mut writing: FuturesUnordered<_> =
            again.into_iter().map(|block| self.write(block, &encoded)).collect();
        let proofs = loop {
            match machine.poll() {
                Some(WriteStep::Write(block)) => writing.push(self.write(block, &encoded)),
                Some(WriteStep::Replace { indexes, avoid }) => {
                    let placed = self.replace(indexes, avoid).await?;
                    machine.replaced(&placed).map_err(ClientError::protocol)?;
                }
                Some(WriteStep::Ready(proofs)) => break proofs,
                Some(WriteStep::Failed(what)) => {
                    return Err(ClientError::WriteFailed { path: self.what.to_string(), what });
                }
                None => match writing.next().await {
                    Some((block, Ok(proof))) => machine.written(block.index, block.attempt, proof),
                    Some((block, Err(why))) => {
                        tracing::warn!(file = %self.file, block = %block.block, block_service = %block.service, %why, "block not written; placing it elsewhere");
                        machine.failed(block.index, block.attempt, why);
                    }
                    None => return Err(ClientError::protocol("nothing left to write, and no end")),
                },
            }
        };
        drop(writing);
        let avoid = machine.avoid().map(|service| service.0).collect();
        Ok(Written { proofs, encoded, avoid })
    }

    async fn write(&self, block: WriteBlock, span: &Encoded) -> (WriteBlock, Result<Bytes, String>) {
        let result = self.shared.write_block(&block, &span.slices(block.index)).await;
        (block, result)
    }

    async fn replace(&self, indexes: Vec<u32>, avoid: Vec<u64>) -> Result<Vec<pb::PlacedBlock>> {
        let ask = |avoid| {
            let (file, cookie, indexes) = (self.file.0, self.cookie, indexes.clone());
            let op = write_op::Op::ReplaceBlocks(pb::ReplaceBlocks { file, cookie, indexes, avoid });
            self.shared.shard_write(self.file.shard(), vec![pb::WriteOp { op: Some(op) }])
        };
        let first = |results: Vec<pb::WriteResult>| {
            results.into_iter().next().ok_or_else(|| ClientError::other_reply("write"))
        };
        let mut result = first(ask(avoid).await?)?;
        if let Some(write_result::Result::Error(error)) = &result.result
            && error.code == ShardError::NoBlockServices.code()
        {
            // Nowhere else: perhaps those that failed are back.
            result = first(ask(Vec::new()).await?)?;
        }
        Ok(eden_reply(result, &self.what)?.blocks)
    }
}
