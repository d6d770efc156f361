//! Text ↔ token ids, with the ids of the engine that will run the model.
//!
//! Built from `tokenizer.json`, or rebuilt from the tables of a GGUF file: byte-level BPE (`gpt2`), BPE over
//! characters (`gemma4`) or SentencePiece (`llama`). The tokenizers crate says what the ids are; byte-level BPE,
//! which most models have, gets them from [`ByteLevelBpe`], and SentencePiece tables from [`SentencePiece`].
//!
//! Encoding never adds a token of its own, except in [`Tokenizer::encode_sequence`], the one place that puts
//! BOS in front.

use std::sync::OnceLock;

use tokenizers::NormalizerWrapper;
use tune_formats::{BaseModel, GgufTokenizer, SpecialTokens, TokenType, TokenizerFiles};
use unicode_normalization_alignments::is_nfc;

use crate::byte_level_bpe::ByteLevelBpe;
use crate::fingerprint::Fingerprint;
use crate::gguf_bpe::GgufBpe;
use crate::sentencepiece::SentencePiece;
use crate::vocabulary::{Spelling, StreamDecoder, Vocabulary};
use crate::{DataError, tokenizer_json};

/// One token of a text and the bytes of the text that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// First byte.
    pub start: usize,
    /// End, exclusive. Tokens that share one character have the same bytes; a token of its own has none.
    pub end: usize,
}

/// The tokenizer of a model.
pub struct Tokenizer {
    engine: Engine,
    vocabulary: Vocabulary,
    special: SpecialTokens,
    fingerprint: [u8; 32],
}

enum Engine {
    ByteLevel(Box<ByteLevelBpe>),
    HuggingFace(Box<HuggingFace>),
    SentencePiece(Box<SentencePiece>),
}

/// An engine of the tokenizers crate.
struct HuggingFace {
    tokenizer: tokenizers::Tokenizer,
    /// The same, reading control tokens as plain text; made when it is first asked for.
    plain: OnceLock<tokenizers::Tokenizer>,
    /// Gives the ids of texts that are in Unicode's normal form C.
    composed: Option<ByteLevelBpe>,
}

impl Tokenizer {
    /// The tokenizer of an opened model.
    ///
    /// # Errors
    /// A tokenizer that does not load or whose kind is not known.
    pub fn from_base(base: &BaseModel) -> Result<Self, DataError> {
        Self::new(&base.tokenizer, &base.special, &base.name)
    }

    /// The tokenizer described by `files`; `model` is its name in messages.
    ///
    /// # Errors
    /// A tokenizer that does not load or whose kind is not known.
    pub fn new(files: &TokenizerFiles, special: &SpecialTokens, model: &str) -> Result<Self, DataError> {
        let (engine, vocabulary) = match files {
            TokenizerFiles::Json { tokenizer_json, .. } => {
                let invalid = |reason| DataError::TokenizerFile { path: tokenizer_json.clone(), reason };
                let (tokenizer, merges) = tokenizer_json::load(tokenizer_json).map_err(invalid)?;
                let vocabulary = Vocabulary::of(&tokenizer).map_err(invalid)?;
                let byte_level = tokenizer_json::byte_level_bpe(&tokenizer, &merges);
                let engine = match (byte_level, tokenizer.get_normalizer()) {
                    (Some(engine), None) => Engine::ByteLevel(Box::new(engine)),
                    (Some(engine), Some(NormalizerWrapper::NFC(_))) => {
                        HuggingFace::engine(tokenizer, Some(engine))
                    }
                    _ => HuggingFace::engine(tokenizer, None),
                };
                (engine, vocabulary)
            }
            TokenizerFiles::Gguf(tables) => from_gguf(&with_roles(tables, special), model)?,
        };
        let fingerprint = fingerprint(files, special, model);
        Ok(Self { engine, vocabulary, special: special.clone(), fingerprint })
    }

    /// Token ids of `text`, without BOS or EOS.
    ///
    /// `special`: control tokens spelt out in the text, such as `<|im_end|>`, become their ids, as a rendered
    /// chat template needs; otherwise they are ordinary text.
    ///
    /// # Errors
    /// Text that the tokenizer refuses.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, DataError> {
        Ok(self.tokens(text, special)?.into_iter().map(|token| token.id).collect())
    }

    /// Token ids of a text that begins a sequence: control tokens are recognised, and BOS goes in front if the
    /// model's tokenizer adds one and the text does not begin with it.
    ///
    /// # Errors
    /// Text that the tokenizer refuses.
    pub fn encode_sequence(&self, text: &str) -> Result<Vec<u32>, DataError> {
        Ok(self.sequence_tokens(text)?.into_iter().map(|token| token.id).collect())
    }

    /// [`Tokenizer::encode_sequence`] with the bytes of each token; an added BOS has none.
    ///
    /// # Errors
    /// Text that the tokenizer refuses.
    pub fn sequence_tokens(&self, text: &str) -> Result<Vec<Token>, DataError> {
        let mut tokens = self.tokens(text, true)?;
        if let Some(bos) = self.special.bos.filter(|_| self.special.add_bos)
            && tokens.first().is_none_or(|token| token.id != bos)
        {
            tokens.insert(0, Token { id: bos, start: 0, end: 0 });
        }
        Ok(tokens)
    }

    /// Text of `ids`, with control tokens spelt out. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.vocabulary.bytes(*id)).copied().collect();
        let bytes = self.vocabulary.without_prefix_space(&bytes);
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// Decodes tokens one by one as they are generated, leaving out control tokens.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(&self.vocabulary)
    }

    /// Bytes that a token stands for; empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.vocabulary.bytes(id)
    }

    /// The token has a role in the sequence rather than text of its own: `<|im_end|>`, `</s>`, …
    pub fn is_control(&self, id: u32) -> bool {
        self.vocabulary.is_control(id)
    }

    /// Number of ids. The model's embedding may have more rows.
    pub fn len(&self) -> usize {
        self.vocabulary.len()
    }

    /// There is no token at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ids with a role of their own.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// Spelling of a special token as a chat template writes it.
    pub fn spelling(&self, id: Option<u32>) -> Option<String> {
        id.map(|id| String::from_utf8_lossy(self.vocabulary.bytes(id)).into_owned())
    }

    /// Differs between tokenizers that differ in any way.
    pub(crate) fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    fn tokens(&self, text: &str, special: bool) -> Result<Vec<Token>, DataError> {
        match &self.engine {
            Engine::ByteLevel(engine) => Ok(engine.encode(text, special)),
            Engine::HuggingFace(engine) => engine.encode(text, special),
            Engine::SentencePiece(engine) => Ok(engine.encode(text, special)),
        }
    }
}

impl HuggingFace {
    fn engine(tokenizer: tokenizers::Tokenizer, composed: Option<ByteLevelBpe>) -> Engine {
        Engine::HuggingFace(Box::new(Self { tokenizer, plain: OnceLock::new(), composed }))
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<Token>, DataError> {
        if let Some(engine) = self.composed.as_ref().filter(|_| text.is_ascii() || is_nfc(text)) {
            return Ok(engine.encode(text, special));
        }
        let tokenizer = if special {
            &self.tokenizer
        } else {
            self.plain.get_or_init(|| {
                let mut plain = self.tokenizer.clone();
                plain.set_encode_special_tokens(true);
                plain
            })
        };
        let encoding =
            tokenizer.encode(text, false).map_err(|error| DataError::Encode { reason: error.to_string() })?;
        let offsets = encoding.get_offsets();
        let ids = encoding.get_ids();
        Ok(ids.iter().zip(offsets).map(|(&id, &(start, end))| Token { id, start, end }).collect())
    }
}

/// A model's tokenizer as `tokenizer.json`, rebuilt from the tables of its GGUF file, without the steps that add
/// special tokens. `None` for a model that has no such tables, and for SentencePiece tables, which have no such form.
///
/// # Errors
/// Tables that do not load.
pub fn gguf_tokenizer_json(base: &BaseModel) -> Result<Option<String>, DataError> {
    let TokenizerFiles::Gguf(tables) = &base.tokenizer else { return Ok(None) };
    let tables = with_roles(tables, &base.special);
    Ok(match GgufBpe::of(&tables, &base.name)? {
        Some(bpe) => bpe.tokenizer().and_then(|tokenizer| tokenizer.to_string(true)).ok(),
        None => None,
    })
}

/// Everything that the parameters of [`Tokenizer::new`] say. A `tokenizer.json` that can no longer be read is known by
/// its path alone; it has just been read.
fn fingerprint(files: &TokenizerFiles, special: &SpecialTokens, model: &str) -> [u8; 32] {
    let mut print = Fingerprint::new();
    print.value(&(special, model));
    match files {
        TokenizerFiles::Json { tokenizer_json, .. } => {
            print.value(tokenizer_json).part(&std::fs::read(tokenizer_json).unwrap_or_default());
        }
        TokenizerFiles::Gguf(GgufTokenizer {
            model,
            pre,
            tokens,
            token_types,
            scores,
            merges,
            unk,
            add_bos,
            add_eos,
            add_space_prefix,
        }) => {
            print.value(&(model, pre, unk, add_bos, add_eos, add_space_prefix)).list(tokens).list(merges);
            let types: Vec<u8> = token_types.iter().map(|kind| *kind as u8).collect();
            let scores: Vec<_> = scores.iter().map(|score| score.to_le_bytes()).collect();
            print.part(&types).part(scores.as_flattened());
        }
    }
    print.finish()
}

/// The tables with the kinds that engines give to some tokens by their text: what ends a generation is a control
/// token however it was written, and an unused control token is never recognised in text.
fn with_roles(tables: &GgufTokenizer, special: &SpecialTokens) -> GgufTokenizer {
    let mut tables = tables.clone();
    let spelt_as_special = |text: &str| text.contains(['<', '[']);
    for (id, (text, kind)) in tables.tokens.iter().zip(&mut tables.token_types).enumerate() {
        if *kind == TokenType::Control && text.contains("unused") {
            *kind = TokenType::Unused;
        } else if special.eos_ids.contains(&(id as u32)) && spelt_as_special(text) {
            *kind = TokenType::Control;
        }
    }
    tables
}

fn from_gguf(tables: &GgufTokenizer, model: &str) -> Result<(Engine, Vocabulary), DataError> {
    let invalid = |reason| DataError::TokenizerTables { model: model.to_owned(), reason };
    let Some(bpe) = GgufBpe::of(tables, model)? else {
        let name = model.to_lowercase();
        let phi3 = name.contains("phi-3") || name.contains("phi3");
        let engine = SentencePiece::from_gguf(tables, phi3).map_err(invalid)?;
        let vocabulary = Vocabulary::from_gguf(tables, Spelling::SentencePiece);
        return Ok((Engine::SentencePiece(Box::new(engine)), vocabulary));
    };
    let engine = match bpe.byte_level() {
        Some(engine) => Engine::ByteLevel(Box::new(engine)),
        None => HuggingFace::engine(bpe.tokenizer().map_err(|error| invalid(error.to_string()))?, None),
    };
    let spelling = if bpe.is_byte_level() { Spelling::ByteLevel } else { Spelling::SentencePiece };
    Ok((engine, Vocabulary::from_gguf(tables, spelling)))
}
