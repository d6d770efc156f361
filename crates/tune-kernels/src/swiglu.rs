//! SwiGLU: the gated activation of a Llama feed-forward block.
//!
//! ```text
//! y = silu(g) · u        silu(g) = g σ(g),  σ(g) = 1 / (1 + e⁻ᵍ)
//! du = dy silu(g)        dg = dy u σ(g) (1 + g (1 - σ(g)))
//! ```
//!
//! g, u, y `[tokens, d_ff]`. Shazeer 2020, arXiv 2002.05202, eq. 5. Saved: g and u (shared with the graph).

use std::mem::MaybeUninit;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, TensorMetadata, backend_extension};
use burn::tensor::{Tensor, activation};
use burn_flex::FlexTensor;

use crate::cpu::{self, Unwritten, exp, for_each, vectorised};

/// `silu(gate) · up`, element by element.
///
/// # Shapes
/// `gate`, `up` `[tokens, d_ff]` -> `[tokens, d_ff]`
///
/// # Panics
/// When the shapes differ.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    assert_eq!(gate.dims(), up.dims(), "swiglu: shapes of gate and up");
    Tensor::from_dispatch(<Dispatch as SwiGlu>::swiglu(gate.into_dispatch(), up.into_dispatch()))
}

/// [`swiglu`] in plain tensor operations.
pub fn reference(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    activation::silu(gate) * up
}

/// The differentiable operation.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait SwiGlu: Backend {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
}

/// The kernels of one backend.
pub(crate) trait SwiGluKernels: Backend {
    /// y.
    fn forward(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
    /// dg and du.
    fn backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl SwiGlu for Flex {
    fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        Self::forward(gate, up)
    }
}

/// Elements of one task: three or five runs of this length stay in the second-level cache.
const CHUNK: usize = 16 * 1024;

impl SwiGluKernels for Flex {
    fn forward(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        let (gate, up) = (cpu::contiguous(gate), cpu::contiguous(up));
        let shape: [usize; 2] = gate.shape().dims();
        let mut y = Unwritten::new(shape[0] * shape[1]);
        let inputs = cpu::values::<f32>(&gate).chunks(CHUNK).zip(cpu::values::<f32>(&up).chunks(CHUNK));
        for_each(inputs.zip(y.slots().chunks_mut(CHUNK)).collect(), |((gate, up), y)| {
            forward_run(gate, up, y);
        });
        // SAFETY: the loop has written every element.
        #[allow(unsafe_code)]
        let y = unsafe { y.written() };
        cpu::from_values(y, shape)
    }

    fn backward(gate: FlexTensor, up: FlexTensor, dy: FlexTensor) -> (FlexTensor, FlexTensor) {
        let (gate, up, dy) = (cpu::contiguous(gate), cpu::contiguous(up), cpu::contiguous(dy));
        let shape: [usize; 2] = gate.shape().dims();
        let mut dgate = Unwritten::new(shape[0] * shape[1]);
        let mut dup = Unwritten::new(shape[0] * shape[1]);
        let inputs = cpu::values::<f32>(&gate).chunks(CHUNK).zip(cpu::values::<f32>(&up).chunks(CHUNK));
        let inputs = inputs.zip(cpu::values::<f32>(&dy).chunks(CHUNK));
        let outputs = dgate.slots().chunks_mut(CHUNK).zip(dup.slots().chunks_mut(CHUNK));
        for_each(inputs.zip(outputs).collect(), |(((gate, up), dy), (dgate, dup))| {
            backward_run(gate, up, dy, dgate, dup);
        });
        // SAFETY: the loop has written every element of both.
        #[allow(unsafe_code)]
        let (dgate, dup) = unsafe { (dgate.written(), dup.written()) };
        (cpu::from_values(dgate, shape), cpu::from_values(dup, shape))
    }
}

vectorised! {
    fn forward_run(gate: &[f32], up: &[f32], y: &mut [MaybeUninit<f32>]) {
        for ((gate, up), y) in gate.iter().zip(up).zip(y) {
            y.write(gate / (1.0 + exp(-gate)) * up);
        }
    }

    fn backward_run(
        gate: &[f32],
        up: &[f32],
        dy: &[f32],
        dgate: &mut [MaybeUninit<f32>],
        dup: &mut [MaybeUninit<f32>],
    ) {
        for ((((gate, up), dy), dgate), dup) in gate.iter().zip(up).zip(dy).zip(dgate).zip(dup) {
            let sigmoid = 1.0 / (1.0 + exp(-gate));
            dup.write(dy * gate * sigmoid);
            dgate.write(dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)));
        }
    }
}

impl<B: SwiGluKernels, C: CheckpointStrategy> SwiGlu for Autodiff<B, C> {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let (gate, gate_node) = gate.into_parts();
        let (up, up_node) = up.into_parts();
        let y = B::forward(gate.clone(), up.clone());
        match SwiGluBackward.prepare::<C>([gate_node, up_node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((gate, up), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

#[derive(Debug)]
struct SwiGluBackward;

impl<B: SwiGluKernels> Backward<B, 2> for SwiGluBackward {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = grads.consume::<B>(&ops.node);
        let [gate_node, up_node] = ops.parents;
        let (gate, up) = ops.state;
        let (dgate, dup) = B::backward(gate, up, dy);
        if let Some(node) = gate_node {
            grads.register::<B>(node.id, dgate);
        }
        if let Some(node) = up_node {
            grads.register::<B>(node.id, dup);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradients, random, values};

    #[test]
    fn equals_the_reference() {
        for shape in [[0, 4], [1, 1], [3, 7], [5, 33], [50, 700]] {
            assert_gradients(
                &[random(1, shape) * 6.0, random(2, shape)],
                |inputs| swiglu(inputs[0].clone(), inputs[1].clone()),
                |inputs| reference(inputs[0].clone(), inputs[1].clone()),
            );
        }
    }

    #[test]
    fn large_gates_stay_finite() {
        let gate =
            Tensor::from_floats([[-1e4, -100.0, -88.0, 88.0, 100.0, 1e4]], &burn::tensor::Device::flex());
        let up = Tensor::ones_like(&gate);
        assert_close("output", &values(swiglu(gate, up)), &[0.0, 0.0, 0.0, 88.0, 100.0, 1e4], 1e-7);
    }

    #[test]
    fn a_transposed_input_is_read_in_its_own_order() {
        let (gate, up) = (random(1, [6, 4]), random(2, [4, 6]));
        let got = swiglu(gate.clone().transpose(), up.clone());
        assert_close("output", &values(got), &values(reference(gate.transpose(), up)), 1e-6);
    }
}
