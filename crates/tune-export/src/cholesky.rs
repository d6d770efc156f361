//! The factor of an inverse that error feedback needs.
//!
//! ```text
//! H⁻¹ = Uᵀ U        U upper triangular
//! ```
//!
//! H `[n, n]`, symmetric and positive definite, in `f64`: its eigenvalues span many orders of magnitude. H itself is
//! never inverted. With rows and columns in reverse order H = L Lᵀ, and U is L⁻¹ in reverse order again: as
//! R = reverse(L) is upper triangular with H = R Rᵀ, H⁻¹ = R⁻ᵀ R⁻¹. Both steps work in place; rows are shared between
//! all cores.

use rayon::prelude::*;

/// Columns that are factored before the rest is updated.
const PANEL: usize = 48;

/// U of H⁻¹ = Uᵀ U, or `None` where H is not positive definite. `h` `[n, n]`, row-major.
pub(crate) fn inverse_factor(mut h: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    assert_eq!(h.len(), n * n, "a matrix [{n}, {n}]");
    h.reverse(); // of a symmetric matrix: rows and columns in reverse order
    factor(&mut h, n)?;
    invert(&mut h, n);
    h.reverse();
    Some(h)
}

/// The lower triangle becomes L of H = L Lᵀ, the upper one zero.
fn factor(h: &mut [f64], n: usize) -> Option<()> {
    for start in (0..n).step_by(PANEL) {
        let end = (start + PANEL).min(n);
        let (above, below) = h.split_at_mut(end * n);
        // the square on the diagonal, row by row
        for i in start..end {
            for j in start..=i {
                let products = dot(&above[i * n + start..i * n + j], &above[j * n + start..j * n + j]);
                let rest = above[i * n + j] - products;
                if i == j {
                    if !(rest.is_finite() && rest > 0.0) {
                        return None;
                    }
                    above[i * n + i] = rest.sqrt();
                } else {
                    above[i * n + j] = rest / above[j * n + j];
                }
            }
            above[i * n + i + 1..(i + 1) * n].fill(0.0);
        }
        let square = &above[start * n..];
        below.par_chunks_exact_mut(n).for_each(|row| {
            for j in start..end {
                let pivots = &square[(j - start) * n..];
                let products = dot(&row[start..j], &pivots[start..j]);
                row[j] = (row[j] - products) / pivots[j];
            }
        });
        // what the panel leaves of the rows below it
        let panel: Vec<f64> = below.chunks_exact(n).flat_map(|row| &row[start..end]).copied().collect();
        let width = end - start;
        below.par_chunks_exact_mut(n).enumerate().for_each(|(i, row)| {
            let own = &panel[i * width..(i + 1) * width];
            for (value, other) in row[end..=end + i].iter_mut().zip(panel.chunks_exact(width)) {
                *value -= dot(own, other);
            }
        });
    }
    Some(())
}

/// The lower triangle becomes its inverse. Row by row: a row of the inverse needs its own row of L and the rows of the
/// inverse above it.
fn invert(l: &mut [f64], n: usize) {
    const STRIP: usize = 128;
    for i in 0..n {
        let (above, rest) = l.split_at_mut(i * n);
        let own = rest[..i].to_vec();
        let diagonal = 1.0 / rest[i];
        rest[i] = diagonal;
        rest[..i].par_chunks_mut(STRIP).enumerate().for_each(|(strip, out)| {
            let first = strip * STRIP;
            out.fill(0.0);
            for (k, factor) in own.iter().enumerate().skip(first) {
                let row = &above[k * n + first..k * n + (k + 1).min(first + out.len())];
                let factor = factor * diagonal;
                for (sum, value) in out.iter_mut().zip(row) {
                    *sum -= factor * value;
                }
            }
        });
    }
}

/// Eight sums, so that the compiler may use vectors.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a8, a), (b8, b)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a8.iter().zip(b8) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f64>() + a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_multiplied_back_is_the_inverse() {
        for n in [1, 5, PANEL, 2 * PANEL + 37, 300] {
            // X Xᵀ of more samples than features, and a little on the diagonal
            let x: Vec<f64> = (0..2 * n * n).map(|i| ((i * i % 1009) as f64 * 0.37).sin()).collect();
            let mut h = vec![0.0; n * n];
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] = dot(&x[i * 2 * n..(i + 1) * 2 * n], &x[j * 2 * n..(j + 1) * 2 * n]);
                }
                h[i * n + i] += 0.1;
            }
            let u = inverse_factor(h.clone(), n).expect("positive definite");
            assert!((0..n).all(|i| u[i * n..i * n + i].iter().all(|v| *v == 0.0)), "upper triangular");
            // U H Uᵀ = 1
            let product = |a: &[f64], b: &[f64], i: usize, j: usize| {
                dot(&a[i * n..(i + 1) * n], &b[j * n..(j + 1) * n])
            };
            let mut uh = vec![0.0; n * n];
            for i in 0..n {
                for j in 0..n {
                    uh[i * n + j] = product(&u, &h, i, j); // H is symmetric
                }
            }
            for i in 0..n {
                for j in 0..n {
                    let wanted = f64::from(u8::from(i == j));
                    assert!((product(&uh, &u, i, j) - wanted).abs() < 1e-8, "n {n}, element {i} {j}");
                }
            }
        }
    }

    #[test]
    fn a_matrix_without_a_factor_is_told() {
        assert_eq!(inverse_factor(vec![1.0, 2.0, 2.0, 1.0], 2), None);
        assert_eq!(inverse_factor(vec![f64::NAN], 1), None);
    }
}
