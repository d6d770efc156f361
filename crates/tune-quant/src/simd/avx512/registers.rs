//! Operations on registers that the decoders of one type each are made of.
#![allow(unsafe_code)] // loads and stores, each through a reference to an array of the size they touch

use std::arch::asm;
#[allow(clippy::wildcard_imports)] // some forty intrinsics
use std::arch::x86_64::*;

use half::bf16;

use crate::simd::Out;
use crate::simd::x86::{part, scales_and_mins};

/// The scales of a block, or its scales and minima, in memory, where an instruction broadcasts its operand for nothing.
/// Left to itself, the compiler keeps them in a register and shuffles, and shuffles are what limits these functions.
#[repr(align(64))]
pub(super) struct Scales([f32; 16]);

impl Scales {
    #[inline]
    #[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
    pub(super) fn of(values: __m512) -> Self {
        let mut scales = Self([0.0; 16]);
        // SAFETY: the array is of 64 bytes.
        unsafe { _mm512_storeu_ps(scales.0.as_mut_ptr(), values) };
        scales
    }

    /// Scale `k` times `values`.
    #[inline]
    #[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
    pub(super) fn times(&self, k: usize, values: __m512) -> __m512 {
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
    pub(super) fn times_less_min(&self, k: usize, values: __m512) -> __m512 {
        let difference;
        // SAFETY: reads the four bytes of each reference.
        unsafe {
            asm!("vbroadcastss {0}, dword ptr [{1}]", "vfmsub213ps {0}, {2}, dword ptr [{3}]{{1to16}}",
                out(zmm_reg) difference, in(reg) &raw const self.0[k], in(zmm_reg) values,
                in(reg) &raw const self.0[8 + k], options(pure, readonly, nostack, preserves_flags));
        }
        difference
    }

    /// [`times_less_min`](Self::times_less_min) of `first` and of `second`.
    #[inline]
    #[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
    pub(super) fn both_times_less_min(&self, k: usize, first: __m512, second: __m512) -> (__m512, __m512) {
        let (first_difference, second_difference);
        // SAFETY: reads the four bytes of each reference.
        unsafe {
            asm!("vbroadcastss {0}, dword ptr [{2}]", "vmovaps {1}, {0}",
                "vfmsub213ps {0}, {3}, dword ptr [{5}]{{1to16}}", "vfmsub213ps {1}, {4}, dword ptr [{5}]{{1to16}}",
                out(zmm_reg) first_difference, out(zmm_reg) second_difference, in(reg) &raw const self.0[k],
                in(zmm_reg) first, in(zmm_reg) second, in(reg) &raw const self.0[8 + k],
                options(pure, readonly, nostack, preserves_flags));
        }
        (first_difference, second_difference)
    }
}

/// `out[i] = table[codes[i] % 16]`; `rounded` holds the table twice, so that the fifth bit of a code does not matter.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn look_up(table: __m512, rounded: __m512i, codes: __m256i, out: Out<'_>) {
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
pub(super) fn look_up_32(low: __m512, high: __m512, codes: __m256i, out: Out<'_>) {
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
pub(super) fn look_up_64([low, high]: [__m512i; 2], codes: __m256i) -> (__m512, __m512) {
    // code i to the lower word of lane i, code 16 + i to its upper word; the upper byte of a word does not matter
    let index = _mm512_permutexvar_epi8(load_words(&INTERLEAVE), _mm512_castsi256_si512(codes));
    let words = _mm512_permutex2var_epi16(low, index, high);
    let second = _mm512_and_si512(words, _mm512_set1_epi32(-0x1_0000));
    (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)), _mm512_castsi512_ps(second))
}

/// Writes 32 values of which none is a subnormal single.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn put(first: __m512, second: __m512, out: Out<'_>) {
    match out {
        Out::F32(out) => store_singles(first, second, out),
        Out::Bf16(out) => store_words(round_normal(first, second), out),
    }
}

/// Writes any 32 values.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn put_any(first: __m512, second: __m512, out: Out<'_>) {
    match out {
        Out::F32(out) => store_singles(first, second, out),
        Out::Bf16(out) => store_words(round_any(first, second), out),
    }
}

/// 32 singles, none of them subnormal, rounded to `bf16`.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn round_normal(first: __m512, second: __m512) -> __m512i {
    // SAFETY: both types are 64 bytes of plain bits.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(second, first)) }
}

/// Any 32 singles rounded to `bf16`, as [`f32_to_bf16`](crate::float::f32_to_bf16) does.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn round_any(first: __m512, second: __m512) -> __m512i {
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
pub(super) fn upper_words(first: __m512, second: __m512) -> __m512i {
    let (first, second) = (_mm512_castps_si512(first), _mm512_castps_si512(second));
    _mm512_permutex2var_epi16(first, load_words(&ODD), second)
}

/// Signed bytes as singles.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn singles(bytes: __m256i) -> (__m512, __m512) {
    let (first, second) = halves(bytes);
    let single = |bytes| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    (single(first), single(second))
}

/// `d`·scale of the eight sub-blocks of Q4_K and Q5_K, then `dmin`·minimum.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn k_scales_and_mins(header: &[u8; 16]) -> Scales {
    let factors = _mm512_mask_blend_ps(0xFF00, half(*part(header, 0)), half(*part(header, 2)));
    let packed = load_16(&scales_and_mins(part(header, 4)));
    Scales::of(_mm512_mul_ps(factors, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(packed))))
}

/// 32 codes: the low nibbles of `bytes`, then the high ones. Bits above the fourth are not cleared.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn two_halves(bytes: &[u8; 16]) -> __m256i {
    let shifts = _mm256_set_epi64x(0x0004_0004_0004_0004, 0x0004_0004_0004_0004, 0, 0);
    _mm256_srlv_epi16(_mm256_broadcastsi128_si256(load_16(bytes)), shifts)
}

/// The low nibbles of `codes`, with bit `i` of `fifth` on top of code `i`.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn with_fifth_bits(codes: __m256i, fifth: [u8; 4]) -> __m256i {
    let codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    _mm256_mask_add_epi8(codes, u32::from_le_bytes(fifth), codes, _mm256_set1_epi8(16))
}

/// For each of 16 lanes the sub-block whose scale it takes: `LEVELS` lanes each, from sub-block `first` on.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn sub_blocks<const LEVELS: usize>(first: usize) -> __m512i {
    let mut lanes = [0i32; 16];
    lanes.iter_mut().enumerate().for_each(|(i, lane)| *lane = (first + i / LEVELS) as i32);
    // SAFETY: the array is of 64 bytes.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

/// 16 bytes of `first`, then 16 of `second`.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn in_halves(first: usize, second: usize) -> __m256i {
    _mm256_set_m128i(_mm_set1_epi8(second as i8), _mm_set1_epi8(first as i8))
}

/// In every byte, the bits of `low` where `mask` has ones, those of `high` elsewhere.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn select(mask: i8, low: __m256i, high: __m256i) -> __m256i {
    _mm256_ternarylogic_epi64::<0xCA>(_mm256_set1_epi8(mask), low, high)
}

/// Shifts every byte by less than its width; bits of the neighbours come in, for the caller to mask.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn shift_right(bytes: __m256i, bits: usize) -> __m256i {
    _mm256_srlv_epi16(bytes, _mm256_set1_epi16(bits as i16))
}

/// [`shift_right`] the other way.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn shift_left(bytes: __m256i, bits: usize) -> __m256i {
    _mm256_sllv_epi16(bytes, _mm256_set1_epi16(bits as i16))
}

/// A half in all 16 lanes.
#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn half(bits: [u8; 2]) -> __m512 {
    _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes(bits)))
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn halves(bytes: __m256i) -> (__m128i, __m128i) {
    (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes))
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn levels(values: &[f32; 16]) -> __m512 {
    // SAFETY: the reference is to 64 bytes.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn load_16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 bytes.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn load_32(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is to 32 bytes.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn load_64(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the reference is to 64 bytes.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn load_words(words: &[u16; 32]) -> __m512i {
    // SAFETY: the reference is to 64 bytes.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn store_words(values: __m512i, out: &mut [bf16; 32]) {
    // SAFETY: the reference is to 64 bytes, and any 16 bits are a bf16.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), values) }
}

#[inline]
#[target_feature(enable = "avx512vl,avx512vbmi,avx512bf16")]
pub(super) fn store_singles(first: __m512, second: __m512, out: &mut [f32; 32]) {
    // SAFETY: the reference is to 128 bytes.
    unsafe {
        _mm512_storeu_ps(out.as_mut_ptr(), first);
        _mm512_storeu_ps(out.as_mut_ptr().add(16), second);
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
