//! Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 from values. Codes are chosen with the scale before it is rounded to half.

use super::push_half;

const LEN: usize = 32;

pub(super) fn encode_q4_0(values: &[f32], out: &mut Vec<u8>) {
    for x in values.as_chunks::<LEN>().0 {
        let (d, codes) = centred_codes(x, 16);
        push_half(d, out);
        push_nibbles(&codes, out);
    }
}

pub(super) fn encode_q4_1(values: &[f32], out: &mut Vec<u8>) {
    for x in values.as_chunks::<LEN>().0 {
        let (d, min, codes) = offset_codes(x, 15);
        push_half(d, out);
        push_half(min, out);
        push_nibbles(&codes, out);
    }
}

pub(super) fn encode_q5_0(values: &[f32], out: &mut Vec<u8>) {
    for x in values.as_chunks::<LEN>().0 {
        let (d, codes) = centred_codes(x, 32);
        push_half(d, out);
        push_fifth_bits(&codes, out);
        push_nibbles(&codes, out);
    }
}

pub(super) fn encode_q5_1(values: &[f32], out: &mut Vec<u8>) {
    for x in values.as_chunks::<LEN>().0 {
        let (d, min, codes) = offset_codes(x, 31);
        push_half(d, out);
        push_half(min, out);
        push_fifth_bits(&codes, out);
        push_nibbles(&codes, out);
    }
}

pub(super) fn encode_q8_0(values: &[f32], out: &mut Vec<u8>) {
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

fn push_nibbles(codes: &[u8; LEN], out: &mut Vec<u8>) {
    out.extend((0..16).map(|j| codes[j] & 15 | codes[16 + j] << 4));
}

fn push_fifth_bits(codes: &[u8; LEN], out: &mut Vec<u8>) {
    let bits = codes.iter().enumerate().fold(0u32, |bits, (j, &q)| bits | u32::from(q >> 4 & 1) << j);
    out.extend(bits.to_le_bytes());
}
