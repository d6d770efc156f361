//! Bytes on disk ↔ typed values: GGUF, safetensors, PEFT adapters, Modelfile.
//!
//! Everything above this crate sees Hugging Face names and the Hugging Face layout. All renaming, permutation
//! and transposition lives in the `names` modules here.

mod config;
mod weights;

pub use config::{Architecture, ModelConfig, RopeScaling};
pub use weights::{BaseModel, Weights};
