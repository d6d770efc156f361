//! Rows between `f32` and `bf16`.

use half::bf16;

use crate::cpu::{for_each, vectorised};

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

/// `[cols, rows]` of rows that begin `stride` apart, each row of it padded with zeros to an even length.
pub(super) fn transposed(values: &[bf16], rows: usize, cols: usize, stride: usize) -> Vec<bf16> {
    // A block of rows of the result is written line of the cache by line of the cache.
    const BLOCK: usize = 32;
    let depth = rows.next_multiple_of(2);
    let mut out = vec![bf16::ZERO; cols * depth];
    let blocks = out.chunks_mut((BLOCK * depth).max(1)).zip((0..cols).step_by(BLOCK)).collect();
    for_each(blocks, |(out, first): (&mut [bf16], usize)| {
        let width = BLOCK.min(cols - first);
        for row in 0..rows {
            for (col, value) in values[row * stride + first..][..width].iter().enumerate() {
                out[col * depth + row] = *value;
            }
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_matrices_of_any_shape() {
        for (rows, cols) in [(0, 3), (3, 0), (1, 1), (5, 70), (64, 33)] {
            let values: Vec<_> = (0..rows * cols).map(|i| bf16::from_f32(i as f32)).collect();
            let (got, depth) = (transposed(&values, rows, cols, cols), rows.next_multiple_of(2));
            for (i, got) in got.iter().enumerate() {
                let (col, row) = (i / depth, i % depth);
                assert_eq!(*got, if row < rows { values[row * cols + col] } else { bf16::ZERO });
            }
        }
    }

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
