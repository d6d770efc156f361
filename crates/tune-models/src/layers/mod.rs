//! The layers that families share.

mod kv_cache;
mod linear;
mod rms_norm;
mod rope;

pub use kv_cache::KvCache;
pub use linear::Linear;
pub use rms_norm::RmsNorm;
pub(crate) use rope::rotary_frequencies;

use std::sync::Arc;

use tune_adapters::Dropout;
use tune_kernels::{Arithmetic, AttentionSpan, RotaryTable};

/// What every block of one forward pass needs besides its input.
#[derive(Clone)]
pub struct Context {
    /// Rotation of each token.
    pub rotary: RotaryTable,
    /// Which keys each query sees.
    pub spans: Arc<[AttentionSpan]>,
    /// Dropout of the adapters, while training.
    pub dropout: Option<Dropout>,
    /// In what matrix products are made.
    pub arithmetic: Arithmetic,
}
