//! The rotary frequencies of a model (Su et al. 2021, arXiv 2104.09864).
//!
//! ```text
//! frequency_i = θ^(−2i / head_dim), i < head_dim / 2
//! ```
//!
//! Scaling of Llama 3.1 as in transformers' `_compute_llama3_parameters`. Frequencies are rounded to f32 and
//! angles computed from them in f32, as transformers does.

use std::f64::consts::PI;

use tune_formats::{ModelConfig, RopeScaling};

/// The `head_dim / 2` frequencies of `config`.
pub(crate) fn rotary_frequencies(config: &ModelConfig) -> Vec<f32> {
    let frequency = |i: usize| config.rope_theta.powf(-(2.0 * i as f64) / config.head_dim as f64);
    (0..config.head_dim / 2).map(|i| scaled(frequency(i), i, config.rope_scaling.as_ref()) as f32).collect()
}

fn scaled(frequency: f64, index: usize, scaling: Option<&RopeScaling>) -> f64 {
    match scaling {
        None => frequency,
        Some(RopeScaling::Linear { factor }) => frequency / factor,
        Some(RopeScaling::Factors(factors)) => {
            frequency / factors.get(index).map_or(1.0, |factor| f64::from(*factor))
        }
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        }) => {
            let context = *original_max_position_embeddings as f64;
            let wavelength = 2.0 * PI / frequency;
            if wavelength < context / high_freq_factor {
                frequency
            } else if wavelength > context / low_freq_factor {
                frequency / factor
            } else {
                let smooth = (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}
