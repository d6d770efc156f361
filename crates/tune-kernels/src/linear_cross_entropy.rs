//! Linear head and cross-entropy as one operation, without the logits of all tokens and without a decoded head.
//!
//! ```text
//! z = x Wᵀ        loss = s Σₜ (log Σⱼ exp z[t, j] - z[t, target(t)])
//! dx = s (softmax(z) - onehot(target)) W        dW = s (softmax(z) - onehot(target))ᵀ x
//! ```
//!
//! x `[tokens, d_model]`; W `[vocab, d_model]`, frozen or trained; loss `[1]`. Forward already forms dx and dW, because then
//! the logits of a chunk of tokens are needed only once: a chunk's logits `[chunk, vocab]` are filled panel by panel
//! of W while the maximum and the sum of each row run along, then each panel becomes its gradient and is
//! multiplied by the same panel of W again. Without a graph there is no second pass, and no more than one panel
//! of logits. Saved: dx and dW.

use std::ops::Range;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Int, Tensor, TensorData, activation};
use burn_flex::FlexTensor;

use crate::cpu::{
    self, SharedSlots, Target, Threads, Unwritten, View, ViewMut, as_slots, exp, for_each, for_each_panel,
    max, multiply, multiply_add, panel_rows, sum_of_exp, vectorised, with_scratch,
};
use crate::{Arithmetic, FrozenWeight, Weight, bf16};

/// `scale · Σ -log softmax(x Wᵀ)[target]` over all rows of `x`.
///
/// `chunk` rows of `x` are done at a time. With a graph, a buffer of `chunk · vocab` values (`f32` or `bf16`) is
/// needed, and the head is decoded twice for each chunk: fewer rows take less memory and more time.
///
/// # Shapes
/// `x` `[tokens, d_model]`, `head` `[vocab, d_model]`, `targets` `[tokens]` -> `[1]`
///
/// # Panics
/// When the shapes do not agree, a target is not below `vocab`, or `chunk` is 0.
pub fn linear_cross_entropy(
    x: Tensor<2>,
    head: &Weight,
    targets: Arc<[u32]>,
    scale: f32,
    chunk: usize,
    arithmetic: Arithmetic,
) -> Tensor<1> {
    let stored = head.stored();
    assert_inputs("linear_cross_entropy", x.dims(), &stored, &targets);
    assert!(chunk > 0, "linear_cross_entropy: chunks of 0 tokens");
    let trained = head.trained().cloned().unwrap_or_else(|| Tensor::empty([0, 0], &x.device().inner()));
    // What is not in the graph is a constant of it.
    let tracked = x.is_autodiff() || trained.is_autodiff();
    let [x, trained] = [x, trained].map(|t| if tracked { t.autodiff() } else { t }.into_dispatch());
    Tensor::from_dispatch(<Dispatch as LinearCrossEntropy>::linear_cross_entropy(
        x, trained, stored, targets, scale, chunk, arithmetic,
    ))
}

/// `-log softmax(x Wᵀ)[target]` of each row of `x`, without a graph and without a buffer of `vocab` floats a row.
///
/// # Shapes
/// `x` `[tokens, d_model]`, `head` `[vocab, d_model]`, `targets` `[tokens]` -> `tokens` values
///
/// # Panics
/// When the shapes do not agree, or a target is not below `vocab`.
pub fn token_losses(x: Tensor<2>, head: &FrozenWeight, targets: &[u32], arithmetic: Arithmetic) -> Vec<f32> {
    assert_inputs("token_losses", x.dims(), head, targets);
    let x = x.inner().into_dispatch();
    let losses = <Dispatch as LinearCrossEntropy>::token_losses(x, head.clone(), targets.into(), arithmetic);
    Tensor::<1>::from_dispatch(losses).into_data().iter::<f32>().collect()
}

fn assert_inputs(operation: &str, [tokens, d_model]: [usize; 2], head: &FrozenWeight, targets: &[u32]) {
    assert_eq!(head.cols(), d_model, "{operation}: d_model of {head:?} for x [{tokens}, {d_model}]");
    assert_eq!(targets.len(), tokens, "{operation}: targets for x [{tokens}, {d_model}]");
    for target in targets {
        assert!(
            (*target as usize) < head.rows(),
            "{operation}: target {target} in a vocabulary of {}",
            head.rows()
        );
    }
}

/// `-log softmax(x Wᵀ)[target]` of each row in plain tensor operations, `[tokens]`, with all logits at once.
pub fn reference(x: Tensor<2>, head: &FrozenWeight, targets: &[u32]) -> Tensor<1> {
    of_logits(crate::frozen_linear::reference(x, head), targets)
}

fn of_logits(logits: Tensor<2>, targets: &[u32]) -> Tensor<1> {
    let device = logits.device();
    let tokens = targets.len();
    let log_probabilities = activation::log_softmax(logits, 1);
    let ids: Vec<i32> = targets.iter().map(|id| *id as i32).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [tokens, 1]), &device);
    log_probabilities.gather(1, ids).neg().reshape([tokens])
}

/// The differentiable operation, and the losses without a graph.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait LinearCrossEntropy: Backend {
    /// `trained` is the head if it is a trained tensor, else empty.
    fn linear_cross_entropy(
        x: FloatTensor<Self>,
        trained: FloatTensor<Self>,
        head: FrozenWeight,
        targets: Arc<[u32]>,
        scale: f32,
        chunk: usize,
        arithmetic: Arithmetic,
    ) -> FloatTensor<Self>;
    fn token_losses(
        x: FloatTensor<Self>,
        head: FrozenWeight,
        targets: Arc<[u32]>,
        arithmetic: Arithmetic,
    ) -> FloatTensor<Self>;
}

/// The kernels of one backend.
pub(crate) trait LinearCrossEntropyKernels: LinearCrossEntropy {
    /// The loss `[1]`, dx, and dW if it is wanted.
    fn loss_and_gradients(
        x: FloatTensor<Self>,
        head: &FrozenWeight,
        targets: &[u32],
        scale: f32,
        chunk: usize,
        arithmetic: Arithmetic,
        wants_head: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, Option<FloatTensor<Self>>);
    /// `gradient · by`, with a scalar `by`; in place, for the gradient of a head is large.
    fn scaled(gradient: FloatTensor<Self>, by: &FloatTensor<Self>) -> FloatTensor<Self>;
}

/// Rows that [`LinearCrossEntropy::token_losses`] does at a time: the head is decoded once for them.
const ROWS_WITHOUT_GRAPH: usize = 1024;

impl LinearCrossEntropy for Flex {
    fn linear_cross_entropy(
        x: FlexTensor,
        _: FlexTensor,
        head: FrozenWeight,
        targets: Arc<[u32]>,
        scale: f32,
        _: usize,
        arithmetic: Arithmetic,
    ) -> FlexTensor {
        let losses = Self::token_losses(x, head, targets, arithmetic);
        cpu::from_values(vec![scaled_sum(cpu::values(&losses), scale)], [1])
    }

    fn token_losses(
        x: FlexTensor,
        head: FrozenWeight,
        targets: Arc<[u32]>,
        arithmetic: Arithmetic,
    ) -> FlexTensor {
        let x = cpu::contiguous(x);
        let [tokens, d_model] = x.shape().dims();
        if arithmetic == Arithmetic::Bf16 {
            let x = cpu::values(&x);
            let (losses, _) = bf16::cross_entropy::loss_and_gradient(
                x,
                head.matrix(),
                &targets,
                None,
                ROWS_WITHOUT_GRAPH,
                None,
            );
            return cpu::from_values(losses, [tokens]);
        }
        let mut losses = vec![0.0; tokens];
        let chunks = cpu::values(&x)
            .chunks(ROWS_WITHOUT_GRAPH * d_model)
            .zip(targets.chunks(ROWS_WITHOUT_GRAPH))
            .zip(losses.chunks_mut(ROWS_WITHOUT_GRAPH));
        for ((x, targets), losses) in chunks {
            let x = View::new(x, targets.len(), d_model);
            with_scratch(targets.len() * panel_rows(d_model), |logits| {
                let mut rows = vec![Row::default(); targets.len()];
                for_each_panel(head.matrix(), |ids, panel| {
                    let logits = &mut logits[..targets.len() * ids.len()];
                    let out = Target::new(as_slots(logits), targets.len(), ids.len());
                    multiply(out, 1.0, x, panel.t(), Threads::All);
                    observe(&mut rows, targets, &ids, logits, ids.len());
                });
                for (loss, row) in losses.iter_mut().zip(&rows) {
                    *loss = row.loss();
                }
            });
        }
        cpu::from_values(losses, [tokens])
    }
}

impl LinearCrossEntropyKernels for Flex {
    fn loss_and_gradients(
        x: FlexTensor,
        head: &FrozenWeight,
        targets: &[u32],
        scale: f32,
        chunk: usize,
        arithmetic: Arithmetic,
        wants_head: bool,
    ) -> (FlexTensor, FlexTensor, Option<FlexTensor>) {
        let x = cpu::contiguous(x);
        let ([tokens, d_model], vocab) = (x.shape().dims(), head.rows());
        let mut d_head = wants_head.then(|| vec![0.0; vocab * d_model]);
        let to_tensor = |values: Vec<f32>| cpu::from_values(values, [vocab, d_model]);
        if arithmetic == Arithmetic::Bf16 {
            let x = cpu::values(&x);
            let (losses, dx) = bf16::cross_entropy::loss_and_gradient(
                x,
                head.matrix(),
                targets,
                Some(scale),
                chunk,
                d_head.as_deref_mut(),
            );
            let loss = cpu::from_values(vec![scaled_sum(&losses, scale)], [1]);
            return (loss, cpu::from_values(dx, [tokens, d_model]), d_head.map(to_tensor));
        }
        let mut losses = vec![0.0; tokens];
        let mut dx = Unwritten::new(tokens * d_model);
        let mut logits = vec![0.0; chunk.min(tokens) * vocab];
        let chunks = cpu::values(&x)
            .chunks(chunk * d_model)
            .zip(targets.chunks(chunk))
            .zip(losses.chunks_mut(chunk))
            .zip(dx.slots().chunks_mut(chunk * d_model));
        for (((x, targets), losses), dx) in chunks {
            let x = View::new(x, targets.len(), d_model);
            let mut rows = vec![Row::default(); targets.len()];
            for_each_panel(head.matrix(), |ids, panel| {
                let columns = &mut logits[ids.start..];
                let out = Target::strided(as_slots(columns), targets.len(), ids.len(), vocab);
                multiply(out, 1.0, x, panel.t(), Threads::All);
                observe(&mut rows, targets, &ids, columns, vocab);
            });
            for (loss, row) in losses.iter_mut().zip(&rows) {
                *loss = row.loss();
            }
            let mut dx = Target::new(dx, targets.len(), d_model).fill_with(|_, _| 0.0);
            for_each_panel(head.matrix(), |ids, panel| {
                to_gradient(&rows, targets, &ids, &mut logits, vocab, scale);
                let gradient = View::strided(&logits[ids.start..], targets.len(), ids.len(), vocab);
                multiply_add(&mut dx, 1.0, gradient, panel, Threads::All);
                if let Some(d_head) = &mut d_head {
                    let sums = as_slots(&mut d_head[ids.start * d_model..ids.end * d_model]);
                    // SAFETY: the slots are those of written values.
                    #[allow(unsafe_code)]
                    let mut sums =
                        unsafe { ViewMut::shared(SharedSlots::new(sums), 0, ids.len(), d_model, d_model) };
                    multiply_add(&mut sums, 1.0, gradient.t(), x, Threads::All);
                }
            });
        }
        // SAFETY: the chunks cover every row.
        #[allow(unsafe_code)]
        let dx = unsafe { dx.written() };
        let loss = scaled_sum(&losses, scale);
        let loss = cpu::from_values(vec![loss], [1]);
        (loss, cpu::from_values(dx, [tokens, d_model]), d_head.map(to_tensor))
    }

    fn scaled(mut gradient: FlexTensor, by: &FlexTensor) -> FlexTensor {
        let by = cpu::values::<f32>(by)[0];
        // Mostly the loss is the end of its graph, and this is 1.
        if by.to_bits() != 1.0_f32.to_bits() {
            gradient.storage_mut::<f32>().iter_mut().for_each(|value| *value *= by);
        }
        gradient
    }
}

/// Rows of logits that are worth a thread's while.
const ROWS_OF_A_TASK: usize = 8;

/// What is known of a row of logits so far.
#[derive(Clone, Copy)]
struct Row {
    maximum: f32,
    /// Sum of `exp(logit - maximum)`.
    sum: f32,
    target: f32,
}

impl Default for Row {
    fn default() -> Self {
        Self { maximum: f32::NEG_INFINITY, sum: 0.0, target: 0.0 }
    }
}

impl Row {
    fn log_sum(&self) -> f32 {
        self.maximum + self.sum.ln()
    }

    fn loss(&self) -> f32 {
        self.log_sum() - self.target
    }
}

/// Takes the logits of the ids `ids` into account. Rows of logits begin `stride` apart.
fn observe(rows: &mut [Row], targets: &[u32], ids: &Range<usize>, logits: &[f32], stride: usize) {
    let known = rows.chunks_mut(ROWS_OF_A_TASK).zip(targets.chunks(ROWS_OF_A_TASK));
    let tasks = known.zip(logits.chunks(ROWS_OF_A_TASK * stride)).collect();
    for_each(tasks, |((rows, targets), logits): ((&mut [Row], &[u32]), &[f32])| {
        for ((row, target), logits) in rows.iter_mut().zip(targets).zip(logits.chunks(stride)) {
            let logits = &logits[..ids.len()];
            let maximum = row.maximum.max(max(logits));
            row.sum = row.sum * exp(row.maximum - maximum) + sum_of_exp(logits, maximum);
            row.maximum = maximum;
            if ids.contains(&(*target as usize)) {
                row.target = logits[*target as usize - ids.start];
            }
        }
    });
}

/// Turns the logits of the ids `ids` into their gradients.
fn to_gradient(
    rows: &[Row],
    targets: &[u32],
    ids: &Range<usize>,
    logits: &mut [f32],
    vocab: usize,
    scale: f32,
) {
    let known = rows.chunks(ROWS_OF_A_TASK).zip(targets.chunks(ROWS_OF_A_TASK));
    let tasks = known.zip(logits.chunks_mut(ROWS_OF_A_TASK * vocab)).collect();
    for_each(tasks, |((rows, targets), logits): ((&[Row], &[u32]), &mut [f32])| {
        for ((row, target), logits) in rows.iter().zip(targets).zip(logits.chunks_exact_mut(vocab)) {
            scaled_exp(&mut logits[ids.clone()], row.log_sum(), scale);
            if ids.contains(&(*target as usize)) {
                logits[*target as usize] -= scale;
            }
        }
    });
}

vectorised! {
    /// Replaces each value by `scale · exp(value - shift)`.
    fn scaled_exp(values: &mut [f32], shift: f32, scale: f32) {
        for value in values {
            *value = exp(*value - shift) * scale;
        }
    }
}

fn scaled_sum(losses: &[f32], scale: f32) -> f32 {
    (losses.iter().map(|loss| f64::from(*loss)).sum::<f64>() * f64::from(scale)) as f32
}

impl<B: LinearCrossEntropyKernels, C: CheckpointStrategy> LinearCrossEntropy for Autodiff<B, C> {
    fn linear_cross_entropy(
        x: FloatTensor<Self>,
        trained: FloatTensor<Self>,
        head: FrozenWeight,
        targets: Arc<[u32]>,
        scale: f32,
        chunk: usize,
        arithmetic: Arithmetic,
    ) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let (trained, head_node) = trained.into_parts();
        match LinearCrossEntropyBackward.prepare::<C>([node, head_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let wants_head = trained.shape().num_elements() > 0;
                let (loss, dx, d_head) =
                    B::loss_and_gradients(x, &head, &targets, scale, chunk, arithmetic, wants_head);
                prep.finish((dx, d_head), loss)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::linear_cross_entropy(x, trained, head, targets, scale, chunk, arithmetic))
            }
        }
    }

    fn token_losses(
        x: FloatTensor<Self>,
        head: FrozenWeight,
        targets: Arc<[u32]>,
        arithmetic: Arithmetic,
    ) -> FloatTensor<Self> {
        Self::from_inner(B::token_losses(x.into_primitive(), head, targets, arithmetic))
    }
}

#[derive(Debug)]
struct LinearCrossEntropyBackward;

impl<B: LinearCrossEntropyKernels> Backward<B, 2> for LinearCrossEntropyBackward {
    type State = (FloatTensor<B>, Option<FloatTensor<B>>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_loss = grads.consume::<B>(&ops.node);
        let [x_node, head_node] = ops.parents;
        let (dx, d_head) = ops.state;
        for (node, gradient) in [(x_node, Some(dx)), (head_node, d_head)] {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<B>(node.id, B::scaled(gradient, &d_loss));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use tune_quant::{BlockType, StoredMatrix};

    use super::*;
    use crate::Arithmetic::F32;
    use crate::testing::{assert_close, assert_gradients, frozen, random, uniform, values};

    fn targets(tokens: usize, vocab: usize) -> Arc<[u32]> {
        (0..tokens).map(|t| (t * 37 % vocab) as u32).collect()
    }

    /// [`reference`] for a head that is a tensor.
    fn reference_of_trained(x: Tensor<2>, head: Tensor<2>, targets: &[u32]) -> Tensor<1> {
        of_logits(x.matmul(head.transpose()), targets)
    }

    fn assert_equals_the_reference(tokens: usize, head: &FrozenWeight, chunk: usize) {
        let targets = targets(tokens, head.rows());
        assert_gradients(
            &[random(1, [tokens, head.cols()])],
            |x| {
                let head = head.clone().into();
                linear_cross_entropy(x[0].clone(), &head, targets.clone(), 0.3, chunk, F32).reshape([1, 1])
            },
            |x| reference(x[0].clone(), head, &targets).sum().mul_scalar(0.3).reshape([1, 1]),
        );
        assert_gradients(
            &[random(1, [tokens, head.cols()]), head.decode(&Device::flex())],
            |x| {
                let head = Weight::Trained(x[1].clone());
                linear_cross_entropy(x[0].clone(), &head, targets.clone(), 0.3, chunk, F32).reshape([1, 1])
            },
            |x| {
                reference_of_trained(x[0].clone(), x[1].clone(), &targets)
                    .sum()
                    .mul_scalar(0.3)
                    .reshape([1, 1])
            },
        );
        let x = random(1, [tokens, head.cols()]) * 3.0;
        let want = values(reference(x.clone(), head, &targets));
        assert_close("losses", &token_losses(x, head, &targets, F32), &want, 1e-5);
    }

    #[test]
    fn equals_the_reference() {
        for (tokens, vocab, d_model) in [(1, 1, 1), (3, 5, 7), (40, 130, 33)] {
            let head = StoredMatrix::from_f32(vocab, d_model, &uniform(4, vocab * d_model));
            assert_equals_the_reference(tokens, &head.into(), 16);
        }
    }

    #[test]
    fn heads_of_several_panels() {
        for block_type in [BlockType::F32, BlockType::Q8_0] {
            let head = frozen(block_type, [5000, 256]);
            for chunk in [1, 7, 100] {
                assert_equals_the_reference(20, &head, chunk);
            }
        }
    }

    #[test]
    fn more_tokens_than_are_done_at_a_time_without_a_graph() {
        assert_equals_the_reference(2100, &frozen(BlockType::F32, [11, 4]), 500);
    }

    /// Rounding x, W and the gradient of the logits to `bf16` costs about 2⁻⁸ of each.
    #[test]
    fn with_bf16_factors() {
        for (tokens, vocab, d_model, chunk) in [(1, 40, 8_usize, 8), (50, 1000, 64, 16), (33, 517, 96, 100)] {
            let head = frozen(BlockType::Q8_0, [vocab, d_model.next_multiple_of(32)]);
            let x = random(1, [tokens, head.cols()]) * 0.5;
            let targets = targets(tokens, vocab);
            let run = |arithmetic| {
                let tracked = x.clone().autodiff().require_grad();
                let weight = Weight::Trained(head.decode(&x.device())).tracked();
                let loss =
                    linear_cross_entropy(tracked.clone(), &weight, targets.clone(), 0.3, chunk, arithmetic)
                        * 2.0;
                let tape = loss.backward();
                let gradient = tracked.grad(&tape).expect("gradient of x");
                let d_head =
                    weight.trained().and_then(|head| head.grad(&tape)).expect("gradient of the head");
                let losses = token_losses(x.clone(), &head, &targets, arithmetic);
                let total = losses.iter().sum::<f32>() * 0.6;
                assert!((values(loss.inner())[0] - total).abs() < 1e-3 * total);
                (losses, values(gradient), values(d_head))
            };
            let (losses, gradient, d_head) = run(Arithmetic::Bf16);
            let (want_losses, want_gradient, want_d_head) = run(F32);
            assert_close("gradient of the head", &d_head, &want_d_head, 2e-2);
            assert_close("losses", &losses, &want_losses, 1e-2);
            assert_close("gradient", &gradient, &want_gradient, 2e-2);
        }
    }

    #[test]
    fn no_tokens_give_no_loss() {
        let head = frozen(BlockType::F32, [5, 4]);
        let weight = head.clone().into();
        let x = random(1, [0, 4]);
        assert_eq!(values(linear_cross_entropy(x.clone(), &weight, [].into(), 1.0, 8, F32)), [0.0]);
        let tracked = x.clone().autodiff().require_grad();
        assert_eq!(values(linear_cross_entropy(tracked, &weight, [].into(), 1.0, 8, F32).inner()), [0.0]);
        assert!(token_losses(x, &head, &[], F32).is_empty());
    }

    #[test]
    fn large_logits_stay_finite() {
        let head = frozen(BlockType::F32, [50, 8]);
        let (x, targets) = (random(1, [6, 8]) * 1e4, targets(6, 50));
        let want = values(reference(x.clone(), &head, &targets));
        assert_close("losses", &token_losses(x, &head, &targets, F32), &want, 1e-5);
    }

    #[test]
    #[should_panic(expected = "target 5 in a vocabulary of 5")]
    fn a_target_outside_the_vocabulary_is_refused() {
        token_losses(random(1, [1, 4]), &frozen(BlockType::F32, [5, 4]), &[5], F32);
    }
}
