//! GGUF names ↔ Hugging Face names, and the order of rows where the two differ.
//!
//! Source: llama.cpp's tensor naming for architecture `llama` and its converter's permutation of q and k.

use tune_quant::RowOrder;

use crate::{Architecture, ModelConfig};

/// Tensors outside the blocks: GGUF name, Hugging Face name, both without `.weight`.
const MODEL: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Tensors of a block: GGUF name after `blk.N.`, Hugging Face name after `model.layers.N.`.
const LLAMA_BLOCK: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Value of `general.architecture`.
pub fn architecture_name(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Llama => "llama",
    }
}

/// The architecture with this `general.architecture`.
pub fn architecture(name: &str) -> Option<Architecture> {
    match name {
        "llama" => Some(Architecture::Llama),
        _ => None,
    }
}

/// Supported values of `general.architecture`.
pub const ARCHITECTURES: [&str; 1] = ["llama"];

/// Hugging Face name of a GGUF tensor: `blk.0.attn_q.weight` → `model.layers.0.self_attn.q_proj.weight`.
/// `None` for what Hugging Face models do not store, such as `rope_freqs.weight`.
pub fn to_hf(architecture: Architecture, gguf: &str) -> Option<String> {
    let (stem, suffix) = split_suffix(gguf)?;
    if let Some((_, hf)) = MODEL.iter().find(|(name, _)| *name == stem) {
        return Some(format!("{hf}{suffix}"));
    }
    let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (_, hf) = block(architecture).iter().find(|(name, _)| *name == part)?;
    Some(format!("model.layers.{layer}.{hf}{suffix}"))
}

/// GGUF name of a Hugging Face tensor: the inverse of [`to_hf`].
pub fn to_gguf(architecture: Architecture, hf: &str) -> Option<String> {
    let (stem, suffix) = split_suffix(hf)?;
    if let Some((gguf, _)) = MODEL.iter().find(|(_, name)| *name == stem) {
        return Some(format!("{gguf}{suffix}"));
    }
    let (layer, part) = stem.strip_prefix("model.layers.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let (gguf, _) = block(architecture).iter().find(|(_, name)| *name == part)?;
    Some(format!("blk.{layer}.{gguf}{suffix}"))
}

/// How GGUF orders the rows of the tensor with this Hugging Face name.
///
/// Architecture `llama` rotates adjacent pairs, so its files hold q and k, weights and biases alike, with the
/// rotary halves of each head interleaved.
pub fn row_order(config: &ModelConfig, hf: &str) -> RowOrder {
    let Some((stem, _)) = split_suffix(hf) else { return RowOrder::Natural };
    match config.architecture {
        Architecture::Llama if stem.ends_with(".q_proj") || stem.ends_with(".k_proj") => {
            RowOrder::RotaryInterleaved { head_dim: config.head_dim }
        }
        Architecture::Llama => RowOrder::Natural,
    }
}

fn block(architecture: Architecture) -> &'static [(&'static str, &'static str)] {
    match architecture {
        Architecture::Llama => &LLAMA_BLOCK,
    }
}

fn split_suffix(name: &str) -> Option<(&str, &str)> {
    [".weight", ".bias"].into_iter().find_map(|suffix| Some((name.strip_suffix(suffix)?, suffix)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_both_ways() {
        for (gguf, hf) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("blk.11.attn_q.bias", "model.layers.11.self_attn.q_proj.bias"),
            ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
            ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"),
        ] {
            assert_eq!(to_hf(Architecture::Llama, gguf).as_deref(), Some(hf));
            assert_eq!(to_gguf(Architecture::Llama, hf).as_deref(), Some(gguf));
        }
        assert_eq!(to_hf(Architecture::Llama, "rope_freqs.weight"), None);
        assert_eq!(to_hf(Architecture::Llama, "blk.x.attn_q.weight"), None);
    }

    #[test]
    fn interleaving_is_the_converters() {
        // Rows 0..8 of one head of width 8 are stored in the order 0 4 1 5 2 6 3 7.
        let order = RowOrder::RotaryInterleaved { head_dim: 8 };
        let stored = (0..8).map(|row| order.stored_row(row)).collect::<Vec<_>>();
        let mut held = [0; 8];
        for (row, &place) in stored.iter().enumerate() {
            held[place] = row;
        }
        assert_eq!(held, [0, 4, 1, 5, 2, 6, 3, 7]);
    }
}
