//! The size of an export before there is one: from dimensions and types alone.

use tune_formats::Architecture;
use tune_formats::gguf::names;

use crate::FileType;
use crate::file_type::ModelShape;

/// Dimensions of a model with a gated MLP.
#[derive(Clone, Copy, Debug)]
pub struct Dimensions {
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// The output head is the embedding.
    pub tied: bool,
}

impl Dimensions {
    /// Bytes of the tensors of a GGUF file of this type, whose blocks have these linear layers (PEFT name, d_out,
    /// d_in) and whose norms and biases are so many numbers. Metadata come on top.
    pub fn gguf_bytes(&self, file_type: FileType, linears: &[(&str, u64, u64)], vectors: u64) -> u64 {
        let model = ModelShape::of(
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.tied,
        );
        let bytes = |name: &str, rows: u64, cols: u64| {
            let block = file_type.of_tensor(name, &[rows as usize, cols as usize], model);
            let blocks = rows.saturating_mul(cols) / block.block_len().max(1) as u64;
            blocks.saturating_mul(block.block_bytes() as u64)
        };
        let (rows, cols) = (self.vocab_size as u64, self.hidden_size as u64);
        let mut sum = vectors.saturating_mul(4).saturating_add(bytes("token_embd.weight", rows, cols));
        if !self.tied {
            sum = sum.saturating_add(bytes("output.weight", rows, cols));
        }
        for layer in 0..self.num_hidden_layers {
            for (linear, d_out, d_in) in linears {
                let group = if linear.starts_with(['q', 'k', 'v', 'o']) { "self_attn" } else { "mlp" };
                let hf = format!("model.layers.{layer}.{group}.{linear}.weight");
                let name = names::to_gguf(Architecture::Llama, &hf).unwrap_or_default();
                sum = sum.saturating_add(bytes(&name, *d_out, *d_in));
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINEARS: [(&str, u64, u64); 7] = [
        ("q_proj", 576, 576),
        ("k_proj", 192, 576),
        ("v_proj", 192, 576),
        ("o_proj", 576, 576),
        ("gate_proj", 1536, 576),
        ("up_proj", 1536, 576),
        ("down_proj", 576, 1536),
    ];

    /// SmolLM2-135M: 134,515,008 parameters, of which 35,136 are norms.
    #[test]
    fn bytes_are_those_of_the_types() {
        let smollm2 = Dimensions {
            num_hidden_layers: 30,
            num_attention_heads: 9,
            num_key_value_heads: 3,
            vocab_size: 49152,
            hidden_size: 576,
            tied: true,
        };
        let matrices = 134_515_008 - 35_136;
        let bytes = |file_type| smollm2.gguf_bytes(file_type, &LINEARS, 35_136);
        assert_eq!(bytes(FileType::F16), 2 * matrices + 4 * 35_136);
        assert_eq!(bytes(FileType::F32), 4 * (matrices + 35_136));
        assert_eq!(bytes(FileType::Q8_0), matrices / 32 * 34 + 4 * 35_136);
        // Rows of 576 are no whole K blocks: Q4_K_M holds them in Q5_0 and the embedding in Q8_0.
        assert!(
            bytes(FileType::Q4_K_M) > matrices / 32 * 22 && bytes(FileType::Q4_K_M) < bytes(FileType::Q8_0)
        );
        let untied = Dimensions { tied: false, ..smollm2 };
        assert_eq!(
            untied.gguf_bytes(FileType::F16, &LINEARS, 35_136) - bytes(FileType::F16),
            2 * 49152 * 576
        );
    }
}
