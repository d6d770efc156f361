//! The `tokenizer.ggml.*` tables of GGUF metadata.

use super::{Array, GgufFile, Value};
use crate::tokenizer::{END_OF_GENERATION, END_OF_TURN};
use crate::{FormatError, GgufTokenizer, SpecialTokens, TokenType};

/// Pre-tokenizers whose models expect BOS unless the file says otherwise.
const BOS_BY_DEFAULT: [&str; 11] = [
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
    "chameleon",
];

/// Roles of tokens that end a generation, by the key that gives their id.
const ENDING_KEYS: [&str; 6] = [
    "eos_token_id",
    "eot_token_id",
    "eom_token_id",
    "fim_pad_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
];

/// Tables and special tokens; what is absent has llama.cpp's defaults.
///
/// # Errors
/// All missing and contradictory tables at once.
pub fn read_tokenizer(file: &GgufFile) -> Result<(GgufTokenizer, SpecialTokens), FormatError> {
    let mut problems = Vec::new();
    let tokenizer = tables(file, &mut problems);
    let special = special(file, &tokenizer);
    if problems.is_empty() {
        Ok((tokenizer, special))
    } else {
        Err(FormatError::Config { path: file.path().to_owned(), problems })
    }
}

fn tables(file: &GgufFile, problems: &mut Vec<String>) -> GgufTokenizer {
    let get = |key: &str| file.metadata().get(&format!("tokenizer.ggml.{key}"));
    let flag = |key: &str| get(key).and_then(Value::as_bool);
    let array = |key: &str| get(key).and_then(Value::as_array);

    let model = get("model").and_then(Value::as_str).unwrap_or_default().to_owned();
    let pre = get("pre").and_then(Value::as_str).map(str::to_owned);
    let strings = |key: &str| array(key).and_then(Array::as_strings).cloned().unwrap_or_default();
    let (tokens, merges) = (strings("tokens"), strings("merges"));
    let mut scores = array("scores").and_then(Array::as_floats).unwrap_or_default();
    if model.is_empty() {
        problems.push("tokenizer.ggml.model is missing".to_owned());
    }
    if tokens.is_empty() {
        problems.push("tokenizer.ggml.tokens is missing".to_owned());
    }
    if model == "gpt2" && merges.is_empty() {
        problems.push("tokenizer.ggml.merges is missing".to_owned());
    }
    if model == "llama" && scores.len() < tokens.len() {
        let (found, expected) = (scores.len(), tokens.len());
        problems.push(format!("tokenizer.ggml.scores has {found} values, expected {expected}"));
    }
    scores.truncate(tokens.len());

    let token_types = match array("token_type").and_then(Array::as_integers) {
        None => vec![TokenType::Normal; tokens.len()],
        Some(numbers) if numbers.len() < tokens.len() => {
            let (found, expected) = (numbers.len(), tokens.len());
            problems.push(format!("tokenizer.ggml.token_type has {found} values, expected {expected}"));
            Vec::new()
        }
        Some(numbers) => numbers
            .into_iter()
            .take(tokens.len())
            .map(|number| TokenType::from_ggml(number).unwrap_or(TokenType::Normal))
            .collect(),
    };

    let is_spm = model == "llama";
    let bos_by_default = is_spm || pre.as_deref().is_some_and(|pre| BOS_BY_DEFAULT.contains(&pre));
    GgufTokenizer {
        unk: id(file, "unknown_token_id", &tokens).or((is_spm && !tokens.is_empty()).then_some(0)),
        add_bos: flag("add_bos_token").unwrap_or(bos_by_default),
        add_eos: flag("add_eos_token").unwrap_or(false),
        add_space_prefix: flag("add_space_prefix").unwrap_or(is_spm),
        model,
        pre,
        tokens,
        token_types,
        scores,
        merges,
    }
}

fn special(file: &GgufFile, tokenizer: &GgufTokenizer) -> SpecialTokens {
    let tokens = &tokenizer.tokens;
    let by_text = |text: &str| tokens.iter().position(|token| token == text).map(|id| id as u32);
    let fallback = |spm: u32| match tokenizer.model.as_str() {
        "llama" => Some(spm),
        "gpt2" => Some(11),
        _ => None,
    };
    let valid = |id: &u32| (*id as usize) < tokens.len();
    let bos = id(file, "bos_token_id", tokens).or(fallback(1).filter(valid));
    let eos = id(file, "eos_token_id", tokens).or(fallback(2).filter(valid));
    let eot = id(file, "eot_token_id", tokens).or_else(|| END_OF_TURN.into_iter().find_map(by_text));
    let mut eos_ids = ENDING_KEYS.into_iter().filter_map(|key| id(file, key, tokens)).collect::<Vec<_>>();
    eos_ids.extend(END_OF_TURN.into_iter().chain(END_OF_GENERATION).filter_map(by_text));
    eos_ids.extend(eos.into_iter().chain(eot));
    eos_ids.sort_unstable();
    eos_ids.dedup();
    let pad = id(file, "padding_token_id", tokens);
    SpecialTokens { bos, eos, pad, eot, eos_ids, add_bos: tokenizer.add_bos && bos.is_some() }
}

/// The id that `tokenizer.ggml.{key}` gives, where it is in range.
fn id(file: &GgufFile, key: &str, tokens: &[String]) -> Option<u32> {
    let id = file.metadata().unsigned(&format!("tokenizer.ggml.{key}"))?;
    (id < tokens.len() as u64).then_some(id as u32)
}
