//! Products with a frozen matrix, decoded one panel of rows at a time.

use std::mem::MaybeUninit;
use std::ops::Range;

use tune_quant::{RowOrder, StoredMatrix};

use super::buffer::with_scratch;
use super::matmul::{Target, Threads, View, ViewMut, multiply, multiply_add};
use super::matvec::{FewRows, MAX_ROWS};
use super::team::for_each;

/// Floats of a decoded panel: 2 MiB, small enough for the last-level cache, large enough that waiting for the
/// other threads after each panel costs nothing.
const PANEL_FLOATS: usize = 512 * 1024;
const MIN_PANEL_ROWS: usize = 32;

/// Rows that are worth a thread's while to decode.
const DECODED_ROWS: usize = 8;

/// Weights of a task when `x` has few rows: about 5 µs, so that handing a task over costs little beside it.
const FEW_ROWS_TASK: usize = 64 * 1024;

/// Calls `work` with consecutive panels of rows of `w` and the range of rows that each holds.
pub(crate) fn for_each_panel(w: &StoredMatrix, mut work: impl FnMut(Range<usize>, View)) {
    let (rows, cols) = (w.rows(), w.cols());
    let panel_rows = panel_rows(cols);
    let ranges = (0..rows).step_by(panel_rows).map(|start| start..rows.min(start + panel_rows));
    if let Some(values) = w.as_f32().filter(|_| w.row_order() == RowOrder::Natural) {
        let whole = View::new(values, rows, cols);
        return ranges.for_each(|range| work(range.clone(), whole.slice_rows(range)));
    }
    with_scratch(panel_rows.min(rows) * cols, |panel| {
        for range in ranges {
            let panel = &mut panel[..range.len() * cols];
            let tasks =
                panel.chunks_mut(DECODED_ROWS * cols).zip(range.clone().step_by(DECODED_ROWS)).collect();
            for_each(tasks, |(rows, first): (&mut [f32], usize)| {
                rows.chunks_exact_mut(cols).zip(first..).for_each(|(row, i)| w.decode_row(i, row));
            });
            work(range.clone(), View::new(panel, range.len(), cols));
        }
    });
}

/// Rows of a panel of a matrix with `cols` columns.
pub(crate) fn panel_rows(cols: usize) -> usize {
    (PANEL_FLOATS / cols.max(1) / MIN_PANEL_ROWS).max(1) * MIN_PANEL_ROWS
}

/// `out = x Wᵀ`, with x `[m, d_in]`, W `[d_out, d_in]`, out `[m, d_out]`. After each panel of W, `finish` is
/// called with its rows and the columns of `out` that they have filled.
pub(crate) fn times_transposed(
    x: View,
    w: &StoredMatrix,
    out: &mut [MaybeUninit<f32>],
    mut finish: impl FnMut(Range<usize>, &mut ViewMut),
) {
    let (m, d_out) = (x.rows(), w.rows());
    if m <= MAX_ROWS {
        let mut out = few_rows_times_transposed(x, w, Target::new(out, m, d_out));
        finish(0..d_out, &mut out);
        return;
    }
    for_each_panel(w, |rows, panel| {
        let columns = Target::strided(&mut out[rows.start..], m, rows.len(), d_out);
        finish(rows, &mut multiply(columns, 1.0, x, panel.t(), Threads::All));
    });
}

/// `out = y W`, with y `[m, d_out]`, W `[d_out, d_in]`, out `[m, d_in]`.
pub(crate) fn times<'a>(y: View, w: &StoredMatrix, out: &'a mut [MaybeUninit<f32>]) -> ViewMut<'a> {
    let mut out = Target::new(out, y.rows(), w.cols()).fill_with(|_, _| 0.0);
    for_each_panel(w, |rows, panel| {
        multiply_add(&mut out, 1.0, y.slice_cols(rows), panel, Threads::All);
    });
    out
}

/// [`times_transposed`] for so few rows of `x` that reading W is most of the work: straight from its blocks.
fn few_rows_times_transposed<'a>(x: View, w: &StoredMatrix, out: Target<'a>) -> ViewMut<'a> {
    let (m, d_in, d_out) = (x.rows(), w.cols(), w.rows());
    if m == 0 {
        return out.fill_with(|_, _| 0.0);
    }
    let x = FewRows::new((0..m).map(|t| x.row(t)), d_in);
    let task_rows = (FEW_ROWS_TASK / d_in.max(1)).max(1);
    with_scratch(d_out * m, |products| {
        let tasks = products.chunks_mut(task_rows * m).enumerate().collect();
        for_each(tasks, |(task, products): (usize, &mut [f32])| x.times(w, task * task_rows, products));
        out.fill_with(|t, i| products[i * m + t])
    })
}
