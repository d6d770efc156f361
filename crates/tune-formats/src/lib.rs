//! Bytes on disk ↔ typed values: GGUF, safetensors, PEFT adapters, Modelfile.
//!
//! [`open`] takes a `.gguf` file or a directory in Hugging Face layout and gives a [`BaseModel`]: configuration,
//! tokenizer files, chat template and weights. Everything above this crate sees Hugging Face names and the
//! Hugging Face layout; all renaming, permutation and transposition lives in the `names` modules here.
//! Weights are memory-mapped and used as stored. Every write goes to a temporary file, is synced, then renamed.

mod atomic;
mod base;
mod config;
mod error;
mod factor;
pub mod gguf;
pub mod hf;
mod mapped;
pub mod modelfile;
pub mod peft;
pub mod provenance;
pub mod safetensors;
mod tokenizer;
mod weights;

pub use base::{BaseModel, Source, open};
pub use config::{Architecture, ModelConfig, RopeScaling};
pub use error::{FormatError, TensorProblem};
pub use tokenizer::{GgufTokenizer, SpecialTokens, TokenType, TokenizerFiles};
pub use weights::{Weights, expected_tensors};
