//! [`Lanes`] of AVX2 and AVX-512.
//!
//! Values of these types are made only inside [`super::encode_avx2`] and [`super::encode_avx512`], which are entered
//! after the processor was asked.

#[allow(clippy::wildcard_imports)] // they name themselves
use std::arch::x86_64::*;
use std::ops::{Add, Div, Mul, Sub};

use super::lanes::{Column, Lanes, Levels, ROUNDING, SIDE_BY_SIDE};

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// 2^23: the integer n below it is the low bits of 2^23 + n.
const TO_LOW_BITS: f32 = 8_388_608.0;

/// Eight lanes; needs AVX2.
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256);

/// Sixteen lanes; needs AVX-512F and AVX2.
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

macro_rules! operators {
    ($lanes:ident: $($operator:ident $method:ident $intrinsic:ident),*) => {$(
        #[allow(unsafe_code)]
        impl $operator for $lanes {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                // SAFETY: a value of this type exists only where the processor has its instructions.
                Self(unsafe { $intrinsic(self.0, other.0) })
            }
        }
    )*};
}

operators!(Avx2: Add add _mm256_add_ps, Sub sub _mm256_sub_ps, Mul mul _mm256_mul_ps, Div div _mm256_div_ps);
operators!(Avx512: Add add _mm512_add_ps, Sub sub _mm512_sub_ps, Mul mul _mm512_mul_ps, Div div _mm512_div_ps);

// SAFETY of all blocks: methods of this type are called only where the processor has AVX2; columns and byte arrays are
// read and written inside their bounds, since `at` is a multiple of 8 below 16, which the slices check.
#[allow(unsafe_code, clippy::inline_always)]
impl Lanes for Avx2 {
    const LANES: usize = 8;
    type Mask = __m256;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(unsafe { _mm256_set1_ps(value) })
    }

    #[inline(always)]
    fn load_values(values: &[f32]) -> Self {
        let lanes: &[f32] = &values[..Self::LANES];
        Self(unsafe { _mm256_loadu_ps(lanes.as_ptr()) })
    }

    #[inline(always)]
    fn load(column: &Column, at: usize) -> Self {
        Self::load_values(&column.0[at..])
    }

    #[inline(always)]
    fn store(self, column: &mut Column, at: usize) {
        let lanes: &mut [f32] = &mut column.0[at..at + Self::LANES];
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn store_bytes(self, bytes: &mut [u8; SIDE_BY_SIDE], at: usize) {
        unsafe { store_low_bytes(_mm256_cvttps_epi32(self.0), &mut bytes[at..at + Self::LANES]) }
    }

    #[inline(always)]
    fn store_nibbles(low: Self, high: Self, bytes: &mut [u8; SIDE_BY_SIDE], at: usize) {
        unsafe {
            let low = _mm256_and_si256(_mm256_cvttps_epi32(low.0), _mm256_set1_epi32(15));
            let high = _mm256_slli_epi32::<4>(_mm256_cvttps_epi32(high.0));
            store_low_bytes(_mm256_or_si256(low, high), &mut bytes[at..at + Self::LANES]);
        }
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Self(unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0) })
    }

    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        Self(unsafe {
            let sign = _mm256_set1_ps(-0.0);
            _mm256_or_ps(_mm256_andnot_ps(sign, self.0), _mm256_and_ps(sign, other.0))
        })
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(unsafe { _mm256_sqrt_ps(self.0) })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(unsafe { _mm256_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn round(self) -> Self {
        Self(unsafe { _mm256_round_ps::<NEAREST>(self.0) })
    }

    #[inline(always)]
    fn nearest_int(self) -> Self {
        let bits = (self + Self::splat(ROUNDING)).0;
        let in_place = Self(unsafe {
            let low = _mm256_and_ps(bits, _mm256_castsi256_ps(_mm256_set1_epi32(0x007F_FFFF)));
            _mm256_or_ps(low, _mm256_set1_ps(TO_LOW_BITS))
        });
        in_place - Self::splat(ROUNDING)
    }

    #[inline(always)]
    fn less(self, other: Self) -> __m256 {
        unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn equal(self, other: Self) -> __m256 {
        unsafe { _mm256_cmp_ps::<_CMP_EQ_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn differs(self, other: Self) -> __m256 {
        unsafe { _mm256_cmp_ps::<_CMP_NEQ_UQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn both(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_and_ps(a, b) }
    }

    #[inline(always)]
    fn any(mask: __m256) -> bool {
        unsafe { _mm256_movemask_ps(mask) != 0 }
    }

    #[inline(always)]
    fn bits(mask: __m256) -> u32 {
        unsafe { _mm256_movemask_ps(mask) as u32 }
    }

    #[inline(always)]
    fn select(mask: __m256, a: Self, b: Self) -> Self {
        Self(unsafe { _mm256_blendv_ps(b.0, a.0, mask) })
    }

    #[inline(always)]
    fn interleave(self, other: Self) -> (Self, Self) {
        unsafe {
            let (low, high) = (_mm256_unpacklo_ps(self.0, other.0), _mm256_unpackhi_ps(self.0, other.0));
            let (first, second) =
                (_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high));
            (Self(first), Self(second))
        }
    }

    #[inline(always)]
    fn nearest_level(self, levels: &Levels) -> (Self, Self) {
        // A permutation uses the low three bits of a node, which are enough inside one half of the tree.
        unsafe {
            let [upper, lower] = halves(&levels.tree);
            let [low_levels, high_levels] = halves(&levels.levels);
            let mut node = _mm256_set1_epi32(1);
            for depth in 0..4 {
                let midpoint = _mm256_permutevar8x32_ps(if depth < 3 { upper } else { lower }, node);
                let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_NLT_UQ>(self.0, midpoint));
                node = _mm256_sub_epi32(_mm256_add_epi32(node, node), above);
            }
            let is_high = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(node));
            let level = _mm256_blendv_ps(
                _mm256_permutevar8x32_ps(low_levels, node),
                _mm256_permutevar8x32_ps(high_levels, node),
                is_high,
            );
            let rank = _mm256_cvtepi32_ps(_mm256_and_si256(node, _mm256_set1_epi32(15)));
            (Self(rank), Self(level))
        }
    }
}

/// The bits of `a` where those of `mask` are set, else those of `b`.
///
/// # Safety
/// The processor has AVX-512F.
#[inline(always)]
#[allow(unsafe_code, clippy::inline_always)]
unsafe fn by_bits(mask: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the caller vouches for the processor.
    unsafe { _mm512_ternarylogic_epi32::<0xCA>(mask, a, b) }
}

/// Stores the lowest byte of each of eight integers.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
#[allow(unsafe_code, clippy::inline_always)]
unsafe fn store_low_bytes(integers: __m256i, bytes: &mut [u8]) {
    let bytes: &mut [u8] = &mut bytes[..Avx2::LANES];
    // SAFETY: eight bytes go into a slice of eight.
    unsafe {
        let low = _mm256_and_si256(integers, _mm256_set1_epi32(255));
        let halves = _mm_packs_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256::<1>(low));
        _mm_storel_epi64(bytes.as_mut_ptr().cast(), _mm_packus_epi16(halves, halves));
    }
}

/// The halves of a table.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
#[allow(unsafe_code, clippy::inline_always)]
unsafe fn halves(table: &[f32; 16]) -> [__m256; 2] {
    // SAFETY: both loads lie inside the table.
    unsafe { [_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))] }
}

// SAFETY of all blocks: methods of this type are called only where the processor has AVX-512F and AVX2; columns and byte arrays
// hold sixteen lanes, which the slices check.
#[allow(unsafe_code, clippy::inline_always)]
impl Lanes for Avx512 {
    const LANES: usize = 16;
    type Mask = __mmask16;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    fn load_values(values: &[f32]) -> Self {
        let lanes: &[f32] = &values[..Self::LANES];
        Self(unsafe { _mm512_loadu_ps(lanes.as_ptr()) })
    }

    #[inline(always)]
    fn load(column: &Column, at: usize) -> Self {
        Self::load_values(&column.0[at..])
    }

    #[inline(always)]
    fn store(self, column: &mut Column, at: usize) {
        let lanes: &mut [f32] = &mut column.0[at..at + Self::LANES];
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn store_bytes(self, bytes: &mut [u8; SIDE_BY_SIDE], at: usize) {
        let lanes: &mut [u8] = &mut bytes[at..at + Self::LANES];
        unsafe {
            let narrow = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(self.0));
            _mm_storeu_si128(lanes.as_mut_ptr().cast(), narrow);
        }
    }

    #[inline(always)]
    fn store_nibbles(low: Self, high: Self, bytes: &mut [u8; SIDE_BY_SIDE], at: usize) {
        let lanes: &mut [u8] = &mut bytes[at..at + Self::LANES];
        unsafe {
            let low = _mm512_and_si512(_mm512_cvttps_epi32(low.0), _mm512_set1_epi32(15));
            let high = _mm512_slli_epi32::<4>(_mm512_cvttps_epi32(high.0));
            let narrow = _mm512_cvtepi32_epi8(_mm512_or_si512(low, high));
            _mm_storeu_si128(lanes.as_mut_ptr().cast(), narrow);
        }
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Self(unsafe { _mm512_abs_ps(self.0) })
    }

    #[inline(always)]
    fn with_sign_of(self, other: Self) -> Self {
        Self(unsafe {
            let (sign, magnitude) = (_mm512_castps_si512(other.0), _mm512_castps_si512(self.0));
            _mm512_castsi512_ps(by_bits(_mm512_set1_epi32(i32::MIN), sign, magnitude))
        })
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Self(unsafe { _mm512_sqrt_ps(self.0) })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn round(self) -> Self {
        Self(unsafe { _mm512_roundscale_ps::<NEAREST>(self.0) })
    }

    #[inline(always)]
    fn nearest_int(self) -> Self {
        let bits = (self + Self::splat(ROUNDING)).0;
        let in_place = Self(unsafe {
            let (bits, exponent) =
                (_mm512_castps_si512(bits), _mm512_castps_si512(_mm512_set1_ps(TO_LOW_BITS)));
            _mm512_castsi512_ps(by_bits(_mm512_set1_epi32(0x007F_FFFF), bits, exponent))
        });
        in_place - Self::splat(ROUNDING)
    }

    #[inline(always)]
    fn less(self, other: Self) -> __mmask16 {
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn equal(self, other: Self) -> __mmask16 {
        unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn differs(self, other: Self) -> __mmask16 {
        unsafe { _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn both(a: __mmask16, b: __mmask16) -> __mmask16 {
        a & b
    }

    #[inline(always)]
    fn any(mask: __mmask16) -> bool {
        mask != 0
    }

    #[inline(always)]
    fn bits(mask: __mmask16) -> u32 {
        u32::from(mask)
    }

    #[inline(always)]
    fn select(mask: __mmask16, a: Self, b: Self) -> Self {
        Self(unsafe { _mm512_mask_blend_ps(mask, b.0, a.0) })
    }

    #[inline(always)]
    fn interleave(self, other: Self) -> (Self, Self) {
        unsafe {
            // from 16 on, an index names a lane of the second vector
            let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            let second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
            let pick = |lanes| Self(_mm512_permutex2var_ps(self.0, lanes, other.0));
            (pick(first), pick(second))
        }
    }

    #[inline(always)]
    fn nearest_level(self, levels: &Levels) -> (Self, Self) {
        // By halves: from masks of sixteen lanes the compiler makes vectors with an instruction that waits for the old
        // value of its destination, so that each round of a loop waits for the one before.
        unsafe {
            let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)));
            let (low_ranks, low_levels) = Avx2(_mm512_castps512_ps256(self.0)).nearest_level(levels);
            let (high_ranks, high_levels) = Avx2(upper).nearest_level(levels);
            let join = |low: Avx2, high: Avx2| {
                let low = _mm512_castps_pd(_mm512_castps256_ps512(low.0));
                Self(_mm512_castpd_ps(_mm512_insertf64x4::<1>(low, _mm256_castps_pd(high.0))))
            };
            (join(low_ranks, high_ranks), join(low_levels, high_levels))
        }
    }
}
