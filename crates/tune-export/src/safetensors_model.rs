//! Base and adapter merged into a folder in Hugging Face layout.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tune_formats::safetensors::{SafetensorsFiles, ShardedWriter, TensorEntry, TensorSpec};
use tune_formats::{BaseModel, FormatError, ModelConfig, RopeScaling, Source};
use tune_quant::{BlockType, RowOrder};

use crate::merge::{self, MergedTensor, Rounding, Values};
use crate::staging::{Staged, write_bytes};
use crate::stored_update::Effect;
use crate::verify::Differences;
use crate::{ExportError, ExportEvent, ExportRequest, Written, special_text, write_companions};

/// Largest file of a sharded model, as transformers writes it.
const MAX_SHARD: u64 = 5_000_000_000;

/// Files of a Hugging Face base that go along unchanged.
const OF_THE_BASE: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "LICENSE",
];

pub(crate) fn write(
    request: &ExportRequest<'_>,
    notes: &mut Vec<String>,
    progress: &mut dyn FnMut(ExportEvent),
) -> Result<Written, ExportError> {
    let base = request.base;
    let tensors = merge::tensors(base, request.adapter)?;
    let specs = specs(base, &tensors);
    let config = config_json(base, &specs)?;
    let size = specs.iter().map(|spec| spec.byte_len().unwrap_or_default() as u64 + 256).sum::<u64>();
    let staged = Staged::folder(request.out, size, request.options.replace_folder)?;
    progress(ExportEvent::Started { tensors: specs.len(), bytes: size });

    let max_shard = request.options.max_shard_bytes.unwrap_or(MAX_SHARD);
    let max_shard = usize::try_from(max_shard).unwrap_or(usize::MAX);
    let metadata = request.adapter.config.provenance.safetensors_metadata();
    let mut writer = ShardedWriter::create(staged.path(), &metadata, &specs, max_shard)?;
    let mut effect = Effect::default();
    for (done, (tensor, spec)) in (1..).zip(tensors.iter().zip(&specs)) {
        effect += tensor.encode(spec.block_type, Rounding::Refit, RowOrder::Natural, |bytes| {
            Ok(writer.append(&spec.name, bytes)?)
        })?;
        progress(ExportEvent::Wrote { done, tensors: specs.len() });
    }
    writer.finish()?;
    write_bytes(&staged.path().join("config.json"), format!("{config:#}\n").as_bytes())?;
    write_tokenizer(request, staged.path(), notes)?;
    write_companions(request, staged.path())?;
    Differences::find(request, staged.path(), notes, |differences| {
        verify(staged.path(), &tensors, &specs, differences, progress)
    })?;
    staged.publish()?;
    Ok(Written { tensors: specs.len(), stored_update: effect.stored_update() })
}

/// Every tensor with its type. Beside matrices of 32 bits, as training in full leaves them, vectors have 32 bits too.
fn specs(base: &BaseModel, tensors: &[MergedTensor<'_>]) -> Vec<TensorSpec> {
    let mut specs: Vec<TensorSpec> = tensors.iter().map(|tensor| spec(base, tensor)).collect();
    if specs.iter().any(|spec| spec.shape.len() == 2 && spec.block_type == BlockType::F32) {
        for vector in specs.iter_mut().filter(|spec| spec.shape.len() == 1) {
            vector.block_type = BlockType::F32;
        }
    }
    specs
}

/// A tensor keeps the 16- or 32-bit type of its base; what a GGUF base stores in blocks becomes F16, which holds
/// decoded blocks more exactly than BF16 does.
fn spec(base: &BaseModel, tensor: &MergedTensor<'_>) -> TensorSpec {
    let block_type = match &tensor.values {
        Values::Vector(_) => match &base.source {
            Source::HfDirectory(directory) => directory.files().tensors().get(&tensor.name),
            Source::Gguf(_) => None,
        }
        .and_then(TensorEntry::block_type)
        .unwrap_or(BlockType::F32),
        Values::Matrix(matrix) => {
            matrix.base_type().filter(|block_type| !block_type.is_quantized()).unwrap_or(BlockType::F16)
        }
    };
    TensorSpec { name: tensor.name.clone(), shape: tensor.shape(), block_type }
}

/// `config.json`: the base's own, or one for what a GGUF file says.
fn config_json(base: &BaseModel, specs: &[TensorSpec]) -> Result<Value, ExportError> {
    let mut config = match &base.source {
        Source::HfDirectory(directory) => read_json(&directory.path().join("config.json"))?,
        Source::Gguf(_) => config_of(base)?,
    };
    let matrices = specs.iter().filter(|spec| spec.shape.len() == 2).map(|spec| spec.block_type);
    let dtype = match matrices.max_by_key(|block_type| block_type.block_bytes()) {
        Some(BlockType::F16) => "float16",
        Some(BlockType::BF16) => "bfloat16",
        _ => "float32",
    };
    if let Some(keys) = config.as_object_mut() {
        keys.remove("quantization_config");
        keys.remove("dtype");
        keys.insert("torch_dtype".to_owned(), dtype.into());
        keys.insert(
            "tie_word_embeddings".to_owned(),
            (!specs.iter().any(|spec| spec.name == "lm_head.weight")).into(),
        );
    }
    Ok(config)
}

fn config_of(base: &BaseModel) -> Result<Value, ExportError> {
    let config = &base.config;
    let mut json = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": false,
        "bos_token_id": base.special.bos,
        "eos_token_id": base.special.eos,
        "pad_token_id": base.special.pad,
    });
    if let Some(scaling) = &config.rope_scaling {
        json["rope_scaling"] = match scaling {
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
            RopeScaling::Factors(factors) => {
                known_scaling(config, factors).ok_or_else(|| FormatError::Tensor {
                    name: "rope_freqs.weight".to_owned(),
                    reason:
                        "holds factors that no rope_scaling of config.json gives; export a GGUF file instead"
                            .to_owned(),
                })?
            }
        };
    }
    Ok(json)
}

/// The Llama 3 scaling that yields `factors`: 3.1 divides by 8, 3.2 by 32.
fn known_scaling(config: &ModelConfig, factors: &[f32]) -> Option<Value> {
    [8.0, 32.0].into_iter().find_map(|factor| {
        let (low_freq_factor, high_freq_factor, original_max_position_embeddings) = (1.0, 4.0, 8192);
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        };
        let candidate = ModelConfig { rope_scaling: Some(scaling), ..config.clone() }.rope_factors()?;
        let equal = candidate.len() == factors.len()
            && candidate.iter().zip(factors).all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs());
        equal.then(|| {
            json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            })
        })
    })
}

/// Tokenizer, generation settings and chat template.
fn write_tokenizer(
    request: &ExportRequest<'_>,
    folder: &Path,
    notes: &mut Vec<String>,
) -> Result<(), ExportError> {
    let base = request.base;
    match &base.source {
        Source::HfDirectory(directory) => {
            for name in OF_THE_BASE {
                let (from, to) = (directory.path().join(name), folder.join(name));
                if from.is_file() {
                    let bytes = fs::read(&from).map_err(|source| FormatError::Read { path: from, source })?;
                    write_bytes(&to, &bytes)?;
                }
            }
        }
        Source::Gguf(_) => {
            match request.options.tokenizer_json {
                Some(text) => {
                    let json = tokenizer_json(base, text)?;
                    write_bytes(&folder.join("tokenizer.json"), format!("{json:#}\n").as_bytes())?;
                }
                None => {
                    notes.push("no tokenizer.json: the base keeps its tokenizer in GGUF metadata".to_owned());
                }
            }
            let tokenizer_config = tokenizer_config(base)?;
            write_bytes(&folder.join("tokenizer_config.json"), format!("{tokenizer_config:#}\n").as_bytes())?;
        }
    }
    let generation_path = folder.join("generation_config.json");
    if !generation_path.is_file() {
        let generation = json!({
            "bos_token_id": base.special.bos,
            "eos_token_id": base.special.eos_ids,
            "pad_token_id": base.special.pad,
        });
        write_bytes(&generation_path, format!("{generation:#}\n").as_bytes())?;
    }
    let copied = matches!(base.source, Source::HfDirectory(_)) && request.options.chat_template.is_none();
    match request.options.chat_template.or(base.chat_template.as_deref()) {
        Some(template) if !copied => write_bytes(&folder.join("chat_template.jinja"), template.as_bytes()),
        _ => Ok(()),
    }
}

/// A tokenizer rebuilt from GGUF tables with the step that puts BOS in front, which transformers takes from here.
fn tokenizer_json(base: &BaseModel, text: &str) -> Result<Value, FormatError> {
    let mut json: Value = serde_json::from_str(text)
        .map_err(|source| FormatError::Json { path: base.path.join("tokenizer.json"), source })?;
    let bos = special_text::text(&base.tokenizer, base.special.bos)?.filter(|_| base.special.add_bos);
    if let (Some(bos), Some(id)) = (bos, base.special.bos) {
        let special = json!({"SpecialToken": {"id": bos, "type_id": 0}});
        let sequence = |name: &str, type_id: u8| json!({"Sequence": {"id": name, "type_id": type_id}});
        json["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [special, sequence("A", 0)],
            "pair": [special, sequence("A", 0), sequence("B", 1)],
            "special_tokens": {bos.as_str(): {"id": bos, "ids": [id], "tokens": [bos]}},
        });
    }
    Ok(json)
}

fn tokenizer_config(base: &BaseModel) -> Result<Value, FormatError> {
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": base.config.max_position_embeddings,
        "add_bos_token": base.special.add_bos,
    });
    for (key, id) in
        [("bos_token", base.special.bos), ("eos_token", base.special.eos), ("pad_token", base.special.pad)]
    {
        if let Some(text) = special_text::text(&base.tokenizer, id)? {
            config[key] = text.into();
        }
    }
    Ok(config)
}

/// Reads the folder back through the project's own reader and compares every row.
fn verify(
    folder: &Path,
    tensors: &[MergedTensor<'_>],
    specs: &[TensorSpec],
    differences: &mut Differences,
    progress: &mut dyn FnMut(ExportEvent),
) -> Result<(), ExportError> {
    let files = SafetensorsFiles::open_directory(folder)?;
    if files.tensors().len() != specs.len() {
        differences.push(format!("there are {} tensors, expected {}", files.tensors().len(), specs.len()));
    }
    for (done, (tensor, spec)) in (1..).zip(tensors.iter().zip(specs)) {
        let (block_type, found) = files.data(&spec.name)?;
        let mut at = 0;
        tensor.encode(spec.block_type, Rounding::Refit, RowOrder::Natural, |bytes| {
            let found = found.get(at..at + bytes.len()).map(|found| (block_type, found));
            let row = at / (spec.byte_len().unwrap_or(1) / spec.shape[0].max(1)).max(1);
            differences.row(&spec.name, row, found, (spec.block_type, &bytes));
            at += bytes.len();
            bytes.release();
            Ok(())
        })?;
        if at != found.len() {
            differences.push(format!("{}: {} bytes, expected {at}", spec.name, found.len()));
        }
        found.release();
        progress(ExportEvent::Verified { done, tensors: specs.len() });
    }
    Ok(())
}

fn read_json(path: &Path) -> Result<Value, FormatError> {
    let bytes = fs::read(path).map_err(|source| FormatError::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| FormatError::Json { path: path.to_owned(), source })
}
