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
}
