//! Frozen linear layer.
use burn::tensor::Tensor;

use crate::FrozenWeight;

/// `y = x Wᵀ`.
pub fn frozen_linear(x: Tensor<2>, w: &FrozenWeight) -> Tensor<2> {
    reference(x, w)
}

/// The same in plain tensor operations.
pub fn reference(x: Tensor<2>, w: &FrozenWeight) -> Tensor<2> {
    let w = w.decode(&x.device());
    x.matmul(w.transpose())
}
