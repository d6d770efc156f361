//! AVX-512 with its BF16 and VBMI extensions (Zen 4, Sapphire Rapids and later).
//!
//! A block of 4- or 5-bit codes has at most 32 different values. They are computed once per scale and rounded to
//! `bf16` together; each weight is then one of the 32 words of a register, which `vpermw` looks up 32 at a time.
//! The levels of several sub-blocks of Q2_K and Q3_K share a register; types of more levels are computed value by
//! value.
//!
//! Fused multiply-add rounds as the product and the sum of the reference do, because the products are exact: 11
//! bits of a half, at most 6 of a scale and 5 of a code.
//!
//! `vcvtne2ps2bf16` takes subnormal singles for zero. The values that go through it are multiples of 2⁻²⁴, the
//! smallest half, so none is subnormal. F32 and NF4 are rounded by [`round_any`], and MXFP4 needs no rounding.

mod registers;

#[allow(clippy::wildcard_imports)] // some forty intrinsics
use std::arch::x86_64::*;

#[allow(clippy::wildcard_imports)] // all there is
use registers::*;

use super::x86::{FROM_0, FROM_16, FROM_MINUS_8, FROM_MINUS_16, blocks, iq4_xs_scales, part, q3_k_scales};
use super::{Decoded, Out};
use crate::BlockType;
use crate::codebook_quants::{E2M1_DOUBLED, NON_LINEAR, mxfp4_scale};
use crate::nf4;

/// The levels of Q2_K, once for each of four sub-blocks.
const COUNT_TO_4: [f32; 16] = [0., 1., 2., 3., 0., 1., 2., 3., 0., 1., 2., 3., 0., 1., 2., 3.];
/// The levels of Q3_K, once for each of two sub-blocks.
const CENTRED_TWICE: [f32; 16] = [-4., -3., -2., -1., 0., 1., 2., 3., -4., -3., -2., -1., 0., 1., 2., 3.];

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn decode<T: Decoded>(block_type: BlockType, bytes: &[u8], out: &mut [T]) {
    match block_type {
        BlockType::F32 => f32(bytes, out),
        BlockType::F16 => f16(bytes, out),
        BlockType::BF16 => bf16(bytes, out),
        BlockType::Q4_0 => q4_0(bytes, out),
        BlockType::Q4_1 => q4_1(bytes, out),
        BlockType::Q5_0 => q5_0(bytes, out),
        BlockType::Q5_1 => q5_1(bytes, out),
        BlockType::Q8_0 => q8_0(bytes, out),
        BlockType::Q2K => q2_k(bytes, out),
        BlockType::Q3K => q3_k(bytes, out),
        BlockType::Q4K => q4_k(bytes, out),
        BlockType::Q5K => q5_k(bytes, out),
        BlockType::Q6K => q6_k(bytes, out),
        BlockType::IQ4NL => iq4_nl(bytes, out),
        BlockType::IQ4XS => iq4_xs(bytes, out),
        BlockType::MXFP4 => mxfp4(bytes, out),
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn nf4<T: Decoded>(
    packed: &[[u8; nf4::BLOCK / 2]],
    scales: impl Iterator<Item = f32>,
    out: &mut [[T; nf4::BLOCK]],
) {
    let codes = levels(&nf4::CODES);
    // the high nibble of each byte, then the low one
    let nibbles = _mm256_set1_epi64x(i64::from_le_bytes([4, 0, 12, 8, 20, 16, 28, 24]));
    for ((packed, scale), out) in packed.iter().zip(scales).zip(out) {
        let table = _mm512_mul_ps(codes, _mm512_set1_ps(scale));
        let rounded = round_any(table, table);
        for (half, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
            let spread = _mm256_cvtepu32_epi64(load_16(half));
            look_up(table, rounded, _mm256_multishift_epi64_epi8(nibbles, spread), T::out(out));
        }
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn f32<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let (bytes, rest) = bytes.as_chunks::<128>();
    let (out, out_rest) = out.as_chunks_mut::<32>();
    for (bytes, out) in bytes.iter().zip(out) {
        let single = |at| _mm512_castsi512_ps(load_64(part(bytes, at)));
        put_any(single(0), single(64), T::out(out));
    }
    T::decode_portable(BlockType::F32, rest, out_rest);
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn f16<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let (bytes, rest) = bytes.as_chunks::<64>();
    let (out, out_rest) = out.as_chunks_mut::<32>();
    for (bytes, out) in bytes.iter().zip(out) {
        let single = |at| _mm512_cvtph_ps(load_32(part(bytes, at)));
        put(single(0), single(32), T::out(out));
    }
    T::decode_portable(BlockType::F16, rest, out_rest);
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn bf16<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let (bytes, rest) = bytes.as_chunks::<64>();
    let (out, out_rest) = out.as_chunks_mut::<32>();
    for (bytes, out) in bytes.iter().zip(out) {
        match T::out(out) {
            Out::F32(out) => {
                let single = |at| _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load_32(part(bytes, at))));
                store_singles(_mm512_castsi512_ps(single(0)), _mm512_castsi512_ps(single(32)), out);
            }
            Out::Bf16(out) => store_words(load_64(bytes), out),
        }
    }
    T::decode_portable(BlockType::BF16, rest, out_rest);
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q4_0<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let centred = levels(&FROM_MINUS_8);
    for (block, out) in blocks::<18, 32, T>(bytes, out) {
        let table = _mm512_mul_ps(half(*part(block, 0)), centred);
        look_up(table, round_normal(table, table), two_halves(part(block, 2)), T::out(out));
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q4_1<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let codes = levels(&FROM_0);
    for (block, out) in blocks::<20, 32, T>(bytes, out) {
        let table = _mm512_fmadd_ps(half(*part(block, 0)), codes, half(*part(block, 2)));
        look_up(table, round_normal(table, table), two_halves(part(block, 4)), T::out(out));
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q5_0<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let (low, high) = (levels(&FROM_MINUS_16), levels(&FROM_0));
    for (block, out) in blocks::<22, 32, T>(bytes, out) {
        let d = half(*part(block, 0));
        let codes = with_fifth_bits(two_halves(part(block, 6)), *part(block, 2));
        look_up_32(_mm512_mul_ps(d, low), _mm512_mul_ps(d, high), codes, T::out(out));
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q5_1<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let (low, high) = (levels(&FROM_0), levels(&FROM_16));
    for (block, out) in blocks::<24, 32, T>(bytes, out) {
        let (d, m) = (half(*part(block, 0)), half(*part(block, 2)));
        let codes = with_fifth_bits(two_halves(part(block, 8)), *part(block, 4));
        look_up_32(_mm512_fmadd_ps(d, low, m), _mm512_fmadd_ps(d, high, m), codes, T::out(out));
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q8_0<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    for (block, out) in blocks::<34, 32, T>(bytes, out) {
        let d = half(*part(block, 0));
        let (first, second) = singles(load_32(part(block, 2)));
        put(_mm512_mul_ps(d, first), _mm512_mul_ps(d, second), T::out(out));
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q2_k<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let count = levels(&COUNT_TO_4);
    for (block, out) in blocks::<84, 256, T>(bytes, out) {
        let packed = load_16(part(block, 0));
        let nibbles = |bytes| {
            let nibbles = _mm_and_si128(bytes, _mm_set1_epi8(15));
            _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(nibbles))
        };
        let scales = _mm512_mul_ps(half(*part(block, 80)), nibbles(packed));
        let mins = _mm512_mul_ps(half(*part(block, 82)), nibbles(_mm_srli_epi16::<4>(packed)));
        for (c, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
            // the four levels of eight sub-blocks
            let table = |first| {
                let index = sub_blocks::<4>(first);
                let (scales, mins) =
                    (_mm512_permutexvar_ps(index, scales), _mm512_permutexvar_ps(index, mins));
                _mm512_fmsub_ps(scales, count, mins)
            };
            let (low, high) = (table(8 * c), table(8 * c + 4));
            let fields = load_32(part(block, 16 + 32 * c));
            for (t, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                let codes = select(3, shift_right(fields, 2 * t), in_halves(8 * t, 8 * t + 4));
                look_up_32(low, high, codes, T::out(out));
            }
        }
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q3_k<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let centred = levels(&CENTRED_TWICE);
    for (block, out) in blocks::<110, 256, T>(bytes, out) {
        let packed = q3_k_scales(part(block, 96));
        let scales = _mm512_cvtepi8_epi32(_mm_sub_epi8(load_16(&packed), _mm_set1_epi8(32)));
        let scales = _mm512_mul_ps(half(*part(block, 108)), _mm512_cvtepi32_ps(scales));
        let high_bits = load_32(part(block, 0));
        for (k, out) in out.as_chunks_mut::<64>().0.iter_mut().enumerate() {
            // the eight levels of four sub-blocks
            let table = |first| _mm512_mul_ps(_mm512_permutexvar_ps(sub_blocks::<8>(first), scales), centred);
            let (low, high) = (table(4 * k), table(4 * k + 2));
            for (h, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                let b = 2 * k + h;
                let low_bits = shift_right(load_32(part(block, 32 + 32 * (b / 4))), 2 * (b % 4));
                let high_bits =
                    if b < 2 { shift_left(high_bits, 2 - b) } else { shift_right(high_bits, b - 2) };
                let codes = select(7, select(3, low_bits, high_bits), in_halves(16 * h, 16 * h + 8));
                look_up_32(low, high, codes, T::out(out));
            }
        }
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q4_k<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let count = levels(&FROM_0);
    for (block, out) in blocks::<144, 256, T>(bytes, out) {
        let scales = k_scales_and_mins(part(block, 0));
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let nibbles = shift_right(load_32(part(block, 16 + 32 * (k / 2))), 4 * (k % 2));
            let table = scales.times_less_min(k, count);
            look_up(table, round_normal(table, table), nibbles, T::out(out));
        }
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q5_k<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let (low, high) = (levels(&FROM_0), levels(&FROM_16));
    for (block, out) in blocks::<176, 256, T>(bytes, out) {
        let scales = k_scales_and_mins(part(block, 0));
        let fifth = load_32(part(block, 16));
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let nibbles = shift_right(load_32(part(block, 48 + 32 * (k / 2))), 4 * (k % 2));
            let fifth = if k < 4 { shift_left(fifth, 4 - k) } else { shift_right(fifth, k - 4) };
            let codes = select(15, nibbles, fifth);
            let (low, high) = scales.both_times_less_min(k, low, high);
            look_up_32(low, high, codes, T::out(out));
        }
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q6_k<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let levels = [load_words(const { &words_from(-32) }), load_words(const { &words_from(0) })];
    for (block, out) in blocks::<210, 256, T>(bytes, out) {
        let scales = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16(part(block, 192))));
        let scales = Scales::of(_mm512_mul_ps(half(*part(block, 208)), scales));
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let (c, t) = (k / 4, k % 4);
            let low = shift_right(load_32(part(block, 64 * c + 32 * (t % 2))), 4 * (t / 2));
            let upper = load_32(part(block, 128 + 32 * c));
            let upper = if t < 2 { shift_left(upper, 4 - 2 * t) } else { shift_right(upper, 2 * t - 4) };
            let (first, second) = look_up_64(levels, select(15, low, upper));
            let (first, second) = (scales.times(2 * k, first), scales.times(2 * k + 1, second));
            put(first, second, T::out(out));
        }
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn iq4_nl<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let levels = levels(&NON_LINEAR);
    for (block, out) in blocks::<18, 32, T>(bytes, out) {
        let table = _mm512_mul_ps(half(*part(block, 0)), levels);
        look_up(table, round_normal(table, table), two_halves(part(block, 2)), T::out(out));
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn iq4_xs<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let levels = levels(&NON_LINEAR);
    for (block, out) in blocks::<136, 256, T>(bytes, out) {
        let packed = iq4_xs_scales(u16::from_le_bytes(*part(block, 2)), u32::from_le_bytes(*part(block, 4)));
        let centred = _mm_sub_epi8(_mm_set1_epi64x(i64::from_le_bytes(packed)), _mm_set1_epi8(32));
        let centred = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(centred));
        let scales = Scales::of(_mm512_mul_ps(half(*part(block, 0)), centred));
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let table = scales.times(k, levels);
            look_up(table, round_normal(table, table), two_halves(part(block, 8 + 16 * k)), T::out(out));
        }
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn mxfp4<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let levels = levels(&E2M1_DOUBLED);
    for (block, out) in blocks::<17, 32, T>(bytes, out) {
        let table = _mm512_mul_ps(_mm512_set1_ps(mxfp4_scale(block[0])), levels);
        // exact in bf16: powers of two, and three halves of them
        look_up(table, upper_words(table, table), two_halves(part(block, 1)), T::out(out));
    }
}

/// `start`, `start + 1`, … `start + 31` as `bf16`; all are small enough to be exact.
const fn words_from(start: i32) -> [u16; 32] {
    let mut words = [0; 32];
    let mut i = 0;
    while i < 32 {
        words[i] = (((start + i as i32) as f32).to_bits() >> 16) as u16;
        i += 1;
    }
    words
}
