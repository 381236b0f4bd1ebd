//! The checker, checked: every kind of damage is found under its invariant's number.

use eggs_machine::Tx;
use eggs_proto::pb::write_op::Op;
use eggs_proto::{BlockServiceId, InodeId, InodeType, ShardId, Time, TransactionId, pb};
use eggs_shard_core::schema::{self, Step};
use prost::Message;

use crate::support::*;

struct Ruin {
    shard: Shard,
    directory: InodeId,
    removed: InodeId,
    file: InodeId,
    blocks: InodeId,
    eden: InodeId,
}

/// A healthy shard with one of everything.
fn healthy() -> Ruin {
    let mut shard = Shard::default();
    let directory = shard.mkdir(1, ROOT, "d");
    let removed = shard.mkdir(2, ROOT, "gone");
    shard.ok(Op::LockDirectory(pb::LockDirectory {
        transaction: 3,
        directory: removed,
        owner: ROOT,
        removed: false,
    }));
    shard.ok(Op::UnlinkEdge(pb::UnlinkEdge {
        transaction: 3,
        directory: ROOT,
        name: "gone".into(),
        target: removed,
        owned: true,
        died_at: 0,
    }));
    shard.ok(Op::RemoveDirectory(pb::RemoveDirectory { transaction: 3, directory: removed }));
    let file = shard.put(directory, "f", b"old");
    shard.put(directory, "f", b"new");
    let written = eden(shard.ok(start(directory, Some(blocks_span(0, 1000, 1, 4, 2)))));
    let certify = pb::CertifySpan { offset: 0, proofs: Shard::proofs(&written.blocks) };
    shard.ok(Op::LinkEden(pb::LinkEden {
        file: written.file,
        cookie: written.cookie,
        certify: Some(certify),
        directory,
        name: "b".into(),
        size: 1000,
        crc: 1,
        ..Default::default()
    }));
    let eden = eden(shard.ok(start(directory, Some(blocks_span(0, 1000, 1, 4, 2)))));
    shard.verify();
    Ruin {
        shard,
        directory: InodeId(directory),
        removed: InodeId(removed),
        file: InodeId(file),
        blocks: InodeId(written.file),
        eden: InodeId(eden.file),
    }
}

impl Ruin {
    fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        let mut tx = Tx::new(&self.shard.table, self.shard.hash);
        tx.put(key, value).unwrap();
        let (batch, _) = tx.finish();
        self.shard.table.apply(batch);
    }

    fn delete(&mut self, key: Vec<u8>) {
        let mut tx = Tx::new(&self.shard.table, self.shard.hash);
        tx.delete(key).unwrap();
        let (batch, _) = tx.finish();
        self.shard.table.apply(batch);
    }

    fn change<R: Message + Default>(&mut self, key: Vec<u8>, change: impl FnOnce(&mut R)) {
        let mut row: R = schema::get(&self.shard.table, &key).unwrap().expect("a row to damage");
        change(&mut row);
        self.put(key, row.encode_to_vec());
    }

    fn first(&self, tag: u8) -> Vec<u8> {
        self.shard.table.iter().find(|(key, _)| key[0] == tag).unwrap().0.to_vec()
    }
}

/// Damage, and the invariant that must be named.
fn expect(invariant: &str, damage: impl FnOnce(&mut Ruin)) {
    let mut ruin = healthy();
    damage(&mut ruin);
    let findings = ruin.shard.findings();
    let named = findings.iter().any(|finding| finding.starts_with(&format!("{invariant}: ")));
    assert!(named, "{invariant} is not among {findings:#?}");
}

#[test]
fn sh_1_rows_that_do_not_decode() {
    expect("SH-1", |ruin| ruin.put(b"Q".to_vec(), vec![]));
    expect("SH-1", |ruin| ruin.put(b"D123".to_vec(), vec![]));
    for tag in [b'D', b'L', b'X', b'F', b'S', b'E', b'B', b'T', b'M'] {
        expect("SH-1", |ruin| {
            let key = ruin.first(tag);
            ruin.put(key, vec![0xff; 5]);
        });
    }
    expect("SH-1", |ruin| {
        let row = pb::EdgeRow { target: ruin.file.0, ..Default::default() };
        ruin.put(schema::living_key(ruin.directory, b"a/b"), row.encode_to_vec());
    });
    expect("SH-1", |ruin| {
        ruin.put(schema::transaction_key(TransactionId(1), Step::SetOwner), vec![]);
    });
    expect("SH-1", |ruin| ruin.put(schema::directory_key(ruin.file), vec![]));
}

#[test]
fn sh_2_edges_without_a_directory() {
    expect("SH-2", |ruin| ruin.delete(schema::directory_key(ruin.directory)));
    expect("SH-2", |ruin| {
        ruin.delete(schema::living_key(ruin.directory, b"f"));
        ruin.delete(schema::living_key(ruin.directory, b"b"));
        ruin.delete(schema::directory_key(ruin.directory));
    });
}

#[test]
fn sh_3_edges_without_a_target() {
    expect("SH-3", |ruin| ruin.delete(schema::file_key(ruin.file)));
    expect("SH-3", |ruin| ruin.delete(schema::file_key(ruin.blocks)));
    expect("SH-3", |ruin| {
        let row = pb::EdgeRow { target: ruin.eden.0, created_at: 1, transaction: 0 };
        ruin.put(schema::living_key(ruin.directory, b"e"), row.encode_to_vec());
    });
    expect("SH-3", |ruin| {
        ruin.put(schema::living_key(ruin.directory, b"e"), pb::EdgeRow::default().encode_to_vec());
    });
}

#[test]
fn sh_4_removed_directories_and_owners() {
    expect("SH-4", |ruin| {
        let row = pb::EdgeRow { target: ruin.file.0, created_at: 1, transaction: 0 };
        ruin.put(schema::living_key(ruin.removed, b"e"), row.encode_to_vec());
    });
    let owner = |id: InodeId| move |row: &mut pb::DirectoryRow| row.owner = id.0;
    expect("SH-4", |ruin| ruin.change(schema::directory_key(InodeId::ROOT), owner(InodeId::NULL)));
    expect("SH-4", |ruin| ruin.change(schema::directory_key(ruin.directory), owner(ruin.directory)));
    expect("SH-4", |ruin| ruin.change(schema::directory_key(ruin.directory), owner(ruin.file)));
}

#[test]
fn sh_5_intervals() {
    let died = |ruin: &Ruin| {
        let list = pb::List { directory: ruin.directory.0, dead: true, ..Default::default() };
        ruin.shard.list(list)[0].died_at
    };
    expect("SH-5", |ruin| {
        let died_at = died(ruin);
        let key = schema::dead_key(ruin.directory, b"f", Time(died_at));
        ruin.change(key, |row: &mut pb::DeadEdgeRow| row.created_at = died_at);
    });
    expect("SH-5", |ruin| {
        let died_at = died(ruin);
        let key = schema::living_key(ruin.directory, b"f");
        ruin.change(key, |row: &mut pb::EdgeRow| row.created_at = died_at - 1);
    });
    expect("SH-5", |ruin| {
        let died_at = died(ruin);
        let row =
            pb::DeadEdgeRow { target: ruin.file.0, created_at: died_at - 1, owned: true, transaction: 0 };
        ruin.put(schema::dead_key(ruin.directory, b"f", Time(died_at + 1)), row.encode_to_vec());
    });
}

#[test]
fn sh_6_published_or_in_writing() {
    expect("SH-6", |ruin| ruin.put(schema::file_key(ruin.eden), pb::FileRow::default().encode_to_vec()));
    expect("SH-6", |ruin| {
        ruin.delete(schema::file_key(ruin.file));
    });
    expect("SH-6", |ruin| {
        ruin.change(schema::eden_key(ruin.eden), |row: &mut pb::EdenRow| row.cookie = 0);
    });
}

#[test]
fn sh_7_contents() {
    let spans = |change: fn(&mut pb::Span)| {
        move |ruin: &mut Ruin| ruin.change(schema::span_key(ruin.blocks, 999), change)
    };
    expect("SH-7", spans(|span| span.size -= 1));
    expect("SH-7", spans(|span| span.offset += 1));
    expect("SH-7", spans(|span| span.crc += 1));
    expect("SH-7", spans(|span| span.storage_class = 1));
    expect("SH-7", spans(|span| span.blocks.as_mut().unwrap().data = 0));
    expect("SH-7", spans(|span| drop(span.blocks.as_mut().unwrap().blocks.pop())));
    expect("SH-7", spans(|span| span.blocks.as_mut().unwrap().blocks[2].cell_crcs.clear()));
    expect("SH-7", |ruin| {
        ruin.change(schema::span_key(ruin.file, 2), |span: &mut pb::Span| span.inline = "bad".into());
    });
    expect("SH-7", |ruin| ruin.delete(schema::span_key(ruin.file, 2)));
    expect("SH-7", |ruin| ruin.change(schema::file_key(ruin.file), |row: &mut pb::FileRow| row.size = 4));
    expect("SH-7", |ruin| ruin.change(schema::file_key(ruin.file), |row: &mut pb::FileRow| row.crc = 4));
    expect("SH-7", |ruin| {
        let pending = |row: &mut pb::EdenRow| row.pending.as_mut().unwrap().offset = 7;
        ruin.change(schema::eden_key(ruin.eden), pending);
    });
}

#[test]
fn sh_8_counts_of_blocks() {
    expect("SH-8", |ruin| ruin.delete(ruin.first(b'B')));
    expect("SH-8", |ruin| ruin.change(ruin.first(b'B'), |row: &mut pb::BlockCountRow| row.blocks += 1));
    expect("SH-8", |ruin| {
        let row = pb::BlockCountRow { blocks: 1 };
        ruin.put(schema::blocks_key(BlockServiceId(1), ruin.file), row.encode_to_vec());
    });
}

#[test]
fn sh_9_counters_and_clock() {
    let meta = |change: fn(&mut pb::ShardMetaRow)| {
        move |ruin: &mut Ruin| ruin.change(schema::META_KEY.to_vec(), change)
    };
    expect("SH-9", meta(|row| row.next_directory = 1));
    expect("SH-9", meta(|row| row.next_file = 1));
    expect("SH-9", meta(|row| row.next_block = 1));
    expect("SH-9", meta(|row| row.next_symlink = 0));
    expect("SH-9", |ruin| ruin.delete(schema::META_KEY.to_vec()));
    expect("SH-9", |ruin| {
        let late = |row: &mut pb::EdgeRow| row.created_at = u64::MAX;
        ruin.change(schema::living_key(ruin.directory, b"f"), late);
    });
    expect("SH-9", |ruin| {
        let id = InodeId::new(InodeType::Directory, ShardId(2), 1);
        let row = pb::DirectoryRow { owner: ROOT, ..Default::default() };
        ruin.put(schema::directory_key(id), row.encode_to_vec());
    });
}

#[test]
fn sh_10_locks() {
    expect("SH-10", |ruin| {
        let lock = |row: &mut pb::EdgeRow| row.transaction = 99;
        ruin.change(schema::living_key(ruin.directory, b"f"), lock);
    });
}
