//! RMSNorm: `y = x / √(mean(x²) + ε) · gain`. Zhang and Sennrich 2019, arXiv 1910.07467.

use burn::tensor::{Device, Tensor};
use tune_kernels::bf16::Input;
use tune_kernels::{Vector, rms_norm};

/// Root-mean-square normalisation.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// `[d_model]`.
    pub gain: Vector,
    eps: f32,
}

impl RmsNorm {
    /// `gain` holds `d_model` values, frozen.
    pub fn new(gain: Vec<f32>, eps: f64) -> Self {
        Self { gain: gain.into(), eps: eps as f32 }
    }

    /// # Shapes
    ///
    /// - x, output: `[tokens, d_model]`
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        match &self.gain {
            Vector::Trained(gain) if gain.is_autodiff() => {
                rms_norm(x, &vec![1.0; self.gain.len()].into(), self.eps) * gain.clone()
            }
            gain => rms_norm(x, &gain.values(), self.eps),
        }
    }

    /// The norm of `x` as the input of a projection.
    pub fn input(&self, x: Tensor<2>) -> Input {
        Input::Norm { x, gain: self.gain.clone(), eps: self.eps }
    }

    /// The same norm; if its gain is trained, with that as a leaf of a fresh autodiff graph.
    pub fn tracked(&self) -> Self {
        Self { gain: self.gain.tracked(), ..*self }
    }

    /// The same norm with a trained gain.
    pub fn unfrozen(&self, device: &Device) -> Self {
        Self { gain: self.gain.unfrozen(device), ..*self }
    }
}
