//! Bytes of the frozen weights: from the header of a file, or from dimensions alone.

use serde::Serialize;
use tune_formats::{BaseModel, FormatError, Source};
use tune_quant::BlockType;
use tune_recipe::{Method, Quantization};

use crate::Shape;

/// Bytes of the frozen weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize)]
pub struct WeightBytes {
    /// Held through the run.
    pub held: u64,
    /// The tokenizer is read from a `tokenizer.json`, not from a GGUF file.
    pub has_json_tokenizer: bool,
    /// Weights, tied ones once.
    pub parameters: u64,
    /// Bits of a weight of the block linears, scales included, rounded down.
    pub linear_bits: u32,
}

impl WeightBytes {
    /// Mean width of a held weight.
    pub fn bits_per_weight(&self) -> f64 {
        self.held as f64 * 8.0 / self.parameters.max(1) as f64
    }
}

/// The weights of an opened model as a run with `quantization` holds them. Exact: block linears, embedding and
/// head by their stored type, norms and biases as 32-bit numbers.
///
/// # Errors
/// A tensor that cannot be read.
pub fn from_model(base: &BaseModel, quantization: Quantization) -> Result<WeightBytes, FormatError> {
    let mut sum = WeightBytes {
        has_json_tokenizer: matches!(base.source, Source::HfDirectory(_)),
        ..WeightBytes::default()
    };
    let (mut linear_bytes, mut linear_elements) = (0, 0);
    for name in base.weights.names() {
        let shape = base.weights.shape(&name).unwrap_or_default();
        let elements = shape.iter().map(|n| *n as u64).product::<u64>();
        if shape.len() != 2 {
            sum.parameters += elements;
            sum.held += 4 * elements;
            continue;
        }
        if name == "lm_head.weight" && base.config.tie_word_embeddings {
            continue;
        }
        let matrix = base.weights.matrix(&name)?;
        let stored = matrix.stored_bytes() as u64;
        let is_16_bit = stored >= 2 * elements;
        let to_nf4 = quantization == Quantization::Nf4 && is_16_bit && is_block_linear(&name);
        let held = if to_nf4 { nf4_bytes(elements) } else { stored };
        sum.held += held;
        if is_block_linear(&name) {
            linear_bytes += held;
            linear_elements += elements;
        }
        sum.parameters += elements;
    }
    sum.linear_bits = (8 * linear_bytes / linear_elements.max(1)) as u32;
    Ok(sum)
}

/// What the weights of a model of this shape take when no file is at hand: NF4 block linears under QLoRA, else 16
/// bits; embedding and head in 16 bits, norms in 32.
pub fn from_shape(shape: &Shape, method: Method) -> WeightBytes {
    in_bits(shape, if method == Method::Qlora { 4 } else { 16 })
}

/// The same with block linears in NF4, in `Q8_0` or in 16 bits.
pub fn in_bits(shape: &Shape, bits: u32) -> WeightBytes {
    let linears = shape.linear_parameters();
    let sixteen = |elements: u64| elements.saturating_mul(BlockType::BF16.block_bytes() as u64);
    let linear_bytes = match bits {
        0..=5 => nf4_bytes(linears),
        6..=9 => {
            let q8 = BlockType::Q8_0;
            (linears / q8.block_len() as u64).saturating_mul(q8.block_bytes() as u64)
        }
        _ => sixteen(linears),
    };
    let other =
        sixteen(shape.embedding_parameters()).saturating_add(shape.vector_parameters().saturating_mul(4));
    WeightBytes {
        held: linear_bytes.saturating_add(other),
        has_json_tokenizer: false,
        parameters: shape.parameters(),
        linear_bits: (u128::from(linear_bytes) * 8 / u128::from(linears.max(1))) as u32,
    }
}

/// NF4 with double quantisation: half a byte a weight, one byte per 64, four bytes per 64 · 256, and one offset.
pub(crate) fn nf4_bytes(elements: u64) -> u64 {
    let blocks = elements.div_ceil(64);
    elements.div_ceil(2).saturating_add(blocks).saturating_add(4 * (blocks.div_ceil(256) + 1))
}

fn is_block_linear(name: &str) -> bool {
    name.starts_with("model.layers.") && name.ends_with("_proj.weight")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nf4_bytes_are_those_of_the_codec() {
        for elements in [64usize, 128, 64 * 256, 64 * 256 + 64, 64 * 1000] {
            let stored = tune_quant::Nf4::quantize(&vec![0.5; elements]).stored_bytes();
            assert_eq!(nf4_bytes(elements as u64), stored as u64, "{elements}");
        }
    }
}
