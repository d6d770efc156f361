//! IQ4_NL, IQ4_XS and MXFP4: 4-bit indices into a table of 16 values.
//!
//! Byte j of 16 holds the index of value j in its low nibble and of value j + 16 in its high one.

use crate::float::half_at;

/// The levels of IQ4_NL and IQ4_XS.
pub(crate) const NON_LINEAR: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

/// Twice the values of E2M1; the scale is halved in exchange, so that both are exact.
pub(crate) const E2M1_DOUBLED: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// d · codes\[16\]: value = d·table\[q\].
#[inline]
pub(crate) fn decode_iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    decode_nibbles(half_at(block, 0), &NON_LINEAR, &block[2..], out);
}

/// d · upper scale bits u16 · lower scale nibbles\[4\] · codes\[128\]: 8 sub-blocks of 32 values with 6-bit scales;
/// value = (d·(scale − 32))·table\[q\].
#[inline]
pub(crate) fn decode_iq4_xs(block: &[u8; 136], out: &mut [f32; 256]) {
    let d = half_at(block, 0);
    let upper = u16::from_le_bytes([block[2], block[3]]);
    for (k, sub) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let low = block[4 + k / 2] >> (4 * (k % 2)) & 15;
        let high = (upper >> (2 * k) & 3) as u8;
        let scale = d * f32::from((low | high << 4) as i8 - 32);
        decode_nibbles(scale, &NON_LINEAR, &block[8 + 16 * k..24 + 16 * k], sub);
    }
}

/// exponent u8 · codes\[16\]: value = 2^(e − 128)·table\[q\].
#[inline]
pub(crate) fn decode_mxfp4(block: &[u8; 17], out: &mut [f32; 32]) {
    decode_nibbles(mxfp4_scale(block[0]), &E2M1_DOUBLED, &block[1..], out);
}

/// 2^(e − 128), of which the first two are subnormal singles.
#[inline]
pub(crate) fn mxfp4_scale(exponent: u8) -> f32 {
    let e = u32::from(exponent);
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
}

#[inline]
fn decode_nibbles(scale: f32, table: &[f32; 16], codes: &[u8], out: &mut [f32; 32]) {
    let (low, high) = out.split_at_mut(16);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(codes) {
        *low = scale * table[usize::from(byte & 15)];
        *high = scale * table[usize::from(byte >> 4)];
    }
}
