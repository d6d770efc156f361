//! Matrix products of strided views through the `gemm` crate, which chooses its kernel at run time.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::buffer::SharedSlots;
use super::team::for_each;

/// Whether a product may use the whole thread pool.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Threads {
    /// The calling thread only: for products inside a parallel task.
    One,
    /// As many threads as rayon has.
    All,
}

/// A read-only matrix over a slice.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// `values` as `rows` consecutive rows of `cols`.
    pub(crate) fn new(values: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(values, rows, cols, cols)
    }

    /// Rows of `cols` values that begin `row_stride` apart.
    pub(crate) fn strided(values: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert_fits(values.len(), rows, cols, row_stride);
        Self { values, rows, cols, row_stride, col_stride: 1 }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The transposed matrix.
    pub(crate) fn t(self) -> Self {
        let Self { values, rows, cols, row_stride, col_stride } = self;
        Self { values, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }

    /// The rows `range`.
    pub(crate) fn slice_rows(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let start = (range.start * self.row_stride).min(self.values.len());
        Self { values: &self.values[start..], rows: range.len(), ..self }
    }

    /// The columns `range`.
    pub(crate) fn slice_cols(self, range: Range<usize>) -> Self {
        self.t().slice_rows(range).t()
    }

    /// Row `row`, when rows are contiguous.
    pub(crate) fn row(&self, row: usize) -> &'a [f32] {
        debug_assert_eq!(self.col_stride, 1);
        &self.values[row * self.row_stride..][..self.cols]
    }
}

/// A matrix that is still to be written. Its rows are contiguous.
pub(crate) struct Target<'a>(ViewMut<'a>);

impl<'a> Target<'a> {
    /// `slots` as `rows` consecutive rows of `cols`.
    pub(crate) fn new(slots: &'a mut [MaybeUninit<f32>], rows: usize, cols: usize) -> Self {
        Self::strided(slots, rows, cols, cols)
    }

    /// Rows of `cols` values that begin `row_stride` apart.
    pub(crate) fn strided(
        slots: &'a mut [MaybeUninit<f32>],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        let slots = SharedSlots::new(slots);
        // SAFETY: `slots` is borrowed exclusively for 'a.
        #[allow(unsafe_code)]
        unsafe {
            Self::shared(slots, 0, rows, cols, row_stride)
        }
    }

    /// Rows of `cols` values, `row_stride` apart, from `offset` on in slots that several tasks write.
    ///
    /// # Safety
    /// For as long as this matrix or what becomes of it lives, no other task touches its elements.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn shared(
        slots: SharedSlots<'a>,
        offset: usize,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        // SAFETY: passed on to the caller.
        let (start, len) = unsafe { slots.from(offset) };
        assert_fits(len, rows, cols, row_stride);
        Self(ViewMut { start, rows, cols, row_stride, borrow: PhantomData })
    }

    /// Writes `value(row, col)` to every element.
    pub(crate) fn fill_with(self, value: impl Fn(usize, usize) -> f32) -> ViewMut<'a> {
        for row in 0..self.0.rows {
            for col in 0..self.0.cols {
                // SAFETY: the matrix was checked against its elements and is exclusive.
                #[allow(unsafe_code)]
                unsafe {
                    self.0.start.add(row * self.0.row_stride + col).write(value(row, col));
                }
            }
        }
        self.0
    }
}

/// A written matrix that can be changed. Its rows are contiguous.
pub(crate) struct ViewMut<'a> {
    start: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

impl<'a> ViewMut<'a> {
    /// As [`Target::shared`].
    ///
    /// # Safety
    /// As there; and every element must have been written.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn shared(
        slots: SharedSlots<'a>,
        offset: usize,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        // SAFETY: passed on to the caller.
        unsafe { Target::shared(slots, offset, rows, cols, row_stride) }.0
    }

    /// Row `row`.
    pub(crate) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: the matrix was checked against its elements, is exclusive, and lives as long as `self`.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(row * self.row_stride), self.cols)
        }
    }
}

impl ViewMut<'_> {
    /// The rows `range`.
    pub(crate) fn slice_rows(&mut self, range: Range<usize>) -> ViewMut<'_> {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        // SAFETY: within the matrix, or one past its last element if the range is empty.
        #[allow(unsafe_code)]
        let start = if range.is_empty() {
            self.start
        } else {
            unsafe { self.start.add(range.start * self.row_stride) }
        };
        ViewMut { start, rows: range.len(), borrow: PhantomData, ..*self }
    }
}

/// `out = scale · a b`.
pub(crate) fn multiply<'a>(out: Target<'a>, scale: f32, a: View, b: View, threads: Threads) -> ViewMut<'a> {
    let mut out = out.0;
    // SAFETY: without `accumulate`, nothing of `out` is read.
    #[allow(unsafe_code)]
    unsafe {
        multiply_into(&mut out, false, scale, a, b, threads);
    }
    out
}

/// `out += scale · a b`.
pub(crate) fn multiply_add(out: &mut ViewMut, scale: f32, a: View, b: View, threads: Threads) {
    // SAFETY: a `ViewMut` has been written.
    #[allow(unsafe_code)]
    unsafe {
        multiply_into(out, true, scale, a, b, threads);
    }
}

/// `out = scale · a b`, or `out += scale · a b`.
///
/// # Safety
/// With `accumulate`, every element of `out` must have been written; without, `out` is not read.
#[allow(unsafe_code)]
unsafe fn multiply_into(out: &mut ViewMut, accumulate: bool, scale: f32, a: View, b: View, threads: Threads) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert_eq!((out.rows, out.cols, k), (m, n, b.rows), "[{m}, {k}] times [{}, {n}]", b.rows);
    if m == 0 || n == 0 {
        return;
    }
    let out = Out { start: out.start, row_stride: out.row_stride };
    // SAFETY: the views were checked against their slices when they were made, the shapes agree, and `out` is exclusive
    // and, if it is read, written; parts of it are disjoint.
    let part = |rows: Range<usize>, cols: Range<usize>| unsafe {
        let (a, b) = (a.slice_rows(rows.clone()), b.slice_cols(cols.clone()));
        gemm::gemm(
            rows.len(),
            cols.len(),
            k,
            out.at(rows.start, cols.start),
            1,
            out.row_stride as isize,
            accumulate,
            a.values.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    };
    match threads {
        Threads::One => part(0..m, 0..n),
        Threads::All => {
            for_each(parts(m, k, n), |(rows, cols)| part(rows, cols));
        }
    }
}

/// Where a product goes: rows of contiguous values.
#[derive(Clone, Copy)]
struct Out {
    start: *mut f32,
    row_stride: usize,
}

// SAFETY: parts of a product write different elements.
#[allow(unsafe_code)]
unsafe impl Send for Out {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Out {}

impl Out {
    fn at(&self, row: usize, col: usize) -> *mut f32 {
        self.start.wrapping_add(row * self.row_stride + col)
    }
}

/// Rows and columns of the parts of a product that threads make: of the longer side, since each part packs what it reads of
/// the other once more. How the depth is summed does not depend on them.
fn parts(m: usize, k: usize, n: usize) -> Vec<(Range<usize>, Range<usize>)> {
    const WORK: usize = 1 << 20;
    const GRANULARITY: usize = 48;
    let wanted = (m * k * n / WORK).clamp(1, 2 * rayon::current_num_threads());
    let cut = |len: usize| {
        let part = len.div_ceil(wanted).next_multiple_of(GRANULARITY);
        (0..len).step_by(part).map(move |first| first..len.min(first + part))
    };
    if m < n { cut(n).map(|cols| (0..m, cols)).collect() } else { cut(m).map(|rows| (rows, 0..n)).collect() }
}

fn assert_fits(len: usize, rows: usize, cols: usize, row_stride: usize) {
    let needed = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
    assert!(needed <= len, "[{rows}, {cols}] with row stride {row_stride} needs {needed} of {len} values");
    assert!(rows <= 1 || cols <= row_stride, "rows of {cols} overlap at stride {row_stride}");
}

#[cfg(test)]
mod tests {
    use super::super::buffer::as_slots;
    use super::*;

    #[test]
    fn products_of_strided_and_transposed_views() {
        for (m, k, n) in [(1, 1, 1), (3, 5, 7), (17, 0, 2), (0, 4, 4), (1, 33, 40), (40, 33, 1), (65, 70, 66)]
        {
            let a: Vec<f32> = (0..m * (k + 2)).map(|i| (i as f32).sin()).collect();
            let b: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.3).cos()).collect();
            let (a, b) = (View::strided(&a, m, k, k + 2), View::new(&b, n, k).t());
            let mut out = vec![f32::NAN; m * n];
            let mut out_view = multiply(Target::new(as_slots(&mut out), m, n), 0.5, a, b, Threads::One);
            multiply_add(&mut out_view, 1.0, a, b, Threads::All);
            for row in 0..m {
                for col in 0..n {
                    let want: f32 = (0..k).map(|i| a.row(row)[i] * b.t().row(col)[i]).sum::<f32>() * 1.5;
                    assert!((out[row * n + col] - want).abs() < 1e-4, "[{m}, {k}, {n}] at [{row}, {col}]");
                }
            }
        }
    }

    #[test]
    fn slices_of_rows_and_columns() {
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let view = View::new(&values, 3, 4);
        assert_eq!(view.slice_rows(1..3).slice_cols(1..3).row(1), [9.0, 10.0]);
        assert_eq!(view.slice_rows(3..3).rows(), 0);
    }
}
