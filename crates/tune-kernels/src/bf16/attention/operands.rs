//! Rows of heads as the factors of products: rotated, packed, transposed.

use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;

use super::Layout;
use crate::RotaryTable;
use crate::bf16::convert::{round, round_ties_away, widen};
use crate::bf16::tile::{PanelRow, WIDTH, pack_columns};
use crate::cpu::vectorised;

/// Values of a chunk of a loop over half a head: one 512-bit register.
const CHUNK: usize = 16;

/// What both directions read.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) qkv: &'a [bf16],
    pub(super) rotary: &'a RotaryTable,
    pub(super) layout: Layout,
}

impl<'a> Input<'a> {
    /// The columns from `column` on of the rows from `token` on, [`Layout::width`] apart.
    pub(super) fn rows(&self, token: usize, column: usize) -> &'a [bf16] {
        &self.qkv[token * self.layout.width() + column..]
    }

    /// The head at `column`, rotated, times `scale`; `out` `[_, dim]` has rows for all of `tokens` and perhaps
    /// more, which become zeros.
    pub(super) fn rotated(&self, tokens: Range<usize>, column: usize, scale: f32, out: &mut [bf16]) {
        let Layout { dim, .. } = self.layout;
        let (out, rest) = out.split_at_mut(tokens.len() * dim);
        rest.fill(bf16::ZERO);
        if !tokens.is_empty() {
            let (cos, sin) = self.rotary.angles(tokens.clone());
            rotate(self.rows(tokens.start, column), self.layout.width(), cos, sin, dim, scale, out);
        }
    }
}

/// Asks for the `dim` values of the row after the next few that begin `stride` apart: rows of a head lie too far
/// apart for the processor to foresee them.
#[inline(always)]
#[allow(clippy::inline_always, reason = "one instruction for each cache line")]
fn prefetch(row: &[bf16], stride: usize, dim: usize) {
    const AHEAD: usize = 8;
    const LINE: usize = 32;
    #[cfg(target_arch = "x86_64")]
    for value in (0..dim).step_by(LINE) {
        let address = row.as_ptr().wrapping_add(AHEAD * stride + value);
        // SAFETY: asking for an address that may not be read has no effect.
        #[allow(unsafe_code)]
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (row, stride, dim, AHEAD, LINE);
}

/// Copies `count` rows of `dim` values that begin `stride` apart; rows of `out` beyond them become zeros.
pub(super) fn copy_rows(rows: &[bf16], count: usize, stride: usize, dim: usize, out: &mut [bf16]) {
    let (out, rest) = out.split_at_mut(count * dim);
    for (row, out) in rows.chunks(stride).zip(out.chunks_exact_mut(dim)) {
        prefetch(row, stride, dim);
        out.copy_from_slice(&row[..dim]);
    }
    rest.fill(bf16::ZERO);
}

/// Packs rows of `dim` values, a multiple of [`WIDTH`] of them, as the columns of a factor: one panel of `dim / 2`
/// pairs for each [`WIDTH`] rows.
pub(super) fn pack_as_columns(rows: &[bf16], dim: usize, panels: &mut [PanelRow]) {
    for (rows, panel) in rows.chunks_exact(WIDTH * dim).zip(panels.chunks_exact_mut(dim / 2)) {
        pack_columns(rows, WIDTH, dim, panel);
    }
}

/// Writes rows of `dim` values, a multiple of [`WIDTH`] of them, as the columns of `out`, whose rows begin
/// `stride` apart. `panel` is scratch space of `dim / 2` rows.
pub(super) fn transpose(rows: &[bf16], dim: usize, panel: &mut [PanelRow], stride: usize, out: &mut [bf16]) {
    for (rows, first) in rows.chunks_exact(WIDTH * dim).zip((0..).step_by(WIDTH)) {
        pack_columns(rows, WIDTH, dim, panel);
        split_pairs(panel, stride, &mut out[first..]);
    }
}

vectorised! {
    fn rotate(
        x: &[bf16],
        stride: usize,
        cos: &[f32],
        sin: &[f32],
        dim: usize,
        scale: f32,
        out: &mut [bf16],
    ) {
        let half = dim / 2;
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for ((x, out), (cos, sin)) in x.chunks(stride).zip(out.chunks_exact_mut(dim)).zip(angles) {
            prefetch(x, stride, dim);
            let (x_low, x_high) = x[..dim].split_at(half);
            let (out_low, out_high) = out.split_at_mut(half);
            let turn = |low: bf16, high: bf16, cos: f32, sin: f32| {
                let (low, high) = (widen(low), widen(high));
                [round((low * cos - high * sin) * scale), round((high * cos + low * sin) * scale)]
            };
            let mut first = 0;
            while first + CHUNK <= half {
                let chunk = first..first + CHUNK;
                let (x_low, x_high) = (&x_low[chunk.clone()], &x_high[chunk.clone()]);
                let (cos, sin) = (&cos[chunk.clone()], &sin[chunk.clone()]);
                let (out_low, out_high) = (&mut out_low[chunk.clone()], &mut out_high[chunk]);
                for j in 0..CHUNK {
                    [out_low[j], out_high[j]] = turn(x_low[j], x_high[j], cos[j], sin[j]);
                }
                first += CHUNK;
            }
            for j in first..half {
                [out_low[j], out_high[j]] = turn(x_low[j], x_high[j], cos[j], sin[j]);
            }
        }
    }

    /// `out` = `x · scale`, rotated back, for one row of a head.
    pub(super) fn rotate_back(x: &[f32], cos: &[f32], sin: &[f32], scale: f32, out: &mut [MaybeUninit<bf16>]) {
        let half = cos.len();
        let (x_low, x_high) = x[..2 * half].split_at(half);
        let (out_low, out_high) = out[..2 * half].split_at_mut(half);
        for (((low, high), (out_low, out_high)), (cos, sin)) in
            x_low.iter().zip(x_high).zip(out_low.iter_mut().zip(out_high)).zip(cos.iter().zip(sin))
        {
            out_low.write(round((low * cos + high * sin) * scale));
            out_high.write(round((high * cos - low * sin) * scale));
        }
    }

    /// Packs `count` rows of `dim` values that begin `stride` apart, two by two, as the rows of a factor: a panel
    /// of `panel_len` pairs for each [`WIDTH`] columns. An odd last row is paired with zeros.
    pub(super) fn pack_as_rows(
        rows: &[bf16],
        count: usize,
        stride: usize,
        dim: usize,
        panel_len: usize,
        panels: &mut [PanelRow],
    ) {
        let zeros = [bf16::ZERO; WIDTH];
        for (p, pair) in (0..count).step_by(2).enumerate() {
            let even = &rows[pair * stride..][..dim];
            let odd = (pair + 1 < count).then(|| &rows[(pair + 1) * stride..][..dim]);
            prefetch(even, stride, dim);
            prefetch(odd.unwrap_or(even), stride, dim);
            for (panel, left) in panels.chunks_exact_mut(panel_len).zip((0..dim).step_by(WIDTH)) {
                let out = &mut panel[p];
                let odd = odd.map_or(&zeros[..], |odd| &odd[left..]);
                if left + WIDTH <= dim {
                    for ((even, odd), out) in even[left..left + WIDTH].iter().zip(&odd[..WIDTH]).zip(&mut out.0) {
                        *out = u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16;
                    }
                } else {
                    *out = PanelRow::ZERO;
                    for ((even, odd), out) in even[left..].iter().zip(odd).zip(&mut out.0) {
                        *out = u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16;
                    }
                }
            }
        }
    }

    /// Writes the halves of each row of a panel as two rows of [`WIDTH`] values.
    fn split_pairs(panel: &[PanelRow], stride: usize, out: &mut [bf16]) {
        for (pair, out) in panel.iter().zip(out.chunks_mut(2 * stride)) {
            let (even, odd) = out.split_at_mut(stride);
            for ((both, even), odd) in pair.0.iter().zip(&mut even[..WIDTH]).zip(&mut odd[..WIDTH]) {
                *even = bf16::from_bits(*both as u16);
                *odd = bf16::from_bits((both >> 16) as u16);
            }
        }
    }

    /// `out = values · factor`, rounded.
    pub(super) fn scale_row(values: &[f32], factor: f32, out: &mut [MaybeUninit<bf16>]) {
        for (value, out) in values.iter().zip(out) {
            out.write(round_ties_away(value * factor));
        }
    }

    /// `Σ a · b` of one row of a head; rows of `b` begin `stride` apart.
    pub(super) fn dot(a: &[bf16], b: &[bf16], stride: usize) -> f32 {
        prefetch(b, stride, b.len());
        let mut lanes = [0.0; CHUNK];
        let (a_head, a_tail) = a.as_chunks::<CHUNK>();
        let (b_head, b_tail) = b.as_chunks::<CHUNK>();
        for (a, b) in a_head.iter().zip(b_head) {
            for i in 0..CHUNK {
                lanes[i] += widen(a[i]) * widen(b[i]);
            }
        }
        let tail = a_tail.iter().zip(b_tail).fold(0.0, |sum, (a, b)| sum + widen(*a) * widen(*b));
        lanes.iter().fold(tail, |sum, lane| sum + lane)
    }
}
