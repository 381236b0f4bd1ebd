//! Files through the machines of `client/core`: spans written block by block, read cell by cell.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use eggs_client_core::encode::{Encoded, encode as encode_span, is_zero};
use eggs_client_core::layout::{Rules, Storage};
use eggs_client_core::read::{Damage, Fetch, FetchFailure, ReadSpan, ReadStep};
use eggs_client_core::span::{Body, StoredSpan, check_page};
use eggs_client_core::write::{WriteBlock, WriteSpan, WriteStep};
use eggs_proto::pb::shard_reply::Result as ShardAnswer;
use eggs_proto::pb::write_op::Op;
use eggs_proto::pb::write_result::Result as WriteAnswer;
use eggs_proto::{BlockError, InodeId, ServiceError, ShardError, pb};

use super::calls::{Calls, GaveUp, refusal};
use crate::bug::Bug;
use crate::kernel::{MILLISECOND, Rpc, SECOND};
use crate::nodes::{decode, encode, request_header};

/// How the files of a run are cut: small enough that a run has many spans.
pub(crate) fn policies() -> pb::Policies {
    let rules = vec![
        pb::SpanRule { max_size: 256, data: 0, parity: 0 },
        pb::SpanRule { max_size: 6000, data: 1, parity: 2 },
        pb::SpanRule { max_size: 40_000, data: 4, parity: 2 },
    ];
    pb::Policies {
        span: Some(pb::SpanPolicy { rules }),
        stripe: Some(pb::StripePolicy { cell_size: 4096 }),
        ..pb::Policies::default()
    }
}

/// How files are cut that get other spans: as if the policy of their directory had changed.
pub(crate) fn other_policies() -> pb::Policies {
    let rules = vec![
        pb::SpanRule { max_size: 1000, data: 0, parity: 0 },
        pb::SpanRule { max_size: 16_000, data: 2, parity: 2 },
        pb::SpanRule { max_size: 30_000, data: 3, parity: 2 },
    ];
    pb::Policies { span: Some(pb::SpanPolicy { rules }), ..policies() }
}

/// Why a file was not written or read.
#[derive(Debug)]
pub(crate) enum FileError {
    GaveUp,
    /// With the instant of the refusal, when the shard's machine refused.
    Refused(ShardError, u64),
    /// The blocks could not be written, or not be had: why, for people.
    Blocks(#[expect(dead_code, reason = "shown by Debug")] String),
    /// What came back cannot be.
    Wrong(String),
}

impl From<GaveUp> for FileError {
    fn from(_: GaveUp) -> Self {
        FileError::GaveUp
    }
}

/// What is to be published under which name.
pub(crate) struct NewFile<'a> {
    pub directory: InodeId,
    pub name: Bytes,
    pub replace: pb::Replace,
    pub attributes: pb::NewAttributes,
    pub contents: &'a [u8],
    /// Stop after this many spans: the file must never be seen.
    pub abandon_after: Option<usize>,
}

/// What is in an eden file, the last of its spans proven and not yet certified.
pub(crate) struct Written {
    pub eden: pb::EdenReply,
    pub certify: Option<pb::CertifySpan>,
    pub size: u64,
}

enum Prepared {
    Plain(pb::NewSpan),
    Blocks(pb::NewSpan, pb::NewBlocks, Box<Encoded>),
}

impl Prepared {
    fn new(calls: &Calls, rules: &Rules, offset: u64, bytes: &[u8]) -> Result<Prepared, FileError> {
        let wrong = |error: &dyn std::fmt::Display| FileError::Wrong(format!("a span to write: {error}"));
        let (size, crc) = (bytes.len() as u32, crc32fast::hash(bytes));
        let span = |body| pb::NewSpan { offset, size, crc, body: Some(body) };
        if is_zero(bytes) {
            return Ok(Prepared::Plain(span(pb::new_span::Body::Zeros(pb::Done {}))));
        }
        match rules.storage(size).map_err(|error| wrong(&error))? {
            Storage::Inline => {
                Ok(Prepared::Plain(span(pb::new_span::Body::Inline(Bytes::copy_from_slice(bytes)))))
            }
            Storage::Blocks { layout, storage_class } => {
                let encoded = encode_span(BytesMut::from(bytes), layout, &mut Vec::new())
                    .map_err(|error| wrong(&error))?;
                if encoded.crc != crc {
                    return Err(FileError::Wrong("the encoder's CRC is not the span's".to_owned()));
                }
                let bad = calls.places.borrow();
                let avoid =
                    bad.services.iter().filter(|(_, (_, flags))| !eggs_proto::flags::writable(*flags));
                let blocks = encoded.new_blocks(storage_class, avoid.map(|(id, _)| id.0).collect());
                let span = span(pb::new_span::Body::Blocks(blocks.clone()));
                Ok(Prepared::Blocks(span, blocks, Box::new(encoded)))
            }
        }
    }

    fn span(&self) -> pb::NewSpan {
        match self {
            Prepared::Plain(span) | Prepared::Blocks(span, ..) => span.clone(),
        }
    }
}

impl Calls {
    pub(super) async fn eden(
        &self,
        directory: InodeId,
        op: Op,
        until: u64,
    ) -> Result<pb::EdenReply, FileError> {
        let result = one(self.write(directory.shard(), vec![op], until).await?)?;
        match (refusal(&result), result.result) {
            (Some(error), _) => Err(FileError::Refused(error, result.time)),
            (None, Some(WriteAnswer::Eden(eden))) => Ok(eden),
            (None, other) => Err(FileError::Wrong(format!("{other:?} instead of an eden file"))),
        }
    }

    /// Writes a file of any size and links it. `Ok(None)`: abandoned as asked.
    pub async fn write_file(
        &self,
        file: &NewFile<'_>,
        until: u64,
    ) -> Result<Option<(pb::LinkReply, u64)>, FileError> {
        let (start, last) = (file.directory, file.abandon_after);
        let written =
            self.write_spans(start, file.attributes, file.contents, &policies(), last, until).await?;
        let Some(Written { eden, certify, size }) = written else { return Ok(None) };
        let link = Op::LinkEden(pb::LinkEden {
            file: eden.file,
            cookie: eden.cookie,
            certify,
            directory: file.directory.0,
            name: file.name.clone(),
            replace: file.replace.into(),
            size,
            crc: crc32fast::hash(file.contents),
        });
        let result = one(self.write(file.directory.shard(), vec![link], until).await?)?;
        match (refusal(&result), result.result) {
            (Some(error), _) => Err(FileError::Refused(error, result.time)),
            (None, Some(WriteAnswer::Link(link))) => Ok(Some((link, result.time))),
            (None, other) => Err(FileError::Wrong(format!("{other:?} instead of a link"))),
        }
    }

    /// Writes contents into an eden file beside a directory, or beside the file whose contents they are. `Ok(None)`:
    /// abandoned after so many spans, as asked.
    pub async fn write_spans(
        &self,
        beside: InodeId,
        attributes: pb::NewAttributes,
        contents: &[u8],
        policies: &pb::Policies,
        abandon_after: Option<usize>,
        until: u64,
    ) -> Result<Option<Written>, FileError> {
        let rules = Rules::new(policies).map_err(|error| FileError::Wrong(error.to_string()))?;
        let step = rules.span_bytes_max() as usize;
        let mut eden: Option<pb::EdenReply> = None;
        let mut certify = None;
        let mut offset = 0u64;
        for (n, bytes) in contents.chunks(step).enumerate() {
            let prepared = Prepared::new(self, &rules, offset, bytes)?;
            let span = Some(prepared.span());
            let op = match &eden {
                None => Op::StartEden(pb::StartEden {
                    directory: beside.0,
                    attributes: Some(attributes),
                    note: "simulation".to_owned(),
                    span,
                }),
                Some(eden) => {
                    let (file, cookie) = (eden.file, eden.cookie);
                    Op::ExtendEden(pb::ExtendEden { file, cookie, certify: certify.take(), span })
                }
            };
            let placed = self.eden(beside, op, until).await?;
            let proofs = self.write_blocks(beside, &prepared, &placed, until).await?;
            certify = Some(pb::CertifySpan { offset, proofs });
            offset += bytes.len() as u64;
            eden = Some(placed);
            if abandon_after == Some(n + 1) {
                if let Some(eden) = eden {
                    self.abandon(&eden, until).await?;
                }
                return Ok(None);
            }
        }
        let Some(eden) = eden else { return Err(FileError::Wrong("an empty file".to_owned())) };
        Ok(Some(Written { eden, certify, size: offset }))
    }

    /// Half of the writers just go away.
    pub async fn abandon(&self, eden: &pb::EdenReply, until: u64) -> Result<(), GaveUp> {
        if self.port.chance(50) {
            let op = Op::AbandonEden(pb::AbandonEden { file: eden.file, cookie: eden.cookie });
            self.write(InodeId(eden.file).shard(), vec![op], until).await?;
        }
        Ok(())
    }

    async fn write_blocks(
        &self,
        directory: InodeId,
        prepared: &Prepared,
        eden: &pb::EdenReply,
        until: u64,
    ) -> Result<Vec<Bytes>, FileError> {
        let Prepared::Blocks(_, blocks, encoded) = prepared else { return Ok(Vec::new()) };
        let mut span =
            WriteSpan::new(blocks, &eden.blocks).map_err(|error| FileError::Wrong(error.to_string()))?;
        let mut flying: Vec<(u64, WriteBlock)> = Vec::new();
        loop {
            while let Some(step) = span.poll() {
                match step {
                    WriteStep::Write(block) => match self.send_block(&block, encoded) {
                        Some(tag) => flying.push((tag, block)),
                        None => span.failed(block.index, block.attempt, "nowhere".to_owned()),
                    },
                    WriteStep::Replace { indexes, avoid } => {
                        let (file, cookie) = (eden.file, eden.cookie);
                        let op = Op::ReplaceBlocks(pb::ReplaceBlocks { file, cookie, indexes, avoid });
                        let placed = self.eden(directory, op, until).await?;
                        span.replaced(&placed.blocks).map_err(|error| FileError::Wrong(error.to_string()))?;
                    }
                    WriteStep::Ready(proofs) => {
                        self.port.forget(&flying.iter().map(|(tag, _)| *tag).collect::<Vec<_>>());
                        return Ok(proofs);
                    }
                    WriteStep::Failed(why) => return Err(FileError::Blocks(why)),
                }
            }
            let tags: Vec<u64> = flying.iter().map(|(tag, _)| *tag).collect();
            let (tag, parts) = self.port.any(&tags).await;
            let Some(at) = flying.iter().position(|(flying, _)| *flying == tag) else { continue };
            let (_, block) = flying.swap_remove(at);
            match parts.and_then(|parts| decode::<pb::WriteBlockReply>(&parts)).and_then(|reply| reply.result)
            {
                Some(pb::write_block_reply::Result::Proof(proof)) => {
                    span.written(block.index, block.attempt, proof);
                }
                Some(pb::write_block_reply::Result::Error(error)) => {
                    span.failed(block.index, block.attempt, error.message);
                }
                None => span.failed(block.index, block.attempt, "no answer".to_owned()),
            }
        }
    }

    fn send_block(&self, block: &WriteBlock, encoded: &Encoded) -> Option<u64> {
        self.send_pieces(block, encoded.slices(block.index))
    }

    /// Begins to write a block; `None`: where its service is is not known.
    pub(super) fn send_pieces(&self, block: &WriteBlock, pieces: Vec<Bytes>) -> Option<u64> {
        let (host, _) = *self.places.borrow().services.get(&block.service)?;
        let start = pb::WriteStart {
            header: Some(request_header(&self.port.cluster, self.port.time(), false)),
            block_service: block.service.0,
            block: block.block.0,
            size: block.size,
            crc: block.crc,
            certificate: block.certificate.clone(),
        };
        let part = |part| encode(&pb::WriteBlockRequest { part: Some(part) });
        let mut parts = vec![part(pb::write_block_request::Part::Start(start))];
        parts.extend(pieces.into_iter().map(|piece| part(pb::write_block_request::Part::Data(piece))));
        Some(self.port.send(host, Rpc::WriteBlock, parts, SECOND))
    }

    // ---- reading ----

    /// The whole contents of a file.
    pub async fn read_file(&self, file: InodeId, size: u64, until: u64) -> Result<Vec<u8>, FileError> {
        let mut contents = Vec::with_capacity(size as usize);
        while (contents.len() as u64) < size {
            let offset = contents.len() as u64;
            let op = pb::shard_request::Op::GetSpans(pb::GetSpans { file: file.0, offset, limit: 2 });
            let reply = match self.shard(file.shard(), op, None, until).await? {
                Ok(ShardAnswer::GetSpans(reply)) => reply,
                Ok(_) => return Err(FileError::Wrong("another reply to GetSpans".to_owned())),
                Err(error) => return Err(FileError::Refused(error, 0)),
            };
            // The file may have got other spans since the last page.
            let page = check_page(reply.spans, offset, true, size, !reply.more)
                .map_err(|error| FileError::Wrong(format!("spans of {file}: {error}")))?;
            for span in page {
                let skip = contents.len().saturating_sub(span.offset as usize);
                match self.read_span(span).await {
                    Ok(bytes) => contents.extend_from_slice(bytes.get(skip..).unwrap_or_default()),
                    Err(why) if self.port.now() + SECOND > until => return Err(FileError::Blocks(why)),
                    // Hosts may be down together, they come back; or the blocks have been replaced: where they are now
                    // the shard knows.
                    Err(_) => {
                        self.refresh().await;
                        self.port.sleep(500 * MILLISECOND).await;
                        break;
                    }
                }
            }
        }
        Ok(contents)
    }

    async fn read_span(&self, span: StoredSpan) -> Result<Vec<u8>, String> {
        if self.port.cluster.bug == Some(Bug::IgnoreCellCrc)
            && let Some(bytes) = self.read_blindly(&span).await
        {
            return Ok(bytes);
        }
        let size = span.size;
        let mut read = ReadSpan::new(Arc::new(span), 0..size, |id| self.readable(id), self.port.below(16));
        self.drive(&mut read).await
    }

    pub(super) async fn drive(&self, read: &mut ReadSpan) -> Result<Vec<u8>, String> {
        // A call is late once, then lost.
        let mut flying: Vec<(u64, Fetch)> = Vec::new();
        loop {
            while let Some(step) = read.poll() {
                match step {
                    ReadStep::Fetch(fetch) => match self.fetch(&fetch) {
                        Some(tag) => flying.push((tag, fetch)),
                        None => read.failed(fetch.id, FetchFailure::Unreachable("nowhere".to_owned())),
                    },
                    ReadStep::Report(_) => {}
                    ReadStep::Done(pieces) => {
                        self.port.forget(&flying.iter().map(|(tag, _)| *tag).collect::<Vec<_>>());
                        return Ok(pieces.concat());
                    }
                    ReadStep::Lost(why) => return Err(why),
                }
            }
            let tags: Vec<u64> = flying.iter().map(|(tag, _)| *tag).collect();
            let (tag, parts) = self.port.any(&tags).await;
            let Some(at) = flying.iter().position(|(flying, _)| *flying == tag) else { continue };
            let (_, fetch) = flying.swap_remove(at);
            match parts.map(|parts| fetched(&parts)) {
                Some(Ok(pieces)) => read.fetched(fetch.id, pieces),
                Some(Err(failure)) => read.failed(fetch.id, failure),
                None => read.failed(fetch.id, FetchFailure::Unreachable("no answer".to_owned())),
            }
            // Sometimes the others seem slow.
            if self.port.chance(5)
                && let Some((_, other)) = flying.first()
            {
                read.late(other.id);
            }
        }
    }

    fn fetch(&self, fetch: &Fetch) -> Option<u64> {
        let (host, _) = *self.places.borrow().services.get(&fetch.service)?;
        let request = pb::FetchBlockRequest {
            header: Some(request_header(&self.port.cluster, self.port.time(), false)),
            block_service: fetch.service.0,
            block: fetch.block.0,
            offset: fetch.offset,
            length: fetch.length,
        };
        Some(self.port.send(host, Rpc::FetchBlock, vec![encode(&request)], SECOND))
    }

    /// [`Bug::IgnoreCellCrc`]: the data blocks as they come. `None`: one did not.
    async fn read_blindly(&self, span: &StoredSpan) -> Option<Vec<u8>> {
        let Body::Blocks { layout, blocks } = &span.body else { return None };
        let mut data = Vec::new();
        for (index, block) in blocks.iter().enumerate().take(layout.data()) {
            let mut bytes = Vec::new();
            // In two parts: of a whole block its host checks the CRC.
            let half = layout.block_size() / 2;
            for (offset, length) in [(0, half), (half, layout.block_size() - half)] {
                let (service, block) = (block.service, block.block);
                let tag = self.fetch(&Fetch { id: 0, index, service, block, offset, length })?;
                let (_, parts) = self.port.any(&[tag]).await;
                bytes.extend(fetched(&parts?).ok()?.concat());
            }
            data.push(bytes);
        }
        let cell = layout.cell_size();
        let cells =
            (0..layout.stripes()).flat_map(|n| data.iter().map(move |b| &b[n * cell..(n + 1) * cell]));
        let mut bytes = cells.collect::<Vec<_>>().concat();
        bytes.truncate(span.size as usize);
        Some(bytes)
    }
}

fn fetched(parts: &[Bytes]) -> Result<Vec<Bytes>, FetchFailure> {
    use pb::fetch_block_reply::Part;
    let mut pieces = Vec::new();
    let unreachable = |why: &str| FetchFailure::Unreachable(why.to_owned());
    for part in parts {
        match decode::<pb::FetchBlockReply>(std::slice::from_ref(part)).and_then(|reply| reply.part) {
            Some(Part::Data(data)) => pieces.push(data),
            Some(Part::Crc(crc)) => {
                let whole = pieces.iter().fold(crc32fast::Hasher::new(), |mut hasher, piece| {
                    hasher.update(piece);
                    hasher
                });
                if whole.finalize() != crc {
                    return Err(unreachable("the CRC of the transfer is wrong"));
                }
                return Ok(pieces);
            }
            Some(Part::Error(error)) => {
                return Err(match BlockError::from_code(error.code) {
                    Some(BlockError::UnknownBlock) => FetchFailure::Damaged(Damage::Missing),
                    Some(BlockError::Corrupt) => FetchFailure::Damaged(Damage::Corrupt),
                    _ => FetchFailure::Unreachable(error.message),
                });
            }
            None => break,
        }
    }
    Err(unreachable("cut off"))
}

/// The result of the one operation of a write.
pub(crate) fn one(mut results: Vec<pb::WriteResult>) -> Result<pb::WriteResult, FileError> {
    match results.pop() {
        Some(result) if results.is_empty() => Ok(result),
        _ => Err(FileError::Wrong("not one result for one operation".to_owned())),
    }
}
