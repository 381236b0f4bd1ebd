//! Writing files: from memory, from a stream, from a file of this host.

use std::fs::File;
use std::io::Read;
use std::path::Path as LocalPath;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use eggs_proto::pb::write_op;
use eggs_proto::{InodeId, Time, pb};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::eden::{EdenFile, Prepared, Spare};
use crate::error::{ClientError, Result};
use crate::names::{check_name, file_attributes, link_reply, optional};
use crate::types::{CreateOptions, Published, Replace};
use crate::{Client, Directory};

/// First size of a span's buffer when nothing is known about the file.
const BUFFER_BYTES_MIN: usize = 64 << 10;
/// Bytes read from a stream at once; also how often progress is told.
const READ_BYTES: usize = 1 << 20;
/// Spans shorter than this are coded where they are: moving to another thread costs more.
const ENCODE_HERE_MAX: usize = 128 << 10;

/// Writes a file from front to back. Its name appears at [`FileWriter::finish`]; dropped before, nothing does.
///
/// At most two spans are in memory: one whose blocks are being written, one being filled.
#[derive(Debug)]
pub struct FileWriter {
    directory: Directory,
    name: Bytes,
    what: Arc<str>,
    options: CreateOptions,
    buffer: BytesMut,
    spare: Spare,
    eden: EdenFile,
    failed: bool,
}

impl FileWriter {
    fn new(directory: &Directory, name: &[u8], options: &CreateOptions) -> Result<FileWriter> {
        let what: Arc<str> = directory.what(name).into();
        let name = Bytes::copy_from_slice(check_name(name, &what)?);
        let eden = EdenFile::new(directory, what.clone(), file_attributes(options));
        Ok(FileWriter {
            directory: directory.clone(),
            name,
            what,
            options: options.clone(),
            buffer: BytesMut::new(),
            spare: Spare::default(),
            eden,
            failed: false,
        })
    }

    /// Of contents that will get no name but take the place of others.
    pub(crate) fn nameless(directory: &Directory, what: String, options: &CreateOptions) -> FileWriter {
        let what: Arc<str> = what.into();
        let eden = EdenFile::new(directory, what.clone(), file_attributes(options));
        FileWriter {
            directory: directory.clone(),
            name: Bytes::new(),
            what,
            options: options.clone(),
            buffer: BytesMut::new(),
            spare: Spare::default(),
            eden,
            failed: false,
        }
    }

    /// Puts what was written in the place of a published file's contents, which must be the same; the bytes.
    pub(crate) async fn replace(mut self, published: InodeId) -> Result<u64> {
        if !self.buffer.is_empty() {
            self.flush().await?;
        }
        self.eden.replace(published).await
    }

    fn span_max(&self) -> usize {
        self.directory.rules.span_bytes_max() as usize
    }

    /// Bytes that still fit the span being filled.
    fn room(&self) -> usize {
        self.span_max() - self.buffer.len()
    }

    /// Makes the buffer large enough for `more` bytes, but not for more than is expected to come.
    fn reserve(&mut self, more: usize) {
        if self.buffer.capacity() - self.buffer.len() >= more {
            return;
        }
        if self.buffer.is_empty()
            && let Some(mut spare) = self.spare.data.pop()
        {
            spare.clear();
            self.buffer = spare;
        }
        let expected = self.options.size_hint.map_or(0, |size| size.saturating_sub(self.written()));
        let expected = usize::try_from(expected).unwrap_or(usize::MAX);
        let whole = expected.max(self.buffer.len() * 2).max(more).max(BUFFER_BYTES_MIN).min(self.room());
        if self.buffer.capacity() - self.buffer.len() < whole {
            self.buffer.reserve(whole);
        }
    }

    /// Takes in the next bytes; waits while too much is in flight.
    ///
    /// # Errors
    /// After an error the file cannot be finished.
    pub async fn write(&mut self, data: &[u8]) -> Result<()> {
        let mut data = data;
        while !data.is_empty() {
            self.flush_if_full().await?;
            let step = data.len().min(self.room());
            self.reserve(step);
            self.buffer.put_slice(&data[..step]);
            data.advance(step);
        }
        Ok(())
    }

    /// Takes in what one read of `input` gives; false at its end.
    async fn read_from(&mut self, input: &mut (dyn AsyncRead + Unpin + Send)) -> Result<bool> {
        self.flush_if_full().await?;
        let step = READ_BYTES.min(self.room());
        self.reserve(step);
        let mut limited = (&mut self.buffer).limit(step);
        let read = input.read_buf(&mut limited).await;
        Ok(read.map_err(|error| ClientError::local(format_args!("input of {}", self.what), error))? > 0)
    }

    /// Bytes taken in.
    pub fn written(&self) -> u64 {
        self.eden.size() + self.buffer.len() as u64
    }

    /// The path, for people.
    pub fn path(&self) -> &str {
        &self.what
    }

    async fn flush_if_full(&mut self) -> Result<()> {
        if self.failed {
            return Err(ClientError::Invalid(format!("{}: writing failed before", self.what)));
        }
        if self.room() > 0 { Ok(()) } else { self.flush().await }
    }

    async fn flush(&mut self) -> Result<()> {
        self.failed = true;
        let span = std::mem::take(&mut self.buffer);
        let prepared = self.prepare(span).await?;
        self.eden.push(prepared, &mut self.spare).await?;
        self.failed = false;
        Ok(())
    }

    async fn prepare(&mut self, span: BytesMut) -> Result<Prepared> {
        let rules = self.directory.rules.clone();
        if span.len() <= ENCODE_HERE_MAX {
            return Prepared::new(span, &rules, &mut self.spare);
        }
        let mut spare = std::mem::take(&mut self.spare);
        let (prepared, spare) = blocking(move || (Prepared::new(span, &rules, &mut spare), spare)).await?;
        self.spare = spare;
        prepared
    }

    /// Makes everything durable and gives the file its name.
    pub async fn finish(mut self) -> Result<Published> {
        if self.failed {
            return Err(ClientError::Invalid(format!("{}: writing failed before", self.what)));
        }
        let inline = self.directory.rules.inline_bytes_max() as usize;
        if self.eden.size() == 0 && self.buffer.len() <= inline {
            let contents = std::mem::take(&mut self.buffer).freeze();
            return self.directory.put_inline(self.name.clone(), contents, &self.options).await;
        }
        if !self.buffer.is_empty() {
            self.flush().await?;
        }
        self.eden.link(&self.name, self.options.replace).await
    }

    /// Gives the file up (dropping does it too, in the background).
    pub async fn abandon(self) {
        self.eden.abandon().await;
    }

    /// Everything from a file of this host. It is read where it is coded, into the span's buffer.
    async fn fill_from(&mut self, mut local: File, progress: &mut (dyn FnMut(u64) + Send)) -> Result<()> {
        let size = self.span_max();
        loop {
            let expected = self.options.size_hint.map_or(0, |all| all.saturating_sub(self.written()));
            self.reserve(usize::try_from(expected).unwrap_or(size).clamp(BUFFER_BYTES_MIN.min(size), size));
            let mut span = std::mem::take(&mut self.buffer);
            let mut spare = std::mem::take(&mut self.spare);
            let (rules, what) = (self.directory.rules.clone(), self.what.clone());
            self.failed = true;
            let read = move || {
                let read = read_span(&mut local, &mut span, size);
                let read = read.map_err(|error| ClientError::local(format_args!("input of {what}"), error));
                // A span that is not full is the last: finished as any file is.
                let filled = match read {
                    Ok(()) if span.len() < size => Ok(Filled::End(span)),
                    Ok(()) => Prepared::new(span, &rules, &mut spare).map(Filled::Span),
                    Err(error) => Err(error),
                };
                (filled, spare, local)
            };
            let filled;
            (filled, self.spare, local) = blocking(read).await?;
            match filled? {
                Filled::Span(span) => self.eden.push(span, &mut self.spare).await?,
                Filled::End(rest) => {
                    self.buffer = rest;
                    self.failed = false;
                    progress(self.written());
                    return Ok(());
                }
            }
            self.failed = false;
            progress(self.written());
        }
    }
}

enum Filled {
    Span(Prepared),
    End(BytesMut),
}

/// Fills `span` up to `size` bytes, or to the end of the file.
fn read_span(local: &mut File, span: &mut BytesMut, size: usize) -> std::io::Result<()> {
    let step = READ_BYTES;
    while span.len() < size {
        let at = span.len();
        let to = size.min(at + step);
        // The buffer is used again and again: clearing it costs only the first time it grows this far.
        span.resize(to, 0);
        match local.read(&mut span[at..to]) {
            Ok(read) => {
                span.truncate(at + read);
                if read == 0 {
                    break;
                }
            }
            Err(error) => {
                span.truncate(at);
                if error.kind() != std::io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        ClientError::local("work on another thread", std::io::Error::other(error.to_string()))
    })
}

impl Client {
    /// Writes a whole file from memory.
    pub async fn put_bytes(
        &self,
        path: impl AsRef<[u8]>,
        contents: Bytes,
        options: &CreateOptions,
    ) -> Result<Published> {
        let (parent, name) = self.parent_of(path.as_ref()).await?;
        parent.put_bytes(name, contents, options).await
    }

    /// Begins a file; nothing has the name until [`FileWriter::finish`].
    pub async fn create(&self, path: impl AsRef<[u8]>, options: &CreateOptions) -> Result<FileWriter> {
        let (parent, name) = self.parent_of(path.as_ref()).await?;
        FileWriter::new(&parent, &name, options)
    }

    /// Writes a whole file from a reader; `progress` hears the bytes taken in so far.
    pub async fn put(
        &self,
        path: impl AsRef<[u8]>,
        input: &mut (dyn AsyncRead + Unpin + Send),
        options: &CreateOptions,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Published> {
        let mut writer = self.create(path, options).await?;
        while writer.read_from(input).await? {
            progress(writer.written());
        }
        writer.finish().await
    }

    /// Writes a whole file from a file of this host (the fastest way: it is read where it is coded).
    pub async fn put_file(
        &self,
        path: impl AsRef<[u8]>,
        local: &LocalPath,
        options: &CreateOptions,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Published> {
        let (parent, name) = self.parent_of(path.as_ref()).await?;
        parent.put_file(name, local, options, progress).await
    }

    /// `hello, world` and ten zero bytes, as three spans stored three ways: inline, blocks, empty.
    pub async fn create_test_file(&self, path: impl AsRef<[u8]>) -> Result<Published> {
        let (parent, name) = self.parent_of(path.as_ref()).await?;
        let what: Arc<str> = parent.what(&name).into();
        check_name(&name, &what)?;
        let attributes = file_attributes(&CreateOptions::default());
        let mut eden = EdenFile::new(&parent, what, attributes);
        let mut spare = Spare::default();
        let world = &b" world"[..];
        let in_blocks = parent.rules.smallest_in_blocks(world.len() as u32).map_err(ClientError::protocol)?;
        let spans = [
            Prepared::inline(Bytes::from_static(b"hello,")),
            Prepared::blocks(BytesMut::from(world), in_blocks, &mut spare)?,
            Prepared::zeros(10)?,
        ];
        for span in spans {
            eden.push(span, &mut spare).await?;
        }
        eden.link(&name, Replace::Refuse).await
    }
}

impl Directory {
    /// One whole file from memory: one request when it is small.
    pub async fn put_bytes(
        &self,
        name: impl AsRef<[u8]>,
        contents: Bytes,
        options: &CreateOptions,
    ) -> Result<Published> {
        if contents.len() <= self.rules.inline_bytes_max() as usize {
            let what = self.what(name.as_ref());
            let name = Bytes::copy_from_slice(check_name(name.as_ref(), &what)?);
            return self.put_inline(name, contents, options).await;
        }
        let options = CreateOptions { size_hint: Some(contents.len() as u64), ..options.clone() };
        let mut writer = FileWriter::new(self, name.as_ref(), &options)?;
        writer.write(&contents).await?;
        writer.finish().await
    }

    /// As [`Client::put_file`].
    pub async fn put_file(
        &self,
        name: impl AsRef<[u8]>,
        local: &LocalPath,
        options: &CreateOptions,
        progress: &mut (dyn FnMut(u64) + Send),
    ) -> Result<Published> {
        let path = local.to_owned();
        let opened = blocking(move || {
            let file = File::open(&path)?;
            let size = file.metadata()?.len();
            Ok((file, size))
        });
        let (file, size) =
            opened.await?.map_err(|error: std::io::Error| ClientError::local(local.display(), error))?;
        let options = CreateOptions { size_hint: Some(options.size_hint.unwrap_or(size)), ..options.clone() };
        let mut writer = FileWriter::new(self, name.as_ref(), &options)?;
        writer.fill_from(file, progress).await?;
        writer.finish().await
    }

    pub async fn create(&self, name: impl AsRef<[u8]>, options: &CreateOptions) -> Result<FileWriter> {
        FileWriter::new(self, name.as_ref(), options)
    }

    async fn put_inline(&self, name: Bytes, contents: Bytes, options: &CreateOptions) -> Result<Published> {
        let what = self.what(&name);
        let (size, crc) = (contents.len() as u64, crc32fast::hash(&contents));
        let op = put_small(self.inode, name, contents, options);
        let result = self.client.write_one(self.inode, op).await?;
        published(result, size, crc, &what)
    }
}

pub(crate) fn put_small(
    directory: InodeId,
    name: Bytes,
    bytes: Bytes,
    options: &CreateOptions,
) -> write_op::Op {
    write_op::Op::PutSmall(pb::PutSmall {
        directory: directory.0,
        name,
        bytes,
        symlink: false,
        attributes: Some(file_attributes(options)),
        replace: options.replace.to_wire(),
    })
}

pub(crate) fn published(result: pb::WriteResult, size: u64, crc: u32, what: &str) -> Result<Published> {
    let (reply, _) = link_reply(result, &what)?;
    Ok(Published {
        inode: InodeId(reply.inode),
        size,
        crc,
        created_at: Time(reply.created_at),
        replaced: optional(reply.replaced),
    })
}
