//! A base model opened for reading: configuration, tokenizer files and weights by Hugging Face name.

use tune_quant::StoredMatrix;

use crate::ModelConfig;

/// Weights by Hugging Face name (`model.layers.0.self_attn.q_proj.weight`), in the Hugging Face layout,
/// memory-mapped and never copied as a whole.
pub trait Weights: Send + Sync {
    /// All names, sorted.
    fn names(&self) -> Vec<String>;
    /// Shape in Hugging Face (row-major) order, or `None` when there is no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// A two-dimensional weight in its stored form.
    fn matrix(&self, name: &str) -> Result<StoredMatrix, crate::FormatError>;
    /// A one-dimensional weight (norms, biases), decoded.
    fn vector(&self, name: &str) -> Result<Vec<f32>, crate::FormatError>;
}

/// A base model opened for reading.
pub struct BaseModel {
    /// Hyper-parameters.
    pub config: ModelConfig,
    /// The weights.
    pub weights: Box<dyn Weights>,
}
