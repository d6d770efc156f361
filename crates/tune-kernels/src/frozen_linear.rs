//! Frozen linear layer: the weight stays in its stored form, also in the graph.
//!
//! ```text
//! y = x Wᵀ        dx = dy W
//! ```
//!
//! x `[tokens, d_in]`; W `[d_out, d_in]`, frozen and usually quantised; y `[tokens, d_out]`.
//! W is decoded one panel of rows at a time, in forward and again in backward (Dettmers et al. 2023,
//! arXiv 2305.14314, eq. 5). Saved: a reference to the stored weight, and neither x nor any decoded value.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::FrozenWeight;
use crate::cpu::{self, Unwritten, View};

/// `x Wᵀ` with a frozen W.
///
/// # Shapes
/// `x` `[tokens, d_in]`, `w` `[d_out, d_in]` -> `[tokens, d_out]`
///
/// # Panics
/// When `d_in` differs.
pub fn frozen_linear(x: Tensor<2>, w: &FrozenWeight) -> Tensor<2> {
    let [tokens, d_in] = x.dims();
    assert_eq!(w.cols(), d_in, "frozen_linear: d_in of {w:?} for x [{tokens}, {d_in}]");
    Tensor::from_dispatch(<Dispatch as FrozenLinear>::frozen_linear(x.into_dispatch(), w.clone()))
}

/// [`frozen_linear`] in plain tensor operations, with the whole weight decoded.
pub fn reference(x: Tensor<2>, w: &FrozenWeight) -> Tensor<2> {
    let w = w.decode(&x.device());
    x.matmul(w.transpose())
}

/// The differentiable operation.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait FrozenLinear: Backend {
    fn frozen_linear(x: FloatTensor<Self>, w: FrozenWeight) -> FloatTensor<Self>;
}

/// The kernels of one backend.
pub(crate) trait FrozenLinearKernels: Backend {
    /// y.
    fn forward(x: FloatTensor<Self>, w: &FrozenWeight) -> FloatTensor<Self>;
    /// dx.
    fn backward(dy: FloatTensor<Self>, w: &FrozenWeight) -> FloatTensor<Self>;
}

impl FrozenLinear for Flex {
    fn frozen_linear(x: FlexTensor, w: FrozenWeight) -> FlexTensor {
        Self::forward(x, &w)
    }
}

impl FrozenLinearKernels for Flex {
    fn forward(x: FlexTensor, w: &FrozenWeight) -> FlexTensor {
        let x = cpu::contiguous(x);
        let [tokens, d_in] = x.shape().dims();
        let mut y = Unwritten::new(tokens * w.rows());
        cpu::times_transposed(View::new(cpu::values(&x), tokens, d_in), w.matrix(), y.slots(), |_, _| ());
        // SAFETY: the product has written every element.
        #[allow(unsafe_code)]
        let y = unsafe { y.written() };
        cpu::from_values(y, [tokens, w.rows()])
    }

    fn backward(dy: FlexTensor, w: &FrozenWeight) -> FlexTensor {
        let dy = cpu::contiguous(dy);
        let [tokens, d_out] = dy.shape().dims();
        let mut dx = Unwritten::new(tokens * w.cols());
        cpu::times(View::new(cpu::values(&dy), tokens, d_out), w.matrix(), dx.slots());
        // SAFETY: the product has written every element.
        #[allow(unsafe_code)]
        let dx = unsafe { dx.written() };
        cpu::from_values(dx, [tokens, w.cols()])
    }
}

impl<B: FrozenLinearKernels, C: CheckpointStrategy> FrozenLinear for Autodiff<B, C> {
    fn frozen_linear(x: FloatTensor<Self>, w: FrozenWeight) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let y = B::forward(x, &w);
        match FrozenLinearBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(w, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

#[derive(Debug)]
struct FrozenLinearBackward;

impl<B: FrozenLinearKernels> Backward<B, 1> for FrozenLinearBackward {
    type State = FrozenWeight;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [x_node] = ops.parents;
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::backward(dy, &ops.state));
        }
    }
}

#[cfg(test)]
mod tests {
    use tune_quant::{BlockType, RowOrder, StoredMatrix};

    use super::*;
    use crate::testing::{assert_close, assert_gradients, frozen, random, uniform, values};

    fn assert_equals_the_reference(tokens: usize, w: &FrozenWeight) {
        assert_gradients(
            &[random(1, [tokens, w.cols()])],
            |inputs| frozen_linear(inputs[0].clone(), w),
            |inputs| reference(inputs[0].clone(), w),
        );
    }

    #[test]
    fn equals_the_reference_for_every_block_type() {
        for block_type in BlockType::ALL {
            for tokens in [1, 4, 5, 70] {
                assert_equals_the_reference(tokens, &frozen(block_type, [65, 512]));
            }
        }
    }

    #[test]
    fn equals_the_reference_for_nf4() {
        let w = StoredMatrix::from_f32(40, 128, &uniform(3, 40 * 128)).to_nf4();
        for tokens in [1, 9] {
            assert_equals_the_reference(tokens, &w.clone().into());
        }
    }

    #[test]
    fn equals_the_reference_for_odd_shapes() {
        for (tokens, d_out, d_in) in
            [(0, 3, 4), (1, 1, 1), (6, 1, 3), (2, 7, 5), (33, 31, 29), (5, 3000, 300)]
        {
            let w = StoredMatrix::from_f32(d_out, d_in, &uniform(4, d_out * d_in));
            assert_equals_the_reference(tokens, &w.into());
        }
    }

    #[test]
    fn rows_are_in_hugging_face_order_whatever_order_they_are_stored_in() {
        let values_of_w = uniform(5, 16 * 32);
        let mut stored = Vec::new();
        for head in 0..2 {
            for row in [0, 4, 1, 5, 2, 6, 3, 7] {
                let row = head * 8 + row;
                BlockType::F32.encode(&values_of_w[row * 32..(row + 1) * 32], &mut stored);
            }
        }
        let order = RowOrder::RotaryInterleaved { head_dim: 8 };
        let w = StoredMatrix::from_blocks(BlockType::F32, 16, 32, stored.into(), order);
        let w = FrozenWeight::from(w.expect("16 rows of 32"));
        let natural = FrozenWeight::from(StoredMatrix::from_f32(16, 32, &values_of_w));
        for tokens in [1, 9] {
            let x = random(6, [tokens, 32]);
            let (got, want) = (frozen_linear(x.clone(), &w), frozen_linear(x, &natural));
            assert_close("output", &values(got), &values(want), 1e-6);
        }
    }

    #[test]
    #[should_panic(expected = "d_in of FrozenWeight(Q8_0 [8, 64])")]
    fn another_input_width_is_refused() {
        frozen_linear(random(1, [3, 32]), &frozen(BlockType::Q8_0, [8, 64]));
    }
}
