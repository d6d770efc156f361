//! Frozen linear layer with a LoRA update beside it.
use burn::tensor::Tensor;

use crate::FrozenWeight;

/// `y = x Wᵀ + s (x Aᵀ) Bᵀ`.
pub fn lora_linear(x: Tensor<2>, w: &FrozenWeight, a: Tensor<2>, b: Tensor<2>, scale: f32) -> Tensor<2> {
    reference(x, w, a, b, scale)
}

/// The same in plain tensor operations.
pub fn reference(x: Tensor<2>, w: &FrozenWeight, a: Tensor<2>, b: Tensor<2>, scale: f32) -> Tensor<2> {
    let base = crate::frozen_linear::reference(x.clone(), w);
    base + x.matmul(a.transpose()).matmul(b.transpose()).mul_scalar(scale)
}
