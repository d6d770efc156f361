//! Sixteen lanes as one AVX-512 register.

#![allow(
    clippy::inline_always,
    reason = "a vector instruction is one only where it is inlined into a function compiled for its set"
)]

#[allow(clippy::wildcard_imports, reason = "intrinsics")]
use std::arch::x86_64::*;

use super::lanes::Lanes;

/// Sixteen lanes of AVX-512 F. Values of this type exist only inside functions that are compiled for it, and that
/// are called after the processor was asked.
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

// SAFETY (of every block): see `Avx512`; loads and stores stay inside the arrays they are given.
#[allow(unsafe_code)]
impl Lanes for Avx512 {
    type Codes = __m512i;
    type Ramp = __m512;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    fn load(values: &[f32; 16]) -> Self {
        Self(unsafe { _mm512_loadu_ps(values.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; 16]) {
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn mul(self, factor: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, factor.0) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)));
            super::avx2::sum(_mm256_add_ps(_mm512_castps512_ps256(self.0), high))
        }
    }

    #[inline(always)]
    fn splat_half(half: [u8; 2]) -> Self {
        Self(unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes(half))) })
    }

    #[inline(always)]
    fn from_halves(bytes: &[u8; 32]) -> Self {
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) })
    }

    #[inline(always)]
    fn from_bf16(bytes: &[u8; 32]) -> Self {
        unsafe {
            let halves = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes.as_ptr().cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(halves)))
        }
    }

    #[inline(always)]
    fn unsigned(bytes: &[u8; 16]) -> Self::Codes {
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn signed(bytes: &[u8; 16]) -> Self::Codes {
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn nibbles_high_first(bytes: [u8; 8]) -> Self::Codes {
        unsafe {
            let pairs = _mm512_cvtepu8_epi64(_mm_loadl_epi64(bytes.as_ptr().cast()));
            _mm512_or_si512(_mm512_srli_epi64::<4>(pairs), _mm512_slli_epi64::<32>(pairs))
        }
    }

    #[inline(always)]
    fn bit_as_16(bits: u16) -> Self::Codes {
        unsafe { _mm512_maskz_set1_epi32(bits, 16) }
    }

    #[inline(always)]
    fn shift_right<const SHIFT: u32>(codes: Self::Codes) -> Self::Codes {
        unsafe { _mm512_srli_epi32::<SHIFT>(codes) }
    }

    #[inline(always)]
    fn shift_left<const SHIFT: u32>(codes: Self::Codes) -> Self::Codes {
        unsafe { _mm512_slli_epi32::<SHIFT>(codes) }
    }

    #[inline(always)]
    fn and(codes: Self::Codes, mask: u32) -> Self::Codes {
        unsafe { _mm512_and_si512(codes, _mm512_set1_epi32(mask as i32)) }
    }

    #[inline(always)]
    fn or(codes: Self::Codes, other: Self::Codes) -> Self::Codes {
        unsafe { _mm512_or_si512(codes, other) }
    }

    #[inline(always)]
    fn to_floats(codes: Self::Codes) -> Self {
        Self(unsafe { _mm512_cvtepi32_ps(codes) })
    }

    #[inline(always)]
    fn ramp(scale: Self, offset: Self) -> Self::Ramp {
        const CODES: [f32; 16] =
            [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];
        Self::load(&CODES).mul_add(scale, offset).0
    }

    #[inline(always)]
    fn nibble_value(ramp: Self::Ramp, codes: Self::Codes) -> Self {
        Self::lookup(Self(ramp), codes)
    }

    #[inline(always)]
    fn lookup(table: Self, codes: Self::Codes) -> Self {
        // looks at the low four bits of each index only
        Self(unsafe { _mm512_permutexvar_ps(codes, table.0) })
    }
}
