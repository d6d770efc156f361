//! Access to weights by Hugging Face name.

use std::collections::BTreeMap;

use tune_quant::StoredMatrix;

use crate::{FormatError, ModelConfig, TensorProblem};

/// Weights by Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), in the Hugging Face layout,
/// memory-mapped and never copied as a whole.
pub trait Weights: Send + Sync {
    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// Shape in Hugging Face (row-major) order, or `None` when there is no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// A two-dimensional weight in its stored form.
    fn matrix(&self, name: &str) -> Result<StoredMatrix, FormatError>;

    /// A one-dimensional weight (norms, biases), decoded.
    fn vector(&self, name: &str) -> Result<Vec<f32>, FormatError>;
}

/// The tensors of a model, Hugging Face name and shape, in the order of the forward pass.
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let d_model = config.hidden_size;
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocab_size, d_model])];
    for layer in 0..config.num_hidden_layers {
        let block = format!("model.layers.{layer}");
        tensors.push((format!("{block}.input_layernorm.weight"), vec![d_model]));
        tensors.push((format!("{block}.post_attention_layernorm.weight"), vec![d_model]));
        for (name, d_out, d_in) in config.block_linears() {
            let path = ModelConfig::linear_path(layer, name);
            tensors.push((format!("{path}.weight"), vec![d_out, d_in]));
            if config.attention_bias && matches!(name, "q_proj" | "k_proj" | "v_proj") {
                tensors.push((format!("{path}.bias"), vec![d_out]));
            }
        }
    }
    tensors.push(("model.norm.weight".to_owned(), vec![d_model]));
    if !config.tie_word_embeddings {
        tensors.push(("lm_head.weight".to_owned(), vec![config.vocab_size, d_model]));
    }
    tensors
}

/// Every tensor that is missing, of the wrong shape, or inside a block without being part of the architecture.
///
/// Unknown tensors outside the blocks are ignored: they cannot change what the blocks compute.
pub(crate) fn check<'a>(
    config: &ModelConfig,
    found: impl Iterator<Item = (&'a str, &'a [usize])>,
) -> Vec<TensorProblem> {
    let mut found = found.collect::<BTreeMap<_, _>>();
    let mut problems = Vec::new();
    for (name, shape) in expected_tensors(config) {
        let got = found.remove(name.as_str());
        if got != Some(shape.as_slice()) {
            problems.push(TensorProblem { name, expected: Some(shape), found: got.map(<[usize]>::to_vec) });
        }
    }
    let unexpected = found.into_iter().filter(|(name, _)| name.starts_with("model.layers."));
    problems.extend(unexpected.map(|(name, shape)| TensorProblem {
        name: name.to_owned(),
        expected: None,
        found: Some(shape.to_vec()),
    }));
    problems
}
