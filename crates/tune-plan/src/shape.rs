//! The dimensions of a model that decide its memory.

use serde::Serialize;
use tune_formats::ModelConfig;
use tune_recipe::{Layers, TargetModules};

/// Dimensions of a decoder-only transformer with a gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Rows of the embedding.
    pub vocab_size: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Width of the gated MLP.
    pub intermediate_size: u64,
    /// Blocks.
    pub num_hidden_layers: u64,
    /// Query heads.
    pub num_attention_heads: u64,
    /// Key and value heads.
    pub num_key_value_heads: u64,
    /// Width of one head.
    pub head_dim: u64,
    /// The output head is the embedding.
    pub tied: bool,
    /// q, k and v have a bias.
    pub attention_bias: bool,
    /// q and k of each head are normalised.
    pub qk_norm: bool,
}

impl From<&ModelConfig> for Shape {
    fn from(config: &ModelConfig) -> Self {
        Self {
            vocab_size: config.vocab_size as u64,
            hidden_size: config.hidden_size as u64,
            intermediate_size: config.intermediate_size as u64,
            num_hidden_layers: config.num_hidden_layers as u64,
            num_attention_heads: config.num_attention_heads as u64,
            num_key_value_heads: config.num_key_value_heads as u64,
            head_dim: config.head_dim as u64,
            tied: config.tie_word_embeddings,
            attention_bias: config.attention_bias,
            qk_norm: false,
        }
    }
}

impl Shape {
    /// Width of all query heads.
    pub fn q(&self) -> u64 {
        self.num_attention_heads.saturating_mul(self.head_dim)
    }

    /// Width of all key heads, and of all value heads.
    pub fn kv(&self) -> u64 {
        self.num_key_value_heads.saturating_mul(self.head_dim)
    }

    /// The linear layers of one block: PEFT name, d_out, d_in.
    pub fn block_linears(&self) -> [(&'static str, u64, u64); 7] {
        let (d, f, q, kv) = (self.hidden_size, self.intermediate_size, self.q(), self.kv());
        [
            ("q_proj", q, d),
            ("k_proj", kv, d),
            ("v_proj", kv, d),
            ("o_proj", d, q),
            ("gate_proj", f, d),
            ("up_proj", f, d),
            ("down_proj", d, f),
        ]
    }

    /// Weights of all blocks' linear layers.
    pub fn linear_parameters(&self) -> u64 {
        let linears = self.block_linears();
        sum(linears.iter().map(|(_, d_out, d_in)| d_out.saturating_mul(*d_in)))
            .saturating_mul(self.num_hidden_layers)
    }

    /// Weights of the embedding and, when it is a matrix of its own, of the output head.
    pub fn embedding_parameters(&self) -> u64 {
        let matrix = self.vocab_size.saturating_mul(self.hidden_size);
        matrix.saturating_mul(if self.tied { 1 } else { 2 })
    }

    /// Norms and biases.
    pub fn vector_parameters(&self) -> u64 {
        let head_norms = if self.qk_norm { self.head_dim.saturating_mul(2) } else { 0 };
        let biases = if self.attention_bias { [self.q(), self.kv(), self.kv()] } else { [0; 3] };
        let block = [self.hidden_size, self.hidden_size, head_norms].into_iter().chain(biases);
        sum(block).saturating_mul(self.num_hidden_layers).saturating_add(self.hidden_size)
    }

    /// All weights, tied ones once.
    pub fn parameters(&self) -> u64 {
        sum([self.linear_parameters(), self.embedding_parameters(), self.vector_parameters()])
    }

    /// Adapter parameters per rank: Σ (d_in + d_out) over the targets.
    pub fn adapter_parameters_per_rank(&self, targets: &TargetModules, layers: &Layers) -> u64 {
        let linears = self.block_linears();
        let adapted = linears.iter().filter(|(name, ..)| targets.contains(name));
        let block = sum(adapted.map(|(_, d_out, d_in)| d_out.saturating_add(*d_in)));
        block.saturating_mul(self.adapted_layers(layers))
    }

    /// Blocks with adapters.
    pub fn adapted_layers(&self, layers: &Layers) -> u64 {
        match layers {
            Layers::All => self.num_hidden_layers,
            Layers::Only(layers) => {
                layers.iter().filter(|layer| (**layer as u64) < self.num_hidden_layers).count() as u64
            }
        }
    }

    /// Blocks from the lowest adapted one upwards: those that a backward pass goes through.
    pub fn traversed_layers(&self, layers: &Layers) -> u64 {
        let lowest = match layers {
            Layers::All => 0,
            Layers::Only(layers) => {
                layers.iter().min().map_or(self.num_hidden_layers, |lowest| *lowest as u64)
            }
        };
        self.num_hidden_layers.saturating_sub(lowest)
    }
}

/// A sum that stops at the largest number: dimensions come from files.
fn sum(parts: impl IntoIterator<Item = u64>) -> u64 {
    parts.into_iter().fold(0, u64::saturating_add)
}
