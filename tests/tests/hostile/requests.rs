//! Requests that are well-formed as messages and mean anything at all.

use eggs_proto::limits::PROTOCOL_VERSION;
use eggs_proto::pb::write_op::Op as WriteOp;
use eggs_proto::pb::{crossdir_request, new_span, registry_request, shard_request};
use eggs_proto::{InodeId, pb};
use prost::Message as _;
use rand::{Rng as _, RngCore as _};
use rand_chacha::ChaCha8Rng;

/// Makes requests by chance, most of them wrong in a few places only.
#[derive(Debug)]
pub struct Requests {
    pub rng: ChaCha8Rng,
    pub cluster: Vec<u8>,
}

impl Requests {
    fn u64(&mut self) -> u64 {
        match self.rng.random_range(0..6) {
            0 => 0,
            1 => u64::MAX,
            2 => self.rng.random_range(0..4096),
            3 => 1 << self.rng.random_range(0..64),
            4 => InodeId::ROOT.0,
            _ => self.rng.next_u64(),
        }
    }

    fn u32(&mut self) -> u32 {
        self.u64() as u32
    }

    fn inode(&mut self) -> u64 {
        match self.rng.random_range(0..4) {
            0 | 1 => InodeId::ROOT.0,
            // One that may exist.
            2 => {
                self.rng.random_range(0..3) << 61
                    | self.rng.random_range(0..256) << 53
                    | self.rng.random_range(0..4)
            }
            _ => self.u64(),
        }
    }

    fn bytes(&mut self) -> bytes::Bytes {
        let length = match self.rng.random_range(0..16) {
            0 => 0,
            1 => self.rng.random_range(0..20_000),
            _ => self.rng.random_range(0..64),
        };
        let mut bytes = vec![0; length];
        self.rng.fill_bytes(&mut bytes);
        bytes.into()
    }

    fn name(&mut self) -> bytes::Bytes {
        match self.rng.random_range(0..8) {
            0 => self.bytes(),
            1 => "..".into(),
            2 => "a/b".into(),
            3 => "nul\0".into(),
            4 => vec![b'n'; self.rng.random_range(250..260)].into(),
            _ => format!("hostile-{}", self.rng.random_range(0..20)).into(),
        }
    }

    fn many<T>(&mut self, make: impl Fn(&mut Self) -> T) -> Vec<T> {
        let count = match self.rng.random_range(0..10) {
            0 => self.rng.random_range(0..600),
            _ => self.rng.random_range(0..4),
        };
        (0..count).map(|_| make(self)).collect()
    }

    fn some<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.rng.random_bool(0.8).then(|| make(self))
    }

    pub fn header(&mut self) -> Option<pb::RequestHeader> {
        if self.rng.random_bool(0.02) {
            return None;
        }
        let mut header = pb::RequestHeader {
            version: PROTOCOL_VERSION,
            cluster_id: self.cluster.clone().into(),
            session: self.u64(),
            sequence: self.u64(),
            ..pb::RequestHeader::default()
        };
        match self.rng.random_range(0..30) {
            0 => header.version = self.u32(),
            1 => header.cluster_id = self.bytes(),
            2 => header.time = self.u64(),
            3 => header.secret = self.bytes(),
            _ => {}
        }
        Some(header)
    }

    fn attributes(&mut self) -> Option<pb::NewAttributes> {
        self.some(|this| pb::NewAttributes {
            mode: this.u32(),
            uid: this.u32(),
            gid: this.u32(),
            mtime: this.some(Self::u64),
        })
    }

    fn policies(&mut self) -> Option<pb::Policies> {
        self.some(|this| pb::Policies {
            snapshot: this.some(|this| pb::SnapshotPolicy {
                keep_ns: this.some(Self::u64),
                keep_versions: this.some(Self::u32),
            }),
            span: this.some(|this| pb::SpanPolicy {
                rules: this.many(|this| pb::SpanRule {
                    max_size: this.u32(),
                    data: this.u32(),
                    parity: this.u32(),
                }),
            }),
            block: this.some(|this| pb::BlockPolicy {
                rules: this.many(|this| pb::BlockRule { max_size: this.u32(), storage_class: this.u32() }),
            }),
            stripe: this.some(|this| pb::StripePolicy { cell_size: this.u32() }),
        })
    }

    fn span(&mut self) -> Option<pb::NewSpan> {
        self.some(|this| pb::NewSpan {
            offset: this.u64(),
            size: this.u32(),
            crc: this.u32(),
            body: this.some(|this| match this.rng.random_range(0..3) {
                0 => new_span::Body::Zeros(pb::Done {}),
                1 => new_span::Body::Inline(this.bytes()),
                _ => new_span::Body::Blocks(pb::NewBlocks {
                    storage_class: this.rng.random_range(0..5),
                    data: this.rng.random_range(0..6),
                    parity: this.rng.random_range(0..6),
                    stripes: this.u32(),
                    cell_size: this.u32(),
                    blocks: this
                        .many(|this| pb::NewBlock { crc: this.u32(), cell_crcs: this.many(Self::u32) }),
                    avoid: this.many(Self::u64),
                }),
            }),
        })
    }

    fn certify(&mut self) -> Option<pb::CertifySpan> {
        self.some(|this| pb::CertifySpan { offset: this.u64(), proofs: this.many(Self::bytes) })
    }

    fn write_op(&mut self) -> pb::WriteOp {
        let replace = self.rng.random_range(-1..3);
        let (directory, file, cookie, name) = (self.inode(), self.inode(), self.u64(), self.name());
        let (transaction, owner) = (self.u64(), self.inode());
        let op = match self.rng.random_range(0..36) {
            0 => WriteOp::StartEden(pb::StartEden {
                directory,
                attributes: self.attributes(),
                note: "hostile".repeat(self.rng.random_range(0..300)),
                span: self.span(),
            }),
            1 => WriteOp::ExtendEden(pb::ExtendEden {
                file,
                cookie,
                certify: self.certify(),
                span: self.span(),
            }),
            2 => WriteOp::ReplaceBlocks(pb::ReplaceBlocks {
                file,
                cookie,
                indexes: self.many(Self::u32),
                avoid: self.many(Self::u64),
            }),
            3 => WriteOp::LinkEden(pb::LinkEden {
                file,
                cookie,
                certify: self.certify(),
                directory,
                name,
                replace,
                size: self.u64(),
                crc: self.u32(),
            }),
            4 => WriteOp::AbandonEden(pb::AbandonEden { file, cookie }),
            5 => WriteOp::PutSmall(pb::PutSmall {
                directory,
                name,
                bytes: self.bytes(),
                symlink: self.rng.random(),
                attributes: self.attributes(),
                replace,
            }),
            6 => WriteOp::Rename(pb::Rename { directory, old_name: name, new_name: self.name(), replace }),
            7 => WriteOp::Unlink(pb::Unlink { directory, name, expected: self.u64() }),
            8 => WriteOp::SetAttributes(pb::SetAttributes {
                inode: file,
                mode: self.some(Self::u32),
                uid: self.some(Self::u32),
                gid: self.some(Self::u32),
                mtime: self.some(Self::u64),
                atime: self.some(Self::u64),
                set_xattrs: self
                    .many(|this| pb::ExtendedAttribute { name: this.name(), value: this.bytes() }),
                remove_xattrs: self.many(Self::name),
            }),
            9 => WriteOp::SetPolicy(pb::SetPolicy {
                directory: file,
                kind: self.rng.random_range(-1..6),
                value: self.policies(),
            }),
            10 => WriteOp::ExpireEden(pb::ExpireEden { limit: self.u32() }),
            11 => WriteOp::CreateDirectory(pb::CreateDirectory {
                transaction,
                owner,
                attributes: self.attributes(),
            }),
            12 => WriteOp::DiscardDirectory(pb::DiscardDirectory { transaction, directory }),
            13 => WriteOp::LockDirectory(pb::LockDirectory {
                transaction,
                directory,
                owner,
                removed: self.u64().is_multiple_of(2),
            }),
            14 => WriteOp::UnlockDirectory(pb::UnlockDirectory { transaction, directory }),
            15 => WriteOp::LockEdge(pb::LockEdge { transaction, directory, name, target: file }),
            16 => WriteOp::UnlockEdge(pb::UnlockEdge { transaction, directory, name }),
            17 => WriteOp::LinkEdge(pb::LinkEdge { transaction, directory, name, target: file, replace }),
            18 => WriteOp::UnlinkEdge(pb::UnlinkEdge {
                transaction,
                directory,
                name,
                target: file,
                owned: true,
                died_at: self.u64(),
            }),
            19 => WriteOp::SetOwner(pb::SetOwner { transaction, directory, owner }),
            20 => WriteOp::ForgetTransactions(pb::ForgetTransactions {
                transactions: self.many(Self::u64),
                floor: self.u64(),
            }),
            21 => WriteOp::RemoveDirectory(pb::RemoveDirectory { transaction, directory }),
            22 => WriteOp::Exchange(pb::Exchange { directory, name, other_name: self.name() }),
            23 => WriteOp::CreateDirectories(pb::CreateDirectories {
                transaction,
                owner,
                names: self.many(Self::name),
                on_the_way: self.attributes(),
                attributes: self.attributes(),
            }),
            24 => WriteOp::DiscardDirectories(pb::DiscardDirectories {
                transaction,
                directory,
                names: self.many(Self::name),
            }),
            25 => WriteOp::ExchangeEdge(pb::ExchangeEdge {
                transaction,
                directory,
                name,
                target: file,
                new_target: owner,
            }),
            26 => WriteOp::SettleEdge(pb::SettleEdge {
                transaction,
                directory,
                name,
                target: file,
                new_target: owner,
                exchanged_at: self.u64(),
            }),
            27 => WriteOp::SetOwners(pb::SetOwners {
                transaction,
                owners: self.many(|this| pb::DirectoryOwner { directory: this.inode(), owner: this.inode() }),
            }),
            28 => {
                let (died_at, target, new_name) = (self.u64(), file, self.name());
                WriteOp::Undelete(pb::Undelete { directory, name, died_at, target, new_name })
            }
            29 => {
                let (died_at, target, owned) = (self.u64(), file, self.u32().is_multiple_of(2));
                WriteOp::Purge(pb::Purge { directory, name, died_at, target, owned })
            }
            30 => WriteOp::ReviveDirectory(pb::ReviveDirectory { transaction, directory, owner }),
            31 => {
                let (died_at, target) = (self.u64(), file);
                WriteOp::LockDeadEdge(pb::LockDeadEdge { transaction, directory, name, died_at, target })
            }
            32 => {
                let (died_at, target) = (self.u64(), file);
                WriteOp::PurgeDeadEdge(pb::PurgeDeadEdge { transaction, directory, name, died_at, target })
            }
            33 => WriteOp::PurgeFile(pb::PurgeFile { transaction, file }),
            34 => WriteOp::PurgeDirectory(pb::PurgeDirectory { transaction, directory }),
            _ => return pb::WriteOp::default(),
        };
        pb::WriteOp { op: Some(op) }
    }

    pub fn shard(&mut self) -> pb::ShardRequest {
        use shard_request::Op;
        let header = self.header();
        let shard = match self.rng.random_range(0..10) {
            0 => 256,
            1 => self.u32(),
            2..5 => self.rng.random_range(0..256),
            _ => 1,
        };
        let op = match self.rng.random_range(0..14) {
            0 => Op::Walk(pb::Walk {
                start: self.inode(),
                components: self.many(Self::name),
                at: self.u64(),
                want_attributes: true,
                want_spans: true,
                moved: self.many(Self::u64),
                not_moved: self.many(Self::u64),
                exchanged: self.many(|this| pb::Exchanged {
                    transaction: this.u64(),
                    target: this.inode(),
                    exchanged_at: this.u64(),
                }),
            }),
            1 => Op::Stat(pb::Stat { inode: self.inode() }),
            2 => Op::GetSpans(pb::GetSpans { file: self.inode(), offset: self.u64(), limit: self.u32() }),
            3 => Op::List(pb::List {
                directory: self.inode(),
                dead: self.rng.random(),
                after_name: self.name(),
                after_died_at: self.u64(),
                limit: self.u32(),
                at: self.u64(),
                since: self.u64(),
                until: self.u64(),
                want_attributes: true,
                prefix: self.name(),
            }),
            4 => Op::ListEden(pb::ListEden { after_file: self.u64(), limit: self.u32() }),
            5 => Op::Check(pb::Check { cursor: self.bytes(), limit_rows: self.u32() }),
            6 => Op::Status(pb::ShardStatus {}),
            _ => Op::Write(pb::Write { ops: self.many(Self::write_op) }),
        };
        pb::ShardRequest { header, shard, op: self.rng.random_bool(0.98).then_some(op) }
    }

    pub fn crossdir(&mut self) -> pb::CrossdirRequest {
        use crossdir_request::Op;
        let header = self.header();
        let op = match self.rng.random_range(0..9) {
            0 => Op::Mkdir(pb::Mkdir {
                parent: self.inode(),
                name: self.name(),
                attributes: self.attributes(),
            }),
            1 => Op::Rmdir(pb::Rmdir { parent: self.inode(), name: self.name(), target: self.inode() }),
            2 => Op::Move(pb::Move {
                old_directory: self.inode(),
                old_name: self.name(),
                target: self.inode(),
                new_directory: self.inode(),
                new_name: self.name(),
                replace: self.rng.random_range(-1..3),
            }),
            3 => Op::MkdirPath(pb::MkdirPath {
                parent: self.inode(),
                names: self.many(Self::name),
                on_the_way: self.attributes(),
                attributes: self.attributes(),
            }),
            4 => Op::ResolveMove(pb::ResolveMove { transaction: self.rng.random() }),
            5 => Op::Exchange(pb::ExchangeAcross {
                directory: self.inode(),
                name: self.name(),
                target: self.inode(),
                other_directory: self.inode(),
                other_name: self.name(),
                other_target: self.inode(),
            }),
            6 => Op::UndeleteInode(pb::UndeleteInode {
                directory: self.inode(),
                name: self.name(),
                died_at: self.u64(),
                target: self.inode(),
                new_directory: self.inode(),
                new_name: self.name(),
            }),
            7 => Op::PurgeInode(pb::PurgeInode {
                directory: self.inode(),
                name: self.name(),
                died_at: self.u64(),
                target: self.inode(),
            }),
            _ => Op::ListTransactions(pb::ListTransactions {}),
        };
        pb::CrossdirRequest { header, op: self.rng.random_bool(0.98).then_some(op) }
    }

    pub fn registry(&mut self) -> pb::RegistryRequest {
        use registry_request::Op;
        let header = self.header();
        let address = "hostile:1".to_owned();
        let op = match self.rng.random_range(0..8) {
            0 => Op::Hello(pb::Hello {}),
            1 => Op::Map(pb::ClusterMap { with_keys: self.rng.random(), known_version: self.rng.random() }),
            2 => Op::ReportBlocks(pb::ReportBlocks {
                blocks: self.many(|this| pb::BadBlock {
                    block_service: this.u64(),
                    block: this.u64(),
                    file: this.u64(),
                    kind: this.rng.random_range(-1..4),
                }),
            }),
            3 => Op::SetFlags(pb::SetFlags {
                block_services: self.many(Self::u64),
                set: self.u32(),
                clear: self.u32(),
            }),
            4 => Op::RegisterStore(pb::RegisterStore {
                id: self.u64(),
                kind: self.rng.random_range(-1..5),
                host: "h".repeat(self.rng.random_range(0..200)),
                address,
                clock_offset: self.rng.random(),
                problem: "p".repeat(self.rng.random_range(0..200)),
                led: self.many(|this| pb::LedGroup {
                    group: this.u32(),
                    term: this.u64(),
                    applied_index: this.u64(),
                    log_bytes: this.u64(),
                    voters: this.many(Self::u64),
                    learners: this.many(Self::u64),
                    conf_index: this.u64(),
                    progress: Vec::new(),
                }),
                transactions: self.u32(),
                boot: self.u64(),
                slow_transactions: self.many(|this| pb::TransactionInfo {
                    transaction: this.u64(),
                    kind: "k".repeat(this.rng.random_range(0..1000)),
                    started_at: this.u64(),
                    step: "s".repeat(this.rng.random_range(0..1000)),
                    finished: this.rng.random(),
                }),
            }),
            5 => Op::SetReplicas(pb::SetReplicas {
                group: self.u32(),
                wanted: self.many(Self::u64),
                preferred: self.u64(),
                force: self.rng.random(),
            }),
            6 => Op::DrainHost(pb::DrainHost {
                host: "h".repeat(self.rng.random_range(0..200)),
                undo: self.rng.random(),
            }),
            _ => Op::RegisterBlockServices(pb::RegisterBlockServices {
                address,
                failure_domain: "h".repeat(self.rng.random_range(0..200)),
                block_services: self.many(|this| pb::BlockServiceReport {
                    id: this.u64(),
                    key: this.bytes(),
                    storage_class: this.u32(),
                    capacity_bytes: this.u64(),
                    available_bytes: this.u64(),
                    used_bytes: this.u64(),
                    ..pb::BlockServiceReport::default()
                }),
                ..Default::default()
            }),
        };
        pb::RegistryRequest { header, op: self.rng.random_bool(0.98).then_some(op) }
    }

    /// A stream from somebody who says to be a store, its magic included: frames, most of them whole.
    pub fn peer(&mut self) -> Vec<u8> {
        use pb::peer_message::Body;
        let mut stream = b"eggspeer".to_vec();
        let greeting = self.some(|this| pb::PeerGreeting {
            version: if this.rng.random_bool(0.8) { PROTOCOL_VERSION } else { this.u32() },
            cluster_id: this.cluster.clone().into(),
            secret: this.bytes(),
            from_store: this.u64(),
            to_store: this.u64(),
        });
        let message = |this: &mut Self| {
            let body = match this.rng.random_range(0..4) {
                0 => Body::Raft(this.bytes()),
                1 => Body::Sleep(pb::PeerSleep { term: this.u64(), index: this.u64(), hash: this.bytes() }),
                2 => Body::Want(pb::SnapshotWant { index: this.u64(), term: this.u64(), offset: this.u64() }),
                _ => Body::Piece(pb::SnapshotPiece {
                    index: this.u64(),
                    term: this.u64(),
                    offset: this.u64(),
                    total: this.u64(),
                    bytes: this.bytes(),
                    crc: this.u32(),
                }),
            };
            pb::PeerMessage { group: this.u32(), body: Some(body) }
        };
        stream.extend(greeting.iter().flat_map(|greeting| self.frame(greeting.encode_to_vec())));
        for _ in 0..self.rng.random_range(0..3) {
            let heartbeat = self.some(|this| pb::PeerHeartbeat {
                boot: this.u64(),
                sent_at: this.u64(),
                wall: this.u64(),
                echo_sent_at: this.u64(),
                echo_age: this.u64(),
                leaving: this.rng.random(),
            });
            let messages = self.many(message);
            let batch = pb::PeerBatch { heartbeat, messages };
            stream.extend(self.frame(batch.encode_to_vec()));
        }
        if self.rng.random_bool(0.2) {
            stream.truncate(self.rng.random_range(0..=stream.len()));
        }
        stream
    }

    fn frame(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        let length = if self.rng.random_bool(0.9) { bytes.len() as u32 } else { self.u32() };
        let crc = if self.rng.random_bool(0.9) { crc32fast::hash(&bytes) } else { self.u32() };
        [&length.to_le_bytes()[..], &crc.to_le_bytes(), &bytes].concat()
    }

    /// The parts of a write of a block; `services` exist.
    pub fn block_write(&mut self, services: &[u64]) -> Vec<pb::WriteBlockRequest> {
        use pb::write_block_request::Part;
        let start = Part::Start(pb::WriteStart {
            header: self.header(),
            block_service: self.service(services),
            block: self.u64(),
            size: self.u32(),
            crc: self.u32(),
            certificate: self.bytes(),
        });
        let mut parts = vec![start];
        for _ in 0..self.rng.random_range(0..4) {
            parts.push(Part::Data(self.bytes()));
        }
        if self.rng.random_bool(0.2) {
            parts.reverse();
        }
        parts.into_iter().map(|part| pb::WriteBlockRequest { part: Some(part) }).collect()
    }

    pub fn block_fetch(&mut self, services: &[u64]) -> pb::FetchBlockRequest {
        pb::FetchBlockRequest {
            header: self.header(),
            block_service: self.service(services),
            block: self.u64(),
            offset: self.u32(),
            length: self.u32(),
        }
    }

    pub fn block_erase(&mut self, services: &[u64]) -> pb::EraseBlocksRequest {
        let block = pb::EraseBlock {
            block_service: self.service(services),
            block: self.u64(),
            certificate: self.bytes(),
        };
        pb::EraseBlocksRequest { header: self.header(), blocks: vec![block] }
    }

    fn service(&mut self, services: &[u64]) -> u64 {
        if services.is_empty() || self.rng.random_bool(0.2) {
            return self.u64();
        }
        services[self.rng.random_range(0..services.len())]
    }
}
