//! GGUF: the single-file model format of llama.cpp and Ollama, versions 2 and 3.
//!
//! [`GgufFile`] reads a file or a split set through memory maps and gives metadata, tensor list and bytes as
//! stored; [`GgufWriter`] streams one out. [`names`] holds everything that differs between GGUF's view of a
//! model and Hugging Face's.

use std::path::Path;
use std::sync::Arc;

use crate::{BaseModel, FormatError, Source, TokenizerFiles};

mod adapter;
mod config;
mod cursor;
pub mod names;
mod reader;
mod split;
mod tokenizer;
mod value;
mod weights;
mod writer;

pub use adapter::{is_adapter, read_adapter};
pub use config::hyper_parameters;
pub use reader::{GgufFile, TensorInfo};
pub use tokenizer::read_tokenizer;
pub use value::{Array, Metadata, Value};
pub use weights::GgufWeights;
pub use writer::{GgufWriter, TensorSpec};

/// The default of `general.alignment`.
pub const ALIGNMENT: usize = 32;

/// Opens a GGUF model: [`crate::open`] for a file.
///
/// # Errors
/// A damaged file, an unsupported architecture or type, or tensors that do not fit the configuration.
pub fn open(path: &Path) -> Result<BaseModel, FormatError> {
    let file = Arc::new(GgufFile::open(path)?);
    let metadata = file.metadata();
    if let Some(kind) = metadata.string("general.type").filter(|kind| *kind != "model") {
        return Err(FormatError::NotAModelGguf { path: path.to_owned(), found: kind.to_owned() });
    }
    let config = config::read(&file)?;
    let (tokenizer, special) = read_tokenizer(&file)?;
    let weights = GgufWeights::new(Arc::clone(&file), &config)?;
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    Ok(BaseModel {
        path: path.to_owned(),
        name: metadata.string("general.name").map(str::to_owned).or(stem).unwrap_or_default(),
        config,
        weights: Box::new(weights),
        tokenizer: TokenizerFiles::Gguf(tokenizer),
        chat_template: metadata.string("tokenizer.chat_template").map(str::to_owned),
        special,
        source: Source::Gguf(file),
    })
}
