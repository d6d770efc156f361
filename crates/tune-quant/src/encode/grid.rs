//! The grid of a stored row: the values that it can hold as long as its scales stay as they are.
//!
//! Every type but the floats and the codebooks stores `value = zero + step · code`, with a zero and a step of its own
//! for each block or sub-block; the codebooks store `value = step · table[code]`. What zero and step are is read off
//! the decoder, by decoding the row with all codes 0 and all codes 1, so that no layout of scales is written down twice.

use super::k_quants::{put_bit_pairs, put_nibble_pairs, put_six_bits, put_top_bits};
use super::legacy_quants::put_fifth_bits;
use super::put_nibbles;
use crate::BlockType;
use crate::codebook_quants::{E2M1_DOUBLED, NON_LINEAR};

/// The grid of a row.
#[derive(Clone, Debug)]
pub struct Grid {
    block_type: BlockType,
    /// The row; its codes do not matter.
    bytes: Vec<u8>,
    zero: Vec<f32>,
    step: Vec<f32>,
}

impl Grid {
    /// The grid of a row stored as `block_type`, or `None` for a type without codes: floats, and those that this crate
    /// does not encode.
    ///
    /// # Panics
    /// If `bytes` are not whole blocks.
    pub fn of(block_type: BlockType, bytes: &[u8]) -> Option<Self> {
        if !block_type.is_quantized() || !block_type.can_encode() {
            return None;
        }
        assert!(bytes.len().is_multiple_of(block_type.block_bytes()), "whole {} blocks", block_type.name());
        let len = bytes.len() / block_type.block_bytes() * block_type.block_len();
        let mut grid = Self { block_type, bytes: bytes.to_vec(), zero: vec![0.0; len], step: vec![0.0; len] };
        let decoded = |grid: &Self, code: u8| {
            let mut values = vec![0.0; len];
            block_type.decode(&grid.with_codes(&vec![code; len]), &mut values);
            values
        };
        match block_type {
            // the level 1
            BlockType::IQ4NL => grid.step = decoded(&grid, 8),
            BlockType::MXFP4 => grid.step = decoded(&grid, 1),
            _ => {
                let (zero, one) = (decoded(&grid, 0), decoded(&grid, 1));
                grid.step = one.iter().zip(&zero).map(|(one, zero)| one - zero).collect();
                grid.zero = zero;
            }
        }
        Some(grid)
    }

    /// Values of the row.
    pub fn len(&self) -> usize {
        self.zero.len()
    }

    /// Whether the row has no values.
    pub fn is_empty(&self) -> bool {
        self.zero.is_empty()
    }

    /// The code at column `column` whose value is nearest to `value`, and that value.
    #[inline]
    pub fn nearest(&self, column: usize, value: f32) -> (u8, f32) {
        let (zero, step) = (self.zero[column], self.step[column]);
        if step == 0.0 {
            return (0, zero);
        }
        match self.block_type {
            BlockType::IQ4NL => nearest_level(&NON_LINEAR, step, value),
            BlockType::MXFP4 => nearest_level(&E2M1_DOUBLED, step, value),
            _ => {
                let code = ((value - zero) / step).round().clamp(0.0, self.max_code());
                (code as u8, zero + step * code)
            }
        }
    }

    /// The row with these codes, one a value.
    ///
    /// # Panics
    /// If there are not as many codes as values.
    pub fn with_codes(&self, codes: &[u8]) -> Vec<u8> {
        assert_eq!(codes.len(), self.len(), "codes of a row");
        let mut bytes = self.bytes.clone();
        let blocks = bytes.chunks_exact_mut(self.block_type.block_bytes());
        for (block, codes) in blocks.zip(codes.chunks_exact(self.block_type.block_len())) {
            put_codes(self.block_type, codes, block);
        }
        bytes
    }

    fn max_code(&self) -> f32 {
        match self.block_type {
            BlockType::Q2K => 3.0,
            BlockType::Q3K => 7.0,
            BlockType::Q5_0 | BlockType::Q5_1 | BlockType::Q5K => 31.0,
            BlockType::Q6K => 63.0,
            // −127 to 127: encoders leave −128 out
            BlockType::Q8_0 => 254.0,
            _ => 15.0,
        }
    }
}

fn nearest_level(table: &[f32; 16], step: f32, value: f32) -> (u8, f32) {
    let wanted = value / step;
    let mut best = 0;
    for code in 1..16 {
        if (table[code] - wanted).abs() < (table[best] - wanted).abs() {
            best = code;
        }
    }
    (best as u8, step * table[best])
}

/// Puts the codes of one block in their places and leaves its scales as they are.
fn put_codes(block_type: BlockType, codes: &[u8], block: &mut [u8]) {
    match block_type {
        BlockType::MXFP4 => put_nibbles(of_32(codes), &mut block[1..]),
        BlockType::Q4_0 | BlockType::IQ4NL => put_nibbles(of_32(codes), &mut block[2..]),
        BlockType::Q4_1 => put_nibbles(of_32(codes), &mut block[4..]),
        BlockType::Q5_0 => {
            put_fifth_bits(of_32(codes), &mut block[2..6]);
            put_nibbles(of_32(codes), &mut block[6..]);
        }
        BlockType::Q5_1 => {
            put_fifth_bits(of_32(codes), &mut block[4..8]);
            put_nibbles(of_32(codes), &mut block[8..]);
        }
        BlockType::Q8_0 => {
            for (byte, code) in block[2..].iter_mut().zip(codes) {
                *byte = code.wrapping_sub(127);
            }
        }
        BlockType::Q2K => put_bit_pairs(of_256(codes), &mut block[16..80]),
        BlockType::Q3K => {
            put_top_bits(of_256(codes), 2, &mut block[..32]);
            put_bit_pairs(of_256(codes), &mut block[32..96]);
        }
        BlockType::Q4K => put_nibble_pairs(of_256(codes), &mut block[16..]),
        BlockType::Q5K => {
            put_top_bits(of_256(codes), 4, &mut block[16..48]);
            put_nibble_pairs(of_256(codes), &mut block[48..]);
        }
        BlockType::Q6K => put_six_bits(of_256(codes), &mut block[..192]),
        BlockType::F32 | BlockType::F16 | BlockType::BF16 | BlockType::IQ4XS => {
            unreachable!("there is no grid of {}", block_type.name())
        }
    }
}

fn of_32(codes: &[u8]) -> &[u8; 32] {
    codes.first_chunk().expect("a block of 32 values")
}

fn of_256(codes: &[u8]) -> &[u8; 256] {
    codes.first_chunk().expect("a block of 256 values")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Vec<f32> {
        (0..512).map(|i: i32| ((i * 37 % 101) as f32).sin() * 0.1 * (1.0 + (i / 32) as f32)).collect()
    }

    fn with_a_grid() -> impl Iterator<Item = BlockType> {
        BlockType::ALL.into_iter().filter(|t| t.is_quantized() && t.can_encode())
    }

    #[test]
    fn the_nearest_codes_of_a_rows_own_values_are_its_codes() {
        for block_type in with_a_grid() {
            let (mut bytes, mut values) = (Vec::new(), vec![0.0; 512]);
            block_type.encode(&row(), &mut bytes);
            block_type.decode(&bytes, &mut values);
            let grid = Grid::of(block_type, &bytes).expect("a grid");
            let codes: Vec<u8> = (0..512).map(|j| grid.nearest(j, values[j]).0).collect();
            let mut again = vec![0.0; 512];
            block_type.decode(&grid.with_codes(&codes), &mut again);
            for (again, value) in again.iter().zip(&values) {
                assert!((again - value).abs() <= 1e-6, "{}: {again} for {value}", block_type.name());
            }
        }
    }

    #[test]
    fn the_value_that_is_told_is_the_value_that_is_stored_and_no_other_is_nearer() {
        for block_type in with_a_grid() {
            let (mut bytes, wanted) = (Vec::new(), row());
            block_type.encode(&wanted, &mut bytes);
            let grid = Grid::of(block_type, &bytes).expect("a grid");
            let (codes, told): (Vec<u8>, Vec<f32>) = (0..512).map(|j| grid.nearest(j, wanted[j])).unzip();
            let [mut stored, mut encoded] = [vec![0.0; 512], vec![0.0; 512]];
            block_type.decode(&grid.with_codes(&codes), &mut stored);
            block_type.decode(&bytes, &mut encoded);
            for j in 0..512 {
                assert!((stored[j] - told[j]).abs() <= 1e-6, "{} {j}", block_type.name());
                let (ours, theirs) = ((stored[j] - wanted[j]).abs(), (encoded[j] - wanted[j]).abs());
                assert!(ours <= theirs + 1e-6, "{} {j}: {ours} from it, {theirs}", block_type.name());
            }
        }
    }

    #[test]
    fn floats_have_no_grid() {
        assert!(Grid::of(BlockType::F16, &[0; 64]).is_none());
        assert!(Grid::of(BlockType::IQ4XS, &[0; 136]).is_none());
    }
}
