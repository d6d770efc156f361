//! Linear head and cross-entropy in one.
use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData, activation};

use crate::FrozenWeight;

/// `scale · Σ -log softmax(x Wᵀ)[target]`.
pub fn linear_cross_entropy(
    x: Tensor<2>,
    head: &FrozenWeight,
    targets: Arc<[u32]>,
    scale: f32,
    _chunk: usize,
) -> Tensor<1> {
    reference(x, head, &targets).sum().mul_scalar(scale)
}

/// `-log softmax(x Wᵀ)[target]` of every token, without a graph.
pub fn token_losses(x: Tensor<2>, head: &FrozenWeight, targets: &[u32]) -> Vec<f32> {
    reference(x.inner(), head, targets).into_data().iter::<f32>().collect()
}

/// `-log softmax(x Wᵀ)[target]` of every token in plain tensor operations, `[tokens]`.
pub fn reference(x: Tensor<2>, head: &FrozenWeight, targets: &[u32]) -> Tensor<1> {
    let device = x.device();
    let tokens = targets.len();
    let log_probabilities = activation::log_softmax(crate::frozen_linear::reference(x, head), 1);
    let ids: Vec<i32> = targets.iter().map(|id| *id as i32).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [tokens, 1]), &device);
    log_probabilities.gather(1, ids).neg().reshape([tokens])
}
