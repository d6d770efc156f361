//! `tokenizer.json` to the `tokenizer.ggml.*` keys of a GGUF file.
//!
//! Byte-level BPE becomes model `gpt2`, BPE with byte fallback (converted SentencePiece) becomes model `llama`.
//! Bases that are GGUF files already keep their keys; nothing here touches them.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value as Json;
use tokenizers::Tokenizer;
use tune_formats::gguf::Metadata;
use tune_formats::{BaseModel, FormatError, TokenType};

use crate::{ExportError, pre_tokenizer};

/// The `tokenizer.*` keys for a base in Hugging Face layout.
pub(crate) fn metadata(
    base: &BaseModel,
    tokenizer_json: &Path,
    tokenizer_config: Option<&Path>,
) -> Result<Metadata, ExportError> {
    let refuse = |reason: String| ExportError::Tokenizer { path: tokenizer_json.to_owned(), reason };
    let json = read(tokenizer_json)?;
    let config = tokenizer_config.map(read).transpose()?.unwrap_or(Json::Null);
    let kind = Kind::of(&json).ok_or_else(|| {
        let kind = json["model"]["type"].as_str().unwrap_or("unknown");
        refuse(format!("its model is {kind} without byte-level or byte-fallback tokens, expected such a BPE"))
    })?;
    let tokenizer = Tokenizer::from_file(tokenizer_json).map_err(|error| refuse(error.to_string()))?;
    let unknown = unknown_token(&json, &config);
    let vocabulary = Vocabulary::new(&json, kind, unknown, base.config.vocab_size).map_err(&refuse)?;

    let mut keys = Metadata::new();
    keys.set("tokenizer.ggml.model", kind.name().into());
    match kind {
        Kind::ByteLevel => {
            let pre = pre_tokenizer::name(&tokenizer, &json).map_err(|digest| {
                refuse(format!("llama.cpp has no pre-tokenizer for it (digest of the check text: {digest})"))
            })?;
            keys.set("tokenizer.ggml.pre", pre.into());
        }
        Kind::SentencePiece => keys.set("tokenizer.ggml.pre", "default".into()),
    }
    let merges = merges(&json).ok_or_else(|| refuse("its merges are not pairs of texts".to_owned()))?;
    if kind == Kind::SentencePiece {
        keys.set("tokenizer.ggml.scores", scores(&vocabulary, &merges).into());
    }
    let types: Vec<i32> = vocabulary.types.iter().map(|kind| kind.to_ggml()).collect();
    let unknown = unknown.and_then(|text| vocabulary.id(text));
    keys.set("tokenizer.ggml.tokens", vocabulary.texts.into());
    keys.set("tokenizer.ggml.token_type", types.into());
    if kind == Kind::ByteLevel {
        let spelt: Vec<String> = merges.iter().map(|(left, right)| spell_merge(left, right)).collect();
        keys.set("tokenizer.ggml.merges", spelt.into());
    }
    let special = &base.special;
    for (key, id) in [
        ("bos_token_id", special.bos),
        ("eos_token_id", special.eos),
        ("unknown_token_id", unknown),
        ("padding_token_id", special.pad),
    ] {
        if let Some(id) = id {
            keys.set(format!("tokenizer.ggml.{key}"), id.into());
        }
    }
    keys.set("tokenizer.ggml.add_bos_token", special.add_bos.into());
    keys.set("tokenizer.ggml.add_eos_token", adds_eos(&json).into());
    keys.set("tokenizer.ggml.add_space_prefix", (kind == Kind::SentencePiece && adds_space(&json)).into());
    Ok(keys)
}

/// The two kinds of tokenizer that GGUF knows and Hugging Face models of the supported families have.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    ByteLevel,
    SentencePiece,
}

impl Kind {
    fn of(json: &Json) -> Option<Self> {
        let model = &json["model"];
        if model["type"] != "BPE" {
            return None;
        }
        let byte_level =
            has_step(&json["pre_tokenizer"], "ByteLevel") || has_step(&json["decoder"], "ByteLevel");
        match (byte_level, model["byte_fallback"] == true) {
            (true, _) => Some(Self::ByteLevel),
            (false, true) => Some(Self::SentencePiece),
            (false, false) => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::ByteLevel => "gpt2",
            Self::SentencePiece => "llama",
        }
    }
}

/// Texts and types by id, as many as the embedding has rows.
struct Vocabulary {
    texts: Vec<String>,
    types: Vec<TokenType>,
}

impl Vocabulary {
    fn new(json: &Json, kind: Kind, unknown: Option<&str>, size: usize) -> Result<Self, String> {
        let mut texts: Vec<Option<String>> = vec![None; size];
        let mut types = vec![TokenType::Unused; size];
        let mut set = |id: Option<u64>, text: &str, kind: TokenType| {
            let id = id.ok_or_else(|| format!("token {text:?} has no id"))? as usize;
            if id >= size {
                return Err(format!("token {text:?} has id {id}, but the embedding has {size} rows"));
            }
            texts[id] = Some(text.to_owned());
            types[id] = kind;
            Ok(())
        };
        for (text, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
            let of_piece = match kind {
                Kind::SentencePiece if unknown == Some(text) => TokenType::Unknown,
                Kind::SentencePiece if is_byte(text) => TokenType::Byte,
                _ => TokenType::Normal,
            };
            set(id.as_u64(), text, of_piece)?;
        }
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            let text = token["content"].as_str().ok_or("an added token has no text")?;
            let id = token["id"].as_u64();
            if kind == Kind::SentencePiece && unknown == Some(text) {
                set(id, text, TokenType::Unknown)?;
            } else if token["special"] == true || looks_like_control(text) {
                set(id, text, TokenType::Control)?;
            } else {
                // Text that users type, matched before the space marker is put in.
                set(id, &text.replace('\u{2581}', " "), TokenType::UserDefined)?;
            }
        }
        let texts: Vec<String> = texts
            .into_iter()
            .enumerate()
            .map(|(id, text)| text.unwrap_or_else(|| format!("[PAD{id}]")))
            .collect();
        let mut first = HashMap::new();
        for (id, text) in texts.iter().enumerate() {
            if let Some(other) = first.insert(text.as_str(), id) {
                return Err(format!("tokens {other} and {id} have the same text {text:?}"));
            }
        }
        Ok(Self { texts, types })
    }

    fn id(&self, text: &str) -> Option<u32> {
        self.texts.iter().position(|other| other == text).map(|id| id as u32)
    }
}

/// Scores that make llama.cpp's SentencePiece merge in the order of the BPE merges: the earlier the first merge that
/// makes a token, the higher its score. Tokens that no merge makes are never merged to.
fn scores(vocabulary: &Vocabulary, merges: &[(String, String)]) -> Vec<f32> {
    let mut rank = HashMap::new();
    for (index, (left, right)) in merges.iter().enumerate() {
        rank.entry(format!("{left}{right}")).or_insert(index);
    }
    let last = merges.len();
    let score = |text: &String, kind: TokenType| match kind {
        TokenType::Normal => -(rank.get(text).copied().unwrap_or(last) as f32),
        TokenType::UserDefined => -1000.0,
        _ => 0.0,
    };
    vocabulary.texts.iter().zip(&vocabulary.types).map(|(text, &kind)| score(text, kind)).collect()
}

/// The merges, written as `"left right"` by older and as `["left", "right"]` by newer files.
fn merges(json: &Json) -> Option<Vec<(String, String)>> {
    let pair = |merge: &Json| match merge {
        Json::String(text) => text.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned())),
        Json::Array(pair) => Some((pair.first()?.as_str()?.to_owned(), pair.get(1)?.as_str()?.to_owned())),
        _ => None,
    };
    json["model"]["merges"].as_array()?.iter().map(pair).collect()
}

/// GGUF separates the parts by a space, so a space inside one is spelt as byte-level BPE spells it.
fn spell_merge(left: &str, right: &str) -> String {
    format!("{} {}", left.replace(' ', "\u{120}"), right.replace(' ', "\u{120}"))
}

fn unknown_token<'a>(json: &'a Json, config: &'a Json) -> Option<&'a str> {
    let token = &config["unk_token"];
    token.as_str().or_else(|| token["content"].as_str()).or_else(|| json["model"]["unk_token"].as_str())
}

/// Whether the post-processor ends a text with a special token.
fn adds_eos(json: &Json) -> bool {
    let processor = &json["post_processor"];
    let steps =
        processor["processors"].as_array().map_or_else(|| vec![processor], |steps| steps.iter().collect());
    steps
        .iter()
        .filter_map(|step| step["single"].as_array())
        .any(|single| single.last().is_some_and(|last| last.get("SpecialToken").is_some()))
}

/// Whether a text starts with the marker of a space that it does not have.
fn adds_space(json: &Json) -> bool {
    let metaspace = step(&json["pre_tokenizer"], "Metaspace");
    let prepends = metaspace.is_some_and(|step| match step["prepend_scheme"].as_str() {
        Some(scheme) => scheme != "never",
        None => step["add_prefix_space"] != false,
    });
    prepends || has_step(&json["normalizer"], "Prepend")
}

fn has_step(component: &Json, kind: &str) -> bool {
    step(component, kind).is_some()
}

/// The step of this type in a normalizer, pre-tokenizer or decoder, which may be a sequence of steps.
fn step<'a>(component: &'a Json, kind: &str) -> Option<&'a Json> {
    if component["type"] == kind {
        return Some(component);
    }
    let steps =
        ["normalizers", "pretokenizers", "decoders"].iter().find_map(|list| component[list].as_array());
    steps?.iter().find_map(|component| step(component, kind))
}

fn is_byte(text: &str) -> bool {
    let hex = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    hex.is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
}

/// llama.cpp's converter takes these for control tokens even where `tokenizer.json` does not call them special.
fn looks_like_control(text: &str) -> bool {
    let wrapped = |open: &str, close: &str| {
        text.len() >= open.len() + close.len() && text.starts_with(open) && text.ends_with(close)
    };
    matches!(text, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || wrapped("<|", "|>")
        || wrapped("<\u{ff5c}", "\u{ff5c}>")
        || wrapped("<unused", ">")
}

fn read(path: &Path) -> Result<Json, FormatError> {
    let bytes = std::fs::read(path).map_err(|source| FormatError::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| FormatError::Json { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use TokenType::{Byte, Control, Normal, Unknown, Unused, UserDefined};
    use serde_json::json;

    use super::*;

    fn sentence_piece() -> Json {
        json!({
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}]},
            "pre_tokenizer": null,
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
            "post_processor": {"type": "TemplateProcessing", "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]},
            "added_tokens": [
                {"id": 0, "content": "<unk>", "special": true},
                {"id": 1, "content": "<s>", "special": true},
                {"id": 7, "content": "\u{2581}\u{2581}", "special": false},
                {"id": 8, "content": "<|user|>", "special": false},
            ],
            "model": {
                "type": "BPE", "byte_fallback": true, "unk_token": "<unk>",
                "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3, "b": 4, "ab": 5, "aab": 6},
                "merges": ["a b", ["a", "ab"]],
            },
        })
    }

    #[test]
    fn sentence_piece_types_and_scores_follow_the_pieces() {
        let json = sentence_piece();
        let kind = Kind::of(&json).expect("known");
        assert_eq!((kind.name(), adds_space(&json), adds_eos(&json)), ("llama", true, false));
        let vocabulary =
            Vocabulary::new(&json, kind, unknown_token(&json, &Json::Null), 10).expect("ten rows");
        assert_eq!(
            vocabulary.types,
            [Unknown, Control, Byte, Normal, Normal, Normal, Normal, UserDefined, Control, Unused]
        );
        assert_eq!(vocabulary.texts[7], "  ");
        assert_eq!(vocabulary.texts[9], "[PAD9]");
        let scores = scores(&vocabulary, &merges(&json).expect("two forms"));
        assert_eq!(scores[5..8], [0.0, -1.0, -1000.0]);
    }

    #[test]
    fn a_vocabulary_larger_than_the_embedding_is_refused() {
        let json = sentence_piece();
        let error = Vocabulary::new(&json, Kind::SentencePiece, None, 8).err();
        assert_eq!(error.as_deref(), Some("token \"<|user|>\" has id 8, but the embedding has 8 rows"));
    }

    #[test]
    fn other_kinds_are_not_guessed() {
        assert!(Kind::of(&json!({"model": {"type": "Unigram"}})).is_none());
        assert!(Kind::of(&json!({"model": {"type": "BPE"}, "decoder": {"type": "WordPiece"}})).is_none());
    }

    #[test]
    fn merges_spell_spaces() {
        assert_eq!(spell_merge("a ", "b"), "a\u{120} b");
    }
}
