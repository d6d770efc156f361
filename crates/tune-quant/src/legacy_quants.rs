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
//! belongs to value j.

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
