//! Golden bytes of stored rows: what a table holds must stay readable by every later version.

use crate::support::*;
use eggs_proto::pb;
use eggs_proto::pb::write_op::Op;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// One of every kind of row, made at known times.
fn sample() -> Shard {
    let mut shard = Shard::default();
    let directory = shard.mkdir(3, ROOT, "d");
    shard.put(directory, "f", b"one");
    shard.put(directory, "f", b"");
    // The leader's choices, made by hand: placement may change, the format may not.
    let choose = |op, block_services: &[u64], proven_blocks: &[u64]| pb::ShardCommand {
        ops: vec![pb::ChosenOp {
            op: Some(pb::WriteOp { op: Some(op) }),
            cookie: 0x0102_0304_0506_0708,
            block_services: block_services.to_vec(),
            proven_blocks: proven_blocks.to_vec(),
            under_spread: false,
            refused: None,
        }],
    };
    let results = shard.apply(&choose(start(directory, Some(blocks_span(0, 10, 1, 1, 1))), &[2, 7], &[]));
    let file = eden(answer(&results[0]).unwrap());
    let extend = Op::ExtendEden(pb::ExtendEden {
        file: file.file,
        cookie: file.cookie,
        certify: Some(pb::CertifySpan { offset: 0, proofs: vec![] }),
        span: Some(blocks_span(10, 4, 2, 2, 0)),
    });
    let proven: Vec<u64> = file.blocks.iter().map(|block| block.block).collect();
    answer(&shard.apply(&choose(extend, &[7, 2], &proven))[0]).unwrap();
    let lock = pb::LockEdge { transaction: 4, directory: ROOT, name: "d".into(), target: directory };
    shard.ok(Op::LockEdge(lock));
    shard.verify();
    shard
}

#[test]
fn rows() {
    let shard = sample();
    let ours = shard.table.iter().filter(|(key, _)| key[0] != eggs_machine::table::RESERVED);
    let rows: Vec<String> = ours.map(|(key, value)| format!("{} {}", hex(key), hex(value))).collect();
    assert_eq!(rows.join("\n"), GOLDEN.trim(), "\nstored rows have changed:\n{}\n", rows.join("\n"));
}

/// The row of copies on their way into a span.
#[test]
fn a_row_of_copies() {
    let row = pb::EdenRow {
        cookie: 1,
        deadline: 2,
        created_at: 3,
        pending: Some(pb::Span { offset: 4, size: 5, crc: 6, storage_class: 3, ..Default::default() }),
        replacement: Some(pb::Replacement { file: 7, offset: 4, indexes: vec![0, 2], blocks: vec![8, 9] }),
        ..Default::default()
    };
    let golden = "090100000000000000110200000000000000290300000000000000\
                  3a0b080410051d060000002003\
                  5a21090700000000000000100\
                  41a0200022210080000000000000009000000000000\
                  00";
    assert_eq!(hex(&prost::Message::encode_to_vec(&row)), golden);
}

const GOLDEN: &str = include_str!("golden.txt");
