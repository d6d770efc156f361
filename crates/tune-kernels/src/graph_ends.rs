//! Where a graph begins and ends, without keeping the values there alive.
//!
//! A run of blocks has a graph for each block. To go backward through one it takes the place of its input and of
//! its output in the graph, not their values, and the gradient of its output:
//!
//! ```text
//! y = alias(p, v):           value v              dL/dp = dL/dy
//! z = seed_gradient(y, g):   value 0              dL/dy = g
//! ```
//!
//! `z.backward()` goes on from y with g, as torch's `y.backward(g)`; burn's own begins at a scalar, and forming
//! `Σ y ⊙ g` for it would need y.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::cpu;

/// `value`, in the graph behind `place`: what arrives here as gradient is the gradient of `place`, whatever the
/// shape of that is.
pub fn alias(place: Tensor<2>, value: Tensor<2>) -> Tensor<2> {
    let value = if place.is_autodiff() { value.autodiff() } else { value };
    Tensor::from_dispatch(<Dispatch as GraphEnds>::alias(place.into_dispatch(), value.into_dispatch()))
}

/// A scalar whose gradient with respect to `y` is `gradient`.
///
/// # Shapes
/// `y` may be an [`alias`] of another shape than `gradient` -> `[1]`
pub fn seed_gradient(y: Tensor<2>, gradient: Tensor<2>) -> Tensor<1> {
    let gradient = if y.is_autodiff() { gradient.autodiff() } else { gradient };
    Tensor::from_dispatch(<Dispatch as GraphEnds>::seed_gradient(y.into_dispatch(), gradient.into_dispatch()))
}

/// The differentiable operations.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait GraphEnds: Backend {
    fn alias(place: FloatTensor<Self>, value: FloatTensor<Self>) -> FloatTensor<Self>;
    fn seed_gradient(y: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl GraphEnds for Flex {
    fn alias(_: FlexTensor, value: FlexTensor) -> FlexTensor {
        value
    }

    fn seed_gradient(_: FlexTensor, _: FlexTensor) -> FlexTensor {
        cpu::from_values(vec![0.0_f32], [1])
    }
}

impl<B: GraphEnds, C: CheckpointStrategy> GraphEnds for Autodiff<B, C> {
    fn alias(place: FloatTensor<Self>, value: FloatTensor<Self>) -> FloatTensor<Self> {
        let (_, node) = place.into_parts();
        let value = value.into_primitive();
        match Alias.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((), value),
            OpsKind::UnTracked(prep) => prep.finish(value),
        }
    }

    fn seed_gradient(y: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        let (y, node) = y.into_parts();
        let gradient = gradient.into_primitive();
        let zero = B::seed_gradient(y, gradient.clone());
        match Seed.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(gradient, zero),
            OpsKind::UnTracked(prep) => prep.finish(zero),
        }
    }
}

#[derive(Debug)]
struct Alias;

impl<B: Backend> Backward<B, 1> for Alias {
    type State = ();

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = grads.consume::<B>(&ops.node);
        let [place] = ops.parents;
        if let Some(place) = place {
            grads.register::<B>(place.id, gradient);
        }
    }
}

#[derive(Debug)]
struct Seed;

impl<B: Backend> Backward<B, 1> for Seed {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        grads.consume::<B>(&ops.node);
        let [y] = ops.parents;
        if let Some(y) = y {
            grads.register::<B>(y.id, ops.state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{random, values};

    #[test]
    fn gradients_pass_through_ends_without_values() {
        let nothing = || Tensor::empty([0, 0], &random(1, [1, 1]).device());
        let input = nothing().autodiff().require_grad();
        let x = alias(input.clone(), random(1, [3, 4]));
        let output = alias(x * 2.0, nothing());
        assert_eq!(output.dims(), [0, 0]);
        let gradient = random(2, [3, 4]);
        let mut tape = seed_gradient(output, gradient.clone()).backward();
        let got = input.grad_remove(&mut tape).expect("gradient of the input");
        assert_eq!(values(got), values(gradient * 2.0));
    }
}
