//! F32, F16 and BF16: one value per block, and the half-precision scales of all other types.

use half::f16;

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

pub(crate) fn encode_f32(values: &[f32], out: &mut Vec<u8>) {
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
}

pub(crate) fn encode_f16(values: &[f32], out: &mut Vec<u8>) {
    out.extend(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()));
}

pub(crate) fn encode_bf16(values: &[f32], out: &mut Vec<u8>) {
    out.extend(values.iter().flat_map(|&v| f32_to_bf16(v).to_le_bytes()));
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
    use super::*;

    #[test]
    fn every_half_decodes_as_the_half_crate_does() {
        for bits in 0..=u16::MAX {
            let (got, want) = (half_to_f32(bits), f16::from_bits(bits).to_f32_const());
            assert_eq!(got.to_bits(), want.to_bits(), "half {bits:#06x}: {got} instead of {want}");
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
