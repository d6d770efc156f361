//! Frozen weights and the operations with hand-written backward, one file per operation.
//!
//! Everything is `[tokens, features]` in `f32`: there is no batch dimension, and a document is a range of the
//! token axis. Each operation file gives the equation, the shapes and what is saved for backward; it holds
//!
//! - the public function on [`burn::tensor::Tensor`], which checks shapes (wrong shapes are programmer errors
//!   and panic with both shapes),
//! - `reference`, the same function in plain tensor operations, which is what the tests compare with,
//! - the forward and backward kernels of the CPU backend on plain slices, and
//! - the node that the operation adds to the autodiff graph.
//!
//! All operations take tensors of a plain device or of an autodiff device. What is frozen is never a tensor
//! ([`FrozenWeight`], [`FrozenVector`], [`RotaryTable`]), so it serves both kinds and is shared, not copied. What may
//! be frozen or trained is a [`Weight`] or a [`Vector`].
//! Results are the same bits with any number of threads: every sum has a fixed order.

mod adamw;
pub mod adamw_8bit;
mod cpu;
mod embedding;
mod frozen;
mod graph_ends;

pub mod attention;
pub mod bf16;
pub mod frozen_linear;
pub mod linear_cross_entropy;
pub mod lora_linear;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
mod weight;

#[cfg(test)]
mod determinism;
#[cfg(test)]
mod testing;

/// In what the factors of matrix products are multiplied. Sums are always `f32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Arithmetic {
    /// Everything in `f32`.
    #[default]
    F32,
    /// Factors rounded to `bf16`.
    Bf16,
}

pub use adamw::{AdamWFactors, adamw, sum_of_squares};
pub use adamw_8bit::{Moments8bit, adamw_8bit};
pub use attention::{AttentionSpan, causal_attention};
pub use cpu::on_pool;
pub use embedding::{add_embedding_gradient, embedding};
pub use frozen::{FrozenVector, FrozenWeight};
pub use frozen_linear::frozen_linear;
pub use graph_ends::{alias, seed_gradient};
pub use linear_cross_entropy::{linear_cross_entropy, token_losses};
pub use lora_linear::lora_linear;
pub use rms_norm::rms_norm;
pub use rope::{RotaryTable, rope};
pub use swiglu::swiglu;
pub use weight::{Vector, Weight};
