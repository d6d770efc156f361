//! Root-mean-square norm with a frozen gain.
//!
//! ```text
//! y = x · r · g          r = 1 / sqrt(mean(x²) + ε)
//! dx = r g dy - x r³ mean(x g dy)
//! ```
//!
//! x, y `[tokens, d_model]`; g `[d_model]`; r `[tokens]`, one value per row.
//! Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4. Saved: x (shared with the graph) and r.

use std::mem::MaybeUninit;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::FrozenVector;
use crate::cpu::{self, Unwritten, dot, for_each, vectorised};

/// `x / sqrt(mean(x²) + eps) · gain`, row by row.
///
/// # Shapes
/// `x` `[tokens, d_model]`, `gain` `[d_model]` -> `[tokens, d_model]`
///
/// # Panics
/// When the widths differ.
pub fn rms_norm(x: Tensor<2>, gain: &FrozenVector, eps: f32) -> Tensor<2> {
    let [tokens, d_model] = x.dims();
    assert_eq!(gain.len(), d_model, "rms_norm: gain for x [{tokens}, {d_model}]");
    Tensor::from_dispatch(<Dispatch as RmsNorm>::rms_norm(x.into_dispatch(), gain.clone(), eps))
}

/// [`rms_norm`] in plain tensor operations.
pub fn reference(x: Tensor<2>, gain: &FrozenVector, eps: f32) -> Tensor<2> {
    let gain = gain.tensor(&x.device()).unsqueeze::<2>();
    let inverse_rms = (x.clone().square().mean_dim(1) + eps).sqrt().recip();
    x * inverse_rms * gain
}

/// The differentiable operation.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait RmsNorm: Backend {
    fn rms_norm(x: FloatTensor<Self>, gain: FrozenVector, eps: f32) -> FloatTensor<Self>;
}

/// The kernels of one backend.
pub(crate) trait RmsNormKernels: Backend {
    /// y and r.
    fn forward(x: FloatTensor<Self>, gain: &FrozenVector, eps: f32)
    -> (FloatTensor<Self>, FloatTensor<Self>);
    /// dx.
    fn backward(
        x: FloatTensor<Self>,
        inverse_rms: FloatTensor<Self>,
        gain: &FrozenVector,
        dy: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

impl RmsNorm for Flex {
    fn rms_norm(x: FlexTensor, gain: FrozenVector, eps: f32) -> FlexTensor {
        Self::forward(x, &gain, eps).0
    }
}

impl RmsNormKernels for Flex {
    fn forward(x: FlexTensor, gain: &FrozenVector, eps: f32) -> (FlexTensor, FlexTensor) {
        let x = cpu::contiguous(x);
        let [tokens, d_model] = x.shape().dims();
        let mut y = Unwritten::new(tokens * d_model);
        let mut inverse_rms = Unwritten::new(tokens);
        let task = ROWS_OF_A_TASK * d_model.max(1);
        let outputs = y.slots().chunks_mut(task).zip(inverse_rms.slots().chunks_mut(ROWS_OF_A_TASK));
        let tasks: Vec<_> = cpu::values::<f32>(&x).chunks(task).zip(outputs).collect();
        for_each(tasks, |(x, (y, inverse_rms))| {
            for ((x, y), r) in x.chunks_exact(d_model).zip(y.chunks_exact_mut(d_model)).zip(inverse_rms) {
                let mean_square = dot(x, x) / d_model as f32;
                let inverse_rms = 1.0 / (mean_square + eps).sqrt();
                r.write(inverse_rms);
                scale_row(x, gain, inverse_rms, y);
            }
        });
        // SAFETY: the loop has written every row of y and every r.
        #[allow(unsafe_code)]
        let (y, inverse_rms) = unsafe { (y.written(), inverse_rms.written()) };
        (cpu::from_values(y, [tokens, d_model]), cpu::from_values(inverse_rms, [tokens]))
    }

    fn backward(x: FlexTensor, inverse_rms: FlexTensor, gain: &FrozenVector, dy: FlexTensor) -> FlexTensor {
        let (x, dy) = (cpu::contiguous(x), cpu::contiguous(dy));
        let [tokens, d_model] = x.shape().dims();
        let mut dx = Unwritten::new(tokens * d_model);
        let task = ROWS_OF_A_TASK * d_model.max(1);
        let of_rows =
            cpu::values::<f32>(&inverse_rms).chunks(ROWS_OF_A_TASK).zip(dx.slots().chunks_mut(task));
        let tasks: Vec<_> = cpu::values::<f32>(&x)
            .chunks(task)
            .zip(cpu::values::<f32>(&dy).chunks(task))
            .zip(of_rows)
            .collect();
        for_each(tasks, |((x, dy), (inverse_rms, dx))| {
            let rows =
                x.chunks_exact(d_model).zip(dy.chunks_exact(d_model)).zip(dx.chunks_exact_mut(d_model));
            for (((x, dy), dx), r) in rows.zip(inverse_rms) {
                backward_row(x, gain, *r, dy, dx);
            }
        });
        // SAFETY: the loop has written every row.
        #[allow(unsafe_code)]
        let dx = unsafe { dx.written() };
        cpu::from_values(dx, [tokens, d_model])
    }
}

/// Rows that are worth a thread's while.
const ROWS_OF_A_TASK: usize = 16;

vectorised! {
    fn scale_row(x: &[f32], gain: &[f32], inverse_rms: f32, y: &mut [MaybeUninit<f32>]) {
        for ((x, g), y) in x.iter().zip(gain).zip(y) {
            y.write(x * inverse_rms * g);
        }
    }

    fn backward_row(x: &[f32], gain: &[f32], inverse_rms: f32, dy: &[f32], dx: &mut [MaybeUninit<f32>]) {
        let mean = cpu::dot3(x, gain, dy) / x.len() as f32;
        let pull = mean * inverse_rms * inverse_rms * inverse_rms;
        for (((x, g), dy), dx) in x.iter().zip(gain).zip(dy).zip(dx) {
            dx.write(dy * g * inverse_rms - x * pull);
        }
    }
}

impl<B: RmsNormKernels, C: CheckpointStrategy> RmsNorm for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, gain: FrozenVector, eps: f32) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let (y, inverse_rms) = B::forward(x.clone(), &gain, eps);
        match RmsNormBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x, inverse_rms, gain), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

#[derive(Debug)]
struct RmsNormBackward;

impl<B: RmsNormKernels> Backward<B, 1> for RmsNormBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, FrozenVector);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [x_node] = ops.parents;
        let (x, inverse_rms, gain) = ops.state;
        if let Some(x_node) = x_node {
            grads.register::<B>(x_node.id, B::backward(x, inverse_rms, &gain, dy));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_gradients, random, uniform};

    #[test]
    fn equals_the_reference() {
        for (tokens, d_model) in [(0, 8), (1, 2), (3, 7), (37, 64), (50, 100)] {
            let gain = FrozenVector::from(uniform(1, d_model));
            assert_gradients(
                &[random(2, [tokens, d_model])],
                |inputs| rms_norm(inputs[0].clone(), &gain, 1e-5),
                |inputs| reference(inputs[0].clone(), &gain, 1e-5),
            );
        }
    }

    #[test]
    #[should_panic(expected = "gain for x [3, 8]")]
    fn a_gain_of_another_width_is_refused() {
        rms_norm(random(1, [3, 8]), &vec![1.0; 7].into(), 1e-5);
    }
}
