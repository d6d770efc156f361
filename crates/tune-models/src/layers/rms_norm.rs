//! RMSNorm: `y = x / √(mean(x²) + ε) · gain`. Zhang and Sennrich 2019, arXiv 1910.07467.

use burn::tensor::Tensor;
use tune_kernels::FrozenVector;
use tune_kernels::bf16::Input;

/// Root-mean-square normalisation with a frozen gain.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    gain: FrozenVector,
    eps: f32,
}

impl RmsNorm {
    /// `gain` holds `d_model` values.
    pub fn new(gain: Vec<f32>, eps: f64) -> Self {
        Self { gain: gain.into(), eps: eps as f32 }
    }

    /// # Shapes
    ///
    /// - x, output: `[tokens, d_model]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        tune_kernels::rms_norm(x, &self.gain, self.eps)
    }

    /// The norm of `x` as the input of a projection.
    pub fn input(&self, x: Tensor<2>) -> Input {
        Input::Norm { x, gain: self.gain.clone(), eps: self.eps }
    }
}
