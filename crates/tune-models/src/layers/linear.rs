//! A linear layer, frozen with an optional adapter or trained: `y = x Wᵀ + bias (+ s · (x Aᵀ) Bᵀ)`.

use burn::tensor::{Device, Tensor};
use tune_adapters::{Dropout, Lora};
use tune_kernels::bf16::Layer;
use tune_kernels::{Vector, Weight, frozen_linear};

/// A linear layer, dense or quantised, with an optional adapter. Models only call `forward`.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[d_out, d_in]`.
    pub weight: Weight,
    /// `[d_out]`.
    pub bias: Option<Vector>,
    /// The update of a frozen weight.
    pub adapter: Option<Lora>,
}

impl Linear {
    /// # Shapes
    ///
    /// - x: `[tokens, d_in]`
    /// - output: `[tokens, d_out]`
    pub fn forward(&self, x: Tensor<2>, dropout: Option<Dropout>) -> Tensor<2> {
        let y = match (&self.adapter, &self.weight) {
            (Some(adapter), weight) => adapter.forward(x, &weight.stored(), dropout),
            (None, Weight::Trained(weight)) if weight.is_autodiff() => x.matmul(weight.clone().transpose()),
            (None, weight) => frozen_linear(x, &weight.stored()),
        };
        match &self.bias {
            None => y,
            Some(Vector::Trained(bias)) => y + bias.clone(),
            Some(Vector::Frozen(bias)) => {
                let bias = bias.tensor(&y.device().inner()).unsqueeze();
                if y.is_autodiff() { y + bias.autodiff() } else { y + bias }
            }
        }
    }

    /// The layer as part of a projection.
    pub fn layer(&self, device: &Device) -> Layer {
        let adapter = self.adapter.as_ref();
        let parts = |lora: &Lora| {
            let (a, b) = lora.factors(device);
            (a, b, lora.scale() as f32)
        };
        Layer { weight: self.weight.clone(), bias: self.bias.clone(), adapter: adapter.map(parts) }
    }

    /// The same layer with what is trained of it as leaves of a fresh autodiff graph.
    pub fn tracked(&self) -> Self {
        Self {
            weight: self.weight.tracked(),
            bias: self.bias.as_ref().map(Vector::tracked),
            adapter: self.adapter.as_ref().map(Lora::tracked),
        }
    }

    /// The same layer with a trained weight and bias, and without an adapter.
    pub fn unfrozen(&self, device: &Device) -> Self {
        Self {
            weight: self.weight.unfrozen(device),
            bias: self.bias.as_ref().map(|bias| bias.unfrozen(device)),
            adapter: None,
        }
    }

    /// Lets what is mapped of it from a file leave memory until it is read again.
    pub fn release(&self) {
        let factors = self.adapter.iter().flat_map(|lora| [&lora.a, &lora.b]);
        factors.chain([&self.weight]).for_each(Weight::release);
    }

    /// Whether anything of it is trained.
    pub fn is_trained(&self) -> bool {
        self.adapter.as_ref().is_some_and(Lora::is_trained) || self.weight.trained().is_some()
    }
}
