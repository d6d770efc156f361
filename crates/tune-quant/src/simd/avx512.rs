//! AVX-512 with its BF16 and VBMI extensions (Zen 4, Sapphire Rapids and later).
//!
//! A block of 4- or 5-bit codes has at most 32 different values. They are computed once per scale and rounded to
//! `bf16` together; each weight is then one of the 32 words of a register, which `vpermw` looks up 32 at a time.
//! Types of more levels are computed value by value.
//!
//! Fused multiply-add rounds as the product and the sum of the reference do, because the products are exact: 11
//! bits of a half, at most 6 of a scale and 5 of a code.
//!
//! `vcvtne2ps2bf16` takes subnormal singles for zero. The values that go through it are multiples of 2⁻²⁴, the
//! smallest half, so none is subnormal; the other types (F32, MXFP4, NF4) are rounded by [`round_any`].
#![allow(unsafe_code)] // loads and stores, each through a reference to an array of the size they touch

use std::arch::asm;
use std::arch::x86_64::*;

use half::bf16;

use super::{
    Decoded, FROM_0, FROM_16, FROM_MINUS_8, FROM_MINUS_16, Out, blocks, iq4_xs_scales, part, q3_k_scales,
    scales_and_mins,
};
use crate::BlockType;
use crate::codebook_quants::{E2M1_DOUBLED, NON_LINEAR, mxfp4_scale};
use crate::nf4;

/// The scales of a block, or its scales and minima, in memory, where an instruction broadcasts its operand for nothing.
/// The compiler would rather keep them in a register and shuffle, and shuffles are what limits these functions.
#[repr(align(64))]
struct Scales([f32; 16]);

impl Scales {
    #[inline]
    #[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
    fn of(values: __m512) -> Self {
        let mut scales = Self([0.0; 16]);
        // SAFETY: the array is of 64 bytes.
        unsafe { _mm512_storeu_ps(scales.0.as_mut_ptr(), values) };
        scales
    }

    /// Scale `k` times `values`.
    #[inline]
    #[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
    fn times(&self, k: usize, values: __m512) -> __m512 {
        let product;
        // SAFETY: reads the four bytes of the reference.
        unsafe {
            asm!("vmulps {}, {}, dword ptr [{}]{{1to16}}", out(zmm_reg) product, in(zmm_reg) values,
                in(reg) &raw const self.0[k], options(pure, readonly, nostack, preserves_flags));
        }
        product
    }

    /// Scale `k` times `values`, less minimum `k`.
    #[inline]
    #[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
    fn times_less_min(&self, k: usize, values: __m512) -> __m512 {
        let difference;
        // SAFETY: reads the four bytes of each reference.
        unsafe {
            asm!("vbroadcastss {0}, dword ptr [{1}]", "vfmsub213ps {0}, {2}, dword ptr [{3}]{{1to16}}",
                out(zmm_reg) difference, in(reg) &raw const self.0[k], in(zmm_reg) values,
                in(reg) &raw const self.0[8 + k], options(pure, readonly, nostack, preserves_flags));
        }
        difference
    }
}

/// The upper words of 32 double words.
const ODD: [u16; 32] = {
    let mut odd = [1; 32];
    let mut i = 1;
    while i < 32 {
        odd[i] = odd[i - 1] + 2;
        i += 1;
    }
    odd
};

/// 0, 16, 1, 17, … 15, 31
const INTERLEAVE: [u16; 32] = {
    let mut places = [0; 32];
    let mut i = 0;
    while i < 32 {
        places[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    places
};

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
        let table = _mm512_mul_ps(half(part(block, 0)), centred);
        look_up(table, round_normal(table, table), two_halves(part(block, 2)), T::out(out));
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q4_1<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let codes = levels(&FROM_0);
    for (block, out) in blocks::<20, 32, T>(bytes, out) {
        let table = _mm512_fmadd_ps(half(part(block, 0)), codes, half(part(block, 2)));
        look_up(table, round_normal(table, table), two_halves(part(block, 4)), T::out(out));
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q5_0<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let (low, high) = (levels(&FROM_MINUS_16), levels(&FROM_0));
    for (block, out) in blocks::<22, 32, T>(bytes, out) {
        let d = half(part(block, 0));
        let codes = with_fifth_bits(two_halves(part(block, 6)), part(block, 2));
        look_up_32(_mm512_mul_ps(d, low), _mm512_mul_ps(d, high), codes, T::out(out));
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q5_1<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let (low, high) = (levels(&FROM_0), levels(&FROM_16));
    for (block, out) in blocks::<24, 32, T>(bytes, out) {
        let (d, m) = (half(part(block, 0)), half(part(block, 2)));
        let codes = with_fifth_bits(two_halves(part(block, 8)), part(block, 4));
        look_up_32(_mm512_fmadd_ps(d, low, m), _mm512_fmadd_ps(d, high, m), codes, T::out(out));
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q8_0<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    for (block, out) in blocks::<34, 32, T>(bytes, out) {
        let d = half(part(block, 0));
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
        let scales = _mm512_mul_ps(half(part(block, 80)), nibbles(packed));
        let mins = _mm512_mul_ps(half(part(block, 82)), nibbles(_mm_srli_epi16::<4>(packed)));
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
        let scales = _mm512_mul_ps(half(part(block, 108)), _mm512_cvtepi32_ps(scales));
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
            let (low, high) = (scales.times_less_min(k, low), scales.times_less_min(k, high));
            look_up_32(low, high, codes, T::out(out));
        }
    }
}

#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn q6_k<T: Decoded>(bytes: &[u8], out: &mut [T]) {
    let levels = [load_words(const { &words_from(-32) }), load_words(const { &words_from(0) })];
    for (block, out) in blocks::<210, 256, T>(bytes, out) {
        let scales = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_16(part(block, 192))));
        let scales = Scales::of(_mm512_mul_ps(half(part(block, 208)), scales));
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
        let table = _mm512_mul_ps(half(part(block, 0)), levels);
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
        let scales = Scales::of(_mm512_mul_ps(half(part(block, 0)), centred));
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

/// `out[i] = table[codes[i] % 16]`; `rounded` holds the table twice, so that the fifth bit of a code does not matter.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn look_up(table: __m512, rounded: __m512i, codes: __m256i, out: Out<'_>) {
    match out {
        Out::F32(out) => {
            let (first, second) = halves(codes);
            let first = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(first), table);
            let second = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(second), table);
            store_singles(first, second, out);
        }
        Out::Bf16(out) => store_words(_mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), rounded), out),
    }
}

/// `out[i]` is entry `codes[i] % 32` of the table `low`, `high`; no entry is a subnormal single.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn look_up_32(low: __m512, high: __m512, codes: __m256i, out: Out<'_>) {
    match out {
        Out::F32(out) => {
            let (first, second) = halves(codes);
            let first = _mm512_permutex2var_ps(low, _mm512_cvtepu8_epi32(first), high);
            let second = _mm512_permutex2var_ps(low, _mm512_cvtepu8_epi32(second), high);
            store_singles(first, second, out);
        }
        Out::Bf16(out) => {
            let table = round_normal(low, high);
            store_words(_mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table), out);
        }
    }
}

/// `levels[codes[i] % 64]` as singles, of levels that are exact in `bf16`. It takes fewer instructions than to convert
/// integers.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn look_up_64([low, high]: [__m512i; 2], codes: __m256i) -> (__m512, __m512) {
    // code i to the lower word of lane i, code 16 + i to its upper word
    let index = _mm512_permutexvar_epi8(load_words(&INTERLEAVE), _mm512_castsi256_si512(codes));
    let words = _mm512_permutex2var_epi16(low, index, high);
    let second = _mm512_and_si512(words, _mm512_set1_epi32(-0x1_0000));
    (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)), _mm512_castsi512_ps(second))
}

/// Writes 32 values of which none is a subnormal single.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn put(first: __m512, second: __m512, out: Out<'_>) {
    match out {
        Out::F32(out) => store_singles(first, second, out),
        Out::Bf16(out) => store_words(round_normal(first, second), out),
    }
}

/// Writes any 32 values.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn put_any(first: __m512, second: __m512, out: Out<'_>) {
    match out {
        Out::F32(out) => store_singles(first, second, out),
        Out::Bf16(out) => store_words(round_any(first, second), out),
    }
}

/// 32 singles, none of them subnormal, rounded to `bf16`.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn round_normal(first: __m512, second: __m512) -> __m512i {
    // SAFETY: both types are 64 bytes of plain bits.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(second, first)) }
}

/// Any 32 singles rounded to `bf16`, as [`f32_to_bf16`](crate::float::f32_to_bf16) does.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn round_any(first: __m512, second: __m512) -> __m512i {
    let round = |values| {
        let bits = _mm512_castps_si512(values);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
        _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000))
    };
    let rounded = |values| _mm512_castsi512_ps(round(values));
    upper_words(rounded(first), rounded(second))
}

/// 32 singles cut to `bf16`.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn upper_words(first: __m512, second: __m512) -> __m512i {
    let (first, second) = (_mm512_castps_si512(first), _mm512_castps_si512(second));
    _mm512_permutex2var_epi16(first, load_words(&ODD), second)
}

/// Signed bytes as singles.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn singles(bytes: __m256i) -> (__m512, __m512) {
    let (first, second) = halves(bytes);
    let single = |bytes| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    (single(first), single(second))
}

/// `d`·scale of the eight sub-blocks of Q4_K and Q5_K, then `dmin`·minimum.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn k_scales_and_mins(header: &[u8; 16]) -> Scales {
    let factors = _mm512_mask_blend_ps(0xFF00, half(part(header, 0)), half(part(header, 2)));
    let packed = load_16(&scales_and_mins(part(header, 4)));
    Scales::of(_mm512_mul_ps(factors, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(packed))))
}

/// 32 codes: the low nibbles of `bytes`, then the high ones. Bits above the fourth are not cleared.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn two_halves(bytes: &[u8; 16]) -> __m256i {
    let shifts = _mm256_set_epi64x(0x0004_0004_0004_0004, 0x0004_0004_0004_0004, 0, 0);
    _mm256_srlv_epi16(_mm256_broadcastsi128_si256(load_16(bytes)), shifts)
}

/// The low nibbles of `codes`, with bit `i` of `fifth` on top of code `i`.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn with_fifth_bits(codes: __m256i, fifth: &[u8; 4]) -> __m256i {
    let codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    _mm256_mask_add_epi8(codes, u32::from_le_bytes(*fifth), codes, _mm256_set1_epi8(16))
}

/// For each of 16 lanes the sub-block whose scale it takes: `LEVELS` lanes each, from sub-block `first` on.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn sub_blocks<const LEVELS: usize>(first: usize) -> __m512i {
    let mut lanes = [0i32; 16];
    lanes.iter_mut().enumerate().for_each(|(i, lane)| *lane = (first + i / LEVELS) as i32);
    // SAFETY: the array is of 64 bytes.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

/// 16 bytes of `first`, then 16 of `second`.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn in_halves(first: usize, second: usize) -> __m256i {
    _mm256_set_m128i(_mm_set1_epi8(second as i8), _mm_set1_epi8(first as i8))
}

/// In every byte, the bits of `low` where `mask` has ones, those of `high` elsewhere.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn select(mask: i8, low: __m256i, high: __m256i) -> __m256i {
    _mm256_ternarylogic_epi64::<0xCA>(_mm256_set1_epi8(mask), low, high)
}

/// Shifts every byte by less than its width; bits of the neighbours come in, for the caller to mask.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn shift_right(bytes: __m256i, bits: usize) -> __m256i {
    _mm256_srlv_epi16(bytes, _mm256_set1_epi16(bits as i16))
}

/// [`shift_right`] the other way.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn shift_left(bytes: __m256i, bits: usize) -> __m256i {
    _mm256_sllv_epi16(bytes, _mm256_set1_epi16(bits as i16))
}

/// A half in all 16 lanes.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn half(bits: &[u8; 2]) -> __m512 {
    _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes(*bits)))
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn halves(bytes: __m256i) -> (__m128i, __m128i) {
    (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes))
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn levels(values: &[f32; 16]) -> __m512 {
    // SAFETY: the reference is to 64 bytes.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn load_16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn load_32(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is to 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn load_64(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the reference is to 64 bytes.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn load_words(words: &[u16; 32]) -> __m512i {
    // SAFETY: the reference is to 64 bytes.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn store_words(values: __m512i, out: &mut [bf16; 32]) {
    // SAFETY: the reference is to 64 bytes, and any 16 bits are a bf16.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), values) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
fn store_singles(first: __m512, second: __m512, out: &mut [f32; 32]) {
    // SAFETY: the reference is to 128 bytes.
    unsafe {
        _mm512_storeu_ps(out.as_mut_ptr(), first);
        _mm512_storeu_ps(out.as_mut_ptr().add(16), second);
    }
}
