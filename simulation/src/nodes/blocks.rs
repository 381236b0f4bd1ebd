//! A host of disks, as `eggs-blockd` is: admission and layout are `blockd/core`'s, the disk is virtual.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use eggs_blockd_core::admission::{Space, admit_erase, check_header, check_range};
use eggs_blockd_core::{Identity, Place, Receiving, WriteAdmission};
use eggs_proto::limits::CLASS_FLASH;
use eggs_proto::{BlockError, BlockId, BlockServiceId, ServiceError, Time, pb};
use rand::{Rng, RngCore};

use super::segments::Segments;
use super::{Cluster, Daemon, Me, RegistryLine, Stop, decode, encode, reply_header};
use crate::bug::Bug;
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
    pub segments: Segments,
    /// Gone, with all that was on it.
    pub lost: bool,
    /// Says that it is full.
    pub full: bool,
    /// Blocks it had leave to erase. What was written to one of these later came late: its writer had been given up.
    pub erased: BTreeSet<BlockId>,
    /// Blocks that faults have damaged: when it starts again it may find that they are none.
    pub damaged: BTreeSet<BlockId>,
}

struct Writing {
    from: NodeId,
    tag: u64,
    disk: usize,
    admission: WriteAdmission,
    place: Place,
}

impl BlockHost {
    pub fn new(me: Me, cluster: Cluster, disks: usize, kernel: &mut Kernel) -> BlockHost {
        let mut host = BlockHost {
            me,
            cluster,
            disks: Vec::new(),
            line: RegistryLine::default(),
            writing: BTreeMap::new(),
        };
        (0..disks).for_each(|_| host.add_disk(kernel));
        host
    }

    /// An empty disk in a slot of its own.
    pub fn add_disk(&mut self, kernel: &mut Kernel) {
        let mut key = [0; 32];
        kernel.rng.fill_bytes(&mut key);
        let identity = Identity {
            cluster: self.cluster.id,
            service: BlockServiceId(kernel.rng.next_u64() | 1),
            key,
            formatted_at: Time(1),
            storage_class: CLASS_FLASH,
            failure_domain: format!("rack{}-{}", self.me.id, self.disks.len()),
        };
        self.disks.push(Disk {
            identity,
            segments: Segments::new(DISK_BYTES),
            lost: false,
            full: false,
            erased: BTreeSet::new(),
            damaged: BTreeSet::new(),
        });
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
        match disk.segments.place(admission.block) {
            Some(place) if (place.size, place.crc) != (admission.size, admission.crc) => {
                return Err(BlockError::WrongCrc);
            }
            Some(_) if disk.segments.read(admission.block).is_ok() => {
                return Ok(Some(Bytes::copy_from_slice(&admission.proof)));
            }
            // A damaged one is written again.
            Some(_) | None => {}
        }
        if self.writing.values().any(|other| other.disk == at && other.admission.block == admission.block) {
            return Err(BlockError::Busy);
        }
        let free_bytes = if disk.full { 0 } else { DISK_BYTES - disk.segments.used_bytes() };
        Space { capacity_bytes: DISK_BYTES, free_bytes }.admit(admission.size, 0)?;
        let mut receiving = Receiving::new(admission.size, admission.crc);
        let mut bytes = Vec::with_capacity(admission.size as usize);
        for part in parts {
            let Some(pb::write_block_request::Part::Data(data)) = part.and_then(|part| part.part) else {
                return Err(BlockError::Malformed);
            };
            receiving.push(&data)?;
            bytes.extend_from_slice(&data);
        }
        receiving.finish()?;
        let number = kernel.tag();
        let place = disk.segments.append(&disk.identity, &admission, &bytes);
        let place = place.map_err(|_| BlockError::NoSpace)?;
        let (from, tag) = (request.from, request.tag);
        if self.cluster.bug == Some(Bug::ProofBeforeSync) {
            disk.segments.placed(&disk.identity, admission.block, place);
            return Ok(Some(Bytes::copy_from_slice(&admission.proof)));
        }
        let writing = Writing { from, tag, disk: at, admission, place };
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
        let Some(writing) = self.writing.remove(&number) else { return };
        let disk = &mut self.disks[writing.disk];
        if disk.lost {
            let reply = write_reply(self.now(kernel), Err(BlockError::DiskLost));
            self.me.reply(kernel, writing.from, writing.tag, Rpc::WriteBlock, vec![encode(&reply)]);
            return;
        }
        disk.segments.sync(writing.place);
        disk.segments.placed(&disk.identity, writing.admission.block, writing.place);
        let proof = Bytes::copy_from_slice(&writing.admission.proof);
        let reply = write_reply(self.now(kernel), Ok(proof));
        self.me.reply(kernel, writing.from, writing.tag, Rpc::WriteBlock, vec![encode(&reply)]);
    }

    // ---- reads ----

    fn fetch(&self, request: &Envelope) -> Result<Bytes, BlockError> {
        let fetch: pb::FetchBlockRequest = decode(&request.parts).ok_or(BlockError::Malformed)?;
        check_header(fetch.header.as_ref(), self.cluster.id)?;
        let disk = &self.disks[self.disk(fetch.block_service)?];
        // Readers trust nobody: half of the hosts hand out what is damaged as if it were not.
        let block = BlockId(fetch.block);
        let blind = self.me.id.0.is_multiple_of(2);
        let (place, bytes) =
            if blind { disk.segments.read_blindly(block)? } else { disk.segments.read(block)? };
        check_range(place.size, fetch.offset, fetch.length)?;
        Ok(bytes.slice(fetch.offset as usize..(fetch.offset + fetch.length) as usize))
    }

    // ---- the janitor's ----

    fn erase(&mut self, request: &Envelope) -> Result<Vec<pb::ProvenBlock>, BlockError> {
        let erase: pb::EraseBlocksRequest = decode(&request.parts).ok_or(BlockError::Malformed)?;
        check_header(erase.header.as_ref(), self.cluster.id)?;
        let mut erase_one = |block: pb::EraseBlock| {
            let at = self.disk(block.block_service)?;
            let disk = &mut self.disks[at];
            let proof = admit_erase(&disk.identity, &block)?;
            let block = BlockId(block.block);
            disk.segments.erase(&disk.identity, block);
            disk.erased.insert(block);
            Ok(Bytes::copy_from_slice(&proof))
        };
        let proven = |erased: Result<Bytes, BlockError>| pb::ProvenBlock {
            result: Some(match erased {
                Ok(proof) => pb::proven_block::Result::Proof(proof),
                Err(error) => pb::proven_block::Result::Error(error.bare()),
            }),
        };
        Ok(erase.blocks.into_iter().map(|block| proven(erase_one(block))).collect())
    }

    fn check(&self, request: &Envelope) -> Result<Vec<pb::CheckedBlock>, BlockError> {
        let check: pb::CheckBlocksRequest = decode(&request.parts).ok_or(BlockError::Malformed)?;
        check_header(check.header.as_ref(), self.cluster.id)?;
        let check_one = |expected: pb::ExpectedBlock| {
            let disk = &self.disks[self.disk(expected.block_service)?];
            let (place, _) = disk.segments.read(BlockId(expected.block))?;
            let right = (place.size, place.crc) == (expected.size, expected.crc);
            if right { Ok(()) } else { Err(BlockError::Corrupt) }
        };
        let checked =
            |block| pb::CheckedBlock { error: check_one(block).err().map(|error: BlockError| error.bare()) };
        Ok(check.blocks.into_iter().map(checked).collect())
    }

    fn heartbeat(&mut self, kernel: &mut Kernel) {
        let report = |disk: &Disk| {
            let used = disk.segments.used_bytes();
            pb::BlockServiceReport {
                id: disk.identity.service.0,
                key: Bytes::copy_from_slice(&disk.identity.key),
                storage_class: u32::from(disk.identity.storage_class),
                failure_domain: disk.identity.failure_domain.clone(),
                path: format!("/disks/{}", disk.identity.service.0),
                capacity_bytes: DISK_BYTES,
                available_bytes: if disk.full { 0 } else { DISK_BYTES - used },
                used_bytes: used,
                blocks: disk.segments.blocks().count() as u64,
                io_errors: 0,
                problem: if disk.lost { "the disk is lost".to_owned() } else { String::new() },
                ..Default::default()
            }
        };
        let register = pb::RegisterBlockServices {
            address: super::address(self.me.id),
            failure_domain: format!("host{}", self.me.id),
            block_services: self.disks.iter().map(report).collect(),
            ..Default::default()
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
    /// Whether there is anything known as the block, right or not.
    pub fn holds(&self, block: BlockId) -> bool {
        self.segments.place(block).is_some()
    }

    /// Whether the block is there, whole, with this CRC.
    pub fn has(&self, block: BlockId, crc: u32) -> bool {
        self.segments.read(block).is_ok_and(|(place, _)| place.crc == crc)
    }
}

/// Results, or why there are none.
fn answered<R>(result: Result<Vec<R>, BlockError>) -> (Vec<R>, Option<pb::Error>) {
    match result {
        Ok(results) => (results, None),
        Err(error) => (Vec::new(), Some(error.bare())),
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
            let lose_journal = kernel.rng.random_range(0..8) == 0;
            disk.segments.open(&disk.identity, lose_journal);
        }
        self.me.timer(kernel, 0, Timer::Heartbeat);
        Ok(())
    }

    fn crash(&mut self, kernel: &mut Kernel) -> Result<(), String> {
        self.writing.clear();
        for disk in &mut self.disks {
            disk.segments.crash(&mut kernel.rng);
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
            Rpc::EraseBlocks => {
                let (results, error) = answered(self.erase(&request));
                let header = reply_header(self.now(kernel));
                vec![encode(&pb::EraseBlocksReply { header, error, results })]
            }
            Rpc::CheckBlocks => {
                let (results, error) = answered(self.check(&request));
                let header = reply_header(self.now(kernel));
                vec![encode(&pb::CheckBlocksReply { header, error, results })]
            }
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
            Timer::Turn | Timer::Held | Timer::RaftTick(_) | Timer::Tick | Timer::Expired(_) => {}
        }
        Ok(())
    }
}
