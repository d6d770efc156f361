//! AVX2 with FMA and F16C (Haswell, Zen and later).
//!
//! As in [`avx512`](super::avx512), the 16 values of a block of 4-bit codes are computed and rounded once per scale;
//! `vpshufb` looks up the two bytes of a `bf16` 32 weights at a time. Other types are computed value by value. Why
//! fused multiply-add rounds as the reference does is said there, too.
#![allow(unsafe_code)] // loads and stores, each through a reference to an array of the size they touch

#[allow(clippy::wildcard_imports)] // some sixty intrinsics
use std::arch::x86_64::*;

use half::bf16;

use super::x86::{FROM_0, FROM_MINUS_8, blocks, iq4_xs_scales, part, q3_k_scales, scales_and_mins};
use super::{Decoded, Out};
use crate::BlockType;
use crate::codebook_quants::{E2M1_DOUBLED, NON_LINEAR, mxfp4_scale};
use crate::nf4;

/// 16 values, the entries of a table.
type Table = [__m256; 2];
/// 32 values, as many as are written at once.
type Singles = [__m256; 4];

#[target_feature(enable = "avx2,fma,f16c")]
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

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn nf4<T: Decoded>(
    packed: &[[u8; nf4::BLOCK / 2]],
    scales: impl Iterator<Item = f32>,
    out: &mut [[T; nf4::BLOCK]],
) {
    let codes = levels(&nf4::CODES);
    for ((packed, scale), out) in packed.iter().zip(scales).zip(out) {
        let table = scaled(codes, _mm256_set1_ps(scale));
        for (half, out) in packed.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
            let low = load_16(half);
            let high = _mm_srli_epi16::<4>(low);
            // the high nibble of each byte, then the low one
            let codes = _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
            look_up(table, codes, T::out(out));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn f32<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let (bytes, rest) = bytes.as_chunks::<128>();
    let (out, out_rest) = out.as_chunks_mut::<32>();
    for (bytes, out) in bytes.iter().zip(out) {
        let single = |at| _mm256_castsi256_ps(load_32(part(bytes, at)));
        put([single(0), single(32), single(64), single(96)], T::out(out));
    }
    T::decode_portable(BlockType::F32, rest, out_rest);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn f16<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let (bytes, rest) = bytes.as_chunks::<64>();
    let (out, out_rest) = out.as_chunks_mut::<32>();
    for (bytes, out) in bytes.iter().zip(out) {
        let single = |at| _mm256_cvtph_ps(load_16(part(bytes, at)));
        put([single(0), single(16), single(32), single(48)], T::out(out));
    }
    T::decode_portable(BlockType::F16, rest, out_rest);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn bf16<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let (bytes, rest) = bytes.as_chunks::<64>();
    let (out, out_rest) = out.as_chunks_mut::<32>();
    for (bytes, out) in bytes.iter().zip(out) {
        match T::out(out) {
            Out::F32(out) => {
                let words = |at| _mm256_cvtepu16_epi32(load_16(part(bytes, at)));
                let single = |at| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words(at)));
                store_singles([single(0), single(16), single(32), single(48)], out);
            }
            Out::Bf16(out) => store_words(load_32(part(bytes, 0)), load_32(part(bytes, 32)), out),
        }
    }
    T::decode_portable(BlockType::BF16, rest, out_rest);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4_0<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let centred = levels(&FROM_MINUS_8);
    for (block, out) in blocks::<18, 32, T>(bytes, out) {
        look_up(scaled(centred, half(*part(block, 0))), two_halves(part(block, 2)), T::out(out));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4_1<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let count = levels(&FROM_0);
    for (block, out) in blocks::<20, 32, T>(bytes, out) {
        let (d, m) = (half(*part(block, 0)), half(*part(block, 2)));
        let table = [_mm256_fmadd_ps(d, count[0], m), _mm256_fmadd_ps(d, count[1], m)];
        look_up(table, two_halves(part(block, 4)), T::out(out));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q5_0<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    for (block, out) in blocks::<22, 32, T>(bytes, out) {
        let d = half(*part(block, 0));
        let codes = with_fifth_bits(two_halves(part(block, 6)), *part(block, 2));
        let centred = _mm256_sub_epi8(codes, _mm256_set1_epi8(16));
        put(singles(centred).map(|q| _mm256_mul_ps(d, q)), T::out(out));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q5_1<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    for (block, out) in blocks::<24, 32, T>(bytes, out) {
        let (d, m) = (half(*part(block, 0)), half(*part(block, 2)));
        let codes = with_fifth_bits(two_halves(part(block, 8)), *part(block, 4));
        put(singles(codes).map(|q| _mm256_fmadd_ps(d, q, m)), T::out(out));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q8_0<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    for (block, out) in blocks::<34, 32, T>(bytes, out) {
        let d = half(*part(block, 0));
        put(singles(load_32(part(block, 2))).map(|q| _mm256_mul_ps(d, q)), T::out(out));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q2_k<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    for (block, out) in blocks::<84, 256, T>(bytes, out) {
        let packed = load_16(part(block, 0));
        let nibbles = |bytes| table_of_bytes(_mm_and_si128(bytes, _mm_set1_epi8(15)));
        let scales = array(scaled(nibbles(packed), half(*part(block, 80))));
        let mins = array(scaled(nibbles(_mm_srli_epi16::<4>(packed)), half(*part(block, 82))));
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let fields = shift_right(load_32(part(block, 16 + 32 * (k / 4))), 2 * (k % 4));
            let codes = singles(_mm256_and_si256(fields, _mm256_set1_epi8(3)));
            let affine = |q, k: usize| _mm256_fmsub_ps(_mm256_set1_ps(scales[k]), q, _mm256_set1_ps(mins[k]));
            let (first, second) = (2 * k, 2 * k + 1);
            let values = [
                affine(codes[0], first),
                affine(codes[1], first),
                affine(codes[2], second),
                affine(codes[3], second),
            ];
            put(values, T::out(out));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q3_k<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    for (block, out) in blocks::<110, 256, T>(bytes, out) {
        let packed = load_16(&q3_k_scales(part(block, 96)));
        let centred = table_of_bytes(_mm_sub_epi8(packed, _mm_set1_epi8(32)));
        let scales = array(scaled(centred, half(*part(block, 108))));
        let high = load_32(part(block, 0));
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let low = shift_right(load_32(part(block, 32 + 32 * (k / 4))), 2 * (k % 4));
            let low = _mm256_and_si256(low, _mm256_set1_epi8(3));
            let bit = _mm256_and_si256(high, _mm256_set1_epi8((1u8 << k) as i8));
            let clear = _mm256_cmpeq_epi8(bit, _mm256_setzero_si256());
            let codes = _mm256_sub_epi8(low, _mm256_and_si256(clear, _mm256_set1_epi8(4)));
            put_scaled(codes, &scales, k, T::out(out));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4_k<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let count = levels(&FROM_0);
    for (block, out) in blocks::<144, 256, T>(bytes, out) {
        let scales = k_scales_and_mins(part(block, 0));
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let nibbles = shift_right(load_32(part(block, 16 + 32 * (k / 2))), 4 * (k % 2));
            let (scale, min) = (_mm256_set1_ps(scales[k]), _mm256_set1_ps(scales[8 + k]));
            let table = [_mm256_fmsub_ps(scale, count[0], min), _mm256_fmsub_ps(scale, count[1], min)];
            look_up(table, nibbles, T::out(out));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q5_k<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    for (block, out) in blocks::<176, 256, T>(bytes, out) {
        let scales = k_scales_and_mins(part(block, 0));
        let fifth = load_32(part(block, 16));
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let nibbles = shift_right(load_32(part(block, 48 + 32 * (k / 2))), 4 * (k % 2));
            let nibbles = _mm256_and_si256(nibbles, _mm256_set1_epi8(15));
            let fifth = if k < 4 { shift_left(fifth, 4 - k) } else { shift_right(fifth, k - 4) };
            let (scale, min) = (_mm256_set1_ps(scales[k]), _mm256_set1_ps(scales[8 + k]));
            let codes = singles(or_masked(nibbles, fifth, 16));
            put(codes.map(|q| _mm256_fmsub_ps(scale, q, min)), T::out(out));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q6_k<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    for (block, out) in blocks::<210, 256, T>(bytes, out) {
        let scales = table_of_bytes(load_16(part(block, 192)));
        let scales = array(scaled(scales, half(*part(block, 208))));
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let (c, t) = (k / 4, k % 4);
            let low = shift_right(load_32(part(block, 64 * c + 32 * (t % 2))), 4 * (t / 2));
            let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
            let upper = load_32(part(block, 128 + 32 * c));
            let upper = if t < 2 { shift_left(upper, 4 - 2 * t) } else { shift_right(upper, 2 * t - 4) };
            let codes = _mm256_sub_epi8(or_masked(low, upper, 0x30), _mm256_set1_epi8(32));
            put_scaled(codes, &scales, k, T::out(out));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn iq4_nl<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let levels = levels(&NON_LINEAR);
    for (block, out) in blocks::<18, 32, T>(bytes, out) {
        look_up(scaled(levels, half(*part(block, 0))), two_halves(part(block, 2)), T::out(out));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn iq4_xs<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let levels = levels(&NON_LINEAR);
    for (block, out) in blocks::<136, 256, T>(bytes, out) {
        let packed = iq4_xs_scales(u16::from_le_bytes(*part(block, 2)), u32::from_le_bytes(*part(block, 4)));
        let packed = _mm_set1_epi64x(i64::from_le_bytes(packed));
        let centred = table_of_bytes(_mm_sub_epi8(packed, _mm_set1_epi8(32)));
        let scales = array(scaled(centred, half(*part(block, 0))));
        for (k, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let table = scaled(levels, _mm256_set1_ps(scales[k]));
            look_up(table, two_halves(part(block, 8 + 16 * k)), T::out(out));
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn mxfp4<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let levels = levels(&E2M1_DOUBLED);
    for (block, out) in blocks::<17, 32, T>(bytes, out) {
        let table = scaled(levels, _mm256_set1_ps(mxfp4_scale(block[0])));
        look_up(table, two_halves(part(block, 1)), T::out(out));
    }
}

/// `out[i] = table[codes[i] % 16]`
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn look_up(table: Table, codes: __m256i, out: Out<'_>) {
    match out {
        Out::F32(out) => {
            let entry = |eight| {
                let index = _mm256_cvtepu8_epi32(eight);
                let (low, high) =
                    (_mm256_permutevar8x32_ps(table[0], index), _mm256_permutevar8x32_ps(table[1], index));
                // the sign bit chooses
                _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
            };
            store_singles(eights(codes).map(entry), out);
        }
        Out::Bf16(out) => {
            let (low, high) = table_bytes(table);
            let codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
            let (low, high) = (_mm256_shuffle_epi8(low, codes), _mm256_shuffle_epi8(high, codes));
            let (first, second) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
            store_words(
                _mm256_permute2x128_si256::<0x20>(first, second),
                _mm256_permute2x128_si256::<0x31>(first, second),
                out,
            );
        }
    }
}

/// The low bytes of a table rounded to `bf16`, and its high bytes; in both lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn table_bytes(table: Table) -> (__m256i, __m256i) {
    let words = round(table[0], table[1]);
    let (low, high) = (_mm256_and_si256(words, _mm256_set1_epi16(0xFF)), _mm256_srli_epi16::<8>(words));
    let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(low, high));
    (_mm256_permute2x128_si256::<0x00>(bytes, bytes), _mm256_permute2x128_si256::<0x11>(bytes, bytes))
}

/// Writes signed codes times `scales[2 * k]` for the first 16, `scales[2 * k + 1]` for the others.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put_scaled(codes: __m256i, scales: &[f32; 16], k: usize, out: Out<'_>) {
    let [a, b, c, d] = singles(codes);
    let (first, second) = (_mm256_set1_ps(scales[2 * k]), _mm256_set1_ps(scales[2 * k + 1]));
    let ([a, b], [c, d]) = (scaled([a, b], first), scaled([c, d], second));
    put([a, b, c, d], out);
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put(values: Singles, out: Out<'_>) {
    match out {
        Out::F32(out) => store_singles(values, out),
        Out::Bf16(out) => store_words(round(values[0], values[1]), round(values[2], values[3]), out),
    }
}

/// 16 singles rounded to `bf16`, as [`f32_to_bf16`](crate::float::f32_to_bf16) does.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn round(first: __m256, second: __m256) -> __m256i {
    let round = |values| {
        let bits = _mm256_castps_si256(values);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
        _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
    };
    _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(round(first), round(second)))
}

/// Signed bytes as singles.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn singles(bytes: __m256i) -> Singles {
    eights(bytes).map(|eight| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)))
}

/// Signed bytes as the 16 values of a table.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn table_of_bytes(bytes: __m128i) -> Table {
    [bytes, _mm_srli_si128::<8>(bytes)].map(|eight| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)))
}

/// Eight bytes each, at the bottom of a register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eights(bytes: __m256i) -> [__m128i; 4] {
    let (first, second) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
    [first, _mm_srli_si128::<8>(first), second, _mm_srli_si128::<8>(second)]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scaled(table: Table, scale: __m256) -> Table {
    table.map(|values| _mm256_mul_ps(scale, values))
}

/// `d`·scale of the eight sub-blocks of Q4_K and Q5_K, then `dmin`·minimum.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn k_scales_and_mins(header: &[u8; 16]) -> [f32; 16] {
    let [scales, mins] = table_of_bytes(load_16(&scales_and_mins(part(header, 4))));
    let (d, dmin) = (half(*part(header, 0)), half(*part(header, 2)));
    array([_mm256_mul_ps(d, scales), _mm256_mul_ps(dmin, mins)])
}

/// 32 codes: the low nibbles of `bytes`, then the high ones. Bits above the fourth are not cleared.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn two_halves(bytes: &[u8; 16]) -> __m256i {
    let low = load_16(bytes);
    _mm256_set_m128i(_mm_srli_epi16::<4>(low), low)
}

/// The low nibbles of `codes`, with bit `i` of `fifth` on top of code `i`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn with_fifth_bits(codes: __m256i, fifth: [u8; 4]) -> __m256i {
    let codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    let byte_of = |i| i64::from(i) * 0x0101_0101_0101_0101;
    let byte_of = _mm256_set_epi64x(byte_of(3), byte_of(2), byte_of(1), byte_of(0));
    let fifth = _mm256_shuffle_epi8(_mm256_set1_epi32(i32::from_le_bytes(fifth)), byte_of);
    let bit = _mm256_set1_epi64x(i64::from_le_bytes(std::array::from_fn(|i| 1 << i)));
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(fifth, bit), bit);
    or_masked(codes, set, 16)
}

/// `bytes | other & mask` in every byte.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn or_masked(bytes: __m256i, other: __m256i, mask: i8) -> __m256i {
    _mm256_or_si256(bytes, _mm256_and_si256(other, _mm256_set1_epi8(mask)))
}

/// Shifts every byte by less than its width; bits of the neighbours come in, for the caller to mask.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn shift_right(bytes: __m256i, bits: usize) -> __m256i {
    _mm256_srl_epi16(bytes, _mm_cvtsi64_si128(bits as i64))
}

/// [`shift_right`] the other way.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn shift_left(bytes: __m256i, bits: usize) -> __m256i {
    _mm256_sll_epi16(bytes, _mm_cvtsi64_si128(bits as i64))
}

/// A half in all eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half(bits: [u8; 2]) -> __m256 {
    _mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes(bits)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn levels(values: &[f32; 16]) -> Table {
    // SAFETY: the reference is to 64 bytes.
    unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))] }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn array(values: Table) -> [f32; 16] {
    let mut array = [0.0; 16];
    // SAFETY: the array is of 64 bytes.
    unsafe {
        _mm256_storeu_ps(array.as_mut_ptr(), values[0]);
        _mm256_storeu_ps(array.as_mut_ptr().add(8), values[1]);
    }
    array
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_32(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is to 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_words(first: __m256i, second: __m256i, out: &mut [bf16; 32]) {
    // SAFETY: the reference is to 64 bytes, and any 16 bits are a bf16.
    unsafe {
        _mm256_storeu_si256(out.as_mut_ptr().cast(), first);
        _mm256_storeu_si256(out.as_mut_ptr().add(16).cast(), second);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_singles(values: Singles, out: &mut [f32; 32]) {
    for (values, out) in values.into_iter().zip(out.as_chunks_mut::<8>().0) {
        // SAFETY: the reference is to 32 bytes.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), values) };
    }
}
