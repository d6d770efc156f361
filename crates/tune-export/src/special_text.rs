//! The texts of special tokens.

use std::path::Path;

use serde::Deserialize;
use tune_formats::{FormatError, TokenizerFiles};

/// The parts of `tokenizer.json` that name special tokens.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

/// The texts of those of `ids` that the tokenizer has.
pub(crate) fn texts(tokenizer: &TokenizerFiles, ids: &[u32]) -> Result<Vec<String>, FormatError> {
    match tokenizer {
        TokenizerFiles::Gguf(tables) => {
            Ok(ids.iter().filter_map(|&id| tables.tokens.get(id as usize)).cloned().collect())
        }
        TokenizerFiles::Json { tokenizer_json, .. } => {
            let json = read(tokenizer_json)?;
            let text = |&id: &u32| json.added_tokens.iter().find(|token| token.id == id);
            Ok(ids.iter().filter_map(text).map(|token| token.content.clone()).collect())
        }
    }
}

/// The text of one token.
pub(crate) fn text(tokenizer: &TokenizerFiles, id: Option<u32>) -> Result<Option<String>, FormatError> {
    Ok(texts(tokenizer, id.as_slice())?.pop())
}

fn read(path: &Path) -> Result<TokenizerJson, FormatError> {
    let bytes = std::fs::read(path).map_err(|source| FormatError::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| FormatError::Json { path: path.to_owned(), source })
}
