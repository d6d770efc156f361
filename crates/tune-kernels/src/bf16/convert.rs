//! Rows between `f32` and `bf16`.

use half::bf16;

use crate::cpu::vectorised;

/// The `f32` of a `bf16`.
#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "a loop is compiled for the widest registers only where it is inlined"
)]
pub(super) fn widen(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

/// The nearest `bf16`, ties to even; a NaN stays one.
#[inline(always)]
#[allow(clippy::inline_always, reason = "as above")]
pub(super) fn round(value: f32) -> bf16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if bits << 1 > 0xFF00_0000 { quiet } else { nearest } as u16)
}

/// The nearest `bf16`, ties away from zero: fewer instructions, for inner loops. A NaN that comes from `bf16`
/// values stays one.
#[inline(always)]
#[allow(clippy::inline_always, reason = "as above")]
pub(super) fn round_ties_away(value: f32) -> bf16 {
    bf16::from_bits((value.to_bits().wrapping_add(0x8000) >> 16) as u16)
}

vectorised! {
    /// `out = values`, rounded.
    pub(super) fn round_row(values: &[f32], out: &mut [bf16]) {
        for (value, out) in values.iter().zip(out) {
            *out = round(*value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_as_the_half_crate() {
        let all =
            (0..=u16::MAX).flat_map(|high| [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF].map(|low| (high, low)));
        for (high, low) in all {
            let value = f32::from_bits(u32::from(high) << 16 | low);
            let (got, want) = (round(value), bf16::from_f32(value));
            assert_eq!(got.to_bits(), want.to_bits(), "{value:e} ({:08x})", value.to_bits());
            assert_eq!(widen(got).to_bits(), want.to_f32().to_bits());
        }
    }
}
