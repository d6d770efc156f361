//! Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 from values. Codes are chosen with the scale before it is rounded to half.
//!
//! Q4_0, Q5_0 and Q8_0 one block at a time: nothing is summed, so the compiler may take the values of a block in any
//! order. Comparisons are made on integers for the same reason. Q4_1 and Q5_1, which cost ggml the least, sixteen blocks at
//! a time: each gets its lane for the range, and for the codes the whole vector.
//!
//! Codes of a block whose scale is so small that its inverse overflows are zeros.
#![allow(clippy::inline_always)] // one copy per instruction set

use super::lanes::{Column, Lanes, SIDE_BY_SIDE};
use super::{blocks, put_half, put_nibbles, vectors};
use crate::float::f32_to_half;

const LEN: usize = 32;
/// 2^23: added to an integer below it, it leaves that integer in the low bits.
const TO_LOW_BITS: f32 = 8_388_608.0;

#[inline(always)]
pub(super) fn encode_q4_0(values: &[f32], out: &mut Vec<u8>) {
    for (x, block) in blocks::<LEN, 18>(values, out) {
        let (d, codes) = centred_codes(x, 16.0);
        put_half(d, &mut block[..2]);
        put_nibbles(&codes, &mut block[2..]);
    }
}

#[inline(always)]
pub(super) fn encode_q4_1<L: Lanes>(values: &[f32], out: &mut Vec<u8>) {
    encode_with_offset::<L, 20>(values, 15.0, out);
}

#[inline(always)]
pub(super) fn encode_q5_0(values: &[f32], out: &mut Vec<u8>) {
    for (x, block) in blocks::<LEN, 22>(values, out) {
        let (d, codes) = centred_codes(x, 32.0);
        put_half(d, &mut block[..2]);
        put_fifth_bits(&codes, &mut block[2..6]);
        put_nibbles(&codes, &mut block[6..]);
    }
}

#[inline(always)]
pub(super) fn encode_q5_1<L: Lanes>(values: &[f32], out: &mut Vec<u8>) {
    encode_with_offset::<L, 24>(values, 31.0, out);
}

#[inline(always)]
pub(super) fn encode_q8_0(values: &[f32], out: &mut Vec<u8>) {
    for (x, block) in blocks::<LEN, 34>(values, out) {
        let mut magnitude = 0;
        for v in x {
            magnitude = magnitude.max(v.abs().to_bits());
        }
        let d = f32::from_bits(magnitude) / 127.0;
        let inverse = inverse_or_zero(d);
        put_half(d, &mut block[..2]);
        for (code, v) in block[2..].iter_mut().zip(x) {
            // one and a half, so that negative integers keep their low bits too
            *code = ((v * inverse).round() + 1.5 * TO_LOW_BITS).to_bits() as u8;
        }
        if inverse.is_infinite() {
            block[2..].fill(0);
        }
    }
}

/// Codes `q` with `x ≈ d·(q − levels/2)`. The value of largest magnitude, sign kept, falls on the code 0, so the
/// range that has one step more is on its side.
#[inline(always)]
fn centred_codes(x: &[f32; LEN], levels: f32) -> (f32, [u8; LEN]) {
    let half = levels / 2.0;
    let d = largest_magnitude(x) / -half;
    let inverse = inverse_or_zero(d);
    let mut codes = [0; LEN];
    if inverse.is_finite() {
        for (code, v) in codes.iter_mut().zip(x) {
            *code = truncated(v * inverse + (half + 0.5), levels - 1.0);
        }
    }
    (d, codes)
}

/// Codes `q` with `x ≈ d·q + min`: d, min, the fifth bits where the block has room for them, and nibbles.
#[inline(always)]
fn encode_with_offset<L: Lanes, const BYTES: usize>(values: &[f32], max_code: f32, out: &mut Vec<u8>) {
    let blocks = values.as_chunks::<LEN>().0;
    let start = out.len();
    out.resize(start + blocks.len() * BYTES, 0);
    let encoded = out[start..].as_chunks_mut::<BYTES>().0;
    let nibbles = BYTES - LEN / 2;
    for (blocks, encoded) in blocks.chunks(SIDE_BY_SIDE).zip(encoded.chunks_mut(SIDE_BY_SIDE)) {
        let (min, max) = ranges::<L>(blocks);
        let (d, inverse) = scales::<L>(&min, &max, max_code);
        let (d_halves, min_halves) = (halves(&d), halves(&min));
        for (i, (x, block)) in blocks.iter().zip(encoded).enumerate() {
            block[..2].copy_from_slice(&d_halves[i]);
            block[2..4].copy_from_slice(&min_halves[i]);
            let (min, inverse) = (L::splat(min.0[i]), L::splat(inverse.0[i]));
            let (mut bytes, mut fifth_bits) = ([0; SIDE_BY_SIDE], 0);
            for at in (0..LEN / 2).step_by(L::LANES) {
                let mut low = offset_codes(L::load_values(&x[at..]), min, inverse, max_code);
                let mut high = offset_codes(L::load_values(&x[LEN / 2 + at..]), min, inverse, max_code);
                if nibbles == 8 {
                    let (low_fifth, high_fifth) =
                        (L::less(L::splat(15.0), low), L::less(L::splat(15.0), high));
                    fifth_bits |= L::bits(low_fifth) << at | L::bits(high_fifth) << (LEN / 2 + at);
                    low = L::select(low_fifth, low - L::splat(16.0), low);
                    high = L::select(high_fifth, high - L::splat(16.0), high);
                }
                (low + high * L::splat(16.0)).store_bytes(&mut bytes, at);
            }
            if nibbles == 8 {
                block[4..8].copy_from_slice(&fifth_bits.to_le_bytes());
            }
            block[nibbles..].copy_from_slice(&bytes);
        }
    }
}

#[inline(always)]
fn offset_codes<L: Lanes>(x: L, min: L, inverse: L, max_code: f32) -> L {
    // what is not a number becomes zero here
    let code = ((x - min) * inverse + L::splat(0.5)).trunc().max(L::splat(0.0));
    code.min(L::splat(max_code))
}

/// The smallest and the largest value of up to sixteen blocks. Of zeros, which may differ in their sign, the first is the
/// smallest.
#[inline(always)]
fn ranges<L: Lanes>(blocks: &[[f32; LEN]]) -> (Column, Column) {
    let (mut min, mut max) = (Column::ZERO, Column::ZERO);
    for at in vectors::<L>(blocks.len()) {
        let (mut lows, mut highs) = ([L::splat(0.0); SIDE_BY_SIDE], [L::splat(0.0); SIDE_BY_SIDE]);
        for ((low, high), block) in lows.iter_mut().zip(&mut highs).zip(&blocks[at..]).take(L::LANES) {
            (*low, *high) = (L::load_values(block), L::load_values(block));
            for from in (L::LANES..LEN).step_by(L::LANES) {
                let values = L::load_values(&block[from..]);
                (*low, *high) = (low.min(values), high.max(values));
            }
        }
        // Halving the vectors, as often as leads to one, ends with the blocks in their order.
        for halvings in 1..=L::LANES.ilog2() {
            let rows = L::LANES >> halvings;
            for i in 0..rows {
                let (a, b) = lows[i].interleave(lows[i + rows]);
                lows[i] = a.min(b);
                let (a, b) = highs[i].interleave(highs[i + rows]);
                highs[i] = a.max(b);
            }
        }
        lows[0].store(&mut min, at);
        highs[0].store(&mut max, at);
        if L::any(L::equal(lows[0], L::splat(0.0))) {
            let ranges = min.0.iter_mut().zip(&mut max.0).zip(blocks);
            for ((min, max), block) in ranges.filter(|((min, _), _)| **min == 0.0) {
                *min = block.iter().copied().find(|v| *v == 0.0).unwrap_or(0.0);
                *max = if *max == 0.0 { 0.0 } else { *max };
            }
        }
    }
    (min, max)
}

/// The steps between codes, and their inverses or zero.
#[inline(always)]
fn scales<L: Lanes>(min: &Column, max: &Column, max_code: f32) -> (Column, Column) {
    let (mut scales, mut inverses) = (Column::ZERO, Column::ZERO);
    for at in vectors::<L>(SIDE_BY_SIDE) {
        let d = (L::load(max, at) - L::load(min, at)) / L::splat(max_code);
        let inverse = L::splat(1.0) / d;
        let is_finite = L::less(inverse, L::splat(f32::INFINITY));
        d.store(&mut scales, at);
        L::select(is_finite, inverse, L::splat(0.0)).store(&mut inverses, at);
    }
    (scales, inverses)
}

#[inline(always)]
fn halves(values: &Column) -> [[u8; 2]; SIDE_BY_SIDE] {
    let mut halves = [[0; 2]; SIDE_BY_SIDE];
    for (half, v) in halves.iter_mut().zip(&values.0) {
        *half = f32_to_half(*v).to_le_bytes();
    }
    halves
}

/// The integer below or at a number that is not negative, but at most `max_code`; zero for what is not a number.
#[inline(always)]
fn truncated(v: f32, max_code: f32) -> u8 {
    let code = v.trunc() + TO_LOW_BITS;
    (if code > max_code + TO_LOW_BITS { max_code + TO_LOW_BITS } else { code }).to_bits() as u8
}

/// The value of largest magnitude with its sign; the first of equals.
#[inline(always)]
fn largest_magnitude(x: &[f32; LEN]) -> f32 {
    let (mut min, mut max) = (0, 0);
    for v in x {
        min = min.min(order(*v));
        max = max.max(order(*v));
    }
    let (negative, positive) = (value_at(min).abs(), value_at(max));
    if positive > negative {
        positive
    } else if positive < negative {
        -negative
    } else {
        let is_largest = |v: &&f32| v.abs().to_bits() == positive.to_bits();
        x.iter().find(is_largest).copied().filter(|v| *v != 0.0).unwrap_or(0.0)
    }
}

/// An integer that is the larger the larger the value is.
#[inline(always)]
fn order(v: f32) -> i32 {
    let bits = v.to_bits() as i32;
    bits ^ ((bits >> 31) & i32::MAX)
}

/// The value that [`order`] maps to `order`.
#[inline(always)]
fn value_at(order: i32) -> f32 {
    f32::from_bits((order ^ ((order >> 31) & i32::MAX)) as u32)
}

#[inline(always)]
fn inverse_or_zero(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Bit j is the fifth bit of code j.
#[inline(always)]
pub(super) fn put_fifth_bits(codes: &[u8; LEN], to: &mut [u8]) {
    for (byte, codes) in to.iter_mut().zip(codes.as_chunks::<8>().0) {
        // The product moves the fifth bit of byte j to bit 56 + j.
        let fifth = u64::from_le_bytes(*codes) >> 4 & 0x0101_0101_0101_0101;
        *byte = (fifth.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
    }
}
