//! SH-15: whatever the bytes, the machine answers, and stays whole.

use bytes::Bytes;
use eggs_machine::Tx;
use eggs_proto::pb::shard_request::Op as Read;
use eggs_proto::pb::write_op::Op;
use eggs_proto::{InodeId, InodeType, ShardId, Time, limits, pb};
use proptest::prelude::*;
use prost::Message;

use crate::support::*;

/// Null, real, near misses, other shards and types, nonsense.
fn ids() -> impl Strategy<Value = u64> {
    let id = |kind, shard, counter| InodeId::new(kind, ShardId(shard), counter).0;
    prop_oneof![
        Just(0),
        Just(ROOT),
        (0u64..5).prop_map(move |n| id(InodeType::Directory, 1, n)),
        (0u64..8).prop_map(move |n| id(InodeType::File, 1, n)),
        (0u64..3).prop_map(move |n| id(InodeType::Symlink, 1, n)),
        (0u64..3).prop_map(move |n| id(InodeType::File, 2, n)),
        Just(u64::MAX),
        any::<u64>(),
    ]
}

fn numbers() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..4, Just(u32::MAX), Just(limits::SPAN_BYTES_MAX), any::<u32>()]
}

fn times() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..3, Just(u64::MAX), Just(u64::MAX - 1), any::<u64>(), Just(1001 * SECOND)]
}

fn names() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        prop::sample::select(vec!["a", "b", "d", "", ".", "..", "a/b", "a\0"]).prop_map(Bytes::from),
        prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from),
    ]
}

fn new_spans() -> impl Strategy<Value = Option<pb::NewSpan>> {
    let body = prop_oneof![
        Just(None),
        Just(Some(pb::new_span::Body::Zeros(pb::Done {}))),
        names().prop_map(|bytes| Some(pb::new_span::Body::Inline(bytes))),
        (prop::array::uniform5(numbers()), 0usize..8, prop::collection::vec(any::<u64>(), 0..3)).prop_map(
            |([storage_class, data, parity, stripes, cell_size], blocks, avoid)| {
                let block = pb::NewBlock { crc: 1, cell_crcs: vec![2] };
                let blocks = vec![block; blocks];
                Some(pb::new_span::Body::Blocks(pb::NewBlocks {
                    storage_class,
                    data,
                    parity,
                    stripes,
                    cell_size,
                    blocks,
                    avoid,
                }))
            }
        ),
    ];
    let wild = (times(), numbers(), any::<u32>(), body).prop_map(|(offset, size, crc, body)| pb::NewSpan {
        offset,
        size,
        crc,
        body,
    });
    prop_oneof![
        Just(None),
        Just(Some(inline_span(0, b"good"))),
        Just(Some(blocks_span(0, 100, 1, 4, 2))),
        wild.prop_map(Some),
    ]
}

fn certifications() -> impl Strategy<Value = Option<pb::CertifySpan>> {
    let proofs = prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20).prop_map(Bytes::from), 0..7);
    prop::option::of((times(), proofs).prop_map(|(offset, proofs)| pb::CertifySpan { offset, proofs }))
}

fn attributes() -> impl Strategy<Value = Option<pb::NewAttributes>> {
    let all = (any::<u32>(), prop::option::of(times()));
    prop::option::of(all.prop_map(|(mode, mtime)| pb::NewAttributes { mode, uid: mode, gid: mode, mtime }))
}

fn client_ops() -> impl Strategy<Value = Op> {
    let xattrs = prop::collection::vec(
        (names(), names()).prop_map(|(name, value)| pb::ExtendedAttribute { name, value }),
        0..3,
    );
    let policies = (numbers(), prop::collection::vec(prop::array::uniform3(numbers()), 0..3)).prop_map(
        |(cell_size, rules)| pb::Policies {
            stripe: Some(pb::StripePolicy { cell_size }),
            span: Some(pb::SpanPolicy {
                rules: rules
                    .into_iter()
                    .map(|[max_size, data, parity]| pb::SpanRule { max_size, data, parity })
                    .collect(),
            }),
            ..Default::default()
        },
    );
    prop_oneof![
        (ids(), attributes(), new_spans()).prop_map(|(directory, attributes, span)| {
            Op::StartEden(pb::StartEden { directory, attributes, note: "é".repeat(900), span })
        }),
        (ids(), times(), certifications(), new_spans()).prop_map(|(file, cookie, certify, span)| {
            Op::ExtendEden(pb::ExtendEden { file, cookie, certify, span })
        }),
        (ids(), times(), prop::collection::vec(numbers(), 0..4)).prop_map(|(file, cookie, indexes)| {
            Op::ReplaceBlocks(pb::ReplaceBlocks { file, cookie, indexes, avoid: vec![1] })
        }),
        (ids(), times(), certifications(), ids(), names(), any::<i32>(), times()).prop_map(
            |(file, cookie, certify, directory, name, replace, size)| {
                Op::LinkEden(pb::LinkEden { file, cookie, certify, directory, name, replace, size, crc: 0 })
            }
        ),
        (ids(), times()).prop_map(|(file, cookie)| Op::AbandonEden(pb::AbandonEden { file, cookie })),
        (ids(), names(), names(), any::<bool>(), attributes(), 0i32..3).prop_map(
            |(directory, name, bytes, symlink, attributes, replace)| {
                Op::PutSmall(pb::PutSmall { directory, name, bytes, symlink, attributes, replace })
            }
        ),
        (ids(), names(), names(), 0i32..3).prop_map(|(directory, old_name, new_name, replace)| {
            Op::Rename(pb::Rename { directory, old_name, new_name, replace })
        }),
        (ids(), names(), names()).prop_map(|(directory, name, other_name)| {
            Op::Exchange(pb::Exchange { directory, name, other_name })
        }),
        (ids(), names(), times(), ids(), names()).prop_map(|(directory, name, died_at, target, new_name)| {
            Op::Undelete(pb::Undelete { directory, name, died_at, target, new_name })
        }),
        (ids(), names(), times(), ids()).prop_map(|(directory, name, died_at, target)| {
            Op::Purge(pb::Purge { directory, name, died_at, target, owned: target % 2 == 0 })
        }),
        (ids(), names(), ids()).prop_map(|(directory, name, expected)| Op::Unlink(pb::Unlink {
            directory,
            name,
            expected
        })),
        (ids(), prop::option::of(times()), xattrs, prop::collection::vec(names(), 0..2)).prop_map(
            |(inode, mtime, set_xattrs, remove_xattrs)| {
                let mode = Some(u32::MAX);
                let set =
                    pb::SetAttributes { inode, mtime, mode, set_xattrs, remove_xattrs, ..Default::default() };
                Op::SetAttributes(set)
            }
        ),
        (ids(), any::<i32>(), prop::option::of(policies)).prop_map(|(directory, kind, value)| Op::SetPolicy(
            pb::SetPolicy { directory, kind: kind % 6, value }
        )),
        numbers().prop_map(|limit| Op::ExpireEden(pb::ExpireEden { limit })),
    ]
}

fn steps() -> impl Strategy<Value = Op> {
    let transaction = || prop_oneof![0u64..4, Just(u64::MAX)];
    prop_oneof![
        (transaction(), ids(), attributes()).prop_map(|(transaction, owner, attributes)| {
            Op::CreateDirectory(pb::CreateDirectory { transaction, owner, attributes })
        }),
        (transaction(), ids()).prop_map(|(transaction, directory)| {
            Op::DiscardDirectory(pb::DiscardDirectory { transaction, directory })
        }),
        (transaction(), ids(), ids()).prop_map(|(transaction, directory, owner)| {
            Op::LockDirectory(pb::LockDirectory { transaction, directory, owner, removed: owner % 2 == 0 })
        }),
        (transaction(), ids()).prop_map(|(transaction, directory)| {
            Op::UnlockDirectory(pb::UnlockDirectory { transaction, directory })
        }),
        (transaction(), ids()).prop_map(|(transaction, directory)| {
            Op::RemoveDirectory(pb::RemoveDirectory { transaction, directory })
        }),
        (transaction(), ids(), names(), ids()).prop_map(|(transaction, directory, name, target)| {
            Op::LockEdge(pb::LockEdge { transaction, directory, name, target })
        }),
        (transaction(), ids(), names()).prop_map(|(transaction, directory, name)| {
            Op::UnlockEdge(pb::UnlockEdge { transaction, directory, name })
        }),
        (transaction(), ids(), names(), ids(), 0i32..3).prop_map(
            |(transaction, directory, name, target, replace)| {
                Op::LinkEdge(pb::LinkEdge { transaction, directory, name, target, replace })
            }
        ),
        (transaction(), ids(), names(), ids(), any::<bool>()).prop_map(
            |(transaction, directory, name, target, owned)| {
                Op::UnlinkEdge(pb::UnlinkEdge {
                    transaction,
                    directory,
                    name,
                    target,
                    owned,
                    died_at: target,
                })
            }
        ),
        (transaction(), ids(), ids()).prop_map(|(transaction, directory, owner)| {
            Op::SetOwner(pb::SetOwner { transaction, directory, owner })
        }),
        (transaction(), ids(), prop::collection::vec(names(), 0..4), attributes()).prop_map(
            |(transaction, owner, names, attributes)| {
                let on_the_way = attributes;
                let create = pb::CreateDirectories { transaction, owner, names, on_the_way, attributes };
                Op::CreateDirectories(create)
            }
        ),
        (transaction(), ids(), prop::collection::vec(names(), 0..4)).prop_map(
            |(transaction, directory, names)| {
                Op::DiscardDirectories(pb::DiscardDirectories { transaction, directory, names })
            }
        ),
        (transaction(), ids(), names(), ids(), ids()).prop_map(
            |(transaction, directory, name, target, new_target)| {
                let step = pb::ExchangeEdge { transaction, directory, name, target, new_target };
                Op::ExchangeEdge(step)
            }
        ),
        (transaction(), ids(), names(), ids(), ids(), times()).prop_map(
            |(transaction, directory, name, target, new_target, exchanged_at)| {
                Op::SettleEdge(pb::SettleEdge {
                    transaction,
                    directory,
                    name,
                    target,
                    new_target,
                    exchanged_at,
                })
            }
        ),
        (transaction(), prop::collection::vec((ids(), ids()), 0..4)).prop_map(|(transaction, owners)| {
            let owner = |(directory, owner)| pb::DirectoryOwner { directory, owner };
            Op::SetOwners(pb::SetOwners { transaction, owners: owners.into_iter().map(owner).collect() })
        }),
        (transaction(), ids(), ids()).prop_map(|(transaction, directory, owner)| {
            Op::ReviveDirectory(pb::ReviveDirectory { transaction, directory, owner })
        }),
        (transaction(), ids(), names(), times(), ids(), 0u8..6).prop_map(
            |(transaction, directory, name, died_at, target, kind)| match kind {
                0 => Op::UndeleteEdge(pb::UndeleteEdge {
                    transaction,
                    directory,
                    new_name: name.clone(),
                    name,
                    died_at,
                    target,
                }),
                1 => Op::LockDeadEdge(pb::LockDeadEdge { transaction, directory, name, died_at, target }),
                2 => Op::PurgeDeadEdge(pb::PurgeDeadEdge { transaction, directory, name, died_at, target }),
                3 => Op::PurgeFile(pb::PurgeFile { transaction, file: target }),
                4 => Op::PurgeDirectory(pb::PurgeDirectory { transaction, directory }),
                _ => Op::FreeDeadEdge(pb::FreeDeadEdge {
                    transaction,
                    directory,
                    name,
                    died_at,
                    lives: target % 2 == 0,
                }),
            },
        ),
        // The floor stays low, or nothing else would ever run.
        (prop::collection::vec(4u64..9, 0..3), 0u64..2).prop_map(|(transactions, floor)| {
            Op::ForgetTransactions(pb::ForgetTransactions { transactions, floor })
        }),
    ]
}

fn janitor_ops() -> impl Strategy<Value = Op> {
    let proofs =
        || prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20).prop_map(Bytes::from), 0..7);
    prop_oneof![
        (
            ids(),
            times(),
            prop::collection::vec(numbers(), 0..4),
            prop::collection::vec(times(), 0..4),
            prop::collection::vec(0u64..9, 0..3),
        )
            .prop_map(|(file, offset, indexes, blocks, services)| {
                let (avoid, only) = (services.clone(), services);
                Op::PlaceReplacements(pb::PlaceReplacements { file, offset, indexes, blocks, avoid, only })
            }),
        (ids(), times(), proofs())
            .prop_map(|(eden, cookie, proofs)| { Op::SwapBlocks(pb::SwapBlocks { eden, cookie, proofs }) }),
        (ids(), ids(), times(), certifications()).prop_map(|(file, eden, cookie, certify)| {
            Op::SwapContents(pb::SwapContents { file, eden, cookie, certify })
        }),
        prop::collection::vec(ids(), 0..4).prop_map(|files| Op::RecordScrub(pb::RecordScrub { files })),
        prop::collection::vec((ids(), 0u64..9, times(), proofs()), 0..4).prop_map(|blocks| {
            let erased = |(file, block_service, block, proofs): (u64, u64, u64, Vec<Bytes>)| {
                let proof = proofs.into_iter().next().unwrap_or_default();
                pb::ErasedBlock { file, block_service, block, proof }
            };
            Op::ForgetGarbage(pb::ForgetGarbage { blocks: blocks.into_iter().map(erased).collect() })
        }),
    ]
}

fn reads() -> impl Strategy<Value = Read> {
    prop_oneof![
        ids().prop_map(|inode| Read::Stat(pb::Stat { inode })),
        (ids(), times(), numbers()).prop_map(|(file, offset, limit)| Read::GetSpans(pb::GetSpans {
            file,
            offset,
            limit
        })),
        (ids(), any::<bool>(), names(), prop::array::uniform4(times()), numbers(), names()).prop_map(
            |(directory, dead, after_name, [after_died_at, at, since, until], limit, prefix)| {
                let want_attributes = true;
                Read::List(pb::List {
                    directory,
                    dead,
                    after_name,
                    after_died_at,
                    limit,
                    at,
                    since,
                    until,
                    want_attributes,
                    prefix,
                })
            }
        ),
        (ids(), numbers()).prop_map(|(after_file, limit)| Read::ListEden(pb::ListEden { after_file, limit })),
        (ids(), numbers())
            .prop_map(|(after_file, limit)| Read::ListFiles(pb::ListFiles { after_file, limit })),
        (ids(), numbers())
            .prop_map(|(after_file, limit)| Read::ListGarbage(pb::ListGarbage { after_file, limit })),
        (times(), ids(), numbers()).prop_map(|(block_service, after_file, limit)| {
            Read::ListServiceFiles(pb::ListServiceFiles { block_service, after_file, limit })
        }),
        prop::collection::vec(ids(), 0..5).prop_map(|inodes| Read::OpenMany(pb::OpenMany { inodes })),
        (names(), numbers()).prop_map(|(cursor, limit_rows)| Read::Check(pb::Check { cursor, limit_rows })),
        (ids(), prop::collection::vec(names(), 0..4), times()).prop_map(|(start, components, at)| {
            Read::Walk(pb::Walk {
                start,
                components,
                at,
                want_attributes: true,
                want_spans: true,
                ..pb::Walk::default()
            })
        }),
    ]
}

fn peopled() -> Shard {
    let mut shard = Shard::default();
    let directory = shard.mkdir(100, ROOT, "d");
    shard.put(ROOT, "a", b"1");
    shard.put(directory, "a", b"2");
    shard.put(directory, "a", b"3");
    shard
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    /// What a coordinator would never do leaves rows that `check` may not like; a client's operations
    /// must not.
    #[test]
    fn clients_cannot_break_a_shard(
        batches in prop::collection::vec(prop::collection::vec(client_ops(), 1..4), 1..12),
        queries in prop::collection::vec(reads(), 0..6),
    ) {
        let mut shard = peopled();
        for batch in batches {
            let count = batch.len();
            let command = shard.prepare(batch, false).unwrap();
            prop_assert_eq!(shard.apply(&command).len(), count);
        }
        for query in queries {
            if let Read::Walk(walk) = &query {
                let _ = shard.walk(walk);
            }
            shard.read(query);
        }
        shard.verify();
    }

    #[test]
    fn nonsense_steps_are_answered(
        ops in prop::collection::vec(prop_oneof![steps(), client_ops(), janitor_ops()], 1..30),
        queries in prop::collection::vec(reads(), 0..6),
    ) {
        let mut shard = peopled();
        for op in ops {
            let before = shard.rows();
            if shard.one(op.clone()).1.is_err() {
                // SH-11
                prop_assert_eq!(&before, &shard.rows(), "refused, but it changed something: {:?}", op);
            }
        }
        for query in queries {
            if let Read::Walk(walk) = &query {
                let _ = shard.walk(walk);
            }
            shard.read(query);
        }
    }

    /// Operations that no leader has prepared: choices missing or made up.
    #[test]
    fn made_up_choices_are_answered(
        ops in prop::collection::vec((prop_oneof![client_ops(), janitor_ops()], times(), prop::collection::vec(0u64..9, 0..7)), 1..10),
    ) {
        let mut shard = peopled();
        let ops = ops.into_iter().map(|(op, cookie, block_services)| pb::ChosenOp {
            op: Some(pb::WriteOp { op: Some(op) }),
            cookie,
            proven_blocks: block_services.clone(),
            under_spread: false,
            block_services,
            refused: None,
        });
        shard.apply(&pb::ShardCommand { ops: ops.collect() });
        shard.verify();
    }

    #[test]
    fn noise_is_answered(noise in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut shard = peopled();
        shard.apply_bytes(&noise);
        shard.verify();
    }
}

#[test]
fn the_end_of_time_is_survived() {
    let shard = peopled();
    let machine = eggs_shard_core::ShardMachine { shard: shard.shard };
    let op = pb::ChosenOp {
        op: Some(pb::WriteOp { op: Some(put_small(ROOT, "a", b"", pb::Replace::File)) }),
        ..Default::default()
    };
    let command = pb::ShardCommand { ops: vec![op; 3] };
    let mut tx = Tx::new(&shard.table, shard.hash);
    eggs_machine::Machine::apply(&machine, &mut tx, Time::MAX, &command.encode_to_vec()).unwrap();
}

#[test]
fn more_operations_than_a_batch_holds_are_refused() {
    let mut shard = peopled();
    let command = pb::ShardCommand { ops: vec![pb::ChosenOp::default(); limits::BATCH_OPS_MAX + 1] };
    assert_eq!(shard.apply(&command).len(), 1);
    assert_eq!(shard.apply(&pb::ShardCommand { ops: vec![pb::ChosenOp::default(); 3] }).len(), 3);
    shard.verify();
}
