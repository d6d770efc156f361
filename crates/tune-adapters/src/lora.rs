//! LoRA: a low-rank update beside a frozen linear layer.
//!
//! ```text
//! y = x Wᵀ + s · (x Aᵀ) Bᵀ        s = α / r, or α / √r with rsLoRA
//! ```
//!
//! W `[d_out, d_in]` frozen; A `[rank, d_in]` Kaiming-uniform; B `[d_out, rank]` zero, so Δ = 0 at step 0.
//! Hu et al. 2021, arXiv 2106.09685, eq. 3; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.
//! Departure: none. `W + ΔW` is never formed while training.

use burn::tensor::{Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tune_kernels::{FrozenWeight, Weight, frozen_linear, lora_linear};

/// What all adapters of a run share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank r of the update.
    pub rank: usize,
    /// α of the scale.
    pub alpha: f64,
    /// Scale by α / √r instead of α / r.
    pub use_rslora: bool,
    /// Probability with which an input of A is zeroed while training.
    pub dropout: f64,
}

impl LoraConfig {
    /// The factor s in front of the update.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

/// Selects the dropout mask of one forward pass: the same key gives the same mask, so a block that is
/// recomputed in the backward pass sees what its forward pass saw, and a resumed run what the first one saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropout {
    /// Derived from the run's seed and the number of the micro-batch.
    pub key: u64,
}

/// The pair A, B of one linear layer: trained, or frozen where it lies in a file, to be decoded by each forward pass.
#[derive(Clone, Debug)]
pub struct Lora {
    /// `[rank, d_in]`.
    pub a: Weight,
    /// `[d_out, rank]`.
    pub b: Weight,
    scale: f64,
    dropout: f64,
    /// Tells the dropout masks of different layers apart.
    stream: u64,
}

impl Lora {
    /// A fresh adapter. `stream` tells the layers of a model apart: layer and seed alone decide the values of
    /// A, so adding a target does not change the others.
    pub fn init(
        config: &LoraConfig,
        [d_out, d_in]: [usize; 2],
        seed: u64,
        stream: u64,
        device: &Device,
    ) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        // Kaiming-uniform with a = √5, as torch's Linear and PEFT: the bound is 1 / √d_in.
        let bound = 1.0 / (d_in as f32).sqrt();
        let a = (0..config.rank * d_in).map(|_| rng.random_range(-bound..bound)).collect();
        let b = vec![0.0; d_out * config.rank];
        Self::from_weights(config, [d_out, d_in], a, b, stream, device)
    }

    /// An adapter with given values: `a` `[rank, d_in]` and `b` `[d_out, rank]`, row-major.
    pub fn from_weights(
        config: &LoraConfig,
        [d_out, d_in]: [usize; 2],
        a: Vec<f32>,
        b: Vec<f32>,
        stream: u64,
        device: &Device,
    ) -> Self {
        let tensor = |values, shape: [usize; 2]| Tensor::from_data(TensorData::new(values, shape), device);
        let (a, b) = (tensor(a, [config.rank, d_in]), tensor(b, [d_out, config.rank]));
        Self::of(config, Weight::Trained(a), Weight::Trained(b), stream)
    }

    /// An adapter that is not trained: `a` `[rank, d_in]` and `b` `[d_out, rank]` stay as and where they are stored.
    pub fn frozen(config: &LoraConfig, a: FrozenWeight, b: FrozenWeight, stream: u64) -> Self {
        Self::of(config, a.into(), b.into(), stream)
    }

    fn of(config: &LoraConfig, a: Weight, b: Weight, stream: u64) -> Self {
        Self { a, b, scale: config.scale(), dropout: config.dropout, stream }
    }

    /// `x Wᵀ + s · (x Aᵀ) Bᵀ`; with `dropout`, A sees x with entries zeroed and the rest scaled up.
    ///
    /// # Shapes
    ///
    /// - x: `[tokens, d_in]`
    /// - output: `[tokens, d_out]`
    pub fn forward(&self, x: Tensor<2>, base: &FrozenWeight, dropout: Option<Dropout>) -> Tensor<2> {
        let (a, b) = self.factors(&x.device().inner());
        match dropout.filter(|_| self.has_dropout()) {
            None => lora_linear(x, base, a, b, self.scale as f32),
            Some(dropout) => {
                let mask = self.mask(x.dims(), dropout, &x.device());
                let update = (x.clone() * mask)
                    .matmul(a.transpose()) // [tokens, rank]
                    .matmul(b.transpose()) // [tokens, d_out]
                    .mul_scalar(self.scale);
                frozen_linear(x, base) + update
            }
        }
    }

    /// The same adapter as a leaf of a fresh autodiff graph: gradients of A and B are kept.
    pub fn tracked(&self) -> Self {
        Self { a: self.a.tracked(), b: self.b.tracked(), ..self.clone() }
    }

    /// A and B as tensors; frozen ones are decoded for the caller.
    pub fn factors(&self, device: &Device) -> (Tensor<2>, Tensor<2>) {
        (self.a.tensor(device), self.b.tensor(device))
    }

    /// Whether the pair is trained.
    pub fn is_trained(&self) -> bool {
        self.a.trained().is_some()
    }

    /// Rank r.
    pub fn rank(&self) -> usize {
        self.a.rows()
    }

    /// The factor s in front of the update.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Whether it drops entries of its input while training.
    pub fn has_dropout(&self) -> bool {
        self.dropout > 0.0
    }

    fn mask(&self, [tokens, d_in]: [usize; 2], dropout: Dropout, device: &Device) -> Tensor<2> {
        let mut rng = ChaCha8Rng::seed_from_u64(dropout.key);
        rng.set_stream(self.stream);
        let kept = (1.0 / (1.0 - self.dropout)) as f32;
        let values: Vec<f32> =
            (0..tokens * d_in).map(|_| if rng.random_bool(self.dropout) { 0.0 } else { kept }).collect();
        Tensor::from_data(TensorData::new(values, [tokens, d_in]), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tune_quant::StoredMatrix;

    const CONFIG: LoraConfig = LoraConfig { rank: 4, alpha: 8.0, use_rslora: false, dropout: 0.0 };

    fn values(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().try_to_vec().expect("f32 tensor")
    }

    fn base() -> FrozenWeight {
        let weight: Vec<f32> = (0..6 * 8).map(|i| (i as f32 * 0.37).sin()).collect();
        StoredMatrix::from_f32(6, 8, &weight).into()
    }

    fn input(device: &Device) -> Tensor<2> {
        let x: Vec<f32> = (0..3 * 8).map(|i| (i as f32 * 0.91).cos()).collect();
        Tensor::from_data(TensorData::new(x, [3, 8]), device)
    }

    #[test]
    fn fresh_adapter_leaves_the_base_output_unchanged() {
        let device = Device::flex();
        let lora = Lora::init(&CONFIG, [6, 8], 7, 0, &device);
        let adapted = values(lora.forward(input(&device), &base(), None));
        assert_eq!(adapted, values(frozen_linear(input(&device), &base())));
    }

    #[test]
    fn initial_a_depends_on_seed_and_stream_only_and_stays_inside_the_bound() {
        let device = Device::flex();
        let a = |seed, stream| values(Lora::init(&CONFIG, [6, 8], seed, stream, &device).a.tensor(&device));
        assert_eq!(a(7, 1), a(7, 1));
        assert_ne!(a(7, 1), a(7, 2));
        assert_ne!(a(7, 1), a(8, 1));
        let bound = 1.0 / 8f32.sqrt();
        assert!(a(7, 1).iter().all(|v| v.abs() <= bound));
        assert!(a(7, 1).iter().any(|v| v.abs() > bound / 2.0));
    }

    #[test]
    fn scale_is_alpha_over_rank_or_over_its_root() {
        assert!((CONFIG.scale() - 2.0).abs() < 1e-12);
        assert!((LoraConfig { use_rslora: true, ..CONFIG }.scale() - 4.0).abs() < 1e-12);
    }

    #[test]
    fn dropout_masks_repeat_by_key_and_keep_the_mean() {
        let device = Device::flex();
        let config = LoraConfig { dropout: 0.25, ..CONFIG };
        let lora = Lora::init(&config, [6, 8], 7, 3, &device);
        let mask = |key| values(lora.mask([500, 8], Dropout { key }, &device));
        assert_eq!(mask(1), mask(1));
        assert_ne!(mask(1), mask(2));
        let mean = mask(1).iter().sum::<f32>() / 4000.0;
        assert!((mean - 1.0).abs() < 0.05, "mean of the mask is {mean}");
    }

    #[test]
    fn dropout_of_a_fresh_adapter_changes_nothing_and_of_a_trained_one_does() {
        let device = Device::flex();
        let config = LoraConfig { dropout: 0.5, ..CONFIG };
        let mut lora = Lora::init(&config, [6, 8], 7, 3, &device);
        let forward = |lora: &Lora, key| values(lora.forward(input(&device), &base(), Some(Dropout { key })));
        assert_eq!(forward(&lora, 1), forward(&lora, 2));
        lora.b = Weight::Trained(Tensor::ones([6, 4], &device));
        assert_ne!(forward(&lora, 1), forward(&lora, 2));
    }
}
