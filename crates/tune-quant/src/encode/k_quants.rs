//! Q2_K to Q6_K from values.
//!
//! Three steps: a search finds scale and minimum of each sub-block; a super-block's scales are divided by the largest
//! and become small integers; with what these now say, every code is chosen again. A sub-block whose scale became zero
//! keeps the codes of its search, which no longer matter but are stored.
#![allow(clippy::inline_always)] // one copy per instruction set

use half::f16;

use super::lanes::{Column, Lanes, SIDE_BY_SIDE, nearest_int};
use super::searches::{Asymmetric, Columns, TINY, Trials, asymmetric, clamp, one_by_one, symmetric};
use super::{columns, in_order, push_half, vectors};

/// Values of a super-block.
const LEN: usize = 256;
/// Values that are searched together in Q4_K and Q5_K: two super-blocks.
const PAIR: usize = 2 * LEN;

#[inline(always)]
pub(super) fn encode_q2_k<L: Lanes>(values: &[f32], out: &mut Vec<u8>) {
    const MAX_CODE: f32 = 3.0;
    let trials = Trials { max_code: MAX_CODE, first: -0.5, count: 15, absolute: true };
    for block in values.as_chunks::<LEN>().0 {
        let x = columns::<16>(block);
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
            out.push(both);
        }
        let q: [u8; LEN] = in_order(&found.codes_again(&x, &stored, MAX_CODE));
        push_bit_pairs(&q, out);
        push_half(d, out);
        push_half(dmin, out);
    }
}

#[inline(always)]
pub(super) fn encode_q3_k<L: Lanes>(values: &[f32], out: &mut Vec<u8>) {
    const HALF: f32 = 4.0;
    for block in values.as_chunks::<LEN>().0 {
        let x = columns::<16>(block);
        let (mut scales, mut codes) = (Column::ZERO, [Column::ZERO; 16]);
        for at in vectors::<L>(16) {
            one_by_one::<L, _>(&x, at, &mut codes).store(&mut scales, at);
        }
        let largest = largest_scale(&scales.0);
        let inverse = -32.0 / largest;
        let (mut sixes, mut d) = ([0_u8; 16], 0.0);
        if largest != 0.0 {
            sixes = scales.0.map(|scale| (nearest_int(inverse * scale).clamp(-32, 31) + 32) as u8);
            d = rounded_to_half(1.0 / inverse);
        }
        let scale = Column(sixes.map(|six| d * f32::from(six as i8 - 32)));

        let mut bytes = [[0; SIDE_BY_SIDE]; 16];
        for at in vectors::<L>(16) {
            let scale = L::load(&scale, at);
            let is_zero = scale.equal(L::splat(0.0));
            for ((x, kept), byte) in x.iter().zip(&codes).zip(&mut bytes) {
                let again = clamp((L::load(x, at) / scale).nearest_int(), -HALF, HALF - 1.0);
                let code = L::select(is_zero, L::load(kept, at), again);
                (code + L::splat(HALF)).store_bytes(byte, at);
            }
        }
        let q: [u8; LEN] = in_order(&bytes);
        out.extend((0..32).map(|l| (0..8).fold(0, |bits, b| bits | (q[32 * b + l] >> 2) << b)));
        push_bit_pairs(&q.map(|q| q & 3), out);
        out.extend((0..8).map(|k| sixes[k] & 15 | sixes[k + 8] << 4));
        out.extend((0..4).map(|k| (0..4).fold(0, |bits, part| bits | sixes[4 * part + k] >> 4 << (2 * part))));
        push_half(d, out);
    }
}

#[inline(always)]
pub(super) fn encode_q4_k<L: Lanes>(values: &[f32], out: &mut Vec<u8>) {
    let trials = Trials { max_code: 15.0, first: -1.0, count: 20, absolute: false };
    for pair in values.chunks(PAIR) {
        encode_pair::<L>(pair, trials, out, push_nibble_pairs);
    }
}

#[inline(always)]
pub(super) fn encode_q5_k<L: Lanes>(values: &[f32], out: &mut Vec<u8>) {
    let trials = Trials { max_code: 31.0, first: -0.5, count: 15, absolute: false };
    for pair in values.chunks(PAIR) {
        encode_pair::<L>(pair, trials, out, |q, out| {
            out.extend((0..32).map(|l| (0..8).fold(0, |bits, b| bits | (q[32 * b + l] >> 4) << b)));
            push_nibble_pairs(&q.map(|q| q & 15), out);
        });
    }
}

#[inline(always)]
pub(super) fn encode_q6_k<L: Lanes>(values: &[f32], out: &mut Vec<u8>) {
    const HALF: f32 = 32.0;
    for block in values.as_chunks::<LEN>().0 {
        let x = columns::<16>(block);
        let mut scales = Column::ZERO;
        let mut found = [None; SIDE_BY_SIDE];
        for at in vectors::<L>(16) {
            let search = symmetric::<L, _>(&x, at, HALF);
            search.scale.store(&mut scales, at);
            found[at] = Some(search);
        }
        let largest = largest_scale(&scales.0);
        if largest.abs() < TINY {
            out.extend([0; 210]);
            continue;
        }
        let inverse = -128.0 / largest;
        let d = rounded_to_half(1.0 / inverse);
        let eights = scales.0.map(|scale| nearest_int(inverse * scale).min(127) as i8);
        let scale = Column(eights.map(|eight| d * f32::from(eight)));

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
        for q in q.as_chunks::<128>().0 {
            out.extend((0..64).map(|l| q[l] & 15 | q[64 + l] << 4));
        }
        for q in q.as_chunks::<128>().0 {
            out.extend((0..32).map(|l| (0..4).fold(0, |bits, t| bits | q[32 * t + l] >> 4 << (2 * t))));
        }
        out.extend(eights.map(|eight| eight as u8));
        push_half(d, out);
    }
}

/// One or two super-blocks of Q4_K or Q5_K; `push_codes` writes the codes of one.
#[inline(always)]
fn encode_pair<L: Lanes>(
    values: &[f32],
    trials: Trials,
    out: &mut Vec<u8>,
    push_codes: impl Fn(&[u8; LEN], &mut Vec<u8>),
) {
    let sub_blocks = values.len() / 32;
    let x = columns::<32>(values);
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
        head[0..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
        head[2..4].copy_from_slice(&f16::from_f32(dmin).to_le_bytes());
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
    let q: [u8; PAIR] = in_order(&found.codes_again(&x, &stored, trials.max_code));
    for (head, q) in heads.iter().zip(q.as_chunks::<LEN>().0).take(sub_blocks / 8) {
        out.extend(head);
        push_codes(q, out);
    }
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
        let mut found =
            Self { scales: Column::ZERO, mins: Column::ZERO, searches: [None; SIDE_BY_SIDE] };
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
fn quantised<const N: usize>(numbers: &[f32; N], max: f32) -> ([u8; N], f32) {
    let largest = numbers.iter().fold(0.0, |max: f32, &v| if v > max { v } else { max });
    let inverse = if largest > 0.0 { max / largest } else { 0.0 };
    (numbers.map(|v| nearest_int(inverse * v) as u8), rounded_to_half(largest / max))
}

/// The scale of largest magnitude with its sign, the first of equals.
fn largest_scale(scales: &[f32; SIDE_BY_SIDE]) -> f32 {
    scales.iter().fold(0.0, |largest: f32, &v| if v.abs() > largest.abs() { v } else { largest })
}

fn rounded_to_half(v: f32) -> f32 {
    f16::from_f32(v).to_f32()
}

/// Four 2-bit codes a byte: `v = 128c + 32t + l` is field `t` of byte `32c + l`.
#[inline(always)]
fn push_bit_pairs(q: &[u8; LEN], out: &mut Vec<u8>) {
    for q in q.as_chunks::<128>().0 {
        out.extend((0..32).map(|l| q[l] | q[32 + l] << 2 | q[64 + l] << 4 | q[96 + l] << 6));
    }
}

/// Two 4-bit codes a byte: `v = 64c + 32h + l` is nibble `h` of byte `32c + l`.
#[inline(always)]
fn push_nibble_pairs(q: &[u8; LEN], out: &mut Vec<u8>) {
    for q in q.as_chunks::<64>().0 {
        out.extend((0..32).map(|l| q[l] | q[32 + l] << 4));
    }
}
