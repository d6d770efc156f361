//! Rounding with error feedback: what one weight loses, the weights beside it make up for.
//!
//! ```text
//! H = Σ x xᵀ + λ 1        H⁻¹ = Uᵀ U
//! q[j] = nearest(w[j])    e = (w[j] − q[j]) / U[j, j]    w[k] −= e U[j, k]   for k > j
//! ```
//!
//! GPTQ: Frantar et al. 2022, arXiv 2210.17323, over inputs x `[d_in]` of the layer while it answers training rows. The
//! rows of W `[d_out, d_in]` are independent. It minimises Σ ‖(W − Q) x‖², the error of what the layer gives, instead of
//! the error of the weights.
//!
//! Departures: scales are given ([`Grid`]): those of the base where the type stays, so that a merge moves codes only;
//! columns come in falling order of H[j, j], as in the authors' later code; and λ is a share of the mean of the
//! diagonal. Lazy updates as in the paper: a block of columns is done before the columns after it hear of it.

use tune_quant::Grid;

use crate::cholesky;

/// Columns between two updates of those that follow.
const LAZY: usize = 128;
/// λ relative to the mean of H's diagonal.
const DAMPING: f64 = 0.01;

/// Σ x xᵀ over the inputs of a linear layer.
#[derive(Clone, Debug, PartialEq)]
pub struct InputMoments {
    /// Input features of the layer.
    pub d_in: usize,
    /// `[d_in, d_in]`, row-major.
    pub sums: Vec<f32>,
}

/// How errors spread in one linear layer.
pub(crate) struct ErrorFeedback {
    /// The columns of W in the order in which they are rounded.
    order: Vec<usize>,
    /// U in that order, `[d_in, d_in]`.
    factor: Vec<f32>,
}

impl ErrorFeedback {
    /// `None` where the moments have no factor, which damping leaves to values that are no numbers.
    pub(crate) fn new(moments: &InputMoments) -> Option<Self> {
        let n = moments.d_in;
        let diagonal = |j: usize| f64::from(moments.sums[j * n + j]);
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| diagonal(b).total_cmp(&diagonal(a)).then(a.cmp(&b)));
        let mean = (0..n).map(diagonal).sum::<f64>() / n as f64;
        // an input that is always zero lets its weight be anything
        let damping = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        let mut h = vec![0.0; n * n];
        for (row, &i) in h.chunks_exact_mut(n).zip(&order) {
            for (value, &j) in row.iter_mut().zip(&order) {
                // the mean of both halves: sums of products in another order differ in their last bits
                *value =
                    f64::midpoint(f64::from(moments.sums[i * n + j]), f64::from(moments.sums[j * n + i]));
            }
        }
        (0..n).for_each(|i| h[i * n + i] += damping);
        let factor = cholesky::inverse_factor(h, n)?;
        Some(Self { order, factor: factor.into_iter().map(|v| v as f32).collect() })
    }

    /// The codes of some rows, one a value: `rows` `[grids.len(), d_in]`.
    pub(crate) fn codes(&self, grids: &[Grid], rows: &[f32]) -> Vec<u8> {
        let n = self.order.len();
        // in the order of rounding
        let mut w: Vec<f32> =
            rows.chunks_exact(n).flat_map(|row| self.order.iter().map(|&column| row[column])).collect();
        let mut codes = vec![0; w.len()];
        let mut errors = vec![0.0_f32; grids.len() * LAZY];
        for start in (0..n).step_by(LAZY) {
            let end = (start + LAZY).min(n);
            let per_row = w.chunks_exact_mut(n).zip(codes.chunks_exact_mut(n)).zip(grids);
            for (((w, codes), grid), errors) in per_row.zip(errors.chunks_exact_mut(LAZY)) {
                for j in start..end {
                    let u = &self.factor[j * n..(j + 1) * n];
                    let (code, value) = grid.nearest(self.order[j], w[j]);
                    codes[self.order[j]] = code;
                    let error = (w[j] - value) / u[j];
                    errors[j - start] = error;
                    subtract(&mut w[j + 1..end], error, &u[j + 1..end]);
                }
            }
            self.tell_the_rest(&mut w, &errors, start..end);
        }
        codes
    }

    /// w[k] −= Σ e[j] U[j, k] for all columns after a block, a few of them at a time, so that they stay in cache for
    /// all j.
    fn tell_the_rest(&self, w: &mut [f32], errors: &[f32], block: std::ops::Range<usize>) {
        const TILE: usize = 256;
        let n = self.order.len();
        for first in (block.end..n).step_by(TILE) {
            let last = (first + TILE).min(n);
            for j in block.clone() {
                let u = &self.factor[j * n + first..j * n + last];
                for (row, errors) in w.chunks_exact_mut(n).zip(errors.chunks_exact(LAZY)) {
                    subtract(&mut row[first..last], errors[j - block.start], u);
                }
            }
        }
    }
}

#[inline]
fn subtract(from: &mut [f32], factor: f32, values: &[f32]) {
    for (from, value) in from.iter_mut().zip(values) {
        *from -= factor * value;
    }
}

#[cfg(test)]
mod tests {
    use tune_quant::BlockType;

    use super::*;

    const D_IN: usize = 256;
    const TOKENS: usize = 600;

    fn random(seed: u32, len: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Inputs that depend on each other, as those of real layers do: `[TOKENS, D_IN]`.
    fn inputs() -> Vec<f32> {
        let mut x = random(7, TOKENS * D_IN);
        for row in x.chunks_exact_mut(D_IN) {
            for j in 1..D_IN {
                row[j] = 0.8 * row[j - 1] + 0.4 * row[j];
            }
        }
        x
    }

    fn moments(x: &[f32]) -> InputMoments {
        let mut sums = vec![0.0; D_IN * D_IN];
        for row in x.chunks_exact(D_IN) {
            for (sums, a) in sums.chunks_exact_mut(D_IN).zip(row) {
                sums.iter_mut().zip(row).for_each(|(sum, b)| *sum += a * b);
            }
        }
        InputMoments { d_in: D_IN, sums }
    }

    /// Σ (x · (w − q))² over all inputs.
    fn output_error(x: &[f32], w: &[f32], q: &[f32]) -> f64 {
        let difference: Vec<f64> = w.iter().zip(q).map(|(w, q)| f64::from(w - q)).collect();
        x.chunks_exact(D_IN)
            .map(|x| x.iter().zip(&difference).map(|(x, d)| f64::from(*x) * d).sum::<f64>().powi(2))
            .sum()
    }

    #[test]
    fn outputs_are_nearer_than_by_rounding_and_the_grid_is_the_bases() {
        let x = inputs();
        let feedback = ErrorFeedback::new(&moments(&x)).expect("a factor");
        for block_type in [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q4K, BlockType::IQ4NL, BlockType::Q6K]
        {
            let base: Vec<f32> = random(3, D_IN);
            let (mut bytes, mut stored) = (Vec::new(), vec![0.0; D_IN]);
            block_type.encode(&base, &mut bytes);
            block_type.decode(&bytes, &mut stored);
            // an update smaller than a step
            let wanted: Vec<f32> = stored.iter().zip(random(5, D_IN)).map(|(w, d)| w + 0.03 * d).collect();
            let grid = Grid::of(block_type, &bytes).expect("a grid");
            let rounded: Vec<f32> = (0..D_IN).map(|j| grid.nearest(j, wanted[j]).1).collect();
            let codes = feedback.codes(std::slice::from_ref(&grid), &wanted);
            let written = grid.with_codes(&codes);
            let mut merged = vec![0.0; D_IN];
            block_type.decode(&written, &mut merged);

            let (nearest, fed_back) =
                (output_error(&x, &wanted, &rounded), output_error(&x, &wanted, &merged));
            assert!(fed_back < 0.9 * nearest, "{}: {fed_back} against {nearest}", block_type.name());
            // the same scales: the written row gives the base back under the base's codes
            let own: Vec<u8> = (0..D_IN).map(|j| grid.nearest(j, stored[j]).0).collect();
            let mut again = vec![0.0; D_IN];
            block_type.decode(&Grid::of(block_type, &written).expect("a grid").with_codes(&own), &mut again);
            assert_eq!(again, stored, "{}", block_type.name());
        }
    }

    #[test]
    fn several_rows_at_once_are_the_same_rows() {
        let x = inputs();
        let feedback = ErrorFeedback::new(&moments(&x)).expect("a factor");
        let rows = random(11, 3 * D_IN);
        let grids: Vec<Grid> = rows
            .chunks_exact(D_IN)
            .map(|row| {
                let mut bytes = Vec::new();
                BlockType::Q4_1.encode(row, &mut bytes);
                Grid::of(BlockType::Q4_1, &bytes).expect("a grid")
            })
            .collect();
        let together = feedback.codes(&grids, &rows);
        for (i, row) in rows.chunks_exact(D_IN).enumerate() {
            assert_eq!(feedback.codes(&grids[i..=i], row), together[i * D_IN..(i + 1) * D_IN]);
        }
    }

    #[test]
    fn inputs_that_are_always_zero_are_no_obstacle() {
        let moments = InputMoments { d_in: 4, sums: vec![0.0; 16] };
        assert!(ErrorFeedback::new(&moments).is_some());
    }
}
