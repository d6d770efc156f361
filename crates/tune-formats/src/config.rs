//! The hyper-parameters of a model, from `config.json` or from GGUF metadata.

use serde::{Deserialize, Serialize};

/// Model families that `tune` can train.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// Llama 2, Llama 3.x, SmolLM/SmolLM2, TinyLlama, Mistral without a sliding window.
    Llama,
}

/// Scaling of rotary frequencies for long contexts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: frequencies divided by `factor` below a wavelength band, blended inside it.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are scaled in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are not scaled.
        high_freq_factor: f64,
        /// Context length before scaling.
        original_max_position_embeddings: usize,
    },
    /// One divisor per frequency, `head_dim / 2` of them: GGUF's `rope_freqs.weight`.
    Factors(Vec<f32>),
}

/// The hyper-parameters of a decoder-only transformer, with Hugging Face field names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Model family.
    pub architecture: Architecture,
    /// Rows of the embedding matrix.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head. Not always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies.
    pub rope_scaling: Option<RopeScaling>,
    /// Longest context the model was made for.
    pub max_position_embeddings: usize,
    /// The output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// q, k and v projections have a bias.
    pub attention_bias: bool,
}

impl ModelConfig {
    /// The linear layers of one block with their shapes `(name, d_out, d_in)`, under their PEFT names and in
    /// the order in which the block applies them.
    pub fn block_linears(&self) -> [(&'static str, usize, usize); 7] {
        let (d_model, d_ff) = (self.hidden_size, self.intermediate_size);
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        [
            ("q_proj", q, d_model),
            ("k_proj", kv, d_model),
            ("v_proj", kv, d_model),
            ("o_proj", d_model, q),
            ("gate_proj", d_ff, d_model),
            ("up_proj", d_ff, d_model),
            ("down_proj", d_model, d_ff),
        ]
    }

    /// Full Hugging Face module path of a block's linear layer, e.g. `model.layers.3.self_attn.q_proj`.
    pub fn linear_path(layer: usize, name: &str) -> String {
        let part = if matches!(name, "gate_proj" | "up_proj" | "down_proj") { "mlp" } else { "self_attn" };
        format!("model.layers.{layer}.{part}.{name}")
    }

    /// The divisor of each rotary frequency `rope_theta^(-2j / head_dim)`, `j < head_dim / 2`, or `None` when
    /// frequencies are not scaled. For llama 3.1 scaling these are the values of GGUF's `rope_freqs.weight`.
    pub fn rope_factors(&self) -> Option<Vec<f32>> {
        let pairs = self.head_dim / 2;
        Some(match self.rope_scaling.as_ref()? {
            RopeScaling::Factors(factors) => factors.clone(),
            RopeScaling::Linear { factor } => vec![*factor as f32; pairs],
            &RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let context = original_max_position_embeddings as f64;
                let divisor = |j: usize| {
                    let frequency = self.rope_theta.powf(-2.0 * j as f64 / self.head_dim as f64);
                    let wavelength = 2.0 * std::f64::consts::PI / frequency;
                    if wavelength < context / high_freq_factor {
                        1.0
                    } else if wavelength > context / low_freq_factor {
                        factor
                    } else {
                        let smooth =
                            (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        1.0 / ((1.0 - smooth) / factor + smooth)
                    }
                };
                (0..pairs).map(|j| divisor(j) as f32).collect()
            }
        })
    }

    /// What makes the values unusable together.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let sizes = [
            ("hidden size", self.hidden_size),
            ("feed-forward size", self.intermediate_size),
            ("number of attention heads", self.num_attention_heads),
            ("number of key-value heads", self.num_key_value_heads),
            ("head width", self.head_dim),
            ("context length", self.max_position_embeddings),
        ];
        for (name, size) in sizes {
            if size == 0 || size > MAX_SIZE {
                problems.push(format!("the {name} is {size}, expected 1 to {MAX_SIZE}"));
            }
        }
        if !(1..=MAX_LAYERS).contains(&self.num_hidden_layers) {
            let layers = self.num_hidden_layers;
            problems.push(format!("the number of layers is {layers}, expected 1 to {MAX_LAYERS}"));
        }
        let (q, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if kv != 0 && !q.is_multiple_of(kv) {
            problems.push(format!("{q} attention heads are not a multiple of {kv} key-value heads"));
        }
        if !self.head_dim.is_multiple_of(2) {
            problems.push(format!("the head width is {}, expected an even number", self.head_dim));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            problems.push(format!("the epsilon of the norms is {}", self.rms_norm_eps));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            problems.push(format!("the base of the rotary frequencies is {}", self.rope_theta));
        }
        problems
    }
}

/// Larger sizes are damage, not models; products of two of them cannot overflow.
const MAX_SIZE: usize = 1 << 28;
/// More layers are damage; bounds the list of expected tensors.
const MAX_LAYERS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn llama_3_2_1b() -> ModelConfig {
        ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 128_256,
            hidden_size: 2048,
            intermediate_size: 8192,
            num_hidden_layers: 16,
            num_attention_heads: 32,
            num_key_value_heads: 8,
            head_dim: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 500_000.0,
            rope_scaling: Some(RopeScaling::Llama3 {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            }),
            max_position_embeddings: 131_072,
            tie_word_embeddings: true,
            attention_bias: false,
        }
    }

    #[test]
    fn llama3_scaling_leaves_short_waves_and_divides_long_ones() {
        let factors = llama_3_2_1b().rope_factors().expect("scaled");
        assert_eq!(factors.len(), 32);
        assert_eq!(factors[0].to_bits(), 1.0_f32.to_bits());
        assert_eq!(factors[31].to_bits(), 32.0_f32.to_bits());
        assert!(factors.is_sorted());
        assert!(factors.iter().any(|&factor| factor > 1.0 && factor < 32.0));
    }

    #[test]
    fn contradictions_are_listed_together() {
        let config = ModelConfig { num_key_value_heads: 5, head_dim: 63, hidden_size: 0, ..llama_3_2_1b() };
        let problems = config.problems();
        assert_eq!(problems.len(), 3, "{problems:?}");
    }
}
