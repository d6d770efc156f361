//! A frozen linear layer with an optional adapter: `y = x Wᵀ + bias (+ s · (x Aᵀ) Bᵀ)`.

use burn::tensor::Tensor;
use tune_adapters::{Dropout, Lora};
use tune_kernels::bf16::Layer;
use tune_kernels::{FrozenVector, FrozenWeight, frozen_linear};

/// A frozen linear layer, dense or quantised, with an optional adapter. Models only call `forward`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[d_out, d_in]`, in its stored form.
    pub weight: FrozenWeight,
    /// `[d_out]`.
    pub bias: Option<FrozenVector>,
    /// The trainable update.
    pub adapter: Option<Lora>,
}

impl Linear {
    /// # Shapes
    ///
    /// - x: `[tokens, d_in]`
    /// - output: `[tokens, d_out]`
    pub fn forward(&self, x: Tensor<2>, dropout: Option<Dropout>) -> Tensor<2> {
        let y = match &self.adapter {
            Some(adapter) => adapter.forward(x, &self.weight, dropout),
            None => frozen_linear(x, &self.weight),
        };
        let Some(bias) = &self.bias else { return y };
        let bias = bias.tensor(&y.device().inner()).unsqueeze();
        if y.is_autodiff() { y + bias.autodiff() } else { y + bias }
    }

    /// The layer as part of a projection.
    pub fn layer(&self) -> Layer {
        let adapter = self.adapter.as_ref();
        Layer {
            weight: self.weight.clone(),
            bias: self.bias.clone(),
            adapter: adapter.map(|lora| (lora.a.clone(), lora.b.clone(), lora.scale() as f32)),
        }
    }

    /// The same layer with its adapter as a leaf of a fresh autodiff graph.
    pub fn tracked(&self) -> Self {
        Self { adapter: self.adapter.as_ref().map(Lora::tracked), ..self.clone() }
    }
}
