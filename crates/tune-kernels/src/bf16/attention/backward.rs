//! Backward for some queries of the heads that share a key head.
//!
//! Scores are made transposed, `[keys, queries]`: then their rows are the left factors of dV and dK as they are,
//! and two rows together are what a panel of dQᵀ takes.

use std::ops::Range;

use half::bf16;

use super::Layout;
use super::operands::{Input, copy_rows, dot, pack_as_columns, pack_as_rows, transpose};
use crate::bf16::tile::{PairedRows, PanelRow, Panels, Sums, WIDTH, multiply};
use crate::cpu::{Buffer, exp2_for_bf16, vectorised, with_buffers};

/// Queries that are packed at once. A multiple of [`WIDTH`].
pub(super) const QUERY_BLOCK: usize = 128;

/// Keys whose scores are made at once, an even number.
const STRIP: usize = 32;

/// Keys whose part of dQ is added at once. A multiple of [`STRIP`].
const KEY_BLOCK: usize = 192;

/// What backward reads.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) input: Input<'a>,
    /// `[tokens, heads · dim]`
    pub(super) o: &'a [bf16],
    pub(super) d_o: &'a [bf16],
    /// `[tokens, heads]`
    pub(super) log_sums: &'a [f32],
}

/// Adds what `queries` of a document, numbered from its first, of all heads of `kv_head` give to `dk`, of rotated
/// keys and without the factor ln 2, and to `dv`, both `[queries.end, wide]` with `wide` a multiple of [`WIDTH`].
/// `finish` is called with each query, its head, and its row of dQ, rotated and without the scale of scores.
pub(super) fn pull_back(
    source: &Source,
    document: &Range<usize>,
    kv_head: usize,
    queries: &Range<usize>,
    dk: &mut [f32],
    dv: &mut [f32],
    mut finish: impl FnMut(usize, usize, &[f32]),
) {
    with_buffers(|workspace: &mut Workspace| {
        let Workspace { keys, queries: packed, strip, dq } = workspace;
        let layout = source.input.layout;
        keys.fill(source, document.start..document.start + queries.end, kv_head);
        for head in layout.heads_of(kv_head) {
            for start in queries.clone().step_by(QUERY_BLOCK) {
                let block = start..queries.end.min(start + QUERY_BLOCK);
                packed.fill(source, document.start + block.start..document.start + block.end, head);
                let columns = dq.columns.take(layout.dim.next_multiple_of(WIDTH) * QUERY_BLOCK);
                strip.pull_back(keys, packed, &block, layout.dim, dk, dv, columns);
                dq.for_each_row(block.len(), |i, row| finish(block.start + i, head, row));
            }
        }
    });
}

/// The keys that some queries see, and their values. Rows beyond them, up to a multiple of [`WIDTH`], are zeros.
#[derive(Default)]
struct Keys {
    /// Rotated, `[keys, dim]`.
    k: Buffer<bf16>,
    /// The same by blocks, `[dim, KEY_BLOCK]` each.
    k_columns: Buffer<bf16>,
    v: Buffer<bf16>,
    panel: Buffer<PanelRow>,
}

impl Keys {
    fn fill(&mut self, source: &Source, tokens: Range<usize>, kv_head: usize) {
        let layout @ Layout { dim, .. } = source.input.layout;
        let padded = tokens.len().next_multiple_of(WIDTH);
        let k = self.k.take(padded * dim);
        source.input.rotated(tokens.clone(), layout.k_column(kv_head), 1.0, k);
        let panel = self.panel.take(dim / 2);
        let k_columns = self.k_columns.take(tokens.len().next_multiple_of(KEY_BLOCK) * dim);
        let blocks = k_columns.chunks_exact_mut(KEY_BLOCK * dim);
        for (k, k_columns) in k.chunks(KEY_BLOCK * dim).zip(blocks) {
            transpose(k, dim, panel, KEY_BLOCK, k_columns);
        }
        let v = source.input.rows(tokens.start, layout.v_column(kv_head));
        copy_rows(v, tokens.len(), layout.width(), dim, self.v.take(padded * dim));
    }
}

/// A block of queries, and the gradients of their o. Queries beyond them, up to a multiple of [`WIDTH`], are zeros.
#[derive(Default)]
struct Queries {
    rows: Buffer<bf16>,
    /// Rotated and scaled, packed as the columns and as the rows of a factor.
    q_columns: Buffer<PanelRow>,
    q_rows: Buffer<PanelRow>,
    d_o_columns: Buffer<PanelRow>,
    d_o_rows: Buffer<PanelRow>,
    log_sums: Buffer<f32>,
    /// `rowsum(dO O)`
    pulls: Buffer<f32>,
}

impl Queries {
    fn fill(&mut self, source: &Source, tokens: Range<usize>, head: usize) {
        let layout @ Layout { dim, heads, .. } = source.input.layout;
        let (count, padded) = (tokens.len(), tokens.len().next_multiple_of(WIDTH));
        let pairs = padded / 2;
        let (columns_len, rows_len) = (padded / WIDTH * (dim / 2), dim.div_ceil(WIDTH) * pairs);
        let rows = self.rows.take(padded * dim);
        source.input.rotated(tokens.clone(), layout.q_column(head), layout.query_scale(), rows);
        pack_as_columns(rows, dim, self.q_columns.take(columns_len));
        pack_as_rows(rows, padded, dim, dim, pairs, self.q_rows.take(rows_len));

        let stride = heads * dim;
        let first = tokens.start * stride + head * dim;
        copy_rows(&source.d_o[first..], count, stride, dim, rows);
        pack_as_columns(rows, dim, self.d_o_columns.take(columns_len));
        pack_as_rows(rows, padded, dim, dim, pairs, self.d_o_rows.take(rows_len));

        let (log_sums, pulls) = (self.log_sums.take(padded), self.pulls.take(padded));
        let o = source.o[first..].chunks(stride);
        for (i, (d_o, o)) in rows.chunks_exact(dim).zip(o).take(count).enumerate() {
            log_sums[i] = source.log_sums[(tokens.start + i) * heads + head];
            pulls[i] = dot(d_o, &o[..dim], stride);
        }
        log_sums[count..].fill(0.0);
        pulls[count..].fill(0.0);
    }
}

/// Scores of some keys and all queries of a block, and what becomes of them.
#[derive(Default)]
struct Strip {
    /// `[STRIP, QUERY_BLOCK]`
    scores: Buffer<f32>,
    d_p: Buffer<f32>,
    p: Buffer<bf16>,
    d_s: Buffer<bf16>,
    /// dS of a block of keys, packed by pairs of keys: a panel of `KEY_BLOCK / 2` pairs for [`WIDTH`] queries.
    d_s_rows: Buffer<PanelRow>,
}

impl Strip {
    /// Adds to dk and dv what a block of queries gives; `dq` `[dim, QUERY_BLOCK]` is written.
    #[allow(clippy::too_many_arguments)]
    fn pull_back(
        &mut self,
        keys: &Keys,
        queries: &Queries,
        block: &Range<usize>,
        dim: usize,
        dk: &mut [f32],
        dv: &mut [f32],
        dq: &mut [f32],
    ) {
        let wide = dim.next_multiple_of(WIDTH);
        let padded = block.len().next_multiple_of(WIDTH);
        let (scores, d_p) = (self.scores.take(STRIP * QUERY_BLOCK), self.d_p.take(STRIP * QUERY_BLOCK));
        let (p, d_s) = (self.p.take(STRIP * QUERY_BLOCK), self.d_s.take(STRIP * QUERY_BLOCK));
        let d_s_rows = self.d_s_rows.take(padded / WIDTH * (KEY_BLOCK / 2));
        for first in (0..block.end).step_by(KEY_BLOCK) {
            let end = block.end.min(first + KEY_BLOCK);
            for key in (first..end).step_by(STRIP) {
                let height = STRIP.min(end - key);
                // queries of the block before `key` see none of these keys
                let unseeing = key.saturating_sub(block.start);
                let first_panel = unseeing / WIDTH;
                for (rows, columns, out) in
                    [(&keys.k, &queries.q_columns, &mut *scores), (&keys.v, &queries.d_o_columns, &mut *d_p)]
                {
                    let rows = PairedRows::new(&rows[key * dim..], dim);
                    let panels = Panels::new(&columns[first_panel * (dim / 2)..], dim / 2);
                    let mut sums = Sums::new(&mut out[first_panel * WIDTH..], QUERY_BLOCK);
                    multiply(height, rows, panels, &mut sums, false);
                }
                for i in (0..height).step_by(2) {
                    let rows = i * QUERY_BLOCK..STRIP.min(i + 2) * QUERY_BLOCK;
                    differentiate(
                        &scores[rows.clone()],
                        &d_p[rows.clone()],
                        &queries.log_sums,
                        &queries.pulls,
                        first_panel,
                        (key + i) as isize - block.start as isize,
                        &mut p[rows.clone()],
                        &mut d_s[rows],
                        &mut d_s_rows[(key + i - first) / 2..],
                    );
                }
                let first_pair = unseeing / 2;
                for (rows, panels, out) in
                    [(&*p, &queries.d_o_rows, &mut *dv), (&*d_s, &queries.q_rows, &mut *dk)]
                {
                    let rows = PairedRows::new(&rows[2 * first_pair..], QUERY_BLOCK);
                    let panels = Panels::new(panels, padded / 2).slice(first_pair..padded / 2);
                    multiply(height, rows, panels, &mut Sums::new(&mut out[key * wide..], wide), true);
                }
            }
            let k_columns = PairedRows::new(&keys.k_columns[first * dim..], KEY_BLOCK);
            for (panel, left) in d_s_rows.chunks_exact(KEY_BLOCK / 2).zip((0..).step_by(WIDTH)) {
                let seen = end.min(block.start + left + WIDTH).saturating_sub(first);
                if seen > 0 {
                    let mut sums = Sums::new(&mut dq[left..], QUERY_BLOCK);
                    let panel = Panels::new(panel, KEY_BLOCK / 2).slice(0..seen.div_ceil(2));
                    multiply(dim, k_columns, panel, &mut sums, first > 0);
                }
            }
        }
    }
}

vectorised! {
    /// P and dS of two keys, from the rows of their scores and dP. The first key is hidden from the first `hidden`
    /// queries, the second from one more; panels before `first_panel` are left out. The pair of rows of dS also
    /// becomes the first of each panel of `KEY_BLOCK / 2` pairs.
    #[allow(clippy::too_many_arguments)]
    fn differentiate(
        scores: &[f32],
        d_p: &[f32],
        log_sums: &[f32],
        pulls: &[f32],
        first_panel: usize,
        hidden: isize,
        p: &mut [bf16],
        d_s: &mut [bf16],
        d_s_rows: &mut [PanelRow],
    ) {
        let log_sums = log_sums.as_chunks::<WIDTH>().0;
        let pulls = pulls.as_chunks::<WIDTH>().0;
        for (panel, (log_sums, pulls)) in log_sums.iter().zip(pulls).enumerate().skip(first_panel) {
            let left = panel * WIDTH;
            let mut both = [[0; WIDTH]; 2];
            for (i, both) in both.iter_mut().enumerate() {
                let chunk = i * QUERY_BLOCK + left..i * QUERY_BLOCK + left + WIDTH;
                let (scores, d_p) = (&scores[chunk.clone()], &d_p[chunk.clone()]);
                let mut p_bits = [0; WIDTH];
                for j in 0..WIDTH {
                    let value = exp2_for_bf16(scores[j] - log_sums[j]);
                    let gradient = value * (d_p[j] - pulls[j]);
                    p_bits[j] = value.to_bits().wrapping_add(ROUND);
                    both[j] = gradient.to_bits().wrapping_add(ROUND);
                }
                let hidden = (hidden + i as isize - left as isize).clamp(0, WIDTH as isize) as u32;
                if hidden > 0 {
                    for j in 0..WIDTH {
                        let seen = if (j as u32) < hidden { 0 } else { u32::MAX };
                        p_bits[j] &= seen;
                        both[j] &= seen;
                    }
                }
                let (p, d_s) = (&mut p[chunk.clone()], &mut d_s[chunk]);
                for j in 0..WIDTH {
                    p[j] = bf16::from_bits((p_bits[j] >> 16) as u16);
                    d_s[j] = bf16::from_bits((both[j] >> 16) as u16);
                }
            }
            let out = &mut d_s_rows[panel * (KEY_BLOCK / 2)].0;
            for j in 0..WIDTH {
                out[j] = both[0][j] >> 16 | both[1][j] & 0xFFFF_0000;
            }
        }
    }
}

/// Half a unit of the last bit of a `bf16`, in the bits of an `f32`: ties are rounded away from zero.
const ROUND: u32 = 0x8000;

/// dQ of a block of queries.
#[derive(Default)]
struct QueryGradients {
    /// `[wide, QUERY_BLOCK]`
    columns: Buffer<f32>,
    /// The same by parts of [`WIDTH`] columns, transposed.
    parts: Buffer<PanelRow>,
    row: Buffer<f32>,
}

impl QueryGradients {
    fn for_each_row(&mut self, count: usize, mut work: impl FnMut(usize, &[f32])) {
        let parts = self.parts.take(self.columns.len() / WIDTH);
        // packing takes 16-bit values in pairs, so it also transposes single values of 32 bits
        pack_as_columns(bytemuck::cast_slice(&self.columns), 2 * QUERY_BLOCK, parts);
        let row = self.row.take(self.columns.len() / QUERY_BLOCK);
        for i in 0..count {
            for (part, row) in parts.chunks_exact(QUERY_BLOCK).zip(row.chunks_exact_mut(WIDTH)) {
                row.copy_from_slice(bytemuck::cast_slice(&part[i].0));
            }
            work(i, row);
        }
    }
}

/// Buffers of a task, kept by the thread for the next one.
#[derive(Default)]
struct Workspace {
    keys: Keys,
    queries: Queries,
    strip: Strip,
    dq: QueryGradients,
}
