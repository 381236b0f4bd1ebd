//! The end of a read: cells that are there and cells computed from them, put together (CL-1).

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use bytes::{Buf, Bytes, BytesMut};

use super::{Cell, ReadSpan, Target};
use crate::code::Code;
use crate::crc::Crc;
use crate::layout::Layout;
use crate::span::Body;

impl ReadSpan {
    pub(super) fn assemble(&self, layout: Layout) -> Result<Vec<Bytes>, String> {
        let mut code = None;
        let mut bytes = Vec::with_capacity(self.stripes.len() * layout.data());
        for stripe in self.stripes.clone() {
            let base = self.at(layout, stripe, 0);
            let cells = &self.cells[base..base + layout.blocks()];
            let columns = self.columns(layout, stripe);
            let rebuilt = self.rebuild(layout, stripe, cells, columns.clone(), &mut code)?;
            for column in columns {
                let range = self.wanted_of(layout, stripe, column);
                let cell = rebuilt.get(&column).or(match &cells[column] {
                    Cell::Have(cell) => Some(cell),
                    _ => None,
                });
                bytes.push(cell.ok_or("a cell is missing")?.slice(range));
            }
        }
        Ok(bytes)
    }

    /// Which bytes of a cell are wanted.
    fn wanted_of(&self, layout: Layout, stripe: usize, column: usize) -> Range<usize> {
        match self.target {
            Target::Block(_) => 0..layout.cell_size(),
            Target::Bytes => {
                let start = stripe * layout.stripe_size() + column * layout.cell_size();
                let from = self.range.start.saturating_sub(start);
                from..(self.range.end - start).min(layout.cell_size())
            }
        }
    }

    /// The cells of `columns` that are not there.
    fn rebuild(
        &self,
        layout: Layout,
        stripe: usize,
        cells: &[Cell],
        columns: Range<usize>,
        code: &mut Option<Code>,
    ) -> Result<BTreeMap<usize, Bytes>, String> {
        let wanted: Vec<usize> = columns.filter(|&n| !matches!(cells[n], Cell::Have(_))).collect();
        if wanted.is_empty() {
            return Ok(BTreeMap::new());
        }
        let have = |(n, cell): (usize, &'_ Cell)| match cell {
            Cell::Have(cell) => Some((n, cell.clone())),
            _ => None,
        };
        let there: Vec<(usize, Bytes)> =
            cells.iter().enumerate().filter_map(have).take(layout.data()).collect();
        if layout.is_mirrored() {
            let copy = |n| there.first().map(|(_, cell)| (n, cell.clone()));
            return Ok(wanted.into_iter().filter_map(copy).collect());
        }
        if code.is_none() {
            *code = Some(Code::new(layout.data(), layout.parity()).map_err(|error| error.to_string())?);
        }
        let code = code.as_ref().ok_or("no code")?;
        let there: Vec<(usize, &[u8])> = there.iter().map(|(n, cell)| (*n, &cell[..])).collect();
        let rebuilt = code.rebuild(&there, &wanted).map_err(|error| error.to_string())?;
        let Body::Blocks { blocks, .. } = &self.span.body else { return Err("no blocks".to_owned()) };
        let mut cells = BTreeMap::new();
        for (n, cell) in wanted.into_iter().zip(rebuilt) {
            // CL-1: the CRCs of the metadata have the last word.
            if Crc::of(&cell).value != blocks[n].cell_crcs[stripe] {
                return Err(format!(
                    "stripe {stripe}: what was rebuilt of block {n} is not what was written"
                ));
            }
            cells.insert(n, Bytes::from(cell));
        }
        Ok(cells)
    }
}

/// The next `length` bytes of the pieces; a copy only when they are not in one piece.
pub fn take_bytes(pieces: &mut VecDeque<Bytes>, length: usize) -> Bytes {
    while pieces.front().is_some_and(Bytes::is_empty) {
        pieces.pop_front();
    }
    if let Some(front) = pieces.front_mut()
        && front.len() >= length
    {
        return front.split_to(length);
    }
    let mut joined = BytesMut::with_capacity(length);
    while joined.len() < length {
        let Some(front) = pieces.front_mut() else { break };
        let step = front.len().min(length - joined.len());
        joined.extend_from_slice(&front[..step]);
        front.advance(step);
        if front.is_empty() {
            pieces.pop_front();
        }
    }
    joined.freeze()
}
