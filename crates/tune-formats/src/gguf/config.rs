//! [`ModelConfig`] ↔ the hyper-parameter keys of GGUF metadata.

use tune_quant::BlockType;

use super::{Array, GgufFile, Metadata, Value, names};
use crate::{Architecture, FormatError, ModelConfig, RopeScaling};

/// The configuration of a GGUF model; keys that are absent have llama.cpp's defaults.
///
/// # Errors
/// An unsupported architecture, or all missing and unusable values at once.
pub(super) fn read(file: &GgufFile) -> Result<ModelConfig, FormatError> {
    let path = file.path();
    let Some(name) = file.metadata().string("general.architecture") else {
        let problems = vec!["general.architecture is missing".to_owned()];
        return Err(FormatError::Config { path: path.to_owned(), problems });
    };
    let Some(architecture) = names::architecture(name) else {
        let supported = names::ARCHITECTURES.join(", ");
        let architecture = name.to_owned();
        return Err(FormatError::UnsupportedArchitecture { path: path.to_owned(), architecture, supported });
    };
    let mut keys = Keys { metadata: file.metadata(), prefix: name, problems: Vec::new() };
    let config = hyper(&mut keys, file, architecture);
    let problems = keys.problems;
    if problems.is_empty() {
        Ok(config)
    } else {
        Err(FormatError::Config { path: path.to_owned(), problems })
    }
}

/// The metadata that describes `config`: architecture and hyper-parameters, typed as llama.cpp demands.
///
/// Rotary factors (llama 3.1 scaling) are no metadata but the tensor `rope_freqs.weight`, see
/// [`ModelConfig::rope_factors`].
pub fn hyper_parameters(config: &ModelConfig) -> Metadata {
    let prefix = names::architecture_name(config.architecture);
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", prefix.into());
    let mut set = |key: &str, value: Value| metadata.set(format!("{prefix}.{key}"), value);
    set("vocab_size", (config.vocab_size as u32).into());
    set("context_length", (config.max_position_embeddings as u32).into());
    set("embedding_length", (config.hidden_size as u32).into());
    set("block_count", (config.num_hidden_layers as u32).into());
    set("feed_forward_length", (config.intermediate_size as u32).into());
    set("attention.head_count", (config.num_attention_heads as u32).into());
    set("attention.head_count_kv", (config.num_key_value_heads as u32).into());
    set("attention.layer_norm_rms_epsilon", (config.rms_norm_eps as f32).into());
    set("rope.freq_base", (config.rope_theta as f32).into());
    set("rope.dimension_count", (config.head_dim as u32).into());
    if config.head_dim * config.num_attention_heads != config.hidden_size {
        set("attention.key_length", (config.head_dim as u32).into());
        set("attention.value_length", (config.head_dim as u32).into());
    }
    if let Some(RopeScaling::Linear { factor }) = config.rope_scaling {
        set("rope.scaling.type", "linear".into());
        set("rope.scaling.factor", (factor as f32).into());
    }
    metadata
}

fn hyper(keys: &mut Keys<'_>, file: &GgufFile, architecture: Architecture) -> ModelConfig {
    let hidden_size = keys.required("embedding_length");
    let num_hidden_layers = keys.required("block_count");
    let num_attention_heads = keys.required("attention.head_count");
    let head_dim = keys
        .optional("attention.key_length")
        .unwrap_or_else(|| hidden_size.checked_div(num_attention_heads).unwrap_or_default());
    let value_dim = keys.optional("attention.value_length").unwrap_or(head_dim);
    if value_dim != head_dim {
        keys.problem(format!(
            "attention.value_length is {value_dim}, expected {head_dim}, as attention.key_length"
        ));
    }
    let rotated = keys.optional("rope.dimension_count").unwrap_or(head_dim);
    if rotated != head_dim {
        keys.problem(format!("rope.dimension_count is {rotated}, expected the head width {head_dim}"));
    }
    if keys.optional("expert_count").is_some_and(|count| count > 0) {
        keys.problem("mixture-of-experts models are not supported".to_owned());
    }
    let rms_norm_eps = keys.float("attention.layer_norm_rms_epsilon").unwrap_or_else(|| {
        keys.problem("attention.layer_norm_rms_epsilon is missing".to_owned());
        0.0
    });

    let vocab_size = match file.tensor("token_embd.weight") {
        Some(tensor) => tensor.rows(),
        None => 0, // listed with the other missing tensors
    };
    let tokens = file.metadata().get("tokenizer.ggml.tokens").and_then(Value::as_array).map_or(0, Array::len);
    if vocab_size != 0 && tokens != vocab_size {
        keys.problem(format!(
            "tokenizer.ggml.tokens has {tokens} tokens, expected the {vocab_size} of token_embd.weight"
        ));
    }

    let config = ModelConfig {
        architecture,
        vocab_size,
        hidden_size,
        intermediate_size: keys.required("feed_forward_length"),
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: keys.optional("attention.head_count_kv").unwrap_or(num_attention_heads),
        head_dim,
        rms_norm_eps,
        rope_theta: keys.float("rope.freq_base").unwrap_or(10_000.0),
        rope_scaling: rope_scaling(keys, file, head_dim),
        max_position_embeddings: keys.required("context_length"),
        tie_word_embeddings: file.tensor("output.weight").is_none(),
        attention_bias: file.tensor("blk.0.attn_q.bias").is_some()
            || file.tensor("blk.0.attn_qkv.bias").is_some(),
    };
    if keys.problems.is_empty() {
        keys.problems.extend(config.problems());
    }
    config
}

fn rope_scaling(keys: &mut Keys<'_>, file: &GgufFile, head_dim: usize) -> Option<RopeScaling> {
    let factor = match keys.text("rope.scaling.type") {
        Some("none") => None,
        None | Some("linear") => keys.float("rope.scaling.factor").filter(|&factor| factor != 0.0),
        Some(other) => {
            keys.problem(format!("rope.scaling.type is \"{other}\", supported are none and linear"));
            None
        }
    };
    let Some(tensor) = file.tensor("rope_freqs.weight") else {
        return factor.map(|factor| RopeScaling::Linear { factor });
    };
    if tensor.block_type != BlockType::F32 || tensor.elements() != head_dim / 2 {
        let (kind, count) = (tensor.block_type.name(), tensor.elements());
        keys.problem(format!(
            "rope_freqs.weight has {count} {kind} values, expected {} F32 values",
            head_dim / 2
        ));
        return None;
    }
    let bytes = match file.data(tensor) {
        Ok(bytes) => bytes,
        Err(error) => {
            keys.problem(error.to_string());
            return None;
        }
    };
    let mut factors = vec![0.0; head_dim / 2];
    tensor.block_type.decode(&bytes, &mut factors);
    if factors.iter().any(|factor| !factor.is_finite() || *factor <= 0.0) {
        keys.problem("rope_freqs.weight holds values that are not positive".to_owned());
    }
    let linear = factor.unwrap_or(1.0) as f32;
    for value in &mut factors {
        *value *= linear;
    }
    Some(RopeScaling::Factors(factors))
}

/// Access to `{architecture}.*` keys that gathers what is wrong.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'a str,
    problems: Vec<String>,
}

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.metadata.get(&format!("{}.{key}", self.prefix))
    }

    fn text(&self, key: &str) -> Option<&'a str> {
        self.get(key)?.as_str()
    }

    fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// A count, or 0 and a problem.
    fn required(&mut self, key: &str) -> usize {
        self.optional(key).unwrap_or_else(|| {
            if self.get(key).is_none() {
                self.problem(format!("{}.{key} is missing", self.prefix));
            }
            0
        })
    }

    /// A count; one per layer is accepted where all are equal.
    fn optional(&mut self, key: &str) -> Option<usize> {
        let value = self.get(key)?;
        let count = match value {
            Value::Array(array) => match array.as_integers()?.as_slice() {
                [first, rest @ ..] if rest.iter().all(|other| other == first) => u64::try_from(*first).ok(),
                _ => {
                    self.problem(format!(
                        "{}.{key} differs between layers, which is not supported",
                        self.prefix
                    ));
                    return None;
                }
            },
            value => value.as_unsigned(),
        };
        let usable = count.and_then(|count| u32::try_from(count).ok());
        if usable.is_none() {
            self.problem(format!("{}.{key} is {value:?}, expected a u32", self.prefix));
        }
        usable.map(|count| count as usize)
    }

    fn float(&mut self, key: &str) -> Option<f64> {
        let value = self.get(key)?;
        let float = value.as_float().filter(|float| float.is_finite());
        if float.is_none() {
            self.problem(format!("{}.{key} is {value:?}, expected an f32", self.prefix));
        }
        // Through the shortest decimal text, so that the f32 for 1e-5 is read as 1e-5.
        float.map(|float| (float as f32).to_string().parse().unwrap_or(float))
    }
}
