//! AdamW with torch's arithmetic and defaults, with moments of 32 or of 8 bits, and clipping by the global norm.
//!
//! The arithmetic is [`tune_kernels::adamw`]'s and [`tune_kernels::adamw_8bit()`]'s. burn's own AdamW has other defaults (ε 1e-5, λ 1e-4) and keys its
//! state by module; ours is a list in the order of [`tune_models::Llama::parameters_mut`], which a checkpoint can store
//! by name.

use burn::tensor::{FloatDType, Tensor};
use tune_kernels::{AdamWFactors, Moments8bit, adamw, adamw_8bit, on_pool, sum_of_squares};

/// Hyper-parameters; the defaults are torch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay λ.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 1e-2 }
    }
}

/// Parameters with fewer values keep moments of 32 bits, as in bitsandbytes: norms and biases are few, and matter.
const LEAST_8BIT: usize = 4096;

/// Optimiser state: both moments of every parameter.
pub struct AdamW {
    config: AdamWConfig,
    steps: u64,
    moments: Vec<Moments>,
    /// Parameters without weight decay; those beyond the end have it.
    exempt: Vec<bool>,
}

/// Moments of one parameter.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "one for each parameter")]
pub enum Moments {
    /// In `f32` and in its shape.
    F32 {
        /// First moment m.
        m: Tensor<2>,
        /// Second moment v.
        v: Tensor<2>,
    },
    /// In 8 bits.
    Bits8(Moments8bit),
}

impl Moments {
    fn zeros(parameter: &Tensor<2>) -> Self {
        Self::F32 { m: parameter.zeros_like(), v: parameter.zeros_like() }
    }

    fn zeros_8bit(parameter: &Tensor<2>) -> Self {
        match parameter.shape().num_elements() {
            ..LEAST_8BIT => Self::zeros(parameter),
            len => Self::Bits8(Moments8bit::zeros(len)),
        }
    }

    /// Whether they belong to a parameter of this shape.
    pub(crate) fn fit(&self, [rows, cols]: [usize; 2]) -> bool {
        match self {
            Self::F32 { m, v } => [m.dims(), v.dims()] == [[rows, cols]; 2],
            Self::Bits8(Moments8bit { m, v }) => {
                let blocks = (rows * cols).div_ceil(tune_kernels::adamw_8bit::BLOCK);
                [m, v].iter().all(|x| x.codes.len() == rows * cols && x.absmax.len() == blocks)
            }
        }
    }
}

impl AdamW {
    /// Zero moments for `parameters`.
    pub fn new<'a>(config: AdamWConfig, parameters: impl IntoIterator<Item = &'a Tensor<2>>) -> Self {
        let moments = parameters.into_iter().map(Moments::zeros).collect();
        Self { config, steps: 0, moments, exempt: Vec::new() }
    }

    /// Zero moments of 8 bits for `parameters`.
    pub fn new_8bit<'a>(config: AdamWConfig, parameters: impl IntoIterator<Item = &'a Tensor<2>>) -> Self {
        let moments = parameters.into_iter().map(Moments::zeros_8bit).collect();
        Self { config, steps: 0, moments, exempt: Vec::new() }
    }

    /// State of a run that has taken `steps` steps.
    pub fn resume(config: AdamWConfig, steps: u64, moments: Vec<Moments>) -> Self {
        Self { config, steps, moments, exempt: Vec::new() }
    }

    /// The same without weight decay of the parameters marked `true`.
    #[must_use]
    pub fn without_decay_of(self, exempt: Vec<bool>) -> Self {
        Self { exempt, ..self }
    }

    /// Moments in the order of the parameters.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Updates every parameter with its gradient, in `f32` or `bf16`. Both come in the order given to
    /// [`new`](Self::new).
    pub fn step(&mut self, learning_rate: f64, parameters: Vec<&mut Tensor<2>>, gradients: Vec<Tensor<2>>) {
        on_pool(|| self.step_here(learning_rate, parameters, gradients));
    }

    fn step_here(&mut self, learning_rate: f64, parameters: Vec<&mut Tensor<2>>, gradients: Vec<Tensor<2>>) {
        assert_eq!(parameters.len(), self.moments.len(), "one parameter for each moment");
        assert_eq!(gradients.len(), self.moments.len(), "one gradient for each moment");
        self.steps += 1;
        let AdamWConfig { beta1, beta2, epsilon, weight_decay } = self.config;
        let correction1 = 1.0 - beta1.powf(self.steps as f64);
        let correction2 = 1.0 - beta2.powf(self.steps as f64);
        let factors = AdamWFactors {
            beta1: beta1 as f32,
            beta2: beta2 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            decay: (1.0 - learning_rate * weight_decay) as f32,
            step_size: (learning_rate / correction1) as f32,
            second_correction: correction2.sqrt() as f32,
            epsilon: epsilon as f32,
        };
        let decays = self.exempt.iter().map(|exempt| !exempt).chain(std::iter::repeat(true));
        let state = self.moments.iter_mut().zip(decays);
        for ((parameter, gradient), (moments, decays)) in parameters.into_iter().zip(gradients).zip(state) {
            let factors = if decays { factors } else { AdamWFactors { decay: 1.0, ..factors } };
            // Taken out, so that nobody else holds them and they change in place.
            let nothing = Tensor::empty([0, 0], &parameter.device());
            let take = |tensor: &mut Tensor<2>| std::mem::replace(tensor, nothing.clone());
            let gradient = gradient.cast(FloatDType::F32);
            match moments {
                Moments::F32 { m, v } => {
                    (*parameter, *m, *v) = adamw(take(parameter), gradient, take(m), take(v), factors);
                }
                Moments::Bits8(moments) => {
                    *parameter = adamw_8bit(take(parameter), &gradient, moments, factors);
                }
            }
        }
    }
}

/// Scales all gradients so that their common L2 norm is at most `max_norm` (`0` only measures), as
/// `torch.nn.utils.clip_grad_norm_`. Returns the norm before clipping. Gradients in `bf16` are counted as they are and
/// scaled in `f32`.
pub fn clip_grad_norm(gradients: &mut [Tensor<2>], max_norm: f64) -> f64 {
    let squares = |gradient: &Tensor<2>| sum_of_squares(&gradient.clone().cast(FloatDType::F32));
    let norm = on_pool(|| gradients.iter().map(squares).sum::<f64>()).sqrt();
    let factor = max_norm / (norm + 1e-6);
    if max_norm > 0.0 && factor < 1.0 {
        for gradient in gradients {
            let nothing = Tensor::empty([0, 0], &gradient.device());
            let dtype = FloatDType::from(gradient.dtype());
            let scaled = std::mem::replace(gradient, nothing).cast(FloatDType::F32).mul_scalar(factor);
            *gradient = scaled.cast(dtype);
        }
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    fn tensor(values: &[f32]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), [1, values.len()]), &Device::flex())
    }

    fn values(tensor: &Tensor<2>) -> Vec<f32> {
        tensor.to_data().try_to_vec().expect("f32 tensor")
    }

    /// Three steps computed with torch 2 (`torch.optim.AdamW(lr=0.1, weight_decay=0.01)`) on p = [1, −2],
    /// with gradients [0.5, −0.25], [0.1, 0.3], [−0.2, 0.05].
    #[test]
    fn three_steps_equal_torch() {
        let mut parameter = tensor(&[1.0, -2.0]);
        let mut adam = AdamW::new(AdamWConfig::default(), [&parameter]);
        for gradient in [[0.5, -0.25], [0.1, 0.3], [-0.2, 0.05]] {
            adam.step(0.1, vec![&mut parameter], vec![tensor(&gradient)]);
        }
        for (got, want) in values(&parameter).iter().zip([0.782_543_8_f32, -1.927_564_9]) {
            assert!((got - want).abs() < 2e-6, "got {got}, want {want}");
        }
    }

    #[test]
    fn moments_of_8_bits_step_nearly_as_those_of_32() {
        let wide = |seed: u64| {
            let values = (0..8192).map(|i| ((i as u64 * 37 + seed * 101) % 1009) as f32 / 500.0 - 1.0);
            Tensor::from_data(TensorData::new(values.collect::<Vec<f32>>(), [16, 512]), &Device::flex())
        };
        let small = || tensor(&[1.0, -2.0]);
        let (mut exact, mut short) = ([wide(0), small()], [wide(0), small()]);
        let mut adam =
            [AdamW::new(AdamWConfig::default(), &exact), AdamW::new_8bit(AdamWConfig::default(), &short)];
        assert!(matches!(adam[1].moments(), [Moments::Bits8(_), Moments::F32 { .. }]));
        for step in 1..6 {
            for (adam, parameters) in adam.iter_mut().zip([&mut exact, &mut short]) {
                let gradients = vec![wide(step), tensor(&[0.5, -0.25])];
                adam.step(0.1, parameters.iter_mut().collect(), gradients);
            }
        }
        assert_eq!(values(&exact[1]), values(&short[1]));
        let (moved, error) = values(&exact[0]).iter().zip(values(&short[0])).zip(values(&wide(0))).fold(
            (0.0_f32, 0.0_f32),
            |(moved, error), ((exact, short), before)| {
                (moved + (exact - before).powi(2), error + (exact - short).powi(2))
            },
        );
        let relative = (error / moved).sqrt();
        assert!(relative > 0.0 && relative < 0.05, "off by {relative} of the way");
    }

    #[test]
    fn gradients_in_16_bits_are_clipped_and_used() {
        let mut gradients =
            vec![tensor(&[3.0, 0.0]).cast(FloatDType::BF16), tensor(&[0.0, 4.0]).cast(FloatDType::BF16)];
        let norm = clip_grad_norm(&mut gradients, 1.0);
        assert!((norm - 5.0).abs() < 1e-6);
        assert!(gradients.iter().all(|gradient| gradient.dtype() == burn::tensor::DType::BF16));
        let mut parameter = tensor(&[1.0, 1.0]);
        let mut adam = AdamW::new(AdamWConfig::default(), [&parameter]);
        adam.step(0.1, vec![&mut parameter], vec![gradients.remove(0)]);
        assert!((values(&parameter)[0] - 0.899).abs() < 1e-3);
    }

    #[test]
    fn exempt_parameters_do_not_decay() {
        let mut parameters = [tensor(&[2.0]), tensor(&[2.0])];
        let adam = AdamW::new(AdamWConfig { weight_decay: 0.5, ..AdamWConfig::default() }, &parameters);
        let mut adam = adam.without_decay_of(vec![true]);
        adam.step(0.1, parameters.iter_mut().collect(), vec![tensor(&[0.0]), tensor(&[0.0])]);
        let want = [2.0_f32, 2.0 * (1.0 - 0.1 * 0.5)];
        assert_eq!(parameters.map(|p| values(&p)[0].to_bits()), want.map(f32::to_bits));
    }

    #[test]
    fn clipping_scales_all_gradients_by_their_common_norm() {
        let mut gradients = vec![tensor(&[3.0, 0.0]), tensor(&[0.0, 4.0])];
        let norm = clip_grad_norm(&mut gradients, 1.0);
        assert!((norm - 5.0).abs() < 1e-6);
        assert!((values(&gradients[0])[0] - 0.6).abs() < 1e-6);
        assert!((values(&gradients[1])[1] - 0.8).abs() < 1e-6);
    }

    #[test]
    fn short_gradients_and_a_limit_of_zero_change_nothing() {
        for limit in [10.0, 0.0] {
            let mut gradients = vec![tensor(&[3.0, 4.0])];
            clip_grad_norm(&mut gradients, limit);
            assert_eq!(values(&gradients[0]), [3.0, 4.0]);
        }
    }
}
