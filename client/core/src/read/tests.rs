//! The read machine against a plain byte array, under random ranges and failures.

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::encode::encode;
use crate::layout::Layout;

struct Disk {
    span: Arc<StoredSpan>,
    plain: Vec<u8>,
    blocks: Vec<Vec<u8>>,
}

fn disk(size: usize, data: u32, parity: u32, cell: u32) -> Disk {
    let plain: Vec<u8> = (0..size as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let layout = Layout::choose(size as u32, data, parity, cell).unwrap();
    let encoded = encode(BytesMut::from(&plain[..]), layout, &mut Vec::new()).unwrap();
    let new = encoded.new_blocks(3, vec![]);
    let stored = new.blocks.iter().enumerate().map(|(n, block)| StoredBlock {
        service: BlockServiceId(n as u64 + 1),
        block: BlockId(n as u64),
        crc: block.crc,
        cell_crcs: block.cell_crcs.clone(),
    });
    let body = Body::Blocks { layout, blocks: stored.collect() };
    let span = StoredSpan { offset: 0, size: size as u32, crc: encoded.crc, storage_class: 3, body };
    let blocks = (0..layout.blocks()).map(|n| encoded.slices(n).concat()).collect();
    Disk { span: Arc::new(span), plain, blocks }
}

impl Disk {
    fn fetch(&self, fetch: &Fetch) -> Bytes {
        let from = fetch.offset as usize;
        Bytes::copy_from_slice(&self.blocks[fetch.index][from..from + fetch.length as usize])
    }

    fn layout(&self) -> Layout {
        let Body::Blocks { layout, .. } = self.span.body else { panic!() };
        layout
    }
}

fn steps(read: &mut ReadSpan) -> Vec<ReadStep> {
    std::iter::from_fn(|| read.poll()).collect()
}

fn fetches(read: &mut ReadSpan) -> Vec<Fetch> {
    let fetch = |step| match step {
        ReadStep::Fetch(fetch) => fetch,
        other => panic!("{other:?}"),
    };
    steps(read).into_iter().map(fetch).collect()
}

#[test]
fn a_small_read_fetches_one_cell() {
    let disk = disk(100_000, 4, 2, 4096);
    let mut read = ReadSpan::new(disk.span.clone(), 5000..5010, |_| true, 0);
    let [fetch] = fetches(&mut read)[..] else { panic!() };
    assert_eq!((fetch.index, fetch.offset, fetch.length), (1, 0, 4096));
    read.fetched(fetch.id, vec![disk.fetch(&fetch)]);
    let [ReadStep::Done(bytes)] = &steps(&mut read)[..] else { panic!() };
    assert_eq!(bytes.concat(), disk.plain[5000..5010]);
}

#[test]
fn a_whole_read_fetches_each_data_block_once_and_no_parity() {
    let disk = disk(100_000, 4, 2, 4096);
    let mut read = ReadSpan::new(disk.span.clone(), 0..100_000, |_| true, 0);
    let fetches = fetches(&mut read);
    assert_eq!(fetches.iter().map(|fetch| fetch.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
}

#[test]
fn mirrors_are_taken_in_turn() {
    let disk = disk(5000, 1, 2, 4096);
    let mut asked: Vec<usize> = (0..3)
        .map(|turn| fetches(&mut ReadSpan::new(disk.span.clone(), 0..1, |_| true, turn))[0].index)
        .collect();
    asked.sort_unstable();
    assert_eq!(asked, [0, 1, 2]);
}

#[test]
fn a_late_block_is_replaced_and_its_answer_still_welcome() {
    let disk = disk(100_000, 4, 2, 4096);
    let mut read = ReadSpan::new(disk.span.clone(), 0..4096, |_| true, 0);
    let [first] = fetches(&mut read)[..] else { panic!() };
    read.late(first.id);
    let more = fetches(&mut read);
    assert_eq!(more.iter().map(|fetch| fetch.index).collect::<Vec<_>>(), [1, 2, 3, 4]);
    read.fetched(first.id, vec![disk.fetch(&first)]);
    assert_eq!(steps(&mut read), [ReadStep::Done(vec![disk.fetch(&first)])]);
    assert!(!read.waits_for(more[0].id));
}

#[test]
fn a_block_the_registry_avoids_is_asked_only_when_nothing_else_is_left() {
    let disk = disk(16_384, 4, 2, 4096);
    let mut read = ReadSpan::new(disk.span.clone(), 0..4096, |service| service.0 > 2, 0);
    let asked = fetches(&mut read);
    assert_eq!(asked.iter().map(|fetch| fetch.index).collect::<Vec<_>>(), [2, 3, 4, 5]);
    read.failed(asked[0].id, FetchFailure::Unreachable("off".to_owned()));
    assert_eq!(fetches(&mut read).iter().map(|fetch| fetch.index).collect::<Vec<_>>(), [0]);
}

#[test]
fn zeros_and_inline_need_no_fetch() {
    let span = |body| {
        Arc::new(StoredSpan { offset: 9, size: 4, crc: crc32fast::hash(b"abcd"), storage_class: 0, body })
    };
    let read = |body, range| steps(&mut ReadSpan::new(span(body), range, |_| true, 0));
    assert_eq!(read(Body::Zeros, 1..9), [ReadStep::Done(vec![Bytes::from_static(&[0; 3])])]);
    let inline = Body::Inline(Bytes::from_static(b"abcd"));
    assert_eq!(read(inline.clone(), 1..3), [ReadStep::Done(vec![Bytes::from_static(b"bc")])]);
    assert_eq!(read(inline, 4..9), [ReadStep::Done(vec![])]);
    assert!(matches!(&read(Body::Inline(Bytes::from_static(b"abcx")), 0..1)[..], [ReadStep::Lost(_)]));
}

/// What the world does to a block in the random test.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fate {
    Fine,
    Missing,
    Unreachable,
    /// Late, and then fine or gone.
    Late(bool),
    /// A bit flips in the cell of every nth stripe, and some answers are short.
    Corrupt(usize),
    Short,
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        4 => Just(Fate::Fine),
        1 => Just(Fate::Missing),
        1 => Just(Fate::Unreachable),
        1 => any::<bool>().prop_map(Fate::Late),
        1 => (1..4usize).prop_map(Fate::Corrupt),
        1 => Just(Fate::Short),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn ranges_come_out_right_or_are_rightly_lost(
        size in 1..150_000usize, data in 1..=6u32, parity in 0..=3u32, cell in 0..20_000u32,
        at in any::<(u32, u32)>(), fates in prop::collection::vec(fate(), 9), seed in any::<u64>(),
        avoided in 0..512u32,
    ) {
        let mut state = seed | 1;
        let mut random = move || { state ^= state << 13; state ^= state >> 7; state ^= state << 17; state };
        let disk = disk(size, data, parity, cell);
        let layout = disk.layout();
        let from = at.0 as usize % size;
        let to = from + at.1 as usize % (size - from + 1);
        let readable = |service: BlockServiceId| avoided >> (service.0 % 9) & 1 == 0;
        let mut read = ReadSpan::new(disk.span.clone(), from as u32..to as u32, readable, random() as usize % 9);
        let mut todo: Vec<(Fetch, bool)> = Vec::new();
        let mut asked = std::collections::BTreeSet::new();
        let mut reported = Vec::new();
        let end = 'run: loop {
            for step in steps(&mut read) {
                match step {
                    ReadStep::Fetch(fetch) => {
                        for stripe in 0..fetch.length as usize / layout.cell_size() {
                            // CL-3: each cell at most once.
                            prop_assert!(asked.insert((fetch.index, fetch.offset as usize / layout.cell_size() + stripe)));
                        }
                        todo.push((fetch, false));
                    }
                    ReadStep::Report(bad) => reported.push(bad.index),
                    end => break 'run end,
                }
            }
            prop_assert!(!todo.is_empty(), "stuck");
            let (fetch, was_late) = todo.swap_remove(random() as usize % todo.len());
            let good = disk.fetch(&fetch);
            match fates[fetch.index] {
                Fate::Late(_) if !was_late => {
                    read.late(fetch.id);
                    todo.push((fetch, true));
                }
                Fate::Fine | Fate::Late(true) => {
                    let cut = random() as usize % (good.len() + 1);
                    read.fetched(fetch.id, vec![good.slice(..cut), good.slice(cut..)]);
                }
                Fate::Missing => read.failed(fetch.id, FetchFailure::Damaged(Damage::Missing)),
                Fate::Unreachable | Fate::Late(false) =>
                    read.failed(fetch.id, FetchFailure::Unreachable("gone".to_owned())),
                Fate::Short => read.fetched(fetch.id, vec![good.slice(1..)]),
                Fate::Corrupt(every) => {
                    let mut bad = good.to_vec();
                    let first = fetch.offset as usize / layout.cell_size();
                    for (n, cell) in bad.chunks_mut(layout.cell_size()).enumerate() {
                        if (first + n).is_multiple_of(every) {
                            cell[random() as usize % layout.cell_size()] ^= 1;
                        }
                    }
                    read.fetched(fetch.id, vec![Bytes::from(bad)]);
                }
            }
        };
        // CL-2: how many right cells each stripe of the range has.
        let right = |stripe: usize| (0..layout.blocks()).filter(|&n| match fates[n] {
            Fate::Fine | Fate::Late(true) => true,
            Fate::Corrupt(every) => !stripe.is_multiple_of(every),
            // Padding is known without asking.
            _ => !layout.is_mirrored() && n < layout.data()
                && (stripe * layout.data() + n) * layout.cell_size() >= size,
        }).count();
        match end {
            ReadStep::Done(bytes) => prop_assert_eq!(bytes.concat(), &disk.plain[from..to]),
            ReadStep::Lost(_) => {
                let stripes = from / layout.stripe_size()..to.div_ceil(layout.stripe_size());
                prop_assert!(stripes.clone().any(|stripe| right(stripe) < layout.data()));
            }
            other => prop_assert!(false, "{other:?}"),
        }
        let mut once = reported.clone();
        once.sort_unstable();
        once.dedup();
        prop_assert_eq!(once.len(), reported.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Any block, of data or parity, in any stripes, with as many blocks gone as the parity allows.
    #[test]
    fn a_block_is_read_or_computed(
        size in 1..150_000usize, data in 1..=6u32, parity in 0..=3u32, cell in 0..20_000u32,
        at in any::<(u8, u8, u8)>(), gone in prop::collection::vec(0..9usize, 0..4), slow in 0..512u32,
    ) {
        let disk = disk(size, data, parity, cell);
        let layout = disk.layout();
        let index = usize::from(at.0) % layout.blocks();
        let from = usize::from(at.1) % layout.stripes();
        let to = from + 1 + usize::from(at.2) % (layout.stripes() - from);
        let gone = &gone[..gone.len().min(parity as usize)];
        let standing = |service: BlockServiceId| match slow >> (service.0 % 9) & 1 {
            1 => Standing::Slow,
            _ => Standing::Good,
        };
        let mut read = ReadSpan::block(disk.span.clone(), index, from..to, standing, 3);
        let bytes = loop {
            match read.poll().expect("stuck") {
                ReadStep::Fetch(fetch) if gone.contains(&fetch.index) =>
                    read.failed(fetch.id, FetchFailure::Damaged(Damage::Missing)),
                ReadStep::Fetch(fetch) => read.fetched(fetch.id, vec![disk.fetch(&fetch)]),
                ReadStep::Report(bad) => prop_assert!(gone.contains(&bad.index)),
                ReadStep::Done(bytes) => break bytes.concat(),
                ReadStep::Lost(what) => panic!("{what}"),
            }
        };
        let cell = layout.cell_size();
        prop_assert_eq!(&bytes, &disk.blocks[index][from * cell..to * cell]);
    }
}

#[test]
fn blocks_that_are_not_there_are_not_read() {
    let disk = disk(100_000, 4, 2, 4096);
    for (index, stripes) in [(6, 0..1), (0, 0..100), (0, 3..3)] {
        let mut read = ReadSpan::block(disk.span.clone(), index, stripes, |_| true, 0);
        assert!(matches!(&steps(&mut read)[..], [ReadStep::Lost(_)]));
    }
}

#[test]
fn a_slow_service_is_read_around_unless_there_is_no_way_around() {
    let disk = disk(16_384, 4, 2, 4096);
    let asked = |slow: &[u64]| {
        let standing = |service: BlockServiceId| match slow.contains(&service.0) {
            true => Standing::Slow,
            false => Standing::Good,
        };
        let mut read = ReadSpan::new(disk.span.clone(), 0..4096, standing, 0);
        fetches(&mut read).iter().map(|fetch| fetch.index).collect::<Vec<_>>()
    };
    assert_eq!(asked(&[1]), [1, 2, 3, 4]);
    assert_eq!(asked(&[1, 2, 3]), [0], "one slow cell, not four of which one is slow");
    assert_eq!(asked(&[2]), [0]);
}
