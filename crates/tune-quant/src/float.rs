//! F32, F16 and BF16: one value per block, and the half-precision scales of all other types.

const HALF_EXPONENT: u32 = 0x7C00;
const F32_EXPONENT: u32 = 0x7F80_0000;
const F32_QUIET: u32 = 0x0040_0000;

/// The half at `bytes[at..at + 2]`.
#[inline]
pub(crate) fn half_at<const N: usize>(bytes: &[u8; N], at: usize) -> f32 {
    half_to_f32(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

/// Half to single, exact, without branches or tables so that it vectorises.
///
/// Moving exponent and mantissa into the place of a single's leaves the exponent bias 127 - 15 = 112 short;
/// multiplying by 2^112 restores it and normalises subnormal halves. Infinity and NaN get their exponent back; a NaN
/// becomes quiet, as it does in the instruction of the processor.
#[inline]
fn half_to_f32(bits: u16) -> f32 {
    let bits = u32::from(bits);
    let magnitude = f32::from_bits((bits & 0x7FFF) << 13) * f32::from_bits((127 + 112) << 23);
    let special = if bits & HALF_EXPONENT == HALF_EXPONENT { F32_EXPONENT } else { 0 };
    let quiet = if bits & 0x7FFF > HALF_EXPONENT { F32_QUIET } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | quiet | (bits & 0x8000) << 16)
}

#[inline]
pub(crate) fn decode_f32(bytes: &[u8], out: &mut [f32]) {
    for (bits, value) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *value = f32::from_le_bytes(*bits);
    }
}

#[inline]
pub(crate) fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    for (bits, value) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *value = half_to_f32(u16::from_le_bytes(*bits));
    }
}

#[inline]
pub(crate) fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (bits, value) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *value = f32::from_bits(u32::from(u16::from_le_bytes(*bits)) << 16);
    }
}

#[inline(always)]
#[allow(clippy::inline_always)]
pub(crate) fn encode_f32(values: &[f32], out: &mut [u8]) {
    for (bytes, v) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *bytes = v.to_le_bytes();
    }
}

#[inline(always)]
#[allow(clippy::inline_always)]
pub(crate) fn encode_f16(values: &[f32], out: &mut [u8]) {
    for (half, &v) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        *half = f32_to_half(v).to_le_bytes();
    }
}

#[inline(always)]
#[allow(clippy::inline_always)]
pub(crate) fn encode_bf16(values: &[f32], out: &mut [u8]) {
    for (half, &v) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        *half = f32_to_bf16(v).to_le_bytes();
    }
}

/// The largest magnitude of `values`; infinite or not a number where one of them is.
#[allow(unsafe_code)]
pub fn largest_magnitude(values: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has the feature that the function enables.
        return unsafe { largest_magnitude_avx2(values) };
    }
    largest_magnitude_anywhere(values)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn largest_magnitude_avx2(values: &[f32]) -> f32 {
    largest_magnitude_anywhere(values)
}

/// By integers, which order magnitudes as numbers do, and whose maximum the compiler takes in vectors.
#[inline(always)]
#[allow(clippy::inline_always)] // one copy per instruction set
fn largest_magnitude_anywhere(values: &[f32]) -> f32 {
    let mut largest = 0;
    for v in values {
        largest = largest.max(v.abs().to_bits());
    }
    f32::from_bits(largest)
}

/// Single to half, to nearest with ties to even, without branches so that it vectorises.
///
/// Between 2^-14 and the largest half, the mantissa is rounded where it lies and the exponent's bias corrected. Below,
/// the sum with 0.5, whose last place is the unit of subnormal halves, is rounded by the addition itself.
#[inline(always)]
#[allow(clippy::inline_always)] // part of every block encoder
pub(crate) fn f32_to_half(value: f32) -> u16 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7FFF_FFFF;
    let rounded = (magnitude + 0x0FFF + (magnitude >> 13 & 1)) >> 13;
    let normal = rounded.saturating_sub(112 << 10).min(HALF_EXPONENT);
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let half =
        if magnitude > F32_EXPONENT { HALF_EXPONENT | 0x0200 | magnitude >> 13 & 0x01FF } else { finite };
    (half | bits >> 16 & 0x8000) as u16
}

/// The single nearest to `value` that a half can hold.
#[inline(always)]
#[allow(clippy::inline_always)]
pub(crate) fn rounded_to_half(value: f32) -> f32 {
    half_to_f32(f32_to_half(value))
}

/// The upper half of a single, rounded to nearest with ties to even; a NaN stays one and becomes quiet.
#[inline]
pub(crate) fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    ((if value.is_nan() { bits | F32_QUIET } else { rounded }) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn every_half_decodes_as_the_half_crate_does() {
        for bits in 0..=u16::MAX {
            let (got, want) = (half_to_f32(bits), f16::from_bits(bits).to_f32_const());
            assert_eq!(got.to_bits(), want.to_bits(), "half {bits:#06x}: {got} instead of {want}");
        }
    }

    #[test]
    fn the_largest_magnitude_tells_of_what_is_no_number() {
        let mut values: Vec<f32> = (0..1000).map(|i: u16| f32::from(i % 77) - 50.0).collect();
        assert_eq!(largest_magnitude(&values).to_bits(), 50.0_f32.to_bits());
        assert_eq!(largest_magnitude(&[]).to_bits(), 0);
        values[999] = f32::NEG_INFINITY;
        assert!(largest_magnitude(&values).is_infinite());
        values[3] = f32::NAN;
        assert!(largest_magnitude(&values).is_nan());
    }

    /// Around every half and the midpoints between them, and over all exponents.
    #[test]
    fn every_single_becomes_the_half_that_the_half_crate_says() {
        let near_halves = (0..=u16::MAX).flat_map(|bits| {
            let at = f16::from_bits(bits).to_f32_const().to_bits();
            [0, 0x0FFF, 0x1000, 0x1001, 0x1FFF].map(|more| f32::from_bits(at.wrapping_add(more)))
        });
        let everywhere = (0..1 << 20).map(|i: u32| f32::from_bits(i.wrapping_mul(0x9E37_79B1)));
        for v in near_halves.chain(everywhere) {
            let (got, want) = (f32_to_half(v), f16::from_f32_const(v).to_bits());
            assert!(
                got == want || v.is_nan() && f16::from_bits(got).is_nan(),
                "{v:e}: {got:#06x}, want {want:#06x}"
            );
        }
    }

    #[test]
    fn bf16_rounds_ties_to_even_and_keeps_nan() {
        for (bits, want) in [
            (0x3F80_8000, 0x3F80),
            (0x3F81_8000, 0x3F82),
            (0x3F80_8001, 0x3F81),
            (0x7F7F_FFFF, 0x7F80),
            (0x7F80_0001, 0x7FC0),
            (0xFFFF_FFFF, 0xFFFF),
        ] {
            assert_eq!(f32_to_bf16(f32::from_bits(bits)), want, "{bits:#010x}");
        }
    }
}
