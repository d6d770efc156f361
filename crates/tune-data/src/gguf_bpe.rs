//! BPE from the tables of a GGUF file: byte-level (`gpt2`) or over characters (`gemma4`).

use tokenizers::AddedToken;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};
use tokenizers::normalizers::replace::Replace;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tune_formats::{GgufTokenizer, TokenType};

use crate::DataError;
use crate::byte_level_bpe::{ByteLevelBpe, Ids};
use crate::pre_tokenizer::PreTokenizer;
use crate::sentencepiece::SPACE;

/// Kinds of `tokenizer.ggml.model` that can be rebuilt, those of [`crate::sentencepiece`] among them.
const SUPPORTED: &str = "gpt2, gemma4, llama";

/// The tables of a BPE, checked.
pub(crate) struct GgufBpe<'a> {
    tables: &'a GgufTokenizer,
    /// Absent for BPE over characters.
    pre: Option<&'static PreTokenizer>,
    ids: Ids<'a>,
    merges: Vec<Merge<'a>>,
}

struct Merge<'a> {
    parts: [&'a str; 2],
    /// Left, right and result.
    ids: (u32, u32, u32),
}

impl<'a> GgufBpe<'a> {
    /// `None` for SentencePiece. `model` is its name in messages.
    ///
    /// # Errors
    /// Kinds that cannot be rebuilt, and tables that do not fit together.
    pub(crate) fn of(tables: &'a GgufTokenizer, model: &str) -> Result<Option<Self>, DataError> {
        let invalid = |reason| DataError::TokenizerTables { model: model.to_owned(), reason };
        if tables.token_types.len() != tables.tokens.len() {
            let (types, tokens) = (tables.token_types.len(), tables.tokens.len());
            return Err(invalid(format!("{types} token types for {tokens} tokens")));
        }
        let byte_level = match tables.model.as_str() {
            "gpt2" => tables.pre.as_deref() != Some("gemma4"),
            "gemma4" => false,
            "llama" => return Ok(None),
            kind => {
                return Err(DataError::UnknownTokenizer {
                    model: model.to_owned(),
                    kind: kind.to_owned(),
                    supported: SUPPORTED,
                });
            }
        };
        let pre = if byte_level {
            let name = tables.pre.as_deref().unwrap_or("default");
            Some(PreTokenizer::named(name).ok_or_else(|| DataError::UnknownPreTokenizer {
                model: model.to_owned(),
                name: name.to_owned(),
                known: PreTokenizer::known(),
            })?)
        } else {
            None
        };
        let ids = ids(tables).map_err(invalid)?;
        let merges = merges(tables, &ids).map_err(invalid)?;
        Ok(Some(Self { tables, pre, ids, merges }))
    }

    /// BPE over bytes, which GGUF files spell as characters.
    pub(crate) fn is_byte_level(&self) -> bool {
        self.pre.is_some()
    }

    /// The engine for BPE over bytes.
    pub(crate) fn byte_level(&self) -> Option<ByteLevelBpe> {
        let pre = self.pre?;
        let added: Vec<_> = added_tokens(self.tables).collect();
        ByteLevelBpe::new(
            &self.ids,
            self.merges.iter().map(|merge| merge.ids),
            pre.ignore_merges,
            true,
            pre.splits,
            added.iter().map(|(id, token)| (*id, token)),
        )
    }

    /// The same in the tokenizers crate.
    pub(crate) fn tokenizer(&self) -> tokenizers::Result<tokenizers::Tokenizer> {
        let vocab = self.tables.tokens.iter().cloned().zip(0..);
        let merges =
            self.merges.iter().map(|Merge { parts: [left, right], .. }| ((*left).into(), (*right).into()));
        let builder = BPE::builder().vocab_and_merges(vocab.collect::<Vocab>(), merges.collect());
        let mut tokenizer = match self.pre {
            Some(pre) => {
                // GPT-2's BPE over bytes spelt as characters
                let mut tokenizer =
                    tokenizers::Tokenizer::new(builder.ignore_merges(pre.ignore_merges).build()?);
                tokenizer.with_pre_tokenizer(Some(pre.build()?));
                tokenizer.with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::default())));
                tokenizer
            }
            None => character_bpe(builder, self.tables)?,
        };
        let added = added_tokens(self.tables).map(|(_, token)| token);
        tokenizer.add_tokens(added.collect::<Vec<_>>())?;
        Ok(tokenizer)
    }
}

/// Gemma 4's BPE over characters, with `▁` for a space and byte tokens for what is not in the vocabulary.
fn character_bpe(builder: BpeBuilder, tables: &GgufTokenizer) -> tokenizers::Result<tokenizers::Tokenizer> {
    let mut builder = builder.byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = tables.unk.and_then(|id| tables.tokens.get(id as usize)) {
        builder = builder.unk_token(unknown.clone());
    }
    let mut tokenizer = tokenizers::Tokenizer::new(builder.build()?);
    tokenizer.with_normalizer(Some(Replace::new(" ", SPACE.to_string())?))?;
    let lines = SplitPattern::Regex(r"[^\n]+|[\n]+".to_owned());
    tokenizer.with_pre_tokenizer(Some(Split::new(lines, SplitDelimiterBehavior::Isolated, false)?));
    Ok(tokenizer)
}

fn ids(tables: &GgufTokenizer) -> Result<Ids<'_>, String> {
    let mut ids = Ids::with_capacity_and_hasher(tables.tokens.len(), rustc_hash::FxBuildHasher);
    for (id, text) in (0..).zip(tables.tokens.iter()) {
        if let Some(other) = ids.insert(text, id) {
            return Err(format!("tokens {other} and {id} have the same text {text:?}"));
        }
    }
    Ok(ids)
}

/// `left right`, separated by the first space that is not the very first character. Both and what they give must
/// be tokens: the tokenizers crate indexes out of bounds otherwise.
fn merges<'a>(tables: &'a GgufTokenizer, ids: &Ids) -> Result<Vec<Merge<'a>>, String> {
    let mut joined = String::new();
    let split = |(index, merge): (usize, &'a String)| {
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let space = merge[first..].find(' ').map(|at| first + at);
        let space = space.ok_or_else(|| format!("merge {index} is {merge:?}, expected two parts"))?;
        let parts @ [left, right] = [&merge[..space], &merge[space + 1..]];
        joined.clear();
        joined.extend(parts);
        let id = |part: &str| {
            ids.get(part)
                .copied()
                .ok_or_else(|| format!("merge {index} is {merge:?} and {part:?} is not a token"))
        };
        Ok(Merge { parts, ids: (id(left)?, id(right)?, id(&joined)?) })
    };
    tables.merges.iter().enumerate().map(split).collect()
}

/// What is cut out of a text before it is merged.
fn added_tokens(tables: &GgufTokenizer) -> impl Iterator<Item = (u32, AddedToken)> {
    (0..).zip(tables.tokens.iter().zip(&tables.token_types)).filter_map(|(id, (text, kind))| {
        let special = match kind {
            TokenType::Control | TokenType::Unknown => true,
            TokenType::UserDefined => false,
            TokenType::Normal | TokenType::Unused | TokenType::Byte => return None,
        };
        (!text.is_empty()).then(|| (id, AddedToken::from(text.clone(), special).normalized(false)))
    })
}
