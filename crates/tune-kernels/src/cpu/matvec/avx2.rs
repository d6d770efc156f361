//! Sixteen lanes as two AVX2 registers.

#![allow(
    clippy::inline_always,
    reason = "a vector instruction is one only where it is inlined into a function compiled for its set"
)]

#[allow(clippy::wildcard_imports, reason = "intrinsics")]
use std::arch::x86_64::*;

use super::lanes::Lanes;

/// Sixteen lanes of AVX2, FMA and F16C, the lower eight first. Values of this type exist only inside functions that
/// are compiled for these, and that are called after the processor was asked.
#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256; 2]);

/// The sum of eight lanes: halves, quarters, eighths.
#[inline(always)]
#[allow(unsafe_code)]
pub(super) fn sum(lanes: __m256) -> f32 {
    // SAFETY: see `Avx2`.
    unsafe {
        let quads = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let pairs = _mm_add_ps(quads, _mm_movehl_ps(quads, quads));
        _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)))
    }
}

// SAFETY (of every block): see `Avx2`; loads and stores stay inside the arrays they are given.
#[allow(unsafe_code)]
impl Lanes for Avx2 {
    type Codes = [__m256i; 2];
    type Ramp = (Self, Self);

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([unsafe { _mm256_set1_ps(value) }; 2])
    }

    #[inline(always)]
    fn load(values: &[f32; 16]) -> Self {
        let at = values.as_ptr();
        Self(unsafe { [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))] })
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; 16]) {
        let at = values.as_mut_ptr();
        unsafe {
            _mm256_storeu_ps(at, self.0[0]);
            _mm256_storeu_ps(at.add(8), self.0[1]);
        }
    }

    #[inline(always)]
    fn mul(self, factor: Self) -> Self {
        let product = |i: usize| unsafe { _mm256_mul_ps(self.0[i], factor.0[i]) };
        Self([product(0), product(1)])
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        let [a, b] = self.0;
        unsafe {
            Self([_mm256_fmadd_ps(a, factor.0[0], addend.0[0]), _mm256_fmadd_ps(b, factor.0[1], addend.0[1])])
        }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        unsafe { Self([_mm256_add_ps(self.0[0], other.0[0]), _mm256_add_ps(self.0[1], other.0[1])]) }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        sum(unsafe { _mm256_add_ps(self.0[0], self.0[1]) })
    }

    #[inline(always)]
    fn splat_half(half: [u8; 2]) -> Self {
        Self([unsafe { _mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes(half))) }; 2])
    }

    #[inline(always)]
    fn from_halves(bytes: &[u8; 32]) -> Self {
        let at = bytes.as_ptr();
        unsafe { Self([0, 16].map(|i| _mm256_cvtph_ps(_mm_loadu_si128(at.add(i).cast())))) }
    }

    #[inline(always)]
    fn from_bf16(bytes: &[u8; 32]) -> Self {
        let at = bytes.as_ptr();
        unsafe {
            let halves = [_mm_loadu_si128(at.cast()), _mm_loadu_si128(at.add(16).cast())];
            let [a, b] = [_mm256_cvtepu16_epi32(halves[0]), _mm256_cvtepu16_epi32(halves[1])];
            Self([
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
            ])
        }
    }

    #[inline(always)]
    fn unsigned(bytes: &[u8; 16]) -> Self::Codes {
        let at = bytes.as_ptr();
        unsafe {
            [
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast())),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(at.add(8).cast())),
            ]
        }
    }

    #[inline(always)]
    fn signed(bytes: &[u8; 16]) -> Self::Codes {
        let at = bytes.as_ptr();
        unsafe {
            [
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast())),
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(at.add(8).cast())),
            ]
        }
    }

    #[inline(always)]
    fn nibbles_high_first(bytes: [u8; 8]) -> Self::Codes {
        let at = bytes.as_ptr();
        unsafe {
            let low = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(at.cast::<i32>().read_unaligned()));
            let high = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(at.add(4).cast::<i32>().read_unaligned()));
            [
                _mm256_or_si256(_mm256_srli_epi64::<4>(low), _mm256_slli_epi64::<32>(low)),
                _mm256_or_si256(_mm256_srli_epi64::<4>(high), _mm256_slli_epi64::<32>(high)),
            ]
        }
    }

    #[inline(always)]
    fn bit_as_16(bits: u16) -> Self::Codes {
        unsafe {
            let bits = _mm256_set1_epi32(i32::from(bits) << 4);
            let (low, high) =
                (_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
            let bit = _mm256_set1_epi32(16);
            [
                _mm256_and_si256(_mm256_srlv_epi32(bits, low), bit),
                _mm256_and_si256(_mm256_srlv_epi32(bits, high), bit),
            ]
        }
    }

    #[inline(always)]
    fn shift_right<const SHIFT: u32>(codes: Self::Codes) -> Self::Codes {
        let count = unsafe { _mm_cvtsi32_si128(SHIFT as i32) };
        unsafe { [_mm256_srl_epi32(codes[0], count), _mm256_srl_epi32(codes[1], count)] }
    }

    #[inline(always)]
    fn shift_left<const SHIFT: u32>(codes: Self::Codes) -> Self::Codes {
        let count = unsafe { _mm_cvtsi32_si128(SHIFT as i32) };
        unsafe { [_mm256_sll_epi32(codes[0], count), _mm256_sll_epi32(codes[1], count)] }
    }

    #[inline(always)]
    fn and(codes: Self::Codes, mask: u32) -> Self::Codes {
        unsafe {
            let mask = _mm256_set1_epi32(mask as i32);
            [_mm256_and_si256(codes[0], mask), _mm256_and_si256(codes[1], mask)]
        }
    }

    #[inline(always)]
    fn or(codes: Self::Codes, other: Self::Codes) -> Self::Codes {
        unsafe { [_mm256_or_si256(codes[0], other[0]), _mm256_or_si256(codes[1], other[1])] }
    }

    #[inline(always)]
    fn to_floats(codes: Self::Codes) -> Self {
        unsafe { Self([_mm256_cvtepi32_ps(codes[0]), _mm256_cvtepi32_ps(codes[1])]) }
    }

    #[inline(always)]
    fn ramp(scale: Self, offset: Self) -> Self::Ramp {
        (scale, offset)
    }

    #[inline(always)]
    fn nibble_value((scale, offset): Self::Ramp, codes: Self::Codes) -> Self {
        Self::to_floats(Self::and(codes, 15)).mul_add(scale, offset)
    }

    #[inline(always)]
    fn lookup(table: Self, codes: Self::Codes) -> Self {
        // A permutation looks at three bits of each index; the fourth, moved to the sign, chooses between two.
        let [low, high] = table.0;
        let entries = |codes: __m256i| unsafe {
            let choice = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            _mm256_blendv_ps(
                _mm256_permutevar8x32_ps(low, codes),
                _mm256_permutevar8x32_ps(high, codes),
                choice,
            )
        };
        Self([entries(codes[0]), entries(codes[1])])
    }
}
