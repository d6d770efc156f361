//! Weights of a GGUF file by Hugging Face name.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use tune_quant::{RowOrder, StoredMatrix};

use super::{GgufFile, TensorInfo, names};
use crate::weights::check;
use crate::{FormatError, ModelConfig, TensorProblem, Weights};

/// Weights of a GGUF file under Hugging Face names, used in place: blocks stay as stored and rows that the file
/// permutes are addressed, not copied.
pub struct GgufWeights {
    file: Arc<GgufFile>,
    tensors: BTreeMap<String, Part>,
}

/// A Hugging Face tensor inside a GGUF tensor.
struct Part {
    tensor: TensorInfo,
    /// All rows of the tensor, or q, k or v of a fused one.
    rows: Range<usize>,
    shape: Vec<usize>,
    order: RowOrder,
}

impl GgufWeights {
    /// Finds every tensor of `config` in `file`.
    ///
    /// # Errors
    /// All tensors that are missing, unexpected or of the wrong shape.
    pub fn new(file: Arc<GgufFile>, config: &ModelConfig) -> Result<Self, FormatError> {
        let mut tensors = BTreeMap::new();
        let mut problems = Vec::new();
        for tensor in file.tensors() {
            if let Some(name) = names::to_hf(config.architecture, &tensor.name) {
                let (rows, shape) = (0..tensor.rows(), tensor.shape());
                let order = names::row_order(config, &name);
                tensors.insert(name, Part { tensor: tensor.clone(), rows, shape, order });
            } else if let Some(parts) = fused_qkv(tensor, config) {
                tensors.extend(parts);
            } else if tensor.name != "rope_freqs.weight" {
                let name = tensor.name.clone();
                problems.push(TensorProblem { name, expected: None, found: Some(tensor.shape()) });
            }
        }
        let shapes = tensors.iter().map(|(name, part)| (name.as_str(), part.shape.as_slice()));
        problems.extend(check(config, shapes));
        if problems.is_empty() {
            return Ok(Self { file, tensors });
        }
        for problem in &mut problems {
            if let Some(name) = names::to_gguf(config.architecture, &problem.name) {
                problem.name = name;
            }
        }
        Err(FormatError::Tensors { path: file.path().to_owned(), problems })
    }

    fn part(&self, name: &str, dims: usize) -> Result<&Part, FormatError> {
        let part = self
            .tensors
            .get(name)
            .ok_or_else(|| FormatError::tensor(name, "the model has no such tensor"))?;
        if part.shape.len() == dims {
            Ok(part)
        } else {
            Err(FormatError::tensor(name, format!("has shape {:?}, expected {dims} dimensions", part.shape)))
        }
    }
}

impl Weights for GgufWeights {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|part| part.shape.clone())
    }

    fn matrix(&self, name: &str) -> Result<StoredMatrix, FormatError> {
        let part = self.part(name, 2)?;
        let bytes = self.file.rows(&part.tensor, part.rows.clone())?;
        StoredMatrix::from_blocks(part.tensor.block_type, part.shape[0], part.shape[1], bytes, part.order)
            .ok_or_else(|| FormatError::tensor(name, "its bytes do not fill its rows"))
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, FormatError> {
        let part = self.part(name, 1)?;
        let (bytes, range) = if part.shape[0] == part.tensor.elements() {
            (self.file.data(&part.tensor)?, 0..part.shape[0])
        } else {
            (self.file.data(&part.tensor)?, part.rows.clone())
        };
        let mut stored = vec![0.0; part.tensor.elements()];
        part.tensor.block_type.decode(&bytes, &mut stored);
        let stored = &stored[range];
        Ok((0..stored.len()).map(|row| stored[part.order.stored_row(row)]).collect())
    }
}

/// q, k and v of a fused `attn_qkv` tensor, whose rows lie in this order.
fn fused_qkv(tensor: &TensorInfo, config: &ModelConfig) -> Option<Vec<(String, Part)>> {
    let (layer, suffix) = tensor.name.strip_prefix("blk.")?.split_once(".attn_qkv.")?;
    let layer: usize = layer.parse().ok()?;
    let shape = tensor.shape();
    let (q, kv) =
        (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    if shape[0] != q + 2 * kv || !matches!((suffix, shape.len()), ("weight", 2) | ("bias", 1)) {
        return None;
    }
    let parts = [("q_proj", 0..q), ("k_proj", q..q + kv), ("v_proj", q + kv..q + 2 * kv)];
    let parts = parts.map(|(part, rows)| {
        let name = format!("{}.{suffix}", ModelConfig::linear_path(layer, part));
        let mut shape = shape.clone();
        shape[0] = rows.len();
        let order = names::row_order(config, &name);
        (name, Part { tensor: tensor.clone(), rows, shape, order })
    });
    Some(parts.into())
}
