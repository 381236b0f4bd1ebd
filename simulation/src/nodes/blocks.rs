//! A host of disks, as `eggs-blockd` is: admission and layout are `blockd/core`'s, the disk is virtual.

use std::collections::BTreeMap;

use bytes::Bytes;
use eggs_blockd_core::admission::{Space, check_header, check_range};
use eggs_blockd_core::header::HEADER_USED_BYTES;
use eggs_blockd_core::{BlockHeader, BlockPath, HEADER_BYTES, Identity, Receiving, WriteAdmission};
use eggs_proto::limits::CLASS_FLASH;
use eggs_proto::{BlockError, BlockId, BlockServiceId, ServiceError, Time, pb};
use rand::{Rng, RngCore};

use super::{Cluster, Daemon, Me, RegistryLine, Stop, decode, encode, reply_header};
use crate::bug::Bug;
use crate::disk::VirtualDisk;
use crate::kernel::{Envelope, Kernel, MICROSECOND, MILLISECOND, NodeId, Rpc, SECOND, Timer};

/// Enough for a run and its reserve.
const DISK_BYTES: u64 = 256 << 20;

pub(crate) struct BlockHost {
    pub me: Me,
    cluster: Cluster,
    pub disks: Vec<Disk>,
    line: RegistryLine,
    /// Writes on their way to the disk.
    writing: BTreeMap<u64, Writing>,
}

pub(crate) struct Disk {
    pub identity: Identity,
    pub files: VirtualDisk,
    /// Gone, with all that was on it.
    pub lost: bool,
    /// Says that it is full.
    pub full: bool,
}

struct Writing {
    from: NodeId,
    tag: u64,
    disk: usize,
    admission: WriteAdmission,
    tmp: String,
    step: Step,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Sync,
    Rename,
    SyncFolder,
}

impl BlockHost {
    pub fn new(me: Me, cluster: Cluster, disks: usize, kernel: &mut Kernel) -> BlockHost {
        let disks = (0..disks)
            .map(|disk| {
                let mut key = [0; 32];
                kernel.rng.fill_bytes(&mut key);
                let identity = Identity {
                    cluster: cluster.id,
                    service: BlockServiceId(kernel.rng.next_u64() | 1),
                    key,
                    formatted_at: Time(1),
                    storage_class: CLASS_FLASH,
                    failure_domain: format!("rack{}-{disk}", me.id),
                };
                let files = VirtualDisk::new(DISK_BYTES);
                Disk { identity, files, lost: false, full: false }
            })
            .collect();
        BlockHost { me, cluster, disks, line: RegistryLine::default(), writing: BTreeMap::new() }
    }

    fn now(&self, kernel: &Kernel) -> Time {
        // A block service keeps no clock of its own: its times bind nobody.
        self.me.wall(kernel)
    }

    fn disk(&self, service: u64) -> Result<usize, BlockError> {
        let found = self.disks.iter().position(|disk| disk.identity.service.0 == service);
        let at = found.ok_or(BlockError::UnknownBlockService)?;
        if self.disks[at].lost { Err(BlockError::DiskLost) } else { Ok(at) }
    }

    // ---- writes ----

    /// `Some`: the proof at once, of a block that is there.
    fn begin_write(&mut self, kernel: &mut Kernel, request: &Envelope) -> Result<Option<Bytes>, BlockError> {
        let mut parts =
            request.parts.iter().map(|part| decode::<pb::WriteBlockRequest>(std::slice::from_ref(part)));
        let first = parts.next().flatten().and_then(|part| part.part);
        let Some(pb::write_block_request::Part::Start(start)) = first else {
            return Err(BlockError::Malformed);
        };
        check_header(start.header.as_ref(), self.cluster.id)?;
        let at = self.disk(start.block_service)?;
        let disk = &mut self.disks[at];
        let admission = WriteAdmission::decide(&disk.identity, &start)?;
        let path = BlockPath::new(admission.block).to_string();
        match disk.read(admission.block) {
            Ok((header, bytes)) if (header.size, header.crc) == (admission.size, admission.crc) => {
                if crc32fast::hash(&bytes) == header.crc {
                    // Its first writer may have been cut off between the rename and this.
                    disk.files.sync_folders();
                    return Ok(Some(Bytes::copy_from_slice(&admission.proof)));
                }
            }
            Ok(_) => return Err(BlockError::WrongCrc),
            Err(_) => {}
        }
        if self.writing.values().any(|other| other.disk == at && other.admission.block == admission.block) {
            return Err(BlockError::Busy);
        }
        let free_bytes = if disk.full { 0 } else { DISK_BYTES - disk.files.used_bytes() };
        Space { capacity_bytes: DISK_BYTES, free_bytes }.admit(admission.size, 0)?;
        let mut receiving = Receiving::new(admission.size, admission.crc);
        let mut bytes = Vec::with_capacity((HEADER_BYTES + admission.size) as usize);
        bytes.extend_from_slice(&disk.header(&admission).encode());
        bytes.resize(HEADER_BYTES as usize, 0);
        for part in parts {
            let Some(pb::write_block_request::Part::Data(data)) = part.and_then(|part| part.part) else {
                return Err(BlockError::Malformed);
            };
            receiving.push(&data)?;
            bytes.extend_from_slice(&data);
        }
        receiving.finish()?;
        let number = kernel.tag();
        let tmp = format!("tmp/{number}");
        disk.files.write(&tmp, bytes.into()).map_err(|_| BlockError::NoSpace)?;
        let (from, tag) = (request.from, request.tag);
        if self.cluster.bug == Some(Bug::ProofBeforeSync) {
            disk.files.rename(&tmp, &path);
            return Ok(Some(Bytes::copy_from_slice(&admission.proof)));
        }
        let writing = Writing { from, tag, disk: at, admission, tmp, step: Step::Sync };
        self.writing.insert(number, writing);
        self.next_step(kernel, number);
        Ok(None)
    }

    fn next_step(&mut self, kernel: &mut Kernel, number: u64) {
        let delay = match kernel.rng.random_range(0..40) {
            0 => kernel.rng.random_range(MILLISECOND..400 * MILLISECOND),
            _ => kernel.rng.random_range(20 * MICROSECOND..MILLISECOND),
        };
        self.me.timer(kernel, delay, Timer::Disk(number));
    }

    fn go_on(&mut self, kernel: &mut Kernel, number: u64) {
        let Some(mut writing) = self.writing.remove(&number) else { return };
        let disk = &mut self.disks[writing.disk];
        if disk.lost {
            let reply = write_reply(self.now(kernel), Err(BlockError::DiskLost));
            self.me.reply(kernel, writing.from, writing.tag, Rpc::WriteBlock, vec![encode(&reply)]);
            return;
        }
        match writing.step {
            Step::Sync => {
                disk.files.sync(&writing.tmp);
                writing.step = Step::Rename;
            }
            Step::Rename => {
                disk.files.rename(&writing.tmp, &BlockPath::new(writing.admission.block).to_string());
                writing.step = Step::SyncFolder;
            }
            Step::SyncFolder => {
                disk.files.sync_folders();
                let proof = Bytes::copy_from_slice(&writing.admission.proof);
                let reply = write_reply(self.now(kernel), Ok(proof));
                self.me.reply(kernel, writing.from, writing.tag, Rpc::WriteBlock, vec![encode(&reply)]);
                return;
            }
        }
        self.writing.insert(number, writing);
        self.next_step(kernel, number);
    }

    // ---- reads ----

    fn fetch(&self, request: &Envelope) -> Result<Bytes, BlockError> {
        let fetch: pb::FetchBlockRequest = decode(&request.parts).ok_or(BlockError::Malformed)?;
        check_header(fetch.header.as_ref(), self.cluster.id)?;
        let disk = &self.disks[self.disk(fetch.block_service)?];
        let (header, bytes) = disk.read(BlockId(fetch.block))?;
        check_range(header.size, fetch.offset, fetch.length)?;
        let range = bytes.slice(fetch.offset as usize..(fetch.offset + fetch.length) as usize);
        if fetch.length == header.size && crc32fast::hash(&range) != header.crc {
            return Err(BlockError::Corrupt);
        }
        Ok(range)
    }

    fn heartbeat(&mut self, kernel: &mut Kernel) {
        let report = |disk: &Disk| {
            let used = disk.files.used_bytes();
            pb::BlockServiceReport {
                id: disk.identity.service.0,
                key: Bytes::copy_from_slice(&disk.identity.key),
                storage_class: u32::from(disk.identity.storage_class),
                failure_domain: disk.identity.failure_domain.clone(),
                path: format!("/disks/{}", disk.identity.service.0),
                capacity_bytes: DISK_BYTES,
                available_bytes: if disk.full { 0 } else { DISK_BYTES - used },
                used_bytes: used,
                blocks: disk.files.paths().len() as u64,
                io_errors: 0,
                problem: if disk.lost { "the disk is lost".to_owned() } else { String::new() },
            }
        };
        let register = pb::RegisterBlockServices {
            address: super::address(self.me.id),
            failure_domain: format!("host{}", self.me.id),
            block_services: self.disks.iter().map(report).collect(),
        };
        let op = pb::registry_request::Op::RegisterBlockServices(register);
        let map = pb::registry_request::Op::Map(pb::ClusterMap { with_keys: false, known_version: 0 });
        let now = self.now(kernel);
        self.line.ask(kernel, &self.me, &self.cluster, now, vec![op, map]);
        let delay = if kernel.now < SECOND { 50 * MILLISECOND } else { self.line.pause() };
        self.me.timer(kernel, delay, Timer::Heartbeat);
    }
}

impl Disk {
    fn header(&self, admission: &WriteAdmission) -> BlockHeader {
        BlockHeader {
            cluster: self.identity.cluster,
            service: self.identity.service,
            block: admission.block,
            size: admission.size,
            crc: admission.crc,
        }
    }

    /// Whether the block is there, whole, with this CRC.
    pub fn has(&self, block: BlockId, crc: u32) -> bool {
        self.read(block).is_ok_and(|(header, bytes)| header.crc == crc && crc32fast::hash(&bytes) == crc)
    }

    /// A block's header and bytes, as `eggs-blockd` reads them.
    fn read(&self, block: BlockId) -> Result<(BlockHeader, Bytes), BlockError> {
        let file = self.files.read(&BlockPath::new(block).to_string()).ok_or(BlockError::UnknownBlock)?;
        let used = file.get(..HEADER_USED_BYTES).and_then(|bytes| bytes.try_into().ok());
        let used: &[u8; HEADER_USED_BYTES] = used.ok_or(BlockError::Corrupt)?;
        let header = BlockHeader::expect(used, self.identity.cluster, self.identity.service, block)
            .map_err(|_| BlockError::Corrupt)?;
        if file.len() as u64 != header.file_bytes() {
            return Err(BlockError::Corrupt);
        }
        Ok((header, file.slice(HEADER_BYTES as usize..)))
    }
}

fn write_reply(time: Time, result: Result<Bytes, BlockError>) -> pb::WriteBlockReply {
    let result = match result {
        Ok(proof) => pb::write_block_reply::Result::Proof(proof),
        Err(error) => pb::write_block_reply::Result::Error(error.bare()),
    };
    pb::WriteBlockReply { header: reply_header(time), result: Some(result) }
}

fn fetch_reply(result: Result<Bytes, BlockError>) -> Vec<Bytes> {
    use pb::fetch_block_reply::Part;
    let part = |part| encode(&pb::FetchBlockReply { part: Some(part) });
    match result {
        Ok(bytes) => {
            let crc = crc32fast::hash(&bytes);
            vec![part(Part::Data(bytes)), part(Part::Crc(crc))]
        }
        Err(error) => vec![part(Part::Error(error.bare()))],
    }
}

impl Daemon for BlockHost {
    fn start(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        for disk in &mut self.disks {
            // What was arriving when it stopped.
            for path in disk.files.paths().into_iter().filter(|path| path.starts_with("tmp/")) {
                disk.files.remove(&path);
            }
        }
        self.me.timer(kernel, 0, Timer::Heartbeat);
        Ok(())
    }

    fn crash(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.writing.clear();
        for disk in &mut self.disks {
            disk.files.crash(&mut kernel.rng);
        }
        Ok(())
    }

    fn on_request(&mut self, kernel: &mut Kernel, request: Envelope) -> Result<(), Stop> {
        let parts = match request.rpc {
            Rpc::WriteBlock => {
                let Some(result) = self.begin_write(kernel, &request).transpose() else { return Ok(()) };
                vec![encode(&write_reply(self.now(kernel), result))]
            }
            Rpc::FetchBlock => fetch_reply(self.fetch(&request)),
            Rpc::Shard | Rpc::Crossdir | Rpc::Registry => return Ok(()),
        };
        self.me.reply(kernel, request.from, request.tag, request.rpc, parts);
        Ok(())
    }

    fn on_reply(&mut self, _kernel: &mut Kernel, reply: Envelope) -> Result<(), Stop> {
        self.line.heard(&self.cluster, &reply);
        Ok(())
    }

    fn on_timer(&mut self, kernel: &mut Kernel, timer: Timer) -> Result<(), Stop> {
        match timer {
            Timer::Disk(number) => self.go_on(kernel, number),
            Timer::Heartbeat => self.heartbeat(kernel),
            Timer::Turn | Timer::RaftTick | Timer::Tick | Timer::Expired(_) => {}
        }
        Ok(())
    }
}
