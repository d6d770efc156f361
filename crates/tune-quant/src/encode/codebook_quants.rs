//! IQ4_NL and MXFP4 from values, sixteen blocks of 32 side by side.
#![allow(clippy::inline_always)] // one copy per instruction set

use super::lanes::{Column, Lanes, Levels, SIDE_BY_SIDE};
use super::legacy_quants::magnitudes;
use super::searches::{Columns, TINY, largest_magnitude};
use super::{blocks, columns, in_order, put_half, put_nibbles, vectors};
use crate::codebook_quants::NON_LINEAR;

const LEN: usize = 32;
/// Values of sixteen blocks.
const TOTAL: usize = SIDE_BY_SIDE * LEN;

static LEVELS: Levels = Levels::new(NON_LINEAR);

/// The scale is searched: trial t maps the value of largest magnitude to t more than the first level, and the fit with
/// the least error, values weighted by their squares, wins. Codes are chosen with the scale before it is rounded.
#[inline(always)]
pub(super) fn encode_iq4_nl<L: Lanes>(values: &[f32], out: &mut [u8]) {
    for (values, out) in values.chunks(TOTAL).zip(out.chunks_mut(SIDE_BY_SIDE * 18)) {
        let x = columns::<L, LEN>(values);
        let count = values.len() / LEN;
        let mut scales = Column::ZERO;
        let mut bytes = [[0; SIDE_BY_SIDE]; LEN];
        for at in vectors::<L>(count) {
            let zero = L::splat(0.0);
            let first = L::splat(NON_LINEAR[0]);
            let largest = largest_magnitude::<L>(&x, at);
            let inverse = L::splat(1.0) / ((zero - largest) / first);
            let (sum_qx, sum_qq) = level_fit(&x, at, inverse);
            let mut scale = sum_qx / sum_qq;
            let mut best_gain = scale * sum_qx;
            for t in -7..=7_i8 {
                let inverse = (L::splat(f32::from(t)) + first) / largest;
                let (sum_qx, sum_qq) = level_fit(&x, at, inverse);
                let better = L::both(zero.less(sum_qq), (best_gain * sum_qq).less(sum_qx * sum_qx));
                scale = L::select(better, sum_qx / sum_qq, scale);
                best_gain = L::select(better, scale * sum_qx, best_gain);
            }
            let scale = L::select(largest.abs().less(L::splat(TINY)), zero, scale);
            let inverse = L::select(scale.equal(zero), zero, L::splat(1.0) / scale);
            for (x, byte) in x.iter().zip(&mut bytes) {
                let (rank, _) = (inverse * L::load(x, at)).nearest_level(&LEVELS);
                rank.store_bytes(byte, at);
            }
            scale.store(&mut scales, at);
        }
        let q: [u8; TOTAL] = in_order(&bytes);
        for (lane, (_, block)) in blocks::<LEN, 18>(values, out).enumerate() {
            put_half(scales.0[lane], &mut block[..2]);
            put_nibbles(&q.as_chunks().0[lane], &mut block[2..]);
        }
    }
}

/// Σ x²·level·x and Σ x²·level², for the levels nearest to `inverse·x`.
#[inline(always)]
fn level_fit<L: Lanes>(x: &Columns<LEN>, at: usize, inverse: L) -> (L, L) {
    let (mut sum_qx, mut sum_qq) = (L::splat(0.0), L::splat(0.0));
    for x in x {
        let x = L::load(x, at);
        let (_, level) = (inverse * x).nearest_level(&LEVELS);
        let weighted = x * x * level;
        sum_qx = sum_qx + weighted * x;
        sum_qq = sum_qq + weighted * level;
    }
    (sum_qx, sum_qq)
}

/// The exponent is that of the largest magnitude; a code's magnitude is the number of midpoints between the levels
/// that the value exceeds, so that a value on a midpoint goes to the smaller level. Nothing is summed: a block has a lane
/// while exponents are found, and whole vectors for its codes.
#[inline(always)]
pub(super) fn encode_mxfp4<L: Lanes>(values: &[f32], out: &mut [u8]) {
    const MIDPOINTS: [f32; 7] = [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0];
    let blocks = values.as_chunks::<LEN>().0;
    let encoded = out.as_chunks_mut::<17>().0;
    for (blocks, encoded) in blocks.chunks(SIDE_BY_SIDE).zip(encoded.chunks_mut(SIDE_BY_SIDE)) {
        let mut largest = Column::ZERO;
        for at in vectors::<L>(blocks.len()) {
            magnitudes::<L>(&blocks[at..]).store(&mut largest, at);
        }
        for ((x, block), largest) in blocks.iter().zip(encoded).zip(largest.0) {
            let (exponent, codes) = block.split_at_mut(1);
            exponent[0] = mxfp4_exponent(largest);
            let scale = L::splat(half_power_of_two(exponent[0]));
            let mut midpoints = [scale; 7];
            for (scaled, midpoint) in midpoints.iter_mut().zip(MIDPOINTS) {
                *scaled = L::splat(midpoint) * scale;
            }
            let mut bytes = [0; SIDE_BY_SIDE];
            for at in vectors::<L>(LEN / 2) {
                let low = mxfp4_codes(L::load_values(&x[at..]), &midpoints);
                let high = mxfp4_codes(L::load_values(&x[LEN / 2 + at..]), &midpoints);
                L::store_nibbles(low, high, &mut bytes, at);
            }
            codes.copy_from_slice(&bytes);
        }
    }
}

/// How many midpoints each magnitude exceeds; 8 more for what is below zero and does not become zero.
#[inline(always)]
fn mxfp4_codes<L: Lanes>(x: L, midpoints: &[L; 7]) -> L {
    let (zero, one) = (L::splat(0.0), L::splat(1.0));
    let mut code = zero;
    for midpoint in midpoints {
        code = code + L::select(midpoint.less(x.abs()), one, zero);
    }
    let is_negative = L::both(x.less(zero), zero.less(code));
    code + L::select(is_negative, L::splat(8.0), zero)
}

/// `floor(log2 magnitude) − 2 + 127` in eight bits, where the logarithm is rounded to a single first: just below a
/// power of two it can reach the next integer.
#[inline(always)]
fn mxfp4_exponent(magnitude: f32) -> u8 {
    // 2^-16 below a power of two and lower no rounding reaches it
    const CLOSE_BELOW: u32 = 0x007F_FF00;
    let (exponent, mantissa) = (magnitude.to_bits() >> 23, magnitude.to_bits() & 0x007F_FFFF);
    if magnitude > 0.0 && exponent > 0 && mantissa < CLOSE_BELOW {
        (exponent as i32 - 2) as u8
    } else if magnitude > 0.0 {
        let log2 = f64::from(magnitude).log2() as f32;
        (log2.floor() as i32 - 2 + 127) as u8
    } else {
        0
    }
}

/// `2^(exponent − 128)`: half the scale of the block, as the levels are twice those of E2M1.
#[inline(always)]
fn half_power_of_two(exponent: u8) -> f32 {
    // 2^-128 and 2^-127 are subnormal.
    f32::from_bits(if exponent < 2 { 0x0020_0000 << exponent } else { u32::from(exponent - 1) << 23 })
}
