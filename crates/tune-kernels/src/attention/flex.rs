//! Attention on the CPU: one task for each block of queries of a head forward, for each head backward.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;

use super::{AttentionSpan, CausalAttention, CausalAttentionKernels, Heads, Saved};
use crate::cpu::{
    self, SharedSlots, Target, Threads, Unwritten, Value, View, ViewMut, as_slots, dot, exp, exp_sum,
    for_each, max, multiply, multiply_add, scale_in_place, vectorised, with_scratch,
};

/// Queries and keys of a tile of scores: 64 KiB, so that two of them and their inputs stay in the second-level
/// cache.
const QUERY_BLOCK: usize = 64;
const KEY_BLOCK: usize = 256;

impl CausalAttention for Flex {
    fn causal_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        spans: Arc<[AttentionSpan]>,
        heads: Heads,
    ) -> FlexTensor {
        Self::forward(q, k, v, &spans, heads).0
    }
}

impl CausalAttentionKernels for Flex {
    fn forward(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        spans: &[AttentionSpan],
        heads: Heads,
    ) -> (FlexTensor, FlexTensor) {
        let [q, k, v] = [q, k, v].map(cpu::contiguous);
        let [tokens, features] = q.shape().dims();
        let inputs = Inputs { q: cpu::values(&q), k: cpu::values(&k), v: cpu::values(&v), heads };
        let (mut o, mut log_sums) = (Unwritten::new(tokens * features), Unwritten::new(tokens * heads.q));
        clear_uncovered(spans, features, o.slots());
        clear_uncovered(spans, heads.q, log_sums.slots());
        let (o_slots, log_sum_slots) = (SharedSlots::new(o.slots()), SharedSlots::new(log_sums.slots()));
        let tasks: Vec<_> = spans
            .iter()
            .flat_map(|span| (0..heads.q).map(move |head| (span, head)))
            .flat_map(|(span, head)| query_blocks(span).map(move |queries| (span, head, queries)))
            .collect();
        for_each(tasks, |(span, head, queries)| {
            let (first, rows) = (span.q.start + queries.start, queries.len());
            // SAFETY: spans do not overlap, so no other task has these rows of this head.
            #[allow(unsafe_code)]
            let (o, log_sums) = unsafe {
                (
                    Target::shared(o_slots, first * features + head * heads.dim, rows, heads.dim, features),
                    Target::shared(log_sum_slots, first * heads.q + head, rows, 1, heads.q),
                )
            };
            forward_block(&inputs, span, head, queries, o, log_sums);
        });
        // SAFETY: the tasks have written the rows of every span, `clear_uncovered` all others.
        #[allow(unsafe_code)]
        let (o, log_sums) = unsafe { (o.written(), log_sums.written()) };
        (cpu::from_values(o, [tokens, features]), cpu::from_values(log_sums, [tokens, heads.q]))
    }

    fn backward(saved: Saved<Self>, d_o: FlexTensor) -> [FlexTensor; 3] {
        let Saved { q, k, v, o, log_sums, spans, heads } = saved;
        let [q, k, v, o, d_o] = [q, k, v, o, d_o].map(cpu::contiguous);
        let [tokens, features] = q.shape().dims();
        let [key_tokens, kv_features] = k.shape().dims();
        let inputs = Inputs { q: cpu::values(&q), k: cpu::values(&k), v: cpu::values(&v), heads };
        let output = Output { o: cpu::values(&o), d_o: cpu::values(&d_o), log_sums: cpu::values(&log_sums) };

        let mut dq = Unwritten::new(tokens * features);
        clear_uncovered(&spans, features, dq.slots());
        // Each query head has its own part of dk and dv, so that heads of one group need not wait for each other.
        let mut dk = vec![0.0; key_tokens * features];
        let mut dv = vec![0.0; key_tokens * features];
        let dq_slots = SharedSlots::new(dq.slots());
        let (dk_slots, dv_slots) = (SharedSlots::new(as_slots(&mut dk)), SharedSlots::new(as_slots(&mut dv)));
        let tasks: Vec<_> =
            spans.iter().flat_map(|span| (0..heads.q).map(move |head| (span, head))).collect();
        for_each(tasks, |(span, head)| {
            let column = head * heads.dim;
            let keys = span.k.start * features + column;
            // SAFETY: spans do not overlap, so no other task has these rows of this head; dk and dv are written.
            #[allow(unsafe_code)]
            let (mut dk, mut dv) = unsafe {
                (
                    ViewMut::shared(dk_slots, keys, span.k.len(), heads.dim, features),
                    ViewMut::shared(dv_slots, keys, span.k.len(), heads.dim, features),
                )
            };
            for queries in query_blocks(span) {
                let first = (span.q.start + queries.start) * features + column;
                // SAFETY: as above.
                #[allow(unsafe_code)]
                let dq = unsafe { Target::shared(dq_slots, first, queries.len(), heads.dim, features) };
                backward_block(&inputs, &output, span, head, queries, dq, &mut dk, &mut dv);
            }
        });
        // SAFETY: the tasks have written the rows of every span, `clear_uncovered` all others.
        #[allow(unsafe_code)]
        let dq = unsafe { dq.written() };
        [
            cpu::from_values(dq, [tokens, features]),
            cpu::from_values(sum_groups(dk, heads), [key_tokens, kv_features]),
            cpu::from_values(sum_groups(dv, heads), [key_tokens, kv_features]),
        ]
    }
}

struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    heads: Heads,
}

impl<'a> Inputs<'a> {
    /// The queries `[rows, head_dim]` of one head.
    fn queries(&self, rows: Range<usize>, head: usize) -> View<'a> {
        columns(self.q, rows, head, self.heads.q, self.heads.dim)
    }

    /// The keys `[rows, head_dim]` that query head `head` reads.
    fn keys(&self, rows: Range<usize>, head: usize) -> View<'a> {
        columns(self.k, rows, self.heads.kv_of(head), self.heads.kv, self.heads.dim)
    }

    /// The values `[rows, head_dim]` that query head `head` reads.
    fn values(&self, rows: Range<usize>, head: usize) -> View<'a> {
        columns(self.v, rows, self.heads.kv_of(head), self.heads.kv, self.heads.dim)
    }
}

struct Output<'a> {
    o: &'a [f32],
    d_o: &'a [f32],
    log_sums: &'a [f32],
}

/// Rows of one head of a matrix `[_, heads · dim]`.
fn columns(values: &[f32], rows: Range<usize>, head: usize, heads: usize, dim: usize) -> View<'_> {
    View::strided(&values[rows.start * heads * dim + head * dim..], rows.len(), dim, heads * dim)
}

/// The blocks of queries of a span, numbered from its first.
fn query_blocks(span: &AttentionSpan) -> impl Iterator<Item = Range<usize>> + use<> {
    let queries = span.q.len();
    (0..queries).step_by(QUERY_BLOCK).map(move |start| start..queries.min(start + QUERY_BLOCK))
}

/// The blocks of keys, numbered from the first of the span, that some of `queries` see.
fn key_blocks(span: &AttentionSpan, queries: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let visible = visible_keys(span, queries.end - 1);
    (0..visible).step_by(KEY_BLOCK).map(move |start| start..visible.min(start + KEY_BLOCK))
}

/// How many keys query `query` of a span sees.
fn visible_keys(span: &AttentionSpan, query: usize) -> usize {
    span.k.len() - span.q.len() + query + 1
}

/// o and the log-sums of one block of queries of one head.
fn forward_block(
    inputs: &Inputs,
    span: &AttentionSpan,
    head: usize,
    queries: Range<usize>,
    o: Target,
    log_sums: Target,
) {
    let rows = queries.len();
    let q = inputs.queries(span.q.start + queries.start..span.q.start + queries.end, head);
    let mut o = o.fill_with(|_, _| 0.0);
    with_scratch(rows * (KEY_BLOCK + 2), |scratch| {
        let (running, tile) = scratch.split_at_mut(2 * rows);
        let (maxima, sums) = running.split_at_mut(rows);
        maxima.fill(f32::NEG_INFINITY);
        sums.fill(0.0);
        for keys in key_blocks(span, &queries) {
            let of_span = span.k.start + keys.start..span.k.start + keys.end;
            let width = keys.len();
            let tile = &mut tile[..rows * width];
            let (k, scale) = (inputs.keys(of_span.clone(), head), inputs.heads.score_scale());
            multiply(Target::new(as_slots(tile), rows, width), scale, q, k.t(), Threads::One);
            for (i, scores) in tile.chunks_exact_mut(width).enumerate() {
                let visible = visible_keys(span, queries.start + i).saturating_sub(keys.start).min(width);
                let (seen, hidden) = scores.split_at_mut(visible);
                let maximum = maxima[i].max(max(seen));
                let shrink = exp(maxima[i] - maximum);
                sums[i] = sums[i] * shrink + exp_sum(seen, maximum);
                maxima[i] = maximum;
                hidden.fill(0.0);
                scale_in_place(o.row(i), shrink);
            }
            let tile = View::new(tile, rows, width);
            multiply_add(&mut o, 1.0, tile, inputs.values(of_span, head), Threads::One);
        }
        for (i, sum) in sums.iter().enumerate() {
            scale_in_place(o.row(i), 1.0 / sum);
        }
        log_sums.fill_with(|i, _| maxima[i] + sums[i].ln());
    });
}

/// dq of one block of queries of one head, and what it adds to the dk and dv of the span's keys.
#[allow(clippy::too_many_arguments)]
fn backward_block(
    inputs: &Inputs,
    output: &Output,
    span: &AttentionSpan,
    head: usize,
    queries: Range<usize>,
    dq: Target,
    dk: &mut ViewMut,
    dv: &mut ViewMut,
) {
    let (heads, rows) = (inputs.heads, queries.len());
    let scale = heads.score_scale();
    let of_span = span.q.start + queries.start..span.q.start + queries.end;
    let q = inputs.queries(of_span.clone(), head);
    let o = columns(output.o, of_span.clone(), head, heads.q, heads.dim);
    let d_o = columns(output.d_o, of_span.clone(), head, heads.q, heads.dim);
    let mut dq = dq.fill_with(|_, _| 0.0);
    with_scratch(rows * (2 * KEY_BLOCK + 1), |scratch| {
        let (pulls, tiles) = scratch.split_at_mut(rows);
        let (p, dp) = tiles.split_at_mut(rows * KEY_BLOCK);
        for (i, pull) in pulls.iter_mut().enumerate() {
            *pull = dot(d_o.row(i), o.row(i));
        }
        for keys in key_blocks(span, &queries) {
            let width = keys.len();
            let of_keys = span.k.start + keys.start..span.k.start + keys.end;
            let (k, v) = (inputs.keys(of_keys.clone(), head), inputs.values(of_keys, head));
            let (p, dp) = (&mut p[..rows * width], &mut dp[..rows * width]);
            multiply(Target::new(as_slots(p), rows, width), scale, q, k.t(), Threads::One);
            multiply(Target::new(as_slots(dp), rows, width), 1.0, d_o, v.t(), Threads::One);
            for (i, (p, dp)) in p.chunks_exact_mut(width).zip(dp.chunks_exact_mut(width)).enumerate() {
                let visible = visible_keys(span, queries.start + i).saturating_sub(keys.start).min(width);
                let log_sum = output.log_sums[(of_span.start + i) * heads.q + head];
                let ((p_seen, p_hidden), (dp_seen, dp_hidden)) =
                    (p.split_at_mut(visible), dp.split_at_mut(visible));
                score_gradients(p_seen, dp_seen, log_sum, pulls[i]);
                p_hidden.fill(0.0);
                dp_hidden.fill(0.0);
            }
            let (p, ds) = (View::new(p, rows, width), View::new(dp, rows, width));
            multiply_add(&mut dv.slice_rows(keys.clone()), 1.0, p.t(), d_o, Threads::One);
            multiply_add(&mut dk.slice_rows(keys), scale, ds.t(), q, Threads::One);
            multiply_add(&mut dq, scale, ds, k, Threads::One);
        }
    });
}

vectorised! {
    /// Turns a row of scores into probabilities, and the row of their gradients into that of the scores.
    fn score_gradients(p: &mut [f32], dp: &mut [f32], log_sum: f32, pull: f32) {
        for (p, dp) in p.iter_mut().zip(dp) {
            *p = exp(*p - log_sum);
            *dp = *p * (*dp - pull);
        }
    }
}

/// Rows whose heads are worth a thread's while to add up.
const SUMMED_ROWS: usize = 256;

/// `[rows, heads · dim]` with the heads of each group added up: `[rows, kv_heads · dim]`.
fn sum_groups(values: Vec<f32>, heads: Heads) -> Vec<f32> {
    if heads.q == heads.kv {
        return values;
    }
    let group = heads.q / heads.kv * heads.dim;
    let mut sums = vec![0.0; values.len() / group * heads.dim];
    let tasks = values.chunks(SUMMED_ROWS * group).zip(sums.chunks_mut(SUMMED_ROWS * heads.dim)).collect();
    for_each(tasks, |(values, sums): (&[f32], &mut [f32])| {
        for (group, sum) in values.chunks_exact(group).zip(sums.chunks_exact_mut(heads.dim)) {
            for head in group.chunks_exact(heads.dim) {
                for (sum, value) in sum.iter_mut().zip(head) {
                    *sum += value;
                }
            }
        }
    });
    sums
}

/// Writes zeros to the rows of width `width` that are in no span.
pub(crate) fn clear_uncovered<T: Value>(spans: &[AttentionSpan], width: usize, slots: &mut [MaybeUninit<T>]) {
    let mut covered = 0;
    for span in spans {
        slots[covered * width..span.q.start * width].fill(MaybeUninit::zeroed());
        covered = span.q.end;
    }
    slots[covered * width..].fill(MaybeUninit::zeroed());
}
