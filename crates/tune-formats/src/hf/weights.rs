//! Weights of safetensors files by canonical name.

use std::collections::BTreeMap;
use std::sync::Arc;

use tune_quant::{RowOrder, StoredMatrix};

use super::{config::HfConfig, names};
use crate::safetensors::SafetensorsFiles;
use crate::weights::{check, expected_tensors};
use crate::{FormatError, Weights};

/// Weights of a Hugging Face checkpoint, used in place.
pub struct HfWeights {
    files: Arc<SafetensorsFiles>,
    /// Canonical name → name in the files.
    stored: BTreeMap<String, String>,
}

impl HfWeights {
    /// Finds every tensor of `config`; where the configuration does not say whether the head is tied, a missing
    /// `lm_head.weight` does.
    ///
    /// # Errors
    /// All tensors that are missing, unexpected, of the wrong shape or of an unsupported type.
    pub(super) fn new(files: Arc<SafetensorsFiles>, config: &mut HfConfig) -> Result<Self, FormatError> {
        let mut stored = files
            .tensors()
            .keys()
            .filter_map(|name| Some((names::canonical(name)?, name.clone())))
            .collect::<BTreeMap<_, _>>();
        if !config.says_whether_tied {
            config.model.tie_word_embeddings = !stored.contains_key("lm_head.weight");
        }
        if config.model.tie_word_embeddings {
            // Some tied checkpoints hold the head as well; it is never used.
            stored.remove("lm_head.weight");
        }
        let shapes =
            stored.iter().map(|(name, stored)| (name.as_str(), files.tensors()[stored].shape.as_slice()));
        let problems = check(&config.model, shapes);
        if !problems.is_empty() {
            return Err(FormatError::Tensors { path: files.path().to_owned(), problems });
        }
        let unsupported = expected_tensors(&config.model)
            .into_iter()
            .map(|(name, _)| (&files.tensors()[&stored[&name]], name))
            .filter(|(entry, _)| entry.block_type().is_none())
            .map(|(entry, name)| format!("{name}: {:?}", entry.dtype))
            .collect::<Vec<_>>();
        if unsupported.is_empty() {
            Ok(Self { files, stored })
        } else {
            let supported = "F32, F16, BF16".to_owned();
            Err(FormatError::UnsupportedTypes {
                path: files.path().to_owned(),
                tensors: unsupported,
                supported,
            })
        }
    }

    fn find(&self, name: &str, dims: usize) -> Result<(&str, &[usize]), FormatError> {
        let stored =
            self.stored.get(name).ok_or_else(|| FormatError::tensor(name, "the model has no such tensor"))?;
        let shape = self.files.tensors()[stored].shape.as_slice();
        if shape.len() == dims {
            Ok((stored, shape))
        } else {
            Err(FormatError::tensor(name, format!("has shape {shape:?}, expected {dims} dimensions")))
        }
    }
}

impl Weights for HfWeights {
    fn names(&self) -> Vec<String> {
        self.stored.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.files.tensors()[self.stored.get(name)?].shape.clone())
    }

    fn matrix(&self, name: &str) -> Result<StoredMatrix, FormatError> {
        let (stored, shape) = self.find(name, 2)?;
        let (block_type, bytes) = self.files.data(stored)?;
        StoredMatrix::from_blocks(block_type, shape[0], shape[1], bytes, RowOrder::Natural)
            .ok_or_else(|| FormatError::tensor(name, "its bytes do not fill its rows"))
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, FormatError> {
        let (stored, shape) = self.find(name, 1)?;
        let (block_type, bytes) = self.files.data(stored)?;
        let mut values = vec![0.0; shape[0]];
        block_type.decode(&bytes, &mut values);
        Ok(values)
    }
}
