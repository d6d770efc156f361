//! What a model says about its tokenizer: files or tables, and the special tokens.

use std::path::PathBuf;
use std::sync::Arc;

/// Where the tokenizer of a model comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenizerFiles {
    /// Files in Hugging Face layout.
    Json {
        /// `tokenizer.json`.
        tokenizer_json: PathBuf,
        /// `tokenizer_config.json`, where there is one.
        tokenizer_config: Option<PathBuf>,
    },
    /// Tables in GGUF metadata.
    Gguf(GgufTokenizer),
}

/// The `tokenizer.ggml.*` tables of a GGUF file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTokenizer {
    /// `gpt2` (byte-level BPE), `llama` (SentencePiece), …
    pub model: String,
    /// Name of the pre-tokenizer, for BPE.
    pub pre: Option<String>,
    /// Text of each token, by id, in the spelling of the tokenizer's kind.
    pub tokens: Arc<Vec<String>>,
    /// Kind of each token, by id; as long as `tokens`.
    pub token_types: Vec<TokenType>,
    /// Score of each token, by id, for SentencePiece; otherwise empty.
    pub scores: Vec<f32>,
    /// `left right` pairs in order of priority, for BPE; otherwise empty.
    pub merges: Arc<Vec<String>>,
    /// Token for text that cannot be encoded.
    pub unk: Option<u32>,
    /// The engine prepends BOS.
    pub add_bos: bool,
    /// The engine appends EOS.
    pub add_eos: bool,
    /// SentencePiece prepends a space to the text.
    pub add_space_prefix: bool,
}

/// Kind of a token in GGUF metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenType {
    /// Ordinary text.
    Normal,
    /// Stands for what cannot be encoded.
    Unknown,
    /// Special: recognised only where special tokens are asked for, never shown.
    Control,
    /// Added by hand: always recognised, shown as text.
    UserDefined,
    /// Padding of the vocabulary.
    Unused,
    /// One byte, spelt `<0xNN>`.
    Byte,
}

impl TokenType {
    /// The type with this number in `tokenizer.ggml.token_type`.
    pub fn from_ggml(number: i64) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// Its number in `tokenizer.ggml.token_type`.
    pub fn to_ggml(self) -> i32 {
        match self {
            Self::Normal => 1,
            Self::Unknown => 2,
            Self::Control => 3,
            Self::UserDefined => 4,
            Self::Unused => 5,
            Self::Byte => 6,
        }
    }
}

/// The ids with a role of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begin of text.
    pub bos: Option<u32>,
    /// End of text: the token that the tokenizer names `eos_token`.
    pub eos: Option<u32>,
    /// Padding. Often equal to `eos`, so nothing may be masked by this id.
    pub pad: Option<u32>,
    /// End of a chat turn.
    pub eot: Option<u32>,
    /// Every token that ends a generation, sorted: `eos`, `eot` and what `generation_config.json` lists.
    pub eos_ids: Vec<u32>,
    /// The tokenizer prepends `bos`.
    pub add_bos: bool,
}

/// Texts of tokens that end a chat turn, the likeliest first.
pub(crate) const END_OF_TURN: [&str; 11] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<|endoftext|>",
    "<|end_of_text|>",
];

/// Texts of tokens that end a generation beside those of [`END_OF_TURN`].
pub(crate) const END_OF_GENERATION: [&str; 11] = [
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "<|eom_id|>",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
];
