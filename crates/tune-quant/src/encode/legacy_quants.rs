//! Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 from values. Codes are chosen with the scale before it is rounded to half.
//!
//! Sixteen blocks at a time: each has its lane while scales are found, and whole vectors for its codes. Nothing is
//! summed, so the values of a block may be taken in any order.
//!
//! Codes of a block whose scale is so small that its inverse overflows are zeros.
#![allow(clippy::inline_always)] // one copy per instruction set

use super::lanes::{Column, Lanes, SIDE_BY_SIDE};
use super::vectors;
use crate::float::f32_to_half;

const LEN: usize = 32;
/// The largest number below 0.5: added to a magnitude, it leaves one that is truncated to the nearest integer, halves
/// to the larger.
const BELOW_HALF: f32 = 0.5_f32.next_down();

#[inline(always)]
pub(super) fn encode_q4_0<L: Lanes>(values: &[f32], out: &mut [u8]) {
    encode_nibbles::<L, 18, true>(values, 15.0, out);
}

#[inline(always)]
pub(super) fn encode_q4_1<L: Lanes>(values: &[f32], out: &mut [u8]) {
    encode_nibbles::<L, 20, false>(values, 15.0, out);
}

#[inline(always)]
pub(super) fn encode_q5_0<L: Lanes>(values: &[f32], out: &mut [u8]) {
    encode_nibbles::<L, 22, true>(values, 31.0, out);
}

#[inline(always)]
pub(super) fn encode_q5_1<L: Lanes>(values: &[f32], out: &mut [u8]) {
    encode_nibbles::<L, 24, false>(values, 31.0, out);
}

/// Codes `q` with `x ≈ d·q`, from −127 to 127, halves away from zero.
#[inline(always)]
pub(super) fn encode_q8_0<L: Lanes>(values: &[f32], out: &mut [u8]) {
    let blocks = values.as_chunks::<LEN>().0;
    let encoded = out.as_chunks_mut::<34>().0;
    for (blocks, encoded) in blocks.chunks(SIDE_BY_SIDE).zip(encoded.chunks_mut(SIDE_BY_SIDE)) {
        let (mut d, mut inverse) = (Column::ZERO, Column::ZERO);
        for at in vectors::<L>(blocks.len()) {
            let scale = magnitudes::<L>(&blocks[at..]) / L::splat(127.0);
            scale.store(&mut d, at);
            inverse_or_zero(scale).0.store(&mut inverse, at);
        }
        let halves = halves(&d);
        for (i, (x, block)) in blocks.iter().zip(encoded).enumerate() {
            block[..2].copy_from_slice(&halves[i]);
            let inverse = L::splat(inverse.0[i]);
            for (x, codes) in
                x.as_chunks::<SIDE_BY_SIDE>().0.iter().zip(block[2..].as_chunks_mut::<SIDE_BY_SIDE>().0)
            {
                for at in vectors::<L>(SIDE_BY_SIDE) {
                    let v = L::load_values(&x[at..at + L::LANES]) * inverse;
                    (v + L::splat(BELOW_HALF).with_sign_of(v)).store_bytes(codes, at);
                }
            }
        }
    }
}

/// Codes `q` with `x ≈ d·q + min`, or `x ≈ d·(q − half)` where the type is `CENTRED`: d, min where there is one, the fifth
/// bits where the block has room for them, and nibbles.
#[inline(always)]
fn encode_nibbles<L: Lanes, const BYTES: usize, const CENTRED: bool>(
    values: &[f32],
    max_code: f32,
    out: &mut [u8],
) {
    let blocks = values.as_chunks::<LEN>().0;
    let encoded = out.as_chunks_mut::<BYTES>().0;
    let scales = if CENTRED { 2 } else { 4 };
    let nibbles = BYTES - LEN / 2;
    for (blocks, encoded) in blocks.chunks(SIDE_BY_SIDE).zip(encoded.chunks_mut(SIDE_BY_SIDE)) {
        let fit =
            if CENTRED { Fit::centred::<L>(blocks, max_code) } else { Fit::offset::<L>(blocks, max_code) };
        let (d_halves, min_halves) = (halves(&fit.d), halves(&fit.min));
        for (i, (x, block)) in blocks.iter().zip(encoded).enumerate() {
            block[..2].copy_from_slice(&d_halves[i]);
            if !CENTRED {
                block[2..4].copy_from_slice(&min_halves[i]);
            }
            let [min, inverse, bias] =
                [&fit.min, &fit.inverse, &fit.bias].map(|of_block| L::splat(of_block.0[i]));
            let (mut bytes, mut fifth_bits) = ([0; SIDE_BY_SIDE], 0);
            for at in vectors::<L>(LEN / 2) {
                let (mut low, mut high) = (L::load_values(&x[at..]), L::load_values(&x[LEN / 2 + at..]));
                if !CENTRED {
                    (low, high) = (low - min, high - min);
                }
                low = clamp(low * inverse + bias, max_code);
                high = clamp(high * inverse + bias, max_code);
                if nibbles > scales {
                    let below = L::splat(16.0_f32.next_down());
                    fifth_bits |=
                        L::bits(below.less(low)) << at | L::bits(below.less(high)) << (LEN / 2 + at);
                }
                L::store_nibbles(low, high, &mut bytes, at);
            }
            if nibbles > scales {
                block[scales..nibbles].copy_from_slice(&fifth_bits.to_le_bytes());
            }
            block[nibbles..].copy_from_slice(&bytes);
        }
    }
}

/// How the values of up to sixteen blocks become codes: `(x − min)·inverse + bias`, truncated.
struct Fit {
    /// As stored.
    d: Column,
    /// As stored, where it is.
    min: Column,
    inverse: Column,
    bias: Column,
}

impl Fit {
    /// Codes from the smallest value to the largest.
    #[inline(always)]
    fn offset<L: Lanes>(blocks: &[[f32; LEN]], max_code: f32) -> Self {
        let (min, max) = ranges::<L>(blocks);
        let mut fit = Self { d: Column::ZERO, min, inverse: Column::ZERO, bias: Column([0.5; SIDE_BY_SIDE]) };
        for at in vectors::<L>(SIDE_BY_SIDE) {
            let d = (L::load(&max, at) - L::load(&min, at)) / L::splat(max_code);
            d.store(&mut fit.d, at);
            inverse_or_zero(d).0.store(&mut fit.inverse, at);
        }
        fit
    }

    /// The value of largest magnitude, sign kept, falls on the code 0, so the range that has one step more is on its side.
    #[inline(always)]
    fn centred<L: Lanes>(blocks: &[[f32; LEN]], max_code: f32) -> Self {
        let half = f32::midpoint(max_code, 1.0);
        let largest = largest_magnitudes::<L>(blocks);
        let mut fit = Self { d: Column::ZERO, min: Column::ZERO, inverse: Column::ZERO, bias: Column::ZERO };
        for at in vectors::<L>(SIDE_BY_SIDE) {
            let d = L::load(&largest, at) / L::splat(-half);
            d.store(&mut fit.d, at);
            let (inverse, overflows) = inverse_or_zero(d);
            inverse.store(&mut fit.inverse, at);
            L::select(overflows, L::splat(0.0), L::splat(half + 0.5)).store(&mut fit.bias, at);
        }
        fit
    }
}

/// Codes before they are truncated; zero for what is not a number.
#[inline(always)]
fn clamp<L: Lanes>(code: L, max_code: f32) -> L {
    code.max(L::splat(0.0)).min(L::splat(max_code))
}

/// 1 ÷ `d`, or zero where `d` is zero or so small that this overflows, and where it overflows.
#[inline(always)]
fn inverse_or_zero<L: Lanes>(d: L) -> (L, L::Mask) {
    let (zero, infinity) = (L::splat(0.0), L::splat(f32::INFINITY));
    let inverse = L::splat(1.0) / d;
    let is_finite = inverse.abs().less(infinity);
    (L::select(is_finite, inverse, zero), L::both(inverse.abs().equal(infinity), d.differs(zero)))
}

/// The smallest and the largest value of up to sixteen blocks. Of zeros, which may differ in their sign, the first is the
/// smallest.
#[inline(always)]
fn ranges<L: Lanes>(blocks: &[[f32; LEN]]) -> (Column, Column) {
    let (mut min, mut max) = (Column::ZERO, Column::ZERO);
    for at in vectors::<L>(blocks.len()) {
        let (low, high) = range_of_lanes::<L>(&blocks[at..]);
        low.store(&mut min, at);
        high.store(&mut max, at);
        if L::any(L::equal(low, L::splat(0.0))) {
            let ranges = min.0.iter_mut().zip(&mut max.0).zip(blocks);
            for ((min, max), block) in ranges.filter(|((min, _), _)| **min == 0.0) {
                *min = block.iter().copied().find(|v| *v == 0.0).unwrap_or(0.0);
                *max = if *max == 0.0 { 0.0 } else { *max };
            }
        }
    }
    (min, max)
}

/// The value of largest magnitude of up to sixteen blocks, with its sign; the first of equals, and of zeros the positive.
#[inline(always)]
fn largest_magnitudes<L: Lanes>(blocks: &[[f32; LEN]]) -> Column {
    let mut largest = Column::ZERO;
    for at in vectors::<L>(blocks.len()) {
        let zero = L::splat(0.0);
        let (low, high) = range_of_lanes::<L>(&blocks[at..]);
        let (low, high) = (low.min(zero), high.max(zero));
        let below = zero - low;
        L::select(high.less(below), low, high).store(&mut largest, at);
        if L::any(L::both(high.equal(below), high.differs(zero))) {
            let lanes = largest.0[at..].iter_mut().zip(&blocks[at..]).take(L::LANES);
            for (largest, block) in lanes.filter(|(largest, _)| **largest != 0.0) {
                let first = block.iter().copied().find(|v| v.abs().to_bits() == largest.abs().to_bits());
                *largest = first.unwrap_or(*largest);
            }
        }
    }
    largest
}

/// The largest magnitude of each of as many blocks as there are lanes; zero where there are fewer.
#[inline(always)]
pub(super) fn magnitudes<L: Lanes>(blocks: &[[f32; LEN]]) -> L {
    let mut magnitudes = [L::splat(0.0); SIDE_BY_SIDE];
    for (magnitude, block) in magnitudes.iter_mut().zip(blocks).take(L::LANES) {
        for from in vectors::<L>(LEN) {
            *magnitude = magnitude.max(L::load_values(&block[from..]).abs());
        }
    }
    of_rows(&mut magnitudes, L::max)
}

/// As [`magnitudes`], the smallest and the largest values.
#[inline(always)]
fn range_of_lanes<L: Lanes>(blocks: &[[f32; LEN]]) -> (L, L) {
    let (mut lows, mut highs) = ([L::splat(0.0); SIDE_BY_SIDE], [L::splat(0.0); SIDE_BY_SIDE]);
    for ((low, high), block) in lows.iter_mut().zip(&mut highs).zip(blocks).take(L::LANES) {
        (*low, *high) = (L::load_values(block), L::load_values(block));
        for from in (L::LANES..LEN).step_by(L::LANES) {
            let values = L::load_values(&block[from..]);
            (*low, *high) = (low.min(values), high.max(values));
        }
    }
    (of_rows(&mut lows, L::min), of_rows(&mut highs, L::max))
}

/// What `combine` makes of all lanes of each row, for as many rows as there are lanes, in their order. What is in `rows` is
/// used up.
#[inline(always)]
fn of_rows<L: Lanes + Copy>(rows: &mut [L; SIDE_BY_SIDE], combine: impl Fn(L, L) -> L) -> L {
    // Halving the vectors, as often as leads to one, ends with the rows in their order.
    for halvings in 1..=L::LANES.ilog2() {
        let left = L::LANES >> halvings;
        for i in 0..left {
            let (a, b) = rows[i].interleave(rows[i + left]);
            rows[i] = combine(a, b);
        }
    }
    rows[0]
}

#[inline(always)]
fn halves(values: &Column) -> [[u8; 2]; SIDE_BY_SIDE] {
    let mut halves = [[0; 2]; SIDE_BY_SIDE];
    for (half, v) in halves.iter_mut().zip(&values.0) {
        *half = f32_to_half(*v).to_le_bytes();
    }
    halves
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
