//! Values to stored blocks, byte for byte as GGUF's reference quantiser without an importance matrix.
//!
//! | file | what is in it |
//! |------|---------------|
//! | `legacy_quants.rs` | Q4_0 Q4_1 Q5_0 Q5_1 Q8_0: scale and codes in one pass |
//! | `k_quants.rs` | Q2_K to Q6_K: sub-blocks are searched, their scales quantised, the codes chosen again |
//! | `codebook_quants.rs` | IQ4_NL and MXFP4 |
//! | `grid.rs` | codes alone, for scales that stay as they are |
//! | `searches.rs` | the searches for scales |
//! | `lanes.rs`, `lanes_x86.rs` | vectors in which each lane is a block of its own |
//!
//! Which reference: x86-64 builds of ggml compile this code for the oldest processor of the family, which has no fused
//! multiply-add, whatever the rest is compiled for. Builds for other families may contract a product and a sum and
//! then differ in the last bit of a sum, hence now and then in a code.
#![allow(clippy::inline_always)] // one copy per instruction set

mod codebook_quants;
mod grid;
mod k_quants;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod lanes_x86;
mod legacy_quants;
mod searches;

pub use grid::Grid;

use crate::{BlockType, float};
use lanes::{Column, Lanes, Portable, SIDE_BY_SIDE};
use searches::Columns;

/// Encodes `values`, a whole number of blocks, into `out`. All types but IQ4_XS.
#[allow(unsafe_code)]
pub(crate) fn encode(block_type: BlockType, values: &[f32], out: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        if std::is_x86_feature_detected!("avx512f") && std::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the features that the function enables.
            return unsafe { encode_avx512(block_type, values, out) };
        }
        if std::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has the feature that the function enables.
            return unsafe { encode_avx2(block_type, values, out) };
        }
    }
    encode_with::<Portable>(block_type, values, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx2")]
fn encode_avx512(block_type: BlockType, values: &[f32], out: &mut [u8]) {
    encode_with::<lanes_x86::Avx512>(block_type, values, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn encode_avx2(block_type: BlockType, values: &[f32], out: &mut [u8]) {
    encode_with::<lanes_x86::Avx2>(block_type, values, out);
}

#[inline(always)]
fn encode_with<L: Lanes>(block_type: BlockType, values: &[f32], out: &mut [u8]) {
    match block_type {
        BlockType::F32 => float::encode_f32(values, out),
        BlockType::F16 => float::encode_f16(values, out),
        BlockType::BF16 => float::encode_bf16(values, out),
        BlockType::Q4_0 => legacy_quants::encode_q4_0::<L>(values, out),
        BlockType::Q4_1 => legacy_quants::encode_q4_1::<L>(values, out),
        BlockType::Q5_0 => legacy_quants::encode_q5_0::<L>(values, out),
        BlockType::Q5_1 => legacy_quants::encode_q5_1::<L>(values, out),
        BlockType::Q8_0 => legacy_quants::encode_q8_0::<L>(values, out),
        BlockType::Q2K => k_quants::encode_q2_k::<L>(values, out),
        BlockType::Q3K => k_quants::encode_q3_k::<L>(values, out),
        BlockType::Q4K => k_quants::encode_q4_k::<L>(values, out),
        BlockType::Q5K => k_quants::encode_q5_k::<L>(values, out),
        BlockType::Q6K => k_quants::encode_q6_k::<L>(values, out),
        BlockType::IQ4NL => codebook_quants::encode_iq4_nl::<L>(values, out),
        BlockType::MXFP4 => codebook_quants::encode_mxfp4::<L>(values, out),
        BlockType::IQ4XS => panic!("no encoder for {}; callers ask can_encode() first", block_type.name()),
    }
}

/// Blocks of values, each with the place for its bytes.
#[inline(always)]
fn blocks<'a, const LEN: usize, const BYTES: usize>(
    values: &'a [f32],
    out: &'a mut [u8],
) -> impl Iterator<Item = (&'a [f32; LEN], &'a mut [u8; BYTES])> {
    values.as_chunks::<LEN>().0.iter().zip(out.as_chunks_mut::<BYTES>().0)
}

/// Up to sixteen blocks of `LEN` values, side by side; those that `values` does not fill are zero.
#[inline(always)]
fn columns<L: Lanes, const LEN: usize>(values: &[f32]) -> Columns<LEN> {
    let blocks = values.as_chunks::<LEN>().0;
    let mut columns = [Column::ZERO; LEN];
    for at in vectors::<L>(blocks.len()) {
        for start in (0..LEN).step_by(L::LANES) {
            let mut tile = [L::splat(0.0); SIDE_BY_SIDE];
            for (row, block) in tile.iter_mut().zip(&blocks[at..]).take(L::LANES) {
                *row = L::load_values(&block[start..]);
            }
            // Shuffling the rows like a deck of cards, as often as halving leads to one, swaps rows and columns.
            for _ in 0..L::LANES.ilog2() {
                let rows = tile;
                for i in 0..L::LANES / 2 {
                    (tile[2 * i], tile[2 * i + 1]) = rows[i].interleave(rows[i + L::LANES / 2]);
                }
            }
            for (row, column) in tile.iter().zip(&mut columns[start..]).take(L::LANES) {
                row.store(column, at);
            }
        }
    }
    columns
}

/// One byte a value, back in the order of the values.
#[inline(always)]
fn in_order<const LEN: usize, const TOTAL: usize>(columns: &[[u8; SIDE_BY_SIDE]; LEN]) -> [u8; TOTAL] {
    let mut values = [0; TOTAL];
    for (lane, block) in values.as_chunks_mut::<LEN>().0.iter_mut().enumerate() {
        for (value, column) in block.iter_mut().zip(columns) {
            *value = column[lane];
        }
    }
    values
}

/// The first lanes of the vectors that hold `blocks` blocks side by side.
#[inline(always)]
fn vectors<L: Lanes>(blocks: usize) -> impl Iterator<Item = usize> {
    (0..blocks).step_by(L::LANES)
}

#[inline(always)]
fn put_half(value: f32, to: &mut [u8]) {
    to.copy_from_slice(&float::f32_to_half(value).to_le_bytes());
}

/// Code j in the low nibble of byte j, code j + 16 in its high one.
#[inline(always)]
fn put_nibbles(codes: &[u8; 32], to: &mut [u8]) {
    for (j, byte) in to.iter_mut().enumerate() {
        *byte = codes[j] & 15 | codes[16 + j] << 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A digest decides about the vectors this processor chooses; the others must agree with them.
    #[test]
    fn every_instruction_set_writes_the_same_bytes() {
        let mut state = 1_u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        // five super-blocks of ordinary values, then sparse, tiny, huge and one-sided ones
        let mut values: Vec<f32> = (0..2560).map(|_| random() * random() * random()).collect();
        for (i, value) in values.iter_mut().enumerate().skip(1280) {
            *value *= match i / 256 {
                5 => f32::from(u8::from(i % 7 == 0)),
                6 => 1e-38,
                7 => 1e30,
                8 => 1.0 / *value * (1.0 + value.abs()),
                _ => [1.0, 1e-20, 1e-6, 1e4][i % 4],
            };
        }
        // and what any bits say, as long as it is a number
        values.extend((0..2560).map(|_| f32::from_bits(random().to_bits().wrapping_mul(0x9E37_79B1))));
        values.iter_mut().filter(|v| !v.is_finite()).for_each(|v| *v = 0.0);
        // zeros of both signs, alone, above nothing, and below something
        values.extend((0..2560).map(|i| {
            let zero: f32 = if random() < 0.0 { -0.0 } else { 0.0 };
            [zero, zero.copysign(random()), f32::max(random(), zero), -f32::max(random(), zero)][i / 32 % 4]
        }));
        for block_type in BlockType::ALL.into_iter().filter(|t| t.can_encode()) {
            let len = block_type.row_bytes(values.len()).expect("whole blocks");
            // whatever was there before
            let (mut want, mut got) = (vec![0xA5; len], vec![0x5A; len]);
            encode_with::<Portable>(block_type, &values, &mut want);
            encode(block_type, &values, &mut got);
            assert_eq!(got, want, "{}", block_type.name());
            #[cfg(target_arch = "x86_64")]
            if std::is_x86_feature_detected!("avx2") {
                got.fill(0xFF);
                // SAFETY: the processor has the feature that the function enables.
                #[allow(unsafe_code)]
                unsafe {
                    encode_avx2(block_type, &values, &mut got);
                }
                assert_eq!(got, want, "{} in AVX2", block_type.name());
            }
        }
    }
}
