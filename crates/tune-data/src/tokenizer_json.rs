//! Loading `tokenizer.json`, with the checks that the tokenizers crate leaves to a panic.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use tokenizers::{ModelWrapper, PostProcessorWrapper, Tokenizer};

use crate::byte_level_bpe::{ByteLevelBpe, Ids};
use crate::pre_tokenizer::expressions;

/// Loads a tokenizer for encoding alone, and its merges.
///
/// # Errors
/// Why it does not load.
pub(crate) fn load(path: &Path) -> Result<(Tokenizer, Vec<Merge>), String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let merges = merges(&bytes)?;
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
    encode_only(&mut tokenizer)?;
    Ok((tokenizer, merges))
}

/// The engine that gives the ids of `tokenizer` for texts that its normaliser leaves as they are, if there is one.
pub(crate) fn byte_level_bpe(tokenizer: &Tokenizer, merges: &[Merge]) -> Option<ByteLevelBpe> {
    let ModelWrapper::BPE(bpe) = tokenizer.get_model() else { return None };
    let affix = |affix: &Option<String>| affix.as_ref().is_some_and(|affix| !affix.is_empty());
    if affix(bpe.get_continuing_subword_prefix())
        || affix(&bpe.end_of_word_suffix)
        || bpe.dropout.is_some_and(|dropout| dropout > 0.0)
    {
        return None;
    }
    let cuts = expressions(tokenizer.get_pre_tokenizer()?)?;
    let vocab = bpe.get_vocab();
    #[allow(clippy::iter_over_hash_type, reason = "from one map to another")]
    let ids: Ids = vocab.iter().map(|(token, id)| (token.as_str(), *id)).collect();
    let mut joined = String::new();
    let merge = |merge: &Merge| {
        let parts @ [left, right] = merge.parts();
        joined.clear();
        joined.extend(parts);
        Some((*ids.get(left)?, *ids.get(right)?, *ids.get(joined.as_str())?))
    };
    let merges: Vec<_> = merges.iter().map(merge).collect::<Option<_>>()?;
    let added = tokenizer.get_added_tokens_decoder();
    if tokenizer.get_normalizer().is_some() && added.values().any(|token| !token.content.is_ascii()) {
        return None;
    }
    let added = added.iter().map(|(id, token)| (*id, token));
    let unknown_vanish = bpe.get_unk_token().is_none() && !bpe.byte_fallback;
    ByteLevelBpe::new(&ids, merges.into_iter(), bpe.ignore_merges, unknown_vanish, &cuts, added)
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

/// The merges of the file. One whose result is longer than every token makes the tokenizers crate index out of bounds,
/// and is refused here.
fn merges(json: &[u8]) -> Result<Vec<Merge>, String> {
    let file: File = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let model = file.model;
    let prefix = model.continuing_subword_prefix.unwrap_or_default().len();
    for (index, merge) in model.merges.iter().enumerate() {
        let [left, right] = merge.parts();
        if right.len() < prefix || left.len() + right.len() - prefix > model.vocab.0 {
            return Err(format!("merge {index} gives a token that is not in the vocabulary"));
        }
    }
    Ok(model.merges)
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

/// Two tokens that become one.
#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum Merge {
    Pair(String, String),
    Text(String),
}

impl Merge {
    fn parts(&self) -> [&str; 2] {
        match self {
            Self::Pair(left, right) => [left, right],
            Self::Text(text) => text.split_once(' ').unwrap_or((text, "")).into(),
        }
    }
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use unicode_normalization_alignments::is_nfc;

    use super::*;

    const TEXT: &str = include_str!("../../../tests/parity/tokenizer/mixed.txt");

    /// The tokenizer of a test model with some parts changed, and the engine for it.
    fn with(change: impl Fn(&mut Value)) -> (Tokenizer, Option<ByteLevelBpe>) {
        let file = include_str!("../../../tests/parity/models/llama-tied/tokenizer.json");
        let mut json: Value = serde_json::from_str(file).unwrap();
        change(&mut json);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        let (tokenizer, merges) = load(&path).unwrap();
        let engine = byte_level_bpe(&tokenizer, &merges);
        (tokenizer, engine)
    }

    fn split(expression: &str) -> Value {
        let split = json!({"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false});
        let spelling =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        json!({"type": "Sequence", "pretokenizers": [split, spelling]})
    }

    #[test]
    fn what_byte_level_models_have_gets_the_fast_engine() {
        let added = json!({
            "id": 320, "content": " and", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": true, "special": false
        });
        let changes: [&dyn Fn(&mut Value); 6] = [
            &|_| {},
            &|json| json["pre_tokenizer"] = split(r"\p{N}{1,3}| ?\p{L}+|\s+(?!\S)|\s+"),
            &|json| json["pre_tokenizer"] = split(r"\s"),
            &|json| json["model"]["ignore_merges"] = true.into(),
            &|json| json["normalizer"] = json!({"type": "NFC"}),
            &|json| json["added_tokens"].as_array_mut().unwrap().push(added.clone()),
        ];
        for change in changes {
            let (tokenizer, engine) = with(change);
            let engine = engine.expect("fast");
            // what a normaliser would change never gets here
            for line in TEXT.lines().filter(|line| is_nfc(line)) {
                let ids: Vec<u32> = engine.encode(line, true).into_iter().map(|token| token.id).collect();
                assert_eq!(ids, tokenizer.encode(line, false).unwrap().get_ids(), "{line}");
            }
        }
    }

    #[test]
    fn everything_else_stays_with_the_tokenizers_crate() {
        let changes: [&dyn Fn(&mut Value); 6] = [
            &|json| json["pre_tokenizer"] = split(r"a(?=b)"),
            &|json| json["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = true.into(),
            &|json| json["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false.into(),
            &|json| json["added_tokens"][2]["lstrip"] = true.into(),
            &|json| json["model"]["dropout"] = 0.5.into(),
            &|json| {
                json["model"]["byte_fallback"] = true.into();
                json["model"]["vocab"].as_object_mut().unwrap().remove("ÿ");
            },
        ];
        for (index, change) in changes.into_iter().enumerate() {
            assert!(with(change).1.is_none(), "change {index}");
        }
    }
}
