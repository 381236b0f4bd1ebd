//! A shard in memory, with a leader in front of it.

use eggs_machine::group::{self, Applied};
use eggs_machine::hash::StateHash;
use eggs_machine::{Machine, MemoryTable, Tx};
use eggs_proto::pb::shard_reply::Result as Reply;
use eggs_proto::pb::shard_request::Op as Read;
use eggs_proto::pb::write_op::Op;
use eggs_proto::pb::write_result::Result as Answer;
use eggs_proto::{BlockId, BlockServiceId, InodeId, ServiceError, ShardError, ShardId, Time, mac, pb};
use eggs_shard_core::{Cluster, ShardMachine};
use prost::Message;

pub const ROOT: u64 = InodeId::ROOT.0;
pub const SECOND: u64 = 1_000_000_000;

pub struct Shard {
    pub shard: ShardId,
    pub table: MemoryTable,
    pub hash: StateHash,
    pub now: u64,
    pub cluster: Cluster,
    random: u64,
}

pub fn key_of(service: u64) -> mac::Key {
    [service as u8; 32]
}

/// `n` writable block services of class 3, each in a domain of its own.
pub fn cluster(n: u64) -> Cluster {
    cluster_with(n, |_| {})
}

/// As [`cluster`], each changed.
pub fn cluster_with(n: u64, change: impl Fn(&mut pb::BlockServiceInfo)) -> Cluster {
    let info = |id| pb::BlockServiceInfo {
        id,
        storage_class: 3,
        failure_domain: format!("domain {id}"),
        available_bytes: 1 << 40,
        key: key_of(id).to_vec().into(),
        ..Default::default()
    };
    let mut block_services: Vec<_> = (1..=n).map(info).collect();
    block_services.iter_mut().for_each(change);
    Cluster::from_map(&pb::ClusterMapReply { block_services, ..Default::default() })
}

impl Default for Shard {
    fn default() -> Self {
        Shard::new(1)
    }
}

impl Shard {
    pub fn new(shard: u8) -> Shard {
        let mut this = Shard {
            shard: ShardId(shard),
            table: MemoryTable::default(),
            hash: StateHash::default(),
            now: 1000 * SECOND,
            cluster: cluster(8),
            random: 7,
        };
        let mut tx = Tx::new(&this.table, this.hash);
        ShardMachine { shard: this.shard }.genesis(&mut tx).unwrap();
        let (batch, hash) = tx.finish();
        this.table.apply(batch);
        this.hash = hash;
        this
    }

    pub fn with(cluster: Cluster) -> Shard {
        Shard { cluster, ..Shard::default() }
    }

    pub fn prepare(&mut self, ops: Vec<Op>, authorized: bool) -> Result<pb::ShardCommand, pb::Error> {
        let write = pb::Write { ops: ops.into_iter().map(|op| pb::WriteOp { op: Some(op) }).collect() };
        let random = &mut self.random;
        let mut entropy = || {
            *random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *random ^ (*random >> 29)
        };
        let (now, cluster) = (Time(self.now), &self.cluster);
        eggs_shard_core::prepare(self.shard, &self.table, write, authorized, now, &mut entropy, cluster)
    }

    pub fn apply(&mut self, command: &pb::ShardCommand) -> Vec<pb::WriteResult> {
        self.apply_bytes(&command.encode_to_vec())
    }

    pub fn apply_bytes(&mut self, command: &[u8]) -> Vec<pb::WriteResult> {
        self.now += SECOND;
        let command = command.to_vec().into();
        let entry = pb::LogEntry { time: self.now, session: 0, sequence: 0, command };
        let mut tx = Tx::new(&self.table, self.hash);
        let machine = ShardMachine { shard: self.shard };
        let Applied::Ran(outcome) = group::apply(&machine, &mut tx, &entry.encode_to_vec()).unwrap() else {
            panic!("the command did not run")
        };
        let (batch, hash) = tx.finish();
        self.table.apply(batch);
        self.hash = hash;
        let mut reply = pb::WriteReply::decode(outcome.reply).unwrap();
        eggs_shard_core::sign(&mut reply, &self.cluster);
        reply.results
    }

    /// Operations as one batch, with the cluster secret.
    pub fn batch(&mut self, ops: Vec<Op>) -> Vec<pb::WriteResult> {
        let command = self.prepare(ops, true).unwrap();
        self.apply(&command)
    }

    pub fn one(&mut self, op: Op) -> (Time, Result<Answer, ShardError>) {
        let results = self.batch(vec![op]);
        let [result] = &results[..] else { panic!("{} results for one operation", results.len()) };
        (Time(result.time), answer(result))
    }

    pub fn ok(&mut self, op: Op) -> Answer {
        let what = format!("{op:?}");
        self.one(op).1.unwrap_or_else(|error| panic!("{error}: {what}"))
    }

    /// A refusal; it must change nothing (SH-11).
    pub fn refused(&mut self, op: Op) -> ShardError {
        let what = format!("{op:?}");
        let before = self.rows();
        let error = self.one(op).1.map(|answer| panic!("{answer:?} for {what}")).unwrap_err();
        assert_eq!(before, self.rows(), "refused with '{error}', but it changed something: {what}");
        error
    }

    /// All rows but the clock's and the memory of steps.
    pub fn rows(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let ours = |key: &[u8]| key[0] != 0 && key[0] != b'T';
        self.table.iter().filter(|(k, _)| ours(k)).map(|(k, v)| (k.to_vec(), v.to_vec())).collect()
    }

    pub fn read(&self, op: Read) -> Reply {
        eggs_shard_core::read(self.shard, &self.table, &op, Time(self.now)).unwrap()
    }

    pub fn walk(&self, walk: &pb::Walk) -> Result<pb::WalkReply, pb::Error> {
        let views = |shard| (shard == self.shard).then_some(&self.table);
        eggs_shard_core::walk(views, walk, Time(self.now)).unwrap()
    }

    pub fn list(&self, list: pb::List) -> Vec<pb::Entry> {
        match self.read(Read::List(list)) {
            Reply::List(reply) => reply.entries,
            other => panic!("{other:?}"),
        }
    }

    pub fn stat(&self, inode: u64) -> Option<pb::Attributes> {
        match self.read(Read::Stat(pb::Stat { inode })) {
            Reply::Stat(reply) => reply.attributes,
            Reply::Error(error) => {
                assert_eq!(ShardError::from_code(error.code), Some(ShardError::NotFound));
                None
            }
            other => panic!("{other:?}"),
        }
    }

    pub fn findings(&self) -> Vec<String> {
        let mut op = pb::Check { limit_rows: 3, ..Default::default() };
        let mut findings = Vec::new();
        loop {
            let Reply::Check(reply) = self.read(Read::Check(op.clone())) else { panic!("no check") };
            findings.extend(reply.findings.into_iter().map(|f| format!("{}: {}", f.invariant, f.message)));
            if reply.cursor.is_empty() {
                return findings;
            }
            op.cursor = reply.cursor;
        }
    }

    /// Everything is as it must be.
    pub fn verify(&self) {
        assert_eq!(self.findings(), Vec::<String>::new());
        let mut hash = StateHash::default();
        for (key, value) in self.table.iter() {
            hash.insert(key, value);
        }
        assert_eq!(hash, self.hash);
    }

    pub fn put(&mut self, directory: u64, name: &str, bytes: &[u8]) -> u64 {
        match self.ok(put_small(directory, name, bytes, pb::Replace::File)) {
            Answer::Link(reply) => reply.inode,
            other => panic!("{other:?}"),
        }
    }

    /// A directory in this shard, linked, as the coordinator makes it.
    pub fn mkdir(&mut self, transaction: u64, parent: u64, name: &str) -> u64 {
        let made = self.ok(Op::CreateDirectory(pb::CreateDirectory {
            transaction,
            owner: parent,
            attributes: Some(pb::NewAttributes { mode: 0o755, ..Default::default() }),
        }));
        let Answer::Link(made) = made else { panic!("{made:?}") };
        self.ok(Op::LinkEdge(pb::LinkEdge {
            transaction,
            directory: parent,
            name: name.to_owned().into(),
            target: made.inode,
            replace: 0,
        }));
        made.inode
    }

    /// A published file "name" of one span of `size` bytes in (4, 2) blocks.
    pub fn put_blocks(&mut self, name: &str, size: u32) -> u64 {
        let eden = eden(self.ok(start(ROOT, Some(blocks_span(0, size, 77, 4, 2)))));
        let certify = Some(pb::CertifySpan { offset: 0, proofs: Shard::proofs(&eden.blocks) });
        self.ok(publish(&eden, certify, name, u64::from(size), 77));
        eden.file
    }

    pub fn spans(&self, file: u64) -> Vec<pb::Span> {
        match self.read(Read::GetSpans(pb::GetSpans { file, offset: 0, limit: 0 })) {
            Reply::GetSpans(reply) => reply.spans,
            other => panic!("{other:?}"),
        }
    }

    /// The blocks of a file's first span.
    pub fn blocks(&self, file: u64) -> Vec<pb::Block> {
        self.spans(file).remove(0).blocks.unwrap().blocks
    }

    /// A page of garbage, signed.
    pub fn garbage_page(&self, after_file: u64, limit: u32) -> pb::ListGarbageReply {
        let Reply::ListGarbage(mut reply) =
            self.read(Read::ListGarbage(pb::ListGarbage { after_file, limit }))
        else {
            panic!("no garbage")
        };
        eggs_shard_core::sign_garbage(&mut reply, &self.cluster);
        reply
    }

    pub fn garbage(&self) -> Vec<pb::GarbageBlock> {
        let reply = self.garbage_page(0, 0);
        assert!(!reply.more);
        reply.blocks
    }

    /// The proofs a block service would give for what was placed.
    pub fn proofs(placed: &[pb::PlacedBlock]) -> Vec<bytes::Bytes> {
        placed
            .iter()
            .map(|block| {
                let (service, id) = (BlockServiceId(block.block_service), BlockId(block.block));
                let key = key_of(block.block_service);
                let certificate = mac::write_certificate(&key, service, id, block.size, block.crc);
                assert_eq!(block.certificate, certificate.to_vec());
                mac::write_proof(&key, service, id, block.size, block.crc).to_vec().into()
            })
            .collect()
    }
}

/// The code of an error on the wire.
pub fn code(error: &pb::Error) -> ShardError {
    ShardError::from_code(error.code).unwrap()
}

pub fn answer(result: &pb::WriteResult) -> Result<Answer, ShardError> {
    match result.result.clone().unwrap() {
        Answer::Error(error) => Err(ShardError::from_code(error.code).unwrap()),
        answer => Ok(answer),
    }
}

pub fn eden(answer: Answer) -> pb::EdenReply {
    match answer {
        Answer::Eden(reply) => reply,
        other => panic!("{other:?}"),
    }
}

pub fn link(answer: Answer) -> pb::LinkReply {
    match answer {
        Answer::Link(reply) => reply,
        other => panic!("{other:?}"),
    }
}

pub fn put_small(directory: u64, name: &str, bytes: &[u8], replace: pb::Replace) -> Op {
    Op::PutSmall(pb::PutSmall {
        directory,
        name: name.to_owned().into(),
        bytes: bytes.to_vec().into(),
        symlink: false,
        attributes: Some(pb::NewAttributes { mode: 0o644, uid: 1, gid: 2, mtime: None }),
        replace: replace as i32,
    })
}

pub fn publish(
    eden: &pb::EdenReply,
    certify: Option<pb::CertifySpan>,
    name: &str,
    size: u64,
    crc: u32,
) -> Op {
    Op::LinkEden(pb::LinkEden {
        file: eden.file,
        cookie: eden.cookie,
        certify,
        directory: ROOT,
        name: name.to_owned().into(),
        replace: pb::Replace::File as i32,
        size,
        crc,
    })
}

pub fn unlink(directory: u64, name: &str) -> Op {
    Op::Unlink(pb::Unlink { directory, name: name.to_owned().into(), expected: 0 })
}

pub fn rename(directory: u64, old: &str, new: &str, replace: pb::Replace) -> Op {
    Op::Rename(pb::Rename {
        directory,
        old_name: old.to_owned().into(),
        new_name: new.to_owned().into(),
        replace: replace as i32,
    })
}

pub fn start(directory: u64, span: Option<pb::NewSpan>) -> Op {
    Op::StartEden(pb::StartEden {
        directory,
        attributes: Some(pb::NewAttributes { mode: 0o600, ..Default::default() }),
        note: "/a/note".to_owned(),
        span,
    })
}

pub fn inline_span(offset: u64, bytes: &[u8]) -> pb::NewSpan {
    pb::NewSpan {
        offset,
        size: bytes.len() as u32,
        crc: crc(bytes),
        body: Some(pb::new_span::Body::Inline(bytes.to_vec().into())),
    }
}

pub fn zeros_span(offset: u64, size: u32) -> pb::NewSpan {
    let crc = crc(&vec![0; size as usize]);
    pb::NewSpan { offset, size, crc, body: Some(pb::new_span::Body::Zeros(pb::Done {})) }
}

/// A span of `size` bytes in (data, parity) blocks of one stripe; what is in them does not matter.
pub fn blocks_span(offset: u64, size: u32, crc: u32, data: u32, parity: u32) -> pb::NewSpan {
    let block = |index| pb::NewBlock { crc: if data == 1 { 5 } else { index }, cell_crcs: vec![9] };
    pb::NewSpan {
        offset,
        size,
        crc,
        body: Some(pb::new_span::Body::Blocks(pb::NewBlocks {
            storage_class: 3,
            data,
            parity,
            stripes: 1,
            cell_size: size.div_ceil(data),
            blocks: (0..data + parity).map(block).collect(),
            avoid: Vec::new(),
        })),
    }
}

/// CRC-32 (ISO-HDLC), bit by bit: independent of the library the shard uses.
pub fn crc(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}
