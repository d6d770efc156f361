//! Model families built from shared layers.
//!
//! A family is one file that reads top to bottom like its paper; what families share lives once in
//! [`layers`]. Models work on one token axis without a batch dimension: the documents of a micro-batch lie
//! one after the other, and attention stays inside each ([`Layout`]).

mod error;
mod layers;
mod layout;
mod llama;
mod trained_weights;

pub use error::ModelError;
pub use layers::{Context, KvCache, Linear, RmsNorm};
pub use layout::Layout;
pub use llama::{AdapterSlot, Block, Llama, Output, Parameter};
pub use trained_weights::TrainedWeights;

use burn::tensor::Device;
use tune_formats::{Architecture, BaseModel};

/// How frozen linear layers are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Quantization {
    /// As stored in the file.
    #[default]
    Keep,
    /// Quantised to NF4 with double quantisation while loading. Weights that are quantised in the file
    /// already are kept as stored.
    Nf4,
}

/// Builds the model of `base` on `device`; the weights stay in their memory-mapped file.
pub fn load(base: &BaseModel, quantization: Quantization, device: &Device) -> Result<Llama, ModelError> {
    match base.config.architecture {
        Architecture::Llama => Llama::load(&base.config, &*base.weights, quantization, device),
    }
}
