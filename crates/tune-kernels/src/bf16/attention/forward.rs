//! Forward for some queries of the heads that share a key head.

use std::ops::Range;

use half::bf16;

use super::Layout;
use super::operands::{Input, pack_as_columns, pack_as_rows};
use crate::bf16::convert::round_ties_away;
use crate::bf16::tile::{PairedRows, PanelRow, Panels, Sums, WIDTH, multiply};
use crate::cpu::{Buffer, LANES, add_lanes, exp2_for_bf16, vectorised, with_buffers};

/// Queries whose scores are made at once. Documents are divided between queries at multiples of it.
pub(super) const STRIP: usize = 32;

/// Keys that are packed at once: with their values 96 KiB for heads of 64. A multiple of [`WIDTH`] and of
/// [`STRIP`], so that every query of a strip sees some key of every block up to its own.
const KEY_BLOCK: usize = 384;

/// The queries `queries` of a document, numbered from its first, of all heads of `kv_head`. `finish` is called
/// with each query, its head, and its row of o before the division by the sum of exponentials.
pub(super) fn attend(
    input: &Input,
    document: &Range<usize>,
    kv_head: usize,
    queries: &Range<usize>,
    mut finish: impl FnMut(usize, usize, &[f32], State),
) {
    with_buffers(|workspace: &mut Workspace| {
        let Layout { dim, .. } = input.layout;
        let (heads, rows) = (input.layout.heads_of(kv_head), queries.len());
        let wide = dim.next_multiple_of(WIDTH);
        let q = workspace.q.take(heads.len() * rows * dim);
        let sums = workspace.sums.take(heads.len() * rows * wide);
        let states = &mut workspace.states;
        states.clear();
        states.resize(heads.len() * rows, State { maximum: f32::NEG_INFINITY, total: 0.0 });
        let (scores, p) = (workspace.scores.take(STRIP * KEY_BLOCK), workspace.p.take(STRIP * KEY_BLOCK));
        let tokens = document.start + queries.start..document.start + queries.end;
        for (head, q) in heads.clone().zip(q.chunks_exact_mut(rows * dim)) {
            input.rotated(tokens.clone(), input.layout.q_column(head), input.layout.query_scale(), q);
        }

        for first in (0..queries.end).step_by(KEY_BLOCK) {
            let keys = KEY_BLOCK.min(queries.end - first);
            let padded = keys.next_multiple_of(WIDTH);
            let rotated = workspace.rotated.take(padded * dim);
            let k = workspace.k.take(padded / WIDTH * (dim / 2));
            let v = workspace.v.take(wide / WIDTH * (KEY_BLOCK / 2));
            let token = document.start + first;
            input.rotated(token..token + keys, input.layout.k_column(kv_head), 1.0, rotated);
            pack_as_columns(rotated, dim, k);
            let values = input.rows(token, input.layout.v_column(kv_head));
            pack_as_rows(values, keys, input.layout.width(), dim, KEY_BLOCK / 2, v);

            for head in 0..heads.len() {
                for top in (0..rows).step_by(STRIP) {
                    let height = STRIP.min(rows - top);
                    let end = queries.start + top + height;
                    if end <= first {
                        continue;
                    }
                    let visible = keys.min(end - first);
                    let row = head * rows + top;
                    let q = PairedRows::new(&q[row * dim..], dim);
                    let of_visible = Panels::new(&k[..visible.div_ceil(WIDTH) * (dim / 2)], dim / 2);
                    multiply(height, q, of_visible, &mut Sums::new(scores, KEY_BLOCK), false);
                    let sums = &mut sums[row * wide..(row + height) * wide];
                    let states = &mut states[row..row + height];
                    let seen = queries.start + top + 1 - first;
                    soften(scores, p, visible.next_multiple_of(WIDTH), seen, states, sums, first > 0);
                    let p = PairedRows::new(p, KEY_BLOCK);
                    let of_visible = Panels::new(v, KEY_BLOCK / 2).slice(0..visible.div_ceil(2));
                    multiply(height, p, of_visible, &mut Sums::new(sums, wide), first > 0);
                }
            }
        }
        for (row, (sums, state)) in sums.chunks_exact(wide).zip(states).enumerate() {
            finish(queries.start + row % rows, heads.start + row / rows, &sums[..dim], *state);
        }
    });
}

/// The softmax of one query so far.
#[derive(Clone, Copy)]
pub(super) struct State {
    maximum: f32,
    /// Sum of the exponentials over the maximum.
    pub(super) total: f32,
}

impl State {
    /// The logarithm to base 2 of the sum of all exponentials.
    pub(super) fn log_sum(self) -> f32 {
        self.maximum + self.total.log2()
    }
}

vectorised! {
    /// Turns scores into exponentials over the running maximum, of which the first query sees `seen` keys and each
    /// further one more, and brings earlier sums to that maximum. `width`, a multiple of [`LANES`], columns are
    /// written.
    fn soften(
        scores: &mut [f32],
        p: &mut [bf16],
        width: usize,
        seen: usize,
        states: &mut [State],
        sums: &mut [f32],
        continued: bool,
    ) {
        let wide = sums.len() / states.len();
        let rows = scores.chunks_exact_mut(KEY_BLOCK).zip(p.chunks_exact_mut(KEY_BLOCK));
        for (i, ((state, sums), (scores, p))) in
            states.iter_mut().zip(sums.chunks_exact_mut(wide)).zip(rows).enumerate()
        {
            let seen = (seen + i).min(width);
            scores[seen..width].fill(f32::NEG_INFINITY);
            let scores = scores[..width].as_chunks::<LANES>().0;
            let mut lanes = [f32::NEG_INFINITY; LANES];
            for chunk in scores {
                for i in 0..LANES {
                    lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
                }
            }
            let maximum = max_lanes(lanes, state.maximum);
            let mut lanes = [0.0; LANES];
            for (chunk, p) in scores.iter().zip(p[..width].as_chunks_mut::<LANES>().0) {
                for i in 0..LANES {
                    let exponential = exp2_for_bf16(chunk[i] - maximum);
                    lanes[i] += exponential;
                    p[i] = round_ties_away(exponential);
                }
            }
            p[seen..width].fill(bf16::ZERO);
            let total = add_lanes(lanes);
            if continued && maximum > state.maximum {
                let shrink = exp2_for_bf16(state.maximum - maximum);
                for sum in sums {
                    *sum *= shrink;
                }
                *state = State { maximum, total: state.total * shrink + total };
            } else {
                *state = State { maximum, total: state.total + total };
            }
        }
    }
}

#[inline(always)]
#[allow(clippy::inline_always, reason = "to be compiled for the registers of the loop around it")]
fn max_lanes(mut lanes: [f32; LANES], at_least: f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = if lanes[i + width] > lanes[i] { lanes[i + width] } else { lanes[i] };
        }
        width /= 2;
    }
    if lanes[0] > at_least { lanes[0] } else { at_least }
}

/// Buffers of a task, kept by the thread for the next one.
#[derive(Default)]
struct Workspace {
    /// Rotated queries `[heads, queries, dim]`.
    q: Buffer<bf16>,
    /// Sums of o, `[heads, queries, wide]`.
    sums: Buffer<f32>,
    states: Vec<State>,
    /// Rotated keys of a block `[keys, dim]`.
    rotated: Buffer<bf16>,
    /// The same, packed.
    k: Buffer<PanelRow>,
    /// Values of a block, packed.
    v: Buffer<PanelRow>,
    /// `[STRIP, KEY_BLOCK]`.
    scores: Buffer<f32>,
    p: Buffer<bf16>,
}
