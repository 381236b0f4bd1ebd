//! Blocks and contents of published files are replaced: what a repair, a rebalance or a restripe does to a shard.

use eggs_proto::pb::shard_reply::Result as Reply;
use eggs_proto::pb::shard_request::Op as Read;
use eggs_proto::pb::write_op::Op;
use eggs_proto::{ShardError, Time, flags, limits, pb};

use crate::support::*;

fn place(shard: &Shard, file: u64, indexes: &[u32]) -> pb::PlaceReplacements {
    let blocks = shard.blocks(file);
    pb::PlaceReplacements {
        file,
        offset: 0,
        indexes: indexes.to_vec(),
        blocks: indexes.iter().map(|&index| blocks[index as usize].block).collect(),
        avoid: Vec::new(),
        only: Vec::new(),
    }
}

fn swap(eden: &pb::EdenReply) -> Op {
    Op::SwapBlocks(pb::SwapBlocks {
        eden: eden.file,
        cookie: eden.cookie,
        proofs: Shard::proofs(&eden.blocks),
    })
}

fn swap_contents(file: u64, eden: &pb::EdenReply, certify: Option<pb::CertifySpan>) -> Op {
    Op::SwapContents(pb::SwapContents { file, eden: eden.file, cookie: eden.cookie, certify })
}

fn services(blocks: &[pb::Block]) -> Vec<u64> {
    blocks.iter().map(|block| block.block_service).collect()
}

/// Files with blocks on a service: (file, blocks, published).
fn on_service(shard: &Shard, block_service: u64) -> Vec<(u64, u32, bool)> {
    let list = pb::ListServiceFiles { block_service, after_file: 0, limit: 0 };
    let Reply::ListServiceFiles(reply) = shard.read(Read::ListServiceFiles(list)) else { panic!() };
    reply.files.iter().map(|file| (file.file, file.blocks, file.published)).collect()
}

#[test]
fn blocks_are_swapped() {
    let mut shard = Shard::default();
    let file = shard.put_blocks("f", 1000);
    let old = shard.blocks(file);
    let placed = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[4, 1]))));
    assert!(!placed.under_spread);
    assert_eq!(placed.blocks.iter().map(|block| block.index).collect::<Vec<_>>(), [4, 1]);
    for (placed, index) in placed.blocks.iter().zip([4, 1]) {
        assert_eq!((placed.crc, placed.size), (old[index].crc, 250));
        assert!(!services(&old).contains(&placed.block_service), "it goes to one of the two others");
    }
    shard.verify();
    assert_eq!(shard.blocks(file), old, "nothing has changed yet");
    assert_eq!(shard.garbage(), []);
    let before = shard.stat(file);

    let (first, again) = (swap(&placed), swap(&placed));
    shard.ok(first);
    shard.verify();
    assert_eq!(shard.stat(file), before);
    let new = shard.blocks(file);
    for index in 0..6 {
        let replaced = [4, 1].contains(&index);
        assert_eq!(new[index].block != old[index].block, replaced);
        assert_eq!((new[index].crc, &new[index].cell_crcs), (old[index].crc, &old[index].cell_crcs));
    }
    assert_eq!(on_service(&shard, old[4].block_service), []);
    assert_eq!(on_service(&shard, placed.blocks[0].block_service), [(file, 1, true)]);
    let garbage: Vec<_> = shard.garbage().iter().map(|block| block.block).collect();
    assert_eq!(garbage, [old[4].block, old[1].block]);
    // What is done is done once.
    assert_eq!(shard.refused(again), ShardError::Expired);
}

/// A disk is not empty while a file in writing may come to have blocks there.
#[test]
fn blocks_that_are_being_written_are_listed_with_their_service() {
    let mut shard = Shard::default();
    let file = shard.put_blocks("f", 1000);
    let placed = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[4]))));
    let service = placed.blocks[0].block_service;
    assert_eq!(on_service(&shard, service), [(placed.file, 1, false)]);
    let mut all = Vec::new();
    for n in 0..20 {
        let writing = eden(shard.ok(start(ROOT, Some(blocks_span(0, 1000, n, 4, 2)))));
        let has = writing.blocks.iter().any(|block| block.block_service == service);
        if n % 2 == 0 {
            let certify = Some(pb::CertifySpan { offset: 0, proofs: Shard::proofs(&writing.blocks) });
            shard.ok(publish(&writing, certify, &format!("f{n}"), 1000, n));
        }
        all.extend(has.then_some((writing.file, 1, n % 2 == 0)));
    }
    all.push((placed.file, 1, false));
    all.sort_unstable();
    assert_eq!(on_service(&shard, service), all);
    for limit in 1..5 {
        let (mut paged, mut after_file, mut more) = (Vec::new(), 0, true);
        while more {
            let list = pb::ListServiceFiles { block_service: service, after_file, limit };
            let Reply::ListServiceFiles(page) = shard.read(Read::ListServiceFiles(list)) else { panic!() };
            assert!(page.files.len() <= limit as usize);
            paged.extend(page.files.iter().map(|file| (file.file, file.blocks, file.published)));
            (after_file, more) = (page.files.last().unwrap().file, page.more);
        }
        assert_eq!(paged, all, "in pages of {limit}");
    }
    // Those of whom the writer is gone are garbage.
    shard.ok(Op::AbandonEden(pb::AbandonEden { file: placed.file, cookie: placed.cookie }));
    assert!(on_service(&shard, service).iter().all(|&(file, ..)| file != placed.file));
}

#[test]
fn only_proven_copies_are_swapped_in() {
    let mut shard = Shard::default();
    let file = shard.put_blocks("f", 1000);
    let placed = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[0, 5]))));
    let good =
        pb::SwapBlocks { eden: placed.file, cookie: placed.cookie, proofs: Shard::proofs(&placed.blocks) };
    let mut cases = vec![good.clone(), good.clone(), good.clone()];
    cases[0].proofs.pop();
    cases[1].proofs.swap(0, 1);
    cases[2].proofs[1] = vec![0; 16].into();
    for case in cases {
        assert_eq!(shard.refused(Op::SwapBlocks(case)), ShardError::BadProof);
    }
    let stranger = pb::SwapBlocks { cookie: placed.cookie + 1, ..good.clone() };
    assert_eq!(shard.refused(Op::SwapBlocks(stranger)), ShardError::NotWriter);
    // A command that no leader has verified.
    let op = pb::ChosenOp {
        op: Some(pb::WriteOp { op: Some(Op::SwapBlocks(good.clone())) }),
        ..Default::default()
    };
    let results = shard.apply(&pb::ShardCommand { ops: vec![op] });
    assert_eq!(answer(&results[0]), Err(ShardError::BadProof));
    // Nor without the secret.
    let unauthorized = shard.prepare(vec![Op::SwapBlocks(good.clone())], false).unwrap_err();
    assert_eq!(code(&unauthorized), ShardError::Unauthorized);
    shard.ok(Op::SwapBlocks(good));
    shard.verify();
}

#[test]
fn a_span_changed_by_another_swap_is_left_alone() {
    let mut shard = Shard::default();
    let file = shard.put_blocks("f", 1000);
    let one = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[2]))));
    let other = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[2]))));
    let outdated = place(&shard, file, &[2]);
    shard.ok(swap(&one));
    assert_eq!(shard.refused(swap(&other)), ShardError::Changed);
    assert_eq!(shard.refused(Op::PlaceReplacements(outdated)), ShardError::Changed);
    shard.ok(Op::AbandonEden(pb::AbandonEden { file: other.file, cookie: other.cookie }));
    // What the second has written is garbage, too.
    assert!(shard.garbage().iter().any(|block| block.block == other.blocks[0].block));
    shard.verify();
}

/// SH-19: two swaps of one span, prepared beside each other for one service.
#[test]
fn two_swaps_never_bring_blocks_together() {
    let mut shard = Shard::with(cluster(7));
    let file = shard.put_blocks("f", 1000);
    let one = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[0]))));
    let other = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[1]))));
    assert_eq!(one.blocks[0].block_service, other.blocks[0].block_service, "there is only one left");
    shard.ok(swap(&one));
    assert_eq!(shard.refused(swap(&other)), ShardError::Changed);
    shard.verify();
}

/// As on six disks, one of which has a damaged block.
#[test]
fn a_damaged_block_comes_back_to_its_disk_when_there_is_no_other() {
    let mut shard = Shard::with(cluster(6));
    let file = shard.put_blocks("f", 1000);
    let old = shard.blocks(file);
    let op = place(&shard, file, &[3]);
    let avoiding = pb::PlaceReplacements { avoid: vec![old[3].block_service], ..op.clone() };
    assert_eq!(shard.refused(Op::PlaceReplacements(avoiding)), ShardError::NoBlockServices);
    let placed = eden(shard.ok(Op::PlaceReplacements(op)));
    assert_eq!(placed.blocks[0].block_service, old[3].block_service);
    shard.ok(swap(&placed));
    assert_ne!(shard.blocks(file)[3].block, old[3].block);
    assert_eq!(shard.garbage()[0].block, old[3].block);
    shard.verify();
}

#[test]
fn replacements_go_where_they_are_told() {
    let mut shard = Shard::with(cluster(12));
    let file = shard.put_blocks("f", 1000);
    let unused: Vec<u64> =
        (1..=12).filter(|service| !services(&shard.blocks(file)).contains(service)).collect();
    let only = pb::PlaceReplacements { only: vec![unused[2]], ..place(&shard, file, &[0]) };
    let placed = eden(shard.ok(Op::PlaceReplacements(only)));
    assert_eq!(placed.blocks[0].block_service, unused[2]);
    let avoid = pb::PlaceReplacements { avoid: unused[1..].to_vec(), ..place(&shard, file, &[0]) };
    let placed = eden(shard.ok(Op::PlaceReplacements(avoid)));
    assert_eq!(placed.blocks[0].block_service, unused[0]);
}

/// What is moved to even out disks has the same failure domains to lose as before, at least.
#[test]
fn what_is_moved_without_need_comes_no_closer_to_the_others() {
    let by_two = |info: &mut pb::BlockServiceInfo| info.failure_domain = format!("domain {}", info.id / 2);
    let mut shard = Shard::with(cluster_with(20, by_two));
    let file = shard.put_blocks("f", 1000);
    let held = services(&shard.blocks(file));
    let domains: Vec<u64> = held.iter().map(|id| id / 2).collect();
    let unused: Vec<u64> = (1..=20).filter(|id| !held.contains(id)).collect();
    let (shared, free): (Vec<u64>, Vec<u64>) =
        unused.into_iter().partition(|id| domains[1..].contains(&(id / 2)));
    assert!(!shared.is_empty() && !free.is_empty());
    let moved = |only: &[u64]| pb::PlaceReplacements { only: only.to_vec(), ..place(&shard, file, &[0]) };
    let (crowd, both) = (moved(&shared), moved(&[&shared[..], &free[..1]].concat()));
    assert_eq!(shard.refused(Op::PlaceReplacements(crowd)), ShardError::NoBlockServices);
    let placed = eden(shard.ok(Op::PlaceReplacements(both)));
    assert_eq!(placed.blocks[0].block_service, free[0]);
    // One that shares its domain already may go where it shares one.
    shard.cluster = cluster_with(20, |info| info.failure_domain = "all".to_owned());
    let placed = eden(shard.ok(Op::PlaceReplacements(pb::PlaceReplacements {
        only: shared[..1].to_vec(),
        ..place(&shard, file, &[0])
    })));
    assert_eq!(placed.blocks[0].block_service, shared[0]);
    // What is lost goes where there is room.
    shard.cluster = cluster_with(20, |info| {
        by_two(info);
        info.read_only = !shared.contains(&info.id);
    });
    assert!(eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[0])))).under_spread);
}

#[test]
fn who_writes_is_told_of_shared_domains() {
    let mut shard = Shard::default();
    let placed = eden(shard.ok(start(ROOT, Some(blocks_span(0, 1000, 1, 4, 2)))));
    assert!(!placed.under_spread);
    // Five domains for six blocks.
    shard.cluster = cluster_with(9, |info| info.failure_domain = format!("domain {}", info.id % 5));
    let placed = eden(shard.ok(start(ROOT, Some(blocks_span(0, 1000, 1, 4, 2)))));
    assert!(placed.under_spread);
    let file = shard.put_blocks("f", 1000);
    let placed = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[0]))));
    assert!(placed.under_spread);
}

#[test]
fn replacements_that_cannot_be() {
    let mut shard = Shard::default();
    let file = shard.put_blocks("f", 1000);
    let inline = shard.put(ROOT, "inline", b"x");
    let good = place(&shard, file, &[0, 1]);
    for (indexes, blocks) in [
        (vec![], vec![]),
        (vec![0, 0], good.blocks.clone()),
        (vec![0], good.blocks.clone()),
        (vec![0, 1], vec![]),
    ] {
        let op = pb::PlaceReplacements { indexes, blocks, ..good.clone() };
        assert_eq!(shard.refused(Op::PlaceReplacements(op)), ShardError::Malformed);
    }
    for changed in [
        pb::PlaceReplacements { indexes: vec![0, 6], ..good.clone() },
        pb::PlaceReplacements { indexes: vec![1, 0], ..good.clone() },
        pb::PlaceReplacements { offset: 1, ..good.clone() },
        pb::PlaceReplacements { file: inline, ..good.clone() },
    ] {
        assert_eq!(shard.refused(Op::PlaceReplacements(changed)), ShardError::Changed);
    }
    let nobody = pb::PlaceReplacements { file: file + 100, ..good.clone() };
    assert_eq!(shard.refused(Op::PlaceReplacements(nobody)), ShardError::NotFound);
    let placed = eden(shard.ok(Op::PlaceReplacements(good)));
    // It is no file and never becomes one.
    let certify = Some(pb::CertifySpan { offset: 0, proofs: Shard::proofs(&placed.blocks) });
    let (file, cookie) = (placed.file, placed.cookie);
    for op in [
        publish(&placed, certify.clone(), "copies", 1000, 77),
        Op::ExtendEden(pb::ExtendEden { file, cookie, certify: certify.clone(), span: None }),
        Op::ExtendEden(pb::ExtendEden { file, cookie, certify: None, span: None }),
        Op::ReplaceBlocks(pb::ReplaceBlocks { file, cookie, indexes: vec![0], avoid: vec![] }),
        swap_contents(inline, &placed, certify),
    ] {
        assert_ne!(shard.refused(op), ShardError::Expired);
    }
    // And a file in writing holds no copies.
    let writing = eden(shard.ok(start(ROOT, Some(blocks_span(0, 1000, 1, 4, 2)))));
    assert_eq!(shard.refused(swap(&writing)), ShardError::BadSpan);
    shard.verify();
}

#[test]
fn a_purged_file_takes_nothing() {
    let mut shard = Shard::default();
    let file = shard.put_blocks("f", 1000);
    let placed = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[0]))));
    let contents = eden(shard.ok(start(file, Some(blocks_span(0, 1000, 77, 1, 2)))));
    shard.ok(unlink(ROOT, "f"));
    let dead = shard.list(pb::List { directory: ROOT, dead: true, ..Default::default() }).remove(0);
    let purge = pb::Purge {
        directory: ROOT,
        name: dead.name.clone(),
        died_at: dead.died_at,
        target: dead.target,
        owned: true,
    };
    shard.ok(Op::Purge(purge));
    assert_eq!(shard.refused(swap(&placed)), ShardError::NotFound);
    let certify = Some(pb::CertifySpan { offset: 0, proofs: Shard::proofs(&contents.blocks) });
    assert_eq!(shard.refused(swap_contents(file, &contents, certify)), ShardError::NotFound);
    assert_eq!(shard.refused(start(file, None)), ShardError::NotFound);
    // Its deadline passes, and the copies are garbage as all of the file is.
    assert_eq!(shard.garbage().len(), 6);
    shard.now += limits::EDEN_DEADLINE.as_nanos() as u64;
    assert_eq!(shard.refused(swap(&placed)), ShardError::Expired);
    shard.ok(Op::ExpireEden(pb::ExpireEden { limit: 10 }));
    assert_eq!(shard.garbage().len(), 6 + 1 + 3);
    shard.verify();
}

#[test]
fn contents_are_swapped() {
    let mut shard = Shard::default();
    let file = shard.put_blocks("f", 1000);
    let (before, old) = (shard.stat(file), shard.blocks(file));
    shard.ok(Op::RecordScrub(pb::RecordScrub { files: vec![file] }));
    // The file stands for a directory of its shard.
    let new = eden(shard.ok(start(file, Some(blocks_span(0, 1000, 77, 1, 2)))));
    let certify = Some(pb::CertifySpan { offset: 0, proofs: Shard::proofs(&new.blocks) });
    shard.ok(swap_contents(file, &new, certify.clone()));
    shard.verify();
    assert_eq!(shard.stat(file), before);
    assert_eq!(shard.blocks(file).len(), 3);
    for block in &new.blocks {
        assert!(on_service(&shard, block.block_service).contains(&(file, 1, true)));
    }
    let mut garbage: Vec<_> = shard.garbage().iter().map(|block| block.block).collect();
    garbage.sort_unstable();
    assert_eq!(garbage, old.iter().map(|block| block.block).collect::<Vec<_>>());
    let Reply::ListFiles(files) = shard.read(Read::ListFiles(pb::ListFiles::default())) else { panic!() };
    assert_eq!(files.files[0].scrubbed_at, 0, "nobody has looked at the new blocks");
    assert_eq!(shard.refused(swap_contents(file, &new, certify)), ShardError::Expired);
}

#[test]
fn contents_of_every_kind_are_swapped() {
    let mut shard = Shard::default();
    let bytes = [&b"hello, world"[..], &[0; 10]].concat();
    let file = shard.put(ROOT, "f", &bytes);
    let attributes = shard.stat(file);
    let two = eden(shard.ok(start(file, Some(inline_span(0, b"hello, world")))));
    shard.ok(Op::ExtendEden(pb::ExtendEden {
        file: two.file,
        cookie: two.cookie,
        certify: None,
        span: Some(zeros_span(12, 10)),
    }));
    shard.ok(swap_contents(file, &two, None));
    shard.verify();
    assert_eq!(shard.spans(file).len(), 2);
    let one = eden(shard.ok(start(file, Some(blocks_span(0, 22, crc(&bytes), 1, 2)))));
    assert_eq!(shard.refused(swap_contents(file, &one, None)), ShardError::BadSpan, "it is in progress");
    let certify = Some(pb::CertifySpan { offset: 0, proofs: Shard::proofs(&one.blocks) });
    let forged = certify.clone().map(|mut certify| {
        certify.proofs[2] = vec![1; 16].into();
        certify
    });
    assert_eq!(shard.refused(swap_contents(file, &one, forged)), ShardError::BadProof);
    shard.ok(swap_contents(file, &one, certify));
    shard.verify();
    assert_eq!(shard.blocks(file).len(), 3);
    assert_eq!(shard.stat(file), attributes);
    let other = eden(shard.ok(start(file, Some(inline_span(0, b"something of 22 bytes.")))));
    assert_eq!(shard.refused(swap_contents(file, &other, None)), ShardError::BadSpan, "another CRC");
    let empty = eden(shard.ok(start(file, None)));
    assert_eq!(shard.refused(swap_contents(file, &empty, None)), ShardError::BadSpan);
    let nothing = shard.put(ROOT, "empty", b"");
    shard.ok(swap_contents(nothing, &empty, None));
    assert_eq!(shard.refused(swap_contents(ROOT, &other, None)), ShardError::Malformed);
    shard.verify();
}

#[test]
fn too_many_spans_are_not_swapped() {
    let mut shard = Shard::default();
    let file = shard.put_blocks("f", 1500);
    let long = eden(shard.ok(start(file, None)));
    for at in 0..1025 {
        let span = Some(zeros_span(at, 1));
        shard.ok(Op::ExtendEden(pb::ExtendEden {
            file: long.file,
            cookie: long.cookie,
            certify: None,
            span,
        }));
    }
    let crc = crc(&[0; 1025]);
    shard.ok(publish(&long, None, "long", 1025, crc));
    let short = eden(shard.ok(start(file, Some(zeros_span(0, 1025)))));
    assert_eq!(shard.refused(swap_contents(long.file, &short, None)), ShardError::TooLarge);
}

/// A swap moved the blocks between placing and swapping the contents: the new contents win all the same.
#[test]
fn contents_and_blocks_are_swapped_beside_each_other() {
    let mut shard = Shard::with(cluster(12));
    let file = shard.put_blocks("f", 1000);
    let copies = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[0]))));
    let late = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[1]))));
    let new = eden(shard.ok(start(file, Some(blocks_span(0, 1000, 77, 4, 2)))));
    shard.ok(swap(&copies));
    let certify = Some(pb::CertifySpan { offset: 0, proofs: Shard::proofs(&new.blocks) });
    shard.ok(swap_contents(file, &new, certify));
    assert_eq!(shard.refused(swap(&late)), ShardError::Changed);
    shard.verify();
}

#[test]
fn scrubs_are_recorded() {
    let mut shard = Shard::default();
    let (one, other) = (shard.put(ROOT, "a", b"1"), shard.put(ROOT, "b", b"22"));
    shard.ok(Op::PutSmall(pb::PutSmall {
        directory: ROOT,
        name: "link".into(),
        bytes: "a".into(),
        symlink: true,
        ..Default::default()
    }));
    let (time, done) = shard.one(Op::RecordScrub(pb::RecordScrub { files: vec![other, other + 9] }));
    done.unwrap();
    let list = |after_file, limit| match shard.read(Read::ListFiles(pb::ListFiles { after_file, limit })) {
        Reply::ListFiles(reply) => (
            reply.files.iter().map(|f| (f.file, f.size, Time(f.scrubbed_at))).collect::<Vec<_>>(),
            reply.more,
        ),
        other => panic!("{other:?}"),
    };
    assert_eq!(list(0, 1), (vec![(one, 1, Time(0))], true));
    assert_eq!(list(one, 1), (vec![(other, 2, time)], false));
    let elsewhere = Op::RecordScrub(pb::RecordScrub { files: vec![one, 0x2040_0000_0000_0001] });
    assert_eq!(shard.refused(elsewhere), ShardError::Malformed);
    shard.verify();
}

#[test]
fn many_are_opened_at_once() {
    let mut shard = Shard::default();
    let file = shard.put_blocks("f", 1000);
    let small = shard.put(ROOT, "small", b"x");
    let inodes = vec![small, ROOT, 0, file + 7, file];
    let open = |inodes| match shard.read(Read::OpenMany(pb::OpenMany { inodes })) {
        Reply::OpenMany(reply) => reply.inodes,
        other => panic!("{other:?}"),
    };
    let opened = open(inodes);
    let codes: Vec<_> = opened.iter().map(|opened| opened.error.as_ref().map(code)).collect();
    let (malformed, missing) = (Some(ShardError::Malformed), Some(ShardError::NotFound));
    assert_eq!(codes, [None, None, malformed, missing, None]);
    assert_eq!(opened[0].attributes, shard.stat(small));
    assert_eq!(&opened[0].spans[0].inline[..], b"x");
    assert!(opened[1].spans.is_empty() && opened[1].all_spans);
    assert_eq!((&opened[4].spans, opened[4].all_spans), (&shard.spans(file), true));
    assert!(open(vec![]).is_empty());
    // No more than fit a message; at least one.
    let many = open(vec![file; 100_000]);
    assert!((1..=limits::PAGE_ENTRIES_MAX as usize).contains(&many.len()));
}

#[test]
fn files_are_found_by_their_block_service() {
    let mut shard = Shard::default();
    let files: Vec<u64> = (0..3).map(|n| shard.put_blocks(&format!("f{n}"), 1000)).collect();
    let mut found = Vec::new();
    for block_service in 1..=8 {
        let mut after_file = 0;
        loop {
            let list = pb::ListServiceFiles { block_service, after_file, limit: 1 };
            let Reply::ListServiceFiles(page) = shard.read(Read::ListServiceFiles(list)) else { panic!() };
            found.extend(page.files.iter().map(|file| (file.file, block_service)));
            assert!(page.files.iter().all(|file| file.published && file.blocks == 1));
            if !page.more {
                break;
            }
            after_file = page.files[0].file;
        }
    }
    found.sort_unstable();
    let mut expected: Vec<(u64, u64)> = Vec::new();
    for file in files {
        expected.extend(services(&shard.blocks(file)).iter().map(|service| (file, *service)));
    }
    expected.sort_unstable();
    assert_eq!(found, expected);
}

#[test]
fn services_that_are_gone_take_nothing() {
    let mut shard = Shard::default();
    let file = shard.put_blocks("f", 1000);
    let lost = shard.blocks(file)[0].block_service;
    shard.cluster = cluster_with(8, |info| info.flags = if info.id == lost { flags::LOST } else { 0 });
    let placed = eden(shard.ok(Op::PlaceReplacements(place(&shard, file, &[0]))));
    assert_ne!(placed.blocks[0].block_service, lost);
    shard.ok(swap(&placed));
    assert!(!services(&shard.blocks(file)).contains(&lost));
    shard.verify();
}
