//! The kernels of [`crate::linear_cross_entropy`] with `bf16` factors.
//!
//! Logits leave the product in `f32` and are turned at once into `exp(z - m)`, with `m` the maximum of a group of
//! neighbouring ids, of which the maximum and the sum are kept. What is stored in `bf16`, `[chunk, vocab]`, is
//! never a logit, and the gradient needs no second exponential: each group is multiplied by
//! `s · exp(m - log Σ exp z)`.

use std::mem::MaybeUninit;

use half::bf16;
use tune_quant::StoredMatrix;

use super::convert::{round, round_row, transposed, widen};
use super::product::{Factor, Operand, Product, Source, Term, Tile, run};
use super::tile::WIDTH;
use crate::cpu::{Buffer, SharedSlots, Unwritten, ViewMut, add_lanes, as_slots, exp, for_each, vectorised};

/// Ids of a group: the columns of a panel, so that every tile holds whole groups.
const GROUP: usize = WIDTH;

/// Rows of an element-wise loop that are worth a thread's while.
const ROWS_OF_A_TASK: usize = 8;

/// The losses of the rows of x `[tokens, d_model]`, and dx when `scale` is given. Then the gradient of the head is
/// added to `d_head` `[vocab, d_model]`, if there is one.
pub(crate) fn loss_and_gradient(
    x: &[f32],
    head: &StoredMatrix,
    targets: &[u32],
    scale: Option<f32>,
    chunk: usize,
    mut d_head: Option<&mut [f32]>,
) -> (Vec<f32>, Vec<f32>) {
    let (d_model, vocab) = (head.cols(), head.rows());
    let mut losses = vec![0.0; targets.len()];
    let mut dx = Unwritten::<f32>::new(if scale.is_some() { targets.len() * d_model } else { 0 });
    let mut chunks = Chunk::new(chunk.min(targets.len()), vocab, scale.is_some());
    for first in (0..targets.len()).step_by(chunk) {
        let rows = first..targets.len().min(first + chunk);
        let (x, targets) = (&x[rows.start * d_model..rows.end * d_model], &targets[rows.clone()]);
        chunks.observe(x, head, targets);
        for ((loss, log_sum), target) in
            losses[rows.clone()].iter_mut().zip(&chunks.log_sums).zip(&chunks.targets)
        {
            *loss = log_sum - target;
        }
        if let Some(scale) = scale {
            chunks.turn_into_gradient(targets, scale);
            let out = SharedSlots::new(&mut dx.slots()[rows.start * d_model..rows.end * d_model]);
            run(&[Product {
                rows: rows.len(),
                cols: d_model,
                terms: vec![Term {
                    a: Operand::new(&chunks.stored, rows.len(), vocab, chunks.stride),
                    b: Factor::Plain(Source::Stored(head)),
                }],
                finish: Box::new(|tile| {
                    for row in tile.rows.clone() {
                        // SAFETY: tiles cover C once, so no other task has these elements.
                        #[allow(unsafe_code)]
                        let out = unsafe { out.range(row * d_model + tile.cols.start, tile.cols.len()) };
                        out.write_copy_of_slice(tile.row(row));
                    }
                }),
            }]);
            if let Some(d_head) = d_head.as_deref_mut() {
                chunks.add_head_gradient(rows.len(), d_model, d_head);
            }
        }
    }
    // SAFETY: the chunks cover every row.
    #[allow(unsafe_code)]
    let dx = unsafe { dx.written() };
    (losses, dx)
}

/// What is known of the logits of a chunk of rows.
struct Chunk {
    vocab: usize,
    groups: usize,
    /// Values from one row of `stored` to the next: an odd number of groups, or all rows would begin at the same
    /// few places of the caches.
    stride: usize,
    /// `exp(z - m)` of the group's m, `[rows, stride]`; empty when no gradient is wanted.
    stored: Buffer<bf16>,
    /// The rows of x.
    rounded: Vec<bf16>,
    /// Maximum and sum of each group, `[rows, groups]`.
    of_groups: Vec<(f32, f32)>,
    /// The logit of each row's target.
    targets: Vec<f32>,
    /// `log Σ exp z` of each row.
    log_sums: Vec<f32>,
}

impl Chunk {
    fn new(rows: usize, vocab: usize, keeps: bool) -> Self {
        let groups = vocab.div_ceil(GROUP);
        let stride = (groups | 1) * GROUP;
        let mut stored = Buffer::default();
        stored.take(if keeps { rows * stride } else { 0 });
        Self {
            vocab,
            groups,
            stride,
            stored,
            rounded: Vec::new(),
            of_groups: vec![(0.0, 0.0); rows * groups],
            targets: vec![0.0; rows],
            log_sums: vec![0.0; rows],
        }
    }

    fn observe(&mut self, x: &[f32], head: &StoredMatrix, targets: &[u32]) {
        let (rows, d_model) = (targets.len(), head.cols());
        self.rounded.resize(x.len(), bf16::ZERO);
        round_row(x, &mut self.rounded);
        let outputs = Outputs {
            stride: self.stride,
            groups: self.groups,
            stored: (!self.stored.is_empty()).then(|| SharedSlots::new(as_slots(&mut self.stored))),
            of_groups: SharedSlots::new(as_slots(&mut self.of_groups)),
            targets: SharedSlots::new(as_slots(&mut self.targets)),
        };
        run(&[Product {
            rows,
            cols: self.vocab,
            terms: vec![Term {
                a: Operand::new(&self.rounded, rows, d_model, d_model),
                b: Factor::Transposed(Source::Stored(head)),
            }],
            finish: Box::new(|tile| outputs.take(&tile, targets)),
        }]);
        let log_sums = self.log_sums.chunks_mut(ROWS_OF_A_TASK);
        let tasks = self.of_groups.chunks(ROWS_OF_A_TASK * self.groups).zip(log_sums).collect();
        for_each(tasks, |(groups, log_sums): (&[(f32, f32)], &mut [f32])| {
            for (groups, log_sum) in groups.chunks_exact(self.groups).zip(log_sums) {
                let maximum = groups.iter().fold(f32::NEG_INFINITY, |m, (of_group, _)| m.max(*of_group));
                let sum: f32 = groups.iter().map(|(of_group, sum)| sum * exp(of_group - maximum)).sum();
                *log_sum = maximum + sum.ln();
            }
        });
    }

    /// Turns what is stored into `scale · (softmax(z) - onehot(target))`.
    fn turn_into_gradient(&mut self, targets: &[u32], scale: f32) {
        let tasks = self.stored.chunks_mut(ROWS_OF_A_TASK * self.stride).zip((0..).step_by(ROWS_OF_A_TASK));
        for_each(tasks.collect(), |(rows, first): (&mut [bf16], usize)| {
            for (row, (i, target)) in
                rows.chunks_exact_mut(self.stride).zip(targets.iter().enumerate().skip(first))
            {
                let (logit, log_sum) = (self.targets[i], self.log_sums[i]);
                let groups = &self.of_groups[i * self.groups..][..self.groups];
                for (values, (maximum, _)) in row[..self.vocab].chunks_mut(GROUP).zip(groups) {
                    scale_in_place(values, scale * exp(maximum - log_sum));
                }
                row[*target as usize] = round(scale * (exp(logit - log_sum) - 1.0));
            }
        });
    }

    /// Adds dzᵀ x, with the gradients of the logits dz that [`turn_into_gradient`](Self::turn_into_gradient) has left.
    fn add_head_gradient(&self, rows: usize, d_model: usize, d_head: &mut [f32]) {
        let depth = rows.next_multiple_of(2);
        let dz = transposed(&self.stored, rows, self.vocab, self.stride);
        let sums = SharedSlots::new(as_slots(d_head));
        let x = Source::Halves { values: &self.rounded, stride: d_model };
        run(&[Product {
            rows: self.vocab,
            cols: d_model,
            terms: vec![Term { a: Operand::new(&dz, self.vocab, rows, depth), b: Factor::Plain(x) }],
            finish: Box::new(|tile| {
                for row in tile.rows.clone() {
                    // SAFETY: tiles cover the gradient once, so no other task has these elements; they are written.
                    #[allow(unsafe_code)]
                    let mut sums = unsafe {
                        ViewMut::shared(sums, row * d_model + tile.cols.start, 1, tile.cols.len(), d_model)
                    };
                    add_in_place(tile.row(row), sums.row(0));
                }
            }),
        }]);
    }
}

/// Where the tiles of logits go.
struct Outputs<'a> {
    stride: usize,
    groups: usize,
    stored: Option<SharedSlots<'a, bf16>>,
    of_groups: SharedSlots<'a, (f32, f32)>,
    targets: SharedSlots<'a>,
}

impl Outputs<'_> {
    fn take(&self, tile: &Tile, targets: &[u32]) {
        let mut unwanted = [MaybeUninit::new(bf16::ZERO); GROUP];
        for row in tile.rows.clone() {
            let logits = tile.row(row);
            for (i, logits) in logits.chunks(GROUP).enumerate() {
                let first = tile.cols.start + i * GROUP;
                // SAFETY: tiles hold whole groups and cover the logits once, so no other task has this one.
                #[allow(unsafe_code)]
                let (stored, of_group) = unsafe {
                    (
                        self.stored.map(|stored| stored.range(row * self.stride + first, logits.len())),
                        self.of_groups.range(row * self.groups + first / GROUP, 1),
                    )
                };
                of_group[0].write(exponentials(logits, stored.unwrap_or(&mut unwanted[..logits.len()])));
            }
            let target = targets[row] as usize;
            if tile.cols.contains(&target) {
                // SAFETY: only the task with the target's column is here.
                #[allow(unsafe_code)]
                let out = unsafe { self.targets.range(row, 1) };
                out[0].write(logits[target - tile.cols.start]);
            }
        }
    }
}

vectorised! {
    /// Writes `exp(logit - m)` and returns m, the maximum, and the sum of what was written before rounding.
    fn exponentials(logits: &[f32], out: &mut [MaybeUninit<bf16>]) -> (f32, f32) {
        const LANES: usize = 16;
        if let (Some((logits, [])), Some((out, []))) =
            (logits.split_first_chunk::<GROUP>(), out.split_first_chunk_mut::<GROUP>())
        {
            let mut lanes = [0.0_f32; LANES];
            for i in 0..LANES {
                lanes[i] = if logits[i] > logits[LANES + i] { logits[i] } else { logits[LANES + i] };
            }
            let mut width = LANES / 2;
            while width > 0 {
                for i in 0..width {
                    lanes[i] = if lanes[i] > lanes[i + width] { lanes[i] } else { lanes[i + width] };
                }
                width /= 2;
            }
            let maximum = lanes[0];
            let mut values = [0.0_f32; GROUP];
            for i in 0..GROUP {
                values[i] = exp(logits[i] - maximum);
                out[i].write(round(values[i]));
            }
            return (maximum, add_lanes(values));
        }
        let maximum = logits.iter().fold(f32::NEG_INFINITY, |m, logit| m.max(*logit));
        let mut sum = 0.0;
        for (logit, out) in logits.iter().zip(out) {
            let value = exp(*logit - maximum);
            sum += value;
            out.write(round(value));
        }
        (maximum, sum)
    }

    fn add_in_place(values: &[f32], sums: &mut [f32]) {
        for (value, sum) in values.iter().zip(sums) {
            *sum += *value;
        }
    }

    fn scale_in_place(values: &mut [bf16], factor: f32) {
        for value in values {
            *value = round(widen(*value) * factor);
        }
    }
}
