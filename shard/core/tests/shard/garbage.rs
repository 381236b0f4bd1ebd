//! What nobody needs any more: listed until it is erased, then forgotten; what lives is never listed.

use std::collections::BTreeSet;

use eggs_proto::pb::write_op::Op;
use eggs_proto::{BlockId, BlockServiceId, ShardError, flags, mac, pb};

use crate::support::*;

/// As the block services would answer an erasure.
fn erase(garbage: &[pb::GarbageBlock]) -> Vec<pb::ErasedBlock> {
    let erased = |block: &pb::GarbageBlock| {
        let (service, id) = (BlockServiceId(block.block_service), BlockId(block.block));
        let key = key_of(service.0);
        let proof = if service.0 == 0 {
            Vec::new()
        } else {
            assert_eq!(block.certificate, mac::erase_certificate(&key, service, id).to_vec());
            mac::erase_proof(&key, service, id).to_vec()
        };
        pb::ErasedBlock { file: block.file, block_service: service.0, block: id.0, proof: proof.into() }
    };
    garbage.iter().map(erased).collect()
}

fn forget(blocks: Vec<pb::ErasedBlock>) -> Op {
    Op::ForgetGarbage(pb::ForgetGarbage { blocks })
}

/// A file in writing of two spans in blocks and one pending, abandoned; 6 blocks each.
fn abandoned(shard: &mut Shard) -> u64 {
    let mut eden = eden(shard.ok(start(ROOT, Some(blocks_span(0, 1000, 1, 4, 2)))));
    let (file, cookie) = (eden.file, eden.cookie);
    for offset in [0, 1000] {
        eden = crate::support::eden(shard.ok(Op::ExtendEden(pb::ExtendEden {
            file,
            cookie,
            certify: Some(pb::CertifySpan { offset, proofs: Shard::proofs(&eden.blocks) }),
            span: Some(blocks_span(offset + 1000, 1000, 1, 4, 2)),
        })));
    }
    shard.ok(Op::ReplaceBlocks(pb::ReplaceBlocks { file, cookie, indexes: vec![3], avoid: vec![] }));
    assert!(shard.garbage().iter().all(|block| block.file != file), "it has a writer");
    shard.ok(Op::AbandonEden(pb::AbandonEden { file, cookie }));
    file
}

#[test]
fn what_a_writer_left_is_erased_in_parts() {
    let mut shard = Shard::default();
    let file = abandoned(&mut shard);
    let all = shard.garbage();
    assert_eq!(all.len(), 19);
    assert!(all.iter().all(|block| block.file == file));
    // One block of each span, of the pending one and the replaced one; then all the others.
    for part in [vec![0, 1, 7, 13], (0..19).collect()] {
        let part: Vec<_> = part.into_iter().map(|index| all[index].clone()).collect();
        shard.ok(forget(erase(&part)));
        shard.verify();
        let left: BTreeSet<u64> = shard.garbage().iter().map(|block| block.block).collect();
        assert!(part.iter().all(|block| !left.contains(&block.block)));
        if part.len() == 4 {
            assert_eq!(left.len(), 15, "the others stay");
        }
    }
    assert_eq!(shard.garbage(), []);
    // Nothing of the file is left in any table.
    assert!(!shard.rows().iter().any(|(key, _)| key.windows(8).any(|id| id == file.to_be_bytes())));
    // Repeated, it finds nothing to do.
    shard.ok(forget(erase(&all)));
}

#[test]
fn only_proven_erasures_are_forgotten() {
    let mut shard = Shard::default();
    abandoned(&mut shard);
    let all = erase(&shard.garbage());
    let mut forged = all[..5].to_vec();
    forged[0].proof = Vec::new().into();
    forged[1].proof = vec![0; 16].into();
    forged[2].proof = all[3].proof.clone();
    forged[3].block_service += 1;
    let (service, block) = (BlockServiceId(forged[4].block_service), BlockId(forged[4].block));
    let certificate = mac::erase_certificate(&key_of(service.0), service, block);
    forged[4].proof = certificate.to_vec().into();
    assert_eq!(shard.refused(forget(forged.clone())), ShardError::BadProof);
    // One good one among them is taken.
    forged.push(all[5].clone());
    shard.ok(forget(forged.clone()));
    assert_eq!(shard.garbage().len(), 18);
    assert!(shard.prepare(vec![forget(all.clone())], false).is_err(), "without the secret");
    // As soon as a leader knows of no block service, it does not know which are gone.
    shard.cluster = cluster(0);
    forged[0].block_service = 99;
    assert_eq!(shard.refused(forget(forged)), ShardError::Busy);
    shard.verify();
}

#[test]
fn what_was_on_disks_that_are_gone_is_forgotten() {
    let mut shard = Shard::default();
    abandoned(&mut shard);
    shard.cluster = cluster_with(7, |info| {
        info.flags = match info.id {
            1 => flags::LOST,
            2 => flags::DECOMMISSIONED,
            3 => flags::STALE,
            4 => flags::NO_WRITE | flags::NO_READ,
            _ => 0,
        }
    });
    let all = shard.garbage();
    assert!(all.iter().all(|block| block.certificate.is_empty() == (block.block_service == 8)));
    let unproven = all
        .iter()
        .map(|block| pb::ErasedBlock {
            file: block.file,
            block_service: block.block_service,
            block: block.block,
            ..Default::default()
        })
        .collect();
    shard.ok(forget(unproven));
    let left: Vec<_> = shard.garbage();
    assert!(!left.is_empty());
    assert!(left.iter().all(|block| (3..=7).contains(&block.block_service)));
    let gone = all.iter().filter(|block| [1, 2, 8].contains(&block.block_service)).count();
    assert_eq!(left.len() + gone, all.len());
    shard.verify();
}

#[test]
fn what_lives_is_never_listed_nor_forgotten() {
    let mut shard = Shard::default();
    let file = shard.put_blocks("f", 1000);
    let writing = eden(shard.ok(start(ROOT, Some(blocks_span(0, 1000, 1, 4, 2)))));
    assert_eq!(shard.garbage(), []);
    let before = shard.rows();
    let living = shard.blocks(file).into_iter().map(|block| (file, block.block_service, block.block));
    let written = writing.blocks.iter().map(|block| (writing.file, block.block_service, block.block));
    let proven = living.chain(written).map(|(file, block_service, block)| {
        let key = key_of(block_service);
        let proof = mac::erase_proof(&key, BlockServiceId(block_service), BlockId(block));
        pb::ErasedBlock { file, block_service, block, proof: proof.to_vec().into() }
    });
    shard.ok(forget(proven.collect()));
    assert_eq!(before, shard.rows());
    // Dead is not garbage either: it can come back.
    shard.ok(unlink(ROOT, "f"));
    assert_eq!(shard.garbage(), []);
}

#[test]
fn garbage_comes_in_pages_of_whole_files() {
    let mut shard = Shard::default();
    let files: Vec<u64> = (0..3).map(|_| abandoned(&mut shard)).collect();
    let page = shard.garbage_page(0, 40);
    assert_eq!((page.blocks.len(), page.more), (38, true), "the third does not fit");
    let rest = shard.garbage_page(page.blocks[37].file, 40);
    assert_eq!((rest.blocks.len(), rest.more), (19, false));
    assert_eq!(rest.blocks[0].file, files[2]);
    // One that fits no page is listed in part.
    let mut rounds = 0;
    loop {
        let (mut after, mut any) = (0, false);
        loop {
            let page = shard.garbage_page(after, 4);
            let Some(last) = page.blocks.last() else { break };
            assert!(page.blocks.len() <= 4 && page.blocks.iter().all(|block| block.file == last.file));
            any = true;
            after = last.file;
            shard.ok(forget(erase(&page.blocks)));
            if !page.more {
                break;
            }
        }
        if !any {
            break;
        }
        rounds += 1;
    }
    assert_eq!(rounds, 5, "19 blocks by 4");
    shard.verify();
}

#[test]
fn what_has_no_blocks_goes_as_well() {
    let mut shard = Shard::default();
    let file = eden(shard.ok(start(ROOT, Some(zeros_span(0, 10)))));
    let (id, cookie) = (file.file, file.cookie);
    let mut offset = 10;
    for _ in 0..5000 {
        shard.ok(Op::ExtendEden(pb::ExtendEden {
            file: id,
            cookie,
            certify: None,
            span: Some(zeros_span(offset, 1)),
        }));
        offset += 1;
    }
    let span = Some(blocks_span(offset, 1000, 1, 4, 2));
    let placed = eden(shard.ok(Op::ExtendEden(pb::ExtendEden { file: id, cookie, certify: None, span })));
    let certify = Some(pb::CertifySpan { offset, proofs: Shard::proofs(&placed.blocks) });
    shard.ok(Op::ExtendEden(pb::ExtendEden { file: id, cookie, certify, span: None }));
    shard.ok(Op::AbandonEden(pb::AbandonEden { file: id, cookie }));
    let nothing = shard.garbage();
    assert_eq!(nothing.len(), 1);
    assert_eq!((nothing[0].block_service, nothing[0].block, nothing[0].certificate.len()), (0, 0, 0));
    shard.ok(forget(erase(&nothing)));
    shard.verify();
    let blocks = shard.garbage();
    assert_eq!(blocks.len(), 6, "now the spans after those without blocks are seen");
    shard.ok(forget(erase(&blocks)));
    assert_eq!(shard.garbage(), []);
    shard.verify();
}
