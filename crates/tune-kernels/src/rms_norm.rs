//! Root-mean-square norm with a frozen gain.
use burn::tensor::Tensor;

use crate::FrozenVector;

/// `y = x / sqrt(mean(x²) + eps) · gain`.
pub fn rms_norm(x: Tensor<2>, gain: &FrozenVector, eps: f32) -> Tensor<2> {
    reference(x, gain, eps)
}

/// The same in plain tensor operations.
pub fn reference(x: Tensor<2>, gain: &FrozenVector, eps: f32) -> Tensor<2> {
    let gain = gain.tensor(&x.device()).unsqueeze::<2>();
    let inverse_rms = (x.clone().square().mean_dim(1) + eps).sqrt().recip();
    x * inverse_rms * gain
}
