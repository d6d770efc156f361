//! The start of a backward pass from a gradient that is known already.
//!
//! ```text
//! z = 0        dL/dy = g        whatever y is
//! ```
//!
//! `z.backward()` then goes on from y with g, as torch's `y.backward(g)`; burn's backward begins at a scalar.
//! Forming `Σ y ⊙ g` for it would read y and g and write both gradients once more.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::cpu;

/// A scalar whose gradient with respect to `y` is `gradient`.
///
/// # Shapes
/// `y` and `gradient` the same -> `[1]`
///
/// # Panics
/// When the shapes differ.
pub fn seed_gradient(y: Tensor<2>, gradient: Tensor<2>) -> Tensor<1> {
    assert_eq!(y.dims(), gradient.dims(), "seed_gradient: shapes of y and its gradient");
    let gradient = if y.is_autodiff() { gradient.autodiff() } else { gradient };
    Tensor::from_dispatch(<Dispatch as SeedGradient>::seed_gradient(
        y.into_dispatch(),
        gradient.into_dispatch(),
    ))
}

/// The differentiable operation.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait SeedGradient: Backend {
    fn seed_gradient(y: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl SeedGradient for Flex {
    fn seed_gradient(_: FlexTensor, _: FlexTensor) -> FlexTensor {
        cpu::from_values(vec![0.0_f32], [1])
    }
}

impl<B: SeedGradient, C: CheckpointStrategy> SeedGradient for Autodiff<B, C> {
    fn seed_gradient(y: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
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

        let (y, node) = y.into_parts();
        let gradient = gradient.into_primitive();
        let zero = B::seed_gradient(y, gradient.clone());
        match Seed.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(gradient, zero),
            OpsKind::UnTracked(prep) => prep.finish(zero),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{random, values};

    #[test]
    fn backward_goes_on_from_the_given_gradient() {
        let x = random(1, [3, 4]).autodiff().require_grad();
        let gradient = random(2, [3, 4]);
        let tape = seed_gradient(x.clone() * 2.0, gradient.clone()).backward();
        let got = values(x.grad(&tape).expect("gradient of x"));
        assert_eq!(got, values(gradient * 2.0));
    }
}
