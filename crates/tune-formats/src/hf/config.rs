//! `config.json` of transformers, in its old and its new spelling.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::read_json;
use crate::{Architecture, FormatError, ModelConfig, RopeScaling};

/// Values of `model_type` that can be used.
const MODEL_TYPES: [&str; 2] = ["llama", "mistral"];

/// A configuration and what the weights still have to tell.
pub(super) struct HfConfig {
    pub(super) model: ModelConfig,
    /// `tie_word_embeddings` was given.
    pub(super) says_whether_tied: bool,
}

/// Special token ids in `config.json` or `generation_config.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TokenIds {
    #[serde(rename = "bos_token_id")]
    pub(super) bos: Option<Ids>,
    #[serde(rename = "eos_token_id")]
    pub(super) eos: Option<Ids>,
    #[serde(rename = "pad_token_id")]
    pub(super) pad: Option<Ids>,
}

/// One id or several. Negative ones, which some files use for "none", are kept apart from valid ones on access.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Ids {
    One(i64),
    Several(Vec<i64>),
}

impl Ids {
    pub(super) fn list(&self) -> Vec<u32> {
        let ids = match self {
            Self::One(id) => std::slice::from_ref(id),
            Self::Several(ids) => ids,
        };
        ids.iter().filter_map(|&id| id.try_into().ok()).collect()
    }
}

/// The keys of `config.json` that matter. Absent ones have the defaults of transformers.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
    max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    sliding_window: Option<usize>,
    quantization_config: Option<Value>,
    #[serde(flatten)]
    ids: TokenIds,
}

/// `rope_scaling` up to transformers 4, `rope_parameters` since 5.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Rope {
    #[serde(rename = "rope_type")]
    kind: Option<String>,
    /// Older than `rope_type`; many files have both.
    #[serde(rename = "type")]
    old_kind: Option<String>,
    #[serde(rename = "rope_theta")]
    theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    partial_rotary_factor: Option<f64>,
}

/// Reads `config.json`.
///
/// # Errors
/// An unsupported `model_type`, or all missing and unusable values at once.
pub(super) fn read(path: &Path) -> Result<(HfConfig, TokenIds), FormatError> {
    let raw: Raw = match read_json(path)? {
        Some(raw) => raw,
        None => return Err(FormatError::read(path, std::io::ErrorKind::NotFound.into())),
    };
    let model_type = raw.model_type.as_deref().unwrap_or("(no model_type)");
    if !MODEL_TYPES.contains(&model_type) {
        return Err(FormatError::UnsupportedArchitecture {
            path: path.to_owned(),
            architecture: model_type.to_owned(),
            supported: MODEL_TYPES.join(", "),
        });
    }
    let mut problems = unsupported(&raw);
    let model = model(&raw, &mut problems);
    if problems.is_empty() {
        problems = model.problems();
    }
    if problems.is_empty() {
        Ok((HfConfig { model, says_whether_tied: raw.tie_word_embeddings.is_some() }, raw.ids))
    } else {
        Err(FormatError::Config { path: path.to_owned(), problems })
    }
}

fn model(raw: &Raw, problems: &mut Vec<String>) -> ModelConfig {
    let mut required = |key: &str, value: Option<usize>| {
        if value.is_none() {
            problems.push(format!("{key} is missing"));
        }
        value.unwrap_or_default()
    };
    let vocab_size = required("vocab_size", raw.vocab_size);
    let hidden_size = required("hidden_size", raw.hidden_size);
    let intermediate_size = required("intermediate_size", raw.intermediate_size);
    let num_hidden_layers = required("num_hidden_layers", raw.num_hidden_layers);
    let num_attention_heads = required("num_attention_heads", raw.num_attention_heads);
    let max_position_embeddings = required("max_position_embeddings", raw.max_position_embeddings);
    let head_dim = raw.head_dim.or(hidden_size.checked_div(num_attention_heads)).unwrap_or_default();
    let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: raw.num_key_value_heads.unwrap_or(num_attention_heads),
        head_dim,
        rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6),
        rope_theta: rope.and_then(|rope| rope.theta).or(raw.rope_theta).unwrap_or(10_000.0),
        rope_scaling: rope.and_then(|rope| scaling(rope, problems)),
        max_position_embeddings,
        tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
        attention_bias: raw.attention_bias.unwrap_or(false),
    }
}

fn scaling(rope: &Rope, problems: &mut Vec<String>) -> Option<RopeScaling> {
    if rope.partial_rotary_factor.is_some_and(|factor| (factor - 1.0).abs() > f64::EPSILON) {
        problems.push("partial_rotary_factor other than 1 is not supported".to_owned());
    }
    let kind = rope.kind.as_deref().or(rope.old_kind.as_deref()).unwrap_or("default");
    let scaling = match kind {
        "default" => return None,
        "linear" => RopeScaling::Linear { factor: rope.factor.unwrap_or(f64::NAN) },
        "llama3" => RopeScaling::Llama3 {
            factor: rope.factor.unwrap_or(8.0),
            low_freq_factor: rope.low_freq_factor.unwrap_or(1.0),
            high_freq_factor: rope.high_freq_factor.unwrap_or(4.0),
            original_max_position_embeddings: rope.original_max_position_embeddings.unwrap_or(8192),
        },
        _ => {
            problems.push(format!(
                "rope scaling \"{kind}\" is not supported, expected default, linear or llama3"
            ));
            return None;
        }
    };
    let usable = match scaling {
        RopeScaling::Linear { factor } => factor > 0.0,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, .. } => {
            factor > 0.0 && low_freq_factor > 0.0 && high_freq_factor > low_freq_factor
        }
        RopeScaling::Factors(_) => true,
    };
    if !usable {
        problems.push(format!("rope scaling has unusable values: {scaling:?}"));
    }
    Some(scaling)
}

/// What the configuration asks for and the implementation does not have.
fn unsupported(raw: &Raw) -> Vec<String> {
    let mut problems = Vec::new();
    if let Some(act) = raw.hidden_act.as_deref().filter(|act| !matches!(*act, "silu" | "swish")) {
        problems.push(format!("hidden_act is \"{act}\", expected \"silu\""));
    }
    if raw.mlp_bias == Some(true) {
        problems.push("mlp_bias is true, which is not supported".to_owned());
    }
    if let Some(window) = raw.sliding_window
        && raw.max_position_embeddings.is_some_and(|context| window < context)
    {
        problems.push(format!("sliding_window is {window}: attention with a window is not supported"));
    }
    if let Some(quantization) = &raw.quantization_config {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        problems.push(format!(
            "the checkpoint is quantised (quant_method {method}); use the unquantised model or a GGUF of it"
        ));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &Value) -> Result<ModelConfig, FormatError> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("config.json");
        std::fs::write(&path, json.to_string()).expect("written");
        read(&path).map(|(config, _)| config.model)
    }

    fn base() -> Value {
        serde_json::json!({
            "model_type": "llama", "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "tie_word_embeddings": true,
        })
    }

    #[test]
    fn old_and_new_rope_fields_mean_the_same() {
        let scaling = serde_json::json!({
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        });
        let mut old = base();
        old["rope_theta"] = 500_000.0.into();
        old["rope_scaling"] = scaling.clone();
        let mut new = base();
        new["rope_parameters"] = scaling;
        new["rope_parameters"]["rope_theta"] = 500_000.0.into();
        let old = parse(&old).expect("old");
        assert_eq!(old, parse(&new).expect("new"));
        assert_eq!(old.rope_theta.to_bits(), 500_000.0_f64.to_bits());
        assert!(matches!(
            old.rope_scaling,
            Some(RopeScaling::Llama3 { original_max_position_embeddings: 8192, .. })
        ));
    }

    #[test]
    fn both_spellings_of_the_kind_may_be_there() {
        let mut config = base();
        config["rope_scaling"] = serde_json::json!({ "type": "linear", "rope_type": "linear", "factor": 4 });
        assert_eq!(parse(&config).expect("both").rope_scaling, Some(RopeScaling::Linear { factor: 4.0 }));
        config["rope_scaling"] = serde_json::json!({ "type": "linear" });
        assert!(parse(&config).expect_err("no factor").to_string().contains("unusable"));
    }

    #[test]
    fn everything_unsupported_is_listed() {
        let mut config = base();
        config["hidden_act"] = "gelu".into();
        config["sliding_window"] = 4096.into();
        config["quantization_config"] = serde_json::json!({ "quant_method": "bitsandbytes" });
        config["rope_scaling"] = serde_json::json!({ "type": "yarn", "factor": 4.0 });
        let text = parse(&config).expect_err("unsupported").to_string();
        for part in ["gelu", "sliding_window", "bitsandbytes", "yarn"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let mut config = base();
        let object = config.as_object_mut().expect("object");
        for key in ["num_key_value_heads", "head_dim", "rms_norm_eps"] {
            object.remove(key);
        }
        let config = parse(&config).expect("defaults");
        assert_eq!((config.num_key_value_heads, config.head_dim), (32, 64));
        assert_eq!(config.rope_theta.to_bits(), 10_000.0_f64.to_bits());
        assert_eq!(config.rms_norm_eps.to_bits(), 1e-6_f64.to_bits());
    }

    #[test]
    fn other_families_are_refused_by_name() {
        let error = parse(&serde_json::json!({ "model_type": "qwen3" })).expect_err("unsupported");
        assert!(error.to_string().contains("\"qwen3\""), "{error}");
    }
}
