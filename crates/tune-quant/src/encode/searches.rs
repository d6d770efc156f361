//! The searches for the scale (and minimum) of a sub-block, for as many sub-blocks at once as a vector has lanes.
//!
//! Each tries several scales and keeps the one with the least weighted error after a refit by least squares. They are
//! those of GGUF's reference quantiser without an importance matrix, operation by operation: sums run over the values
//! in order and nothing is fused, so results are equal to the last bit. Decisions that branch there are selections of
//! lanes here.
#![allow(clippy::inline_always)] // one copy per instruction set

use super::lanes::{Column, Lanes};

/// Below this largest magnitude a sub-block of the symmetric types counts as zero.
pub(super) const TINY: f32 = 1e-15;

/// Sixteen sub-blocks of `LEN` values; column i holds value i of each.
pub(super) type Columns<const LEN: usize> = [Column; LEN];

/// Parameters of [`asymmetric`].
#[derive(Clone, Copy)]
pub(super) struct Trials {
    /// The largest code.
    pub(super) max_code: f32,
    /// Trial t spreads the range of the values over `max_code + first + t·0.1` steps.
    pub(super) first: f32,
    /// How many trials follow the one over `max_code` steps.
    pub(super) count: u8,
    /// Errors are weighted by magnitude, not squared.
    pub(super) absolute: bool,
}

/// What [`asymmetric`] found, a sub-block a lane: value ≈ scale·code − min.
#[derive(Clone, Copy)]
pub(super) struct Asymmetric<L> {
    pub(super) scale: L,
    /// Not below zero.
    pub(super) min: L,
    /// The codes belonging to it are `code(x) = clamp(round(inverse·(x − offset)))`.
    inverse: L,
    offset: L,
}

impl<L: Lanes> Asymmetric<L> {
    #[inline(always)]
    pub(super) fn code(self, x: L, max_code: f32) -> L {
        clamp((self.inverse * (x - self.offset)).round(), 0.0, max_code)
    }
}

/// Scale and minimum for codes from 0 to `max_code`, lanes `at..` of the columns.
#[inline(always)]
pub(super) fn asymmetric<L: Lanes, const LEN: usize>(
    x: &Columns<LEN>,
    weights: &Columns<LEN>,
    at: usize,
    trials: Trials,
) -> Asymmetric<L> {
    let Trials { max_code, first, count, absolute } = trials;
    let zero = L::splat(0.0);
    let x0 = L::load(&x[0], at);
    let (mut min, mut max) = (x0, x0);
    let mut sum_w = L::load(&weights[0], at);
    let mut sum_x = sum_w * x0;
    for (x, w) in x.iter().zip(weights).skip(1) {
        let (x, w) = (L::load(x, at), L::load(w, at));
        min = L::select(x.less(min), x, min);
        max = L::select(max.less(x), x, max);
        sum_w = sum_w + w;
        sum_x = sum_x + w * x;
    }
    min = min.min(zero);
    let flat = max.equal(min);

    let mut codes = [Column::ZERO; LEN];
    let inverse = L::splat(max_code) / (max - min);
    let mut best = Asymmetric { scale: L::splat(1.0) / inverse, min, inverse: finite(inverse), offset: min };
    for (x, q) in x.iter().zip(&mut codes) {
        best.code(L::load(x, at), max_code).store(q, at);
    }
    let mut best_error = error((x, weights, &codes), at, (best.scale, best.min), absolute);

    for t in 0..=count {
        let steps = first + 0.1 * f32::from(t) + max_code;
        let inverse = finite(L::splat(steps) / (max - min));
        let trial = Asymmetric { inverse, offset: min, ..best };
        let (mut sum_q, mut sum_qq, mut sum_qx) = (zero, zero, zero);
        for ((x, w), q) in x.iter().zip(weights).zip(&mut codes) {
            let (x, w) = (L::load(x, at), L::load(w, at));
            let code = trial.code(x, max_code);
            code.store(q, at);
            let weighted = w * code;
            sum_q = sum_q + weighted;
            sum_qq = sum_qq + weighted * code;
            sum_qx = sum_qx + weighted * x;
        }
        let determinant = sum_w * sum_qq - sum_q * sum_q;
        let scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
        let fitted_min = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
        let above = zero.less(fitted_min);
        let scale = L::select(above, sum_qx / sum_qq, scale);
        let fitted_min = L::select(above, zero, fitted_min);
        let trial_error = error((x, weights, &codes), at, (scale, fitted_min), absolute);
        let better = L::both(zero.less(determinant), trial_error.less(best_error));
        best_error = L::select(better, trial_error, best_error);
        best.scale = L::select(better, scale, best.scale);
        best.inverse = L::select(better, inverse, best.inverse);
        best.offset = L::select(better, min, best.offset);
        min = L::select(better, fitted_min, min);
    }
    // A sub-block of one value, or of values above zero that are all equal, is all minimum.
    Asymmetric {
        scale: L::select(flat, zero, best.scale),
        min: zero - min,
        inverse: L::select(flat, zero, best.inverse),
        offset: best.offset,
    }
}

/// Σ weight·|scale·code + min − x|, or of its square.
#[inline(always)]
fn error<L: Lanes, const LEN: usize>(
    (x, weights, codes): (&Columns<LEN>, &Columns<LEN>, &Columns<LEN>),
    at: usize,
    (scale, min): (L, L),
    absolute: bool,
) -> L {
    let mut error = L::splat(0.0);
    for ((x, w), q) in x.iter().zip(weights).zip(codes) {
        let (x, w, q) = (L::load(x, at), L::load(w, at), L::load(q, at));
        let difference = scale * q + min - x;
        error = error + w * if absolute { difference.abs() } else { difference * difference };
    }
    error
}

/// What a search found without a minimum, a sub-block a lane: value ≈ scale·code.
#[derive(Clone, Copy)]
pub(super) struct Symmetric<L> {
    /// Zero where all values are [`TINY`].
    pub(super) scale: L,
    /// The codes belonging to it are `code(x) = clamp(round(inverse·x))`.
    inverse: L,
}

impl<L: Lanes> Symmetric<L> {
    #[inline(always)]
    pub(super) fn code(self, x: L, half: f32) -> L {
        clamp((self.inverse * x).round(), -half, half - 1.0)
    }
}

/// Scale for codes from `−half` to `half − 1`, lanes `at..` of the columns; values are weighted by their squares.
#[inline(always)]
pub(super) fn symmetric<L: Lanes, const LEN: usize>(x: &Columns<LEN>, at: usize, half: f32) -> Symmetric<L> {
    let zero = L::splat(0.0);
    let largest = largest_magnitude::<L>(x, at);
    let mut best = Symmetric { scale: zero, inverse: L::splat(-half) / largest };
    let (sum_qx, sum_qq) = squared_fit(x, at, best, half);
    best.scale = L::select(sum_qq.equal(zero), zero, sum_qx / sum_qq);
    let mut best_gain = best.scale * sum_qx;
    for t in (-9..=9_i8).filter(|&t| t != 0) {
        let inverse = L::splat(-(half + 0.1 * f32::from(t))) / largest;
        let (sum_qx, sum_qq) = squared_fit(x, at, Symmetric { inverse, ..best }, half);
        let better = L::both(zero.less(sum_qq), (best_gain * sum_qq).less(sum_qx * sum_qx));
        best.scale = L::select(better, sum_qx / sum_qq, best.scale);
        best.inverse = L::select(better, inverse, best.inverse);
        best_gain = L::select(better, best.scale * sum_qx, best_gain);
    }
    best.scale = L::select(largest.abs().less(L::splat(TINY)), zero, best.scale);
    best
}

/// Σ x²·x·code and Σ x²·code².
#[inline(always)]
fn squared_fit<L: Lanes, const LEN: usize>(
    x: &Columns<LEN>,
    at: usize,
    trial: Symmetric<L>,
    half: f32,
) -> (L, L) {
    let (mut sum_qx, mut sum_qq) = (L::splat(0.0), L::splat(0.0));
    for x in x {
        let x = L::load(x, at);
        let (w, q) = (x * x, trial.code(x, half));
        sum_qx = sum_qx + w * x * q;
        sum_qq = sum_qq + w * q * q;
    }
    (sum_qx, sum_qq)
}

/// Scales and codes from −4 to 3 of several sets of sub-blocks, lanes `at..` of the columns: starting from plain rounding,
/// each value in turn moves to the code that fits best beside all others, for up to five rounds. Codes of [`TINY`]
/// sub-blocks are −4.
///
/// Each step waits for the one before, division included; sets fill each other's waits.
#[inline(always)]
pub(super) fn one_by_one<L: Lanes, const LEN: usize, const SETS: usize>(
    x: &[Columns<LEN>; SETS],
    at: usize,
    codes: &mut [Columns<LEN>; SETS],
) -> [L; SETS] {
    const HALF: f32 = 4.0;
    let zero = L::splat(0.0);
    let (mut sum_qx, mut sum_qq) = ([zero; SETS], [zero; SETS]);
    for s in 0..SETS {
        let inverse = L::splat(-HALF) / largest_magnitude::<L>(&x[s], at);
        for (x, q) in x[s].iter().zip(&mut codes[s]) {
            let x = L::load(x, at);
            let (w, code) = (x * x, clamp((inverse * x).round(), -HALF, HALF - 1.0));
            code.store(q, at);
            sum_qx[s] = sum_qx[s] + w * x * code;
            sum_qq[s] = sum_qq[s] + w * code * code;
        }
    }
    for _ in 0..5 {
        let mut changed = false;
        for i in 0..LEN {
            for s in 0..SETS {
                let (x, old) = (L::load(&x[s][i], at), L::load(&codes[s][i], at));
                let w = x * x;
                let rest_qx = sum_qx[s] - w * x * old;
                let rest_qq = sum_qq[s] - w * old * old;
                // What is left without this value may be next to nothing, and the quotient beyond any integer.
                let new = clamp((x * rest_qq / rest_qx).nearest_int(), -HALF, HALF - 1.0);
                let (qx, qq) = (rest_qx + w * x * new, rest_qq + w * new * new);
                let is_valid = L::both(zero.less(rest_qx), zero.less(qq));
                let fits_better = (sum_qx[s] * sum_qx[s] * qq).less(qx * qx * sum_qq[s]);
                let better = L::both(L::both(is_valid, fits_better), old.differs(new));
                // Not a selection of `new` or `old`: that becomes a masked store, which AMD's processors with AVX2 run as
                // microcode. The difference of two small integers is exact.
                (old + L::select(better, new - old, zero)).store(&mut codes[s][i], at);
                sum_qx[s] = L::select(better, qx, sum_qx[s]);
                sum_qq[s] = L::select(better, qq, sum_qq[s]);
                changed |= L::any(better);
            }
        }
        if !changed {
            break;
        }
    }
    let mut scales = [zero; SETS];
    for s in 0..SETS {
        let tiny = largest_magnitude::<L>(&x[s], at).abs().less(L::splat(TINY));
        if L::any(tiny) {
            for q in &mut codes[s] {
                L::select(tiny, L::splat(-HALF), L::load(q, at)).store(q, at);
            }
        }
        let scale = L::select(zero.less(sum_qq[s]), sum_qx[s] / sum_qq[s], zero);
        scales[s] = L::select(tiny, zero, scale);
    }
    scales
}

/// The value of largest magnitude with its sign, the first of equals.
#[inline(always)]
pub(super) fn largest_magnitude<L: Lanes>(x: &[Column], at: usize) -> L {
    let (mut largest, mut magnitude) = (L::splat(0.0), L::splat(0.0));
    for x in x {
        let x = L::load(x, at);
        let larger = magnitude.less(x.abs());
        largest = L::select(larger, x, largest);
        magnitude = L::select(larger, x.abs(), magnitude);
    }
    largest
}

#[inline(always)]
pub(super) fn clamp<L: Lanes>(v: L, low: f32, high: f32) -> L {
    v.max(L::splat(low)).min(L::splat(high))
}

/// Zero in place of infinity. The range of a sub-block can be so small that its inverse overflows; the reference then
/// rounds infinities and NaNs, and the code is 0 for both.
#[inline(always)]
fn finite<L: Lanes>(inverse: L) -> L {
    L::select(inverse.abs().less(L::splat(f32::INFINITY)), inverse, L::splat(0.0))
}
