//! Reed–Solomon over GF(2^8), the code of the `reed-solomon-erasure` crate (Backblaze's matrix).
//!
//! Encoding is the crate's. Rebuilding is done here on its arithmetic: the crate wants every shard
//! mutable, which would copy all the cells that are there to make the one that is not.

use eggs_proto::limits::{DATA_BLOCKS_MAX, PARITY_BLOCKS_MAX};
use reed_solomon_erasure::galois_8::{self, ReedSolomon};

/// Why cells cannot be computed; always a caller's mistake or a layout that was not checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodeError {
    #[error("({0}, {1}) blocks cannot be coded")]
    Parameters(usize, usize),
    #[error("cells of different lengths, too few of them, or indexes that cannot be")]
    Cells,
}

/// A code of `data` + `parity` cells; `data` of any of them give the others.
#[derive(Debug)]
pub struct Code {
    data: usize,
    parity: usize,
    codec: ReedSolomon,
    /// Row p: what parity cell p takes of each data cell.
    rows: Vec<Vec<u8>>,
}

impl Code {
    /// `data` and `parity` of at least 1.
    pub fn new(data: usize, parity: usize) -> Result<Code, CodeError> {
        let wrong = CodeError::Parameters(data, parity);
        if data > DATA_BLOCKS_MAX as usize || parity > PARITY_BLOCKS_MAX as usize {
            return Err(wrong);
        }
        let codec = ReedSolomon::new(data, parity).map_err(|_| wrong)?;
        // Encoding the unit vectors gives the matrix's columns.
        let mut rows = vec![vec![0; data]; parity];
        for column in 0..data {
            let unit: Vec<[u8; 1]> = (0..data).map(|n| [u8::from(n == column)]).collect();
            let mut image = vec![[0u8; 1]; parity];
            codec.encode_sep(&unit, &mut image).map_err(|_| wrong)?;
            for (row, [value]) in rows.iter_mut().zip(image) {
                row[column] = value;
            }
        }
        Ok(Code { data, parity, codec, rows })
    }

    /// Fills the parity cells of one stripe.
    pub fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]) -> Result<(), CodeError> {
        self.codec.encode_sep(data, parity).map_err(|_| CodeError::Cells)
    }

    /// Computes the cells `wanted`, of data or parity, from `data` cells that are there, given with their indexes.
    pub fn rebuild(&self, there: &[(usize, &[u8])], wanted: &[usize]) -> Result<Vec<Vec<u8>>, CodeError> {
        let length = there.first().map_or(0, |(_, cell)| cell.len());
        let sound = there.len() == self.data
            && there.iter().all(|(n, cell)| *n < self.data + self.parity && cell.len() == length)
            && wanted.iter().all(|&n| n < self.data + self.parity);
        if !sound {
            return Err(CodeError::Cells);
        }
        let matrix = there.iter().map(|&(n, _)| self.row(n)).collect();
        let inverse = invert(matrix).ok_or(CodeError::Cells)?;
        let factors = |cell: usize| match cell.checked_sub(self.data) {
            Some(parity) => times(&self.rows[parity], &inverse),
            None => inverse[cell].clone(),
        };
        Ok(wanted.iter().map(|&cell| combine(&factors(cell), there, length)).collect())
    }

    fn row(&self, cell: usize) -> Vec<u8> {
        match cell.checked_sub(self.data) {
            Some(parity) => self.rows[parity].clone(),
            None => (0..self.data).map(|n| u8::from(n == cell)).collect(),
        }
    }
}

/// A row times a matrix.
fn times(row: &[u8], matrix: &[Vec<u8>]) -> Vec<u8> {
    let column = |n: usize| row.iter().zip(matrix).fold(0, |sum, (&a, line)| sum ^ galois_8::mul(a, line[n]));
    (0..row.len()).map(column).collect()
}

/// The sum of the cells, each times its factor. In pieces that stay in the nearest cache.
fn combine(factors: &[u8], cells: &[(usize, &[u8])], length: usize) -> Vec<u8> {
    const PIECE: usize = 16 << 10;
    let mut sum = vec![0; length];
    for (n, piece) in sum.chunks_mut(PIECE).enumerate() {
        let range = n * PIECE..n * PIECE + piece.len();
        for (&factor, (_, cell)) in factors.iter().zip(cells) {
            if factor != 0 {
                galois_8::mul_slice_xor(factor, &cell[range.clone()], piece);
            }
        }
    }
    sum
}

/// Gauss–Jordan; `None` when the matrix has no inverse (a cell given twice).
fn invert(mut matrix: Vec<Vec<u8>>) -> Option<Vec<Vec<u8>>> {
    let size = matrix.len();
    for (n, row) in matrix.iter_mut().enumerate() {
        row.extend((0..size).map(|column| u8::from(column == n)));
    }
    for column in 0..size {
        let pivot = (column..size).find(|&row| matrix[row][column] != 0)?;
        matrix.swap(column, pivot);
        let factor = galois_8::div(1, matrix[column][column]);
        for value in &mut matrix[column] {
            *value = galois_8::mul(*value, factor);
        }
        let pivot_row = matrix[column].clone();
        for (n, row) in matrix.iter_mut().enumerate() {
            let factor = row[column];
            if n != column && factor != 0 {
                for (value, pivot) in row.iter_mut().zip(&pivot_row) {
                    *value ^= galois_8::mul(factor, *pivot);
                }
            }
        }
    }
    Some(matrix.into_iter().map(|mut row| row.split_off(size)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wrong_arguments_are_errors() {
        assert!(Code::new(0, 1).is_err());
        assert!(Code::new(17, 1).is_err());
        assert!(Code::new(4, 17).is_err());
        let code = Code::new(2, 1).unwrap();
        assert_eq!(code.rebuild(&[(0, b"a")], &[1]), Err(CodeError::Cells));
        assert_eq!(code.rebuild(&[(0, b"a"), (0, b"a")], &[1]), Err(CodeError::Cells));
        assert_eq!(code.rebuild(&[(0, b"a"), (3, b"a")], &[1]), Err(CodeError::Cells));
        assert_eq!(code.rebuild(&[(0, b"a"), (2, b"aa")], &[1]), Err(CodeError::Cells));
    }

    #[test]
    fn golden_parity() {
        // Stored on disks for ever: another matrix would lose every file.
        let code = Code::new(4, 2).unwrap();
        let mut parity = [[0u8; 2]; 2];
        let [a, b] = &mut parity;
        code.encode(&[&[1, 0], &[2, 0], &[3, 0], &[4, 255]], &mut [a, b]).unwrap();
        assert_eq!(parity, GOLDEN);
    }
    const GOLDEN: [[u8; 2]; 2] = [[69, 144], [94, 168]];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// CL-2 for one stripe: any `data` cells give the others.
        #[test]
        fn any_cells_give_the_others(data in 1..=16usize, parity in 1..=16usize, length in 1..40_000usize,
                                     seed in any::<u64>()) {
            let mut state = seed | 1;
            let mut random = || { state ^= state << 13; state ^= state >> 7; state ^= state << 17; state };
            let cells: Vec<Vec<u8>> =
                (0..data).map(|_| (0..length).map(|_| random() as u8).collect()).collect();
            let mut coded = vec![vec![0u8; length]; parity];
            let code = Code::new(data, parity).unwrap();
            let slices: Vec<&[u8]> = cells.iter().map(Vec::as_slice).collect();
            code.encode(&slices, &mut coded.iter_mut().map(Vec::as_mut_slice).collect::<Vec<_>>()).unwrap();
            let mut left: Vec<(usize, &[u8])> =
                slices.iter().copied().chain(coded.iter().map(Vec::as_slice)).enumerate().collect();
            while left.len() > data {
                left.swap_remove(random() as usize % left.len());
            }
            let wanted: Vec<usize> = (0..data + parity).collect();
            let all: Vec<Vec<u8>> = cells.iter().chain(&coded).cloned().collect();
            prop_assert_eq!(code.rebuild(&left, &wanted).unwrap(), all);
        }
    }
}
