//! PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Keys of the tensors: `base_model.model.{module path}.lora_A.weight` `[r, d_in]` and `….lora_B.weight`
//! `[d_out, r]`. What is written is the subset that PEFT, vLLM and llama.cpp's converter all read: one alpha, linear
//! layers only, no biases, no whole modules, and one rank unless the adapter came with several. The provenance lies in
//! the metadata of the safetensors file, where other readers ignore it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use tune_quant::{BlockType, RowOrder, StoredMatrix};

pub use crate::factor::Factor;
use crate::provenance::Provenance;
use crate::safetensors::{SafetensorsFiles, SafetensorsWriter, TensorSpec};
use crate::{BaseModel, FormatError, TensorProblem, atomic};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";
/// What PEFT puts before the path of a module.
const PREFIX: &str = "base_model.model.";

/// A LoRA adapter: how it is applied, and its matrices.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// How it is applied.
    pub config: AdapterConfig,
    /// The matrices by module path, e.g. `model.layers.0.self_attn.q_proj`.
    pub layers: BTreeMap<String, LoraWeights>,
}

/// The hyper-parameters of a LoRA adapter, under their PEFT names.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Name or path of the base, as its user gave it.
    pub base_model_name_or_path: Option<String>,
    /// What it was trained on. Only adapters of `tune` have it.
    pub provenance: Provenance,
    /// Rank; layers may have another one of their own.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Dropout on the input of A during training.
    pub lora_dropout: f64,
    /// Last parts of the adapted module paths, e.g. `q_proj`.
    pub target_modules: Vec<String>,
    /// The scale is `lora_alpha / √r` instead of `lora_alpha / r`.
    pub use_rslora: bool,
    /// The adapted blocks; `None` for all.
    pub layers_to_transform: Option<Vec<usize>>,
}

/// The two factors of one update, `ΔW = scale · B · A`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraWeights {
    /// Rank.
    pub r: usize,
    /// Input features.
    pub d_in: usize,
    /// Output features.
    pub d_out: usize,
    /// A, `[r, d_in]`, row-major.
    pub a: Factor,
    /// B, `[d_out, r]`, row-major.
    pub b: Factor,
}

impl Default for AdapterConfig {
    /// PEFT's defaults.
    fn default() -> Self {
        Self {
            base_model_name_or_path: None,
            provenance: Provenance::default(),
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: Vec::new(),
            use_rslora: false,
            layers_to_transform: None,
        }
    }
}

impl AdapterConfig {
    /// The factor of the update: `lora_alpha / r`, or `lora_alpha / √r` with rsLoRA.
    pub fn scale(&self) -> f64 {
        self.scale_of(self.r)
    }

    /// The factor of the update of a layer with rank `r`.
    pub fn scale_of(&self, r: usize) -> f64 {
        let r = r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }
}

impl Adapter {
    /// Checks that every matrix fits the layer of `base` that it adapts.
    ///
    /// # Errors
    /// [`FormatError::OtherBase`] with every mismatch.
    pub fn check_base(&self, base: &BaseModel) -> Result<(), FormatError> {
        let mut problems = Vec::new();
        for (path, lora) in &self.layers {
            let shape = base.weights.shape(&format!("{path}.weight"));
            let (want_a, want_b) = match shape.as_deref() {
                Some(&[d_out, d_in]) => (Some(vec![lora.r, d_in]), Some(vec![d_out, lora.r])),
                _ => (None, None),
            };
            let found =
                [("lora_A", want_a, vec![lora.r, lora.d_in]), ("lora_B", want_b, vec![lora.d_out, lora.r])];
            problems.extend(
                found.into_iter().filter(|(_, expected, found)| expected.as_ref() != Some(found)).map(
                    |(part, expected, found)| TensorProblem {
                        name: format!("{path}.{part}"),
                        expected,
                        found: Some(found),
                    },
                ),
            );
        }
        if problems.is_empty() {
            return Ok(());
        }
        let help = match &self.config.base_model_name_or_path {
            Some(name) => format!("pass --base {name}"),
            None => "pass --base with the model that the adapter was trained on".to_owned(),
        };
        Err(FormatError::OtherBase { help, problems })
    }

    /// The adapter was trained on exactly these weights, as far as [`BaseModel::digest`] can tell; `None` when it
    /// does not say. Another quantisation of the same model gives `false` and still works.
    ///
    /// # Errors
    /// A base that cannot be read.
    pub fn trained_on(&self, base: &BaseModel) -> Result<Option<bool>, FormatError> {
        match &self.config.provenance.base_digest {
            Some(digest) => Ok(Some(*digest == base.digest()?)),
            None => Ok(None),
        }
    }

    /// Refuses a base with other weights than those trained on, also where its shapes fit.
    ///
    /// # Errors
    /// [`FormatError::OtherWeights`] with both digests; a base that cannot be read.
    pub fn require_trained_base(&self, base: &BaseModel) -> Result<(), FormatError> {
        let Some(expected) = &self.config.provenance.base_digest else { return Ok(()) };
        let found = base.digest()?;
        if found == *expected {
            return Ok(());
        }
        let named = self.config.base_model_name_or_path.as_deref();
        Err(FormatError::OtherWeights {
            what: if self.layers.is_empty() { "run" } else { "adapter" },
            base: base.path.clone(),
            expected: expected.clone(),
            found,
            trained_over: named.unwrap_or("a base that it does not name").to_owned(),
        })
    }
}

/// Reads an adapter folder.
///
/// # Errors
/// Missing files, a kind of adapter other than plain LoRA on linear layers, or tensors that do not fit the
/// configuration: all problems at once.
pub fn read(directory: &Path) -> Result<Adapter, FormatError> {
    let unusable = |problems: Vec<String>, help: &str| FormatError::Adapter {
        path: directory.to_owned(),
        problems,
        help: help.to_owned(),
    };
    let config_path = directory.join(CONFIG);
    let weights_path = directory.join(WEIGHTS);
    if !config_path.exists() {
        let problems = vec![format!("there is no {CONFIG}")];
        return Err(unusable(
            problems,
            "pass the folder that holds adapter_config.json, such as RUN/adapter",
        ));
    }
    let text = std::fs::read(&config_path).map_err(|error| FormatError::read(&config_path, error))?;
    let raw: RawConfig = serde_json::from_slice(&text)
        .map_err(|source| FormatError::Json { path: config_path.clone(), source })?;
    if !weights_path.exists() && directory.join(PICKLE).exists() {
        let problems = vec![format!("{PICKLE} is a Python pickle, which can run code when it is read")];
        return Err(unusable(problems, "save the adapter again with safe_serialization=True"));
    }
    let files = SafetensorsFiles::open(&weights_path)?;

    let mut problems = raw.unsupported();
    let mut layers = BTreeMap::<String, Factors>::new();
    for name in files.tensors().keys() {
        let path = name.strip_prefix(PREFIX).and_then(|key| {
            let a = key.strip_suffix(".lora_A.weight").map(|path| (path, true));
            a.or_else(|| key.strip_suffix(".lora_B.weight").map(|path| (path, false)))
        });
        match path {
            Some((path, true)) => layers.entry(path.to_owned()).or_default().a = Some(name.clone()),
            Some((path, false)) => layers.entry(path.to_owned()).or_default().b = Some(name.clone()),
            None => problems.push(format!("tensor {name} is not a factor of a linear layer")),
        }
    }
    if layers.is_empty() {
        problems.push(format!("{WEIGHTS} has no lora_A and lora_B tensors"));
    }
    let mut loras = BTreeMap::new();
    for (path, factors) in layers {
        let r = of_pattern(&raw.rank_pattern, &path).map_or(raw.r, |r| r as usize);
        match factors.load(&files, &path, r) {
            Ok(mut lora) => {
                if let Some(alpha) = of_pattern(&raw.alpha_pattern, &path)
                    && raw.lora_alpha != 0.0
                {
                    // one alpha for all: the rest of a layer's own goes into its matrix
                    let factor = (alpha / raw.lora_alpha) as f32;
                    lora.b.to_mut().iter_mut().for_each(|value| *value *= factor);
                }
                loras.insert(path, lora);
            }
            Err(problem) => problems.push(problem),
        }
    }
    if !problems.is_empty() {
        return Err(unusable(problems, "supported are LoRA adapters on linear layers, without biases"));
    }
    let target_modules = match raw.target_modules {
        Some(Targets::List(names)) => names,
        // A regular expression or "all-linear": what it matched is in the file.
        Some(Targets::Pattern(_)) | None => last_parts(loras.keys()),
    };
    let config = AdapterConfig {
        base_model_name_or_path: raw.base_model_name_or_path,
        provenance: Provenance::read(|key| files.metadata().get(key).cloned()),
        r: raw.r,
        lora_alpha: raw.lora_alpha,
        lora_dropout: raw.lora_dropout,
        target_modules,
        use_rslora: raw.use_rslora,
        layers_to_transform: raw.layers_to_transform.map(Layers::list),
    };
    Ok(Adapter { config, layers: loras })
}

/// Writes an adapter folder; other files in it are kept.
///
/// Each of the two files is replaced atomically, the matrices first. Their shapes tell a rank of an older
/// configuration apart, should the process end in between.
///
/// # Errors
/// Factors that do not fit the configuration, or files that cannot be written.
pub fn write(directory: &Path, adapter: &Adapter) -> Result<(), FormatError> {
    let weights_path = directory.join(WEIGHTS);
    let config = &adapter.config;
    for (path, lora) in &adapter.layers {
        let fits = lora.r > 0 && lora.a.len() == lora.r * lora.d_in && lora.b.len() == lora.d_out * lora.r;
        if !fits {
            let reason = format!("{path} has rank {}, {} and {} values", lora.r, lora.a.len(), lora.b.len());
            return Err(FormatError::unwritable(&weights_path, reason));
        }
    }

    let metadata = config.provenance.safetensors_metadata();
    let factors = adapter.layers.iter().flat_map(|(path, lora)| {
        let (a, b) = (format!("{PREFIX}{path}.lora_A.weight"), format!("{PREFIX}{path}.lora_B.weight"));
        [(a, [lora.r, lora.d_in], &lora.a), (b, [lora.d_out, lora.r], &lora.b)]
    });
    let spec = |(name, shape, _): (String, [usize; 2], _)| TensorSpec {
        name,
        shape: shape.to_vec(),
        block_type: BlockType::F32,
    };
    let specs = factors.clone().map(spec).collect::<Vec<_>>();
    let mut writer = SafetensorsWriter::create(&weights_path, &metadata, &specs)?;
    for (name, _, values) in factors {
        let bytes = values.values().iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
        writer.write(&name, &bytes)?;
    }
    writer.finish()?;
    atomic::write(&directory.join(CONFIG), format!("{:#}\n", config_json(adapter)).as_bytes())
}

/// `adapter_config.json`, keys sorted as PEFT sorts them.
fn config_json(adapter: &Adapter) -> Value {
    let config = &adapter.config;
    let others = adapter.layers.iter().filter(|(_, lora)| lora.r != config.r);
    let rank_pattern: serde_json::Map<String, Value> =
        others.map(|(path, lora)| (path.clone(), lora.r.into())).collect();
    // Ollama reads `lora_alpha` as an integer.
    let lora_alpha = if config.lora_alpha.fract() == 0.0 && config.lora_alpha.abs() < 1e15 {
        json!(config.lora_alpha as i64)
    } else {
        json!(config.lora_alpha)
    };
    json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": config.layers_to_transform,
        "lora_alpha": lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": rank_pattern,
        "revision": null,
        "target_modules": config.target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": config.use_rslora,
    })
}

/// The distinct last parts of module paths.
fn last_parts<'a>(paths: impl Iterator<Item = &'a String>) -> Vec<String> {
    let parts = paths.filter_map(|path| path.rsplit('.').next()).collect::<BTreeSet<_>>();
    parts.into_iter().map(str::to_owned).collect()
}

/// Names of the two tensors of one layer.
#[derive(Default)]
struct Factors {
    a: Option<String>,
    b: Option<String>,
}

impl Factors {
    fn load(&self, files: &SafetensorsFiles, path: &str, r: usize) -> Result<LoraWeights, String> {
        let (Some(a), Some(b)) = (&self.a, &self.b) else {
            let missing = if self.a.is_none() { "lora_A" } else { "lora_B" };
            return Err(format!("{path}.{missing} is missing"));
        };
        let (shape_a, shape_b) = (&files.tensors()[a].shape, &files.tensors()[b].shape);
        let (&[rank_a, d_in], &[d_out, rank_b]) = (shape_a.as_slice(), shape_b.as_slice()) else {
            return Err(format!(
                "{path}: shapes {shape_a:?} and {shape_b:?}, expected [{r}, d_in] and [d_out, {r}]"
            ));
        };
        if rank_a != r || rank_b != r {
            return Err(format!("{path}: shapes {shape_a:?} and {shape_b:?}, expected rank {r}"));
        }
        let factor = |name: &str, rows, cols| {
            let (block_type, bytes) = files.data(name).map_err(|error| error.to_string())?;
            StoredMatrix::from_blocks(block_type, rows, cols, bytes, RowOrder::Natural)
                .map(Factor::Stored)
                .ok_or_else(|| format!("{name}: its bytes do not fill its rows"))
        };
        Ok(LoraWeights { r, d_in, d_out, a: factor(a, r, d_in)?, b: factor(b, d_out, r)? })
    }
}

/// `adapter_config.json` as PEFT writes it; absent keys have PEFT's defaults.
#[derive(Deserialize)]
#[allow(clippy::struct_excessive_bools, reason = "the keys of the file")]
struct RawConfig {
    peft_type: String,
    base_model_name_or_path: Option<String>,
    #[serde(default = "default_r")]
    r: usize,
    #[serde(default = "default_alpha")]
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Option<Targets>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    lora_bias: bool,
    bias: Option<String>,
    #[serde(default)]
    rank_pattern: Value,
    #[serde(default)]
    alpha_pattern: Value,
    #[serde(default)]
    modules_to_save: Value,
    #[serde(default)]
    layer_replication: Value,
    layers_to_transform: Option<Layers>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Targets {
    List(Vec<String>),
    Pattern(#[allow(dead_code, reason = "only tells that it is not a list")] String),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Layers {
    One(usize),
    List(Vec<usize>),
}

impl Layers {
    fn list(self) -> Vec<usize> {
        match self {
            Self::One(layer) => vec![layer],
            Self::List(layers) => layers,
        }
    }
}

impl RawConfig {
    /// What the configuration asks for and plain LoRA does not have.
    fn unsupported(&self) -> Vec<String> {
        let is_set = |value: &Value| match value {
            Value::Null => false,
            Value::Object(map) => !map.is_empty(),
            Value::Array(items) => !items.is_empty(),
            _ => true,
        };
        let bias = self.bias.as_deref().unwrap_or("none");
        let checks = [
            (self.peft_type != "LORA", format!("peft_type is {}, expected LORA", self.peft_type)),
            (self.r == 0, "r is 0".to_owned()),
            (!self.lora_alpha.is_finite(), format!("lora_alpha is {}", self.lora_alpha)),
            (self.use_dora, "use_dora is true".to_owned()),
            (self.fan_in_fan_out, "fan_in_fan_out is true".to_owned()),
            (self.lora_bias, "lora_bias is true".to_owned()),
            (bias != "none", format!("bias is \"{bias}\", expected \"none\"")),
            (!is_plain(&self.rank_pattern), "rank_pattern has other keys than names of modules".to_owned()),
            (!is_plain(&self.alpha_pattern), "alpha_pattern has other keys than names of modules".to_owned()),
            (
                self.lora_alpha == 0.0 && is_set(&self.alpha_pattern),
                "alpha_pattern is set over lora_alpha 0".to_owned(),
            ),
            (is_set(&self.modules_to_save), "modules_to_save is set".to_owned()),
            (is_set(&self.layer_replication), "layer_replication is set".to_owned()),
        ];
        checks.into_iter().filter(|(unsupported, _)| *unsupported).map(|(_, problem)| problem).collect()
    }
}

/// What a pattern says of a module: its keys are last parts of paths. PEFT takes them for regular expressions, which
/// those of its users are not.
fn of_pattern(pattern: &Value, path: &str) -> Option<f64> {
    let matches = |key: &str| path == key || path.strip_suffix(key).is_some_and(|rest| rest.ends_with('.'));
    pattern.as_object()?.iter().find(|(key, _)| matches(key)).and_then(|(_, value)| value.as_f64())
}

fn is_plain(pattern: &Value) -> bool {
    let is_name = |key: &str| key.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.'));
    match pattern {
        Value::Null => true,
        Value::Object(map) => {
            map.iter().all(|(key, value)| is_name(key) && value.as_f64().is_some_and(|v| v > 0.0))
        }
        _ => false,
    }
}

fn default_r() -> usize {
    AdapterConfig::default().r
}

fn default_alpha() -> f64 {
    AdapterConfig::default().lora_alpha
}
