//! Tokenizer files of a Hugging Face directory: special tokens and chat template.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::config::{Ids, TokenIds};
use super::read_json;
use crate::tokenizer::{END_OF_GENERATION, END_OF_TURN};
use crate::{FormatError, SpecialTokens, TokenizerFiles};

/// What the files say.
pub(super) struct Tokenizer {
    pub(super) files: TokenizerFiles,
    pub(super) special: SpecialTokens,
    pub(super) chat_template: Option<String>,
}

/// The parts of `tokenizer.json` that tell about special tokens; the vocabulary itself is skipped.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    post_processor: Option<Value>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

/// `tokenizer_config.json`.
#[derive(Default, Deserialize)]
#[serde(default)]
struct TokenizerConfig {
    bos_token: Option<TokenText>,
    eos_token: Option<TokenText>,
    pad_token: Option<TokenText>,
    add_bos_token: Option<bool>,
    chat_template: Option<ChatTemplates>,
}

/// A token as plain text or as an object with its properties.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenText {
    Plain(String),
    Object { content: String },
}

/// One chat template, or several by name.
#[derive(Deserialize)]
#[serde(untagged)]
enum ChatTemplates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// `chat_template.json`.
#[derive(Deserialize)]
struct ChatTemplateJson {
    chat_template: String,
}

impl TokenText {
    fn text(&self) -> &str {
        match self {
            Self::Plain(text) | Self::Object { content: text } => text,
        }
    }
}

/// Reads the tokenizer files of `directory`; `config` holds the ids of `config.json`.
///
/// # Errors
/// No `tokenizer.json`, or files that do not parse.
pub(super) fn read(directory: &Path, config: &TokenIds) -> Result<Tokenizer, FormatError> {
    let json_path = directory.join("tokenizer.json");
    let config_path = directory.join("tokenizer_config.json");
    let Some(json) = read_json::<TokenizerJson>(&json_path)? else {
        let reason = "the directory has no tokenizer.json".to_owned();
        return Err(FormatError::NotAModel { path: directory.to_owned(), reason });
    };
    let tokenizer_config = read_json::<TokenizerConfig>(&config_path)?;
    let generation = read_json::<TokenIds>(&directory.join("generation_config.json"))?.unwrap_or_default();
    let files = TokenizerFiles::Json {
        tokenizer_json: json_path,
        tokenizer_config: tokenizer_config.is_some().then_some(config_path),
    };
    let tokenizer_config = tokenizer_config.unwrap_or_default();
    let special = special(&json, &tokenizer_config, config, &generation);
    let chat_template = chat_template(directory, tokenizer_config.chat_template)?;
    Ok(Tokenizer { files, special, chat_template })
}

fn special(
    json: &TokenizerJson,
    tokenizer: &TokenizerConfig,
    config: &TokenIds,
    generation: &TokenIds,
) -> SpecialTokens {
    let by_text =
        |text: &str| json.added_tokens.iter().find(|token| token.content == text).map(|token| token.id);
    let first = |ids: &Option<Ids>| ids.as_ref().and_then(|ids| ids.list().first().copied());
    let role = |named: &Option<TokenText>, in_config: &Option<Ids>, in_generation: &Option<Ids>| {
        let named = named.as_ref().and_then(|token| by_text(token.text()));
        named.or_else(|| first(in_config)).or_else(|| first(in_generation))
    };
    let bos = role(&tokenizer.bos_token, &config.bos, &generation.bos);
    let eos = role(&tokenizer.eos_token, &config.eos, &generation.eos);
    let pad = role(&tokenizer.pad_token, &config.pad, &generation.pad);
    let eot = END_OF_TURN.into_iter().find_map(by_text);

    let listed = [&config.eos, &generation.eos];
    let mut eos_ids = listed.into_iter().flatten().flat_map(Ids::list).collect::<Vec<_>>();
    eos_ids.extend(eos.into_iter().chain(eot));
    eos_ids.extend(END_OF_TURN.into_iter().chain(END_OF_GENERATION).filter_map(by_text));
    eos_ids.sort_unstable();
    eos_ids.dedup();

    // What the post-processor does wins over what the configuration claims.
    let prepends = match &json.post_processor {
        Some(processor) if !processor.is_null() => starts_with_special(processor),
        _ => tokenizer.add_bos_token.unwrap_or(false),
    };
    SpecialTokens { bos, eos, pad, eot, eos_ids, add_bos: prepends && bos.is_some() }
}

/// A post-processor that puts a special token before a single text.
fn starts_with_special(processor: &Value) -> bool {
    let is = |kind: &str| processor["type"] == kind;
    if is("Sequence") {
        let steps = processor["processors"].as_array();
        return steps.is_some_and(|steps| steps.iter().any(starts_with_special));
    }
    is("TemplateProcessing") && processor["single"][0].get("SpecialToken").is_some()
}

/// The default chat template. As in transformers, `chat_template.jinja` wins over the other places.
fn chat_template(directory: &Path, in_config: Option<ChatTemplates>) -> Result<Option<String>, FormatError> {
    let jinja = directory.join("chat_template.jinja");
    match std::fs::read_to_string(&jinja) {
        Ok(template) => return Ok(Some(template)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(FormatError::read(&jinja, error)),
    }
    match in_config {
        Some(ChatTemplates::One(template)) => return Ok(Some(template)),
        Some(ChatTemplates::Named(templates)) => {
            let default = templates.into_iter().find(|template| template.name == "default");
            if let Some(default) = default {
                return Ok(Some(default.template));
            }
        }
        None => {}
    }
    let json = read_json::<ChatTemplateJson>(&directory.join("chat_template.json"))?;
    Ok(json.map(|json| json.chat_template))
}
