//! The innermost product: a few rows of A, in pairs of `bf16`, times a packed panel of B, summed in `f32`.
//!
//! A panel holds [`WIDTH`] columns of B. Depth goes in pairs: element `[p][j]` of a panel is a `u32` with
//! `B[2p][j]` in its low half and `B[2p + 1][j]` in its high half, which is what one lane of `vdpbf16ps` takes.
//! A is read row by row as it lies in memory, also in pairs. With AVX-512 BF16 a tile of 12 × 32 sums stays in
//! registers and a pair of each row is broadcast against two loads of the panel; elsewhere the same sums are made
//! with `f32` arithmetic in the same order.

#![allow(unsafe_code)]

use half::bf16;

use crate::cpu::{InstructionSet, vectorised};

/// Columns of a panel.
pub(super) const WIDTH: usize = 32;

/// Rows of the largest tile.
pub(super) const HEIGHT: usize = 12;

/// One pair of rows of a panel, aligned for the widest loads.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct PanelRow(pub [u32; WIDTH]);

// SAFETY: plain integers without padding: 128 bytes, aligned to 64.
unsafe impl bytemuck::Zeroable for PanelRow {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for PanelRow {}

impl PanelRow {
    pub(super) const ZERO: Self = Self([0; WIDTH]);
}

/// Rows of a matrix of `bf16` that begin `stride` apart, of which pairs of columns are read.
#[derive(Clone, Copy)]
pub(super) struct PairedRows<'a> {
    values: &'a [bf16],
    stride: usize,
}

impl<'a> PairedRows<'a> {
    /// `values` from the first column of the first row on.
    pub(super) fn new(values: &'a [bf16], stride: usize) -> Self {
        Self { values, stride }
    }
}

/// A tile of sums: rows of [`WIDTH`] values that begin `stride` apart.
pub(super) struct Sums<'a> {
    values: &'a mut [f32],
    stride: usize,
}

impl<'a> Sums<'a> {
    /// `values` from the first sum of the first row on.
    pub(super) fn new(values: &'a mut [f32], stride: usize) -> Self {
        Self { values, stride }
    }
}

/// `sums = rows · panel`, or `sums += rows · panel`, for `count` rows and the whole depth of the panel.
pub(super) fn multiply(
    count: usize,
    rows: PairedRows,
    panel: &[PanelRow],
    sums: &mut Sums,
    accumulate: bool,
) {
    assert!(count == 0 || (count - 1) * rows.stride + 2 * panel.len() <= rows.values.len(), "rows of A");
    assert!(count == 0 || (count - 1) * sums.stride + WIDTH <= sums.values.len(), "rows of sums");
    #[cfg(target_arch = "x86_64")]
    if is_fast() {
        let (mut row, mut rest) = (0, count);
        while rest > 0 {
            let height = rest.min(HEIGHT);
            // SAFETY: the processor has the features, and the rows were checked against their slices above.
            unsafe {
                avx512::multiply(
                    height,
                    rows.values.as_ptr().add(row * rows.stride),
                    rows.stride,
                    panel,
                    sums.values.as_mut_ptr().add(row * sums.stride),
                    sums.stride,
                    accumulate,
                );
            }
            (row, rest) = (row + height, rest - height);
        }
        return;
    }
    for row in 0..count {
        let pairs = &rows.values[row * rows.stride..][..2 * panel.len()];
        let sums = &mut sums.values[row * sums.stride..][..WIDTH];
        multiply_row(pairs, panel, sums, accumulate);
    }
}

/// Whether products of `bf16` run on instructions of their own here.
pub fn is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512bf16") && InstructionSet::best() == InstructionSet::Avx512
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

vectorised! {
    /// One row of [`multiply`] without instructions for `bf16`.
    fn multiply_row(pairs: &[bf16], panel: &[PanelRow], sums: &mut [f32], accumulate: bool) {
        let mut products = [0.0_f32; WIDTH];
        for (pair, row) in pairs.as_chunks::<2>().0.iter().zip(panel) {
            let [even, odd] = pair.map(|value| f32::from_bits(u32::from(value.to_bits()) << 16));
            for (product, both) in products.iter_mut().zip(row.0) {
                *product += odd * f32::from_bits(both & 0xFFFF_0000);
                *product += even * f32::from_bits(both << 16);
            }
        }
        for (sum, product) in sums.iter_mut().zip(products) {
            *sum = if accumulate { *sum + product } else { product };
        }
    }

    /// Packs two rows of B into a row of a panel; columns beyond the rows become zeros.
    pub(super) fn pack_row_pair(even: &[bf16], odd: &[bf16], out: &mut PanelRow) {
        if let (Some((even, _)), Some((odd, _))) = (even.split_first_chunk::<WIDTH>(), odd.split_first_chunk()) {
            for ((even, odd), out) in even.iter().zip(odd as &[bf16; WIDTH]).zip(&mut out.0) {
                *out = u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16;
            }
        } else {
            *out = PanelRow::ZERO;
            for (even, out) in even.iter().zip(&mut out.0) {
                *out = u32::from(even.to_bits());
            }
            for (odd, out) in odd.iter().zip(&mut out.0) {
                *out |= u32::from(odd.to_bits()) << 16;
            }
        }
    }
}

/// Packs up to [`WIDTH`] columns of B, each contiguous: column `j` begins at `j · stride`. `panel.len()` pairs of
/// each column are taken; columns beyond `count` become zeros.
pub(super) fn pack_columns(columns: &[bf16], count: usize, stride: usize, panel: &mut [PanelRow]) {
    assert!(count == 0 || (count - 1) * stride + 2 * panel.len() <= columns.len(), "columns of B");
    #[cfg(target_arch = "x86_64")]
    if is_fast() && count == WIDTH {
        // SAFETY: the processor has the features, and the columns were checked against their slice above.
        unsafe { avx512::pack_columns(columns.as_ptr(), stride, panel) };
        return;
    }
    panel.fill(PanelRow::ZERO);
    for (j, column) in columns.chunks(stride.max(1)).take(count).enumerate() {
        for (pair, row) in column.as_chunks::<2>().0.iter().zip(panel.iter_mut()) {
            row.0[j] = u32::from(pair[0].to_bits()) | u32::from(pair[1].to_bits()) << 16;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_load_si512, _mm512_loadu_ps,
        _mm512_loadu_si512, _mm512_maskz_loadu_epi32, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_store_si512, _mm512_storeu_ps,
        _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };
    use std::mem::transmute;

    use half::bf16;

    use super::{HEIGHT, PanelRow, WIDTH};

    /// # Safety
    /// `rows` has `height` rows of `2 · panel.len()` values, `sums` as many of [`WIDTH`]; `height` is at most
    /// [`HEIGHT`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn multiply(
        height: usize,
        rows: *const bf16,
        row_stride: usize,
        panel: &[PanelRow],
        sums: *mut f32,
        sum_stride: usize,
        accumulate: bool,
    ) {
        macro_rules! by_height {
            ($($height:literal)*) => {
                match height {
                    // SAFETY: passed on to the caller.
                    $($height => unsafe {
                        tile::<$height>(rows, row_stride, panel, sums, sum_stride, accumulate)
                    },)*
                    _ => unreachable!("a tile has 1 to {HEIGHT} rows"),
                }
            };
        }
        by_height!(12 11 10 9 8 7 6 5 4 3 2 1);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn tile<const ROWS: usize>(
        rows: *const bf16,
        row_stride: usize,
        panel: &[PanelRow],
        sums: *mut f32,
        sum_stride: usize,
        accumulate: bool,
    ) {
        let mut left = [_mm512_setzero_ps(); ROWS];
        let mut right = [_mm512_setzero_ps(); ROWS];
        for (p, b) in panel.iter().enumerate() {
            // SAFETY: a panel row is 128 aligned bytes; the caller vouches for the pairs of each row. Every bit
            // pattern is a vector of bf16.
            unsafe {
                let b_left = transmute::<__m512i, __m512bh>(_mm512_load_si512(b.0.as_ptr().cast()));
                let b_right = transmute::<__m512i, __m512bh>(_mm512_load_si512(b.0.as_ptr().add(16).cast()));
                for i in 0..ROWS {
                    let pair = rows.add(i * row_stride + 2 * p).cast::<i32>().read_unaligned();
                    let pair = transmute::<__m512i, __m512bh>(_mm512_set1_epi32(pair));
                    left[i] = _mm512_dpbf16_ps(left[i], b_left, pair);
                    right[i] = _mm512_dpbf16_ps(right[i], b_right, pair);
                }
            }
        }
        for i in 0..ROWS {
            // SAFETY: the caller vouches for the sums of each row.
            unsafe {
                let out = sums.add(i * sum_stride);
                if accumulate {
                    left[i] = _mm512_add_ps(_mm512_loadu_ps(out), left[i]);
                    right[i] = _mm512_add_ps(_mm512_loadu_ps(out.add(16)), right[i]);
                }
                _mm512_storeu_ps(out, left[i]);
                _mm512_storeu_ps(out.add(16), right[i]);
            }
        }
    }

    /// # Safety
    /// `columns` has [`WIDTH`] columns of `2 · panel.len()` values, `stride` apart.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[allow(clippy::cast_ptr_alignment, reason = "loads of any alignment")]
    pub(super) unsafe fn pack_columns(columns: *const bf16, stride: usize, panel: &mut [PanelRow]) {
        for (block, rows) in panel.chunks_mut(16).enumerate() {
            let mask = if rows.len() == 16 { u16::MAX } else { (1 << rows.len()) - 1 };
            for half in 0..WIDTH / 16 {
                let mut lines = [_mm512_setzero_si512(); 16];
                for (j, line) in lines.iter_mut().enumerate() {
                    // SAFETY: the caller vouches for the pairs of each column; the mask leaves out all others.
                    *line = unsafe {
                        let pairs = columns.add((half * 16 + j) * stride + block * 32).cast::<i32>();
                        if mask == u16::MAX {
                            _mm512_loadu_si512(pairs.cast())
                        } else {
                            _mm512_maskz_loadu_epi32(mask, pairs)
                        }
                    };
                }
                for (row, line) in rows.iter_mut().zip(transpose(&lines)) {
                    // SAFETY: half a panel row is 64 aligned bytes.
                    unsafe { _mm512_store_si512(row.0.as_mut_ptr().add(half * 16).cast(), line) };
                }
            }
        }
    }

    /// Transposes 16 × 16 values of 32 bits.
    #[target_feature(enable = "avx512f")]
    fn transpose(lines: &[__m512i; 16]) -> [__m512i; 16] {
        let mut a = *lines;
        for i in 0..8 {
            (a[2 * i], a[2 * i + 1]) = (
                _mm512_unpacklo_epi32(lines[2 * i], lines[2 * i + 1]),
                _mm512_unpackhi_epi32(lines[2 * i], lines[2 * i + 1]),
            );
        }
        // b[4g + c]: column c of each 4 × 4 block of rows 4g .. 4g + 4, one block in each 128-bit lane
        let mut b = a;
        for g in 0..4 {
            b[4 * g] = _mm512_unpacklo_epi64(a[4 * g], a[4 * g + 2]);
            b[4 * g + 1] = _mm512_unpackhi_epi64(a[4 * g], a[4 * g + 2]);
            b[4 * g + 2] = _mm512_unpacklo_epi64(a[4 * g + 1], a[4 * g + 3]);
            b[4 * g + 3] = _mm512_unpackhi_epi64(a[4 * g + 1], a[4 * g + 3]);
        }
        let mut out = b;
        for c in 0..4 {
            let (even_low, odd_low) = (
                _mm512_shuffle_i32x4::<0b10_00_10_00>(b[c], b[4 + c]),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(b[c], b[4 + c]),
            );
            let (even_high, odd_high) = (
                _mm512_shuffle_i32x4::<0b10_00_10_00>(b[8 + c], b[12 + c]),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(b[8 + c], b[12 + c]),
            );
            out[c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(even_low, even_high);
            out[8 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(even_low, even_high);
            out[4 + c] = _mm512_shuffle_i32x4::<0b10_00_10_00>(odd_low, odd_high);
            out[12 + c] = _mm512_shuffle_i32x4::<0b11_01_11_01>(odd_low, odd_high);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::uniform;

    fn matrix(seed: u64, len: usize) -> Vec<bf16> {
        uniform(seed, len).into_iter().map(bf16::from_f32).collect()
    }

    fn product(
        count: usize,
        a: &[bf16],
        stride: usize,
        b: &[bf16],
        columns: usize,
        depth: usize,
    ) -> Vec<f32> {
        let sum = |i: usize, j: usize| {
            (0..depth).map(|k| a[i * stride + k].to_f64() * b[j * depth + k].to_f64()).sum::<f64>() as f32
        };
        (0..count).flat_map(|i| (0..WIDTH).map(move |j| if j < columns { sum(i, j) } else { 0.0 })).collect()
    }

    fn assert_close(got: &[f32], want: &[f32]) {
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() < 1e-4, "[{i}]: {got}, want {want}");
        }
    }

    #[test]
    fn products_of_every_height_and_ragged_panels() {
        for (count, depth, columns) in
            [(1, 2, 32), (5, 34, 32), (12, 64, 31), (13, 66, 7), (25, 30, 32), (3, 2, 1)]
        {
            let stride = depth + 2;
            let (a, b) = (matrix(1, count * stride), matrix(2, columns * depth));
            let mut panel = vec![PanelRow([u32::MAX; WIDTH]); depth / 2];
            pack_columns(&b, columns, depth, &mut panel);
            let mut sums = vec![f32::NAN; count * WIDTH];
            multiply(count, PairedRows::new(&a, stride), &panel, &mut Sums::new(&mut sums, WIDTH), false);
            let want = product(count, &a, stride, &b, columns, depth);
            assert_close(&sums, &want);
            multiply(count, PairedRows::new(&a, stride), &panel, &mut Sums::new(&mut sums, WIDTH), true);
            assert_close(&sums, &want.iter().map(|v| 2.0 * v).collect::<Vec<_>>());
            let mut portable = vec![0.0; WIDTH];
            multiply_row(&a[..depth], &panel, &mut portable, false);
            assert_close(&portable, &want[..WIDTH]);
        }
    }

    #[test]
    fn rows_and_columns_pack_into_the_same_panel() {
        for (columns, depth) in [(32, 2), (32, 64), (32, 50), (20, 64)] {
            let b = matrix(3, columns * depth); // column by column
            let row = |k: usize| (0..columns).map(|j| b[j * depth + k]).collect::<Vec<_>>();
            let (mut by_columns, mut by_rows) =
                (vec![PanelRow::ZERO; depth / 2], vec![PanelRow([7; WIDTH]); depth / 2]);
            pack_columns(&b, columns, depth, &mut by_columns);
            for (p, out) in by_rows.iter_mut().enumerate() {
                pack_row_pair(&row(2 * p), &row(2 * p + 1), out);
            }
            assert!(by_columns.iter().zip(&by_rows).all(|(a, b)| a.0 == b.0), "[{depth}, {columns}]");
        }
    }
}
