//! Loading `tokenizer.json`, with the checks that the tokenizers crate leaves to a panic.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tokenizers::{ModelWrapper, PostProcessorWrapper, Tokenizer};

/// Loads a tokenizer for encoding alone.
///
/// # Errors
/// Why it does not load.
pub(crate) fn load(path: &Path) -> Result<Tokenizer, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    check_merges(&bytes)?;
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
    encode_only(&mut tokenizer)?;
    Ok(tokenizer)
}

/// Strips what would change ids or offsets: BOS is put in front in one place only, and `trim_offsets` of a
/// byte-level post-processor would hide the space in front of a word.
fn encode_only(tokenizer: &mut Tokenizer) -> Result<(), String> {
    tokenizer.with_post_processor(None::<PostProcessorWrapper>);
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
    match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) => {
            let unknown = bpe.get_unk_token().clone();
            match unknown.filter(|token| tokenizer.token_to_id(token).is_none()) {
                Some(token) => Err(format!("its unknown token {token:?} is not in the vocabulary")),
                None => Ok(()),
            }
        }
        ModelWrapper::Unigram(_) => Ok(()),
        ModelWrapper::WordPiece(_) | ModelWrapper::WordLevel(_) => {
            Err("a word-piece or word-level model, expected BPE or Unigram".to_owned())
        }
    }
}

/// A merge whose result is longer than every token makes the tokenizers crate index out of bounds.
fn check_merges(json: &[u8]) -> Result<(), String> {
    let file: File = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let model = file.model;
    let prefix = model.continuing_subword_prefix.unwrap_or_default().len();
    for (index, merge) in model.merges.iter().enumerate() {
        let (left, right) = match merge {
            Merge::Pair(left, right) => (left.as_str(), right.as_str()),
            Merge::Text(text) => text.split_once(' ').unwrap_or((text, "")),
        };
        if right.len() < prefix || left.len() + right.len() - prefix > model.vocab.0 {
            return Err(format!("merge {index} gives a token that is not in the vocabulary"));
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct File {
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    vocab: LongestKey,
    #[serde(default)]
    merges: Vec<Merge>,
    continuing_subword_prefix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

/// Length of the longest key of a vocabulary, in bytes; zero for the list of a Unigram model.
#[derive(Default)]
struct LongestKey(usize);

impl<'de> Deserialize<'de> for LongestKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl<'de> Visitor<'de> for Keys {
            type Value = LongestKey;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LongestKey, A::Error> {
                let mut longest = 0;
                while let Some((key, IgnoredAny)) = map.next_entry::<String, _>()? {
                    longest = longest.max(key.len());
                }
                Ok(LongestKey(longest))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<LongestKey, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(LongestKey(0))
            }
        }

        deserializer.deserialize_any(Keys)
    }
}
