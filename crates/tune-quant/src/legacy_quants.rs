//! Q4_0 Q4_1 Q5_0 Q5_1 Q8_0: blocks of 32 values with half-precision scale `d` and, in the `_1` types, minimum `m`.
//!
//! | type | bytes                              | value        |
//! |------|------------------------------------|--------------|
//! | Q4_0 | d · codes\[16\]                    | d·(q − 8)    |
//! | Q4_1 | d · m · codes\[16\]                | d·q + m      |
//! | Q5_0 | d · fifth bits\[4\] · codes\[16\]  | d·(q − 16)   |
//! | Q5_1 | d · m · fifth bits\[4\] · codes\[16\] | d·q + m   |
//! | Q8_0 | d · i8\[32\]                       | d·q          |
//!
//! Byte j of the codes holds value j in its low nibble and value j + 16 in its high one; bit j of the fifth bits
//! belongs to value j. Encoding uses the scale before it is rounded to half, as the reference does.

use half::f16;

use crate::float::half_at;

const LEN: usize = 32;

#[inline]
pub(crate) fn decode_q4_0(block: &[u8; 18], out: &mut [f32; LEN]) {
    let d = half_at(block, 0);
    for j in 0..16 {
        let byte = block[2 + j];
        out[j] = d * f32::from((byte & 15) as i8 - 8);
        out[16 + j] = d * f32::from((byte >> 4) as i8 - 8);
    }
}

#[inline]
pub(crate) fn decode_q4_1(block: &[u8; 20], out: &mut [f32; LEN]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for j in 0..16 {
        let byte = block[4 + j];
        out[j] = d * f32::from(byte & 15) + m;
        out[16 + j] = d * f32::from(byte >> 4) + m;
    }
}

#[inline]
pub(crate) fn decode_q5_0(block: &[u8; 22], out: &mut [f32; LEN]) {
    let d = half_at(block, 0);
    let fifth = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for j in 0..16 {
        let byte = u32::from(block[6 + j]);
        out[j] = d * ((byte & 15 | (fifth >> j & 1) << 4) as i32 - 16) as f32;
        out[16 + j] = d * ((byte >> 4 | (fifth >> (16 + j) & 1) << 4) as i32 - 16) as f32;
    }
}

#[inline]
pub(crate) fn decode_q5_1(block: &[u8; 24], out: &mut [f32; LEN]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let fifth = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for j in 0..16 {
        let byte = u32::from(block[8 + j]);
        out[j] = d * (byte & 15 | (fifth >> j & 1) << 4) as i32 as f32 + m;
        out[16 + j] = d * (byte >> 4 | (fifth >> (16 + j) & 1) << 4) as i32 as f32 + m;
    }
}

#[inline]
pub(crate) fn decode_q8_0(block: &[u8; 34], out: &mut [f32; LEN]) {
    let d = half_at(block, 0);
    for j in 0..LEN {
        out[j] = d * f32::from(block[2 + j] as i8);
    }
}

pub(crate) fn encode_q4_0(values: &[f32], out: &mut Vec<u8>) {
    for x in values.as_chunks::<LEN>().0 {
        let (d, codes) = centred_codes(x, 16);
        push_half(d, out);
        push_nibbles(&codes, out);
    }
}

pub(crate) fn encode_q4_1(values: &[f32], out: &mut Vec<u8>) {
    for x in values.as_chunks::<LEN>().0 {
        let (d, min, codes) = offset_codes(x, 15);
        push_half(d, out);
        push_half(min, out);
        push_nibbles(&codes, out);
    }
}

pub(crate) fn encode_q5_0(values: &[f32], out: &mut Vec<u8>) {
    for x in values.as_chunks::<LEN>().0 {
        let (d, codes) = centred_codes(x, 32);
        push_half(d, out);
        push_fifth_bits(&codes, out);
        push_nibbles(&codes, out);
    }
}

pub(crate) fn encode_q5_1(values: &[f32], out: &mut Vec<u8>) {
    for x in values.as_chunks::<LEN>().0 {
        let (d, min, codes) = offset_codes(x, 31);
        push_half(d, out);
        push_half(min, out);
        push_fifth_bits(&codes, out);
        push_nibbles(&codes, out);
    }
}

pub(crate) fn encode_q8_0(values: &[f32], out: &mut Vec<u8>) {
    for x in values.as_chunks::<LEN>().0 {
        let d = x.iter().fold(0.0f32, |max, v| max.max(v.abs())) / 127.0;
        let inverse = inverse_or_zero(d);
        push_half(d, out);
        out.extend(x.iter().map(|v| (v * inverse).round() as i8 as u8));
    }
}

/// Codes `q` with `x ≈ d·(q − levels/2)`. The value of largest magnitude, sign kept, falls on the code 0, so the
/// range that has one step more is on its side.
fn centred_codes(x: &[f32; LEN], levels: u8) -> (f32, [u8; LEN]) {
    let half = f32::from(levels / 2);
    let d = largest_magnitude(x) / -half;
    let inverse = inverse_or_zero(d);
    (d, x.map(|v| ((v * inverse + (half + 0.5)) as u8).min(levels - 1)))
}

/// Codes `q` with `x ≈ d·q + min`.
fn offset_codes(x: &[f32; LEN], max_code: u8) -> (f32, f32, [u8; LEN]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, |a, v| if v > a { v } else { a });
    let min = x.iter().copied().fold(f32::INFINITY, |a, v| if v < a { v } else { a });
    let d = (max - min) / f32::from(max_code);
    let inverse = inverse_or_zero(d);
    (d, min, x.map(|v| (((v - min) * inverse + 0.5) as u8).min(max_code)))
}

/// The value of largest magnitude with its sign; the first of equals.
fn largest_magnitude(x: &[f32]) -> f32 {
    x.iter().copied().fold(0.0, |a: f32, v| if v.abs() > a.abs() { v } else { a })
}

fn inverse_or_zero(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn push_half(value: f32, out: &mut Vec<u8>) {
    out.extend(f16::from_f32(value).to_le_bytes());
}

fn push_nibbles(codes: &[u8; LEN], out: &mut Vec<u8>) {
    out.extend((0..16).map(|j| codes[j] & 15 | codes[16 + j] << 4));
}

fn push_fifth_bits(codes: &[u8; LEN], out: &mut Vec<u8>) {
    let bits = codes.iter().enumerate().fold(0u32, |bits, (j, &q)| bits | u32::from(q >> 4 & 1) << j);
    out.extend(bits.to_le_bytes());
}
