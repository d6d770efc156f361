//! Q2_K to Q6_K: super-blocks of 256 values whose sub-blocks have quantised scales (and minima) of their own.
//!
//! value = (d·scale)·q − (dmin·min), evaluated in this order in `f32`; Q3_K and Q6_K have no minima and signed
//! codes. Layouts are at each decoder; `v` is the index of a value in the super-block, `l` runs over 0..32.

use crate::float::half_at;

const LEN: usize = 256;

/// scales\[16\] (low nibble scale, high nibble minimum, one per 16 values) · codes\[64\] · d · dmin.
/// `v = 128c + 32t + l` is the 2-bit field `t` of `codes[32c + l]`.
#[inline]
pub(crate) fn decode_q2_k(block: &[u8; 84], out: &mut [f32; LEN]) {
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    let codes: &[u8; 64] = part(block, 16);
    for (k, sub) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(block[k] & 15);
        let min = dmin * f32::from(block[k] >> 4);
        let (c, t, l0) = (k / 8, k / 2 % 4, k % 2 * 16);
        let codes: &[u8; 16] = part(codes, 32 * c + l0);
        for l in 0..16 {
            sub[l] = scale * f32::from(codes[l] >> (2 * t) & 3) - min;
        }
    }
}

/// high bits\[32\] · low bits\[64\] · scales\[12\] · d. Low bits as in Q2_K; the third bit of `v = 32b + l` is bit
/// `b` of `high[l]`, and 4 is subtracted where it is clear. 6-bit scales, one per 16 values, less 32.
#[inline]
pub(crate) fn decode_q3_k(block: &[u8; 110], out: &mut [f32; LEN]) {
    let d = half_at(block, 108);
    let high: &[u8; 32] = part(block, 0);
    let low: &[u8; 64] = part(block, 32);
    let scales: &[u8; 12] = part(block, 96);
    for (k, sub) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale_low = scales[k % 8] >> (4 * (k / 8)) & 15;
        let scale_high = scales[8 + k % 4] >> (2 * (k / 4)) & 3;
        let scale = d * f32::from((scale_low | scale_high << 4) as i8 - 32);
        let (c, t, l0) = (k / 8, k / 2 % 4, k % 2 * 16);
        let low: &[u8; 16] = part(low, 32 * c + l0);
        let high: &[u8; 16] = part(high, l0);
        for l in 0..16 {
            let q = low[l] >> (2 * t) & 3 | (high[l] >> (k / 2) & 1) << 2;
            sub[l] = scale * f32::from(q as i8 - 4);
        }
    }
}

/// d · dmin · scales\[12\] · codes\[128\]. `v = 64c + 32h + l` is nibble `h` of `codes[32c + l]`.
#[inline]
pub(crate) fn decode_q4_k(block: &[u8; 144], out: &mut [f32; LEN]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let packed = part(block, 4);
    let codes: &[u8; 128] = part(block, 16);
    for (c, pair) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let ((scale_low, min_low), (scale_high, min_high)) =
            (scale_and_min(packed, 2 * c), scale_and_min(packed, 2 * c + 1));
        let (scale_low, min_low) = (d * scale_low, dmin * min_low);
        let (scale_high, min_high) = (d * scale_high, dmin * min_high);
        let codes: &[u8; 32] = part(codes, 32 * c);
        for l in 0..32 {
            pair[l] = scale_low * f32::from(codes[l] & 15) - min_low;
            pair[32 + l] = scale_high * f32::from(codes[l] >> 4) - min_high;
        }
    }
}

/// d · dmin · scales\[12\] · fifth bits\[32\] · codes\[128\]. As Q4_K; the fifth bit of `v = 32b + l` is bit `b` of
/// `fifth[l]`.
#[inline]
pub(crate) fn decode_q5_k(block: &[u8; 176], out: &mut [f32; LEN]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let packed = part(block, 4);
    let fifth: &[u8; 32] = part(block, 16);
    let codes: &[u8; 128] = part(block, 48);
    for (c, pair) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
        let ((scale_low, min_low), (scale_high, min_high)) =
            (scale_and_min(packed, 2 * c), scale_and_min(packed, 2 * c + 1));
        let (scale_low, min_low) = (d * scale_low, dmin * min_low);
        let (scale_high, min_high) = (d * scale_high, dmin * min_high);
        let codes: &[u8; 32] = part(codes, 32 * c);
        for l in 0..32 {
            let low = codes[l] & 15 | (fifth[l] >> (2 * c) & 1) << 4;
            let high = codes[l] >> 4 | (fifth[l] >> (2 * c + 1) & 1) << 4;
            pair[l] = scale_low * f32::from(low) - min_low;
            pair[32 + l] = scale_high * f32::from(high) - min_high;
        }
    }
}

/// low nibbles\[128\] · upper bit pairs\[64\] · i8 scales\[16\] (one per 16 values) · d. `v = 128c + 32t + l`: nibble
/// `t / 2` of `low[64c + 32(t mod 2) + l]`, upper bits from field `t` of `upper[32c + l]`, less 32.
#[inline]
pub(crate) fn decode_q6_k(block: &[u8; 210], out: &mut [f32; LEN]) {
    let d = half_at(block, 208);
    let low: &[u8; 128] = part(block, 0);
    let upper: &[u8; 64] = part(block, 128);
    let scales: &[u8; 16] = part(block, 192);
    for (k, sub) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let scale = d * f32::from(scales[k] as i8);
        let (c, t, l0) = (k / 8, k / 2 % 4, k % 2 * 16);
        let low: &[u8; 16] = part(low, 64 * c + 32 * (t % 2) + l0);
        let upper: &[u8; 16] = part(upper, 32 * c + l0);
        for l in 0..16 {
            let q = low[l] >> (4 * (t / 2)) & 15 | (upper[l] >> (2 * t) & 3) << 4;
            sub[l] = scale * f32::from(q as i8 - 32);
        }
    }
}

/// The 6-bit scale and minimum of sub-block `k` of Q4_K and Q5_K: the first four lie in the low six bits of bytes
/// 0..4 and 4..8; the last four have their low nibbles in bytes 8..12 and their upper bits on top of the first.
#[inline]
fn scale_and_min(packed: &[u8; 12], k: usize) -> (f32, f32) {
    let (scale, min) = if k < 4 {
        (packed[k] & 63, packed[k + 4] & 63)
    } else {
        (packed[k + 4] & 15 | packed[k - 4] >> 6 << 4, packed[k + 4] >> 4 | packed[k] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// `N` bytes of a block from `start` on.
#[inline]
fn part<const N: usize>(block: &[u8], start: usize) -> &[u8; N] {
    block[start..].first_chunk().expect("a part lies inside its block")
}
