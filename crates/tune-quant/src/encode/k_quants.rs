//! Q2_K to Q6_K from values.
//!
//! Three steps: a search finds scale and minimum of each sub-block; a super-block's scales are divided by the largest
//! and become small integers; with what these now say, every code is chosen again. A sub-block whose scale became zero
//! keeps the codes of its search, which no longer matter but are stored.
#![allow(clippy::inline_always)] // one copy per instruction set

use super::lanes::{Column, Lanes, SIDE_BY_SIDE, nearest_int};
use super::searches::{Asymmetric, Columns, TINY, Trials, asymmetric, clamp, one_by_one, symmetric};
use super::{blocks, columns, in_order, put_half, vectors};
use crate::float::rounded_to_half;

/// Values of a super-block.
const LEN: usize = 256;
/// Values that are searched together in Q4_K and Q5_K: two super-blocks.
const PAIR: usize = 2 * LEN;
/// Super-blocks that are searched together in Q3_K.
const SETS: usize = 4;

#[inline(always)]
pub(super) fn encode_q2_k<L: Lanes>(values: &[f32], out: &mut [u8]) {
    const MAX_CODE: f32 = 3.0;
    let trials = Trials { max_code: MAX_CODE, first: -0.5, count: 15, absolute: true };
    for (values, block) in blocks::<LEN, 84>(values, out) {
        let x = columns::<L, 16>(values);
        let mut weights = [Column::ZERO; 16];
        for at in vectors::<L>(16) {
            for (w, x) in weights.iter_mut().zip(&x) {
                L::load(x, at).abs().store(w, at);
            }
        }
        let found = Found::<L>::search(&x, &weights, 16, trials);
        let (scale, d) = quantised(&found.scales.0, 15.0);
        let (min, dmin) = quantised(&found.mins.0, 15.0);
        let mut stored = Stored::default();
        for k in 0..16 {
            let both = scale[k] | min[k] << 4;
            stored.scale.0[k] = d * f32::from(both & 15);
            stored.min.0[k] = dmin * f32::from(both >> 4);
            block[k] = both;
        }
        let q: [u8; LEN] = in_order(&found.codes_again(&x, &stored, MAX_CODE));
        put_bit_pairs(&q, &mut block[16..80]);
        put_half(d, &mut block[80..82]);
        put_half(dmin, &mut block[82..84]);
    }
}

#[inline(always)]
pub(super) fn encode_q3_k<L: Lanes>(values: &[f32], out: &mut [u8]) {
    for (values, out) in values.chunks(SETS * LEN).zip(out.chunks_mut(SETS * 110)) {
        let (mut x, mut codes) = ([[Column::ZERO; 16]; SETS], [[Column::ZERO; 16]; SETS]);
        for (x, values) in x.iter_mut().zip(values.chunks(LEN)) {
            *x = columns::<L, 16>(values);
        }
        let mut scales = [Column::ZERO; SETS];
        for at in vectors::<L>(16) {
            let found: [L; SETS] = one_by_one(&x, at, &mut codes);
            for (scales, found) in scales.iter_mut().zip(found) {
                found.store(scales, at);
            }
        }
        for (part, (_, block)) in blocks::<LEN, 110>(values, out).enumerate() {
            finish_q3_k::<L>(&x[part], &scales[part].0, &codes[part], block);
        }
    }
}

/// The block of values whose sub-blocks have these scales and codes.
#[inline(always)]
fn finish_q3_k<L: Lanes>(x: &Columns<16>, scales: &[f32; 16], codes: &Columns<16>, block: &mut [u8; 110]) {
    const HALF: f32 = 4.0;
    let largest = largest_scale(scales);
    let (mut sixes, mut d) = ([0_u8; 16], 0.0);
    if largest != 0.0 {
        let inverse = -32.0 / largest;
        d = rounded_to_half(1.0 / inverse);
        for (six, scale) in sixes.iter_mut().zip(scales) {
            *six = (nearest_int(inverse * scale).clamp(-32, 31) + 32) as u8;
        }
    }
    let mut scale = Column::ZERO;
    for (scale, six) in scale.0.iter_mut().zip(sixes) {
        *scale = d * f32::from(six as i8 - 32);
    }

    let mut bytes = [[0; SIDE_BY_SIDE]; 16];
    for at in vectors::<L>(16) {
        let scale = L::load(&scale, at);
        let is_zero = scale.equal(L::splat(0.0));
        for ((x, kept), byte) in x.iter().zip(codes).zip(&mut bytes) {
            let again = clamp((L::load(x, at) / scale).nearest_int(), -HALF, HALF - 1.0);
            let code = L::select(is_zero, L::load(kept, at), again);
            (code + L::splat(HALF)).store_bytes(byte, at);
        }
    }
    let q: [u8; LEN] = in_order(&bytes);
    put_top_bits(&q, 2, &mut block[..32]);
    put_bit_pairs(&q, &mut block[32..96]);
    for k in 0..8 {
        block[96 + k] = sixes[k] & 15 | sixes[k + 8] << 4;
    }
    for k in 0..4 {
        let top = |part: usize| sixes[4 * part + k] >> 4 << (2 * part);
        block[104 + k] = top(0) | top(1) | top(2) | top(3);
    }
    put_half(d, &mut block[108..110]);
}

#[inline(always)]
pub(super) fn encode_q4_k<L: Lanes>(values: &[f32], out: &mut [u8]) {
    let trials = Trials { max_code: 15.0, first: -1.0, count: 20, absolute: false };
    for (pair, out) in values.chunks(PAIR).zip(out.chunks_mut(2 * 144)) {
        let (heads, codes) = encode_pair::<L>(pair, trials);
        for (part, (_, block)) in blocks::<LEN, 144>(pair, out).enumerate() {
            block[..16].copy_from_slice(&heads[part]);
            put_nibble_pairs(&codes.as_chunks().0[part], &mut block[16..]);
        }
    }
}

#[inline(always)]
pub(super) fn encode_q5_k<L: Lanes>(values: &[f32], out: &mut [u8]) {
    let trials = Trials { max_code: 31.0, first: -0.5, count: 15, absolute: false };
    for (pair, out) in values.chunks(PAIR).zip(out.chunks_mut(2 * 176)) {
        let (heads, codes) = encode_pair::<L>(pair, trials);
        for (part, (_, block)) in blocks::<LEN, 176>(pair, out).enumerate() {
            let codes = &codes.as_chunks().0[part];
            block[..16].copy_from_slice(&heads[part]);
            put_top_bits(codes, 4, &mut block[16..48]);
            put_nibble_pairs(codes, &mut block[48..]);
        }
    }
}

#[inline(always)]
pub(super) fn encode_q6_k<L: Lanes>(values: &[f32], out: &mut [u8]) {
    const HALF: f32 = 32.0;
    for (values, block) in blocks::<LEN, 210>(values, out) {
        let x = columns::<L, 16>(values);
        let mut scales = Column::ZERO;
        let mut found = [None; SIDE_BY_SIDE];
        for at in vectors::<L>(16) {
            let search = symmetric::<L, _>(&x, at, HALF);
            search.scale.store(&mut scales, at);
            found[at] = Some(search);
        }
        let largest = largest_scale(&scales.0);
        if largest.abs() < TINY {
            block.fill(0);
            continue;
        }
        let inverse = -128.0 / largest;
        let d = rounded_to_half(1.0 / inverse);
        let mut scale = Column::ZERO;
        for k in 0..16 {
            let eight = nearest_int(inverse * scales.0[k]).min(127) as i8;
            scale.0[k] = d * f32::from(eight);
            block[192 + k] = eight as u8;
        }

        let mut bytes = [[0; SIDE_BY_SIDE]; 16];
        for at in vectors::<L>(16) {
            let Some(search) = found[at] else { continue };
            let scale = L::load(&scale, at);
            let is_zero = scale.equal(L::splat(0.0));
            let is_tiny = search.scale.equal(L::splat(0.0));
            for (x, byte) in x.iter().zip(&mut bytes) {
                let x = L::load(x, at);
                let again = clamp((x / scale).nearest_int(), -HALF, HALF - 1.0);
                let kept = L::select(is_tiny, L::splat(-HALF), search.code(x, HALF));
                (L::select(is_zero, kept, again) + L::splat(HALF)).store_bytes(byte, at);
            }
        }
        let q: [u8; LEN] = in_order(&bytes);
        put_six_bits(&q, &mut block[..192]);
        put_half(d, &mut block[208..210]);
    }
}

/// One or two super-blocks of Q4_K or Q5_K: scales and minima as they are stored, and the codes, one a byte.
#[inline(always)]
fn encode_pair<L: Lanes>(values: &[f32], trials: Trials) -> ([[u8; 16]; 2], [u8; PAIR]) {
    let sub_blocks = values.len() / 32;
    let x = columns::<L, 32>(values);
    let mut weights = [Column::ZERO; 32];
    for at in vectors::<L>(sub_blocks) {
        let mut squares = L::splat(0.0);
        for x in &x {
            let x = L::load(x, at);
            squares = squares + x * x;
        }
        let typical = (squares / L::splat(32.0)).sqrt();
        for (w, x) in weights.iter_mut().zip(&x) {
            (typical + L::load(x, at).abs()).store(w, at);
        }
    }
    let found = Found::<L>::search(&x, &weights, sub_blocks, trials);
    let mut stored = Stored::default();
    let mut heads = [[0; 16]; 2];
    for (part, head) in heads.iter_mut().enumerate().take(sub_blocks / 8) {
        let of_part = |column: &Column| column.0.as_chunks::<8>().0[part];
        let (scale, d) = quantised(&of_part(&found.scales), 63.0);
        let (min, dmin) = quantised(&of_part(&found.mins), 63.0);
        put_half(d, &mut head[0..2]);
        put_half(dmin, &mut head[2..4]);
        let packed = &mut head[4..];
        for k in 0..8 {
            let (scale, min) = (scale[k].min(63), min[k].min(63));
            stored.scale.0[8 * part + k] = d * f32::from(scale);
            stored.min.0[8 * part + k] = dmin * f32::from(min);
            if k < 4 {
                packed[k] = scale;
                packed[k + 4] = min;
            } else {
                packed[k + 4] = scale & 15 | min << 4;
                packed[k - 4] |= scale >> 4 << 6;
                packed[k] |= min >> 4 << 6;
            }
        }
    }
    (heads, in_order(&found.codes_again(&x, &stored, trials.max_code)))
}

/// What the searches found for sixteen sub-blocks.
struct Found<L> {
    scales: Column,
    mins: Column,
    /// At the first lane of each vector.
    searches: [Option<Asymmetric<L>>; SIDE_BY_SIDE],
}

/// Scales and minima as the block will say them; zero for lanes without a sub-block.
struct Stored {
    scale: Column,
    min: Column,
}

impl Default for Stored {
    fn default() -> Self {
        Self { scale: Column::ZERO, min: Column::ZERO }
    }
}

impl<L: Lanes> Found<L> {
    #[inline(always)]
    fn search<const SUB: usize>(
        x: &Columns<SUB>,
        weights: &Columns<SUB>,
        sub_blocks: usize,
        trials: Trials,
    ) -> Self {
        let mut found = Self { scales: Column::ZERO, mins: Column::ZERO, searches: [None; SIDE_BY_SIDE] };
        for at in vectors::<L>(sub_blocks) {
            let search = asymmetric::<L, SUB>(x, weights, at, trials);
            search.scale.store(&mut found.scales, at);
            search.min.store(&mut found.mins, at);
            found.searches[at] = Some(search);
        }
        found
    }

    /// The codes nearest to the values under the stored scales, one a byte.
    #[inline(always)]
    fn codes_again<const SUB: usize>(
        &self,
        x: &Columns<SUB>,
        stored: &Stored,
        max_code: f32,
    ) -> [[u8; SIDE_BY_SIDE]; SUB] {
        let mut bytes = [[0; SIDE_BY_SIDE]; SUB];
        for (at, search) in self.searches.iter().enumerate() {
            let Some(search) = search else { continue };
            let (scale, min) = (L::load(&stored.scale, at), L::load(&stored.min, at));
            let is_zero = scale.equal(L::splat(0.0));
            for (x, byte) in x.iter().zip(&mut bytes) {
                let x = L::load(x, at);
                let again = clamp(((x + min) / scale).nearest_int(), 0.0, max_code);
                L::select(is_zero, search.code(x, max_code), again).store_bytes(byte, at);
            }
        }
        bytes
    }
}

/// Numbers that are not below zero as integers, the largest becoming `max`, and the unit that they count, rounded to
/// half. Integers are what is left of a wider one in eight bits, as in the reference, should a number be negative.
#[inline(always)]
fn quantised<const N: usize>(numbers: &[f32; N], max: f32) -> ([u8; N], f32) {
    let mut largest = 0.0_f32;
    for &v in numbers {
        largest = if v > largest { v } else { largest };
    }
    let inverse = if largest > 0.0 { max / largest } else { 0.0 };
    let mut integers = [0; N];
    for (integer, v) in integers.iter_mut().zip(numbers) {
        *integer = nearest_int(inverse * v) as u8;
    }
    (integers, rounded_to_half(largest / max))
}

/// The scale of largest magnitude with its sign, the first of equals.
#[inline(always)]
fn largest_scale(scales: &[f32; SIDE_BY_SIDE]) -> f32 {
    let mut largest = 0.0_f32;
    for &v in scales {
        largest = if v.abs() > largest.abs() { v } else { largest };
    }
    largest
}

/// The low nibbles of 6-bit codes, then their upper bit pairs, as Q6_K holds them.
#[inline(always)]
pub(super) fn put_six_bits(q: &[u8; LEN], to: &mut [u8]) {
    for (c, q) in q.as_chunks::<128>().0.iter().enumerate() {
        for l in 0..64 {
            to[64 * c + l] = q[l] & 15 | q[64 + l] << 4;
        }
        for l in 0..32 {
            let top = |t: usize| q[32 * t + l] >> 4 << (2 * t);
            to[128 + 32 * c + l] = top(0) | top(1) | top(2) | top(3);
        }
    }
}

/// Four 2-bit codes a byte: `v = 128c + 32t + l` is field `t` of byte `32c + l`. Higher bits are left out.
#[inline(always)]
pub(super) fn put_bit_pairs(q: &[u8; LEN], to: &mut [u8]) {
    for (q, to) in q.as_chunks::<128>().0.iter().zip(to.as_chunks_mut::<32>().0) {
        for l in 0..32 {
            let pair = |t: usize| (q[32 * t + l] & 3) << (2 * t);
            to[l] = pair(0) | pair(1) | pair(2) | pair(3);
        }
    }
}

/// Two 4-bit codes a byte: `v = 64c + 32h + l` is nibble `h` of byte `32c + l`. Higher bits are left out.
#[inline(always)]
pub(super) fn put_nibble_pairs(q: &[u8; LEN], to: &mut [u8]) {
    for (q, to) in q.as_chunks::<64>().0.iter().zip(to.as_chunks_mut::<32>().0) {
        for l in 0..32 {
            to[l] = q[l] & 15 | q[32 + l] << 4;
        }
    }
}

/// The bit of value 2^`bit`, the highest of a code: that of `v = 32b + l` is bit `b` of byte `l`.
#[inline(always)]
pub(super) fn put_top_bits(q: &[u8; LEN], bit: u32, to: &mut [u8]) {
    to.fill(0);
    for (b, q) in q.as_chunks::<32>().0.iter().enumerate() {
        for (byte, q) in to.iter_mut().zip(q) {
            *byte |= q >> bit << b;
        }
    }
}
