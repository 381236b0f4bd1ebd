//! Files in writing: spans, proofs, replaced blocks, deadlines, publishing.

use eggs_proto::pb::shard_reply::Result as Reply;
use eggs_proto::pb::shard_request::Op as Read;
use eggs_proto::pb::write_op::Op;
use eggs_proto::{ShardError, Time, limits, pb};

use crate::support::*;

fn extend(eden: &pb::EdenReply, certify: Option<pb::CertifySpan>, span: Option<pb::NewSpan>) -> Op {
    Op::ExtendEden(pb::ExtendEden { file: eden.file, cookie: eden.cookie, certify, span })
}

fn publish(eden: &pb::EdenReply, certify: Option<pb::CertifySpan>, size: u64, crc: u32) -> Op {
    Op::LinkEden(pb::LinkEden {
        file: eden.file,
        cookie: eden.cookie,
        certify,
        directory: ROOT,
        name: "f".into(),
        replace: pb::Replace::File as i32,
        size,
        crc,
    })
}

fn certify(offset: u64, placed: &[pb::PlacedBlock]) -> Option<pb::CertifySpan> {
    Some(pb::CertifySpan { offset, proofs: Shard::proofs(placed) })
}

fn spans(shard: &Shard, file: u64, offset: u64) -> Vec<pb::Span> {
    match shard.read(Read::GetSpans(pb::GetSpans { file, offset, limit: 0 })) {
        Reply::GetSpans(reply) => reply.spans,
        other => panic!("{other:?}"),
    }
}

fn eden_files(shard: &Shard) -> Vec<pb::EdenFile> {
    match shard.read(Read::ListEden(pb::ListEden::default())) {
        Reply::ListEden(reply) => reply.files,
        other => panic!("{other:?}"),
    }
}

#[test]
fn one_span_takes_two_requests() {
    let mut shard = Shard::default();
    let crc = 0x1234;
    let (time, reply) = shard.one(start(ROOT, Some(blocks_span(0, 100_000, crc, 4, 2))));
    let eden = eden(reply.unwrap());
    assert_eq!(eden.deadline, time.saturating_add(limits::EDEN_DEADLINE).0);
    assert_eq!(eden.blocks.len(), 6);
    assert!(eden.blocks.iter().zip(0..).all(|(block, index)| block.index == index && block.size == 25_000));
    assert_eq!(shard.stat(eden.file), None, "a file in writing cannot be seen");
    assert_eq!(eden_files(&shard)[0].note, "/a/note");
    shard.verify();
    let (time, reply) = shard.one(publish(&eden, certify(0, &eden.blocks), 100_000, crc));
    assert_eq!(link(reply.unwrap()).inode, eden.file);
    let attributes = shard.stat(eden.file).unwrap();
    assert_eq!((attributes.size, attributes.crc, attributes.mtime), (100_000, Some(crc), time.0));
    assert_eq!(attributes.mode, 0o600);
    assert!(eden_files(&shard).is_empty());
    let stored = spans(&shard, eden.file, 99_999);
    let blocks = stored[0].blocks.as_ref().unwrap();
    assert_eq!((blocks.data, blocks.parity, blocks.blocks.len()), (4, 2, 6));
    assert!(spans(&shard, eden.file, 100_000).is_empty());
    shard.verify();
}

#[test]
fn a_file_of_spans_of_every_kind() {
    let mut shard = Shard::default();
    let (hello, world) = (b"hello, ", b"world");
    let whole = [&hello[..], &world[..], &[0; 10]].concat();
    let file = eden(shard.ok(start(ROOT, Some(inline_span(0, hello)))));
    let second = eden(shard.ok(extend(&file, None, Some(blocks_span(7, 5, crc(world), 1, 2)))));
    assert_eq!(shard.refused(extend(&file, None, Some(zeros_span(12, 10)))), ShardError::BadSpan);
    let certified = certify(7, &second.blocks);
    shard.ok(extend(&file, certified, Some(zeros_span(12, 10))));
    // Certifying a span without blocks says nothing new.
    let nothing = Some(pb::CertifySpan { offset: 12, proofs: vec![] });
    shard.ok(publish(&file, nothing, whole.len() as u64, crc(&whole)));
    let stored = spans(&shard, file.file, 0);
    assert_eq!(
        stored.iter().map(|s| (s.offset, s.size, s.storage_class)).collect::<Vec<_>>(),
        [(0, 7, 1), (7, 5, 3), (12, 10, 0)]
    );
    assert_eq!(spans(&shard, file.file, 6).len(), 3);
    assert_eq!(spans(&shard, file.file, 7).len(), 2);
    assert_eq!(spans(&shard, file.file, 12).len(), 1);
    shard.verify();
}

#[test]
fn a_span_needs_the_proofs_of_its_blocks() {
    let mut shard = Shard::default();
    let file = eden(shard.ok(start(ROOT, Some(blocks_span(0, 1000, 1, 4, 2)))));
    let good = certify(0, &file.blocks).unwrap();
    let mut cases = vec![good.clone(), good.clone(), good.clone()];
    cases[0].proofs.pop();
    cases[1].proofs.swap(0, 1);
    cases[2].proofs[3] = vec![0; 16].into();
    for case in cases {
        assert_eq!(shard.refused(publish(&file, Some(case), 1000, 1)), ShardError::BadProof);
    }
    assert_eq!(shard.refused(publish(&file, None, 1000, 1)), ShardError::BadSpan);
    let elsewhere = pb::CertifySpan { offset: 1, ..good.clone() };
    assert_eq!(shard.refused(publish(&file, Some(elsewhere), 1000, 1)), ShardError::BadSpan);
    assert_eq!(shard.refused(publish(&file, Some(good.clone()), 1000, 2)), ShardError::BadSpan);
    assert_eq!(shard.refused(publish(&file, Some(good.clone()), 999, 1)), ShardError::BadSpan);
    let stranger = pb::EdenReply { cookie: file.cookie + 1, ..file.clone() };
    assert_eq!(shard.refused(publish(&stranger, Some(good.clone()), 1000, 1)), ShardError::NotWriter);
    let nobody = pb::EdenReply { cookie: 0, ..file.clone() };
    assert_eq!(shard.refused(publish(&nobody, Some(good.clone()), 1000, 1)), ShardError::NotWriter);
    shard.ok(publish(&file, Some(good), 1000, 1));
    assert_eq!(shard.refused(extend(&file, None, None)), ShardError::NotWriter);
    shard.verify();
}

/// SH-14: proofs were verified, and before the command is applied a block is replaced.
#[test]
fn proofs_of_blocks_replaced_meanwhile_are_refused() {
    let mut shard = Shard::default();
    let file = eden(shard.ok(start(ROOT, Some(blocks_span(0, 1000, 1, 4, 2)))));
    let command = shard.prepare(vec![publish(&file, certify(0, &file.blocks), 1000, 1)], true).unwrap();
    let replace = Op::ReplaceBlocks(pb::ReplaceBlocks {
        file: file.file,
        cookie: file.cookie,
        indexes: vec![2],
        avoid: vec![],
    });
    shard.ok(replace);
    let results = shard.apply(&command);
    assert_eq!(answer(&results[0]), Err(ShardError::BadProof));
    shard.verify();
}

#[test]
fn blocks_are_replaced_in_mid_write() {
    let mut shard = Shard::default();
    let file = eden(shard.ok(start(ROOT, Some(blocks_span(0, 1000, 1, 4, 2)))));
    let replace = |indexes: &[u32], avoid: &[u64]| {
        Op::ReplaceBlocks(pb::ReplaceBlocks {
            file: file.file,
            cookie: file.cookie,
            indexes: indexes.to_vec(),
            avoid: avoid.to_vec(),
        })
    };
    let replaced = eden(shard.ok(replace(&[5, 2], &[]))).blocks;
    assert_eq!(replaced.iter().map(|block| block.index).collect::<Vec<_>>(), [5, 2]);
    let used: Vec<u64> = file.blocks.iter().map(|block| block.block_service).collect();
    assert!(replaced.iter().all(|block| !used.contains(&block.block_service)));
    for bad in [&[][..], &[6], &[1, 1]] {
        assert_eq!(shard.refused(replace(bad, &[])), ShardError::Malformed);
    }
    let all: Vec<u64> = (1..=8).collect();
    assert_eq!(shard.refused(replace(&[0], &all)), ShardError::NoBlockServices);
    let mut placed = file.blocks.clone();
    for block in replaced {
        let index = block.index as usize;
        placed[index] = block;
    }
    shard.ok(publish(&file, certify(0, &placed), 1000, 1));
    // The two blocks given up are still known, to be erased one day.
    let left = eden_files(&shard);
    assert_eq!(left.len(), 1);
    assert!(left[0].expired);
    shard.verify();
}

/// Two replacements chosen on one state: the second may not put two blocks on one service.
#[test]
fn replacements_that_cross_each_other_stay_apart() {
    let mut shard = Shard::default();
    let file = eden(shard.ok(start(ROOT, Some(blocks_span(0, 1000, 1, 4, 2)))));
    let unused: Vec<u64> =
        (1..=8).filter(|id| file.blocks.iter().all(|block| block.block_service != *id)).collect();
    let replace = |index| {
        let replace =
            pb::ReplaceBlocks { file: file.file, cookie: file.cookie, indexes: vec![index], avoid: vec![] };
        let op = Some(pb::WriteOp { op: Some(Op::ReplaceBlocks(replace)) });
        pb::ChosenOp { op, block_services: vec![unused[0]], ..Default::default() }
    };
    let results = shard.apply(&pb::ShardCommand { ops: vec![replace(0), replace(1), replace(0)] });
    assert!(answer(&results[0]).is_ok());
    assert_eq!(answer(&results[1]), Err(ShardError::Changed));
    assert!(answer(&results[2]).is_ok());
    shard.verify();
}

#[test]
fn expiry_goes_round_and_keeps_to_its_limit() {
    let mut shard = Shard::default();
    for _ in 0..5 {
        shard.ok(start(ROOT, Some(inline_span(0, b"x"))));
    }
    shard.now += 2 * limits::EDEN_DEADLINE.as_nanos() as u64;
    let mut left = Vec::new();
    for limit in [2, 2, 1] {
        shard.ok(Op::ExpireEden(pb::ExpireEden { limit }));
        left.push(eden_files(&shard).iter().filter(|file| !file.expired).count());
    }
    assert_eq!(left, [3, 1, 0]);
    shard.verify();
}

#[test]
fn there_must_be_enough_block_services() {
    let mut shard = Shard::default();
    assert_eq!(shard.refused(start(ROOT, Some(blocks_span(0, 1000, 1, 7, 2)))), ShardError::NoBlockServices);
    let mut span = blocks_span(0, 1000, 1, 4, 2);
    let Some(pb::new_span::Body::Blocks(blocks)) = &mut span.body else { panic!() };
    blocks.avoid = vec![1, 2];
    let placed = eden(shard.ok(start(ROOT, Some(span.clone())))).blocks;
    assert!(placed.iter().all(|block| block.block_service > 2));
    let Some(pb::new_span::Body::Blocks(blocks)) = &mut span.body else { panic!() };
    blocks.avoid.push(3);
    assert_eq!(shard.refused(start(ROOT, Some(span.clone()))), ShardError::NoBlockServices);
    let Some(pb::new_span::Body::Blocks(blocks)) = &mut span.body else { panic!() };
    blocks.avoid.clear();
    blocks.storage_class = 2;
    assert_eq!(shard.refused(start(ROOT, Some(span))), ShardError::NoBlockServices);
}

#[test]
fn spans_that_cannot_be() {
    let mut shard = Shard::default();
    let file = eden(shard.ok(start(ROOT, None)));
    let inline = |size, crc, bytes: &[u8]| pb::NewSpan {
        offset: 0,
        size,
        crc,
        body: Some(pb::new_span::Body::Inline(bytes.to_vec().into())),
    };
    let blocks = |change: &dyn Fn(&mut pb::NewBlocks)| {
        let mut span = blocks_span(0, 1000, 1, 4, 2);
        let Some(pb::new_span::Body::Blocks(blocks)) = &mut span.body else { panic!() };
        change(blocks);
        span
    };
    let large = vec![0; limits::INLINE_BYTES_MAX as usize + 1];
    let bad = [
        inline(1, crc(b"ab"), b"ab"),
        inline(2, 0, b"ab"),
        inline(0, 0, b""),
        inline(large.len() as u32, crc(&large), &large),
        zeros_span(1, 5),
        pb::NewSpan { crc: 7, ..zeros_span(0, 5) },
        pb::NewSpan { size: limits::SPAN_BYTES_MAX + 1, ..zeros_span(0, 5) },
        blocks(&|b| b.storage_class = 1),
        blocks(&|b| b.storage_class = 256),
        blocks(&|b| b.data = 0),
        blocks(&|b| b.data = u32::MAX),
        blocks(&|b| b.parity = u32::MAX),
        blocks(&|b| b.stripes = 2),
        blocks(&|b| b.cell_size = u32::MAX),
        blocks(&|b| b.blocks.truncate(5)),
        blocks(&|b| b.blocks[3].cell_crcs.clear()),
        pb::NewSpan { size: 2001, ..blocks_span(0, 2000, 1, 1, 1) },
        blocks(&|b| (b.data, b.parity) = (1, 5)),
    ];
    for (index, span) in bad.into_iter().enumerate() {
        let what = format!("case {index}");
        let error = shard.refused(extend(&file, None, Some(span.clone())));
        assert_eq!(error, ShardError::BadSpan, "{what}");
        let error = shard.refused(start(ROOT, Some(span)));
        assert_eq!(error, ShardError::BadSpan, "{what}");
    }
    assert_eq!(
        shard.refused(extend(&file, None, Some(pb::NewSpan { body: None, ..zeros_span(0, 5) }))),
        ShardError::Malformed
    );
    assert_eq!(
        shard.refused(extend(&file, None, Some(pb::NewSpan { offset: u64::MAX, ..zeros_span(0, 5) }))),
        ShardError::TooLarge
    );
    // An empty file may be written the long way, too.
    shard.ok(publish(&file, None, 0, 0));
    shard.verify();
}

#[test]
fn deadlines_pass_unless_pushed_out() {
    let mut shard = Shard::default();
    let hour = limits::EDEN_DEADLINE.as_nanos() as u64;
    let kept = eden(shard.ok(start(ROOT, Some(inline_span(0, b"k")))));
    let late = eden(shard.ok(start(ROOT, Some(inline_span(0, b"l")))));
    let empty = eden(shard.ok(start(ROOT, None)));
    shard.now += hour / 2;
    shard.ok(extend(&kept, None, None));
    shard.now += hour / 2;
    assert_eq!(shard.refused(publish(&late, None, 1, crc(b"l"))), ShardError::Expired);
    assert!(eggs_shard_core::expirable(&shard.table, Time(shard.now)).unwrap());
    for _ in 0..3 {
        shard.ok(Op::ExpireEden(pb::ExpireEden { limit: 1 }));
    }
    assert!(!eggs_shard_core::expirable(&shard.table, Time(shard.now)).unwrap());
    let files: Vec<_> = eden_files(&shard).iter().map(|f| (f.file, f.expired)).collect();
    assert_eq!(files, [(kept.file, false), (late.file, true)]);
    assert_eq!(shard.refused(extend(&late, None, None)), ShardError::Expired);
    assert_eq!(shard.refused(extend(&empty, None, None)), ShardError::NotWriter);
    shard.ok(publish(&kept, None, 1, crc(b"k")));
    shard.verify();
}

#[test]
fn a_writer_can_give_up() {
    let mut shard = Shard::default();
    let file = eden(shard.ok(start(ROOT, Some(blocks_span(0, 1000, 1, 1, 2)))));
    let abandon = Op::AbandonEden(pb::AbandonEden { file: file.file, cookie: file.cookie });
    let stranger = Op::AbandonEden(pb::AbandonEden { file: file.file, cookie: 1 });
    assert_eq!(shard.refused(stranger), ShardError::NotWriter);
    shard.ok(abandon.clone());
    assert!(eden_files(&shard)[0].expired);
    assert_eq!(shard.refused(abandon), ShardError::Expired);
    shard.verify();
}

#[test]
fn publishing_replaces_what_has_the_name() {
    let mut shard = Shard::default();
    let old = shard.put(ROOT, "f", b"old");
    let file = eden(shard.ok(start(ROOT, Some(inline_span(0, b"new")))));
    let refuse = Op::LinkEden(pb::LinkEden {
        file: file.file,
        cookie: file.cookie,
        directory: ROOT,
        name: "f".into(),
        size: 3,
        crc: crc(b"new"),
        ..Default::default()
    });
    assert_eq!(shard.refused(refuse), ShardError::Exists);
    assert_eq!(link(shard.ok(publish(&file, None, 3, crc(b"new")))).replaced, old);
    let dead = shard.list(pb::List { directory: ROOT, dead: true, ..Default::default() });
    assert_eq!((dead[0].target, dead[0].owned), (old, true));
    shard.verify();
}

#[test]
fn a_batch_publishes_many() {
    let mut shard = Shard::default();
    let starts = (0..3).map(|_| start(ROOT, Some(inline_span(0, b"x")))).collect();
    let files: Vec<_> = shard.batch(starts).iter().map(|result| eden(answer(result).unwrap())).collect();
    let ops = files.iter().map(|file| publish(file, None, 1, crc(b"x"))).collect();
    for (result, file) in shard.batch(ops).iter().zip(&files) {
        assert_eq!(link(answer(result).unwrap()).inode, file.file);
    }
    shard.verify();
}
