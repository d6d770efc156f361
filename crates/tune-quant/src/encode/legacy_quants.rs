//! Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 from values. Codes are chosen with the scale before it is rounded to half.
//!
//! One block at a time: nothing is summed, so the compiler may take the values of a block in any order. Comparisons are
//! made on integers for the same reason. Codes of a block whose scale is so small that its inverse overflows are zeros.
#![allow(clippy::inline_always)] // one copy per instruction set

use super::{blocks, put_half, put_nibbles};

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
pub(super) fn encode_q4_1(values: &[f32], out: &mut Vec<u8>) {
    for (x, block) in blocks::<LEN, 20>(values, out) {
        let (d, min, codes) = offset_codes(x, 15.0);
        put_half(d, &mut block[..2]);
        put_half(min, &mut block[2..4]);
        put_nibbles(&codes, &mut block[4..]);
    }
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
pub(super) fn encode_q5_1(values: &[f32], out: &mut Vec<u8>) {
    for (x, block) in blocks::<LEN, 24>(values, out) {
        let (d, min, codes) = offset_codes(x, 31.0);
        put_half(d, &mut block[..2]);
        put_half(min, &mut block[2..4]);
        put_fifth_bits(&codes, &mut block[4..8]);
        put_nibbles(&codes, &mut block[8..]);
    }
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

/// Codes `q` with `x ≈ d·q + min`.
#[inline(always)]
fn offset_codes(x: &[f32; LEN], max_code: f32) -> (f32, f32, [u8; LEN]) {
    let (min, max) = range(x);
    let d = (max - min) / max_code;
    let inverse = inverse_or_zero(d);
    let mut codes = [0; LEN];
    if inverse.is_finite() {
        for (code, v) in codes.iter_mut().zip(x) {
            *code = truncated((v - min) * inverse + 0.5, max_code);
        }
    }
    (d, min, codes)
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

/// The smallest and largest value; the first of equals.
#[inline(always)]
fn range(x: &[f32; LEN]) -> (f32, f32) {
    let (mut min, mut max) = (order(x[0]), order(x[0]));
    for v in x {
        min = min.min(order(*v));
        max = max.max(order(*v));
    }
    let (mut min, max) = (value_at(min), value_at(max));
    if min == 0.0 {
        // equal values that differ in their bits are zeros
        for v in x.iter().rev() {
            min = if *v == 0.0 { *v } else { min };
        }
    }
    (min, max)
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
