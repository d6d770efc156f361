//! Names in Hugging Face checkpoints that differ from the canonical ones.

/// The canonical name of a tensor of a checkpoint, or `None` for tensors that hold no weights (masks and
/// rotary tables that old versions of transformers saved).
///
/// Checkpoints saved from a bare `LlamaModel` lack the prefix `model.`.
pub(super) fn canonical(name: &str) -> Option<String> {
    let is_table = [".rotary_emb.inv_freq", ".masked_bias", ".attention.bias"];
    if is_table.iter().any(|table| name.ends_with(table)) {
        return None;
    }
    let bare = ["layers.", "embed_tokens.", "norm."];
    if bare.iter().any(|prefix| name.starts_with(prefix)) {
        return Some(format!("model.{name}"));
    }
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_models_and_tables() {
        let canonical = |name| canonical(name);
        assert_eq!(
            canonical("layers.0.mlp.up_proj.weight").as_deref(),
            Some("model.layers.0.mlp.up_proj.weight")
        );
        assert_eq!(canonical("lm_head.weight").as_deref(), Some("lm_head.weight"));
        assert_eq!(canonical("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
    }
}
