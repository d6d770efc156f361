//! Self-attention on the CPU: tasks for ranges of queries of the heads that share a key head.
//!
//! A task packs the keys that it needs itself, which costs little beside its products, so tasks share nothing.
//! Only backward of a long document has several parts of dk and dv, which are added up in the order of its
//! queries. How a document is divided there depends on its length alone.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::Flex;
use burn_flex::FlexTensor;

use super::backward::{Source, pull_back};
use super::forward::{self, attend};
use super::operands::{Input, rotate_back, scale_row};
use super::{Layout, Saved, SelfAttention, SelfAttentionKernels};
use crate::attention::clear_uncovered;
use crate::bf16::tile::WIDTH;
use crate::cpu::{self, SharedSlots, Unwritten, map, vectorised, with_scratch};
use crate::{AttentionSpan, RotaryTable};

/// Queries of a task, all heads of a group taken together: enough that packing the keys is a small part of it, and
/// few enough that they stay in the second-level cache. Forward takes fewer where threads would have nothing to do.
const TASK_QUERIES: usize = 768;
const FEWEST_TASK_QUERIES: usize = 192;

/// Most parts into which backward divides a document: each has its own dk and dv.
const MOST_PARTS: usize = 8;

impl SelfAttention for Flex {
    fn self_attention(
        qkv: FlexTensor,
        rotary: RotaryTable,
        spans: Arc<[AttentionSpan]>,
        layout: Layout,
    ) -> FlexTensor {
        Self::forward(qkv, &rotary, &spans, layout).0
    }
}

impl SelfAttentionKernels for Flex {
    fn forward(
        qkv: FlexTensor,
        rotary: &RotaryTable,
        spans: &[AttentionSpan],
        layout: Layout,
    ) -> (FlexTensor, FlexTensor) {
        let qkv = cpu::contiguous(qkv);
        let input = Input { qkv: cpu::values(&qkv), rotary, layout };
        let Layout { heads, dim, .. } = layout;
        let tokens = rotary.tokens();
        let (mut o, mut log_sums) = (Unwritten::new(tokens * heads * dim), Unwritten::new(tokens * heads));
        clear_uncovered(spans, heads * dim, o.slots());
        clear_uncovered(spans, heads, log_sums.slots());
        let (o_slots, log_sum_slots) = (SharedSlots::new(o.slots()), SharedSlots::new(log_sums.slots()));
        let wanted = 4 * rayon::current_num_threads();
        let rows = (tokens * heads / wanted).clamp(FEWEST_TASK_QUERIES, TASK_QUERIES) / layout.group();
        let rows = rows.max(1).next_multiple_of(forward::STRIP);
        let parts = |document: &Range<usize>| {
            let len = document.len();
            (0..len).step_by(rows).map(move |start| start..len.min(start + rows)).rev()
        };
        for_each(tasks(spans, layout, parts), |Task { document, kv_head, queries }| {
            attend(&input, document, *kv_head, queries, |query, head, sums, state| {
                let token = document.start + query;
                // SAFETY: spans do not overlap, so no other task has this token of this head.
                #[allow(unsafe_code)]
                let (o, log_sum) = unsafe {
                    let row = token * heads + head;
                    (o_slots.range(row * dim, dim), log_sum_slots.range(row, 1))
                };
                scale_row(sums, 1.0 / state.total, o);
                log_sum[0].write(state.log_sum());
            });
        });
        // SAFETY: the tasks have written the rows of every span, `clear_uncovered` all others.
        #[allow(unsafe_code)]
        let (o, log_sums) = unsafe { (o.written(), log_sums.written()) };
        (cpu::from_values(o, [tokens, heads * dim]), cpu::from_values(log_sums, [tokens, heads]))
    }

    fn backward(saved: Saved<Self>, d_o: FlexTensor) -> FlexTensor {
        let Saved { qkv, o, log_sums, rotary, spans, layout } = saved;
        let [qkv, o, d_o] = [qkv, o, d_o].map(cpu::contiguous);
        let source = Source {
            input: Input { qkv: cpu::values(&qkv), rotary: &rotary, layout },
            o: cpu::values(&o),
            d_o: cpu::values(&d_o),
            log_sums: cpu::values(&log_sums),
        };
        let (tokens, dim, wide) = (rotary.tokens(), layout.dim, layout.dim.next_multiple_of(WIDTH));
        let width = layout.width();
        let mut gradient = Unwritten::new(tokens * width);
        clear_uncovered(&spans, width, gradient.slots());
        let slots = SharedSlots::new(gradient.slots());
        let finish = |token: usize, kv_head: usize, dk: &[f32], dv: &[f32]| {
            let (cos, sin) = rotary.angles(token..token + 1);
            // SAFETY: spans do not overlap, and each token of each key head is finished once.
            #[allow(unsafe_code)]
            let [k, v] = [layout.k_column(kv_head), layout.v_column(kv_head)]
                .map(|column| unsafe { slots.range(token * width + column, dim) });
            // the queries that dK was made with had been multiplied by log2 e
            rotate_back(dk, cos, sin, std::f32::consts::LN_2, k);
            scale_row(&dv[..dim], 1.0, v);
        };
        let parts = for_each(tasks(&spans, layout, |document| parts(document.len(), layout)), |task| {
            let Task { document, kv_head, queries } = task;
            let pull_back = |sums: &mut [f32]| {
                let (dk, dv) = sums.split_at_mut(queries.end * wide);
                pull_back(&source, document, *kv_head, queries, dk, dv, |query, head, dq| {
                    let token = document.start + query;
                    let (cos, sin) = rotary.angles(token..token + 1);
                    // SAFETY: spans do not overlap, so no other task has this token of this head.
                    #[allow(unsafe_code)]
                    let out = unsafe { slots.range(token * width + layout.q_column(head), dim) };
                    rotate_back(dq, cos, sin, layout.score_scale(), out);
                });
            };
            let len = 2 * queries.end * wide;
            if queries.len() < document.len() {
                let mut sums = vec![0.0; len];
                pull_back(&mut sums);
                return sums;
            }
            with_scratch(len, |sums| {
                sums.fill(0.0);
                pull_back(sums);
                let (dk, dv) = sums.split_at(queries.end * wide);
                for (token, (dk, dv)) in
                    document.clone().zip(dk.chunks_exact(wide).zip(dv.chunks_exact(wide)))
                {
                    finish(token, *kv_head, dk, dv);
                }
            });
            Vec::new()
        });
        add_parts(&parts, wide, finish);
        // SAFETY: tasks have written the queries of every span, tasks or `add_parts` the keys and values, and
        // `clear_uncovered` all others.
        #[allow(unsafe_code)]
        let gradient = unsafe { gradient.written() };
        cpu::from_values(gradient, [tokens, width])
    }
}

/// Some queries of a document, numbered from its first, of the heads that share a key head.
struct Task {
    document: Range<usize>,
    kv_head: usize,
    queries: Range<usize>,
}

/// The tasks of all documents; those of a document and key head follow each other.
fn tasks<I: IntoIterator<Item = Range<usize>>>(
    spans: &[AttentionSpan],
    layout: Layout,
    parts: impl Fn(&Range<usize>) -> I,
) -> Vec<Task> {
    let mut tasks = Vec::new();
    for document in spans.iter().map(|span| &span.q).filter(|document| !document.is_empty()) {
        for kv_head in 0..layout.kv_heads {
            let of_part = |queries| Task { document: document.clone(), kv_head, queries };
            tasks.extend(parts(document).into_iter().map(of_part));
        }
    }
    tasks
}

/// The results of `work`, in the order of `tasks`.
fn for_each<R: Send>(tasks: Vec<Task>, work: impl Fn(&Task) -> R + Sync) -> Vec<(Task, R)> {
    map(tasks, |task| {
        let result = work(&task);
        (task, result)
    })
}

/// Divides the queries of a document into parts that take about the same time: a query meets all keys before it.
fn parts(len: usize, layout: Layout) -> Vec<Range<usize>> {
    let count = (len * layout.group()).div_ceil(TASK_QUERIES).clamp(1, MOST_PARTS);
    let bound = |part: usize| {
        let share = part as f64 / count as f64;
        len.min((len as f64 * share.sqrt()) as usize / WIDTH * WIDTH)
    };
    let mut bounds: Vec<usize> = (0..count).map(bound).chain([len]).collect();
    bounds.dedup();
    bounds.windows(2).map(|pair| pair[0]..pair[1]).collect()
}

/// Adds up the dk and dv of the parts of each document, and hands each row to `finish`.
fn add_parts(parts: &[(Task, Vec<f32>)], wide: usize, finish: impl Fn(usize, usize, &[f32], &[f32]) + Sync) {
    const ROWS: usize = 64;
    let one_head = |a: &(Task, Vec<f32>), b: &(Task, Vec<f32>)| {
        (a.0.document.start, a.0.kv_head) == (b.0.document.start, b.0.kv_head)
    };
    let blocks: Vec<_> = parts
        .chunk_by(one_head)
        .filter(|parts| parts.len() > 1)
        .flat_map(|parts| (0..parts[0].0.document.len()).step_by(ROWS).map(move |first| (parts, first)))
        .collect();
    cpu::for_each(blocks, |(parts, first): (&[(Task, Vec<f32>)], usize)| {
        let Task { document, kv_head, .. } = &parts[0].0;
        with_scratch(2 * wide, |sum| {
            for key in first..document.len().min(first + ROWS) {
                sum.fill(0.0);
                for (Task { queries, .. }, sums) in parts.iter().filter(|part| part.0.queries.end > key) {
                    let (dk, dv) = sums.split_at(queries.end * wide);
                    for (sum, part) in sum.chunks_exact_mut(wide).zip([dk, dv]) {
                        add(sum, &part[key * wide..(key + 1) * wide]);
                    }
                }
                let (dk, dv) = sum.split_at(wide);
                finish(document.start + key, *kv_head, dk, dv);
            }
        });
    });
}

vectorised! {
    fn add(sum: &mut [f32], values: &[f32]) {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum += value;
        }
    }
}
