//! A frozen linear layer with an optional adapter: `y = x Wᵀ + bias (+ s · (x Aᵀ) Bᵀ)`.

use burn::tensor::Tensor;
use tune_adapters::{Dropout, Lora};
use tune_kernels::{FrozenWeight, frozen_linear};

/// A frozen linear layer, dense or quantised, with an optional adapter. Models only call `forward`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[d_out, d_in]`, in its stored form.
    pub weight: FrozenWeight,
    /// `[1, d_out]`, frozen.
    pub bias: Option<Tensor<2>>,
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
        match &self.bias {
            Some(bias) if y.is_autodiff() => y + bias.clone().autodiff(),
            Some(bias) => y + bias.clone(),
            None => y,
        }
    }

    /// The same layer with its adapter as a leaf of a fresh autodiff graph.
    pub fn tracked(&self) -> Self {
        Self { adapter: self.adapter.as_ref().map(Lora::tracked), ..self.clone() }
    }
}
