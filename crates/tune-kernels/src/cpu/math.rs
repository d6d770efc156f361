//! Vectorised loops that several operations use.

#![allow(
    clippy::inline_always,
    reason = "a loop is compiled for the widest registers only where it is inlined"
)]

use super::vectorised;

/// Independent partial sums of a reduction: enough for two 512-bit registers, and the same on every processor.
pub(crate) const LANES: usize = 32;

/// `eˣ` within 2 units in the last place for `x` in [-87.3, 88.3]; 0 below, `e^88.3` above; NaN stays NaN.
///
/// `x = n ln 2 + r` with `|r| ≤ ln 2 / 2`, and a polynomial of degree 7 for `eʳ`. Coefficients and the split of
/// `ln 2` are those of Cephes' `expf` (Moshier).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it leaves the nearest integer in the low mantissa bits
    const LN_2_HIGH: f32 = 355.0 / 512.0;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let underflows = x < -87.3;
    let x = if x > 88.3 { 88.3 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4_f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let fraction = (p * r * r + r) + 1.0;
    let power_of_two = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if underflows { 0.0 } else { fraction * power_of_two }
}

/// `2ˣ` within a relative 4e-6 for `x` in [-125, 127]; `2⁻¹²⁵` below; NaN stays NaN. For values that are rounded to
/// `bf16`, whose half unit is 2e-3.
///
/// `x = n + f` with `|f| ≤ 1/2`, and a polynomial of degree 4 for `2ᶠ`, whose exponent is then moved by `n`.
#[inline(always)]
pub(crate) fn exp2_for_bf16(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // as in `exp`
    let x = if x < -125.0 { -125.0 } else { x };
    let shifted = x + ROUND;
    let f = x - (shifted - ROUND);
    let mut p = 0.009_570_102_f32;
    p = p * f + 0.055_917_86;
    p = p * f + 0.240_247_44;
    p = p * f + 0.693_121_8;
    p = p * f + 0.999_999_3;
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// The sum of partial sums.
#[inline(always)]
pub(crate) fn add_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `Σ a · b · c`, to be inlined into another vectorised loop.
#[inline(always)]
pub(crate) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a_head, a_tail) = a.as_chunks::<LANES>();
    let (b_head, b_tail) = b.as_chunks::<LANES>();
    let (c_head, c_tail) = c.as_chunks::<LANES>();
    for ((a, b), c) in a_head.iter().zip(b_head).zip(c_head) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i] * c[i];
        }
    }
    let tail = a_tail.iter().zip(b_tail).zip(c_tail);
    tail.fold(add_lanes(lanes), |sum, ((a, b), c)| sum + a * b * c)
}

vectorised! {
    /// `Σ a · b`.
    pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0.0; LANES];
        let (a_head, a_tail) = a.as_chunks::<LANES>();
        let (b_head, b_tail) = b.as_chunks::<LANES>();
        for (a, b) in a_head.iter().zip(b_head) {
            for i in 0..LANES {
                lanes[i] += a[i] * b[i];
            }
        }
        a_tail.iter().zip(b_tail).fold(add_lanes(lanes), |sum, (a, b)| sum + a * b)
    }

    /// The largest value, `-inf` for none.
    pub(crate) fn max(values: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (head, tail) = values.as_chunks::<LANES>();
        for chunk in head {
            for i in 0..LANES {
                lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
            }
        }
        lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |a, b| a.max(*b))
    }

    /// Replaces each value by `exp(value - shift)` and returns their sum.
    pub(crate) fn exp_sum(values: &mut [f32], shift: f32) -> f32 {
        let mut lanes = [0.0; LANES];
        let (head, tail) = values.as_chunks_mut::<LANES>();
        for chunk in head {
            for i in 0..LANES {
                chunk[i] = exp(chunk[i] - shift);
                lanes[i] += chunk[i];
            }
        }
        let mut sum = add_lanes(lanes);
        for value in tail {
            *value = exp(*value - shift);
            sum += *value;
        }
        sum
    }

    /// `Σ exp(value - shift)`.
    pub(crate) fn sum_of_exp(values: &[f32], shift: f32) -> f32 {
        let mut lanes = [0.0; LANES];
        let (head, tail) = values.as_chunks::<LANES>();
        for chunk in head {
            for i in 0..LANES {
                lanes[i] += exp(chunk[i] - shift);
            }
        }
        tail.iter().fold(add_lanes(lanes), |sum, value| sum + exp(*value - shift))
    }

    /// Multiplies each value by `factor`.
    pub(crate) fn scale_in_place(values: &mut [f32], factor: f32) {
        for value in values {
            *value *= factor;
        }
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in 0..=2_000_000 {
            let x = -87.3 + i as f32 * (88.3 + 87.3) / 2_000_000.0;
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(error <= 2.0 * f64::from(f32::EPSILON), "exp({x}) is off by {error:e}");
        }
    }

    #[test]
    fn exp2_is_accurate_enough_for_bf16() {
        for i in 0..=2_000_000 {
            let x = -125.0 + i as f32 * (127.0 + 125.0) / 2_000_000.0;
            let want = f64::from(x).exp2();
            let error = (f64::from(exp2_for_bf16(x)) - want).abs() / want;
            assert!(error <= 4e-6, "2^{x} is off by {error:e}");
        }
        assert!((exp2_for_bf16(0.0) - 1.0).abs() < 4e-6);
        assert!(exp2_for_bf16(f32::NEG_INFINITY) < 1e-37);
        assert!(exp2_for_bf16(f32::NAN).is_nan());
    }

    #[test]
    fn exp_at_the_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1e9), 0.0);
        assert!(exp(1e9).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_of_every_length() {
        for len in 0..100 {
            let a: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..len).map(|i| (i as f32 * 1.3).cos()).collect();
            let want: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            assert!((f64::from(dot(&a, &b)) - want).abs() < 1e-5);
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut e = a.clone();
            let sum = exp_sum(&mut e, 0.5);
            assert_eq!(sum, sum_of_exp(&a, 0.5));
            let want: f64 = a.iter().map(|a| (f64::from(*a) - 0.5).exp()).sum();
            assert!((f64::from(sum) - want).abs() <= 1e-6 * want);
            assert!(e.iter().zip(&a).all(|(e, a)| (e - (a - 0.5).exp()).abs() < 1e-6));
        }
    }
}
