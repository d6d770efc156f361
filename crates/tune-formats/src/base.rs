//! A base model opened for reading, whatever its container.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tune_quant::Storage;

use crate::gguf::GgufFile;
use crate::hf::HfDirectory;
use crate::{FormatError, ModelConfig, SpecialTokens, TokenizerFiles, Weights, gguf, hf};

/// Bytes of each tensor that enter [`BaseModel::digest`].
const DIGEST_BYTES: usize = 4096;

/// A base model opened for reading.
pub struct BaseModel {
    /// The file or directory.
    pub path: PathBuf,
    /// What the model is called: `general.name`, the Hub repository, or the name of the file or directory.
    pub name: String,
    /// Hyper-parameters.
    pub config: ModelConfig,
    /// The weights.
    pub weights: Box<dyn Weights>,
    /// Where the tokenizer comes from.
    pub tokenizer: TokenizerFiles,
    /// Jinja source of the model's chat template.
    pub chat_template: Option<String>,
    /// The ids with a role of their own.
    pub special: SpecialTokens,
    /// The container, for whoever copies metadata or tensors as stored.
    pub source: Source,
}

/// The container of a base model.
#[derive(Clone, Debug)]
pub enum Source {
    /// A GGUF file, perhaps split.
    Gguf(Arc<GgufFile>),
    /// A directory in Hugging Face layout.
    HfDirectory(Arc<HfDirectory>),
}

/// Opens a `.gguf` file (the first part of a split one) or a directory in Hugging Face layout.
///
/// Checks the container, the configuration, and that every tensor of the architecture is there in its shape.
/// Weights stay on disk, memory-mapped.
///
/// # Errors
/// Anything that [`FormatError`] names, apart from adapters and writing.
pub fn open(path: &Path) -> Result<BaseModel, FormatError> {
    let kind = std::fs::metadata(path).map_err(|error| FormatError::read(path, error))?;
    if kind.is_dir() { hf::open(path) } else { gguf::open(path) }
}

impl BaseModel {
    /// Stored weights, counted one by one.
    pub fn parameters(&self) -> u64 {
        let elements =
            |name: &String| self.weights.shape(name).map_or(0, |s| s.iter().product::<usize>()) as u64;
        self.weights.names().iter().map(elements).sum()
    }

    /// Identity of the weights, as 64 hexadecimal digits: SHA-256 over the name, type, shape and first 4 KiB of
    /// every tensor, in order of names.
    ///
    /// Names of files, metadata and splitting do not enter; quantisation does. It tells two bases apart without
    /// reading gigabytes; it does not prove that every byte is equal.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn digest(&self) -> Result<String, FormatError> {
        let mut hash = Sha256::new();
        for name in self.weights.names() {
            let shape = self.weights.shape(&name).unwrap_or_default();
            hash.update(format!("{name} {shape:?}\n"));
            if shape.len() == 2 {
                let matrix = self.weights.matrix(&name)?;
                hash.update(matrix.type_name());
                if let Storage::Blocks { bytes, .. } = matrix.storage() {
                    hash.update(&bytes[..bytes.len().min(DIGEST_BYTES)]);
                }
                // The system has mapped more pages than were read, of weights that may never be needed again.
                matrix.release();
            } else {
                let values = self.weights.vector(&name)?;
                let bytes: &[u8] = bytemuck::cast_slice(&values);
                hash.update(&bytes[..bytes.len().min(DIGEST_BYTES)]);
            }
        }
        let digest = hash.finalize();
        let digits = digest.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        Ok(digits.map(|digit| char::from_digit(digit.into(), 16).unwrap_or_default()).collect())
    }
}
