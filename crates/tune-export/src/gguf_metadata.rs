//! The metadata of an exported GGUF file.

use tune_formats::gguf::{Array, Metadata, Value, hyper_parameters};
use tune_formats::provenance::Provenance;
use tune_formats::{BaseModel, Source, TokenizerFiles};

use crate::{ExportError, ExportOptions, ExportRequest, FileType, tokenizer_metadata};

/// Version of the block layouts, which readers compare.
pub(crate) const QUANTIZATION_VERSION: u32 = 2;

/// Metadata of a merged model: that of a GGUF base with its key types and tokenizer untouched, or built from the
/// files of a Hugging Face directory.
pub(crate) fn of_model(request: &ExportRequest<'_>, file_type: FileType) -> Result<Metadata, ExportError> {
    let ExportRequest { base, options, .. } = request;
    let mut metadata = match &base.source {
        Source::Gguf(file) => file.metadata().clone(),
        Source::HfDirectory(_) => from_hugging_face(base)?,
    };
    // Lineage, identity and packing of the base's file say nothing true about the new one.
    metadata.retain(|key| {
        !key.starts_with("split.")
            && !key.starts_with("general.base_model.")
            && !key.starts_with("tune.")
            && !matches!(key, "general.uuid" | "general.quantized_by" | "general.alignment")
    });
    set_name(&mut metadata, base, options);
    set_provenance(&mut metadata, &request.adapter.config.provenance);
    if let Some(template) = options.chat_template.or(base.chat_template.as_deref()) {
        metadata.set("tokenizer.chat_template", strip_generation_tags(template).into());
    }
    metadata.set("general.quantization_version", QUANTIZATION_VERSION.into());
    metadata.set("general.file_type", file_type.number().into());
    Ok(metadata)
}

/// Metadata of an adapter whose loader multiplies by `alpha / r`.
pub(crate) fn of_adapter(request: &ExportRequest<'_>, alpha: f32) -> Metadata {
    let ExportRequest { base, options, .. } = request;
    let mut metadata = Metadata::new();
    let architecture = hyper_parameters(&base.config).string("general.architecture").map(str::to_owned);
    metadata.set("general.architecture", architecture.unwrap_or_default().into());
    metadata.set("general.type", "adapter".into());
    metadata.set("adapter.type", "lora".into());
    metadata.set("adapter.lora.alpha", alpha.into());
    set_name(&mut metadata, base, options);
    set_provenance(&mut metadata, &request.adapter.config.provenance);
    metadata.set("general.quantization_version", QUANTIZATION_VERSION.into());
    metadata.set("general.file_type", FileType::F32.number().into());
    metadata
}

/// The `tokenizer.*` keys of a model, chat template included.
///
/// # Errors
/// A tokenizer that GGUF cannot express.
pub fn tokenizer_keys(base: &BaseModel) -> Result<Metadata, ExportError> {
    let mut keys = match (&base.source, &base.tokenizer) {
        (Source::Gguf(file), _) => file.metadata().clone(),
        (_, TokenizerFiles::Json { tokenizer_json, tokenizer_config }) => {
            tokenizer_metadata::metadata(base, tokenizer_json, tokenizer_config.as_deref())?
        }
        (_, TokenizerFiles::Gguf(_)) => Metadata::new(),
    };
    keys.retain(|key| key.starts_with("tokenizer."));
    if let Some(template) = &base.chat_template {
        keys.set("tokenizer.chat_template", strip_generation_tags(template).into());
    }
    Ok(keys)
}

/// About how many bytes the metadata occupies in a file.
pub(crate) fn byte_len(metadata: &Metadata) -> u64 {
    metadata.iter().map(|(key, value)| (key.len() + 16 + value_len(value)) as u64).sum()
}

fn from_hugging_face(base: &BaseModel) -> Result<Metadata, ExportError> {
    let mut metadata = hyper_parameters(&base.config);
    metadata.set("general.type", "model".into());
    for (key, value) in tokenizer_keys(base)?.iter() {
        metadata.set(key, value.clone());
    }
    Ok(metadata)
}

fn set_provenance(metadata: &mut Metadata, provenance: &Provenance) {
    for (key, value) in provenance.entries() {
        metadata.set(key, value.into());
    }
}

fn set_name(metadata: &mut Metadata, base: &BaseModel, options: &ExportOptions<'_>) {
    metadata.set("general.name", options.name.unwrap_or(&base.name).into());
    metadata.set("general.base_model.count", 1_u32.into());
    metadata.set("general.base_model.0.name", base.name.as_str().into());
    if let Some((organization, repository)) = base.name.split_once('/') {
        metadata.set("general.base_model.0.organization", organization.into());
        let url = format!("https://huggingface.co/{organization}/{repository}");
        metadata.set("general.base_model.0.repo_url", url.into());
    }
}

/// Other engines do not know the tags that mark what is trained.
fn strip_generation_tags(template: &str) -> String {
    let mut text = template.to_owned();
    for tag in ["generation", "endgeneration"] {
        for (open, close) in [("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")] {
            text = text.replace(&format!("{open} {tag} {close}"), "");
        }
    }
    text
}

fn value_len(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(Array::String(texts)) => texts.iter().map(|text| 8 + text.len()).sum(),
        Value::Array(array) => array.len() * 8,
        _ => 8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_disappear_and_nothing_else() {
        let template = "{% if a %}{%- generation %}{{ x }}{% endgeneration -%}{% endif %}{{ 'generation' }}";
        assert_eq!(strip_generation_tags(template), "{% if a %}{{ x }}{% endif %}{{ 'generation' }}");
    }
}
