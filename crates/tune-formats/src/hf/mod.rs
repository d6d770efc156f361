//! Directories in Hugging Face layout: `config.json`, `*.safetensors`, tokenizer files.

mod config;
mod names;
mod tokenizer;
mod weights;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::DeserializeOwned;

use crate::safetensors::SafetensorsFiles;
use crate::{BaseModel, FormatError, Source, Weights};

pub use weights::HfWeights;

/// An open directory in Hugging Face layout.
#[derive(Debug)]
pub struct HfDirectory {
    path: PathBuf,
    files: Arc<SafetensorsFiles>,
}

impl HfDirectory {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The weights as stored.
    pub fn files(&self) -> &SafetensorsFiles {
        &self.files
    }
}

/// Opens a model directory: [`crate::open`] for a directory.
///
/// # Errors
/// Missing files, an unsupported configuration or dtype, or tensors that do not fit the configuration.
pub fn open(path: &Path) -> Result<BaseModel, FormatError> {
    let not_a_model =
        |reason: &str| FormatError::NotAModel { path: path.to_owned(), reason: reason.to_owned() };
    if !path.join("config.json").exists() {
        if path.join("adapter_config.json").exists() {
            return Err(not_a_model("it holds a PEFT adapter, expected the base model"));
        }
        let reason = match first_gguf(path) {
            Some(file) => {
                format!("the directory has no config.json, but a GGUF file that can be passed itself: {file}")
            }
            None => "the directory has no config.json".to_owned(),
        };
        return Err(not_a_model(&reason));
    }
    let (mut config, ids) = config::read(&path.join("config.json"))?;
    let files = Arc::new(SafetensorsFiles::open_directory(path)?);
    let weights = HfWeights::new(Arc::clone(&files), &mut config)?;
    let tokenizer = tokenizer::read(path, &ids)?;
    Ok(BaseModel {
        path: path.to_owned(),
        name: name(path),
        config: config.model,
        weights: Box::new(weights),
        tokenizer: tokenizer.files,
        chat_template: tokenizer.chat_template,
        special: tokenizer.special,
        source: Source::HfDirectory(Arc::new(HfDirectory { path: path.to_owned(), files })),
    })
}

/// The weights of a model directory alone, whatever tokenizer it has or lacks.
///
/// # Errors
/// As [`open`], but for the tokenizer.
pub fn open_weights(path: &Path) -> Result<Box<dyn Weights>, FormatError> {
    let (mut config, _) = config::read(&path.join("config.json"))?;
    let files = Arc::new(SafetensorsFiles::open_directory(path)?);
    Ok(Box::new(HfWeights::new(files, &mut config)?))
}

/// Name of the first GGUF file in a directory, in alphabetical order.
fn first_gguf(directory: &Path) -> Option<String> {
    let paths = std::fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path());
    let files = paths.filter(|path| path.extension().is_some_and(|extension| extension == "gguf")).min();
    files?.file_name().map(|name| name.to_string_lossy().into_owned())
}

/// `OWNER/REPO` for a directory of the Hub's cache, otherwise the name of the directory.
fn name(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let repository = path.components().find_map(|part| {
        let part = part.as_os_str().to_str()?;
        part.strip_prefix("models--").map(|repository| repository.replacen("--", "/", 1))
    });
    repository
        .or_else(|| path.file_name().map(|name| name.to_string_lossy().into_owned()))
        .unwrap_or_else(|| path.display().to_string())
}

/// A JSON file, or `None` where there is none.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, FormatError> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| FormatError::Json { path: path.to_owned(), source }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FormatError::read(path, error)),
    }
}
