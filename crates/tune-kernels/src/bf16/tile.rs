//! The innermost product: a few rows of A, in pairs of `bf16`, times a packed panel of B, summed in `f32`.
//!
//! A panel holds [`WIDTH`] columns of B. Depth goes in pairs: element `[p][j]` of a panel is a `u32` with
//! `B[2p][j]` in its low half and `B[2p + 1][j]` in its high half, which is what one lane of `vdpbf16ps` takes.
//! A is read row by row as it lies in memory, also in pairs. With AVX-512 BF16 a tile of 12 × 32 sums stays in
//! registers and a pair of each row is broadcast against two loads of the panel; with AMX one of 32 × 32; elsewhere
//! both factors become `f32` before tiles of them are multiplied ([`widened`]).

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod widened;

use std::ops::Range;

use half::bf16;

use crate::cpu::{Buffer, InstructionSet, prefetch_part, vectorised};
use widened::Registers;

/// Columns of a panel.
pub(super) const WIDTH: usize = 32;

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

    /// Whether tiles are read slowly from where they lie: their rows cross lines of the cache, or fall on so few
    /// places of it that they drive each other out.
    pub(super) fn is_slow(self) -> bool {
        const LINE: usize = 64;
        const PLACES: usize = 2048;
        let stride = self.stride * size_of::<bf16>();
        let crosses = !self.values.as_ptr().addr().is_multiple_of(LINE) || !stride.is_multiple_of(LINE);
        has_tiles() && (crosses || stride.is_multiple_of(PLACES))
    }

    /// The first `depth` values of `count` rows from row `top` on, copied to `buffer`; those of the next rows are asked
    /// for.
    pub(super) fn gather(
        self,
        top: usize,
        count: usize,
        depth: usize,
        buffer: &mut Buffer<bf16>,
    ) -> PairedRows<'_> {
        let stride = depth.next_multiple_of(WIDTH);
        let gathered = buffer.take(count * stride);
        let rows = self.values[top * self.stride..].chunks(self.stride);
        for ((i, row), out) in rows.enumerate().zip(gathered.chunks_exact_mut(stride)) {
            prefetch_part(self.values, (top + count + i) * self.stride, depth);
            out[..depth].copy_from_slice(&row[..depth]);
        }
        PairedRows { values: gathered, stride }
    }
}

/// Panels of the same depth, one after the other, or the same part of the depth of each.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    rows: &'a [PanelRow],
    stride: usize,
    first: usize,
    pairs: usize,
    /// Columns of B in all of them; those beyond are zeros that nobody asks for.
    columns: usize,
}

impl<'a> Panels<'a> {
    /// `rows` in panels of `pairs` pairs.
    pub(super) fn new(rows: &'a [PanelRow], pairs: usize) -> Self {
        let columns = rows.len() / pairs.max(1) * WIDTH;
        Self { rows, stride: pairs, first: 0, pairs, columns }
    }

    /// Only the first `columns` are wanted of what they make.
    pub(super) fn narrow(self, columns: usize) -> Self {
        Self { columns, ..self }
    }

    /// The pairs `pairs` of each panel.
    pub(super) fn slice(self, pairs: Range<usize>) -> Self {
        assert!(pairs.start <= pairs.end && pairs.end <= self.pairs, "pairs {pairs:?} of {}", self.pairs);
        Self { first: self.first + pairs.start, pairs: pairs.len(), ..self }
    }

    pub(super) fn pairs(self) -> usize {
        self.pairs
    }

    pub(super) fn count(self) -> usize {
        self.rows.len() / self.stride.max(1)
    }

    /// The panel `index`.
    fn panel(self, index: usize) -> &'a [PanelRow] {
        &self.rows[index * self.stride + self.first..][..self.pairs]
    }

    fn each(self) -> impl Iterator<Item = &'a [PanelRow]> {
        let panels = self.rows.chunks_exact(self.stride.max(1));
        panels.map(move |panel| &panel[self.first..self.first + self.pairs])
    }
}

/// A product of a sum: rows of A and as much of the depth of B.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) rows: PairedRows<'a>,
    pub(super) panels: Panels<'a>,
}

/// A tile of sums: rows that begin `stride` apart.
pub(super) struct Sums<'a> {
    values: &'a mut [f32],
    stride: usize,
}

impl<'a> Sums<'a> {
    /// `values` from the first sum of the first row on.
    pub(super) fn new(values: &'a mut [f32], stride: usize) -> Self {
        Self { values, stride }
    }

    /// Those of the rows from `top` on.
    pub(super) fn below(&mut self, top: usize) -> Sums<'_> {
        Sums { values: &mut self.values[top * self.stride..], stride: self.stride }
    }
}

/// [`multiply_parts`] of one part.
pub(super) fn multiply(count: usize, rows: PairedRows, panels: Panels, sums: &mut Sums, accumulate: bool) {
    multiply_parts(count, &[Part { rows, panels }], sums, accumulate);
}

/// `sums = Σ rows · panels` over `parts`, or `sums += …`, for `count` rows and the whole depth of the panels; those of a
/// panel lie beside those of the panel before.
pub(super) fn multiply_parts(count: usize, parts: &[Part], sums: &mut Sums, accumulate: bool) {
    let Some(first) = parts.first() else { return };
    let columns = first.panels.count() * WIDTH;
    if count == 0 || columns == 0 {
        return;
    }
    assert!((count - 1) * sums.stride + columns <= sums.values.len(), "rows of sums");
    for Part { rows, panels } in parts {
        assert!(panels.count() * WIDTH == columns, "as many panels in each part");
        assert!((count - 1) * rows.stride + 2 * panels.pairs() <= rows.values.len(), "rows of A");
    }
    let (start, stride) = (sums.values.as_mut_ptr(), sums.stride);
    match Engine::best() {
        // SAFETY: the processor has the instructions, and rows and sums were checked against their slices above.
        #[cfg(target_arch = "x86_64")]
        Engine::Avx512 => unsafe { avx512::multiply(count, parts, start, stride, accumulate) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Engine::Amx => unsafe { amx::multiply(count, parts, start, stride, accumulate) },
        // SAFETY: as above.
        Engine::Widened(registers) => unsafe {
            widened::multiply(registers, count, parts, start, stride, accumulate);
        },
    }
}

/// Rows of a tile: a task takes a multiple of them.
pub(super) fn height() -> usize {
    #[cfg(target_arch = "x86_64")]
    if Engine::best() == Engine::Amx {
        return amx::HEIGHT;
    }
    12
}

/// Whether products of `bf16` are at least as fast as those of `f32` here: on instructions of their own, or widened into
/// tiles that fill the registers.
pub fn is_fast() -> bool {
    cfg!(target_feature = "neon") || Engine::best() != Engine::Widened(Registers::Plain)
}

/// Whether both factors become `f32` first.
pub(super) fn widens() -> bool {
    matches!(Engine::best(), Engine::Widened(_))
}

/// Whether they run on tiles (AMX).
pub fn has_tiles() -> bool {
    InstructionSet::best() == InstructionSet::Amx
}

/// What makes the products.
#[derive(Clone, Copy, PartialEq)]
enum Engine {
    Widened(Registers),
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Engine {
    fn best() -> Self {
        match InstructionSet::best() {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Amx => Self::Amx,
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 if is_x86_feature_detected!("avx512bf16") => Self::Avx512,
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => Self::Widened(Registers::Avx512),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => Self::Widened(Registers::Avx2),
            _ => Self::Widened(Registers::Plain),
        }
    }
}

vectorised! {
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
    if count == WIDTH {
        match InstructionSet::best() {
            // SAFETY: the processor has the features, and the columns were checked against their slice above.
            InstructionSet::Avx512 | InstructionSet::Amx => {
                return unsafe { avx512::pack_columns(columns.as_ptr(), stride, panel) };
            }
            // SAFETY: as above.
            InstructionSet::Avx2 => return unsafe { avx2::pack_columns(columns.as_ptr(), stride, panel) },
            InstructionSet::Portable => {}
        }
    }
    panel.fill(PanelRow::ZERO);
    for (j, column) in columns.chunks(stride.max(1)).take(count).enumerate() {
        for (pair, row) in column.as_chunks::<2>().0.iter().zip(panel.iter_mut()) {
            row.0[j] = u32::from(pair[0].to_bits()) | u32::from(pair[1].to_bits()) << 16;
        }
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
        for (count, depth, columns) in [
            (1, 2, 32),
            (5, 34, 32),
            (12, 64, 31),
            (13, 66, 7),
            (25, 30, 32),
            (3, 2, 1),
            (70, 100, 32),
            (48, 96, 9),
        ] {
            let stride = depth + 2;
            let (a, b) = (matrix(1, count * stride), matrix(2, columns * depth));
            let mut panel = vec![PanelRow([u32::MAX; WIDTH]); depth / 2];
            pack_columns(&b, columns, depth, &mut panel);
            let mut sums = vec![f32::NAN; count * WIDTH];
            let part = Part { rows: PairedRows::new(&a, stride), panels: Panels::new(&panel, depth / 2) };
            multiply_parts(count, &[part], &mut Sums::new(&mut sums, WIDTH), false);
            let want = product(count, &a, stride, &b, columns, depth);
            assert_close(&sums, &want);
            multiply_parts(count, &[part], &mut Sums::new(&mut sums, WIDTH), true);
            assert_close(&sums, &want.iter().map(|v| 2.0 * v).collect::<Vec<_>>());
            for registers in Registers::available() {
                let mut sums = vec![f32::NAN; count * WIDTH];
                // SAFETY: `part` has `count` rows and a panel of their depth, for which there are sums.
                unsafe {
                    widened::multiply(registers, count, &[part], sums.as_mut_ptr(), WIDTH, false);
                }
                assert_close(&sums, &want);
            }
        }
    }

    #[test]
    fn several_panels_and_parts_of_their_depth() {
        let (count, depth, part) = (37, 130, 16..49);
        let (a, b) = (matrix(4, count * depth), matrix(5, 2 * WIDTH * depth));
        let mut panels = vec![PanelRow::ZERO; depth];
        for (columns, panel) in b.chunks_exact(WIDTH * depth).zip(panels.chunks_exact_mut(depth / 2)) {
            pack_columns(columns, WIDTH, depth, panel);
        }
        let stride = 2 * WIDTH + 5;
        let mut sums = vec![f32::NAN; count * stride];
        let first = 2 * part.start;
        let rows = PairedRows::new(&a[first..], depth);
        let panels = Panels::new(&panels, depth / 2).slice(part.clone());
        multiply(count, rows, panels, &mut Sums::new(&mut sums, stride), false);
        for i in 0..count {
            for j in 0..2 * WIDTH {
                let factors = (first..2 * part.end).map(|k| (a[i * depth + k], b[j * depth + k]));
                let want = factors.map(|(a, b)| a.to_f64() * b.to_f64()).sum::<f64>() as f32;
                let got = sums[i * stride + j];
                assert!((got - want).abs() < 1e-4, "[{i}, {j}]: {got}, want {want}");
            }
            assert!(sums[i * stride + 2 * WIDTH..(i + 1) * stride].iter().all(|v| v.is_nan()));
        }
    }

    #[test]
    fn sums_of_parts_have_the_same_bits_at_once_and_one_after_the_other_and_of_narrow_panels() {
        let (count, depth) = (29, 82);
        for columns in [7, 16, 17, 32, 48, 64] {
            let (a, b) = (matrix(6, count * depth), matrix(7, columns * depth));
            let count_of_panels = columns.div_ceil(WIDTH);
            let mut panels = vec![PanelRow::ZERO; count_of_panels * depth / 2];
            for (columns, panel) in b.chunks(WIDTH * depth).zip(panels.chunks_exact_mut(depth / 2)) {
                pack_columns(columns, columns.len() / depth, depth, panel);
            }
            let part = |pairs: Range<usize>| Part {
                rows: PairedRows::new(&a[2 * pairs.start..], depth),
                panels: Panels::new(&panels, depth / 2).slice(pairs).narrow(columns),
            };
            let parts = [0..16, 16..33, 33..41].map(part);
            let stride = count_of_panels * WIDTH;
            let [mut at_once, mut one_by_one] = [0, 1].map(|_| vec![0.0; count * stride]);
            multiply_parts(count, &parts, &mut Sums::new(&mut at_once, stride), false);
            for (i, part) in parts.iter().enumerate() {
                multiply_parts(count, &[*part], &mut Sums::new(&mut one_by_one, stride), i > 0);
            }
            for (i, a) in a.chunks_exact(depth).enumerate() {
                for (j, b) in b.chunks_exact(depth).enumerate() {
                    let (got, want) = (at_once[i * stride + j], one_by_one[i * stride + j]);
                    assert_eq!(got.to_bits(), want.to_bits(), "[{i}, {j}] of {columns} columns");
                    let want = a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()).sum::<f64>();
                    assert!((f64::from(got) - want).abs() < 1e-4, "[{i}, {j}]: {got}, want {want}");
                }
            }
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
